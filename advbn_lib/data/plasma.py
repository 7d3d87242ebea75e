"""Plasma fractals: random clouds by the diamond-square method.

Source: the fog of CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019; released generator). The map wraps round at its
borders, and the noise falls at each level by the *square* of the decay, since the released code multiplies the noise,
drawn within plus and minus its size, by that size once more.
"""

from __future__ import annotations

from torch import Tensor

FIRST_WIBBLE = 100.0


def draws_needed(side: int) -> int:
    """How many random numbers a map of ``side`` (a power of two) takes: one for each place but the first corner."""
    return side * side - 1


def plasma_fractal(uniform: Tensor, side: int, decay: float) -> Tensor:
    """Maps (N,side,side) in [0,1] from random numbers in [0,1) (N, :func:`draws_needed`); each touches 0 and 1.

    The numbers are used from the coarsest level to the finest; at each level first for the middles of the squares, then
    for the middles of their upper edges, then of their left edges, each row by row.

    Args:
        side: a power of two, 2 or more.
        decay: the wibble is divided by it from level to level, the noise by its square.
    """
    if side < 2 or side & (side - 1):
        raise ValueError(f"the side of a plasma fractal is a power of two, got {side}")
    if uniform.dim() != 2 or uniform.shape[1] != draws_needed(side):
        raise ValueError(f"side {side} takes N,{draws_needed(side)} random numbers, got {tuple(uniform.shape)}")
    count, used, step, wibble = len(uniform), 0, side, FIRST_WIBBLE
    heights = uniform.new_zeros(count, side, side)
    while step >= 2:
        half, cells = step // 2, side // step
        noise = (2 * uniform[:, used : used + 3 * cells * cells] - 1) * wibble**2
        squares, upper, left = noise.view(count, 3, cells, cells).unbind(1)
        used += 3 * cells * cells
        corners = heights[:, ::step, ::step]
        below, beside = corners.roll(-1, 1), corners.roll(-1, 2)
        middles = (corners + below + beside + below.roll(-1, 2)) / 4 + squares
        heights[:, half::step, half::step] = middles
        heights[:, ::step, half::step] = (middles + middles.roll(1, 1) + corners + beside) / 4 + upper
        heights[:, half::step, ::step] = (middles + middles.roll(1, 2) + corners + below) / 4 + left
        step, wibble = half, wibble / decay
    heights = heights - heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)
