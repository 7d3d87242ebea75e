"""The loader: seeded, resumable, and the same as cropping and flipping one image after the other."""

import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_images
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from advbn_lib.benchmarks import torch_loader
from advbn_lib.data import DeviceLoader
from advbn_lib.data.digits import load_digits


def pixels_of(images: torch.Tensor, source) -> torch.Tensor:
    """Normalised images back to uint8."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (source.mean, source.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def variants(image: torch.Tensor, padding: int) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop and mirror image of one image (3,H,W), by its pixels."""
    padded, size = F.pad(image, [padding] * 4), image.shape[-1]
    found = {}
    for row, column, flip in itertools.product(range(2 * padding + 1), range(2 * padding + 1), (False, True)):
        crop = padded[:, row : row + size, column : column + size]
        found[(crop.flip(2) if flip else crop).contiguous().numpy().tobytes()] = (row, column, flip)
    return found


def same(first, second) -> bool:
    pairs = list(itertools.zip_longest(first, second))
    return all(
        a is not None and b is not None and torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs
    )


def test_every_image_is_a_crop_or_mirrored_crop_of_its_own_and_every_draw_occurs():
    images, draws = tiny_images(64), []
    known = [variants(image, 2) for image in images.images]
    by_pixels = {pixels: (i, draw) for i, variant in enumerate(known) for pixels, draw in variant.items()}
    loader = DeviceLoader(images, 16, seed=0, padding=2)
    for epoch in range(12):
        seen = []
        for batch, labels in loader.epoch(epoch):
            for image, label in zip(pixels_of(batch, images), labels):
                index, draw = by_pixels[image.contiguous().numpy().tobytes()]
                assert images.labels[index] == label
                seen.append(index)
                draws.append(draw)
        assert sorted(seen) == list(range(64))
    for values, choices in ((0, 5), (1, 5), (2, 2)):
        counts = torch.tensor([draw[values] for draw in draws]).int().bincount(minlength=choices)
        expected = len(draws) / choices
        assert len(counts) == choices and (counts - expected).abs().max() < 5 * expected**0.5
    assert len(set(draws)) == 50  # rows, columns and mirror are drawn independently


def test_normalisation_is_torchvisions():
    images = tiny_images(32)
    change = transforms.Compose([transforms.ToTensor(), transforms.Normalize(images.mean, images.std)])
    expected = torch.stack([change(to_pil_image(image)) for image in images.images])
    batch, labels = next(DeviceLoader(images, 32, seed=0, padding=0, flip=False).epoch(0))
    order = [
        next(i for i, image in enumerate(images.images) if torch.equal(image, own)) for own in pixels_of(batch, images)
    ]
    torch.testing.assert_close(batch, expected[order], rtol=0, atol=1e-6)
    assert torch.equal(labels, images.labels[order]) and sorted(order) == list(range(32))


def test_border_pixels_are_torchvisions_black():
    images = tiny_images(4)
    batch, _ = next(DeviceLoader(images, 4, seed=0, padding=8, flip=False).epoch(0))
    black = torch.tensor([-m / s for m, s in zip(images.mean, images.std)])
    assert (batch - black.view(1, 3, 1, 1)).abs().amin() < 1e-6
    torch.testing.assert_close(batch.amin((0, 2, 3)), black)


def test_without_augmentation_nothing_is_cropped_or_mirrored():
    images = tiny_images(16)
    batch, _ = next(DeviceLoader(images, 16, seed=3, padding=0, flip=False).epoch(0))
    own = {image.contiguous().numpy().tobytes() for image in pixels_of(batch, images)}
    assert own == {image.numpy().tobytes() for image in images.images}


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_batches_do_not_depend_on_where_the_epoch_is_entered(start):
    loader, later = (DeviceLoader(tiny_images(40), 8, seed=7) for _ in range(2))
    torch.rand(100)  # the global random state does not matter
    list(later.epoch(1))  # nor what was read before
    assert same(later.epoch(2, start), list(loader.epoch(2))[start:])


@pytest.mark.parametrize(("seed", "epoch"), [(8, 2), (7, 3)])
def test_another_seed_or_epoch_gives_other_batches(seed, epoch):
    images = tiny_images(40)
    batch, labels = next(DeviceLoader(images, 8, 7).epoch(2))
    other, other_labels = next(DeviceLoader(images, 8, seed).epoch(epoch))
    assert not torch.equal(batch, other) and not torch.equal(labels, other_labels)


def test_batches_of_an_epoch_are_augmented_differently():
    image = tiny_images(1).images.expand(40, -1, -1, -1)
    images = tiny_images(40)
    loader = DeviceLoader(
        type(images)(images.name, image, images.labels, images.classes, images.mean, images.std), 20, seed=0
    )
    first, second = (batch for batch, _ in loader.epoch(0))
    assert not torch.equal(first, second) and len(first.unique(dim=0)) > 5


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    list(DeviceLoader(tiny_images(40), 8, seed=7).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_incomplete_batch_is_dropped():
    loader = DeviceLoader(tiny_images(43), 8, seed=0)
    assert [len(labels) for _, labels in loader.epoch(0)] == [8] * 5 and len(loader) == 5


def test_batches_are_float_and_channels_last():
    batch, labels = next(DeviceLoader(tiny_images(16), 8, seed=0).epoch(0))
    assert batch.shape == (8, 3, 12, 12) and batch.dtype == torch.float32 and labels.dtype == torch.int64
    assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [0, -1, 41])
def test_a_batch_size_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match=f"from 1 to 40, the size of tiny/train; got {size}"):
        DeviceLoader(tiny_images(40), size, seed=0)


def test_is_much_faster_than_torchs_loader_with_the_same_transforms():
    def seconds(batches) -> float:
        started = time.perf_counter()
        assert sum(len(labels) for _, labels in batches) == 1280
        return time.perf_counter() - started

    images = load_digits("train")
    own, torchs = DeviceLoader(images, 128, seed=0), torch_loader(images, seed=0, workers=0)
    rounds = [(seconds(own.epoch(epoch)), seconds(torchs)) for epoch in range(4)]
    assert 3 * min(mine for mine, _ in rounds) < min(theirs for _, theirs in rounds)
