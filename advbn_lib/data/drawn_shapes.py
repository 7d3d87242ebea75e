"""Made-up images with boxes: bright shapes on a dark, noisy ground. For trying out a detector without any data."""

from __future__ import annotations

import torch
from torch import Tensor

from advbn_lib.data.boxes import BoxSet

CLASSES = ("disc", "square")


def drawn_shapes(count: int, size: int = 64, seed: int = 0, most: int = 3) -> BoxSet:
    """``count`` images of ``size`` pixels with one to ``most`` red discs and green squares each, never two in one place."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [_image(size, most, generator) for _ in range(count)]
    images, boxes, labels = zip(*drawn)
    difficult = tuple(torch.zeros(len(each), dtype=torch.bool) for each in labels)
    return BoxSet(f"shapes, {count} of seed {seed}", images, boxes, labels, difficult, CLASSES)


def _image(size: int, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    image = torch.randint(0, 80, (3, size, size), generator=generator, dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    cell = size // 2
    boxes, labels = [], []
    places = torch.randperm(4, generator=generator)[: int(torch.randint(1, most + 1, (), generator=generator))]
    for place in places.tolist():  # the quarters of the image: the shapes cannot overlap
        label = int(torch.randint(0, len(CLASSES), (), generator=generator))
        side = int(torch.randint(cell // 2, cell - 1, (), generator=generator))
        left, top = (
            int(torch.randint(0, cell - side, (), generator=generator)) + cell * at for at in (place % 2, place // 2)
        )
        inside = (columns >= left) & (columns < left + side) & (rows >= top) & (rows < top + side)
        if CLASSES[label] == "disc":
            middle = (side - 1) / 2
            inside &= (columns - left - middle) ** 2 + (rows - top - middle) ** 2 <= (side / 2) ** 2
        image[label][inside] = 230
        boxes.append([left, top, left + side, top + side])
        labels.append(label + 1)
    return image, torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels)
