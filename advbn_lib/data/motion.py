"""Motion blur, as ImageMagick does it: an image smeared to one side along a line.

Source: ImageMagick's ``MotionBlurImage``, which the released CIFAR-10-C generator calls. The kernel is half a Gaussian:
``2 * radius + 1`` samples that start at the pixel itself. Its places are rounded to whole pixels, and beyond the border
the edge pixel is repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEGLIGIBLE = 1e-6  # a share of the light that no grey level shows


def half_gaussian(radius: int, sigma: float) -> list[float]:
    """The ``2 * radius + 1`` weights of the kernel, from the pixel itself outwards; they sum to 1."""
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    return (weights / weights.sum()).tolist()


def motion_blur(x: Tensor, radius: int, sigma: float, angles: Tensor) -> Tensor:
    """Images (N,C,H,W), each smeared along its own angle.

    Args:
        x: grey levels in any unit.
        radius: of the kernel, in pixels.
        sigma: its standard deviation, in pixels.
        angles: N, degrees; 0 takes the light from the right, 90 from below.
    """
    count, channels, height, width = x.shape
    radians = torch.deg2rad(angles).view(-1, 1, 1)
    rows = torch.arange(height, device=x.device).view(1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, -1)
    flat = x.flatten(2)
    blurred = torch.zeros_like(flat)
    for step, weight in enumerate(half_gaussian(radius, sigma)):
        if weight < NEGLIGIBLE:
            break
        across, down = ((step * side - 0.5).ceil().long() for side in (radians.cos(), radians.sin()))
        places = (rows + down).clamp(0, height - 1) * width + (columns + across).clamp(0, width - 1)
        blurred += weight * flat.gather(2, places.view(count, 1, -1).expand(-1, channels, -1))
    return blurred.view_as(x)
