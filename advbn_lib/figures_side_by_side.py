"""Figures of the comparison of all methods: a heat map, ranks, and gain against cost.

They keep to the ways of :mod:`advbn_lib.figures`: functions of numbers that return a matplotlib Figure, in the same style and
colours, and no meaning by colour alone. For each there is a function that says the same in words, for the text alternative.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advbn_lib.figures import COLOURS, WIDTH, _cell, _label, _new, _style
from advbn_lib.records import Estimate

Row = Mapping[str, Estimate]
MAP = matplotlib.colormaps[
    "cividis"
]  # for the colour-blind as for others, and its lightness rises evenly: it prints in grey
LABELS = 1.75  # inches, for the names of the methods
RANK_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # one for each column
DISK = 15  # points: a number in the figure of gain over cost
NARROWEST = 0.42  # inches: a cell that "100.0" fits into


def heat_map(
    rows: Mapping[str, Row], *, low_is_good: Collection[str] = (), ratios: Collection[str] = (), title: str = ""
) -> Figure:
    """A row for each method, a column for each measure: the value in the cell, half its 95 % interval below, light is good.

    Each column has a scale of its own, from its worst value to its best, so colours are compared within a column alone.

    Args:
        rows: method to measure to value; the first row names the columns. What a row lacks is left blank.
        low_is_good: columns where less is better.
        ratios: columns that are no shares of 1, written as they are; others are written in percent.

    Raises:
        ValueError: no row, or more columns than fit side by side.
    """
    columns = _columns(rows)
    room = (WIDTH - LABELS) / len(columns)
    if room < NARROWEST:
        raise ValueError(
            f"{len(columns)} columns do not fit side by side: make two figures of {len(columns) // 2 + 1} at most"
        )
    wide = max(4, int(room * 10))  # characters; a longer word sticks out, but is whole
    heads = [textwrap.fill(name.replace("_", " "), wide, break_long_words=False) for name in columns]
    lines = max(head.count("\n") + 1 for head in heads)
    title = textwrap.fill(title, 42)  # it begins where the cells begin
    with _style():
        figure, axes = _new(1, 1, 0.5 + 0.35 * bool(title) + 0.2 * title.count("\n") + 0.19 * lines + 0.42 * len(rows))
        ax = axes[0, 0]
        for across, column in enumerate(columns):
            shares = goodness(
                {name: row[column].mean for name, row in rows.items() if column in row}, column in low_is_good
            )
            for place, (name, row) in enumerate(rows.items()):
                if column in row:
                    _cell(ax, across, place, MAP(shares[name]), in_cell(row[column], column in ratios), False)
        for text in ax.texts:
            text.set_fontsize(9)
            text.set_linespacing(1.0)
        ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        ax.xaxis.tick_top()
        ax.set_xticks(range(len(columns)), heads, fontsize=9)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.tick_params(length=0)
        _label(ax, "", "", title)
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
        figure.supxlabel("light is good; each column has a scale of its own", fontsize=10)
    return figure


def describe_heat_map(
    rows: Mapping[str, Row], *, low_is_good: Collection[str] = (), ratios: Collection[str] = ()
) -> str:
    """In words: the best and the worst of each column."""
    told = []
    for column in _columns(rows):
        means = {name: row[column].mean for name, row in rows.items() if column in row}
        if means:
            ordered = sorted(means, key=means.__getitem__, reverse=column not in low_is_good)
            first, last = (f"{name} ({_value(means[name], column in ratios)})" for name in (ordered[0], ordered[-1]))
            told.append(f"{column.replace('_', ' ')}: best {first}, worst {last}")
    return (
        f"A map of {len(rows)} methods and {len(_columns(rows))} measures with a value in each cell. "
        + "; ".join(told)
        + "."
    )


def goodness(values: Mapping[str, float], low_is_good: bool = False) -> dict[str, float]:
    """Values to their places between the worst (0) and the best (1) of them; one half if all are the same."""
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    if low == high:
        return dict.fromkeys(values, 0.5)
    shares = {name: (value - low) / (high - low) for name, value in values.items()}
    return {name: 1 - share for name, share in shares.items()} if low_is_good else shares


def in_cell(value: Estimate, ratio: bool = False) -> str:
    """``"67.3"`` and, on a line of its own, ``"±0.4"``: percent unless it is a ratio; one seed has no interval."""
    text = _value(value.mean, ratio)
    return text if math.isnan(value.low) else f"{text}\n±{_value(value.high - value.mean, ratio)}"


def _value(value: float, ratio: bool) -> str:
    if not ratio:
        return f"{100 * value:.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _columns(rows: Mapping[str, Row]) -> list[str]:
    if not rows:
        raise ValueError("no method to show: load records of one at least")
    return list(next(iter(rows.values())))


# ---- ranks -----------------------------------------------------------------------------------

Ranks = Mapping[str, Mapping[str, Sequence[float]]]


def ranks(
    values: Mapping[str, Mapping[str, Sequence[float]]], low_is_good: Collection[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Ranks from 1 (the best) in each column, seed by seed; those who are equal share the mean of their ranks.

    Args:
        values: method to measure to one value for each seed, the same seeds in the same order for every method.
        low_is_good: columns where less is better.

    Raises:
        ValueError: a method lacks a column or a seed.
    """
    if not values:
        raise ValueError("no method to rank: load records of one at least")
    shape = {column: len(seeds) for column, seeds in next(iter(values.values())).items()}
    for name, row in values.items():
        if {column: len(seeds) for column, seeds in row.items()} != shape:
            raise ValueError(f"{name} has not the columns and seeds that {next(iter(values))} has: rank what all have")
    found: dict[str, dict[str, list[float]]] = {name: {} for name in values}
    for column, seeds in shape.items():
        sign = 1 if column in low_is_good else -1
        for seed in range(seeds):
            signed = {name: sign * row[column][seed] for name, row in values.items()}
            for name, value in signed.items():
                below, equal = (sum(map(test, signed.values())) for test in (value.__gt__, value.__eq__))
                found[name].setdefault(column, []).append(below + (equal + 1) / 2)
    return found


def rank_plot(found: Ranks, title: str = "") -> Figure:
    """For each method a marker at its mean rank in each column, with a bar from its best to its worst seed.

    Methods stand by their mean rank over columns, the best at the top.

    Raises:
        ValueError: no method.
    """
    names = by_mean_rank(found)
    columns = list(found[names[0]])
    step = 0.8 / len(columns)
    with _style():
        figure, axes = _new(1, 1, 1.3 + 0.3 * math.ceil(len(columns) / 3) + len(names) * max(0.3, 0.06 * len(columns)))
        ax = axes[0, 0]
        for number, (colour, marker, column) in enumerate(zip(cycle(COLOURS), cycle(RANK_MARKERS), columns)):
            places = [place + step * (number - (len(columns) - 1) / 2) for place in range(len(names))]
            for place, name in zip(places, names):
                seeds = found[name][column]
                ax.plot([min(seeds), max(seeds)], [place, place], color=colour, linewidth=1.5)
            means = [fmean(found[name][column]) for name in names]
            look = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none"}
            ax.plot(means, places, label=column.replace("_", " "), **look)
        for place in range(1, len(names)):
            ax.axhline(place - 0.5, color="0.85", linewidth=0.8)
        ax.set_yticks(range(len(names)), names)
        ax.set(ylim=(len(names) - 0.5, -0.5), xlim=(0.5, len(names) + 0.5))
        ax.set_xticks(range(1, len(names) + 1))
        ax.grid(axis="y", visible=False)
        _label(ax, "rank (1 is the best); bars: best to worst seed", "", title)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def describe_ranks(found: Ranks) -> str:
    """In words: the methods by their mean rank."""
    told = ", ".join(f"{name} ({mean_rank(found[name]):.1f})" for name in by_mean_rank(found))
    return f"Ranks of {len(found)} methods in {len(next(iter(found.values())))} columns. Mean rank, the best first: {told}."


def by_mean_rank(found: Ranks) -> list[str]:
    """The methods, the one with the best mean rank first. Raises ValueError if there is none."""
    if not found:
        raise ValueError("no method to show: load records of one at least")
    return sorted(found, key=lambda name: mean_rank(found[name]))


def mean_rank(row: Mapping[str, Sequence[float]]) -> float:
    """Over columns and seeds; each column counts the same."""
    return fmean(fmean(seeds) for seeds in row.values())


# ---- gain against cost -----------------------------------------------------------------------

Points = Mapping[str, tuple[Estimate, Estimate]]  # method to its cost, as a ratio, and its gain, a difference of shares


def gain_and_cost(points: Points, *, xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Gain (percentage points, with its 95 % interval) over cost; each method has a number, and the legend its name.

    Costs are drawn by their mean, on a scale that doubles at equal steps, or an even one where no cost is twice another. Where
    numbers would lie on one another, they stand beside, and a line leads to the point.

    Raises:
        ValueError: no method, or a cost that is not above 0.
    """
    if not points or any(not cost.mean > 0 for cost, _ in points.values()):
        raise ValueError("there must be a method at least, and each cost must be above 0")
    with _style():
        figure, axes = _new(1, 1, 3.9 + 0.2 * math.ceil(len(points) / 3))
        ax = axes[0, 0]
        drawn = list(zip(cycle(COLOURS), points.items()))
        for number, (colour, (name, (cost, gain))) in enumerate(drawn, start=1):
            _point(ax, cost.mean, gain, colour, f"{number}  {name}")
        ax.axhline(0, color="0.35", linestyle="--", linewidth=1.2)
        _scale_of_costs(ax, [cost.mean for cost, _ in points.values()])
        ax.margins(y=0.1)
        _label(ax, xlabel, ylabel, title)
        _legend_below(figure)
        places = [(cost.mean, 100 * gain.mean) for cost, gain in points.values()]
        for number, (place, beside) in enumerate(zip(places, _side_by_side(ax, places)), start=1):
            _numbered(ax, number, place, beside, drawn[number - 1][0])
    return figure


def describe_gain_and_cost(points: Points) -> str:
    """In words: each method's gain and cost, the cheapest first."""
    ordered = sorted(points.items(), key=lambda item: item[1][0].mean)
    told = "; ".join(f"{name}: {_value(gain.mean, False)} points at {cost.mean:.1f}" for name, (cost, gain) in ordered)
    return f"Gain of {len(points)} methods over their cost. {told}."


def _scale_of_costs(ax: Axes, costs: Sequence[float]) -> None:
    """An axis with two ticks or more and a little room beside: whole doublings, or an even scale of what is nearly the same."""
    low, high = min(costs), max(costs)
    if high < 2 * low:
        room = max(0.15 * (high - low), 0.05 * high)
        ax.set_xlim(low - room, high + room)
        return
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
    ax.set_xlim(2 ** (math.floor(math.log2(low)) - 0.2), 2 ** (math.ceil(math.log2(high)) + 0.2))


def _point(ax: Axes, x: float, gain: Estimate, colour, label: str) -> None:
    """A dot, the interval if there is one, and an entry of the legend."""
    if not math.isnan(gain.low):
        ax.plot([x, x], [100 * gain.low, 100 * gain.high], color=colour, linewidth=2, zorder=2)
    ax.plot(x, 100 * gain.mean, marker="o", linestyle="none", color=colour, markersize=5, zorder=2)
    ax.plot([], [], marker="o", linestyle="none", color=colour, markersize=7, label=label)


def _legend_below(figure: Figure) -> None:
    """The legend, in as many columns, three at most, as the figure is wide; when this returns, the layout is decided."""
    for columns in (3, 2, 1):
        spaces = {"handlelength": 0.8, "handletextpad": 0.4, "columnspacing": 0.8}
        legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False, **spaces)
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _side_by_side(ax: Axes, places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where disks of ``DISK`` points go so that none lies on another: at their places, or as little to a side as will do."""
    least = (DISK + 3) * ax.figure.dpi / 72  # pixels between two centres
    taken: list[tuple[float, float]] = []
    for x, y in ax.transData.transform(places):
        for step in range(4 * len(places)):
            beside = x + (-1) ** step * math.ceil(step / 2) * least / 2, y
            if all(math.dist(beside, other) >= least for other in taken):
                break
        taken.append(beside)
    return [tuple(place) for place in ax.transData.inverted().transform(taken)]


def _numbered(ax: Axes, number: int, place: tuple[float, float], beside: tuple[float, float], colour) -> None:
    """A white disk with a number and a coloured edge, and a line to its place if it stands beside it."""
    if not math.isclose(place[0], beside[0]):
        ax.plot(*zip(place, beside), color=colour, linewidth=1, zorder=2.5)
    look = {"markersize": DISK, "markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 1.8}
    ax.plot(*beside, marker="o", linestyle="none", zorder=3, clip_on=False, **look)
    ax.text(*beside, str(number), ha="center", va="center", fontsize=9, zorder=4)
