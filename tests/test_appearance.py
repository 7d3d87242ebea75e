"""Style and content as numbers; and the study that compares the adversary with other changes of the same size."""

import copy

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from conftest import assert_same_traces, tiny_images, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib import AdvBN
from advbn_lib import appearance as looks
from advbn_lib.appearance import CONTENT, MEASURES, change_as_much, measure, pixel_change, to_grey_levels
from advbn_lib.appearance_study import CONTROLS, StudyConfig, changed_images, compare, misfit, study
from advbn_lib.decoder import Autoencoder, DecoderConfig
from advbn_lib.training import Schedule

SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=25, deadline=None)


def pictures(seed: int = 0, count: int = 4, size: int = 24, detail: int = 7) -> torch.Tensor:
    """Smooth colour images in [0.2, 0.8] (float64), with edges everywhere."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, detail, detail, generator=generator, dtype=torch.float64)
    return 0.2 + 0.6 * torch.nn.functional.interpolate(small, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def moved(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The same pixels of each image at other places."""
    order = torch.randperm(x[0, 0].numel(), generator=torch.Generator().manual_seed(seed))
    return x.flatten(2)[:, :, order].view_as(x)


# ---- the measures --------------------------------------------------------------------------


@given(SEEDS)
@few
def test_nothing_changed(seed):
    x = pictures(seed)
    expected = {name: 1.0 for name in (*CONTENT, "contrast_ratio")}
    for name, values in measure(x, x).items():
        assert values.shape == (4,)
        torch.testing.assert_close(values, torch.full((4,), expected.get(name, 0.0), dtype=x.dtype), atol=1e-6, rtol=0)


@given(SEEDS, st.floats(0.2, 1.0), st.floats(-0.15, 0.15))
@few
def test_a_change_of_brightness_and_contrast_is_all_style(seed, contrast, brightness):
    x = pictures(seed)
    middle = x.mean((2, 3), keepdim=True)
    y = middle + contrast * (x - middle) + brightness
    found = measure(x, y)
    for name in CONTENT:
        torch.testing.assert_close(found[name], torch.ones(4, dtype=x.dtype), atol=1e-3, rtol=0)
    torch.testing.assert_close(found["contrast_ratio"], torch.full((4,), contrast, dtype=x.dtype), atol=1e-6, rtol=0)
    stds = x.std((2, 3), correction=0)
    expected = ((3 * brightness**2 + ((1 - contrast) * stds).square().sum(1)) / 6).sqrt()
    torch.testing.assert_close(found["style_change"], expected, atol=1e-9, rtol=0)


@given(SEEDS)
@few
def test_moving_pixels_is_no_style(seed):
    x = pictures(seed, size=32)
    found = measure(x, moved(x, seed))
    for name in ("style_change", "histogram_distance", "saturation_change"):
        torch.testing.assert_close(found[name], torch.zeros(4, dtype=x.dtype), atol=1e-9, rtol=0)
    torch.testing.assert_close(found["contrast_ratio"], torch.ones(4, dtype=x.dtype), atol=1e-9, rtol=0)
    for name in CONTENT:
        assert found[name].mean() < 0.15, name


def test_a_negative_keeps_the_edges_and_turns_the_luma():
    x = pictures()
    found = measure(x, 1 - x)
    for name, value in {"edge_correlation": 1.0, "edge_direction": 1.0, "luma_correlation": -1.0}.items():
        torch.testing.assert_close(found[name], torch.full((4,), value, dtype=x.dtype), atol=1e-6, rtol=0)
    assert (found["ssim_structure"] < 0).all()


def test_stripes_that_stand_crosswise():
    wave = torch.sin(torch.arange(24, dtype=torch.float64) / 2) / 4 + 0.5
    upright = wave.expand(1, 3, 24, 24)
    torch.testing.assert_close(
        looks.edge_direction(upright, upright.mT), torch.tensor([-1.0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert looks.luma_correlation(upright, upright.mT).abs() < 0.1


def test_an_erased_image_has_no_content():
    x = pictures()
    found = measure(x, torch.full_like(x, 0.5))
    for name in ("edge_correlation", "edge_direction", "luma_correlation", "contrast_ratio"):
        torch.testing.assert_close(found[name], torch.zeros(4, dtype=x.dtype), atol=1e-9, rtol=0)
    nothing = measure(torch.zeros_like(x), torch.zeros_like(x))
    assert all(torch.isfinite(values).all() for values in [*found.values(), *nothing.values()])


def test_gamma_keeps_more_edges_than_noise_or_blur_of_the_same_size():
    x = pictures(count=16)
    gamma = x**2
    size = pixel_change(x, gamma)
    generator = torch.Generator().manual_seed(0)
    noise = change_as_much(x, torch.randn(x.shape, generator=generator, dtype=x.dtype), size)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, [3] * 4, mode="reflect"), 7, 1)
    blur = change_as_much(x, blurred - x, size)
    kept = {name: measure(x, y) for name, y in {"gamma": gamma, "noise": noise, "blur": blur}.items()}
    for name in CONTENT:
        assert kept["gamma"][name].min() > 0.8
        for other in ("noise", "blur"):
            assert kept[other][name].mean() < kept["gamma"][name].mean()
    for name in ("style_change", "histogram_distance"):
        assert (kept["gamma"][name] > kept["noise"][name]).all()


def test_more_noise_leaves_fewer_edges():
    x = pictures(count=32)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    for name in CONTENT:
        kept = [MEASURES[name](x, x + amount * noise).mean() for amount in (0, 0.02, 0.05, 0.1, 0.2)]
        assert all(first > second for first, second in zip(kept, kept[1:])), name


def test_taking_the_colour_out():
    x = pictures()
    grey = looks.luma(x)[:, None].expand_as(x)
    colourful = (x.amax(1) - x.amin(1)).mean((1, 2))
    torch.testing.assert_close(looks.saturation_change(x, grey), -colourful)
    torch.testing.assert_close(looks.edge_correlation(x, grey), torch.ones(4, dtype=x.dtype))


def test_histogram_distance_is_scipys_wasserstein_distance():
    x, y = pictures(0), pictures(1)
    for number, value in enumerate(looks.histogram_distance(x, y)):
        expected = np.mean(
            [scipy.stats.wasserstein_distance(x[number, c].ravel(), y[number, c].ravel()) for c in range(3)]
        )
        assert value == pytest.approx(expected, abs=1e-12)


def test_edges_are_scipys_sobel():
    x, y = pictures(0, 1), pictures(1, 1)

    def gradients(image: torch.Tensor) -> np.ndarray:
        grey = np.tensordot(np.array([0.299, 0.587, 0.114]), image[0].numpy(), 1)
        return np.stack([scipy.ndimage.sobel(grey, axis)[1:-1, 1:-1] for axis in (1, 0)])

    a, b = gradients(x), gradients(y)
    strength = [np.hypot(*g).ravel() for g in (a, b)]
    assert looks.edge_correlation(x, y).item() == pytest.approx(np.corrcoef(*strength)[0, 1], abs=1e-9)
    angle = np.arctan2(a[1], a[0]) - np.arctan2(b[1], b[0])
    weight = strength[0] * strength[1]
    assert looks.edge_direction(x, y).item() == pytest.approx(
        np.average(np.cos(2 * angle).ravel(), weights=weight), abs=1e-6
    )


def test_structure_window_by_window():
    x, y = pictures(0, 1, 13), pictures(1, 1, 13)
    grey = [np.tensordot(np.array([0.299, 0.587, 0.114]), image[0].numpy(), 1) for image in (x, y)]
    bell = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    weights = np.outer(bell, bell) / bell.sum() ** 2
    values = []
    for row in range(3):
        for column in range(3):
            a, b = (image[row : row + 11, column : column + 11] for image in grey)
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            spread = [np.sqrt((weights * (v - m) ** 2).sum()) for v, m in ((a, mean_a), (b, mean_b))]
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            values.append((covariance + 0.00045) / (spread[0] * spread[1] + 0.00045))
    assert looks.ssim_structure(x, y).item() == pytest.approx(np.mean(values), abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
def test_each_image_is_measured_by_itself_and_stays_in_range(name):
    x, y = pictures(0, 6), torch.rand(6, 3, 24, 24, dtype=torch.float64)
    together = MEASURES[name](x, y)
    alone = torch.cat([MEASURES[name](x[[i]], y[[i]]) for i in range(6)])
    torch.testing.assert_close(together, alone)
    assert together.min() >= (
        0 if name in ("pixel_change", "style_change", "histogram_distance", "contrast_ratio") else -1
    )
    single = MEASURES[name](x.float(), y.float())
    torch.testing.assert_close(single.double(), together, atol=1e-4, rtol=0)
    if name != "contrast_ratio":
        assert together.max() <= 1


@pytest.mark.parametrize("shape", [(4, 3, 24, 23), (4, 1, 24, 24), (3, 24, 24), (4, 3, 10, 10)])
def test_batches_that_cannot_be_compared_are_refused(shape):
    with pytest.raises(ValueError, match="same shape"):
        measure(pictures() if shape[-1] > 10 else torch.rand(shape), torch.rand(shape))


# ---- changes of a given size ---------------------------------------------------------------


@given(SEEDS, st.floats(0.0, 0.35))
@few
def test_a_change_gets_the_size_that_was_asked_for(seed, size):
    x = pictures(seed)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    sizes = size * torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=x.dtype)
    y = change_as_much(x, direction, sizes)
    torch.testing.assert_close(pixel_change(x, y), sizes, atol=1e-5, rtol=0)
    assert y.min() >= 0 and y.max() <= 1
    inside = (y > 0) & (y < 1) & (sizes.view(-1, 1, 1, 1) > 1e-3)
    assert (((y - x) * direction)[inside] > 0).all(), "against the direction"


def test_a_size_out_of_reach_is_approached_as_far_as_it_goes():
    x = pictures()
    y = change_as_much(x, torch.ones_like(x), torch.full((4,), 0.95, dtype=x.dtype))
    assert torch.equal(y, torch.ones_like(x))
    half = change_as_much(x, 1 - x, torch.full((4,), 0.95, dtype=x.dtype), most=0.5)
    torch.testing.assert_close(half, (1 + x) / 2)


def test_grey_levels_are_those_of_a_file():
    x = torch.rand(2, 3, 5, 5)
    levels = to_grey_levels(x) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert torch.equal(to_grey_levels(x).mul(255).round().byte(), (x * 255).round().byte())
    assert to_grey_levels(0.5 + 0.001 * (x - 0.5)).unique().numel() <= 2


# ---- the study -----------------------------------------------------------------------------

QUICK = DecoderConfig(width=8, depth=1, images=64, schedule=Schedule(1, 16, 0.05, weight_decay=0.0))


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    """Untrained: what the study promises does not depend on a good decoder."""
    torch.manual_seed(0)
    return Autoencoder(tiny_network(), tiny_images(size=16), QUICK).eval()


def batch(autoencoder: Autoencoder, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return autoencoder.images.images[:count].float() / 255, autoencoder.images.labels[:count]


def test_the_adversary_is_advbns(autoencoder):
    images, labels = batch(autoencoder)
    shown, features = changed_images(autoencoder, images, labels)
    method = AdvBN(copy.deepcopy(autoencoder.split.model), example=images)
    x = autoencoder.encode(images)
    worst = method.perturb(x, labels)
    assert torch.equal(features["unchanged"], x) and torch.equal(features["adversarial"], worst)
    assert torch.equal(shown["adversarial"], to_grey_levels(autoencoder.decode(worst)))
    assert not torch.equal(features["random"], worst)


def test_every_control_changes_an_image_as_much_as_the_adversary_does(autoencoder):
    images, labels = batch(autoencoder)
    shown, _ = changed_images(autoencoder, images, labels)
    assert shown.keys() == {"unchanged", "adversarial", "random", *CONTROLS}
    sizes = pixel_change(shown["unchanged"], shown["adversarial"])
    assert sizes.min() > 0.005
    for name in CONTROLS.keys() - {"grey_blur"}:
        torch.testing.assert_close(pixel_change(shown["unchanged"], shown[name]), sizes, atol=0.002, rtol=0)


@pytest.mark.parametrize(("eps", "out_of_reach"), [(1.1, False), (8.0, True)])
def test_a_blur_is_at_most_a_blur(autoencoder, eps, out_of_reach):
    images, labels = batch(autoencoder)
    shown, _ = changed_images(autoencoder, images, labels, eps, step_size=eps / 4)
    before = shown["unchanged"]
    grey = looks.luma(before).numpy()
    blurred = np.stack([scipy.ndimage.gaussian_filter(one, 2.0, mode="mirror", truncate=3.0) for one in grey])
    fully = to_grey_levels(torch.from_numpy(blurred)[:, None].expand_as(before))
    wanted, reached, limit = (pixel_change(before, y) for y in (shown["adversarial"], shown["grey_blur"], fully))
    assert (wanted > limit).any() == out_of_reach
    torch.testing.assert_close(reached, torch.minimum(wanted, limit), atol=0.003, rtol=0)


def test_the_decoders_own_error_is_not_the_adversarys(autoencoder):
    images, labels = batch(autoencoder)
    results = compare(autoencoder, images, labels, eps=1e-6, step_size=1e-6, steps=1)
    assert results["unchanged"]["pixel_change"].min() > 0.05, "an untrained decoder is bad"
    for name in ("adversarial", "random"):
        assert results[name]["pixel_change"].max() < 0.001
        assert results[name]["edge_correlation"].min() > 0.9


def test_the_pixel_attack_goes_along_the_sign_of_the_gradient(autoencoder):
    images, labels = batch(autoencoder)
    shown, _ = changed_images(autoencoder, images, labels)
    x = shown["unchanged"].clone().requires_grad_()
    torch.nn.functional.cross_entropy(autoencoder.classify(x), labels).backward()
    step = shown["pixel_attack"] - shown["unchanged"]
    assert (step * x.grad.sign() >= 0).all() and (step != 0).float().mean() > 0.9


def test_shares_count_images_at_which_the_adversary_is_ahead(autoencoder):
    results = compare(autoencoder, *batch(autoencoder))
    for name in CONTROLS:
        style = results["adversarial"]["style_change"] > results[name]["style_change"]
        edges = results["adversarial"]["edge_correlation"] > results[name]["edge_correlation"]
        assert torch.equal(results[name]["adversary_does_both"].bool(), style & edges)
    assert {"accuracy", "features_accuracy", "misfit"} <= results["adversarial"].keys()
    assert not {"features_accuracy", "misfit"} & results["noise"].keys()


def test_misfit_is_relative_and_by_image(autoencoder):
    images, _ = batch(autoencoder)
    x = autoencoder.encode(images)
    torch.testing.assert_close(misfit(autoencoder, images, x), torch.zeros(12))
    longer = x * torch.arange(1.0, 13.0).view(-1, 1, 1, 1)
    torch.testing.assert_close(misfit(autoencoder, images, longer), 1 - 1 / torch.arange(1.0, 13.0))
    assert torch.isfinite(misfit(autoencoder, images, torch.zeros_like(x))).all()


def test_a_seed_decides_all_that_is_random(autoencoder):
    images, labels = batch(autoencoder)
    first, again, other = (changed_images(autoencoder, images, labels, seed=seed)[0] for seed in (0, 0, 1))
    for name in first:
        assert torch.equal(first[name], again[name])
        assert torch.equal(first[name], other[name]) == (
            name not in ("random", "random_as_large", "noise", "colour_cast")
        )


def test_a_study_leaves_the_network_as_it_was_and_names_its_groups(tmp_path):
    network, images = tiny_network().train(), tiny_images(size=16)
    config = StudyConfig(("layer1", "layer2"), (1.1, 0.5), batch_size=8, batches=2, decoder=QUICK)
    before = traces(network)
    tables, curves = study(network, images, images, config, 3, tmp_path, show_progress=False)
    assert_same_traces(before, traces(network))
    assert list(tables) == ["appearance", "appearance_eps_0.5", "appearance_layer2", "appearance_layer2_eps_0.5"]
    assert list(curves) == ["decoder_error_layer1", "decoder_error_layer2"] and len(list(tmp_path.iterdir())) == 2
    for table in tables.values():
        assert table.keys() == {"unchanged", "adversarial", "random", *CONTROLS}
        for measures in table.values():
            assert MEASURES.keys() <= measures.keys() and all(np.isfinite(list(measures.values())))
    again, _ = study(network, images, images, config, 3, tmp_path, show_progress=False)
    assert again == tables


def test_the_mean_is_over_all_images_of_all_batches():
    network, images = tiny_network(), tiny_images(size=16)
    config = StudyConfig(("layer1",), (1.1,), batch_size=24, batches=2, decoder=QUICK)
    tables, _ = study(network, images, images.first(40), config, show_progress=False)  # batches of 24 and 16
    right = tables["appearance"]["unchanged"]["accuracy"] * 40
    assert right == pytest.approx(round(right), abs=1e-6)
