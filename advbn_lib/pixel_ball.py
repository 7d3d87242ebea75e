"""The set of image-level adversaries: any change of the pixels, none by more than eps.

Source: the l-infinity threat model of Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks"
(ICLR 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advbn_lib.perturbations import Delta

TOLERANCE = 1e-3  # normalising and back in float32 is off by far less; images in other units are off by far more


@dataclass(frozen=True)
class PixelBall:
    """The l-infinity ball of radius ``eps`` around an image, cut to the pixels that an image can have.

    It is applied to normalised images (N,C,H,W), as a network sees them. A delta is one tensor of that shape, in pixel
    units: 0 is black and 1 is white, so that ``eps``, the ascent's step size and the delta are in the same unit
    whatever the normalisation.

    Args:
        eps: radius in [0,1] units, e.g. 4/255; from 0 to 1.
        mean, std: of each channel, in [0,1] units: what the images were normalised with. (0,), (1,) for images in
            [0,1].

    Raises:
        ValueError: eps is out of its range, or mean and std do not fit each other.
    """

    eps: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        if self.eps > 1:
            raise ValueError(f"eps is in [0,1] units, and {self.eps} looks like 0..255 units: give {self.eps:g} / 255")
        if not self.eps >= 0:
            raise ValueError(f"eps must be from 0 to 1, in [0,1] units, got {self.eps}")
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise ValueError(f"mean and std need a value for each channel, std above 0, got {self.mean} and {self.std}")

    @property
    def per_sample(self) -> bool:
        return True

    def start(self, x: Tensor) -> Delta:
        """No change.

        Raises:
            ValueError: these images were not normalised with ``mean`` and ``std``: some pixels are out of [0,1].
        """
        self._check(x)
        return (torch.zeros_like(x),)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta:
        """Uniform noise from the ball, cut where the image would leave [0,1].

        Raises:
            ValueError: as :meth:`start`.
        """
        self._check(x)
        draw = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self.project(x, ((2 * draw - 1) * self.eps,))

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        return x + delta[0] / self._channels(self.std, x)

    def project(self, x: Tensor, delta: Delta) -> Delta:
        # Rounding can put a black or white pixel just outside [0,1]. "No change" stays in the set: 0 is never cut off.
        pixels = self.pixels(x)
        lowest, highest = (-pixels).clamp(-self.eps, 0), (1 - pixels).clamp(0, self.eps)
        return (torch.maximum(lowest, torch.minimum(delta[0], highest)),)

    def pixels(self, x: Tensor) -> Tensor:
        """Normalised images back in [0,1] units."""
        return x * self._channels(self.std, x) + self._channels(self.mean, x)

    def _channels(self, values: tuple[float, ...], x: Tensor) -> Tensor:
        return torch.tensor(values, device=x.device, dtype=x.dtype).view(-1, 1, 1)

    def _check(self, x: Tensor) -> None:
        low, high = torch.stack(self.pixels(x).aminmax()).tolist()
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            raise ValueError(
                f"with this mean and std the pixels go from {low:.3g} to {high:.3g}, not from 0 to 1: "
                "give the mean and std that these images were normalised with"
            )
