"""What a run on the segmentation task uses: data, network, schedule, A-FAN's sites, and the test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advbn_lib.data.camvid import CLASSES, load_camvid
from advbn_lib.data.images import DataError
from advbn_lib.data.mask_loader import MaskLoader
from advbn_lib.data.masks import IGNORE, MaskSet
from advbn_lib.methods.afan import Site
from advbn_lib.models.deeplab import SmallDeepLab
from advbn_lib.poly_schedule import PolySchedule
from advbn_lib.provenance import state_checksum
from advbn_lib.segmentation_metrics import MaskScores, mask_confusion
from advbn_lib.tasks.segmentation import Segmentation
from advbn_lib.weights import published_weights

# As released for VOC 2012, with the stage below the encoder's last one: layer3 of four there, layer2 of three here.
SITES = (
    Site("layer2", gamma=0.01, steps=1, points=3, mix="11", weight=0.1),
    Site("aspp", gamma=0.4, steps=1, points=2, weight=0.1),
)
DRAWN_CLASSES = ("sky", "ground", "house")


@dataclass(frozen=True)
class SegmentationBench:
    """Sizes of a segmentation run.

    Attributes:
        schedule: of the training.
        source: ``"camvid"``, or ``"drawn"``: made-up streets, which need no data.
        size: (height, width) that images and masks are reduced to, for training and test.
        crop: of the training windows; the sides must be multiples of 8.
        scale: smallest and largest factor of the random scale.
        train_images, test_images: how many, from the first on; None: all.
        depth, width, channels: of the :class:`~advbn_lib.models.deeplab.SmallDeepLab`.
        pretrained: start the encoder from the published CIFAR-10 weights of its depth.
        sites, clean_weight: A-FAN's.
    """

    schedule: PolySchedule
    source: Literal["camvid", "drawn"] = "camvid"
    size: tuple[int, int] = (120, 160)
    crop: tuple[int, int] = (96, 128)
    scale: tuple[float, float] = (0.75, 1.5)
    train_images: int | None = None
    test_images: int | None = None
    depth: int = 20
    width: int = 16
    channels: int = 64
    pretrained: bool = True
    sites: tuple[Site, ...] = SITES
    clean_weight: float = 0.7

    def __post_init__(self):
        if self.source not in ("camvid", "drawn"):
            raise ValueError(f"source is 'camvid' or 'drawn', got {self.source!r}")
        if self.source == "drawn" and (self.train_images is None or self.test_images is None):
            raise ValueError("drawn streets have no end: say how many train_images and test_images")

    def task(self, seed: int, device: torch.device | str) -> tuple[Segmentation, dict[str, str]]:
        """A fresh model on the device, and where its weights come from."""
        weights = published_weights(f"resnet{self.depth}") if self.pretrained else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SmallDeepLab(len(self._classes), self.depth, self.width, weights, channels=self.channels)
        source = f"encoder: {weights.name if weights else 'random'}; decoder: random"
        started = {"source": source, "sha256": state_checksum(model.state_dict())}
        return Segmentation(model.to(device)), started

    def loader(self, seed: int, device: torch.device | str) -> MaskLoader:
        """Training batches."""
        return MaskLoader(self._masks("train"), self.schedule.batch_size, self.crop, seed, device, self.scale)

    def evaluate(
        self, model: nn.Module, device: torch.device | str, show_progress: bool = False
    ) -> dict[str, dict[str, float]]:
        """Scores on the test set, by name, and the IoU of each class that occurs. The test set is used once: after training."""
        test = self._masks("test")
        counts = mask_confusion(model, test, device, model.encoder.output_stride, show_progress=show_progress)
        scores = MaskScores.of(counts, test.classes)
        whole = {"miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy, "absent_classes": len(scores.absent)}
        return {"segmentation": whole, "iou": scores.iou}

    def data(self) -> dict[str, dict[str, Any]]:
        """Size, checksum and counts of what is left out, of each set."""
        sets = [self._masks(split) for split in ("train", "test")]
        return {masks.name: {"images": len(masks), "sha256": masks.checksum, **masks.left_out} for masks in sets}

    @property
    def _classes(self) -> tuple[str, ...]:
        return DRAWN_CLASSES if self.source == "drawn" else CLASSES

    def _masks(self, split: Literal["train", "test"]) -> MaskSet:
        count = self.train_images if split == "train" else self.test_images
        if self.source == "drawn":
            return drawn_streets(count, self.size, seed=0 if split == "train" else 1)
        return load_camvid(split).stacked(self.size).first(count)


def drawn_streets(count: int, size: tuple[int, int] = (32, 48), seed: int = 0) -> MaskSet:
    """Made-up streets: sky over ground, houses between them, noise on everything, and an unlabelled frame of one pixel.

    Args:
        count: images. size: (height, width), at least 8 each. seed: of all that is random.

    Raises:
        DataError: no images, or too small ones.
    """
    if count < 1 or min(size) < 8:
        raise DataError(f"streets need at least one image of 8x8 pixels, got {count} of {size}")
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([[120, 170, 230], [110, 110, 105], [170, 80, 60]])
    masks = torch.stack([_street(size, generator) for _ in range(count)])
    pixels = colours[masks.long()].permute(0, 3, 1, 2).float()
    brightness = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    noisy = pixels * brightness + 25 * torch.randn(pixels.shape, generator=generator)
    masks[:, [0, -1]] = masks[:, :, [0, -1]] = IGNORE
    return MaskSet(f"drawn streets {seed}", noisy.clamp(0, 255).to(torch.uint8), masks, DRAWN_CLASSES)


def _street(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    height, width = size
    mask = torch.zeros(size, dtype=torch.uint8)
    horizon = height // 2 + int(torch.randint(-height // 8, height // 8 + 1, (), generator=generator))
    mask[horizon:] = 1
    for _ in range(2):
        left = int(torch.randint(0, width - width // 4, (), generator=generator))
        top = int(torch.randint(height // 8, horizon - 1, (), generator=generator))
        mask[top : horizon + height // 8, left : left + width // 4] = 2
    return mask


BENCHES = {
    "smoke": SegmentationBench(
        PolySchedule(epochs=4, batch_size=4, lr=0.1), source="drawn", size=(32, 48), crop=(32, 32), train_images=24, test_images=12,
        depth=8, width=8, channels=16, pretrained=False,
    ),
    "cpu": SegmentationBench(PolySchedule(epochs=14, batch_size=8, lr=0.1)),
}  # fmt: skip
