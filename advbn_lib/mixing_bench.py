"""Color-MNIST with the exact decoder: how much each method is harmed by colours that give the class away. No StyleGAN is in it.

One run trains a network at each level of bias. Source of the levels: Kim et al., "Learning Not to Learn" (CVPR 2019), and two of
this book; see :mod:`advbn_lib.data.colour_mnist`. What AdvMix itself used on Color-MNIST is not known to us.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn

from advbn_lib.attacks import PGD
from advbn_lib.checkpoints import read_checkpoint, save_checkpoint
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
from advbn_lib.methods.advmix import (
    AdvMix,
    GreyTraining,
    Mixup,
    OnImages,
    RandMix,
    Recolour,
    Reconstruction,
    climb_of,
)
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.methods.pgd_training import PGDTraining
from advbn_lib.mixing import ColourDecoder, Encoded, Mixer, MixingLoader
from advbn_lib.mixing_robustness import MixingAttack, mixing_accuracy
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.provenance import state_checksum
from advbn_lib.style_mix import StyleBank
from advbn_lib.training import History, Schedule, train

Level = float | None  # a variance of the colours around the class's; None: the colour says nothing
LEVELS: tuple[Level, ...] = (EXTREME, *VARIANCES, UNBIASED)
BIASED = "mean_biased"  # the mean over all levels but the unbiased one
COLOURS = (0.0, 1.0)


@dataclass(frozen=True)
class MixingBench:
    """The sizes.

    Args:
        data_set: ``"mnist"``, or scikit-learn's ``"digits"`` for smoke tests.
        images: how many of the first training and test images; None: all.
        attacked: how many of the first test images are mixed, with the colours of the test images after them.
        levels: variances of the training colours. Test colours are drawn around the mean colour of a random class, as in LNTL.
        width: of :class:`~advbn_lib.models.digit_cnn.DigitCNN`.
        schedule: of each training.
        eps, steps, restarts: of AdvMix, see there. RandMix has the same eps, and with many looks as many restarts.
        clean_weight: of all methods with a clean and another loss, l-inf training among them.
        pgd_eps, pgd_steps: of l-inf training; the radius is in 1/255.
        attack_steps, attack_restarts: of the test's mixing, with the same eps.
    """

    data_set: Literal["mnist", "digits"]
    images: tuple[int | None, int | None]
    attacked: int
    width: int
    schedule: Schedule
    levels: tuple[Level, ...] = LEVELS
    eps: float = 0.3
    steps: int = 5
    restarts: int = 3
    clean_weight: float = 0.5
    pgd_eps: float = 25.5
    pgd_steps: int = 5
    attack_steps: int = 5
    attack_restarts: int = 20

    @property
    def passes(self) -> int:
        """Forward passes of AdvMix's search: each restart looks at its start and after every step."""
        return self.restarts * (self.steps + 1)

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


Builder = Callable[[MixingBench, nn.Module, StyleBank, ImageSet], Method]


def _mixed(kind: Callable[..., Method], *sizes: str, **options: Any) -> Builder:
    """A builder of a mixed training; ``sizes`` are the bench's fields that it takes, as ``name`` or ``name=field``."""

    def build(bench: MixingBench, model: nn.Module, bank: StyleBank, images: ImageSet) -> Method:
        chosen = {"clean_weight": bench.clean_weight}
        for size in sizes:
            name, _, field = size.partition("=")
            chosen[name] = getattr(bench, field or name)
        return kind(model, ColourDecoder(), bank, images.mean, images.std, **{**chosen, **options})

    return build


def _linf(bench: MixingBench, model: nn.Module, bank: StyleBank, images: ImageSet) -> Method:
    attack = PGD(images.mean, images.std, bench.pgd_steps, 2.5 / bench.pgd_steps)
    return OnImages(PGDTraining(model, attack, bench.pgd_eps, bench.clean_weight))


METHODS: dict[str, Builder] = {
    "nominal": lambda bench, model, bank, images: OnImages(PlainTraining(model)),
    "advmix": _mixed(AdvMix, "eps", "steps", "restarts"),
    "randmix": _mixed(RandMix, "eps"),
    "randmix_looks": _mixed(RandMix, "eps", "looks=restarts"),
    "randmix_passes": _mixed(RandMix, "eps", "looks=passes"),
    "reconstruction": _mixed(Reconstruction),
    "mixup": lambda bench, model, bank, images: OnImages(Mixup(model)),
    "linf": _linf,
    "recolour": _mixed(Recolour),
    "grey": lambda bench, model, bank, images: OnImages(GreyTraining(model, images.mean, images.std)),
    # ablations
    "advmix_mixed_alone": _mixed(AdvMix, "eps", "steps", "restarts", clean_weight=0.0),
    "advmix_consistency": _mixed(AdvMix, "eps", "steps", "restarts", consistency=1.0),
}
ABOUT = {
    "nominal": "plain training",
    "advmix": "AdvMix: the worst of several other images' colours, each moved in its ball",
    "randmix": "control: another image's colour, no ascent",
    "randmix_looks": "control: the worst of as many other images' colours, no ascent",
    "randmix_passes": "control: the worst of as many other images' colours as AdvMix makes passes, no ascent",
    "reconstruction": "control: decoded with the own colour",
    "mixup": "mixup of pixels",
    "linf": "l-inf adversarial training on pixels",
    "recolour": "oracle: colours drawn evenly from all there are",
    "grey": "plain training on grey images",
    "advmix_mixed_alone": "AdvMix without real images",
    "advmix_consistency": "AdvMix with a term for the same answer to both images",
}


@dataclass(frozen=True)
class MixingRun:
    """What a run gave; see :class:`advbn_lib.records.Record`.

    ``metrics`` has one group, ``mixing``: ``accuracy`` (on real test images) and ``robust`` (under mixing with the most restarts),
    each a share by level, and their mean over the biased levels as ``mean_biased``. ``curves`` has the losses by epoch and
    the accuracy after each restart so far, by level.
    """

    metrics: dict[str, Any]
    curves: dict[str, Any]
    cost: dict[str, float]
    data: dict[str, Any]
    weights: dict[str, Any]


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

    Raises:
        ValueError: no such method.
    """
    if method_name not in METHODS:
        raise ValueError(f"methods are {', '.join(METHODS)}; got {method_name!r}")
    rows, weights = {}, {"source": f"random, seed {seed}"}
    for level in bench.levels:
        rows[level_name(level)] = row = _level(bench, method_name, level, seed, device, code, folder, show_progress)
        weights["sha256"] = row["weights"]
    shares = {group: {name: row[group] for name, row in rows.items()} for group in ("accuracy", "robust")}
    biased = [level_name(level) for level in bench.levels if level is not UNBIASED]
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
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    checkpoint, done = (folder and folder / f"{kind}-{key[:12]}.pt" for kind in ("training", "level"))
    if done and done.exists() and (stored := read_checkpoint(done))["key"] == key:
        return stored["progress"]
    torch.manual_seed(seed)
    model = DigitCNN(bench.width, len(train_set.images.classes), train_set.grey.shape[-1])
    start = state_checksum(model.state_dict())
    bank = StyleBank(train_set.colours.to(device), train_set.images.labels.to(device), COLOURS)
    model = model.to(device, memory_format=torch.channels_last)
    method = METHODS[method_name](bench, model, bank, train_set.images)
    loader = MixingLoader(
        train_set.images, train_set.grey.unsqueeze(1), train_set.colours, bench.schedule.batch_size, seed, device
    )  # fmt: skip
    history = train(
        method, loader, bench.schedule, checkpoint, key, show_progress=show_progress, precision=torch.float32
    )
    row = {**_tested(bench, method, test.to(device), history, show_progress), "data": data, "weights": start}
    if done:
        save_checkpoint(done, {"model": model}, row, key)
        checkpoint.unlink(missing_ok=True)
    return row


def _tested(
    bench: MixingBench, method: Method, test: ColouredDigits, history: History, show_progress: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    (found,) = accuracy(method, test.images).values()
    mixed, others = test.first(bench.attacked), test.first(None, bench.attacked)
    mixer = Mixer(
        ColourDecoder(), StyleBank(others.colours, others.images.labels, COLOURS), test.images.mean, test.images.std
    )
    attack = MixingAttack(bench.eps, climb_of(bench.attack_steps), bench.attack_restarts)
    after = mixing_accuracy(method, mixer, encoded(mixed), mixed.images.labels, attack, show_progress)
    return {
        "accuracy": found,
        "robust": after[-1],
        "accuracy_after_restarts": after,
        "clean_loss": [clean for clean, _ in history.losses],
        "mixed_loss": [mixed for _, mixed in history.losses],
        "train_seconds": history.seconds,
        "test_seconds": time.perf_counter() - started,
    }


def encoded(digits: ColouredDigits) -> Encoded:
    """Coloured digits and their codes, as one batch that is in no bank."""
    images = digits.images.normalise(digits.images.images.float() / 255)
    nowhere = torch.full((len(digits),), -1, device=images.device)
    return Encoded(images, digits.grey.unsqueeze(1).float() / 255, digits.colours, nowhere)


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
