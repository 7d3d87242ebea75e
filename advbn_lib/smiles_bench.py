"""Smiles in a light that gives them away, in a light that says nothing, and in no light: what each method is harmed by the plant.

It stands for the CelebA experiment of AdvMix ("Smiling"; Gowal et al., CVPR 2020). What differs: the correlation is planted by us
(:func:`advbn_lib.data.smiles.planted`), so that it can be removed; and the decoder is the exact one, grey times colour: it can
change the light of a face and nothing else. **No StyleGAN is in it.** One run trains a network at each of ``LEVELS``:

- ``planted``: warm light goes with a smile in most of the training faces (:attr:`SmilesBench.share`), cold light with none;
- ``removed``: the same two lights, which say nothing of the label;
- ``none``: the grey faces as they are. There is no second style to mix with, so only methods that need none are trained there.

In the test the light says nothing, whatever it said in training; at ``none`` the test faces are grey too.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advbn_lib.data.celeba import load_celeba
from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.digits import load_digits
from advbn_lib.data.images import ImageSet
from advbn_lib.data.smiles import MIDDLE, TINT, TintedFaces, load_smiles, planted
from advbn_lib.methods.advmix import MixedTraining
from advbn_lib.methods.base import Method
from advbn_lib.metrics_binary import measure_binary
from advbn_lib.mixing import Encoded
from advbn_lib.mixing_methods import ABOUT as ABOUT_ALL
from advbn_lib.mixing_methods import METHODS as ALL
from advbn_lib.mixing_methods import MixingSizes, mixed, require_method
from advbn_lib.mixing_trials import MixingRun, Trained, accuracy_under_mixing, once, train_on
from advbn_lib.training import Schedule

Level = Literal["planted", "removed", "none"]
LEVELS: tuple[Level, ...] = ("planted", "removed", "none")
SAYS_NOTHING = 0.5  # share of faces whose light agrees with the label
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: shares of red, green and blue in the lightness of a grey image


class Relight(MixedTraining):
    """The oracle: tints drawn evenly from the coldest to the warmest. It is told what the others must find: an upper bound."""

    def choose_style(self, batch: Encoded, labels: Tensor) -> Tensor:
        tint = 2 * torch.rand(len(batch), 1, device=batch.style.device) - 1
        return MIDDLE + tint * batch.style.new_tensor(TINT)


_SHARED = ("nominal", "advmix", "randmix", "randmix_looks", "reconstruction", "mixup", "linf", "grey")
METHODS = {**{name: ALL[name] for name in _SHARED}, "recolour": mixed(Relight)}
ABOUT = {**{name: ABOUT_ALL[name] for name in _SHARED}, "recolour": "oracle: tints drawn evenly from cold to warm"}
WITHOUT_STYLES = ("nominal", "mixup", "linf")  # trained at ``none`` too


@dataclass(frozen=True, kw_only=True)
class SmilesBench(MixingSizes):
    """The sizes; see also :class:`~advbn_lib.mixing_methods.MixingSizes`.

    Args:
        data_set: ``"smiles"``; ``"celeba"``: its attribute "Smiling", turned grey; or ``"digits"``, scikit-learn's, of which those
            above four stand for smiles, for smoke tests.
        images: how many of the first training and test images; None: all.
        share: of the training faces at ``planted``, those whose light agrees with the label.
    """

    data_set: Literal["smiles", "celeba", "digits"]
    images: tuple[int | None, int | None] = (None, None)
    share: float = 0.95

    def faces(self, split: Literal["train", "test"], seed: int) -> ImageSet:
        """Grey images of two classes, in three equal channels.

        Args:
            seed: of the split, where there is no official one (smiles).

        Raises:
            DataError: the data are missing, or a class is.
        """
        count = self.images[split == "test"]
        if self.data_set == "celeba":
            return greyed(load_celeba(split, "Smiling", count=count))
        found = load_smiles(split, seed) if self.data_set == "smiles" else _two_classes(load_digits(split))
        return require_all_classes(found.first(count))


def lit(faces: ImageSet, share: float | None, seed: int) -> TintedFaces:
    """Grey faces in warm or cold light that agrees with the label in this share of them; None: as they are, in no light."""
    if share is not None:
        return planted(faces, share, seed)
    colours = torch.ones(len(faces), 3, device=faces.images.device)
    return TintedFaces(faces, faces.images[:, 0], colours, torch.zeros_like(faces.labels, dtype=torch.bool))


def greyed(images: ImageSet) -> ImageSet:
    """Colour images as grey ones in three equal channels, rounded to whole levels."""
    luma = torch.tensor(LUMA, device=images.images.device).view(1, 3, 1, 1)
    parts = [  # in parts: in floats all at once would need four times the memory
        (part * luma).sum(1, keepdim=True).round().clamp(0, 255).to(torch.uint8) for part in images.images.split(1000)
    ]
    return dataclasses.replace(images, name=f"{images.name}, grey", images=torch.cat(parts).repeat(1, 3, 1, 1))


def levels_of(method_name: str) -> tuple[Level, ...]:
    """At which of ``LEVELS`` a method is trained."""
    return tuple(level for level in LEVELS if level != "none" or method_name in WITHOUT_STYLES)


def run_smiles_bench(
    bench: SmilesBench, method_name: str, seed: int, device: torch.device, code: str, folder: Path | None = None,
    show_progress: bool = True,
) -> MixingRun:  # fmt: skip
    """Train and test one of ``METHODS`` at each of its levels; levels that are done, and steps, are not done again.

    All levels start from the same weights and see the faces in the same order; so do all methods.

    Args:
        seed: of weights, order, tints and, for smiles, the split.
        code: hash of the code; what other code left in ``folder`` is not taken.
        folder: for checkpoints and for the levels that are done; None: nothing is kept.

    Returns:
        Its ``metrics`` have one group, ``smiles``; each number is from 0 to 1 and stands under its level:

        - ``balanced_accuracy``, ``area`` (under the ROC curve), ``accuracy``: on all test faces;
        - ``agreeing``, ``conflicting``: balanced accuracy on the half of them whose light agrees with the label as the plant has
          it, and on the other half; not at ``none``;
        - ``robust``: balanced accuracy on the first test faces under mixing with the most restarts; not at ``none``.

        ``curves`` has the losses by epoch, and the balanced accuracy after each restart so far.

    Raises:
        ValueError: no such method.
    """
    require_method(method_name, METHODS)
    train_faces, test_faces = (bench.faces(split, seed) for split in ("train", "test"))
    rows = {
        level: _level(bench, method_name, level, train_faces, test_faces, seed, device, code, folder, show_progress)
        for level in levels_of(method_name)
    }
    groups = {
        name: {level: row["metrics"][name] for level, row in rows.items() if name in row["metrics"]} for name in METRICS
    }
    curves = {f"{name}/{level}": curve for level, row in rows.items() for name, curve in row["curves"].items()}
    cost = {
        part: round(sum(row["cost"][part] for row in rows.values()), 2) for part in ("train_seconds", "test_seconds")
    }
    data = {name: about for row in rows.values() for name, about in row["data"].items()}
    weights = {"source": f"random, seed {seed}", "sha256": rows["planted"]["weights"]}
    return MixingRun({"smiles": groups}, curves, cost, data, weights)


METRICS = ("balanced_accuracy", "area", "accuracy", "agreeing", "conflicting", "robust")


def _level(
    bench: SmilesBench, method_name: str, level: Level, train_faces: ImageSet, test_faces: ImageSet, seed: int,
    device: torch.device, code: str, folder: Path | None, show_progress: bool,
) -> dict[str, Any]:  # fmt: skip
    in_training = {"planted": bench.share, "removed": SAYS_NOTHING, "none": None}[level]
    train_set = lit(train_faces, in_training, seed)
    test = lit(test_faces, None if level == "none" else SAYS_NOTHING, seed)
    data = {lot.images.name: {"images": len(lot), "sha256": lot.images.checksum} for lot in (train_set, test)}
    sizes = dataclasses.asdict(bench)
    identity = {"method": method_name, "level": level, "seed": seed, "code": code, "data": data, "bench": sizes}

    def trial(checkpoint: Path | None, key: str) -> tuple[nn.Module, dict[str, Any]]:
        trained = train_on(train_set, bench, METHODS[method_name], seed, device, checkpoint, key, show_progress)
        return trained.method.model, {**_tested(bench, trained, test, device, show_progress), "data": data}

    return once(folder, identity, trial)


def _tested(
    bench: SmilesBench, trained: Trained, test: TintedFaces, device: torch.device, show_progress: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    metrics, curves = _plain_metrics(trained.method, chosen(test, slice(None), device)), {}
    if bool(test.agrees.any()):  # there is light
        attacked, others = (chosen(test, part, device) for part in (slice(bench.attacked), slice(bench.attacked, None)))
        after = robust_balanced_accuracy(trained.method, attacked, others, bench, show_progress)
        metrics["robust"], curves["balanced_accuracy_after_restarts"] = after[-1], after
    curves["clean_loss"] = [clean for clean, _ in trained.history.losses]
    curves["mixed_loss"] = [mixed for _, mixed in trained.history.losses]
    cost = {"train_seconds": trained.history.seconds, "test_seconds": time.perf_counter() - started}
    return {"metrics": metrics, "curves": curves, "cost": cost, "weights": trained.start}


def _plain_metrics(method: Method, test: TintedFaces) -> dict[str, float]:
    (found,) = measure_binary(method, test.images).values()
    metrics = {"balanced_accuracy": found.balanced_accuracy, "area": found.area, "accuracy": found.accuracy}
    if bool(test.agrees.any()):
        for name, half in (("agreeing", test.agrees), ("conflicting", ~test.agrees)):
            (of_half,) = measure_binary(method, chosen(test, half).images).values()
            metrics[name] = of_half.balanced_accuracy
    return metrics


def robust_balanced_accuracy(
    method: Method, attacked: TintedFaces, others: TintedFaces, sizes: MixingSizes, show_progress: bool = True
) -> list[float]:
    """Mean over the two classes of the share that is right as it is and after each restart so far.

    Args:
        attacked, others: see :func:`~advbn_lib.mixing_trials.accuracy_under_mixing`.

    Raises:
        DataError: one of the classes is not attacked.
    """
    labels = require_all_classes(attacked.images).labels
    by_class = [
        accuracy_under_mixing(method, chosen(attacked, labels == label), others, sizes, show_progress)
        for label in (0, 1)
    ]
    return [fmean(shares) for shares in zip(*by_class)]


def chosen(faces: TintedFaces, which: Tensor | slice, device: torch.device | None = None) -> TintedFaces:
    """Some of the faces: a mask or a slice; on another device if one is given."""
    images, device = faces.images, device or faces.grey.device
    some = dataclasses.replace(images, images=images.images[which], labels=images.labels[which])
    return TintedFaces(some.to(device), *(part[which].to(device) for part in (faces.grey, faces.colours, faces.agrees)))


def _two_classes(digits: ImageSet) -> ImageSet:
    return dataclasses.replace(digits, labels=(digits.labels > 4).long(), classes=("to four", "above four"))


BENCHES: dict[str, SmilesBench] = {
    "smoke_smiles": SmilesBench(
        data_set="digits", images=(320, 200), attacked=100, width=4, restarts=2, steps=2, pgd_steps=2, attack_steps=2,
        attack_restarts=5, schedule=Schedule(epochs=2, batch_size=64, lr=0.05),
    ),
    "cpu_smiles": SmilesBench(
        data_set="smiles", attacked=300, width=8, steps=2, pgd_eps=8.0, pgd_steps=3, attack_steps=3,
        schedule=Schedule(epochs=6, batch_size=128, lr=0.05, milestones=(4, 5), warmup=0.5, weight_decay=5e-4),
    ),
    # For those who have CelebA; no number in this book is from it.
    "gpu_smiles_celeba": SmilesBench(
        data_set="celeba", attacked=2_000, width=32, pgd_eps=8.0,
        schedule=Schedule(epochs=10, batch_size=256, lr=0.1, milestones=(6, 8), warmup=0.5, weight_decay=5e-4),
    ),
}  # fmt: skip
