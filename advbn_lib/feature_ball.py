"""A-FAN's set: any change of a feature map, each entry by itself.

Source: Chen et al., "Adversarial Feature Augmentation and Normalization for Visual Recognition", TMLR 2022; released code,
where each step of the ascent adds ``gamma / 255`` times the sign of the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advbn_lib.perturbations import Delta


@dataclass(frozen=True)
class FeatureBall:
    """The l-infinity ball of radius ``eps`` around a feature map (N,...); a delta is one tensor of its shape.

    Args:
        eps: radius, in units of the features, above 0. None: no bound, so that only the ascent's steps limit the change, as in
            the released settings.
    """

    eps: float | None = None

    def __post_init__(self):
        if self.eps is not None and not self.eps > 0:
            raise ValueError(f"eps must be above 0, or None for no bound, got {self.eps}")

    @property
    def per_sample(self) -> bool:
        return True

    def start(self, x: Tensor) -> Delta:
        return (torch.zeros_like(x),)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta:
        """Uniform noise from the ball.

        Raises:
            ValueError: the ball has no bound.
        """
        if self.eps is None:
            raise ValueError("a ball without a bound cannot be drawn from: give it an eps")
        draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return ((2 * draw - 1) * self.eps,)

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        return x + delta[0]

    def project(self, x: Tensor, delta: Delta) -> Delta:
        return delta if self.eps is None else (delta[0].clamp(-self.eps, self.eps),)
