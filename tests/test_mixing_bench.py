"""The Color-MNIST bench: every method, resumed level by level as if never stopped."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from advbn_lib.data.colour_mnist import PALETTE
from advbn_lib.data.images import DataError
from advbn_lib.methods.advmix import RandMix
from advbn_lib.mixing_bench import (
    BENCHES,
    BIASED,
    METHODS,
    MixingBench,
    level_name,
    run_mixing_bench,
)
from advbn_lib.mixing_methods import ABOUT
from advbn_lib.mixing_trials import encoded
from advbn_lib.training import Schedule

pytest.importorskip("sklearn")
CPU = torch.device("cpu")
SMOKE = BENCHES["smoke_mixing"]


def short(**changes) -> MixingBench:
    small = dataclasses.replace(
        SMOKE, images=(128, 60), attacked=30, attack_restarts=2, schedule=Schedule(epochs=1, batch_size=64, lr=0.05)
    )
    return dataclasses.replace(small, **changes)


def run(bench: MixingBench, method: str = "randmix", seed: int = 0, folder=None, code: str = "code"):
    return run_mixing_bench(bench, method, seed, CPU, code, folder, show_progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_shares_at_every_level(method):
    ran = run(short(), method)
    levels = {"0.02", "unbiased"}
    for group in ("accuracy", "robust"):
        assert ran.metrics["mixing"][group].keys() == levels | {BIASED}
        assert all(0 <= share <= 1 for share in ran.metrics["mixing"][group].values())
        assert ran.metrics["mixing"][group][BIASED] == ran.metrics["mixing"][group]["0.02"], (
            "the unbiased one is not in it"
        )
    for level in levels:
        after = ran.curves[f"accuracy_after_restarts/{level}"]
        assert len(after) == 3 and after == sorted(after, reverse=True)
        assert after[-1] == ran.metrics["mixing"]["robust"][level]
        assert len(ran.curves[f"clean_loss/{level}"]) == 1
    assert len(ran.data) == 4 and all(row["sha256"] for row in ran.data.values())
    assert ran.weights["sha256"] and ran.cost["train_seconds"] > 0
    assert method in ABOUT
    json.dumps(dataclasses.asdict(ran), allow_nan=False)


def test_the_seed_and_the_method_decide_and_nothing_else():
    first, again, other = (run(short(), seed=seed) for seed in (0, 0, 1))
    assert first.curves == again.curves and first.metrics == again.metrics
    assert first.curves != other.curves and first.weights["sha256"] != other.weights["sha256"]
    assert run(short(), "recolour").weights == first.weights, "all methods start from the same weights"


def test_a_level_does_not_depend_on_the_ones_before_it():
    both, alone = run(short()), run(short(levels=(None, 0.02)))
    for group in ("accuracy", "robust"):
        assert both.metrics["mixing"][group] == alone.metrics["mixing"][group]


def test_killed_between_levels_and_within_one_it_ends_as_if_never_stopped(tmp_path, monkeypatch):
    bench = short(schedule=Schedule(epochs=2, batch_size=64, lr=0.05))
    whole = run(bench)
    choose, calls = RandMix.choose_style, []

    def killed(self, batch, labels):
        calls.append(len(batch))
        if len(calls) == 4 + 3:  # two epochs of two steps at the first level, then the second epoch of the second one
            raise KeyboardInterrupt
        return choose(self, batch, labels)

    monkeypatch.setattr(RandMix, "choose_style", killed)
    with pytest.raises(KeyboardInterrupt):
        run(bench, folder=tmp_path)
    assert len(list(tmp_path.glob("level-*.pt"))) == 1 and len(list(tmp_path.glob("training-*.pt"))) == 1
    torch.manual_seed(99)
    calls = [0] * 100
    resumed = run(bench, folder=tmp_path)
    assert len(calls) == 100 + 2, "the level that is done is not done again, nor is the first epoch of the other one"
    assert resumed.curves == whole.curves and resumed.metrics == whole.metrics
    assert not list(tmp_path.glob("training-*.pt"))
    again = run(bench, folder=tmp_path)
    assert len(calls) == 100 + 2 and again.metrics == whole.metrics and again.data == whole.data


def test_levels_by_other_code_are_not_taken(tmp_path):
    run(short(levels=(0.02,)), folder=tmp_path)
    run(short(levels=(0.02,)), folder=tmp_path, code="other code")
    assert len(list(tmp_path.glob("level-*.pt"))) == 2


def test_a_missing_class_and_an_unknown_method_are_refused():
    with pytest.raises(DataError, match="no image of"):
        run(short(images=(5, 60)))
    with pytest.raises(ValueError, match="advmix, randmix"):
        run(short(), "magic")


def test_training_colours_say_the_class_and_test_colours_do_not():
    train, test = (short(images=(None, None)).digits(split, 0.005, 0) for split in ("train", "test"))
    for digits, wanted in ((train, True), (test, False)):
        means = torch.stack([digits.colours[digits.images.labels == label].mean(0) for label in range(10)])
        spread = means.std(0).mean()
        assert (spread > 0.2) == wanted, "of the classes' mean colours"
        nearest = torch.cdist(digits.colours, torch.tensor(PALETTE) / 255).argmin(1)
        share = (nearest == digits.images.labels).float().mean()
        assert share > 0.8 if wanted else share < 0.2
    assert torch.equal(encoded(test).content[:, 0], test.grey.float() / 255)


def test_the_sizes_that_runs_use_have_all_levels():
    bench = BENCHES["cpu_mixing"]
    assert [level_name(level) for level in bench.levels] == [
        "0.005", "0.02", "0.025", "0.03", "0.035", "0.04", "0.045", "0.05", "unbiased"
    ]  # fmt: skip
    assert bench.attack_restarts >= 20 and bench.data_set == "mnist"
