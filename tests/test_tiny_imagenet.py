"""Tiny ImageNet: read whole and right, or refused with a message that says how to mend it. On small files in its layout."""

import hashlib
import http.server
import shutil
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advbn_lib.data import DataError, load_images, tiny_imagenet
from advbn_lib.data.tiny_imagenet import load_tiny_imagenet

WNIDS = ("n02124075", "n01443537", "n04067472", "n01629819")  # not sorted, as in the archive
NAMES = {
    "n02124075": "Egyptian cat", "n01443537": "goldfish, Carassius auratus", "n04067472": "reel",
    "n01629819": "European fire salamander, Salamandra salamandra",
}  # fmt: skip
TRAIN, TEST = 3, 2
# Colours far apart, so that JPEG's losses cannot make one class's image another's.
COLOURS = {wnid: ((60 * k + 20) % 256, (130 * k + 40) % 256, (200 - 50 * k) % 256) for k, wnid in enumerate(WNIDS)}


def save(path: Path, wnid: str, mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[wnid]).convert(mode).save(path, "JPEG", quality=95)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A set of 4 classes in the published layout, with another number of classes and images expected."""
    monkeypatch.setattr(tiny_imagenet, "CLASSES", len(WNIDS))
    monkeypatch.setattr(tiny_imagenet, "PER_CLASS", {"train": TRAIN, "test": TEST})
    monkeypatch.setattr(tiny_imagenet, "URL", "http://127.0.0.1:9/tiny-imagenet-200.zip")
    top = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        for number in (10, 0, 2):
            save(top / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", wnid)
        (top / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    rows = [(f"val_{number}.JPEG", WNIDS[(3 * number) % 4]) for number in range(TEST * len(WNIDS))]
    for name, wnid in rows:
        save(top / "val" / "images" / name, wnid)
    (top / "val" / "val_annotations.txt").write_text("".join(f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in rows))
    (top / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (top / "words.txt").write_text("n00001740\tentity\n" + "".join(f"{wnid}\t{name}\n" for wnid, name in NAMES.items()))
    save(top / "test" / "images" / "test_0.JPEG", WNIDS[0])
    return top


def colour_of(images: torch.Tensor) -> list[tuple[int, ...]]:
    return [tuple(image.float().mean((1, 2)).round().int().tolist()) for image in images]


def assert_right(images, wnids: list[str]) -> None:
    """Each image has its class's colour and number."""
    assert images.labels.tolist() == [sorted(WNIDS).index(wnid) for wnid in wnids]
    for colour, wnid in zip(colour_of(images.images), wnids, strict=True):
        assert np.abs(np.subtract(colour, COLOURS[wnid])).max() <= 3


@pytest.mark.parametrize("inside", ["", "tiny_imagenet"])
def test_training_images_are_read_the_classes_in_turn(folder, tmp_path, inside):
    if inside:
        (tmp_path / inside).mkdir()
        folder.rename(tmp_path / inside / folder.name)
    images = load_tiny_imagenet("train", tmp_path)
    assert images.name == "tiny_imagenet/train" and images.images.shape == (12, 3, 64, 64)
    assert_right(images, sorted(WNIDS) * TRAIN)
    assert images.classes == ("goldfish", "European fire salamander", "Egyptian cat", "reel")
    assert images.first(4).labels.unique().numel() == 4


def test_images_of_a_class_are_in_the_order_of_their_numbers(folder, tmp_path):
    wnid = sorted(WNIDS)[0]
    for number, level in ((0, 10), (2, 120), (10, 240)):
        Image.new("RGB", (64, 64), (level,) * 3).save(
            folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", "JPEG"
        )
    images = load_tiny_imagenet("train", tmp_path)
    levels = images.images[images.labels == 0].float().mean((1, 2, 3))
    assert torch.allclose(levels, torch.tensor([10.0, 120.0, 240.0]), atol=2)


def test_test_images_are_those_of_the_annotations_in_their_order(folder, tmp_path):
    images = load_tiny_imagenet("test", tmp_path)
    assert images.name == "tiny_imagenet/test"
    assert_right(images, [WNIDS[(3 * number) % 4] for number in range(8)])


def test_it_is_a_data_set_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path))
    assert len(load_images("tiny_imagenet", "test")) == 8


def test_grey_images_get_three_equal_channels(folder, tmp_path):
    wnid = WNIDS[1]
    save(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG", wnid, "L")
    images = load_tiny_imagenet("train", tmp_path)
    (image,) = images.images[:4][images.labels[:4] == sorted(WNIDS).index(wnid)]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_hidden_files_and_lists_of_boxes_are_passed_over(folder, tmp_path):
    wnid = WNIDS[0]
    for stray in (
        folder / "train" / ".DS_Store", folder / "val" / "images" / "._val_0.JPEG",
        folder / "train" / wnid / "images" / f"._{wnid}_0.JPEG", folder / "train" / wnid / "images" / "Thumbs.db",
        folder / "train" / "notes.txt",
    ):  # fmt: skip
        stray.write_bytes(b"no image")
    assert len(load_tiny_imagenet("train", tmp_path)) == 12 and len(load_tiny_imagenet("test", tmp_path)) == 8


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


ANNOTATIONS = Path("val", "val_annotations.txt")
SPOILED = {
    "missing class": (
        "train", lambda f: shutil.rmtree(f / "train" / WNIDS[2]), f"train lacks the classes {WNIDS[2]}; unpack"
    ),
    "unknown class": (
        "train", lambda f: (f / "train" / "n09999999").mkdir(), "folders that are no class: n09999999; unpack"
    ),
    "missing image": (
        "train", lambda f: (f / "train" / WNIDS[2] / "images" / f"{WNIDS[2]}_2.JPEG").unlink(),
        f"class {WNIDS[2]} has 2 images here, and should have 3: unpack .* complete=False",
    ),
    "image of another class": (
        "train", lambda f: save(f / "train" / WNIDS[0] / "images" / f"{WNIDS[1]}_7.JPEG", WNIDS[1]),
        f"{WNIDS[1]}_7.JPEG should not be there: .*{WNIDS[0]}_<number>",
    ),
    "no images folder": (
        "train", lambda f: shutil.rmtree(f / "train" / WNIDS[0] / "images"), "images is missing; unpack"
    ),
    "wrong size": (
        "train", lambda f: save(f / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_2.JPEG", WNIDS[0], size=(32, 48)),
        "_2.JPEG has 32x48 pixels, and Tiny ImageNet 64x64",
    ),
    "truncated image": (
        "test", lambda f: truncate(f / "val" / "images" / "val_3.JPEG"), "val_3.JPEG is no whole image .*copy it anew"
    ),
    "no image": (
        "test", lambda f: (f / "val" / "images" / "val_3.JPEG").write_bytes(b"GIF?"), "val_3.JPEG is no whole image"
    ),
    "missing test image": (
        "test", lambda f: (f / "val" / "images" / "val_3.JPEG").unlink(), "images lacks val_3.JPEG; unpack"
    ),
    "unlabelled test image": (
        "test", lambda f: save(f / "val" / "images" / "val_77.JPEG", WNIDS[0]), "without a label: val_77.JPEG"
    ),
    "unknown label": (
        "test", lambda f: edit(f / ANNOTATIONS, WNIDS[3], "n00000001"), "line 2: .*is no file name and class"
    ),
    "second label": (
        "test", lambda f: edit(f / ANNOTATIONS, "val_1.JPEG", "val_0.JPEG"), "line 2: .*second label for val_0.JPEG"
    ),
    "a path as a name": (
        "test", lambda f: edit(f / ANNOTATIONS, "val_1.JPEG", "../val_1.JPEG"), "line 2: .*is no file name"
    ),
    "unbalanced labels": (
        "test", lambda f: edit(f / ANNOTATIONS, WNIDS[3], WNIDS[0]), "has [13] images here, and should have 2"
    ),
    "no annotations": ("test", lambda f: (f / ANNOTATIONS).unlink(), "val_annotations.txt is missing; unpack"),
    "no list of classes": ("test", lambda f: (f / "wnids.txt").unlink(), "wnids.txt is missing; unpack"),
    "short list of classes": (
        "test", lambda f: edit(f / "wnids.txt", f"{WNIDS[0]}\n", ""), "names 3 classes in 3 lines, and should name 4"
    ),
    "class twice": (
        "test", lambda f: edit(f / "wnids.txt", WNIDS[0], WNIDS[1]), "names 3 classes in 4 lines, and should name 4"
    ),
    "no WordNet number": ("test", lambda f: edit(f / "wnids.txt", WNIDS[0], "goldfish"), "'goldfish' is no WordNet"),
    "no name": ("test", lambda f: edit(f / "words.txt", WNIDS[0], "n00000001"), f"no name for {WNIDS[0]}"),
    "no text": ("test", lambda f: (f / "words.txt").write_bytes(b"\xff\xfe\x00"), "words.txt is damaged: it is no text"),
}  # fmt: skip


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_wrong_is_named_with_a_way_to_mend_it(folder, tmp_path, name):
    split, spoil, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(DataError, match=message):
        load_tiny_imagenet(split, tmp_path)


def test_a_part_of_the_set_will_do_if_that_is_said(folder, tmp_path):
    wnid = sorted(WNIDS)[1]
    (folder / "train" / wnid / "images" / f"{wnid}_0.JPEG").unlink()
    images = load_tiny_imagenet("train", tmp_path, complete=False)
    assert images.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 2, 3]
    shutil.rmtree(folder / "train" / wnid / "images")
    (folder / "train" / wnid / "images").mkdir()
    with pytest.raises(DataError, match=f"class {wnid} has 0 images"):
        load_tiny_imagenet("train", tmp_path, complete=False)


def test_the_published_numbers_are_asked_for(folder, tmp_path, monkeypatch):
    monkeypatch.undo()
    assert (tiny_imagenet.CLASSES, tiny_imagenet.PER_CLASS) == (200, {"train": 500, "test": 50})
    with pytest.raises(DataError, match="names 4 classes in 4 lines, and should name 200"):
        load_tiny_imagenet("test", tmp_path)


@pytest.fixture
def website(folder, tmp_path, monkeypatch) -> Path:
    """The archive behind a web address of this machine."""
    archive = tmp_path / "site" / "tiny-imagenet-200.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(tiny_imagenet, "URL", f"http://127.0.0.1:{server.server_port}/{archive.name}")
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield archive
    server.shutdown()
    server.server_close()


def test_what_is_not_there_is_downloaded_once(website, tmp_path):
    root = tmp_path / "new"
    assert len(load_tiny_imagenet("test", root)) == 8
    website.unlink()
    assert len(load_tiny_imagenet("train", root)) == 12
    assert sorted(path.name for path in root.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_another_archive_is_refused_and_not_unpacked(website, tmp_path):
    root, whole = tmp_path / "new", website.read_bytes()
    website.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="could not be downloaded.*ADVBN_DATA"):
        load_tiny_imagenet("test", root)
    assert not [path for path in root.iterdir() if path.is_dir()]
    website.write_bytes(whole)
    assert len(load_tiny_imagenet("test", root)) == 8


def test_an_interrupt_while_unpacking_leaves_no_half_of_a_set(website, tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def interrupted(archive, aside, *_):
        (Path(aside) / "tiny-imagenet-200" / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    root = tmp_path / "new"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(utils, "extract_archive", interrupted)
        load_tiny_imagenet("test", root)
    assert [path.name for path in root.iterdir()] == ["tiny-imagenet-200.zip"]
    assert len(load_tiny_imagenet("test", root)) == 8


def test_without_internet_the_message_says_where_to_put_the_data(folder, tmp_path):
    root = tmp_path / "new"
    with pytest.raises(DataError, match="could not be downloaded.*unpack tiny-imagenet-200.zip there"):
        load_tiny_imagenet("test", root)
    with pytest.raises(DataError, match="tiny-imagenet-200 is missing: unpack"):
        load_tiny_imagenet("test", root, download=False)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        load_tiny_imagenet("val", tmp_path)
