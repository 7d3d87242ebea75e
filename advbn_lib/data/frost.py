"""The photographs of frost that CIFAR-10-C lays over images: found or downloaded, and checked.

Source: hendrycks/robustness (Apache-2.0), folder ``ImageNet-C/imagenet_c/imagenet_c/frost``, one fixed commit.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advbn_lib.data.images import DataError, data_root
from advbn_lib.files import sha256

SOURCE = (
    "https://raw.githubusercontent.com/hendrycks/robustness/8190fe329f5f072a06e3a2aea02bb5dda69aed9f"
    "/ImageNet-C/imagenet_c/imagenet_c/frost"
)
# SHA-256 of the five that the CIFAR script draws from (there is a sixth, which it never draws).
FILES = {
    "frost1.png": "ff9f907860bd7a835d459e32f9d588062b7f61ee267343cc7222b56753a14755",
    "frost2.png": "fe211a89b336999c207a852ce05818d4545d0b57c5beadd824b4cc9d9a9b6137",
    "frost3.png": "2d0d50b4a9bb213f38b024ef7768731bb83cc08d2f26b5766bbc167cdfa0e504",
    "frost4.jpg": "3f8b91ca1a9fa7167b09e773da53f5ae60d0a1fd88f02a783f6e328a72887f6e",
    "frost5.jpg": "5fc6a19df4a429ba68abdcc8f8a4278d4c9f81c9ccafd2c92ab0c8cf8992ebd2",
}
SHRINK = 5  # the scale of 0.2


def frost_overlays(root: Path | None = None) -> tuple[Tensor, ...]:
    """The five overlays at 0.2 of their size: uint8, 3,H,W each (63 to 120 rows, 105 to 180 columns). Read once.

    Args:
        root: folder that holds ``frost``; default: see :func:`advbn_lib.data.images.data_root`. What is missing is
            downloaded.

    Raises:
        DataError: a file is damaged, or missing and cannot be downloaded.
    """
    return _read((root or data_root()) / "frost")


def frost_available(root: Path | None = None) -> bool:
    """Whether all five files are there and whole. Downloads nothing."""
    folder = (root or data_root()) / "frost"
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in FILES.items())


@lru_cache
def _read(folder: Path) -> tuple[Tensor, ...]:
    return tuple(_shrunk(_checked(folder / name, digest)) for name, digest in FILES.items())


def _checked(path: Path, digest: str) -> Path:
    if not path.is_file():
        _download(f"{SOURCE}/{path.name}", path, digest)
    if sha256(path) != digest:
        raise DataError(f"{path} is damaged: its SHA-256 should be {digest}; remove it to have it downloaded anew")
    return path


def _shrunk(path: Path) -> Tensor:
    """Bilinear sampling at a scale of 0.2 falls on whole pixels, the third of each five; so does OpenCV's resize."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels[SHRINK // 2 :: SHRINK, SHRINK // 2 :: SHRINK].transpose(2, 0, 1).copy())


def _download(url: str, path: Path, digest: str) -> None:
    from torch.hub import download_url_to_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(path), hash_prefix=digest, progress=False)  # to a temporary file first
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{path} is missing and could not be downloaded from {url} ({error}): put the file there by hand, "
            f"or leave out the shift 'frost'"
        ) from error
