"""What a training takes: a known amount of memory, known work, and both after a kill."""

from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import nn

from advbn_lib import training_cost
from advbn_lib.training_cost import TrainingCost, metered

CPU = torch.device("cpu")
MIB = 2**20
HERE = sys.platform == "linux" and training_cost._start_peak(CPU) is not None
needs_peak = pytest.mark.skipif(not HERE, reason="this system does not let a process reset its own peak of memory")


def held(mib: float) -> torch.Tensor:
    """That much memory, written to: untouched pages are not there."""
    return torch.ones(int(mib * MIB / 4))


def computed(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Training(nn.Module):
    """Holds as many MiB for a moment as it is told to."""

    def __init__(self, mib: int):
        super().__init__()
        self.mib, self.weight = mib, nn.Parameter(torch.ones(()))

    def forward(self) -> torch.Tensor:
        return (held(self.mib) * self.weight).sum()


@needs_peak
@pytest.mark.parametrize("mib", [40, 160])
def test_memory_is_that_of_the_training_and_not_of_what_was_there_before(mib):
    before = held(300)
    del before  # a peak from before
    data = held(64)  # and something that stays
    training = Training(mib)
    with metered(CPU) as cost:
        training().backward()
    # The tensor and its product with the weight; the gradient may be a third.
    assert 1.9 * mib < cost.memory_mib < 3.2 * mib + 16
    assert data.sum() > 0


@needs_peak
def test_memory_that_was_freed_before_is_not_free_for_the_training():
    """Small pieces stay with the process when they are freed, and a training could live in them unseen."""
    pieces = [torch.ones(8_000) for _ in range(2_000)]  # 61 MiB
    del pieces
    with metered(CPU) as cost:
        kept = [torch.ones(8_000) for _ in range(2_000)]
    assert cost.memory_mib > 50 and len(kept) == 2_000


@needs_peak
def test_a_training_that_takes_nothing_takes_nothing():
    with metered(CPU) as cost:
        computed(0.02)
    assert 0 <= cost.memory_mib < 8


def test_where_the_system_does_not_tell_memory_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(training_cost, "SELF", tmp_path / "nothing")
    with metered(CPU) as cost:
        computed(0.01)
    assert cost.memory_mib is None and cost.cpu_seconds >= 0.01
    monkeypatch.setattr(training_cost.sys, "platform", "darwin")
    with metered(CPU) as cost:
        pass
    assert cost.memory_mib is None


def test_seconds_are_those_of_computing():
    with metered(CPU) as cost:
        time.sleep(0.2)
        computed(0.05)
    assert 0.05 <= cost.cpu_seconds < 0.2


def test_a_block_that_fails_says_nothing_and_leaves_no_hook():
    module = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), metered(CPU, module) as cost:
        raise RuntimeError
    assert cost == TrainingCost() and list(module.state_dict()) == ["weight", "bias"]


def test_seconds_before_a_kill_count_and_what_was_lost_does_not():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    with metered(CPU, first):
        computed(0.3)
        kept = first.state_dict()
        computed(0.3)  # after the last checkpoint: lost
    with metered(CPU, second) as cost:
        computed(0.2)  # until the checkpoint is read
        second.load_state_dict(kept)
        computed(0.05)
    assert 0.35 <= cost.cpu_seconds < 0.5
    assert torch.equal(first.weight, second.weight) and list(second.state_dict()) == ["weight", "bias"]


def test_after_a_checkpoint_without_them_seconds_are_unknown():
    module = nn.Linear(2, 2)
    with metered(CPU, module) as cost:
        module.load_state_dict(nn.Linear(2, 2).state_dict())
    assert cost.cpu_seconds is None
