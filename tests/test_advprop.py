"""Worst-case images: the set that they are in, and training on them with two BatchNorm sets."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, copy_of_state, differing, tiny_images, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advbn_lib import DualBatchNorm, Steps, ascend, use_branch
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.methods.advprop import AdvProp
from advbn_lib.pixel_ball import PixelBall
from advbn_lib.training import Schedule, train

few = settings(max_examples=25, deadline=None)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MEANS, STDS = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - MEANS.to(pixels)) / STDS.to(pixels)


def images(count: int = 8, size: int = 12, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalised, with a third of the pixels black or white."""
    return normalised((1.5 * torch.rand(count, 3, size, size, dtype=dtype) - 0.25).clamp(0, 1))


def labels(count: int = 8) -> torch.Tensor:
    return torch.arange(count) % 10


# The set


@given(eps=st.floats(0, 1), seed=st.integers(0, 2**31), far=st.floats(0.01, 10))
@few
def test_a_projected_image_is_within_eps_and_an_image(eps, seed, far):
    torch.manual_seed(seed)
    ball, x = PixelBall(eps, MEAN, STD), images(2, 6, torch.float64)
    inside = ball.project(x, (far * torch.randn_like(x),))
    changed = ball.apply(x, inside)
    assert inside[0].abs().max() <= eps
    pixels, before = (STDS.double() * y + MEANS.double() for y in (changed, x))
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    torch.testing.assert_close(pixels - before, inside[0], rtol=0, atol=1e-6)
    assert torch.equal(ball.project(x, inside)[0], inside[0])


@given(eps=st.floats(0.001, 1), seed=st.integers(0, 2**31))
@few
def test_projection_goes_to_the_nearest_and_leaves_inner_points_alone(eps, seed):
    torch.manual_seed(seed)
    ball, x = PixelBall(eps, MEAN, STD), images(2, 6)
    pixels = ball.pixels(x)
    up, down = (ball.project(x, (torch.full_like(x, far),))[0] for far in (5.0, -5.0))
    torch.testing.assert_close(up, (1 - pixels).clamp(0, eps))
    torch.testing.assert_close(down, -pixels.clamp(0, eps))
    (drawn,) = ball.sample(x, torch.Generator().manual_seed(seed))
    assert torch.equal(ball.project(x, (drawn,))[0], drawn)


def test_no_change_is_in_the_set_whatever_the_rounding():
    x = normalised(torch.tensor([0.0, 1.0, 1 / 3]).repeat(1, 3, 50, 1))
    ball = PixelBall(4 / 255, MEAN, STD)
    for off in (0, 1e-5, -1e-5):
        start = ball.start(x + off)
        assert torch.equal(ball.apply(x + off, start), x + off)
        assert torch.equal(ball.project(x + off, start)[0], start[0])


def test_a_delta_is_in_units_of_pixels():
    x = normalised(torch.full((1, 3, 4, 4), 0.5))
    ball = PixelBall(8 / 255, MEAN, STD)
    found = ascend(lambda y: y.flatten(1).sum(1), x, ball, Steps(3, 2 / 255))
    torch.testing.assert_close(found.delta[0], torch.full_like(x, 6 / 255))
    torch.testing.assert_close(ball.apply(x, found.delta), normalised(torch.full((1, 3, 4, 4), 0.5 + 6 / 255)))
    found = ascend(lambda y: -y.flatten(1).sum(1), x, ball, Steps(30, 2 / 255))
    torch.testing.assert_close(found.delta[0], torch.full_like(x, -8 / 255))


def test_images_that_are_not_normalised_have_mean_0_and_std_1():
    x = torch.rand(2, 1, 5, 5)
    ball = PixelBall(0.3, (0.0,), (1.0,))
    (delta,) = ball.project(x, (torch.ones_like(x),))
    torch.testing.assert_close(ball.apply(x, (delta,)), (x + 0.3).clamp_max(1))


def test_draws_fill_the_ball_evenly_where_the_image_leaves_room():
    x, ball = normalised(torch.full((2, 3, 40, 40), 0.5)), PixelBall(0.25, MEAN, STD)
    (first,), (again,) = (ball.sample(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    counts = torch.histc(first, bins=8, min=-0.25, max=0.25)
    assert counts.sum() == 9600  # none outside
    assert (counts - 1200).abs().max() < 5 * 1200**0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": 4}, r"looks like 0\.\.255 units: give 4 / 255"),
        ({"eps": 1.01}, r"looks like 0\.\.255 units"),
        ({"eps": -0.1}, r"from 0 to 1.*got -0.1"),
        ({"eps": float("nan")}, "from 0 to 1.*got nan"),
        ({"mean": (0.5,)}, "a value for each channel"),
        ({"std": (0.2, 0.0, 0.3)}, "std above 0"),
    ],
    ids=str,
)
def test_a_bad_ball_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PixelBall(**{"eps": 0.1, "mean": MEAN, "std": STD, **wrong})


@pytest.mark.parametrize("of", [PixelBall.start, PixelBall.sample], ids=["start", "sample"])
def test_images_with_another_normalisation_are_refused(of):
    ball = PixelBall(0.1, MEAN, STD)
    with pytest.raises(ValueError, match="pixels go from .* not from 0 to 1.*normalised with"):
        of(ball, 255 * torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="pixels go from .* not from 0 to 1"):
        of(PixelBall(0.1, (0.0,) * 3, (1.0,) * 3), images())


# The method


def advprop(model: nn.Module | None = None, **options) -> AdvProp:
    """On a network whose main and auxiliary sets differ in every part."""
    method = AdvProp(model or tiny_network(), MEAN, STD, **options).train()
    for _ in range(3):
        method.model(images())
    for layer in dual_layers(method.model):
        layer.adversarial.weight.data.uniform_(0.5, 1.5)
    return method


def dual_layers(model: nn.Module) -> list[DualBatchNorm]:
    return [module for module in model.modules() if isinstance(module, DualBatchNorm)]


def set_of(model: nn.Module, branch: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in copy_of_state(model).items() if f".{branch}." in name}


def test_every_batch_norm_gets_an_auxiliary_one():
    method = advprop()
    assert len(dual_layers(method.model)) == 7  # ResNet-8: the stem's, and two in each of three blocks
    assert sum(isinstance(module, nn.BatchNorm2d) for module in method.model.modules()) == 14
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in method.model.parameters()}


def test_the_loss_is_half_of_each_unless_other_weights_are_given():
    for weights, (clean_weight, weight) in (({}, (0.5, 0.5)), ({"clean_weight": 1.0, "weight": 0.25}, (1.0, 0.25))):
        method = advprop(**weights).eval()
        losses = method(images(), labels())
        torch.testing.assert_close(losses.total, clean_weight * losses.clean + weight * losses.adversarial)


def test_each_kind_of_image_goes_through_its_own_set():
    method, x, y = advprop().eval(), images(), labels()
    losses, perturbed = method(x, y), method.perturb(x, y)
    for branch, inputs, loss in (("clean", x, losses.clean), ("adversarial", perturbed, losses.adversarial)):
        with use_branch(method.model, branch):
            torch.testing.assert_close(loss, F.cross_entropy(method.model(inputs), y))
    assert losses.clean != losses.adversarial


def test_the_main_set_sees_clean_images_only():
    """After a batch it is what plain training leaves."""
    method = advprop()
    x, y, before = images(), labels(), set_of(method.model, "clean")
    method(x, y)
    after = set_of(method.model, "clean")
    method.model.load_state_dict({**method.model.state_dict(), **before})
    method.model(x)
    assert differing(after, set_of(method.model, "clean")) == []


@pytest.mark.parametrize(("attack_mode", "expected"), [("train", 4), ("eval", 1)])
def test_the_auxiliary_set_sees_the_adversarial_images(attack_mode, expected):
    method = advprop(steps=3, attack_mode=attack_mode)
    stem = method.model.bn1
    seen = [int(bn.num_batches_tracked) for bn in (stem.clean, stem.adversarial)]
    old, x, y = stem.adversarial.running_mean.clone(), images(), labels()
    state = copy_of_state(method.model)
    perturbed = method.perturb(x, y)
    method.model.load_state_dict(state)
    method(x, y)
    now = [int(bn.num_batches_tracked) for bn in (stem.clean, stem.adversarial)]
    assert [b - a for a, b in zip(seen, now)] == [1, expected]
    if attack_mode == "eval":
        fresh = method.model.conv1(perturbed).mean((0, 2, 3)).detach()
        torch.testing.assert_close(stem.adversarial.running_mean, 0.9 * old + 0.1 * fresh)


@pytest.mark.parametrize("attack_mode", ["train", "eval"])
def test_the_attack_climbs_the_loss_through_the_auxiliary_set(attack_mode):
    method, x, y = advprop(attack_mode=attack_mode), images(), labels()
    found = method.attack(x, y)
    method.train(attack_mode == "train")
    with use_branch(method.model, "adversarial"):
        torch.testing.assert_close(found.losses[0], F.cross_entropy(method.model(x), y).detach())
    assert found.losses.shape == (5,) and (found.losses.diff() > 0).all()
    method.train()
    method.model.bn1.clean.weight.data.mul_(-1)
    if attack_mode == "train":  # it uses no running statistics
        assert torch.equal(method.attack(x, y).losses, found.losses)
    method.model.bn1.adversarial.weight.data.mul_(-1)
    assert not torch.equal(method.attack(x, y).losses, found.losses)


@pytest.mark.parametrize("options", [{}, {"steps": 1}, {"steps": 1, "step_size": 4.0}, {"random_start": True}], ids=str)
def test_an_adversarial_image_is_an_image_within_eps(options):
    method, x, y = advprop(**options), images(), labels()
    perturbed = method.perturb(x, y)
    change = (perturbed - x) * STDS * 255
    reach = min(4.0, options.get("steps", 5) * options.get("step_size", 1.0))
    assert change.abs().max() <= reach + 1e-3 and (change.abs() > reach - 1e-3).float().mean() > 0.3
    pixels = perturbed * STDS + MEANS
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6 and not perturbed.requires_grad


def test_an_attack_in_eval_mode_leaves_no_trace():
    method, x, y = advprop(attack_mode="eval"), images(), labels()
    method(x, y).total.backward()
    method.model.layer3.eval()
    before = traces(method.model)
    method.perturb(x, y)
    assert_same_traces(before, traces(method.model))


@pytest.mark.parametrize("attack_mode", ["train", "eval"])
@pytest.mark.parametrize("call", [1, 4])
def test_modes_and_branches_come_back_after_an_error(attack_mode, call):
    method, calls = advprop(attack_mode=attack_mode), []
    method.model.layer3.eval()

    def stop(*_):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt

    method.model.fc.register_forward_hook(stop)
    x, y = images(), labels()
    before = traces(method.model)
    with pytest.raises(KeyboardInterrupt):
        method(x, y)
    after = traces(method.model)
    if attack_mode == "train":
        before["state"] = after["state"] = {}
    assert_same_traces(before, after)


def test_both_losses_train_every_shared_layer():
    method = advprop()
    losses = method(images(), labels())
    for loss, branch in ((losses.clean, "adversarial"), (losses.adversarial, "clean")):
        method.zero_grad()
        loss.backward(retain_graph=True)
        without = {name for name, p in method.model.named_parameters() if p.grad is None}
        assert without == {name for name, _ in method.model.named_parameters() if f".{branch}." in name}


def test_it_is_tested_through_the_main_set():
    method, x = advprop().eval(), images()
    assert method.branches == ("clean",) and list(method.predictions(x)) == ["clean"]
    assert torch.equal(method.predictions(x)["clean"], method.model(x))
    assert not torch.equal(method.predict(x, "adversarial"), method.model(x))


def test_without_an_auxiliary_set_both_kinds_share_one():
    method = advprop(dual_bn=False)
    before = int(method.model.bn1.num_batches_tracked)
    method(images(), labels())
    assert dual_layers(method.model) == [] and int(method.model.bn1.num_batches_tracked) - before == 5 + 2


def test_a_network_without_batch_norm_is_warned_of():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.warns(UserWarning, match="Sequential has no BatchNorm"):
        method = AdvProp(model, MEAN, STD)
    assert not method.dual_bn and method(images(), labels()).total.isfinite()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdvProp(model, MEAN, STD, dual_bn=False)


def test_a_model_that_has_an_auxiliary_set_keeps_it_or_is_refused():
    model = tiny_network()
    AdvProp(model, MEAN, STD)
    assert AdvProp(model, MEAN, STD).dual_bn
    with pytest.raises(ValueError, match="two BatchNorm sets already"):
        AdvProp(model, MEAN, STD, dual_bn=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": 4 / 255}, "write 4 for 4/255; got 0.015"),
        ({"eps": -4}, "write 4 for 4/255; got -4"),
        ({"eps": float("nan")}, "got nan"),
        ({"eps": 256}, "got 256"),
        ({"steps": 0}, "at least 1 step"),
        ({"step_size": 0}, "step size must be above 0"),
        ({"attack_mode": "test"}, "'train' or 'eval', got 'test'"),
    ],
    ids=str,
)
def test_bad_values_are_refused_before_the_model_is_touched(wrong, message):
    model = tiny_network()
    with pytest.raises(ValueError, match=message):
        AdvProp(model, MEAN, STD, **wrong)
    assert dual_layers(model) == []


def test_images_with_nan_are_refused():
    x = images()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises((FloatingPointError, ValueError), match="nan"):
        advprop()(x, labels())


def test_it_learns_in_the_training_loop():
    train_set = tiny_images(64)
    method = AdvProp(tiny_network(8), train_set.mean, train_set.std, steps=1, step_size=4)
    loader = DeviceLoader(train_set, 32, 0, padding=0, flip=False)
    history = train(method, loader, Schedule(12, 32, 0.1), show_progress=False, precision=torch.float32)
    assert all(end < 0.6 * start for start, end in zip(history.losses[0], history.losses[-1]))
