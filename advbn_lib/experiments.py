"""What can be run: experiments, and presets of different size. Configuration only; :mod:`advbn_lib.running` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import CleanFineTuning, PlainTraining, RandomStatistics
from advbn_lib.training import Schedule


@dataclass(frozen=True)
class Plain:
    """The whole network, on clean images."""

    trains: ClassVar[type[Method]] = PlainTraining

    def build(self, model: nn.Module) -> Method:
        return PlainTraining(model)


@dataclass(frozen=True)
class Clean:
    """Clean fine-tuning above ``layer``."""

    trains: ClassVar[type[Method]] = CleanFineTuning

    layer: str = "layer1"

    def build(self, model: nn.Module) -> Method:
        return CleanFineTuning(model, self.layer)


@dataclass(frozen=True)
class Random:
    """Random statistics of AdvBN's size, without ascent."""

    trains: ClassVar[type[Method]] = RandomStatistics

    layer: str = "layer1"
    eps: float = 1.1
    dual_bn: bool = True

    def build(self, model: nn.Module) -> Method:
        return RandomStatistics(model, self.layer, self.eps, dual_bn=self.dual_bn)


@dataclass(frozen=True)
class Adversarial:
    """AdvBN; the paper's values."""

    trains: ClassVar[type[Method]] = AdvBN

    layer: str = "layer1"
    eps: float = 1.1
    step_size: float = 0.2
    steps: int = 6
    dual_bn: bool = True

    def build(self, model: nn.Module) -> Method:
        return AdvBN(model, self.layer, self.eps, self.step_size, self.steps, dual_bn=self.dual_bn)


@dataclass(frozen=True)
class Preset:
    """The size of an experiment.

    Attributes:
        data: name of the data set.
        network: name of the network, see :func:`advbn_lib.running.new_network`.
        start: weights that fine-tuning starts from: ``"published"``, or those of the ``pretrain`` experiment.
        fine_tuning: its schedule; the batch size is also the number of images that share a perturbation.
        pretraining: the schedule of the ``pretrain`` experiment.
        train_images: how many of the first training images fine-tuning uses; None: all.
        test_images: how many of the first test images; None: all.
        shifts: what is tested.
    """

    data: str
    network: str
    start: Literal["published", "pretrain"]
    fine_tuning: Schedule
    pretraining: Schedule | None = None
    train_images: int | None = None
    test_images: int | None = None
    shifts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A method and why it is run."""

    name: str
    about: str
    method: Plain | Clean | Random | Adversarial
    stage: Literal["none", "pretraining", "fine_tuning"] = "fine_tuning"


SHIFTS = (
    "clean",
    *(
        f"{name}-{severity}"
        for name in ("gaussian_noise", "brightness", "contrast", "defocus_blur")
        for severity in (1, 3, 5)
    ),
    "grey",
)

# Fine-tuning follows the paper's shape: a pretrained network, a low rate with one drop by ten, batch norm decayed too.
PRESETS = {
    "smoke": Preset(
        "digits", "resnet8", "pretrain",
        pretraining=Schedule(epochs=8, batch_size=32, lr=0.1, milestones=(6,)),
        fine_tuning=Schedule(epochs=2, batch_size=64, lr=0.01, milestones=(1,)),
        train_images=640, shifts=("clean", "gaussian_noise-3", "brightness-3", "contrast-3", "defocus_blur-3", "grey"),
    ),
    "cpu": Preset(
        "cifar10", "resnet20", "published",
        fine_tuning=Schedule(epochs=4, batch_size=128, lr=0.01, milestones=(2,)),
        train_images=10_000, shifts=SHIFTS,
    ),
    "gpu": Preset(
        "cifar10", "resnet18", "pretrain",
        pretraining=Schedule(epochs=20, batch_size=128, lr=0.1, milestones=(12, 17), warmup=1, weight_decay=5e-4),
        fine_tuning=Schedule(epochs=4, batch_size=128, lr=0.01, milestones=(2,)),
        shifts=SHIFTS,
    ),
}  # fmt: skip

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "pretrain", "a plain network to start from (presets without published weights)", Plain(), "pretraining"
        ),
        Experiment("untouched", "the starting point itself, only tested", Plain(), "none"),
        Experiment("clean_finetuning", "control: the same layers, trained as long, on clean features", Clean()),
        Experiment("random_statistics", "control: random statistics of the same size, no ascent", Random()),
        Experiment("advbn", "AdvBN with the paper's eps, step size and steps", Adversarial()),
        Experiment(
            "advbn_shared_bn",
            "control: AdvBN with one BatchNorm set for both kinds of features",
            Adversarial(dual_bn=False),
        ),
    )
}


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
