"""CelebA: a small tree in the documented layout is read as it is, and a damaged one refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CelebA

from advbn_lib.data import DataError
from advbn_lib.data.celeba import load_celeba

FACES = {"train": 9, "validation": 4, "test": 3}
NAMES = [f"{number:06}.jpg" for number in range(1, 17)]
SMILES = [number % 3 != 0 for number in range(16)]
ATTRIBUTES = ["Bald", "Smiling", "Young"]


def rows(values) -> str:
    return "".join(f"{name} {value}\n" for name, value in zip(NAMES, values))


def picture(number: int) -> np.ndarray:
    """Grey 40 above and below the middle square; in it a colour of its own, the left half darker."""
    pixels = np.full((218, 178, 3), 40, np.uint8)
    pixels[20:198] = (10 * number + 50, 120, 200 - 10 * number)
    pixels[20:198, :89] //= 2
    return pixels


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """16 made-up faces in the published layout, and torchvision's checksums made to fit."""
    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.fromarray(picture(number)).save(folder / "img_align_celeba" / name, quality=100, subsampling=0)
    signs = [" ".join(f"{s:2}" for s in (-1, 1 if smile else -1, 1)) for smile in SMILES]
    of_split = [code for code, count in enumerate(FACES.values()) for _ in range(count)]
    (folder / "list_attr_celeba.txt").write_text(f"16\n{' '.join(ATTRIBUTES)} \n" + rows(signs))
    (folder / "list_eval_partition.txt").write_text(rows(of_split))
    (folder / "identity_CelebA.txt").write_text(rows(range(16)))
    (folder / "list_bbox_celeba.txt").write_text("16\nimage_id x_1 y_1 width height\n" + rows(["1 2 3 4"] * 16))
    (folder / "list_landmarks_align_celeba.txt").write_text("16\nlefteye_x lefteye_y\n" + rows(["69 109"] * 16))
    sign(folder, monkeypatch)
    return tmp_path


def sign(folder: Path, monkeypatch) -> None:
    listed = [
        (where, hashlib.md5((folder / name).read_bytes()).hexdigest() if name.endswith(".txt") else md5, name)
        for where, md5, name in CelebA.file_list
    ]
    monkeypatch.setattr(CelebA, "file_list", listed)


@pytest.mark.parametrize("split", FACES)
def test_the_standard_split_is_read_as_it_is(root, split):
    start = sum(list(FACES.values())[: list(FACES).index(split)])
    images = load_celeba(split, side=16, root=root)
    numbers = range(start, start + FACES[split])
    assert images.images.shape == (len(numbers), 3, 16, 16) and images.images.dtype == torch.uint8
    assert images.labels.tolist() == [int(SMILES[number]) for number in numbers]
    assert images.classes == ("not Smiling", "Smiling") and images.name == f"celeba/{split}, Smiling, 16 px"
    for place, number in enumerate(numbers):
        right = torch.tensor([10 * number + 50, 120, 200 - 10 * number]).view(3, 1, 1)
        assert (images.images[place, :, :, 9:].float() - right).abs().max() <= 4, "the middle square, without the rest"
        assert (images.images[place, :, :, :7].float() - right / 2).abs().max() <= 4, "not mirrored or turned"


def test_the_first_faces_can_be_read_alone(root):
    whole, part = load_celeba("train", root=root), load_celeba("train", count=4, root=root)
    assert torch.equal(part.images, whole.images[:4]) and torch.equal(part.labels, whole.labels[:4])
    assert whole.images.shape[1:] == (3, 64, 64)
    with pytest.raises(DataError, match="asked for 10 faces, but CelebA's train part has 9: ask for fewer"):
        load_celeba("train", count=10, root=root)


def test_another_attribute_can_be_asked_for(root):
    with pytest.raises(DataError, match="CelebA has no attribute 'Smile'; there are Bald, Smiling, Young"):
        load_celeba("train", "Smile", root=root)
    with pytest.raises(DataError, match="celeba/train, Bald, 64 px: no image of Bald among its 9 images"):
        load_celeba("train", "Bald", root=root)


def test_absent_faces_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=r"img_align_celeba is missing: get .*mmlab.*unpack .*celeba, or set ADVBN_DATA"
    ):
        load_celeba("test")


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise RuntimeError("too many users have viewed this file")

    monkeypatch.setattr(CelebA, "download", refused)
    with pytest.raises(DataError, match=r"could not be downloaded \(too many users.*get img_align_celeba.zip"):
        load_celeba("test", root=tmp_path / "new", download=True)


@pytest.mark.parametrize("name", [name for _, _, name in CelebA.file_list if name.endswith(".txt")])
def test_a_missing_or_damaged_list_is_named(root, name):
    path = root / "celeba" / name
    path.write_text(path.read_text()[:-3])
    with pytest.raises(DataError, match=f"{name} is damaged .*: get "):
        load_celeba("train", root=root)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} is missing: get "):
        load_celeba("train", root=root)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "000003.jpg cannot be read as an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "000003.jpg cannot be read as an image"),
        (lambda path: Image.new("RGB", (64, 64)).save(path), "000003.jpg has 64x64 pixels, expected 178x218"),
    ],
    ids=["missing", "cut short", "size"],
)
def test_a_damaged_face_is_named(root, spoil, message):
    spoil(root / "celeba" / "img_align_celeba" / "000003.jpg")
    with pytest.raises(DataError, match=message):
        load_celeba("train", root=root)


def test_bad_arguments_are_refused(root):
    with pytest.raises(ValueError, match="split is one of train, validation, test, got 'valid'"):
        load_celeba("valid", root=root)
    for options in ({"side": 0}, {"count": 0}):
        with pytest.raises(ValueError, match="side and count must be positive"):
            load_celeba("train", root=root, **options)
