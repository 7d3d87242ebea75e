"""How a measured number is put into words. Knows estimates and strings, nothing of Sphinx."""

from __future__ import annotations

import math

MINUS = "\N{MINUS SIGN}"
SHARES = (
    "accuracy", "mean", "shift", "balanced", "commonest_answer", "detection", "segmentation", "robust", "area",
    "mixing", "apgd", "calibration_error", "digits", "smiles",
)  # fmt: skip
INTERVAL = "95 % interval "


def number(value: float, metric: str, signed: bool = False) -> str:
    """Write a value of ``metric``: accuracies as per cent, anything else with three digits.

    >>> number(0.9173, "accuracy/clean/clean")
    '91.7'
    >>> number(0.0003, "accuracy/clean/clean", signed=True)
    '+0.03'
    >>> number(1234.5, "images_per_second")
    '1,230'
    """
    if not math.isfinite(value):
        raise ValueError(f"{metric} is {value}, which is no number to show")
    if is_accuracy(metric):
        text = points(100 * value) if signed else f"{100 * value:.1f}"
    else:
        text = three_digits(value, signed)
    return text.replace("-", MINUS)


def points(value: float) -> str:
    """A difference with its sign. Next to zero it has one digit more: on which side a limit lies decides a verdict."""
    if abs(value) < 0.005:
        return "0.0"
    return f"{value:+.2f}" if abs(value) < 0.05 else f"{value:+.1f}"


def three_digits(value: float, signed: bool) -> str:
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:+,.{decimals}f}" if signed else f"{rounded:,.{decimals}f}"


# Measures in a group of shares that are none: a difference, a weight, a correlation.
NO_SHARES = {"digits": (["colour_gap"], ["fusing_weight"], ["weight_follows"])}


def is_accuracy(metric: str) -> bool:
    """Accuracies, means of them over shifts, average precisions and overlaps are shares from 0 to 1."""
    group, *inside = metric.split("/")
    return group in SHARES and inside[:1] not in NO_SHARES.get(group, ())


def seeds(count: int) -> str:
    return f"n = {count} seed" + ("" if count == 1 else "s")


def interval(estimate, metric: str, signed: bool = False) -> str:
    """Write the interval, or say that one seed gives none."""
    if estimate.n < 2:
        return "no interval"
    low, high = estimate.low, estimate.high
    if is_accuracy(metric) and not signed:  # a share cannot leave 0 to 1, though a t interval does not know that
        low, high = max(low, 0.0), min(high, 1.0)
    low, high = (number(value, metric, signed) for value in (low, high))
    return f"{INTERVAL}{low} to {high}"


def brief(estimate, metric: str, paired: bool) -> str:
    """For a table whose head says what the brackets are: '+3.1 points [+2.5, +3.7], n = 3'; of one seed 'no interval'."""
    unit = (" points" if paired else " %") if is_accuracy(metric) else ""
    value, spread = number(estimate.mean, metric, signed=paired), interval(estimate, metric, signed=paired)
    spread = f"[{spread.removeprefix(INTERVAL).replace(' to ', ', ')}]" if estimate.n > 1 else f"({spread})"
    return f"{value}{unit} {spread}, n = {estimate.n}"


def level(estimate, metric: str, preset: str) -> str:
    """'91.6 % (95 % interval 91.2 to 91.9, n = 3 seeds, cpu scale)'."""
    unit = " %" if is_accuracy(metric) else ""
    value = number(estimate.mean, metric)
    return f"{value}{unit} ({interval(estimate, metric)}, {seeds(estimate.n)}, {preset} scale)"


def gap(estimate, metric: str, preset: str) -> str:
    """'+3.1 points (95 % interval +2.5 to +3.7, paired by seed, n = 3 seeds, cpu scale)'."""
    unit = " points" if is_accuracy(metric) else ""
    value = number(estimate.mean, metric, signed=True)
    spread = interval(estimate, metric, signed=True)
    return f"{value}{unit} ({spread}, paired by seed, {seeds(estimate.n)}, {preset} scale)"
