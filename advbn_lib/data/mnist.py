"""MNIST (LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998), in torchvision's layout.

``<root>/MNIST/raw`` or ``<root>/mnist/MNIST/raw`` with four files in the IDX format, plain or packed (``.gz``), downloaded if they
are not there. What counts is the unpacked content, which must have the published checksum: packing a file again changes the
``.gz`` and not the digits. A set is read whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advbn_lib.data.images import DataError, ImageSet, data_root

CLASSES = tuple("0123456789")
SIDE, PADDING = 28, 2
MEAN = STD = (0.5, 0.5, 0.5)
# Images and labels of each split: a file and the MD5 of its unpacked content.
FILES = {
    "train": (
        ("train-images-idx3-ubyte", "6bbc9ace898e44ae57da46a324031adb"),
        ("train-labels-idx1-ubyte", "a25bea736e30d166cdddb491f175f624"),
    ),
    "test": (
        ("t10k-images-idx3-ubyte", "2646ac647ad5339dbf082846283269ea"),
        ("t10k-labels-idx1-ubyte", "27ae3e4e09519cfbb04c329615203637"),
    ),
}


def load_mnist(split: Literal["train", "test"], root: Path | None = None, download: bool = True) -> ImageSet:
    """60,000 training or 10,000 test digits, in the original order; 28x28, with a black border of 2 pixels: 32x32.

    Grey is repeated in the three channels. A value v in [0,1] is normalised to 2v - 1. Do not flip them in training: a mirrored
    digit is none, or another one.

    Args:
        root: folder that holds ``MNIST/raw``, or ``mnist`` with it; default: see :func:`advbn_lib.data.images.data_root`.
        download: fetch the split's files (10 or 2 MB, checked, with a progress bar) if they are not there.

    Raises:
        DataError: a file is missing, truncated or altered; the message names it and says how to mend it.
    """
    grey, labels = grey_digits(split, root, download)
    return ImageSet(f"mnist/{split}", grey.unsqueeze(1).repeat(1, 3, 1, 1), labels, CLASSES, MEAN, STD)


def grey_digits(
    split: Literal["train", "test"], root: Path | None = None, download: bool = True
) -> tuple[Tensor, Tensor]:
    """The same digits (uint8, N,32,32; 255 is ink) and their labels (int64, N). Arguments and errors: see :func:`load_mnist`."""
    if split not in FILES:
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    folder = _folder(root or data_root())
    images, labels = (_read(folder, name, md5, download) for name, md5 in FILES[split])
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1]:
        raise DataError(
            f"{folder}: the {split} images have shape {images.shape} and the labels {labels.shape}, expected N,{SIDE},{SIDE} and N: "
            f"{_mend(folder)}"
        )
    return F.pad(torch.from_numpy(images), [PADDING] * 4), torch.from_numpy(labels.astype(np.int64))


def _folder(root: Path) -> Path:
    inner = root / "mnist"
    return (inner if inner.is_dir() else root) / "MNIST" / "raw"


def _read(folder: Path, name: str, md5: str, download: bool) -> np.ndarray:
    """The array in a file, which has the published checksum; it is downloaded first if it is not there."""
    path, packed = folder / name, folder / f"{name}.gz"
    if not path.exists() and not packed.exists():
        _fetch(packed, download)
    if path.exists():
        content = path.read_bytes()
    else:
        path = packed
        try:
            content = gzip.decompress(packed.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{packed} is no whole gzip file ({error}): {_mend(packed)}") from error
    actual = hashlib.md5(content).hexdigest()
    if actual != md5:
        raise DataError(
            f"{path} is damaged or altered: unpacked it has {len(content):,} bytes with MD5 {actual}, expected {md5}; {_mend(path)}"
        )
    return _array(content, path)


def _fetch(packed: Path, download: bool) -> None:
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import download_url

    urls = [mirror + packed.name for mirror in MNIST.mirrors]
    if not download:
        raise DataError(f"{packed} is missing: put it there (from {urls[0]}), or run again with internet")
    failures = []
    for url in urls:
        try:
            return download_url(url, str(packed.parent), packed.name, dict(MNIST.resources)[packed.name])
        except (OSError, RuntimeError) as error:
            packed.unlink(missing_ok=True)  # what was fetched is not the file
            failures.append(f"{url}: {error}")
    raise DataError(
        f"MNIST's {packed.name} is not in {packed.parent} and could not be downloaded ({'; '.join(failures)}): put it there, or set "
        "ADVBN_DATA to the folder that holds it"
    )


def _array(content: bytes, path: Path) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8, the number of dimensions, each size as four bytes (the highest first), then the data."""
    dimensions = content[3] if content[:3] == b"\x00\x00\x08" and len(content) > 3 else 0
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if not dimensions or len(content) != start + math.prod(shape):
        raise DataError(f"{path} is no IDX file of bytes, or not a whole one: {_mend(path)}")
    return np.frombuffer(bytearray(content), dtype=np.uint8, offset=start).reshape(
        shape
    )  # a bytearray can be written to


def _mend(path: Path) -> str:
    return f"remove {path} and run again with internet; it will be downloaded"
