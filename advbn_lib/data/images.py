"""A set of small images, in memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class DataError(RuntimeError):
    """Data are missing, damaged or of the wrong kind; the message names the file, what was expected, and how to mend it."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size.

    Attributes:
        name: e.g. ``"cifar10/train"``.
        images: uint8, N,3,H,W.
        labels: int64, N, from 0 to ``len(classes) - 1``.
        classes: their names.
        mean, std: of each channel, in [0,1] units: what the networks expect their input to be normalised with.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3:
            raise DataError(
                f"{self.name}: images must be uint8 and N,3,H,W, got {self.images.dtype} and {tuple(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise DataError(f"{self.name}: {len(self.images)} images but {tuple(self.labels.shape)} labels")
        if len(self.labels) == 0:
            raise DataError(f"{self.name}: no images")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"{self.name}: labels go from {low} to {high}, but there are {len(self.classes)} classes (0 to {len(self.classes) - 1})"
            )

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of pixels and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images.cpu().numpy()))
        digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def first(self, count: int | None, start: int = 0) -> ImageSet:
        """``count`` images from number ``start`` on, in the data set's own order; all that are left if None.

        Raises:
            DataError: if there are fewer.
        """
        if count is None and start == 0:
            return self
        end = len(self) if count is None else start + count
        if not 0 <= start < end <= len(self):
            raise DataError(f"{self.name}: asked for images {start} to {end - 1}, but it has {len(self)}")
        return dataclasses.replace(self, images=self.images[start:end], labels=self.labels[start:end])

    def part(self, index: int, parts: int) -> ImageSet:
        """Every ``parts``-th image from number ``index`` on: the parts 0 to ``parts - 1`` share the set out.

        Raises:
            DataError: no such part, or it would be empty.
        """
        if not 0 <= index < parts <= len(self):
            raise DataError(f"{self.name}: there is no part {index} of {parts} of its {len(self)} images")
        return dataclasses.replace(self, images=self.images[index::parts], labels=self.labels[index::parts])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on another device."""
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def normalise(self, images: Tensor) -> Tensor:
        """Images in [0,1] (N,3,H,W) to what the networks expect."""
        mean, std = (
            torch.tensor(v, device=images.device, dtype=images.dtype).view(1, 3, 1, 1) for v in (self.mean, self.std)
        )
        return (images - mean) / std


def data_root() -> Path:
    """Where data sets are: the folder that the environment variable ``ADVBN_DATA`` names, else a cache in the home folder."""
    named = os.environ.get("ADVBN_DATA")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "advbn_lib"
