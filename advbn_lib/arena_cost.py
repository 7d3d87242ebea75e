"""What a training step of each method of the arenas costs, and how many epochs a budget of time is worth.

The arenas that give each method the same *time* rest on it: their epochs are in presets, and a test holds them against the records
that come from here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from advbn_lib import digits_arena
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.digits_presets import DIGITS_PRESETS
from advbn_lib.experiments import EXPERIMENTS, find
from advbn_lib.fused_bn import unfuse_batch_norms
from advbn_lib.measuring import Job, Outcome
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.presets import PRESETS
from advbn_lib.provenance import state_checksum
from advbn_lib.running import UNFLIPPED, new_network, prepare, training_images
from advbn_lib.step_timing import ROUNDS, Step, gpu_clock, in_turns, training_step

AT = ("smoke_arena", "cpu_arena", "smoke_digits_arena", "cpu_digits_arena")  # presets
TRAINED = tuple(name for name, _ in PRESETS["cpu_arena_compute"].epochs)  # what trains on in the CIFAR-10 arena
# What a cost depends on. Not the presets, or their epochs could not be settled afterwards; what counts of them is in the record.
CODE = (
    "advbn_lib.step_timing", "advbn_lib.digits_arena", "advbn_lib.data.loader", "advbn_lib.models.cifar_resnet",
    *dict.fromkeys(EXPERIMENTS[name].method.trains.__module__ for name in TRAINED),
)  # fmt: skip
END_POINTS = "end_points"  # the first part of AFA's training on digits; others begin with "natural"
# Of the time that a method spends to that of its budget. Half an epoch is lost to whole numbers of them, and between seeds the costs of
# a step differ by some per cent on the same machine. 15 % is well above that, and well below what would decide a comparison.
TOLERANCE = 0.15


@dataclass(frozen=True)
class Budget:
    """A comparison at the same time.

    Attributes:
        preset: the trainings'. measured_at: the preset that steps are measured at.
        unit: the method whose epochs the time is counted in. epochs: how many of them it is.
    """

    preset: str
    measured_at: str
    unit: str
    epochs: int

    @property
    def planned(self) -> dict[str, int]:
        """Epochs of each method, as its preset says."""
        arena = DIGITS_PRESETS.get(self.preset) or PRESETS[self.preset]
        return dict(arena.epochs)

    def spent(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """The time of each method's planned training, part by part, in that of the budget: 1 is a perfect match.

        AFA's two stages on CIFAR-10 share the time, and what they spend together is that of each.

        Args:
            seconds: of a step, by name, as :func:`measure` gives them.
        """
        time = self.epochs * seconds[self.unit]
        return {name: sum(n * seconds[part] for part, n in self._parts(name)) / time for name in self.planned}

    def fits(self, seconds: Mapping[str, float]) -> dict[str, bool]:
        """Whether each method's training takes as long as the budget: to half an epoch, and within ``TOLERANCE``."""
        spent = self.spent(seconds)
        epoch = {name: spent[name] / epochs for name, epochs in self.planned.items()}
        return {name: abs(taken - 1) <= TOLERANCE + epoch[name] / 2 for name, taken in spent.items()}

    def _parts(self, name: str) -> tuple[tuple[str, int], ...]:
        """What a step of each part of a training is measured as, and the epochs of the part."""
        if arena := DIGITS_PRESETS.get(self.preset):
            epochs = (part.epochs for part in arena.schedules(name))
            return tuple(zip(parts_of(name), epochs, strict=True))
        stages = ({stage, EXPERIMENTS[stage].after} for stage in self.planned if EXPERIMENTS[stage].after)
        return tuple((stage, self.planned[stage]) for stage in next((both for both in stages if name in both), {name}))


CIFAR_BUDGET = Budget("cpu_arena_compute", "cpu_arena", "pgd_finetuning", 6)
DIGITS_BUDGET = Budget("cpu_digits_arena_compute", "cpu_digits_arena", "pgd", 16)
BUDGETS = {budget.preset: budget for budget in (CIFAR_BUDGET, DIGITS_BUDGET)}


def parts_of(method: str) -> tuple[str, ...]:
    """Names of the parts of a method's training on digits, one or two; the last has the method's own."""
    first = END_POINTS if method == "afa" else "natural"
    return (method,) if len(digits_arena.METHODS[method]) == 1 else (first, method)


def measure(job: Job) -> Outcome:
    """Seconds of one training step of each method, and their ratios to a plain one's; networks are new.

    On a GPU by the clock. On a CPU seconds of computing, summed over threads. Methods take turns, step by step; the median counts.
    """
    steps, data, weights = (_digit_steps if job.preset in DIGITS_PRESETS else _cifar_steps)(job)
    clock = gpu_clock if job.device.type == "cuda" else time.process_time
    taken = in_turns(steps, clock, ROUNDS)
    plain = next(name for name in ("natural", "plain_finetuning") if name in taken)
    ratio = {name: seconds / taken[plain] for name, seconds in taken.items()}
    return Outcome({"arena_step_cost": {"seconds": taken, "ratio": ratio}}, data=data, weights=weights)


def config(preset: str) -> dict[str, Any]:
    """What is chosen at a preset."""
    if preset in DIGITS_PRESETS:
        return {"rounds": ROUNDS, "arena": asdict(DIGITS_PRESETS[preset])}
    size = PRESETS[preset]
    methods = {name: asdict(find(name, preset)[0].method) for name in TRAINED}
    sizes = {"data": size.data, "network": size.network, "batch_size": size.fine_tuning.batch_size, "rounds": ROUNDS}
    return {**sizes, "methods": methods}


def _cifar_steps(job: Job) -> tuple[dict[str, Step], dict[str, Any], dict[str, Any]]:
    steps, size = {}, PRESETS[job.preset]
    images = training_images(prepare("plain_finetuning", job.preset, job.seed, str(job.device)))
    loader = DeviceLoader(images, size.fine_tuning.batch_size, job.seed, job.device, flip=size.data not in UNFLIPPED)
    for name in TRAINED:
        run = prepare(name, job.preset, job.seed, str(job.device))
        torch.manual_seed(job.seed)
        network = new_network(size.network, len(images.classes)).to(job.device, memory_format=torch.channels_last)
        checksum = state_checksum(network.state_dict())
        if run.experiment.after:  # with the two BatchNorm sets of the first stage, as its training begins
            find(run.experiment.after, job.preset)[0].method.build(network, images)
            unfuse_batch_norms(network)
        method = run.experiment.method.build(network, images).to(job.device)
        steps[name] = training_step(method, loader, size.fine_tuning, run.precision)
    data = {images.name: {"images": len(images), "sha256": images.checksum}}
    return steps, data, {"source": f"new, seed {job.seed}", "sha256": checksum}


def _digit_steps(job: Job) -> tuple[dict[str, Step], dict[str, Any], dict[str, Any]]:
    arena, steps = DIGITS_PRESETS[job.preset], {}
    train_set = arena.digits("train", arena.levels[0], job.seed)
    names = dict.fromkeys(part for method in digits_arena.METHODS for part in parts_of(method))
    for name in names:
        torch.manual_seed(job.seed)
        network = DigitCNN(arena.width, len(train_set.images.classes), train_set.grey.shape[-1])
        checksum = state_checksum(network.state_dict())
        network = network.to(job.device, memory_format=torch.channels_last)
        given, loader = digits_arena.prepared(arena, network, train_set, job.seed, job.device)
        method = "afa" if name == END_POINTS else name
        until = parts_of(method).index(name) + 1
        *before, build = digits_arena.METHODS[method][:until]
        for earlier in before:  # each part goes on from the network that the one before it has made
            earlier(given)
        steps[name] = training_step(
            build(given).to(job.device), loader, arena.schedules(method)[until - 1], torch.float32
        )
    images = train_set.images
    data = {images.name: {"images": len(images), "sha256": images.checksum}}
    return steps, data, {"source": f"new, seed {job.seed}", "sha256": checksum}
