"""Data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from advbn_lib.data.cifar10 import load_cifar10
from advbn_lib.data.cifar100 import load_cifar100
from advbn_lib.data.colour_mnist import EXTREME, UNBIASED, VARIANCES, colour_mnist
from advbn_lib.data.digits import load_digits
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.data.mnist import load_mnist
from advbn_lib.data.pacs import load_pacs_split
from advbn_lib.data.smiles import load_smiles
from advbn_lib.data.svhn import load_svhn
from advbn_lib.data.tiny_imagenet import load_tiny_imagenet

DATA_SETS: dict[str, Callable[[Literal["train", "test"]], ImageSet]] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "digits": load_digits,
    "mnist": load_mnist,
    "smiles": load_smiles,
    "svhn": load_svhn,
    "tiny_imagenet": load_tiny_imagenet,
    **{f"colour_mnist/{variance:g}": partial(colour_mnist, variance=variance) for variance in (EXTREME, *VARIANCES)},
    "colour_mnist/unbiased": partial(colour_mnist, variance=UNBIASED),
    **{f"pacs/{domain}": partial(load_pacs_split, domain) for domain in ("photo", "art_painting", "cartoon", "sketch")},
}


def load_images(name: str, split: Literal["train", "test"]) -> ImageSet:
    """A data set by name: one of ``DATA_SETS``."""
    if name not in DATA_SETS:
        raise DataError(f"no data set {name!r}; there are {', '.join(sorted(DATA_SETS))}")
    return DATA_SETS[name](split)
