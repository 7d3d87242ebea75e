"""A-FAN's controls do what A-FAN does, but for the one thing that each leaves out."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, batch, copy_of_state, differing, tiny_network, traces

from advbn_lib import PlainTraining
from advbn_lib.methods.afan import AFAN, UNIT, Site
from advbn_lib.methods.feature_controls import ExtraForwards, FeatureNoise, UnchangedFeatures
from advbn_lib.tasks import Classification

SITES = [
    Site("layer1"), Site("layer2", points=5, mix="0011", weight=0.2), Site("relu", gamma=2, eps=3, weight=0.1),
]  # fmt: skip


def of_type(kind, *sites, seed: int = 1):
    """A method on a network that depends on the seed alone."""
    torch.manual_seed(seed)
    return kind(Classification(tiny_network()), sites or SITES[:1]).train()


def passes(model) -> dict[str, int]:
    return {name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.layer)
def test_noise_fills_what_the_steps_can_reach_evenly(site):
    method, (images, labels) = of_type(FeatureNoise, site), batch(16)
    cut = method.task.cut(images, labels, site.layer)
    noise = method.change(cut, site) - cut.features
    assert noise.abs().max() <= site.reach * (1 + 1e-4)
    share = torch.histc(noise, bins=10, min=-site.reach, max=site.reach) / noise.numel()
    assert (share - 0.1).abs().max() < 0.02
    assert site.reach == pytest.approx({"layer1": 2.5, "layer2": 2.5, "relu": 3}[site.layer] * UNIT)


def test_noise_is_seeded_new_for_each_batch_and_blind_to_the_targets():
    method, (images, labels) = of_type(FeatureNoise), batch()
    site = method.sites[0]
    cut, other = (method.task.cut(images, targets, site.layer) for targets in (labels, (labels + 1) % 10))
    torch.manual_seed(5)
    first, second = method.change(cut, site), method.change(cut, site)
    torch.manual_seed(5)
    assert torch.equal(method.change(other, site), first) and not torch.equal(first, second)


@pytest.mark.parametrize("kind", [FeatureNoise, UnchangedFeatures])
def test_the_changed_features_are_trained_on_as_afans_are(kind):
    method, (images, labels) = of_type(kind, SITES[1], SITES[2]).eval(), batch()
    torch.manual_seed(3)
    losses = method(images, labels)
    torch.manual_seed(3)
    clean, total = F.cross_entropy(method.model(images), labels), 0.0
    for site in method.sites:
        cut = method.task.cut(images, labels, site.layer)
        for features in site.path(cut.features, method.change(cut, site)):
            total = total + site.weight * cut.loss(features).mean()
    torch.testing.assert_close(losses.total, 0.5 * clean + total)
    torch.testing.assert_close(losses.adversarial, total / (4 * 0.2 + 0.1))
    torch.testing.assert_close(losses.clean, clean)


def test_unchanged_features_give_the_clean_loss_twice():
    method, (images, labels) = of_type(UnchangedFeatures), batch()
    losses = method(images, labels)
    torch.testing.assert_close(losses.adversarial, losses.clean)
    torch.testing.assert_close(losses.total, losses.clean)
    losses.total.backward()
    plain = of_type(lambda task, _: PlainTraining(task.model))
    plain(images, labels).total.backward()
    above, below = method.model.layer2[0].conv1.weight.grad, method.model.conv1.weight.grad
    torch.testing.assert_close(above, plain.model.layer2[0].conv1.weight.grad)
    torch.testing.assert_close(below, 0.5 * plain.model.conv1.weight.grad)


def test_extra_forwards_have_the_gradients_of_plain_training_and_other_running_statistics():
    extra, plain = of_type(ExtraForwards, *SITES[:2]), of_type(lambda task, _: PlainTraining(task.model))
    images, labels = batch()
    for method in (extra, plain):
        losses = method(images, labels)
        losses.total.backward()
        assert losses.total is losses.clean and losses.adversarial is None
    assert differing(gradients(extra.model), gradients(plain.model)) == []
    moved = differing(copy_of_state(extra.model), copy_of_state(plain.model))
    assert moved and all("running" in name or "tracked" in name for name in moved)
    assert {name for name in moved if "running_mean" in name} == {
        name for name in copy_of_state(plain.model) if "running_mean" in name
    }


@pytest.mark.parametrize("sites", [SITES[:1], SITES[1:2], SITES], ids=["released", "points", "several"])
def test_extra_forwards_pass_through_each_batch_norm_as_often_as_afan(sites):
    counts = []
    for kind in (AFAN, ExtraForwards):
        method = of_type(kind, *sites)
        method(*batch())
        counts.append(passes(method.model))
    assert counts[0] == counts[1]


def test_in_eval_mode_extra_forwards_do_nothing():
    method, (images, labels) = of_type(ExtraForwards).eval(), batch()
    before = traces(method.model)
    method(images, labels)
    assert_same_traces(before, traces(method.model))


@pytest.mark.parametrize("kind", [FeatureNoise, UnchangedFeatures])
def test_no_control_looks_for_the_worst(kind):
    """They pass each BatchNorm above the site once for each point and once for the clean features."""
    method = of_type(kind)
    method(*batch())
    counts = passes(method.model)
    assert set(counts.values()) == {2}


def test_the_extra_passes_keep_no_graph():
    method, kept = of_type(ExtraForwards), []
    method.model.fc.register_forward_hook(lambda *_: kept.append(torch.is_grad_enabled()))
    method(*batch())
    assert kept == [False] * 6 + [True]
