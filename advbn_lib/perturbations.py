"""The sets that the adversaries walk in.

A set says where "no change" is (``start``), how a point of it changes the input (``apply``), how to come back into it
(``project``), and how to draw from it at random (``sample``: the control without an adversary). A point ``delta`` is a tuple of
tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from advbn_lib.statistics import BATCH, INSTANCE, scale_statistics

Delta = tuple[Tensor, ...]


class Perturbation(Protocol):
    """What :func:`advbn_lib.ascent.ascend` needs of a set."""

    @property
    def per_sample(self) -> bool:
        """Whether each sample has a delta of its own (else the batch shares one)."""

    def start(self, x: Tensor) -> Delta: ...

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta: ...

    def apply(self, x: Tensor, delta: Delta) -> Tensor: ...

    def project(self, x: Tensor, delta: Delta) -> Delta: ...


@dataclass(frozen=True)
class ChannelStatistics:
    """AdvBN's set: factors in [1 - eps, 1 + eps] on each channel's mean and standard deviation.

    Source: Shu et al., NeurIPS 2021; released code, ``perturb``: a delta is ``(mean_factor, std_factor)``, each 1,C,1,1, shared
    by the whole batch. With the paper's eps of 1.1 a factor may become slightly negative.

    Args:
        eps: half width of the interval, above 0.
        clamp_at_zero: cut the changed features at 0, as the released code does where they come out of a ReLU.
        per_image: factors and moments per image (N,C,1,1), not per batch. Not in the paper; an ablation.
    """

    eps: float = 1.1
    clamp_at_zero: bool = True
    per_image: bool = False

    def __post_init__(self):
        if not self.eps > 0:
            raise ValueError(f"eps must be above 0, got {self.eps}; for no perturbation train without the adversary")

    @property
    def per_sample(self) -> bool:
        return self.per_image

    def start(self, x: Tensor) -> Delta:
        ones = x.new_ones(self._shape(x))
        return ones, ones.clone()

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta:
        """Factors drawn uniformly from the set: noise of the same size as the adversary's, without the adversary."""
        draws = [torch.rand(self._shape(x), generator=generator, device=x.device, dtype=x.dtype) for _ in range(2)]
        return tuple(1 + self.eps * (2 * draw - 1) for draw in draws)

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        changed = scale_statistics(x, *delta, axes=INSTANCE if self.per_image else BATCH)
        return changed.clamp_min(0) if self.clamp_at_zero else changed

    def project(self, x: Tensor, delta: Delta) -> Delta:
        return tuple(factor.clamp(1 - self.eps, 1 + self.eps) for factor in delta)

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0] if self.per_image else 1, x.shape[1], 1, 1)
