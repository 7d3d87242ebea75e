"""Balls of pixel changes with a radius for each image, in the l-infinity or the l2 norm.

Source: the threat models of Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018).
:class:`~advbn_lib.pixel_ball.PixelBall` is the l-infinity ball with one radius for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advbn_lib.perturbations import Delta
from advbn_lib.pixel_ball import PixelBall

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, eq=False)
class PixelBalls:
    """The ball of each image's own radius around it, cut to the pixels that an image can have.

    It is applied to normalised images (N,C,H,W). A delta is one tensor of that shape **in units of the image's radius**: the
    pixels change by ``radius * delta``. So one step size, a share of the radius, serves a batch of different radii.

    Args:
        radii: for each image (N,), or one for all; in [0,1] units. l-inf: the farthest that a pixel may change, from 0 to 1.
            l2: the norm over all pixels of the change.
        mean, std: of each channel, in [0,1] units: what the images were normalised with. (0,), (1,) for images in [0,1].
        norm: ``"linf"`` or ``"l2"``.

    Raises:
        ValueError: a radius is negative, no number, or looks like 0..255 units; mean and std do not fit each other.
    """

    radii: Tensor | float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm: Norm = "linf"

    def __post_init__(self):
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm is 'linf' or 'l2', got {self.norm!r}")
        radii = torch.as_tensor(self.radii)
        if radii.dim() > 1 or not radii.numel():
            raise ValueError(f"radii is one number or one for each image (N,), got shape {tuple(radii.shape)}")
        low, high = torch.stack(radii.aminmax()).tolist()
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(f"a radius is 0 or more, in [0,1] units; these go from {low:g} to {high:g}")
        if self.norm == "linf" and high > 1:
            raise ValueError(
                f"radii are in [0,1] units, and {high:g} looks like 0..255 units: divide by 255 ({high:g} / 255)"
            )
        _ = self.pixels  # refuses a bad mean or std

    @property
    def pixels(self) -> PixelBall:
        """All that an image can become: it knows the normalisation, and its projection only cuts pixels to [0,1]."""
        return PixelBall(1.0, self.mean, self.std)

    @property
    def per_sample(self) -> bool:
        return True

    def start(self, x: Tensor) -> Delta:
        """No change.

        Raises:
            ValueError: there is not a radius for each image; the images were not normalised with ``mean`` and ``std`` (some
                pixels are out of [0,1]); an l2 radius looks like 0..255 units.
        """
        self._check(x)
        return self.pixels.start(x)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta:
        """A uniform draw from each ball, cut where the image would leave [0,1].

        In the l2 ball, too, it is uniform over the volume. With as many pixels as an image has, nearly all of that is close
        to the surface.

        Raises:
            ValueError: as :meth:`start`.
        """
        (zero,) = self.start(x)
        if self.norm == "linf":
            draw = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
        else:
            direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            share = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
            length = share ** (1 / zero[0].numel()) / _norms(direction).clamp_min(1e-12)
            draw = direction * _per_image(length)
        return self.project(x, (draw,))

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        return self.pixels.apply(x, (self._radii(x) * delta[0],))

    def project(self, x: Tensor, delta: Delta) -> Delta:
        """Back into the ball, then into the images.

        l-inf: to the nearest point of both. l2: the second step only shrinks a change, so the point stays in the ball; it need
        not be the nearest one (the customary projection).
        """
        (inside,) = delta
        if self.norm == "linf":
            inside = inside.clamp(-1, 1)
        else:
            inside = inside / _per_image(_norms(inside).clamp_min(1))
        ones = torch.ones_like(x)
        # A radius of 0 would make 0/0 of a black pixel; there any delta is no change.
        radii = self._radii(x).clamp_min(torch.finfo(x.dtype).tiny)
        (lowest,), (highest,) = self.pixels.project(x, (-ones,)), self.pixels.project(x, (ones,))
        return (torch.maximum(lowest / radii, torch.minimum(inside, highest / radii)),)

    def _radii(self, x: Tensor) -> Tensor:
        radii = torch.as_tensor(self.radii, device=x.device, dtype=x.dtype)
        return _per_image(radii.expand(len(x)))

    def _check(self, x: Tensor) -> None:
        radii = torch.as_tensor(self.radii)
        if radii.dim() == 1 and len(radii) != len(x):
            raise ValueError(f"{len(radii)} radii for {len(x)} images: give one for each, or one number for all")
        if self.norm == "l2":
            # Each pixel is at most 0.5 from mid-grey: from this radius on, every image can become the same grey.
            grey = 0.5 * x[0].numel() ** 0.5
            high = float(radii.max())
            if high >= grey:
                raise ValueError(
                    f"an l2 radius of {high:g} reaches from every image of this size to plain grey ({grey:.3g} is enough for that): "
                    f"it looks like 0..255 units; divide by 255 ({high:g} / 255)"
                )


def _norms(delta: Tensor) -> Tensor:
    return delta.flatten(1).norm(dim=1)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
