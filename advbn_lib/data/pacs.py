"""PACS: the same seven classes as photographs, art paintings, cartoons and sketches.

Source: Li et al., "Deeper, Broader and Artier Domain Generalization", ICCV 2017. There a network is trained on three of
the domains and tested on the fourth; here it is trained on photographs and tested on the three others.

Images are read from ``<root>/pacs112`` (reduced to 112x112) or else ``<root>/PACS`` (the original, 227x227), one file an
image: ``<domain>/<class>/<name>.<jpg, png or webp>``. If ``SHA256SUMS`` lies there, every file is checked against it.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from advbn_lib.data.cifar10 import MEAN, STD
from advbn_lib.data.images import DataError, ImageSet, data_root
from advbn_lib.files import sha256

DOMAINS = {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929}  # images in each
CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
TRAINING_DOMAIN = "photo"
FOLDERS = ("pacs112", "PACS")
IMAGES_IN = ("", "images", "kfold")  # where the domains lie within the folder, in the copies in circulation
FILE_TYPES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = ("train", "validation", "all")
LISTS = {"train": "train", "validation": "crossval"}  # what the authors' lists call them
VALIDATION_PART = 10  # one image in so many

Split = Literal["train", "validation", "all"]


def load_pacs_split(domain: str, split: Literal["train", "test"], size: int = 64) -> ImageSet:
    """The training or the test images of a domain, as this book uses them: trained on photographs, tested on all four.

    Photographs have the training and the validation part of :func:`load_pacs`. In another domain every image is a test
    image, and there are no training images.

    Raises:
        ValueError: for the training images of another domain than photographs.
        DataError: see :func:`load_pacs`.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    if domain == TRAINING_DOMAIN:
        return load_pacs(domain, "train" if split == "train" else "validation", size)
    if split == "train":
        raise ValueError(
            f"all of {domain!r} are test images here; to train on them use load_pacs({domain!r}, 'train'), and test on "
            "its 'validation'"
        )
    return load_pacs(domain, "all", size)


def load_pacs(
    domain: str, split: Split, size: int = 64, seed: int = 0, root: Path | None = None, complete: bool = True
) -> ImageSet:
    """One domain of PACS, or a part of it, in a fixed order that mixes the classes.

    Mean and standard deviation are those of CIFAR-10's networks, which are what is fine-tuned on PACS here.

    With the authors' lists (``<domain>_train_kfold.txt`` and ``<domain>_crossval_kfold.txt``, beside the images or in a
    folder there) the parts are theirs. Else one image in ten of each class is for validation; which ones depends on
    ``seed`` and the names of the files alone, not on their type. The set's name says which split it is.

    Args:
        domain: one of ``DOMAINS``.
        split: ``"train"``, ``"validation"``, or ``"all"`` for the whole domain.
        size: side of the images. They are resized bilinearly, with antialiasing.
        seed: of the split, where there are no lists.
        root: folder that holds ``pacs112`` or ``PACS``; default: see :func:`advbn_lib.data.images.data_root`.
        complete: refuse a domain without the published number of images.

    Raises:
        ValueError: there is no such domain or split, or the size is not positive.
        DataError: files are missing, damaged, unknown or no images; the message names them and says how to mend it.
    """
    if domain not in DOMAINS:
        raise ValueError(f"no domain {domain!r} in PACS; there are {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    if size < 1:
        raise ValueError(f"size must be positive, got {size}")
    folder = _pacs_folder(root or data_root(), domain)
    files = _files(folder, domain)
    if complete and len(files) != DOMAINS[domain]:
        raise DataError(
            f"{folder} has {len(files):,} images of {domain}, PACS has {DOMAINS[domain]:,}: copy the folder anew, or "
            "use load_pacs(..., complete=False)"
        )
    _check_sums(folder, domain, files)
    name = f"pacs/{domain}/{split}, {size} px"
    chosen, splitting = list(files), ""
    if split != "all":
        lists = _official_lists(folder, domain)
        chosen = _listed(lists, split, files) if lists else _drawn(chosen, split, seed)
        splitting = ", official split" if lists else f", own split {seed}"
    # In the order of the folders the first images would all be of one class.
    chosen.sort(key=lambda image: _rank(image, seed=0))
    pixels = np.stack([_read(files[image], size) for image in chosen])
    labels = torch.tensor([CLASSES.index(image.split("/")[1]) for image in chosen])
    return ImageSet(name + splitting, torch.from_numpy(pixels), labels, CLASSES, MEAN, STD)


def _pacs_folder(root: Path, domain: str) -> Path:
    """The folder with the domains."""
    for name in FOLDERS:
        for inner in IMAGES_IN:
            if (root / name / inner / domain).is_dir():
                return root / name / inner
    raise DataError(
        f"{root / FOLDERS[1] / domain} is missing: get PACS (a link is on https://domaingeneralization.github.io) and put "
        f"its folders {', '.join(DOMAINS)} into {root / FOLDERS[1]}, or set ADVBN_DATA to the folder that holds PACS"
    )


def _files(folder: Path, domain: str) -> dict[str, Path]:
    """``{"photo/dog/056_0001": path}``: the images of a domain, by their names without the file type, sorted."""
    classes = {path.name for path in (folder / domain).iterdir() if path.is_dir() and not path.name.startswith(".")}
    unknown, missing = sorted(classes - set(CLASSES)), sorted(set(CLASSES) - classes)
    if unknown:
        raise DataError(
            f"{folder / domain / unknown[0]}: PACS has no class {unknown[0]!r}, only {', '.join(CLASSES)}; "
            "remove the folder"
        )
    if missing:
        raise DataError(f"{folder / domain / missing[0]} is missing: copy {folder / domain} anew")
    files: dict[str, Path] = {}
    for class_name in CLASSES:
        paths = sorted((folder / domain / class_name).iterdir())
        images = [path for path in paths if path.suffix.lower() in FILE_TYPES and not path.name.startswith(".")]
        if not images:
            raise DataError(f"{folder / domain / class_name} has no images: copy {folder / domain} anew")
        for path in images:
            image = f"{domain}/{class_name}/{path.stem}"
            if image in files:
                raise DataError(f"{path} and {files[image].name} are two images of one name: remove one")
            files[image] = path
    return files


def _check_sums(folder: Path, domain: str, files: dict[str, Path]) -> None:
    """Compare a domain with ``SHA256SUMS``, where there is one."""
    listing = folder / "SHA256SUMS"
    if not listing.is_file():
        return
    mend = f"copy {folder} anew"
    expected = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        row = re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line)
        if row is None:
            raise DataError(f"{listing} is damaged in line {number}: {mend}")
        expected[row[2]] = row[1]
    present = {path.relative_to(folder).as_posix(): path for path in files.values()}
    listed = {name for name in expected if name.startswith(f"{domain}/")}
    if listed != present.keys():
        name = min(listed ^ present.keys())
        raise DataError(f"{folder / name} is {'missing' if name in listed else 'not in SHA256SUMS'}: {mend}")
    for name, path in present.items():
        if sha256(path) != expected[name]:
            raise DataError(f"{path} is damaged or altered: its SHA-256 is not that of SHA256SUMS; {mend}")


def _official_lists(folder: Path, domain: str) -> dict[str, Path]:
    """The authors' lists of a domain, ``{}`` if there are none.

    They lie beside the domains or in a folder there, whose name differs from copy to copy.
    """
    names = {split: f"{domain}_{listed}_kfold.txt" for split, listed in LISTS.items()}
    top = folder if folder.name in FOLDERS else folder.parent
    for place in (top, *sorted(path for path in top.iterdir() if path.is_dir())):
        lists = {split: place / name for split, name in names.items() if (place / name).is_file()}
        if len(lists) == len(names):
            return lists
        if lists:
            missing = next(name for split, name in names.items() if split not in lists)
            raise DataError(f"{place} has one list of the official split but not {missing}: put it there too")
    return {}


def _listed(lists: dict[str, Path], split: str, files: dict[str, Path]) -> list[str]:
    """The images that the list of ``split`` names."""
    parts = {name: _read_list(path, files) for name, path in lists.items()}
    both = parts["train"] & parts["validation"]
    if both:
        raise DataError(f"{lists['validation']} and {lists['train'].name} both name {min(both)}: get the lists anew")
    return sorted(parts[split])


def _read_list(path: Path, files: dict[str, Path]) -> set[str]:
    """The images in a list of lines ``photo/dog/056_0001.jpg 1``.

    The file type may differ from that of the files. The number, which counts the classes from 1, is not used: lists with
    wrong numbers are in circulation, and the class stands in the path.
    """
    images = set()
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        row = re.fullmatch(r"(\w+/\w+/[^/]+)\.\w+\s+\d+", line.strip())
        if row is None:
            raise DataError(
                f"{path} is damaged in line {number}, {line[:80]!r}: get the list anew, or remove the lists"
            )
        if row[1] not in files:
            raise DataError(f"{path} names {row[1]} in line {number}, but there is no such image: copy the images anew")
        images.add(row[1])
    if not images:
        raise DataError(f"{path} is empty: get the list anew, or remove the lists")
    return images


def _drawn(images: list[str], split: str, seed: int) -> list[str]:
    """The part of the images that is for training or for validation, drawn in each class."""
    chosen = []
    for class_name in CLASSES:
        ranked = sorted(
            (image for image in images if image.split("/")[1] == class_name), key=lambda image: _rank(image, seed)
        )
        held_out = max(1, round(len(ranked) / VALIDATION_PART))
        chosen += ranked[:held_out] if split == "validation" else ranked[held_out:]
    return chosen


def _rank(image: str, seed: int) -> bytes:
    """A place in a random order. A hash, so that the order is the same with any version of any library."""
    return hashlib.sha256(f"{seed} {image}".encode()).digest()


def _read(path: Path, size: int) -> np.ndarray:
    """An image file as uint8, 3,S,S."""
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, depending on the file type
        raise DataError(f"{path} cannot be read as an image ({error}): copy it anew") from error
    return np.asarray(resized).transpose(2, 0, 1)
