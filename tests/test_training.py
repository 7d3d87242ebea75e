"""The training loop: killed and resumed is uninterrupted; bad losses and bad checkpoints are refused."""

import math
import random

import pytest
import torch
from conftest import copy_of_state, differing, tiny_images, tiny_network
from torch import nn

from advbn_lib import AdvBN, CleanFineTuning, Losses, PlainTraining, RandomStatistics
from advbn_lib.checkpoints import CheckpointError, read_checkpoint
from advbn_lib.data import DeviceLoader
from advbn_lib.methods import Method
from advbn_lib.training import LOOK_EVERY, Schedule, train

SCHEDULE = Schedule(epochs=2, batch_size=4, lr=0.05, milestones=(1,), warmup=0.5)
STEPS = 26  # an epoch: more than LOOK_EVERY, so that a checkpoint is written in the middle of one


class WithDropout(RandomStatistics):
    """Draws random numbers in two places."""

    def __init__(self, model: nn.Module):
        model.fc = nn.Sequential(nn.Dropout(0.3), model.fc)
        super().__init__(model)


METHODS = [AdvBN, RandomStatistics, WithDropout, PlainTraining]


class Killed(Exception):
    pass


class LoaderThatKills(DeviceLoader):
    """Stops the run when it asks for one batch more than ``after``."""

    after = math.inf

    def _batch(self, *arguments):
        self.after -= 1
        if self.after < 0:
            raise Killed
        return super()._batch(*arguments)


def start(method_type, checkpoint, seed: int = 0, after: float = math.inf, **options):
    """Build everything anew, as a new process would, and train."""
    torch.manual_seed(seed)
    method = method_type(tiny_network())
    loader = LoaderThatKills(tiny_images(4 * STEPS), 4, seed=3)
    loader.after = after
    history = train(method, loader, SCHEDULE, checkpoint, "key", save_every=0, show_progress=False, **options)
    return method, history


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What each method ends with if nothing happens: computed once."""
    finished = {}

    def of(method_type):
        if method_type not in finished:
            path = tmp_path_factory.mktemp(method_type.__name__) / "checkpoint.pt"
            method, history = start(method_type, path)
            finished[method_type] = copy_of_state(method), history, torch.get_rng_state(), read_checkpoint(path)
        return finished[method_type]

    return of


def flattened(value, path: str = "") -> dict[str, object]:
    """The leaves of nested dicts and lists, by their path."""
    if isinstance(value, (dict, list, tuple)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in pairs for name, leaf in flattened(part, f"{path}/{key}").items()}
    return {path: value}


def assert_same_end(expected, method, history, checkpoint) -> None:
    state, expected_history, random_state, expected_checkpoint = expected
    assert differing(state, copy_of_state(method)) == []
    assert torch.equal(torch.get_rng_state(), random_state)
    assert history.losses == expected_history.losses and (history.epoch, history.step) == (2, 0)
    first, second = (
        flattened(content["parts"]["optimizer"]) for content in (expected_checkpoint, read_checkpoint(checkpoint))
    )
    assert first.keys() == second.keys() and any("momentum_buffer" in name for name in first)
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name


RANDOM_STEPS = sorted(random.Random(20).sample(range(1, 2 * STEPS), 4))


@pytest.mark.parametrize("after", [LOOK_EVERY, STEPS, *RANDOM_STEPS])
@pytest.mark.parametrize("method_type", METHODS)
def test_killed_and_resumed_ends_as_uninterrupted(method_type, after, uninterrupted, tmp_path):
    expected, checkpoint = uninterrupted(method_type), tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        start(method_type, checkpoint, after=after)
    seed = 0 if after < LOOK_EVERY else 99  # a new process may have other random numbers: the checkpoint's count
    assert_same_end(expected, *start(method_type, checkpoint, seed), checkpoint)


def test_killed_many_times_ends_as_uninterrupted(uninterrupted, tmp_path):
    expected, checkpoint = uninterrupted(AdvBN), tmp_path / "checkpoint.pt"
    for seed, after in enumerate(
        (24, 8, 21, 3)
    ):  # saved after step 20, then the first epoch, then 20 steps more, then nothing new
        with pytest.raises(Killed):
            start(AdvBN, checkpoint, seed, after)
    assert_same_end(expected, *start(AdvBN, checkpoint, 99), checkpoint)


def test_checkpoints_do_not_change_the_training(uninterrupted):
    state, history, _, _ = uninterrupted(AdvBN)
    method, without = start(AdvBN, None)
    assert differing(state, copy_of_state(method)) == [] and without.losses == history.losses


def test_a_resumed_run_goes_on_and_does_not_begin_anew(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        start(AdvBN, checkpoint, after=STEPS + 22)
    saved = read_checkpoint(checkpoint)["progress"]
    assert (saved["epoch"], saved["step"]) == (1, 20)
    start(AdvBN, checkpoint, after=STEPS - 20)  # only the batches that are left are asked for
    with_nothing_left = start(AdvBN, checkpoint, after=0)
    assert with_nothing_left[1].epoch == 2


def test_a_finished_run_resumed_is_what_it_was(uninterrupted, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    start(AdvBN, checkpoint)
    assert_same_end(uninterrupted(AdvBN), *start(AdvBN, checkpoint, 99), checkpoint)


def test_the_history_is_of_every_step(tmp_path):
    class Counts(Method):
        calls = 0

        def forward(self, images, labels):
            self.calls += 1
            value = self.model(images).sum() * 0 + self.calls
            return Losses(value, value, 10 * value)

    method = Counts(tiny_network())
    history = train(method, DeviceLoader(tiny_images(4 * STEPS), 4, seed=0), SCHEDULE, show_progress=False)
    expected = [(STEPS + 1) / 2, STEPS + (STEPS + 1) / 2]
    assert [clean for clean, _ in history.losses] == expected
    assert [adversarial for _, adversarial in history.losses] == [10 * value for value in expected]
    assert history.seconds > 0


class BreaksAt(PlainTraining):
    """One loss is not finite."""

    def __init__(self, model: nn.Module, step: int, value: float):
        super().__init__(model)
        self.step, self.value, self.calls = step, value, 0

    def forward(self, images, labels):
        losses = super().forward(images, labels)
        self.calls += 1
        return losses if self.calls <= self.step else Losses(losses.total * self.value, losses.clean * self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("step", "named"), [(0, "step 0 of epoch 0"), (23, "step 23 of epoch 0"), (STEPS + 2, "step 2 of epoch 1")]
)
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(step, named, value, tmp_path):
    checkpoint, method = tmp_path / "checkpoint.pt", BreaksAt(tiny_network(), step, value)
    with pytest.raises(FloatingPointError, match=named):
        train(
            method,
            DeviceLoader(tiny_images(4 * STEPS), 4, seed=0),
            SCHEDULE,
            checkpoint,
            "key",
            save_every=0,
            show_progress=False,
        )
    assert checkpoint.exists() == (step > LOOK_EVERY)
    if checkpoint.exists():
        weights = read_checkpoint(checkpoint)["parts"]["method"]
        assert all(tensor.isfinite().all() for tensor in weights.values())
        method = PlainTraining(tiny_network())
        resumed = train(
            method, DeviceLoader(tiny_images(4 * STEPS), 4, seed=0), SCHEDULE, checkpoint, "key", show_progress=False
        )
        assert resumed.epoch == 2


def test_a_nan_in_the_last_step_of_a_short_run_is_noticed():
    method = BreaksAt(tiny_network(), 2, math.nan)
    with pytest.raises(FloatingPointError, match="step 2 of epoch 0"):
        train(method, DeviceLoader(tiny_images(12), 4, seed=0), Schedule(1, 4, 0.1), show_progress=False)


def test_another_runs_checkpoint_is_refused_and_kept(tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        start(AdvBN, checkpoint, after=21)
    content = checkpoint.read_bytes()
    loader = DeviceLoader(tiny_images(), 4, seed=0)
    with pytest.raises(CheckpointError, match=rf"{checkpoint}.*another run"):
        train(AdvBN(tiny_network()), loader, SCHEDULE, checkpoint, "another key", show_progress=False)
    assert checkpoint.read_bytes() == content


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_checkpoint_is_refused_by_name(share, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Killed):
        start(AdvBN, checkpoint, after=21)
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=rf"{checkpoint} is damaged.*remove it"):
        start(AdvBN, checkpoint)


def test_only_the_methods_parameters_are_trained():
    method = CleanFineTuning(tiny_network(), "layer2")
    before = copy_of_state(method)
    train(method, DeviceLoader(tiny_images(16), 4, seed=0), Schedule(1, 4, 0.1), show_progress=False)
    changed = {name.split(".")[1] for name in differing(before, copy_of_state(method))}
    assert changed == {"layer3", "fc"}


def test_weight_decay_and_rate_reach_the_optimizer():
    """On a loss without gradient each step shrinks every weight, BatchNorm's too, by rate times decay."""

    class Zero(Method):
        def forward(self, images, labels):
            value = sum(p.sum() for p in self.model.parameters()) * 0
            return Losses(value, value)

    method, schedule = (
        Zero(tiny_network()),
        Schedule(3, 4, lr=0.5, milestones=(2,), warmup=1, momentum=0, weight_decay=0.1),
    )
    before = copy_of_state(method)
    train(method, DeviceLoader(tiny_images(8), 4, seed=0), schedule, show_progress=False)
    rates = [0, 0.25, 0.5, 0.5, 0.05, 0.05]
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * math.prod(1 - 0.1 * rate for rate in rates))


def test_training_lowers_the_loss():
    method = PlainTraining(tiny_network(8))
    history = train(
        method,
        DeviceLoader(tiny_images(160), 16, seed=0, padding=0, flip=False),
        Schedule(6, 16, 0.1),
        show_progress=False,
    )
    clean = [loss for loss, _ in history.losses]
    assert clean[-1] < 0.8 * clean[0]


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0), (0.5, 0.5), (1, 1), (1.99, 1), (2, 0.1), (3.99, 0.1), (4, 0.01), (10, 0.01)],
)  # fmt: skip
def test_the_rate_warms_up_and_drops_at_the_milestones(epoch, rate):
    assert Schedule(5, 8, lr=1.0, milestones=(2, 4), warmup=1).rate(epoch) == pytest.approx(rate)


def test_without_warmup_the_rate_is_full_from_the_start():
    assert Schedule(5, 8, lr=0.3).rate(0) == 0.3


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"lr": -1}, {"lr": math.nan}], ids=str)
def test_a_bad_schedule_is_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        Schedule(**{"epochs": 1, "batch_size": 1, "lr": 0.1, **wrong})
