"""The one inner loop: against the official code's results, and by what any ascent must do."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import copy_of_state, differing
from torch import nn

from advbn_lib import AdvBN, ChannelStatistics, Steps, ascend

GOLDEN = [folder for folder in (Path(__file__).parent / "golden", os.environ.get("ADVBN_GOLDEN")) if folder]
FILES = sorted(path for folder in GOLDEN for path in Path(folder).glob("advbn_resnet*.npz"))


def golden_network(vectors) -> nn.Module:
    """The network of the golden vectors, behind a layer that does nothing, to be cut at."""
    out, channels = vectors["conv_weight"].shape[:2]
    layers = OrderedDict(
        cut=nn.Identity(), conv=nn.Conv2d(channels, out, 3, padding=1, bias=False), bn=nn.BatchNorm2d(out), relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(out, len(vectors["fc_bias"])),
    )  # fmt: skip
    network = nn.Sequential(layers).double()
    named = {
        name.replace("_", ".", 1): torch.from_numpy(vectors[name])
        for name in vectors
        if name.startswith(("conv_", "bn_", "fc_"))
    }
    network.load_state_dict({**named, "bn.num_batches_tracked": torch.tensor(0)})
    return network


def attack_by_loop(vectors, network, features, targets):
    perturbation = ChannelStatistics(float(vectors["eps"]), bool(vectors["clamp_at_zero"]))
    steps = Steps(int(vectors["steps"]), float(vectors["step_size"]))
    network.eval()
    found = ascend(lambda x: F.cross_entropy(network(x), targets, reduction="none"), features, perturbation, steps)
    return found, perturbation.apply(features, found.delta)


def attack_by_method(vectors, network, features, targets):
    method = AdvBN(
        network, "cut", float(vectors["eps"]), float(vectors["step_size"]), int(vectors["steps"]),
        clamp_at_zero=bool(vectors["clamp_at_zero"]), example=features,
    )  # fmt: skip
    method.train()
    return method.attack(features, targets), method.perturb(features, targets)


def test_there_are_golden_vectors():
    assert (Path(__file__).parent / "golden" / "advbn_resnet.npz") in FILES


@pytest.mark.parametrize("attack", [attack_by_loop, attack_by_method])
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_matches_the_official_code(path, attack):
    vectors = dict(np.load(path))
    features, targets = torch.from_numpy(vectors["features"]), torch.from_numpy(vectors["targets"])
    network, given = golden_network(vectors), features.clone()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    found, changed = attack(vectors, network, features, targets)
    mean_factor, std_factor = found.delta
    for ours, name in (
        (found.losses, "loss_at_each_step"),
        (mean_factor, "mean_factor"),
        (std_factor, "std_factor"),
        (changed, "adversarial_features"),
    ):
        np.testing.assert_allclose(
            ours.numpy().reshape(vectors[name].shape), vectors[name], rtol=0, atol=1e-9, err_msg=name
        )
    assert torch.equal(features, given)
    after = {
        name.replace("bn.clean", "bn"): buffer
        for name, buffer in network.named_buffers()
        if ".adversarial." not in name
    }
    assert differing(buffers, after) == []


def squared_distance(target: torch.Tensor):
    """Convex in the factors, so that every projected step up goes up."""
    return lambda x: (x - target).square().flatten(1).sum(1)


def test_losses_rise_on_a_convex_problem():
    x, target = torch.rand(4, 3, 5, 5).double(), torch.randn(4, 3, 5, 5).double()
    for direction in ("sign", "l2"):
        losses = ascend(
            squared_distance(target), x, ChannelStatistics(clamp_at_zero=False), Steps(10, 0.1, direction)
        ).losses
        assert losses.shape == (10,)
        assert (losses.diff() > 0).all()


def test_a_linear_problem_is_solved_at_the_corner_of_the_set():
    x = torch.rand(4, 2, 5, 5) + torch.rand(4, 2, 1, 1)
    weight = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    found = ascend(
        lambda x: (weight * x).flatten(1).sum(1), x, ChannelStatistics(0.5, clamp_at_zero=False), Steps(6, 0.2)
    )
    torch.testing.assert_close(found.delta[0].flatten(), torch.tensor([1.5, 0.5]))


def test_the_papers_values_reach_from_slightly_below_zero_to_a_little_over_two():
    x, path = torch.rand(4, 2, 5, 5) + 1, []

    def objective(changed: torch.Tensor) -> torch.Tensor:
        path.append((changed.detach().mean((0, 2, 3)) / x.mean((0, 2, 3))).tolist())
        return (changed * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)).flatten(1).sum(1)

    found = ascend(objective, x, ChannelStatistics(clamp_at_zero=False))
    path.append(found.delta[0].flatten().tolist())
    np.testing.assert_allclose(
        np.transpose(path), [[1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.1], [1, 0.8, 0.6, 0.4, 0.2, 0.0, -0.1]], atol=1e-5
    )


@pytest.mark.parametrize("per_image", [False, True])
def test_the_best_iterate_is_never_worse_than_any_other(per_image):
    x = torch.rand(6, 3, 4, 4)

    def wavy(changed: torch.Tensor) -> torch.Tensor:
        return torch.sin(9 * changed.mean((2, 3))).sum(1)

    perturbation = ChannelStatistics(per_image=per_image, clamp_at_zero=False)
    best = ascend(wavy, x, perturbation, Steps(7, 0.3, keep="best"))
    last = ascend(wavy, x, perturbation, Steps(7, 0.3))
    reached, start, end = (
        wavy(perturbation.apply(x, delta)) for delta in (best.delta, perturbation.start(x), last.delta)
    )
    assert len(best.losses) == 8
    torch.testing.assert_close(best.losses[:7], last.losses)
    torch.testing.assert_close(best.losses[7], end.mean())
    if per_image:
        assert (reached >= torch.maximum(start, end) - 1e-6).all()
    assert reached.mean() >= best.losses.max() - 1e-6
    assert reached.mean() > end.mean() + 1e-3  # on this problem the last step is not the best one


def test_a_random_start_is_in_the_set_and_repeatable():
    x, target = torch.rand(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    steps, perturbation = Steps(3, 0.05, random_start=True), ChannelStatistics(0.5)
    first, again, other = (
        ascend(squared_distance(target), x, perturbation, steps, torch.Generator().manual_seed(seed)).delta
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert all(((part - 1).abs() <= 0.5 + 1e-6).all() for part in first)


def test_without_random_start_no_random_number_is_drawn():
    before = torch.get_rng_state()
    ascend(
        squared_distance(torch.zeros(2, 3, 4, 4)),
        torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        ChannelStatistics(),
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_along_the_normalised_gradient_has_its_length():
    x, target = torch.rand(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    found = ascend(squared_distance(target), x, ChannelStatistics(clamp_at_zero=False), Steps(1, 0.25, "l2"))
    for part in found.delta:
        torch.testing.assert_close((part - 1).norm(), torch.tensor(0.25))


def test_factors_per_image_are_those_that_each_image_gets_alone():
    x, weight = torch.rand(5, 3, 4, 4), torch.randn(1, 3, 4, 4)
    perturbation = ChannelStatistics(per_image=True)
    together = ascend(squared_distance(weight), x, perturbation).delta
    alone = [ascend(squared_distance(weight), image[None], perturbation).delta for image in x]
    for i, part in enumerate(together):
        torch.testing.assert_close(part, torch.cat([delta[i] for delta in alone]))


def test_a_dead_channel_keeps_its_factors():
    x = torch.rand(4, 3, 5, 5)
    x[:, 1] = 0
    found = ascend(squared_distance(torch.full_like(x, -1.0)), x, ChannelStatistics())
    for part in found.delta:
        assert part[0, 1].item() == 1
        assert (part[0, [0, 2]] != 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 3, 5])
def test_a_loss_that_is_not_finite_is_refused_and_the_step_named(step, bad):
    calls = []

    def objective(x: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return x.flatten(1).sum(1) * (bad if len(calls) == step + 1 else 1)

    with pytest.raises(FloatingPointError, match=rf"step {step} of 6"):
        ascend(objective, torch.rand(2, 3, 4, 4), ChannelStatistics())


def test_only_the_perturbation_is_differentiated():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x = torch.rand(2, 3, 6, 6)
    network(x)
    before = copy_of_state(network)
    x.requires_grad_()
    with torch.no_grad():  # the caller's mode does not matter, and comes back
        found = ascend(lambda x: network(x).sum(1), x, ChannelStatistics())
        assert not torch.is_grad_enabled()
    assert all(p.grad is None for p in network.parameters()) and x.grad is None
    assert not any(part.requires_grad for part in found.delta) and not found.losses.requires_grad
    assert differing(before, copy_of_state(network)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"count": -1},
        {"size": 0},
        {"size": -0.1},
        {"size": float("nan")},
        {"direction": "up"},
        {"keep": "first"},
    ],
    ids=str,
)
def test_bad_steps_are_refused(wrong):
    with pytest.raises(ValueError, match=f"got.*{next(iter(wrong.values()))}"):
        Steps(**wrong)
