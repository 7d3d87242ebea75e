"""Means and standard deviations of feature maps, and the one formula that changes them.

Style, in this book, is what the first two moments of a feature map carry. AdaIN (Huang and Belongie, ICCV 2017,
equation 8), the AdvBN shift, MoEx and the A-FAN mix are all :func:`renormalise`, over different axes:

=============  =================  ======================================================
axes           reduced over       who uses it
=============  =================  ======================================================
``BATCH``      N, H, W            batch normalisation, AdvBN: one value per channel
``INSTANCE``   H, W               AdaIN, MixStyle, StyleGAN: one per image and channel
``POSITION``   C                  PONO, MoEx, A-FAN's code: one per image and position
=============  =================  ======================================================
"""

from __future__ import annotations

from torch import Tensor

BATCH = (0, 2, 3)
INSTANCE = (2, 3)
POSITION = (1,)


def mean(x: Tensor, axes: tuple[int, ...] = BATCH) -> Tensor:
    """Mean of ``x`` (N,C,H,W) over ``axes``; the reduced axes stay, with length 1."""
    return x.mean(axes, keepdim=True)


def std(x: Tensor, axes: tuple[int, ...] = BATCH, eps: float = 1e-5, unbiased: bool = True) -> Tensor:
    """Standard deviation of ``x`` (N,C,H,W) over ``axes``; the reduced axes stay, with length 1.

    ``eps`` is added to the variance, so that the result is never 0 and its gradient stays finite. The unbiased
    variance with 1e-5 is what the official AdvBN and A-FAN code use; torch's own normalisation layers use the biased one.

    Raises:
        ValueError: if there is one element only along ``axes``, whose unbiased variance is undefined.
    """
    if unbiased and _count(x, axes) < 2:
        raise ValueError(
            f"the unbiased variance over axes {axes} of a {tuple(x.shape)} tensor is undefined: it has one element there"
        )
    return (x.var(axes, keepdim=True, unbiased=unbiased) + eps).sqrt()


def renormalise(
    x: Tensor, new_mean: Tensor, new_std: Tensor, axes: tuple[int, ...] = BATCH, eps: float = 1e-5
) -> Tensor:
    """Give ``x`` another mean and standard deviation: ``new_std * (x - mean) / std + new_mean``.

    Args:
        x: features, N,C,H,W.
        new_mean, new_std: broadcastable to ``x``.
        axes: over which the moments of ``x`` are taken: BATCH, INSTANCE or POSITION.
    """
    return new_std * (x - mean(x, axes)) / std(x, axes, eps) + new_mean


def adain(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """Adaptive instance normalisation: ``content`` with the per-image channel moments of ``style`` (AdaIN, equation 8)."""
    return renormalise(content, mean(style, INSTANCE), std(style, INSTANCE, eps), INSTANCE, eps)


def scale_statistics(x: Tensor, mean_factor: Tensor, std_factor: Tensor, axes: tuple[int, ...] = BATCH) -> Tensor:
    """Multiply the mean and the standard deviation of ``x`` by factors: ``std_factor * (x - mean) + mean_factor * mean``.

    This is :func:`renormalise` to ``(mean_factor * mean, std_factor * std)`` with the ``std`` cancelled, as in the
    official AdvBN code: no division, so it is exact also for a dead channel.
    """
    mu = mean(x, axes)
    return std_factor * (x - mu) + mean_factor * mu


def _count(x: Tensor, axes: tuple[int, ...]) -> int:
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return count
