"""Accuracy over strengths: every curve is the attack that it says, and the numbers made of curves are right."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from conftest import assert_same_traces, tiny_images, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advbn_lib.attacks import PGD, judge, worse, worst_case
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.fused_bn import Fusion, force_weights, fused_layers, recorded_weights
from advbn_lib.methods.afa import AFA, EndPoints
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.modes import evaluating
from advbn_lib.robustness import NOISE_SEED, StrengthTest, area, areas, follows, spearman, strength_test
from advbn_lib.training import Schedule, train

few = settings(max_examples=40, deadline=None)
SMALL = StrengthTest((0, 4, 8, 16), steps=4, images=32, fixed_weights=(0, 0.5, 1), cross_strengths=(16,), batch_size=20)
TEST = tiny_images(64, seed=1, name="tiny/test")
ATTACK = PGD(TEST.mean, TEST.std, steps=1, step=1.0)


def trained(method: Method, epochs: int) -> Method:
    loader = DeviceLoader(tiny_images(256), 32, 0, padding=0, flip=False)
    train(method, loader, Schedule(epochs, 32, 0.05), show_progress=False, precision=torch.float32)
    return method


def varied(network: nn.Module) -> nn.Module:
    """With predictors that react to their input."""
    generator = torch.Generator().manual_seed(5)
    for layer in fused_layers(network).values():
        if layer.predictor is not None:
            nn.init.normal_(layer.predictor.last.weight, std=0.5, generator=generator)
    return network


@pytest.fixture(scope="module")
def plain() -> Method:
    torch.manual_seed(0)
    return trained(PlainTraining(tiny_network(8)), 5)


@pytest.fixture(scope="module")
def end_points() -> Method:
    torch.manual_seed(0)
    return trained(EndPoints(tiny_network(8), ATTACK, eps=8.0), 6)


@pytest.fixture(scope="module")
def afa(end_points) -> Method:
    torch.manual_seed(0)
    method = AFA(EndPoints(tiny_network(8), ATTACK).model, ATTACK, eps=8.0)
    method.model.load_state_dict(end_points.model.state_dict())
    varied(method.model)
    return trained(method, 1)


@pytest.fixture(scope="module")
def measured(afa) -> dict[str, dict]:
    return strength_test(afa, TEST, SMALL, show_progress=False)


def batches(config: StrengthTest, test: ImageSet = TEST):
    """Normalised images, labels and the generator of their noise."""
    test = test.first(config.images)
    for number, (pixels, labels) in enumerate(zip(test.images.split(20), test.labels.split(20))):
        yield test.normalise(pixels.float() / 255), labels, torch.Generator().manual_seed(NOISE_SEED + number)


# The curves


def test_a_model_without_fusing_has_one_curve_and_a_worst_case(plain):
    found = strength_test(plain, TEST, SMALL, show_progress=False)
    assert found.keys() == {"robust", "area"}
    assert {curve: [*values] for curve, values in found["robust"].items()} == {
        "clean": ["0", "4", "8", "16"],
        "worst_case": ["16"],
    }
    assert found["area"] == {"clean": pytest.approx(area({float(s): v for s, v in found["robust"]["clean"].items()}))}


def test_the_curve_is_the_attack_on_the_model_written_out(plain):
    found = strength_test(plain, TEST, SMALL, show_progress=False)["robust"]
    attack = PGD(TEST.mean, TEST.std, steps=4)
    right = {"clean": 0, "worst_case": 0}
    with evaluating(plain):
        for images, labels, generator in batches(SMALL):
            state = generator.get_state()
            main = worst_case(attack, plain.model, images, labels, 16 / 255, generator=generator)
            generator.set_state(state)
            other = worst_case(
                replace(attack, loss="margin"), plain.model, images, labels, 16 / 255, generator=generator
            )
            right["clean"] += (~main.wrong).sum().item()
            right["worst_case"] += (~worse(main, other).wrong).sum().item()
    assert {curve: values["16"] for curve, values in found.items()} == {
        curve: pytest.approx(count / 32) for curve, count in right.items()
    }


def test_a_model_that_fuses_has_all_curves(measured):
    whole, crossed = ["0", "4", "8", "16"], ["16"]
    assert {curve: [*values] for curve, values in measured["robust"].items()} == {
        "fused": whole, "frozen_weights": crossed, "worst_case": crossed,
        "fixed_0": whole, "fixed_0.5": whole, "fixed_1": whole,
    }  # fmt: skip
    assert measured["area"].keys() == {"fused", "fixed_0", "fixed_0.5", "fixed_1", "best_fixed", "oracle"}
    assert json.loads(json.dumps(measured)) == measured
    assert json.loads(json.dumps(asdict(SMALL)))["strengths"] == [0, 4, 8, 16]


def test_fixed_weights_are_in_attack_and_answer_and_the_ends_are_the_end_points(afa, measured):
    attack = PGD(TEST.mean, TEST.std, steps=4)
    for curve, branch in (("fixed_0", "clean"), ("fixed_1", "adversarial")):
        right = 0
        with evaluating(afa):
            for images, labels, generator in batches(SMALL):
                found = worst_case(
                    attack, lambda x: afa.predict(x, branch), images, labels, 16 / 255, generator=generator
                )
                right += (~found.wrong).sum().item()
        assert measured["robust"][curve]["16"] == pytest.approx(right / 32)


def test_the_weaker_attack_sees_the_weights_of_the_clean_images(afa, measured):
    attack, right = PGD(TEST.mean, TEST.std, steps=4), 0
    with evaluating(afa):
        for images, labels, generator in batches(SMALL):
            with recorded_weights(afa.model) as seen, torch.no_grad():
                afa.predict(images)
            with force_weights(afa.model, dict(seen)):
                changed = attack.perturb(afa.predict, images, labels, 16 / 255, generator)
            found = worse(judge(afa.predict, images, labels), judge(afa.predict, changed, labels))
            right += (~found.wrong).sum().item()
    assert measured["robust"]["frozen_weights"]["16"] == pytest.approx(right / 32)


def test_the_worst_case_is_at_most_every_attack_on_the_whole_model(measured):
    robust = measured["robust"]
    assert robust["worst_case"]["16"] <= min(robust["fused"]["16"], robust["frozen_weights"]["16"])


def test_the_worst_case_finds_what_a_flat_loss_hides(afa, monkeypatch):
    """Logits so large that the cross-entropy is flat, but while weights are forced."""
    honest, stem = afa.predict, fused_layers(afa.model)["bn1"]
    monkeypatch.setattr(
        afa, "predict", lambda x, branch="fused": honest(x, branch) * (1e6 if stem.forced is None else 1)
    )
    found = strength_test(afa, TEST, SMALL, show_progress=False)["robust"]
    assert found["worst_case"]["16"] < found["fused"]["16"] - 0.2


def test_accuracy_does_not_rise_with_strength(afa, plain, measured):
    """Strengths are separate attacks, so this is not by construction."""
    for robust in (measured["robust"], strength_test(plain, TEST, SMALL, show_progress=False)["robust"]):
        for curve in robust.keys() - {"frozen_weights"}:
            values = [*robust[curve].values()]
            assert all(later <= earlier + 2 / 32 for earlier, later in zip(values, values[1:])), curve
    assert measured["robust"]["fused"]["0"] > measured["robust"]["fused"]["16"] + 0.2


def test_an_unchanged_image_counts(plain):
    """Where labels are mostly wrong, an attack cannot help the model."""
    shuffled = replace(TEST, labels=TEST.labels.flip(0))
    robust = strength_test(plain, shuffled, SMALL, show_progress=False)["robust"]["clean"]
    assert all(value <= robust["0"] for value in robust.values())


def test_end_points_have_fixed_weights_alone(end_points, measured):
    found = strength_test(end_points, TEST, SMALL, show_progress=False)
    assert found.keys() == {"robust", "area"}
    # Stage 2 trains the predictors and nothing else.
    assert found["robust"] == {c: v for c, v in measured["robust"].items() if c.startswith("fixed")}
    assert found["area"] == {c: v for c, v in measured["area"].items() if c != "fused"}


def test_the_same_model_gives_the_same_numbers_and_stays_as_it_is(afa, measured):
    afa.train()
    before = traces(afa)
    assert strength_test(afa, TEST, SMALL, show_progress=False) == measured
    assert_same_traces(before, traces(afa))


def test_it_computes_in_full_precision(plain):
    seen = set()

    class Watched(PlainTraining):
        def predict(self, images, branch="clean"):
            logits = super().predict(images, branch)
            seen.add(logits.dtype)
            return logits

    with torch.autocast("cpu", torch.bfloat16):
        strength_test(Watched(plain.model), TEST, replace(SMALL, images=4, steps=1), show_progress=False)
    assert seen == {torch.float32}


# The weights


def test_weights_are_those_of_the_attacked_images(afa, measured):
    attack, found = PGD(TEST.mean, TEST.std, steps=4), {}
    with evaluating(afa):
        for images, labels, generator in batches(SMALL):
            changed = worst_case(attack, afa.predict, images, labels, 16 / 255, generator=generator).images
            with recorded_weights(afa.model) as seen, torch.no_grad():
                afa.predict(changed)
            for layer, weights in seen.items():
                found.setdefault(layer, []).append(weights)
    layers = {layer: torch.cat(parts) for layer, parts in found.items()}
    assert measured["weights"].keys() == measured["weight_follows"].keys() == {*layers, "all"}
    for layer, weights in [*layers.items(), ("all", torch.stack([*layers.values()]).mean(0))]:
        assert measured["weights"][layer]["mean"]["16"] == pytest.approx(weights.mean().item(), abs=1e-6)
        assert measured["weights"][layer]["std"]["16"] == pytest.approx(weights.std(correction=0).item(), abs=1e-6)
        assert weights.std() > 0


def test_untrained_predictors_follow_nothing():
    method = AFA(tiny_network(), ATTACK)
    found = strength_test(method, TEST, replace(SMALL, images=4, steps=1), show_progress=False)
    assert set(found["weight_follows"].values()) == {0.0}
    assert found["weights"]["all"]["mean"] == dict.fromkeys(("0", "4", "8", "16"), 0.5)


def test_one_weight_in_the_network_is_seen_at_every_layer():
    method = AFA(tiny_network(), ATTACK, fusion=Fusion(weights="network"))
    varied(method.model)
    found = strength_test(method, TEST, replace(SMALL, images=6, steps=1), show_progress=False)["weights"]
    assert len({json.dumps(found[layer]) for layer in found.keys() - {"all"}}) == 1
    assert found["all"]["mean"]["16"] == pytest.approx(found["bn1"]["mean"]["16"])


def test_a_weight_that_rises_with_strength_follows_it():
    rising = {s: 0.1 * s + 0.001 * torch.arange(10.0) for s in (0.0, 1.0, 4.0)}
    assert follows(rising) > 0.9
    assert follows({-s: weights for s, weights in rising.items()}) < -0.9


@given(data=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
@few
def test_spearman_is_scipys_with_ties(data):
    stats = pytest.importorskip("scipy.stats")
    first, second = (torch.tensor(values, dtype=torch.float32) for values in zip(*data))
    found = spearman(first, second)
    if first.unique().numel() == 1 or second.unique().numel() == 1:
        assert found == 0
    else:
        assert found == pytest.approx(stats.spearmanr(first.numpy(), second.numpy()).statistic, abs=1e-12)


def test_spearman_refuses_what_is_no_pair_of_series():
    for first, second in ((torch.zeros(3), torch.zeros(4)), (torch.zeros(1), torch.zeros(1)), (torch.eye(2),) * 2):
        with pytest.raises(ValueError, match=r"two series \(N,\)"):
            spearman(first, second)


# The areas


def test_area_is_a_mean_over_strengths_by_trapezoids():
    assert area({0: 0.75, 3: 0.75, 12: 0.75}) == pytest.approx(0.75)
    assert area({0: 1.0, 2: 0.5, 12: 0.0}) == pytest.approx((2 * 0.75 + 10 * 0.25) / 12)


def test_the_oracle_takes_the_best_weight_of_each_strength():
    config = StrengthTest((0, 4, 8), fixed_weights=(0, 1), cross_strengths=(8,))
    robust = {
        "fused": {0: 0.9, 4: 0.5, 8: 0.3}, "worst_case": {8: 0.2},
        "fixed_0": {0: 1.0, 4: 0.2, 8: 0.0}, "fixed_1": {0: 0.6, 4: 0.5, 8: 0.4},
    }  # fmt: skip
    assert areas(robust, config) == pytest.approx(
        {"fused": 0.55, "fixed_0": 0.35, "fixed_1": 0.5, "best_fixed": 0.5, "oracle": (0.75 + 0.45) / 2}
    )


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strengths": (1, 2)}, "begin with 0"),
        ({"strengths": (0,)}, "two at least"),
        ({"strengths": (0, 4, 4)}, "begin with 0 and rise"),
        ({"strengths": (0, 4 / 255, 8 / 255)}, "write 8 for 8/255"),
        ({"strengths": (0, 4, 256)}, "255 at most"),
        ({"cross_strengths": (5,)}, "some of the strengths"),
        ({"fixed_weights": (0, 2)}, r"from 0 \(clean\) to 1"),
        ({"follow_up_to": 0.5}, "follow_up_to is a strength above 0"),
        ({"restarts": 0}, "at least 1"),
        ({"images": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"steps": 0}, "at least 1 step"),
        ({"step": -1.0}, "step size must be above 0"),
    ],
    ids=str,
)
def test_a_bad_test_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        StrengthTest(**wrong)


def test_images_that_do_not_fit_are_refused(plain):
    with pytest.raises(DataError, match="asked for images 0 to 99, but it has 64"):
        strength_test(plain, TEST, replace(SMALL, images=100), show_progress=False)
    more = replace(TEST, labels=TEST.labels + 5, classes=tuple("0123456789ABCDE"))
    with pytest.raises(ValueError, match="but the model has 10 classes"):
        strength_test(plain, more, SMALL, show_progress=False)


def test_a_failed_attack_leaves_the_model_as_it_was(plain, monkeypatch):
    plain.train()
    before, honest = traces(plain), plain.predict
    monkeypatch.setattr(plain, "predict", lambda x, branch="clean": honest(x, branch) * float("nan"))
    with pytest.raises(FloatingPointError, match="ascent step 0"):
        strength_test(plain, TEST, SMALL, show_progress=False)
    assert_same_traces(before, traces(plain))
