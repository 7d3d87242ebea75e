"""Color-MNIST: what the colours say of the digits, and what they do not."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mnist import RAW, idx, sign

from advbn_lib.data import DataError, mnist
from advbn_lib.data.colour_mnist import EXTREME, PALETTE, VARIANCES, colour_mnist, coloured_digits, colourise
from advbn_lib.data.colour_mnist import _around as around

EACH = 200  # digits of a class


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Made-up digits in MNIST's layout: a white square on black, so that the colour can be read off."""
    write(tmp_path, monkeypatch, np.arange(10 * EACH) % 10)
    return tmp_path


def write(folder: Path, monkeypatch, labels: np.ndarray) -> None:
    (folder / RAW).mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((len(labels), 28, 28), np.uint8)
    pixels[:, 8:20, 8:20] = 255
    pixels[:, 6:8, 6:8] = 100
    for listed in mnist.FILES.values():
        for (name, _), array in zip(listed, (pixels, labels.astype(np.uint8))):
            (folder / RAW / f"{name}.gz").write_bytes(gzip.compress(idx(array), compresslevel=1))
    sign(folder / RAW, monkeypatch)


def correlation_ratio(digits) -> float:
    """Share of the colours' variance that lies between the digits: 0 if the colour says nothing of the digit."""
    colours, labels = digits.colours.double(), digits.images.labels
    means = torch.stack([colours[labels == label].mean(0) for label in range(10)])
    return (((means - means.mean(0)) ** 2).mean(0) / colours.var(0)).mean().item()


@pytest.mark.parametrize("variance", [*VARIANCES, EXTREME])
def test_the_training_colours_are_around_the_mean_colour_of_the_digit(root, variance):
    digits = coloured_digits("train", variance, root=root)
    expected = cut_off_mean(torch.tensor(PALETTE) / 255, variance)
    means = torch.stack([digits.colours[digits.images.labels == label].mean(0) for label in range(10)])
    assert (means - expected).abs().max() < 5 * variance**0.5 / EACH**0.5


def cut_off_mean(means: torch.Tensor, variance: float) -> torch.Tensor:
    """By adding up the density on a grid."""
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    density = torch.exp(-((grid - means.double()[..., None]) ** 2) / (2 * variance))
    return (density * grid).sum(-1) / density.sum(-1)


@settings(max_examples=25, deadline=None)
@given(mean=st.floats(0, 1), variance=st.sampled_from((EXTREME, *VARIANCES)))
def test_colours_are_distributed_as_if_drawn_again_until_inside(mean, variance):
    """The protocol's own way, beside the one pass that is used."""
    random, count = np.random.default_rng(0), 4000
    drawn = random.normal(mean, variance**0.5, 6 * count)
    again = np.sort(drawn[(drawn > 0) & (drawn < 1)][:count])
    ranks = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ours = around(torch.tensor(mean), variance, ranks).numpy()
    assert (np.diff(ours) >= 0).all() and ours.min() >= 0 and ours.max() <= 1
    assert np.abs(np.searchsorted(again, ours) / len(again) - ranks.numpy()).max() < 2.5 / len(again) ** 0.5


@pytest.mark.parametrize("reading", ["palette", "uniform"])
@pytest.mark.parametrize("variance", [EXTREME, 0.05, None])
def test_the_test_colours_say_nothing_of_the_digit(root, variance, reading):
    test = coloured_digits("test", variance, test_colours=reading, root=root)
    assert correlation_ratio(test) < 0.02
    if variance is not None:
        assert correlation_ratio(coloured_digits("train", variance, root=root)) > 0.5


def test_test_colours_from_the_palette_are_near_one_of_its_colours_all_alike_often(root):
    test = coloured_digits("test", 1e-6, root=root)
    distance = torch.cdist(test.colours, torch.tensor(PALETTE) / 255)
    assert distance.min(1).values.max() < 0.02
    assert (torch.bincount(distance.argmin(1), minlength=10) / len(test) - 0.1).abs().max() < 0.04


def test_uniform_colours_fill_the_cube_in_both_splits(root):
    for split in ("train", "test"):
        digits = coloured_digits(split, None, root=root)
        assert torch.histc(digits.colours, 10, 0, 1).min() > 0.08 * digits.colours.numel()
        assert correlation_ratio(digits) < 0.02
    same = [coloured_digits("test", v, test_colours="uniform", root=root).images.checksum for v in (0.02, 0.05, None)]
    assert len(set(same)) == 1, "one test set serves all variances"


def test_an_image_is_grey_times_colour_and_gives_the_colour_back(root):
    digits = coloured_digits("train", 0.03, root=root)
    images = digits.images.images
    assert images.dtype == torch.uint8 and images.shape == (10 * EACH, 3, 32, 32)
    product = digits.grey[:, None] / 255 * digits.colours[:, :, None, None]
    assert (images / 255 - product).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(images[:, :, 16, 16] / 255, digits.colours), "where the grey is white, the image is the colour"
    assert not images[:, :, :2].any()


@settings(max_examples=50, deadline=None)
@given(grey=st.integers(0, 255), colour=st.tuples(*[st.floats(0, 1)] * 3))
def test_colouring_rounds_to_the_nearest_level(grey, colour):
    pixels = colourise(torch.full((1, 2, 3), grey, dtype=torch.uint8), torch.tensor([colour]))
    assert pixels.shape == (1, 3, 2, 3)
    for channel in range(3):
        assert abs(pixels[0, channel].float() - grey * colour[channel]).max() <= 0.5 + 1e-4


def test_the_set_depends_on_seed_split_and_variance_alone(root):
    first = coloured_digits("train", 0.02, root=root)
    assert first.images.checksum == colour_mnist("train", 0.02, root=root).checksum
    others = [
        coloured_digits("train", 0.02, seed=1, root=root),
        coloured_digits("train", 0.03, root=root),
        coloured_digits("test", 0.02, root=root),
        coloured_digits("train", None, root=root),
    ]
    assert len({first.images.checksum, *(other.images.checksum for other in others)}) == 5
    assert len({first.images.name, *(other.images.name for other in others)}) == 5


def test_sets_of_one_seed_differ_in_the_spread_only(root):
    narrow, wide = (coloured_digits("train", variance, root=root) for variance in (0.005, 0.05))
    of_one = narrow.images.labels == 1
    green = torch.stack([digits.colours[of_one][:, 1] for digits in (narrow, wide)])  # its mean is far from 0 and 1
    assert torch.corrcoef(green)[0, 1] > 0.99 and 2.5 < green[1].std() / green[0].std() < 3.5


def test_parts_and_other_colours_keep_images_and_codes_together(root):
    digits = coloured_digits("train", 0.02, root=root)
    part = digits.first(30, start=20)
    assert len(part) == 30 and torch.equal(part.images.images, digits.images.images[20:50])
    assert torch.equal(part.colours, digits.colours[20:50]) and torch.equal(part.grey, digits.grey[20:50])
    swapped = part.recoloured(part.colours.flip(0))
    assert torch.equal(swapped.images.images[:, :, 16, 16] / 255, part.colours.flip(0))
    assert torch.equal(part.recoloured(part.colours).images.images, part.images.images)
    assert len(digits.to("cpu").first(None)) == len(digits)


def test_bad_input_is_refused(root, monkeypatch):
    for variance in (0, -0.02, float("nan")):
        with pytest.raises(ValueError, match="variance must be above 0, or None"):
            coloured_digits("train", variance, root=root)
    with pytest.raises(ValueError, match="test_colours is 'palette' or 'uniform', got 'hue'"):
        coloured_digits("test", 0.02, test_colours="hue", root=root)
    with pytest.raises(ValueError, match="'train' or 'test', got 'extra'"):
        coloured_digits("extra", 0.02, root=root)
    write(root, monkeypatch, np.arange(40) % 9)
    with pytest.raises(DataError, match="colour_mnist/train, variance 0.02, seed 0: no image of 9 among"):
        coloured_digits("train", 0.02, root=root)


def test_the_real_digits_are_coloured_whole():
    if not (data_folder() / "mnist").is_dir():
        pytest.skip("ADVBN_DATA holds no mnist")
    digits = coloured_digits("test", 0.02, download=False)
    assert len(digits) == 10_000 and correlation_ratio(digits) < 0.01
    brightest = digits.images.images.flatten(2).max(2).values
    assert (brightest / 255 - digits.colours).abs().max() < 0.1, "not every digit has a white pixel"
