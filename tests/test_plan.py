"""What the book lacks, what that will cost, and the workflow that runs it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advbn_lib import plan, records
from advbn_lib.__main__ import main
from advbn_lib.claims import read_claims
from advbn_lib.experiments import EXPERIMENTS, find
from advbn_lib.measurements import MEASUREMENTS
from advbn_lib.plan import SCALES, Planned, costs, missing, planned

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = [run for scale in SCALES for run in planned(scale)]


def record(run: Planned, hours: float = 1.0, **hardware) -> records.Record:
    machine = {"gpu": None, "cpu": "A chip", "threads": 1, **hardware}
    return records.Record(
        experiment=run.experiment, preset=run.preset, seed=run.seed, key="", config={}, metrics={}, curves={},
        cost={"wall_seconds": 3600 * hours}, hardware=machine, versions={}, code={}, data={}, weights={}, created="",
    )  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
def test_every_planned_run_can_be_made(scale):
    runs = planned(scale)
    assert len(set(runs)) == len(runs) > 0
    for run in runs:
        if run.experiment in EXPERIMENTS:
            find(run.experiment, run.preset)
        else:
            assert run.preset in MEASUREMENTS[run.experiment].presets


def test_what_the_claims_of_the_book_need_is_planned():
    """At the scales whose records are in the book."""
    there = {(run.experiment, run.preset) for run in EVERYTHING}
    presets = {preset for scale in SCALES.values() for preset in scale}
    for claim in read_claims(ROOT / "book" / "claims.yml"):
        for preset in set(claim.presets) & presets:
            assert {(side.experiment, preset) for side in claim.sides} <= there, claim.id


def test_every_record_in_the_book_is_planned():
    """Else a deleted one would not come back."""
    found = {Planned(r.experiment, r.preset, r.seed) for r in records.load_all(ROOT / "records")}
    assert found and found <= set(planned("cpu") + planned("gpu"))


def test_a_run_begins_with_the_trainings_it_needs():
    assert Planned("afa", "cpu_attack", 1).begins_with == (Planned("end_points", "cpu_attack", 1),)
    assert Planned("advbn", "cpu_fresh", 2).begins_with == (Planned("pretrain", "cpu_fresh", 2),)
    assert Planned("advbn", "cpu", 2).begins_with == () == Planned("detection_afan", "cpu", 0).begins_with
    assert Planned("masking_checks", "cpu_attack", 0).begins_with == tuple(
        Planned(name, "cpu_attack", 0) for name in ("pretrain", "pgd_8", "afa")
    )
    assert Planned("appearance", "cpu", 0).begins_with == ()
    for run in EVERYTHING:
        assert all(start.experiment in EXPERIMENTS and start.seed == run.seed for start in run.begins_with)


def test_deleted_records_are_what_is_missing(tmp_path):
    runs = planned("smoke")
    for run in runs:
        records.write(record(run), tmp_path)
    assert missing(runs, tmp_path) == []
    gone = runs[::3]
    for run in gone:
        run.record(tmp_path).unlink()
    assert missing(runs, tmp_path) == gone


def test_an_edited_record_is_no_missing_one(tmp_path):
    run = planned("smoke")[0]
    path = records.write(record(run), tmp_path)
    path.write_text(path.read_text().replace("A chip", "Another"))
    with pytest.raises(records.RecordError, match="changed after the run"):
        missing([run], tmp_path)


def test_costs_are_those_of_runs_of_the_same_kind_on_each_machine(tmp_path):
    kind = ("advbn", "smoke")
    for seed, hours in ((0, 1.0), (1, 3.0)):
        records.write(record(Planned(*kind, seed), hours), tmp_path)
    records.write(record(Planned("untouched", "smoke", 0), 0.5, threads=2), tmp_path)
    wanted = [Planned(*kind, 2), Planned(*kind, 3), Planned("afan", "cpu_scratch", 0)]
    assert costs(wanted, tmp_path) == [plan.Cost("A chip, 1 thread", 4.0, 1)], (
        "the other machine has made none of these"
    )
    records.write(record(Planned(*kind, 4), 0.25, threads=2), tmp_path)
    assert costs(wanted, tmp_path) == [
        plan.Cost("A chip, 2 threads", 0.5, 1),
        plan.Cost("A chip, 1 thread", 4.0, 1),
    ]
    assert costs([Planned("augmix", "smoke", 0)], tmp_path)[0] == plan.Cost("A chip, 2 threads", 0.375, 0, rough=1)
    assert costs([], tmp_path) == [] == costs(wanted, tmp_path / "none")


def test_a_run_that_was_never_made_is_guessed_from_its_preset(tmp_path):
    """An experiment's seeds count as one: the mean is over experiments."""
    for name, seed, hours in (("advbn", 0, 1.0), ("advbn", 1, 3.0), ("untouched", 0, 0.5), ("untouched", 1, 0.5)):
        records.write(record(Planned(name, "smoke", seed), hours), tmp_path)
    wanted = [Planned("advbn", "smoke", 2), Planned("augmix", "smoke", 0), Planned("advbn", "cpu", 0)]
    [found] = costs(wanted, tmp_path)
    assert found == plan.Cost("A chip, 1 thread", 2.0 + (2.0 + 0.5) / 2, 1, rough=1)
    assert str(found) == (
        "about 3.2 hours one after the other (A chip, 1 thread), roughly: 1 of the runs are guessed from others of their preset, "
        "and 1 runs that no record of this machine tells about"
    )


def test_trainings_whose_weights_are_gone_are_counted_once(tmp_path):
    """AFA needs its end points; the end points of the other seed are still there, and those of a third are to be run anyway."""
    for seed in (0, 1, 2):
        one = record(Planned("end_points", "smoke_attack", seed), 1.0)
        records.write(dataclasses.replace(one, cost={**one.cost, "train_seconds": 1800.0}), tmp_path)
        records.write(record(Planned("afa", "smoke_attack", seed), 0.25), tmp_path)
    kept = tmp_path / "runs" / "end_points" / "smoke_attack-s1" / "final.pt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    wanted = [Planned("afa", "smoke_attack", seed) for seed in (0, 1, 2)]
    wanted += [Planned("end_points", "smoke_attack", 2), Planned("afa_network", "smoke_attack", 0)]
    again = plan.to_train_again(wanted, tmp_path / "runs")
    assert again == [Planned("end_points", "smoke_attack", 0)]
    [found], [without] = costs(wanted, tmp_path, tmp_path / "runs"), costs(wanted, tmp_path)
    assert (found.trainings, without.trainings) == (1, 0) and found.hours == pytest.approx(without.hours + 0.5)
    assert "with 1 trainings made again" in str(found)


def test_weights_that_other_lost_weights_begin_with_are_trained_again_too(tmp_path):
    [afa] = [run for run in planned("cpu", [0]) if (run.experiment, run.preset) == ("afa_finetuning", "cpu_arena")]
    names = {run.experiment for run in plan.to_train_again([afa], tmp_path)}
    assert names == {"end_points_finetuning", "pretrain"}


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="no scale 'cpu_fresh'; there are smoke, cpu, gpu"):
        planned("cpu_fresh")


def test_the_command_says_what_is_missing_and_what_it_costs(tmp_path, capsys):
    everything = planned("smoke", [0])
    for run in everything:
        records.write(record(run, 0.25), tmp_path)
    assert main(["--records", str(tmp_path), "plan", "--preset", "smoke", "--seed", "0"]) == 0
    assert capsys.readouterr().out == f"smoke: {len(everything)} runs, 0 without a record\n"
    records.write(record(Planned("advbn", "smoke", 1), 0.75), tmp_path)
    Planned("advbn", "smoke", 0).record(tmp_path).unlink()
    assert main(["--records", str(tmp_path), "plan", "--preset", "smoke", "--seed", "0"]) == 0
    said = capsys.readouterr().out
    assert "advbn (smoke): seed 0\n" in said and "about 0.8 hours one after the other (A chip, 1 thread)" in said


def test_the_command_prints_every_claim_and_its_verdict(tmp_path, capsys):
    assert main(["--records", str(tmp_path), "claims"]) == 0
    said = capsys.readouterr().out
    claims = read_claims(ROOT / "book" / "claims.yml")
    assert all(f"{claim.id} ({claim.paper}): {claim.says}" in said for claim in claims)
    assert said.count("not run") == sum(len(claim.presets) for claim in claims)
    assert main(["--records", str(tmp_path), "claims", "--preset", "huge"]) == 1
    assert "no preset 'huge'" in capsys.readouterr().err


# The workflow itself

needs_snakemake = pytest.mark.skipif(
    shutil.which("snakemake", path=Path(sys.executable).parent) is None, reason="needs snakemake"
)


def command(folder: Path, *words: str) -> list[str | Path]:
    return [
        sys.executable, "-m", "snakemake", "-s", ROOT / "workflow" / "Snakefile", "--directory", folder, "--cores", "2", "--nolock",
        "--rerun-incomplete", *words, "--config", "preset=smoke", "seeds=0", f"records={folder / 'records'}", f"runs={folder / 'runs'}",
        "book=false",
    ]  # fmt: skip


def snakemake(folder: Path, *words: str) -> None:
    ended = subprocess.run(command(folder, *words), cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def records_but(gone: tuple[str, ...], folder: Path) -> dict[Path, bytes]:
    """Records of everything else, written; what is in them."""
    paths = [records.write(record(run), folder) for run in planned("smoke", [0]) if run.experiment not in gone]
    return {path: path.read_bytes() for path in paths}


@needs_snakemake
def test_the_workflow_runs_what_is_missing_and_nothing_else(tmp_path):
    gone = ("untouched", "clean_finetuning")
    before = records_but(gone, tmp_path / "records")
    snakemake(tmp_path, "--dry-run")
    assert not (tmp_path / "runs").exists()
    snakemake(tmp_path)
    assert missing(planned("smoke", [0]), tmp_path / "records") == []
    assert {path: path.read_bytes() for path in before} == before
    for name in gone:
        assert (
            records.read(Planned(name, "smoke", 0).record(tmp_path / "records")).metric("mean/clean/corruptions") > 0.2
        )
    trained = {path.parent.parent.name for path in (tmp_path / "runs").glob("*/*/final.pt")}
    assert trained == {"pretrain", *gone}
    made = {path: path.stat().st_mtime_ns for part in ("records", "runs") for path in (tmp_path / part).rglob("*.*")}
    snakemake(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in made} == made


@needs_snakemake
def test_a_killed_workflow_goes_on(tmp_path):
    tmp_path = tmp_path / "a folder"  # blanks must not matter
    tmp_path.mkdir()
    before = records_but(("random_statistics",), tmp_path / "records")
    running = subprocess.Popen(command(tmp_path), cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    started = tmp_path / "runs" / "pretrain"
    while not list(started.glob("*/training-*.pt")):  # its first checkpoint
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not list(started.glob("*/final.pt")), "it was killed too late to show anything"
    snakemake(tmp_path)
    assert missing(planned("smoke", [0]), tmp_path / "records") == []
    assert {path: path.read_bytes() for path in before} == before
