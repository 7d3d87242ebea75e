"""Does a network know how often it is right? Expected calibration error."""

from __future__ import annotations

import torch
from torch import Tensor

from advbn_lib.data.images import ImageSet
from advbn_lib.evaluation import CHUNK
from advbn_lib.methods.base import Method
from advbn_lib.modes import evaluating
from advbn_lib.training import computing_in


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """How far confidence is from accuracy, from 0 to 1: over bins of confidence, the mean gap between the two, by images.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), equation 3, with bins of equal width.

    Args:
        logits: (N,K). labels: right classes (N,), int64.
        bins: how many.

    Raises:
        ValueError: no bin, or no image.
    """
    if bins < 1 or len(labels) == 0:
        raise ValueError(f"there must be a bin and an image at least, got {bins} and {len(labels)}")
    confidence, answer = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1  # a bin holds its upper edge, as in the paper
    gap = (answer == labels).double() - confidence
    return torch.zeros(bins, dtype=gap.dtype, device=gap.device).index_add(0, place, gap).abs().sum().item() / len(
        labels
    )


@torch.no_grad()
def calibration(
    method: Method, test: ImageSet, bins: int = 15, precision: torch.dtype = torch.float32
) -> dict[str, float]:
    """:func:`expected_calibration_error` on unchanged images, through each of ``method.branches``."""
    found: dict[str, list[Tensor]] = {branch: [] for branch in method.branches}
    with evaluating(method):
        for images in test.images.split(CHUNK):
            normalised = test.normalise(images.float() / 255).contiguous(memory_format=torch.channels_last)
            with computing_in(precision, test.images.device):
                for branch, logits in method.predictions(normalised).items():
                    found[branch].append(logits.float())
    return {branch: expected_calibration_error(torch.cat(parts), test.labels, bins) for branch, parts in found.items()}
