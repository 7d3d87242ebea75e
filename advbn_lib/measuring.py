"""What a measurement is: how it is asked for, what is asked, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """One measurement to make: at which preset, with which seed, where. See :class:`advbn_lib.running.Run`."""

    preset: str
    seed: int
    device: torch.device
    records_folder: Path | None = None
    runs_folder: Path = Path("runs")
    show_progress: bool = True


@dataclass(frozen=True)
class Outcome:
    """What a measurement gave: the parts of a :class:`advbn_lib.records.Record` that only it knows."""

    metrics: dict[str, Any]
    curves: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measurement:
    """Something to measure.

    Attributes:
        about: why.
        presets: at which it can be made.
        config: what is chosen at a preset.
        modules: whose code the numbers depend on.
        measure: makes it.
        on_gpu: whether it uses the GPU if there is one.
        repeatable: whether the same code gives the same numbers; then it is not made twice.
        group: of metrics that the command line prints; empty: the one of its own name.
        headline: the numbers of it that are printed, by name; empty: all.
    """

    name: str
    about: str
    presets: tuple[str, ...]
    config: Callable[[str], dict[str, Any]]
    modules: tuple[str, ...]
    measure: Callable[[Job], Outcome]
    on_gpu: bool = True
    repeatable: bool = True
    group: str = ""
    headline: tuple[str, ...] = ()
