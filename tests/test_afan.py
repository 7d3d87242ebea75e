"""A-FAN: against the official code's results, and by what its parts must do."""

import copy
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, batch, tiny_images, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import efficientnet_b0, googlenet, resnet18, swin_t

from advbn_lib import SplitError
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.feature_ball import FeatureBall
from advbn_lib.methods.afan import (
    AFAN,
    UNIT,
    FeatureAugmentation,
    Site,
    interpolate,
    reinject,
)
from advbn_lib.models.cifar_resnet import resnet18_for_cifar
from advbn_lib.models.efficientnet import efficientnet_b0_for_cifar
from advbn_lib.statistics import BATCH, POSITION, mean, std
from advbn_lib.tasks import Classification, Cut
from advbn_lib.training import Schedule, train

few = settings(max_examples=25, deadline=None)
GOLDEN = [folder for folder in (Path(__file__).parent / "golden", os.environ.get("ADVBN_GOLDEN")) if folder]
FILES = sorted(path for folder in GOLDEN for path in Path(folder).glob("afan_classification*.npz"))


def afan(*sites: Site, model: nn.Module | None = None, **options) -> AFAN:
    return AFAN(Classification(model or used_before(tiny_network())), sites or [Site("layer1")], **options)


def used_before(model: nn.Module, size: int = 12) -> nn.Module:
    """With running statistics that are not those of a new network."""
    model.train()
    for _ in range(3):
        model(1 + 2 * torch.randn(8, 3, size, size))
    return model


def passes(model: nn.Module, before: dict[str, int] | None = None) -> dict[str, int]:
    """Batches that each BatchNorm saw, since ``before``."""
    now = {name: int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")}
    return {name: count - (before or {}).get(name, 0) for name, count in now.items()}


def below(name: str) -> bool:
    return name.split(".")[0] in ("conv1", "bn1", "relu", "layer1")


# The released code


def golden_network(vectors) -> nn.Module:
    """The network of the golden vectors, behind a layer that does nothing, to be cut at."""
    out, channels = vectors["conv_weight"].shape[:2]
    layers = OrderedDict(
        cut=nn.Identity(), conv=nn.Conv2d(channels, out, 3, padding=1, bias=False), bn=nn.BatchNorm2d(out),
        relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(out, len(vectors["fc_bias"])),
    )  # fmt: skip
    network = nn.Sequential(layers).double()
    own = {name: name.replace(".", "_") for name in network.state_dict() if name != "bn.num_batches_tracked"}
    given = {name: torch.from_numpy(vectors[stored]) for name, stored in own.items()}
    network.load_state_dict({**given, "bn.num_batches_tracked": torch.tensor(0)})
    return network


def assert_golden(ours: torch.Tensor, vectors, name: str) -> None:
    np.testing.assert_allclose(ours.detach().numpy(), vectors[name], rtol=0, atol=1e-9, err_msg=name)


def test_there_are_golden_vectors():
    assert (Path(__file__).parent / "golden" / "afan_classification.npz") in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_matches_the_official_code(path):
    vectors = dict(np.load(path))
    features, targets = torch.from_numpy(vectors["features"]), torch.from_numpy(vectors["targets"])
    network, points = golden_network(vectors), int(vectors["points"])
    site = Site("cut", float(vectors["gamma_over_255"]), int(vectors["steps"]), points)
    method = AFAN(Classification(network, features), [site]).train()
    given = features.clone()
    adversarial = method.change(method.task.cut(features, targets, "cut"), site)
    assert_golden(adversarial, vectors, "adversarial_features")
    assert_golden(network.bn.running_mean, vectors, "bn_running_mean_after")
    assert_golden(network.bn.running_var, vectors, "bn_running_var_after")
    way = interpolate(features, adversarial, points)
    assert_golden(way, vectors, "interpolated")
    assert_golden(torch.stack([reinject(features, point) for point in way]), vectors, "renormalised")
    mixed = Site("cut", points=points, mix="1" * (points - 1))
    for digits, name in ((site, "interpolated"), (mixed, "renormalised")):
        trained_on = torch.stack(list(digits.path(features, adversarial)))
        np.testing.assert_allclose(trained_on.numpy(), vectors[name][1:], rtol=0, atol=1e-9)
    assert torch.equal(features, given)


def staged_network() -> nn.Sequential:
    """Three stages and a head in a row, in double precision, so that a slice of it is a rest of the network."""
    widths = (3, 5, 6, 7)
    stages = [
        nn.Sequential(nn.Conv2d(below, here, 3, padding=1, bias=False), nn.BatchNorm2d(here), nn.ReLU())
        for below, here in zip(widths, widths[1:])
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))
    network = nn.Sequential(OrderedDict(one=stages[0], two=stages[1], three=stages[2], head=head)).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1), nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network


def straight_line(network: nn.Sequential, images, labels, sites: list[Site], clean_weight: float) -> torch.Tensor:
    """The released training loss written out, with nothing of the library in it."""
    total, names = 0.0, [name for name, _ in network.named_children()]
    for site in sites:
        cut = names.index(site.layer) + 1
        clean = network[:cut](images).detach()
        worst = clean.clone()
        for _ in range(site.steps):
            worst.requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(network[cut:](worst), labels), worst)
            worst = worst.detach() + site.gamma / 255 * gradient.sign()
        for k in range(1, site.points):
            point = clean + k / (site.points - 1) * (worst - clean)
            if site.mix[k - 1 : k] == "1":
                deviation, wanted = ((x.var(1, keepdim=True) + 1e-5).sqrt() for x in (clean, point))
                point = wanted * (clean - clean.mean(1, keepdim=True)) / deviation + point.mean(1, keepdim=True)
            total = total + site.weight * F.cross_entropy(network[cut:](point), labels)
    return total + clean_weight * F.cross_entropy(network(images), labels)


def a_site(layer: str):
    """Any site without a ball, which the released settings do not have."""
    mixes = st.integers(2, 5).flatmap(lambda n: st.tuples(st.just(n), st.text("01", min_size=n - 1, max_size=n - 1)))
    return st.builds(
        lambda gamma, steps, way, weight: Site(layer, gamma, steps, *way, weight=weight),
        st.sampled_from([0.1, 0.5, 1.5, 20.0]), st.integers(1, 7), mixes, st.sampled_from([0.1, 0.25, 0.5]),
    )  # fmt: skip


layers = st.lists(st.sampled_from(["one", "two", "three"]), min_size=1, max_size=3)


@given(layers.flatmap(lambda names: st.tuples(*map(a_site, names))), st.booleans(), st.integers(0, 2**31))
@few
def test_loss_gradients_and_buffers_are_those_of_the_method_written_out(sites, training, seed):
    torch.manual_seed(seed)
    network = staged_network().train(training)
    images, labels = torch.randn(6, 3, 8, 6, dtype=torch.float64), torch.randint(0, 4, (6,))
    written_out = copy.deepcopy(network)
    ours = AFAN(Classification(network, images), sites, clean_weight=0.6)(images, labels).total
    expected = straight_line(written_out, images, labels, sites, 0.6)
    exact = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(ours, expected, **exact)
    ours.backward(), expected.backward()
    for (name, mine), theirs in zip(network.named_parameters(), written_out.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, **exact, msg=lambda text, name=name: f"{name}: {text}")
    for (name, mine), theirs in zip(network.named_buffers(), written_out.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, **exact, msg=lambda text, name=name: f"{name}: {text}")


def test_the_defaults_are_those_released_for_cifar10():
    site, method = Site("layer1"), afan()
    assert (site.gamma, site.steps, site.points, site.mix, site.weight) == (0.5, 5, 2, "", 0.5)
    assert (site.eps, site.random_start, site.over) == (None, False, "channels")
    assert site.ball == FeatureBall(None) and site.climb.direction == "sign" and site.climb.keep == "last"
    assert method.clean_weight == 0.5 and method.attack_mode == "train"
    assert site.reach == pytest.approx(2.5 / 255)


# The site: what is refused, how far it reaches, what it trains on


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"points": 1}, "at least 2, got 1"),
        ({"points": 0}, "at least 2, got 0"),
        ({"points": 5, "mix": "011"}, "each of the 4 points.*'011'"),
        ({"points": 5, "mix": "00111"}, "each of the 4 points.*'00111'"),
        ({"points": 3, "mix": "02"}, "0 or 1.*'02'"),
        ({"over": "spatial"}, "'channels' or 'batch', got 'spatial'"),
        ({"random_start": True}, "give eps"),
        ({"eps": 0}, "eps must be above 0"),
        ({"eps": -2.0}, "eps must be above 0"),
        ({"eps": float("nan")}, "eps must be above 0"),
        ({"gamma": 0}, "step size must be above 0"),
        ({"gamma": -0.5}, "step size must be above 0"),
        ({"gamma": float("nan")}, "step size must be above 0"),
        ({"steps": 0}, "at least 1 step, got 0"),
    ],
    ids=str,
)
def test_a_bad_site_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Site("layer1", **wrong)


def cut_of(features: torch.Tensor, slope: torch.Tensor) -> Cut:
    """A linear rest of the model: the ascent goes along ``sign(slope)`` at every step."""
    return Cut(features, lambda x: (slope * x).flatten(1).sum(1))


@given(
    gamma=st.floats(0.01, 5), steps=st.integers(1, 6), eps=st.none() | st.floats(0.01, 10), random_start=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@few
def test_no_entry_gets_farther_than_the_reach_and_some_get_there(gamma, steps, eps, random_start, seed):
    torch.manual_seed(seed)
    site = Site("layer1", gamma, steps, eps=eps, random_start=random_start and eps is not None)
    features, slope = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    change = METHOD.change(cut_of(features, slope), site) - features
    assert change.abs().max() <= site.reach * (1 + 1e-9)
    if not site.random_start:
        torch.testing.assert_close(change, site.reach * slope.sign())
    else:
        assert change.abs().max() >= 0.8 * site.reach
        assert change.unique().numel() > 2 or site.reach <= steps * gamma * UNIT  # begun from noise


METHOD = AFAN(Classification(tiny_network()), [Site("layer1")])


def test_a_ball_keeps_the_change_inside_at_every_step():
    seen = []

    def loss(x):
        seen.append((x.detach() - features).abs().max().item() / UNIT)
        return x.flatten(1).sum(1)

    features = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    METHOD.change(Cut(features, loss), Site("layer1", gamma=0.5, steps=5, eps=1.2))
    assert seen == pytest.approx([0, 0.5, 1.0, 1.2, 1.2])


def test_the_points_are_in_equal_steps_from_the_clean_to_the_adversarial_feature():
    clean, adversarial = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    way = interpolate(clean, adversarial, 5)
    assert way.shape == (5, 2, 3, 4, 5)
    for share, point in zip((0, 0.25, 0.5, 0.75, 1), way):
        torch.testing.assert_close(point, (1 - share) * clean + share * adversarial)
    assert torch.equal(way[0], clean)


@pytest.mark.parametrize(
    ("points", "mix"), [(2, ""), (2, "1"), (3, "01"), (3, "10"), (5, "0011"), (5, "1100"), (4, "")]
)
@pytest.mark.parametrize("over", ["channels", "batch"])
def test_each_digit_mixes_its_point_the_first_the_weakest(points, mix, over):
    clean, adversarial = torch.randn(2, 4, 3, 5, 5)
    site, axes = Site("layer1", points=points, mix=mix, over=over), POSITION if over == "channels" else BATCH
    trained_on = list(site.path(clean, adversarial))
    assert len(trained_on) == points - 1
    for number, features in enumerate(trained_on, start=1):
        point = clean + number / (points - 1) * (adversarial - clean)
        mixed = mix[number - 1 :].startswith("1")
        torch.testing.assert_close(features, reinject(clean, point, axes) if mixed else point)


shapes = st.sampled_from([((4, 6, 3, 5), POSITION), ((4, 6, 3, 5), BATCH), ((8, 16), POSITION), ((8, 16), (0,))])


@given(shape_and_axes=shapes, seed=st.integers(0, 2**31), scale=st.floats(0.1, 10), shift=st.floats(-10, 10))
@few
def test_reinjection_gives_the_others_statistics_and_keeps_the_shape_of_the_clean_feature(
    shape_and_axes, seed, scale, shift
):
    (shape, axes), generator = shape_and_axes, torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    other = scale * noise + shift
    result = reinject(clean, other, axes)
    torch.testing.assert_close(mean(result, axes), mean(other, axes))
    # The 1e-5 in the clean feature's variance makes the result's spread a little smaller.
    exact = std(other, axes) * std(clean, axes, eps=0) / std(clean, axes)
    torch.testing.assert_close(std(result, axes, eps=0), exact)
    ranks = [x.movedim(axes[0], -1).argsort(-1) for x in (clean, result)]
    assert len(axes) > 1 or torch.equal(*ranks)  # scaled and shifted, no more
    torch.testing.assert_close(reinject(clean, clean, axes), clean)


def test_the_released_statistics_are_those_of_each_position():
    clean, other = torch.randn(2, 4, 6, 3, 5)
    result, single = reinject(clean, other), reinject(clean[1:2, :, 2:3, 3:4], other[1:2, :, 2:3, 3:4])
    torch.testing.assert_close(result[1:2, :, 2:3, 3:4], single)


@pytest.mark.parametrize("axes", [POSITION, BATCH])
def test_constant_features_stay_finite(axes):
    constant, other = torch.full((4, 6, 3, 5), 7.0), torch.randn(4, 6, 3, 5)
    torch.testing.assert_close(reinject(constant, other, axes), mean(other, axes).expand_as(other))
    flattened = reinject(other, constant, axes)
    assert flattened.isfinite().all() and (flattened - 7).abs().max() < 0.02  # sqrt(1e-5) is left of the spread


@pytest.mark.parametrize("over", ["channels", "batch"])
def test_a_site_mixes_vectors_too(over):
    clean, other = torch.randn(2, 8, 16)
    (result,) = Site("layer1", mix="1", over=over).path(clean, other)
    axes = (1,) if over == "channels" else (0,)
    torch.testing.assert_close(result.mean(axes), other.mean(axes))
    torch.testing.assert_close(result.std(axes), other.std(axes), rtol=1e-4, atol=1e-4)


# The ball


def test_the_ball_starts_at_no_change_and_cuts_at_its_radius():
    x, ball = torch.randn(4, 3, 5, 5), FeatureBall(0.25)
    assert torch.equal(ball.apply(x, ball.start(x)), x) and ball.per_sample
    delta = (torch.linspace(-1, 1, 300).view(4, 3, 5, 5),)
    assert torch.equal(ball.project(x, delta)[0], delta[0].clamp(-0.25, 0.25))
    assert torch.equal(ball.apply(x, delta), x + delta[0])
    assert FeatureBall(None).project(x, delta)[0] is delta[0]


def test_draws_from_the_ball_fill_it_evenly_and_are_repeatable():
    x = torch.zeros(4, 10, 100)
    (first,), (again,) = (FeatureBall(0.25).sample(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    counts = torch.histc(first, bins=10, min=-0.25, max=0.25)
    assert counts.sum() == 4000  # none outside
    assert (counts - 400).abs().max() < 100  # 5 standard deviations


@pytest.mark.parametrize("eps", [0, -0.1, float("nan")])
def test_a_bad_radius_is_refused(eps):
    with pytest.raises(ValueError, match=f"eps must be above 0, or None for no bound, got {eps}"):
        FeatureBall(eps)
    with pytest.raises(ValueError, match="give it an eps"):
        FeatureBall(None).sample(torch.zeros(2, 3))


# The attack


def test_the_attack_climbs():
    method = afan(Site("layer1", gamma=5.0)).eval()
    images, labels = batch()
    cut = method.task.cut(images, labels, "layer1")
    found = method.attack(cut, method.sites[0])
    assert found.losses.shape == (5,) and (found.losses.diff() > 0).all()
    torch.testing.assert_close(found.losses[0], cut.loss(cut.features).mean())
    changed = method.change(cut, method.sites[0])
    torch.testing.assert_close(changed, cut.features + found.delta[0])
    assert cut.loss(changed).mean() > found.losses[-1] and not changed.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_an_attack_in_eval_mode_leaves_no_trace(training):
    method = afan(attack_mode="eval").train(training)
    images, labels = batch()
    method(images, labels).total.backward()  # so that there are gradients to spoil
    method.model.layer3.train(not training)
    method.model.fc.weight.requires_grad_(False)
    cut = method.task.cut(images, labels, "layer1")
    before = traces(method.model)
    method.change(cut, method.sites[0])
    assert_same_traces(before, traces(method.model))


def test_an_attack_in_train_mode_updates_running_statistics_and_nothing_else():
    method = afan().train()
    images, labels = batch()
    cut = method.task.cut(images, labels, "layer1")
    before, seen = traces(method.model), passes(method.model)
    method.change(cut, method.sites[0])
    assert passes(method.model, seen) == {name: 0 if below(name) else 5 for name in seen}
    after = traces(method.model)
    for state in (before["state"], after["state"]):
        for name in [name for name in state if "running" in name or "tracked" in name]:
            del state[name]
    assert_same_traces(before, after)


def test_the_attack_uses_the_mode_that_was_asked_for():
    images, labels = batch()
    found = {}
    for attack_mode in ("train", "eval"):
        torch.manual_seed(1)
        method = afan(attack_mode=attack_mode).train()
        cut = method.task.cut(images, labels, "layer1")
        found[attack_mode] = method.attack(cut, method.sites[0]).losses[0]
        method.train(attack_mode == "train")
        torch.testing.assert_close(found[attack_mode], cut.loss(cut.features).mean().detach())
    assert (found["train"] - found["eval"]).abs() > 1e-3


@pytest.mark.parametrize("attack_mode", ["train", "eval"])
@pytest.mark.parametrize("call", [1, 3, 5])
def test_modes_come_back_after_an_error_inside_the_ascent(attack_mode, call):
    method = afan(attack_mode=attack_mode).train()
    method.model.layer3.eval()
    images, labels = batch()
    cut, calls = method.task.cut(images, labels, "layer1"), []

    def stop(*_):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt

    method.model.fc.register_forward_hook(stop)
    before = traces(method.model)
    with pytest.raises(KeyboardInterrupt):
        method.change(cut, method.sites[0])
    after = traces(method.model)
    if attack_mode == "train":
        del before["state"], after["state"]
        before["state"] = after["state"] = {}
    assert_same_traces(before, after)


def test_features_with_nan_are_refused():
    images, labels = batch()
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0 of 5"):
        afan().train()(images, labels)


def test_bfloat16_is_warned_of_and_float32_is_not():
    images, labels = batch()
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="bfloat16.*precision=torch.float32"):
        afan()(images, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        afan()(images, labels)


def test_without_a_random_start_no_random_number_is_drawn():
    method, (images, labels) = afan().train(), batch()
    before = torch.get_rng_state()
    method(images, labels)
    assert torch.equal(torch.get_rng_state(), before)


# The losses


SITES = [
    [Site("layer1")],
    [Site("layer1", points=5, mix="0011", weight=0.2)],
    [Site("relu", points=3, mix="01", over="batch", weight=0.1), Site("layer2", steps=2, weight=0.3)],
]
IDS = ["released", "points", "two-sites"]


@pytest.mark.parametrize("sites", SITES, ids=IDS)
@pytest.mark.parametrize("clean_weight", [0.5, 0.7])
def test_the_loss_is_the_weighted_sum_over_the_sites_and_their_points(sites, clean_weight):
    method, (images, labels) = afan(*sites, clean_weight=clean_weight).eval(), batch()
    losses = method(images, labels)
    clean = F.cross_entropy(method.model(images), labels)
    total, weights = clean_weight * clean, 0.0
    for site in sites:
        split = method.task.split(site.layer)
        features = split.features(images).detach()
        adversarial = method.change(method.task.cut(images, labels, site.layer), site)
        for k in range(1, site.points):
            point = features + k / (site.points - 1) * (adversarial - features)
            if site.mix and site.mix[k - 1] == "1":
                point = reinject(features, point, POSITION if site.over == "channels" else BATCH)
            total, weights = total + site.weight * F.cross_entropy(split.tail(point), labels), weights + site.weight
    torch.testing.assert_close(losses.clean, clean)
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(losses.adversarial, (total - clean_weight * clean) / weights)
    assert losses.adversarial > losses.clean


@pytest.mark.parametrize("sites", SITES, ids=IDS)
def test_batch_norm_moves_as_often_as_in_the_released_code(sites):
    """Released: 2 times below the cut, 7 times above it."""
    method = afan(*sites).train()
    before = passes(method.model)
    method(*batch())
    order = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3")
    expected = {}
    for name in before:
        depth = order.index(name.split(".")[0])
        tails = (site.steps + site.points - 1 for site in sites if depth > order.index(site.layer))
        cuts = sum(depth <= order.index(site.layer) for site in sites)
        expected[name] = 1 + cuts + sum(tails)
    assert passes(method.model, before) == expected
    if sites is SITES[0]:
        assert set(expected.values()) == {2, 7}


def test_the_clean_pass_comes_last():
    method, calls = afan().train(), []
    method.model.conv1.register_forward_hook(lambda *_: calls.append("stem"))
    method.model.fc.register_forward_hook(lambda *_: calls.append("head"))
    method(*batch())
    assert calls == ["stem", *["head"] * 6, "stem", "head"]


def test_the_augmented_loss_trains_the_layers_above_the_site_only():
    method, (images, labels) = afan().train(), batch()
    method(images, labels).adversarial.backward()
    without = {name for name, p in method.model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in method.model.named_parameters() if below(name)}
    above = [p.grad for name, p in method.model.named_parameters() if not below(name)]
    assert all(gradient.abs().max() > 0 for gradient in above)


def test_the_layers_below_get_the_clean_losss_gradient_times_its_weight():
    method, (images, labels) = afan(clean_weight=0.3).train(), batch()
    method(images, labels).total.backward()
    gradient = method.model.conv1.weight.grad.clone()
    method.model.zero_grad()
    F.cross_entropy(method.model(images), labels).backward()
    torch.testing.assert_close(gradient, 0.3 * method.model.conv1.weight.grad)


def test_all_parameters_are_trained():
    method = afan()
    assert {id(p) for p in method.trainable_parameters()} == {id(p) for p in method.model.parameters()}


def test_bad_methods_are_refused():
    with pytest.raises(SplitError, match="no layer 'layer9'.*layer3"):
        afan(Site("layer1"), Site("layer9"))
    with pytest.raises(ValueError, match="at least one site"):
        AFAN(Classification(tiny_network()), [])
    with pytest.raises(ValueError, match="'train' or 'eval', got 'test'"):
        afan(attack_mode="test")
    with pytest.raises(NotImplementedError, match="FeatureAugmentation must say"):
        FeatureAugmentation(Classification(tiny_network()), [Site("layer1")])(*batch())


NETWORKS = [
    (resnet18_for_cifar, "layer2"),
    (efficientnet_b0_for_cifar, "features.3"),
    (efficientnet_b0_for_cifar, "features.0"),
]


@pytest.mark.parametrize(("build", "layer"), NETWORKS, ids=["resnet18", "efficientnet", "efficientnet-stem"])
def test_it_runs_on_other_networks(build, layer):
    model = build(num_classes=7)
    method = AFAN(
        Classification(model, torch.zeros(2, 3, 16, 16)), [Site(layer, steps=2, points=3, mix="01", weight=0.25)]
    ).train()
    images, labels = batch(4, 16, 7)
    losses = method(images, labels)
    losses.total.backward()
    assert losses.total.isfinite() and all(p.grad is not None for p in model.parameters())
    assert model.eval()(images).shape == (4, 7)


@pytest.mark.parametrize(("build", "layer"), [(resnet18, "layer2"), (efficientnet_b0, "features.3")])
@pytest.mark.parametrize("training", [True, False])
def test_the_cut_of_a_torchvision_network_has_the_loss_of_the_whole_and_leaves_it_as_it_was(build, layer, training):
    model = build(num_classes=7)
    task, (images, labels) = Classification(model, torch.zeros(2, 3, 32, 32)), batch(3, 32, 7)
    if training:  # live BatchNorms update themselves in train mode: that is the mode's doing, not the cut's
        for module in model.train().modules():
            module.momentum = 0.0
    else:
        model.eval()
    task.check(layer)
    before = traces(model)
    torch.manual_seed(1)
    cut = task.cut(images, labels, layer)
    halves = cut.loss(cut.features)
    torch.manual_seed(1)  # EfficientNet leaves out branches at random
    whole = task.loss(images, labels)
    torch.testing.assert_close(halves.mean(), whole)
    AFAN(task, [Site(layer)], attack_mode="eval").attack(cut, Site(layer))
    after = traces(model) | {"random": before["random"]}
    for state in (before["state"], after["state"]):
        for name in [name for name in state if name.endswith("num_batches_tracked")]:
            del state[name]
    assert_same_traces(before, after)


def test_a_network_that_cannot_be_cut_there_is_refused():
    with pytest.raises(SplitError, match=r"N,H,W,C, not N,C,H,W"):
        AFAN(Classification(swin_t(num_classes=3)), [Site("features.1")])
    with pytest.raises(SplitError, match="aux_logits=False"):
        AFAN(Classification(googlenet(num_classes=3, init_weights=False)), [Site("inception3a")])


def test_efficientnet_for_small_images_keeps_its_resolution_at_the_stem():
    model = efficientnet_b0_for_cifar(100).eval()
    images = torch.randn(1, 3, 32, 32)
    assert model.features[0](images).shape == (1, 32, 32, 32)
    assert model.features(images).shape == (1, 1280, 2, 2) and model(images).shape == (1, 100)


def test_it_learns_in_the_training_loop():
    method = afan(model=tiny_network(8))
    images = tiny_images(64)
    history = train(
        method, DeviceLoader(images, 32, 0, padding=0, flip=False), Schedule(15, 32, 0.1), show_progress=False,
        precision=torch.float32,
    )  # fmt: skip
    assert history.losses[-1][0] < 0.5 * history.losses[0][0]
    assert history.losses[-1][1] < 0.5 * history.losses[0][1]
