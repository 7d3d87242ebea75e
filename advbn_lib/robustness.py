"""Accuracy under attacks of growing strength, for one model: curves, the area under them, and what the fusing weights do.

Robustness is an upper bound until nobody finds a better attack. So a model that fuses is attacked through all that it computes,
its weight predictors too, and besides with weights that are held fixed: the harm of the worst of these attacks counts, of each
image. Advice followed: Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security" (ICML 2018); Tramer et
al., "On Adaptive Attacks to Adversarial Example Defenses" (NeurIPS 2020). Signs of a hidden gradient are looked for in
:mod:`advbn_lib.masking_checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from advbn_lib.attacks import PGD, Attacked, Predict, judge, worse, worst_case
from advbn_lib.data.images import ImageSet
from advbn_lib.fused_bn import force_weights, fused_layers, recorded_weights
from advbn_lib.methods.base import Method
from advbn_lib.methods.pgd_training import UNIT
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress

NOISE_SEED = 2105_15157  # every model meets the same random starts
SURROGATE_WEIGHTS = (0.0, 0.5, 1.0)  # forced, in some of the attacks that the worst case is of


@dataclass(frozen=True)
class StrengthTest:
    """How a model is attacked, and with what strengths.

    Args:
        strengths: radii of the l-infinity ball in 1/255, from 0 up.
        steps, step: of projected gradient descent; the length of a step is a share of the radius.
        restarts: climbs of each attack; an image counts as broken if one of them breaks it.
        images: how many of the first test images; None: all.
        fixed_weights: fusing weights of the models with a fixed one, from 0 (clean) to 1 (adversarial).
        cross_strengths: at which of the strengths the weaker attack and the worst case are found, too.
        follow_up_to: up to which strength it is asked whether the weights follow it: that of the training, above which a
            predictor has learned nothing.
        batch_size: images at a time. Which noise an image meets depends on it.

    Raises:
        ValueError: a value is out of its range; the message says how to mend it.
    """

    strengths: tuple[float, ...] = (0, 1, 2, 4, 6, 8, 10, 12)
    steps: int = 20
    step: float = 0.25
    restarts: int = 1
    images: int | None = 1000
    fixed_weights: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    cross_strengths: tuple[float, ...] = (4, 8, 12)
    follow_up_to: float = 8
    batch_size: int = 250

    def __post_init__(self):
        strengths = self.strengths
        if len(strengths) < 2 or strengths[0] != 0 or any(low >= high for low, high in zip(strengths, strengths[1:])):
            raise ValueError(f"strengths begin with 0 and rise, and there are two at least; got {strengths}")
        if not 0.05 <= strengths[1] <= strengths[-1] <= 255:
            raise ValueError(f"strengths are in 1/255, to 255 at most: write 8 for 8/255; got {strengths}")
        if not set(self.cross_strengths) <= set(strengths):
            raise ValueError(f"cross_strengths are some of the strengths {strengths}, got {self.cross_strengths}")
        if not all(0 <= weight <= 1 for weight in self.fixed_weights):
            raise ValueError(f"fixed_weights are from 0 (clean) to 1 (adversarial), got {self.fixed_weights}")
        if self.follow_up_to < strengths[1]:
            raise ValueError(
                f"follow_up_to is a strength above 0, at least {strengths[1]:g}; got {self.follow_up_to:g}"
            )
        if self.restarts < 1 or self.batch_size < 1 or (self.images is not None and self.images < 1):
            raise ValueError(
                f"restarts, batch_size and images are at least 1, got {self.restarts}, {self.batch_size} and {self.images}"
            )
        _ = self.attack((0.0,), (1.0,))  # it refuses bad steps

    def attack(self, mean: tuple[float, ...], std: tuple[float, ...]) -> PGD:
        """The attack that the curves are made with, on images that were normalised with ``mean`` and ``std``."""
        return PGD(mean, std, self.steps, self.step)


def strength_test(
    method: Method, test: ImageSet, config: StrengthTest = StrengthTest(), show_progress: bool = True
) -> dict[str, dict]:
    """Attack a model with every strength, and count its right answers.

    Each strength is an attack of its own, from the same random starts (in units of the radius), on the same images for every
    curve and every model. An image that is answered wrongly without a change counts as broken at every strength. All computes in
    float32, in eval mode; afterwards each module's mode is as before.

    Args:
        method: on the device of the images. Which curves there are depends on what it is:

            - A model without fusing BatchNorms: one curve for each of ``method.branches``, most often ``"clean"`` alone.
            - One with fusing BatchNorms: ``"fixed_0"``, ``"fixed_0.25"`` and so on: the weight is forced in the attack and in the
              answer, as if that were the model.
            - If it predicts weights (``"fused"`` is one of its branches), also ``"fused"``: the adaptive attack, through the
              predictors. And at ``cross_strengths`` ``"frozen_weights"``: the attack sees weights that are frozen at those of
              the clean image, and the whole model answers. It is the weaker attack, and shows what an evaluation with it would
              have missed.
            - With one main curve (``"clean"`` alone, or ``"fused"``), at ``cross_strengths`` also ``"worst_case"``: of each image
              the worst of the main attack, of one that climbs the margin and not the cross-entropy, and, where weights are
              predicted, of attacks with weights frozen and with weights forced to 0, 0.5 and 1 (the whole model answers).
        test: its first ``config.images`` images are used.

    Returns:
        Groups of metrics, ready for JSON; strengths are text, such as ``"8"``:

        - ``robust``: ``{curve: {strength: accuracy}}``, from 0 to 1.
        - ``area``: ``{curve: ...}``, of curves with all strengths: the area under the curve (trapezoids) divided by the largest
          strength. With fixed weights also ``best_fixed``, the largest of these, and ``oracle``, of the curve that has of each
          strength the best fixed weight. Both choose on the test images: they are upper bounds for fixed weights.
        - ``weights``, if they are predicted: ``{layer: {"mean": {strength: ...}, "std": {strength: ...}}}`` over images that the
          adaptive attack changed; layer ``"all"`` is the mean over layers.
        - ``weight_follows``, likewise: ``{layer: ...}``, Spearman's correlation of a weight with the strength that its image was
          attacked with, over all images and the strengths to ``follow_up_to``; 0 if the weight never changes.

    Raises:
        ValueError: labels do not fit the model.
        DataError: there are fewer test images.
        FloatingPointError: a loss is NaN or infinite.
    """
    test = test.first(config.images)
    device, tally = test.images.device, _Tally()
    attack = config.attack(test.mean, test.std)
    pairs = list(zip(test.images.split(config.batch_size), test.labels.split(config.batch_size)))
    jobs = [(index, strength) for index in range(len(pairs)) for strength in config.strengths]
    with evaluating(method), torch.autocast(device.type, enabled=False):
        for index, strength in progress(jobs, "attack", show_progress):
            pixels, labels = pairs[index]
            images = test.normalise(pixels.float() / 255)
            batch = _Batch(method, attack, config, images, labels, strength, NOISE_SEED + index)
            for curve, found in batch.curves():
                tally.add(curve, strength, found)
            for layer, weights in batch.weights.items():
                tally.weights.setdefault(layer, {}).setdefault(strength, []).append(weights)
    return tally.metrics(config)


@dataclass
class _Tally:
    """What was found so far; it stays on the device until the end.

    Attributes:
        wrong: of each curve and strength, whether the images of each batch are answered wrongly, (N,).
        weights: of each layer and strength, the fusing weights of each batch, (N,).
    """

    wrong: dict[str, dict[float, list[Tensor]]] = field(default_factory=dict)
    weights: dict[str, dict[float, list[Tensor]]] = field(default_factory=dict)

    def add(self, curve: str, strength: float, found: Attacked) -> None:
        self.wrong.setdefault(curve, {}).setdefault(strength, []).append(found.wrong)

    def metrics(self, config: StrengthTest) -> dict[str, dict]:
        """The groups that :func:`strength_test` returns."""
        robust = {
            curve: {s: 1 - torch.cat(parts).double().mean().item() for s, parts in by_strength.items()}
            for curve, by_strength in self.wrong.items()
        }
        weights = {layer: {s: torch.cat(parts) for s, parts in found.items()} for layer, found in self.weights.items()}
        if weights:
            weights["all"] = {s: torch.stack([w[s] for w in weights.values()]).mean(0) for s in config.strengths}
        groups = {"robust": {curve: _named(values) for curve, values in robust.items()}, "area": areas(robust, config)}
        if weights:
            groups["weights"] = {
                layer: {
                    "mean": _named({s: w.mean().item() for s, w in found.items()}),
                    "std": _named({s: w.std(correction=0).item() for s, w in found.items()}),
                }
                for layer, found in weights.items()
            }
            groups["weight_follows"] = {
                layer: follows({s: w for s, w in found.items() if s <= config.follow_up_to})
                for layer, found in weights.items()
            }
        return groups


class _Batch:
    """The attacks of one strength on one batch of images; ``weights``: of each layer, under the adaptive attack."""

    def __init__(
        self, method: Method, attack: PGD, config: StrengthTest, images: Tensor, labels: Tensor, strength: float, seed: int
    ):  # fmt: skip
        self.method, self.attack, self.config = method, attack, config
        self.images, self.labels, self.radius, self.seed = images, labels, strength * UNIT, seed
        self.weights: dict[str, Tensor] = {}
        self.crossed = strength in config.cross_strengths

    def curves(self) -> Iterator[tuple[str, Attacked]]:
        """Each curve's name, and what its attack found."""
        method, fuses = self.method, bool(fused_layers(self.method.model))
        main = None
        if "fused" in method.branches:
            yield from self._fused()
        elif not fuses:
            for branch in method.branches:
                main = self._attacked(lambda x: method.predict(x, branch))
                yield branch, main
            if self.crossed and len(method.branches) == 1:
                yield "worst_case", worse(main, self._attacked(method.predict, replace(self.attack, loss="margin")))
        if fuses:
            for weight in self.config.fixed_weights:
                with force_weights(method.model, weight):
                    yield f"fixed_{weight:g}", self._attacked(self._predict)

    def _fused(self) -> Iterator[tuple[str, Attacked]]:
        main = self._attacked(self._predict)
        yield "fused", main
        self.weights = self._weights(main.images)
        if not self.crossed:
            return
        frozen = self._weights(self.images)
        weaker = self._attacked_with(frozen)
        yield "frozen_weights", weaker
        margin = self._attacked(self._predict, replace(self.attack, loss="margin"))
        yield "worst_case", reduce(worse, [main, margin, weaker, *map(self._attacked_with, SURROGATE_WEIGHTS)])

    def _predict(self, images: Tensor) -> Tensor:
        return self.method.predict(images, "fused")

    def _weights(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), recorded_weights(self.method.model) as seen:
            self._predict(images)
        return dict(seen)

    def _attacked(self, predict: Predict, attack: PGD | None = None) -> Attacked:
        if not self.radius:
            return judge(predict, self.images, self.labels)
        return worst_case(
            attack or self.attack, predict, self.images, self.labels, self.radius, self.config.restarts, self._noise()
        )

    def _attacked_with(self, weights: float | Mapping[str, Tensor]) -> Attacked:
        """The attack sees these weights; the answer is that of the whole model."""
        if not self.radius:
            return judge(self._predict, self.images, self.labels)
        return worst_case(
            self.attack, self._predict, self.images, self.labels, self.radius, self.config.restarts, self._noise(),
            _within(lambda: force_weights(self.method.model, weights), self._predict),
        )  # fmt: skip

    def _noise(self) -> torch.Generator:
        return torch.Generator(self.images.device).manual_seed(self.seed)


def _within(block: Callable[[], AbstractContextManager], predict: Predict) -> Predict:
    """``predict``, each time inside a new ``block()``: such as a model with forced weights, for a surrogate."""

    def inside(images: Tensor) -> Tensor:
        with block():
            return predict(images)

    return inside


def areas(robust: Mapping[str, Mapping[float, float]], config: StrengthTest) -> dict[str, float]:
    """The group ``area`` of :func:`strength_test`, from accuracies ``{curve: {strength: accuracy}}``."""
    whole = {curve: values for curve, values in robust.items() if len(values) == len(config.strengths)}
    found = {curve: area(values) for curve, values in whole.items()}
    fixed = [whole[name] for name in (f"fixed_{weight:g}" for weight in config.fixed_weights) if name in whole]
    if fixed:
        found["best_fixed"] = max(area(values) for values in fixed)
        found["oracle"] = area({s: max(values[s] for values in fixed) for s in config.strengths})
    return found


def area(curve: Mapping[float, float]) -> float:
    """Area under a curve ``{strength: accuracy}``, by trapezoids, divided by the largest strength: a mean accuracy, 0 to 1."""
    points = sorted(curve.items())
    total = sum((s - r) * (a + b) / 2 for (r, a), (s, b) in zip(points, points[1:]))
    return total / points[-1][0]


def follows(weights: Mapping[float, Tensor]) -> float:
    """Spearman's correlation of weights with strengths, from ``{strength: weights (N,)}``; 0 if all weights are the same."""
    strengths = [torch.full_like(values, strength) for strength, values in weights.items()]
    return spearman(torch.cat(strengths), torch.cat(list(weights.values())))


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two series (N,), from -1 to 1. Equal values share the mean of their ranks.

    0 if one of them is constant: it follows nothing (the coefficient itself is not defined there).

    Raises:
        ValueError: they are not of one length, or shorter than 2.
    """
    if first.shape != second.shape or first.dim() != 1 or len(first) < 2:
        raise ValueError(f"two series (N,) of at least 2 values, got {tuple(first.shape)} and {tuple(second.shape)}")
    first, second = (ranks - ranks.mean() for ranks in (_ranks(first), _ranks(second)))
    lengths = (first.norm() * second.norm()).item()
    return (first @ second).item() / lengths if lengths else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks (N,) from 0, in float64; equal values share their mean rank."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts + 1) / 2).double()[group]


def _named(values: Mapping[float, float]) -> dict[str, float]:
    return {f"{strength:g}": value for strength, value in values.items()}
