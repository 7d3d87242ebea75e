"""The stored CIFAR-10-C: the corrupted test images as they were published.

Source: Hendrycks and Dietterich, ICLR 2019; Zenodo record 2535967. One file a corruption, uint8 50,000x32x32x3,
severity 1 first; the images of each severity are in the order of CIFAR-10's test set. They are not what
:mod:`advbn_lib.data.corruptions` computes: the library versions and the random numbers differ. So a set from here says
"stored" in its name.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from pathlib import Path

import numpy as np
import torch

from advbn_lib.data.cifar10 import CLASSES, MEAN, STD
from advbn_lib.data.corruptions import CORRUPTIONS, EXTRA
from advbn_lib.data.images import DataError, ImageSet, data_root
from advbn_lib.files import atomic_write, sha256

URL = "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar"
SHA256 = "c72763e101c723b7c507b96205f7e938912a5d587376173b825850cf3cb876a7"  # 2,918,471,680 bytes
FOLDER = "CIFAR-10-C"
NAMES = (*CORRUPTIONS, *EXTRA, "spatter")
SEVERITIES = 5


def load_cifar10c(
    name: str, severity: int, root: Path | None = None, download: bool = False, per_severity: int = 10_000
) -> ImageSet:
    """The test images of CIFAR-10 under one corruption, as published.

    Args:
        name: one of ``NAMES``.
        severity: 1 to 5.
        root: folder that holds ``CIFAR-10-C``, or ``CIFAR-10-C.tar`` to be unpacked; default: see
            :func:`advbn_lib.data.images.data_root`.
        download: fetch the archive (2.9 GB, checked, with a progress bar) if neither is there.
        per_severity: how many images the files have of each severity; the published ones 10,000.

    Raises:
        DataError: a file is missing, damaged or of another shape; the message names it and says how to mend it.
    """
    if name not in NAMES:
        raise ValueError(f"CIFAR-10-C has no corruption {name!r}; it has {', '.join(NAMES)}")
    if severity not in range(1, SEVERITIES + 1):
        raise ValueError(f"CIFAR-10-C has severities 1 to {SEVERITIES}, got {severity}")
    root = root or data_root()
    missing = [_path(root, wanted) for wanted in (name, "labels") if not _path(root, wanted).is_file()]
    if missing:
        _unpack(root, missing[0], download)
    images = _read(_path(root, name), (SEVERITIES * per_severity, 32, 32, 3))
    labels = _read(_path(root, "labels"), (SEVERITIES * per_severity,)).reshape(SEVERITIES, per_severity)
    if (labels != labels[0]).any():
        raise DataError(f"{_path(root, 'labels')}: the severities have different labels; {_mend(root)}")
    part = images[(severity - 1) * per_severity : severity * per_severity]
    return ImageSet(
        f"cifar10c/{name}-{severity}, stored",
        torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2))),
        torch.from_numpy(labels[0].astype(np.int64)),
        CLASSES,
        MEAN,
        STD,
    )


def cifar10c_available(root: Path | None = None) -> bool:
    """Whether the files of all 15 corruptions and the labels are there. Does not look into them, downloads nothing."""
    return all(_path(root or data_root(), name).is_file() for name in (*CORRUPTIONS, "labels"))


def stored_checksum(root: Path | None = None) -> str:
    """SHA-256 over the files of the 15 corruptions and the labels: which CIFAR-10-C a record was tested on.

    Raises:
        DataError: one of them is missing, and so is the archive that has it, or it is damaged.
    """
    root = root or data_root()
    files = [_path(root, name) for name in (*CORRUPTIONS, "labels")]
    if missing := [file for file in files if not file.is_file()]:
        _unpack(root, missing[0], download=False)
    return hashlib.sha256("\n".join(sha256(file) for file in files).encode()).hexdigest()


def _path(root: Path, name: str) -> Path:
    return root / FOLDER / f"{name}.npy"


def _mend(root: Path) -> str:
    return f"remove the folder {root / FOLDER} and unpack {URL} (2.9 GB) in {root} anew"


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array, mapped and not read: most calls want a fifth of it."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); {_mend(path.parent.parent)}") from error
    if array.dtype != np.uint8 or array.shape != shape:
        raise DataError(
            f"{path} should hold uint8 {shape}, but holds {array.dtype} {array.shape}; {_mend(path.parent.parent)}"
        )
    return array


def _unpack(root: Path, missing: Path, download: bool) -> None:
    """Take the files out of the archive, each whole or not at all, and to no other place than its own."""
    archive = root / f"{FOLDER}.tar"
    if not archive.is_file():
        if not download:
            raise DataError(
                f"{missing} is missing: unpack {URL} (2.9 GB) in {root}, or call load_cifar10c with download=True"
            )
        _download(archive)
    if sha256(archive) != SHA256:
        raise DataError(f"{archive} is damaged: its SHA-256 should be {SHA256}; remove it and get it anew from {URL}")
    with tarfile.open(archive) as tar:
        for name in (*NAMES, "labels"):
            with tar.extractfile(f"{FOLDER}/{name}.npy") as source, atomic_write(_path(root, name)) as target:
                shutil.copyfileobj(source, target)


def _download(archive: Path) -> None:
    from torch.hub import download_url_to_file

    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(URL, str(archive), hash_prefix=SHA256)  # to a temporary file first; shows a bar
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{archive} is missing and could not be downloaded from {URL} ({error}): put it there by hand"
        ) from error
