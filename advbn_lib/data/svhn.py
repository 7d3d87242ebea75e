"""SVHN (Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011), in torchvision's form.

``train_32x32.mat`` and ``test_32x32.mat`` in ``<root>/svhn`` or ``<root>``, downloaded if they are not there. A file is checked
before it is used: a set is read whole or not at all.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from advbn_lib.data.cifar10 import MEAN, STD
from advbn_lib.data.images import DataError, ImageSet, data_root

CLASSES = tuple("0123456789")
SIDE = 32


def load_svhn(split: Literal["train", "test"], root: Path | None = None, download: bool = True) -> ImageSet:
    """73,257 training or 26,032 test images of house numbers, 32x32, in the original order; the class is the digit in the middle.

    They are normalised as CIFAR-10 is, so that a network can be moved from one to the other. Do not flip them in training: a
    mirrored digit is none, or another one.

    Args:
        root: folder that holds the files, or ``svhn`` with them; default: see :func:`advbn_lib.data.images.data_root`.
        download: fetch the file of the split (182 or 64 MB, checked, with a progress bar) if it is not there.

    Raises:
        DataError: a file is missing, truncated or altered, or SciPy is not installed; the message says how to mend it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    path = _checked(root or data_root(), split, download)
    content = _read(path)
    pixels, labels = _entry(content, "X", path), _entry(content, "y", path)
    if pixels.dtype != np.uint8 or pixels.shape[:3] != (SIDE, SIDE, 3) or pixels.ndim != 4:
        raise DataError(f"{path}: 'X' is no array of bytes of shape 32,32,3,N: {_mend(path)}")
    labels = labels.reshape(-1).astype(np.int64)
    if labels.size and not 1 <= labels.min() <= labels.max() <= 10:
        raise DataError(
            f"{path}: labels go from {labels.min()} to {labels.max()}, in this file they should be 1 to 10 (10 for the digit 0): "
            f"{_mend(path)}"
        )
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    # The file comes from MATLAB, where places count from 1: the digit 0 is its class 10.
    return ImageSet(f"svhn/{split}", torch.from_numpy(images), torch.from_numpy(labels % 10), CLASSES, MEAN, STD)


def _checked(root: Path, split: str, download: bool) -> Path:
    """The split's file, which has the published checksum; it is downloaded first if it is not there."""
    from torchvision.datasets import SVHN
    from torchvision.datasets.utils import calculate_md5, check_integrity, download_url

    url, name, md5 = SVHN.split_list[split]
    path = root / "svhn" / name
    if not path.exists() and ((root / name).exists() or not (root / "svhn").is_dir()):
        path = root / name
    if download and not path.exists():
        try:
            download_url(url, str(path.parent), name, md5)
        except (OSError, RuntimeError) as error:
            path.unlink(missing_ok=True)  # what was fetched is not the file
            raise DataError(
                f"SVHN's {name} is not in {path.parent} and could not be downloaded ({error}): put it there (from {url}), or set "
                "ADVBN_DATA to the folder that holds it"
            ) from error
    if not path.exists():
        raise DataError(f"{path} is missing: put it there (from {url}), or run again with internet")
    if not check_integrity(str(path), md5):
        raise DataError(
            f"{path} is damaged or altered: {path.stat().st_size:,} bytes with MD5 {calculate_md5(str(path))}, expected {md5}; "
            f"{_mend(path)}"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise DataError("SVHN comes in MATLAB's form, which is read with SciPy: pip install scipy") from error
    try:
        return loadmat(path)
    except (MatReadError, OSError, ValueError, TypeError, NotImplementedError, zlib.error) as error:
        raise DataError(f"{path} is no whole MATLAB file ({error}): {_mend(path)}") from error


def _entry(content: dict[str, Any], key: str, path: Path) -> np.ndarray:
    if not isinstance(content.get(key), np.ndarray):
        held = ", ".join(repr(name) for name in content if not name.startswith("__")) or "nothing"
        raise DataError(f"{path} holds {held}, but no array {key!r}: {_mend(path)}")
    return content[key]


def _mend(path: Path) -> str:
    return f"remove {path} and run again with internet; it will be downloaded"
