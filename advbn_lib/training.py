"""The training loop: one for all methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from advbn_lib.checkpoints import load_checkpoint, save_checkpoint
from advbn_lib.methods.base import Method
from advbn_lib.progress import progress

LOOK_EVERY = 20  # steps between looks at the losses: each look makes the host wait for the device


@dataclass(frozen=True)
class Schedule:
    """SGD with a step schedule.

    Args:
        epochs: passes over the training set.
        batch_size: images a step. AdvBN's perturbation is shared by these.
        lr: learning rate at the start.
        milestones: epochs (from 0) from which on the rate is multiplied by ``gamma`` once more.
        warmup: epochs over which the rate rises linearly to ``lr``.
        weight_decay: applies to every parameter, BatchNorm's too, as in the released AdvBN code.
    """

    epochs: int
    batch_size: int
    lr: float
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"epochs and batch_size must be at least 1 and lr above 0, got {self.epochs}, {self.batch_size}, {self.lr}"
            )

    def rate(self, epoch: float) -> float:
        """Learning rate at a point in time, in epochs from 0."""
        warm = min(1.0, epoch / self.warmup) if self.warmup else 1.0
        return self.lr * warm * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass
class History:
    """Where a training stands and what it has seen: what a resumed run needs beside weights and random state.

    Attributes:
        epoch, step: the next batch. seconds: spent on training so far.
        losses: (clean, adversarial) means of each finished epoch. current: the same of each step of the epoch under way.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)
    current: list[list[float]] = field(default_factory=list)

    def add(self, waiting: list[Tensor]) -> None:
        """Take losses over from the device.

        Raises:
            FloatingPointError: if one is NaN or infinite.
        """
        for values in torch.stack(waiting).tolist() if waiting else []:
            if not all(math.isfinite(value) for value in values):
                clean, adversarial = values
                raise FloatingPointError(
                    f"the loss is not finite at step {len(self.current)} of epoch {self.epoch} (clean {clean}, adversarial {adversarial}): "
                    "lower the learning rate or eps; the last checkpoint is from before"
                )
            self.current.append(values)
        waiting.clear()

    def end_epoch(self) -> None:
        self.losses.append([math.fsum(column) / len(self.current) for column in zip(*self.current)])
        self.epoch, self.step, self.current = self.epoch + 1, 0, []


class Loader(Protocol):
    """What :func:`train` needs of a loader; :class:`~advbn_lib.data.loader.DeviceLoader` is one."""

    device: torch.device

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


def train(
    method: Method, loader: Loader, schedule: Schedule, checkpoint: Path | None = None, key: str = "",
    save_every: float = 60.0, show_progress: bool = True, precision: torch.dtype | None = None,
    after_epoch: Callable[[History], None] | None = None,
) -> History:  # fmt: skip
    """Train ``method`` in place, from ``checkpoint`` on if that file is there.

    Killed and started again, it ends as if it had not been: on a CPU bit for bit.

    Args:
        checkpoint: where to save, atomically, about every ``save_every`` seconds and after each epoch; None: nowhere.
        key: names the run; a checkpoint of another run is refused.
        precision: of the passes; None: :func:`precision_on` the loader's device.
        after_epoch: called after each epoch, when its checkpoint is saved. A run that is killed in it does not call it again.

    Raises:
        FloatingPointError: a loss is NaN or infinite; the message says at which step.
        CheckpointError: the checkpoint is damaged, or another run's.
    """
    optimizer = torch.optim.SGD(
        method.trainable_parameters(), lr=schedule.lr, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )  # fmt: skip
    dtype = precision or precision_on(loader.device)
    scaler = torch.amp.GradScaler(loader.device.type, enabled=dtype == torch.float16)  # fp16 gradients would underflow
    parts = {"method": method, "optimizer": optimizer, "scaler": scaler}
    resume = checkpoint is not None and checkpoint.exists()
    history = History(**load_checkpoint(checkpoint, parts, key)) if resume else History()
    waiting, looked, saved = [], time.perf_counter(), time.perf_counter()
    method.train()
    while history.epoch < schedule.epochs:
        batches = loader.epoch(history.epoch, history.step)
        label = f"epoch {history.epoch + 1} of {schedule.epochs}"
        for images, labels in progress(batches, label, show_progress, initial=history.step, total=len(loader)):
            optimizer.param_groups[0]["lr"] = schedule.rate(history.epoch + history.step / len(loader))
            try:
                with computing_in(dtype, loader.device):
                    losses = method(images, labels)
            except FloatingPointError as error:
                raise FloatingPointError(f"step {history.step} of epoch {history.epoch}: {error}") from error
            scaler.scale(losses.total).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            waiting.append(
                torch.stack([losses.clean, losses.clean if losses.adversarial is None else losses.adversarial]).detach()
            )
            history.step += 1
            epoch_over = history.step == len(loader)
            if epoch_over or history.step % LOOK_EVERY == 0:
                history.add(waiting)
                now = time.perf_counter()
                history.seconds, looked = history.seconds + now - looked, now
                if epoch_over:
                    history.end_epoch()
                if checkpoint is not None and (epoch_over or now - saved > save_every):
                    save_checkpoint(checkpoint, parts, asdict(history), key)
                    looked = saved = time.perf_counter()
                if epoch_over and after_epoch is not None:
                    after_epoch(history)
                    method.train()
                    looked = time.perf_counter()
    return history


def precision_on(device: torch.device) -> torch.dtype:
    """The fastest that trains well: bfloat16 where the device computes in it, else float16 on a GPU (a T4), float32 on a CPU."""
    if device.type != "cuda":
        return torch.bfloat16 if torch.backends.mkldnn.is_available() and _cpu_has_bfloat16() else torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Inside the block, convolutions and matrix products compute in ``dtype``; weights stay as they are."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def _cpu_has_bfloat16() -> bool:
    # Without these instructions bfloat16 is emulated, at a fraction of float32's speed. Both questions are private in torch 2.6.
    asked = (getattr(torch.cpu, name, lambda: False) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))  # fmt: skip
    return any(ask() for ask in asked)
