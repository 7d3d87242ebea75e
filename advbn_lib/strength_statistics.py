"""How feature statistics change with an attack's strength: the observation that AFA starts from, measured without AFA.

Source: "Adaptive Feature Alignment for Adversarial Training" (AFA, arXiv 2105.15157) says in its abstract that feature
statistics change monotonically and smoothly with the attack strength. How it measured that is not known to us; this is our way.

"Monotone" alone says little, so each number stands beside what it would be without an effect:

- **Noise**: each pixel changes as much as under the attack, up or down at random. Any family of small changes gives smooth curves;
  what the attack gives beyond that is its own.
- **Halves**: every second image, and the others. What differs between them is sampling error.
- **Chance**: what points in random order give (:func:`chance`).
- **Size**: how far a statistic moves, in units of its spread between clean images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advbn_lib.attacks import PGD
from advbn_lib.data.images import ImageSet
from advbn_lib.methods.pgd_training import UNIT
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress
from advbn_lib.statistics import INSTANCE

Change = Literal["attack", "noise"]
CHANGES: tuple[Change, ...] = ("attack", "noise")
CHANCE_DRAWS, CHANCE_SEED = 50_000, 21_05_15157


def _check_strengths(strengths: Sequence[float]) -> None:
    if len(strengths) < 3 or any(after <= before for before, after in zip(strengths, strengths[1:])):
        raise ValueError(f"strengths must rise, and be 3 or more; got {', '.join(map(str, strengths))}")


@dataclass(frozen=True)
class StatisticsStudy:
    """What is measured, and on what.

    Args:
        strengths: l-infinity radii in 1/255, rising from 0; at least 3.
        steps: of the attack (:class:`~advbn_lib.attacks.PGD` with a random start, steps of a quarter of the radius).
        images: how many of the test images, the first ones; an even number, for the halves.
        seed: of the random starts and of the noise. No two strengths share a draw, so that nothing ties the points of a curve
            together but the images and the strength.
        batch_size: images at a time; the statistics are those of all images together.
        examples: how many channels of a layer are kept as curves for a figure.

    Raises:
        ValueError: a value is out of its range.
    """

    strengths: tuple[float, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    steps: int = 10
    images: int = 1000
    seed: int = 0
    batch_size: int = 250
    examples: int = 6

    def __post_init__(self):
        _check_strengths(self.strengths)
        if self.strengths[0] != 0 or self.strengths[-1] > 255 or self.strengths[-1] < 0.05:
            raise ValueError(
                f"strengths are in 1/255 and begin with 0 (clean): write 8 for 8/255; got {', '.join(map(str, self.strengths))}"
            )
        if self.images < 4 or self.images % 2:
            raise ValueError(f"images must be even, and 4 or more: they are compared in two halves; got {self.images}")
        for name in ("steps", "batch_size", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class ByStrength:
    """One statistic of a layer's channels at each strength: float64, on the CPU.

    Attributes:
        values: (S,C), over all images.
        halves: (2,S,C), over every second image and over the others.
        spread: (C,), standard deviation of one image's share of the statistic between clean images. Divided by the root of their
            number it is the statistic's standard error.
    """

    values: Tensor
    halves: Tensor
    spread: Tensor

    @property
    def shifts(self) -> Tensor:
        """Changes from clean (S,C) in units of the spread; 0 where a channel has none."""
        return _in_spreads(self.values - self.values[:1], self.spread)


@dataclass(frozen=True, eq=False)
class LayerByStrength:
    """Mean and variance of the channels of a layer's input, over images and positions, at each strength."""

    mean: ByStrength
    variance: ByStrength


def batch_norm_layers(model: nn.Module) -> tuple[str, ...]:
    """The names of the model's BatchNorms, in its order.

    Raises:
        ValueError: it has none.
    """
    names = tuple(name for name, module in model.named_modules() if isinstance(module, _BatchNorm))
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm, before which its statistics could be taken. If they were folded into the "
            "convolutions for deployment, take the model from before that"
        )
    return names


# ---- measuring -----------------------------------------------------------------------------


def measure(
    model: nn.Module, layers: Sequence[str], test: ImageSet, study: StatisticsStudy = StatisticsStudy(),
    show_progress: bool = True,
) -> tuple[dict[Change, dict[str, LayerByStrength]], dict[Change, list[float]]]:  # fmt: skip
    """The statistics of what goes into ``layers``, and the model's accuracy, at each strength of the attack and of the noise.

    The model is attacked and measured in eval mode, in float32; it keeps its mode, and no hook stays on it.

    Args:
        model: normalised images (N,3,H,W) to logits (N,K), on the device of ``test``.
        layers: names of modules whose input is N,C,H,W.

    Raises:
        ValueError: no such layer, one that does not run once in a forward pass, or one with other inputs; labels do not fit the
            model.
        DataError: the test set has fewer images than the study asks for.
    """
    images = test.first(study.images)
    attack = PGD(test.mean, test.std, steps=study.steps)
    found: dict[Change, dict[str, list[_Moments]]] = {change: {name: [] for name in layers} for change in CHANGES}
    accuracies: dict[Change, list[float]] = {change: [] for change in CHANGES}
    for index, strength in enumerate(progress(study.strengths, "strengths", show_progress)):
        generator = torch.Generator(images.images.device).manual_seed(study.seed * 100_003 + index)
        moments, right = _at_strength(model, layers, images, attack, strength, study.batch_size, generator)
        for change in CHANGES:
            accuracies[change].append(right[change])
            for name in layers:
                found[change][name].append(moments[change][name])
    return {change: {name: _by_strength(at) for name, at in found[change].items()} for change in CHANGES}, accuracies


@dataclass(frozen=True, eq=False)
class _Moments:
    """Each image's mean and (biased) variance over positions: (N,C), float64."""

    mean: Tensor
    variance: Tensor

    def over(self, chosen: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C,) over positions and the chosen images."""
        mean = self.mean[chosen].mean(0)
        return mean, self.about(mean)[chosen].mean(0)

    def about(self, mean: Tensor) -> Tensor:
        """Each image's mean squared distance (N,C) from a common mean: its share of the variance."""
        return self.variance + (self.mean - mean) ** 2


def _at_strength(
    model: nn.Module, layers: Sequence[str], images: ImageSet, attack: PGD, strength: float, batch_size: int,
    generator: torch.Generator,
) -> tuple[dict[Change, dict[str, _Moments]], dict[Change, float]]:  # fmt: skip
    """Moments of each layer's input, and accuracy, under both changes."""
    parts: dict[Change, dict[str, list[_Moments]]] = {change: {name: [] for name in layers} for change in CHANGES}
    right = {change: torch.zeros((), dtype=torch.int64, device=images.images.device) for change in CHANGES}
    with evaluating(model):
        for batch, labels in zip(images.images.split(batch_size), images.labels.split(batch_size)):
            pixels = batch.float() / 255
            attacked = attack.perturb(model, images.normalise(pixels), labels, strength * UNIT, generator)
            noisy = images.normalise(_random_signs(pixels, _pixels(attacked, images), generator))
            for change, x in (("attack", attacked), ("noise", noisy)):
                with _moments_of_inputs(model, layers) as seen, torch.no_grad():
                    right[change] += (model(x).argmax(1) == labels).sum()
                for name in layers:
                    if name not in seen:
                        raise ValueError(f"the layer {name!r} did not run in a forward pass: leave it out")
                    parts[change][name].append(seen[name])
    moments = {
        change: {
            name: _Moments(torch.cat([m.mean for m in found]), torch.cat([m.variance for m in found]))
            for name, found in parts[change].items()
        }
        for change in CHANGES
    }
    return moments, {change: count.item() / len(images) for change, count in right.items()}


def _pixels(x: Tensor, images: ImageSet) -> Tensor:
    """Normalised images back in [0,1]."""
    mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (images.mean, images.std))
    return x * std + mean


def _random_signs(pixels: Tensor, changed: Tensor, generator: torch.Generator) -> Tensor:
    """Each pixel changed by as much, up or down at random, and cut to [0,1]."""
    signs = torch.randint(0, 2, pixels.shape, generator=generator, device=pixels.device, dtype=pixels.dtype) * 2 - 1
    return (pixels + signs * (changed - pixels)).clamp(0, 1)


@contextmanager
def _moments_of_inputs(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, _Moments]]:
    """Inside the block, a forward pass leaves the moments of each layer's input in the dict. No hook stays, also after an error."""
    modules, seen, hooks = dict(model.named_modules()), {}, []
    if unknown := [name for name in layers if name not in modules]:
        raise ValueError(f"the model has no layer {', '.join(map(repr, unknown))}")

    def look(name: str, inputs: tuple[Tensor, ...]) -> None:
        if name in seen:
            raise ValueError(
                f"the layer {name!r} runs more than once in a forward pass: its statistics are not of one place"
            )
        x = inputs[0].detach()
        if x.dim() != 4:
            raise ValueError(f"the layer {name!r} gets {tuple(x.shape)}, but statistics need N,C,H,W")
        variance, mean = torch.var_mean(x.float(), INSTANCE, correction=0)
        seen[name] = _Moments(mean.cpu().double(), variance.cpu().double())

    try:
        for name in layers:
            hooks.append(modules[name].register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs)))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _by_strength(at: list[_Moments]) -> LayerByStrength:
    whole, halves = [m.over() for m in at], [[m.over(slice(start, None, 2)) for m in at] for start in (0, 1)]
    clean = at[0]
    spreads = clean.mean.std(0), clean.about(clean.mean.mean(0)).std(0)
    return LayerByStrength(*(
        ByStrength(
            torch.stack([moments[which] for moments in whole]),
            torch.stack([torch.stack([moments[which] for moments in half]) for half in halves]),
            spreads[which],
        )
        for which in (0, 1)
    ))  # fmt: skip


# ---- describing ----------------------------------------------------------------------------


def monotonicity(values: Tensor, strengths: Sequence[float]) -> dict[str, float]:
    """How monotone and how smooth channels are in the strength. A change of unit, offset or sign of a channel changes nothing.

    Args:
        values: a statistic (S,C) at each strength.
        strengths: rising, S of them.

    Returns:
        ``monotone_share``: of the channels, those that rise, or fall, at every step.
        ``spearman``: the mean over channels of the absolute rank correlation with the strength.
        ``roughness``: the mean over channels of how far (root of the mean square) a point is from the line between its two
        neighbours, in units of the channel's range. From 0 (a straight line) to 1 (it goes from end to end at every step). For
        equal steps these are the second differences, halved.
        ``bend``: the mean over channels of the largest distance from the line between the first and the last point, in units of
        the range: how good it would be to interpolate between the ends.

        A channel that never changes is not monotone: it has a rank correlation, a roughness and a bend of 0.

    Raises:
        ValueError: there are fewer than 3 strengths, they do not rise, or values are not one for each.
    """
    _check_strengths(strengths)
    if values.dim() != 2 or len(values) != len(strengths) or not values.shape[1]:
        raise ValueError(f"values must be (S,C) for {len(strengths)} strengths, got shape {tuple(values.shape)}")
    values = values.detach().cpu().double()
    return {name: float(of.double().mean()) for name, of in _of_channels(values, strengths).items()}


def _of_channels(values: Tensor, strengths: Sequence[float]) -> dict[str, Tensor]:
    """What :func:`monotonicity` averages, of each channel: (C,)."""
    at = torch.tensor(strengths, dtype=torch.float64)[:, None]
    steps, size = values.diff(dim=0), values.amax(0) - values.amin(0)
    before, after = values[:-2], values[2:]
    chord = before + (after - before) * ((at[1:-1] - at[:-2]) / (at[2:] - at[:-2]))
    ends = values[:1] + (values[-1:] - values[:1]) * ((at - at[0]) / (at[-1] - at[0]))
    return {
        "monotone_share": (steps > 0).all(0) | (steps < 0).all(0),
        "spearman": _spearman(values).abs(),
        "roughness": _ratio((values[1:-1] - chord).square().mean(0).sqrt(), size),
        "bend": _ratio((values - ends).abs().amax(0), size),
    }


def _spearman(values: Tensor) -> Tensor:
    """Rank correlation of each column (S,C) with its place; 0 for a constant column."""
    less = (values[:, None] > values[None]).double().sum(1)
    same = (values[:, None] == values[None]).double().sum(1)
    ranks = less + (same - 1) / 2  # ties share the mean of their ranks
    ranks = ranks - ranks.mean(0)
    places = torch.arange(len(values), dtype=torch.float64)[:, None]
    places = places - places.mean()
    return _ratio((ranks * places).sum(0), (ranks.square().sum(0) * places.square().sum()).sqrt())


def chance(strengths: Sequence[float]) -> dict[str, float]:
    """What :func:`monotonicity` gives for independent normal numbers (white noise), whose order is random.

    ``monotone_share`` is exact, 2/S!; the others are means over simulated channels, with a fixed seed. Also
    ``monotone_in_both_halves``: 2/(S!)².

    Raises:
        ValueError: as :func:`monotonicity`.
    """
    generator = torch.Generator().manual_seed(CHANCE_SEED)
    draws = torch.randn(len(strengths), CHANCE_DRAWS, generator=generator, dtype=torch.float64)
    orders = math.factorial(len(strengths))
    exact = {"monotone_share": 2 / orders, "monotone_in_both_halves": 2 / orders**2}
    return monotonicity(draws, strengths) | exact


def describe(curves: Sequence[ByStrength], strengths: Sequence[float]) -> dict[str, float]:
    """:func:`monotonicity` of all channels of one or more layers, each channel counted once, and beside it:

    - ``monotone_in_both_halves``: share of channels that are monotone in each half of the images, in the same direction.
    - ``rising_share``: share of channels that are higher at the last strength than clean.
    - ``shift``: median over channels of the absolute change from clean to the last strength, in units of the spread between
      clean images.
    - ``shift_error``: the same of half the difference between the halves' changes: the size of sampling error. For a change that
      is nothing else, both are alike.

    Raises:
        ValueError: as :func:`monotonicity`.
    """
    values = torch.cat([curve.values for curve in curves], 1)
    first, second = (torch.cat([curve.halves[half] for curve in curves], 1) for half in (0, 1))
    shifts = torch.cat([curve.shifts[-1] for curve in curves])
    differences = [((curve.halves[0] - curve.halves[1]) / 2, curve.spread) for curve in curves]
    errors = torch.cat([_in_spreads(half[-1] - half[0], spread) for half, spread in differences])
    steps = first.diff(dim=0), second.diff(dim=0)
    both = [((a > 0) & (b > 0)).all(0) for a, b in (steps, (-steps[0], -steps[1]))]
    return monotonicity(values, strengths) | {
        "monotone_in_both_halves": float((both[0] | both[1]).double().mean()),
        "rising_share": float((shifts > 0).double().mean()),
        "shift": float(shifts.abs().quantile(0.5)),
        "shift_error": float(errors.abs().quantile(0.5)),
    }


def strength_statistics(
    model: nn.Module, test: ImageSet, study: StatisticsStudy = StatisticsStudy(), layers: Sequence[str] | None = None,
    show_progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The observation on one model, as numbers for a record.

    Args:
        model, test: see :func:`measure`.
        layers: before which statistics are taken; None: all BatchNorms.

    Returns:
        Metrics ``<attack|noise>/<mean|variance>/<all or a layer>`` to :func:`describe`, ``<attack|noise>/accuracy/<strength>``, and
        ``chance`` (:func:`chance`). Curves: ``strengths``, and ``<layer>/channels``, ``<layer>/<attack|noise>/<mean|variance>``:
        for a few channels, evenly spread over the layer, the changes from clean at each strength, in units of the spread.

    Raises:
        ValueError, DataError: see :func:`measure` and :func:`batch_norm_layers`.
    """
    layers = batch_norm_layers(model) if layers is None else tuple(layers)
    if not layers:
        raise ValueError("name at least one layer, or None for all BatchNorms")
    found, accuracies = measure(model, layers, test, study, show_progress)
    metrics: dict[str, Any] = {"chance": chance(study.strengths)}
    for change in CHANGES:
        named = {f"{strength:g}": share for strength, share in zip(study.strengths, accuracies[change])}
        metrics[change] = {"accuracy": named}
        for moment in ("mean", "variance"):
            by_layer = {name: getattr(found[change][name], moment) for name in layers}
            metrics[change][moment] = {"all": describe(list(by_layer.values()), study.strengths)} | {
                name: describe([curve], study.strengths) for name, curve in by_layer.items()
            }
    curves = {"strengths": list(study.strengths)} | {
        name: _examples({change: found[change][name] for change in CHANGES}, study.examples) for name in layers
    }
    return metrics, curves


def _examples(changes: dict[Change, LayerByStrength], count: int) -> dict[str, Any]:
    channels = len(changes["attack"].mean.spread)
    chosen = sorted({round(place) for place in torch.linspace(0, channels - 1, min(count, channels)).tolist()})
    return {"channels": chosen} | {
        change: {
            moment: [[round(v, 6) for v in line] for line in getattr(at, moment).shifts[:, chosen].T.tolist()]
            for moment in ("mean", "variance")
        }
        for change, at in changes.items()
    }


def _in_spreads(change: Tensor, spread: Tensor) -> Tensor:
    return _ratio(change, spread.expand_as(change))


def _ratio(value: Tensor, size: Tensor) -> Tensor:
    """0 where the size is 0: such a channel is constant."""
    return torch.where(size > 0, value / size.clamp_min(torch.finfo(size.dtype).tiny), torch.zeros_like(value))
