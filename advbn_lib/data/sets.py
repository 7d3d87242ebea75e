"""Data sets by name."""

from __future__ import annotations

from typing import Literal

from advbn_lib.data.cifar10 import load_cifar10
from advbn_lib.data.digits import load_digits
from advbn_lib.data.images import DataError, ImageSet

DATA_SETS = {"cifar10": load_cifar10, "digits": load_digits}


def load_images(name: str, split: Literal["train", "test"]) -> ImageSet:
    """A data set by name: one of ``DATA_SETS``."""
    if name not in DATA_SETS:
        raise DataError(f"no data set {name!r}; there are {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name](split)
