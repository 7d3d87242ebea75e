"""Color-MNIST with the exact decoder: how much each method is harmed by colours that give the class away. No StyleGAN is in it.

One run trains a network at each level of bias. Source of the levels: Kim et al., "Learning Not to Learn" (CVPR 2019), and two of
this book; see :mod:`advbn_lib.data.colour_mnist`. What AdvMix itself used on Color-MNIST is not known to us.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn

from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.colour_mnist import (
    EXTREME,
    UNBIASED,
    VARIANCES,
    ColouredDigits,
    coloured,
    coloured_digits,
)
from advbn_lib.data.digits import load_digits
from advbn_lib.data.images import ImageSet
from advbn_lib.evaluation import accuracy
from advbn_lib.mixing_methods import METHODS, MixingSizes, require_method
from advbn_lib.mixing_trials import Material, MixingRun, Trained, accuracy_under_mixing, in_one_colour, once, train_on
from advbn_lib.training import Schedule

Level = float | None  # a variance of the colours around the class's; None: the colour says nothing
LEVELS: tuple[Level, ...] = (EXTREME, *VARIANCES, UNBIASED)
BIASED = "mean_biased"  # the mean over all levels but the unbiased one


@dataclass(frozen=True, kw_only=True)
class MixingBench(MixingSizes):
    """The sizes; see also :class:`~advbn_lib.mixing_methods.MixingSizes`.

    Args:
        data_set: ``"mnist"``, or scikit-learn's ``"digits"`` for smoke tests.
        images: how many of the first training and test images; None: all.
        levels: variances of the training colours. Test colours are drawn around the mean colour of a random class, as in LNTL.
    """

    data_set: Literal["mnist", "digits"]
    images: tuple[int | None, int | None]
    levels: tuple[Level, ...] = LEVELS

    def digits(self, split: Literal["train", "test"], level: Level, seed: int) -> ColouredDigits:
        """The coloured digits of a split.

        Raises:
            DataError: the data are missing, or a class is.
        """
        count = self.images[split == "test"]
        made = coloured_digits if self.data_set == "mnist" else _coloured_smoke_digits
        found = made(split, level, seed).first(count)
        require_all_classes(found.images)
        return found


def level_name(level: Level) -> str:
    """``"0.02"``; ``"unbiased"`` for None."""
    return "unbiased" if level is None else f"{level:g}"


def run_mixing_bench(
    bench: MixingBench, method_name: str, seed: int, device: torch.device, code: str, folder: Path | None = None,
    show_progress: bool = True,
) -> MixingRun:  # fmt: skip
    """Train and test one of ``METHODS`` at each level of bias; levels that are done, and steps, are not done again.

    All levels start from the same weights and see the images in the same order; so do all methods.

    Args:
        seed: of weights, order and colours.
        code: hash of the code; what other code left in ``folder`` is not taken.
        folder: for checkpoints and for the levels that are done; None: nothing is kept.

    Returns:
        Its ``metrics`` have one group, ``mixing``: ``accuracy`` (on real test images) and ``robust`` (under mixing with the most
        restarts), each a share by level, and their mean over the biased levels as ``mean_biased``. ``curves`` has the losses by
        epoch and the accuracy after each restart so far, by level.

    Raises:
        ValueError: no such method.
    """
    require_method(method_name, METHODS)
    rows, weights = {}, {"source": f"random, seed {seed}"}
    for level in bench.levels:
        rows[level_name(level)] = row = _level(bench, method_name, level, seed, device, code, folder, show_progress)
        weights["sha256"] = row["weights"]
    return gathered(rows, bench.levels, weights)


def gathered(rows: dict[str, dict[str, Any]], levels: tuple[Level, ...], weights: dict[str, Any]) -> MixingRun:
    """One run of the rows of its levels, by :func:`level_name`."""
    shares = {group: {name: row[group] for name, row in rows.items()} for group in ("accuracy", "robust")}
    biased = [level_name(level) for level in levels if level is not UNBIASED]
    for found in shares.values():
        found[BIASED] = fmean(found[name] for name in biased)
    curves = {f"{curve}/{name}": row[curve] for curve in CURVES for name, row in rows.items()}
    cost = {part: round(sum(row[part] for row in rows.values()), 2) for part in ("train_seconds", "test_seconds")}
    data = {name: about for row in rows.values() for name, about in row["data"].items()}
    return MixingRun({"mixing": shares}, curves, cost, data, weights)


CURVES = ("clean_loss", "mixed_loss", "accuracy_after_restarts")


def _level(
    bench: MixingBench, method_name: str, level: Level, seed: int, device: torch.device, code: str, folder: Path | None,
    show_progress: bool,
) -> dict[str, Any]:  # fmt: skip
    train_set, test = (bench.digits(split, level, seed) for split in ("train", "test"))
    data = {
        digits.images.name: {"images": len(digits), "sha256": digits.images.checksum} for digits in (train_set, test)
    }
    sizes = {**dataclasses.asdict(bench), "levels": None}  # a level does not depend on which others there are
    identity = {"method": method_name, "level": level, "seed": seed, "code": code, "data": data, "bench": sizes}

    def trial(checkpoint: Path | None, key: str) -> tuple[nn.Module, dict[str, Any]]:
        trained = train_on(train_set, bench, METHODS[method_name], seed, device, checkpoint, key, show_progress)
        found = test.to(device)
        attacked, others = (
            in_one_colour(part) for part in (found.first(bench.attacked), found.first(None, bench.attacked))
        )
        row = tested(bench, trained, found.images, attacked, others, show_progress)
        return trained.method.model, {**row, "data": data}

    return once(folder, identity, trial)


def tested(
    sizes: MixingSizes, trained: Trained, images: ImageSet, attacked: Material, others: Material, show_progress: bool
) -> dict[str, Any]:
    """The row of a level: accuracy on real test ``images``, and on the ``attacked`` ones mixed with the styles of ``others``."""
    started = time.perf_counter()
    (found,) = accuracy(trained.method, images).values()
    after = accuracy_under_mixing(trained.method, attacked, others, sizes, show_progress)
    history = trained.history
    return {
        "accuracy": found,
        "robust": after[-1],
        "accuracy_after_restarts": after,
        "clean_loss": [clean for clean, _ in history.losses],
        "mixed_loss": [mixed for _, mixed in history.losses],
        "train_seconds": history.seconds,
        "test_seconds": time.perf_counter() - started,
        "weights": trained.start,
    }


def _coloured_smoke_digits(split: Literal["train", "test"], level: Level, seed: int) -> ColouredDigits:
    """scikit-learn's digits in colours, by the same protocol."""
    digits = load_digits(split)
    return coloured(digits.images[:, 0].contiguous(), digits.labels, split, level, seed, name="coloured digits")


BENCHES: dict[str, MixingBench] = {
    "smoke_mixing": MixingBench(
        data_set="digits", images=(320, 200), attacked=100, width=4, levels=(0.02, UNBIASED), restarts=2, steps=2,
        schedule=Schedule(epochs=2, batch_size=64, lr=0.05), pgd_steps=2, attack_steps=2, attack_restarts=5,
    ),
    "cpu_mixing": MixingBench(
        data_set="mnist", images=(6_000, None), attacked=300, width=8, steps=3,
        schedule=Schedule(epochs=8, batch_size=128, lr=0.05, milestones=(5, 7), warmup=0.5, weight_decay=5e-4),
    ),
}  # fmt: skip
