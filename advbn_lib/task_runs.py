"""Detection and segmentation, with A-FAN and with its controls: one runner, by the same training loop, for both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from advbn_lib.methods.afan import AFAN, FeatureAugmentation, Site
from advbn_lib.methods.feature_controls import ExtraForwards, FeatureNoise, NoAugmentation
from advbn_lib.tasks.base import Task
from advbn_lib.training import History, Loader, Schedule, train

METHODS: dict[str, type[FeatureAugmentation]] = {
    "plain": NoAugmentation,
    "afan": AFAN,
    "noise": FeatureNoise,
    "extra_forwards": ExtraForwards,
}
ABOUT = {
    "plain": "without augmentation of features",
    "afan": "with A-FAN",
    "noise": "control: uniform noise on features, as large as A-FAN's steps reach",
    "extra_forwards": "control: A-FAN's forward passes and no more",
}


class Bench(Protocol):
    """A task with its data, its network and its sizes: a frozen dataclass, whose fields stand in the record."""

    schedule: Schedule
    sites: tuple[Site, ...]
    clean_weight: float

    def task(self, seed: int, device: torch.device) -> tuple[Task, dict[str, Any]]:
        """A network to train, on the device, and what its weights are (``source`` and ``sha256``)."""

    def loader(self, seed: int, device: torch.device) -> Loader: ...

    def evaluate(self, model: nn.Module, device: torch.device, show_progress: bool) -> dict[str, dict[str, float]]:
        """Metrics by group, e.g. ``{"detection": {"map_50": 0.7}}``."""

    def data(self) -> dict[str, Any]:
        """What it reads: counts and checksums by set."""


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """What a run gave; see :class:`advbn_lib.records.Record`."""

    model: nn.Module
    metrics: dict[str, Any]
    history: History
    test_seconds: float
    data: dict[str, Any]
    weights: dict[str, Any]


def run_bench(
    bench: Bench, method_name: str, seed: int, device: torch.device, code: str, folder: Path | None = None, show_progress: bool = True
) -> TaskRun:  # fmt: skip
    """Train a bench's network by one of ``METHODS``, from its checkpoint on if there is one, and test it after the last epoch.

    Args:
        code: hash of the code; a checkpoint by other code is not resumed.
        folder: for the checkpoint; None: none is kept.

    Everything is computed in 32-bit floats: A-FAN's changes are too small for less.
    """
    torch.manual_seed(seed)
    task, weights = bench.task(seed, device)
    method = METHODS[method_name](task, bench.sites, bench.clean_weight)
    data = bench.data()
    key = _digest({
        "method": method_name, "seed": seed, "code": code, "data": data, "weights": weights["sha256"], "bench": dataclasses.asdict(bench),
    })  # fmt: skip
    checkpoint = None if folder is None else folder / f"training-{key[:12]}.pt"
    history = train(
        method, bench.loader(seed, device), bench.schedule, checkpoint, key,
        show_progress=show_progress, precision=torch.float32,
    )  # fmt: skip
    started = time.perf_counter()
    metrics = bench.evaluate(task.model, device, show_progress)
    return TaskRun(task.model, metrics, history, time.perf_counter() - started, data, weights)


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
