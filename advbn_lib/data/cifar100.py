"""CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009), in torchvision's form.

``<root>/cifar-100-python`` or ``<root>/cifar100/cifar-100-python``, downloaded if it is not there. Every file is
checked before it is used: a set is read whole or not at all.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from advbn_lib.data.cifar10 import MEAN, STD
from advbn_lib.data.images import DataError, ImageSet, data_root

CLASSES = 100


def load_cifar100(split: Literal["train", "test"], root: Path | None = None, download: bool = True) -> ImageSet:
    """50,000 training or 10,000 test images of 100 (fine) classes, 32x32, in the original order.

    They are normalised as CIFAR-10 is, so that a network can be moved from one to the other.

    Args:
        root: folder that holds ``cifar-100-python``, or ``cifar100`` with it; default: see
            :func:`advbn_lib.data.images.data_root`.
        download: fetch it (170 MB, checked, with a progress bar) if it is not there.

    Raises:
        DataError: a file is missing, truncated or altered; the message names it and says how to mend it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    folder = _folder(root or data_root(), download)
    batch, names = _read(folder, split), _read(folder, "meta")
    pixels, labels = _entry(batch, "data", folder / split), _entry(batch, "fine_labels", folder / split)
    classes = tuple(_entry(names, "fine_label_names", folder / "meta"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3 * 32 * 32,):
        raise DataError(f"{folder / split}: 'data' are not rows of 3x32x32 bytes: {_mend(folder)}")
    if len(classes) != CLASSES:
        raise DataError(f"{folder / 'meta'} names {len(classes)} classes, not {CLASSES}: {_mend(folder)}")
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32))
    return ImageSet(f"cifar100/{split}", images, torch.tensor(labels, dtype=torch.int64), classes, MEAN, STD)


def _folder(root: Path, download: bool) -> Path:
    """Where the files are, all of them checked; they are downloaded first if there is no such folder."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive

    inner = root / "cifar100" / CIFAR100.base_folder
    folder = inner if inner.is_dir() else root / CIFAR100.base_folder
    if download and not folder.is_dir():
        try:
            download_and_extract_archive(CIFAR100.url, str(root), filename=CIFAR100.filename, md5=CIFAR100.tgz_md5)
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"CIFAR-100 is not in {root} and could not be downloaded ({error}): put {CIFAR100.base_folder} there, "
                "or set ADVBN_DATA to the folder that holds it"
            ) from error
    for name, md5 in (*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])):
        if not check_integrity(str(folder / name), md5):
            state = "is missing" if not (folder / name).exists() else f"is damaged (its MD5 is not {md5})"
            raise DataError(f"{folder / name} {state}: {_mend(folder)}")
    return folder


def _read(folder: Path, name: str) -> Any:
    # A pickle can run code as it is read. This one is the published file, by its checksum, or it is not read.
    try:
        return pickle.loads((folder / name).read_bytes(), encoding="latin1")
    except (pickle.UnpicklingError, EOFError, ValueError) as error:
        raise DataError(f"{folder / name} is no whole pickle ({error}): {_mend(folder)}") from error


def _entry(content: Any, key: str, path: Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        held = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path} holds {held}, but no {key!r}: {_mend(path.parent)}")
    return content[key]


def _mend(folder: Path) -> str:
    return f"remove {folder} and run again with internet; it will be downloaded"
