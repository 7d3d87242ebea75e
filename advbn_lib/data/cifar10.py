"""CIFAR-10 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009), from either of two forms.

- torchvision's: ``<root>/cifar-10-batches-py``, downloaded if it is not there.
- packed: ``<root>/cifar10`` with 60 lossless WebP sheets of 25x40 images, ``labels.json``, ``array_checks.json`` and
  ``SHA256SUMS``.

Every file is checked before it is used: a set is read whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from advbn_lib.data.images import DataError, ImageSet, data_root
from advbn_lib.files import sha256

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# What the published CIFAR ResNets were trained with (ImageNet's values, not CIFAR's own).
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
SHEETS, ROWS, COLUMNS = 10, 25, 40


def load_cifar10(split: Literal["train", "test"], root: Path | None = None, download: bool = True) -> ImageSet:
    """50,000 training or 10,000 test images, 32x32, in the original order.

    Args:
        root: folder that holds ``cifar10`` (packed) or ``cifar-10-batches-py``; default: see :func:`advbn_lib.data.images.data_root`.
        download: fetch torchvision's form (170 MB, checked, with a progress bar) if neither is there.

    Raises:
        DataError: a file is missing, truncated or altered; the message names it and says how to mend it.
    """
    if split not in BATCHES:
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    root = root or data_root()
    folder = root / "cifar10"
    if any(folder.glob("*.webp")):
        pixels, labels = _read_packed(folder, split)
    else:
        official = folder if (folder / "cifar-10-batches-py").is_dir() else root
        pixels, labels = _read_official(official, split, download)
    return ImageSet(f"cifar10/{split}", torch.from_numpy(pixels), torch.tensor(labels), CLASSES, MEAN, STD)


def _read_packed(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    expected = _checksums(folder)
    checks = json.loads(_checked(folder, "array_checks.json", expected).read_text())["sha256_of_uint8_10000x3072_array"]
    all_labels = json.loads(_checked(folder, "labels.json", expected).read_text())["labels"]
    parts, labels = [], []
    for batch in BATCHES[split]:
        sheets = [_read_sheet(_checked(folder, f"{batch}_{i}.webp", expected)) for i in range(SHEETS)]
        pixels = np.ascontiguousarray(np.concatenate(sheets).transpose(0, 3, 1, 2))
        if hashlib.sha256(pixels).hexdigest() != checks[batch]:
            raise DataError(f"{folder}: the decoded pixels of {batch} differ from array_checks.json: {_mend(folder)}")
        parts.append(pixels)
        labels += all_labels[batch]
    return np.concatenate(parts), labels


def _checksums(folder: Path) -> dict[str, str]:
    listing = folder / "SHA256SUMS"
    if not listing.is_file():
        raise DataError(f"{listing} is missing: without it the packed CIFAR-10 cannot be checked; {_mend(folder)}")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = [re.fullmatch(r"([0-9a-f]{64})[ *]+(\S+)", line.strip()) for line in lines]
    if not all(rows):
        raise DataError(f"{listing} is damaged in line {rows.index(None) + 1}: {_mend(folder)}")
    return {row[2]: row[1] for row in rows}


def _checked(folder: Path, name: str, expected: dict[str, str]) -> Path:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is missing: {_mend(folder)}")
    actual = sha256(path)
    if actual != expected.get(name):
        raise DataError(
            f"{path} is damaged or altered: {path.stat().st_size:,} bytes with SHA-256 {actual[:12]}…, "
            f"expected {str(expected.get(name))[:12]}… (SHA256SUMS); {_mend(folder)}"
        )
    return path


def _mend(folder: Path) -> str:
    return f"copy the folder anew, or remove {folder} to have CIFAR-10 downloaded"


def _read_sheet(path: Path) -> np.ndarray:
    """One sheet of 1,000 images, row by row: 1000,32,32,3."""
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    return sheet.reshape(ROWS, 32, COLUMNS, 32, 3).swapaxes(1, 2).reshape(ROWS * COLUMNS, 32, 32, 3)


def _read_official(root: Path, split: str, download: bool) -> tuple[np.ndarray, list[int]]:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = root / CIFAR10.base_folder
    if folder.is_dir() or not download:
        files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
        for name, md5 in files:
            if not check_integrity(str(folder / name), md5):
                state = "is missing" if not (folder / name).exists() else f"is damaged (its MD5 is not {md5})"
                raise DataError(
                    f"{folder / name} {state}: remove {folder} and run again with internet; it will be downloaded"
                )
    try:
        data = CIFAR10(str(root), train=split == "train", download=download and not folder.is_dir())
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 is not in {root} and could not be downloaded ({error}): put cifar-10-batches-py there, "
            "or set ADVBN_DATA to the folder that holds it"
        ) from error
    return np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), data.targets
