"""Statistics by attack strength: measured right, and described by numbers that mean what they say."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from conftest import assert_same_traces, tiny_images, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advbn_lib.attacks import PGD
from advbn_lib.data import DataError
from advbn_lib.data.images import ImageSet
from advbn_lib.methods.pgd_training import UNIT
from advbn_lib.strength_statistics import (
    ByStrength,
    StatisticsStudy,
    batch_norm_layers,
    chance,
    describe,
    measure,
    monotonicity,
    strength_statistics,
)

few = settings(max_examples=30, deadline=None)
STRENGTHS = tuple(range(9))
SMALL = StatisticsStudy(strengths=(0, 2, 4, 8), steps=2, images=12, batch_size=5, examples=3)


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def network() -> nn.Module:
    """With running statistics, in train mode."""
    model = tiny_network()
    for _ in range(3):
        model(torch.randn(16, 3, 12, 12))
    return model


def grey_images(count: int = 12) -> ImageSet:
    """Mid-grey of slightly different levels: no change of up to 8/255 reaches black or white."""
    images = torch.randint(100, 150, (count, 3, 8, 8), dtype=torch.uint8)
    return ImageSet("grey/test", images, torch.arange(count) % 2, ("a", "b"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


class MeansOnly(nn.Module):
    """Two classes, told apart by the means of the channels: the worst change of each pixel is known."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("weights", torch.tensor([1.0, -2.0, 0.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (self.bn(x).mean((2, 3)) * self.weights).sum(1)
        return torch.stack([score, -score], 1)


# ---- describing ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "monotone", "spearman", "roughness", "bend"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7, 8], 1, 1, 0, 0),
        ([5, 4, 3, 2, 1, 0, -1, -2, -3], 1, 1, 0, 0),
        ([0, 1, 4, 9, 16, 25, 36, 49, 64], 1, 1, 1 / 64, 16 / 64),
        ([0, 0, 0, 0, 1, 1, 1, 1, 1], 0, None, math.sqrt(2 * 0.25 / 7), 0.5),  # a step: only its two ends are off
        ([0, 1, 0, 1, 0, 1, 0, 1, 0], 0, 0, 1, 1),
        ([2, 2, 2, 2, 2, 2, 2, 2, 2], 0, 0, 0, 0),
        ([0, 1, 2, 3, 5, 4, 6, 7, 8], 0, 1 - 6 * 2 / (9 * 80), None, None),
    ],
    ids=["rising", "falling", "square", "step", "zigzag", "constant", "one exchange"],
)  # fmt: skip
def test_planted_curves_are_described_as_what_they_are(values, monotone, spearman, roughness, bend):
    found = monotonicity(column(values), STRENGTHS)
    expected = {"monotone_share": monotone, "spearman": spearman, "roughness": roughness, "bend": bend}
    for name, number in expected.items():
        assert number is None or found[name] == pytest.approx(number, abs=1e-12), name


def test_channels_are_averaged():
    values = torch.cat([column(STRENGTHS), column([0, 1] * 4 + [0])], 1)
    assert monotonicity(values, STRENGTHS) == pytest.approx(
        {"monotone_share": 0.5, "spearman": 0.5, "roughness": 0.5, "bend": 0.5}
    )


def test_a_straight_line_over_unequal_strengths_is_smooth():
    strengths = (0, 1, 2, 4, 8)
    found = monotonicity(column([3 - 0.5 * s for s in strengths]), strengths)
    assert found == pytest.approx({"monotone_share": 1, "spearman": 1, "roughness": 0, "bend": 0}, abs=1e-12)
    assert monotonicity(column([0, 1, 2, 3, 4]), strengths)["roughness"] > 0.05


def test_ties_share_their_rank():
    from scipy.stats import spearmanr

    values = torch.randint(0, 4, (9, 40)).double()
    values[0] = torch.arange(40) % 4
    expected = [abs(spearmanr(STRENGTHS, line).statistic) for line in values.T.numpy() if len(set(line)) > 1]
    assert monotonicity(values, STRENGTHS)["spearman"] == pytest.approx(sum(expected) / 40)


@few
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-50, 50), st.sampled_from([-1, 1]))
def test_unit_offset_and_sign_change_nothing(seed, scale, offset, sign):
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    strengths = (0, 1, 2, 4, 8)
    before, after = monotonicity(values, strengths), monotonicity(sign * scale * values + offset, strengths)
    assert after == pytest.approx(before, rel=1e-6)
    assert 0 <= before["roughness"] <= 1 and 0 <= before["spearman"] <= 1


@few
@given(st.permutations(range(6)))
def test_only_the_right_order_and_its_reverse_are_monotone(order):
    found = monotonicity(column(list(order)), range(6))
    assert found["monotone_share"] == (list(order) in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]))


def test_chance_is_what_random_orders_give():
    strengths = (0, 1, 2, 3)
    values = torch.rand(4, 100_000, dtype=torch.float64)
    found, expected = monotonicity(values, strengths), chance(strengths)
    assert expected["monotone_share"] == 2 / 24 and expected["monotone_in_both_halves"] == 2 / 24**2
    assert found["monotone_share"] == pytest.approx(2 / 24, abs=0.004)
    assert found["spearman"] == pytest.approx(expected["spearman"], abs=0.005)
    assert chance(strengths) == expected
    # All 24 orders: the mean of |rho| is exactly known.
    every = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float64).T
    assert monotonicity(every, strengths)["spearman"] == pytest.approx(expected["spearman"], abs=0.005)


def test_noise_is_rough_and_a_trend_with_little_noise_is_not():
    noise = torch.randn(9, 500, dtype=torch.float64)
    trend = torch.arange(9.0, dtype=torch.float64)[:, None]
    rough, smooth = monotonicity(noise, STRENGTHS), monotonicity(trend + 0.05 * noise, STRENGTHS)
    assert rough["roughness"] == pytest.approx(chance(STRENGTHS)["roughness"], abs=0.02)
    assert rough["monotone_share"] < 0.02 and smooth["monotone_share"] == 1
    assert smooth["roughness"] < 0.02 < 0.3 < rough["roughness"]


def test_the_size_of_a_change_and_of_its_error_are_told():
    trend = torch.arange(9.0, dtype=torch.float64)[:, None].expand(9, 200)
    spread = torch.full((200,), 2.0, dtype=torch.float64)

    def curve(effect: float, error: float) -> ByStrength:
        halves = effect * trend + error * torch.randn(2, 9, 200, dtype=torch.float64)
        return ByStrength(halves.mean(0), halves, spread)

    real = describe([curve(1.0, 0.01)], STRENGTHS)
    assert real["shift"] == pytest.approx(4, rel=0.01) and real["shift_error"] < 0.01
    assert real["monotone_in_both_halves"] == 1 and real["rising_share"] == 1
    nil = describe([curve(0.0, 1.0)], STRENGTHS)
    assert nil["shift"] == pytest.approx(nil["shift_error"], rel=0.3)
    assert nil["monotone_in_both_halves"] == 0 and 0.3 < nil["rising_share"] < 0.7


def test_halves_that_go_opposite_ways_do_not_agree():
    halves = torch.stack([column(STRENGTHS), -column(STRENGTHS)])
    found = describe([ByStrength(0.6 * halves[0] + 0.4 * halves[1], halves, torch.ones(1))], STRENGTHS)
    assert found["monotone_share"] == 1 and found["monotone_in_both_halves"] == 0


def test_each_channel_counts_once_whatever_its_layer():
    rising, flat = column(STRENGTHS), torch.zeros(9, 3, dtype=torch.float64)
    layers = [
        ByStrength(values, values.expand(2, *values.shape), torch.ones(values.shape[1])) for values in (rising, flat)
    ]
    assert describe(layers, STRENGTHS)["monotone_share"] == 0.25


# ---- measuring -----------------------------------------------------------------------------


def test_statistics_are_those_of_all_inputs_together():
    model, test = network(), tiny_images(20)
    found, accuracies = measure(model, batch_norm_layers(model), test, SMALL, show_progress=False)
    model.eval()
    inputs: dict[str, list[torch.Tensor]] = {"bn1": [], "layer3.0.bn2": []}
    for name, kept in inputs.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0].detach().double()))
    with torch.no_grad():
        logits = model(test.normalise(test.images[:12].float() / 255))
    for name, (x,) in inputs.items():
        at = found["attack"][name]
        assert torch.allclose(at.mean.values[0], x.mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(at.variance.values[0], x.var((0, 2, 3), correction=0), rtol=1e-5)
        for half in (0, 1):
            part = x[half::2]
            assert torch.allclose(at.mean.halves[half, 0], part.mean((0, 2, 3)), atol=1e-6)
            assert torch.allclose(at.variance.halves[half, 0], part.var((0, 2, 3), correction=0), rtol=1e-5)
        assert torch.allclose(at.mean.spread, x.mean((2, 3)).std(0), rtol=1e-5)
        shares = (x - x.mean((0, 2, 3), keepdim=True)).square().mean((2, 3))
        assert torch.allclose(at.variance.spread, shares.std(0), rtol=1e-5)
        assert at.mean.values.shape == (4, x.shape[1])
        assert torch.equal(found["noise"][name].mean.shifts[0], torch.zeros(x.shape[1], dtype=torch.float64))
    right = (logits.argmax(1) == test.labels[:12]).double().mean().item()
    assert accuracies["attack"][0] == accuracies["noise"][0] == right


def test_a_known_worst_case_moves_the_means_in_straight_lines():
    """Every pixel of a channel goes the same way, by the radius: up for one class, down for the other."""
    test = grey_images()
    one_class = dataclasses.replace(test, labels=torch.zeros_like(test.labels))
    study = dataclasses.replace(SMALL, steps=8, strengths=(0, 1, 2, 4, 8))
    found, _ = measure(MeansOnly(), ["bn"], one_class, study, show_progress=False)
    radii = torch.tensor(study.strengths, dtype=torch.float64) * UNIT
    change = -torch.tensor([1.0, -1.0, 1.0]) / torch.tensor(test.std)
    attacked = found["attack"]["bn"]
    assert torch.allclose(attacked.mean.values - attacked.mean.values[0], radii[:, None] * change.double(), atol=1e-6)
    assert torch.allclose(attacked.variance.values, attacked.variance.values[:1].expand(5, 3), atol=1e-6)
    described = describe([attacked.mean], study.strengths)
    assert described["monotone_share"] == described["monotone_in_both_halves"] == 1
    assert described["roughness"] < 1e-4 and described["rising_share"] == pytest.approx(1 / 3)
    # The same sizes with random signs: the means hardly move, and variances grow by the square of the radius.
    noise = found["noise"]["bn"]
    moved = (noise.mean.values - noise.mean.values[0]).abs()
    assert (moved[-1] < 0.2 * radii[-1] * change.abs()).all()
    grown = noise.variance.values[-1] - noise.variance.values[0]
    assert torch.allclose(grown, (radii[-1] * change.double()).square(), rtol=0.5)


def test_noise_changes_each_pixel_by_as_much_as_the_attack(monkeypatch):
    from advbn_lib import strength_statistics as module

    given = []
    original = module._random_signs

    def spied(pixels, changed, generator):
        given.append((pixels, changed, original(pixels, changed, generator)))
        return given[-1][2]

    monkeypatch.setattr(module, "_random_signs", spied)
    measure(MeansOnly(), ["bn"], grey_images(), SMALL, show_progress=False)
    assert len(given) == 4 * 3
    for pixels, changed, noisy in given:
        assert torch.allclose((noisy - pixels).abs(), (changed - pixels).abs(), atol=1e-6)
    pixels, changed, noisy = given[-1]
    assert ((noisy - pixels) * (changed - pixels) < 0).float().mean() == pytest.approx(0.5, abs=0.1)


def test_noise_stays_an_image():
    from advbn_lib.strength_statistics import _random_signs

    pixels = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(4, 3, 8, 2)
    noisy = _random_signs(pixels, pixels + torch.tensor([0.1, -0.1]), torch.Generator().manual_seed(0))
    assert noisy.min() == 0 and noisy.max() == 1


def test_the_attack_hurts_and_noise_of_its_size_does_not():
    model, test = MeansOnly(), grey_images()
    levels = torch.tensor([118, 122], dtype=torch.uint8)
    clear = dataclasses.replace(
        test, images=levels[1 - test.labels].view(-1, 1, 1, 1) * torch.ones(1, 3, 8, 8, dtype=torch.uint8),
        mean=(120 / 255,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    model.weights.copy_(torch.tensor([1.0, 1.0, 1.0]))
    study = dataclasses.replace(SMALL, strengths=(0, 1, 4, 8), steps=8)
    _, accuracies = measure(model, ["bn"], clear, study, show_progress=False)
    assert accuracies["attack"] == [1, 1, 0, 0]  # the classes are 2 grey levels from where the answer changes
    assert accuracies["noise"] == [1, 1, 1, 1]


def test_the_same_seed_gives_the_same_and_another_seed_does_not():
    model, test = network(), tiny_images(20)
    first, again, other = (
        measure(model, ["layer2.0.bn1"], test, dataclasses.replace(SMALL, seed=seed), False)[0] for seed in (0, 0, 1)
    )
    values = [found["attack"]["layer2.0.bn1"].mean.values for found in (first, again, other)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0][0], values[2][0]) and not torch.equal(values[0][1:], values[2][1:])


def test_no_trace_stays_on_the_model():
    model = network()
    model.layer1.eval()
    before = traces(model)
    measure(model, batch_norm_layers(model), tiny_images(20), SMALL, show_progress=False)
    assert_same_traces(before, traces(model))
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_no_hook_stays_after_an_error():
    model = network()
    with pytest.raises(ValueError, match="'fc' gets"):
        measure(model, ["bn1", "fc"], tiny_images(20), SMALL, show_progress=False)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert model.training


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.unused, self.fc = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(self.bn(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["bn"], "'bn' runs more than once"),
        (["unused"], "'unused' did not run"),
        (["bm"], "no layer 'bm'"),
        ([], "at least one layer"),
    ],
)
def test_layers_that_cannot_be_measured_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        strength_statistics(Twice(), tiny_images(20), SMALL, layers, show_progress=False)


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="has no BatchNorm.*folded"):
        strength_statistics(nn.Flatten(), tiny_images(20), SMALL, show_progress=False)


def test_too_few_images_and_wrong_labels_are_refused():
    with pytest.raises(DataError, match="asked for images 0 to 11, but it has 8"):
        measure(network(), ["bn1"], tiny_images(8), SMALL, show_progress=False)
    with pytest.raises(ValueError, match="labels go from 0 to 4, but the model has 2 classes"):
        measure(MeansOnly(), ["bn"], tiny_images(20), SMALL, show_progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": (0, 8)}, "3 or more"),
        ({"strengths": (0, 4, 2)}, "must rise"),
        ({"strengths": (0, 2, 2)}, "must rise"),
        ({"strengths": (1, 2, 4)}, "begin with 0"),
        ({"strengths": (0, 1 / 255, 8 / 255)}, "write 8 for 8/255"),
        ({"strengths": (0, 100, 300)}, "in 1/255"),
        ({"images": 11}, "images must be even"),
        ({"images": 2}, "4 or more"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"examples": 0}, "examples must be at least 1"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("values", [torch.zeros(8, 3), torch.zeros(9), torch.zeros(9, 0)])
def test_values_that_do_not_fit_the_strengths_are_refused(values):
    with pytest.raises(ValueError, match=r"\(S,C\) for 9 strengths"):
        monotonicity(values, STRENGTHS)


# ---- as a record ---------------------------------------------------------------------------


def test_numbers_for_a_record():
    model, test = network(), tiny_images(20)
    metrics, curves = strength_statistics(model, test, SMALL, show_progress=False)
    assert json.loads(json.dumps([metrics, curves], allow_nan=False)) == [metrics, curves]
    names = batch_norm_layers(model)
    assert len(names) == 7 and "layer3.0.bn2" in names
    for change in ("attack", "noise"):
        assert set(metrics[change]["accuracy"]) == {"0", "2", "4", "8"}
        for moment in ("mean", "variance"):
            assert set(metrics[change][moment]) == {"all", *names}
            numbers = metrics[change][moment]["all"]
            assert set(numbers) == {
                "monotone_share", "spearman", "roughness", "bend", "monotone_in_both_halves", "rising_share", "shift",
                "shift_error",
            }  # fmt: skip
    assert metrics["chance"] == chance(SMALL.strengths)
    assert curves["strengths"] == [0, 2, 4, 8]
    last = curves["layer3.0.bn2"]
    assert last["channels"] == [0, 8, 15]
    found, _ = measure(model, ["layer3.0.bn2"], test, SMALL, show_progress=False)
    shifts = found["noise"]["layer3.0.bn2"].variance.shifts
    assert last["noise"]["variance"][1] == pytest.approx(shifts[:, 8].tolist(), abs=1e-6)


def test_the_attack_is_the_one_of_the_book():
    """The measured images are those of :class:`PGD` with the study's steps, at the study's radius."""
    model, test = network().eval(), tiny_images(12)
    study = dataclasses.replace(SMALL, batch_size=12)
    found, _ = measure(model, ["bn1"], test, study, show_progress=False)
    images = test.normalise(test.images.float() / 255)
    generator = torch.Generator().manual_seed(3)
    attacked = PGD(test.mean, test.std, steps=2).perturb(model, images, test.labels, 8 * UNIT, generator)
    expected = model.conv1(attacked).double().mean((0, 2, 3))
    assert torch.allclose(found["attack"]["bn1"].mean.values[3], expected, atol=1e-6)
