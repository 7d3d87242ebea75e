"""PASCAL VOC segmentation: 20 classes and background (Everingham et al., "The PASCAL Visual Object Classes Challenge").

torchvision's layout: ``<root>/VOCdevkit/VOC2012`` with ``ImageSets/Segmentation/<split>.txt``, ``JPEGImages/<name>.jpg`` (or
another type of image file) and ``SegmentationClass/<name>.png`` (a palette image; 255 marks the borders of objects, which have
no label).
"""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from advbn_lib.data.images import DataError, data_root
from advbn_lib.data.masks import FILE_TYPES, IGNORE, MaskFiles

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
IDS = {**{index: index for index in range(len(CLASSES))}, IGNORE: IGNORE}
YEARS = ("2007", "2012")


def load_voc_masks(
    split: str = "train", year: str = "2012", root: Path | None = None, download: bool = False
) -> MaskFiles:
    """The images of a list, read when they are asked for. A-FAN trains on ``train`` and tests on ``val``.

    Args:
        split: a list in ``ImageSets/Segmentation``: ``"train"``, ``"val"``, ``"trainval"``, and 2007's ``"test"``.
        year: ``"2007"`` or ``"2012"``.
        root: folder that holds ``VOCdevkit``; default: see :func:`advbn_lib.data.images.data_root`.
        download: fetch what is missing through torchvision (checked there).

    Raises:
        ValueError: there is no such year.
        DataError: the list, an image or a mask is missing, or the list is damaged.
    """
    if str(year) not in YEARS:
        raise ValueError(f"year is one of {', '.join(YEARS)}, got {year!r}")
    root = root or data_root()
    folder = root / "VOCdevkit" / f"VOC{year}"
    if download and not folder.is_dir():
        _download(root, split, str(year))
    listing = folder / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listing.is_file():
        lists = sorted(path.stem for path in listing.parent.glob("*.txt"))
        mend = (
            f"there are {', '.join(lists)}"
            if lists
            else f"use load_voc_masks(..., download=True), or put VOCdevkit into {root}"
        )
        raise DataError(f"{listing} is missing: {mend}")
    pairs = tuple(_pair(folder, listing, number, line) for number, line in _lines(listing))
    if not pairs:
        raise DataError(f"{listing} is empty: copy it anew")
    return MaskFiles(f"voc{year}/{split}", pairs, CLASSES, IDS)


def _lines(listing: Path) -> list[tuple[int, str]]:
    """The names in a list, with their line numbers."""
    text = listing.read_text(encoding="utf-8-sig", errors="replace")
    lines = [(number, _name(line.strip())) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    seen: dict[str, int] = {}
    for number, name in lines:
        path = PureWindowsPath(name)  # knows both kinds of slashes
        if path.drive or path.root or ".." in path.parts or "\0" in name:
            raise DataError(
                f"{listing} has {name[:80]!r} in line {number}: write one image name a line, as it is called in JPEGImages"
            )
        if name in seen:
            raise DataError(f"{listing} names {name!r} in lines {seen[name]} and {number}: remove one of them")
        seen[name] = number
    return lines


def _name(line: str) -> str:
    """The name without the file type, which some tools write into the list."""
    ending = Path(line).suffix
    return line.removesuffix(ending) if ending.lower() in FILE_TYPES else line


def _pair(folder: Path, listing: Path, number: int, name: str) -> tuple[Path, Path]:
    where = f"which {listing} names in line {number}: copy {folder} anew"
    image = _existing(folder / "JPEGImages", name, (".jpg", *FILE_TYPES), where)
    return image, _existing(folder / "SegmentationClass", name, (".png",), where)


def _existing(folder: Path, name: str, endings: tuple[str, ...], where: str) -> Path:
    for ending in endings:
        for path in (folder / f"{name}{ending}", folder / f"{name}{ending.upper()}"):
            if path.is_file():
                return path
    raise DataError(f"{folder / name}{endings[0]} is missing, {where}")


def _download(root: Path, split: str, year: str) -> None:
    from torchvision.datasets import VOCSegmentation

    # torchvision has 2007's test images under a year of their own, and they unpack into the same folder.
    year, split = ("2007-test", "test") if (year, split) == ("2007", "test") else (year, split)
    try:
        VOCSegmentation(str(root), year=year, image_set=split, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"VOC{year} could not be downloaded ({error}): get it from http://host.robots.ox.ac.uk/pascal/VOC and unpack it in {root}"
        ) from error
