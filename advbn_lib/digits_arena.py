"""All methods side by side on Color-MNIST, small enough for a CPU: one network, one budget, one evaluation.

One run trains one method at each level of bias, as :mod:`advbn_lib.mixing_bench` does; the colours, and how the levels are known, are
in :mod:`advbn_lib.data.colour_mnist`; the sizes in :mod:`advbn_lib.digits_presets`. The rules of the comparison are ours:

- **One budget.** Every method sees each training image as often, in the same order. A method that trains the whole network has all
  epochs for it. One that goes on from a trained network gets the plain network of the same seed after a part of the epochs, and
  then the others: AdvBN, and AugMix and the controls that train the same layers. AFA spends the first part on its end points.
- **One evaluation**, of the weights after the last epoch. No epoch is selected.
- Digits are neither cropped nor mirrored, by any method: a mirrored digit is none.
- AugMix is as in the rest of this book. It moves, turns and shears, which keeps a digit what it is. But its auto-contrast,
  equalisation and solarisation work on each colour channel by itself: they take the colour of a digit away, or change it. On
  these data this is a help that no other method but those that mix colours has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advbn_lib.attacks import PGD, training_step
from advbn_lib.checkpoints import read_checkpoint, save_checkpoint
from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.colour_mnist import UNBIASED, ColouredDigits, coloured, coloured_digits
from advbn_lib.data.digits import load_digits
from advbn_lib.data.images import ImageSet
from advbn_lib.data.shifts import parse_shift
from advbn_lib.evaluation import accuracies, accuracy, family_means
from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.advmix import AdvMix, OnImages, RandMix
from advbn_lib.methods.afa import AFA, EndPoints
from advbn_lib.methods.afan import AFAN, Site
from advbn_lib.methods.augmix import AugMix, AugMixAdvBN, Mixing
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import CleanFineTuning, PlainTraining, RandomStatistics
from advbn_lib.methods.mixed_statistics import MixedStatistics
from advbn_lib.methods.pgd_training import PGDTraining
from advbn_lib.mixing import ColourDecoder, MixingLoader
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.provenance import state_checksum
from advbn_lib.robustness import StrengthTest, strength_test
from advbn_lib.side_by_side import Beside, side_by_side
from advbn_lib.style_mix import StyleBank
from advbn_lib.tasks.classification import Classification
from advbn_lib.training import Schedule, train
from advbn_lib.training_cost import metered

Level = float | None  # a variance of the colours around their class's; None: the colour says nothing
BIASED = "mean_biased"  # the mean over all levels but the unbiased one
CUT = "layer1"  # whose output AdvBN and A-FAN change
FAMILIES = ("corruptions", "noise", "blur", "weather", "digital", "style")
CURVES = ("clean_loss", "adversarial_loss")
COSTS = ("train_seconds", "train_cpu_seconds", "test_seconds")
PASSES = ("forward_passes", "backward_passes")
MEMORY = "training_memory_mib"


@dataclass(frozen=True)
class DigitsArena:
    """The sizes.

    Args:
        about: in words, for the pages.
        data_set: ``"mnist"``, or scikit-learn's ``"digits"`` for smoke tests.
        images: how many of the first training and test images; None: all.
        width: of :class:`~advbn_lib.models.digit_cnn.DigitCNN`.
        schedule: of a whole training.
        first_share: of the epochs that go into the first of two parts.
        second_lr: the learning rate at which the second part starts; predictor_lr: that of AFA, whose second part trains from nothing
            what predicts its weights.
        levels: variances of the training colours; None is the unbiased level.
        shifts: of the test images.
        attacked: how the trained networks are attacked.
        pgd_eps, pgd_steps: of attacks while training, of PGD training and of AFA; the radius is in 1/255.
        mix_eps, mix_steps, mix_restarts: of AdvMix, see there. RandMix has the same eps.
        clean_weight: of AdvMix and RandMix.
        beside: calibration, and an attack that is not ours.
        epochs: of methods that train longer or shorter than ``schedule`` says, by name; milestones move along.

    Raises:
        ValueError: ``first_share`` leaves one of two parts without an epoch, or ``epochs`` names no method.
    """

    about: str
    data_set: Literal["mnist", "digits"]
    images: tuple[int | None, int | None]
    width: int
    schedule: Schedule
    attacked: StrengthTest
    shifts: tuple[str, ...]
    first_share: float = 0.5
    second_lr: float = 0.02
    predictor_lr: float = 0.1
    levels: tuple[Level, ...] = (0.02, 0.035, UNBIASED)
    pgd_eps: float = 16.0
    pgd_steps: int = 3
    mix_eps: float = 0.3
    mix_steps: int = 3
    mix_restarts: int = 3
    clean_weight: float = 0.5
    beside: Beside = Beside(radius=16.0)
    epochs: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        if unknown := [name for name, _ in self.epochs if name not in METHODS]:
            raise ValueError(f"epochs are given for {', '.join(unknown)}; methods are {', '.join(METHODS)}")
        for name in METHODS:
            self.schedules(name)

    def schedules(self, method: str) -> tuple[Schedule, ...]:
        """Of each part of a method's training, one or two. Together they are as long as the method's budget.

        Raises:
            ValueError: a part would have no epoch.
        """
        total = dict(self.epochs).get(method, self.schedule.epochs)
        if len(METHODS[method]) == 1:
            return (_as_long(self.schedule, total),)
        first = round(self.first_share * total)
        if not 0 < first < total:
            raise ValueError(
                f"{method} trains in two parts: {total} epochs and a first share of {self.first_share} leave one of them without "
                "an epoch"
            )
        lr = self.predictor_lr if method == "afa" else self.second_lr
        second = dataclasses.replace(self.schedule, lr=lr, warmup=0.0)
        return _as_long(self.schedule, first), _as_long(second, total - first)

    def digits(self, split: Literal["train", "test"], level: Level, seed: int) -> ColouredDigits:
        """The coloured digits of a split.

        Raises:
            DataError: the data are missing, or a class is.
        """
        if self.data_set == "mnist":
            found = coloured_digits(split, level, seed)
        else:
            grey = load_digits(split)
            found = coloured(grey.images[:, 0].contiguous(), grey.labels, split, level, seed)
        found = found.first(self.images[split == "test"])
        require_all_classes(found.images)
        return found


@dataclass(frozen=True, eq=False)
class Given:
    """What a method is built from."""

    arena: DigitsArena
    model: nn.Module
    images: ImageSet
    bank: StyleBank

    @property
    def example(self) -> Tensor:
        """A batch of images, for splitting the model."""
        device = next(self.model.parameters()).device
        return self.images.normalise(self.images.images[:2].float() / 255).to(device)

    def attack(self) -> PGD:
        """While training."""
        steps = self.arena.pgd_steps
        return PGD(self.images.mean, self.images.std, steps, training_step(steps))

    def mixing(self) -> Mixing:
        """AugMix's way to change an image."""
        return Mixing(self.images.mean, self.images.std)

    def mix(self, kind: Callable[..., Method], **options: Any) -> Method:
        """AdvMix or RandMix."""
        arena, images = self.arena, self.images
        options |= {"eps": arena.mix_eps, "clean_weight": arena.clean_weight}
        return kind(self.model, ColourDecoder(), self.bank, images.mean, images.std, **options)


Part = Callable[[Given], Method]


def _plain(given: Given) -> Method:
    return OnImages(PlainTraining(given.model))


def _on_images(build: Part) -> Part:
    return lambda given: OnImages(build(given))


def _pgd(given: Given) -> Method:
    return PGDTraining(given.model, given.attack(), given.arena.pgd_eps)


def _afan(given: Given) -> Method:
    return AFAN(Classification(given.model, given.example), [Site(CUT)])


def _advmix(given: Given) -> Method:
    return given.mix(AdvMix, steps=given.arena.mix_steps, restarts=given.arena.mix_restarts)


def _above(build: Part) -> tuple[Part, Part]:
    """A method that fine-tunes: a plain network first."""
    return _plain, _on_images(build)


# The parts of each method's training, one or two.
METHODS: dict[str, tuple[Part, ...]] = {
    "natural": (_plain,),
    "clean_finetuning": _above(lambda given: CleanFineTuning(given.model, CUT, given.example)),
    "random_statistics": _above(lambda given: RandomStatistics(given.model, CUT, example=given.example)),
    "mixed_statistics": _above(lambda given: MixedStatistics(given.model, CUT, example=given.example)),
    "advbn": _above(lambda given: AdvBN(given.model, CUT, example=given.example)),
    "augmix": _above(lambda given: AugMix(given.model, CUT, given.mixing(), example=given.example)),
    "advbn_augmix": _above(lambda given: AugMixAdvBN(given.model, CUT, given.mixing(), example=given.example)),
    "pgd": (_on_images(_pgd),),
    "afan": (_on_images(_afan),),
    "afa": (
        _on_images(lambda given: EndPoints(given.model, given.attack(), given.arena.pgd_eps)),
        _on_images(lambda given: AFA(given.model, given.attack(), given.arena.pgd_eps)),
    ),
    "randmix": (lambda given: given.mix(RandMix),),
    "advmix": (_advmix,),
}
ABOUT = {
    "natural": "plain training",
    "clean_finetuning": "control: plain training, then the layers above the cut alone",
    "random_statistics": "control: random statistics above the cut, no ascent",
    "mixed_statistics": "control: statistics mixed with another image's above the cut (MixStyle), no ascent",
    "advbn": "AdvBN above the cut",
    "augmix": "AugMix above the cut",
    "advbn_augmix": "AdvBN with AugMix in its clean branch",
    "pgd": "adversarial training on pixels (PGD)",
    "afan": "A-FAN",
    "afa": "AFA: end points, then fusing weights",
    "randmix": "control: another image's colour, no ascent",
    "advmix": "AdvMix: the worst of several other images' colours, each moved in its ball",
}


@dataclass(frozen=True)
class DigitsRun:
    """What a run gave; see :class:`advbn_lib.records.Record`.

    ``metrics`` has one group, ``digits``: ``digits/<measure>/<branch>/<level>``, each a share from 0 to 1, and the mean over the
    biased levels as ``mean_biased``. Branches are those of the method; AFA is attacked through ``fused`` alone. Measures:

    - ``accuracy``: on test images whose colour does not depend on the digit;
    - ``aligned``: on the same digits in colours of their own class, as in training; ``colour_gap``: how much less
      ``accuracy`` is than that;
    - ``corruptions``, ``noise``, ``blur``, ``weather``, ``digital``, ``style``: means over the shifts of a family that are tested;
      ``shift_<name>``: each by itself;
    - ``pgd_<strength>``: on the first test images, attacked, by the strength in 1/255; 0: the same images unchanged;
      ``worst_case_<strength>``, of models with one main curve: of each image the worst of several attacks, see
      :func:`~advbn_lib.robustness.strength_test`;
    - ``apgd``, ``calibration_error``: see :func:`~advbn_lib.side_by_side.side_by_side`;
    - ``fusing_weight`` and ``weight_follows``, of AFA: the mean weight over layers and images, with the strength of the attack (and
      ``all``) in the branch's place.

    ``cost`` has seconds of training, by the clock and of computing on CPUs, the most memory that training took at any level, and
    forward and backward passes through the network for one training image in one epoch, those of the search for a worst case among
    them.
    """

    metrics: dict[str, Any]
    curves: dict[str, Any]
    cost: dict[str, float | None]
    data: dict[str, Any]
    weights: dict[str, Any]


def level_name(level: Level) -> str:
    """``"0.02"``; ``"unbiased"`` for None."""
    return "unbiased" if level is None else f"{level:g}"


def run_digits_arena(
    arena: DigitsArena, method_name: str, seed: int, device: torch.device, code: str, folder: Path | None = None,
    show_progress: bool = True,
) -> DigitsRun:  # fmt: skip
    """Train and test one of ``METHODS`` at each level of bias; levels that are done are not done again.

    All methods and levels start from the same weights and see the images in the same order.

    Args:
        seed: of weights, order and colours.
        code: hash of the code; what other code left in ``folder`` is not taken.
        folder: for the levels that are done; None: nothing is kept.

    Raises:
        ValueError: no such method.
    """
    if method_name not in METHODS:
        raise ValueError(f"methods are {', '.join(METHODS)}; got {method_name!r}")
    rows = {
        level_name(level): _level(arena, method_name, level, seed, device, code, folder, show_progress)
        for level in arena.levels
    }
    one = next(iter(rows.values()))
    metrics = {
        measure: {branch: _by_level(rows, measure, branch) for branch in by_branch}
        for measure, by_branch in one["measured"].items()
    }
    curves = {f"{curve}/{name}": row[curve] for curve in CURVES for name, row in rows.items()}
    cost = {part: round(sum(row[part] for row in rows.values()), 2) for part in COSTS}
    cost |= {part: round(fmean(row[part] for row in rows.values()), 3) for part in PASSES}
    peaks = [row[MEMORY] for row in rows.values()]
    cost |= {MEMORY: None if None in peaks else max(peaks)}
    data = {name: about for row in rows.values() for name, about in row["data"].items()}
    weights = {"source": f"random, seed {seed}", "sha256": one["weights"]}
    return DigitsRun({"digits": metrics}, curves, cost, data, weights)


def _by_level(rows: dict[str, dict], measure: str, branch: str) -> dict[str, float]:
    shares = {name: row["measured"][measure][branch] for name, row in rows.items()}
    biased = [share for name, share in shares.items() if name != level_name(UNBIASED)]
    return {**shares, BIASED: fmean(biased)} if biased else shares


def _level(
    arena: DigitsArena, method_name: str, level: Level, seed: int, device: torch.device, code: str, folder: Path | None,
    show_progress: bool,
) -> dict[str, Any]:  # fmt: skip
    train_set, test = (arena.digits(split, level, seed) for split in ("train", "test"))
    # "train": a colour of the digit's own class; the digits are those of the test.
    aligned = coloured(
        test.grey, test.images.labels, "train", level, seed, name="test digits in colours of their own"
    ).images
    data = {
        images.name: {"images": len(images), "sha256": images.checksum}
        for images in (train_set.images, test.images, aligned)
    }
    sizes = {
        **dataclasses.asdict(arena),
        "levels": None,
        "about": None,
        "epochs": None,
    }  # a level depends on none of them
    parts = [dataclasses.asdict(part) for part in arena.schedules(method_name)]
    identity = {
        "method": method_name, "level": level, "seed": seed, "code": code, "data": data, "arena": sizes, "parts": parts,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    done = folder and folder / f"level-{key[:12]}.pt"
    if done and done.exists() and (stored := read_checkpoint(done))["key"] == key:
        return stored["progress"]
    torch.manual_seed(seed)
    model = DigitCNN(arena.width, len(train_set.images.classes), train_set.grey.shape[-1])
    start = state_checksum(model.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    method, trained = _trained(arena, method_name, model, train_set, seed, device, show_progress)
    started = time.perf_counter()
    measured = _measured(arena, method, test.images.to(device), aligned.to(device), show_progress)
    tested = {"test_seconds": time.perf_counter() - started}
    row = {"measured": measured, **trained, **tested, "data": data, "weights": start}
    if done:
        save_checkpoint(done, {}, row, key)
    return row


def _trained(
    arena: DigitsArena, method_name: str, model: nn.Module, train_set: ColouredDigits, seed: int, device: torch.device,
    show_progress: bool,
) -> tuple[Method, dict[str, Any]]:  # fmt: skip
    """The method after its last part, and losses and costs of all parts. Not resumed: a level takes a minute or two."""
    given, loader = prepared(arena, model, train_set, seed, device)
    losses, clock, before, passes = [], 0.0, 0, dict.fromkeys(PASSES, 0)
    with metered(device) as cost:
        for part, schedule in zip(METHODS[method_name], arena.schedules(method_name), strict=True):
            method = part(given).to(device)
            with counted_passes(model.linear) as count:
                history = train(
                    method, _Later(loader, before), schedule, show_progress=show_progress, precision=torch.float32
                )
            clock, losses, before = clock + history.seconds, losses + history.losses, before + schedule.epochs
            passes = {way: images + count[way] for way, images in passes.items()}
    seen = before * len(loader) * loader.batch_size
    return method, {
        "clean_loss": [clean for clean, _ in losses],
        "adversarial_loss": [adversarial for _, adversarial in losses],
        "train_seconds": clock,
        "train_cpu_seconds": cost.cpu_seconds,
        MEMORY: cost.memory_mib,
        **{way: images / seen for way, images in passes.items()},
    }


def prepared(
    arena: DigitsArena, model: nn.Module, train_set: ColouredDigits, seed: int, device: torch.device
) -> tuple[Given, MixingLoader]:
    """What the parts of a method's training are built from, and the batches that all methods train on."""
    bank = StyleBank(train_set.colours.to(device), train_set.images.labels.to(device), (0.0, 1.0))
    loader = MixingLoader(
        train_set.images, train_set.grey.unsqueeze(1), train_set.colours, arena.schedule.batch_size, seed, device
    )
    return Given(arena, model, train_set.images, bank), loader


class _Later:
    """A loader whose first epoch is number ``epochs`` of another: the second part of a training goes on where the first ended."""

    def __init__(self, loader: MixingLoader, epochs: int):
        self.loader, self.epochs, self.device = loader, epochs, loader.device

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Any, Tensor]]:
        return self.loader.epoch(self.epochs + epoch, start)


@contextmanager
def counted_passes(layer: nn.Module) -> Iterator[dict[str, int]]:
    """Inside the block, how many images go through the layer, by ``PASSES``."""
    count = dict.fromkeys(PASSES, 0)

    def add(way: str, images: int) -> None:
        count[way] += images

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        images = len(output)
        add("forward_passes", images)
        if output.requires_grad:
            output.register_hook(lambda gradient: add("backward_passes", images))

    hook = layer.register_forward_hook(seen)
    try:
        yield count
    finally:
        hook.remove()


def _measured(
    arena: DigitsArena, method: Method, test: ImageSet, aligned: ImageSet, show_progress: bool
) -> dict[str, dict[str, float]]:
    """``{measure: {branch: share}}``, see :class:`DigitsRun`."""
    table = accuracies(method, test, [parse_shift(name) for name in ("clean", *arena.shifts)], show_progress)
    own_colour = accuracy(method, aligned)
    families = {branch: family_means(shares) for branch, shares in table.items()}
    attacked = strength_test(method, test, arena.attacked, show_progress)
    measured = {
        "accuracy": {branch: shares["clean"] for branch, shares in table.items()},
        "aligned": own_colour,
        "colour_gap": {branch: own_colour[branch] - shares["clean"] for branch, shares in table.items()},
    }
    for family in FAMILIES:
        found = {branch: means[family] for branch, means in families.items() if family in means}
        measured |= {family: found} if found else {}
    for name in arena.shifts:
        measured[f"shift_{name}"] = {branch: shares[name] for branch, shares in table.items()}
    return {**measured, **_under_attack(attacked, method, arena), **side_by_side(method, test, arena.beside)}


def _under_attack(found: dict[str, dict], method: Method, arena: DigitsArena) -> dict[str, dict[str, float]]:
    """What the attacks say, by measure and branch; of AFA its weights, too."""
    robust, measured = found["robust"], {}
    for strength in arena.attacked.strengths:
        curves = {branch: robust[branch] for branch in method.branches if branch in robust}
        measured[f"pgd_{strength:g}"] = {branch: shares[f"{strength:g}"] for branch, shares in curves.items()}
    for strength, share in robust.get("worst_case", {}).items():
        measured[f"worst_case_{strength}"] = {"fused" if "fused" in robust else "clean": share}
    if "weights" in found:
        measured["fusing_weight"] = found["weights"]["all"]["mean"]
        measured["weight_follows"] = {"all": found["weight_follows"]["all"]}
    return measured


def _as_long(schedule: Schedule, epochs: int) -> Schedule:
    # Not rounded to whole epochs: in a short part a drop of the rate would come late, or never.
    moved = tuple(epochs * milestone / schedule.epochs for milestone in schedule.milestones)
    return dataclasses.replace(schedule, epochs=epochs, milestones=moved)
