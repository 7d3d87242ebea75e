"""Published weights, found or downloaded, and checked."""

from __future__ import annotations

from pathlib import Path

from advbn_lib.data.images import DataError, data_root
from advbn_lib.files import sha256

# akamaster/pytorch_resnet_cifar10, BSD-2-Clause. The file names begin their SHA-256.
SOURCE = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models"
PUBLISHED = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th", "resnet56": "resnet56-4bfd9763.th"}


def published_weights(network: str, root: Path | None = None) -> Path:
    """The file with the released CIFAR-10 weights of ``"resnet20"``, ``"resnet32"`` or ``"resnet56"``; downloaded if needed.

    Raises:
        ValueError: there are none for this network.
        DataError: the file is damaged, or cannot be downloaded.
    """
    if network not in PUBLISHED:
        raise ValueError(f"no published CIFAR-10 weights for {network!r}; there are some for {', '.join(PUBLISHED)}")
    path = (root or data_root()) / "weights_cifar10_resnet" / PUBLISHED[network]
    if not path.exists():
        _download(f"{SOURCE}/{path.name}", path)
    start = path.stem.rpartition("-")[2]
    if not sha256(path).startswith(start):
        raise DataError(
            f"{path} is damaged: its SHA-256 should begin with {start}; remove it to have it downloaded anew"
        )
    return path


def _download(url: str, path: Path) -> None:
    from torch.hub import download_url_to_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(
            url, str(path), hash_prefix=path.stem.rpartition("-")[2]
        )  # to a temporary file first; shows a bar
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{path} is missing and could not be downloaded from {url} ({error}): put the file there by hand"
        ) from error
