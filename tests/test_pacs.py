"""PACS: its domains, its splits, and what is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from PIL import Image

from advbn_lib.data import DataError
from advbn_lib.data.cifar10 import MEAN, STD
from advbn_lib.data.pacs import CLASSES, DOMAINS, load_pacs, load_pacs_split

EACH = 12  # images of a class
WHERE = ["PACS", "PACS/images", "PACS/kfold", "pacs112"]


def colour_of(domain: str, class_name: str, index: int) -> tuple[int, int, int]:
    return 60 * list(DOMAINS).index(domain) + 30, 30 * CLASSES.index(class_name) + 20, 10 * index + 20


def make_domain(folder: Path, domain: str, file_type: str = "png", side: int = 12, each: int = EACH) -> None:
    """Images of one colour, which says whose they are."""
    for class_name in CLASSES:
        (folder / domain / class_name).mkdir(parents=True)
        for index in range(each):
            image = Image.new("RGB", (side, side), colour_of(domain, class_name, index))
            options = {"lossless": True} if file_type == "webp" else {"quality": 100, "subsampling": 0}
            options = {} if file_type == "png" else options
            image.save(folder / domain / class_name / f"pic_{index:03}.{file_type}", **options)


def make_lists(folder: Path, domain: str, file_type: str = "jpg", held_out: tuple[int, ...] = (3, 7)) -> None:
    """The authors' lists; they number the classes from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {"train": [], "crossval": [], "test": []}
    for number, class_name in enumerate(CLASSES, 1):
        for index in range(EACH):
            line = f"{domain}/{class_name}/pic_{index:03}.{file_type} {number}"
            lines["crossval" if index in held_out else "train"].append(line)
            lines["test"].append(line)
    for name, listed in lines.items():
        (folder / f"{domain}_{name}_kfold.txt").write_text("\n".join(listed) + "\n")


def sign(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(folder)}" for path in paths]
    (folder / "SHA256SUMS").write_text("\n".join(rows) + "\n")


@pytest.fixture
def photos(tmp_path) -> Path:
    """The root of a small tree: photographs alone, no lists."""
    make_domain(tmp_path / "PACS", "photo")
    return tmp_path


def load(root: Path, split: str, domain: str = "photo", **options):
    return load_pacs(domain, split, **{"size": 8, "root": root, "complete": False, **options})


def indices(images) -> list[tuple[int, int]]:
    """Which file each image is, from its colour: (class, index)."""
    colours = images.images[:, :, 0, 0].float()
    return [(round((green - 20) / 30), round((blue - 20) / 10)) for _, green, blue in colours.tolist()]


@pytest.mark.parametrize("where", WHERE)
def test_a_domain_is_read_whole_with_its_labels(tmp_path, where):
    for domain in DOMAINS:
        make_domain(tmp_path / where, domain)
    for number, domain in enumerate(DOMAINS):
        images = load(tmp_path, "all", domain)
        assert images.images.shape == (7 * EACH, 3, 8, 8) and images.images.dtype == torch.uint8
        assert (images.images[:, 0] == 60 * number + 30).all()
        assert sorted(indices(images)) == [(label, index) for label in range(7) for index in range(EACH)]
        assert [label for label, _ in indices(images)] == images.labels.tolist()
        assert images.classes == CLASSES and (images.mean, images.std) == (MEAN, STD)
        assert images.name == f"pacs/{domain}/all, 8 px"


@pytest.mark.parametrize("file_type", ["jpg", "png", "webp"])
def test_the_file_type_changes_neither_order_nor_split(tmp_path, file_type):
    make_domain(tmp_path / "PACS", "photo", file_type)
    make_domain(tmp_path / "other" / "pacs112", "photo", "png")
    for split in ("train", "validation", "all"):
        assert indices(load(tmp_path, split)) == indices(load(tmp_path / "other", split))


def test_images_are_reduced_with_antialiasing(tmp_path):
    make_domain(tmp_path / "PACS", "photo")
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    for path in (tmp_path / "PACS" / "photo").glob("*/*"):
        Image.fromarray(stripes).save(path)
    assert (load(tmp_path, "all", size=16).images[..., 2:-2].float() - 100).abs().max() <= 3
    corner = np.zeros((24, 24, 3), np.uint8)
    corner[:12, 12:, 2] = 255  # tells rows from columns, and channels
    for path in (tmp_path / "PACS" / "photo").glob("*/*"):
        Image.fromarray(corner).save(path)
    image = load(tmp_path, "all", size=8).images[0]
    assert image[2, 0, 7] == 255 and image[2, 7, 0] == 0 and image[2, 0, 0] == 0 and not image[:2].any()


def test_grey_and_palette_files_become_three_channels(photos):
    folder = photos / "PACS" / "photo" / "dog"
    Image.new("L", (12, 12), 77).save(folder / "pic_000.png")
    Image.new("RGB", (12, 12), (9, 200, 30)).quantize(4).save(folder / "pic_001.png")
    found = {tuple(colour) for colour in load(photos, "all").images[:, :, 4, 4].tolist()}
    assert {(77, 77, 77), (9, 200, 30)} <= found


def test_the_order_mixes_the_classes_and_is_fixed(photos):
    first = load(photos, "all")
    assert indices(first) == indices(load(photos, "all", seed=5))
    assert len(set(first.labels[:14].tolist())) >= 5
    assert first.checksum == load(photos, "all").checksum


def test_without_lists_a_tenth_of_each_class_is_held_out(photos):
    train, validation = load(photos, "train"), load(photos, "validation")
    assert not set(indices(train)) & set(indices(validation))
    assert set(indices(train)) | set(indices(validation)) == set(indices(load(photos, "all")))
    assert torch.bincount(validation.labels).tolist() == [1] * 7
    assert train.name == "pacs/photo/train, 8 px, own split 0"
    assert validation.name == "pacs/photo/validation, 8 px, own split 0"


@pytest.mark.parametrize(("each", "held_out"), [(2, 1), (14, 1), (16, 2), (24, 2), (26, 3)])
def test_the_part_held_out_is_rounded_but_never_empty(tmp_path, each, held_out):
    make_domain(tmp_path / "PACS", "photo", each=each)
    assert torch.bincount(load(tmp_path, "validation").labels).tolist() == [held_out] * 7


def test_the_split_depends_on_the_seed_and_not_on_what_else_is_there(photos):
    splits = [tuple(sorted(indices(load(photos, "validation", seed=seed)))) for seed in range(5)]
    assert len(set(splits)) == 5
    make_domain(photos / "PACS", "sketch")
    (photos / "PACS" / "photo" / "dog" / "Thumbs.db").write_bytes(b"no image")
    (photos / "PACS" / "photo" / ".hidden").mkdir()
    assert tuple(sorted(indices(load(photos, "validation")))) == splits[0]
    assert load(photos, "validation", seed=3).name.endswith("own split 3")


def test_the_split_is_this_one(photos):
    """A change of the split would change what is trained on: those whose hash is lowest are held out."""

    def hashed(class_name: str, index: int) -> str:
        return hashlib.sha256(f"0 photo/{class_name}/pic_{index:03}".encode()).hexdigest()

    lowest = [min(range(EACH), key=lambda index: hashed(class_name, index)) for class_name in CLASSES]
    assert sorted(indices(load(photos, "validation"))) == list(enumerate(lowest))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("place", ["", "splits", "Train val splits and h5py files pre-read"])
def test_the_authors_lists_are_used_where_they_are(tmp_path, where, place):
    make_domain(tmp_path / where, "photo")
    make_lists(tmp_path / where.split("/")[0] / place, "photo")
    train, validation = load(tmp_path, "train"), load(tmp_path, "validation")
    assert sorted(indices(validation)) == [(label, index) for label in range(7) for index in (3, 7)]
    assert set(indices(train)) == set(indices(load(tmp_path, "all"))) - set(indices(validation))
    assert [label for label, _ in indices(train)] == train.labels.tolist()
    assert train.name == "pacs/photo/train, 8 px, official split"
    assert load(tmp_path, "all").name == "pacs/photo/all, 8 px"


def test_lists_of_another_domain_are_not_used(photos):
    make_lists(photos / "PACS", "sketch")
    assert load(photos, "train").name.endswith("own split 0")


def test_a_line_twice_or_with_a_wrong_number_does_no_harm(photos):
    make_lists(photos / "PACS", "photo")
    path = photos / "PACS" / "photo_train_kfold.txt"
    expected = load(photos, "train")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].removesuffix(" 1") + " 0", *lines[1:], lines[2], ""]))
    assert load(photos, "train").checksum == expected.checksum


def bad_line(path: Path) -> None:
    path.write_text(path.read_text() + "photo/dog/pic_000\n")


def unknown_image(path: Path) -> None:
    path.write_text(path.read_text() + "photo/dog/pic_999.jpg 1\n")


def image_of_the_other_list(path: Path) -> None:
    path.write_text(path.read_text() + "photo/dog/pic_003.jpg 1\n")


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, "one list of the official split but not photo_train_kfold.txt"),
        (lambda path: path.write_text(""), "photo_train_kfold.txt is empty: get the list anew"),
        (bad_line, r"photo_train_kfold.txt is damaged in line 71, 'photo/dog/pic_000': get the list anew"),
        (unknown_image, "photo_train_kfold.txt names photo/dog/pic_999 in line 71, but there is no such image: copy"),
        (image_of_the_other_list, "both name photo/dog/pic_003: get the lists anew"),
    ],
    ids=["missing", "empty", "damaged", "unknown", "overlap"],
)
def test_bad_lists_are_refused(photos, split, spoil, message):
    make_lists(photos / "PACS", "photo")
    spoil(photos / "PACS" / "photo_train_kfold.txt")
    with pytest.raises(DataError, match=message):
        load(photos, split)


def test_missing_pacs_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"PACS.photo is missing: get PACS .*https.*put its folders photo, art_painting"
    ):
        load(tmp_path, "all")
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"elsewhere.PACS.sketch is missing.*ADVBN_DATA"):
        load_pacs("sketch", "all")


def remove_class(folder: Path) -> None:
    for path in (folder / "horse").iterdir():
        path.unlink()
    (folder / "horse").rmdir()


def empty_class(folder: Path) -> None:
    for path in (folder / "horse").iterdir():
        path.unlink()


def no_image(folder: Path) -> None:
    (folder / "horse" / "pic_004.png").write_bytes(b"this is no image")


def same_name(folder: Path) -> None:
    Image.new("RGB", (4, 4)).save(folder / "horse" / "pic_004.jpg")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "cat").mkdir(), r"photo.cat: PACS has no class 'cat', only dog, .*remove the folder"),
        (remove_class, r"photo.horse is missing: copy .*photo anew"),
        (empty_class, r"photo.horse has no images: copy .*photo anew"),
        (no_image, r"pic_004.png cannot be read as an image .*copy it anew"),
        (same_name, r"pic_004.png and pic_004.jpg are two images of one name: remove one"),
    ],
    ids=["unknown class", "class missing", "class empty", "no image", "two of one name"],
)
def test_a_damaged_tree_is_refused(photos, spoil, message):
    spoil(photos / "PACS" / "photo")
    with pytest.raises(DataError, match=message):
        load(photos, "all")


@pytest.mark.parametrize("file_type", ["jpg", "png", "webp"])
def test_a_file_cut_short_is_refused(tmp_path, file_type):
    make_domain(tmp_path / "PACS", "photo", file_type)
    path = tmp_path / "PACS" / "photo" / "horse" / f"pic_004.{file_type}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"pic_004.{file_type} cannot be read as an image .*copy it anew"):
        load(tmp_path, "all")


def test_a_domain_of_another_size_is_refused_unless_asked_for(photos):
    with pytest.raises(
        DataError, match=r"has 84 images of photo, PACS has 1,670: copy the folder anew, or use .*complete"
    ):
        load_pacs("photo", "train", root=photos)
    assert len(load_pacs("photo", "all", size=8, root=photos, complete=False)) == 84


def test_files_are_checked_where_there_are_checksums(photos):
    folder = photos / "PACS"
    sign(folder)
    assert len(load(photos, "all")) == 7 * EACH
    other = folder / "photo" / "dog" / "pic_001.png"
    good = other.read_bytes()
    Image.new("RGB", (12, 12)).save(other)
    with pytest.raises(DataError, match=r"dog.pic_001.png is damaged or altered.*copy .*PACS anew"):
        load(photos, "all")
    other.unlink()
    with pytest.raises(DataError, match=r"dog.pic_001.png is missing: copy .*PACS anew"):
        load(photos, "all")
    other.write_bytes(good)
    (other.parent / "pic_100.png").write_bytes(good)
    with pytest.raises(DataError, match=r"dog.pic_100.png is not in SHA256SUMS"):
        load(photos, "all")
    (other.parent / "pic_100.png").unlink()
    listing = folder / "SHA256SUMS"
    listing.write_text(listing.read_text() + "0123 \n")
    with pytest.raises(DataError, match=r"SHA256SUMS is damaged in line 85"):
        load(photos, "all")


def test_unknown_names_are_refused(photos):
    with pytest.raises(ValueError, match="no domain 'clipart' in PACS; there are photo, art_painting, cartoon, sketch"):
        load(photos, "all", "clipart")
    with pytest.raises(ValueError, match="split is one of train, validation, all, got 'test'"):
        load(photos, "test")
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        load(photos, "all", size=0)


def test_the_books_split_trains_on_photographs_only(tmp_path, monkeypatch):
    for domain in DOMAINS:
        make_domain(tmp_path / "PACS", domain)
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path))
    monkeypatch.setattr("advbn_lib.data.pacs.DOMAINS", dict.fromkeys(DOMAINS, 7 * EACH))
    train, test = load_pacs_split("photo", "train", 8), load_pacs_split("photo", "test", 8)
    assert not set(indices(train)) & set(indices(test)) and len(train) + len(test) == 7 * EACH
    assert (train.name, test.name) == (load(tmp_path, "train").name, load(tmp_path, "validation").name)
    assert load_pacs_split("sketch", "test").images.shape == (7 * EACH, 3, 64, 64)
    with pytest.raises(ValueError, match="all of 'sketch' are test images here"):
        load_pacs_split("sketch", "train")
    with pytest.raises(ValueError, match="split is 'train' or 'test', got 'all'"):
        load_pacs_split("photo", "all")


def test_the_real_domains_have_the_published_numbers_of_images():
    if not (data_folder() / "pacs112").is_dir():
        pytest.skip("ADVBN_DATA holds no pacs112")
    counts = {domain: len(load_pacs(domain, "all", size=8)) for domain in DOMAINS}
    assert counts == {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929}


def test_the_real_photographs_split_by_class():
    if not (data_folder() / "pacs112").is_dir():
        pytest.skip("ADVBN_DATA holds no pacs112")
    train, test = load_pacs_split("photo", "train", 16), load_pacs_split("photo", "test", 16)
    of_each = torch.tensor([189, 202, 182, 186, 199, 280, 432])
    assert torch.equal(torch.bincount(train.labels) + torch.bincount(test.labels), of_each)
    assert (torch.bincount(test.labels) - of_each / 10).abs().max() <= 0.5
    sketches = load_pacs("sketch", "all", size=16).images.float()
    assert (sketches[:, :1] - sketches).abs().max() <= 2 and sketches.mean() > 200  # dark lines on white
