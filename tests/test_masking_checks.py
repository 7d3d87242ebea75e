"""Signs of a hidden gradient: models with a planted mask are flagged, by the check that names the reason; honest ones are not."""

import copy
import json
from collections.abc import Collection
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, tiny_images, tiny_network, traces
from torch import Tensor, nn

from advbn_lib.attacks import PGD, Predict, judge
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.fused_bn import fuse_batch_norms, fused_layers, recorded_weights
from advbn_lib.masking_checks import LEVEL, Check, Effort, _Case, masking_checks, more_than, square_search
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.methods.pgd_training import PGDTraining
from advbn_lib.training import Schedule, train

TEST = tiny_images(48, seed=1, name="tiny/test")
IMAGES, LABELS = TEST.normalise(TEST.images.float() / 255), TEST.labels
MEANS, STDS = (torch.tensor(values).view(1, 3, 1, 1) for values in (TEST.mean, TEST.std))
RADIUS = 16 / 255
LITTLE = Effort(steps=6, more_steps=12, restarts=1, unlimited_steps=15, noise=6, queries=50)


def checked(
    predict: Predict, labels: Tensor = LABELS, only: Collection[str] = (), **others: Predict
) -> dict[str, Check]:
    generator = torch.Generator().manual_seed(0)
    found = masking_checks(predict, IMAGES, labels, TEST.mean, TEST.std, RADIUS, others, generator, LITTLE, only)
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


@pytest.fixture(scope="module")
def natural() -> nn.Module:
    return trained(PlainTraining(tiny_network(8)))


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return trained(PGDTraining(tiny_network(8), PGD(TEST.mean, TEST.std, 1, 1.0), 8.0))


def trained(method) -> nn.Module:
    loader = DeviceLoader(tiny_images(256), 32, 0, padding=0, flip=False)
    train(method, loader, Schedule(6, 32, 0.05), show_progress=False, precision=torch.float32)
    return method.model.eval()


def fused(network: nn.Module, change=None) -> nn.Module:
    """The network with a second BatchNorm set, and weights that depend much on the image; ``change`` is done to each weight."""
    model, generator = copy.deepcopy(network), torch.Generator().manual_seed(3)
    fuse_batch_norms(model)
    layers = fused_layers(model)
    for layer in layers.values():
        nn.init.uniform_(layer.adversarial.weight, 0.2, 2.0, generator=generator)
        nn.init.normal_(layer.adversarial.bias, std=1.0, generator=generator)
        nn.init.normal_(layer.predictor.last.weight, std=4.0, generator=generator)
    model.eval()
    with (
        recorded_weights(model) as weights,
        torch.no_grad(),
    ):  # in the middle, so that a threshold is in every image's reach
        for name, layer in layers.items():
            model(IMAGES)
            layer.predictor.last.bias -= weights[name].logit().median()
    for layer in layers.values() if change else ():
        layer.predictor.register_forward_hook(lambda _module, _inputs, weight: change(weight))
    return model


def answers(predict: Predict) -> Tensor:
    """Its own answers as labels: what it is attacked for is then not a matter of training."""
    with torch.no_grad():
        return predict(IMAGES).argmax(1)


def pixels(x: Tensor) -> Tensor:
    return x * STDS + MEANS


def normalised(x: Tensor) -> Tensor:
    return (x - MEANS) / STDS


# Honest models


@pytest.mark.parametrize("kind", ["natural", "robust"])
def test_honest_models_pass(kind, natural, robust, request):
    network = request.getfixturevalue(kind)
    other = robust if kind == "natural" else natural
    checks = checked(network, other=other)
    assert failed(checks) == set(), {name: checks[name].says for name in failed(checks)}
    assert [*checks] == [
        "gradient", "slope", "jumps", "loss", "strength", "unlimited", "one_step", "effort", "margin", "per_logit", "noise",
        "search", "transfer from other", "repeat",
    ]  # fmt: skip
    assert json.loads(json.dumps([asdict(check) for check in checks.values()]))[0]["passed"] is True
    assert all(check.says.endswith(".") for check in checks.values())


def test_an_honest_model_that_fuses_passes(natural):
    model = fused(natural)
    checks = checked(model, answers(model))
    assert failed(checks) == set(), {name: checks[name].says for name in failed(checks)}


def test_the_model_stays_as_it_is_and_noise_comes_from_the_generator(natural):
    before = traces(natural)
    some = ["slope", "one_step", "noise", "search"]
    assert checked(natural, only=some) == checked(natural, only=some)
    assert_same_traces(before, traces(natural))


# Planted masks


class Backwards(torch.autograd.Function):
    """The identity, with a gradient that is multiplied by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class RoundedStraightThrough(torch.autograd.Function):
    """Coarse blocks, as a codec makes them; the backward pass is that of a shift instead."""

    @staticmethod
    def forward(ctx, x):
        return (normalised((pixels(x) * 12).round() / 12)).clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.roll((5, 7), (2, 3))


def rounded(x: Tensor) -> Tensor:
    return normalised((pixels(x) * 12).round() / 12)


def staircase(x: Tensor) -> Tensor:
    scaled = pixels(x) * 12
    whole = scaled.detach().floor()
    return normalised((whole + 0.5 + 0.5 * torch.tanh(300 * (scaled - whole - 0.5))) / 12)


def thermometer(x: Tensor) -> Tensor:
    levels = torch.linspace(0, 1, 13)[1:-1].view(-1, 1, 1, 1, 1)
    return normalised((pixels(x) > levels).to(x).mean(0))


def distance(x: Tensor) -> tuple[Tensor, Tensor]:
    """To the nearest of the clean images, in [0,1] units of the farthest pixel, and which that is: a perfect detector's view."""
    far = (pixels(x).flatten(1)[:, None] - pixels(IMAGES).flatten(1)[None]).abs().amax(2)
    return far.min(1)


def detector(network: nn.Module) -> Predict:
    """Whatever is no clean image gets no answer: uniform logits."""
    return lambda x: network(x) * (distance(x)[0] < 0.5 / 255)[:, None]


def large_ones_recognised(network: nn.Module) -> Predict:
    """Strong attacks are recognised, and undone."""

    def predict(x: Tensor) -> Tensor:
        far, nearest = distance(x)
        known = 10.0 * F.one_hot(LABELS[nearest], 10)
        return torch.where((far > 12 / 255)[:, None], known, network(x))

    return predict


def forgetful(network: nn.Module) -> Predict:
    """Answers change after a while."""
    calls = []

    def predict(x: Tensor) -> Tensor:
        calls.append(None)
        return network(x) + 0.1 * len(calls) * torch.arange(10)

    return predict


def two_faced(network: nn.Module) -> Predict:
    """Another model while gradients are taken."""
    return lambda x: network(x.flip(3)) if x.requires_grad else network(x)


def without_gradient(network: nn.Module) -> Predict:
    @torch.no_grad()
    def predict(x: Tensor) -> Tensor:
        return network(x)

    return predict


def not_a_number(network: nn.Module) -> Predict:
    """The forward pass is right; the backward pass is 0 / 0."""
    return lambda x: network(x) + (x.flatten(1).sum(1, keepdim=True) * 0).sqrt() * 0


def ripples(network: nn.Module) -> Predict:
    """A fine ripple on the logits: right gradients that point nowhere."""
    return lambda x: network(x) + 0.3 * torch.sin(2000 * x.flatten(1)[:, :10])


MASKS = {
    "rounded": (lambda net: lambda x: net(rounded(x)), {"gradient", "jumps", "search"}),
    "thermometer": (lambda net: lambda x: net(thermometer(x)), {"gradient", "jumps"}),
    "detached": (lambda net: lambda x: net(x.detach()), {"gradient", "slope", "loss", "unlimited", "search"}),
    "no gradient": (without_gradient, {"gradient", "slope", "loss", "unlimited"}),
    "not a number": (not_a_number, {"gradient"}),
    "saturated": (lambda net: lambda x: 1e4 * net(x), {"gradient", "margin"}),
    "squashed": (lambda net: lambda x: 10 * torch.tanh(0.7 * net(x)), {"per_logit"}),
    "noise": (lambda net: lambda x: net(x + 0.1 * torch.randn_like(x)), {"repeat"}),
    "flipped": (lambda net: lambda x: net(Backwards.apply(x, -1.0)), {"slope", "loss", "unlimited", "search"}),
    "zeroed": (lambda net: lambda x: net(Backwards.apply(x, 0.0)), {"gradient", "slope", "loss", "search"}),
    "half zeroed": (lambda net: lambda x: net(Backwards.apply(x, (torch.arange(12) % 3 == 0).float())), {"slope"}),
    "steep": (lambda net: lambda x: net(staircase(x)), {"slope", "search"}),
    "straight through, wrongly": (lambda net: lambda x: net(RoundedStraightThrough.apply(x)), {"slope", "jumps"}),
    "detector": (detector, {"gradient", "jumps"}),
    "large ones recognised": (large_ones_recognised, {"strength", "loss", "jumps"}),
    "forgetful": (forgetful, {"repeat"}),
    "two-faced": (two_faced, {"repeat", "slope"}),
    "ripples": (ripples, {"slope"}),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
def test_a_planted_mask_is_flagged(mask, natural):
    plant, reasons = MASKS[mask]
    checks = checked(plant(natural), only=reasons)
    assert failed(checks) == checks.keys() == reasons, {name: check.numbers for name, check in checks.items()}
    assert all(len(checks[name].says) > 100 for name in reasons)


def test_a_weight_predictor_without_gradient_is_flagged(natural):
    """The mask of AFA: the attack does not see that the weights depend on the image."""
    model = fused(natural, torch.Tensor.detach)
    assert "slope" in failed(checked(model, answers(model), ["slope"]))


def test_a_weight_predictor_with_a_threshold_is_flagged(natural):
    """The same by a step: each weight is 0 or 1."""
    model = fused(natural, lambda weight: (weight > 0.5).to(weight))
    assert "jumps" in failed(checked(model, answers(model), ["jumps"]))


def test_batch_statistics_are_flagged(natural):
    model = copy.deepcopy(natural).train()
    assert "repeat" in failed(checked(model, answers(model), ["repeat"]))


def test_what_a_mask_hides_is_found_from_another_model(natural):
    checks = checked(lambda x: natural(rounded(x)), only=["transfer from smooth"], smooth=natural)
    assert not checks["transfer from smooth"].passed
    assert "made on smooth" in checks["transfer from smooth"].says


def test_a_loss_that_is_nan_is_a_finding_and_no_crash(natural):
    def predict(x: Tensor) -> Tensor:
        return natural(x).masked_fill((distance(x)[0] > 6 / 255)[:, None], torch.nan)

    checks = checked(predict, only=["loss", "unlimited"])
    assert failed(checks) == {"loss", "unlimited"} and "cannot go on" in checks["unlimited"].says


# The parts


def test_more_than_is_a_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for total in (32, 100, 1000):
        for share in (0.02, 0.1):
            for count in range(total // 5):
                tail = stats.binom.sf(count - 1, total, share)
                assert more_than(count, total, share) == (count > share * total and tail < LEVEL)


def test_the_search_stays_in_the_ball_and_finds_something(natural):
    case = _Case(
        natural, IMAGES, LABELS, TEST.mean, TEST.std, RADIUS, Effort(queries=150), torch.Generator().manual_seed(0)
    )
    found = square_search(case)
    assert (pixels(found.images) - pixels(IMAGES)).abs().max() <= RADIUS + 1e-6
    assert pixels(found.images).min() > -1e-6 and pixels(found.images).max() < 1 + 1e-6
    clean = judge(natural, IMAGES, LABELS)
    assert found.wrong.sum() > clean.wrong.sum() + 8 and not (clean.wrong & ~found.wrong).any()


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": IMAGES[:8], "labels": LABELS[:8]}, "with 8 images nothing can be told"),
        ({"radius": 0.0}, "must be above 0"),
        ({"radius": 8.0}, r"0\.\.255 units"),
        ({"labels": LABELS + 5}, "but the model has 10 classes"),
        ({"images": 255 * IMAGES}, "mean and std"),
        ({"only": ["slopes"]}, "no check slopes; there are gradient, slope, jumps"),
    ],
    ids=["few", "zero", "units", "labels", "pixels", "only"],
)
def test_bad_input_is_refused(natural, wrong, message):
    given = {"images": IMAGES, "labels": LABELS, "radius": RADIUS, "mean": TEST.mean, "std": TEST.std, **wrong}
    with pytest.raises(ValueError, match=message):
        masking_checks(natural, **given)


@pytest.mark.parametrize(
    "wrong", [{"steps": 3}, {"steps": 100}, {"noise": 0}, {"queries": 0}, {"restarts": 0}], ids=str
)
def test_too_little_effort_is_refused(wrong):
    with pytest.raises(ValueError, match="every effort is at least 1"):
        Effort(**wrong)
