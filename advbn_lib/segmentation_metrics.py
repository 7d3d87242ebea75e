"""How well masks are found: intersection over union (IoU) of each class, their mean, and the share of right pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.data.masks import IGNORE, Masks, normalise
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress


@dataclass(frozen=True)
class MaskScores:
    """Scores of a set, from counts of pixels (K,K; rows are the true classes, columns the answers).

    Attributes:
        miou: mean of ``iou``: classes that occur neither in truth nor in an answer are left out. NaN without a labelled pixel.
        pixel_accuracy: share of the labelled pixels that are right, 0 to 1. NaN without a labelled pixel.
        iou: of each class that occurs, 0 to 1: pixels that are of the class and called so, of those that are either.
        absent: the classes that are left out.
    """

    miou: float
    pixel_accuracy: float
    iou: dict[str, float]
    absent: tuple[str, ...]

    @classmethod
    def of(cls, counts: Tensor, classes: tuple[str, ...]) -> MaskScores:
        right, union = counts.diag().double(), (counts.sum(0) + counts.sum(1) - counts.diag()).double()
        shares = dict(zip(classes, (right / union).tolist()))
        occurs = dict(zip(classes, (union > 0).tolist()))
        iou = {name: share for name, share in shares.items() if occurs[name]}
        miou = sum(iou.values()) / len(iou) if iou else float("nan")
        absent = tuple(name for name in classes if not occurs[name])
        return cls(miou, (right.sum() / counts.sum()).item(), iou, absent)


@torch.no_grad()
def mask_confusion(
    model: nn.Module,
    masks: Masks,
    device: torch.device | str,
    stride: int = 16,
    chunk: int = 16,
    show_progress: bool = False,
) -> Tensor:
    """Counts of labelled pixels over a set: K,K, int64, on the CPU; rows are the true classes, columns the answers.

    The model is in eval mode meanwhile. Images are taken whole; sides that ``stride`` does not divide are filled up with the
    mean colour, to the right and at the bottom, and the answers there are cut off.

    Args:
        model: normalised images (N,3,H,W) to logits (N,K,H,W).
        chunk: at most so many images at once; only images of one size are taken together.
    """
    classes = len(masks.classes)
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    with evaluating(model):
        for indices in progress(range(0, len(masks), chunk), "test", show_progress):
            samples = [masks[index] for index in range(indices, min(indices + chunk, len(masks)))]
            for images, targets in _by_size(samples):
                targets = targets.to(device).long()
                answers = predict_masks(model, normalise(images.to(device), masks), stride)
                labelled = targets != IGNORE
                pairs = targets[labelled] * classes + answers[labelled]
                counts += torch.bincount(pairs, minlength=classes * classes)
    return counts.view(classes, classes).cpu()


def predict_masks(model: nn.Module, images: Tensor, stride: int = 16) -> Tensor:
    """Normalised images (N,3,H,W) of any size to the most likely class of each pixel (N,H,W), in the mode the model is in."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % stride, 0, -height % stride))
    logits = model(padded.contiguous(memory_format=torch.channels_last))
    return logits[..., :height, :width].argmax(1)


def _by_size(samples: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for image, mask in samples:
        groups.setdefault(mask.shape, []).append((image, mask))
    return [tuple(torch.stack(parts) for parts in zip(*group)) for group in groups.values()]
