"""Where a perturbation set of assignment 4 is judged: trainings against it and against noise of the same size, and a test.

Everything here runs on the judge's side. A set is asked for values only: where to start, what a delta makes of the images, the
gradient in the delta, the projection. It never sees the network, the labels or the test images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.ascent import Steps, ascend
from advbn_lib.assignments.small_digits import optimiser, small_digits, small_network
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.modes import evaluating
from advbn_lib.perturbations import Delta, Perturbation

Arm = Literal["adversary", "noise", "clean"]


@dataclass(frozen=True)
class Arena:
    """How long and against what.

    Args:
        images: how many training images.
        epochs: passes over them.
        steps: of the ascent.
        width: of the network.
        test_images: how many test images.
    """

    images: int = 640
    epochs: int = 6
    steps: int = 3
    width: int = 16
    test_images: int = 300


@dataclass(frozen=True)
class Lamps:
    """The test: soft light and shadow laid over the image, as bad as it can be for this network.

    A delta is a coarse grid of brightness (N,1,3,3), made smooth and added; none is larger than ``strength``.
    """

    strength: float = 0.3
    grid: int = 3
    steps: int = 10

    @property
    def per_sample(self) -> bool:
        return True

    def start(self, x: Tensor) -> Delta:
        return (x.new_zeros(len(x), 1, self.grid, self.grid),)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta:
        shape = (len(x), 1, self.grid, self.grid)
        return ((2 * torch.rand(shape, generator=generator, dtype=x.dtype) - 1) * self.strength,)

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        light = F.interpolate(delta[0], size=x.shape[-2:], mode="bicubic", align_corners=True)
        return (x + light).clamp(0, 1)

    def project(self, x: Tensor, delta: Delta) -> Delta:
        return (delta[0].clamp(-self.strength, self.strength),)


def noise_as_large(perturbation: Perturbation, x: Tensor, delta: Delta, generator: torch.Generator) -> Delta:
    """Each number of ``delta`` as far from the start as it is, in a random direction: its size, and no adversary.

    So a set cannot tell by how far a delta goes whether it is the adversary's.
    """
    turned = []
    for start, found in zip(perturbation.start(x), delta):
        sign = torch.randint(0, 2, found.shape, generator=generator).to(found) * 2 - 1
        turned.append(start + sign * (found - start))
    return perturbation.project(x, tuple(turned))


def train_against(
    perturbation: Perturbation, step_size: float, arm: Arm, seed: int, arena: Arena = Arena()
) -> nn.Module:
    """A network trained on clean images and on perturbed ones, half and half; in eval mode.

    The arms see the same images in the same order from the same first weights. They differ in the perturbation alone.
    """
    images, labels = (part[: arena.images] for part in small_digits("train"))
    network, order = small_network(seed, arena.width), torch.Generator().manual_seed(seed)
    draws = torch.Generator().manual_seed(seed + 10**6)
    optimizer, steps = optimiser(network), Steps(arena.steps, step_size)
    for _ in range(arena.epochs):
        for chosen in torch.randperm(len(images), generator=order).split(64):
            x, y = images[chosen], labels[chosen]
            with evaluating(network):
                if arm != "clean":
                    delta = ascend(lambda z: cross_entropies(network(z), y), x, perturbation, steps).delta
                if arm == "noise":
                    delta = noise_as_large(perturbation, x, delta, draws)
                with torch.no_grad():
                    changed = x if arm == "clean" else perturbation.apply(x, delta)
            network.train()
            loss = F.cross_entropy(network(torch.cat([x, changed])), torch.cat([y, y]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def under_lamps(
    network: nn.Module, arena: Arena = Arena(), lamps: Lamps = Lamps(), shift: int = 0
) -> tuple[float, float]:
    """Shares of right answers on test images (from number ``shift`` on, in a circle): clean, and under the worst lamps found."""
    images, labels = (part.roll(-shift, 0)[: arena.test_images] for part in small_digits("test"))
    steps = Steps(lamps.steps, 2.5 * lamps.strength / lamps.steps)
    found = ascend(lambda z: cross_entropies(network(z), labels), images, lamps, steps)
    with torch.no_grad():
        return tuple(
            (network(x).argmax(1) == labels).float().mean().item() for x in (images, lamps.apply(images, found.delta))
        )


def gains(
    perturbation: Perturbation, step_size: float, seeds: tuple[int, ...], arena: Arena = Arena(), lamps: Lamps = Lamps(),
    shift: int = 0,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """For each seed: how much more the adversary helps under the lamps than noise as large, and the clean accuracy with it."""
    more, clean = [], []
    for seed in seeds:
        arms = [
            under_lamps(train_against(perturbation, step_size, arm, seed, arena), arena, lamps, shift)
            for arm in ("adversary", "noise")
        ]
        more.append(arms[0][1] - arms[1][1])
        clean.append(arms[0][0])
    return more, clean
