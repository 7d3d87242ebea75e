"""How fast the loader is, beside torch's own."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable

import torch

from advbn_lib.data.images import ImageSet
from advbn_lib.data.loader import DeviceLoader

BATCH, IMAGES, ROUNDS = 128, 10_000, 5


def loader_speed(train_set: ImageSet, seed: int) -> dict[str, float]:
    """Training images a second of :class:`DeviceLoader` and of torch's DataLoader with the same transforms, on the CPU.

    The two take turns, and the median round counts. torch's gets the better of no workers and one for each core.
    """
    train_set = train_set.first(min(IMAGES, len(train_set)))
    own = DeviceLoader(train_set, BATCH, seed)
    others = {workers: torch_loader(train_set, seed, workers) for workers in (0, os.cpu_count() or 1)}
    speeds: dict[str, list[float]] = {name: [] for name in ("own", *map(str, others))}
    for epoch in range(ROUNDS):
        speeds["own"].append(_images_per_second(own.epoch(epoch)))
        for workers, loader in others.items():
            speeds[str(workers)].append(_images_per_second(loader))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    torch_best = max(value for name, value in medians.items() if name != "own")
    return {
        "images_per_second": medians["own"],
        "torch_images_per_second": torch_best,
        "ratio": medians["own"] / torch_best,
    }


def torch_loader(train_set: ImageSet, seed: int, workers: int) -> torch.utils.data.DataLoader:
    """torch's DataLoader with torchvision's transforms: random crop with padding 4, flip, to tensor, normalise."""
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    change = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(train_set.mean, train_set.std),
    ])  # fmt: skip

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(train_set)

        def __getitem__(self, index: int):
            return change(to_pil_image(train_set.images[index])), train_set.labels[index]

    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.DataLoader(
        Images(), BATCH, shuffle=True, drop_last=True, num_workers=workers, generator=generator
    )


def _images_per_second(batches: Iterable) -> float:
    started = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    return count / (time.perf_counter() - started)
