"""Corruption errors: mCE against a reference model, and the plain mean where there is none.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
section 4.2: a corruption's error, averaged over its severities, is divided by the same error of AlexNet, and the quotients are
averaged over the corruptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

SEVERITIES = 5


@dataclass(frozen=True)
class Reference:
    """A model that corruption errors are measured against: its name, and its mean error under each corruption, from 0 to 1."""

    name: str
    errors: Mapping[str, float]


# AlexNet on ImageNet-C, as in the test scripts that Hendrycks and Dietterich, and the authors of AdvBN, have released.
ALEXNET = Reference(
    "AlexNet",
    {
        "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
        "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
        "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
        "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
    },
)  # fmt: skip
CORRUPTIONS = tuple(ALEXNET.errors)


@dataclass(frozen=True)
class CorruptionError:
    """A mean over corruptions, and what it is a mean of.

    Attributes:
        value: the mean, in percent.
        reference: the model that the errors were divided by; None: they were not divided.
        by_corruption: each corruption's part of the mean, in percent.
        missing: corruptions of the full list that were not tested. With any, ``value`` is not comparable with a full one.
    """

    value: float
    reference: str | None
    by_corruption: dict[str, float]
    missing: tuple[str, ...]

    @property
    def corruptions(self) -> int:
        """How many were tested."""
        return len(self.by_corruption)

    def __str__(self) -> str:
        name = "mean error" if self.reference is None else "mCE"
        against = "" if self.reference is None else f", relative to {self.reference}"
        total = self.corruptions + len(self.missing)
        without = f" (without {', '.join(self.missing)})" if self.missing else ""
        unit = " %" if self.reference is None else ""
        return f"{name} {self.value:.1f}{unit}{against}, {self.corruptions} of {total} corruptions{without}"


def mce(errors: Mapping[str, Sequence[float]], reference: Reference = ALEXNET) -> CorruptionError:
    """Mean corruption error, in percent of the reference's: 100 is as bad as the reference.

    Args:
        errors: for each corruption its error rates (1 - accuracy), from 0 to 1, at the five severities.

    Raises:
        ValueError: no corruption at all, one that the reference lacks, or rates that are not five shares.
    """
    means = _means(errors, reference.errors)
    return _summary({name: 100 * mean / reference.errors[name] for name, mean in means.items()}, reference)


def relative_mce(
    errors: Mapping[str, Sequence[float]], clean_error: float, reference: Reference, reference_clean_error: float
) -> CorruptionError:
    """Relative mCE (same source): by how much the error rises over that on clean images, in percent of the reference's rise.

    Args:
        clean_error, reference_clean_error: error rates on clean images, from 0 to 1.

    Raises:
        ValueError: as :func:`mce`; or the reference's error does not rise under some corruption.
    """
    means = _means(errors, reference.errors)
    rises = {name: reference.errors[name] - reference_clean_error for name in means}
    if flat := [name for name, rise in rises.items() if rise <= 0]:
        raise ValueError(f"the error of {reference.name} does not rise under {', '.join(flat)}: nothing to divide by")
    return _summary({name: 100 * (mean - clean_error) / rises[name] for name, mean in means.items()}, reference)


def mean_error(errors: Mapping[str, Sequence[float]], corruptions: Sequence[str] = CORRUPTIONS) -> CorruptionError:
    """Plain mean of the error rates, in percent, each corruption counting once. For CIFAR-10-C, which has no official reference.

    Args:
        errors: as for :func:`mce`.
        corruptions: the full list.
    """
    means = _means(errors, dict.fromkeys(corruptions))
    by_corruption = {name: 100 * mean for name, mean in means.items()}
    missing = tuple(name for name in corruptions if name not in means)
    return CorruptionError(fmean(by_corruption.values()), None, by_corruption, missing)


def _means(errors: Mapping[str, Sequence[float]], known: Mapping[str, object]) -> dict[str, float]:
    if not errors:
        raise ValueError("no corruption was tested")
    if unknown := [name for name in errors if name not in known]:
        raise ValueError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    for name, rates in errors.items():
        if len(rates) != SEVERITIES or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(
                f"{name} must have {SEVERITIES} error rates from 0 to 1, one for each severity; got {list(rates)}"
            )
    return {name: fmean(errors[name]) for name in known if name in errors}


def _summary(by_corruption: dict[str, float], reference: Reference) -> CorruptionError:
    missing = tuple(name for name in reference.errors if name not in by_corruption)
    return CorruptionError(fmean(by_corruption.values()), reference.name, by_corruption, missing)
