"""How well a detector finds objects: average precision.

Source: COCO's measure (Lin et al., ECCV 2014), by torchmetrics: the area under the precision-recall curve at 101 points, averaged
over classes; ``map`` also averages over ten thresholds of the overlap from 0.5 to 0.95. VOC2007's own measure has one threshold,
0.5, and eleven points: :func:`average_precision`'s ``map_50`` is near to it, not the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advbn_lib.data.boxes import BoxSet
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress

Detections = dict[str, Tensor]


@torch.no_grad()
def detect(
    model: nn.Module, boxes: BoxSet, device: torch.device | str, batch_size: int = 8, show_progress: bool = True
) -> list[Detections]:  # fmt: skip
    """What the detector finds in each image: ``boxes`` (n,4) in the image's pixels, ``labels`` and ``scores`` (n,), on the CPU.

    The model is in eval mode meanwhile and gets its modes back.
    """
    found: list[Detections] = []
    with evaluating(model):
        for start in progress(range(0, len(boxes), batch_size), "test", show_progress):
            numbers = range(start, min(start + batch_size, len(boxes)))
            images = [boxes.image(number).to(device).float() / 255 for number in numbers]
            found += [{name: value.cpu() for name, value in each.items()} for each in model(images)]
    return found


def average_precision(found: Sequence[Detections], boxes: BoxSet) -> dict[str, dict[str, float]]:
    """``{"detection": {"map": , "map_50": , "map_75": }, "classes": {class: its part of map}}``, each from 0 to 1.

    Objects marked as difficult count neither as found nor as missed: torchmetrics is told that they are crowds. A detection on
    one is then free of charge if at least half (in general: the threshold) of *the detection* lies in the object, where VOC asks
    for that share of their union. Images without objects count: what is found there is wrong. A class without objects has no
    figure.

    Args:
        found: one entry an image, as :func:`detect` gives them. At most 100 detections an image are counted.

    Raises:
        ValueError: not one entry for each image, or no image has an object.
        ModuleNotFoundError: torchmetrics or pycocotools is not installed; the message says how to.
    """
    if len(found) != len(boxes):
        raise ValueError(f"{boxes.name} has {len(boxes)} images, but there are detections for {len(found)}")
    if not any(bool((~flags).any()) for flags in boxes.difficult):
        raise ValueError(f"{boxes.name} has no object to find: average precision is not defined")
    metric = _metric()
    targets = [
        {"boxes": box, "labels": label, "iscrowd": flags.to(torch.int64)}
        for box, label, flags in zip(boxes.boxes, boxes.labels, boxes.difficult)
    ]
    metric.update([dict(each) for each in found], targets)
    values = metric.compute()
    each = zip(values["classes"].reshape(-1).tolist(), values["map_per_class"].reshape(-1).tolist())
    return {
        "detection": {name: values[name].item() for name in ("map", "map_50", "map_75")},
        "classes": {boxes.classes[label - 1]: value for label, value in each if value >= 0},  # -1: no objects
    }


def _metric():
    try:
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(class_metrics=True)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"average precision needs torchmetrics and pycocotools ({error}): pip install 'advbn_lib[detection]'"
        ) from error
