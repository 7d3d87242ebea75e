"""Figures of the chapters on pixel attacks and AFA: accuracy, statistics and fusing weights over the attack's strength; images.

They keep to the ways of :mod:`advbn_lib.figures`: functions of tensors and numbers that return a matplotlib Figure, in the
same style and colours, and no meaning by colour alone. Strengths are l-infinity radii in 1/255.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from advbn_lib.figures import COLOURS, MARKERS, WIDTH, _bare, _label, _mean, _new, _style
from advbn_lib.records import Estimate

STRENGTH = "strength of the attack, in 1/255"
CLEAR = tuple(colour for colour in COLOURS if np.dot(colour, (0.2, 0.7, 0.1)) < 0.8)  # no yellow: thin lines on white
LINES = (
    "-",
    "--",
    "-.",
    (0, (1, 1.2)),
    (0, (6, 1.5, 1, 1.5, 1, 1.5)),
)


def accuracy_by_strength(
    curves: Mapping[str, Mapping[float, float | Estimate]], *, strong: Collection[str] = (), trained_up_to: float | None = None,
    title: str = "",
) -> Figure:  # fmt: skip
    """Accuracy (shares of 1, drawn in percent) over the strength of the attack; intervals are bands.

    Args:
        curves: name to accuracy at each strength; curves need not have the same strengths.
        strong: names of the curves to draw thick, and black.
        trained_up_to: the largest strength in training, as a dotted line up: beyond it curves extrapolate.

    Raises:
        ValueError: no curves, an empty one, or ``strong`` names one that is not there.
    """
    if not curves or not all(curves.values()):
        raise ValueError("there must be curves, each with at least one strength")
    if unknown := set(strong) - set(curves):
        raise ValueError(f"no curve is called {', '.join(sorted(unknown))}")
    ticks = sorted({strength for curve in curves.values() for strength in curve})
    with _style():
        figure, axes = _new(1, 1, 4.0 + 0.21 * math.ceil((len(curves) + (trained_up_to is not None)) / 2))
        ax = axes[0, 0]
        weak = zip(cycle(CLEAR), cycle(MARKERS), cycle(LINES))
        black = zip(cycle([(0.05, 0.05, 0.05)]), cycle(MARKERS), cycle(LINES))
        for name, curve in curves.items():
            at = sorted(curve)
            colour, marker, line = next(black if name in strong else weak)
            size = (
                {"linewidth": 2.8, "markersize": 7, "zorder": 3}
                if name in strong
                else {"linewidth": 1.5, "markersize": 5}
            )
            means = [100 * _mean(curve[strength]) for strength in at]
            ax.plot(at, means, color=colour, marker=marker, linestyle=line, label=name, **size)
            _band(ax, at, [curve[strength] for strength in at], colour)
        if trained_up_to is not None:
            ax.axvline(trained_up_to, color="0.35", linestyle=":", linewidth=1.5, label="strongest in training")
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_ylim(0, None)
        _label(ax, STRENGTH, "accuracy, %", title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.2)
    return figure


def _band(ax: Axes, at: Sequence[float], values: Sequence[float | Estimate], colour) -> None:
    """The intervals of those values that have one."""
    sure = [(x, v) for x, v in zip(at, values) if isinstance(v, Estimate) and not math.isnan(v.low)]
    if sure:
        places = [x for x, _ in sure]
        low, high = ([100 * v.low for _, v in sure], [100 * v.high for _, v in sure])
        ax.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def statistics_by_strength(
    panels: Mapping[str, Sequence[Sequence[float]]], strengths: Sequence[float], *, channels: Sequence[int] | None = None,
    ylabel: str = "change of the channel's mean,\nin standard deviations between images", title: str = "",
) -> Figure:  # fmt: skip
    """Statistics of a layer's channels over the strength, each channel a line; panels (the attack, noise) side by side, on one scale.

    Args:
        panels: name to the lines of the channels, the same ones in each; a line has a value for each strength.
        channels: their numbers, for the legend; without it there is none.

    Raises:
        ValueError: panels or lines do not fit each other, or the strengths.
    """
    counts = {len(lines) for lines in panels.values()}
    if len(counts) != 1 or (channels is not None and counts != {len(channels)}):
        found = ", ".join(f"{name}: {len(lines)}" for name, lines in panels.items()) or "no panels"
        raise ValueError(f"every panel needs the same channels, got {found}")
    if any(len(line) != len(strengths) for lines in panels.values() for line in lines):
        raise ValueError(f"every line needs a value for each of the {len(strengths)} strengths")
    rows = math.ceil(counts.pop() / 3) if channels is not None else 0
    with _style():
        figure = Figure(figsize=(WIDTH, 3.5 + 0.21 * rows), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, (name, lines) in zip(axes, panels.items()):
            ax.axhline(0, color="0.35", linewidth=1)
            looks = zip(cycle(CLEAR), cycle(MARKERS), cycle(LINES), lines)
            for number, (colour, marker, style, line) in enumerate(looks):
                label = f"channel {channels[number]}" if channels is not None and ax is axes[0] else None
                ax.plot(
                    strengths,
                    line,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linestyle=style,
                    linewidth=1.5,
                    label=label,
                )
            ticks = _few_ticks(strengths)
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            _label(ax, "strength, in 1/255", ylabel if ax is axes[0] else "", name)
        if channels is not None:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=3)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def weights_by_strength(
    layers: Mapping[str, Mapping[float, tuple[float, float]]], *, columns: int = 3, trained_up_to: float | None = None,
    title: str = "",
) -> Figure:  # fmt: skip
    """Predicted fusing weights over the strength of the attack: a panel a layer, the mean as a line, the spread between samples as a band.

    Args:
        layers: name to (mean, standard deviation between samples) at each strength.
        columns: panels in a row.
        trained_up_to: the largest strength in training, as a dotted line up.

    Raises:
        ValueError: no layers, or an empty one; a mean is not from 0 (clean) to 1 (adversarial), or a standard deviation below 0.
    """
    if not layers or not all(layers.values()):
        raise ValueError("there must be layers, each with at least one strength")
    for name, points in layers.items():
        if bad := [pair for pair in points.values() if not (0 <= pair[0] <= 1 and pair[1] >= 0)]:
            raise ValueError(
                f"{name}: a weight is from 0 to 1, and its spread 0 or more; got {bad[0][0]:g} and {bad[0][1]:g}"
            )
    rows, columns = -(-len(layers) // columns), min(columns, len(layers))
    with _style():
        figure = Figure(figsize=(WIDTH, 0.7 + 1.65 * rows + (0.3 if title else 0)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for ax in axes.flat[len(layers) :]:
            ax.set_visible(False)
        for number, (ax, (name, points)) in enumerate(zip(axes.flat, layers.items())):
            at = sorted(points)
            means, spreads = (np.array([points[strength][part] for strength in at]) for part in (0, 1))
            low, high = np.clip(means - spreads, 0, 1), np.clip(means + spreads, 0, 1)
            ax.fill_between(at, low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
            ax.plot(at, means, color=COLOURS[0], marker="o", markersize=4, linewidth=1.5)
            if trained_up_to is not None:
                ax.axvline(trained_up_to, color="0.35", linestyle=":", linewidth=1.5)
            ticks = _few_ticks(at)
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.set(ylim=(-0.04, 1.04), yticks=[0, 0.5, 1])
            ax.set_yticklabels(["0 clean", "0.5", "1 adv."])
            ax.set_title(name, fontsize=10, loc="left")
            # Where the last row is not full, the panel above the gap has the numbers.
            ax.tick_params(labelbottom=number + columns >= len(layers))
        figure.supxlabel(STRENGTH, fontsize=11)
        figure.supylabel("fusing weight", fontsize=11)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def adversarial_images(
    images: Tensor, attacked: Mapping[str, Tensor], answers: Mapping[str, Sequence[str]] | None = None, *, magnify: float,
    title: str = "",
) -> Figure:  # fmt: skip
    """Images, what an attack changed, magnified, and what became of them: a row an image, two columns an attack.

    Args:
        images: in [0,1], N,3,H,W.
        attacked: name of each attack to attacked images of the same shape.
        answers: what stands below a picture (the model's answer and how sure it is): for ``"image"`` and each attack one text
            for each image.
        magnify: a change is drawn as grey plus this many times the change: 0.5 / radius fills the scale.

    Raises:
        ValueError: shapes or answers do not fit, or ``magnify`` is not above 0.
    """
    for name, changed in attacked.items():
        if changed.shape != images.shape:
            raise ValueError(f"{name} has shape {tuple(changed.shape)}, the images {tuple(images.shape)}")
    if not attacked or not magnify > 0:
        raise ValueError(f"there must be an attack, and magnify above 0; got {len(attacked)} attacks and {magnify:g}")
    if answers is not None and (
        answers.keys() != {"image", *attacked} or any(len(texts) != len(images) for texts in answers.values())
    ):
        raise ValueError(
            f"answers needs {len(images)} texts for each of: image, {', '.join(attacked)}; got "
            + ", ".join(f"{name}: {len(texts)}" for name, texts in answers.items())
        )
    columns: list[tuple[str, str, Tensor]] = [("image", "image", images)]
    for name, changed in attacked.items():
        grey = (0.5 + magnify * (changed - images)).clamp(0, 1)
        columns += [("", f"change × {magnify:.3g}", grey), (name, name, changed)]
    side = WIDTH / len(columns)
    across = max(int(side * 11.5), 6)  # characters that fit below a picture
    texts = {name: [_wrapped(text, across) for text in lines] for name, lines in (answers or {}).items()}
    lines = max((text.count("\n") + 1 for column in texts.values() for text in column), default=0)
    heads = [textwrap.fill(head, across) for _, head, _ in columns]
    head = 0.22 * max(text.count("\n") + 1 for text in heads) + (0.35 if title else 0)
    height = images.shape[2] / images.shape[3] * side + 0.17 * lines
    with _style():
        figure, axes = _new(len(images), len(columns), 0.1 + head + height * len(images), gaps=0.02)
        for row, line in enumerate(axes):
            for ax, (name, _, pictures) in zip(line, columns):
                picture = pictures[row].detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
                ax.imshow(picture, interpolation="nearest")
                _bare(ax)
                if name in texts:
                    ax.set_xlabel(texts[name][row], fontsize=10, labelpad=2)
        for ax, text in zip(axes[0], heads):
            ax.set_title(text, fontsize=10)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def _wrapped(text: str, across: int) -> str:
    return textwrap.fill(text.replace(" %", "\N{NO-BREAK SPACE}%"), across)


def loss_surface(
    losses: Tensor, along: Sequence[float], across: Sequence[float], *, xlabel: str, ylabel: str, label: str = "loss",
    path: Sequence[tuple[float, float]] = (), title: str = "",
) -> Figure:  # fmt: skip
    """The loss over a plane of changes, as a map with numbered contours: light is high.

    Args:
        losses: (len(across), len(along)).
        along, across: places of the columns and the rows, rising; at least 2 of each.
        path: points (along, across) to join with a line: the way that an attack went; a dot at its start, a star at its end.

    Raises:
        ValueError: the shapes do not fit, or places do not rise.
    """
    if losses.shape != (len(across), len(along)) or min(losses.shape) < 2:
        raise ValueError(
            f"losses must be (rows, columns) = ({len(across)}, {len(along)}), 2 or more, got {tuple(losses.shape)}"
        )
    if any(bool((torch.tensor(places).diff() <= 0).any()) for places in (along, across)):
        raise ValueError("the places along and across must rise")
    values = losses.detach().cpu().numpy()
    with _style():
        figure, axes = _new(1, 1, 4.6)
        ax = axes[0, 0]
        drawn = ax.pcolormesh(along, across, values, cmap="cividis", shading="nearest")
        if values.max() > values.min():
            contours = ax.contour(along, across, values, levels=6, colors="white", linewidths=0.9)
            ax.clabel(contours, fontsize=9, fmt="%.2g")
        if path:
            xs, ys = zip(*path)
            ax.plot(xs, ys, color="white", linewidth=4)
            ax.plot(xs, ys, color=COLOURS[3], linewidth=2)
            ax.plot(xs[:1], ys[:1], marker="o", markersize=9, color=COLOURS[3], markeredgecolor="white")
            ax.plot(xs[-1:], ys[-1:], marker="*", markersize=15, color=COLOURS[3], markeredgecolor="white")
        ax.grid(visible=False)
        _label(ax, xlabel, ylabel, title)
        figure.colorbar(drawn, ax=ax, label=label)
    return figure


def _few_ticks(strengths: Sequence[float]) -> list[float]:
    """Some of the strengths (rising), the first one always, far enough apart that their numbers have room."""
    apart = (strengths[-1] - strengths[0]) / 4.5
    ticks = list(strengths[:1])
    for strength in strengths[1:]:
        if strength - ticks[-1] >= apart:
            ticks.append(strength)
    return ticks
