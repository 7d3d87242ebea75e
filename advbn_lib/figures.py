"""The book's figures: functions of tensors and numbers that return a matplotlib Figure, and :func:`show` for the page.

Nothing global is changed: no pyplot, and the style holds only while a figure is made. Colours are of seaborn's
"colorblind" palette; where colour carries meaning, a marker, a position or a label carries it too.
"""

from __future__ import annotations

import base64
import html
import io
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import matplotlib
import numpy as np
import seaborn
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from advbn_lib.data.shifts import Shift
from advbn_lib.records import Estimate

WIDTH = 6.0  # inches: on a phone's 360 pixels, text of 11 points is then still 9 pixels high
DPI = 150
COLOURS = tuple(seaborn.color_palette("colorblind"))
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    "font.size": 11, "axes.titlesize": 12, "axes.labelsize": 11,
    "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "0.9",
}  # fmt: skip


def show(figure: Figure, alt: str) -> None:
    """Put a figure on the page, as a PNG with a text alternative: in Jupyter, on Colab and in the built book.

    Args:
        alt: what the figure shows, in words, for those who cannot see it.

    Raises:
        ValueError: if ``alt`` is blank.
    """
    from IPython.display import display

    display({"text/html": as_html(figure, alt), "text/plain": alt}, raw=True)


def as_html(figure: Figure, alt: str) -> str:
    """The figure as one ``<img>`` element with the picture inside it. Raises ValueError if ``alt`` is blank."""
    if not alt.strip():
        raise ValueError("a figure needs alt text: say in words what it shows")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI, facecolor="white")
    width = round(figure.get_figwidth() * 96)  # CSS pixels
    data = base64.b64encode(png.getvalue()).decode()
    words = html.escape(" ".join(alt.split()), quote=True)
    style = "max-width: 100%; height: auto"
    return f'<img alt="{words}" width="{width}" style="{style}" src="data:image/png;base64,{data}">'


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], fold: str = "") -> None:
    """Put a table of texts on the page; works where :func:`show` does.

    Args:
        fold: if given, the table is folded away under this line, and opens with a click.

    Raises:
        ValueError: a row is not as long as the head.
    """
    from IPython.display import display

    table = as_markdown(head, rows)
    if fold:
        table = f"<details><summary>{html.escape(fold)}</summary>\n\n{table}\n\n</details>"
    display({"text/markdown": table, "text/plain": "\n".join("\t".join(row) for row in [head, *rows])}, raw=True)


def as_markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown. Raises ValueError if a row is not as long as the head."""
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"every row needs {len(head)} cells, as the head has")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def in_percent(value: Estimate, signed: bool = False) -> str:
    """``"67.3 ± 0.4"``: a share of 1 in percent and half its 95 % interval; ``"67.3"`` for one seed, which has no interval.

    Args:
        signed: for a difference: ``"+1.2 ± 0.4"``, percentage points.
    """
    mean = _signed(value.mean) if signed else f"{100 * value.mean:.1f}"
    if math.isnan(value.low):
        return mean
    text = f"{mean} ± {100 * (value.high - value.mean):.1f}"
    return text.replace(" ", "\N{NO-BREAK SPACE}")  # not to be broken in a narrow table


def image_grid(rows: Mapping[str, Tensor], columns: Sequence[str] | None = None, title: str = "") -> Figure:
    """Images in a grid: one row per entry, its name at the left.

    Args:
        rows: name to images in [0,1], N,3,H,W; the same N in each.
        columns: N names to stand above the columns.

    Raises:
        ValueError: no rows, rows of different length, or another number of column names.
    """
    count = _columns(rows, columns)
    lines = max((name.count("\n") + 1 for name in columns or ()), default=0)
    left, gap, head = 0.5, 0.05, 0.05 + 0.24 * lines + (0.3 if title else 0)  # inches
    side = (WIDTH - left - gap * count) / count
    height = head + (side + gap) * len(rows)
    places = {"left": left / WIDTH, "right": 1 - gap / WIDTH, "top": 1 - head / height, "bottom": gap / height}
    places |= {"wspace": gap / side, "hspace": gap / side}
    with _style():
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(len(rows), count, squeeze=False, gridspec_kw=places)
        for line, (name, images) in zip(axes, rows.items()):
            for ax, image in zip(line, images):
                ax.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
                _bare(ax)
            line[0].set_ylabel(name)
        for ax, name in zip(axes[0], columns or ()):
            ax.set_title(name, fontsize=11)
        if title:
            figure.suptitle(title, fontsize=12, y=1 - 0.06 / height, va="top")
    return figure


def channel_grid(image: Tensor, features: Tensor, count: int = 15, columns: int = 4, title: str = "") -> Figure:
    """An image (3,H,W in [0,1]) and the first ``count`` channels of its feature map (C,H,W): dark = 0, one scale."""
    maps = features[:count].detach().cpu()
    rows = -(-(len(maps) + 1) // columns)
    with _style():
        figure, axes = _new(rows, columns, WIDTH * rows / columns * 1.13 + 0.4, gaps=0.02)
        for ax in axes.flat:
            _bare(ax)
            ax.set_visible(False)
        axes.flat[0].imshow(image.detach().cpu().permute(1, 2, 0).numpy())
        axes.flat[0].set_title("the image", fontsize=10)
        for number, (ax, values) in enumerate(zip(list(axes.flat)[1:], maps)):
            ax.imshow(values.numpy(), cmap="cividis", vmin=0, vmax=float(maps.max()))
            ax.set_title(f"channel {number}", fontsize=10)
        for ax in list(axes.flat)[: len(maps) + 1]:
            ax.set_visible(True)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def curves(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str, title: str = "",
    level: tuple[str, float] | None = None, upright: tuple[str, float] | None = None, from_zero: bool = True,
) -> Figure:  # fmt: skip
    """Lines over ``x``, with markers; ``level`` and ``upright``: name and value of a dashed line across or up."""
    with _style():
        figure, axes = _new(1, 1, 4.1)
        ax = axes[0, 0]
        for colour, marker, (name, values) in zip(cycle(COLOURS), cycle(MARKERS), lines.items()):
            ax.plot(x, values, color=colour, marker=marker, markersize=5, label=name)
        if level:
            ax.axhline(level[1], color="0.35", linestyle="--", linewidth=1.2, label=level[0])
        if upright:
            ax.axvline(upright[1], color="0.35", linestyle=":", linewidth=1.5, label=upright[0])
        _label(ax, xlabel, ylabel, title)
        if from_zero:
            ax.set_ylim(bottom=0)
        if len(lines) > 1 or level or upright:
            figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def bars(
    groups: Mapping[str, Mapping[str, float]], *, xlabel: str, title: str = "", level: tuple[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Lying bars: for each group (named at the left) one bar per series; every group has the same series."""
    names, series = list(groups), list(next(iter(groups.values())))
    thickness = 0.8 / len(series)
    with _style():
        figure, axes = _new(1, 1, 1.5 + 0.22 * len(names) * (len(series) + 0.8))
        ax = axes[0, 0]
        for number, (one, hatch) in enumerate(zip(series, cycle(("", "//", "..", "xx")))):
            places = np.arange(len(names)) + (number - (len(series) - 1) / 2) * thickness
            values = [groups[name][one] for name in names]
            look = {"color": COLOURS[number], "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
            ax.barh(places, values, thickness, label=one, **look)
        if level:
            ax.axvline(level[1], color="0.2", linestyle="--", linewidth=1.2, label=level[0])
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        _label(ax, xlabel, "", title)
        figure.legend(loc="outside lower center", ncols=len(series) + bool(level), frameon=False)
    return figure


def strips(values: Mapping[str, Sequence[float]], *, ylabel: str, title: str = "", log: bool = False) -> Figure:
    """Single values as dots, one column per entry, with a bar at the median."""
    with _style():
        figure, axes = _new(1, 1, 3.7)
        ax = axes[0, 0]
        for place, (colour, marker, numbers) in enumerate(zip(cycle(COLOURS), cycle(MARKERS), values.values())):
            spread = np.linspace(-0.22, 0.22, len(numbers)) if len(numbers) > 1 else np.zeros(1)
            ax.scatter(place + spread, numbers, s=26, color=colour, marker=marker, alpha=0.85, linewidth=0)
            ax.hlines(np.median(numbers), place - 0.33, place + 0.33, color="0.15", linewidth=2)
        ax.set_xticks(range(len(values)), list(values))
        ax.grid(axis="x", visible=False)
        if log:
            ax.set_yscale("log")
        _label(ax, "", ylabel, title)
    return figure


def instance_and_batch(values: Tensor, batch: Tensor, *, ylabel: str, title: str = "") -> Figure:
    """One number per image and channel (N,C) as dots, and the batch's one number per channel (C) as a line."""
    count, channels = values.shape
    with _style():
        figure, axes = _new(1, 1, 3.5)
        ax = axes[0, 0]
        shift = np.linspace(-0.25, 0.25, count)
        for channel in range(channels):
            label = "one image" if channel == 0 else None
            dots = values[:, channel].cpu()
            ax.scatter(channel + shift, dots, s=9, color=COLOURS[0], alpha=0.5, linewidth=0, label=label)
            label = "the whole batch" if channel == 0 else None
            ax.hlines(float(batch[channel]), channel - 0.4, channel + 0.4, color=COLOURS[3], linewidth=2.5, label=label)
        ax.set_xticks(range(0, channels, 2))
        ax.grid(axis="x", visible=False)
        _label(ax, "channel", ylabel, title)
        ax.legend(frameon=False)
    return figure


def sorted_factors(factors: Mapping[str, Tensor], eps: float, title: str = "") -> Figure:
    """Each set of factors sorted by size, between the ends of the interval [1 - eps, 1 + eps]."""
    with _style():
        figure, axes = _new(1, 1, 3.7)
        ax = axes[0, 0]
        for end, label in ((1 - eps, "end of the interval"), (1 + eps, None)):
            ax.axhline(end, color="0.35", linestyle="--", linewidth=1.2, label=label)
        ax.axhline(1, color="0.35", linestyle=":", linewidth=1.5, label="no change")
        for colour, marker, (name, values) in zip(cycle(COLOURS), cycle(MARKERS), factors.items()):
            ordered = values.detach().flatten().sort().values.cpu()
            ranks = np.arange(1, len(ordered) + 1)
            ax.plot(ranks, ordered, color=colour, marker=marker, markersize=6, linestyle="none", label=name)
        _label(ax, "channels, sorted by their factor", "factor", title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def against(x: Tensor, groups: Mapping[str, Tensor], *, xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Scatter of each group's values over ``x`` (same length), with the line where both are equal."""
    across = x.detach().cpu()
    with _style():
        figure, axes = _new(1, 1, 4.2)
        ax = axes[0, 0]
        ends = [float(across.min()), float(across.max())]
        ax.plot(ends, ends, color="0.35", linestyle="--", linewidth=1.2, label="no difference")
        for colour, marker, (name, values) in zip(cycle(COLOURS), cycle(MARKERS), groups.items()):
            dots = values.detach().cpu()
            ax.scatter(across, dots, s=30, color=colour, marker=marker, alpha=0.85, linewidth=0, label=name)
        _label(ax, xlabel, ylabel, title)
        figure.legend(loc="outside lower center", ncols=len(groups) + 1, frameon=False)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    with seaborn.axes_style("whitegrid", rc={k: v for k, v in STYLE.items() if "spines" in k or "grid" in k}):
        with seaborn.plotting_context("notebook", rc={k: v for k, v in STYLE.items() if "size" in k}):
            yield


def _new(rows: int, columns: int, height: float, gaps: float | None = None) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if gaps is not None:
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=gaps, hspace=gaps)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _columns(rows: Mapping[str, Tensor], columns: Sequence[str] | None) -> int:
    counts = {len(images) for images in rows.values()}
    if len(counts) != 1:
        found = ", ".join(f"{name}: {len(images)}" for name, images in rows.items()) or "no rows"
        raise ValueError(f"every row needs the same number of images, got {found}")
    count = counts.pop()
    if columns is not None and len(columns) != count:
        raise ValueError(f"{count} images a row, but {len(columns)} column names")
    return count


def _bare(ax: Axes) -> None:
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _label(ax: Axes, xlabel: str, ylabel: str, title: str) -> None:
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, loc="left")


@dataclass(frozen=True)
class _Band:
    """A row of a gallery: images (3,H,W) in ``columns`` places, a name at the left, captions above."""

    images: Sequence[Tensor]
    columns: int
    name: str = ""
    captions: Sequence[str] = ()


def shift_gallery(image: Tensor, shifts: Sequence[Shift], columns: int = 4) -> Figure:
    """One image (3,H,W in [0,1]) under each shift.

    Those with degrees have a row for each kind and a column for each severity. Those without stand below, ``columns`` in a row.

    Raises:
        ValueError: nothing but clean images is asked for.
    """
    severities = sorted({shift.severity for shift in shifts if shift.severity})
    by_degree: dict[str, list[Tensor]] = {}
    one_degree: dict[str, Tensor] = {}
    for shift in shifts:
        changed = shift(image[None], torch.Generator(image.device).manual_seed(0))[0]
        if shift.severity:
            row = by_degree.setdefault(_words(shift.name), [image] + [torch.ones_like(image)] * len(severities))
            row[1 + severities.index(shift.severity)] = changed
        elif shift.name != "clean":
            one_degree[_words(shift.name)] = changed
    head = ["unchanged", *(f"severity {severity}" for severity in severities)]
    bands = [_Band(row, len(head), name) for name, row in by_degree.items()]
    if bands:
        bands[0] = _Band(bands[0].images, len(head), bands[0].name, head)
    elif one_degree:
        one_degree = {"unchanged": image} | one_degree
    names = list(one_degree)
    for start in range(0, len(names), columns):
        some = names[start : start + columns]
        bands.append(_Band([one_degree[name] for name in some], columns, captions=some))
    return _gallery(bands)


def _gallery(bands: Sequence[_Band]) -> Figure:
    if not bands:
        raise ValueError("no shift to show: give some besides the clean images")
    gap, line = 0.05, 0.19  # inches
    left = 0.5 if any(band.name for band in bands) else gap
    sides, heads, captions = [], [], []
    for band in bands:
        start = left if band.name else gap
        sides.append((WIDTH - start - gap * band.columns) / band.columns)
        wrapped = [textwrap.fill(caption, int(sides[-1] * 12)) for caption in band.captions]
        captions.append(wrapped)
        heads.append(max((line * (text.count("\n") + 1) + gap for text in wrapped), default=0))
    height = gap + sum(sides) + sum(heads) + gap * len(bands)
    top = height - gap
    with _style():
        figure = Figure(figsize=(WIDTH, height))
        for band, side, head, texts in zip(bands, sides, heads, captions):
            top -= head + side
            for number, image in enumerate(band.images):
                across = (left if band.name else gap) + number * (side + gap)
                ax = figure.add_axes((across / WIDTH, top / height, side / WIDTH, side / height))
                ax.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
                _bare(ax)
                if texts:
                    ax.set_title(texts[number], fontsize=10, pad=3)
                if number == 0 and band.name:
                    ax.set_ylabel(textwrap.fill(band.name, 11), fontsize=10)
            top -= gap
    return figure


def accuracy_dots(tables: Mapping[str, Mapping[str, float | Estimate]], title: str = "") -> Figure:
    """Accuracies (shares of 1, drawn in percent): a row for each shift, a colour and marker for each table, intervals as bars."""
    names = list(next(iter(tables.values())))
    offsets = np.linspace(-0.31, 0.31, len(tables)) if len(tables) > 1 else [0.0]
    with _style():
        figure, axes = _new(1, 1, 1.4 + 0.28 * len(tables) + 0.42 * len(names))
        ax = axes[0, 0]
        for colour, marker, offset, (label, table) in zip(cycle(COLOURS), cycle(MARKERS), offsets, tables.items()):
            for place, name in enumerate(names):
                _interval(ax, place + offset, table[name], colour, marker, label if place == 0 else None)
        for place in range(1, len(names)):
            ax.axhline(place - 0.5, color="0.85", linewidth=0.8)
        ax.set_yticks(range(len(names)), [_words(name) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        _label(ax, "accuracy, %", "", title)
        figure.legend(loc="outside lower center", ncols=1 if len(tables) > 4 else 2, frameon=False)
    return figure


def difference_forest(comparisons: Mapping[str, Mapping[str, Estimate]], title: str = "") -> Figure:
    """Differences in accuracy, in percentage points with intervals: a group of rows for each comparison, and a line at zero."""
    place, ticks = 0.0, []
    with _style():
        figure, axes = _new(1, 1, 1.0 + 0.3 * sum(len(group) + 1.3 for group in comparisons.values()))
        ax = axes[0, 0]
        ax.axvline(0, color="0.2", linestyle="--", linewidth=1.2)
        for colour, marker, (heading, group) in zip(cycle(COLOURS), cycle(MARKERS), comparisons.items()):
            look = {"fontsize": 10, "fontweight": "bold", "va": "center"}
            blank = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line at zero
            ax.text(0.0, place, heading, transform=ax.get_yaxis_transform(), bbox=blank, **look)
            for label, value in group.items():
                place += 1
                _interval(ax, place, value, colour, marker)
                ticks.append((place, f"{label}, n = {value.n}"))
            place += 1.3
        ax.set_yticks(*zip(*ticks))
        ax.set_ylim(place - 0.5, -0.7)
        ax.grid(axis="y", visible=False)
        _label(ax, "percentage points, with 95 % interval", "", title)
    return figure


def dose(
    x: Sequence[float] | Sequence[str], lines: Mapping[str, Sequence[float | Estimate | None]], *, xlabel: str, ylabel: str,
    title: str = "", level: tuple[str, float] | None = None,
) -> Figure:  # fmt: skip
    """Accuracies, or differences of them (shares of 1, drawn in percent), over a setting, with intervals as upright bars.

    Args:
        x: numbers, or words, which stand at equal distances.
        lines: name to one value for each ``x``; None leaves it out.
        level: name and value of a dashed line across.

    Raises:
        ValueError: a line is not as long as ``x``.
    """
    for name, values in lines.items():
        if len(values) != len(x):
            raise ValueError(f"{name}: {len(values)} values for {len(x)} places")
    words = any(isinstance(value, str) for value in x)
    places = np.arange(len(x), dtype=float) if words else np.asarray(x, dtype=float)
    spacing = np.diff(np.sort(places)).min() if len(x) > 1 else 1.0
    step = 0.05 * spacing  # lines stand side by side, so that bars do not overlap
    with _style():
        figure, axes = _new(1, 1, 3.7 + 0.2 * math.ceil(len(lines) / 2))
        ax = axes[0, 0]
        for number, (colour, marker, (name, values)) in enumerate(zip(cycle(COLOURS), cycle(MARKERS), lines.items())):
            shifted = places + step * (number - (len(lines) - 1) / 2)
            means = [math.nan if value is None else 100 * _mean(value) for value in values]
            ax.plot(shifted, means, color=colour, marker=marker, markersize=6, linewidth=1.2, label=name)
            for place, value in zip(shifted, values):
                if isinstance(value, Estimate):
                    ax.plot([place, place], [100 * value.low, 100 * value.high], color=colour, linewidth=2)
        if level:
            ax.axhline(100 * level[1], color="0.35", linestyle="--", linewidth=1.2, label=level[0])
        ax.set_xticks(places, list(x) if words else [f"{value:g}" for value in x])
        ax.grid(axis="x", visible=False)
        _label(ax, xlabel, ylabel, title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def difference_map(
    rows: Mapping[str, Mapping[str, Estimate]], title: str = "", groups: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """Differences in accuracy as a map: a number (percentage points) and a colour in each cell, less is orange and more is purple.

    A dot and bold type mark a difference whose 95 % interval excludes zero.

    Args:
        rows: name to a difference for each column (shares of 1). The first row names the columns; one that lacks a column
            has a blank there.
        groups: heading to the names of the rows below it; names without a row are passed over.
    """
    means = [abs(100 * value.mean) for row in rows.values() for value in row.values()]
    scale = max(1.0, *means)

    def write(value: Estimate) -> tuple[str, bool]:
        sure = excludes_zero(value)
        return _signed(value.mean) + (" •" if sure else ""), sure

    figure = _cells(rows, groups, matplotlib.colormaps["PuOr"], Normalize(-scale, scale), write, title)
    figure.supxlabel("percentage points;  • the 95 % interval excludes zero", fontsize=10)
    return figure


def accuracy_map(
    rows: Mapping[str, Mapping[str, float | Estimate]],
    title: str = "",
    groups: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Accuracies (shares of 1) as a map: the percentage in each cell, light is high. ``rows``, ``groups``: :func:`difference_map`."""

    def write(value: float | Estimate) -> tuple[str, bool]:
        return f"{100 * _mean(value):.0f}", False

    figure = _cells(rows, groups, matplotlib.colormaps["cividis"], Normalize(0, 100), write, title)
    figure.supxlabel("accuracy, %", fontsize=10)
    return figure


def excludes_zero(value: Estimate) -> bool:
    """Whether the whole interval lies on one side of zero; False for one seed, which has no interval."""
    return value.low > 0 or value.high < 0


def _cells(
    rows: Mapping[str, Mapping[str, float | Estimate]], groups: Mapping[str, Sequence[str]] | None, colours: Colormap,
    scale: Normalize, write: Callable[[float | Estimate], tuple[str, bool]], title: str,
) -> Figure:  # fmt: skip
    """A map of coloured cells; ``write`` gives the text of a value and whether it is bold."""
    columns = list(next(iter(rows.values())))
    lines, labels = [], []  # a line without a row is a heading
    for heading, names in (groups or {"": list(rows)}).items():
        present = [name for name in names if name in rows]
        if present and heading:
            lines, labels = [*lines, None], [*labels, heading]
        lines += [rows[name] for name in present]
        labels += [_words(name).removeprefix(f"{heading.removesuffix('s')} ") for name in present]
    head = 0.2 * max(column.count("\n") + 1 for column in columns)
    with _style():
        figure, axes = _new(1, 1, 0.5 + (0.35 if title else 0.1) + head + 0.25 * len(lines))
        ax = axes[0, 0]
        for place, line in enumerate(lines):
            for across, column in enumerate(columns):
                if line and column in line:
                    _cell(ax, across, place, colours(scale(100 * _mean(line[column]))), *write(line[column]))
        ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(lines) - 0.5, -0.5))
        ax.xaxis.tick_top()
        ax.set_xticks(range(len(columns)), columns)
        for tick, line in zip(ax.set_yticks(range(len(lines)), labels), lines):
            tick.label1.set_fontweight("normal" if line else "bold")
        ax.tick_params(length=0)
        _label(ax, "", "", title)
        ax.grid(visible=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    return figure


def _cell(ax: Axes, across: float, place: float, colour: tuple[float, ...], text: str, bold: bool) -> None:
    ax.fill_between([across - 0.48, across + 0.48], place - 0.46, place + 0.46, color=colour, linewidth=0)
    luminance = np.dot(np.power(colour[:3], 2.2), (0.2126, 0.7152, 0.0722))  # of sRGB, about
    light = luminance > 0.18  # where black and white stand out alike
    look = {"color": "black" if light else "white", "fontweight": "bold" if bold else "normal"}
    ax.text(across, place, text, fontsize=10, ha="center", va="center", **look)


def _signed(share: float) -> str:
    """A difference of shares in percentage points, with a minus sign that is one, and no sign for what rounds to zero."""
    points = round(100 * share, 1)
    return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "0.0"


def _words(name: str) -> str:
    """``"contrast, severity 3"`` for ``"contrast-3"``; blanks for underscores."""
    return name.replace("_", " ").replace("-", ", severity ")


def _mean(value: float | Estimate) -> float:
    return value.mean if isinstance(value, Estimate) else value


def _interval(ax: Axes, place: float, value: float | Estimate, colour, marker: str, label: str | None = None) -> None:
    """A value in percent, and its interval if it has one, at a height."""
    if isinstance(value, Estimate):
        ax.plot([100 * value.low, 100 * value.high], [place, place], color=colour, linewidth=2)
    ax.plot(100 * _mean(value), place, marker=marker, color=colour, markersize=5, linestyle="none", label=label)
