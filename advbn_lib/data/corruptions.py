"""The corruptions of CIFAR-10-C, computed on the device for a whole batch at once.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019; constants and operations of the released CIFAR generator (``make_cifar_c.py``), borders and rounding of the
libraries it calls. They are not the stored CIFAR-10-C files (see :mod:`advbn_lib.data.cifar10c`), which were made with
the libraries of 2018 and other random numbers.

Each entry of :data:`CORRUPTIONS` maps images in [0,1] (N,3,S,S; whole grey levels), a severity of 1 to 5 and a
generator on the images' device (None: torch's own) to changed images. The caller clips them to [0,1] and cuts them down
to whole grey levels. Every image draws its own random numbers, all of them before it is changed, in the order that the
function's docstring gives. What is random is drawn in ``_name``; what is then done with it, where that is more than a
line, is the function after it. The constants are meant for 32 pixels; other square sizes work too, but for frost only
up to 62.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advbn_lib.data.frost import frost_overlays
from advbn_lib.data.jpeg import jpeg
from advbn_lib.data.motion import motion_blur
from advbn_lib.data.plasma import draws_needed, plasma_fractal
from advbn_lib.data.resampling import along_both, box_matrix, gaussian_matrix, zoom_matrix

ShiftFunction = Callable[[Tensor, int, torch.Generator | None], Tensor]

# One entry a severity.
GAUSSIAN_NOISE = (0.04, 0.06, 0.08, 0.09, 0.10)  # standard deviation
SHOT_NOISE = (500, 250, 100, 75, 50)  # photons that make white
IMPULSE_NOISE = (0.01, 0.02, 0.03, 0.05, 0.07)  # share of the entries
DEFOCUS_BLUR = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))  # radius, smoothing
GLASS_BLUR = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))  # sigma, rounds; pixels move by 1 at most
MOTION_BLUR = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))  # radius, sigma
MOTION_ANGLES = (-45.0, 45.0)  # degrees
ZOOM_BLUR = (1.06, 1.11, 1.16, 1.21, 1.26)  # where the zoom factors, in steps of 0.01 from 1, stop
SNOW = (  # mean, deviation and zoom of the flakes, threshold, radius and sigma of the motion blur, share of the image
    (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
    (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
    (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
    (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
    (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
)
SNOW_ANGLES = (-135.0, -45.0)  # degrees
FROST = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))  # factor of the image, of the overlay
FOG = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))  # density, decay of the plasma
BRIGHTNESS = (0.05, 0.1, 0.15, 0.2, 0.3)
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)
ELASTIC = (  # displacement, its smoothing, jitter of the affine map's three points; all in sides of the image
    (0, 0, 0.08),
    (0.05, 0.2, 0.07),
    (0.08, 0.06, 0.06),
    (0.1, 0.04, 0.05),
    (0.1, 0.03, 0.03),
)
PIXELATE = (0.95, 0.9, 0.85, 0.75, 0.65)  # of the side
JPEG_QUALITY = (80, 65, 58, 50, 40)
SPECKLE_NOISE = (0.06, 0.1, 0.12, 0.16, 0.2)  # standard deviation, in units of the pixel
GAUSSIAN_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # sigma
SATURATE = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))  # factor, summand

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def _gaussian_noise(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws N,3,S,S normal numbers."""
    return x + _at(GAUSSIAN_NOISE, severity) * _normal(x.shape, x, generator)


def _shot_noise(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws a Poisson number for each entry."""
    photons = _at(SHOT_NOISE, severity)
    return torch.poisson(x * photons, generator) / photons


def _impulse_noise(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Salt or pepper, as likely, on a share of the entries. Draws N,3,S,S uniform numbers."""
    share, u = _at(IMPULSE_NOISE, severity), _uniform(x.shape, x, generator)
    return torch.where(u < share, (u < share / 2).to(x), x)


def _speckle_noise(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws N,3,S,S normal numbers."""
    return x + x * _at(SPECKLE_NOISE, severity) * _normal(x.shape, x, generator)


def _defocus_blur(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    radius, smoothing = _at(DEFOCUS_BLUR, severity)
    kernel = disk(radius, smoothing).tolist()
    reach, (height, width) = len(kernel) // 2, x.shape[2:]
    padded, blurred = F.pad(x, [reach] * 4, mode="reflect"), torch.zeros_like(x)
    # Not conv2d, which rounds to 10 bits on some GPUs: here a grey level may hang on the last bit.
    for i, j in itertools.product(range(len(kernel)), repeat=2):
        blurred.add_(padded[..., i : i + height, j : j + width], alpha=kernel[i][j])
    return blurred


def disk(radius: float, smoothing: float) -> Tensor:
    """A disk of this radius (pixels), smoothed by a 3x3 Gaussian of this sigma; float64, odd side, sums to 1."""
    reach = int(radius) + 1  # the smoothing widens it by one pixel
    grid = torch.arange(-reach, reach + 1, dtype=torch.float64)
    shape = ((grid[:, None] ** 2 + grid[None, :] ** 2) <= radius**2).double()
    shape = shape / shape.sum()
    bell = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / (2 * smoothing**2))
    bell = bell / bell.sum()
    return F.conv2d(shape[None, None], torch.outer(bell, bell)[None, None], padding=1)[0, 0]


def _glass_blur(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws whole numbers 0 and 1: rounds,N,2,S-2,S-2; how far up, then how far to the left, each pixel's source is."""
    rounds = _at(GLASS_BLUR, severity)[1]
    inner = _side(x) - 2
    moves = torch.randint(0, 2, (rounds, len(x), 2, inner, inner), generator=generator, device=x.device)
    return through_glass(x, severity, moves)


def through_glass(x: Tensor, severity: int, moves: Tensor) -> Tensor:
    """Glass blur with given moves.

    Each pixel but those of the two first rows and columns becomes a copy of itself, the one above, the one to the left,
    or the one above and to the left. (The released code means to exchange them. But it exchanges two views of one
    array, and overwrites; and since it goes from the last pixel to the first, a source is never a pixel that it has
    changed in this round. So one gather does a round.)

    Args:
        moves: rounds,N,2,S-2,S-2 of 0 and 1: how far up and to the left the source of the pixel (2..S-1, 2..S-1) is.
    """
    sigma, side = _at(GLASS_BLUR, severity)[0], _side(x)
    blur = gaussian_matrix(side, sigma, 4.0, "nearest")
    levels = _cut(along_both(x, blur)).flatten(2)
    places = torch.arange(side * side, device=x.device).view(side, side)
    for move in moves:
        sources = places.repeat(len(x), 1, 1)
        sources[:, 2:, 2:] -= side * move[:, 0] + move[:, 1]
        levels = levels.gather(2, sources.view(len(x), 1, -1).expand(-1, 3, -1))
    return along_both(levels.view_as(x), blur)


def _motion_blur(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws N uniform numbers: the angles."""
    return smeared(x, *_at(MOTION_BLUR, severity), _between(*MOTION_ANGLES, (len(x),), x, generator))


def smeared(x: Tensor, radius: int, sigma: float, angles: Tensor) -> Tensor:
    """Motion blur (see :func:`advbn_lib.data.motion.motion_blur`) as it comes back from ImageMagick: whole grey levels.

    ImageMagick computes with 16 bits; the reference images show that they are then cut down to 8, not rounded.
    """
    return ((motion_blur(x, radius, sigma, angles) * 65535).round() / 257 + 1e-4).floor() / 255


def _zoom_blur(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Mean of the image and of all its zooms, the zoom by 1 among them."""
    side = _side(x)
    total = x.clone()
    # As the released code has it: whether the last factor belongs to them is a matter of rounding.
    factors = np.arange(1, _at(ZOOM_BLUR, severity), 0.01).tolist()
    for factor in factors:
        total += along_both(x, zoom_matrix(side, factor))
    return total / (len(factors) + 1)


def _snow(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws N,S,S normal numbers, then N uniform ones: the flakes and the angles they fall at."""
    flakes = _normal((len(x), _side(x), _side(x)), x, generator)
    return let_it_snow(x, severity, flakes, _between(*SNOW_ANGLES, (len(x),), x, generator))


def let_it_snow(x: Tensor, severity: int, flakes: Tensor, angles: Tensor) -> Tensor:
    """Snow from normal (N,S,S) and angles (N, degrees): whitens the image, adds streaks and the same streaks turned."""
    mean, deviation, zoom, threshold, radius, sigma, share = _at(SNOW, severity)
    layer = along_both(mean + deviation * flakes, zoom_matrix(_side(x), zoom))[:, None]
    layer = _cut(torch.where(layer < threshold, 0, layer).clamp(0, 1))
    layer = smeared(layer, radius, sigma, angles)
    grey = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    whitened = share * x + (1 - share) * torch.maximum(x, 1.5 * grey + 0.5)
    return whitened + layer + layer.flip(2, 3)


def _frost(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws 3,N uniform numbers: which overlay, and the first row and column of the piece of it."""
    side, overlays = _side(x), frost_overlays()
    if side >= min(min(overlay.shape[1:]) for overlay in overlays):
        raise ValueError(f"frost works up to 62 pixels, the size of the smallest overlay; got images of {side} pixels")
    rooms = torch.tensor([[overlay.shape[1] - side, overlay.shape[2] - side] for overlay in overlays], device=x.device)
    which, down, right = _uniform((3, len(x)), x, generator)
    which = (which * len(overlays)).long()
    return frosted(x, severity, which, (down * rooms[which, 0]).long(), (right * rooms[which, 1]).long())


def frosted(x: Tensor, severity: int, which: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Frost from the numbers (N each) of the overlays and the first rows and columns of the pieces."""
    of_image, of_overlay = _at(FROST, severity)
    overlays, steps = frost_overlays(), torch.arange(_side(x), device=x.device)
    height, width = (max(overlay.shape[axis] for overlay in overlays) for axis in (1, 2))
    sheet = torch.stack([F.pad(o, [0, width - o.shape[2], 0, height - o.shape[1]]) for o in overlays]).to(x.device)
    pieces = sheet[which[:, None, None], :, (rows[:, None] + steps)[:, :, None], (columns[:, None] + steps)[:, None, :]]
    return of_image * x + of_overlay * pieces.permute(0, 3, 1, 2) / 255


def _fog(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws N,M*M-1 uniform numbers, M being the power of two at S or above."""
    return in_fog(x, severity, _uniform((len(x), draws_needed(_power_of_two(_side(x)))), x, generator))


def in_fog(x: Tensor, severity: int, uniform: Tensor) -> Tensor:
    """Fog from uniform numbers (as :func:`advbn_lib.data.plasma.plasma_fractal`), dimmed to the image's own maximum."""
    density, decay = _at(FOG, severity)
    side = _side(x)
    plasma = plasma_fractal(uniform, _power_of_two(side), decay)[:, None, :side, :side]
    brightest = x.amax((1, 2, 3), keepdim=True)
    return (x + density * plasma) * brightest / (brightest + density)


def _brightness(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """HSV: V + c. Hue and saturation stay, so each pixel is scaled by new V / old V; a black one becomes grey."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + _at(BRIGHTNESS, severity)).clamp(0, 1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-8), brighter)


def _contrast(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return (x - mean) * _at(CONTRAST, severity) + mean


def _elastic_transform(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Draws N,3,2 uniform numbers, then N,2,S,S: the moves of three points, and of every pixel across and down."""
    points = _between(-1, 1, (len(x), 3, 2), x, generator)
    fields = _between(-1, 1, (len(x), 2, _side(x), _side(x)), x, generator)
    return stretched(x, severity, points, fields)


def stretched(x: Tensor, severity: int, points: Tensor, fields: Tensor) -> Tensor:
    """An affine map by the moves of three points, then a smooth displacement.

    Args:
        points: N,3,2 in [-1,1]: moves (across, down) of the lower right, upper right and upper left corner of a square.
        fields: N,2,S,S in [-1,1]: displacements (across, down) before smoothing.
    """
    displacement, smoothing, jitter = _at(ELASTIC, severity)
    side = _side(x)
    centre, reach = side // 2, side // 3
    corners = x.new_tensor([[reach, reach], [reach, -reach], [-reach, -reach]]) + centre
    moved = corners + jitter * side * points
    # The map takes the corners to where they moved; sampling needs its inverse: from the moved points to the corners.
    inverse = torch.linalg.solve(torch.cat([moved, torch.ones_like(moved[..., :1])], dim=2), corners.expand_as(moved))
    grid = torch.stack(torch.meshgrid(*[torch.arange(side, device=x.device)] * 2, indexing="xy"), dim=-1).to(x)
    places = grid.view(1, -1, 2) @ inverse[:, :2] + inverse[:, 2:]
    x = _sampled(x, places.view(len(x), side, side, 2), edge_twice=False)
    smooth = gaussian_matrix(side, smoothing * side, 3.0, "reflect")
    moves = displacement * side * along_both(fields, smooth).permute(0, 2, 3, 1)
    return _sampled(x, grid + moves, edge_twice=True)


def _pixelate(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """Smaller by Pillow's BOX filter, and back. Rounds to whole grey levels after each pass, first along the rows."""
    side = _side(x)
    small = int(side * _at(PIXELATE, severity))
    shrink, grow = box_matrix(side, small).to(x), box_matrix(small, side).to(x)
    x = _rounded(shrink @ _rounded(x @ shrink.T))
    return grow @ x @ grow.T


def _jpeg_compression(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    return jpeg((x * 255).round(), _at(JPEG_QUALITY, severity)).to(x) / 255


def _gaussian_blur(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    return along_both(x, gaussian_matrix(_side(x), _at(GAUSSIAN_BLUR, severity), 4.0, "nearest"))


def _saturate(x: Tensor, severity: int, generator: torch.Generator | None) -> Tensor:
    """HSV: factor * S + summand. Hue and value stay; a grey pixel, whose hue is that of red, turns reddish."""
    factor, summand = _at(SATURATE, severity)
    value = x.amax(1, keepdim=True)
    lack = value - x
    saturation = lack.amax(1, keepdim=True) / value.clamp_min(1e-8)
    wanted = (factor * saturation + summand).clamp(0, 1)
    red_lack = value * x.new_tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
    return value - wanted * torch.where(saturation > 0, lack / saturation.clamp_min(1e-8), red_lack)


def _at(table: tuple, severity: int):
    if severity not in range(1, 6):
        raise ValueError(f"a corruption has severities 1 to 5, got {severity}")
    return table[severity - 1]


def _side(x: Tensor) -> int:
    if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
        raise ValueError(f"this corruption takes square images N,3,S,S, got {tuple(x.shape)}")
    return x.shape[3]


def _power_of_two(side: int) -> int:
    return 1 << math.ceil(math.log2(side))


def _uniform(shape: tuple[int, ...], x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device=x.device, dtype=x.dtype)


def _between(low: float, high: float, shape: tuple[int, ...], x: Tensor, generator: torch.Generator | None) -> Tensor:
    return low + (high - low) * _uniform(shape, x, generator)


def _normal(shape: tuple[int, ...], x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)


def _cut(x: Tensor) -> Tensor:
    """Down to whole grey levels; 1e-4 of a level: rounding in float32 must not push a whole level down."""
    return (x * 255 + 1e-4).floor() / 255


def _rounded(x: Tensor) -> Tensor:
    """To the nearest whole grey level, halves upwards."""
    return (x * 255 + 0.5).floor() / 255


def _sampled(x: Tensor, places: Tensor, edge_twice: bool) -> Tensor:
    """Bilinear samples of x (N,3,S,S) at places (N,S,S,2: column and row, in pixels), mirrored beyond the borders.

    Args:
        edge_twice: whether the mirror image begins with the edge pixel itself, or with the one next to it.
    """
    side = x.shape[3]
    scaled = (2 * places + 1) / side - 1 if edge_twice else 2 * places / (side - 1) - 1
    return F.grid_sample(x, scaled, mode="bilinear", padding_mode="reflection", align_corners=not edge_twice)


CORRUPTIONS: dict[str, ShiftFunction] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
# Of the released generator's four further ones all but spatter. None of them counts in the mean.
EXTRA: dict[str, ShiftFunction] = {
    "speckle_noise": _speckle_noise,
    "gaussian_blur": _gaussian_blur,
    "saturate": _saturate,
}
