"""How an image looks after a change: measures of style and of content, one number per image.

All compare two batches of images in [0,1] (N,3,H,W), ``before`` and ``after``, and give a tensor (N,). "Style" is what
is left when positions are forgotten: the first two moments and the histogram of the colours. "Content" is where things
are: edges, their direction, and the pattern of light and dark. The measures of content do not see a change of
brightness or contrast, not even an extreme one: read them beside ``contrast_ratio``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
FLAT = 1e-4  # a map whose RMS is below this is flat: 1/40 of a grey level
Measure = Callable[[Tensor, Tensor], Tensor]


def pixel_change(before: Tensor, after: Tensor) -> Tensor:
    """Root mean square of the pixels' differences, in [0,1]: the size of a change, of whatever kind."""
    return (after - before).flatten(1).square().mean(1).sqrt()


# ---- style ---------------------------------------------------------------------------------


def style_change(before: Tensor, after: Tensor) -> Tensor:
    """Root mean square of six differences: of the mean and the standard deviation of red, green and blue. In [0,1].

    Means are light and colour, standard deviations contrast: the two numbers per channel that AdvBN changes in a
    feature map, here in the image.
    """
    return (_moments(after) - _moments(before)).square().mean(1).sqrt()


def saturation_change(before: Tensor, after: Tensor) -> Tensor:
    """Mean saturation after minus before, in [-1,1]: that of a pixel is max - min of its three values, 0 if it is grey.

    HSV's own saturation divides this by max, which makes a loud colour of the faintest noise on black.
    """
    return _saturation(after) - _saturation(before)


def histogram_distance(before: Tensor, after: Tensor) -> Tensor:
    """Earth mover's distance between the histograms of a colour, mean over the three, in [0,1].

    In one dimension that is the mean difference between the sorted values (Villani, "Topics in Optimal Transportation",
    2003, section 2.2).
    """
    return (after.flatten(2).sort(2).values - before.flatten(2).sort(2).values).abs().mean((1, 2))


def contrast_ratio(before: Tensor, after: Tensor) -> Tensor:
    """Standard deviation of the luma after, divided by that before (at least half a grey level); 1: kept, 0: erased."""
    spread = [luma(images).flatten(1).std(1, correction=0) for images in (before, after)]
    return spread[1] / spread[0].clamp_min(0.5 / 255)


# ---- content -------------------------------------------------------------------------------


def edge_correlation(before: Tensor, after: Tensor) -> Tensor:
    """Correlation of the two maps of edge strength (Sobel, of the luma), in [-1,1]; 0 if one of them is flat."""
    return correlation(_edges(before).norm(dim=1), _edges(after).norm(dim=1))


def edge_direction(before: Tensor, after: Tensor) -> Tensor:
    """How far edges keep their direction, in [-1,1]: 1: all do, 0: no relation, or no edges, -1: all stand crosswise.

    Mean of ``cos(2 * angle between the two gradients)`` over the pixels, weighted by the product of the two edge
    strengths. The factor 2 makes a line with bright and dark exchanged the same line.
    """
    first, second = _edges(before), _edges(after)
    strength = first.norm(dim=1) * second.norm(dim=1)
    aligned = 2 * (first * second).sum(1).square() / strength.clamp_min(FLAT**4) - strength
    total = strength.flatten(1).sum(1)
    smallest = FLAT**2 * strength[0].numel()
    return torch.where(total > smallest, aligned.flatten(1).sum(1) / total.clamp_min(smallest), 0.0)


def luma_correlation(before: Tensor, after: Tensor) -> Tensor:
    """Correlation of the two lumas, in [-1,1]; 0 if one is flat. A negative of the image, all edges kept, has -1."""
    return correlation(luma(before), luma(after))


def ssim_structure(before: Tensor, after: Tensor) -> Tensor:
    """The structure term of SSIM of the luma, mean over windows, in [-1,1].

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (IEEE TIP 2004), equation 10
    and section III.B: ``(cov + C3) / (s1 * s2 + C3)`` in Gaussian windows of 11x11 (sigma 1.5), ``C3 = 0.03**2 / 2``.
    Where one window is flat it is near 1, so an *erased* image scores well: read it beside :func:`contrast_ratio`.
    """
    x, y, window = luma(before)[:, None], luma(after)[:, None], _window().to(before)

    def average(values: Tensor) -> Tensor:
        return F.conv2d(values, window)

    mean_x, mean_y = average(x), average(y)
    variance_x, variance_y = (average(x * x) - mean_x**2).clamp_min(0), (average(y * y) - mean_y**2).clamp_min(0)
    covariance, c3 = average(x * y) - mean_x * mean_y, 0.03**2 / 2
    return ((covariance + c3) / ((variance_x * variance_y).sqrt() + c3)).mean((1, 2, 3))


STYLE: dict[str, Measure] = {
    "style_change": style_change,
    "histogram_distance": histogram_distance,
    "saturation_change": saturation_change,
    "contrast_ratio": contrast_ratio,
}
CONTENT: dict[str, Measure] = {
    "edge_correlation": edge_correlation,
    "edge_direction": edge_direction,
    "luma_correlation": luma_correlation,
    "ssim_structure": ssim_structure,
}
MEASURES: dict[str, Measure] = {"pixel_change": pixel_change, **STYLE, **CONTENT}


def measure(before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """All of ``MEASURES``, each a tensor (N,).

    Raises:
        ValueError: the batches differ in shape, or are not N,3,H,W with H and W at least 11.
    """
    if before.shape != after.shape or before.dim() != 4 or before.shape[1] != 3 or min(before.shape[2:]) < 11:
        raise ValueError(
            f"two batches of the same shape (N,3,H,W), at least 11 pixels wide and high, are compared; got "
            f"{tuple(before.shape)} and {tuple(after.shape)}"
        )
    return {name: function(before, after) for name, function in MEASURES.items()}


# ---- changes of a given size ---------------------------------------------------------------


def change_as_much(
    before: Tensor, direction: Tensor, size: Tensor, most: float = 64.0, halvings: int = 22
) -> Tensor:  # fmt: skip
    """Images changed along ``direction`` so far that their :func:`pixel_change` is ``size``, after cutting to [0,1].

    To compare two kinds of change says little if one is simply larger. This makes the second as large as the first.

    Args:
        before: images in [0,1], N,3,H,W.
        direction: the change at full strength, N,3,H,W: noise, or ``other - before`` to go towards (and past) other
            images.
        size: wanted, (N,).
        most: the greatest strength. An image that does not reach its size with it gets ``most``, and changes less.
        halvings: of the interval that the strength is searched in.
    """
    low, high = torch.zeros_like(size), torch.full_like(size, min(1.0, most))

    def changed(strength: Tensor) -> Tensor:
        return (before + strength.view(-1, 1, 1, 1) * direction).clamp(0, 1)

    for _ in range(max(0, math.ceil(math.log2(most)))):
        high = torch.where(pixel_change(before, changed(high)) < size, 2 * high, high).clamp_max(most)
    for _ in range(halvings):
        middle = (low + high) / 2
        less = pixel_change(before, changed(middle)) < size
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return changed(high)


def to_grey_levels(images: Tensor) -> Tensor:
    """Images in [0,1] rounded to the 256 levels of a PNG: contrast too small for a file is gone."""
    return (images * 255).round() / 255


# ---- parts ---------------------------------------------------------------------------------


def luma(images: Tensor) -> Tensor:
    """Brightness of N,3,H,W as N,H,W: the weighted sum of red, green and blue (ITU-R BT.601)."""
    weights = torch.tensor(LUMA, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(1)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two maps of each image (N,...): (N,), in [-1,1]; 0 if one of them is flat."""
    x, y = first.flatten(1), second.flatten(1)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    flat = FLAT * x.shape[1] ** 0.5
    lengths = x.norm(dim=1), y.norm(dim=1)
    value = (x * y).sum(1) / (lengths[0].clamp_min(flat) * lengths[1].clamp_min(flat))
    return torch.where((lengths[0] > flat) & (lengths[1] > flat), value.clamp(-1, 1), 0.0)


def _moments(images: Tensor) -> Tensor:
    return torch.cat([images.mean((2, 3)), images.std((2, 3), correction=0)], 1)


def _saturation(images: Tensor) -> Tensor:
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def _edges(images: Tensor) -> Tensor:
    """Sobel gradients of the luma inside the border: N,2,H-2,W-2, in luma per pixel."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 8
    kernels = torch.stack([across, across.T])[:, None].to(images.dtype)
    return F.conv2d(luma(images)[:, None], kernels)


def _window() -> Tensor:
    places = torch.arange(11, dtype=torch.float64) - 5
    bell = torch.exp(-(places**2) / (2 * 1.5**2))
    bell = bell / bell.sum()
    return torch.outer(bell, bell)[None, None]
