"""Blurs and resizes as small matrices.

A separable linear filter treats the rows and the columns of an image alike, so it is one matrix on both sides:
``A @ image @ A.T``. Each function makes such a matrix once (float64, on the CPU); :func:`along_both` applies it to a
batch. The rules at the borders and for the sample positions are those of the libraries that the released CIFAR-10-C
generator calls.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


def along_both(x: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` (M,S) along the rows and the columns of square images (...,S,S): to (...,M,M)."""
    matrix = matrix.to(x)
    return matrix @ (x @ matrix.T)


@lru_cache
def gaussian_matrix(size: int, sigma: float, truncate: float, border: Literal["nearest", "reflect"]) -> Tensor:
    """Gaussian blur of ``size`` samples, cut at ``truncate`` standard deviations, to (size,size); each row sums to 1.

    As scipy.ndimage's ``gaussian_filter``: the cut is at ``int(truncate * sigma + 0.5)`` samples; beyond the border the
    edge sample is repeated (``nearest``), or all samples are mirrored, edge included (``reflect``). With sigma 0: the
    identity.
    """
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return torch.eye(size, dtype=torch.float64)
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    places = torch.arange(size)[:, None] + offsets
    if border == "nearest":
        places = places.clamp(0, size - 1)
    else:
        places = places.remainder(2 * size)
        places = torch.minimum(places, 2 * size - 1 - places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(size, -1))


@lru_cache
def box_matrix(before: int, after: int) -> Tensor:
    """Pillow's BOX filter from ``before`` samples to ``after``, (after,before).

    A new sample is the plain mean of the old ones whose centres lie within it; enlarging, it is the one old sample
    around its own centre. (It is no area average: an old sample counts in full or not at all.)
    """
    scale = before / after
    width = max(scale, 1.0)
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for i in range(after):
        centre = (i + 0.5) * scale
        first, end = max(int(centre - width / 2 + 0.5), 0), min(int(centre + width / 2 + 0.5), before)
        inside = [j for j in range(first, end) if -0.5 < (j + 0.5 - centre) / width <= 0.5]
        matrix[i, inside] = 1 / len(inside)
    return matrix


@lru_cache
def zoom_matrix(size: int, factor: float) -> Tensor:
    """Zoom into the middle by ``factor`` (1 or more), linearly, keeping the size: (size,size).

    As the released generator's ``clipped_zoom``: the middle ``ceil(size / factor)`` samples are zoomed by
    scipy.ndimage's ``zoom`` of order 1 (first sample to first, last to last) to ``round`` of their number times
    ``factor``, and what is more than ``size`` is trimmed.
    """
    crop = math.ceil(size / factor)
    zoomed = round(crop * factor)
    places = (torch.arange(size, dtype=torch.float64) + (zoomed - size) // 2) * ((crop - 1) / (zoomed - 1))
    left = places.floor().clamp(0, crop - 1)
    right = (left + 1).clamp_max(crop - 1)
    share = (places - left).clamp(0, 1)
    start = (size - crop) // 2
    matrix = torch.zeros(size, size, dtype=torch.float64)
    matrix.scatter_add_(1, (left.long() + start)[:, None], (1 - share)[:, None])
    return matrix.scatter_add_(1, (right.long() + start)[:, None], share[:, None])
