"""Who is taken for whom: needed where the classes are not equally frequent, or where a network gives one answer to everything."""

from __future__ import annotations

import torch
from torch import Tensor

from advbn_lib.data.images import ImageSet
from advbn_lib.methods.base import Method
from advbn_lib.modes import evaluating
from advbn_lib.training import computing_in

CHUNK = 250


@torch.no_grad()
def confusion(method: Method, test: ImageSet, precision: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Counts of each of ``method.branches``: K,K, int64, on the CPU; rows are the true classes, columns the answers."""
    classes, device = len(test.classes), test.images.device
    counts = {branch: torch.zeros(classes * classes, dtype=torch.int64, device=device) for branch in method.branches}
    with evaluating(method):
        for images, labels in zip(test.images.split(CHUNK), test.labels.split(CHUNK)):
            normalised = test.normalise(images.float() / 255).contiguous(memory_format=torch.channels_last)
            with computing_in(precision, device):
                predictions = method.predictions(normalised)
            for branch, logits in predictions.items():
                counts[branch] += torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
    return {branch: count.view(classes, classes).cpu() for branch, count in counts.items()}


def accuracy_of(counts: Tensor) -> float:
    """Share of right answers, 0 to 1."""
    return counts.diag().sum().item() / counts.sum().item()


def balanced_accuracy_of(counts: Tensor) -> float:
    """Mean over the classes that occur of the share of each that is found, 0 to 1: every class counts the same."""
    present = counts.sum(1) > 0
    return (counts.diag()[present].double() / counts.sum(1)[present]).mean().item()


def commonest_answer_of(counts: Tensor) -> float:
    """Share of the answer that is given most often, 0 to 1: near 1 the network says the same of everything."""
    return counts.sum(0).max().item() / counts.sum().item()
