"""CelebA (Liu et al., "Deep Learning Face Attributes in the Wild", ICCV 2015), one attribute at a time, in torchvision's layout.

``<root>/celeba`` with the folder ``img_align_celeba`` (aligned faces, 178x218) and the lists ``list_attr_celeba.txt``,
``list_eval_partition.txt``, ``identity_CelebA.txt``, ``list_bbox_celeba.txt`` and ``list_landmarks_align_celeba.txt``, which
torchvision checks and reads. AdvMix (Gowal et al., CVPR 2020) classifies attributes of it, "Smiling" among them.

The faces are cut to their middle square (178x178) and reduced bilinearly with antialiasing. They are of real people, and their
use is restricted to research that is not commercial.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.images import DataError, ImageSet, data_root

WIDTH, HEIGHT = 178, 218
MEAN = STD = (0.5, 0.5, 0.5)
SITE = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # what torchvision calls them


def load_celeba(
    split: Literal["train", "validation", "test"], attribute: str = "Smiling", side: int = 64, count: int | None = None,
    root: Path | None = None, download: bool = False,
) -> ImageSet:  # fmt: skip
    """The first ``count`` faces of the standard split; class 1 are those with the attribute, class 0 those without.

    All 162,770 training faces at 64x64 take 2 GB of memory; there are 19,867 validation and 19,962 test faces.

    Args:
        attribute: one of the 40 in the head of ``list_attr_celeba.txt``.
        side: of the images.
        count: None: all.
        root: folder that holds ``celeba``; default: see :func:`advbn_lib.data.images.data_root`.
        download: let torchvision fetch it (1.4 GB, checked) from Google Drive; this needs the package gdown, and fails on days on
            which too many others fetch it.

    Raises:
        ValueError: no such split, or a side or count that is not positive.
        DataError: files are missing, damaged or of another size, there is no such attribute, or one class is missing; the message
            says how to mend it.
    """
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, got {split!r}")
    if side < 1 or (count is not None and count < 1):
        raise ValueError(f"side and count must be positive, got {side} and {count}")
    faces = _checked(root or data_root(), split, download)
    names = [name for name in faces.attr_names if name]  # the head of the list ends in a blank
    if attribute not in names:
        raise DataError(f"CelebA has no attribute {attribute!r}; there are {', '.join(names)}")
    if count is not None and count > len(faces):
        raise DataError(f"asked for {count:,} faces, but CelebA's {split} part has {len(faces):,}: ask for fewer")
    count = count or len(faces)
    folder = Path(faces.root) / faces.base_folder / "img_align_celeba"
    pixels = np.empty((count, 3, side, side), dtype=np.uint8)  # at once: a list of arrays would need twice the memory
    for place, name in enumerate(faces.filename[:count]):
        pixels[place] = _read(folder / name, side)
    labels = faces.attr[:count, names.index(attribute)].long()
    classes = (f"not {attribute}", attribute)
    return require_all_classes(
        ImageSet(f"celeba/{split}, {attribute}, {side} px", torch.from_numpy(pixels), labels, classes, MEAN, STD)
    )


def _checked(root: Path, split: str, download: bool):
    """torchvision's data set, all of whose lists have the published checksums."""
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import check_integrity

    folder = root / CelebA.base_folder
    if download:
        try:
            root.mkdir(parents=True, exist_ok=True)
            CelebA(str(root), download=True)
        except (OSError, RuntimeError) as error:
            raise DataError(f"CelebA could not be downloaded ({error}): {_get(folder)}") from error
    if not (folder / "img_align_celeba").is_dir():
        raise DataError(f"{folder / 'img_align_celeba'} is missing: {_get(folder)}")
    for _, md5, name in CelebA.file_list:
        if name.endswith(".txt") and not check_integrity(str(folder / name), md5):
            state = f"is damaged (its MD5 is not {md5})" if (folder / name).exists() else "is missing"
            raise DataError(f"{folder / name} {state}: {_get(folder)}")
    return CelebA(str(root), SPLITS[split])


def _read(path: Path, side: int) -> np.ndarray:
    """A face as uint8, 3,S,S."""
    try:
        with Image.open(path) as image:
            face = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, depending on the file type
        raise DataError(f"{path} cannot be read as an image ({error}): copy it anew") from error
    if face.size != (WIDTH, HEIGHT):
        raise DataError(
            f"{path} has {face.size[0]}x{face.size[1]} pixels, expected {WIDTH}x{HEIGHT}: is it of the aligned set?"
        )
    top = (HEIGHT - WIDTH) // 2
    square = face.crop((0, top, WIDTH, top + WIDTH))
    return np.asarray(square.resize((side, side), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def _get(folder: Path) -> str:
    return (
        f"get img_align_celeba.zip and the five lists from {SITE}, unpack them into {folder}, or set ADVBN_DATA to the "
        f"folder that holds {folder.name}"
    )
