"""The figures of the comparison: what is drawn is what was given, and it can be read without colour."""

from __future__ import annotations

import math

import numpy as np
import pytest

from advbn_lib.figures import as_html
from advbn_lib.figures_side_by_side import (
    MAP,
    by_mean_rank,
    describe_gain_and_cost,
    describe_heat_map,
    describe_ranks,
    gain_and_cost,
    goodness,
    heat_map,
    in_cell,
    rank_plot,
    ranks,
)
from advbn_lib.records import Estimate


def value(mean: float, half: float = 0.01) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 3)


ONE_SEED = Estimate(0.5, math.nan, math.nan, 1)
ROWS = {
    "natural": {"clean": value(0.9), "error": value(0.2), "cost": value(1.0, 0.0)},
    "AdvBN": {"clean": value(0.8), "error": value(0.1), "cost": value(3.3, 0.1)},
    "PGD": {"clean": ONE_SEED, "cost": value(120.0, 2.0)},
}


def colour_of(ax, across: int, place: int) -> tuple[float, ...]:
    [patch] = [
        one for one in ax.collections
        if np.allclose(one.get_paths()[0].get_extents().intervalx.mean(), across)
        and np.allclose(one.get_paths()[0].get_extents().intervaly.mean(), place)
    ]  # fmt: skip
    return tuple(patch.get_facecolor()[0])


def test_the_heat_map_has_every_value_with_its_interval():
    figure = heat_map(ROWS, low_is_good=("error", "cost"), ratios=("cost",), title="All")
    [ax] = figure.axes
    texts = {text.get_text() for text in ax.texts}
    assert texts == {
        "90.0\n±1.0",
        "80.0\n±1.0",
        "50.0",
        "20.0\n±1.0",
        "10.0\n±1.0",
        "1.0\n±0.0",
        "3.3\n±0.1",
        "120\n±2.0",
    }
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(ROWS)
    assert "alt=" in as_html(figure, describe_heat_map(ROWS, ratios=("cost",)))


def test_light_is_good_and_each_column_has_its_own_scale():
    [ax] = heat_map(ROWS, low_is_good=("error", "cost"), ratios=("cost",)).axes
    best, worst = MAP(1.0), MAP(0.0)
    assert colour_of(ax, 0, 0) == best and colour_of(ax, 0, 2) == worst
    assert colour_of(ax, 1, 1) == best and colour_of(ax, 1, 0) == worst, "a low error is good"
    assert colour_of(ax, 2, 0) == best and colour_of(ax, 2, 2) == worst


def test_lightness_rises_with_goodness_so_that_grey_says_the_same():
    lightness = [np.dot(np.power(MAP(share)[:3], 2.2), (0.2126, 0.7152, 0.0722)) for share in np.linspace(0, 1, 11)]
    assert lightness == sorted(lightness) and lightness[-1] - lightness[0] > 0.5


def test_goodness_of_equal_values_is_in_the_middle():
    assert goodness({"a": 1.0, "b": 1.0}) == {"a": 0.5, "b": 0.5} and goodness({}) == {}
    assert goodness({"a": 1.0, "b": 2.0, "c": 3.0}, low_is_good=True) == {"a": 1.0, "b": 0.5, "c": 0.0}


def test_a_negative_value_has_a_minus_sign():
    assert in_cell(value(-0.053)) == "\N{MINUS SIGN}5.3\n±1.0"


def test_too_many_columns_and_no_rows_are_refused():
    with pytest.raises(ValueError, match="make two figures"):
        heat_map({"a": {str(number): value(0.5) for number in range(12)}})
    for draw in (heat_map, rank_plot, ranks):
        with pytest.raises(ValueError, match="load records"):
            draw({})


def test_the_words_name_the_best_and_the_worst():
    words = describe_heat_map(ROWS, low_is_good=("error", "cost"), ratios=("cost",))
    assert "clean: best natural (90.0), worst PGD (50.0)" in words
    assert "error: best AdvBN (10.0), worst natural (20.0)" in words and "worst PGD (120)" in words


VALUES = {
    "a": {"x": [0.9, 0.5], "e": [0.3, 0.3]},
    "b": {"x": [0.8, 0.5], "e": [0.1, 0.2]},
    "c": {"x": [0.7, 0.9], "e": [0.2, 0.1]},
}


def test_ranks_are_those_of_each_seed_and_ties_share():
    found = ranks(VALUES, low_is_good=("e",))
    assert found == {
        "a": {"x": [1, 2.5], "e": [3, 3]},
        "b": {"x": [2, 2.5], "e": [1, 2]},
        "c": {"x": [3, 1], "e": [2, 1]},
    }
    assert by_mean_rank(found) == ["c", "b", "a"]
    assert describe_ranks(found).endswith("c (1.8), b (1.9), a (2.4).")


def test_ranks_need_the_same_columns_and_seeds():
    for row in ({"x": [0.1]}, {"x": [0.1], "e": [0.1, 0.2]}):
        with pytest.raises(ValueError, match="c has not the columns and seeds"):
            ranks({**VALUES, "c": row})


def test_the_rank_plot_has_a_marker_and_a_bar_for_each_method_and_column():
    found = ranks(VALUES, low_is_good=("e",))
    [ax] = rank_plot(found, "Ranks").axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["c", "b", "a"]
    markers = {line.get_label(): line for line in ax.lines if line.get_marker() != "None"}
    assert markers.keys() == {"x", "e"} and list(markers["x"].get_xdata()) == [2, 2.25, 1.75]
    assert len({line.get_marker() for line in markers.values()}) == 2, "not by colour alone"
    bars = [tuple(line.get_xdata()) for line in ax.lines if line.get_marker() == "None" and len(line.get_xdata()) == 2]
    assert {(1, 3), (2, 2.5), (1, 2.5), (1, 2), (3, 3)} <= set(bars)


def test_gain_over_cost_is_numbered_and_has_intervals():
    points = {"AdvBN": (value(3.3), value(0.02)), "AugMix": (value(18.6), value(-0.03)), "once": (value(1.0), ONE_SEED)}
    [ax] = gain_and_cost(points, xlabel="cost", ylabel="points").axes
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3"]
    assert np.allclose([text.get_position() for text in ax.texts], [(3.3, 2.0), (18.6, -3.0), (1.0, 50.0)])
    bars = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 2 and line.get_linestyle() == "-"]
    assert np.allclose(bars, [[1, 3], [-4, -2]])
    assert describe_gain_and_cost(points).startswith(
        "Gain of 3 methods over their cost. once: 50.0 points at 1.0; AdvBN: 2.0"
    )
    for bad in ({}, {"free": (value(0.0), value(0.1))}):
        with pytest.raises(ValueError, match="above 0"):
            gain_and_cost(bad, xlabel="", ylabel="")


def test_numbers_of_equal_methods_stand_beside_one_another_and_lead_to_their_points():
    names = [f"AdvBN + AugMix, adv. {number}" for number in range(6)]  # as long as the arenas have them
    points = {name: (value(1.0), value(0.1)) for name in names} | {"alone": (value(1.5), value(0.1))}
    figure = gain_and_cost(points, xlabel="cost", ylabel="points")
    [ax], [legend] = figure.axes, figure.legends
    figure.draw_without_rendering()
    centres = ax.transData.transform([text.get_position() for text in ax.texts])
    apart = [np.hypot(*(one - other)) for place, one in enumerate(centres) for other in centres[:place]]
    assert min(apart) > 15 * figure.dpi / 72, "a disk is 15 points wide"
    assert ax.texts[0].get_position() == pytest.approx((1.0, 10)) and ax.texts[-1].get_position() == pytest.approx(
        (1.5, 10)
    )
    leads = [line for line in ax.lines if line.get_linewidth() == 1]
    assert len(leads) == 5, "all but the first of the equal ones"
    for lead, text in zip(leads, ax.texts[1:], strict=False):
        assert lead.get_xydata()[0] == pytest.approx((1.0, 10)) and lead.get_xydata()[1] == pytest.approx(
            text.get_position()
        )
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, "the legend is whole"


def test_costs_that_are_nearly_the_same_have_an_even_scale_of_their_own():
    scales = {}
    for costs in ((0.8, 1.0), (0.5, 1.0)):
        points = {str(cost): (value(cost), value(0.1)) for cost in costs}
        [ax] = gain_and_cost(points, xlabel="cost", ylabel="points").axes
        scales[ax.get_xscale()] = ax.get_xlim()
    assert scales["linear"] == pytest.approx((0.75, 1.05)) and scales["log"] == pytest.approx((2**-1.2, 2**0.2))


@pytest.mark.parametrize("costs", [(2.5, 3.3), (2.0, 2.0), (0.7, 40.0)])
def test_the_axis_of_costs_has_two_ticks_or_more(costs):
    points = {str(number): (value(cost), value(0.1)) for number, cost in enumerate(costs)}
    [ax] = gain_and_cost(points, xlabel="cost", ylabel="points").axes
    low, high = ax.get_xlim()
    assert sum(low <= tick <= high for tick in ax.get_xticks()) >= 2
    assert low < min(costs) and max(costs) < high
