"""Timing whole steps of training, method beside method in one process.

A step is all that a step of training takes: the batch, the losses, their gradients, the optimiser's step. :mod:`advbn_lib.step_cost`
leaves the first and the last of these out, and for a cheap step they are no small part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch

from advbn_lib.methods.base import Method
from advbn_lib.training import Loader, Schedule, computing_in

ROUNDS = 15
WARM_UP = 2  # rounds that are not counted

Step = Callable[[], None]


def in_turns(steps: Mapping[str, Step], clock: Callable[[], float], rounds: int) -> dict[str, float]:
    """Median seconds of each step; they take turns, so that a slow moment of the machine is no method's own."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + rounds):
        for name, step in steps.items():
            start = clock()
            step()
            taken[name].append(clock() - start)
    return {name: statistics.median(values[WARM_UP:]) for name, values in taken.items()}


def training_step(method: Method, loader: Loader, schedule: Schedule, precision: torch.dtype) -> Step:
    """A step of a training as :func:`~advbn_lib.training.train` makes it, each time with the next batch."""
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


def gpu_clock() -> float:
    """Seconds, when all that the GPU was asked for is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _endless(loader: Loader) -> Iterator[Any]:
    for epoch in count():
        yield from loader.epoch(epoch)
