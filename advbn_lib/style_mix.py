"""AdvMix's set: small balls around the styles of OTHER images, and the bank that those styles come from.

Source: Gowal et al., "Achieving Robustness in the Wild via Adversarial Mixing with Disentangled Representations" (AdvMix,
CVPR 2020, arXiv 1912.03192). There is no public code, so this is a reconstruction. The set of changes that keep the label is a
union of l-infinity balls, one around the style of each image of the training set; the ascent walks in one of them at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from advbn_lib.perturbations import Delta


@dataclass(frozen=True, eq=False)
class StyleMix:
    """The ball around a style code: each coordinate changes by at most ``eps`` times its ``scale``.

    It is applied to style codes x (N,...), each of **another** image than the one whose content it will be mixed with. A delta
    is one tensor of that shape **in units of the radius**: the code changes by ``eps * scale * delta``. So one step size, a share
    of the radius, serves codes of every scale, as in :class:`~advbn_lib.pixel_balls.PixelBalls`.

    Args:
        eps: radius in units of ``scale``; 0 or more. At 0 the style is that of the other image, unchanged.
        scale: unit of each coordinate, broadcastable to x; 0 or more. :attr:`StyleBank.scale` is the customary one: eps then has
            no units of its own. None: 1.
        bounds: the lowest and the highest value that a coordinate can have, where there are such: (0, 1) for a colour. The styles
            in x are to be within them.

    Raises:
        ValueError: eps or scale is negative or not finite, or the bounds are in the wrong order.
    """

    eps: float
    scale: Tensor | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self):
        if not (self.eps >= 0 and math.isfinite(self.eps)):
            raise ValueError(
                f"eps must be 0 or more, in standard deviations of the bank if that is the scale; got {self.eps}"
            )
        if self.scale is not None and not bool((torch.isfinite(self.scale) & (self.scale >= 0)).all()):
            raise ValueError(
                "a scale is 0 or more and finite, and some here are not: are there NaN among the style codes?"
            )
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds are (lowest, highest), got {self.bounds}")

    @property
    def per_sample(self) -> bool:
        return True

    def start(self, x: Tensor) -> Delta:
        """The other image's style itself."""
        return (torch.zeros_like(x),)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta:
        """A uniform draw from the ball: the random start, and RandMix, the control without an adversary."""
        draw = 2 * torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) - 1
        return self.project(x, (draw,))

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        moved = x + self._radius(x) * delta[0]
        # project keeps to the bounds but for rounding: 1 + 1e-8 is no colour.
        return moved if self.bounds is None else moved.clamp(*self.bounds)

    def project(self, x: Tensor, delta: Delta) -> Delta:
        """To the nearest point that is in the ball and within the bounds."""
        inside = delta[0].clamp(-1, 1)
        if self.bounds is None:
            return (inside,)
        # A radius of 0 would make 0/0 of a centre on a bound; there any delta is no change.
        radius = self._radius(x).clamp_min(torch.finfo(x.dtype).tiny)
        lowest, highest = (((bound - x) / radius).clamp(-1, 1) for bound in self.bounds)
        return (torch.maximum(lowest, torch.minimum(inside, highest)),)

    def _radius(self, x: Tensor) -> Tensor:
        scale = torch.ones((), device=x.device, dtype=x.dtype) if self.scale is None else self.scale.to(x)
        return self.eps * scale.expand(x.shape)


@dataclass(frozen=True, eq=False)
class StyleBank:
    """The styles of a set of images, to mix with the content of others.

    Args:
        styles: (M,...), float32; M at least 2. In float16 the ascent's steps would be rounded away.
        labels: (M,), int64: what the images show. No draw looks at them; they are for measuring leakage.
        bounds: see :class:`StyleMix`.

    Raises:
        ValueError: styles and labels do not fit each other, there are fewer than two, or a code is not finite or out of bounds.
    """

    styles: Tensor
    labels: Tensor
    bounds: tuple[float, float] | None = None

    def __post_init__(self):
        if self.styles.dim() < 2 or self.styles.dtype != torch.float32 or self.labels.shape != self.styles.shape[:1]:
            raise ValueError(
                f"styles must be float32 (M,...) with one label each (M,), got {self.styles.dtype} of shape "
                f"{tuple(self.styles.shape)} and labels of shape {tuple(self.labels.shape)}"
            )
        if len(self.styles) < 2:
            raise ValueError("a bank needs at least two styles: mixing takes the style of another image")
        if not bool(torch.isfinite(self.styles).all()):
            raise ValueError("some style codes are NaN or infinite: encode those images again, or leave them out")
        low, high = torch.stack(self.styles.aminmax()).tolist()
        if self.bounds is not None and not self.bounds[0] <= low <= high <= self.bounds[1]:
            raise ValueError(
                f"style codes go from {low:g} to {high:g}, which is out of the bounds {self.bounds}: are they in 0..255 units?"
            )

    def __len__(self) -> int:
        return len(self.styles)

    @cached_property
    def scale(self) -> Tensor:
        """Standard deviation of each coordinate over the bank (1,...)."""
        return self.styles.std(0, keepdim=True)

    def around(self, eps: float) -> StyleMix:
        """The balls of radius ``eps``, in standard deviations of the bank, around its styles."""
        return StyleMix(eps, self.scale, self.bounds)

    def draw(self, count: int, generator: torch.Generator | None = None, others_than: Tensor | None = None) -> Tensor:
        """Styles drawn evenly from the bank (count,...), with replacement.

        Args:
            generator: on the bank's device.
            others_than: int64 (count,): each sample's own place in the bank, which it is not given; -1 if it is not in the bank.

        Raises:
            ValueError: ``others_than`` is of another length.
        """
        device = self.styles.device
        if others_than is None:
            others_than = torch.full((count,), -1, device=device)
        if others_than.shape != (count,):
            raise ValueError(
                f"others_than must have one place for each of {count} samples, got shape {tuple(others_than.shape)}"
            )
        own = others_than.to(device)
        choices = len(self) - (own >= 0).long()  # one fewer for those that are in the bank
        # In 64 bits the product is exact enough that each place is as likely.
        share = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        place = (share * choices).long()
        return self.styles[place + ((own >= 0) & (place >= own)).long()]
