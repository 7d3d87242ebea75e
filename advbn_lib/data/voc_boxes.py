"""Detection data in the layout of PASCAL VOC: VOC2007, VOC2012, and BCCD, whose 364 photographs show blood cells.

Sources: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010; github.com/Shenggan/BCCD_Dataset.

A tree has three folders: ``ImageSets/Main/<split>.txt`` names the images, ``Annotations/<image>.xml`` holds their objects,
``JPEGImages/<image>.jpg`` the pixels.

VOC counts pixels from 1, and a box's last pixel belongs to it. Here left and top are made smaller by 1, so that the first pixel
begins at 0 and a box's width is right minus left. An object whose maximum is not above its minimum in the file has no area.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree
from xml.parsers import expat

from advbn_lib.data.boxes import FILE_TYPES, BoxSet, Objects, chosen_classes, image_size
from advbn_lib.data.images import DataError, data_root
from advbn_lib.files import sha256

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
BCCD_CLASSES = ("RBC", "WBC", "Platelets")
BCCD_IMAGES = {"train": 205, "val": 87, "trainval": 292, "test": 72}  # in each split

_Element = ElementTree.Element


def load_voc(
    year: Literal[2007, 2012], split: str = "trainval", root: Path | None = None, keep: tuple[str, ...] | None = None
) -> BoxSet:
    """VOC2007 or VOC2012, from ``<root>/VOCdevkit/VOC<year>``, where torchvision puts it.

    To download: ``torchvision.datasets.VOCDetection(root, year="2007", image_set="trainval", download=True)``; VOC2007 has a
    test split too (``image_set="test"``), VOC2012's has no public boxes.

    Args:
        split: ``"train"``, ``"val"``, ``"trainval"`` or ``"test"``.
        root: default: see :func:`advbn_lib.data.images.data_root`.
        keep: classes to keep; the others' objects are counted and left out.

    Raises:
        ValueError: there is no such year or class.
        DataError: see :func:`load_voc_tree`.
    """
    if year not in (2007, 2012):
        raise ValueError(f"VOC2007 and VOC2012 can be loaded, not {year!r}")
    folder = (root or data_root()) / "VOCdevkit" / f"VOC{year}"
    if not folder.is_dir():
        how = f"torchvision.datasets.VOCDetection({str(folder.parent.parent)!r}, year='{year}', image_set='trainval', download=True)"
        raise DataError(f"{folder} is missing: get it with {how}, or set ADVBN_DATA to the folder that holds VOCdevkit")
    return load_voc_tree(folder, split, VOC_CLASSES, keep, name=f"voc{year}/{split}")


def load_bccd(
    split: str = "train", root: Path | None = None, keep: tuple[str, ...] | None = None, complete: bool = True
) -> BoxSet:
    """BCCD, blood cells of three classes, from ``<root>/bccd``. With ``SHA256SUMS`` there, the split's files are checked.

    Args:
        split, root, keep: see :func:`load_voc`.
        complete: refuse a split without the published number of images.

    Raises:
        DataError: see :func:`load_voc_tree`.
    """
    folder = (root or data_root()) / "bccd"
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing: put the folder BCCD of github.com/Shenggan/BCCD_Dataset there, or set ADVBN_DATA to the "
            "folder that holds bccd"
        )
    _check_sums(folder, split)
    found = load_voc_tree(folder, split, BCCD_CLASSES, keep, name=f"bccd/{split}")
    if complete and split in BCCD_IMAGES and len(found) != BCCD_IMAGES[split]:
        raise DataError(
            f"{folder} has {len(found)} images in {split}, BCCD has {BCCD_IMAGES[split]}: copy the folder anew, or use "
            "load_bccd(..., complete=False)"
        )
    return found


def load_voc_tree(
    folder: Path, split: str, classes: tuple[str, ...], keep: tuple[str, ...] | None = None,
    one_based: bool = True, name: str = "",
) -> BoxSet:  # fmt: skip
    """Any data in VOC's layout.

    Coordinates may be fractions; ``difficult``, ``truncated``, ``size`` and the like may be missing; parts of objects are not
    read; an image may have no object. What is left out (boxes of no area or outside the image, objects of classes that are
    not kept) and what is changed (boxes cut off at the edge) is counted in ``left_out``, and a warning says it once.

    Args:
        folder: holds ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        split: a list in ``ImageSets/Main``, without ``.txt``.
        classes: all names that may occur, in the order of their labels.
        keep: those to keep; None: all. Labels count these.
        one_based: the first pixel is number 1, as in VOC; False: the coordinates are those of the edges, from 0.
        name: of the set; default: that of the folder and the split.

    Raises:
        ValueError: ``keep`` names an unknown class.
        DataError: a list, an annotation or an image is missing or damaged, or of an unknown class; the message says where.
    """
    kept = chosen_classes(classes, keep)
    name = name or f"{folder.name}/{split}"
    objects = Objects(kept)
    for image_id in _listed(folder, split, objects):
        path = folder / "Annotations" / f"{image_id}.xml"
        annotation = _parse(path)
        image = _image_path(folder, image_id, (annotation.findtext("filename") or "").strip())
        size = image_size(image)
        objects.left_out["images of another size than their annotation says"] += _stated_size(annotation) not in (
            None,
            size,
        )
        objects.start(image, size)
        for number, element in enumerate(annotation.findall("object"), 1):
            where = f"{path}, object {number}"
            class_name = (element.findtext("name") or "").strip()
            if class_name not in classes:
                raise DataError(f"{where}: no class {class_name!r}; there are {', '.join(classes)}")
            objects.add(_box(element, where, one_based), class_name, _flag(element, "difficult", where))
        objects.end()
    return objects.box_set(name)


def _listed(folder: Path, split: str, objects: Objects) -> list[str]:
    """The images of a split, each once."""
    lists = folder / "ImageSets" / "Main"
    path = lists / f"{split}.txt"
    if not path.is_file():
        there = ", ".join(sorted(each.stem for each in lists.glob("*.txt"))) or "none"
        raise DataError(f"{path} is missing; lists that are there: {there}. Copy {folder} anew, or name one of them")
    images: dict[str, None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        row = re.fullmatch(r"(\S+)(\s+-?[01])?", line.strip())  # the lists of one class have a second column
        if row is None or ".." in Path(row[1]).parts or Path(row[1]).is_absolute():
            raise DataError(f"{path} is damaged in line {number}, {line[:80]!r}: one image name a line")
        image = row[1][: -len(Path(row[1]).suffix)] if Path(row[1]).suffix.lower() in FILE_TYPES else row[1]
        objects.left_out["repeated lines of the list"] += image in images
        images[image] = None
    if not images:
        raise DataError(f"{path} names no image: copy it anew")
    return list(images)


def _parse(path: Path) -> _Element:
    """The root of an annotation.

    A file that declares entities is refused: they are not part of the format, and nested ones can fill the memory.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing, but its image is in the list: copy it there") from None

    def refuse(entity: str, *_) -> None:
        raise DataError(f"{path} declares the entity {entity!r}: an annotation has none; remove the declaration")

    scan = expat.ParserCreate()
    scan.EntityDeclHandler = refuse
    try:
        scan.Parse(content, True)
        root = ElementTree.fromstring(content)
    except (expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"{path} is no XML ({error}): copy it anew") from error
    if root.tag != "annotation":
        raise DataError(f"{path} begins with <{root.tag}>, VOC's annotations with <annotation>: copy it anew")
    return root


def _image_path(folder: Path, image_id: str, filename: str) -> Path:
    """The image: named as the annotation is, or else as the annotation says, with or without a file type."""
    images = folder / "JPEGImages"
    for name in filter(None, (image_id, Path(filename).name)):
        for suffix in ("", *FILE_TYPES, *(kind.upper() for kind in FILE_TYPES)):
            path = images / f"{name}{suffix}"
            if path.is_file():
                return path
    raise DataError(f"{images / image_id}.jpg is missing: copy it there, or take {image_id} out of the list")


def _box(element: _Element, where: str, one_based: bool) -> tuple[float, float, float, float]:
    frame = element.find("bndbox")
    if frame is None:
        raise DataError(f"{where} has no <bndbox>: give it one, or remove the object")
    values = []
    for tag in ("xmin", "ymin", "xmax", "ymax"):
        text = frame.findtext(tag)
        try:
            value = float("" if text is None else text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{where}: <{tag}> must be a number, got {text!r}")
        values.append(value)
    left, top, right, bottom = values
    if one_based and right > left and bottom > top:
        return left - 1, top - 1, right, bottom
    return left, top, right, bottom


def _flag(element: _Element, tag: str, where: str) -> bool:
    text = (element.findtext(tag) or "0").strip().lower() or "0"
    if text not in ("0", "1", "false", "true", "unspecified"):
        raise DataError(f"{where}: <{tag}> must be 0 or 1, got {text!r}")
    return text in ("1", "true")


def _stated_size(annotation: _Element) -> tuple[int, int] | None:
    """Width and height of the image by its annotation; None where it does not say (some tools write 0)."""
    stated = [annotation.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    if not all(re.fullmatch(r"\d+(\.0*)?", text) for text in stated):
        return None
    width, height = (int(float(text)) for text in stated)
    return (width, height) if width and height else None


def _check_sums(folder: Path, split: str) -> None:
    """Compare the files of a split with ``SHA256SUMS``, where there is one."""
    listing, mend = folder / "SHA256SUMS", f"copy {folder} anew"
    if not listing.is_file():
        return
    expected = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        row = re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line)
        if row is None:
            raise DataError(f"{listing} is damaged in line {number}: {mend}")
        expected[row[2]] = row[1]
    images = _listed(folder, split, Objects(()))
    names = [f"ImageSets/Main/{split}.txt"]
    names += [
        f"{part}/{image}{kind}" for image in images for part, kind in (("Annotations", ".xml"), ("JPEGImages", ".jpg"))
    ]
    for name in names:
        if name not in expected:
            raise DataError(f"{folder / name} is not in SHA256SUMS: {mend}")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing: {mend}")
        if sha256(folder / name) != expected[name]:
            raise DataError(f"{folder / name} is damaged or altered: its SHA-256 is not that of SHA256SUMS; {mend}")
