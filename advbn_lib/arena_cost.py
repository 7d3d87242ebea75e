"""What a training step of each method of the arenas costs, and how many epochs a budget of time is worth.

The arenas that give each method the same *time* rest on it: their epochs are in presets, and a test holds them against the records
that come from here. A step is all that a step of training takes: the batch, the losses, their gradients, the optimiser's step.
:mod:`advbn_lib.step_cost` leaves the first and the last of these out, and for a cheap step they are no small part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch

from advbn_lib import digits_arena
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.experiments import EXPERIMENTS, find
from advbn_lib.fused_bn import unfuse_batch_norms
from advbn_lib.measuring import Job, Outcome
from advbn_lib.methods.base import Method
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.presets import PRESETS
from advbn_lib.provenance import state_checksum
from advbn_lib.running import UNFLIPPED, new_network, prepare, training_images
from advbn_lib.training import Loader, Schedule, computing_in

ROUNDS = 15
WARM_UP = 2  # rounds that are not counted
AT = ("smoke_arena", "cpu_arena", "smoke_digits_arena", "cpu_digits_arena")  # presets
CODE = ("advbn_lib.arena_cost",)  # which leads to the methods and all that they are built with
TRAINED = tuple(name for name, _ in PRESETS["cpu_arena_compute"].epochs)  # what trains on in the CIFAR-10 arena
END_POINTS = "end_points"  # the first part of AFA's training on digits; others begin with "natural"
# Of a method's time in its budget: half an epoch is lost to whole numbers of them, and between seeds the costs of a step differ by
# some per cent on the same machine. 15 % is well above that, and well below what would decide a comparison.
TOLERANCE = 0.15

Step = Callable[[], None]


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
        arena = digits_arena.ARENAS.get(self.preset) or PRESETS[self.preset]
        return dict(arena.epochs)

    def worth(self, seconds: Mapping[str, float]) -> dict[str, float]:
        """How many epochs of each method the time is worth, not rounded.

        AFA's two stages on CIFAR-10 have as many epochs each, and share the time.

        Args:
            seconds: of a step, by name, as :func:`measure` gives them.
        """
        time_of = {name: self._seconds(name, seconds) for name in self.planned}
        return {name: self.epochs * time_of[self.unit] / taken for name, taken in time_of.items()}

    def _seconds(self, name: str, seconds: Mapping[str, float]) -> float:
        """Of a step, mean over the parts of a training; of AFA's stages on CIFAR-10 the sum."""
        arena = digits_arena.ARENAS.get(self.preset)
        if arena is None:
            stages = [{stage, EXPERIMENTS[stage].after} for stage in self.planned if EXPERIMENTS[stage].after]
            return sum(seconds[stage] for stage in next((both for both in stages if name in both), {name}))
        return arena.first_share * seconds[parts_of(name)[0]] + (1 - arena.first_share) * seconds[name]


CIFAR_BUDGET = Budget("cpu_arena_compute", "cpu_arena", "pgd_finetuning", 6)
DIGITS_BUDGET = Budget("cpu_digits_arena_compute", "cpu_digits_arena", "pgd", 8)
BUDGETS = {budget.preset: budget for budget in (CIFAR_BUDGET, DIGITS_BUDGET)}


def fits(planned: int, worth: float) -> bool:
    """Whether a whole number of epochs, at least 1, is what the time is worth: rounded, and within ``TOLERANCE``."""
    return abs(planned - max(1.0, worth)) <= 0.5 + TOLERANCE * worth


def parts_of(method: str) -> tuple[str, ...]:
    """Names of the parts of a method's training on digits, one or two; the last has the method's own."""
    first = END_POINTS if method == "afa" else "natural"
    return (method,) if len(digits_arena.METHODS[method]) == 1 else (first, method)


def measure(job: Job) -> Outcome:
    """Seconds of one training step of each method, and their ratios to a plain one's; networks are new.

    On a GPU by the clock. On a CPU seconds of computing, summed over threads. Methods take turns, step by step; the median counts.
    """
    steps, data, weights = (_digit_steps if job.preset in digits_arena.ARENAS else _cifar_steps)(job)
    clock = _gpu_clock if job.device.type == "cuda" else time.process_time
    taken = in_turns(steps, clock, ROUNDS)
    plain = next(name for name in ("natural", "plain_finetuning") if name in taken)
    ratio = {name: seconds / taken[plain] for name, seconds in taken.items()}
    return Outcome({"arena_step_cost": {"seconds": taken, "ratio": ratio}}, data=data, weights=weights)


def config(preset: str) -> dict[str, Any]:
    """What is chosen at a preset."""
    if preset in digits_arena.ARENAS:
        return {"rounds": ROUNDS, "arena": asdict(digits_arena.ARENAS[preset])}
    size = PRESETS[preset]
    methods = {name: asdict(find(name, preset)[0].method) for name in TRAINED}
    sizes = {"data": size.data, "network": size.network, "batch_size": size.fine_tuning.batch_size, "rounds": ROUNDS}
    return {**sizes, "methods": methods}


def in_turns(steps: Mapping[str, Step], clock: Callable[[], float], rounds: int) -> dict[str, float]:
    """Median seconds of each step; they take turns, so that a slow moment of the machine is no method's own."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + rounds):
        for name, step in steps.items():
            start = clock()
            step()
            taken[name].append(clock() - start)
    return {name: statistics.median(values[WARM_UP:]) for name, values in taken.items()}


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
        steps[name] = _step(method, loader, size.fine_tuning, run.precision)
    data = {images.name: {"images": len(images), "sha256": images.checksum}}
    return steps, data, {"source": f"new, seed {job.seed}", "sha256": checksum}


def _digit_steps(job: Job) -> tuple[dict[str, Step], dict[str, Any], dict[str, Any]]:
    arena, steps = digits_arena.ARENAS[job.preset], {}
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
        steps[name] = _step(build(given).to(job.device), loader, arena.schedules(method)[until - 1], torch.float32)
    images = train_set.images
    data = {images.name: {"images": len(images), "sha256": images.checksum}}
    return steps, data, {"source": f"new, seed {job.seed}", "sha256": checksum}


def _step(method: Method, loader: Loader, schedule: Schedule, precision: torch.dtype) -> Step:
    batches = _endless(loader)
    optimizer = torch.optim.SGD(
        method.trainable_parameters(), lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )
    method.train()

    def step() -> None:
        images, labels = next(batches)
        with computing_in(precision, loader.device):
            losses = method(images, labels)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _endless(loader: Loader) -> Iterator[Any]:
    for epoch in count():
        yield from loader.epoch(epoch)


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
