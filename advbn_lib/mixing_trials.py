"""One trial of a bench of mixing: a network trained with one method on images with codes, and tested under mixing.

Where an image is grey times one colour, the exact decoder (:class:`~advbn_lib.mixing.ColourDecoder`) and exact codes serve, and no
StyleGAN is in it: :func:`in_one_colour`. Codes of a trained generator come as :class:`Material` too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from advbn_lib.checkpoints import read_checkpoint, save_checkpoint
from advbn_lib.data.images import ImageSet
from advbn_lib.methods.advmix import climb_of
from advbn_lib.methods.base import Method
from advbn_lib.mixing import ColourDecoder, Decoder, Encoded, Mixer, MixingLoader
from advbn_lib.mixing_methods import Builder, MixingSizes
from advbn_lib.mixing_robustness import MixingAttack, mixing_accuracy
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.provenance import state_checksum
from advbn_lib.style_mix import StyleBank
from advbn_lib.training import History, train

BOUNDS = (0.0, 1.0)  # of a colour


class Coloured(Protocol):
    """Labelled images and what they are made of, on one device: ``images = grey * colour``, rounded.

    :class:`~advbn_lib.data.colour_mnist.ColouredDigits` and :class:`~advbn_lib.data.smiles.TintedFaces` are such.
    """

    @property
    def images(self) -> ImageSet:
        """M images, uint8."""

    @property
    def grey(self) -> Tensor:
        """uint8, M,H,W: the content."""

    @property
    def colours(self) -> Tensor:
        """float32, M,3, in [0,1]: the style."""


@dataclass(frozen=True)
class MixingRun:
    """What a run of a bench gave; see :class:`advbn_lib.records.Record`."""

    metrics: dict[str, Any]
    curves: dict[str, Any]
    cost: dict[str, float]
    data: dict[str, Any]
    weights: dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """``start``: checksum of the weights that the training began with."""

    method: Method
    history: History
    start: str


@dataclass(frozen=True, eq=False)
class Material:
    """Labelled images, their codes, and the decoder of these.

    Attributes:
        images: M images, uint8.
        content, style: codes, M first; uint8 ones are grey levels.
        decoder: on the device of the model that is trained with it.
        bounds: of a coordinate of a style, where there are such; see :class:`~advbn_lib.style_mix.StyleMix`.
    """

    images: ImageSet
    content: Tensor
    style: Tensor
    decoder: Decoder
    bounds: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def bank(self, device: torch.device) -> StyleBank:
        """The styles, to mix with."""
        return StyleBank(self.style.to(device), self.images.labels.to(device), self.bounds)

    def batch(self) -> Encoded:
        """All of them, as one batch that is in no bank."""
        images = self.images.normalise(self.images.images.float() / 255)
        nowhere = torch.full((len(self),), -1, device=images.device)
        content, style = (
            code.float() / 255 if code.dtype == torch.uint8 else code for code in (self.content, self.style)
        )
        return Encoded(images, content, style, nowhere)


def in_one_colour(coloured: Coloured) -> Material:
    """Images that are grey times one colour, with the exact decoder."""
    return Material(coloured.images, coloured.grey.unsqueeze(1), coloured.colours, ColourDecoder(), BOUNDS)


def train_on(
    train_set: Coloured | Material, sizes: MixingSizes, build: Builder, seed: int, device: torch.device, checkpoint: Path | None,
    key: str, show_progress: bool,
) -> Trained:  # fmt: skip
    """Train a new network; the seed says its weights and the order of the images.

    Args:
        train_set: on the CPU; the bank has its styles.
        checkpoint, key: see :func:`advbn_lib.training.train`.
    """
    material = train_set if isinstance(train_set, Material) else in_one_colour(train_set)
    images = material.images
    torch.manual_seed(seed)
    model = DigitCNN(sizes.width, len(images.classes), images.images.shape[-1])
    start = state_checksum(model.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    method = build(sizes, model, material.decoder, material.bank(device), images)
    loader = MixingLoader(images, material.content, material.style, sizes.schedule.batch_size, seed, device)
    history = train(
        method, loader, sizes.schedule, checkpoint, key, show_progress=show_progress, precision=torch.float32
    )
    return Trained(method, history, start)


def accuracy_under_mixing(
    method: Method, attacked: Coloured | Material, others: Coloured | Material, sizes: MixingSizes, show_progress: bool
) -> list[float]:
    """Share of ``attacked`` that is right as it is and after each restart so far, mixed with the styles of ``others``.

    Args:
        attacked, others: real test images, none in both; on the model's device.
    """
    attacked, others = (each if isinstance(each, Material) else in_one_colour(each) for each in (attacked, others))
    images = attacked.images
    mixer = Mixer(attacked.decoder, others.bank(images.labels.device), images.mean, images.std)
    attack = MixingAttack(sizes.eps, climb_of(sizes.attack_steps), sizes.attack_restarts)
    return mixing_accuracy(method, mixer, attacked.batch(), images.labels, attack, show_progress)


def encoded(coloured: Coloured) -> Encoded:
    """Images in one colour each and their codes, as one batch that is in no bank."""
    return in_one_colour(coloured).batch()


def once(
    folder: Path | None, identity: dict[str, Any], trial: Callable[[Path | None, str], tuple[nn.Module, dict[str, Any]]]
) -> dict[str, Any]:
    """The row that a trial gives; one that is kept in ``folder`` from the same trial is taken from there.

    Args:
        folder: None: nothing is kept.
        identity: all that the row depends on, as JSON.
        trial: from a file for the checkpoint of its training, and the key of that, to its model and its row.
    """
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    if folder is None:
        return trial(None, key)[1]
    checkpoint, done = (folder / f"{kind}-{key[:12]}.pt" for kind in ("training", "level"))
    if done.exists() and (stored := read_checkpoint(done))["key"] == key:
        return stored["progress"]
    model, row = trial(checkpoint, key)
    save_checkpoint(done, {"model": model}, row, key)
    checkpoint.unlink(missing_ok=True)
    return row
