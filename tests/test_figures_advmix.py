"""The figures of the chapters on AdvMix: they draw what they are given, and can be read without colour or sight."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from advbn_lib import figures, figures_advmix
from advbn_lib.records import Estimate
from advbn_lib.style_splitting import MixGrid, SwapMeasurement

LEVELS = (None, 0.05, 0.005, 0.02)  # in no order


def value(mean: float, half: float = 0.02, n: int = 5) -> Estimate:
    return Estimate(mean, mean - half, mean + half, n)


def curve(start: float) -> dict[float | None, Estimate]:
    return {level: value(start + 0.02 * place) for place, level in enumerate(LEVELS)}


CURVES = {
    "AdvMix": curve(0.8), "nominal": {0.02: value(0.4, math.nan, 1), None: value(0.9, math.nan, 1)},
    "published": {0.02: 0.4055, 0.05: 0.845},
}  # fmt: skip
DIFFERENCES = {
    "AdvMix minus RandMix": {0.02: value(0.03), 0.05: value(0.01), None: value(-0.05)},
    "one seed": {0.02: value(0.03, math.nan, 1)},
}


def swap(kept: float, taken: float, colour: float, colour_kept: float) -> SwapMeasurement:
    parts = {"own": 0.9, "kept": kept, "leakage": 0.9 - kept, "taken": taken, "taken_before": 0.01, "colour": colour}
    parts |= {"colour_r2": colour - 0.1, "colour_kept": colour_kept, "own_colour": 0.95}
    return SwapMeasurement(**{name: value(mean, n=200) for name, mean in parts.items()})


CUTS = {2: swap(0.88, 0.02, 0.9, 0.05), 1: swap(0.1, 0.8, 0.95, 0.0), 3: swap(0.89, 0.01, 0.3, 0.7)}
IDEAL = swap(0.9, 0.01, 0.99, 0.01)


def mixes(rows: int = 2, columns: int = 3) -> MixGrid:
    random = torch.Generator().manual_seed(0)
    mixed = torch.rand(rows, columns, 3, 8, 8, generator=random)
    return MixGrid(torch.rand(rows, 3, 8, 8, generator=random), torch.rand(columns, 3, 8, 8, generator=random), mixed)


def makers() -> dict[str, tuple[Callable[[], Figure], str]]:
    """Each figure, and what is said of it in words."""
    return {
        "grid": (lambda: figures_advmix.grid(mixes(), title="t"), figures_advmix.describe_grid(mixes())),
        "cuts": (
            lambda: figures_advmix.cuts(CUTS, chosen=2, ideal=IDEAL, title="t"),
            figures_advmix.describe_cuts(CUTS, 2),
        ),
        "accuracy_by_bias": (
            lambda: figures_advmix.accuracy_by_bias(CURVES, strong=["AdvMix"], published=["published"], title="t"),
            figures_advmix.describe_bias(CURVES),
        ),
        "differences_by_bias": (
            lambda: figures_advmix.differences_by_bias(DIFFERENCES, title="t"),
            figures_advmix.describe_differences(DIFFERENCES),
        ),
    }


@pytest.mark.parametrize("name", makers())
def test_every_figure_becomes_an_image_that_is_not_too_heavy(name):
    make, words = makers()[name]
    tag = figures.as_html(make(), words)
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', tag)[1])))
    assert picture.width == round(figures.WIDTH * figures.DPI) and picture.height < 2.5 * picture.width
    assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    assert len(tag) < 400_000 and words in tag.replace("&#x27;", "'")


def test_nothing_global_changes():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        for make, words in makers().values():
            figures.as_html(make(), words)
        assert dict(matplotlib.rcParams) == before


def lines_of(ax) -> dict[str, matplotlib.lines.Line2D]:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


# ---- grids -----------------------------------------------------------------------------------


def test_the_grid_has_each_picture_where_it_belongs():
    given, figure = mixes(2, 3), figures_advmix.grid(mixes(2, 3))
    drawn = {}
    for ax in figure.axes:
        box = ax.get_position()
        drawn[round(box.x0, 4), round(-box.y0, 4)] = ax.images[0].get_array()
    across, down = sorted({x for x, _ in drawn}), sorted({y for _, y in drawn})
    assert len(across) == 4 and len(down) == 3 and len(drawn) == 11, "no picture in the corner"

    def at(row: int, column: int) -> torch.Tensor:
        return torch.from_numpy(np.asarray(drawn[across[column], down[row]])).permute(2, 0, 1)

    assert all(torch.allclose(at(0, column + 1), given.styles[column]) for column in range(3))
    for row in range(2):
        assert torch.allclose(at(row + 1, 0), given.contents[row])
        assert all(torch.allclose(at(row + 1, column + 1), given.mixes[row, column]) for column in range(3))
    texts = {text.get_text() for text in figure.texts}
    assert {"style of ...", "content of ..."} <= texts


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 8), (8, 2)])
def test_pictures_of_a_grid_stay_on_the_figure_and_apart(rows, columns):
    boxes = [ax.get_position() for ax in figures_advmix.grid(mixes(rows, columns), "t").axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            assert one.x0 >= other.x1 or other.x0 >= one.x1 or one.y0 >= other.y1 or other.y0 >= one.y1


def test_the_words_for_a_grid_say_what_is_mixed():
    words = figures_advmix.describe_grid(mixes(2, 3), "digit", "colour")
    assert "2 rows and 3 columns" in words and "digit code of its row" in words and "colour code of its column" in words


# ---- cuts ------------------------------------------------------------------------------------


def test_labels_are_in_percent_and_colours_are_correlations_in_the_order_of_the_cuts():
    labels, colours = figures_advmix.cuts(CUTS, chosen=2, ideal=IDEAL).axes
    assert list(lines_of(labels)["mix: label of the content"].get_ydata()) == pytest.approx([10, 88, 89])
    assert list(lines_of(labels)["mix: label of the style"].get_ydata()) == pytest.approx([80, 2, 1])
    assert list(lines_of(labels)["own style: right"].get_ydata()) == pytest.approx([90, 90, 90])
    assert list(lines_of(colours)["mix: with the style's image"].get_ydata()) == pytest.approx([0.95, 0.9, 0.3])
    assert list(lines_of(colours)["mix: with the content's image"].get_ydata()) == pytest.approx([0, 0.05, 0.7])
    for ax in (labels, colours):
        assert set(lines_of(ax)["the cut that is used"].get_xdata()) == {2}
        assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "3", "exact"]
        drawn = [line for name, line in lines_of(ax).items() if name != "the cut that is used"]
        assert len({(line.get_marker(), line.get_linestyle()) for line in drawn}) == 3, "told apart without colour"
    bars = [
        sorted(line.get_ydata())
        for line in labels.lines
        if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert any(bar == pytest.approx([86, 90]) for bar in bars), "the interval of 88 %"
    exact = [line for line in labels.lines if len(line.get_xdata()) == 1]
    assert sorted(float(line.get_ydata()[0]) for line in exact) == pytest.approx([1, 90, 90])
    assert all(line.get_markerfacecolor() == "none" for line in exact)
    assert [tick.get_text() for tick in figures_advmix.cuts(CUTS).axes[0].get_xticklabels()] == ["1", "2", "3"]


def test_the_words_for_cuts_have_their_numbers():
    words = figures_advmix.describe_cuts(CUTS, 2)
    assert "cut 1: 10 % keep the label of the content, 80 % take that of the style" in words
    assert "correlate 0.30 with the style's image, 0.70 with the content's" in words
    assert "90 % of 200" in words and words.endswith("the cut that is used: 2.")


def test_cuts_that_were_not_measured_are_refused():
    for call in (figures_advmix.cuts, figures_advmix.describe_cuts):
        with pytest.raises(ValueError, match="there must be a cut"):
            call({})
        with pytest.raises(ValueError, match="cut 4 was not measured, only 1, 2, 3"):
            call(CUTS, chosen=4)


# ---- accuracy and differences ------------------------------------------------------------------


def test_bias_goes_from_strong_to_none():
    figure = figures_advmix.accuracy_by_bias(CURVES, strong=["AdvMix"], published=["published"])
    ax = figure.axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [".005", ".02", ".05", "none\n(no bias)"]
    lines = lines_of(ax)
    assert list(lines["AdvMix"].get_ydata()) == pytest.approx([84, 86, 82, 80])
    assert list(lines["nominal"].get_xdata()) == [1, 3] and list(lines["nominal"].get_ydata()) == pytest.approx(
        [40, 90]
    )
    assert list(lines["published"].get_ydata()) == pytest.approx([40.55, 84.5])
    assert lines["published"].get_linestyle() == "None", "not our run: points alone"
    assert lines["AdvMix"].get_linewidth() > 1.5 * lines["nominal"].get_linewidth()
    assert len(ax.collections) == 1, "an interval for the curve that has one"
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(78) and heights.max() == pytest.approx(88)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(CURVES)


def test_ten_methods_are_told_apart_without_colour():
    curves = {f"method {number}": curve(0.3 + 0.05 * number) for number in range(10)}
    ax = figures_advmix.accuracy_by_bias(curves).axes[0]
    looks = [(line.get_marker(), line.get_linestyle(), line._dash_pattern) for line in lines_of(ax).values()]
    assert len(looks) == 10 and len(set(map(str, looks))) == 10
    assert all(np.dot(to_rgb(line.get_color()), (0.2, 0.7, 0.1)) < 0.8 for line in ax.lines), "no yellow on white"


def test_the_words_for_curves_have_their_ends():
    words = figures_advmix.describe_bias(CURVES)
    assert "AdvMix 84.0 % (variance 0.005) to 80.0 % (unbiased)" in words
    assert "published 40.6 % (variance 0.02) to 84.5 % (variance 0.05)" in words
    assert "only 40.0 % (variance 0.02)." in figures_advmix.describe_bias({"only": {0.02: 0.4}})


def test_a_full_marker_is_a_difference_whose_interval_excludes_zero():
    figure = figures_advmix.differences_by_bias(DIFFERENCES)
    ax = figure.axes[0]
    dots = [line for line in ax.lines if len(line.get_xdata()) == 1]
    full = {round(float(dot.get_ydata()[0])): dot.get_markerfacecolor() != "white" for dot in dots[:3]}
    assert full == {3: True, 1: False, -5: True}
    assert dots[3].get_markerfacecolor() == "white", "one seed has no interval"
    bars = [
        sorted(line.get_ydata()) for line in ax.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1
    ]
    assert any(bar == pytest.approx([-7, -3]) for bar in bars)
    assert any(set(np.atleast_1d(line.get_ydata())) == {0} for line in ax.lines), "a line at zero"
    assert len({(dot.get_marker()) for dot in dots}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(DIFFERENCES)


def test_the_words_for_differences_have_their_intervals():
    words = figures_advmix.describe_differences(DIFFERENCES)
    assert "AdvMix minus RandMix, n = 5: variance 0.02: +3.0 (+1.0 to +5.0)" in words
    assert "unbiased: \N{MINUS SIGN}5.0 (\N{MINUS SIGN}7.0 to \N{MINUS SIGN}3.0)" in words
    assert "one seed, n = 1: variance 0.02: +3.0." in words
    uneven = {"a": {0.02: value(0.1, n=5), 0.05: value(0.1, n=3)}}
    assert "n = 3 to 5" in figures_advmix.describe_differences(uneven)


def test_what_cannot_be_drawn_is_refused():
    for call in (
        figures_advmix.accuracy_by_bias, figures_advmix.describe_bias, figures_advmix.differences_by_bias,
        figures_advmix.describe_differences,
    ):  # fmt: skip
        for curves in ({}, {"AdvMix": {}}):
            with pytest.raises(ValueError, match="at least one level of bias"):
                call(curves)
    for option in ("strong", "published"):
        with pytest.raises(ValueError, match="no curve is called AdvMx"):
            figures_advmix.accuracy_by_bias(CURVES, **{option: ["AdvMx"]})
