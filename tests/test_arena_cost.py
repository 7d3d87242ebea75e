"""The cost of a step in the arenas, and the epochs that rest on it."""

from __future__ import annotations

import pytest
import torch

from advbn_lib import arena_cost, digits_arena, records
from advbn_lib.arena_cost import AT, BUDGETS, CIFAR_BUDGET, DIGITS_BUDGET, TRAINED, parts_of
from advbn_lib.arena_tables import CIFAR, DIGITS
from advbn_lib.digits_presets import DIGITS_PRESETS
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.measurements import run_measurement
from advbn_lib.measuring import Job
from advbn_lib.plan import SCALES
from advbn_lib.step_timing import in_turns

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


def test_what_a_training_spends_is_the_sum_of_its_parts():
    """A step of plain training is a second, others are two, PGD is ten."""
    seconds = {name: 10.0 if name == "pgd_finetuning" else 2.0 for name in TRAINED} | {"plain_finetuning": 1.0}
    spent, planned = CIFAR_BUDGET.spent(seconds), CIFAR_BUDGET.planned
    assert spent["pgd_finetuning"] == 1 and spent["plain_finetuning"] == planned["plain_finetuning"] / 60
    assert spent["advbn"] == 2 * planned["advbn"] / 60
    both = planned["end_points_finetuning"] + planned["afa_finetuning"]
    assert spent["end_points_finetuning"] == spent["afa_finetuning"] == 2 * both / 60, "two stages share the time"
    seconds = {name: 10.0 if name == "pgd" else 2.0 for name in OF_DIGITS} | {"natural": 1.0, "end_points": 4.0}
    spent, planned = DIGITS_BUDGET.spent(seconds), DIGITS_BUDGET.planned
    assert spent["pgd"] == 1 and spent["natural"] == planned["natural"] / 160
    for name, first in (("advbn", 1), ("afa", 4)):
        plain, own = (part.epochs for part in DIGITS_PRESETS[DIGITS_BUDGET.preset].schedules(name))
        assert plain + own == planned[name] and spent[name] == (first * plain + 2 * own) / 160, (
            "each part at its own cost"
        )


@pytest.mark.parametrize(
    ("epochs", "seconds", "good"),
    [(10, 6.0, True), (10, 7.1, True), (10, 8.0, False), (10, 4.9, True), (10, 4.4, False), (1, 90.0, True), (1, 200.0, False), (1, 30.0, False)],
)  # fmt: skip
def test_a_training_fits_to_half_an_epoch_and_fifteen_per_cent(monkeypatch, epochs, seconds, good):
    """Six epochs of PGD, ten seconds a step each, are the budget: sixty. Ten epochs of six seconds are a perfect match."""
    monkeypatch.setattr(arena_cost.Budget, "planned", {"pgd_finetuning": 6, "advbn": epochs})
    fits = CIFAR_BUDGET.fits({"pgd_finetuning": 10.0, "advbn": seconds})
    assert fits == {"pgd_finetuning": True, "advbn": good}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_epochs_of_the_compute_presets_are_those_of_the_measured_costs(budget):
    """Against the records of the book. A changed record, or a changed preset, fails here."""
    found = records.load("arena_step_cost", budget.measured_at)
    if not found:
        pytest.skip(f"no record yet of arena_step_cost at {budget.measured_at}: run it with python -m advbn_lib run")
    seconds = {name: value.mean for name, value in records.estimates(found, "arena_step_cost/seconds").items()}
    spent, fits = budget.spent(seconds), budget.fits(seconds)
    assert all(fits.values()), (
        f"times the budget: { {name: round(spent[name], 2) for name in spent if not fits[name]} }"
    )


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
