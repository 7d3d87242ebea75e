"""Run records: the one source of the numbers in the book.

A record is a small JSON file, ``records/<experiment>/<preset>-s<seed>.json``, that says what was run, on what, and what came
out. It ends with a digest of its own contents, so that an edit by hand is noticed. This module knows nothing of torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from advbn_lib.files import atomic_write

FORMAT = 1
# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
# fmt: off
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
             2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
# fmt: on


class RecordError(ValueError):
    """A record is missing something, damaged, or was edited; the message names the file."""


@dataclass(frozen=True)
class Record:
    """What one run was and what it gave.

    Attributes:
        experiment, preset, seed: its name.
        key: hash of ``config``, the code that was used, data and starting weights: equal keys, equal runs.
        config: everything that was chosen.
        metrics: results; ``accuracy`` holds shares from 0 to 1 as ``accuracy[branch][shift]``, ``shift`` their means over
            severities, ``mean`` those over families of shifts.
        curves: lists over epochs.
        cost: ``train_seconds``, ``wall_seconds``, ``peak_memory_mib``, ...
        hardware, versions: of the machine and the software; ``test`` in them, if the test ran elsewhere than the training.
        code: ``hash`` of the sources used, git ``commit`` and whether the tree was ``dirty``.
        data, weights: checksums.
        created: date, UTC.
    """

    experiment: str
    preset: str
    seed: int
    key: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    curves: dict[str, Any]
    cost: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, Any]
    code: dict[str, Any]
    data: dict[str, Any]
    weights: dict[str, Any]
    created: str

    def metric(self, path: str) -> float:
        """A number by its path, e.g. ``"accuracy/clean/contrast-3"`` or ``"cost/train_seconds"``.

        Raises:
            RecordError: there is none; the message lists what there is at that place.
        """
        value: Any = {"cost": self.cost, **self.metrics}
        for part in path.split("/"):
            if not isinstance(value, dict) or part not in value:
                there = ", ".join(value) if isinstance(value, dict) else "a number"
                raise RecordError(
                    f"{self.experiment} ({self.preset}, seed {self.seed}) has no {path!r}: at {part!r} there is {there}"
                )
            value = value[part]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            there = f"below it there is {', '.join(value)}" if isinstance(value, dict) else f"it is {value!r}"
            raise RecordError(f"{path!r} of {self.experiment} is not a number; {there}")
        return float(value)


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` seeds with its 95 % interval (Student's t); the interval is NaN for one seed."""

    mean: float
    low: float
    high: float
    n: int


def default_folder() -> Path:
    """Where records are: ``ADVBN_RECORDS`` if set, else the checkout's ``records``, else the copy installed with the library."""
    named = os.environ.get("ADVBN_RECORDS")
    if named:
        return Path(named)
    package = Path(__file__).resolve().parent
    checkout = package.parent / "records"
    return checkout if (package.parent / "pyproject.toml").is_file() else package / "_records"


def path_of(experiment: str, preset: str, seed: int, folder: Path | None = None) -> Path:
    """Where the record of a run is, or would be."""
    return (folder or default_folder()) / experiment / f"{preset}-s{seed}.json"


def write(record: Record, folder: Path | None = None) -> Path:
    """Write ``record`` under its name, atomically, and return the path."""
    body = {"format": FORMAT, **dataclasses.asdict(record)}
    path = path_of(record.experiment, record.preset, record.seed, folder)
    text = json.dumps({**body, "digest": _digest(body)}, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")
    return path


def read(path: Path) -> Record:
    """Read a record and check it.

    Raises:
        RecordError: not a record, of another format, not what its file name says, or edited after the run.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"there is no record {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordError(
            f"{path} is not JSON ({error}): restore it, or remove it and run the experiment again"
        ) from error
    if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
        raise RecordError(f"{path} is not a record of format {FORMAT}")
    if body.pop("digest", None) != _digest({"format": FORMAT, **body}):
        raise RecordError(
            f"{path} was changed after the run (its digest does not fit): restore it, or remove it and run the experiment again"
        )
    expected = {field.name for field in dataclasses.fields(Record)}
    if body.keys() != expected:
        raise RecordError(
            f"{path} lacks {sorted(expected - body.keys())} and has {sorted(body.keys() - expected)} too many"
        )
    record = Record(**body)
    if path.name != f"{record.preset}-s{record.seed}.json" or path.parent.name != record.experiment:
        raise RecordError(
            f"{path} holds the record of {record.experiment}, {record.preset}, seed {record.seed}: its name should say so"
        )
    return record


def load(experiment: str, preset: str, folder: Path | None = None) -> list[Record]:
    """All records of an experiment at a preset, by seed; an empty list if there are none."""
    found = (folder or default_folder()).joinpath(experiment).glob(f"{preset}-s*.json")
    return sorted((read(path) for path in found), key=lambda record: record.seed)


def load_all(folder: Path | None = None) -> list[Record]:
    """All records there are, by experiment, preset and seed."""
    found = (read(path) for path in (folder or default_folder()).glob("*/*.json"))
    return sorted(found, key=lambda record: (record.experiment, record.preset, record.seed))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % t interval of independent values."""
    if not values:
        raise RecordError("there is no value to average: run the experiment first")
    mean, n = fmean(values), len(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = _student_t(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def aggregate(records: Sequence[Record], metric: str) -> Estimate:
    """A metric over seeds."""
    return estimate([record.metric(metric) for record in records])


def difference(
    first: Sequence[Record], second: Sequence[Record], metric: str, second_metric: str | None = None
) -> Estimate:
    """``first`` minus ``second``, paired by seed: seeds share their data order, so pairing takes that noise out.

    Args:
        second_metric: for ``second``, if it is another one (another branch, say).

    Raises:
        RecordError: no seed is in both.
    """
    others = {record.seed: record for record in second}
    pairs = [(record, others[record.seed]) for record in first if record.seed in others]
    if not pairs:
        raise RecordError("the two experiments have no seed in common: run both for the same seeds")
    return estimate([a.metric(metric) - b.metric(second_metric or metric) for a, b in pairs])


def estimates(records: Sequence[Record], path: str) -> dict[str, Estimate]:
    """Every number below a path, e.g. ``"shift/clean"``, over seeds."""
    return {name: aggregate(records, f"{path}/{name}") for name in _below(records, path)}


def differences(
    first: Sequence[Record], second: Sequence[Record], path: str, second_path: str | None = None
) -> dict[str, Estimate]:
    """:func:`difference` of every number below a path that both have."""
    other = second_path or path
    shared = [name for name in _below(first, path) if name in _below(second, other)]
    return {name: difference(first, second, f"{path}/{name}", f"{other}/{name}") for name in shared}


def _below(records: Sequence[Record], path: str) -> list[str]:
    if not records:
        raise RecordError(f"there is no record to read {path!r} from: run the experiment first")
    place: Any = records[0].metrics
    for part in path.split("/"):
        if not isinstance(place, dict) or part not in place:
            raise RecordError(f"{records[0].experiment} has nothing below {path!r}")
        place = place[part]
    return list(place) if isinstance(place, dict) else []


def _student_t(degrees: int) -> float:
    if degrees <= len(STUDENT_T):
        return STUDENT_T[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    # Two terms of the Cornish-Fisher expansion: from 20 degrees on, under 0.001 off.
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
