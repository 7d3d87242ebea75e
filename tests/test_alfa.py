"""L-ALFA: the strengths are learnt as the released rule says, and survive a killed run."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import batch, copy_of_state, differing, tiny_images, tiny_network

from advbn_lib import SplitError
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.methods.alfa import RESNET56, LearnableAFAN, Strengths, spread_positions
from advbn_lib.models import CifarResNet
from advbn_lib.tasks import Classification
from advbn_lib.training import Schedule, train

LAYERS = ("relu", "layer1", "layer3")


def alfa(layers=LAYERS, **options) -> LearnableAFAN:
    return LearnableAFAN(Classification(tiny_network()), layers, **options).train()


def pushed(method: LearnableAFAN, *w: float) -> LearnableAFAN:
    """With other strengths."""
    method.w.copy_(torch.tensor(w))
    return method


def test_the_defaults_are_the_released_ones():
    method = LearnableAFAN(Classification(CifarResNet(56, 2)))
    assert [site.layer for site in method.sites] == list(RESNET56)
    assert {(site.steps, site.gamma, site.points, site.mix) for site in method.sites} == {(3, 1.0, 2, "")}
    assert torch.equal(method.w, torch.full((9,), 1 / 9)) and method.attack_mode == "train"
    assert (method.clean_weight, method.weight, method.strengths) == (0.5, 0.5, Strengths(1.0, 0.01, 0.9))
    shapes = [tuple(method.task.cut(*batch(2, 32), site.layer).features.shape[1:]) for site in method.sites]
    assert shapes == [(2, 32, 32)] * 3 + [(4, 16, 16)] * 3 + [(8, 8, 8)] * 3


def test_positions_spread_over_any_depth():
    assert spread_positions(CifarResNet(56, 2)) == RESNET56
    for depth in (8, 20, 110):
        model = CifarResNet(depth, 2)
        names, last = dict(model.named_modules()), f"layer3.{(depth - 2) // 6 - 1}"
        for count in range(2, 5):
            found = spread_positions(model, count)
            assert len(set(found)) == count and set(found) <= set(names) and (found[0], found[-1]) == ("relu", last)
    assert spread_positions(CifarResNet(8, 2), 4) == ("relu", "layer1.0", "layer2.0", "layer3.0")
    for count in (1, 5):
        with pytest.raises(ValueError, match=f"4 positions: take 2 to 4 of them, got {count}"):
            spread_positions(CifarResNet(8, 2), count)


def test_the_loss_is_that_of_the_source():
    method, (images, labels) = pushed(alfa(clean_weight=0.4, weight=0.7), 0.9, 0.4, -0.3).eval(), batch()
    losses = method(images, labels)
    clean, changed = F.cross_entropy(method.model(images), labels), []
    for strength, site in zip((0.9, 0.4, -0.3), method.sites):
        cut = method.task.cut(images, labels, site.layer)
        mixed = cut.features + strength * (method.change(cut, site) - cut.features)
        changed.append(F.cross_entropy(method.task.split(site.layer).tail(mixed), labels))
    mean = sum(changed) / 3
    torch.testing.assert_close(losses.clean, clean)
    torch.testing.assert_close(losses.adversarial, mean)
    torch.testing.assert_close(losses.total, 0.4 * clean + 0.7 * mean + (0.9 + 0.4 + 0.3))


def derivative(method: LearnableAFAN, images, labels, i: int, h: float = 1e-3) -> float:
    """Of the loss for strength i, by a difference: the adversarial features do not depend on the strengths."""
    w, ends = method.w.clone(), []
    for sign in (1, -1):
        method.w.copy_(w)
        method.w[i] += sign * h
        with torch.no_grad():
            ends.append(method(images, labels).total.item())
    method.w.copy_(w)
    return (ends[0] - ends[1]) / (2 * h)


def test_a_backward_pass_steps_the_strengths_down_the_loss_and_keeps_their_sum():
    method, (images, labels) = alfa(strengths=Strengths(0.5, 0.1, 0.9), gamma=20.0).double().eval(), batch()
    images = images.double()
    pushed(method, 0.7, 0.5, -0.2)
    reference = torch.nn.Parameter(method.w.clone())
    optimizer = torch.optim.SGD([reference], lr=0.1, momentum=0.9)
    for _ in range(3):
        slopes = [derivative(method, images, labels, i) for i in range(3)]
        reference.grad = torch.tensor(slopes, dtype=torch.float64)
        optimizer.step()
        with torch.no_grad():
            reference -= (reference.sum() - 1) / 3
        method(images, labels).total.backward()
        torch.testing.assert_close(method.w, reference.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method.w.sum().item(), 1.0)
    assert (reference - torch.tensor([0.7, 0.5, -0.2])).abs().min() > 1e-3  # each has moved


def test_the_penalty_lifts_negative_strengths_and_does_nothing_without_one():
    images, labels = batch()
    ends = {}
    for w in ((0.5, 0.3, 0.2), (0.7, 0.5, -0.2)):
        for penalty in (0.0, 3.0):
            torch.manual_seed(1)
            method = pushed(alfa(strengths=Strengths(penalty)).eval(), *w)
            method(images, labels).total.backward()
            ends[w, penalty] = method.w
    torch.testing.assert_close(ends[(0.5, 0.3, 0.2), 0.0], ends[(0.5, 0.3, 0.2), 3.0], rtol=0, atol=1e-6)
    assert ends[(0.7, 0.5, -0.2), 3.0][2] > ends[(0.7, 0.5, -0.2), 0.0][2] + 0.03


def test_looking_does_not_learn():
    method, (images, labels) = alfa(), batch()
    method(images, labels)
    with torch.no_grad():
        method(images, labels)
    method.predict(images)
    assert torch.equal(method.w, torch.full((3,), 1 / 3)) and not method.momentum.any()


def test_strengths_are_kept_with_the_method_but_not_given_to_the_optimiser():
    method = alfa()
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in method.model.parameters()}
    assert {id(p) for p in method.parameters()} == {id(p) for p in method.model.parameters()}
    assert {"w", "momentum"} <= set(method.state_dict())


def test_a_copy_learns_for_itself():
    method, (images, labels) = alfa(), batch()
    other = copy.deepcopy(method)
    other(images, labels).total.backward()
    assert torch.equal(method.w, torch.full((3,), 1 / 3)) and other.momentum.all()
    method(images, labels).total.backward()
    torch.testing.assert_close(method.w, other.w)


def test_the_changed_features_train_the_layers_above_them_only():
    method, (images, labels) = alfa(("layer2", "layer3")), batch()
    method(images, labels).adversarial.backward()
    trained = {name for name, p in method.model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in method.model.named_parameters() if name.startswith(("layer3", "fc"))}


class Killed(Exception):
    pass


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    images, checkpoint = tiny_images(64), tmp_path / "checkpoint"
    schedule = Schedule(3, 16, 0.05)

    def run(path, kill_at: int | None = None, seed: int = 0) -> LearnableAFAN:
        torch.manual_seed(seed)
        method, batches = alfa(strengths=Strengths(lr=0.1)), []

        def count(*_):
            batches.append(None)
            if len(batches) == kill_at:
                raise Killed

        method.register_forward_pre_hook(count)
        loader = DeviceLoader(images, 16, 0)
        train(method, loader, schedule, path, "run", show_progress=False, precision=torch.float32)
        return method

    whole = run(None)
    with pytest.raises(Killed):
        run(checkpoint, kill_at=7)
    resumed = run(checkpoint, seed=99)
    assert differing(copy_of_state(whole), copy_of_state(resumed)) == []
    assert (whole.w - 1 / 3).abs().max() > 1e-4 and whole.momentum.all()
    torch.testing.assert_close(whole.w.sum().item(), 1.0)


def test_bad_values_are_refused():
    with pytest.raises(SplitError, match="no layer 'layer1.3'"):  # ResNet-56's positions on a ResNet-8
        alfa(RESNET56)
    with pytest.raises(ValueError, match="at least one site"):
        alfa(())
    with pytest.raises(ValueError, match="name it once, got layer1, layer1"):
        alfa(("layer1", "layer1"))
    for wrong in ({"penalty": -1}, {"lr": -0.1}, {"momentum": 1.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=f"got.*{next(iter(wrong.values()))}"):
            Strengths(**wrong)


def test_float16_is_refused_because_its_loss_is_scaled():
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="precision=torch.float32"):
        alfa()(*batch())
