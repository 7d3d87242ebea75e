"""Figures of the chapters on A-FAN: changed feature maps, gain against cost, boxes and masks on images.

They keep to the ways of :mod:`advbn_lib.figures`: functions of tensors and numbers that return a matplotlib Figure, in the
same style and colours, and no meaning by colour alone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from advbn_lib.figures import COLOURS, MARKERS, WIDTH, _bare, _label, _new, _style
from advbn_lib.records import Estimate

VOID = (0.35, 0.35, 0.35)


def feature_changes(clean: Tensor, changed: Mapping[str, Tensor], channels: Sequence[int], title: str = "") -> Figure:
    """Some channels of a clean feature map, and what was added to them.

    Args:
        clean: one image's features, C,H,W.
        changed: name to features of the same shape. Drawn is changed minus clean: less is orange, more is purple, all on one
            scale, which is written below.
        channels: which of them, a row each.

    Raises:
        ValueError: another shape, or nothing was changed.
    """
    for name, features in changed.items():
        if features.shape != clean.shape:
            raise ValueError(f"{name} has shape {tuple(features.shape)}, the clean features {tuple(clean.shape)}")
    differences = {name: (features - clean).detach().cpu() for name, features in changed.items()}
    limit = max((float(values[list(channels)].abs().max()) for values in differences.values()), default=0.0)
    if not limit > 0:
        raise ValueError("nothing was changed in these channels: there is no change to draw")
    names = ["clean", *(f"{name}\n− clean" for name in changed)]
    with _style():
        figure, axes, strip = _grid_over_strip(len(channels), names, clean.shape[1] / clean.shape[2], title)
        for line, channel in zip(axes, channels):
            line[0].imshow(clean[channel].detach().cpu().numpy(), cmap="cividis")
            line[0].set_ylabel(f"channel {channel}")
            for ax, values in zip(line[1:], differences.values()):
                drawn = ax.imshow(values[channel].numpy(), cmap="PuOr", vmin=-limit, vmax=limit)
            for ax in line:
                _bare(ax)
        bar = figure.colorbar(drawn, cax=strip, orientation="horizontal", ticks=[-limit, 0, limit])
        bar.ax.set_xticklabels([f"\N{MINUS SIGN}{limit:.2g}", "0", f"{limit:.2g}"])
        bar.set_label("change, in the features' unit", fontsize=10)
    return figure


def _grid_over_strip(rows: int, names: Sequence[str], shape: float, title: str) -> tuple[Figure, np.ndarray, Axes]:
    """A grid of pictures, height over width ``shape``, with ``names`` above its columns, and a strip for a scale below."""
    left, gap, below = 0.35, 0.05, 0.75  # inches
    head = 0.05 + 0.2 * max(name.count("\n") + 1 for name in names) + (0.3 if title else 0)
    side = (WIDTH - left - gap * len(names)) / len(names)
    height = head + rows * (side * shape + gap) + below
    places = {"left": left / WIDTH, "right": 1 - gap / WIDTH, "top": 1 - head / height, "bottom": below / height}
    figure = Figure(figsize=(WIDTH, height))
    grid = {**places, "wspace": gap / side, "hspace": gap / (side * shape)}
    axes = figure.subplots(rows, len(names), squeeze=False, gridspec_kw=grid)
    for ax, name in zip(axes[0], names):
        ax.set_title(name, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=12, y=1 - 0.06 / height, va="top")
    return figure, axes, figure.add_axes((0.25, (below - 0.25) / height, 0.5, 0.12 / height))


def gain_against_time(
    points: Mapping[str, tuple[float, Estimate]], *, xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """What each method gains and what it costs: a number, a colour and a marker a method, its interval as an upright bar.

    Args:
        points: method to its training time (in any unit above 0; logarithmic axis) and its gain (share of 1, drawn in points).

    Raises:
        ValueError: no points, or a time that is not above 0.
    """
    if not points:
        raise ValueError("no method to draw")
    if bad := [name for name, (time, _) in points.items() if not time > 0]:
        raise ValueError(f"a time must be above 0: {', '.join(bad)}")
    with _style():
        figure, axes = _new(1, 1, 3.9 + 0.21 * -(-len(points) // 2))
        ax = axes[0, 0]
        ax.axhline(0, color="0.2", linestyle="--", linewidth=1.2)
        looks = zip(cycle(COLOURS), cycle(MARKERS), points.items())
        for number, (colour, marker, (name, (time, gain))) in enumerate(looks, start=1):
            look = {"color": colour, "marker": marker, "markersize": 7, "linestyle": "none"}
            ax.plot(time, 100 * gain.mean, label=f"{number}  {name}", **look)
            ax.plot([time, time], [100 * gain.low, 100 * gain.high], color=colour, linewidth=2)
            ax.annotate(str(number), (time, 100 * gain.mean), (6, 4), textcoords="offset points", fontsize=11)
        ax.set_xscale("log")
        times = [time for time, _ in points.values()]
        ax.set_xlim(min(times) / 1.25, max(times) * 1.35)
        ticks = _round_numbers(min(times) / 1.25, max(times) * 1.35)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        _label(ax, xlabel, ylabel, title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _round_numbers(low: float, high: float, most: int = 12) -> list[float]:
    """Of 1, 1.5, 2, 3, 5, 7, 10 and so on those in between; fewer kinds where these are more than ``most``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    for kinds in ((1, 1.5, 2, 3, 5, 7), (1, 3), (1,)):
        found = [kind * 10.0**power for power in powers for kind in kinds if low < kind * 10.0**power < high]
        if len(found) <= most:
            break
    return found


@dataclass(frozen=True)
class Boxes:
    """Boxes on an image: corners (n,4: left, top, right, bottom, in pixels), and a few words for each."""

    corners: Tensor
    words: Sequence[str]


def boxes_on_images(
    images: Sequence[Tensor], layers: Mapping[str, Sequence[Boxes]], columns: int = 2, title: str = ""
) -> Figure:
    """Images (3,H,W in [0,1]) with boxes on them: the first layer in full lines, the second dashed, the third dotted.

    Args:
        layers: name (the truth, a prediction) to the boxes of each image. The words of the first layer stand at the top of a box,
            those of the others at the bottom.

    Raises:
        ValueError: a layer is not for as many images, or a box has no words.
    """
    for name, layer in layers.items():
        if len(layer) != len(images):
            raise ValueError(f"{name}: boxes of {len(layer)} images for {len(images)} images")
        if any(len(boxes.corners) != len(boxes.words) for boxes in layer):
            raise ValueError(f"{name}: every box needs its words, if only empty ones")
    looks = list(zip(layers, (COLOURS[1], COLOURS[0], COLOURS[4]), ("-", "--", ":")))
    height = sum(max(image.shape[1] / image.shape[2] for image in row) for row in _rows(images, columns))
    with _style():
        figure, axes = _new(-(-len(images) // columns), columns, WIDTH * height / columns + 0.6, gaps=0.02)
        for ax in axes.flat[len(images) :]:
            ax.set_visible(False)
        for number, (ax, image) in enumerate(zip(axes.flat, images)):
            _picture(ax, image)
            for place, (name, colour, line) in enumerate(looks):
                _draw_boxes(ax, layers[name][number], colour, line, at_top=place == 0)
        handles = [Patch(facecolor="none", edgecolor=c, linestyle=ls, linewidth=1.8, label=n) for n, c, ls in looks]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def masks_on_images(
    images: Sequence[Tensor], rows: Mapping[str, Sequence[Tensor]], classes: Sequence[str], title: str = ""
) -> Figure:
    """Images (3,H,W in [0,1]) above their masks; each class has a colour and, where it fills enough of a mask, its number.

    Args:
        rows: name (the truth, a prediction) to a mask (H,W) of each image: the number of a class, or anything else (255, say)
            for pixels without a label, which are dark grey.
        classes: their names, in the order of their numbers.

    Raises:
        ValueError: a row is not for as many images.
    """
    for name, masks in rows.items():
        if len(masks) != len(images):
            raise ValueError(f"{name}: {len(masks)} masks for {len(images)} images")
    palette = class_colours(len(classes))
    shown = sorted(
        {int(k) for masks in rows.values() for mask in masks for k in mask.unique() if 0 <= k < len(classes)}
    )
    names = [(f"{number} {classes[number]}", palette[number]) for number in shown]
    side = WIDTH / len(images) * max(image.shape[1] / image.shape[2] for image in images)
    with _style():
        figure, axes = _new(
            1 + len(rows), len(images), (1 + len(rows)) * side + 0.22 * -(-(len(names) + 1) // 3) + 0.6, gaps=0.02
        )
        for ax, image in zip(axes[0], images):
            _picture(ax, image)
        axes[0, 0].set_ylabel("image", fontsize=10)
        for line, (name, masks) in zip(axes[1:], rows.items()):
            for ax, mask in zip(line, masks):
                _draw_mask(ax, mask.detach().cpu(), palette)
            line[0].set_ylabel(textwrap.fill(name, 14), fontsize=10)
        handles = [
            Patch(facecolor=colour, edgecolor="0.3", label=label) for label, colour in [*names, ("no label", VOID)]
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        if title:
            figure.suptitle(title, fontsize=12)
    return figure


def class_colours(count: int) -> np.ndarray:
    """A colour (RGB in [0,1]) for each class: seaborn's "colorblind" ten, then the same, lighter, again and again."""
    rounds = np.arange(count) // len(COLOURS)
    base = np.array([COLOURS[k % len(COLOURS)] for k in range(count)]).reshape(count, 3)
    return 1 - (1 - base) * (0.55**rounds)[:, None]


def _draw_boxes(ax: Axes, boxes: Boxes, colour: tuple[float, ...], line: str, at_top: bool) -> None:
    for (left, top, right, bottom), words in zip(boxes.corners.detach().cpu().tolist(), boxes.words):
        size = {"width": right - left, "height": bottom - top}
        ax.add_patch(Rectangle((left, top), **size, fill=False, edgecolor="white", linewidth=3.2, alpha=0.7))
        ax.add_patch(Rectangle((left, top), **size, fill=False, edgecolor=colour, linewidth=1.8, linestyle=line))
        place = {"va": "top", "y": top} if at_top else {"va": "bottom", "y": bottom}
        back = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
        ax.text(left, s=words, fontsize=7, color="black", bbox=back, clip_on=True, **place)


def _draw_mask(ax: Axes, mask: Tensor, palette: np.ndarray) -> None:
    picture = np.empty((*mask.shape, 3))
    picture[:] = VOID
    for number, colour in enumerate(palette):
        picture[(mask == number).numpy()] = colour
    ax.imshow(picture, interpolation="nearest")
    _bare(ax)
    for number in range(len(palette)):
        inside = mask == number
        if inside.sum() > 0.03 * mask.numel():
            row, column = _innermost(inside)
            light = matplotlib.colors.rgb_to_hsv(palette[number])[2] > 0.55
            ax.text(column, row, str(number), fontsize=8, ha="center", va="center", color="black" if light else "white")


def _innermost(inside: Tensor) -> tuple[int, int]:
    """Row and column of a pixel as deep inside a region (bool, H,W) as any."""
    while True:
        # A pixel stays if its eight neighbours are in the region, too; outside the image there is no region.
        padded = F.pad(inside.float()[None, None], (1, 1, 1, 1))
        core = -F.max_pool2d(-padded, 3, stride=1)[0, 0] > 0
        if not core.any():
            places = inside.nonzero()
            row, column = places[len(places) // 2].tolist()
            return row, column
        inside = core


def _picture(ax: Axes, image: Tensor) -> None:
    ax.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    _bare(ax)


def _rows(images: Sequence[Tensor], columns: int) -> list[Sequence[Tensor]]:
    return [images[start : start + columns] for start in range(0, len(images), columns)]
