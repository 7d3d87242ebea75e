"""Images with boxes: VOC's and COCO's formats, what is refused and what is counted, and the batches made of them."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advbn_lib.data import DataError
from advbn_lib.data.box_loader import BoxLoader, mirrored_image
from advbn_lib.data.boxes import BoxSet, resize
from advbn_lib.data.coco_boxes import load_coco, load_coco_tree
from advbn_lib.data.drawn_shapes import drawn_shapes
from advbn_lib.data.voc_boxes import VOC_CLASSES, load_bccd, load_voc, load_voc_tree

ONE = "<object><name>dog</name><bndbox><xmin>3</xmin><ymin>5</ymin><xmax>11.5</xmax><ymax>9</ymax></bndbox></object>"


def box(name="dog", left=3, top=5, right=11, bottom=9, more="") -> str:
    corners = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def add_image(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = {"RGB": (200, 100, 50), "L": 77, "CMYK": (0, 0, 0, 0), "P": 3}[mode]
    Image.new(mode, size, colour).save(path)


def add_voc(folder: Path, image: str, objects: str, head: str = "", **options) -> None:
    add_image(folder / "JPEGImages" / f"{image}.jpg", **options)
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "Annotations" / f"{image}.xml").write_text(f"<annotation>{head}{objects}</annotation>")
    lists = folder / "ImageSets" / "Main" / "trainval.txt"
    lists.parent.mkdir(parents=True, exist_ok=True)
    lists.write_text((lists.read_text() if lists.exists() else "") + f"{image}\n")


@pytest.fixture
def voc(tmp_path) -> Path:
    return tmp_path / "VOCdevkit" / "VOC2007"


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_voc_counts_pixels_from_one(voc, tmp_path, silent):
    add_voc(voc, "000001", ONE)
    found = load_voc(2007, root=tmp_path)
    assert found.boxes[0].tolist() == [[2.0, 4.0, 11.5, 9.0]] and found.boxes[0].dtype == torch.float32
    assert found.labels[0].tolist() == [VOC_CLASSES.index("dog") + 1]
    assert found.image(0).shape == (3, 12, 20) and found.image(0).dtype == torch.uint8
    edges = load_voc_tree(voc, "trainval", VOC_CLASSES, one_based=False)
    assert edges.boxes[0].tolist() == [[3.0, 5.0, 11.5, 9.0]]


def test_legal_variants_of_voc_are_read(voc, tmp_path, silent):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    add_voc(voc, "grey", box(more="<difficult>1</difficult><truncated>0</truncated>") + box("cat", more=part), mode="L")
    add_voc(voc, "cmyk", "", mode="CMYK", head="<size><width>0</width><height>0</height></size>")
    add_voc(voc, "named", ONE, head="<filename>other</filename>")
    (voc / "JPEGImages" / "named.jpg").rename(voc / "JPEGImages" / "other.JPG")
    found = load_voc(2007, root=tmp_path)
    assert [len(each) for each in found.boxes] == [2, 0, 1] and found.boxes[1].shape == (0, 4)
    assert found.difficult[0].tolist() == [True, False] and found.left_out == {}
    assert [found.image(index).shape[0] for index in range(3)] == [3, 3, 3]
    assert found.image(0)[:, 0, 0].tolist() == [77] * 3 and (found.image(1) > 250).all()
    kept = found.with_boxes()
    assert len(kept) == 2 and kept.left_out == {"images without objects": 1}


def test_what_is_left_out_of_voc_is_counted_and_said(voc, tmp_path):
    flat, far, over = box(left=4, right=4), box(left=50, right=60), box(left=15, right=25)
    add_voc(voc, "a", flat + far + over + box("cat") + box(), head="<size><width>7</width><height>12</height></size>")
    with pytest.warns(UserWarning, match="1 boxes of no area.*1 boxes outside their image") as caught:
        found = load_voc(2007, root=tmp_path, keep=("dog",))
    assert len(caught) == 1 and Path(caught[0].filename).name == "test_boxes.py"
    assert found.left_out == {
        "boxes of no area": 1, "boxes outside their image": 1, "boxes cut off at the edge of their image": 1,
        "objects of other classes": 1, "images of another size than their annotation says": 1,
    }  # fmt: skip
    assert found.boxes[0].tolist() == [[14.0, 4.0, 20.0, 9.0], [2.0, 4.0, 11.0, 9.0]]
    assert found.classes == ("dog",) and found.labels[0].tolist() == [1, 1] and found.counts() == {"dog": 2}


@pytest.mark.parametrize(
    "objects, message",
    [
        (box("unicorn"), "a.xml, object 1: no class 'unicorn'; there are aeroplane"),
        (ONE + box(left="left"), "a.xml, object 2: <xmin> must be a number, got 'left'"),
        (box(right="nan"), "<xmax> must be a number"),
        ("<object><name>dog</name></object>", "object 1 has no <bndbox>"),
        (box(more="<difficult>maybe</difficult>"), "<difficult> must be 0 or 1"),
        ("<object>", "a.xml is no XML .*line 1"),
    ],
)
def test_a_broken_annotation_names_file_and_place(voc, tmp_path, objects, message):
    add_voc(voc, "a", objects)
    with pytest.raises(DataError, match=message):
        load_voc(2007, root=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused(voc, tmp_path, encoding):
    add_voc(voc, "a", "")
    bomb = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
    (voc / "Annotations" / "a.xml").write_text(bomb, encoding=encoding)
    with pytest.raises(DataError, match="declares the entity 'a'"):
        load_voc(2007, root=tmp_path)


def test_missing_files_are_named(voc, tmp_path):
    with pytest.raises(DataError, match="VOC2007 is missing: get it with torchvision"):
        load_voc(2007, root=tmp_path)
    add_voc(voc, "a", ONE)
    with pytest.raises(DataError, match="test.txt is missing; lists that are there: trainval"):
        load_voc(2007, "test", root=tmp_path)
    (voc / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="a.jpg cannot be read as an image"):
        load_voc(2007, root=tmp_path)
    (voc / "JPEGImages" / "a.jpg").unlink()
    with pytest.raises(DataError, match="a.jpg is missing"):
        load_voc(2007, root=tmp_path)
    (voc / "Annotations" / "a.xml").unlink()
    with pytest.raises(DataError, match="a.xml is missing"):
        load_voc(2007, root=tmp_path)
    (voc / "ImageSets" / "Main" / "trainval.txt").write_text("../../secret\n")
    with pytest.raises(DataError, match="damaged in line 1"):
        load_voc(2007, root=tmp_path)
    with pytest.raises(ValueError, match="no class 'unicorn'; there are aeroplane"):
        load_voc(2007, root=tmp_path, keep=("unicorn",))
    with pytest.raises(ValueError, match="not 1999"):
        load_voc(1999, root=tmp_path)


def test_bccd_is_checked_against_its_sums(tmp_path):
    folder = tmp_path / "bccd"
    add_voc(folder, "cell", box("WBC"))
    rows = [(path, hashlib.sha256(path.read_bytes()).hexdigest()) for path in folder.rglob("*") if path.is_file()]
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  ./{path.relative_to(folder)}\n" for path, digest in rows))
    with pytest.raises(DataError, match="1 images in trainval, BCCD has 292"):
        load_bccd("trainval", tmp_path)
    assert load_bccd("trainval", tmp_path, complete=False).labels[0].tolist() == [2]
    (folder / "Annotations" / "cell.xml").write_text(f"<annotation>{box('RBC')}</annotation>")
    with pytest.raises(DataError, match="cell.xml is damaged or altered"):
        load_bccd("trainval", tmp_path, complete=False)


def test_bccd_is_as_it_was_published():
    root = data_folder()
    with pytest.warns(UserWarning, match="bccd/trainval: left out or changed: 2 boxes of no area"):
        found = load_bccd("trainval", root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        test = load_bccd("test", root)
    totals = {name: found.counts()[name] + test.counts()[name] for name in found.classes}
    assert totals == {
        "RBC": 4153,
        "WBC": 372,
        "Platelets": 361,
    }  # 4,155 red cells were published, two of them have no area
    small = test.first(3).resized(168, 224)
    assert all(small.image(index).shape == (3, 168, 224) for index in range(3))
    assert torch.allclose(small.boxes[0], test.boxes[0] * 0.35)


def coco(folder: Path, **changes) -> Path:
    """A small tree: categories 3 and 7, three images, one of them without a file and one without objects."""
    content = {
        "categories": [{"id": 7, "name": "zebra"}, {"id": 3, "name": "apple"}],
        "images": [{"id": 5, "file_name": "x.jpg"}, {"id": 9, "file_name": "y.jpg"}, {"id": 11, "file_name": "z.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1, 2, 3.5, 4], "segmentation": [[1, 2, 3]], "area": 1},
            {"id": 2, "image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1, "segmentation": {"counts": "a"}},
            {"id": 3, "image_id": 5, "category_id": 3, "bbox": [15, 0, 9, 9], "iscrowd": 0},
            {"id": 4, "image_id": 5, "category_id": 3, "bbox": [1, 1, 0, 9]},
            {"id": 5, "image_id": 11, "category_id": 3, "bbox": [1, 1, 1, 9]},
        ],
    } | changes  # fmt: skip
    path = folder / "annotations" / "instances_val2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for name in ("x.jpg", "y.jpg"):
        add_image(folder / "val2017" / name)
    return path


def test_coco_is_read_and_what_is_left_out_counted(tmp_path):
    coco(tmp_path / "coco")
    with pytest.warns(UserWarning, match="1 crowds") as caught:
        found = load_coco("val2017", tmp_path)
    assert len(caught) == 1 and len(found) == 2
    assert found.classes == ("apple", "zebra") and found.labels[0].tolist() == [2, 1]
    assert found.boxes[0].tolist() == [[1.0, 2.0, 4.5, 6.0], [15.0, 0.0, 20.0, 9.0]] and len(found.boxes[1]) == 0
    assert found.left_out == {
        "boxes cut off at the edge of their image": 1, "boxes of no area": 1, "crowds": 1,
        "images without a file": 1, "objects in images without a file": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": [{"id": 1, "image_id": 5, "category_id": 4, "bbox": [0, 0, 1, 1]}]}, r"no category 4; there are 3 \(apple\)"),
        ({"annotations": [{"id": 8, "image_id": 6, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "annotation 8: there is no image 6"),
        ({"annotations": [{"id": 8, "image_id": 5, "category_id": 3, "bbox": [0, 0, 1]}]}, "bbox must be four numbers"),
        ({"annotations": [{"id": 8, "image_id": 5, "category_id": 3, "bbox": [0, 0, float("nan"), 1]}]}, "four numbers"),
        ({"annotations": [{"id": 8, "image_id": 5, "category_id": 3, "bbox": [0, 0, 10**400, 1]}]}, "four numbers"),
        ({"annotations": [{"id": 8, "image_id": 5, "category_id": 3}]}, "annotation 8: bbox must be four numbers .* got None"),
        ({"annotations": [{"id": 8, "image_id": [5], "category_id": 3}]}, r"annotation 8: there is no image \[5\]"),
        ({"annotations": [{"id": 8, "image_id": 5, "category_id": {}}]}, "annotation 8: no category {}"),
        ({"annotations": [{"id": 8, "image_id": 5, "category_id": 3, "iscrowd": []}]}, r"iscrowd must be 0 or 1, got \[\]"),
        ({"annotations": 3}, "no list of objects 'annotations'"),
        ({"images": [{"id": 5, "file_name": "../x.jpg"}]}, "there is no image 11|lies outside"),
        ({"images": [{"id": 5, "file_name": "../x.jpg"}], "annotations": []}, "lies outside"),
        ({"images": [{"id": 5, "file_name": "lost.jpg"}], "annotations": []}, "none of the 1 images .*lost.jpg is missing"),
        ({"images": [{"id": 5, "file_name": r"C:\photos\x.jpg"}], "annotations": []}, "lies outside"),
        ({"images": [{"id": [5], "file_name": "x.jpg"}], "annotations": []}, r"no whole number as its id \(\[5\]\)"),
        ({"images": [{"id": "a1", "file_name": "x.jpg"}], "annotations": []}, r"no whole number as its id \('a1'\)"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "an id that is there already"),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "a"}]}, "categories 3 and others have the name 'a'"),
    ],
)  # fmt: skip
def test_broken_coco_is_refused(tmp_path, changes, message):
    path = coco(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        load_coco_tree(path, tmp_path / "val2017")


def test_ids_may_be_text_and_what_is_stated_twice_counts_once(tmp_path):
    box = {"id": 1, "image_id": 5.0, "category_id": "7", "bbox": [1, 2, 3, 4], "iscrowd": "0"}
    path = coco(
        tmp_path,
        images=[{"id": "5", "file_name": "x.jpg", "width": None, "height": 0}, {"id": "010", "file_name": "y.jpg", "width": "20"}],
        categories=[{"id": "7", "name": "zebra"}, {"id": "10", "name": "apple"}],
        annotations=[box, box, {**box, "bbox": [1, 1, 2, 2]}, {**box, "id": None}],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="1 annotations that stand there twice"):
        found = load_coco_tree(path, tmp_path / "val2017")
    assert found.left_out == {"annotations that stand there twice": 1} and found.classes == ("zebra", "apple")
    assert found.boxes[0].tolist() == [[1.0, 2.0, 4.0, 6.0], [1.0, 1.0, 3.0, 3.0], [1.0, 2.0, 4.0, 6.0]]


@pytest.mark.parametrize("used", [(7,), (3,), ()])
def test_a_category_without_objects_may_have_the_name_of_another(tmp_path, used):
    names = [{"id": 3, "name": "zebra"}, {"id": 5, "name": "apple"}, {"id": 7, "name": "zebra"}]
    objects = [{"id": id, "image_id": 5, "category_id": id, "bbox": [1, 2, 3, 4]} for id in (5, *used)]
    with pytest.warns(UserWarning, match="1 categories without objects that have the name of another"):
        found = load_coco_tree(coco(tmp_path, categories=names, annotations=objects), tmp_path / "val2017")
    assert found.classes == (("apple", "zebra") if used == (7,) else ("zebra", "apple"))
    assert found.counts() == {"apple": 1, "zebra": len(used)}


@pytest.mark.parametrize("name", ["part/x.jpg", r"part\x.jpg"])
def test_images_may_lie_in_a_folder_of_the_folder(tmp_path, silent, name):
    add_image(tmp_path / "val2017" / "part" / "x.jpg")
    path = coco(tmp_path, images=[{"id": 5, "file_name": name}], annotations=[])
    assert len(load_coco_tree(path, tmp_path / "val2017")) == 1


def test_coco_that_is_no_json_or_missing(tmp_path):
    path = coco(tmp_path)
    path.write_text('{"images": [')
    with pytest.raises(DataError, match="is no JSON .*line 1"):
        load_coco("val2017", tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(DataError, match="is no JSON"):
        load_coco("val2017", tmp_path)
    with pytest.raises(DataError, match="cannot be read .* give the JSON file itself"):
        load_coco_tree(path.parent, tmp_path)
    with pytest.raises(DataError, match="instances_train2017.json is missing"):
        load_coco("train2017", tmp_path)
    with pytest.raises(DataError, match="unpack train2017.zip"):
        load_coco("train2017", tmp_path / "elsewhere")


def test_a_box_set_refuses_what_does_not_fit():
    image, flags = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool)
    square, one = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([1])
    for boxes, labels, message in (
        (square.double(), one, "float32"),
        (square[:, :3], one, "float32"),
        (square[:, [2, 0, 0, 2]], one, "right above its left"),
        (square * float("inf"), one, "finite"),
        (square, one + 1, "from 1 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            BoxSet("wrong", (image,), (boxes,), (labels,), (flags,), ("a",))
    with pytest.raises(DataError, match="asked for 2 images"):
        BoxSet("right", (image,), (square,), (one,), (flags,), ("a",)).first(2)


def test_the_checksum_knows_every_part(tmp_path):
    first, same, other = (drawn_shapes(2, 16, seed) for seed in (0, 0, 1))
    assert first.checksum == same.checksum != other.checksum
    boxes = (first.boxes[0] + 0.5, *first.boxes[1:])
    moved = BoxSet("moved", first.images, boxes, first.labels, first.difficult, first.classes)
    assert moved.checksum != first.checksum


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 60), st.integers(4, 60), st.integers(4, 40), st.integers(20, 80))
def test_resizing_keeps_boxes_where_they_are(height, width, min_side, max_side):
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    whole = torch.tensor([[0.0, 0.0, width, height]])
    small, scaled = resize(image, whole, min_side, max_side)
    assert scaled[0, 2:].tolist() == pytest.approx([small.shape[2], small.shape[1]])
    assert min(small.shape[1:]) <= min_side and max(small.shape[1:]) <= max_side
    assert min(small.shape[1:]) == min_side or max(small.shape[1:]) == max_side


def test_mirroring_twice_changes_nothing():
    shapes = drawn_shapes(1, 32)
    image, boxes = mirrored_image(shapes.image(0), shapes.boxes[0])
    left, _, right, _ = boxes[0].int().tolist()
    assert (image[:, :, left:right].amax() == 230) and not torch.equal(image, shapes.image(0))
    again, back = mirrored_image(image, boxes)
    assert torch.equal(again, shapes.image(0)) and torch.equal(back, shapes.boxes[0])


def same_batches(first, second) -> bool:
    return len(first) == len(second) and all(
        all(map(torch.equal, x, u)) and all(torch.equal(a[key], b[key]) for a, b in zip(y, v) for key in a)
        for (x, y), (u, v) in zip(first, second)
    )


def test_a_batch_depends_on_seed_epoch_and_index_alone():
    shapes = drawn_shapes(9, 32)
    loader = BoxLoader(shapes, 2, seed=3)
    batches = list(loader.epoch(1))
    assert len(batches) == len(loader) == 4
    assert same_batches(list(BoxLoader(shapes, 2, seed=3).epoch(1, start=2)), batches[2:])
    assert same_batches(list(BoxLoader(shapes, 2, seed=3, threads=2).epoch(1)), batches)
    assert not same_batches(list(loader.epoch(2)), batches)
    assert not same_batches(list(BoxLoader(shapes, 2, seed=4).epoch(1)), batches)
    images, targets = batches[0]
    assert images[0].dtype == torch.float32 and 0 <= images[0].min() and images[0].max() <= 1
    assert targets[0].keys() == {"boxes", "labels"} and len(targets) == 2


def test_images_come_from_files_and_difficult_objects_stay_away(voc, tmp_path):
    add_voc(voc, "a", box(more="<difficult>1</difficult>") + ONE, size=(40, 20))
    add_voc(voc, "b", "", size=(40, 20))
    found = load_voc(2007, root=tmp_path)
    images, targets = next(BoxLoader(found, 2, 0, flip=False, sides=(10, 100)).epoch(0))
    assert sorted(len(target["boxes"]) for target in targets) == [0, 1]
    assert all(image.shape == (3, 10, 20) for image in images)
    assert torch.cat([target["boxes"] for target in targets]).tolist() == [[1.0, 2.0, 5.75, 4.5]]
    _, targets = next(BoxLoader(found, 2, 0, difficult=True).epoch(0))
    assert sorted(len(target["boxes"]) for target in targets) == [0, 2]
    with pytest.raises(ValueError, match="from 1 to 2"):
        BoxLoader(found, 3, 0)


def test_drawn_shapes_fill_their_boxes():
    shapes = drawn_shapes(20, 48)
    assert min(map(len, shapes.boxes)) >= 1 and all(shapes.counts().values())
    for image, boxes, labels in zip(shapes.images, shapes.boxes, shapes.labels):
        for (left, top, right, bottom), label in zip(boxes.int().tolist(), labels.tolist()):
            inside = np.asarray(image[label - 1, top:bottom, left:right]) == 230
            assert inside.any(0).all() and inside.any(1).all()  # it touches all four sides
            assert inside.mean() == pytest.approx(np.pi / 4 if label == 1 else 1, abs=0.06)
