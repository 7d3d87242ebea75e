"""What can be run: experiments, and presets of different size. Configuration only; :mod:`advbn_lib.running` runs it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from advbn_lib.data.images import ImageSet
from advbn_lib.data.shifts import CORRUPTIONS, STYLES, WITHOUT_SEVERITY
from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.augmix import AugMix, AugMixAdvBN, Mixing
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import CleanFineTuning, PlainTraining, RandomStatistics, UnchangedStatistics
from advbn_lib.training import Schedule


@dataclass(frozen=True)
class Plain:
    """The whole network, on clean images."""

    trains: ClassVar[type[Method]] = PlainTraining

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return PlainTraining(model)


@dataclass(frozen=True)
class Clean:
    """Clean fine-tuning above ``layer``."""

    trains: ClassVar[type[Method]] = CleanFineTuning

    layer: str = "layer1"

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return CleanFineTuning(model, self.layer)


@dataclass(frozen=True)
class Unchanged:
    """Two BatchNorm sets, both trained on clean features: an ascent of no steps."""

    trains: ClassVar[type[Method]] = UnchangedStatistics

    layer: str = "layer1"

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return UnchangedStatistics(model, self.layer)


@dataclass(frozen=True)
class Random:
    """Random statistics of AdvBN's size, without ascent."""

    trains: ClassVar[type[Method]] = RandomStatistics

    layer: str = "layer1"
    eps: float = 1.1
    dual_bn: bool = True
    per_image: bool = False

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return RandomStatistics(model, **dataclasses.asdict(self))


@dataclass(frozen=True)
class Adversarial:
    """AdvBN; the paper's values."""

    trains: ClassVar[type[Method]] = AdvBN

    layer: str = "layer1"
    eps: float = 1.1
    step_size: float = 0.2
    steps: int = 6
    dual_bn: bool = True
    random_start: bool = False
    per_image: bool = False

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return AdvBN(model, **dataclasses.asdict(self))


@dataclass(frozen=True)
class Augmented:
    """AugMix above ``layer``; the weight of its divergence and its severity as in the paper."""

    trains: ClassVar[type[Method]] = AugMix

    layer: str = "layer1"
    weight: float = 12.0
    severity: int = 3

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return AugMix(model, self.layer, Mixing(images.mean, images.std, self.severity), self.weight)


@dataclass(frozen=True)
class AugmentedAdversarial:
    """AdvBN with AugMix in its clean branch."""

    trains: ClassVar[type[Method]] = AugMixAdvBN

    layer: str = "layer1"
    eps: float = 1.1
    step_size: float = 0.2
    steps: int = 6
    weight: float = 12.0
    severity: int = 3

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        mixing = Mixing(images.mean, images.std, self.severity)
        return AugMixAdvBN(model, self.layer, mixing, self.weight, self.eps, self.step_size, self.steps)


Configuration = Plain | Clean | Unchanged | Random | Adversarial | Augmented | AugmentedAdversarial


@dataclass(frozen=True)
class Preset:
    """The size of an experiment.

    Attributes:
        about: in words, for the pages.
        data: name of the data set.
        network: name of the network, see :func:`advbn_lib.running.new_network`.
        start: weights that fine-tuning starts from: ``"published"``, or those of the ``pretrain`` experiment.
        fine_tuning: its schedule; the batch size is also the number of images that share a perturbation.
        pretraining: the schedule of the ``pretrain`` experiment.
        pretraining_start: what that starts from: a new network, or the published weights with a new last layer.
        pretraining_images: how many of the first training images it uses; None: all.
        train_images: how many training images fine-tuning uses; None: all.
        first_train_image: where they begin.
        test_images: how many of the first test images; None: all.
        shifts: what is tested.
        elsewhere: other test sets, of the same classes, that are tested as they are.
        parts: tests each shift on one part in ``parts`` of the test images, in turn; see :func:`advbn_lib.evaluation.accuracies`.
        corruptions: ``"computed"`` here, or the ``"stored"`` files of CIFAR-10-C. The two are never mixed.
        precision: ``"auto"``: :func:`advbn_lib.training.precision_on` the device.
    """

    about: str
    data: str
    network: str
    start: Literal["published", "pretrain"]
    fine_tuning: Schedule
    pretraining: Schedule | None = None
    pretraining_start: Literal["new", "published"] = "new"
    pretraining_images: int | None = None
    train_images: int | None = None
    first_train_image: int = 0
    test_images: int | None = None
    shifts: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    parts: int = 1
    corruptions: Literal["computed", "stored"] = "computed"
    precision: Literal["auto", "float32"] = "auto"


@dataclass(frozen=True)
class Experiment:
    """A method and why it is run."""

    name: str
    about: str
    method: Configuration
    stage: Literal["none", "pretraining", "fine_tuning"] = "fine_tuning"


def shifts_at(severities: tuple[int, ...], names: tuple[str, ...] = (*CORRUPTIONS, *STYLES)) -> tuple[str, ...]:
    """The clean images, and these shifts at these severities (those without degrees once)."""
    degrees = {name: (0,) if name in WITHOUT_SEVERITY else severities for name in names}
    return ("clean", *(f"{name}-{s}" if s else name for name in names for s in degrees[name]))


EVERY_SHIFT = shifts_at((1, 2, 3, 4, 5))
SOME_SHIFTS = shifts_at((1, 3, 5), (*CORRUPTIONS, "grey", "inverted", "hue", "sepia", "night", "painting_starry_night"))

# Fine-tuning follows the paper's shape: a pretrained network, a low rate with one drop by ten, batch norm decayed too.
PRESETS = {
    "smoke": Preset(
        "scikit-learn's digits and a tiny network: to see that everything runs",
        "digits", "resnet8", "pretrain", precision="float32",
        pretraining=Schedule(epochs=8, batch_size=32, lr=0.1, milestones=(6,)),
        fine_tuning=Schedule(epochs=2, batch_size=64, lr=0.01, milestones=(1,)),
        train_images=640, shifts=("clean", "gaussian_noise-3", "brightness-3", "contrast-3", "defocus_blur-3", "grey"),
    ),
    "cpu": Preset(
        "CIFAR-10, ResNet-20 from published weights, 10,000 training images, 3 epochs; every severity of a shift is tested "
        "on another fifth of the 10,000 test images",
        "cifar10", "resnet20", "published",
        fine_tuning=Schedule(epochs=3, batch_size=128, lr=0.01, milestones=(2,)),
        train_images=10_000, shifts=EVERY_SHIFT, parts=5,
    ),
    "cpu_ablation": Preset(
        "CIFAR-10, ResNet-20 from published weights, 5,000 training images, 2 epochs; severities 1, 3 and 5 are tested on a "
        "third each of the first 2,000 test images",
        "cifar10", "resnet20", "published",
        fine_tuning=Schedule(epochs=2, batch_size=128, lr=0.01, milestones=(1,)),
        train_images=5_000, test_images=2_000, shifts=SOME_SHIFTS, parts=3,
    ),
    "cpu_fresh": Preset(
        "CIFAR-10, ResNet-20 trained here for 4 epochs on 20,000 images, then fine-tuned for 2 epochs on 5,000 that it has not "
        "seen; severities 1, 3 and 5 are tested on a third each of the first 2,000 test images",
        "cifar10", "resnet20", "pretrain",
        pretraining=Schedule(epochs=4, batch_size=128, lr=0.1, milestones=(2, 3), warmup=0.5, weight_decay=5e-4),
        pretraining_images=20_000,
        fine_tuning=Schedule(epochs=2, batch_size=128, lr=0.01, milestones=(1,)),
        train_images=5_000, first_train_image=40_000, test_images=2_000, shifts=SOME_SHIFTS, parts=3,
    ),
    "cpu_pacs": Preset(
        "PACS at 64 pixels, ResNet-20 from CIFAR-10 weights; trained on photographs alone, tested on art, cartoons and sketches",
        "pacs/photo", "resnet20", "pretrain",
        pretraining=Schedule(epochs=14, batch_size=64, lr=0.02, milestones=(9, 12), warmup=1, weight_decay=5e-4),
        pretraining_start="published",
        fine_tuning=Schedule(epochs=6, batch_size=64, lr=0.01, milestones=(4,)),
        shifts=("clean", "grey", "inverted", *(f"hue-{s}" for s in range(1, 6))),
        elsewhere=("pacs/art_painting", "pacs/cartoon", "pacs/sketch"),
    ),
    "gpu": Preset(
        "CIFAR-10, ResNet-18 trained here, all training images; every shift is tested on all 10,000 test images",
        "cifar10", "resnet18", "pretrain",
        pretraining=Schedule(epochs=20, batch_size=128, lr=0.1, milestones=(12, 17), warmup=1, weight_decay=5e-4),
        fine_tuning=Schedule(epochs=4, batch_size=128, lr=0.01, milestones=(2,)),
        shifts=EVERY_SHIFT,
    ),
}  # fmt: skip
# With the files of CIFAR-10-C, for those who have them. Their numbers are not comparable with computed corruptions.
PRESETS |= {
    f"{name}_stored": dataclasses.replace(
        PRESETS[name],
        about=f"{PRESETS[name].about}; the corruptions are the stored files of CIFAR-10-C",
        corruptions="stored",
        shifts=shifts_at((1, 2, 3, 4, 5), tuple(CORRUPTIONS)),
    )
    for name in ("cpu", "gpu")
}

HEADLINE = (
    Experiment("pretrain", "a plain network to start from (presets without published weights)", Plain(), "pretraining"),
    Experiment("untouched", "the starting point itself, only tested", Plain(), "none"),
    Experiment("clean_finetuning", "control: the same layers, trained as long, on clean features", Clean()),
    Experiment("random_statistics", "control: random statistics of the same size, no ascent", Random()),
    Experiment("advbn", "AdvBN with the paper's eps, step size and steps", Adversarial()),
    Experiment("advbn_eps05", "AdvBN with a smaller set: eps 0.5", Adversarial(eps=0.5)),
    Experiment(
        "advbn_shared_bn",
        "control: AdvBN with one BatchNorm set for both kinds of features",
        Adversarial(dual_bn=False),
    ),
    Experiment("augmix", "control: AugMix, an augmentation of images", Augmented()),
    Experiment("advbn_augmix", "AdvBN with AugMix in its clean branch", AugmentedAdversarial()),
)

ABLATIONS = (
    Experiment("unchanged_statistics", "no step, no random start: both branches train on clean features", Unchanged()),
    *(
        Experiment(f"{kind}_{where}", f"{about}, cut at {layer} and not at layer1", method(layer=layer))
        for where, layer in (("stem", "relu"), ("layer2", "layer2"), ("layer3", "layer3"))
        for kind, about, method in (
            ("clean", "clean fine-tuning", Clean),
            ("random", "random statistics", Random),
            ("advbn", "AdvBN", Adversarial),
        )
    ),
    Experiment("random_eps05", "control for advbn_eps05: random statistics with eps 0.5", Random(eps=0.5)),
    Experiment("advbn_eps02", "AdvBN with eps 0.2", Adversarial(eps=0.2)),
    Experiment("random_eps02", "control for advbn_eps02: random statistics with eps 0.2", Random(eps=0.2)),
    Experiment(
        "advbn_1_step", "AdvBN with one step of the usual size, which goes as far as eps 0.2", Adversarial(steps=1)
    ),
    Experiment("advbn_1_long_step", "AdvBN with one step as long as eps", Adversarial(steps=1, step_size=1.1)),
    Experiment("advbn_3_steps", "AdvBN with three steps of twice the usual size", Adversarial(steps=3, step_size=0.4)),
    Experiment("advbn_random_start", "AdvBN that starts the ascent at random factors", Adversarial(random_start=True)),
    Experiment("advbn_per_image", "AdvBN with statistics and factors for each image", Adversarial(per_image=True)),
    Experiment(
        "random_per_image", "control for advbn_per_image: random factors for each image", Random(per_image=True)
    ),
)

EXPERIMENTS = {experiment.name: experiment for experiment in (*HEADLINE, *ABLATIONS)}


def find(experiment: str, preset: str) -> tuple[Experiment, Preset]:
    """Look both up.

    Raises:
        ValueError: there is no such experiment or preset (all are listed), or the preset has no such stage.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"no experiment {experiment!r}; there are {', '.join(EXPERIMENTS)}")
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if EXPERIMENTS[experiment].stage == "pretraining" and PRESETS[preset].pretraining is None:
        raise ValueError(f"preset {preset!r} starts from published weights: there is nothing to pretrain")
    return EXPERIMENTS[experiment], PRESETS[preset]


def choose_preset(preset: str = "auto") -> str:
    """``preset``, or for ``"auto"`` the one for this machine: ``"gpu"`` with a GPU, else ``"cpu"``.

    Raises:
        ValueError: there is no such preset.
    """
    if preset == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are auto, {', '.join(PRESETS)}")
    return preset
