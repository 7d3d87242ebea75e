"""Numbers that the papers report, each with where it was read. None of them was measured by this project."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Reported:
    """A number from a paper or its released code.

    Attributes:
        value, unit: as printed there.
        what: what it measures.
        setting: at which scale.
        source: where it was read.
        how_known: how sure we are of it.
    """

    value: float
    unit: str
    what: str
    setting: str
    source: str
    how_known: str


_README = "README of the official code, github.com/azshue/AdvBN"
_RESNET50 = "ResNet-50 on ImageNet"

REPORTED = {
    f"advbn/{metric}/{method}": Reported(value, unit, what, _RESNET50, _README, "read there; not measured by us")
    for metric, unit, what, values in (
        ("imagenet", "%", "ImageNet top-1 accuracy", {"standard": 76.1, "advbn": 77.0}),
        (
            "imagenet_c_mce",
            "mCE",
            "ImageNet-C mean corruption error (lower is better)",
            {"standard": 76.7, "advbn": 72.7},
        ),
        ("instagram", "%", "ImageNet-Instagram accuracy", {"standard": 67.2, "advbn": 69.5}),
        ("sketch", "%", "ImageNet-Sketch accuracy", {"standard": 24.1, "advbn": 27.9}),
        ("stylized", "%", "Stylized-ImageNet accuracy", {"standard": 7.4, "advbn": 11.9}),
    )
    for method, value in values.items()
}

_AFAN = "official code, github.com/VITA-Group/CV_A-FAN"
_CHECKPOINTS = "our reading of the file names of released checkpoints"

REPORTED |= {
    "afan/cifar10/afan": Reported(
        94.82, "%", "CIFAR-10 accuracy on clean images, five steps at stage 1",
        "ResNet-56 on CIFAR-10, 45,000 training images, 200 epochs", f"README of the {_AFAN}",
        "read there; not measured by us; no number of its baseline was found",
    ),
    "afan/voc07_map/standard": Reported(
        73.96, "mAP", "VOC2007 detection", "Faster R-CNN with ResNet-50 on VOC2007",
        f'checkpoint name "7396" in the {_AFAN}', f"{_CHECKPOINTS}; not measured by us",
    ),
    "afan/voc07_map/afan": Reported(
        75.38, "mAP", "VOC2007 detection", "Faster R-CNN with ResNet-50 on VOC2007",
        f'checkpoint name "7538" and a comment in the {_AFAN}', f"{_CHECKPOINTS} and a comment; not measured by us",
    ),
}  # fmt: skip

REPORTED["advmix/celeba_smile_errors/advmix"] = Reported(
    21, "%", "errors of a smile detector that AdvMix does away with, of those without it", "CelebA",
    "abstract of the paper, second version, arXiv 1912.03192",
    "read there; not measured by us; the accuracies behind it are not known to us",
)  # fmt: skip

# Accuracy on Color-MNIST by the variance of the training colours: it calibrates our biased sets, and is no result of AdvMix.
REPORTED |= {
    f"lntl/{method}/{variance:g}": Reported(
        value, "%", "accuracy on Color-MNIST, colours of the test independent of the digit", f"variance {variance:g}, 100 epochs",
        "README of the code of Learning Not to Learn, github.com/feidfoe/learning-not-to-learn",
        "read there; not measured by us",
    )
    for method, values in {
        "baseline": (40.55, 48.13, 59.96, 66.26, 73.33, 79.73, 84.50),
        "lntl": (81.85, 88.54, 91.37, 93.06, 94.06, 95.55, 96.18),
    }.items()
    for variance, value in zip((0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05), values)
}  # fmt: skip


def gain(metric: str) -> float:
    """AdvBN minus standard training on one of the paper's metrics, e.g. ``"imagenet_c_mce"``."""
    return round(REPORTED[f"advbn/{metric}/advbn"].value - REPORTED[f"advbn/{metric}/standard"].value, 4)


def in_words(keys: Iterable[str]) -> str:
    """The numbers of these keys, with what they are and how they are known; numbers of the same thing share a sentence.

    Raises:
        KeyError: there is no such number.
    """
    pairs = [(key.rpartition("/")[2].replace("_", " "), REPORTED[key]) for key in keys]
    sentences = []
    for (what, setting), group in groupby(pairs, key=lambda pair: (pair[1].what, pair[1].setting)):
        same = list(group)
        values = ", ".join(f"{f'{name} ' * (len(same) > 1)}{number.value:g} {number.unit}" for name, number in same)
        known = dict.fromkeys(f"{number.source}; {number.how_known}" for _, number in same)
        sentences.append(f"{what[0].upper()}{what[1:]}, {setting}: {values} ({'; '.join(known)}).")
    return " ".join(sentences)
