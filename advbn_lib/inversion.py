"""Look at features: find the image that has them.

Source: Mahendran and Vedaldi, "Understanding Deep Image Representations by Inverting Them" (CVPR 2015): gradient
descent on the pixels, with total variation as the prior. No decoder is trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def invert(
    features_of: Callable[[Tensor], Tensor], target: Tensor, shape: tuple[int, ...], steps: int = 200, lr: float = 0.05,
    tv: float = 1e-3, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Images whose features are as close to ``target`` as the descent gets.

    Each image minimises the squared distance of its features relative to the target's squared length, plus ``tv`` times
    its :func:`total_variation`. Images do not influence each other, so any number can share a call.

    Args:
        features_of: maps images in [0,1] (N,3,H,W) to features: normalisation, then a network in eval mode.
        target: the features to reach, N first.
        shape: of the images, (3,H,W).
        steps: of Adam on the pixels, at least 1.
        lr: its learning rate, in units of the pixel range.
        tv: weight of the prior; 0: none, so that noise which the features do not see stays in the images.
        generator: on the target's device; for the start, which is grey with a little noise.

    Returns:
        Images in [0,1], N and ``shape``, without gradient. They are the best found, not the truth: always look at the
        inversion of unchanged features beside them.

    Raises:
        ValueError: fewer than 1 step, or ``features_of`` gives another shape than the target's.
    """
    if steps < 1:
        raise ValueError(f"the inversion needs at least 1 step, got {steps}")
    target = target.detach()
    noise = torch.randn(len(target), *shape, generator=generator, device=target.device, dtype=target.dtype)
    images = (0.5 + 0.05 * noise).requires_grad_()
    length = target.flatten(1).square().sum(1).clamp_min(1e-12)
    optimizer = torch.optim.Adam([images], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            features = features_of(images)
            if features.shape != target.shape:
                raise ValueError(f"features_of gives {tuple(features.shape)}, but the target is {tuple(target.shape)}")
            distance = (features - target).flatten(1).square().sum(1) / length
            images.grad = torch.autograd.grad((distance + tv * total_variation(images)).sum(), images)[0]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                images.clamp_(0, 1)
    return images.detach()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring pixels of each image: N,C,H,W to (N,)."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs()
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs()
    return down.flatten(1).mean(1) + across.flatten(1).mean(1)
