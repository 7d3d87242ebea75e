"""The arena of coloured digits: every method, one budget, levels that are done are not done again."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from advbn_lib import digits_arena, measurements
from advbn_lib.data.images import DataError
from advbn_lib.digits_arena import (
    ABOUT,
    BIASED,
    METHODS,
    DigitsArena,
    counted_passes,
    run_digits_arena,
)
from advbn_lib.digits_presets import DIGITS_PRESETS
from advbn_lib.measuring import Job
from advbn_lib.robustness import StrengthTest
from advbn_lib.side_by_side import Beside
from advbn_lib.training import Schedule

pytest.importorskip("sklearn")
pytest.importorskip("torchattacks")
CPU = torch.device("cpu")
FINE_TUNED = ("clean_finetuning", "random_statistics", "mixed_statistics", "advbn", "augmix", "advbn_augmix")
DUAL = ("random_statistics", "mixed_statistics", "advbn", "advbn_augmix")
MEASURES = {
    "accuracy",
    "aligned",
    "colour_gap",
    "corruptions",
    "noise",
    "style",
    "shift_gaussian_noise-3",
    "shift_inverted",
    "pgd_0",
    "pgd_2",
    "pgd_8",
    "pgd_16",
    "apgd",
    "calibration_error",
}


def short(**changes) -> DigitsArena:
    attacked = StrengthTest(
        strengths=(0, 2, 8, 16), steps=2, images=30, fixed_weights=(), cross_strengths=(16,), follow_up_to=16
    )
    sizes = {"images": (64, 60), "schedule": Schedule(epochs=2, batch_size=32, lr=0.05), "levels": (0.02,)}
    sizes |= {"shifts": ("gaussian_noise-3", "inverted"), "attacked": attacked}
    sizes |= {"beside": Beside(apgd_images=8, apgd_steps=2, radius=16.0)}
    return dataclasses.replace(DIGITS_PRESETS["smoke_digits_arena"], **{**sizes, **changes})


def run(arena: DigitsArena, method: str = "natural", seed: int = 0, folder=None, code: str = "code"):
    return run_digits_arena(arena, method, seed, CPU, code, folder, show_progress=False)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_measures(method):
    ran = run(short(), method)
    measured = ran.metrics["digits"]
    branches = set(measured["accuracy"])
    wanted = {"afa": {"fused", "clean", "adversarial"}}
    dual = {name: {"clean", "adversarial"} for name in DUAL}
    assert branches == (wanted | dual).get(method, {"clean"})
    weights = {name: set(measured.pop(name)) for name in ("fusing_weight", "weight_follows") if name in measured}
    assert weights == ({"fusing_weight": {"0", "2", "8", "16"}, "weight_follows": {"all"}} if method == "afa" else {})
    assert measured.keys() == MEASURES | (set() if method in DUAL else {"worst_case_16"}) and method in ABOUT
    for measure, by_branch in measured.items():
        attacked_alone = measure.startswith(("pgd_", "apgd", "worst_case")) and method == "afa"
        assert set(by_branch) == ({"fused"} if attacked_alone else branches)
        for shares in by_branch.values():
            assert shares.keys() == {"0.02", BIASED} and shares["0.02"] == shares[BIASED]
            assert all(0 <= share <= 1 or measure == "colour_gap" for share in shares.values())
    if method not in DUAL:
        [main] = measured["worst_case_16"]
        assert measured["worst_case_16"][main]["0.02"] <= measured["pgd_16"][main]["0.02"], "one of several attacks"
    for branch in branches:
        gap = measured["aligned"][branch]["0.02"] - measured["accuracy"][branch]["0.02"]
        assert measured["colour_gap"][branch]["0.02"] == pytest.approx(gap)
    assert len(ran.curves["clean_loss/0.02"]) == 2, "a loss for each epoch of the budget"
    assert ran.cost["train_cpu_seconds"] > 0 and (
        ran.cost["training_memory_mib"] is None or ran.cost["training_memory_mib"] >= 0
    )
    assert ran.cost["forward_passes"] >= 1 <= ran.cost["backward_passes"]
    assert len(ran.data) == 3 and all(row["sha256"] for row in ran.data.values()) and ran.weights["sha256"]
    json.dumps(dataclasses.asdict(ran), allow_nan=False)


def test_passes_are_those_of_the_methods():
    """Natural training: one of each. PGD: one of each for a step of the attack, and for the loss."""
    assert [run(short(), "natural").cost[way] for way in digits_arena.PASSES] == [1, 1]
    assert [run(short(pgd_steps=2), "pgd").cost[way] for way in digits_arena.PASSES] == [3, 3]
    random, clean = (run(short(), name).cost["forward_passes"] for name in ("random_statistics", "clean_finetuning"))
    assert (random, clean) == (1.5, 1.0), "two branches in the second half of the epochs"


def test_passes_are_counted_inside_the_block_alone():
    layer = nn.Linear(2, 3)
    with counted_passes(layer) as count:
        layer(torch.ones(5, 2)).sum().backward()
        with torch.no_grad():
            layer(torch.ones(7, 2))
    layer(torch.ones(11, 2)).sum().backward()
    assert count == {"forward_passes": 12, "backward_passes": 5}


def test_both_levels_are_averaged_only_over_the_biased_ones():
    both, alone = run(short(levels=(None, 0.02, 0.035))), run(short())
    accuracy = both.metrics["digits"]["accuracy"]["clean"]
    assert accuracy.keys() == {"unbiased", "0.02", "0.035", BIASED}
    assert accuracy[BIASED] == pytest.approx((accuracy["0.02"] + accuracy["0.035"]) / 2)
    for measure, by_branch in alone.metrics["digits"].items():
        assert both.metrics["digits"][measure]["clean"]["0.02"] == by_branch["clean"]["0.02"], (
            "a level stands by itself"
        )
    assert BIASED not in run(short(levels=(None,))).metrics["digits"]["accuracy"]["clean"]


def test_the_seed_decides_and_all_methods_start_from_the_same_weights():
    first, again, other = (run(short(), seed=seed) for seed in (0, 0, 1))
    assert first.curves == again.curves and first.metrics == again.metrics
    assert first.curves != other.curves and first.weights["sha256"] != other.weights["sha256"]
    assert run(short(), "afan").weights == first.weights


def test_what_fine_tunes_begins_with_the_plain_network_and_sees_what_it_would_have_seen():
    """The first part is natural training; clean fine-tuning goes on with the images of the next epoch."""
    arena = short(schedule=Schedule(epochs=4, batch_size=32, lr=0.05, milestones=(3,)))
    losses = run(arena, "clean_finetuning").curves["clean_loss/0.02"]
    assert losses[:2] == run(arena, "natural").curves["clean_loss/0.02"][:2] and len(losses) == 4
    seen = []
    given = digits_arena._Later(type("Recorder", (), {"device": CPU, "epoch": lambda self, *at: seen.append(at)})(), 2)
    given.epoch(0), given.epoch(1, 5)
    assert seen == [(2, 0), (3, 5)]


def test_every_method_has_the_same_budget():
    for name in ("smoke_digits_arena", "cpu_digits_arena"):
        arena = DIGITS_PRESETS[name]
        for method in METHODS:
            parts = arena.schedules(method)
            assert sum(part.epochs for part in parts) == arena.schedule.epochs
            assert len({part.batch_size for part in parts}) == 1
            assert len(parts) == (2 if method in (*FINE_TUNED, "afa") else 1)
            drops = len(arena.schedule.milestones)
            assert all(part.rate(part.epochs) == pytest.approx(part.lr / 10**drops) for part in parts)
            assert parts[-1].lr == {1: arena.schedule.lr, 2: 0.1 if method == "afa" else 0.02}[len(parts)]


def test_with_epochs_of_its_own_a_method_trains_as_long_as_they_say():
    arena = DIGITS_PRESETS["cpu_digits_arena_compute"]
    wanted = dict(arena.epochs)
    assert wanted.keys() == METHODS.keys() and wanted["pgd"] == 2 * arena.schedule.epochs
    for method in METHODS:
        parts = arena.schedules(method)
        assert sum(part.epochs for part in parts) == wanted[method]
        assert all(0 < milestone < part.epochs for part in parts for milestone in part.milestones)
        assert all(part.rate(part.epochs) == pytest.approx(part.lr / 100) for part in parts), "both drops come"
    doubled = short(epochs=(("natural", 4),))
    assert len(run(doubled, "natural").curves["clean_loss/0.02"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": (("magic", 3),)}, "given for magic"),
        ({"first_share": 1.0}, "leave one of them without an epoch"),
        ({"epochs": (("advbn", 1),)}, "advbn trains in two parts"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        short(**changes)


def test_a_missing_class_and_an_unknown_method_are_refused():
    with pytest.raises(DataError, match="no image of"):
        run(short(images=(5, 60)))
    with pytest.raises(ValueError, match="natural, clean_finetuning"):
        run(short(), "magic")


def test_levels_that_are_done_are_not_done_again(tmp_path, monkeypatch):
    arena = short(levels=(0.02, None))
    whole, trained = run(arena), []
    original = digits_arena.train

    def counted(*arguments, **options):
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(digits_arena, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        run(arena, folder=tmp_path)
    torch.manual_seed(99)
    resumed = run(arena, folder=tmp_path)
    assert len(trained) == 3 and resumed.metrics == whole.metrics and resumed.curves == whole.curves
    again = run(arena, folder=tmp_path)
    assert len(trained) == 3 and again.metrics == whole.metrics and again.cost == resumed.cost
    run(arena, folder=tmp_path, code="other code")
    assert len(trained) == 5


def test_a_run_leaves_a_record(tmp_path, monkeypatch):
    monkeypatch.setitem(DIGITS_PRESETS, "smoke_digits_arena", short())
    job = Job("smoke_digits_arena", 0, CPU, tmp_path / "records", tmp_path / "runs", False)
    record = measurements.run_measurement("digits_random_statistics", job)
    assert record.metric("digits/accuracy/adversarial/0.02") >= 0
    assert record.metric("cost/forward_passes") == 1.5 and record.config["method"] == "random_statistics"
    assert measurements.run_measurement("digits_random_statistics", job) == record
