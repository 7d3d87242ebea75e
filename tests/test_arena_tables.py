"""The comparison read from records: with none, with some and with all of them; and the chapter that shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from advbn_lib import records
from advbn_lib.arena_tables import ARENAS, CIFAR, COST, DIGITS, Arena, record_link, verdict
from advbn_lib.digits_arena import METHODS
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.figures import as_html
from advbn_lib.measurements import MEASUREMENTS
from advbn_lib.records import Estimate, Record, RecordError

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "notebooks" / "13_side_by_side.ipynb"


def share(name: str, branch: str, metric: str, seed: int) -> float:
    """A number for each cell, the same each time; natural training is the best by far, and the seeds differ a little."""
    base = 0.8 if name in ("digits_natural", "plain_finetuning") else 0.3
    return base + 0.001 * (sum(map(ord, name + branch + metric)) % 50) + 0.002 * seed


def write(
    arena: Arena, folder: Path, names: set[str] | None = None, seeds: tuple[int, ...] = (0, 1, 2), device: str = "cpu", **cost,
) -> None:  # fmt: skip
    """Made-up records with all that the arena reads; an experiment's seconds are ten, and ten more for each letter beyond ten.

    By the clock they are as many as the seed is larger than minus one: a busy machine. ``cost`` is put over the costs.
    """
    for name in dict.fromkeys(name for arm in arena.arms for name in (*arm.before, arm.experiment)):
        for seed in seeds if names is None or name in names else ():
            metrics: dict = {}
            for arm in (arm for arm in arena.arms if arm.experiment == name):
                for column in (*arena.columns, *arena.families):
                    *path, last = column.metric.format(branch=arm.branch).split("/")
                    place = metrics
                    for part in path:
                        place = place.setdefault(part, {})
                    place[last] = share(name, arm.branch, column.metric, seed)
            seconds = 10.0 + 10 * max(0, len(name) - 10)
            took = {
                "train_seconds": seconds * (seed + 1),
                "train_cpu_seconds": seconds,
                "training_memory_mib": 100.0 + seed,
                **cost,
            }
            took |= (
                {"train_seconds": 0.0, "train_cpu_seconds": 0.0, "training_memory_mib": None}
                if name == "untouched"
                else {}
            )
            run = Record(
                experiment=name, preset=arena.preset, seed=seed, key="", config={}, metrics=metrics, curves={}, cost=took,
                hardware={"device": device}, versions={}, code={}, data={}, weights={}, created="",
            )  # fmt: skip
            records.write(run, folder)


@pytest.mark.parametrize("arena", (DIGITS, CIFAR), ids=lambda arena: arena.preset)
def test_without_records_there_is_nothing_but_commands(tmp_path, arena):
    assert arena.runs(tmp_path) == arena.values(arena.columns, tmp_path) == arena.costs(tmp_path) == {}
    assert arena.differences(arena.columns, tmp_path) == arena.by_seed(arena.columns, tmp_path) == {}
    commands = arena.commands(tmp_path)
    assert len(commands) == len({name for arm in arena.arms for name in (*arm.before, arm.experiment)})
    assert all(f"--preset {arena.preset} --seed 0 1 2" in command for command in commands)


@pytest.mark.parametrize("arena", (DIGITS, CIFAR), ids=lambda arena: arena.preset)
def test_with_all_records_every_cell_has_a_number(tmp_path, arena):
    write(arena, tmp_path)
    labels = {arm.label for arm in arena.arms}
    values, differences = (
        read([*arena.columns, *arena.families], tmp_path) for read in (arena.values, arena.differences)
    )
    assert arena.commands(tmp_path) == [] and values.keys() == labels and differences.keys() == labels - {"natural"}
    assert all(row.keys() == {*(c.label for c in (*arena.columns, *arena.families)), COST} for row in values.values())
    assert all(cell.n == 3 for row in values.values() for cell in row.values())
    arm, column = arena.arms[-1], arena.columns[0]
    natural = next(arm for arm in arena.arms if arm.label == "natural")
    wanted = share(arm.experiment, arm.branch, column.metric, 1) - share(natural.experiment, "clean", column.metric, 1)
    assert differences[arm.label][column.label].mean == pytest.approx(wanted)
    assert verdict(differences[arm.label][column.label]) == "worse"
    assert arena.memory(tmp_path)[arm.label] == pytest.approx(101)


def test_costs_are_ratios_and_count_what_a_method_goes_on_from(tmp_path):
    write(CIFAR, tmp_path)
    costs = CIFAR.costs(tmp_path)
    plain = 10.0 + 10 * (len("plain_finetuning") - 10)
    both = sum(10.0 + 10 * (len(name) - 10) for name in ("afa_finetuning", "end_points_finetuning"))
    assert costs["natural"].mean == 1.0 and costs["AFA"].mean == pytest.approx(both / plain)
    assert costs["AdvBN"].mean == costs["AdvBN, adv. BN"].mean == pytest.approx(10 / plain)


def test_costs_do_not_depend_on_what_else_a_cpu_does_and_are_by_the_clock_on_a_gpu(tmp_path):
    write(CIFAR, tmp_path, {"plain_finetuning"})
    write(CIFAR, tmp_path, {"advbn"}, seeds=(0,))
    write(CIFAR, tmp_path, {"advbn"}, seeds=(1,), train_seconds=9e9)
    ratios = CIFAR.costs(tmp_path)["AdvBN"]
    assert ratios.n == 2 and ratios.low == ratios.mean == ratios.high
    assert CIFAR.clocks(tmp_path) == ["seconds of computing on a CPU, summed over threads"]
    write(CIFAR, tmp_path, {"advbn"}, seeds=(0, 1), device="cuda")
    assert "AdvBN" not in CIFAR.costs(tmp_path), "a GPU's seconds in those of a CPU"
    assert len(CIFAR.clocks(tmp_path)) == 2
    write(CIFAR, tmp_path, {"plain_finetuning"}, device="cuda", train_cpu_seconds=1.0)
    assert CIFAR.costs(tmp_path)["AdvBN"].mean == pytest.approx(10 / (10.0 + 10 * (len("plain_finetuning") - 10)))


def test_records_of_before_cost_was_measured_show_none(tmp_path):
    write(CIFAR, tmp_path, train_cpu_seconds=None, training_memory_mib=None)
    assert CIFAR.costs(tmp_path) == CIFAR.memory(tmp_path) == {}
    assert CIFAR.values(CIFAR.columns, tmp_path).keys() == {arm.label for arm in CIFAR.arms}
    write(CIFAR, tmp_path, {"plain_finetuning", "advbn"}, seeds=(1,))
    assert CIFAR.costs(tmp_path)["AdvBN"].n == 1 and CIFAR.memory(tmp_path)["AdvBN"] == 101


def test_at_the_same_time_costs_are_in_those_of_pgd(tmp_path):
    for arena in (ARENAS[1], ARENAS[3]):
        write(arena, tmp_path)
        costs = arena.costs(tmp_path)
        assert costs["PGD"].mean == 1.0 and costs["natural"].mean != 1.0


def test_memory_is_the_larger_of_a_training_and_of_what_it_goes_on_from(tmp_path):
    write(CIFAR, tmp_path)
    write(CIFAR, tmp_path, {"end_points_finetuning"}, training_memory_mib=500.0)
    memory = CIFAR.memory(tmp_path)
    assert memory["AFA"] == 500 and memory["PGD"] == 101 and "the start itself" not in memory


def test_with_some_records_the_rest_is_left_out(tmp_path):
    write(CIFAR, tmp_path, {"advbn", "afa_finetuning"})
    assert [arm.label for arm in CIFAR.runs(tmp_path)] == ["AdvBN", "AdvBN, adv. BN"], "AFA's first stage is missing"
    assert CIFAR.costs(tmp_path) == CIFAR.differences(CIFAR.columns, tmp_path) == {}
    write(CIFAR, tmp_path, {"end_points_finetuning", "plain_finetuning"}, seeds=(1,))
    assert {label: row["clean"].n for label, row in CIFAR.values(CIFAR.columns, tmp_path).items()} == {
        "natural": 1, "AdvBN": 3, "AdvBN, adv. BN": 3, "AFA": 1,
    }  # fmt: skip
    assert {row["clean"].n for row in CIFAR.differences(CIFAR.columns, tmp_path).values()} == {1}
    assert {len(row["clean"]) for row in CIFAR.by_seed(CIFAR.columns, tmp_path).values()} == {1}
    assert "python -m advbn_lib run plain_finetuning --preset cpu_arena --seed 0 2 --threads 1" in CIFAR.commands(
        tmp_path
    )
    write(CIFAR, tmp_path, {"pgd_finetuning"}, seeds=(2,))
    assert CIFAR.by_seed(CIFAR.columns, tmp_path) == {}, "no seed is shared by all"
    assert "PGD" not in CIFAR.differences(CIFAR.columns, tmp_path) and "PGD" in CIFAR.values(CIFAR.columns, tmp_path)


@pytest.mark.parametrize(
    ("value", "low_is_good", "words"),
    [
        (Estimate(0.1, 0.05, 0.15, 3), False, "better"),
        (Estimate(0.1, 0.05, 0.15, 3), True, "worse"),
        (Estimate(-0.1, -0.15, -0.05, 3), False, "worse"),
        (Estimate(-0.1, -0.15, -0.05, 3), True, "better"),
        (Estimate(0.1, -0.05, 0.25, 3), False, "undecided"),
        (Estimate(0.1, math.nan, math.nan, 1), False, "one seed"),
    ],
)
def test_verdicts(value, low_is_good, words):
    assert verdict(value, low_is_good) == words


def test_arms_are_runs_that_can_be_made():
    assert {arm.experiment for arm in DIGITS.arms} == {f"digits_{method}" for method in METHODS}
    for arena in ARENAS:
        for arm in arena.arms:
            for name in (*arm.before, arm.experiment):
                assert name in EXPERIMENTS or arena.preset in MEASUREMENTS[name].presets
        assert len({arm.label for arm in arena.arms}) == len(arena.arms)


def test_a_measure_can_be_left_out_by_its_name():
    left = DIGITS.without("APGD 16")
    assert [column for column in DIGITS.columns if column not in left.columns] == [
        column for column in DIGITS.columns if column.label == "APGD 16"
    ]
    with pytest.raises(ValueError, match="measures are clean, .*got 'APGD 8'"):
        DIGITS.without("APGD 8")


def test_links_lead_to_the_page_of_records():
    from docutils.nodes import make_id

    link = record_link("digits_advbn", "cpu_digits_arena")
    assert f'"../book/records.html#{make_id("record-digits_advbn-cpu_digits_arena")}"' in link
    assert record_link("advbn", "cpu", "1 < 2").endswith(">1 &lt; 2</a>")
    [afa] = [arm for arm in CIFAR.arms if arm.label == "AFA"]
    assert all(f"record-{name}-finetuning-cpu-arena" in CIFAR.links(afa) for name in ("end-points", "afa"))
    with pytest.raises(RecordError, match="no name of records"):
        record_link('"><script>', "cpu")


@pytest.mark.parametrize("there", ["none", "some", "all"])
def test_the_chapter_shows_what_there_is(tmp_path, monkeypatch, capsys, there):
    """The cells that read records, run as they stand; figures are drawn in earnest."""
    some = {"digits_natural", "digits_advbn", "advbn", "pgd_finetuning"}
    for arena in ARENAS if there != "none" else ():
        write(arena, tmp_path, some if there == "some" else None)
    monkeypatch.setenv("ADVBN_RECORDS", str(tmp_path))
    figures, tables, names = [], [], {}
    monkeypatch.setattr("advbn_lib.figures.show", lambda figure, alt: figures.append(as_html(figure, alt)))
    monkeypatch.setattr("advbn_lib.figures.show_table", lambda head, rows, fold="": tables.append((head, rows)))
    sources = ["".join(c["source"]) for c in json.loads(CHAPTER.read_text())["cells"] if c["cell_type"] == "code"]
    for part in sources[1:]:
        if "live(method)" in part or "(LIVE, " in part or "LIVE.preset].about" in part:
            part = part.split("\n\n\nheat(LIVE")[0].split("\n\n\nranked(LIVE")[0].split("\n\n\ngains(LIVE")[0]
            part = 'LIVE = DIGITS.at("smoke_digits_arena", "").without("APGD 16")' if "live(method)" in part else part
        exec(compile(part.replace('preset = "auto"', 'preset = "smoke"'), CHAPTER.name, "exec"), names)
    said = capsys.readouterr().out
    assert said.count("not run yet") == (4 if there == "none" else 0)
    assert said.count("not timed yet") == 2 and "the time of 6 epochs of PGD training" in said
    assert len(figures) == {"none": 0, "some": 13, "all": 16}[there]
    assert len(tables) == 1 + (0 if there == "none" else 2 * 4), "of each arena the differences, and the values"
    for head, rows in tables[1:]:
        assert all(len(row) == len(head) and row[-1].startswith("<a href=") for row in rows)
        assert all(cell == "–" or cell.startswith("<a href=") for row in rows for cell in row[3:-2]), (
            "every cell is linked"
        )
    if there == "all":
        assert "lack seeds" not in said and "–" not in {cell for row in tables[1][1][1:] for cell in row}
