"""Shifted test sets: what a classifier meets that it was not trained on.

Two kinds: the corruptions of CIFAR-10-C (:mod:`advbn_lib.data.corruptions`), computed here on the device, and changes of style
(:mod:`advbn_lib.data.styles`). A shift maps images in [0,1] (N,3,H,W) to images in [0,1], cut down to whole grey levels as the
released generator of CIFAR-10-C does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from advbn_lib.data.corruptions import CORRUPTIONS, EXTRA
from advbn_lib.data.styles import STYLE_FAMILIES, STYLES
from advbn_lib.data.styles import WITHOUT_SEVERITY as STYLES_WITHOUT_SEVERITY


def _unchanged(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    return x


SHIFTS: dict[str, Callable[[Tensor, int, torch.Generator | None], Tensor]] = {
    "clean": _unchanged,
    **CORRUPTIONS,
    **EXTRA,
    **STYLES,
}
WITHOUT_SEVERITY = ("clean", *STYLES_WITHOUT_SEVERITY)

# A family's figure is the mean over its members; `corruptions` are the fifteen of CIFAR-10-C, whose four groups follow.
FAMILIES: dict[str, tuple[str, ...]] = {
    "corruptions": tuple(CORRUPTIONS),
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "style": tuple(STYLES),
    **STYLE_FAMILIES,
    "domains": ("art_painting", "cartoon", "sketch"),  # of PACS: other test sets, no shifts of one
}


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
