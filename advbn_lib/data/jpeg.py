"""What JPEG compression does to images, computed on the device: no file is written, no loop over images.

Source: the JPEG standard (ITU-T T.81; quantisation tables of annex K) and the choices of libjpeg (libjpeg-turbo,
Pillow's): quality scales the tables, chroma has half the resolution, the integer cosine transform of Loeffler,
Ligtenberg and Moschytz (13 fractional bits), the smooth ("fancy") enlargement of chroma. All rounding is where libjpeg
has it, so the result is Pillow's bit for bit (for images wider than 4 pixels: narrower chroma is enlarged otherwise).
The entropy coding loses nothing, and is left out.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *((99,) * 8,) * 4,
)  # fmt: skip

# The cosine transform in units of 2^-13: half of each row, which is mirrored with an even sign, then with an odd one.
# The entries are sqrt(2) * cos(k pi / 16) to within one unit: sums of libjpeg's twelve rounded constants.
EVEN = (
    (8192, 8192, 8192, 8192),
    (10703, 4433, -4433, -10703),
    (8192, -8192, -8192, 8192),
    (4433, -10704, 10704, -4433),
)
ODD = ((11363, 9633, 6437, 2260), (9633, -2259, -11362, -6436), (6437, -11362, 2261, 9633), (2260, -6436, 9633, -11363))


def jpeg(levels: Tensor, quality: int) -> Tensor:
    """Grey levels 0..255 (N,3,H,W; whole numbers of any dtype) after compression and decompression, int32.

    Args:
        quality: 1 to 100, as Pillow's.
    """
    height, width = levels.shape[2:]
    # Columns are filled up before chroma is halved, rows after it.
    red, green, blue = _grow(levels.to(torch.int32), 2, 16).unbind(1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    chroma = torch.stack(
        [-11059 * red - 21709 * green + 32768 * blue, 32768 * red - 27439 * green - 5329 * blue], dim=1
    )
    chroma = _halve((chroma + (128 << 16) + 32767) >> 16)
    luma = _quantise(_grow(luma[:, None], 8, 8), LUMINANCE, quality)[:, 0, :height, :width]
    chroma = _quantise(_grow(chroma, 8, 8), CHROMINANCE, quality)[:, :, : (height + 1) // 2, : (width + 1) // 2]
    chroma_blue, chroma_red = (_enlarge(chroma)[:, :, :height, :width] - 128).unbind(1)
    return torch.stack(
        [
            luma + ((91881 * chroma_red + 32768) >> 16),
            luma + ((-22554 * chroma_blue - 46802 * chroma_red + 32768) >> 16),
            luma + ((116130 * chroma_blue + 32768) >> 16),
        ],
        dim=1,
    ).clamp(0, 255)


def quantisation_table(table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """A standard table (8x8) scaled to ``quality`` as libjpeg does: int64, 1 to 255."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality is 1 to 100, got {quality}")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return ((torch.tensor(table) * percent + 50) // 100).clamp(1, 255)


def _grow(x: Tensor, row_multiple: int, column_multiple: int) -> Tensor:
    """Repeat the last row and column until the sides are multiples."""
    height, width = x.shape[2:]
    more_rows, more_columns = -height % row_multiple, -width % column_multiple
    if not more_rows and not more_columns:
        return x
    rows = torch.arange(height + more_rows, device=x.device).clamp_max(height - 1)
    columns = torch.arange(width + more_columns, device=x.device).clamp_max(width - 1)
    return x[:, :, rows[:, None], columns]


def _halve(x: Tensor) -> Tensor:
    """Mean of each 2x2 square, rounded down and up in turn from column to column."""
    sums = x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]
    return (sums + 1 + torch.arange(sums.shape[-1], device=x.device, dtype=x.dtype) % 2) >> 2


def _enlarge(x: Tensor) -> Tensor:
    """Twice the size: each new sample is 3/4 of the nearest old one and 1/4 of the next, along rows and columns."""
    padded = F.pad(x.double(), [1, 1, 1, 1], mode="replicate").to(x.dtype)
    middle = 3 * padded[..., 1:-1, :]
    tall = torch.stack([middle + padded[..., :-2, :], middle + padded[..., 2:, :]], dim=-2).flatten(-3, -2)
    middle = 3 * tall[..., 1:-1]
    return torch.stack([(middle + tall[..., :-2] + 8) >> 4, (middle + tall[..., 2:] + 7) >> 4], dim=-1).flatten(-2)


@lru_cache
def _cosines() -> Tensor:
    """The 8x8 transform in units of 2^-13, one row a frequency; float64, which holds sums of whole numbers exactly."""
    rows = torch.empty(8, 8, dtype=torch.float64)
    for i in range(4):
        even, odd = torch.tensor(EVEN[i], dtype=torch.float64), torch.tensor(ODD[i], dtype=torch.float64)
        rows[2 * i], rows[2 * i + 1] = torch.cat([even, even.flip(0)]), torch.cat([odd, -odd.flip(0)])
    return rows


def _shift(x: Tensor, bits: int) -> Tensor:
    """Divide by 2^bits, halves upwards."""
    return (x * 0.5**bits + 0.5).floor()


def _quantise(plane: Tensor, table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """Planes (N,C,H,W; sides are multiples of 8) transformed in 8x8 blocks, rounded to the table, transformed back."""
    count, channels, height, width = plane.shape
    cosines = _cosines().to(plane.device)
    steps = quantisation_table(table, quality).to(cosines)
    blocks = (plane - 128).double().view(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    # Rows first, then columns; the first pass keeps two bits more, and the result is eight times the true one.
    coefficients = _shift(cosines @ _shift(blocks @ cosines.T, 11), 15)
    whole = coefficients.sign() * ((coefficients.abs() + 4 * steps) / (8 * steps)).floor()
    # Back: columns first, then rows.
    blocks = _shift(_shift(cosines.T @ (whole * steps), 11) @ cosines, 18)
    blocks = (blocks + 128).clamp(0, 255).to(torch.int32)
    return blocks.transpose(3, 4).reshape(count, channels, height, width)
