"""What a training takes: seconds of computing, and memory on top of what the process held before.

Neither the clock nor the peak of a process says this: other programs lengthen the one, and data and earlier trainings raise the
other.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

SELF = Path("/proc/self")  # what Linux tells a process about itself
RESET_PEAK = "5"  # written to clear_refs, see proc(5)
KEPT_AS = "seconds_of_computing"


@dataclass
class TrainingCost:
    """Filled in when the block of :func:`metered` ends.

    Attributes:
        cpu_seconds: seconds of computing, summed over the threads of this process; those from before a kill count. None: unknown.
        memory_mib: the most memory that the block held on top of what was there when it began, in MiB: of the GPU, or of this
            process on a CPU. Of a training that was killed, what its last process saw. None: the system does not tell.
    """

    cpu_seconds: float | None = 0.0
    memory_mib: float | None = None


@contextmanager
def metered(device: torch.device, kept_with: nn.Module | None = None) -> Iterator[TrainingCost]:
    """Measure what the block takes.

    On a CPU memory is told by Linux alone, and only where a process may reset its own peak. What the process holds, but does not
    use, is given back first: else the block would take it, and seem to need less than it does.

    Args:
        device: which the block computes on.
        kept_with: a module that checkpoints hold. Inside the block its ``state_dict`` carries the seconds so far, and
            ``load_state_dict`` goes on from them; after a state without them ``cpu_seconds`` is None.
    """
    cost, clock = TrainingCost(), _Clock()
    handles = [] if kept_with is None else clock.keep_with(kept_with)
    held = _start_peak(device)
    clock.start()
    try:
        yield cost
        seconds = clock.seconds
        cost.cpu_seconds = None if math.isnan(seconds) else seconds
        cost.memory_mib = None if held is None else round(max(0, _peak(device) - held) / 2**20, 1)
    finally:
        for handle in handles:
            handle.remove()


class _Clock:
    """Seconds of computing, which go on from those in a loaded state; NaN after a state that has none."""

    def __init__(self):
        self.before, self.started = 0.0, time.process_time()

    def start(self) -> None:
        self.started = time.process_time()

    @property
    def seconds(self) -> float:
        return self.before + time.process_time() - self.started

    def keep_with(self, module: nn.Module) -> list[RemovableHandle]:
        """Let the state of a module carry the seconds. Removing the handles ends it."""

        # Functions, for torch marks a hook with an attribute, and a bound method takes none.
        def save(_: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
            state[prefix + KEPT_AS] = torch.tensor(self.seconds, dtype=torch.float64)

        def load(_: nn.Module, state: dict[str, Any], prefix: str, *more: Any) -> None:
            kept = state.pop(prefix + KEPT_AS, None)
            self.before = math.nan if kept is None else float(kept)
            self.start()

        return [module.register_state_dict_post_hook(save), module.register_load_state_dict_pre_hook(load)]


def _start_peak(device: torch.device) -> int | None:
    """Begin to watch for the most memory; bytes held now, or None if that cannot be watched."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if sys.platform != "linux":
        return None
    _give_back()
    try:
        (SELF / "clear_refs").write_text(RESET_PEAK)
        return _peak(device)
    except (OSError, KeyError):  # not allowed in some containers, and not told by some
        return None


def _peak(device: torch.device) -> int:
    """The most bytes since :func:`_start_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    told = dict(line.split(":", 1) for line in (SELF / "status").read_text().splitlines() if ":" in line)
    return int(told["VmHWM"].split()[0]) * 2**10


def _give_back() -> None:
    """Return freed memory to the system, where the C library can be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
