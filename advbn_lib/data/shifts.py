"""Shifted test sets: what a classifier meets that it was not trained on.

Sources: the corruptions are those of CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019; constants of the released
generator), computed here on the device. They are not the stored CIFAR-10-C files, whose pixels differ a little.

A shift maps images in [0,1] (N,3,H,W) to images in [0,1], cut down to whole grey levels as the released generator does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GAUSSIAN_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
DEFOCUS_BLUR = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))  # radius, smoothing
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Shift:
    """A change of the test images.

    Attributes:
        name: one of ``SHIFTS``.
        severity: 1 to 5, or 0 for a shift that has no degrees (``clean``, ``grey``).
    """

    name: str
    severity: int = 0

    def __post_init__(self):
        if self.name not in SHIFTS:
            raise ValueError(f"no shift {self.name!r}; there are {', '.join(SHIFTS)}")
        allowed = range(0, 1) if self.name in WITHOUT_SEVERITY else range(1, 6)
        if self.severity not in allowed:
            raise ValueError(f"{self.name} has severities {list(allowed)}, got {self.severity}")

    def __str__(self) -> str:
        return f"{self.name}-{self.severity}" if self.severity else self.name

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images in [0,1] (N,3,H,W), shifted. ``generator`` (on their device) makes the noise repeatable."""
        if self.name == "clean":
            return images
        shifted = SHIFTS[self.name](images, self.severity, generator).clamp(0, 1)
        # 1e-4 of a grey level: rounding in float32 must not push a whole level down.
        return (shifted * 255 + 1e-4).floor() / 255


def parse_shift(text: str) -> Shift:
    """``"contrast-3"`` or ``"grey"`` to a :class:`Shift`."""
    name, _, severity = text.partition("-")
    if severity and not severity.isdigit():
        raise ValueError(f"a shift is written NAME or NAME-SEVERITY, got {text!r}")
    return Shift(name, int(severity or 0))


def _gaussian_noise(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    return x + GAUSSIAN_NOISE[severity - 1] * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _brightness(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """HSV: V + c. Hue and saturation stay, so each pixel is scaled by new V / old V; a black one becomes grey."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + BRIGHTNESS[severity - 1]).clamp(0, 1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-8), brighter)


def _contrast(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * CONTRAST[severity - 1] + mean


def _defocus_blur(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    radius, smoothing = DEFOCUS_BLUR[severity - 1]
    kernel = _disk(radius, smoothing).to(x)
    reach = kernel.shape[0] // 2
    return F.conv2d(F.pad(x, [reach] * 4, mode="reflect"), kernel.expand(3, 1, -1, -1), groups=3)


def _grey(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    weights = torch.tensor(LUMA, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True).expand_as(x)


def _disk(radius: float, smoothing: float) -> Tensor:
    """A disk of this radius, smoothed by a 3x3 Gaussian; float64, sums to 1."""
    reach = int(radius) + 1  # the smoothing widens it by one pixel
    grid = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = ((grid[:, None] ** 2 + grid[None, :] ** 2) <= radius**2).double()
    disk = disk / disk.sum()
    bell = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / (2 * smoothing**2))
    bell = bell / bell.sum()
    return F.conv2d(disk[None, None], torch.outer(bell, bell)[None, None], padding=1)[0, 0]


SHIFTS: dict[str, Callable[[Tensor, int, torch.Generator | None], Tensor]] = {
    "clean": lambda x, severity, generator: x,
    "gaussian_noise": _gaussian_noise,
    "brightness": _brightness,
    "contrast": _contrast,
    "defocus_blur": _defocus_blur,
    "grey": _grey,
}
WITHOUT_SEVERITY = ("clean", "grey")

FAMILIES = {"corruptions": ("gaussian_noise", "brightness", "contrast", "defocus_blur"), "style": ("grey",)}
