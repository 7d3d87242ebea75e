"""Shifts of style: colours, filters, and the palettes of paintings."""

import colorsys
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib.data import paintings
from advbn_lib.data.images import DataError
from advbn_lib.data.paintings import (
    HISTOGRAMS,
    PAINTINGS,
    count_levels,
    match_histogram,
    painting_histogram,
    write_histograms,
)
from advbn_lib.data.styles import (
    BLENDS,
    FILTERS,
    HUE_DEGREES,
    SEPIA,
    STYLE_FAMILIES,
    STYLES,
    WITHOUT_SEVERITY,
    Filter,
    Layer,
    luma,
    rotate_hue,
    vignette,
)

ALL = [(name, severity) for name in STYLES for severity in ([0] if name in WITHOUT_SEVERITY else range(1, 6))]
every_style = pytest.mark.parametrize(("name", "severity"), ALL)
every_filter = pytest.mark.parametrize("name", FILTERS)
every_painting = pytest.mark.parametrize("name", PAINTINGS)
unit = st.floats(0, 1)


def some_images(count: int = 6, height: int = 16, width: int = 20) -> torch.Tensor:
    """Whole grey levels in [0,1], black, white, greys and single colours among them."""
    images = torch.randint(0, 256, (count, 3, height, width)) / 255
    images[0], images[1] = 0, 1
    images[2, 1:] = images[2, :1]
    images[3, :2] = 0
    return images


def pixels(*colours: tuple[float, float, float]) -> torch.Tensor:
    """Colours as one image, 1,3,1,W."""
    return torch.tensor(colours, dtype=torch.float32).T.reshape(1, 3, 1, -1)


def cut(images: torch.Tensor) -> np.ndarray:
    """To whole grey levels, as every shift is: N,H,W,3."""
    return (images.clamp(0, 1) * 255 + 1e-4).floor().permute(0, 2, 3, 1).numpy()


# --- all of them ---


def test_the_families_share_the_styles_out_and_hue_alone_has_degrees():
    assert [name for names in STYLE_FAMILIES.values() for name in names] == list(STYLES)
    assert list(STYLE_FAMILIES) == ["colour", "filters", "paintings"]
    assert set(STYLES) - set(WITHOUT_SEVERITY) == {"hue"}


@every_style
def test_every_style_gives_images_of_the_same_kind_and_keeps_its_input(name, severity):
    images = some_images()
    before = images.clone()
    styled = STYLES[name](images, severity, None)
    assert styled.shape == images.shape and styled.dtype == images.dtype
    assert styled.isfinite().all() and styled.amin() >= -1e-6 and styled.amax() <= 1 + 1e-6
    assert torch.equal(images, before)
    assert (cut(styled)[4:] != cut(images)[4:]).mean() > 0.5  # it does change the images of many colours


@every_style
def test_every_style_treats_each_image_alone_and_without_chance(name, severity):
    images = some_images()
    together = STYLES[name](images, severity, torch.Generator().manual_seed(1))
    torch.rand(3)
    alone = torch.cat([STYLES[name](image[None], severity, None) for image in images])
    assert torch.equal(together, alone)


@every_style
def test_no_style_but_the_vignette_knows_where_a_pixel_is(name, severity):
    """Shapes are left alone: pixels that change places keep their new colours."""
    images = some_images()
    order = torch.randperm(16 * 20)
    moved = images.flatten(2)[..., order].view_as(images)
    styled = STYLES[name](images, severity, None).flatten(2)[..., order].view_as(images)
    same = torch.allclose(STYLES[name](moved, severity, None), styled, atol=1e-6)
    assert same == (name != "vignette")


@every_style
def test_every_style_mirrors_with_its_image(name, severity):
    images = some_images()
    for axis in (2, 3):
        mirrored = STYLES[name](images.flip(axis), severity, None).flip(axis)
        torch.testing.assert_close(mirrored, STYLES[name](images, severity, None))


def test_no_two_styles_are_alike():
    styled = [cut(STYLES[name](some_images(), severity, None)) for name, severity in ALL]
    for i, first in enumerate(styled):
        for second in styled[:i]:
            assert np.abs(first - second).mean() > 3  # grey levels


# --- colour ---


def test_grey_weighs_the_channels_and_greying_twice_is_greying_once():
    primaries = STYLES["grey"](pixels((1, 0, 0), (0, 1, 0), (0, 0, 1)), 0, None)
    torch.testing.assert_close(primaries, torch.tensor([0.299, 0.587, 0.114]).expand(1, 3, 1, 3))
    once = STYLES["grey"](some_images(), 0, None)
    assert np.array_equal(
        cut(STYLES["grey"](torch.from_numpy(cut(once)).permute(0, 3, 1, 2) / 255, 0, None)), cut(once)
    )


def test_inverting_turns_the_levels_round_and_twice_changes_nothing():
    images = some_images()
    once = STYLES["inverted"](images, 0, None)
    assert np.array_equal(cut(once), 255 - cut(images))
    assert np.array_equal(cut(STYLES["inverted"](once, 0, None)), cut(images))


@pytest.mark.parametrize("severity", range(1, 6))
def test_hue_turns_as_in_colorsys(severity):
    images = some_images(8, 8, 8)
    images[4] = torch.randint(0, 3, (3, 8, 8)) / 2  # channels that are equal, or the largest together
    expected = np.empty((*images.shape[:1], *images.shape[2:], 3))
    for place in np.ndindex(expected.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*images.permute(0, 2, 3, 1)[place].tolist())
        expected[place] = colorsys.hsv_to_rgb((hue + severity * 36 / 360) % 1, saturation, value)
    turned = STYLES["hue"](images, severity, None)
    np.testing.assert_allclose(turned.permute(0, 2, 3, 1).numpy(), expected, rtol=0, atol=3e-6)


def test_hue_takes_red_to_green_to_blue_and_half_a_turn_twice_changes_nothing():
    red, green, blue = pixels((1, 0, 0)), pixels((0, 1, 0)), pixels((0, 0, 1))
    for start, end in ((red, green), (green, blue), (blue, red)):
        torch.testing.assert_close(rotate_hue(start, 120), end, rtol=0, atol=1e-6)
        torch.testing.assert_close(rotate_hue(end, -120), start, rtol=0, atol=1e-6)
    images = some_images()
    assert HUE_DEGREES[-1] == 180
    back = STYLES["hue"](STYLES["hue"](images, 5, None), 5, None)
    torch.testing.assert_close(back, images, rtol=0, atol=3e-6)


@settings(deadline=None, max_examples=50)
@given(st.tuples(unit, unit, unit), st.floats(-360, 360), st.floats(-360, 360))
def test_turns_of_the_hue_add_up_and_keep_value_and_chroma(colour, first, second):
    x = pixels(colour).double()
    turned = rotate_hue(x, first)
    for extreme in (torch.amax, torch.amin):
        torch.testing.assert_close(extreme(turned, 1), extreme(x, 1), rtol=0, atol=1e-9)
    if x.amax() - x.amin() > 1e-3:  # else the hue is of no colour
        torch.testing.assert_close(rotate_hue(turned, second), rotate_hue(x, first + second), rtol=0, atol=1e-7)


# --- filters ---


def w3c(mode: str, below: float, above: float) -> float:
    """The blend functions of Compositing and Blending Level 1, section 10.1, for one number each."""
    if mode == "multiply":
        return below * above
    if mode == "screen":
        return 1 - (1 - below) * (1 - above)
    if mode == "hard_light":
        return w3c("multiply", below, 2 * above) if above <= 0.5 else w3c("screen", below, 2 * above - 1)
    if mode == "overlay":
        return w3c("hard_light", above, below)
    if above <= 0.5:
        return below - (1 - 2 * above) * below * (1 - below)
    curve = ((16 * below - 12) * below + 4) * below if below <= 0.25 else below**0.5
    return below + (2 * above - 1) * (curve - below)


@pytest.mark.parametrize("mode", BLENDS)
def test_blends_are_those_of_the_w3c(mode):
    levels = [i / 20 for i in range(21)]
    below, above = (grid.double() for grid in torch.meshgrid(torch.tensor(levels), torch.tensor(levels), indexing="ij"))
    expected = torch.tensor([[w3c(mode, b, a) for a in above[0].tolist()] for b in below[:, 0].tolist()]).double()
    torch.testing.assert_close(BLENDS[mode](below, above), expected, rtol=0, atol=1e-6)
    assert expected.amin() >= 0 and expected.amax() <= 1


def test_sepia_is_that_of_the_w3c():
    """Filter Effects Level 1: the matrix of sepia(amount), at the full amount."""
    rest = 0.0  # 1 - amount
    matrix = [
        (0.393 + 0.607 * rest, 0.769 - 0.769 * rest, 0.189 - 0.189 * rest),
        (0.349 - 0.349 * rest, 0.686 + 0.314 * rest, 0.168 - 0.168 * rest),
        (0.272 - 0.272 * rest, 0.534 - 0.534 * rest, 0.131 + 0.869 * rest),
    ]
    assert np.array_equal(SEPIA, matrix)
    images = some_images()
    expected = np.einsum("dc,nchw->ndhw", np.array(matrix), images.numpy()).clip(0, 1)
    np.testing.assert_allclose(STYLES["sepia"](images, 0, None).numpy(), expected, atol=1e-6)


def test_a_filter_without_steps_changes_nothing():
    images = some_images()
    torch.testing.assert_close(Filter()(images), images)
    transparent = Filter(layers=tuple(Layer(blend, (0.9, 0.1, 0.4), 0.0) for blend in BLENDS))
    torch.testing.assert_close(transparent(images), images)


def test_each_step_of_a_filter_does_what_it_says():
    images = some_images()
    close = torch.testing.assert_close
    close(Filter(saturation=0)(images), luma(images).expand_as(images))
    close(Filter(saturation=0.5)(images), (images + luma(images)) / 2)
    close(Filter(gamma=(0.5, 1, 2))(images), torch.stack([images[:, 0].sqrt(), images[:, 1], images[:, 2] ** 2], 1))
    low, high = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)
    close(Filter(low=(0.1, 0.2, 0.3), high=(0.9, 0.8, 0.7))(images), low + (high - low) * images)
    close(Filter(contrast=1)(images), 3 * images**2 - 2 * images**3)
    close(Filter(contrast=0.5)(images), (images + 3 * images**2 - 2 * images**3) / 2)
    tint = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1)
    close(Filter(layers=(Layer("multiply", (0.2, 0.5, 0.8), 0.5),))(images), images * (1 + tint) / 2)
    close(Filter(layers=(Layer("screen", None),))(images), images + luma(images) - images * luma(images))
    # The image is below, the colour above: W3C's blends of the two are not symmetric.
    colour = [[[[w3c("soft_light", below, 0.9)] for below in (0.1, 0.6)]]]
    two = torch.tensor([0.1, 0.6]).view(1, 1, 2, 1).expand(1, 3, 2, 1)
    close(Filter(layers=(Layer("soft_light", (0.9, 0.9, 0.9)),))(two), torch.tensor(colour).expand(1, 3, 2, 1))


def test_the_steps_come_in_their_order():
    images = some_images()
    steps = Filter(
        saturation=0, low=(0.2, 0.2, 0.2), layers=(Layer("multiply", (1, 0.5, 0)), Layer("screen", (0, 0, 0.5)))
    )
    toned = 0.2 + 0.8 * luma(images)
    expected = torch.cat([toned, toned * 0.5, torch.full_like(toned, 0.5)], 1)
    torch.testing.assert_close(steps(images), expected)


@pytest.mark.parametrize(("height", "width"), [(5, 5), (3, 7), (1, 1)])
def test_a_vignette_darkens_towards_the_corners(height, width):
    factor = vignette(torch.zeros(2, 3, height, width), 0.6)[0, 0]
    assert factor.shape == (height, width)
    assert factor[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == pytest.approx([0.4] * 4)
    if height > 1:
        assert factor[height // 2, width // 2].item() == pytest.approx(1)
        assert factor[0, width // 2].item() == factor[height // 2, 0].item() == pytest.approx(0.7)


@every_filter
def test_a_filter_keeps_the_order_of_greys(name):
    ramp = torch.linspace(0, 1, 256).view(256, 1, 1, 1).expand(256, 3, 3, 3)
    filtered = FILTERS[name](ramp)
    assert (filtered.diff(dim=0) >= -1e-6).all()
    assert filtered[-1].sum() - filtered[0].sum() > 5  # of 27: it is still an image


def test_the_filters_are_what_their_names_say():
    images = 0.15 + 0.7 * torch.rand(20, 3, 16, 16)
    out = {name: apply(images) for name, apply in FILTERS.items()}

    def warmth(x):
        return (x[:, 0] - x[:, 2]).mean()

    def chroma(x):
        return (x.amax(1) - x.amin(1)).mean()

    assert warmth(out["warm"]) > warmth(images) + 0.1 and warmth(out["cool"]) < warmth(images) - 0.1
    assert out["faded"].std() < 0.7 * images.std() and chroma(out["faded"]) < 0.6 * chroma(images)
    assert out["high_contrast"].std() > 1.5 * images.std()
    assert chroma(out["bleach_bypass"]) < 0.6 * chroma(images) and luma(out["bleach_bypass"]).std() > luma(images).std()
    assert out["night"].mean() < 0.6 * images.mean() and warmth(out["night"]) < -0.1
    ramp = FILTERS["cross_process"](torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)).flatten(1)
    assert ramp[0, 2] > ramp[0, 0] and ramp[1, 2] < ramp[1, 0]  # blue shadows, yellow lights
    assert out["vignette"][..., 0, 0].mean() < 0.4 * out["vignette"][..., 8, 8].mean()


# --- paintings ---


def picture_of(histogram: np.ndarray) -> np.ndarray:
    """An image, P,1,3, with this histogram (3,256)."""
    return np.stack([np.repeat(np.arange(256), counts) for counts in histogram], -1)[:, None].astype(np.uint8)


def matched_by_numpy(channel: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """One channel of levels, matched to counts (256) as the method is defined, with NumPy's interpolation."""
    there = np.flatnonzero(counts)
    share = np.cumsum(np.bincount(channel.ravel(), minlength=256)) / channel.size
    return np.interp(share, np.cumsum(counts)[there] / counts.sum(), there)[channel]


def assert_matched(images: torch.Tensor, histogram: np.ndarray) -> None:
    ours = match_histogram(images, torch.from_numpy(histogram)).numpy() * 255
    levels = (images * 255).round().numpy().astype(np.uint8)
    for n, c in np.ndindex(levels.shape[:2]):
        np.testing.assert_allclose(ours[n, c], matched_by_numpy(levels[n, c], histogram[c]), rtol=0, atol=1e-3)


@every_painting
def test_matching_to_a_painting_is_as_defined(name):
    assert_matched(some_images(), painting_histogram(name).numpy())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 40), st.integers(1, 300))
def test_matching_is_as_defined_for_any_histograms(seed, levels_there, size, painting_pixels):
    """Also for few levels with gaps between them, for one level, one pixel, and paintings smaller than the image."""
    draw = np.random.default_rng(seed)
    histogram = np.stack(
        [np.bincount(draw.choice(draw.choice(256, levels_there), painting_pixels), minlength=256) for _ in range(3)]
    )
    levels = draw.choice(draw.choice(256, levels_there), (2, 3, 1, size))
    assert_matched(torch.from_numpy(levels).float() / 255, histogram)


@every_painting
def test_matching_is_scikit_images(name):
    match_histograms = pytest.importorskip("skimage.exposure").match_histograms
    images = some_images()
    images[4:] = images[4:] * 0.4 + 0.2
    levels = (images * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    picture = picture_of(painting_histogram(name).numpy())
    expected = np.stack([match_histograms(image, picture, channel_axis=-1) for image in levels])
    ours = cut(match_histogram(torch.from_numpy(levels).permute(0, 3, 1, 2) / 255, painting_histogram(name)))
    assert np.abs(ours - expected).max() <= 1 and (ours != expected).mean() < 1e-3


@every_painting
def test_a_matched_image_has_the_paintings_colours(name):
    """With every level in an image equally often, quantiles come back to within a level's share."""
    image = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    histogram = painting_histogram(name)
    theirs = histogram.cumsum(1) / histogram.sum(1, keepdim=True)
    matched = match_histogram(image, histogram)[0].flatten(1) * 255
    for level in (50, 100, 150, 200):
        share = (matched <= level).float().mean(1)
        assert (share - theirs[:, level]).abs().max() < 0.02
    assert (matched.diff(dim=1) >= 0).all()  # darker stays darker


def test_a_painting_matched_to_itself_stays_as_it_is():
    histogram = painting_histogram("shipwreck")
    picture = torch.from_numpy(picture_of(histogram.numpy())).permute(2, 1, 0)[None] / 255
    torch.testing.assert_close(match_histogram(picture, histogram), picture, rtol=0, atol=1e-6)


def test_values_between_levels_are_rounded_first():
    images = some_images()
    noise = (torch.rand_like(images) - 0.5) * 0.9 / 255
    histogram = painting_histogram("the_scream")
    assert torch.equal(match_histogram(images + noise, histogram), match_histogram(images, histogram))


def test_the_stored_histograms_say_where_they_are_from():
    stored = json.loads(HISTOGRAMS.read_text(encoding="utf-8"))
    assert list(stored) == list(PAINTINGS) and HISTOGRAMS.stat().st_size < 50_000
    for name, painting in PAINTINGS.items():
        provenance = {key: value for key, value in stored[name].items() if key != "histogram"}
        assert provenance == vars(painting)
        histogram = painting_histogram(name)
        assert histogram.shape == (3, 256) and histogram.dtype == torch.int64 and histogram.amin() >= 0
        assert histogram.sum(1).unique().numel() == 1 and histogram[0].sum() <= 512 * 512


def test_the_stored_histograms_are_those_of_the_paintings(tmp_path):
    folder = data_folder() / "style_images" / "style"
    if not folder.is_dir():
        pytest.skip("ADVBN_DATA holds no style_images/style")
    write_histograms(folder, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == HISTOGRAMS.read_bytes()


def test_cifar_images_match_to_the_paintings_as_scikit_image_does():
    match_histograms = pytest.importorskip("skimage.exposure").match_histograms
    from PIL import Image

    folder = data_folder() / "style_images" / "style"
    golden = Path(os.environ.get("ADVBN_GOLDEN", "")) / "cifar10c_first8.npz"
    if not folder.is_dir() or not golden.is_file():
        pytest.skip("ADVBN_DATA holds no style_images/style, or ADVBN_GOLDEN no cifar10c_first8.npz")
    images = np.load(golden)["clean"]
    for name, painting in PAINTINGS.items():
        picture = np.asarray(Image.open(folder / painting.file).convert("RGB"))
        expected = np.stack([match_histograms(image, picture, channel_axis=-1) for image in images])
        ours = cut(STYLES[f"painting_{name}"](torch.from_numpy(images).permute(0, 3, 1, 2) / 255, 0, None))
        assert np.abs(ours - expected).max() <= 1 and (ours != expected).mean() < 1e-3


def test_an_unknown_painting_is_refused():
    with pytest.raises(ValueError, match="no painting 'mona_lisa'; there are starry_night"):
        painting_histogram("mona_lisa")


def cut_short(text: str) -> str:
    return text[: len(text) // 2]


def without_a_painting(text: str) -> str:
    return json.dumps({name: entry for name, entry in json.loads(text).items() if name != "shipwreck"})


def with_a_count_too_many(text: str) -> str:
    stored = json.loads(text)
    stored["shipwreck"]["histogram"][1][7] += 1
    return json.dumps(stored)


def with_a_level_missing(text: str) -> str:
    stored = json.loads(text)
    del stored["shipwreck"]["histogram"][2][0]
    return json.dumps(stored)


@pytest.mark.parametrize("spoil", [None, cut_short, without_a_painting, with_a_count_too_many, with_a_level_missing])
def test_bad_stored_histograms_are_refused(tmp_path, monkeypatch, spoil):
    path = tmp_path / "painting_histograms.json"
    if spoil:
        path.write_text(spoil(HISTOGRAMS.read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(paintings, "HISTOGRAMS", path)
    paintings._stored_histograms.cache_clear()
    with pytest.raises(DataError, match=r"painting_histograms\.json.*install advbn_lib anew"):
        painting_histogram("the_scream")
    monkeypatch.undo()
    assert painting_histogram("the_scream").sum() > 0  # a failure is not remembered


def test_histograms_are_not_made_of_other_pictures(tmp_path):
    from PIL import Image

    with pytest.raises(DataError, match="starry_night_google.jpg is missing"):
        write_histograms(tmp_path, tmp_path / "new.json")
    Image.new("RGB", (4, 2), (1, 2, 3)).save(tmp_path / "starry_night_google.jpg", quality=100, subsampling=0)
    with pytest.raises(DataError, match="starry_night_google.jpg is not the file of PAINTINGS"):
        write_histograms(tmp_path, tmp_path / "new.json")
    (tmp_path / "starry_night_google.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="no readable image"):
        write_histograms(tmp_path, tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_levels_are_counted_in_each_channel(tmp_path):
    from PIL import Image

    Image.fromarray(np.array([[[0, 5, 255], [0, 6, 255]]], np.uint8)).save(tmp_path / "two.png")
    counts = count_levels(tmp_path / "two.png")
    assert counts.shape == (3, 256) and counts.sum() == 6
    assert counts[0, 0] == 2 and counts[1, 5] == counts[1, 6] == 1 and counts[2, 255] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_style
def test_styles_are_the_same_on_a_gpu(name, severity):
    images = some_images()
    styled = STYLES[name](images.cuda(), severity, None)
    assert styled.is_cuda
    np.testing.assert_allclose(cut(styled.cpu()), cut(STYLES[name](images, severity, None)), atol=1)
