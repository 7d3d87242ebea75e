"""The claims ledger: verdicts computed from records by criteria that were fixed before the runs (``book/claims.yml``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, Literal

from advbn_lib import plan, records, reported
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.measurements import MEASUREMENTS
from advbn_lib.presets import PRESETS
from advbn_lib.records import Estimate, Record, RecordError

Verdict = Literal[
    "holds at this scale", "does not hold at this scale", "undecided at this scale", "incomplete", "not run"
]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a metric of an experiment."""

    experiment: str
    metric: str


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the comparison that decides: ``first`` minus ``second``, paired by seed, must exceed ``above``.

    Without ``second``, ``first`` itself must. It is decided at each of ``presets`` by itself.

    Attributes:
        protocol: what is trained, what is measured, through which branch or under which attack: a sentence.
        controls: what else could bring about the effect, and is tested: names of experiments, ids of claims, or sentences.
        reported: the paper's numbers, keys of :data:`advbn_lib.reported.REPORTED`.
        reported_why: if there are none, why; else, what to mind in comparing.
        needs: claims without which this one says nothing: where one of them does not hold, this one cannot.
        written: the criterion, before or after the runs were seen.
    """

    id: str
    paper: str
    says: str
    first: Side
    second: Side | None
    above: float
    presets: tuple[str, ...] = ("cpu",)
    protocol: str = ""
    controls: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()
    reported_why: str = ""
    needs: tuple[Claim, ...] = ()
    written: Literal["before", "after"] = "before"

    @property
    def sides(self) -> tuple[Side, ...]:
        """One or two."""
        return (self.first,) if self.second is None else (self.first, self.second)


@dataclass(frozen=True)
class Spent:
    """What one run of a claim's first side took on one kind of machine: training and test, the mean over its records."""

    machine: str
    hours: float


@dataclass(frozen=True)
class Finding:
    """A claim at a preset.

    Attributes:
        effect: None if it was not run, or if the sides have no seed in common.
        reason: of a verdict that the interval alone does not explain, e.g. ``"2 of 3 seeds"``; else empty.
        cost: by kind of machine.
    """

    claim: Claim
    preset: str
    verdict: Verdict
    effect: Estimate | None
    reason: str = ""
    cost: tuple[Spent, ...] = ()

    @property
    def in_words(self) -> str:
        """The verdict, and its reason in brackets."""
        return f"{self.verdict} ({self.reason})" if self.reason else self.verdict


def claims_file() -> Path:
    """The ledger of the checkout that the library is in.

    Raises:
        FileNotFoundError: the library is installed without one.
    """
    path = Path(__file__).resolve().parent.parent / "book" / "claims.yml"
    if not path.is_file():
        raise FileNotFoundError(
            "the claims are in book/claims.yml of a checkout, and this is none: clone the repository"
        )
    return path


def read_claims(path: Path) -> list[Claim]:
    """The claims in a ledger file.

    Raises:
        RecordError: the file is no list, an entry lacks a field, an id stands twice, or what an entry needs does not stand before it.
    """
    import yaml

    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecordError(f"{path} is not YAML: {error}") from error
    if not isinstance(rows, list):
        raise RecordError(f"{path} is no list of claims")
    found: dict[str, Claim] = {}
    for row in rows:
        name = row.get("id") if isinstance(row, Mapping) else None
        try:
            claim = _claim(row, found)
        except (TypeError, KeyError, ValueError) as error:
            raise RecordError(f"{path}: the entry {name!r} is not a claim: {error}") from error
        if claim.id in found:
            raise RecordError(f"{path}: the id {claim.id!r} stands twice")
        found[claim.id] = claim
    return list(found.values())


def _claim(row: dict[str, Any], before: Mapping[str, Claim]) -> Claim:
    """One entry; ``before``: those above it, which it may need."""
    sides = {side: Side(**row[side]) if row[side] else None for side in ("first", "second")}
    words = [name for name in ("presets", "controls", "reported", "needs") if isinstance(row.get(name), str)]
    if words:
        raise ValueError(f"{', '.join(words)} must be a list: [{row[words[0]]}]")
    if isinstance(row["above"], bool) or not isinstance(row["above"], int | float):
        raise ValueError(f"above must be a number, got {row['above']!r}")
    lists = {name: tuple(row.get(name) or ()) for name in ("presets", "controls", "reported")}
    needs = row.get("needs") or []
    if missing := [name for name in needs if name not in before]:
        raise ValueError(f"it needs {', '.join(missing)}, which must stand above it")
    claim = Claim(**{**row, **sides, **lists, "needs": tuple(before[name] for name in needs)})
    if claim.first is None:
        raise ValueError("it has no first side")
    for side in claim.sides:  # else a slip of the pen reads as "not run"
        if side.experiment not in EXPERIMENTS and side.experiment not in MEASUREMENTS:
            raise ValueError(f"{side.experiment!r} is no experiment; python -m advbn_lib list has all")
        known = MEASUREMENTS[side.experiment].presets if side.experiment in MEASUREMENTS else PRESETS
        if elsewhere := [preset for preset in claim.presets if preset not in known]:
            raise ValueError(f"{side.experiment} has no preset {', '.join(elsewhere)}")
    if not (claim.presets and claim.protocol and claim.controls):
        raise ValueError("it must have presets, a protocol and controls")
    if not (claim.reported or claim.reported_why):
        raise ValueError("it must say which numbers the paper has (reported) or why there is none (reported_why)")
    if unknown := [key for key in claim.reported if key not in reported.REPORTED]:
        raise ValueError(f"advbn_lib.reported has no {', '.join(unknown)}")
    if claim.written not in ("before", "after"):
        raise ValueError(f"it was written before or after the runs, got {claim.written!r}")
    for needed in claim.needs:
        if elsewhere := set(claim.presets) - set(needed.presets):
            raise ValueError(f"it needs {needed.id}, which is not decided at {', '.join(sorted(elsewhere))}")
    return claim


def decide(claim: Claim, preset: str, folder: Path | None = None) -> Finding:
    """The verdict: holds if the whole 95 % interval is above the criterion, does not if it is wholly below, else undecided.

    Seeds beyond those that :mod:`advbn_lib.plan` has do not count, and while one of those is lacking on a side the verdict is
    "incomplete": who may choose when to stop can choose the verdict. A preset that the plan does not have takes all seeds. A claim
    whose ``needs`` do not all hold cannot hold: its verdict is then "undecided", with the reason.
    """
    runs = [records.load(side.experiment, preset, folder) for side in claim.sides]
    if not all(runs):
        return Finding(claim, preset, "not run", None)
    due, common = seeds_due(claim, preset), set.intersection(*({run.seed for run in side} for side in runs))
    counted = common if due is None else common & due
    cost, effect = spent(runs[0]), _effect(claim, runs, counted) if counted else None
    if effect is None or (due is not None and counted < due):
        reason = "no seed in common" if due is None else f"{len(counted)} of {len(due)} seeds"
        return Finding(claim, preset, "incomplete", effect, reason, cost)
    if effect.low > claim.above:
        verdict, reason = _holds_unless(claim, preset, folder)
    elif effect.high < claim.above:
        verdict, reason = "does not hold at this scale", ""
    else:  # also for one seed, whose interval is NaN
        verdict, reason = "undecided at this scale", ""
    return Finding(claim, preset, verdict, effect, reason, cost)


def _effect(claim: Claim, runs: list[list[Record]], seeds: set[int]) -> Estimate:
    first, *second = ([run for run in side if run.seed in seeds] for side in runs)
    if claim.second is None:
        return records.aggregate(first, claim.first.metric)
    return records.difference(first, second[0], claim.first.metric, claim.second.metric)


def _holds_unless(claim: Claim, preset: str, folder: Path | None) -> tuple[Verdict, str]:
    """The verdict of a claim whose own numbers hold, and why it is another: something that it needs does not hold."""
    needed = {one.id: decide(one, preset, folder).verdict.removesuffix(" at this scale") for one in claim.needs}
    words = {"undecided": "is undecided", "incomplete": "is incomplete", "not run": "was not run"}
    lacking = [f"{name}, which {words.get(verdict, verdict)}" for name, verdict in needed.items() if verdict != "holds"]
    return ("undecided at this scale", f"needs {'; and '.join(lacking)}") if lacking else ("holds at this scale", "")


def seeds_due(claim: Claim, preset: str) -> frozenset[int] | None:
    """The seeds that the plan has for every side of a claim that is in it; None: for no side."""
    planned = [_planned_seeds().get((side.experiment, preset)) for side in claim.sides]
    due = [seeds for seeds in planned if seeds is not None]
    return frozenset.intersection(*due) if due else None


@cache
def _planned_seeds() -> Mapping[tuple[str, str], frozenset[int]]:
    """By experiment and preset."""
    seeds: dict[tuple[str, str], frozenset[int]] = {}
    for run in (run for scale in plan.SCALES for run in plan.planned(scale)):
        pair = (run.experiment, run.preset)
        seeds[pair] = seeds.get(pair, frozenset()) | {run.seed}
    return MappingProxyType(seeds)


def spent(runs: list[Record]) -> tuple[Spent, ...]:
    """The mean hours of these runs by kind of machine: training and test; of a measurement without these, the whole."""
    hours: dict[str, list[float]] = {}
    for run in runs:
        if {"train_seconds", "test_seconds"} <= run.cost.keys():  # all of it, also where a killed run went on
            seconds = run.cost["train_seconds"] + run.cost["test_seconds"]
        else:
            seconds = run.cost.get("wall_seconds")
        if seconds is not None:
            hours.setdefault(plan.machine(run), []).append(seconds / 3600)
    return tuple(Spent(machine, fmean(each)) for machine, each in hours.items())


def sentence(finding: Finding) -> str:
    """E.g. ``"undecided at this scale: 0.004, 95 % interval -0.004 to 0.011, n = 3; the limit is 0"``, as plain text."""
    effect = finding.effect
    if effect is None:
        return finding.in_words
    interval = f", 95 % interval {effect.low:.3g} to {effect.high:.3g}" if effect.n > 1 else ""
    return f"{finding.in_words}: {effect.mean:.3g}{interval}, n = {effect.n}; the limit is {finding.claim.above:g}"


def cost_in_words(finding: Finding) -> str:
    """E.g. ``"0.15 hours a run (AMD EPYC, 1 thread)"``; empty if it was not run."""
    return "; ".join(f"{one.hours:.2g} hours a run ({one.machine})" for one in finding.cost)


def details(claim: Claim) -> list[tuple[str, str]]:
    """What stands behind a claim besides its numbers: pairs of a title and a text."""
    found = [("Protocol", claim.protocol), ("Controls", "; ".join(map(control_in_words, claim.controls)))]
    number = " ".join(filter(None, (reported.in_words(claim.reported), claim.reported_why)))
    found.append(("The paper's number", number))
    if claim.needs:
        needed = ", ".join(one.id for one in claim.needs)
        found.append(("Needs", f"{needed}. Where one of these does not hold, this claim cannot."))
    if claim.written == "after":
        found.append(("Written", "after the records had been seen, so it is no test that could surprise us."))
    return found


def control_in_words(control: str) -> str:
    """``"augmix (AugMix, an augmentation of images)"`` for an experiment, ``"see ID"`` for a claim, a sentence as it is."""
    known = EXPERIMENTS.get(control) or MEASUREMENTS.get(control)
    if known:
        return f"{control} ({known.about.removeprefix('control: ')})"
    return control if " " in control else f"see {control}"
