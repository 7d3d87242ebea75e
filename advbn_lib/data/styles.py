"""Shifts of style: the shapes stay, the colours and tones change.

Three families: changes of colour (grey, inverted, turned hues), photographic filters, and the palettes of paintings
(:mod:`advbn_lib.data.paintings`). The filters are our own, in the manner of those of photo applications, which
ImageNet-Instagram (Wu et al., "Recognizing Instagram Filtered Images with Feature De-stylization", arXiv 1912.13000)
tests with; they are not that set's filters. Each is a row of ``FILTERS``, made of the same few steps.

Every function here takes images in [0,1] (N,3,H,W) and gives images of the same shape, on their device; the caller
(:class:`advbn_lib.data.shifts.Shift`) cuts them to whole grey levels in range.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from advbn_lib.data.paintings import PAINTINGS, match_histogram, painting_histogram

ShiftFunction = Callable[[Tensor, int, torch.Generator | None], Tensor]
Colour = tuple[float, float, float]

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
HUE_DEGREES = (36, 72, 108, 144, 180)  # severity 5 gives the complementary colours
SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))  # W3C "Filter Effects", sepia(1)


def luma(x: Tensor) -> Tensor:
    """Brightness of each pixel as ITU-R BT.601 weighs the channels: N,3,H,W to N,1,H,W."""
    weights = torch.tensor(LUMA, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)


def rotate_hue(x: Tensor, degrees: float) -> Tensor:
    """HSV: the hue turned, saturation and value kept. Pure red turned by 120 degrees is pure green."""
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    red, green, blue = x.split(1, dim=1)
    # The hue in sixths of a turn, counted from the channel that is largest.
    sixths = torch.where(
        value == red, green - blue, torch.where(value == green, blue - red, red - green)
    ) / chroma.clamp_min(1e-8)
    sixths = sixths + torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0)) + degrees / 60
    # A channel is full within one sixth of its own hue (red 0, green 2, blue 4), and empty from two sixths on.
    own = torch.tensor([0.0, 2.0, 4.0], device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    away = (sixths - own + 3).remainder(6).sub(3).abs()
    return value - chroma * (away - 1).clamp(0, 1)


@dataclass(frozen=True)
class Layer:
    """A colour laid over the image.

    Attributes:
        blend: one of ``BLENDS``.
        colour: red, green, blue in [0,1]; None: the image's own grey.
        opacity: from 0 (no effect) to 1.
    """

    blend: str
    colour: Colour | None
    opacity: float = 1.0


@dataclass(frozen=True)
class Filter:
    """A photographic filter: the steps below, in this order. The defaults change nothing.

    Attributes:
        saturation: 0 is grey, 1 as it was, above 1 stronger colours.
        matrix: new red, green and blue as sums of the old ones, row by row.
        gamma: exponent of each channel; below 1 brightens.
        contrast: from 0 to 1, how much of an S-shaped curve (3x^2 - 2x^3); negative flattens.
        low, high: what 0 and 1 of each channel become.
        layers: colours laid over, the first one first.
        vignette: how much darker the corners become, from 0 to 1.
    """

    saturation: float = 1.0
    matrix: tuple[Colour, Colour, Colour] | None = None
    gamma: Colour = (1.0, 1.0, 1.0)
    contrast: float = 0.0
    low: Colour = (0.0, 0.0, 0.0)
    high: Colour = (1.0, 1.0, 1.0)
    layers: tuple[Layer, ...] = ()
    vignette: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Images in [0,1] (N,3,H,W), filtered; in [0,1]."""
        x = self._mix_channels(x).clamp(0, 1)
        x = self._tone(x)
        for layer in self.layers:
            over = luma(x).expand_as(x) if layer.colour is None else _per_channel(layer.colour, x).expand_as(x)
            x = torch.lerp(x, BLENDS[layer.blend](x, over), layer.opacity)
        return (x * vignette(x, self.vignette)).clamp(0, 1)

    def _mix_channels(self, x: Tensor) -> Tensor:
        if self.saturation != 1:
            x = torch.lerp(luma(x).expand_as(x), x, self.saturation)
        if self.matrix is not None:
            weights = torch.tensor(self.matrix, device=x.device, dtype=x.dtype).view(1, 3, 3, 1, 1)
            x = (x.unsqueeze(1) * weights).sum(2)  # not a matrix product: those may be rounded to fewer bits on a GPU
        return x

    def _tone(self, x: Tensor) -> Tensor:
        x = x.pow(_per_channel(self.gamma, x))
        x = torch.lerp(x, x * x * (3 - 2 * x), self.contrast)
        return torch.lerp(_per_channel(self.low, x), _per_channel(self.high, x), x)


def _per_channel(colour: Colour, x: Tensor) -> Tensor:
    return torch.tensor(colour, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)


def vignette(x: Tensor, strength: float) -> Tensor:
    """A factor for each position (1,1,H,W): 1 in the middle, 1 - strength in the corners, square in the distance."""
    squared = [
        torch.linspace(-1, 1, size, device=x.device, dtype=x.dtype).square().view(shape)
        for size, shape in ((x.shape[2], (1, 1, -1, 1)), (x.shape[3], (1, 1, 1, -1)))
    ]
    return 1 - strength * (squared[0] + squared[1]) / 2


def multiply(below: Tensor, above: Tensor) -> Tensor:
    """As two slides in one projector: never brighter than either."""
    return below * above


def screen(below: Tensor, above: Tensor) -> Tensor:
    """As two projectors on one screen: never darker than either."""
    return below + above - below * above


def overlay(below: Tensor, above: Tensor) -> Tensor:
    """Multiply where the lower one is dark, screen where it is light: more contrast."""
    return torch.where(below <= 0.5, multiply(above, 2 * below), screen(above, 2 * below - 1))


def soft_light(below: Tensor, above: Tensor) -> Tensor:
    """A gentle overlay, led by the upper one: above 0.5 brightens, below 0.5 darkens; black and white stay."""
    lifted = torch.where(below <= 0.25, ((16 * below - 12) * below + 4) * below, below.sqrt())
    darker, lighter = below * (1 - below), lifted - below
    return below + (2 * above - 1) * torch.where(above <= 0.5, darker, lighter)


# W3C "Compositing and Blending Level 1", section 10.1: separable blend modes, of the backdrop and the source.
BLENDS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multiply": multiply,
    "screen": screen,
    "overlay": overlay,
    "soft_light": soft_light,
}

FILTERS: Mapping[str, Filter] = {
    "sepia": Filter(matrix=SEPIA),
    "warm": Filter(gamma=(0.8, 1.0, 1.3), layers=(Layer("soft_light", (1.0, 0.65, 0.2), 0.5),)),
    "cool": Filter(saturation=0.8, gamma=(1.3, 1.0, 0.8), layers=(Layer("soft_light", (0.2, 0.5, 1.0), 0.5),)),
    "faded": Filter(saturation=0.6, low=(0.28, 0.25, 0.25), high=(0.95, 0.9, 0.82)),
    "high_contrast": Filter(saturation=1.4, contrast=1.0, layers=(Layer("overlay", None, 0.5),)),
    "vignette": Filter(contrast=0.4, layers=(Layer("multiply", (1.0, 0.95, 0.85)),), vignette=0.8),
    "cross_process": Filter(
        saturation=1.3, gamma=(0.9, 0.85, 1.0), contrast=0.8, low=(0.0, 0.0, 0.3), high=(1.0, 1.0, 0.7),
    ),
    "bleach_bypass": Filter(saturation=0.35, layers=(Layer("overlay", None, 0.9),)),
    "night": Filter(
        saturation=0.5, gamma=(1.6, 1.4, 1.1),
        layers=(Layer("multiply", (0.35, 0.45, 0.85)), Layer("screen", (0.0, 0.02, 0.1))),
    ),
}  # fmt: skip


def _grey(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    return luma(x).expand_as(x)


def _inverted(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    return 1 - x


def _hue(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    return rotate_hue(x, HUE_DEGREES[severity - 1])


def _filtered(x: Tensor, severity: int, generator: torch.Generator | None, *, name: str) -> Tensor:
    return FILTERS[name](x)


def _painted(x: Tensor, severity: int, generator: torch.Generator | None, *, name: str) -> Tensor:
    return match_histogram(x, painting_histogram(name))


STYLES: dict[str, ShiftFunction] = {
    "grey": _grey,
    "inverted": _inverted,
    "hue": _hue,
    **{name: partial(_filtered, name=name) for name in FILTERS},
    **{f"painting_{name}": partial(_painted, name=name) for name in PAINTINGS},
}
WITHOUT_SEVERITY = tuple(name for name in STYLES if name != "hue")
STYLE_FAMILIES: dict[str, tuple[str, ...]] = {
    "colour": ("grey", "inverted", "hue"),
    "filters": tuple(FILTERS),
    "paintings": tuple(f"painting_{name}" for name in PAINTINGS),
}
