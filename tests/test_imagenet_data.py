"""ImageNet and its shifted versions on disk: class indices, layouts, preprocessing, loaders, and what is refused."""

from __future__ import annotations

import io
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as TF

from advbn_lib.data.imagenet import (
    MEAN,
    STD,
    TEST_SETS,
    ImageNetFolder,
    ImageNetLoader,
    Share,
    evaluation_batches,
    evaluation_transform,
    find_parts,
    imagenet_r_wnids,
    imagenet_wnids,
    training_transform,
)  # fmt: skip
from advbn_lib.data.images import DataError
from advbn_lib.metrics import CORRUPTIONS

INDICES = (1, 5, 400, 999)
WNIDS = tuple(imagenet_wnids()[index] for index in INDICES)


def encoded(seed: int, size: tuple[int, int] = (48, 40), kind: str = "JPEG") -> bytes:
    """A small picture, smooth so that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize(size, Image.BICUBIC).save(file, kind)
    return file.getvalue()


def class_tree(folder: Path, wnids=WNIDS, images: int = 2, seed: int = 0, suffix: str = "JPEG") -> Path:
    """Class folders with some pictures each."""
    for place, wnid in enumerate(wnids):
        (folder / wnid).mkdir(parents=True)
        for number in range(images):
            picture = encoded(1000 * seed + 10 * place + number, kind="PNG" if suffix == "png" else "JPEG")
            (folder / wnid / f"{wnid}_{number}.{suffix}").write_bytes(picture)
    return folder


def opened(folder: Path, crop: int = 32, **options) -> ImageNetFolder:
    return ImageNetFolder("tree", folder, evaluation_transform(True, crop), partial=True, **options)


# ---- classes -------------------------------------------------------------------------------


def test_there_are_1000_classes_in_order():
    wnids = imagenet_wnids()
    assert len(set(wnids)) == 1000 and list(wnids) == sorted(wnids)
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)
    assert (wnids[0], wnids[281], wnids[999]) == ("n01440764", "n02123045", "n15075141")  # tench, tabby, toilet tissue


def test_classes_are_those_that_timm_lists():
    timm_data = pytest.importorskip("timm.data")
    assert tuple(timm_data.ImageNetInfo().label_names()) == imagenet_wnids()


def test_every_fourth_class_is_that_of_the_sample():
    files = (data_folder() / "imagenet_sample160").glob("*.jpg")
    assert tuple(sorted(file.name.split("_")[0] for file in files)) == imagenet_wnids()[::4]


def test_imagenet_r_has_200_of_them():
    assert len(imagenet_r_wnids()) == 200 and set(imagenet_r_wnids()) < set(imagenet_wnids())
    places = find_parts("imagenet_r", Path("."))[0].logits()
    # The first and the last few that its authors' script prints.
    assert places[:8] == (1, 2, 4, 6, 8, 9, 11, 13) and places[-4:] == (980, 981, 983, 988)


# ---- preprocessing -------------------------------------------------------------------------


def whole_levels(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return images * std + mean


def test_test_images_are_scaled_to_256_and_cropped_to_224():
    image = Image.open(io.BytesIO(encoded(0, (500, 400)))).convert("RGB")
    expected = TF.to_tensor(TF.center_crop(TF.resize(image, 256), 224))
    torch.testing.assert_close(whole_levels(evaluation_transform(True)(image)), expected)


def test_stored_sets_are_cropped_only():
    image = Image.open(io.BytesIO(encoded(0, (256, 256), "PNG")))
    torch.testing.assert_close(whole_levels(evaluation_transform(False)(image)), TF.to_tensor(image)[:, 16:240, 16:240])


def test_training_images_are_random_crops(seeds=8):
    image = Image.open(io.BytesIO(encoded(0, (500, 400)))).convert("RGB")
    crops = torch.stack([training_transform(32)(image) for _ in range(seeds)])
    assert crops.shape == (seeds, 3, 32, 32)
    levels = whole_levels(crops)
    assert levels.min() >= -1e-6 and levels.max() <= 1 + 1e-6
    assert crops.flatten(1).unique(dim=0).shape[0] == seeds


# ---- folders -------------------------------------------------------------------------------


def test_labels_are_imagenets_class_indices(tmp_path):
    images = opened(class_tree(tmp_path / "val"))
    assert sorted(set(images.targets)) == list(INDICES) and len(images) == 8
    pixels, label = images[0]
    assert pixels.shape == (3, 32, 32) and label == INDICES[0] == images.class_to_idx[WNIDS[0]]


def test_files_beside_the_classes_and_hidden_folders_are_passed_over(tmp_path):
    class_tree(tmp_path)
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / ".cache").mkdir()
    assert opened(tmp_path).classes == list(WNIDS)


@pytest.fixture(scope="module")
def all_classes(tmp_path_factory) -> Path:
    """A folder with all 1,000 classes, one picture each."""
    folder, picture = tmp_path_factory.mktemp("whole"), encoded(0)
    for wnid in imagenet_wnids():
        (folder / wnid).mkdir()
        (folder / wnid / "picture.JPEG").write_bytes(picture)
    return folder


def test_a_whole_set_needs_no_permission(all_classes):
    images = ImageNetFolder("imagenet/val", all_classes, evaluation_transform(True, 32))
    assert images.targets == list(range(1000))


def test_a_missing_class_is_named(all_classes):
    moved = all_classes / imagenet_wnids()[7]
    moved.rename(all_classes.parent / "elsewhere")
    try:
        with pytest.raises(DataError, match=rf"imagenet/val: .* lacks 1 of 1,000 classes \({moved.name}\).*--partial"):
            ImageNetFolder("imagenet/val", all_classes, evaluation_transform(True, 32))
    finally:
        (all_classes.parent / "elsewhere").rename(moved)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=f"tree: there is no folder {tmp_path / 'nowhere'}.*n01440764"):
        opened(tmp_path / "nowhere")


@pytest.mark.parametrize(("folders", "message"), [((), "holds no folder"), (("train", "val"), "train, val is not among them"),
                                                  (("n00000001", WNIDS[0]), "n00000001 is not among them")])  # fmt: skip
def test_another_layout_is_refused_and_the_right_one_named(tmp_path, folders, message):
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=f"one folder for each of 1,000 classes.*WordNet number.*{message}"):
        opened(tmp_path)


def test_an_empty_class_is_named(tmp_path):
    class_tree(tmp_path)
    (tmp_path / imagenet_wnids()[8]).mkdir()
    with pytest.raises(DataError, match=f"tree: .*{imagenet_wnids()[8]}"):
        opened(tmp_path)


def broken(kind: str) -> bytes:
    whole = encoded(0, (200, 200), "PNG" if "PNG" in kind else "JPEG")
    if "flipped" in kind:
        middle = len(whole) // 2
        return whole[:middle] + bytes(byte ^ 0xFF for byte in whole[middle : middle + 40]) + whole[middle + 40 :]
    return {"no picture": b"not a picture", "empty": b""}.get(kind, whole[: len(whole) // 2])


@pytest.mark.parametrize("kind", ["no picture", "empty", "half a JPEG", "half a PNG", "PNG with flipped bits"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, kind):
    class_tree(tmp_path, images=1)
    bad = tmp_path / WNIDS[0] / f"bad.{'png' if 'PNG' in kind else 'JPEG'}"
    bad.write_bytes(broken(kind))
    images = opened(tmp_path)
    place = [path for path, _ in images.samples].index(str(bad))
    with pytest.raises(DataError, match=rf"tree: {bad} cannot be used .*copy it anew"):
        images[place]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_stops_a_loader_by_name(tmp_path, workers):
    class_tree(tmp_path, images=1)
    bad = tmp_path / WNIDS[2] / "bad.JPEG"
    bad.write_bytes(b"not a picture")
    with pytest.raises(DataError, match=str(bad)):
        list(evaluation_batches(opened(tmp_path), 2, workers=workers))


def test_an_image_too_small_for_the_crop_is_refused_not_padded(tmp_path):
    class_tree(tmp_path)
    images = ImageNetFolder("stylized_imagenet", tmp_path, evaluation_transform(False, 64), partial=True)
    with pytest.raises(DataError, match="48x40 pixels, too few for a crop of 64"):
        images[0]


def test_the_listing_is_of_names_and_sizes(tmp_path):
    first, second = class_tree(tmp_path / "a"), class_tree(tmp_path / "b")
    listing = opened(first).listing()
    assert opened(second).listing() == listing  # wherever it lies
    file = second / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    os.utime(file, (0, 0))
    assert opened(second).listing() == listing
    file.write_bytes(file.read_bytes() + b"\0")
    assert opened(second).listing() != listing
    assert opened(second).listing(sizes=False) == opened(first).listing(sizes=False)
    file.rename(file.with_name("other.JPEG"))
    assert opened(second).listing(sizes=False) != opened(first).listing(sizes=False)


# ---- the sets and their layouts ------------------------------------------------------------


def names(parts) -> list[str]:
    return [part.name for part in parts]


@pytest.mark.parametrize(
    ("name", "inside", "resize"),
    [
        ("imagenet", "val", True), ("stylized_imagenet", "val", False), ("imagenet_sketch", "sketch", True),
        ("imagenet_sketch", ".", True), ("imagenet_advbn", ".", False), ("imagenet_r", ".", True),
    ],
)  # fmt: skip
def test_sets_of_one_part(tmp_path, name, inside, resize):
    wnids = imagenet_r_wnids()[:3] if name == "imagenet_r" else WNIDS
    class_tree(tmp_path / inside, wnids, suffix="png" if name == "imagenet_advbn" else "JPEG")
    (part,) = find_parts(name, tmp_path)
    assert part.name == name and part.resize is resize
    part.check(partial=True)
    images = part.open(32, partial=True)
    assert set(images.targets) == {imagenet_wnids().index(wnid) for wnid in wnids} and images[0][0].shape == (3, 32, 32)
    assert (part.logits() is None) == (name != "imagenet_r")
    with pytest.raises(DataError, match="lacks"):
        part.check()


def corrupted(folder: Path, corruptions, severities=range(1, 6), grouped: bool = False) -> Path:
    for corruption in corruptions:
        for severity in severities:
            group = Path("blur" if "blur" in corruption else "other") if grouped else Path()
            class_tree(folder / group / corruption / str(severity), WNIDS[:1], images=1)
    return folder


@pytest.mark.parametrize("grouped", [False, True])
def test_imagenet_c_in_both_layouts(tmp_path, grouped):
    corrupted(tmp_path, ("fog", "zoom_blur"), grouped=grouped)
    (tmp_path / "speckle_noise" / "1").mkdir(parents=True)  # one of the extra ones, which mCE does not count
    parts = find_parts("imagenet_c", tmp_path)
    assert names(parts) == [
        f"imagenet_c-{name}-{severity}" for name in ("zoom_blur", "fog") for severity in range(1, 6)
    ]
    assert not any(part.resize for part in parts)
    assert {part.folder.parent.name for part in parts} == {"fog", "zoom_blur"}
    assert len(parts[0].open(32, partial=True)) == 1


def test_a_missing_severity_is_named(tmp_path):
    corrupted(tmp_path, ("fog",), severities=(1, 2, 4, 5))
    with pytest.raises(DataError, match="fog should hold the severities 1 to 5; 3 is missing"):
        find_parts("imagenet_c", tmp_path)


def test_a_corruption_in_two_places_is_refused(tmp_path):
    corrupted(corrupted(tmp_path, ("fog",)), ("fog",), grouped=True)
    with pytest.raises(DataError, match="fog stands in .* and in .*remove one"):
        find_parts("imagenet_c", tmp_path)


def test_no_corruption_at_all_is_another_layout(tmp_path):
    class_tree(tmp_path / "val")
    with pytest.raises(DataError, match="<corruption>/<severity>/<wnid>, with corruptions such as gaussian_noise"):
        find_parts("imagenet_c", tmp_path)


def test_each_folder_of_imagenet_instagram_is_a_filter(tmp_path):
    for name in ("Hudson", "1977"):
        class_tree(tmp_path / name)
    parts = find_parts("imagenet_instagram", tmp_path)
    assert names(parts) == ["imagenet_instagram-1977", "imagenet_instagram-Hudson"] and all(
        part.resize for part in parts
    )


def test_imagenet_instagram_without_filters_is_another_layout(tmp_path):
    for folder in (class_tree(tmp_path / "a"), tmp_path / "empty"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(DataError, match="one folder for each filter"):
            find_parts("imagenet_instagram", folder)


def test_imagenet_r_takes_its_own_classes_only(tmp_path):
    class_tree(tmp_path, (imagenet_wnids()[0],))  # the tench is not in ImageNet-R
    with pytest.raises(
        DataError, match="imagenet_r: .* one folder for each of 200 classes.*n01440764 is not among them"
    ):
        find_parts("imagenet_r", tmp_path)[0].check(partial=True)


def test_unknown_sets_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no test set 'imagenet_x'; there are imagenet, imagenet_c"):
        find_parts("imagenet_x", tmp_path)
    for name in TEST_SETS:
        with pytest.raises(DataError, match=f"{name}: there is no folder"):
            find_parts(name, tmp_path / "nowhere")


def test_corruptions_of_the_metric_and_of_the_folders_agree(tmp_path):
    parts = find_parts("imagenet_c", corrupted(tmp_path, CORRUPTIONS))
    assert len(parts) == 75 and list(dict.fromkeys(name.split("-")[1] for name in names(parts))) == list(CORRUPTIONS)


# ---- loaders -------------------------------------------------------------------------------


@pytest.fixture
def training_set(tmp_path) -> ImageNetFolder:
    return ImageNetFolder("tree", class_tree(tmp_path / "train", images=3), training_transform(32), partial=True)


def stacked(batches) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def test_an_epoch_is_every_image_once_with_a_smaller_last_batch(training_set):
    loader = ImageNetLoader(training_set, 5, seed=0)
    batches = list(loader.epoch(0))
    assert [len(labels) for _, labels in batches] == [5, 5, 2] and len(loader) == 3
    assert sorted(stacked(batches)[1].tolist()) == sorted(training_set.targets)


def test_batches_depend_on_seed_and_epoch_alone(training_set):
    first = stacked(ImageNetLoader(training_set, 4, seed=1).epoch(2))
    torch.manual_seed(99)
    again = stacked(ImageNetLoader(training_set, 4, seed=1).epoch(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    by_workers = stacked(ImageNetLoader(training_set, 4, seed=1, workers=2).epoch(2))
    assert torch.equal(first[0], by_workers[0]) and torch.equal(first[1], by_workers[1])
    for seed, epoch in ((1, 3), (2, 2), (2, 1), (3, 0)):
        assert not torch.equal(first[0], stacked(ImageNetLoader(training_set, 4, seed=seed).epoch(epoch))[0])


def test_an_epoch_can_be_taken_up_in_the_middle(training_set):
    loader = ImageNetLoader(training_set, 5, seed=0)
    whole, rest = list(loader.epoch(1)), list(loader.epoch(1, start=1))
    assert len(rest) == 2
    assert all(torch.equal(a, b) for pair in zip(whole[1:], rest, strict=True) for a, b in zip(*pair, strict=True))
    assert list(loader.epoch(1, start=3)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_trainings_random_numbers_alone(training_set, workers):
    before = torch.get_rng_state()
    list(islice(ImageNetLoader(training_set, 4, seed=0, workers=workers).epoch(0), 2))
    list(evaluation_batches(opened(Path(training_set.root)), 4, workers=workers))
    assert torch.equal(before, torch.get_rng_state())


def test_batches_of_a_test_are_in_order(tmp_path):
    images = opened(class_tree(tmp_path, images=3))
    pixels, labels = stacked(evaluation_batches(images, 5))
    assert labels.tolist() == images.targets and torch.equal(pixels[4], images[4][0])


def test_a_batch_larger_than_the_share_is_refused(training_set):
    assert len(ImageNetLoader(training_set, 6, 0, share=Share(1, 2))) == 1
    for size in (0, 7):
        with pytest.raises(ValueError, match="batch_size must be from 1 to 6, a process's share of tree"):
            ImageNetLoader(training_set, size, 0, share=Share(1, 2))


class Numbered(list):
    """Stands for a folder: each image is its number."""

    name = "numbers"

    def __getitem__(self, index):
        return torch.tensor(super().__getitem__(index)), 0


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 8), st.integers(0, 3), st.data())
def test_shares_are_equal_and_cover_everything(count, processes, batch, epoch, data):
    images = Numbered(range(count))
    batch = min(batch, -(-count // processes))
    loaders = [ImageNetLoader(images, batch, 7, share=Share(rank, processes)) for rank in range(processes)]
    shares = [[pixels.tolist() for pixels, _ in loader.epoch(epoch)] for loader in loaders]
    assert (
        {len(loader) for loader in loaders}
        == {len(share) for share in shares}
        == {-(-(-(-count // processes)) // batch)}
    )
    assert len({tuple(len(part) for part in share) for share in shares}) == 1  # all step together
    seen = sorted(number for share in shares for part in share for number in part)
    assert set(seen) == set(range(count)) and len(seen) - count < processes
    start = data.draw(st.integers(0, len(shares[0])))
    assert [pixels.tolist() for pixels, _ in loaders[0].epoch(epoch, start)] == shares[0][start:]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 8))
def test_a_test_counts_every_image_once(count, processes, batch):
    images = Numbered(range(count))
    seen = [
        number
        for rank in range(processes)
        for pixels, _ in evaluation_batches(images, batch, share=Share(rank, processes))
        for number in pixels.tolist()
    ]
    assert sorted(seen) == list(range(count))
