"""Smiles: a split that keeps equal files together, and a tint that says of the label what it is told to say."""

import dataclasses
import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advbn_lib.data import DataError, ImageSet
from advbn_lib.data.smiles import CLASSES, EDITIONS, load_smiles, planted

FACES = (40, 25)  # without and with a smile


def face(number: int, side: int = 64) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(params=EDITIONS, ids=lambda edition: edition.folder)
def tree(tmp_path, request) -> Path:
    """The folder of one of the editions, with a few made-up faces."""
    edition = request.param
    for label, part in enumerate(edition.parts):
        folder = tmp_path / edition.folder / part
        folder.mkdir(parents=True)
        for number in range(FACES[label]):
            (folder / f"{2 * number + label}.png").write_bytes(face(2 * number + label))
    return tmp_path / edition.folder


def parts(tree: Path) -> list[Path]:
    edition = next(edition for edition in EDITIONS if edition.folder == tree.name)
    return [tree / part for part in edition.parts]


def load(tree: Path, split: str, **options) -> ImageSet:
    return load_smiles(split, **{"root": tree.parent, "complete": False, **options})


def contents(images: ImageSet) -> list[bytes]:
    return [image.numpy().tobytes() for image in images.images]


def test_the_faces_are_shared_out_whole_class_by_class(tree):
    train, test = load(tree, "train"), load(tree, "test")
    assert torch.bincount(test.labels).tolist() == [8, 5] and torch.bincount(train.labels).tolist() == [32, 20]
    assert not set(contents(train)) & set(contents(test))
    assert train.classes == CLASSES and train.images.shape == (52, 3, 64, 64)
    assert (train.name, test.name) == (f"{tree.name}/train, own split 0", f"{tree.name}/test, own split 0")
    expected = {np.asarray(Image.open(io.BytesIO(face(2 * n + label)))).tobytes(): label for label in (0, 1) for n in range(FACES[label])}  # fmt: skip
    for images in (train, test):
        for image, label in zip(images.images, images.labels.tolist()):
            assert expected[image[0].numpy().tobytes()] == label
            assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_the_split_depends_on_the_seed_and_not_on_names(tree):
    splits = [frozenset(contents(load(tree, "test", seed=seed))) for seed in range(4)]
    assert len(set(splits)) == 4
    before = [load(tree, split).checksum for split in ("train", "test")]
    for folder in parts(tree):
        for number, path in enumerate(sorted(folder.iterdir(), reverse=True)):
            path.rename(folder / f"renamed{number}.png")
    assert [load(tree, split).checksum for split in ("train", "test")] == before


def test_the_order_mixes_the_classes(tree):
    assert 0 < load(tree, "train").labels[:20].sum() < 20


@pytest.mark.parametrize("copies", [1, 3])
def test_equal_files_come_to_the_same_side(tree, copies):
    none, _ = parts(tree)
    for number in range(0, 2 * FACES[0], 2):
        for copy in range(copies):
            (none / f"{number}_{copy}.png").write_bytes((none / f"{number}.png").read_bytes())
    train, test = load(tree, "train"), load(tree, "test")
    assert not set(contents(train)) & set(contents(test))
    assert (len(train), len(test)) == ((copies + 1) * 32 + 20, (copies + 1) * 8 + 5)


def test_a_face_with_both_labels_is_left_out(tree):
    none, smile = parts(tree)
    (smile / "again.png").write_bytes((none / "0.png").read_bytes())
    kept = contents(load(tree, "train")) + contents(load(tree, "test"))
    assert len(kept) == sum(FACES) - 1
    assert load(tree, "test").images.shape[2:] == (64, 64)


def test_missing_faces_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"elsewhere.SMILEs is missing: get .*hromi/SMILEsmileD.*ADVBN_DATA"):
        load_smiles("train")


def test_another_number_of_faces_is_refused_unless_asked_for(tree):
    with pytest.raises(DataError, match=r"has 40 faces without and 25 with a smile, expected .*3,690: copy .*complete"):
        load(tree, "train", complete=True)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (clear, r"no image of smile among its .* images: take more"),
        (lambda folder: (clear(folder), folder.rmdir()), r"is missing: copy the data set anew"),
        (lambda folder: (folder / "1.png").write_bytes(b"no image"), r"1.png cannot be read as an image.*copy it anew"),
        (lambda folder: (folder / "1.png").write_bytes(face(1)[:300]), r"1.png cannot be read as an image.*copy it"),
        (lambda folder: (folder / "1.png").write_bytes(face(1, 60)), r"1.png has 60x60 pixels, expected 64x64"),
    ],
    ids=["no smile", "no folder", "no image", "cut short", "size"],
)
def test_a_damaged_folder_is_refused(tree, spoil, message):
    spoil(parts(tree)[1])
    with pytest.raises(DataError, match=message):
        load(tree, "train")
        load(tree, "test")


def test_files_are_checked_where_there_are_checksums(tree):
    paths = sorted(path for path in tree.rglob("*.png"))
    rows = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(tree)}" for path in paths]
    (tree / "SHA256SUMS").write_text("\n".join(rows) + "\n")
    assert len(load(tree, "train")) == 52
    paths[3].write_bytes(face(999))
    with pytest.raises(DataError, match=f"{paths[3].name} is damaged or altered: .*copy"):
        load(tree, "train")


def test_unknown_splits_are_refused(tree):
    with pytest.raises(ValueError, match="'train' or 'test', got 'validation'"):
        load(tree, "validation")


# ---- the plant -----------------------------------------------------------------------------


def grey_faces(counts: tuple[int, int] = (60, 40), side: int = 8) -> ImageSet:
    labels = torch.cat([torch.zeros(counts[0]), torch.ones(counts[1])]).long()
    grey = torch.randint(0, 256, (len(labels), 1, side, side), generator=torch.Generator().manual_seed(1))
    return ImageSet("faces/train", grey.to(torch.uint8).repeat(1, 3, 1, 1), labels, CLASSES, (0.5,) * 3, (0.5,) * 3)


def is_warm(images: torch.Tensor) -> torch.Tensor:
    """Read off the pixels: more red than blue."""
    return images[:, 0].flatten(1).sum(1, dtype=torch.int64) > images[:, 2].flatten(1).sum(1, dtype=torch.int64)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), counts=st.tuples(st.integers(1, 60), st.integers(1, 60)), seed=st.integers(0, 9))
def test_the_light_agrees_with_the_label_in_the_asked_share_of_each_class(share, counts, seed):
    tinted = planted(grey_faces(counts), share, seed)
    right = tinted.agrees
    for label in (0, 1):
        members = tinted.images.labels == label
        assert abs(int(right[members].sum()) - share * counts[label]) <= 0.5
    warm = tinted.colours[:, 0] > tinted.colours[:, 2]
    wrong = (warm == (tinted.images.labels == 1)) != right
    assert wrong.float().mean() <= 0.02 + 1 / sum(counts), "a tint may stray across white, but seldom"


@pytest.mark.parametrize(
    ("share", "low", "high"), [(1.0, 0.98, 1.0), (0.5, 0.47, 0.53), (0.0, 0.0, 0.02), (0.9, 0.88, 0.92)]
)
def test_a_rule_that_reads_the_light_is_as_right_as_was_asked_for(share, low, high):
    tinted = planted(grey_faces((600, 400), side=4), share)
    assert low <= (is_warm(tinted.images.images) == (tinted.images.labels == 1)).float().mean() <= high


def test_nothing_of_the_plant_is_left_in_a_grey_copy():
    faces = grey_faces((100, 100))
    tinted = planted(faces, 1.0)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    brightness = (tinted.images.images * weights).sum(1)
    assert (brightness - 0.8 * faces.images[:, 0]).abs().max() <= 0.51


def test_a_tinted_face_is_grey_times_colour():
    faces = grey_faces()
    tinted = planted(faces, 0.9)
    assert torch.equal(tinted.grey, faces.images[:, 0]) and torch.equal(tinted.images.labels, faces.labels)
    product = tinted.grey[:, None] * tinted.colours[:, :, None, None]
    assert (tinted.images.images - product).abs().max() <= 0.5 + 1e-3
    assert tinted.colours.min() >= 0 and tinted.colours.max() <= 1 and tinted.colours.dtype == torch.float32
    assert tinted.colours.std(0)[2] > 0.05, "the tints vary"
    assert len(tinted) == 100 and tinted.images.name == "faces/train, tint 0.9, seed 0"


def test_the_plant_depends_on_seed_and_set():
    faces = grey_faces()
    other = dataclasses.replace(faces, name="faces/test")
    one = planted(faces, 0.9)
    assert one.images.checksum == planted(faces, 0.9).images.checksum
    for different in (planted(faces, 0.9, seed=1), planted(other, 0.9), planted(faces, 0.8)):
        assert different.images.checksum != one.images.checksum


def test_a_plant_in_the_wrong_set_is_refused():
    faces = grey_faces()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share must be from 0 to 1"):
            planted(faces, share)
    with pytest.raises(DataError, match="has colour already"):
        planted(planted(faces, 0.9).images, 0.9)
    with pytest.raises(DataError, match="no image of smile among its 60 images"):
        planted(faces.first(60), 0.9)
    with pytest.raises(DataError, match="has 3 classes"):
        planted(dataclasses.replace(faces, classes=("a", "b", "c")), 0.9)


def test_the_real_faces_split_as_they_always_have():
    if not (data_folder() / "smiles").is_dir():
        pytest.skip("ADVBN_DATA holds no smiles")
    test = load_smiles("test")
    assert torch.bincount(test.labels).tolist() == [1264, 737], (
        "a fifth of 6,311 and 3,687, and two that are there twice"
    )
    assert planted(test, 0.5).images.images.shape == (2001, 3, 64, 64)
