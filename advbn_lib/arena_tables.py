"""The comparison of all methods, read from records: values, paired differences, ranks and costs of each arena, some runs or all.

What has no record is left out, and :meth:`Arena.commands` says how to make it. No number is computed here that is not in a record.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from advbn_lib import records
from advbn_lib.records import Estimate, Record, RecordError

Verdict = Literal["better", "worse", "undecided", "one seed"]
COST = "cost"  # the column of training cost, as a ratio to that of one of the methods
CLOCKS = {  # of training cost, by the kind of device: other programs lengthen the clock's time, but a GPU has no time of its own
    "cpu": ("cost/train_cpu_seconds", "seconds of computing on a CPU, summed over threads"),
    "cuda": ("cost/train_seconds", "seconds by the clock on a GPU"),
}
MEMORY = "training_memory_mib"


@dataclass(frozen=True)
class Arm:
    """A row: a method, read through one of its BatchNorm sets.

    Args:
        label: its name on the page.
        experiment: whose records it is read from.
        branch: of the model.
        before: experiments whose training it goes on from and which count as its cost.
    """

    label: str
    experiment: str
    branch: str = "clean"
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A measure: where it stands in a record (``{branch}`` for the arm's branch), and whether less of it is better."""

    label: str
    metric: str
    low_is_good: bool = False


Runs = Mapping[Arm, Sequence[Record]]


@dataclass(frozen=True)
class Arena:
    """Methods, measures and the preset that they were run at.

    Args:
        name: in words. preset: of the records.
        natural: label of the arm that others are compared with.
        arms: the rows. columns: the main measures. families: the corruptions by family.
        cost_of: label of the arm whose cost is 1.
    """

    name: str
    preset: str
    natural: str
    arms: tuple[Arm, ...]
    columns: tuple[Column, ...]
    families: tuple[Column, ...]
    cost_of: str = "natural"

    def at(self, preset: str, name: str, cost_of: str = "natural") -> Arena:
        """The same comparison at another preset."""
        return replace(self, preset=preset, name=name, cost_of=cost_of)

    def without(self, label: str) -> Arena:
        """The same comparison without one of the main measures.

        Raises:
            ValueError: there is no such measure.
        """
        columns = tuple(column for column in self.columns if column.label != label)
        if columns == self.columns:
            raise ValueError(f"measures are {', '.join(column.label for column in columns)}; got {label!r}")
        return replace(self, columns=columns)

    def runs(self, folder: Path | None = None) -> dict[Arm, list[Record]]:
        """Records by arm, for arms that have any; an arm lacks the seeds that what it goes on from lacks."""
        found = {}
        for arm in self.arms:
            known = [{run.seed for run in self._load(name, folder)} for name in arm.before]
            runs = [run for run in self._load(arm.experiment, folder) if all(run.seed in seeds for seeds in known)]
            if runs:
                found[arm] = runs
        return found

    def commands(self, folder: Path | None = None) -> list[str]:
        """How to make the records that are missing, for seeds 0 to 2; on one thread, as those of the book."""
        names = dict.fromkeys(name for arm in self.arms for name in (*arm.before, arm.experiment))
        lacking = {name: {0, 1, 2} - {run.seed for run in self._load(name, folder)} for name in names}
        return [
            f"python -m advbn_lib run {name} --preset {self.preset} --seed {' '.join(map(str, sorted(seeds)))} --threads 1"
            for name, seeds in lacking.items()
            if seeds
        ]

    def values(self, columns: Iterable[Column], folder: Path | None = None) -> dict[str, dict[str, Estimate]]:
        """Label to measure to its value over seeds, and to ``COST`` where that is known."""
        runs = self.runs(folder)
        costs = self.costs(folder)
        return {
            arm.label: {
                **{column.label: records.aggregate(found, _path(column, arm)) for column in columns},
                **({COST: costs[arm.label]} if arm.label in costs else {}),
            }
            for arm, found in runs.items()
        }

    def differences(self, columns: Iterable[Column], folder: Path | None = None) -> dict[str, dict[str, Estimate]]:
        """Label to measure to what it is more than natural training's, paired by seed; empty if that was not run."""
        runs, columns = self.runs(folder), list(columns)
        natural = self._natural(runs)
        if natural is None:
            return {}
        return {
            arm.label: {
                column.label: records.difference(
                    found, runs[natural], _path(column, arm), _path(column, natural)
                )
                for column in columns
            }
            for arm, found in runs.items()
            if arm != natural and _shared([found, runs[natural]])
        }  # fmt: skip

    def by_seed(self, columns: Iterable[Column], folder: Path | None = None) -> dict[str, dict[str, list[float]]]:
        """Label to measure to one value for each seed that all arms with records share; empty if they share none."""
        runs, columns = self.runs(folder), list(columns)
        seeds = _shared(runs.values())
        if not seeds:
            return {}
        return {
            arm.label: {
                column.label: [run.metric(_path(column, arm)) for run in found if run.seed in seeds]
                for column in columns
            }
            for arm, found in runs.items()
        }

    def costs(self, folder: Path | None = None) -> dict[str, Estimate]:
        """Label to the time of its training in that of ``cost_of``'s, seed by seed; what it goes on from counts.

        Times are those of ``CLOCKS``; a ratio is of two of the same kind. Without ``cost_of``'s records there are none. One method
        read through two sets has one cost.
        """
        runs = self.runs(folder)
        unit = next((arm for arm in runs if arm.label == self.cost_of), None)
        if unit is None:
            return {}
        one, found = self._seconds(unit, runs[unit], folder), {}
        for arm, of_arm in runs.items():
            taken = self._seconds(arm, of_arm, folder)
            both = [seed for seed in taken if seed in one and taken[seed][0] == one[seed][0] and one[seed][1] > 0]
            if both:
                found[arm.label] = records.estimate([taken[seed][1] / one[seed][1] for seed in both])
        return found

    def clocks(self, folder: Path | None = None) -> list[str]:
        """In words, what costs are measured by: one kind of time for each kind of device that its records are from."""
        kinds = {_device(run) for found in self.runs(folder).values() for run in found}
        return [words for kind, (_, words) in CLOCKS.items() if kind in kinds]

    def memory(self, folder: Path | None = None) -> dict[str, float]:
        """Label to the most memory that its training took on top of what was there before, in MiB; mean over seeds.

        Of the GPU, or of the process on a CPU. Only over seeds whose records tell: older ones and some systems do not. What it goes
        on from counts: the larger of the two.
        """
        told: dict[str, list[float]] = {}
        for arm, found in self.runs(folder).items():
            for runs in self._together(arm, found, folder).values():
                peaks = [run.cost.get(MEMORY) for run in runs]
                if None not in peaks and any(peaks):
                    told.setdefault(arm.label, []).append(max(peaks))
        return {label: fmean(peaks) for label, peaks in told.items()}

    def links(self, arm: Arm) -> str:
        """Links to the records of a row: those of what it goes on from, and its own."""
        names = (*arm.before, arm.experiment)
        return ", ".join(
            record_link(name, self.preset, f"records of {name}" if arm.before else "records") for name in names
        )

    def _natural(self, runs: Runs) -> Arm | None:
        return next((arm for arm in runs if arm.label == self.natural), None)

    def _together(self, arm: Arm, found: Sequence[Record], folder: Path | None) -> dict[int, list[Record]]:
        """By seed, an arm's record and those of what it goes on from."""
        before = [{run.seed: run for run in self._load(name, folder)} for name in arm.before]
        return {run.seed: [*(runs[run.seed] for runs in before), run] for run in found}

    def _seconds(self, arm: Arm, found: Sequence[Record], folder: Path | None) -> dict[int, tuple[str, float]]:
        """By seed, the kind of time and how much of it; without seeds whose records do not tell, or are from different devices."""
        taken = {}
        for seed, runs in self._together(arm, found, folder).items():
            kinds = {_device(run) for run in runs}
            metric = CLOCKS[kinds.pop()][0]
            values = [run.cost.get(metric.removeprefix("cost/")) for run in runs]
            if not kinds and None not in values:
                taken[seed] = (metric, sum(run.metric(metric) for run in runs))
        return taken

    def _load(self, experiment: str, folder: Path | None) -> list[Record]:
        return records.load(experiment, self.preset, folder)


def verdict(difference: Estimate, low_is_good: bool = False) -> Verdict:
    """What a difference to natural training says, by the rule of the book: the whole 95 % interval must be on one side of zero."""
    if difference.n < 2:
        return "one seed"
    if difference.low > 0 or difference.high < 0:
        return "better" if (difference.low > 0) != low_is_good else "worse"
    return "undecided"


def record_link(experiment: str, preset: str, words: str = "records") -> str:
    """A link in HTML from a chapter to an experiment's place on the built book's page of records, which has all of its seeds.

    Raises:
        RecordError: a name that the page could not have.
    """
    name = f"{experiment}-{preset}"
    if not name.replace("_", "").replace("-", "").isalnum():
        raise RecordError(f"{name!r} is no name of records")
    return f'<a href="../book/records.html#record-{name.replace("_", "-")}">{html.escape(words)}</a>'


def _device(run: Record) -> str:
    return "cuda" if run.hardware.get("device") == "cuda" else "cpu"


def _path(column: Column, arm: Arm) -> str:
    return column.metric.format(branch=arm.branch)


def _shared(runs: Iterable[Sequence[Record]]) -> set[int]:
    sets = [{run.seed for run in found} for found in runs]
    return set.intersection(*sets) if sets else set()


def _digits(measure: str, label: str, low_is_good: bool = False, level: str = "unbiased") -> Column:
    return Column(label, f"digits/{measure}/{{branch}}/{level}", low_is_good)


DIGITS = Arena(
    "coloured digits, epoch-matched", "cpu_digits_arena", "natural",
    arms=(
        Arm("natural", "digits_natural"),
        Arm("clean fine-tuning", "digits_clean_finetuning"),
        Arm("AugMix", "digits_augmix"),
        Arm("random statistics", "digits_random_statistics"),
        Arm("random, adv. BN", "digits_random_statistics", "adversarial"),
        Arm("MixStyle", "digits_mixed_statistics"),
        Arm("MixStyle, adv. BN", "digits_mixed_statistics", "adversarial"),
        Arm("AdvBN", "digits_advbn"),
        Arm("AdvBN, adv. BN", "digits_advbn", "adversarial"),
        Arm("AdvBN + AugMix", "digits_advbn_augmix"),
        Arm("AdvBN + AugMix, adv.", "digits_advbn_augmix", "adversarial"),
        Arm("PGD", "digits_pgd"),
        Arm("A-FAN", "digits_afan"),
        Arm("AFA", "digits_afa", "fused"),
        Arm("RandMix", "digits_randmix"),
        Arm("AdvMix", "digits_advmix"),
    ),
    columns=(
        _digits("accuracy", "clean"),
        _digits("accuracy", "bias", level="mean_biased"),
        _digits("corruptions", "corr."),
        _digits("style", "style"),
        _digits("pgd_2", "PGD 2"),
        _digits("pgd_8", "PGD 8"),
        _digits("pgd_16", "PGD 16"),
        _digits("apgd", "APGD 16"),
        _digits("calibration_error", "ECE", True),
    ),
    families=tuple(_digits(family, family) for family in ("noise", "blur", "weather", "digital")),
)  # fmt: skip
CIFAR = Arena(
    "CIFAR-10, epoch-matched", "cpu_arena", "natural",
    arms=(
        Arm("natural", "plain_finetuning"),
        Arm("the start itself", "untouched"),
        Arm("clean fine-tuning", "clean_finetuning"),
        Arm("AugMix", "augmix"),
        Arm("random statistics", "random_statistics"),
        Arm("random, adv. BN", "random_statistics", "adversarial"),
        Arm("random per image", "random_per_image"),
        Arm("per image, adv. BN", "random_per_image", "adversarial"),
        Arm("MixStyle", "mixed_statistics"),
        Arm("MixStyle, adv. BN", "mixed_statistics", "adversarial"),
        Arm("AdvBN", "advbn"),
        Arm("AdvBN, adv. BN", "advbn", "adversarial"),
        Arm("AdvBN + AugMix", "advbn_augmix"),
        Arm("AdvBN + AugMix, adv.", "advbn_augmix", "adversarial"),
        Arm("PGD", "pgd_finetuning"),
        Arm("A-FAN", "afan_finetuning"),
        Arm("AFA", "afa_finetuning", "fused", ("end_points_finetuning",)),
    ),
    columns=(
        Column("clean", "accuracy/{branch}/clean"),
        Column("corr.", "mean/{branch}/corruptions"),
        Column("style", "mean/{branch}/style"),
        Column("PGD 2", "robust/{branch}/2"),
        Column("PGD 8", "robust/{branch}/8"),
        Column("APGD 8", "apgd/{branch}"),
        Column("ECE", "calibration_error/{branch}", True),
    ),
    families=tuple(Column(family, f"mean/{{branch}}/{family}") for family in ("noise", "blur", "weather", "digital")),
)  # fmt: skip
ARENAS = (
    DIGITS,
    DIGITS.at("cpu_digits_arena_compute", "coloured digits, compute-matched", cost_of="PGD"),
    CIFAR,
    CIFAR.at("cpu_arena_compute", "CIFAR-10, compute-matched", cost_of="PGD"),
)
