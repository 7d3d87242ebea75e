"""COCO2017's boxes, or any data in COCO's format.

Source: Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014; format: cocodataset.org/#format-data. A box there is
left, top, width, height in pixels from 0. Outlines (polygons or run lengths) are not read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

from advbn_lib.data.boxes import BoxSet, Objects, chosen_classes, image_size
from advbn_lib.data.images import DataError, data_root

FOLDERS = ("coco", "coco2017", "COCO", "COCO2017")


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

    The categories' ids may have gaps: labels count the categories from 1, in the order of their ids. Left out and counted,
    with one warning: crowds, boxes of no area or outside their image, objects of classes that are not kept, images whose file
    is not there. Images without objects stay; :meth:`~advbn_lib.data.boxes.BoxSet.with_boxes` leaves them out.

    Raises:
        ValueError: ``keep`` names an unknown class.
        DataError: the file is missing or damaged, or it has no images, or none of them is there; the message says where.
    """
    content = _read(annotations)
    categories = _by_id(content, "categories", annotations)
    names = {
        number: _text(category, "name", f"{annotations}, category {number}")
        for number, category in sorted(categories.items())
    }
    if len(set(names.values())) < len(names):
        raise DataError(f"{annotations}: two categories have the same name: rename one")
    listed = _by_id(content, "images", annotations)
    objects = Objects(chosen_classes(tuple(names.values()), keep))
    found = _objects_of(content, annotations, listed, names, objects)
    for number, row in sorted(listed.items()):
        where = f"{annotations}, image {number}"
        file = PurePosixPath(_text(row, "file_name", where))
        if file.is_absolute() or ".." in file.parts:
            raise DataError(f"{where}: its file {str(file)!r} lies outside {images}: name a file in it")
        if not (images / file).is_file():
            objects.left_out["images without a file"] += 1
            objects.left_out["objects in images without a file"] += len(found[number])
            continue
        objects.start(images / file, _size(row, images / file, objects))
        for box, class_name in found[number]:
            objects.add(box, class_name)
        objects.end()
    if not objects.images:
        raise DataError(f"{images} has none of the {len(listed)} images that {annotations} names: copy them there")
    return objects.box_set(name or annotations.stem)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy it there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON ({error}): copy it anew") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} must hold an object with images, annotations and categories, got a {type(content).__name__}"
        )
    for part in ("images", "annotations", "categories"):
        if not isinstance(content.get(part), list) or not all(isinstance(row, dict) for row in content[part]):
            raise DataError(f"{path} has no list of objects {part!r}: use an instances file in COCO's format")
    return content


def _by_id(content: dict[str, Any], part: str, path: Path) -> dict[Any, dict[str, Any]]:
    """The rows of a part by their ids."""
    rows: dict[Any, dict[str, Any]] = {}
    for place, row in enumerate(content[part]):
        number = row.get("id")
        if not isinstance(number, int) or number in rows:
            wrong = "an id that is there already" if number in rows else "no whole number as its id"
            raise DataError(f"{path}: entry {place} of {part!r} has {wrong} ({number!r})")
        rows[number] = row
    if not rows:
        raise DataError(f"{path} has no {part}: use an instances file in COCO's format")
    return rows


def _objects_of(
    content: dict[str, Any], path: Path, listed: dict[int, Any], names: dict[int, str], objects: Objects
) -> dict[int, list[tuple[tuple[float, float, float, float], str]]]:  # fmt: skip
    """Boxes and class names of each image, crowds left out."""
    found: dict[int, list[tuple[tuple[float, float, float, float], str]]] = {number: [] for number in listed}
    for place, row in enumerate(content["annotations"]):
        where = f"{path}, annotation {row.get('id', f'in place {place}')}"
        if row.get("image_id") not in listed:
            raise DataError(f"{where}: there is no image {row.get('image_id')!r}")
        if row.get("category_id") not in names:
            known = ", ".join(f"{number} ({name})" for number, name in names.items())
            raise DataError(f"{where}: no category {row.get('category_id')!r}; there are {known}")
        if row.get("iscrowd"):
            objects.left_out["crowds"] += 1
            continue
        found[row["image_id"]].append((_box(row.get("bbox"), where), names[row["category_id"]]))
    return found


def _box(box: Any, where: str) -> tuple[float, float, float, float]:
    numbers = (
        isinstance(box, list) and len(box) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
    )
    if not numbers:
        raise DataError(f"{where}: bbox must be four numbers (left, top, width, height), got {box!r}")
    left, top, width, height = map(float, box)
    return left, top, left + width, top + height


def _size(row: dict[str, Any], path: Path, objects: Objects) -> tuple[int, int]:
    """Width and height: the file's. They decide where boxes are cut off."""
    size = image_size(path)
    stated = (row.get("width", size[0]), row.get("height", size[1]))
    objects.left_out["images of another size than their annotation says"] += stated != size
    return size


def _text(row: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(row.get(key), str) or not row[key]:
        raise DataError(f"{where}: {key!r} must be a name, got {row.get(key)!r}")
    return row[key]
