"""The detection runs of this book: which data, which detector, how long, and A-FAN's places in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from advbn_lib.data.box_loader import BoxLoader
from advbn_lib.data.boxes import BoxSet
from advbn_lib.data.drawn_shapes import CLASSES as SHAPES
from advbn_lib.data.drawn_shapes import drawn_shapes
from advbn_lib.data.voc_boxes import BCCD_CLASSES, load_bccd
from advbn_lib.detection_metrics import average_precision, detect
from advbn_lib.methods.afan import Site
from advbn_lib.models.faster_rcnn import DetectorSizes, faster_rcnn
from advbn_lib.provenance import state_checksum
from advbn_lib.tasks.detection import ROI, Detection
from advbn_lib.training import Schedule
from advbn_lib.weights import PUBLISHED

SHARE = 0.3  # of the region vectors' loss in the released setting 1


def released_sites(layer: str, share: float = SHARE) -> tuple[tuple[Site, ...], float]:
    """A-FAN's released setting 1 for VOC2007: its two sites, and the weight of the clean loss.

    A third of ``1 - share`` weighs the clean loss and each of four features between the clean and the adversarial output of
    ``layer``; a third of ``share`` weighs the adversarial region vectors. With 0.3 that is 0.233 five times and 0.1: the weights'
    sum is not 1.

    Args:
        layer: of the backbone; the release takes the second of its three stages.
    """
    weight = (1 - share) / 3
    encoder = Site(layer, gamma=1.0, steps=1, points=5, mix="0011", weight=weight)
    regions = Site(ROI, gamma=0.1, steps=1, points=2, weight=share / 3)
    return (encoder, regions), weight


@dataclass(frozen=True)
class DetectionBench:
    """One detector on one data set.

    Args:
        data_set: ``"bccd"``, trained on its trainval images and tested on its test images, or ``"shapes"``, drawn by code.
        images: of the training and the test set; None: all.
        network, sizes, pretrained: see :func:`~advbn_lib.models.faster_rcnn.faster_rcnn`.
        schedule: of the training.
        sites, clean_weight: of A-FAN.
    """

    data_set: Literal["bccd", "shapes"]
    images: tuple[int | None, int | None]
    network: str
    sizes: DetectorSizes
    pretrained: bool
    schedule: Schedule
    sites: tuple[Site, ...]
    clean_weight: float

    def task(self, seed: int, device: torch.device | str) -> tuple[Detection, dict[str, str]]:
        """A new detector on the device, and where its first weights come from."""
        with torch.random.fork_rng(devices=[]):  # made on the CPU: the same on every device
            torch.manual_seed(seed)
            model = faster_rcnn(self.network, self._classes(), self.sizes, self.pretrained)
        published = f"{PUBLISHED[self.network]}, CIFAR-10" if self.pretrained else f"random, seed {seed}"
        start = {"source": published, "sha256": state_checksum(model.state_dict())}
        return Detection(model.to(device)), start

    def loader(self, seed: int, device: torch.device | str) -> BoxLoader:
        """Training batches."""
        return BoxLoader(self._train_set(), self.schedule.batch_size, seed, device)

    def evaluate(
        self, model: nn.Module, device: torch.device | str, show_progress: bool = True
    ) -> dict[str, dict[str, float]]:
        """Average precision on the test set; see :func:`~advbn_lib.detection_metrics.average_precision`."""
        test = self._test_set()
        return average_precision(detect(model, test, device, show_progress=show_progress), test)

    def data(self) -> dict[str, dict[str, Any]]:
        """Size, checksum and objects of each set, and what was left out of it."""
        return {
            boxes.name: {
                "images": len(boxes),
                "sha256": boxes.checksum,
                "objects": boxes.counts(),
                "left_out": dict(boxes.left_out),
            }
            for boxes in (self._train_set(), self._test_set())
        }

    def _train_set(self) -> BoxSet:
        if self.data_set == "shapes":
            return drawn_shapes(self.images[0], self.sizes.min_side, seed=0)
        return self._resized(load_bccd("trainval").first(self.images[0]))

    def _test_set(self) -> BoxSet:
        if self.data_set == "shapes":
            return drawn_shapes(self.images[1], self.sizes.min_side, seed=1)
        return self._resized(load_bccd("test").first(self.images[1]))

    def _resized(self, boxes: BoxSet) -> BoxSet:
        # Once and for all: the detector then finds the images in the size that it wants.
        return boxes.resized(self.sizes.min_side, self.sizes.max_side)

    def _classes(self) -> tuple[str, ...]:
        return SHAPES if self.data_set == "shapes" else BCCD_CLASSES


# The last stage of the backbone but one, as in the release: layer2 of three there, layer1 of two here. So one stage of the
# backbone lies above the cut, and the augmented losses train it. Cells are nearly as wide as high: one ratio of anchors is enough.
_SITES, _CLEAN_WEIGHT = released_sites("layer1")
_SMALL = DetectorSizes(
    64, 64, (16, 28), (1.0,), anchors_per_image=32, regions_per_image=16, proposals=(50, 50), divisible=16
)
_CELLS = DetectorSizes(
    168, 224, (14, 32, 64), (1.0,), anchors_per_image=64, regions_per_image=32, proposals=(200, 100), divisible=16
)  # fmt: skip

BENCHES: dict[str, DetectionBench] = {
    "smoke": DetectionBench(
        data_set="shapes", images=(12, 6), network="resnet8", sizes=_SMALL, pretrained=False,
        schedule=Schedule(epochs=1, batch_size=4, lr=0.01), sites=_SITES, clean_weight=_CLEAN_WEIGHT,
    ),
    "cpu": DetectionBench(
        data_set="bccd", images=(None, None), network="resnet20", sizes=_CELLS, pretrained=True,
        schedule=Schedule(epochs=6, batch_size=2, lr=0.02, milestones=(5,), warmup=0.3), sites=_SITES,
        clean_weight=_CLEAN_WEIGHT,
    ),
}  # fmt: skip
