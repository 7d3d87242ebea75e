"""Tiny ImageNet: 200 of ImageNet's classes at 64x64 (made for Stanford's course CS231n).

``<root>/tiny-imagenet-200`` or ``<root>/tiny_imagenet/tiny-imagenet-200``, as its archive is laid out, downloaded if it is not
there. Below that folder:

==============================  ==============================================================
``wnids.txt``                   the classes by WordNet number (wnid), one a line
``words.txt``                   a wnid, a tab, and its names, separated by commas
``train/<wnid>/images``         ``<wnid>_<number>.JPEG``, 500 for each class
``val/images``                  ``val_<number>.JPEG``, 10,000
``val/val_annotations.txt``     a file's name, its wnid, and a box, separated by tabs
==============================  ==============================================================

The archive's test images have no labels; as is usual, the validation images serve as the test set. The archive is checked by
its MD5 when it is downloaded. A folder is checked each time: its counts, names, and that every image is whole and 64x64.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from advbn_lib.data.imagenet import MEAN, STD
from advbn_lib.data.images import DataError, ImageSet, data_root

FOLDER = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
CLASSES, SIDE = 200, 64
PER_CLASS = {"train": 500, "test": 50}


def load_tiny_imagenet(
    split: Literal["train", "test"], root: Path | None = None, download: bool = True, complete: bool = True
) -> ImageSet:
    """100,000 training or 10,000 test images (the validation part) of 200 classes, 64x64.

    Classes are numbered in the order of their sorted wnids, as in ImageNet, and named by their first name. Grey images become
    colour images with three equal channels. Training images come class by class in turn, so that the first ones are of all
    classes; test images in the order of their annotations.

    Args:
        root: folder that holds ``tiny-imagenet-200``, or ``tiny_imagenet`` with it; default: see
            :func:`advbn_lib.data.images.data_root`.
        download: fetch it (248 MB, checked, with a progress bar) if it is not there.
        complete: refuse a set without the published numbers of classes and images.

    Raises:
        DataError: files are missing, damaged, of another size or in the wrong place; the message names them and says how to mend
            it.
    """
    if split not in PER_CLASS:
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    folder = _folder(root or data_root(), download)
    wnids, names = _classes(folder, complete)
    found = _training_files(folder, wnids) if split == "train" else _validation_files(folder, wnids)
    _check_counts(folder, wnids, [label for _, label in found], PER_CLASS[split] if complete else None)
    pixels = np.empty(
        (len(found), 3, SIDE, SIDE), dtype=np.uint8
    )  # at once: a list of arrays would need twice the memory
    for place, (path, _) in enumerate(found):
        pixels[place] = _read(path)
    labels = torch.tensor([label for _, label in found])
    return ImageSet(f"tiny_imagenet/{split}", torch.from_numpy(pixels), labels, names, MEAN, STD)


def _folder(root: Path, download: bool) -> Path:
    """Where the set is; it is downloaded and unpacked first if there is no such folder."""
    from torchvision.datasets.utils import download_and_extract_archive

    inner = root / "tiny_imagenet" / FOLDER
    folder = inner if inner.is_dir() else root / FOLDER
    if folder.is_dir():
        return folder
    if not download:
        raise DataError(f"{folder} is missing: unpack {Path(URL).name} there (from {URL})")
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Unpacked aside, then moved: after an interrupt there is no folder, and not one with half of the images.
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{FOLDER}.") as aside:
            download_and_extract_archive(URL, str(root), aside, md5=MD5)
            (Path(aside) / FOLDER).replace(folder)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"Tiny ImageNet is not in {root} and could not be downloaded ({error}): unpack {Path(URL).name} there (from {URL}), "
            "or set ADVBN_DATA to the folder that holds it"
        ) from error
    return folder


def _classes(folder: Path, complete: bool) -> tuple[list[str], tuple[str, ...]]:
    """The sorted wnids, and the classes' names."""
    wnids = sorted(line.strip() for line in _lines(folder / "wnids.txt") if line.strip())
    if bad := [wnid for wnid in wnids if not re.fullmatch(r"n\d{8}", wnid)]:
        raise DataError(f"{folder / 'wnids.txt'}: {bad[0]!r} is no WordNet number, such as n01443537; {_mend(folder)}")
    if len(set(wnids)) != len(wnids) or not wnids or (complete and len(wnids) != CLASSES):
        raise DataError(
            f"{folder / 'wnids.txt'} names {len(set(wnids))} classes in {len(wnids)} lines, and should name {CLASSES}; {_mend(folder)}"
        )
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt") if "\t" in line)
    if unnamed := [wnid for wnid in wnids if wnid not in words]:
        raise DataError(f"{folder / 'words.txt'} has no name for {_some(unnamed)}; {_mend(folder)}")
    return wnids, tuple(words[wnid].split(",")[0].strip() for wnid in wnids)


def _training_files(folder: Path, wnids: Sequence[str]) -> list[tuple[Path, int]]:
    """Files and labels, the classes in turn."""
    train = folder / "train"
    there = {path.name for path in _entries(train, folder) if path.is_dir()}
    missing, unknown = sorted(set(wnids) - there), sorted(there - set(wnids))
    if missing or unknown:
        state = f"lacks the classes {_some(missing)}" if missing else f"has folders that are no class: {_some(unknown)}"
        raise DataError(f"{train} {state}; {_mend(folder)}")
    placed = []
    for label, wnid in enumerate(wnids):
        images = [path for path in _entries(train / wnid / "images", folder) if path.suffix == ".JPEG"]
        if strays := [path.name for path in images if not re.fullmatch(rf"{wnid}_\d+\.JPEG", path.name)]:
            raise DataError(
                f"{train / wnid / 'images'}: {_some(strays)} should not be there: this class's images are named "
                f"{wnid}_<number>.JPEG; {_mend(folder)}"
            )
        images.sort(key=lambda path: int(path.stem.split("_")[1]))
        placed += [(place, label, path) for place, path in enumerate(images)]
    return [(path, label) for _, label, path in sorted(placed, key=lambda image: image[:2])]


def _validation_files(folder: Path, wnids: Sequence[str]) -> list[tuple[Path, int]]:
    """Files and labels, in the order of the annotations."""
    listing, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    found: dict[str, int] = {}
    for number, line in enumerate(_lines(listing), start=1):
        name, wnid = (line.split("\t") + [""])[:2]
        if not line.strip():
            continue
        if wnid not in label_of or name in found or Path(name).name != name:
            reason = f"a second label for {name}" if name in found else "no file name and class of wnids.txt"
            raise DataError(f"{listing}, line {number}: {line[:60]!r} is {reason}; {_mend(folder)}")
        found[name] = label_of[wnid]
    there = {path.name for path in _entries(images, folder) if path.suffix == ".JPEG"}
    missing, unknown = sorted(found.keys() - there), sorted(there - found.keys())
    if missing or unknown:
        state = f"lacks {_some(missing)}" if missing else f"has images without a label: {_some(unknown)}"
        raise DataError(f"{images} {state}; {_mend(folder)}")
    return [(images / name, label) for name, label in found.items()]


def _check_counts(folder: Path, wnids: Sequence[str], labels: Sequence[int], expected: int | None) -> None:
    counts = Counter(labels)
    for label, wnid in enumerate(wnids):
        if counts[label] != expected if expected is not None else not counts[label]:
            wanted = (
                f"{expected}: {_mend(folder)}, or use load_tiny_imagenet(..., complete=False)" if expected else "some"
            )
            raise DataError(f"{folder}: class {wnid} has {counts[label]} images here, and should have {wanted}")


def _read(path: Path) -> np.ndarray:
    """3,64,64 bytes."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises SyntaxError for some broken files
        raise DataError(f"{path} is no whole image ({error}): copy it anew") from error
    if pixels.shape != (SIDE, SIDE, 3):
        raise DataError(
            f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, and Tiny ImageNet {SIDE}x{SIDE}: is it of another set?"
        )
    return pixels.transpose(2, 0, 1)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"{path} is missing; {_mend(path.parent)}")
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is damaged: it is no text ({error}); {_mend(path.parent)}") from error


def _entries(folder: Path, top: Path) -> list[Path]:
    """What is in a folder, without hidden files, which some systems leave there."""
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; {_mend(top)}")
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _mend(folder: Path) -> str:
    return f"unpack {Path(URL).name} (from {URL}) anew over {folder}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
