"""What is measured of networks that an attack preset trained: their statistics, signs of a hidden gradient, other libraries' attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from advbn_lib.attack_agreement import Agreement, agreement
from advbn_lib.attacks import Predict
from advbn_lib.data.images import ImageSet
from advbn_lib.data.sets import load_images
from advbn_lib.fused_bn import force_weights
from advbn_lib.masking_checks import Effort, masking_checks
from advbn_lib.measuring import Job, Measurement, Outcome
from advbn_lib.methods.base import Method
from advbn_lib.methods.pgd_training import UNIT
from advbn_lib.presets import PRESETS
from advbn_lib.provenance import state_checksum
from advbn_lib.running import prepare, train_method
from advbn_lib.strength_probe import ProbeStudy, strength_probe
from advbn_lib.strength_statistics import StatisticsStudy, strength_statistics

TRAINING_CODE = (
    "advbn_lib.training", "advbn_lib.data.loader", "advbn_lib.models.cifar_resnet", "advbn_lib.methods.afa",
    "advbn_lib.methods.pgd_training",
)  # fmt: skip


def _trained(job: Job, names: tuple[str, ...]) -> dict[str, Method]:
    """The methods of these experiments, trained at the job's preset with its seed, in eval mode."""
    found = {}
    for name in names:
        start = prepare(
            name, job.preset, job.seed, str(job.device),
            records_folder=job.records_folder, runs_folder=job.runs_folder, show_progress=job.show_progress,
        )  # fmt: skip
        found[name] = train_method(start).method.eval()
    return found


def _outcome(
    metrics: dict[str, Any], test: ImageSet, methods: dict[str, Method], curves: dict[str, Any] | None = None
) -> Outcome:
    data = {test.name: {"images": len(test), "sha256": test.checksum}}
    checksums = {name: state_checksum(method.model.state_dict()) for name, method in methods.items()}
    return Outcome(metrics, curves or {}, data=data, weights={"source": "trained at this preset", "sha256": checksums})


def _test_images(job: Job, count: int | None = None) -> ImageSet:
    return load_images(PRESETS[job.preset].data, "test").first(count).to(job.device)


def _config(sizes: dict[str, Any], names: tuple[str, ...], preset: str) -> dict[str, Any]:
    size = PRESETS[preset]
    return {"data": size.data, "network": size.network, "models": names, **asdict(sizes[preset])}


# ---- statistics against strength -----------------------------------------------------------

STATISTICS = {
    "smoke_attack": StatisticsStudy(strengths=(0, 8, 16, 32), steps=2, images=64, examples=3),
    "cpu_attack": StatisticsStudy(),
    "gpu_attack": StatisticsStudy(images=10_000),
}
OF_STATISTICS = ("pretrain", "pgd_8")  # trained on clean images; trained on attacked ones


def _strength_statistics(job: Job) -> Outcome:
    study, test, methods = (
        replace(STATISTICS[job.preset], seed=job.seed),
        _test_images(job),
        _trained(job, OF_STATISTICS),
    )
    tables, curves = {}, {}
    for name, method in methods.items():
        tables[name], found = strength_statistics(method.model, test, study, show_progress=job.show_progress)
        curves |= {f"{name}/{curve}": values for curve, values in found.items()}
    return _outcome({"statistics": tables}, test, methods, curves)


# ---- signs of a hidden gradient ------------------------------------------------------------


@dataclass(frozen=True)
class CheckedAt:
    """On how many of the first test images, in which radius (1/255), and how hard the checks try."""

    images: int
    strength: float
    effort: Effort


CHECKS = {
    "smoke_attack": CheckedAt(64, 8.0, Effort(4, 8, 1, 8, 4, 16)),
    "cpu_attack": CheckedAt(200, 8.0, Effort(20, 50, 2, 30, 20, 200)),
    "gpu_attack": CheckedAt(1000, 8.0, Effort()),
}
CHECKED = ("pretrain", "pgd_8", "afa")


def _masking_checks(job: Job) -> Outcome:
    size, methods = CHECKS[job.preset], _trained(job, CHECKED)
    test = _test_images(job, size.images)
    images, labels = test.normalise(test.images.float() / 255), test.labels
    models: dict[str, Predict] = {name: method.predict for name, method in methods.items()}
    tables = {}
    for name, predict in models.items():
        others = {other: model for other, model in models.items() if other != name}
        if name == "afa":  # attacks on itself that go round its predictors
            others |= {f"weights_{weight:g}": partial(_forced, methods[name], weight) for weight in (0.0, 0.5, 1.0)}
        generator = torch.Generator(job.device).manual_seed(job.seed)
        found = masking_checks(
            predict, images, labels, test.mean, test.std, size.strength * UNIT, others, generator, size.effort
        )
        tables[name] = {check.name: {"passed": float(check.passed), **check.numbers} for check in found}
    return _outcome({"masking_checks": tables}, test, methods)


def _forced(method: Method, weight: float, images: torch.Tensor) -> torch.Tensor:
    with force_weights(method.model, weight):
        return method.predict(images)


# ---- can the strength be read? -------------------------------------------------------------

PROBED_ON = {
    "smoke_attack": ProbeStudy(strengths=(0, 8), images=32, steps=2, batch_size=32),
    "cpu_attack": ProbeStudy(),
    "gpu_attack": ProbeStudy(images=10_000, batch_size=1000),
}
PROBED = ("afa", "afa_supervised")


def _strength_probe(job: Job) -> Outcome:
    study, test, methods = replace(PROBED_ON[job.preset], seed=job.seed), _test_images(job), _trained(job, PROBED)
    tables = {name: strength_probe(method, test, study, job.show_progress) for name, method in methods.items()}
    return _outcome({"strength_probe": tables}, test, methods)


# ---- attacks of other libraries ------------------------------------------------------------


@dataclass(frozen=True)
class ComparedOn:
    """On how many of the first test images, and how."""

    images: int
    attack: Agreement


COMPARED = {
    "smoke_attack": ComparedOn(32, Agreement(steps=4, rounds=1, subset=8, apgd_steps=4, queries=8)),
    "cpu_attack": ComparedOn(500, Agreement(subset=200, apgd_steps=50, queries=1000)),
    "gpu_attack": ComparedOn(1000, Agreement(subset=1000, apgd_steps=100, queries=5000)),
}


def _attack_agreement(job: Job) -> Outcome:
    size, methods = COMPARED[job.preset], _trained(job, CHECKED)
    test, networks = _test_images(job, size.images), {name: method.model for name, method in methods.items()}
    attack = replace(size.attack, seed=job.seed)
    tables = agreement(networks, test.images.float() / 255, test.labels, test.mean, test.std, attack)
    return _outcome({"attack_agreement": tables}, test, methods)


# ---- all of them ---------------------------------------------------------------------------


def _measurement(
    name: str, about: str, sizes: dict[str, Any], models: tuple[str, ...], modules: tuple[str, ...],
    measure: Callable[[Job], Outcome], group: str = "", headline: tuple[str, ...] = (),
) -> Measurement:  # fmt: skip
    return Measurement(
        name, about, tuple(sizes), partial(_config, sizes, models), (*modules, *TRAINING_CODE), measure,
        repeatable=name != "attack_agreement", group=group, headline=headline,
    )  # fmt: skip


ATTACK_MEASUREMENTS = (
    _measurement(
        "strength_statistics", "do feature statistics move one way only as an attack gets stronger, and under noise?",
        STATISTICS, OF_STATISTICS, ("advbn_lib.strength_statistics",), _strength_statistics, "statistics",
        ("monotone_share", "spearman", "shift"),
    ),
    _measurement(
        "masking_checks", "signs that a trained network hides its gradient",
        CHECKS, CHECKED, ("advbn_lib.masking_checks",), _masking_checks, headline=("passed",),
    ),
    _measurement(
        "strength_probe", "can the strength of an attack be read from what AFA's predictors see?",
        PROBED_ON, PROBED, ("advbn_lib.strength_probe", "advbn_lib.robustness"), _strength_probe,
    ),
    _measurement(
        "attack_agreement", "our attack beside those of torchattacks and foolbox, and others that we have not written",
        COMPARED, CHECKED, ("advbn_lib.attack_agreement",), _attack_agreement,
    ),
)  # fmt: skip
