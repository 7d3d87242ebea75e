"""The corruptions of CIFAR-10-C: against the released generator's images, and against plain ones, one image at a time."""

import colorsys
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from advbn_lib.data import corruptions, frost
from advbn_lib.data.corruptions import CORRUPTIONS, EXTRA
from advbn_lib.data.frost import frost_available, frost_overlays
from advbn_lib.data.images import DataError
from advbn_lib.data.jpeg import LUMINANCE, jpeg, quantisation_table
from advbn_lib.data.motion import half_gaussian, motion_blur
from advbn_lib.data.plasma import draws_needed, plasma_fractal
from advbn_lib.data.resampling import along_both, box_matrix, gaussian_matrix, zoom_matrix

DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
DRAWN = (
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
)  # what is drawn can be given from outside
RANDOM = tuple(name for name in CORRUPTIONS if name not in DETERMINISTIC)
ALL = {**CORRUPTIONS, **EXTRA}
every_severity = pytest.mark.parametrize("severity", range(1, 6))
every_name = pytest.mark.parametrize("name", ALL)


def images_of(pixels: np.ndarray) -> torch.Tensor:
    """uint8 N,H,W,3 to [0,1] N,3,H,W."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def levels(shifted: torch.Tensor) -> np.ndarray:
    """What the caller makes of it: whole grey levels, N,H,W,3."""
    return (shifted.clamp(0, 1) * 255 + 1e-4).floor().permute(0, 2, 3, 1).numpy()


def some_pixels(count: int = 6, side: int = 32, seed: int = 0) -> np.ndarray:
    """Images with smooth parts, edges and noise; the first all black, the second all white."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (count, side, side, 3), np.uint8)
    smooth = ndimage.gaussian_filter(random.normal(size=pixels.shape), (0, 3, 3, 0)) * 700 + 128
    pixels[2::2] = smooth.clip(0, 255).astype(np.uint8)[2::2]
    pixels[0], pixels[1] = 0, 255
    return pixels


def with_frost(name: str) -> None:
    """Skip the test of frost where its images are not."""
    if name == "frost":
        data_folder()


# What the released generator draws for one image, in its order, in the form of advbn_lib's functions.


def draw_glass(random, severity):
    rounds = (1, 1, 1, 2, 2)[severity - 1]
    draws = random.randint(-1, 1, size=(rounds, 30, 30, 2))  # from the last row and column to the first; across, down
    return (torch.tensor(-draws[:, ::-1, ::-1, ::-1].transpose(0, 3, 1, 2).copy()),)


def draw_motion(random, severity):
    return (torch.tensor(random.uniform(-45, 45)),)


def draw_snow(random, severity):
    return torch.tensor(random.normal(size=(32, 32))), torch.tensor(random.uniform(-135, -45))


def draw_frost(random, severity):
    which = random.randint(5)
    height, width = frost_overlays()[which].shape[1:]
    return tuple(torch.tensor(number) for number in (which, random.randint(height - 32), random.randint(width - 32)))


def draw_fog(random, severity):
    return (torch.tensor(random.uniform(0, 1, 1023)),)


def draw_elastic(random, severity):
    return torch.tensor(random.uniform(-1, 1, (3, 2))), torch.tensor(random.uniform(-1, 1, (2, 32, 32)))


DRAW = dict(zip(DRAWN, (draw_glass, draw_motion, draw_snow, draw_frost, draw_fog, draw_elastic)))


def drawn(name: str, severity: int, count: int, random: np.random.RandomState) -> list[torch.Tensor]:
    """The draws for a batch."""
    columns = list(zip(*[DRAW[name](random, severity) for _ in range(count)]))
    return [torch.stack(c, dim=1 if name == "glass_blur" else 0).to(c[0].dtype if c[0].dtype == torch.int64 else torch.float32) for c in columns]  # fmt: skip


def apply_draws(name: str, x: torch.Tensor, severity: int, draws: list[torch.Tensor]) -> torch.Tensor:
    if name == "motion_blur":
        return corruptions.smeared(x, *corruptions.MOTION_BLUR[severity - 1], *draws)
    functions = {
        "glass_blur": corruptions.through_glass,
        "snow": corruptions.let_it_snow,
        "frost": corruptions.frosted,
        "fog": corruptions.in_fog,
        "elastic_transform": corruptions.stretched,
    }
    return functions[name](x, severity, *draws)


# The released generator's images.


def test_there_are_the_fifteen_in_the_published_order():
    assert ", ".join(CORRUPTIONS) == (
        "gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog, "
        "brightness, contrast, elastic_transform, pixelate, jpeg_compression"
    )


@every_severity
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_is_the_released_generators(released, name, severity):
    difference = np.abs(levels(ALL[name](images_of(released["clean"]), severity, None)) - released[name][severity - 1])
    assert difference.max() <= 1 and difference.mean() < 0.1
    if name in ("pixelate", "jpeg_compression"):
        assert difference.max() == 0


@pytest.mark.parametrize("name", DRAWN)
def test_with_the_released_generators_draws_is_its_image(released, name):
    """It ran on NumPy's seed 0, so that its draws are known."""
    with_frost(name)
    random = np.random.RandomState(0)
    for severity in range(1, 6):
        draws = drawn(name, severity, 8, random)
        difference = (
            levels(apply_draws(name, images_of(released["clean"]), severity, draws)) - released[name][severity - 1]
        )
        # Glass blur is cut down to whole levels twice, so that two differences in the last bit can add up.
        assert np.abs(difference).max() <= (2 if name == "glass_blur" else 1), severity
        assert (difference != 0).mean() < 0.02, severity


@every_severity
@pytest.mark.parametrize("name", RANDOM)
def test_with_its_own_draws_changes_as_much_as_the_released_generator(released, name, severity):
    """The mean change of the 8 released images lies within the spread of our own changes of the same 8."""
    with_frost(name)
    x, generator = images_of(released["clean"]), torch.Generator().manual_seed(severity)
    clean = released["clean"].astype(float)
    own = [np.abs(levels(ALL[name](x, severity, generator)) - clean).mean() for _ in range(30)]
    theirs = np.abs(released[name][severity - 1] - clean).mean()
    assert theirs == pytest.approx(np.mean(own), abs=4.5 * np.std(own, ddof=1) + 0.05)


# Plain references: one image at a time, float64, HWC, from the same draws.


def reference_glass(image, severity, moves):
    sigma = (0.05, 0.25, 0.4, 0.25, 0.4)[severity - 1]
    pixels = np.floor(ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest") * 255 + 1e-6)
    for up, left in moves.numpy():
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                source = row - up[row - 2, column - 2], column - left[row - 2, column - 2]
                here, there = pixels[row, column], pixels[source]  # views: an exchange that is none
                pixels[row, column], pixels[source] = there, here
    return ndimage.gaussian_filter(pixels / 255, (sigma, sigma, 0), mode="nearest")


def smear(layer, radius, sigma, angle):
    """Half a Gaussian along a line, places rounded, edge repeated; 16 bits, cut down to 8. H,W,C in [0,1] to [0,1]."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    reach, blurred = 2 * radius + 1, np.zeros(layer.shape)
    padded = np.pad(layer, [(reach, reach), (reach, reach), (0, 0)], mode="edge")
    for step, weight in enumerate(weights / weights.sum()):
        down = reach + int(np.ceil(step * np.sin(np.deg2rad(angle)) - 0.5))
        right = reach + int(np.ceil(step * np.cos(np.deg2rad(angle)) - 0.5))
        blurred += weight * padded[down : down + len(layer), right : right + layer.shape[1]]
    return np.floor(np.rint(blurred * 65535) / 257) / 255


def reference_motion(image, severity, angle):
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity - 1]
    return smear(image / 255, radius, sigma, float(angle))


def clipped_zoom(layer, factor):
    """scipy's zoom of the middle, trimmed to the old size. H,W."""
    side = len(layer)
    crop = int(np.ceil(side / factor))
    start = (side - crop) // 2
    zoomed = ndimage.zoom(layer[start : start + crop, start : start + crop], factor, order=1)
    trim = (len(zoomed) - side) // 2
    return zoomed[trim : trim + side, trim : trim + side]


def reference_snow(image, severity, flakes, angle):
    loc, scale, zoom, threshold, radius, sigma, share = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity - 1]  # fmt: skip
    x, layer = image / 255, clipped_zoom(loc + scale * flakes.double().numpy(), zoom)
    layer = np.floor(np.where(layer < threshold, 0, layer).clip(0, 1) * 255) / 255
    layer = smear(layer[..., None], radius, sigma, float(angle))
    grey = x @ np.array([0.299, 0.587, 0.114])
    return share * x + (1 - share) * np.maximum(x, grey[..., None] * 1.5 + 0.5) + layer + layer[::-1, ::-1]


def reference_frost(image, severity, which, row, column):
    factors = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[severity - 1]
    name = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")[which]
    overlay = Image.open(data_folder() / "frost" / name).convert("RGB")
    at = [5 * np.arange(start, start + 32) + 2 for start in (int(row), int(column))]
    return (factors[0] * image + factors[1] * np.asarray(overlay)[np.ix_(*at)]) / 255


def reference_fog(image, severity, uniform):
    density, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity - 1]
    draws, heights, step, wibble = iter(uniform.double().tolist()), np.zeros((32, 32)), 32, 100.0
    while step >= 2:
        half = step // 2
        for down, right in ((half, half), (0, half), (half, 0)):  # middles of squares, of upper edges, of left edges
            reach = [(-half, -half), (-half, half), (half, -half), (half, half)] if down == right else [(-half, 0), (half, 0), (0, -half), (0, half)]  # fmt: skip
            for i in range(down, 32, step):
                for j in range(right, 32, step):
                    around = [heights[(i + di) % 32, (j + dj) % 32] for di, dj in reach]
                    heights[i, j] = np.mean(around) + wibble * wibble * (2 * next(draws) - 1)
        step, wibble = half, wibble / decay
    plasma = (heights - heights.min()) / (heights.max() - heights.min())
    brightest = image.max() / 255
    return (image / 255 + density * plasma[..., None]) * brightest / (brightest + density)


def reference_elastic(image, severity, points, fields):
    alpha, sigma, affine = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))[severity - 1]  # fmt: skip
    corners = np.array([[26.0, 26], [26, 6], [6, 6]])  # across, down
    moved = corners + 32 * affine * points.double().numpy()
    back = np.linalg.inv(np.vstack([moved.T, np.ones(3)]).T) @ corners  # rows: across, down, one
    down, across = np.mgrid[:32, :32].astype(float)
    places = across[..., None] * back[0] + down[..., None] * back[1] + back[2]
    at = [places[..., 1], places[..., 0]]
    x = np.stack([ndimage.map_coordinates(c, at, order=1, mode="mirror") for c in (image / 255).transpose(2, 0, 1)], -1)
    move = [ndimage.gaussian_filter(field, 32 * sigma, mode="reflect", truncate=3) * 32 * alpha for field in fields.double().numpy()]  # fmt: skip
    at = [down + move[1], across + move[0]]
    return np.stack([ndimage.map_coordinates(c, at, order=1, mode="reflect") for c in x.transpose(2, 0, 1)], -1)


REFERENCES = dict(zip(DRAWN, (reference_glass, reference_motion, reference_snow, reference_frost, reference_fog, reference_elastic)))  # fmt: skip


@every_severity
@pytest.mark.parametrize("name", DRAWN)
def test_is_the_plain_one_from_the_same_draws(name, severity):
    with_frost(name)
    pixels = some_pixels(8)
    draws = drawn(name, severity, len(pixels), np.random.RandomState(severity))
    expected = [
        REFERENCES[name](image, severity, *[draw[:, i] if name == "glass_blur" else draw[i] for draw in draws])
        for i, image in enumerate(pixels)
    ]
    expected = np.floor(np.clip(expected, 0, 1) * 255 + 1e-4)
    difference = levels(apply_draws(name, images_of(pixels), severity, draws)) - expected
    assert np.abs(difference).max() <= (2 if name == "glass_blur" else 1)
    assert (difference != 0).mean() < 0.01


@every_severity
@pytest.mark.parametrize("name", DRAWN)
def test_the_random_numbers_are_drawn_as_documented(name, severity):
    with_frost(name)
    x, size = images_of(some_pixels(8)), (8, 32, 32)

    def uniform(generator, *shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(shape, generator=generator)

    def draws_of(g):
        if name == "glass_blur":
            return [torch.randint(0, 2, ((1, 1, 1, 2, 2)[severity - 1], 8, 2, 30, 30), generator=g)]
        if name == "motion_blur":
            return [uniform(g, 8, low=-45.0, high=45.0)]
        if name == "snow":
            return [torch.randn(size, generator=g), uniform(g, 8, low=-135.0, high=-45.0)]
        if name == "frost":
            which, *places = torch.rand(3, 8, generator=g)
            which = (5 * which).long()
            rooms = torch.tensor([[side - 32 for side in overlay.shape[1:]] for overlay in frost_overlays()])[which]
            return [which, *((place * room).long() for place, room in zip(places, rooms.T))]
        if name == "fog":
            return [uniform(g, 8, 1023)]
        return [uniform(g, 8, 3, 2, low=-1.0), uniform(g, 8, 2, 32, 32, low=-1.0)]

    expected = apply_draws(name, x, severity, draws_of(torch.Generator().manual_seed(3)))
    assert torch.equal(ALL[name](x, severity, torch.Generator().manual_seed(3)), expected)


def test_frost_draws_every_overlay_and_every_place_alike():
    data_folder()
    black, overlays = torch.zeros(4000, 3, 32, 32), [overlay.numpy() for overlay in frost_overlays()]
    pieces = (CORRUPTIONS["frost"](black, 1, torch.Generator().manual_seed(0)) / 0.2 * 255).round().byte().numpy()
    known = [overlay.tobytes() for overlay in overlays]
    different = [
        which for which in range(5) if known.index(known[which]) == which
    ]  # two of the five have the same pixels
    found = 0
    for which in different:
        height, width = (side - 32 for side in overlays[which].shape[1:])
        corners = np.ndindex(height, width)
        places = {overlays[which][:, i : i + 2, j : j + 16].tobytes(): (i, j) for i, j in corners}
        seen = np.array([p for piece in pieces if (p := places.get(np.ascontiguousarray(piece[:, :2, :16]).tobytes()))])
        share = known.count(known[which]) / 5
        assert len(seen) == pytest.approx(4000 * share, abs=5 * (4000 * share * (1 - share)) ** 0.5)
        for axis, room in enumerate((height, width)):
            assert seen[:, axis].min() <= 0.05 * room and seen[:, axis].max() >= 0.95 * room - 1
            assert seen[:, axis].mean() == pytest.approx((room - 1) / 2, abs=5 * room / (12 * len(seen)) ** 0.5)
        found += len(seen)
    assert 3950 < found <= 4000  # the rest are from flat places that look like others


# Noise: its moments.


@every_severity
@pytest.mark.parametrize("grey", [0, 51, 128, 255])
def test_gaussian_noise_and_speckle_have_the_published_size(severity, grey):
    x = torch.full((20, 3, 32, 32), grey / 255)
    for name, size in (
        ("gaussian_noise", (0.04, 0.06, 0.08, 0.09, 0.1)),
        ("speckle_noise", (0.06, 0.1, 0.12, 0.16, 0.2)),
    ):
        expected = size[severity - 1] * (1 if name == "gaussian_noise" else grey / 255)
        noise = ALL[name](x, severity, torch.Generator().manual_seed(0)) - x
        assert noise.mean().item() == pytest.approx(0, abs=5 * expected / noise.numel() ** 0.5 + 1e-7)
        assert noise.std().item() == pytest.approx(expected, rel=0.02)
        assert (noise.abs() <= expected).float().mean().item() == pytest.approx(0.683 if expected else 1, abs=0.02)


@every_severity
@pytest.mark.parametrize("grey", [0, 26, 128, 255])
def test_shot_noise_counts_photons(severity, grey):
    x, photons = torch.full((20, 3, 32, 32), grey / 255), (500, 250, 100, 75, 50)[severity - 1]
    counts = CORRUPTIONS["shot_noise"](x, severity, torch.Generator().manual_seed(0)) * photons
    expected = photons * grey / 255
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
    assert counts.mean().item() == pytest.approx(expected, abs=5 * (expected / counts.numel()) ** 0.5)
    assert counts.var().item() == pytest.approx(expected, rel=0.04)  # as of every Poisson number


@every_severity
def test_impulse_noise_is_salt_and_pepper_on_single_entries(severity):
    x, share = torch.full((100, 3, 32, 32), 0.5), (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    noisy = CORRUPTIONS["impulse_noise"](x, severity, torch.Generator().manual_seed(0))
    salt, pepper = noisy == 1, noisy == 0
    assert torch.equal(noisy[~salt & ~pepper], x[~salt & ~pepper])
    for kind in (salt, pepper):
        sigma = (share / 2 * (1 - share / 2) / x.numel()) ** 0.5
        assert kind.float().mean().item() == pytest.approx(share / 2, abs=5 * sigma)
    whole_pixels = (salt | pepper).all(dim=1).float().mean().item()
    assert whole_pixels == pytest.approx(share**3, abs=5 * (share**3 / 102_400) ** 0.5 + 1e-5)


# The deterministic ones against other libraries, on other images and sizes.


@pytest.mark.parametrize("side", [12, 32, 45])
@pytest.mark.parametrize(("sigma", "truncate"), [(0, 3), (0.05, 4), (0.25, 4), (0.4, 4), (1.0, 4), (1.28, 3), (6.4, 3)])
@pytest.mark.parametrize("border", ["nearest", "reflect"])
def test_gaussian_blur_is_scipys(side, sigma, truncate, border):
    image = np.random.default_rng(0).normal(size=(side, side))
    expected = ndimage.gaussian_filter(image, sigma, mode=border, truncate=truncate)
    blurred = along_both(torch.from_numpy(image), gaussian_matrix(side, sigma, float(truncate), border))
    np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("side", [32, 33, 64])
@pytest.mark.parametrize("factor", [1.0, *np.arange(1.01, 1.26, 0.01), 1.75, 2.25])
def test_zoom_is_scipys(side, factor):
    image = np.random.default_rng(0).normal(size=(side, side))
    zoomed = along_both(torch.from_numpy(image), zoom_matrix(side, float(factor)))
    np.testing.assert_allclose(zoomed.numpy(), clipped_zoom(image, float(factor)), atol=1e-12)


@every_severity
def test_zoom_blur_is_the_mean_of_the_image_and_its_zooms(severity):
    x = some_pixels(3)[2] / 255
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[severity - 1], 0.01)
    zooms = [np.stack([clipped_zoom(x[..., c], factor) for c in range(3)], -1) for factor in factors]
    blurred = CORRUPTIONS["zoom_blur"](torch.from_numpy(x).permute(2, 0, 1)[None], severity, None)
    np.testing.assert_allclose(blurred[0].permute(1, 2, 0).numpy(), (x + sum(zooms)) / (len(zooms) + 1), atol=1e-12)


@given(before=st.integers(1, 70), after=st.integers(1, 70))
@settings(max_examples=60, deadline=None)
def test_box_filter_is_pillows(before, after):
    row = np.random.default_rng(before).normal(size=(1, before)).astype(np.float32)
    expected = np.asarray(Image.fromarray(row).resize((after, 1), Image.Resampling.BOX))
    matrix = box_matrix(before, after)
    np.testing.assert_allclose(row @ matrix.float().numpy().T, expected, atol=1e-5)


@every_severity
@pytest.mark.parametrize("side", [32, 41, 64])
def test_pixelate_is_pillows(side, severity):
    pixels, small = some_pixels(side=side), int(side * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    box = Image.Resampling.BOX
    expected = [
        np.asarray(Image.fromarray(image).resize((small, small), box).resize((side, side), box)) for image in pixels
    ]
    assert np.array_equal(levels(CORRUPTIONS["pixelate"](images_of(pixels), severity, None)), np.stack(expected))


def by_pillow(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


@pytest.mark.parametrize("quality", [1, 20, 40, 50, 58, 65, 80, 95, 100])
@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (33, 47), (18, 7), (28, 22), (1, 5)])
def test_jpeg_is_pillows_bit_for_bit(quality, shape):
    pixels = some_pixels(6, 64)[:, : shape[0], : shape[1]]
    ours = jpeg(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), quality)
    expected = np.stack([by_pillow(image.copy(), quality) for image in pixels])
    assert np.array_equal(ours.permute(0, 2, 3, 1).numpy(), expected)


@every_severity
def test_jpeg_compression_has_the_published_quality(severity):
    pixels = some_pixels()
    expected = [by_pillow(image, (80, 65, 58, 50, 40)[severity - 1]) for image in pixels]
    assert np.array_equal(
        levels(CORRUPTIONS["jpeg_compression"](images_of(pixels), severity, None)), np.stack(expected)
    )


def test_quality_scales_the_tables():
    assert quantisation_table(LUMINANCE, 50).tolist() == [list(row) for row in LUMINANCE]
    assert (quantisation_table(LUMINANCE, 100) == 1).all() and quantisation_table(LUMINANCE, 1).max() == 255
    for quality in (0, 101):
        with pytest.raises(ValueError, match=f"1 to 100, got {quality}"):
            quantisation_table(LUMINANCE, quality)


@every_severity
def test_saturate_changes_the_saturation_in_hsv(severity):
    factor, summand = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))[severity - 1]
    pixels = some_pixels(side=8)
    pixels[2, :4] = pixels[2, :4, :, :1]  # greys, whose hue is nought
    expected = np.empty(pixels.shape)
    for place in np.ndindex(expected.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[place] / 255))
        expected[place] = colorsys.hsv_to_rgb(hue, min(1, saturation * factor + summand), value)
    np.testing.assert_allclose(EXTRA["saturate"](images_of(pixels), severity, None).permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)  # fmt: skip


@every_severity
def test_gaussian_blur_has_the_published_width(severity):
    pixels, sigma = some_pixels(), (0.4, 0.6, 0.7, 0.8, 1)[severity - 1]
    expected = ndimage.gaussian_filter(pixels / 255, (0, sigma, sigma, 0), mode="nearest")
    np.testing.assert_allclose(EXTRA["gaussian_blur"](images_of(pixels), severity, None).permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)  # fmt: skip


@every_severity
def test_defocus_blur_is_scipys_with_a_smoothed_disk(severity):
    radius, smoothing = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[severity - 1]
    down, across = np.mgrid[-8:9, -8:9]
    disk = (down**2 + across**2 <= radius**2).astype(float)
    disk = ndimage.gaussian_filter(disk / disk.sum(), smoothing, radius=1)
    pixels = some_pixels()
    expected = [ndimage.correlate(image / 255, disk[..., None], mode="mirror") for image in pixels]
    np.testing.assert_allclose(CORRUPTIONS["defocus_blur"](images_of(pixels), severity, None).permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)  # fmt: skip


# Motion blur and plasma by themselves.


def test_the_kernel_of_motion_blur_is_half_a_gaussian():
    weights = half_gaussian(6, 1.5)
    assert len(weights) == 13 and sum(weights) == pytest.approx(1)
    assert weights[3] / weights[0] == pytest.approx(np.exp(-9 / 4.5))


@pytest.mark.parametrize(("angle", "row", "column"), [(0.0, 16, 14), (90.0, 14, 16), (-90.0, 18, 16), (45.0, 15, 15), (180.0, 16, 18)])  # fmt: skip
def test_motion_blur_takes_light_from_one_side(angle, row, column):
    point = torch.zeros(1, 1, 32, 32)
    point[..., 16, 16] = 1
    smeared = motion_blur(point, 6, 2, torch.tensor([angle]))[0, 0]
    assert smeared[row, column] > 0.05 and smeared[32 - row, 32 - column] == 0
    assert smeared.sum().item() == pytest.approx(1, abs=1e-5)


@given(exponent=st.integers(1, 6), decay=st.floats(1.0, 4.0), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_plasma_fills_its_range(exponent, decay, seed):
    side = 2**exponent
    uniform = torch.rand(3, draws_needed(side), generator=torch.Generator().manual_seed(seed))
    maps = plasma_fractal(uniform, side, decay)
    assert maps.shape == (3, side, side)
    assert torch.equal(maps.amin((1, 2)), torch.zeros(3)) and torch.equal(maps.amax((1, 2)), torch.ones(3))


@pytest.mark.parametrize(("side", "numbers", "message"), [(24, 575, "power of two, got 24"), (1, 0, "power of two, got 1"), (32, 1024, "takes N,1023")])  # fmt: skip
def test_plasma_refuses_other_sides_and_numbers(side, numbers, message):
    with pytest.raises(ValueError, match=message):
        plasma_fractal(torch.rand(2, numbers), side, 2.0)


def test_more_decay_makes_smoother_plasma():
    uniform = torch.rand(50, 1023, generator=torch.Generator().manual_seed(0))
    roughness = [plasma_fractal(uniform, 32, decay).diff(dim=2).abs().mean() for decay in (3, 2.5, 2, 1.75)]
    assert all(smoother < rougher for smoother, rougher in zip(roughness, roughness[1:]))


# What all have in common.


@every_name
def test_keeps_shape_and_input_and_is_finite(name):
    with_frost(name)
    x = images_of(some_pixels())
    before = x.clone()
    for severity in range(1, 6):
        shifted = ALL[name](x, severity, torch.Generator().manual_seed(0))
        assert shifted.shape == x.shape and shifted.dtype == x.dtype and shifted.isfinite().all()
        assert not torch.equal(shifted[2:], x[2:])
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", [*DETERMINISTIC, "gaussian_blur", "saturate"])
def test_a_batch_is_its_images_one_by_one(name):
    x = images_of(some_pixels())
    single = torch.cat([ALL[name](image[None], 4, None) for image in x])
    torch.testing.assert_close(ALL[name](x, 4, None), single, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*RANDOM, "speckle_noise"])
def test_each_image_draws_for_itself_and_a_seed_repeats_it(name):
    with_frost(name)
    x = images_of(some_pixels()[2:3]).expand(6, -1, -1, -1)
    first, again, other = (ALL[name](x, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for i in range(6):
        assert not any(torch.equal(first[i], first[j]) for j in range(i))
    torch.manual_seed(5)
    drawn_by_torch = ALL[name](x, 3, None)
    torch.manual_seed(5)
    assert torch.equal(drawn_by_torch, ALL[name](x, 3, None)) and not torch.equal(drawn_by_torch, ALL[name](x, 3, None))


@pytest.mark.parametrize("name", [*DETERMINISTIC, "gaussian_blur", "saturate"])
def test_the_deterministic_ones_draw_nothing(name):
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    ALL[name](images_of(some_pixels()), 3, generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("side", [12, 40, 48, 62])
@every_name
def test_other_sizes_work(name, side):
    with_frost(name)
    shifted = ALL[name](images_of(some_pixels(3, side)), 5, torch.Generator().manual_seed(0))
    assert shifted.shape == (3, 3, side, side) and shifted.isfinite().all()


def test_frost_refuses_images_larger_than_its_overlays():
    data_folder()
    with pytest.raises(ValueError, match="up to 62 pixels.*got images of 63"):
        CORRUPTIONS["frost"](torch.zeros(1, 3, 63, 63), 1, None)


@pytest.mark.parametrize("severity", [0, 6, -1])
@every_name
def test_an_unknown_severity_is_refused(name, severity):
    with_frost(name)
    with pytest.raises(ValueError, match=f"severities 1 to 5, got {severity}"):
        ALL[name](torch.zeros(1, 3, 32, 32), severity, None)


@pytest.mark.parametrize(
    "name", ["glass_blur", "zoom_blur", "snow", "fog", "elastic_transform", "pixelate", "gaussian_blur"]
)
def test_images_that_are_not_square_are_refused(name):
    with pytest.raises(ValueError, match=r"square images N,3,S,S, got \(1, 3, 32, 40\)"):
        ALL[name](torch.zeros(1, 3, 32, 40), 1, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_name
def test_is_the_same_on_a_gpu(name):
    with_frost(name)
    x, device = images_of(some_pixels()), torch.device("cuda")
    if name in DRAWN:
        draws = drawn(name, 4, len(x), np.random.RandomState(0))
        own = apply_draws(name, x, 4, draws)
        shifted = apply_draws(name, x.to(device), 4, [draw.to(device) for draw in draws])
    elif name in RANDOM or name == "speckle_noise":
        own, shifted = x, x.to(device)  # other random numbers: that it runs there is tested below
    else:
        own, shifted = ALL[name](x, 4, None), ALL[name](x.to(device), 4, None)
    assert np.abs(levels(shifted.cpu()) - levels(own)).max() <= 1
    first, again = (ALL[name](x.to(device), 4, torch.Generator(device).manual_seed(0)) for _ in range(2))
    assert first.device.type == "cuda" and torch.equal(first, again)


# The overlays of frost.


def test_the_overlays_are_those_of_a_bilinear_resize():
    folder = data_folder() / "frost"
    for path, overlay in zip(sorted(folder.glob("frost[1-5].*")), frost_overlays(), strict=True):
        pixels = torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(pixels, scale_factor=0.2, mode="bilinear", antialias=False)[0]
        assert overlay.dtype == torch.uint8
        torch.testing.assert_close(overlay.float(), expected, rtol=0, atol=0.01)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Path:
    """A folder that stands for the repository: the files that can be downloaded."""
    folder = tmp_path / "server"
    folder.mkdir()
    for name in frost.FILES:
        (folder / name).write_bytes((data_folder() / "frost" / name).read_bytes())
    monkeypatch.setattr(frost, "SOURCE", folder.as_uri())
    return folder


def test_what_is_missing_is_downloaded_and_checked(server, tmp_path):
    root = tmp_path / "data"
    assert not frost_available(root)
    for own, other in zip(frost_overlays(root), frost_overlays(), strict=True):
        assert torch.equal(own, other)
    assert frost_available(root) and frost_available(data_folder())
    assert sorted(path.name for path in (root / "frost").iterdir()) == sorted(frost.FILES)


def test_a_damaged_download_is_refused_and_not_kept(server, tmp_path):
    (server / "frost3.png").write_bytes((server / "frost3.png").read_bytes()[:-1])
    with pytest.raises(DataError, match="frost3.png is missing and could not be downloaded.*by hand"):
        frost_overlays(tmp_path / "data")
    assert not (tmp_path / "data" / "frost" / "frost3.png").exists()


def test_without_a_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(frost, "SOURCE", (tmp_path / "nowhere").as_uri())
    with pytest.raises(DataError, match="frost1.png is missing.*file:///.*put the file there by hand, or leave out"):
        frost_overlays(tmp_path / "data")


def test_a_damaged_file_is_refused(server, tmp_path):
    folder = tmp_path / "data" / "frost"
    folder.mkdir(parents=True)
    (folder / "frost2.png").write_bytes((server / "frost2.png").read_bytes() + b"x")
    assert not frost_available(tmp_path / "data")
    with pytest.raises(DataError, match="frost2.png is damaged: its SHA-256 should be fe211a89.*remove it"):
        frost_overlays(tmp_path / "data")
    assert not frost_available(tmp_path / "data")
