"""Training batches of images with boxes.

As in :mod:`advbn_lib.data.loader`, each batch is a function of (seed, epoch, index) alone, so that a resumed run sees the same
data without replaying what came before.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from advbn_lib.data.boxes import BoxSet, resize

Targets = list[dict[str, Tensor]]
AHEAD = 4  # batches that the threads read before they are asked for


class BoxLoader:
    """Shuffled batches, half of the images mirrored.

    Args:
        boxes: the training set. Images in memory are kept on the device.
        batch_size: images a batch; an incomplete last batch is dropped.
        seed: of order and mirroring.
        device: where the batches are made.
        flip: mirror half of the images, from left to right.
        sides: short and long side that images are scaled to (see :func:`~advbn_lib.data.boxes.resize`); None: as they are.
            torchvision's models scale by themselves; scaling here saves memory.
        difficult: train on objects marked as difficult too. By default they are left out, as a test does not count them either.
        threads: that read image files ahead; 0: none. For sets in memory they gain nothing.

    Raises:
        ValueError: the batch is larger than the set, or a number is negative.
    """

    def __init__(
        self, boxes: BoxSet, batch_size: int, seed: int, device: torch.device | str = "cpu", flip: bool = True,
        sides: tuple[int, int] | None = None, difficult: bool = False, threads: int = 0,
    ):  # fmt: skip
        if not 0 < batch_size <= len(boxes):
            raise ValueError(f"batch_size must be from 1 to {len(boxes)}, the size of {boxes.name}; got {batch_size}")
        if threads < 0:
            raise ValueError(f"threads must be 0 or more, got {threads}")
        self.boxes, self.batch_size, self.seed, self.device = boxes, batch_size, seed, torch.device(device)
        self.flip, self.sides, self.threads = flip, sides, threads
        self._images = [image.to(self.device) if isinstance(image, Tensor) else None for image in boxes.images]
        kept = [torch.ones_like(flags) if difficult else ~flags for flags in boxes.difficult]
        self._boxes = [each[keep].to(self.device) for each, keep in zip(boxes.boxes, kept)]
        self._labels = [each[keep].to(self.device) for each, keep in zip(boxes.labels, kept)]

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.boxes) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[list[Tensor], Targets]]:
        """The batches of an epoch from ``start`` on.

        Each is a list of images (3,H,W; float in [0,1]) and a list of targets: ``boxes`` (n,4) and ``labels`` (n,) of an image.
        n may be 0.
        """
        order = torch.randperm(len(self.boxes), generator=self._generator(epoch, -1)).tolist()
        indices = range(start, len(self))
        if not self.threads:
            yield from (self._batch(order, epoch, index) for index in indices)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = []
            for index in indices:
                waiting.append(pool.submit(self._batch, order, epoch, index))
                if len(waiting) > AHEAD:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()

    def _batch(self, order: list[int], epoch: int, index: int) -> tuple[list[Tensor], Targets]:
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
        mirrored = torch.rand(len(chosen), generator=self._generator(epoch, index)) < (0.5 if self.flip else 0.0)
        pairs = [self._one(number, mirror) for number, mirror in zip(chosen, mirrored.tolist())]
        return [image for image, _ in pairs], [target for _, target in pairs]

    def _one(self, number: int, mirror: bool) -> tuple[Tensor, dict[str, Tensor]]:
        image, boxes = self._images[number], self._boxes[number]
        if image is None:
            image = self.boxes.image(number).to(self.device)
        if self.sides is not None:
            image, boxes = resize(image, boxes, *self.sides)
        if mirror:
            image, boxes = mirrored_image(image, boxes)
        return image.float() / 255, {"boxes": boxes, "labels": self._labels[number]}

    def _generator(self, epoch: int, index: int) -> torch.Generator:
        # Made on the CPU, the draws are the same on every device.
        return torch.Generator().manual_seed(((self.seed * 100_003 + epoch) * 100_003 + index + 1) % 2**63)


def mirrored_image(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """An image (3,H,W) and its boxes (n,4), left and right exchanged."""
    left, top, right, bottom = boxes.unbind(1)
    width = image.shape[-1]
    return image.flip(-1), torch.stack([width - right, top, width - left, bottom], dim=1)
