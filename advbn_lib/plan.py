"""The runs behind the book, at each scale: which there are, which are missing, and what those will cost.

``workflow/Snakefile`` runs what is missing; ``python -m advbn_lib plan`` says beforehand how long it takes, from the records of
runs that were made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from advbn_lib import digits_arena, mixing_bench, records, smiles_bench, stylegan_mixing_bench
from advbn_lib.attack_measurements import CHECKED, OF_STATISTICS, PROBED
from advbn_lib.experiments import ABLATIONS, ATTACKED, EXPERIMENTS, FROM_SCRATCH, HEADLINE, TRAINED_ON, find
from advbn_lib.presets import PRESETS

SEEDS = (0, 1, 2)
FIVE = (0, 1, 2, 3, 4)
MORE_SEEDS = {"cpu_mixing": FIVE, "cpu_smiles": FIVE, "cpu_generator": FIVE}  # small enough for more
_BENCHES = tuple(
    f"{task}_{method}" for task in ("detection", "segmentation") for method in ("plain", "afan", "noise", "extra_forwards")
)  # fmt: skip
_ATTACKED = ("pretrain", *(experiment.name for experiment in ATTACKED))
_ATTACK_MEASUREMENTS = ("strength_statistics", "strength_probe", "masking_checks", "attack_agreement")
_HEADLINE = tuple(experiment.name for experiment in HEADLINE if experiment.name != "pretrain")
_ABLATIONS = (
    "untouched", "clean_finetuning", "random_statistics", "advbn", "advbn_eps05",
    *(experiment.name for experiment in ABLATIONS),
)  # fmt: skip
_CONTROLLED = ("untouched", "clean_finetuning", "random_statistics", "advbn")
_ARENA = (
    *_CONTROLLED, "advbn_augmix", "augmix", "random_per_image", *(experiment.name for experiment in TRAINED_ON),
)  # fmt: skip
_DIGITS = tuple(f"digits_{method}" for method in digits_arena.METHODS)
_MIXING = tuple(f"mixing_{method}" for method in mixing_bench.METHODS)
_SMILES = tuple(f"smiles_{method}" for method in smiles_bench.METHODS)
_STYLEGAN = tuple(f"stylegan_{method}" for method in stylegan_mixing_bench.METHODS)
_FROM_SCRATCH = ("pretrain", *(experiment.name for experiment in FROM_SCRATCH), "step_cost")

# What is run at each scale: preset, and the names of experiments and measurements.
SCALES: dict[str, dict[str, tuple[str, ...]]] = {
    "smoke": {"smoke": _CONTROLLED, "smoke_attack": ("pretrain", "end_points", "afa")},
    "cpu": {
        "cpu": (*_HEADLINE, "appearance", "loader_speed", *_BENCHES),
        "cpu_ablation": _ABLATIONS,
        "cpu_fresh": _CONTROLLED,
        "cpu_pacs": _CONTROLLED,
        "cpu_scratch": _FROM_SCRATCH,
        "cpu_attack": (*_ATTACKED, *_ATTACK_MEASUREMENTS),
        "cpu_arena": ("arena_step_cost", *_ARENA),  # first: the epochs of the next preset rest on it
        "cpu_arena_compute": _ARENA,
        "cpu_mixing": _MIXING,
        "cpu_generator": ("generator", "encoding", *_STYLEGAN),
        "cpu_smiles": _SMILES,
        "cpu_digits_arena": ("arena_step_cost", *_DIGITS),
        "cpu_digits_arena_compute": _DIGITS,
    },
    "gpu": {
        "gpu": (*_HEADLINE, "appearance"),
        "gpu_scratch": _FROM_SCRATCH,
        "gpu_attack": (*_ATTACKED, *_ATTACK_MEASUREMENTS),
        "gpu_arena": _ARENA,
    },
}
# Run once: at cpu scale the published weights are tested, and no seed is in it; one generator comes with the library.
_ONE_SEED = {("untouched", "cpu"), ("generator", "cpu_generator")}
_TRAINED_BY_OTHERS = {
    "strength_statistics": OF_STATISTICS, "strength_probe": PROBED, "masking_checks": CHECKED, "attack_agreement": CHECKED,
    "appearance": ("pretrain",),
}  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """A run that the book is built on: ``experiment`` may be a measurement."""

    experiment: str
    preset: str
    seed: int

    @property
    def begins_with(self) -> tuple[Planned, ...]:
        """The trainings whose weights it needs. Each must be over before it starts: two runs that train one would do it twice."""
        names: tuple[str, ...] = ()
        if self.experiment in EXPERIMENTS:
            experiment, size = find(self.experiment, self.preset)
            start = size.pretraining_start if experiment.stage == "pretraining" else size.start
            names = (experiment.after,) if experiment.after else ("pretrain",) if start == "pretrain" else ()
        elif self.experiment != "appearance" or PRESETS[self.preset].start == "pretrain":
            names = _TRAINED_BY_OTHERS.get(self.experiment, ())
        return tuple(Planned(name, self.preset, self.seed) for name in names)

    def record(self, folder: Path | None = None) -> Path:
        """Where its record is, or will be."""
        return records.path_of(self.experiment, self.preset, self.seed, folder)


@dataclass(frozen=True)
class Cost:
    """What runs will cost on one kind of machine.

    Attributes:
        machine: as records name it, with the threads a run had.
        hours: one run after the other. unknown: how many runs no record tells about.
        rough: how many of the runs were never made on this machine: they count as the mean of the other runs of their preset.
        trainings: how many trainings of ``hours`` are made again, because their weights are gone.
    """

    machine: str
    hours: float
    unknown: int
    rough: int = 0
    trainings: int = 0

    def __str__(self) -> str:
        """A line for a plan."""
        told = [f"about {self.hours:.1f} hours one after the other ({self.machine})"]
        if self.rough:
            told.append(f"roughly: {self.rough} of the runs are guessed from others of their preset")
        if self.trainings:
            told.append(f"with {self.trainings} trainings made again, because their weights are gone")
        if self.unknown:
            told.append(f"and {self.unknown} runs that no record of this machine tells about")
        return ", ".join(told)


def planned(scale: str, seeds: Iterable[int] | None = None) -> list[Planned]:
    """All runs of a scale.

    Args:
        seeds: None: ``SEEDS``, or ``MORE_SEEDS`` of a preset.

    Raises:
        ValueError: there is no such scale, or a preset on its own was named.
    """
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}; there are {', '.join(SCALES)}")
    runs, asked = [], None if seeds is None else tuple(seeds)
    for preset, names in SCALES[scale].items():
        wanted = MORE_SEEDS.get(preset, SEEDS) if asked is None else asked
        runs += [
            Planned(name, preset, seed)
            for name in names
            for seed in wanted[: 1 if (name, preset) in _ONE_SEED else None]
        ]
    return runs


def missing(runs: Iterable[Planned], folder: Path | None = None) -> list[Planned]:
    """Those that have no record. A record that is damaged is an error, and not missing.

    Raises:
        RecordError: see :func:`advbn_lib.records.read`.
    """
    lacking = []
    for run in runs:
        if run.record(folder).exists():
            records.read(run.record(folder))
        else:
            lacking.append(run)
    return lacking


def to_train_again(runs: Iterable[Planned], runs_folder: Path) -> list[Planned]:
    """Trainings that the runs begin with, whose weights are not in the folder, and which are not among the runs themselves."""
    runs, found = list(runs), {}
    waiting = list(runs)
    while waiting:
        for start in waiting.pop().begins_with:
            if (
                start not in found
                and not (runs_folder / start.experiment / f"{start.preset}-s{start.seed}" / "final.pt").exists()
            ):
                found[start] = start not in runs
                waiting.append(start)
    return [start for start, beside in found.items() if beside]


def past_hours(
    folder: Path | None = None, metric: str = "cost/wall_seconds"
) -> dict[str, dict[tuple[str, str], float]]:
    """What runs took: mean hours by kind of machine and by (experiment, preset).

    Args:
        metric: seconds; records without it are left out.
    """
    known: dict[str, dict[tuple[str, str], list[float]]] = {}
    for record in records.load_all(folder):
        if record.cost.get(metric.removeprefix("cost/")) is not None:
            times = known.setdefault(machine(record), {})
            times.setdefault((record.experiment, record.preset), []).append(record.metric(metric) / 3600)
    return {name: {pair: fmean(hours) for pair, hours in times.items()} for name, times in known.items()}


def costs(runs: Iterable[Planned], folder: Path | None = None, runs_folder: Path | None = None) -> list[Cost]:
    """What the runs will cost, by kind of machine, the best known first.

    From the records of the same experiment and preset. Where there is none, from the other runs of the preset: roughly, their mean.
    A kind of machine that has made none of the experiments is left out, if another has.

    Args:
        runs_folder: where weights are kept. Trainings that must be made again, because theirs are gone, are then counted, too.
    """
    runs = list(runs)
    again = [] if runs_folder is None else to_train_again(runs, runs_folder)
    trained, past, found = past_hours(folder, "cost/train_seconds"), past_hours(folder), []
    # A machine that has made none of these experiments knows little: it counts only where no other has.
    telling = [name for name, hours in past.items() if any((run.experiment, run.preset) in hours for run in runs)]
    for name in telling or past:
        hours = past[name]
        whole = [_hours(run, hours) for run in runs]
        parts = [_hours(run, trained.get(name, {})) for run in again]
        told = [one for one in (*whole, *parts) if one is not None]
        if told:
            rough = sum(one is not None and (run.experiment, run.preset) not in hours for run, one in zip(runs, whole))
            unknown, more = len(whole) + len(parts) - len(told), len(parts) - parts.count(None)
            found.append(Cost(name, sum(told), unknown, rough, more))
    return sorted(found, key=lambda cost: (cost.unknown, cost.rough, cost.hours))


def _hours(run: Planned, known: dict[tuple[str, str], float]) -> float | None:
    """Those of the same experiment and preset, else the mean of the preset's, else None."""
    beside = [hours for (_, preset), hours in known.items() if preset == run.preset]
    return known.get((run.experiment, run.preset), fmean(beside) if beside else None)


def machine(record: records.Record) -> str:
    """E.g. ``"AMD EPYC, 1 thread"``."""
    threads = record.hardware["threads"]
    return record.hardware["gpu"] or f"{record.hardware['cpu']}, {threads} thread{'s' * (threads != 1)}"
