"""The stages of AFA, and the adversarial trainings that it is compared with, on tiny data."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, copy_of_state, differing, tiny_images, tiny_network, traces
from torch import nn

from advbn_lib import Steps, ascend, use_branch
from advbn_lib.attacks import PGD, cross_entropies
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.fused_bn import SHARED, Fusion, force_weights, fused_layers, predictor_parameters, recorded_weights
from advbn_lib.methods.afa import AFA, EndPoints, FusedMethod, JointAFA
from advbn_lib.methods.base import Method
from advbn_lib.methods.pgd_training import TRADES, PGDTraining, divergences
from advbn_lib.modes import evaluating
from advbn_lib.pixel_ball import PixelBall
from advbn_lib.training import Schedule, train

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
ATTACK = PGD(MEAN, STD, steps=2, step=0.6)
FIXED = PGD(MEAN, STD, steps=2, step=0.6, random_start=False)
STAGES = [EndPoints, AFA, JointAFA]
METHODS = [*STAGES, PGDTraining, TRADES]
of_methods = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.__name__)
of_stages = pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.__name__)


def sample(count: int = 8, size: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images with a third of the pixels black or white, and labels."""
    pixels = (1.5 * torch.rand(count, 3, size, size) - 0.25).clamp(0, 1)
    means, stds = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - means) / stds, torch.arange(count) % 10


def made(kind: type[Method], attack: PGD = ATTACK, **options) -> Method:
    """With BatchNorm sets that differ, and predictors that do not say 0.5."""
    method = kind(tiny_network(), attack, **options).train()
    if isinstance(method, FusedMethod):
        for branch in ("clean", "adversarial"):
            method.predict(sample()[0], branch)
        for layer in fused_layers(method.model).values():
            nn.init.uniform_(layer.adversarial.weight, 0.5, 1.5)
            nn.init.normal_(layer.adversarial.bias)
            if layer.predictor is not None:
                nn.init.normal_(layer.predictor.last.weight, std=0.5)
    return method


def attacked(method: Method, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return method.perturb(x) if isinstance(method, TRADES) else method.perturb(x, y)


def parts(names: list[str]) -> set[str]:
    """Which parts of a fused model these entries of its state belong to."""
    kinds = ("clean", "adversarial", "predictor")
    return {next((kind for kind in kinds if f".{kind}." in name), "shared") for name in names}


def loader(count: int = 64) -> DeviceLoader:
    return DeviceLoader(tiny_images(count), 16, 0, padding=0, flip=False)


def run(method: Method, epochs: int = 1, **options) -> list[list[float]]:
    schedule = Schedule(epochs, 16, 0.05)
    return train(method, loader(), schedule, show_progress=False, precision=torch.float32, **options).losses


# Stage 1


def test_each_kind_of_image_goes_through_its_own_set():
    method, (x, y) = made(EndPoints, FIXED, clean_weight=0.25), sample()
    perturbed = method.perturb(x, y, "adversarial")
    state = copy_of_state(method.model)
    losses = method(x, y)
    method.model.load_state_dict(state)
    with use_branch(method.model, "clean"):
        torch.testing.assert_close(losses.clean, F.cross_entropy(method.model(x), y))
    with use_branch(method.model, "adversarial"):
        torch.testing.assert_close(losses.adversarial, F.cross_entropy(method.model(perturbed), y))
    torch.testing.assert_close(losses.total, 0.25 * losses.clean + 0.75 * losses.adversarial)


def test_the_end_points_attack_is_on_the_adversarial_set_with_running_statistics():
    method, (x, y) = made(EndPoints, FIXED, eps=4.0), sample()
    found = method.perturb(x, y, "adversarial")
    ball = PixelBall(4 / 255, MEAN, STD)
    with evaluating(method.model), use_branch(method.model, "adversarial"):
        steps = Steps(2, 0.6 * 4 / 255)
        expected = ascend(lambda z: cross_entropies(method.model(z), y), x, ball, steps)
    torch.testing.assert_close(found, ball.apply(x, expected.delta))
    assert not torch.allclose(found, method.perturb(x, y, "clean"), atol=1e-3)


def test_a_set_sees_only_its_own_kind_and_each_batch_once():
    method, (x, y) = made(EndPoints, FIXED), sample()
    stem = fused_layers(method.model)["bn1"]
    old = {kind: (getattr(stem, kind).running_mean.clone()) for kind in ("clean", "adversarial")}
    seen = {"clean": x, "adversarial": method.perturb(x, y, "adversarial")}
    method(x, y)
    for kind, images in seen.items():
        fresh = method.model.conv1(images).mean((0, 2, 3)).detach()
        torch.testing.assert_close(getattr(stem, kind).running_mean, 0.9 * old[kind] + 0.1 * fresh)


@pytest.mark.parametrize("mix", list(SHARED))
def test_the_end_points_train_everything_but_the_predictors(mix):
    method = made(EndPoints, fusion=Fusion(mix))
    before = copy_of_state(method)
    run(method)
    assert parts(differing(before, copy_of_state(method))) == {"clean", "adversarial", "shared"}
    left = {id(p) for p in method.model.parameters()} - {id(p) for p in method.trainable_parameters()}
    assert left == {id(p) for p in predictor_parameters(method.model)} != set()


# Stage 2


@pytest.mark.parametrize("fusion", [Fusion(), Fusion(weights="network"), Fusion("statistics", moments=True)], ids=str)
def test_only_the_predictors_are_trained(fusion):
    method = made(AFA, fusion=fusion)
    before = copy_of_state(method)
    run(method)
    changed = differing(before, copy_of_state(method))
    assert set(changed) == {name for name in before if ".predictor." in name} != set()


def test_what_is_frozen_gets_no_gradient_and_can_be_trained_afterwards():
    method = made(AFA)
    flags = [p.requires_grad for p in method.model.parameters()]
    method(*sample()).total.backward()
    trained = {id(p) for p in method.trainable_parameters()}
    assert all((p.grad is not None) == (id(p) in trained) for p in method.model.parameters())
    assert [p.requires_grad for p in method.model.parameters()] == flags and all(flags)


def test_dropout_is_off_while_the_predictors_train():
    model = tiny_network()
    model.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    method, (x, y) = AFA(model, FIXED).train(), sample()
    strengths = torch.arange(8.0)
    assert torch.equal(method.loss(x, y, strengths), method.loss(x, y, strengths))
    assert all(module.training for module in method.modules())


def test_the_loss_is_that_of_the_fused_model_on_images_of_these_strengths():
    method, (x, y) = made(AFA, FIXED), sample()
    strengths = torch.arange(8.0)
    found = method.loss(x, y, strengths)
    perturbed = method.perturb(x, y, strengths=strengths)
    change = ((perturbed - x) * torch.tensor(STD).view(1, 3, 1, 1)).abs().amax((1, 2, 3)) * 255
    torch.testing.assert_close(change, strengths, atol=1e-3, rtol=0)  # with steps of 0.6 two reach the surface
    assert torch.equal(perturbed[0], x[0])
    torch.testing.assert_close(found, F.cross_entropy(method.model.eval()(perturbed), y))


def test_the_attack_goes_through_the_predictors():
    method, (x, y) = made(AFA, FIXED).eval(), sample()
    adaptive = method.perturb(x, y)
    with recorded_weights(method.model) as weights:
        method.predict(x)
    with force_weights(method.model, weights):
        frozen = method.perturb(x, y)
    assert (adaptive != frozen).float().mean() > 0.02
    assert F.cross_entropy(method.predict(adaptive), y) > F.cross_entropy(method.predict(frozen), y)


def test_strengths_are_the_whole_numbers_to_eps_each_as_likely():
    drawn = made(AFA, eps=8.0).draw_strengths(torch.zeros(9000, 1))
    assert drawn.shape == (9000,) and drawn.dtype == torch.float32
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == list(range(9)) and (counts - 1000).abs().max() < 5 * 1000**0.5


def test_weights_that_are_told_the_strength_follow_it():
    """Images on which it can be seen: strength 8 makes them brighter, and the attack does nothing more."""
    images = torch.full((16, 3, 16, 16), 0.5) + 0.01 * torch.rand(16, 3, 16, 16)
    strengths = torch.arange(16.0) % 9
    method = made(AFA, supervision=1.0)
    method.perturb = lambda x, labels, strengths: x + strengths.view(-1, 1, 1, 1) / 8
    labels = torch.zeros(16, dtype=torch.int64)
    optimizer = torch.optim.Adam(method.trainable_parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        method.loss(images, labels, strengths).backward()
        optimizer.step()
    with recorded_weights(method.model) as weights:
        method.eval().predict(method.perturb(images, labels, strengths))
    follow = torch.stack(list(weights.values())).mean(0)
    assert torch.corrcoef(torch.stack([follow, strengths]))[0, 1] > 0.9


def test_supervision_adds_the_distance_from_the_strength():
    method, (x, y), strengths = made(AFA, FIXED), sample(), torch.arange(8.0)
    untold = method.loss(x, y, strengths)
    method.supervision = 0.5
    told = method.loss(x, y, strengths)
    with recorded_weights(method.model) as weights, evaluating(method.model):
        method.predict(method.perturb(x, y, strengths=strengths))
    right = strengths / 8
    expected = [-(right * w.log() + (1 - right) * (1 - w).log()).mean() for w in weights.values()]
    torch.testing.assert_close(told - untold, 0.5 * sum(expected) / len(expected))
    with pytest.raises(ValueError, match="0 or more"):
        made(AFA, supervision=-1.0)


@pytest.mark.parametrize(("useless", "right"), [("adversarial", 0.0), ("clean", 1.0)])
def test_the_predictors_learn_which_end_point_is_right(useless, right):
    """One layer's set is spoilt: its weight must go to the other. Where the sets are the same nothing draws the weight."""
    attack = PGD(MEAN, STD, 1, 1.0)
    first = PGDTraining(tiny_network(8), attack, eps=1.0)
    run(first, 6)
    method = AFA(first.model, attack, eps=1.0)
    getattr(fused_layers(method.model)["layer2.0.bn2"], useless).weight.data.neg_()
    losses = train(method, loader(), Schedule(3, 16, 0.3), show_progress=False, precision=torch.float32).losses
    assert losses[-1][0] < 0.7 * losses[0][0]
    with recorded_weights(method.model) as weights:
        method.eval().predict(next(loader().epoch(0))[0])
    assert (weights.pop("layer2.0.bn2") - right).abs().max() < 0.05
    assert all((values - 0.5).abs().max() < 0.05 for values in weights.values())


# Both at once


@pytest.mark.parametrize("mix", list(SHARED))
def test_joint_training_trains_everything(mix):
    method = made(JointAFA, fusion=Fusion(mix))
    before = copy_of_state(method)
    history = run(method)
    assert parts(differing(before, copy_of_state(method))) == {"clean", "adversarial", "predictor", "shared"}
    assert len(history[0]) == 2


def test_the_joint_loss_is_the_sum():
    method, (x, y) = made(JointAFA, FIXED), sample()
    method.draw_strengths = lambda images: torch.full((len(images),), 3.0)
    losses = method(x, y)
    perturbed = method.perturb(x, y, strengths=3.0)
    torch.testing.assert_close(losses.adversarial, F.cross_entropy(method.predict(perturbed), y))
    state = copy_of_state(method.model)
    first = made(EndPoints, FIXED)
    first.model.load_state_dict(state)
    torch.testing.assert_close(losses.clean, first(x, y).clean)
    assert losses.total > losses.adversarial


# All stages


@pytest.mark.parametrize("wrong", [8 / 255, torch.tensor([0.0, 8 / 255]), -1.0, 256.0], ids=str)
def test_strengths_in_other_units_are_refused(wrong):
    method, (x, y) = made(AFA), sample()
    with pytest.raises(ValueError, match="write 8 for 8/255"):
        method.perturb(x, y, strengths=wrong)


def test_a_strength_of_zero_is_no_attack():
    method, (x, y) = made(AFA), sample()
    torch.testing.assert_close(method.perturb(x, y, strengths=0.0), x)


@of_stages
def test_predictions_are_those_of_the_branches(kind):
    method, (x, _) = made(kind).eval(), sample()
    found = method.predictions(x)
    assert list(found) == (["clean", "adversarial"] if kind is EndPoints else ["fused", "clean", "adversarial"])
    for weight, branch in ((0.0, "clean"), (1.0, "adversarial")):
        with force_weights(method.model, weight):
            assert torch.equal(method.predict(x), found[branch])
    assert torch.equal(method.predict(x), method.model(x)) and torch.equal(method.predict(x, "fused"), method.model(x))
    assert not torch.equal(found["clean"], found["adversarial"])


@of_methods
def test_the_attack_leaves_no_trace(kind):
    method, (x, y) = made(kind), sample()
    method.model.layer3.eval()
    before = traces(method.model)
    attacked(method, x, y)
    after = traces(method.model)
    before["random"] = after["random"] = before["random"]  # a random start draws numbers
    assert_same_traces(before, after)


@of_methods
@pytest.mark.parametrize("call", [1, 2, 4])
def test_everything_comes_back_after_an_error(kind, call):
    method, calls = made(kind), []
    method.model.layer3.eval()

    def stop(*_):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt

    method.model.fc.register_forward_hook(stop)
    x, y = sample()
    before = traces(method.model)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):
            method(x, y)
    after = traces(method.model)
    for kind_of_trace in ("modes", "flags", "branches", "gradients"):
        assert before[kind_of_trace] == after[kind_of_trace]


@of_methods
def test_a_run_that_was_killed_resumes_bit_for_bit(kind, tmp_path):
    def fresh() -> Method:
        torch.manual_seed(1)
        return made(kind)

    whole = fresh()
    torch.manual_seed(2)
    losses = run(whole, 2)

    class Stopped(Exception):
        pass

    def stop(history):
        raise Stopped

    killed, path = fresh(), tmp_path / "run.pt"
    torch.manual_seed(2)
    with pytest.raises(Stopped):
        run(killed, 2, checkpoint=path, after_epoch=stop)
    resumed = fresh()
    torch.manual_seed(3)
    assert run(resumed, 2, checkpoint=path) == losses
    assert differing(copy_of_state(whole), copy_of_state(resumed)) == []


@of_stages
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": 8 / 255}, "write 8 for 8/255; got 0.03"),
        ({"eps": -8.0}, "write 8 for 8/255; got -8"),
        ({"eps": float("nan")}, "got nan"),
        ({"eps": 256.0}, "got 256"),
    ],
    ids=str,
)
def test_a_bad_eps_is_refused_before_the_model_is_touched(kind, wrong, message):
    model = tiny_network()
    with pytest.raises(ValueError, match=message):
        kind(model, ATTACK, **wrong)
    assert fused_layers(model) == {}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AFA, {"eps": 7.5}, "eps must be one, got 7.5"),
        (JointAFA, {"eps": 7.5}, "eps must be one, got 7.5"),
        (AFA, {"eps": float("inf")}, "got inf"),
        (EndPoints, {"clean_weight": 0.0}, "one set is not trained"),
        (JointAFA, {"clean_weight": 1.0}, "one set is not trained"),
        (PGDTraining, {"clean_weight": 1.0}, "use PlainTraining"),
        (PGDTraining, {"eps": 8 / 255}, "write 8 for 8/255"),
        (TRADES, {"eps": 8 / 255}, "write 8 for 8/255"),
        (TRADES, {"beta": 0.0}, "use PlainTraining"),
        (TRADES, {"attack": FIXED}, "random_start=True"),
    ],
    ids=str,
)
def test_bad_values_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"model": tiny_network(), "attack": ATTACK, **options})


@of_stages
def test_a_model_without_batch_norm_is_refused(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(ValueError, match="folded into the convolutions"):
        kind(model, ATTACK)


@of_methods
def test_bad_batches_are_refused(kind):
    method, (x, y) = made(kind), sample()
    with pytest.raises(ValueError, match="pixels go from"):
        method(255 * x, y)
    for wrong in (y + 3, y - 100):
        with pytest.raises(ValueError, match="labels go from"):
            method(x, wrong)


# PGD-AT and TRADES


@pytest.mark.parametrize("clean_weight", [0.0, 0.5, 0.2])
def test_pgd_training_weighs_the_two_kinds(clean_weight):
    method, (x, y) = made(PGDTraining, FIXED, clean_weight=clean_weight), sample()
    perturbed, before = method.perturb(x, y), int(method.model.bn1.num_batches_tracked)
    losses = method(x, y)
    assert int(method.model.bn1.num_batches_tracked) - before == (2 if clean_weight else 1)
    adversarial, clean = (F.cross_entropy(method.model(z), y) for z in (perturbed, x))
    torch.testing.assert_close(losses.adversarial, adversarial)
    torch.testing.assert_close(losses.clean, clean if clean_weight else adversarial)
    torch.testing.assert_close(losses.total, (1 - clean_weight) * adversarial + clean_weight * clean)


def test_trades_adds_the_divergence():
    method, (x, y) = made(TRADES, eps=8.0, beta=3.0), sample()
    torch.manual_seed(5)
    perturbed = method.perturb(x)
    torch.manual_seed(5)
    losses = method(x, y)
    clean, adversarial = method.model(x), method.model(perturbed)
    p, q = clean.softmax(1), adversarial.softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(losses.clean, F.cross_entropy(clean, y))
    torch.testing.assert_close(losses.total, F.cross_entropy(clean, y) + 3 * divergence.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.adversarial, F.cross_entropy(adversarial, y))


def test_the_attack_of_trades_climbs_the_divergence():
    method, (x, _) = made(TRADES, PGD(MEAN, STD, 5)).eval(), sample()
    noise = PixelBall(8 / 255, MEAN, STD)
    clean = method.model(x)
    drawn = method.model(noise.apply(x, noise.sample(x)))
    assert (divergences(clean, method.model(method.perturb(x))) > divergences(clean, drawn)).all()
    assert torch.equal(divergences(clean, clean), torch.zeros(8)) and (divergences(clean, drawn) > 0).all()


@of_methods
def test_it_learns_in_the_training_loop(kind):
    method = made(kind, PGD(MEAN, STD, 1, 1.0), eps=2.0)
    losses = run(method, 6)
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]
