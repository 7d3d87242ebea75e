"""Accuracy under each shift, through each BatchNorm branch."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

import torch

from advbn_lib.data.images import ImageSet
from advbn_lib.data.shifts import FAMILIES, Shift, parse_shift
from advbn_lib.methods.base import Method
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress

CHUNK = 500  # fixed: the noise of a shifted test set depends on it
NOISE_SEED = 20_09_08965  # every run is tested on the same noise


@torch.no_grad()
def accuracy(method: Method, test: ImageSet, shift: Shift) -> dict[str, float]:
    """Share of right answers, from 0 to 1, of each of ``method.branches`` on the shifted test set.

    The shifted images depend on the test set and the shift alone (and, for random shifts, on the kind of device).
    """
    device = test.images.device
    generator = torch.Generator(device).manual_seed(NOISE_SEED)
    right = dict.fromkeys(method.branches, torch.zeros((), dtype=torch.int64, device=device))
    with evaluating(method):
        for images, labels in zip(test.images.split(CHUNK), test.labels.split(CHUNK)):
            shifted = test.normalise(shift(images.float() / 255, generator)).contiguous(
                memory_format=torch.channels_last
            )
            for branch in method.branches:
                right[branch] = right[branch] + (method.predict(shifted, branch).argmax(1) == labels).sum()
    return {branch: count.item() / len(test) for branch, count in right.items()}


def accuracies(
    method: Method, test: ImageSet, shifts: Iterable[Shift], show_progress: bool = True
) -> dict[str, dict[str, float]]:
    """:func:`accuracy` for several shifts: ``{branch: {shift: share}}``."""
    shifts = list(shifts)
    table: dict[str, dict[str, float]] = {branch: {} for branch in method.branches}
    for shift in progress(shifts, "test", show_progress):
        for branch, share in accuracy(method, test, shift).items():
            table[branch][str(shift)] = share
    return table


def family_means(table: dict[str, float]) -> dict[str, float]:
    """Mean accuracy under each family of shifts (``corruptions``, ``style``) that ``table`` (one branch) has some of.

    The severities of a shift are averaged first, so that a shift counts once however many degrees of it were tested.
    """
    by_name: dict[str, list[float]] = {}
    for shift, share in table.items():
        by_name.setdefault(parse_shift(shift).name, []).append(share)
    means = {}
    for family, names in FAMILIES.items():
        tested = [fmean(by_name[name]) for name in names if name in by_name]
        if tested:
            means[family] = fmean(tested)
    return means
