"""A loader for data sets that fit on the device: images stay there, and a batch is cropped and flipped in one gather.

Source of the idea: Keller Jordan's cifar10-airbench. Each batch is a function of (seed, epoch, index) alone, so that a resumed
run sees the same data without replaying what came before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from advbn_lib.data.images import ImageSet


class DeviceLoader:
    """Shuffled, augmented, normalised batches.

    Args:
        images: the training set.
        batch_size: images a batch; an incomplete last batch is dropped.
        seed: of order and augmentation.
        device: where the set is kept and the batches are made.
        padding: of the random crop (zeros, as torchvision's RandomCrop); 0: no crop.
        flip: mirror half of the images.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        padding: int = 4,
        flip: bool = True,
    ):
        if not 0 < batch_size <= len(images):
            raise ValueError(f"batch_size must be from 1 to {len(images)}, the size of {images.name}; got {batch_size}")
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.padding, self.flip, self.size = padding, flip, images.images.shape[-1]
        padded = F.pad(images.images.to(self.device), [padding] * 4)
        # N,H,W,3: with a pixel's channels side by side, one gather gives a channels-last batch.
        self._pixels = padded.permute(0, 2, 3, 1).contiguous()
        self._labels = images.labels.to(self.device)
        scale = torch.tensor(images.std) * 255
        self._scale = (1 / scale).to(self.device)
        self._offset = (-torch.tensor(images.mean) * 255 / scale).to(self.device)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._labels) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from ``start`` on: images (N,3,H,W; float, normalised, channels-last) and labels (N,)."""
        order = torch.randperm(len(self._labels), generator=self._generator(epoch, -1))
        for index in range(start, len(self)):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield self._batch(chosen.to(self.device), self._generator(epoch, index))

    def _batch(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = len(chosen)
        rows, columns = torch.randint(0, 2 * self.padding + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < (0.5 if self.flip else 0.0)
        across = torch.arange(self.size)
        rows = (rows + across).to(self.device)
        columns = (columns + torch.where(mirrored, across.flip(0), across)).to(self.device)
        pixels = self._pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        normalised = torch.addcmul(self._offset, pixels.to(torch.float32), self._scale)
        return normalised.permute(0, 3, 1, 2), self._labels[chosen]

    def _generator(self, epoch: int, index: int) -> torch.Generator:
        # The draws are a few numbers a batch: made on the CPU, they are the same on every device.
        return torch.Generator().manual_seed(((self.seed * 100_003 + epoch) * 100_003 + index + 1) % 2**63)
