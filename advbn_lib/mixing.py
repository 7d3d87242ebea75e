"""Mixing: the content of one image decoded with the style of another; and the search for the worst style.

Source: AdvMix (see :mod:`advbn_lib.style_mix`); a reconstruction. Two decoders serve it: :class:`ColourDecoder`, which is exact
and needs no training, is a **test bench** for the adversary alone; what it gives is no result of a StyleGAN. The other one is made
from a trained generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from advbn_lib.ascent import Steps, ascend
from advbn_lib.data.images import ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.style_mix import StyleBank, StyleMix


class Decoder(Protocol):
    """What mixing needs: an image from a content and a style code."""

    def decode(self, content: Tensor, style: Tensor) -> Tensor:
        """Images in [0,1] (N,3,H,W) from codes with N first; differentiable in ``style``."""


class ColourDecoder:
    """A grey image times one colour: an exact decoder for Color-MNIST, where the class is in the grey image alone.

    Content: grey images (N,1,H,W) in [0,1]. Style: colours (N,3) in [0,1].
    """

    def decode(self, content: Tensor, style: Tensor) -> Tensor:
        """Images in [0,1] (N,3,H,W).

        Raises:
            ValueError: the codes are of other shapes.
        """
        if content.dim() != 4 or content.shape[1] != 1 or style.shape != (len(content), 3):
            raise ValueError(
                "content must be grey images (N,1,H,W) and style their colours (N,3), got shapes "
                f"{tuple(content.shape)} and {tuple(style.shape)}"
            )
        return content * style[:, :, None, None]

    def encode(self, images: Tensor, tolerance: float = 1.5 / 255) -> tuple[Tensor, Tensor]:
        """The codes of images in [0,1] (N,3,H,W) that have one colour each; decoded again, they give the images.

        Half the light and twice the grey give the same image: the brightest pixel of the content is set to 1. A black image has
        black for its colour, and no content is left of it.

        Args:
            tolerance: how far a decoded pixel may be off; rounding to whole levels needs a little.

        Raises:
            ValueError: an image has more than one colour.
        """
        colours = images.amax((2, 3))
        # Of each pixel the grey that fits all channels best: rounding errors of the channels average out.
        light = (images * colours[:, :, None, None]).sum(1, keepdim=True)
        grey = (light / colours.square().sum(1)[:, None, None, None].clamp_min(1e-12)).clamp(0, 1)
        off = float((self.decode(grey, colours) - images).abs().max())
        if off > tolerance:
            raise ValueError(
                f"an image is not a grey image times one colour: a pixel is off by {off:.3f}. This decoder is for Color-MNIST; "
                "for other images train a generator"
            )
        return grey, colours


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch of images and their codes.

    Attributes:
        images: (N,3,H,W) as a loader gives them: normalised.
        content, style: codes, N first.
        places: int64 (N,): where the sample's own style is in the bank; -1: it is not in it.
    """

    images: Tensor
    content: Tensor
    style: Tensor
    places: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Tensor | slice) -> Encoded:
        """Some of the samples."""
        return Encoded(self.images[chosen], self.content[chosen], self.style[chosen], self.places[chosen])


class MixingLoader(DeviceLoader):
    """Batches of images with their codes, in :class:`~advbn_lib.data.loader.DeviceLoader`'s order: (:class:`Encoded`, labels).

    Nothing is cropped or mirrored: the codes are of the image as it is. The bank is to hold the styles of this set, in its order.

    Args:
        images: the training set.
        content, style: its codes, M first; uint8 ones are grey levels and become floats in [0,1], float16 ones float32.
        batch_size, seed, device: see :class:`~advbn_lib.data.loader.DeviceLoader`.

    Raises:
        ValueError: there is not one code for each image.
    """

    def __init__(
        self, images: ImageSet, content: Tensor, style: Tensor, batch_size: int, seed: int, device: torch.device | str = "cpu"
    ):  # fmt: skip
        if not len(content) == len(style) == len(images):
            raise ValueError(
                f"{images.name} has {len(images)} images, but there are {len(content)} content and {len(style)} style codes: "
                "encode this very set"
            )
        super().__init__(images, batch_size, seed, device, padding=0, flip=False)
        self._content, self._style = content.to(self.device), style.to(self.device)

    def _batch(self, chosen: Tensor, generator: torch.Generator) -> tuple[Encoded, Tensor]:
        images, labels = super()._batch(chosen, generator)
        return Encoded(images, _floats(self._content[chosen]), _floats(self._style[chosen]), chosen), labels


@dataclass(frozen=True, eq=False)
class Mixer:
    """A frozen decoder, the styles to mix with, and how the classifier's input is normalised.

    Args:
        decoder: of codes; nothing here trains it.
        bank: styles of the images to mix with.
        mean, std: of each channel, in [0,1] units.
    """

    decoder: Decoder
    bank: StyleBank
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def images(self, content: Tensor, style: Tensor) -> Tensor:
        """Decoded images as the classifier wants them: normalised (N,3,H,W)."""
        images = self.decoder.decode(content, style)
        mean, std = (images.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.clamp(0, 1) - mean) / std

    def others(self, batch: Encoded, generator: torch.Generator | None = None) -> Tensor:
        """For each sample the style of another image of the bank, at random."""
        return self.bank.draw(len(batch), generator, batch.places)


def worst_style(
    predict: Callable[[Tensor], Tensor], mixer: Mixer, batch: Encoded, labels: Tensor, ball: StyleMix, climb: Steps | None,
    restarts: int = 1, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Of several styles of other images, each moved within its ball, the one with the largest cross-entropy, for each sample.

    The ascent is :func:`advbn_lib.ascent.ascend`, as AdvBN's is; what differs is the set
    (:class:`~advbn_lib.style_mix.StyleMix`) and that there are restarts, since the set is a union of balls.

    Args:
        predict: normalised images (N,3,H,W) to logits (N,K). Put the model into eval mode first.
        batch: only content and places are read.
        labels: int64 (N,).
        ball: around each of the styles, e.g. ``mixer.bank.around(0.3)``.
        climb: how to walk; None: not at all, each look is a random point of a ball (RandMix).
        restarts: looks, each around a fresh other image.
        generator: on the codes' device.

    Returns:
        Style codes (N,...), no graph.

    Raises:
        ValueError: restarts below 1.
        FloatingPointError: a loss is NaN or infinite.
    """
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")

    def objective(style: Tensor) -> Tensor:
        return cross_entropies(predict(mixer.images(batch.content, style)), labels)

    worst, worst_loss = None, None
    for _ in range(restarts):
        other = mixer.others(batch, generator)
        if climb is None:
            delta = ball.sample(other, generator)
        else:
            delta = ascend(objective, other, ball, climb, generator).delta
        style = ball.apply(other, delta)
        if restarts == 1:
            return style  # nothing to compare it with
        with torch.no_grad():
            loss = objective(style)
        if worst is None:
            worst, worst_loss = style, loss
        else:
            wins = loss > worst_loss
            worst = torch.where(wins.view(-1, *[1] * (style.dim() - 1)), style, worst)
            worst_loss = torch.maximum(loss, worst_loss)
    return worst


def _floats(codes: Tensor) -> Tensor:
    return codes.float() / 255 if codes.dtype == torch.uint8 else codes.float()
