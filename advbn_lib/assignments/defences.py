"""Three defences of assignment 3. Each looks robust against a plain attack, and none is.

Why they look so, and how to show that they are not, is what the assignment asks. The patterns are those that Athalye et al.,
"Obfuscated Gradients Give a False Sense of Security" (ICML 2018), and Tramer et al., "On Adaptive Attacks to Adversarial
Example Defenses" (NeurIPS 2020), found in published defences; these three are made up for teaching.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from advbn_lib.assignments.small_digits import CLASSES, small_digits, small_network, trained_network

KINDS = ("confident", "rounded", "experts")
SHOWN_IMAGES = 100  # the first test images are for the notebook; grading takes others
REASONS = {
    "the loss saturates": "the softmax is so sure that the cross-entropy's gradient is 0 in floating point",
    "a step function": "a part is constant almost everywhere, so its gradient is 0",
    "a detached part": "what decides is computed without a gradient, and only the rest is seen by the attack",
    "a smaller radius": "the images are shrunk, so that an attack within the radius is weaker",
    "adversarial training": "the network has been trained on attacks and really is robust",
    "the attack's step is too long": "the attack jumps over the adversarial images",
}


class Defence(nn.Module):
    """Images in [0,1] (N,1,8,8) to logits (N,10).

    Attributes:
        network: the classifier within.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network


class Confident(Defence):
    """A network that is very sure of its answers."""

    scale = 1e4

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.network(images)


class Rounded(Defence):
    """The image is rounded to four grey levels, with a little noise so that nobody knows which way a pixel goes."""

    levels = 3
    noise = 0.6

    def __init__(self, network: nn.Module, seed: int = 0):
        super().__init__(network)
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor) -> Tensor:
        draw = torch.rand(images.shape, generator=self.generator, dtype=images.dtype) - 0.5
        return self.network((self.levels * images + self.noise * draw).round().clamp(0, self.levels) / self.levels)


class Experts(Defence):
    """Ten experts, one for each digit, and a network that predicts how much each of them has to say about this image.

    Attributes:
        experts: ten small votes on each image.
    """

    sharpness = 5.0

    def __init__(self, network: nn.Module, experts: nn.Module):
        super().__init__(network)
        self.experts = experts

    def forward(self, images: Tensor) -> Tensor:
        weights = (self.sharpness * self.network(images)).softmax(1).detach()
        votes = 2 * torch.eye(CLASSES) + 0.1 * self.experts(images)[:, None, :].tanh()
        return 3 * (weights[:, :, None] * votes).sum(1)


def build_defence(kind: str, weights: Mapping[str, Tensor], seed: int = 0) -> Defence:
    """A defence with trained weights, in eval mode; ``seed`` is of its random numbers, if it has any.

    Raises:
        ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"a defence is one of {', '.join(KINDS)}, got {kind!r}")
    network = small_network(0)
    defence = {
        "confident": lambda: Confident(network),
        "rounded": lambda: Rounded(network, seed),
        "experts": lambda: Experts(network, small_network(7)),
    }[kind]()
    defence.network.load_state_dict(dict(weights))
    return defence.eval().requires_grad_(False)


def weights_of(kind: str, seed: int) -> dict[str, Tensor]:
    """The trained weights of a defence; a few seconds the first time."""
    return {name: value.clone() for name, value in _trained(seed, 0.15 if kind == "rounded" else 0.0).items()}


@lru_cache(maxsize=8)
def _trained(seed: int, noise: float) -> dict[str, Tensor]:
    return trained_network(seed, noise).state_dict()


def make_defence(kind: str, seed: int = 0, draws: int = 0) -> Defence:
    """A defence as the checks use it, and the notebook: ``kind`` is one of ``KINDS``; ``seed`` of its training."""
    return build_defence(kind, weights_of(kind, seed), draws)


def shown_images(count: int = SHOWN_IMAGES) -> tuple[Tensor, Tensor]:
    """Test images (N,1,8,8) in [0,1] and labels for the notebook."""
    images, labels = small_digits("test")
    return images[: min(count, SHOWN_IMAGES)], labels[: min(count, SHOWN_IMAGES)]
