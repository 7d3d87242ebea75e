"""The sizes at which experiments are run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from advbn_lib.data.shifts import CORRUPTIONS, STYLES, WITHOUT_SEVERITY
from advbn_lib.robustness import StrengthTest
from advbn_lib.side_by_side import Beside
from advbn_lib.training import Schedule


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
class AttackPreset(Preset):
    """A size at which networks are also attacked on their pixels.

    Attributes:
        attack_steps: of the attack in training, for the methods that train on attacked images.
        attacked: how the trained network is attacked.
    """

    attack_steps: int = 7
    attacked: StrengthTest = StrengthTest()


@dataclass(frozen=True)
class ArenaPreset(AttackPreset):
    """A size at which all methods are compared: each trains the same network on for as many epochs, or for as much time.

    Attributes:
        beside: what is measured there and nowhere else.
        rates: learning rates of experiments that start at another one than ``fine_tuning`` says, by name. AFA's second stage trains
            what predicts its weights from nothing, at the rate that it has in its reconstruction.
        epochs: of experiments that train longer or shorter than ``fine_tuning`` says, by name; its milestones move along.
    """

    beside: Beside = Beside()
    rates: tuple[tuple[str, float], ...] = (("afa_finetuning", 0.1),)
    epochs: tuple[tuple[str, int], ...] = ()

    def schedule_of(self, experiment: str) -> Schedule:
        """Its fine-tuning, as long as ``epochs`` says and with the rate of ``rates``."""
        long = dict(self.epochs).get(experiment, self.fine_tuning.epochs)
        moved = tuple(round(long * milestone / self.fine_tuning.epochs) for milestone in self.fine_tuning.milestones)
        rate = dict(self.rates).get(experiment, self.fine_tuning.lr)
        return dataclasses.replace(self.fine_tuning, lr=rate, epochs=long, milestones=moved)


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
    "cpu_scratch": Preset(
        "CIFAR-10, ResNet-20 trained from scratch for 10 epochs on 5,000 images, in float32; all 10,000 clean test images, "
        "each corruption at severity 3 on a fifteenth of them",
        "cifar10", "resnet20", "pretrain", precision="float32",
        pretraining=Schedule(epochs=10, batch_size=64, lr=0.1, milestones=(6, 9), warmup=1, weight_decay=5e-4),
        pretraining_images=5_000,
        fine_tuning=Schedule(epochs=2, batch_size=64, lr=0.01, milestones=(1,)), train_images=5_000,
        shifts=shifts_at((3,), tuple(CORRUPTIONS)), parts=15,
    ),
    "gpu_scratch": Preset(
        "CIFAR-10, ResNet-56 trained from scratch for 200 epochs on the first 45,000 images, in float32, as A-FAN's released "
        "code does, but tested after the last epoch; every corruption on all 10,000 test images",
        "cifar10", "resnet56", "pretrain", precision="float32",
        pretraining=Schedule(epochs=200, batch_size=128, lr=0.1, milestones=(50, 150), warmup=1, weight_decay=5e-4),
        pretraining_images=45_000,
        fine_tuning=Schedule(epochs=4, batch_size=128, lr=0.01, milestones=(2,)),
        shifts=shifts_at((1, 2, 3, 4, 5), tuple(CORRUPTIONS)),
    ),
}  # fmt: skip
# Whole trainings on attacked images. Fine-tuning is AFA's second stage: only what predicts the fusing weights is trained.
PRESETS |= {
    "smoke_attack": AttackPreset(
        "scikit-learn's digits and a tiny network, attacked: to see that everything runs",
        "digits", "resnet8", "pretrain", precision="float32",
        pretraining=Schedule(epochs=4, batch_size=32, lr=0.1, milestones=(3,)), pretraining_images=640,
        fine_tuning=Schedule(epochs=1, batch_size=64, lr=0.1), train_images=640, shifts=("clean",),
        attack_steps=2, attacked=StrengthTest(strengths=(0, 4, 8, 16), steps=3, images=64, cross_strengths=(8,)),
    ),
    "cpu_attack": AttackPreset(
        "CIFAR-10, ResNet-8 trained from scratch for 15 epochs on 10,000 images; attacked on the first 1,000 test images",
        "cifar10", "resnet8", "pretrain",
        pretraining=Schedule(epochs=15, batch_size=128, lr=0.1, milestones=(9, 13), warmup=1, weight_decay=5e-4),
        pretraining_images=10_000,
        fine_tuning=Schedule(epochs=3, batch_size=128, lr=0.1, milestones=(2,)), train_images=10_000,
        shifts=("clean",), attack_steps=3, attacked=StrengthTest(fixed_weights=(0.0, 0.5, 1.0), cross_strengths=(8,)),
    ),
    "gpu_attack": AttackPreset(
        "CIFAR-10, ResNet-18 trained from scratch for 30 epochs on all training images; attacked on all test images",
        "cifar10", "resnet18", "pretrain",
        pretraining=Schedule(epochs=30, batch_size=128, lr=0.1, milestones=(20, 27), warmup=1, weight_decay=5e-4),
        fine_tuning=Schedule(epochs=3, batch_size=128, lr=0.1, milestones=(2,)),
        shifts=("clean",), attack_steps=7, attacked=StrengthTest(images=10_000),
    ),
}  # fmt: skip
# All methods side by side: each goes on from the same network, on images that it has not seen.
PRESETS |= {
    "smoke_arena": ArenaPreset(
        "scikit-learn's digits and a tiny network, all methods: to see that everything runs",
        "digits", "resnet8", "pretrain", precision="float32",
        pretraining=Schedule(epochs=4, batch_size=32, lr=0.1, milestones=(3,)), pretraining_images=640,
        fine_tuning=Schedule(epochs=1, batch_size=64, lr=0.02), train_images=640, shifts=("clean", "contrast-3", "grey"),
        attack_steps=2, attacked=StrengthTest(strengths=(0, 2, 8), steps=3, images=64, cross_strengths=(8,)),
        beside=Beside(apgd_images=32, apgd_steps=4),
    ),
    "cpu_arena": ArenaPreset(
        "CIFAR-10, ResNet-20 trained here for 4 epochs on 20,000 images, then trained on by each method for 3 epochs on 10,000 that "
        "it has not seen; severities 1, 3 and 5 are tested on a third each of the first 2,000 test images, attacks on the first 500",
        "cifar10", "resnet20", "pretrain",
        pretraining=Schedule(epochs=4, batch_size=128, lr=0.1, milestones=(2, 3), warmup=0.5, weight_decay=5e-4),
        pretraining_images=20_000,
        fine_tuning=Schedule(epochs=3, batch_size=128, lr=0.02, milestones=(2,), weight_decay=5e-4),
        train_images=10_000, first_train_image=20_000, test_images=2_000, shifts=SOME_SHIFTS, parts=3, attack_steps=3,
        attacked=StrengthTest(strengths=(0, 2, 8), images=500, fixed_weights=(0.0, 1.0), cross_strengths=(8,)),
        precision="float32",  # A-FAN's steps are too small for bfloat16
    ),
    "gpu_arena": ArenaPreset(
        "CIFAR-10, ResNet-18 trained here for 15 epochs on 25,000 images, then trained on by each method for 5 epochs on the other "
        "25,000; every severity of a shift is tested on another fifth of the 10,000 test images, attacks on the first 1,000",
        "cifar10", "resnet18", "pretrain",
        pretraining=Schedule(epochs=15, batch_size=128, lr=0.1, milestones=(9, 13), warmup=1, weight_decay=5e-4),
        pretraining_images=25_000,
        fine_tuning=Schedule(epochs=5, batch_size=128, lr=0.02, milestones=(3,), weight_decay=5e-4),
        train_images=25_000, first_train_image=25_000, shifts=EVERY_SHIFT, parts=5, attack_steps=7,
        attacked=StrengthTest(strengths=(0, 2, 8), cross_strengths=(8,)), beside=Beside(apgd_images=1_000, apgd_steps=100),
    ),
}  # fmt: skip
# Whole epochs that take about as long as 6 epochs of PGD training. A test holds them against the records of arena_step_cost.
# AFA's two stages share the time.
PRESETS["cpu_arena_compute"] = dataclasses.replace(
    PRESETS["cpu_arena"],
    about="as cpu_arena, but each method trains on for as many epochs as take it about the time of 6 epochs of PGD training",
    epochs=(
        ("plain_finetuning", 18), ("clean_finetuning", 26), ("random_statistics", 14), ("random_per_image", 14), ("mixed_statistics", 14),
        ("advbn", 5), ("augmix", 6), ("advbn_augmix", 3), ("pgd_finetuning", 6), ("afan_finetuning", 5),
        ("end_points_finetuning", 2), ("afa_finetuning", 2),
    ),
)  # fmt: skip
# A-FAN's training from scratch with other networks and data.
PRESETS |= {
    f"gpu_scratch_{name}": dataclasses.replace(PRESETS["gpu_scratch"], about=about, **changed)
    for name, about, changed in (
        ("cifar100", "CIFAR-100, ResNet-56, otherwise as gpu_scratch; clean test images", {"data": "cifar100", "shifts": ("clean",)}),
        ("resnet18", "CIFAR-10, ResNet-18, otherwise as gpu_scratch", {"network": "resnet18"}),
        ("efficientnet_b0", "CIFAR-10, EfficientNet-B0, otherwise as gpu_scratch", {"network": "efficientnet_b0"}),
    )
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


# Presets of measurements that have sizes of their own, in words, for pages that name a scale.
MEASURED_AT = {
    "cpu_mixing": "Color-MNIST, 6,000 training images, 8 epochs, four small convolutions; nine levels of bias, exact decoder, no StyleGAN",
    "cpu_generator": "coloured MNIST digits of 32 pixels; a StyleGAN of 15,000 steps, an encoder of 2,500; with it, 2,000 training images "
    "and 8 epochs at four levels of bias",
    "cpu_smiles": "SMILEsmileD, 8,001 training faces of 64 pixels, 6 epochs, four small convolutions; planted light, exact decoder",
}
