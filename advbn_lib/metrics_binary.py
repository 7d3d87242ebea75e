"""Two classes of which one is rarer: accuracy, balanced accuracy, and the area under the ROC curve.

A network that always answers "no" has an accuracy of 63 % where 63 % are "no". Its balanced accuracy is 1/2, and so is its area.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advbn_lib.confusion import CHUNK, balanced_accuracy_of
from advbn_lib.data.images import ImageSet
from advbn_lib.methods.base import Method
from advbn_lib.modes import evaluating
from advbn_lib.training import computing_in


@dataclass(frozen=True)
class BinaryMetrics:
    """All from 0 to 1.

    Attributes:
        accuracy: share of right answers.
        balanced_accuracy: mean over the two classes of the share of each that is found.
        area: under the ROC curve; see :func:`area_under_curve`.
    """

    accuracy: float
    balanced_accuracy: float
    area: float


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how likely a random image of class 1 has a higher score than one of class 0 (a tie counts half).

    Computed from ranks (Mann and Whitney, 1947), so that no threshold is needed and ties are exact.

    Args:
        scores: N, the higher the more class 1; e.g. the difference of two logits.
        labels: N, 0 or 1.

    Raises:
        ValueError: shapes differ, a score is not a number, labels are not 0 and 1, or one of the classes does not occur.
    """
    if scores.dim() != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must be N each, got {tuple(scores.shape)} and {tuple(labels.shape)}")
    if scores.isnan().any():
        raise ValueError(f"{int(scores.isnan().sum())} of {len(scores)} scores are not a number")
    if set(labels.tolist()) != {0, 1}:
        raise ValueError(f"both classes, 0 and 1, must occur and no other; got {sorted(set(labels.tolist()))}")
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    rank = (last - (counts.double() - 1) / 2)[place]  # of tied scores: the middle of the places that they share
    positive = labels == 1
    ones = int(positive.sum())
    zeros = len(labels) - ones
    return ((rank[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros)).item()


def binary_metrics(logits: Tensor, labels: Tensor) -> BinaryMetrics:
    """From logits (N,2) and labels (N, 0 or 1).

    Raises:
        ValueError: other shapes or labels, or one of the classes does not occur.
    """
    if logits.dim() != 2 or logits.shape[1] != 2:
        raise ValueError(f"two classes have logits of shape N,2, got {tuple(logits.shape)}")
    area = area_under_curve(logits[:, 1].double() - logits[:, 0].double(), labels)
    counts = torch.bincount(labels * 2 + logits.argmax(1), minlength=4).view(2, 2).cpu()
    return BinaryMetrics(counts.diag().sum().item() / len(labels), balanced_accuracy_of(counts), area)


@torch.no_grad()
def measure_binary(method: Method, test: ImageSet, precision: torch.dtype = torch.float32) -> dict[str, BinaryMetrics]:
    """Of each of ``method.branches``, on a test set of two classes, on the device that it lies on.

    Raises:
        ValueError: the set has not two classes, or one of them does not occur.
    """
    logits: dict[str, list[Tensor]] = {branch: [] for branch in method.branches}
    with evaluating(method):
        for images in test.images.split(CHUNK):
            normalised = test.normalise(images.float() / 255).contiguous(memory_format=torch.channels_last)
            with computing_in(precision, test.images.device):
                predictions = method.predictions(normalised)
            for branch, outputs in predictions.items():
                logits[branch].append(outputs.float())
    return {branch: binary_metrics(torch.cat(outputs), test.labels) for branch, outputs in logits.items()}
