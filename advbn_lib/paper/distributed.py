"""Several processes that train one network: each on its share of a batch, with equal weights after each step.

Started by ``torchrun``, which tells each process its place. Started without it, there is one process. Processes talk through
NCCL on GPUs and through Gloo on CPUs.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from advbn_lib.data.imagenet import Share
from advbn_lib.methods.base import Losses, Method

T = TypeVar("T")
PATIENCE = datetime.timedelta(hours=1)  # one process lists a million files while the others wait


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank, count: its number, and how many there are.
        local_rank: its number on this machine, which is the number of its GPU.
        device: where it computes.
    """

    rank: int
    count: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and shows progress."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Which images are this process's."""
        return Share(self.rank, self.count)

    def wait(self) -> None:
        """Until all are here."""
        self.sum(torch.zeros(1))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def from_first(self, value: T) -> T:
        """What the first process has given; the others' values are ignored."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def one_by_machine(self) -> Iterator[None]:
        """The first process of each machine runs the block before the others do: it may download, they find the file."""
        if self.local_rank != 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()


@contextmanager
def process_group(device: str | None = None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` has started; leave them at the end of the block.

    Args:
        device: ``"cpu"`` or ``"cuda"``; None: GPUs if there are any.

    Raises:
        ValueError: no such device, or fewer GPUs than processes on this machine.
    """
    rank, count, local_rank = (int(os.environ.get(name, default)) for name, default in
                               (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is cpu or cuda, got {device!r}; torchrun says which GPU is whose")
    if kind == "cuda":
        if torch.cuda.device_count() <= local_rank:
            raise ValueError(f"torch sees {torch.cuda.device_count()} GPU(s) here: start at most so many processes")
        torch.cuda.set_device(local_rank)
    place = torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")
    store = {} if "RANK" in os.environ else {"store": dist.HashStore()}  # alone, it needs no address to meet at
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=count, timeout=PATIENCE, **store)
    failed = True
    try:
        yield Processes(rank, count, local_rank, place)
        failed = False
    finally:
        if (
            count == 1 or not failed
        ):  # after an error, leaving in good order would wait for processes that wait for this one
            dist.destroy_process_group()


def synchronise(method: Method) -> Method:
    """Make every BatchNorm of ``method``, of both branches, a SyncBatchNorm with the same parameters and statistics; in place."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(method)


class Distributed:
    """A method whose gradients are averaged over all processes: what :func:`advbn_lib.training.train` is given.

    - On GPUs every BatchNorm becomes a SyncBatchNorm: the two outer passes normalise with statistics of the whole batch. The
      ascent is in eval mode and its factors belong to the process: nothing of it is synchronised, as in the released code.
    - On CPUs, for which SyncBatchNorm is not made, plain BatchNorm normalises each process's share by itself; with several
      processes a warning says so. The first process's running statistics count: all take them over before each step.

    Args:
        method: on the CPU or on the device already; parameters that it does not train must not require a gradient.
    """

    def __init__(self, method: Method, processes: Processes):
        self.synchronised = processes.device.type == "cuda"
        if self.synchronised:
            method = synchronise(method)
        elif processes.count > 1 and processes.first:
            warnings.warn(
                "SyncBatchNorm needs GPUs: each process normalises its own share of the batch, so results depend on their number",
                stacklevel=3,
            )
        self.method = method.to(processes.device)
        devices = [processes.local_rank] if processes.device.type == "cuda" else None
        # Every trained parameter, both BatchNorm sets' too, has a gradient in each step: no search for unused ones.
        self.parallel = DistributedDataParallel(self.method, device_ids=devices)

    def __call__(self, images: Tensor, labels: Tensor) -> Losses:
        return self.parallel(images, labels)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return self.method.trainable_parameters()

    def train(self) -> None:
        self.method.train()

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state)

    def take_running_statistics(self) -> None:
        """From the first process, where the others' differ (see above): before a test, and before weights are kept."""
        for buffer in self.method.buffers():
            dist.broadcast(buffer, src=0)
