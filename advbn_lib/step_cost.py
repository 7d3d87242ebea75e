"""What a training step costs, method beside method in one process.

The seconds of whole trainings depend on what else a machine does at the time. Here the methods take turns, step by step, and the
median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from advbn_lib.methods.base import Method

ROUNDS = 15
WARM_UP = 2  # rounds that are not counted


def step_cost(
    methods: dict[str, Method], images: Tensor, labels: Tensor, plain: str, rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Seconds of one step, forwards and backwards, of each method in train mode, and their ratios to ``plain``'s.

    On a GPU by the clock. On a CPU seconds of computing, summed over threads: they do not count time that other programs had.

    Args:
        methods: on the device of the batch.
        images, labels: one batch (N,3,H,W) and (N,).
        plain: the name of the method that ratios are taken to.

    Returns:
        ``{"seconds": {name: ...}, "ratio": {name: ...}}``.
    """
    clock = _gpu_clock if images.is_cuda else time.process_time
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(WARM_UP + rounds):
        for name, method in methods.items():
            seconds = _one_step(method.train(), images, labels, clock)
            if number >= WARM_UP:
                taken[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {"seconds": medians, "ratio": {name: value / medians[plain] for name, value in medians.items()}}


def _one_step(method: Method, images: Tensor, labels: Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    method(images, labels).total.backward()
    seconds = clock() - start
    method.zero_grad(set_to_none=True)
    return seconds


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()
