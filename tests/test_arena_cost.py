"""The cost of a step in the arenas, and the epochs that rest on it."""

from __future__ import annotations

import pytest
import torch

from advbn_lib import arena_cost, digits_arena, records
from advbn_lib.arena_cost import AT, BUDGETS, CIFAR_BUDGET, DIGITS_BUDGET, TRAINED, fits, in_turns, parts_of
from advbn_lib.arena_tables import CIFAR, DIGITS
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.measurements import run_measurement
from advbn_lib.measuring import Job
from advbn_lib.plan import SCALES

CPU = torch.device("cpu")
OF_DIGITS = {*digits_arena.METHODS, arena_cost.END_POINTS}


def test_every_method_of_an_arena_has_a_cost_and_epochs():
    arms = {name for arm in CIFAR.arms for name in (*arm.before, arm.experiment)}
    assert set(TRAINED) == {name for name in arms if EXPERIMENTS[name].stage != "none"}
    assert CIFAR_BUDGET.planned.keys() == set(TRAINED)
    assert {f"digits_{name}" for name in DIGITS_BUDGET.planned} == {arm.experiment for arm in DIGITS.arms}
    for budget in BUDGETS.values():
        assert budget.planned[budget.unit] == budget.epochs
        assert budget.measured_at in AT and "arena_step_cost" in SCALES["cpu"][budget.measured_at]


def test_the_time_is_worth_what_the_rule_says():
    """A step of plain training is a second, others are two, PGD is ten."""
    seconds = {name: 10.0 if name == "pgd_finetuning" else 2.0 for name in TRAINED} | {"plain_finetuning": 1.0}
    worth = CIFAR_BUDGET.worth(seconds)
    assert worth["pgd_finetuning"] == 6 and worth["plain_finetuning"] == 60 and worth["advbn"] == 30
    assert worth["end_points_finetuning"] == worth["afa_finetuning"] == 15, "two stages share the time"
    seconds = {name: 10.0 if name == "pgd" else 2.0 for name in OF_DIGITS} | {"natural": 1.0, "end_points": 4.0}
    worth = DIGITS_BUDGET.worth(seconds)
    assert worth["pgd"] == 8 and worth["natural"] == 80 and worth["randmix"] == 40
    assert worth["advbn"] == pytest.approx(80 / 1.5), "half of its epochs are plain ones"
    assert worth["afa"] == pytest.approx(80 / 3), "half of its epochs are for its end points"


@pytest.mark.parametrize(
    ("epochs", "worth", "good"),
    [(3, 2.6, True), (3, 3.4, True), (1, 0.2, True), (2, 0.2, False), (50, 44, True), (52, 43, False), (20, 44, False), (3, 6, False)],
)  # fmt: skip
def test_epochs_are_what_the_time_is_worth(epochs, worth, good):
    assert fits(epochs, worth) == good


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_epochs_of_the_compute_presets_are_those_of_the_measured_costs(budget):
    """Against the records of the book. A changed record, or a changed preset, fails here."""
    found = records.load("arena_step_cost", budget.measured_at)
    if not found:
        pytest.skip(f"no record yet of arena_step_cost at {budget.measured_at}: run it with python -m advbn_lib run")
    seconds = {name: value.mean for name, value in records.estimates(found, "arena_step_cost/seconds").items()}
    worth = budget.worth(seconds)
    wrong = {name: (epochs, worth[name]) for name, epochs in budget.planned.items() if not fits(epochs, worth[name])}
    assert not wrong, f"epochs planned, and worth: {wrong}"


def test_steps_take_turns_and_the_median_counts_without_the_first_rounds():
    order, now = [], iter(range(10_000))
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, lambda: float(next(now)), 3)
    assert order == ["a", "b"] * 5 and seconds == {"a": 1.0, "b": 1.0}
    took = iter([0, 100, 0, 100, 0, 1, 0, 9, 0, 2])
    assert in_turns({"a": lambda: None}, lambda: float(next(took)), 3) == {"a": 2.0}


@pytest.mark.parametrize("preset", ["smoke_arena", "smoke_digits_arena"])
def test_the_cost_of_every_step_is_measured(tmp_path, monkeypatch, preset):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(arena_cost, "ROUNDS", 3)
    record = run_measurement("arena_step_cost", Job(preset, 0, CPU, tmp_path))
    ratio, seconds = (record.metrics["arena_step_cost"][what] for what in ("ratio", "seconds"))
    plain, pgd = ("plain_finetuning", "pgd_finetuning") if preset == "smoke_arena" else ("natural", "pgd")
    assert seconds.keys() == (set(TRAINED) if preset == "smoke_arena" else OF_DIGITS)
    assert ratio[plain] == 1 and ratio[pgd] == pytest.approx(seconds[pgd] / seconds[plain]) and ratio[pgd] > 1.5
    assert record.config["rounds"] == 3 and record.weights["sha256"] and record.data


def test_parts_have_names_of_their_own():
    assert parts_of("natural") == ("natural",) and parts_of("advbn") == ("natural", "advbn")
    assert parts_of("afa") == ("end_points", "afa")
    for method, builders in digits_arena.METHODS.items():
        assert len(parts_of(method)) == len(builders)
