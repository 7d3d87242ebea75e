"""Accuracy under each shift, through each BatchNorm branch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean

import torch

from advbn_lib.data.images import ImageSet
from advbn_lib.data.shifts import CORRUPTIONS, FAMILIES, Shift
from advbn_lib.methods.base import Method
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress
from advbn_lib.training import computing_in

CHUNK = 500  # fixed: the noise of a shifted test set depends on it
NOISE_SEED = 20_09_08965  # every run is tested on the same noise


@torch.no_grad()
def accuracy(
    method: Method, test: ImageSet, shift: Shift = Shift("clean"), precision: torch.dtype = torch.float32
) -> dict[str, float]:
    """Share of right answers, from 0 to 1, of each of ``method.branches`` on the shifted test set.

    The shifted images depend on the test set and the shift alone (and, for random shifts, on the kind of device).
    """
    device = test.images.device
    generator = torch.Generator(device).manual_seed(NOISE_SEED)
    right = dict.fromkeys(method.branches, torch.zeros((), dtype=torch.int64, device=device))
    with evaluating(method):
        for images, labels in zip(test.images.split(CHUNK), test.labels.split(CHUNK)):
            # Shifts compute in full precision: grey levels are at stake.
            shifted = test.normalise(shift(images.float() / 255, generator))
            with computing_in(precision, device):
                predictions = method.predictions(shifted.contiguous(memory_format=torch.channels_last))
            for branch, logits in predictions.items():
                right[branch] = right[branch] + (logits.argmax(1) == labels).sum()
    return {branch: count.item() / len(test) for branch, count in right.items()}


def accuracies(
    method: Method, test: ImageSet, shifts: Iterable[Shift], show_progress: bool = True, *, parts: int = 1,
    stored: Callable[[str, int], ImageSet] | None = None, precision: torch.dtype = torch.float32,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """:func:`accuracy` for several shifts: ``{branch: {shift: share}}``.

    Args:
        parts: with 5, each of the five severities of a shift is tested on another fifth of the images, so that the shift as a
            whole is tested on all of them, at a fifth of the cost. Clean images are always tested in full.
        stored: gives the images of a corruption at a severity, to take them from there and not to compute them;
            :func:`~advbn_lib.data.cifar10c.load_cifar10c`, if ``test`` is CIFAR-10's.
        precision: what convolutions and matrix products compute in.
    """
    shifts = list(shifts)
    table: dict[str, dict[str, float]] = {branch: {} for branch in method.branches}
    for shift, index in progress(list(zip(shifts, _part_indices(shifts, parts))), "test", show_progress):
        images, change = test, shift
        if stored is not None and shift.name in CORRUPTIONS:
            images = stored(shift.name, shift.severity).first(len(test)).to(test.images.device)
            change = Shift("clean")
        if shift.name != "clean":
            images = images.part(index, parts)
        for branch, share in accuracy(method, images, change, precision).items():
            table[branch][str(shift)] = share
    return table


def _part_indices(shifts: list[Shift], parts: int) -> list[int]:
    """The severity says which part; shifts without degrees take the parts in turn."""
    indices, turn = [], 0
    for shift in shifts:
        indices.append((shift.severity - 1 if shift.severity else turn) % parts)
        turn += shift.severity == 0 and shift.name != "clean"
    return indices


def shift_means(table: dict[str, float]) -> dict[str, float]:
    """Accuracies by shift and severity (one branch) to means over the severities that were tested: ``{"contrast": ...}``."""
    by_name: dict[str, list[float]] = {}
    for shift, share in table.items():
        by_name.setdefault(shift.rpartition("-")[0] or shift, []).append(share)
    return {name: fmean(shares) for name, shares in by_name.items()}


def family_means(table: dict[str, float]) -> dict[str, float]:
    """Mean accuracy under each family of shifts (``corruptions``, ``style``, ...) that ``table`` (one branch) has some of.

    The severities of a shift are averaged first, so that a shift counts once however many degrees of it were tested.
    """
    by_name = shift_means(table)
    tested = {family: [by_name[name] for name in names if name in by_name] for family, names in FAMILIES.items()}
    return {family: fmean(shares) for family, shares in tested.items() if shares}
