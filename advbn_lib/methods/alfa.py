"""L-ALFA: A-FAN at several layers, with learnt strengths.

Source: the learnable variant of the released A-FAN code (github.com/VITA-Group/CV_A-FAN, ``main_learnable.py``), which
goes back to "ALFA: Adversarial Feature Augmentation for Enhanced Image Recognition" by the same group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from advbn_lib.methods.afan import AFAN, Site
from advbn_lib.methods.base import Losses
from advbn_lib.models.cifar_resnet import CifarResNet
from advbn_lib.tasks.base import Task

RESNET56 = (
    "relu", "layer1.3", "layer1.6", "layer2.0", "layer2.4", "layer2.7", "layer3.1", "layer3.5", "layer3.8",
)  # fmt: skip


@dataclass(frozen=True)
class Strengths:
    """How the strengths of the layers are learnt. The defaults are the released ones.

    Args:
        penalty: factor of the l1 norm of the strengths in the loss, at least 0. While all strengths are above 0 it
            pushes each of them alike, and keeping their sum at 1 takes that back: it does nothing. It lifts negative
            ones, at the cost of the others.
        lr, momentum: of their own SGD, which has no weight decay.
    """

    penalty: float = 1.0
    lr: float = 0.01
    momentum: float = 0.9

    def __post_init__(self):
        if not self.penalty >= 0 or not self.lr >= 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"penalty and lr must be at least 0 and momentum from 0 to below 1, "
                f"got {self.penalty}, {self.lr}, {self.momentum}"
            )


class LearnableAFAN(AFAN):
    """A-FAN at n layers, each with a strength w_i for its change; the strengths are learnt beside the weights.

    The loss is ``clean_weight`` times the clean cross-entropy, plus ``weight`` times the mean over the layers of the
    cross-entropy of ``f_i + w_i (a_i - f_i)``, plus ``penalty`` times the l1 norm of w. Here f_i is the clean feature
    and a_i the adversarial one. The strengths start at 1/n. Each backward pass of the loss ends with a step of their
    own SGD *down* the loss (they are no adversary), after which all move by the same amount so that they sum to 1. One
    may become negative.

    Args:
        task, clean_weight, attack_mode: see :class:`~advbn_lib.methods.afan.AFAN`.
        layers: where features are changed, each once. The default is the released choice for ResNet-56; for another
            depth see :func:`spread_positions`.
        gamma, steps: of the ascent at each layer, as in :class:`~advbn_lib.methods.afan.Site`.
        weight: of the changed features' mean loss.
        strengths: how w is learnt.

    Attributes:
        w: the strengths (n,), a buffer: no part of :meth:`trainable_parameters`, but of the state dict.
        momentum: of their SGD (n,), a buffer.

    Raises:
        ValueError: a layer that the model does not have, that stands twice, or none.
    """

    def __init__(
        self, task: Task, layers: Sequence[str] = RESNET56, gamma: float = 1.0, steps: int = 3,
        clean_weight: float = 0.5, weight: float = 0.5, strengths: Strengths = Strengths(),
        attack_mode: Literal["train", "eval"] = "train",
    ):  # fmt: skip
        if len(set(layers)) < len(layers):
            raise ValueError(f"each layer has one strength: name it once, got {', '.join(layers)}")
        super().__init__(task, [Site(layer, gamma, steps) for layer in layers], clean_weight, attack_mode)
        self.weight, self.strengths = weight, strengths
        example = next(self.model.parameters())
        count = len(self.sites)
        self.register_buffer("w", torch.full((count,), 1 / count, device=example.device))
        self.register_buffer("momentum", torch.zeros(count, device=example.device))

    def forward(self, inputs: Any, targets: Any) -> Losses:
        """The losses; the backward pass of their total takes a step of the strengths."""
        device = self.w.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError(
                "in float16 the loss is scaled, and the strengths' step would be too: "
                "train in float32 (precision=torch.float32)"
            )
        w = self._leaf()
        changed = torch.zeros((), device=self.w.device, dtype=self.w.dtype)
        for strength, site in zip(w, self.sites):
            cut = self.task.cut(inputs, targets, site.layer)
            features = cut.features + strength * (self.change(cut, site) - cut.features)
            changed = changed + cut.loss(features).mean() / len(self.sites)
        clean = self.task.loss(inputs, targets)  # last, as in A-FAN
        total = self.clean_weight * clean + self.weight * changed + self.strengths.penalty * w.abs().sum()
        return Losses(total, clean, changed)

    def _leaf(self) -> Tensor:
        """The strengths as a variable of this batch's graph, which steps them when its gradient is complete.

        The training loop has one optimiser, with one learning rate, for the weights. A new variable each time, rather
        than a parameter with a hook, because a copy of a module does not take its hooks along.
        """
        w = self.w.detach().clone().requires_grad_()
        if torch.is_grad_enabled():
            w.register_post_accumulate_grad_hook(lambda leaf: self._step(leaf.grad))
        return w

    @torch.no_grad()
    def _step(self, gradient: Tensor) -> None:
        self.momentum.mul_(self.strengths.momentum).add_(gradient)
        self.w.sub_(self.momentum, alpha=self.strengths.lr)
        self.w.sub_((self.w.sum() - 1) / len(self.w))


def spread_positions(model: CifarResNet, count: int = 9) -> tuple[str, ...]:
    """``count`` layers of a CIFAR ResNet in even steps from the stem's ReLU to the last block, both included.

    For a ResNet-56 and 9 these are the released positions.

    Raises:
        ValueError: fewer than 2, or more than the network has blocks and stem.
    """
    stages = {name: getattr(model, name) for name in ("layer1", "layer2", "layer3")}
    names = ["relu", *(f"{name}.{block}" for name, blocks in stages.items() for block in range(len(blocks)))]
    if not 2 <= count <= len(names):
        raise ValueError(f"this network has {len(names)} positions: take 2 to {len(names)} of them, got {count}")
    steps = count - 1
    # Rounded down after adding 2/3: the rounding that gives the released positions.
    return tuple(names[(3 * (len(names) - 1) * i + 2 * steps) // (3 * steps)] for i in range(count))
