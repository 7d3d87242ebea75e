"""Cityscapes: street scenes of 50 cities (Cordts et al., CVPR 2016), with the 19 classes that are evaluated.

The official layout: ``leftImg8bit/<split>/<city>/<name>_leftImg8bit.png`` and ``gtFine/<split>/<city>/<name>_gtFine_labelIds.png``,
in ``<root>/cityscapes`` or in ``<root>`` itself. It cannot be downloaded by a program: register at https://www.cityscapes-dataset.com and
get ``leftImg8bit_trainvaltest.zip`` and ``gtFine_trainvaltest.zip``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from advbn_lib.data.images import DataError, data_root
from advbn_lib.data.masks import IGNORE, MaskFiles, files_in, pair_up

# The data set's number of each evaluated class; its place here is the class that is trained on ("train id").
LABEL_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20,
    "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31,
    "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
CLASSES = tuple(LABEL_IDS)
# All other numbers up to 33 are not evaluated; -1, a number plate, is 255 in the files.
IDS = {
    **{number: IGNORE for number in range(34)},
    IGNORE: IGNORE,
    **{number: index for index, number in enumerate(LABEL_IDS.values())},
}
SPLITS = ("train", "val")
IMAGE, MASK = "_leftImg8bit", "_gtFine_labelIds"


def load_cityscapes(split: Literal["train", "val"], root: Path | None = None) -> MaskFiles:
    """The finely annotated images of a split, read when they are asked for. There are no public labels for ``test``.

    Args:
        root: see the head of this module; default: see :func:`advbn_lib.data.images.data_root`.

    Raises:
        ValueError: there is no such split.
        DataError: files are missing or stand alone.
    """
    if split not in SPLITS:
        raise ValueError(
            f"split is 'train' or 'val' (the labels of 'test' are not public, 'train_extra' has none that are fine), got {split!r}"
        )
    root = root or data_root()
    folder = next((place for place in (root / "cityscapes", root) if (place / "leftImg8bit" / split).is_dir()), None)
    if folder is None:
        raise DataError(
            f"{root / 'cityscapes' / 'leftImg8bit' / split} is missing: get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
            f"from https://www.cityscapes-dataset.com (after registration) and unpack both in {root / 'cityscapes'}"
        )
    images = _by_name(folder / "leftImg8bit" / split, IMAGE)
    masks = _by_name(folder / "gtFine" / split, MASK)
    return MaskFiles(f"cityscapes/{split}", pair_up(images, masks, f"cityscapes/{split}"), CLASSES, IDS)


def _by_name(folder: Path, ending: str) -> dict[str, Path]:
    """``{"aachen/aachen_000000_000019": path}``: the files of all cities with this ending."""
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing: unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in one folder"
        )
    cities = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {
        f"{city.name}/{path.stem.removesuffix(ending)}": path
        for city in cities
        for path in files_in(city)
        if path.stem.endswith(ending)
    }
    if not found:
        raise DataError(
            f"{folder} has no file <city>/*{ending}.png: unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip in one "
            "folder (coloured masks, coarse masks and train ids are not read)"
        )
    return found
