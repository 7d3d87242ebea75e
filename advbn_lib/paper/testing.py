"""A test at the paper's scale, from the kept weights to the record."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advbn_lib import records
from advbn_lib.data.imagenet import Part
from advbn_lib.data.images import DataError
from advbn_lib.paper.distributed import Processes
from advbn_lib.paper.protocol import RELEASED, Counts, Trained, corruption_error, count_all, find_sets, summarise
from advbn_lib.provenance import code_hash, git_state, hardware, peak_memory_mib, versions

USED = ("advbn_lib.paper.protocol",)


@dataclass(frozen=True)
class PaperTest:
    """What is tested on, and where the results go.

    Args:
        folders: of each test set (names as in :data:`advbn_lib.data.imagenet.TEST_SETS`); None or no entry: not at hand.
        runs_folder, records_folder, workers, partial: as for :class:`~advbn_lib.paper.training.PaperRun`.
        batch_size: images at a time in each process.
    """

    folders: Mapping[str, Path | None]
    runs_folder: Path = Path("runs")
    records_folder: Path | None = None
    workers: int = 4
    batch_size: int = 64
    partial: bool = False
    show_progress: bool = True


def evaluate_paper(test: PaperTest, trained: Trained, processes: Processes) -> records.Record:
    """Test on every set that is there, and write the record. Every process calls it.

    If there is a record of the training, the results are added to it. Sets that are not there are named in its
    ``config["test"]["not_tested"]``. Killed and started again, it goes on with the part that it was at.

    Raises:
        DataError: there is no set at all, a set has another layout, or an image cannot be read.
    """
    started = time.perf_counter()
    parts, not_tested = find_sets(test.folders, test.partial)
    if not parts:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in not_tested.items())
        raise DataError(f"nothing to test on: {reasons}; name a folder, such as --data for ImageNet itself")
    # Counts of other weights, at another crop or by other code are in other files.
    state_file = test.runs_folder / trained.experiment / f"s{trained.seed}" / f"test-{trained.key[:12]}-{code_hash(USED)[:8]}.json"
    counted = count_all(
        trained, [part for members in parts.values() for part in members], processes, state_file,
        batch_size=test.batch_size, workers=test.workers, partial=test.partial, show_progress=test.show_progress,
    )  # fmt: skip
    record = _record(test, trained, parts, counted, not_tested, processes, time.perf_counter() - started)
    if processes.first:
        records.write(record, test.records_folder)
    processes.wait()
    return record


def _record(
    test: PaperTest, trained: Trained, parts: dict[str, list[Part]], counted: dict[str, Counts], not_tested: dict[str, str],
    processes: Processes, seconds: float,
) -> records.Record:  # fmt: skip
    preset = "trial" if test.partial else trained.preset
    old = _of_training(test, trained, preset)
    metrics = _merge(old.metrics, summarise(parts, counted)) if old else summarise(parts, counted)
    machine = {**hardware(processes.device), "processes": processes.count, "precision": "float32"}
    memory = peak_memory_mib(processes.device)
    cost = old.cost if old else {"wall_seconds": round(seconds, 2), "peak_memory_mib": memory}
    test_hash = code_hash(USED)
    code = old.code if old else {"hash": test_hash, **git_state()}
    return records.Record(
        experiment=trained.experiment, preset=preset, seed=trained.seed, key=trained.key,
        config={**trained.config, "test": _about(metrics, not_tested)},
        metrics=metrics,
        curves=old.curves if old else {},
        cost={**cost, "test_seconds": round(sum(counts.seconds for counts in counted.values()), 2)},
        hardware={**old.hardware, "test": machine} if old else machine,
        versions=old.versions if old else versions(),
        code={**code, "test_hash": test_hash},
        data={**(old.data if old else {}), **{name: _data(counts) for name, counts in counted.items()}},
        weights=trained.weights,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def _of_training(test: PaperTest, trained: Trained, preset: str) -> records.Record | None:
    path = records.path_of(trained.experiment, preset, trained.seed, test.records_folder)
    record = records.read(path) if path.exists() else None
    return record if record is not None and record.key == trained.key else None


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old metrics with the new ones, row by row: what is not tested again stays."""
    merged = {}
    for group in dict.fromkeys(("shift", "mce", "selection", *old, *new)):
        rows = {**old.get(group, {}), **new.get(group, {})}
        for name, row in rows.items():
            rows[name] = {**old[group][name], **row} if isinstance(row, dict) and name in old.get(group, {}) else row
        if rows:
            merged[group] = rows
    return merged


def _about(metrics: dict[str, Any], not_tested: dict[str, str]) -> dict[str, Any]:
    """How to read the metrics: earlier tests' sets count as tested."""
    shares = metrics["shift"]["clean"]
    about: dict[str, Any] = {
        "released_branches": dict(RELEASED),
        "not_tested": {name: reason for name, reason in not_tested.items() if name not in shares},
    }
    if "mce" in metrics:
        error = corruption_error(metrics["accuracy"]["clean"])
        about["mce"] = {"reference": error.reference, "missing_corruptions": list(error.missing)}
    return about


def _data(counts: Counts) -> dict[str, Any]:
    return {"images": counts.images, "classes": counts.classes, "sha256_of_names_and_sizes": counts.listing}
