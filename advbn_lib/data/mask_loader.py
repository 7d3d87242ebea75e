"""Training batches of images and masks: random scale, crop and flip, the same for both.

Each batch is a function of (seed, epoch, index) alone, so that a resumed run sees the same data without replaying what came
before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from advbn_lib.data.masks import IGNORE, Masks, MaskSet, normalise


class MaskLoader:
    """Shuffled, augmented, normalised batches.

    An image is enlarged by a random factor, a window is cut out, and half of the windows are mirrored, all in one bilinear
    sampling without antialiasing (nearest pixel for the mask). What lies outside the image has the mean colour and no label.

    Args:
        masks: the training set. A :class:`~advbn_lib.data.masks.MaskSet` is kept on the device; of a
            :class:`~advbn_lib.data.masks.MaskFiles`, the images of a batch are read when it is their turn.
        batch_size: images a batch; an incomplete last batch is dropped.
        crop: (height, width) of the windows.
        seed: of order and augmentation.
        device: where the batches are made.
        scale: smallest and largest factor; A-FAN's for VOC is 0.5 to 2. (1, 1): none.
        flip: mirror half of the windows.

    Raises:
        ValueError: a batch size that the set does not have, no window, or factors that are not positive and in order.
    """

    def __init__(
        self, masks: Masks, batch_size: int, crop: tuple[int, int], seed: int, device: torch.device | str = "cpu",
        scale: tuple[float, float] = (0.5, 2.0), flip: bool = True,
    ):  # fmt: skip
        if not 0 < batch_size <= len(masks):
            raise ValueError(f"batch_size must be from 1 to {len(masks)}, the size of {masks.name}; got {batch_size}")
        if min(crop) < 1 or not 0 < scale[0] <= scale[1]:
            raise ValueError(f"crop must be positive and scale two factors above 0 in order, got {crop} and {scale}")
        self.batch_size, self.crop, self.seed, self.device = batch_size, crop, seed, torch.device(device)
        self.scale, self.flip = scale, flip
        self._masks = masks.to(self.device) if isinstance(masks, MaskSet) else masks

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._masks) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from ``start`` on: images (N,3,h,w; float, normalised) and masks (N,h,w; int64)."""
        order = torch.randperm(len(self._masks), generator=self._generator(epoch, -1))
        for index in range(start, len(self)):
            chosen = order[index * self.batch_size : (index + 1) * self.batch_size]
            yield self._batch(chosen.tolist(), self._generator(epoch, index))

    def _batch(self, chosen: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        draws = torch.rand(len(chosen), 4, generator=generator).tolist()
        windows = [self._window(self._masks[index], draw) for index, draw in zip(chosen, draws)]
        images, masks = (torch.cat(parts) for parts in zip(*windows))
        return images.contiguous(memory_format=torch.channels_last), masks

    def _window(self, sample: tuple[Tensor, Tensor], draw: list[float]) -> tuple[Tensor, Tensor]:
        """An image (1,3,h,w) and its mask (1,h,w); ``draw``: numbers in [0,1) for scale, row, column and mirror."""
        image, mask = (part.to(self.device) for part in sample)
        low, high = self.scale
        factor = low + draw[0] * (high - low)
        rows, columns = (
            _positions(side, window, factor, place, self.device)
            for side, window, place in zip(mask.shape, self.crop, draw[1:3])
        )
        if self.flip and draw[3] < 0.5:
            columns = columns.flip(0)
        grid = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None]), dim=-1)[None]
        # Outside is 0 for grid_sample: the mean colour of a normalised image, and IGNORE of a mask that is counted from there.
        pixels = F.grid_sample(normalise(image[None], self._masks), grid, align_corners=False)
        labels = F.grid_sample(mask[None, None].float() - IGNORE, grid, mode="nearest", align_corners=False)
        return pixels, labels[:, 0].round().long() + IGNORE

    def _generator(self, epoch: int, index: int) -> torch.Generator:
        # The draws are a few numbers a batch: made on the CPU, they are the same on every device.
        return torch.Generator().manual_seed(((self.seed * 100_003 + epoch) * 100_003 + index + 1) % 2**63)


def _positions(side: int, window: int, factor: float, place: float, device: torch.device) -> Tensor:
    """Where a window's pixels lie in an image, along one side, in grid_sample's units: -1 to 1 from edge to edge.

    The window lies anywhere within the enlarged side or, where it is the longer of the two, anywhere around it.
    """
    large = max(1, round(side * factor))
    offset = round(place * (large - window))  # whole pixels: at factor 1 a window is cut out and not blurred
    return (2 * (torch.arange(window, device=device) + offset) + 1) / large - 1
