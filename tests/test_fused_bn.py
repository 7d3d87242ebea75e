"""Two BatchNorm sets and a weight between them."""

import copy

import pytest
import torch
from conftest import assert_same_traces, batch, copy_of_state, differing, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advbn_lib import DualBatchNorm, add_second_batch_norm, single_branch, use_branch
from advbn_lib.fused_bn import (
    SHARED,
    FusedBatchNorm,
    Fusion,
    force_weights,
    fuse_batch_norms,
    fused_layers,
    predictor_parameters,
    recorded_weights,
    unfuse_batch_norms,
    use_fused,
)

few = settings(max_examples=20, deadline=None)
mixes = pytest.mark.parametrize("mix", list(SHARED))
END_POINTS = [(0.0, "clean"), (1.0, "adversarial")]


def layer(channels: int = 5, **fusion) -> FusedBatchNorm:
    """With sets that differ in all that they do not share, and a predictor that does not say 0.5."""
    return unlike(FusedBatchNorm(nn.BatchNorm2d(channels), Fusion(**fusion)))


def unlike(fused: FusedBatchNorm) -> FusedBatchNorm:
    for part in (fused.clean, fused.adversarial):
        for values in (part.weight.data, part.running_var):
            values.uniform_(0.5, 2)
        for values in (part.bias.data, part.running_mean):
            values.normal_()
    if fused.predictor is not None:
        nn.init.normal_(fused.predictor.last.weight, std=0.5)
    return fused.eval()


def network(dtype: torch.dtype = torch.float32, **fusion) -> nn.Module:
    model = tiny_network()
    fuse_batch_norms(model, Fusion(**fusion))
    for fused in fused_layers(model).values():
        unlike(fused)
    return model.to(dtype).eval()


def features(count: int = 6, channels: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(count, channels, 4, 3, dtype=dtype) + 1).contiguous(memory_format=torch.channels_last)


# The end points


@mixes
@pytest.mark.parametrize(("weight", "branch"), END_POINTS)
def test_weights_0_and_1_are_the_end_points_bit_for_bit(mix, weight, branch):
    model, x = network(mix=mix), batch()[0]
    for weights in (weight, torch.full((len(x),), weight)):
        with force_weights(model, weights):
            fused = model(x)
        with use_branch(model, branch):
            assert torch.equal(fused, model(x))
    with use_branch(model, {"clean": "adversarial", "adversarial": "clean"}[branch]):
        assert not torch.allclose(fused, model(x))


@pytest.mark.parametrize("mix", ["output", "affine"])
@pytest.mark.parametrize(("weight", "branch"), END_POINTS)
def test_fused_outputs_are_those_of_the_plain_network_bit_for_bit(mix, weight, branch):
    model, x = network(mix=mix), batch()[0]
    plain = single_branch(model, branch)
    assert not any(isinstance(module, DualBatchNorm) for module in plain.modules())
    with force_weights(model, weight):
        assert torch.equal(model(x), plain(x))


@mixes
@pytest.mark.parametrize("branch", ["clean", "adversarial"])
def test_an_end_point_is_the_plain_network(mix, branch):
    model, x = network(mix=mix), batch()[0]
    with use_branch(model, branch):
        torch.testing.assert_close(model(x), single_branch(model, branch)(x))


# Between them


@given(weight=st.floats(0, 1), seed=st.integers(0, 2**31))
@few
def test_each_mix_is_its_formula(weight, seed):
    torch.manual_seed(seed)
    x = features(dtype=torch.float64)
    for mix in SHARED:
        fused = layer(mix=mix).double()
        with force_weights(fused, weight):
            found = fused(x)
        parts = [
            [1 - weight, *(v.view(1, -1, 1, 1) for v in (b.running_mean, b.running_var, b.weight, b.bias))]
            for b in (fused.clean, fused.adversarial)
        ]
        parts[1][0] = weight
        if mix == "output":
            expected = sum(w * ((x - m) / (v + 1e-5).sqrt() * g + b) for w, m, v, g, b in parts)
        else:
            m, v, g, b = (
                sum(w * value for w, value in zip((1 - weight, weight), pair)) for pair in list(zip(*parts))[1:]
            )
            expected = (x - m) / (v + 1e-5).sqrt() * g + b
        torch.testing.assert_close(found, expected)


def test_fusing_outputs_is_not_interpolating_the_parameters():
    outputs, x = layer(), features()
    parameters = copy.deepcopy(outputs)
    parameters.fusion = Fusion("parameters")
    with force_weights(outputs, 0.5), force_weights(parameters, 0.5):
        assert (outputs(x) - parameters(x)).abs().max() > 0.01


@mixes
def test_the_sets_share_what_the_mix_says_and_keep_sharing_it(mix):
    parts = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    original = layer(mix=mix).float()
    for fused in (original, copy.deepcopy(original), copy.deepcopy(original).double(), original.to("meta")):
        shared = {part for part in parts if getattr(fused.clean, part) is getattr(fused.adversarial, part)}
        assert shared == set(SHARED[mix])


@mixes
def test_training_one_end_point_moves_the_other_only_in_what_they_share(mix):
    model = network(mix=mix).train()
    before = copy_of_state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with use_branch(model, "adversarial"):
        model(batch()[0]).square().sum().backward()
    optimizer.step()
    clean = {name.rpartition(".")[2] for name in differing(before, copy_of_state(model)) if ".clean." in name}
    assert clean == set(SHARED[mix])


# The weights


@pytest.mark.parametrize("fusion", [{}, {"moments": True}, {"weights": "network"}, {"mix": "statistics"}], ids=str)
def test_a_sample_does_not_depend_on_the_others(fusion):
    model, (x, _) = network(torch.float64, **fusion), batch()
    x = x.double()
    whole = model(x)
    for chosen in ([0], [5, 2], [7, 6, 5, 4]):
        torch.testing.assert_close(model(x[chosen]), whole[chosen])
    with recorded_weights(model) as weights:
        model(x)
    assert all(values.std() > 1e-6 for values in weights.values())


@pytest.mark.parametrize("moments", [False, True])
def test_weights_are_one_half_before_training_and_all_of_the_predictor_trains(moments):
    model = tiny_network()
    fuse_batch_norms(model, Fusion(moments=moments))
    layers = fused_layers(model).values()
    for fused in layers:
        nn.init.normal_(fused.adversarial.bias)
    optimizer = torch.optim.SGD(predictor_parameters(model), lr=0.1)
    with recorded_weights(model) as weights:
        before = copy_of_state(model)
        for _ in range(3):  # after one step the last layers are not 0 any more, so that the first ones train too
            nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
            if len(weights) and not differing(before, copy_of_state(model)):
                assert list(weights) == list(fused_layers(model)) and len(weights) == 7
                assert all(torch.equal(w, torch.full((8,), 0.5)) for w in weights.values())
            optimizer.step()
            optimizer.zero_grad()
    changed = differing(before, copy_of_state(model))
    assert set(changed) == {name for name in before if ".predictor." in name}


@pytest.mark.parametrize("moments", [False, True])
def test_a_predictor_tells_apart_what_its_pooled_input_does(moments):
    """Two kinds of inputs, one for each set. They differ in their mean, or, where the predictor sees it, in their spread."""
    torch.manual_seed(1)
    fused = FusedBatchNorm(nn.BatchNorm2d(5), Fusion(moments=moments)).eval()
    fused.adversarial.bias.data += 1
    kind = torch.arange(64) % 2
    x = torch.randn(64, 5, 6, 6)
    x = x * (1 + kind.view(-1, 1, 1, 1)) if moments else x + kind.view(-1, 1, 1, 1)
    with force_weights(fused, kind.float()):
        wanted = fused(x).detach()
    optimizer = torch.optim.SGD(fused.predictor.parameters(), lr=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        (fused(x) - wanted).square().mean().backward()
        optimizer.step()
    assert (fused.fusing_weights(x) - kind).abs().max() < 0.4


@pytest.mark.parametrize("fusion", [{}, {"weights": "network"}, {"mix": "statistics"}, {"mix": "parameters"}], ids=str)
def test_the_gradient_of_the_image_goes_through_the_predicted_weights(fusion):
    """An attack that holds the weights fixed climbs another function."""
    model, (x, labels) = network(torch.float64, **fusion), batch()
    x = x.double().requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), labels, reduction="sum"), x)[0]

    with recorded_weights(model) as weights:
        adaptive = gradient()
    with force_weights(model, weights):
        frozen = gradient()
    assert (adaptive - frozen).abs().max() > 1e-3 * adaptive.abs().max()
    index, step = (0, 1, 5, 6), 1e-6
    change = torch.zeros_like(x).index_put_(tuple(torch.tensor([i]) for i in index), torch.tensor(step).double())
    with torch.no_grad():
        up, down = (nn.functional.cross_entropy(model(x + s * change), labels, reduction="sum") for s in (1, -1))
    torch.testing.assert_close((up - down) / (2 * step), adaptive[index], rtol=1e-3, atol=1e-6)


@mixes
def test_the_gradient_reaches_a_forced_weight(mix):
    fused, x = layer(mix=mix).double(), features(dtype=torch.float64)
    weights = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    with force_weights(fused, weights):
        (found,) = torch.autograd.grad(fused(x).sum(), weights)
    assert (found.abs() > 1e-6).all()


def test_what_was_recorded_can_be_forced():
    model, x = network(), batch()[0]
    with recorded_weights(model) as weights:
        expected = model(x)
    with force_weights(model, weights), recorded_weights(model) as again:
        assert torch.equal(model(x), expected)
    assert all(torch.equal(weights[name], again[name]) and not weights[name].requires_grad for name in weights)


def test_one_weight_in_the_network():
    model, x = network(weights="network"), batch()[0]
    with recorded_weights(model) as weights:
        model(x)
    assert len(weights) == 7 and all(torch.equal(values, weights["bn1"]) for values in weights.values())
    first = fused_layers(model)["bn1"]
    assert {id(p) for p in predictor_parameters(model)} == {id(p) for p in first.predictor.parameters()}
    copied = copy.deepcopy(model)  # nothing of the last graph is kept, which could not be copied
    unlike(fused_layers(copied)["bn1"])
    assert not torch.equal(copied(x), model(x)) and fused_layers(copied)["bn1"].handed is not first.handed


def test_one_weight_in_the_network_is_of_this_batch():
    model = network(weights="network")
    model(batch()[0])
    with pytest.raises(RuntimeError, match="which has not run before this one"):
        model.layer3(torch.randn(8, 8, 6, 6))
    with pytest.raises(RuntimeError):
        model(torch.randn(8, 3, 12, 12).double())  # an error in the stem
    with pytest.raises(RuntimeError, match="which has not run"):
        model.layer3(torch.randn(8, 8, 6, 6))


# Modes


@mixes
def test_when_fusing_the_mode_makes_no_difference_and_no_statistic_moves(mix):
    model, x = network(mix=mix), batch()[0]
    expected, before = model(x), copy_of_state(model)
    assert torch.equal(model.train()(x), expected)
    assert differing(before, copy_of_state(model)) == []


def test_an_end_point_in_train_mode_uses_the_batch_and_moves_its_statistics():
    fused, x = layer().train(), features()
    before = copy_of_state(fused)
    with use_branch(fused, "adversarial"):
        y = fused(x)
    plain = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()
    weight, bias = (v.view(1, -1, 1, 1) for v in (fused.adversarial.weight, fused.adversarial.bias))
    torch.testing.assert_close(y, plain * weight + bias)
    assert {name for name in differing(before, copy_of_state(fused))} == {
        f"adversarial.{part}" for part in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_the_model_alone_fuses_and_blocks_nest():
    model, x = network(), batch()[0]
    fused = model(x)
    with use_branch(model, "clean"):
        clean = model(x)
        with use_fused(model):
            assert torch.equal(model(x), fused)
        assert torch.equal(model(x), clean)
    with force_weights(model, 0.0):
        with force_weights(model, 1.0):
            assert not torch.equal(model(x), clean)
        assert torch.equal(model(x), clean)
    assert torch.equal(model(x), fused) and not torch.equal(fused, clean)


@pytest.mark.parametrize(
    "block",
    [use_fused, lambda m: force_weights(m, 0.3), recorded_weights],
    ids=("use_fused", "force_weights", "recorded_weights"),
)
def test_everything_comes_back_after_an_error(block):
    model = network()
    first = next(iter(fused_layers(model).values()))
    first.branch = "clean"

    def settings_of() -> list:
        return [(fused.branch, fused.forced, fused.listener) for fused in fused_layers(model).values()]

    before, old = traces(model), settings_of()
    with pytest.raises(KeyboardInterrupt), block(model):
        assert settings_of() != old
        raise KeyboardInterrupt
    assert settings_of() == old
    assert_same_traces(before, traces(model))


def test_it_computes_in_bfloat16():
    model, x = network(), batch()[0]
    for mix in SHARED:
        for fused in fused_layers(model).values():
            fused.fusion = Fusion(mix)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        full = model(x)
        assert (low - full).abs().max() < 0.05 * full.abs().max()


# Into a model


def test_a_model_with_two_sets_keeps_them():
    model, x = tiny_network(), batch()[0]
    add_second_batch_norm(model, ["bn1", "layer1.0.bn1"])
    model.bn1.adversarial.bias.data.normal_()
    model.eval()
    with use_branch(model, "adversarial"):
        expected = model(x)
    assert fuse_batch_norms(model) == 7 == len(fused_layers(model))
    with force_weights(model, 1.0):
        assert torch.equal(model(x), expected)
    assert fuse_batch_norms(model) == 7
    assert not any(
        isinstance(inner, DualBatchNorm) for fused in fused_layers(model).values() for inner in fused.children()
    )


@mixes
def test_the_sets_can_be_fused_in_another_way(mix):
    model, x = network(mix=mix), batch()[0]
    expected = {}
    for branch in ("clean", "adversarial"):
        with use_branch(model, branch):
            expected[branch] = model(x)
    assert unfuse_batch_norms(model) == 7 and not fused_layers(model) and unfuse_batch_norms(model) == 0
    for branch, logits in expected.items():
        with use_branch(model, branch):
            torch.testing.assert_close(model(x), logits)
    assert fuse_batch_norms(model, Fusion(mix, "network", moments=True)) == 7
    for weight, branch in END_POINTS:
        with force_weights(model, weight):
            torch.testing.assert_close(model(x), expected[branch])


def test_a_state_goes_into_a_fresh_model():
    model, fresh, x = network(), network(), batch()[0]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x), fresh(x))


def test_a_model_whose_batch_norms_were_folded_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    folded = nn.Sequential(torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1]), nn.ReLU())
    with pytest.raises(ValueError, match="no BatchNorm to fuse.*folded into the convolutions"):
        fuse_batch_norms(folded)


@pytest.mark.parametrize(
    ("module", "fusion", "error", "message"),
    [
        (nn.BatchNorm1d(4), {}, TypeError, "only BatchNorm2d and SyncBatchNorm.*BatchNorm1d"),
        (nn.BatchNorm2d(4, track_running_stats=False), {}, ValueError, "track_running_stats=True"),
        (nn.BatchNorm2d(4, affine=False), {"mix": "affine"}, ValueError, "no affine parameters"),
    ],
    ids=str,
)
def test_layers_that_cannot_fuse_are_refused_and_the_model_left_alone(module, fusion, error, message):
    model = nn.Sequential(nn.BatchNorm2d(3), module)
    with pytest.raises(error, match=message):
        fuse_batch_norms(model, Fusion(**fusion))
    assert fused_layers(model) == {}


def test_a_model_that_fuses_in_another_way_is_refused():
    with pytest.raises(ValueError, match="fuses already.*'affine'.*begin with a fresh model"):
        fuse_batch_norms(network(mix="affine"), Fusion())


@pytest.mark.parametrize("mix", ["output", "statistics", "parameters"])
def test_without_affine_parameters_there_are_statistics_to_mix(mix):
    fused = FusedBatchNorm(nn.BatchNorm2d(3, affine=False), Fusion(mix))
    fused.adversarial.running_mean += 1
    x = torch.randn(2, 3, 4, 4)
    with force_weights(fused, 0.25):
        torch.testing.assert_close(fused(x), (x - 0.25) / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan"), torch.tensor([0.5, 2.0]), torch.full((2, 2), 0.5)], ids=str)
def test_bad_weights_are_refused(wrong):
    with pytest.raises(ValueError, match=r"from 0 \(clean\) to 1 \(adversarial\)"), force_weights(network(), wrong):
        pytest.fail("the block must not be entered")


def test_a_model_that_does_not_fuse_cannot_be_forced_to():
    with pytest.raises(ValueError, match="no layer that fuses"), force_weights(nn.BatchNorm2d(3), 0.5):
        pytest.fail("the block must not be entered")


def test_weights_for_other_layers_or_samples_are_refused():
    model = network()
    with pytest.raises(ValueError, match="but the layers that fuse are"), force_weights(model, {"bn1": torch.ones(8)}):
        pytest.fail("the block must not be entered")
    with pytest.raises(ValueError, match="forced for 3 samples, but this batch has 8"):
        with force_weights(model, torch.ones(3)):
            model(batch()[0])


@pytest.mark.parametrize("wrong", [{"mix": "both"}, {"weights": "stage"}, {"reduction": 0}], ids=str)
def test_a_bad_fusion_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Fusion(**wrong)
