"""Figures of the chapters on AdvMix: grids of mixes, leakage and colour by cut, accuracy against bias, paired differences.

They keep to the ways of :mod:`advbn_lib.figures`: functions of tensors and numbers that return a matplotlib Figure, in the same
style and colours, and no meaning by colour alone. For each there is a function that says the same in words, for the text
alternative: ``show(cuts(...), describe_cuts(...))``. So no number in it is typed by hand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advbn_lib.figures import MARKERS, WIDTH, _bare, _label, _mean, _new, _signed, _style, excludes_zero
from advbn_lib.figures_afa import CLEAR, LINES, _band
from advbn_lib.records import Estimate
from advbn_lib.style_splitting import MixGrid, SwapMeasurement

Level = float | None  # the variance of the colours around their class's mean; None: no bias
BIAS = "variance of the colours of a class (strong bias at the left)"

# ---- pictures of mixes ----------------------------------------------------------------------


def grid(mixes: MixGrid, title: str = "") -> Figure:
    """Rows have a content, columns a style: real images at the left and at the top, apart from the mixes."""
    rows, columns = mixes.mixes.shape[:2]
    left, gap, apart = 0.42, 0.04, 0.14  # inches
    head = 0.3 + (0.3 if title else 0)
    side = (WIDTH - left - apart - gap * (columns + 1)) / (columns + 1)
    shape = mixes.mixes.shape[3] / mixes.mixes.shape[4]
    height = head + apart + (shape * side + gap) * (rows + 1)
    with _style():
        figure = Figure(figsize=(WIDTH, height))

        def place(row: int, column: int, image) -> Axes:
            x = left + column * (side + gap) + (apart if column else 0)
            y = height - head - (row + 1) * shape * side - row * gap - (apart if row else 0)
            ax = figure.add_axes((x / WIDTH, y / height, side / WIDTH, shape * side / height))
            ax.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            _bare(ax)
            return ax

        tops = [place(0, column + 1, image) for column, image in enumerate(mixes.styles)]
        sides = [place(row + 1, 0, image) for row, image in enumerate(mixes.contents)]
        for row, line in enumerate(mixes.mixes):
            for column, image in enumerate(line):
                place(row + 1, column + 1, image)
        middle = (tops[0].get_position().x0 + tops[-1].get_position().x1) / 2
        figure.text(middle, 1 - (head - 0.06) / height, "style of ...", ha="center", va="bottom", fontsize=11)
        middle = (sides[0].get_position().y1 + sides[-1].get_position().y0) / 2
        figure.text(0.2 / WIDTH, middle, "content of ...", ha="center", va="center", rotation=90, fontsize=11)
        if title:
            figure.suptitle(title, fontsize=12, y=1 - 0.06 / height, va="top")
    return figure


def describe_grid(mixes: MixGrid, content: str = "content", style: str = "style") -> str:
    """In words; ``content`` and ``style`` say what they are in these images, e.g. "digit" and "colour"."""
    rows, columns = mixes.mixes.shape[:2]
    return (
        f"A grid of {rows} rows and {columns} columns of decoded mixes. The column at the left has {rows} real images that give the "
        f"{content}, the row at the top {columns} real images that give the {style}. Each mix has the {content} code of its row and "
        f"the {style} code of its column."
    )


# ---- leakage and colour by cut --------------------------------------------------------------


def cuts(
    measured: Mapping[int, SwapMeasurement], *, chosen: int | None = None, ideal: SwapMeasurement | None = None, title: str = "",
) -> Figure:  # fmt: skip
    """What became of label and colour when styles were swapped, over the cut; intervals are upright bars.

    Args:
        measured: of :func:`~advbn_lib.style_splitting.measure_cuts`.
        chosen: the cut that is used, as a dotted line up.
        ideal: of an exact decoder, as open markers beside the last cut.

    Raises:
        ValueError: nothing was measured, or not at the chosen cut.
    """
    _check_cuts(measured, chosen)
    places = sorted(measured)
    panels = (
        ("labels", "share of answers, %", (
            ("own style: right", "own"), ("mix: label of the content", "kept"), ("mix: label of the style", "taken"),
        )),
        ("colours", "correlation", (
            ("own style: with the image", "own_colour"), ("mix: with the style's image", "colour"),
            ("mix: with the content's image", "colour_kept"),
        )),
    )  # fmt: skip
    with _style():
        figure, axes = _new(2, 1, 7.4)
        for ax, (name, ylabel, lines) in zip(axes[:, 0], panels):
            scale = 100 if name == "labels" else 1
            for number, (label, part) in enumerate(lines):
                look = {"color": CLEAR[number], "marker": MARKERS[number]}
                shift = 0.06 * (number - 1)  # side by side, so that bars do not overlap
                values = [getattr(measured[cut], part) for cut in places]
                at = [cut + shift for cut in places]
                _line(ax, at, values, scale, linestyle=LINES[number], label=label, **look)
                if ideal is not None:
                    value = getattr(ideal, part)
                    ax.plot(
                        places[-1] + 0.8 + shift,
                        scale * value.mean,
                        markerfacecolor="none",
                        markersize=8,
                        linestyle="none",
                        **look,
                    )
            if chosen is not None:
                ax.axvline(chosen, color="0.35", linestyle=":", linewidth=1.5, label="the cut that is used")
            ticks = [str(cut) for cut in places]
            ax.set_xticks(
                places + ([places[-1] + 0.8] if ideal is not None else []),
                ticks + (["exact"] if ideal is not None else []),
            )
            ax.grid(axis="x", visible=False)
            _label(ax, "styles that are content", ylabel, name)
            ax.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.19), ncols=2, handlelength=3)
        axes[0, 0].set_ylim(-3, 103)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def describe_cuts(measured: Mapping[int, SwapMeasurement], chosen: int | None = None) -> str:
    """In words: the numbers of each cut, and which one is used."""
    _check_cuts(measured, chosen)
    own = next(iter(measured.values()))
    parts = [
        f"cut {cut}: {100 * at.kept.mean:.0f} % keep the label of the content, {100 * at.taken.mean:.0f} % take that of the style; "
        f"colours correlate {at.colour.mean:.2f} with the style's image, {at.colour_kept.mean:.2f} with the content's"
        for cut, at in sorted(measured.items())
    ]
    used = "" if chosen is None else f" A dotted line marks the cut that is used: {chosen}."
    return (
        f"Two charts over the number of styles that are content. With their own style {100 * own.own.mean:.0f} % of {own.own.n} "
        f"decoded images are answered rightly, and colours correlate {own.own_colour.mean:.2f} with the images'. Mixes, "
        + "; ".join(parts)
        + f".{used}"
    )


def _check_cuts(measured: Mapping[int, SwapMeasurement], chosen: int | None) -> None:
    if not measured:
        raise ValueError("there must be a cut that was measured")
    if chosen is not None and chosen not in measured:
        raise ValueError(f"cut {chosen} was not measured, only {', '.join(map(str, sorted(measured)))}")


# ---- accuracy against bias ------------------------------------------------------------------


def accuracy_by_bias(
    curves: Mapping[str, Mapping[Level, float | Estimate]], *, strong: Collection[str] = (), published: Collection[str] = (),
    title: str = "",
) -> Figure:  # fmt: skip
    """Accuracy (shares of 1, drawn in percent) over the bias of the training set, the strongest at the left; intervals are bands.

    Args:
        curves: name to accuracy at each variance (None: unbiased); curves need not have the same ones.
        strong: names of the curves to draw thick.
        published: names of rows that others have published: grey and without a line, as they are not our runs.

    Raises:
        ValueError: no curves, an empty one, or a name among ``strong`` or ``published`` that no curve has.
    """
    levels = _levels(curves)
    if unknown := {*strong, *published} - set(curves):
        raise ValueError(f"no curve is called {', '.join(sorted(unknown))}")
    with _style():
        figure, axes = _new(1, 1, 4.3 + 0.21 * math.ceil(len(curves) / 2))
        ax = axes[0, 0]
        looks = zip(cycle(CLEAR), cycle(MARKERS), cycle(LINES))
        for name, curve in curves.items():
            at = [place for place, level in enumerate(levels) if level in curve]
            values = [curve[levels[place]] for place in at]
            means = [100 * _mean(value) for value in values]
            if name in published:
                ax.plot(
                    at, means, color="0.45", marker="x", markersize=7, markeredgewidth=2, linestyle="none", label=name
                )
                continue
            colour, marker, line = next(looks)
            size = (
                {"linewidth": 2.8, "markersize": 7, "zorder": 3}
                if name in strong
                else {"linewidth": 1.4, "markersize": 5}
            )
            ax.plot(at, means, color=colour, marker=marker, linestyle=line, label=name, **size)
            _band(ax, at, values, colour)
        _bias_axis(ax, levels)
        _label(ax, BIAS, "accuracy, %", title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, handlelength=3.2)
    return figure


def describe_bias(curves: Mapping[str, Mapping[Level, float | Estimate]]) -> str:
    """In words: each curve's ends."""
    levels = _levels(curves)
    parts = []
    for name, curve in curves.items():
        at = [level for level in levels if level in curve]
        ends = at if len(at) == 1 else [at[0], at[-1]]
        parts.append(f"{name} " + " to ".join(f"{100 * _mean(curve[level]):.1f} % ({_bias(level)})" for level in ends))
    return f"Accuracy over the bias of the training set, from strong to weak. {'; '.join(parts)}."


def differences_by_bias(
    lines: Mapping[str, Mapping[Level, Estimate]], *, title: str = "", ylabel: str = "difference, percentage points",
) -> Figure:  # fmt: skip
    """Paired differences of accuracy (shares of 1, drawn in points) over the bias, with intervals, and a line at zero.

    A marker is full where the interval excludes zero, and open where it does not, or where one seed gives none.

    Args:
        lines: what is compared (``"AdvMix minus RandMix"``) to the difference at each variance (None: unbiased).

    Raises:
        ValueError: no lines, or an empty one.
    """
    levels = _levels(lines)
    step = 0.5 / max(len(lines), 2)
    with _style():
        figure, axes = _new(1, 1, 3.9 + 0.21 * len(lines))
        ax = axes[0, 0]
        ax.axhline(0, color="0.2", linestyle="--", linewidth=1.2)
        for number, (colour, marker, (name, line)) in enumerate(zip(cycle(CLEAR), cycle(MARKERS), lines.items())):
            shift = step * (number - (len(lines) - 1) / 2)
            ax.plot([], [], color=colour, marker=marker, linewidth=2, label=name)
            for place, level in enumerate(levels):
                if level in line:
                    value, x = line[level], place + shift
                    ax.plot([x, x], [100 * value.low, 100 * value.high], color=colour, linewidth=2)
                    face = colour if excludes_zero(value) else "white"
                    ax.plot(
                        x,
                        100 * value.mean,
                        color=colour,
                        marker=marker,
                        markersize=7,
                        markerfacecolor=face,
                        markeredgewidth=1.8,
                    )
        _bias_axis(ax, levels)
        _label(ax, BIAS, ylabel, title)
        figure.legend(loc="outside lower center", ncols=1, frameon=False)
    return figure


def describe_differences(lines: Mapping[str, Mapping[Level, Estimate]]) -> str:
    """In words: each difference with its interval."""
    levels = _levels(lines)
    parts = []
    for name, line in lines.items():
        values = [f"{_bias(level)}: {_with_interval(line[level])}" for level in levels if level in line]
        seeds = sorted({value.n for value in line.values()})
        several = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        parts.append(f"{name}, n = {several}: {', '.join(values)}")
    return (
        f"Differences in percentage points, with 95 % intervals, over the bias from strong to weak. {'; '.join(parts)}."
    )


def _with_interval(value: Estimate) -> str:
    if math.isnan(value.low):
        return _signed(value.mean)
    return f"{_signed(value.mean)} ({_signed(value.low)} to {_signed(value.high)})"


def _levels(curves: Mapping[str, Mapping[Level, object]]) -> list[Level]:
    """All variances, rising, the unbiased set (None) last.

    Raises:
        ValueError: no curves, or an empty one.
    """
    if not curves or not all(curves.values()):
        raise ValueError("there must be curves, each with at least one level of bias")
    return sorted(
        {level for curve in curves.values() for level in curve}, key=lambda level: math.inf if level is None else level
    )


def _bias(level: Level) -> str:
    return "unbiased" if level is None else f"variance {level:g}"


def _bias_axis(ax: Axes, levels: Sequence[Level]) -> None:
    """Levels at equal distances, numbered as they are called."""
    names = ["none\n(no bias)" if level is None else f"{level:g}".removeprefix("0") for level in levels]
    ax.set_xticks(range(len(levels)), names)
    ax.set_xlim(-0.4, len(levels) - 0.6)
    ax.grid(axis="x", visible=False)


# ---- parts ----------------------------------------------------------------------------------


def _line(ax: Axes, at: Sequence[float], values: Sequence[Estimate], scale: float, **look) -> None:
    """A line with upright bars for the intervals, all times ``scale``; ``look`` is matplotlib's."""
    ax.plot(at, [scale * value.mean for value in values], linewidth=1.5, markersize=6, **look)
    for x, value in zip(at, values):
        ax.plot([x, x], [scale * value.low, scale * value.high], color=look["color"], linewidth=2)
