"""COCO2017's boxes, or any data in COCO's format.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; format: cocodataset.org/#format-data. A box there is
left, top, width, height in pixels from 0. Outlines (polygons or run lengths) are not read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path, PureWindowsPath
from typing import Any

from advbn_lib.data.boxes import BoxSet, Objects, chosen_classes, image_size
from advbn_lib.data.images import DataError, data_root

FOLDERS = ("coco", "coco2017", "COCO", "COCO2017")
CROWD = {0: False, 1: True, "0": False, "1": True, None: False}  # what ``iscrowd`` may be; true equals 1, false 0

_Found = dict[int, list[tuple[tuple[float, float, float, float], str]]]


def load_coco(split: str = "train2017", root: Path | None = None, keep: tuple[str, ...] | None = None) -> BoxSet:
    """COCO2017 from ``<root>/coco``: ``annotations/instances_<split>.json`` and ``<split>/*.jpg``.

    To download: ``train2017.zip``, ``val2017.zip`` and ``annotations_trainval2017.zip`` from cocodataset.org/#download.

    Args:
        split: ``"train2017"`` or ``"val2017"``.
        root: folder that holds ``coco`` (or ``COCO``, ``coco2017``, ``COCO2017``) or is it; default: see
            :func:`advbn_lib.data.images.data_root`.
        keep: classes to keep.

    Raises:
        ValueError, DataError: see :func:`load_coco_tree`.
    """
    root = root or data_root()
    folder = next(
        (place for place in (root, *(root / name for name in FOLDERS)) if (place / "annotations").is_dir()), None
    )
    if folder is None:
        raise DataError(
            f"{root / FOLDERS[0] / 'annotations'} is missing: unpack {split}.zip and annotations_trainval2017.zip of "
            f"cocodataset.org/#download in {root / FOLDERS[0]}, or set ADVBN_DATA to the folder that holds it"
        )
    return load_coco_tree(folder / "annotations" / f"instances_{split}.json", folder / split, keep, f"coco/{split}")


def load_coco_tree(annotations: Path, images: Path, keep: tuple[str, ...] | None = None, name: str = "") -> BoxSet:
    """Boxes of a JSON file in COCO's format, and the folder of its images.

    The categories' ids may have gaps: labels count the categories from 1, in the order of their ids. Ids may be written as
    text (``"7"``). Left out and counted, with one warning: crowds, boxes of no area or outside their image, objects of classes
    that are not kept, images whose file is not there, annotations that stand there twice, and categories without objects that
    have the name of another. Images without objects stay; :meth:`~advbn_lib.data.boxes.BoxSet.with_boxes` leaves them out.

    Raises:
        ValueError: ``keep`` names an unknown class.
        DataError: the file is missing or damaged, or it has no images, or none of them is there; the message says where.
    """
    content = _read(annotations)
    names, unused = _names(content, annotations)
    listed = _by_id(content, "images", annotations)
    objects = Objects(chosen_classes(tuple(names.values()), keep))
    objects.left_out["categories without objects that have the name of another"] += unused
    found = _objects_of(content, annotations, listed, names, objects)
    lost = []
    for number, row in sorted(listed.items()):
        path = _image_path(row, images, f"{annotations}, image {number}")
        if not path.is_file():
            lost.append(path)
            objects.left_out["images without a file"] += 1
            objects.left_out["objects in images without a file"] += len(found[number])
            continue
        objects.start(path, _size(row, path, objects))
        for box, class_name in found[number]:
            objects.add(box, class_name)
        objects.end()
    if not objects.images:
        raise DataError(
            f"{images} has none of the {len(listed)} images that {annotations} names: {lost[0]} is missing, for one. Copy them "
            "there, or give the folder that the names start from"
        )
    return objects.box_set(name or annotations.stem)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy it there") from None
    except (ValueError, RecursionError) as error:  # what json raises
        raise DataError(f"{path} is no JSON ({error}): copy it anew") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): give the JSON file itself") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} must hold an object with images, annotations and categories, got a {type(content).__name__}"
        )
    for part in ("images", "annotations", "categories"):
        if not isinstance(content.get(part), list) or not all(isinstance(row, dict) for row in content[part]):
            raise DataError(f"{path} has no list of objects {part!r}: use an instances file in COCO's format")
    return content


def _number(value: Any) -> int | None:
    """An id: a whole number, or one written as text or as a fraction (``7.0``); None if it is anything else."""
    try:
        number = int(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None
    return None if isinstance(value, float) and number != value else number


def _by_id(content: dict[str, Any], part: str, path: Path) -> dict[int, dict[str, Any]]:
    """The rows of a part by their ids."""
    rows: dict[int, dict[str, Any]] = {}
    for place, row in enumerate(content[part]):
        number = _number(row.get("id"))
        if number is None or number in rows:
            wrong = "no whole number as its id" if number is None else "an id that is there already"
            raise DataError(
                f"{path}: entry {place} of {part!r} has {wrong} ({row.get('id')!r}): number the {part} anew"
            )
        rows[number] = row
    if not rows:
        raise DataError(f"{path} has no {part}: use an instances file in COCO's format")
    return rows


def _names(content: dict[str, Any], path: Path) -> tuple[dict[int, str], int]:
    """The categories' names by their ids, in their order; and how many were left out.

    Some tools write a group of classes as one more category, which may have the name of one of them and no objects.
    """
    rows = _by_id(content, "categories", path)
    names = {number: _text(row, "name", f"{path}, category {number}") for number, row in sorted(rows.items())}
    used = {_number(row.get("category_id")) for row in content["annotations"]}
    shared = {number for number, name in names.items() if list(names.values()).count(name) > 1}
    kept = {number: name for number, name in names.items() if number not in shared or number in used}
    for number in sorted(shared - used):  # none of that name is used: the first stays
        if names[number] not in kept.values():
            kept[number] = names[number]
    twice = sorted(number for number in kept if list(kept.values()).count(kept[number]) > 1)
    if twice:
        raise DataError(f"{path}: the categories {twice[0]} and others have the name {kept[twice[0]]!r}: rename them")
    return dict(sorted(kept.items())), len(names) - len(kept)


def _objects_of(
    content: dict[str, Any], path: Path, listed: dict[int, Any], names: dict[int, str], objects: Objects
) -> _Found:  # fmt: skip
    """Boxes and class names of each image, without crowds and repetitions."""
    found: _Found = {number: [] for number in listed}
    ids = Counter(_number(row.get("id")) for row in content["annotations"])
    seen = set()  # of what has an id that another has too
    for place, row in enumerate(content["annotations"]):
        where = f"{path}, annotation {row.get('id', f'in place {place}')}"
        image, category = _number(row.get("image_id")), _number(row.get("category_id"))
        if image not in listed:
            raise DataError(
                f"{where}: there is no image {row.get('image_id')!r}: remove the annotation, or list its image"
            )
        if category not in names:
            known = ", ".join(f"{number} ({name})" for number, name in names.items())
            raise DataError(f"{where}: no category {row.get('category_id')!r}; there are {known}")
        if _is_crowd(row, where):
            objects.left_out["crowds"] += 1
            continue
        box = _box(row.get("bbox"), where)
        number = _number(row.get("id"))
        if number is not None and ids[number] > 1:
            if (number, image, category, box) in seen:
                objects.left_out["annotations that stand there twice"] += 1
                continue
            seen.add((number, image, category, box))
        found[image].append((box, names[category]))
    return found


def _is_crowd(row: dict[str, Any], where: str) -> bool:
    value = row.get("iscrowd")
    if isinstance(value, (list, dict)) or value not in CROWD:
        raise DataError(f"{where}: iscrowd must be 0 or 1, got {value!r}")
    return CROWD[value]


def _box(box: Any, where: str) -> tuple[float, float, float, float]:
    try:
        left, top, width, height = (float(value) if isinstance(value, (int, float)) else math.nan for value in box)
        finite = all(map(math.isfinite, (left, top, width, height)))
    except (TypeError, ValueError, OverflowError):  # no list, not four, or a whole number beyond all floats
        finite = False
    if not finite:
        raise DataError(f"{where}: bbox must be four numbers (left, top, width, height), got {box!r}")
    return left, top, left + width, top + height


def _image_path(row: dict[str, Any], images: Path, where: str) -> Path:
    """Where the image should be; a name that was written on Windows may have backslashes."""
    name = _text(row, "file_name", where)
    file = PureWindowsPath(name)  # knows both kinds of slashes
    if file.drive or file.root or ".." in file.parts:
        raise DataError(f"{where}: its file {name!r} lies outside {images}: name it as it is called in that folder")
    return images / name if (images / name).is_file() else images / file.as_posix()


def _size(row: dict[str, Any], path: Path, objects: Objects) -> tuple[int, int]:
    """Width and height: the file's. They decide where boxes are cut off."""
    size = image_size(path)
    stated = _number(row.get("width")), _number(row.get("height"))
    # Some tools write 0 or nothing.
    objects.left_out["images of another size than their annotation says"] += all(stated) and stated != size
    return size


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise DataError(f"{where}: {key!r} must be a name, got {row.get(key)!r}")
    return row[key]
