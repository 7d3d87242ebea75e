"""A-FAN: worst-case feature maps as augmentation, and their statistics re-injected into the clean ones.

Source: Chen, Cheng, Gan, Wang, Wang, Wang, Liu, "Adversarial Feature Augmentation and Normalization for Visual Recognition",
TMLR 2022 (arXiv 2103.12171); released code github.com/VITA-Group/CV_A-FAN. Its aim is accuracy on clean images.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from advbn_lib.ascent import Ascended, Steps, ascend
from advbn_lib.feature_ball import FeatureBall
from advbn_lib.methods.base import Losses, Method
from advbn_lib.modes import evaluating
from advbn_lib.statistics import BATCH, POSITION, mean, renormalise, std
from advbn_lib.tasks.base import Cut, Task

UNIT = 1 / 255  # the released code's unit of change. Features are no pixels: it is a habit, not a grey level.


@dataclass(frozen=True)
class Site:
    """Where A-FAN perturbs, how far, and what it trains on there. The defaults are those released for CIFAR-10.

    Args:
        layer: whose output is perturbed.
        gamma: length of a step of the ascent, in 1/255 of the features' unit, above 0.
        steps: of the ascent, at least 1.
        points: how many points on the way from the clean feature (point 0, which is not trained on again) to the adversarial
            one (the last), at least 2.
        mix: one digit for each point but the clean one, weakest first: 1 where the point's statistics are re-injected into the
            clean feature, 0 where the point itself is used; ``"0011"`` for the stronger half of five. Empty: no 1.
        over: what the re-injected statistics are taken over: ``"channels"``, at each position, as in the released code, or
            ``"batch"`` (N,H,W), as the paper's abstract can be read.
        weight: of the loss at each of these points, above 0.
        eps: radius of the ball that each step is projected into, in 1/255; None: not projected, as in the released settings.
        random_start: begin at a random point of that ball. (The released code can also start at random without projecting.)
    """

    layer: str
    gamma: float = 0.5
    steps: int = 5
    points: int = 2
    mix: str = ""
    over: Literal["channels", "batch"] = "channels"
    weight: float = 0.5
    eps: float | None = None
    random_start: bool = False

    def __post_init__(self):
        if self.points < 2:
            raise ValueError(f"points counts the clean and the adversarial feature: at least 2, got {self.points}")
        if not self.weight > 0:
            raise ValueError(f"weight must be above 0, got {self.weight}")
        if self.mix and (len(self.mix) != self.points - 1 or set(self.mix) - set("01")):
            raise ValueError(
                f"mix needs a 0 or 1 for each of the {self.points - 1} points after the clean one, got {self.mix!r}"
            )
        if self.over not in ("channels", "batch"):
            raise ValueError(f"over is 'channels' or 'batch', got {self.over!r}")
        if self.random_start and self.eps is None:
            raise ValueError("a random start is drawn from a ball: give eps, in 1/255")
        _ = self.ball, self.climb  # they refuse a bad eps, gamma or number of steps

    @property
    def ball(self) -> FeatureBall:
        """The set that the ascent walks in."""
        return FeatureBall(None if self.eps is None else self.eps * UNIT)

    @property
    def climb(self) -> Steps:
        """How it walks."""
        return Steps(self.steps, self.gamma * UNIT, random_start=self.random_start)

    @property
    def reach(self) -> float:
        """The farthest that an entry can get from the clean feature, in the features' unit."""
        steps = self.steps * self.gamma
        far = steps if self.eps is None else min(self.eps, steps + self.random_start * self.eps)
        return far * UNIT

    def path(self, clean: Tensor, adversarial: Tensor) -> Iterator[Tensor]:
        """The features to train on, from the weakest to the strongest: points on the way, mixed where ``mix`` says so."""
        axes = POSITION if self.over == "channels" else BATCH[: clean.dim() - 1]
        digits = self.mix or "0" * (self.points - 1)
        for point, digit in zip(interpolate(clean, adversarial, self.points)[1:], digits):
            yield reinject(clean, point, axes) if digit == "1" else point


def even_weight(points: int) -> float:
    """Of the loss at each point after the clean one, if half of the whole is for the clean images and the points share the rest."""
    return 0.5 / (points - 1)


def interpolate(clean: Tensor, adversarial: Tensor, points: int) -> Tensor:
    """``points`` features (points,N,...) in equal steps from ``clean`` to ``adversarial``, both included."""
    share = torch.linspace(0, 1, points, device=clean.device, dtype=clean.dtype)
    return clean + share.view(-1, *[1] * clean.dim()) * (adversarial - clean)


def reinject(clean: Tensor, other: Tensor, axes: tuple[int, ...] = POSITION, eps: float = 1e-5) -> Tensor:
    """``clean`` with the means and standard deviations that ``other`` has over ``axes``: AdaIN's formula over other axes."""
    return renormalise(clean, mean(other, axes), std(other, axes, eps), axes, eps)


class FeatureAugmentation(Method):
    """Training on clean inputs and on changed features at some sites; a subclass says how they are changed.

    The changed features carry the original targets. They have no graph, so their losses train the layers above the site only.

    Args:
        task: the model and its loss; see :mod:`advbn_lib.tasks`.
        sites: where features are changed.
        clean_weight: of the loss of the unchanged inputs.

    Raises:
        ValueError: there is no site, or a layer that the model does not have.
    """

    def __init__(self, task: Task, sites: Sequence[Site], clean_weight: float = 0.5):
        super().__init__(task.model)
        if not sites:
            raise ValueError("name at least one site to change features at")
        for site in sites:
            task.check(site.layer)
        self.task, self.sites, self.clean_weight = task, tuple(sites), clean_weight

    def change(self, cut: Cut, site: Site) -> Tensor:
        """The most changed feature of the site; same shape, no graph."""
        raise NotImplementedError(f"{type(self).__name__} must say how it changes features")

    def forward(self, inputs: Any, targets: Any) -> Losses:
        weighted, weights = 0.0, 0.0
        for site in self.sites:
            cut = self.task.cut(inputs, targets, site.layer)
            _check_precision(cut.features.device)
            for features in site.path(cut.features, self.change(cut, site)):
                weighted = weighted + site.weight * cut.loss(features).mean()
                weights += site.weight
        # The clean pass comes last, as in the released code for classification: running statistics lean on it.
        clean = self.task.loss(inputs, targets)
        return Losses(self.clean_weight * clean + weighted, clean, weighted / weights)


class AFAN(FeatureAugmentation):
    """Adversarial feature augmentation and normalisation.

    >>> method = AFAN(Classification(model), [Site("layer1")])        # doctest: +SKIP
    >>> losses = method(images, labels)                               # doctest: +SKIP
    >>> losses.total.backward()                                       # doctest: +SKIP

    Args:
        task, sites, clean_weight: see :class:`FeatureAugmentation`.
        attack_mode: the model's mode during the ascent. ``"train"``, as released: BatchNorm uses the batch and updates its
            running statistics at every step. ``"eval"``: the ascent leaves no trace.
    """

    def __init__(
        self, task: Task, sites: Sequence[Site], clean_weight: float = 0.5, attack_mode: Literal["train", "eval"] = "train"
    ):  # fmt: skip
        if attack_mode not in ("train", "eval"):
            raise ValueError(f"attack_mode is 'train' or 'eval', got {attack_mode!r}")
        super().__init__(task, sites, clean_weight)
        self.attack_mode = attack_mode

    def attack(self, cut: Cut, site: Site) -> Ascended:
        """The worst change of the features at a site: ``delta`` is one tensor of their shape."""
        with evaluating(self.model) if self.attack_mode == "eval" else nullcontext():
            return ascend(cut.loss, cut.features, site.ball, site.climb)

    def change(self, cut: Cut, site: Site) -> Tensor:
        return site.ball.apply(cut.features, self.attack(cut, site).delta)


def _check_precision(device: torch.device) -> None:
    if not torch.is_autocast_enabled(device.type):
        return
    dtype = torch.get_autocast_dtype(device.type)
    if dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"A-FAN's steps are about as small as what {str(dtype).removeprefix('torch.')} can tell apart: "
            "train it in float32 (precision=torch.float32)",
            stacklevel=4,
        )
