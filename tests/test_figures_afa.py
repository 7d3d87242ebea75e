"""The figures of the chapters on pixel attacks and AFA: they draw what they are given, and can be read without colour or sight."""

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

from advbn_lib import figures, figures_afa
from advbn_lib.records import Estimate

STRENGTHS = (0, 1, 2, 4, 8)


def estimates(start: float, seeds: int = 3) -> dict[float, Estimate]:
    half = 0.01 if seeds > 1 else math.nan
    means = {strength: start - 0.03 * strength for strength in STRENGTHS}
    return {strength: Estimate(mean, mean - half, mean + half, seeds) for strength, mean in means.items()}


CURVES = {"AFA": estimates(0.8), "natural": estimates(0.9, 1), "worst case": {8: 0.3, 4: 0.5}}
PANELS = {"attack": [[0, 1, 2, 3, 4], [0, -1, -1, 0, 1]], "noise": [[0, 0, 0.1, 0.1, 0.2], [0, 0, 0, 0, 0.1]]}
LAYERS = {f"layer{k}": {s: (min(0.2 * k + 0.1 * s, 1.0), 0.1) for s in STRENGTHS} for k in range(4)}


def pictures() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    return images, {"attacked": images + 8 / 255, "noise": images - 4 / 255}


ANSWERS = {"image": ["cat 90 %", "dog 80 %"], "attacked": ["dog 99 %", "cat 99 %"], "noise": ["cat 88 %", "dog 70 %"]}


def makers() -> dict[str, Callable[[], Figure]]:
    images, attacked = pictures()
    surface = torch.arange(12.0).view(3, 4)
    return {
        "accuracy_by_strength": lambda: figures_afa.accuracy_by_strength(
            CURVES, strong=["AFA"], trained_up_to=8, title="t"
        ),
        "statistics_by_strength": lambda: figures_afa.statistics_by_strength(
            PANELS, STRENGTHS, channels=[3, 9], title="t"
        ),
        "weights_by_strength": lambda: figures_afa.weights_by_strength(LAYERS, trained_up_to=4, title="t"),
        "adversarial_images": lambda: figures_afa.adversarial_images(
            images, attacked, ANSWERS, magnify=255 / 16, title="t"
        ),
        "loss_surface": lambda: figures_afa.loss_surface(
            surface, [0, 1, 2, 3], [-1, 0, 1], xlabel="x", ylabel="y", path=[(0, 0), (1, 0.5), (3, 1)], title="t"
        ),
    }


def lines_of(ax) -> dict[str, matplotlib.lines.Line2D]:
    return {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}


@pytest.mark.parametrize("name", makers())
def test_every_figure_becomes_an_image_that_is_not_too_heavy(name):
    tag = figures.as_html(makers()[name](), "What it shows.")
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', tag)[1])))
    assert picture.width == round(figures.WIDTH * figures.DPI) and picture.height < 2.5 * picture.width
    assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    assert len(tag) < 400_000


def test_nothing_global_changes():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        for make in makers().values():
            figures.as_html(make(), "What it shows.")
        assert dict(matplotlib.rcParams) == before


def test_accuracy_is_drawn_in_percent_at_its_strengths():
    figure = makers()["accuracy_by_strength"]()
    ax = figure.axes[0]
    lines = lines_of(ax)
    assert list(lines["AFA"].get_xdata()) == list(STRENGTHS)
    assert list(lines["AFA"].get_ydata()) == pytest.approx([80, 77, 74, 68, 56])
    assert list(lines["worst case"].get_xdata()) == [4, 8], "in the order of the strengths"
    assert list(lines["worst case"].get_ydata()) == pytest.approx([50, 30])
    assert lines["AFA"].get_linewidth() > 1.5 * lines["natural"].get_linewidth()
    assert set(lines["strongest in training"].get_xdata()) == {8}
    assert len(ax.collections) == 1, "an interval for the curve that has one"
    heights = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(55) and heights.max() == pytest.approx(81)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "1", "2", "4", "8"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*CURVES, "strongest in training"}


def test_ten_curves_are_told_apart_without_colour():
    curves = {f"method {k}": estimates(0.5 + 0.03 * k) for k in range(10)}
    ax = figures_afa.accuracy_by_strength(curves).axes[0]
    looks = [(line.get_marker(), line.get_linestyle(), line._dash_pattern) for line in lines_of(ax).values()]
    assert len(looks) == 10 and len(set(map(str, looks))) == 10
    assert all(np.dot(to_rgb(line.get_color()), (0.2, 0.7, 0.1)) < 0.8 for line in ax.lines), "no yellow on white"


def test_accuracy_refuses_what_cannot_be_drawn():
    for curves in ({}, {"AFA": {}}):
        with pytest.raises(ValueError, match="at least one strength"):
            figures_afa.accuracy_by_strength(curves)
    with pytest.raises(ValueError, match="no curve is called AFN"):
        figures_afa.accuracy_by_strength(CURVES, strong=["AFN"])


def test_statistics_have_a_line_a_channel_on_one_scale():
    figure = makers()["statistics_by_strength"]()
    left, right = figure.axes
    for ax, lines in zip((left, right), PANELS.values()):
        drawn = [line for line in ax.lines if len(line.get_xdata()) == len(STRENGTHS)]
        assert [list(line.get_ydata()) for line in drawn] == lines
        assert len({(line.get_marker(), line.get_linestyle()) for line in drawn}) == 2
    assert left.get_ylim() == right.get_ylim()
    assert [left.get_title("left"), right.get_title("left")] == ["attack", "noise"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["channel 3", "channel 9"]
    assert not figures_afa.statistics_by_strength(PANELS, STRENGTHS).legends


def test_statistics_refuse_lines_that_do_not_fit():
    with pytest.raises(ValueError, match="same channels, got no panels"):
        figures_afa.statistics_by_strength({}, STRENGTHS)
    with pytest.raises(ValueError, match="same channels, got attack: 2, noise: 1"):
        figures_afa.statistics_by_strength({**PANELS, "noise": PANELS["noise"][:1]}, STRENGTHS)
    with pytest.raises(ValueError, match="same channels"):
        figures_afa.statistics_by_strength(PANELS, STRENGTHS, channels=[1])
    with pytest.raises(ValueError, match="for each of the 4 strengths"):
        figures_afa.statistics_by_strength(PANELS, STRENGTHS[1:])


def test_weights_have_a_panel_a_layer_and_a_band():
    figure = makers()["weights_by_strength"]()
    shown = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title("left") for ax in shown] == list(LAYERS)
    means = [points[strength][0] for strength in STRENGTHS for points in [LAYERS["layer1"]]]
    assert list(shown[1].lines[0].get_ydata()) == pytest.approx(means)
    band = shown[1].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.1) and band.max() == 1, "cut to the possible weights"
    numbered = [ax.xaxis.get_tick_params()["labelbottom"] for ax in shown]
    assert numbered == [False, True, True, True], "the lowest panel of each column has numbers"


def test_weights_refuse_what_is_none():
    with pytest.raises(ValueError, match="at least one strength"):
        figures_afa.weights_by_strength({"bn1": {}})
    for pair in ((1.2, 0.1), (-0.1, 0.1), (0.5, -0.1), (math.nan, 0.1)):
        with pytest.raises(ValueError, match="bn1: a weight is from 0 to 1"):
            figures_afa.weights_by_strength({"bn1": {0: pair}})


def test_changes_are_drawn_around_grey_and_answers_below():
    figure = makers()["adversarial_images"]()
    images, attacked = pictures()
    drawn = np.array([ax.images[0].get_array() for ax in figure.axes]).reshape(2, 5, 8, 8, 3)
    as_drawn = images.permute(0, 2, 3, 1).numpy()
    assert np.allclose(drawn[:, 0], as_drawn) and np.allclose(drawn[:, 2], as_drawn + 8 / 255)
    assert np.allclose(drawn[:, 1], 1, atol=1e-5), "a change of the whole radius up is white"
    assert np.allclose(drawn[:, 3], 0.25, atol=1e-5), "half of it down is dark grey"
    below = [ax.get_xlabel().replace("\N{NO-BREAK SPACE}", " ") for ax in figure.axes]
    assert below == ["cat 90 %", "", "dog 99 %", "", "cat 88 %", "dog 80 %", "", "cat 99 %", "", "dog 70 %"]
    assert [ax.get_title() for ax in figure.axes[:5]] == [
        "image", "change × 15.9", "attacked", "change × 15.9", "noise"
    ]  # fmt: skip


def test_images_that_do_not_fit_are_refused():
    images, attacked = pictures()
    with pytest.raises(ValueError, match=r"attacked has shape \(1, 3, 8, 8\)"):
        figures_afa.adversarial_images(images, {"attacked": attacked["attacked"][:1]}, magnify=10)
    with pytest.raises(ValueError, match="magnify above 0; got 1 attacks and 0"):
        figures_afa.adversarial_images(images, {"attacked": images}, magnify=0)
    with pytest.raises(ValueError, match="there must be an attack"):
        figures_afa.adversarial_images(images, {}, magnify=1)
    for answers in ({**ANSWERS, "noise": ["cat"]}, {"image": ANSWERS["image"]}):
        with pytest.raises(ValueError, match="2 texts for each of: image, attacked, noise; got"):
            figures_afa.adversarial_images(images, attacked, answers, magnify=10)


def test_the_surface_has_its_values_where_they_belong():
    ax = makers()["loss_surface"]().axes[0]
    assert np.allclose(ax.collections[0].get_array().reshape(3, 4), np.arange(12).reshape(3, 4))
    path = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert list(path[0].get_xdata()) == [0, 1, 3] and list(path[0].get_ydata()) == [0, 0.5, 1]
    figures.as_html(
        figures_afa.loss_surface(torch.ones(2, 2), [0, 1], [0, 1], xlabel="x", ylabel="y"), "A flat surface."
    )


def test_a_surface_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 2\), 2 or more, got \(2, 3\)"):
        figures_afa.loss_surface(torch.ones(2, 3), [0, 1], [0, 1, 2], xlabel="x", ylabel="y")
    with pytest.raises(ValueError, match="must rise"):
        figures_afa.loss_surface(torch.ones(2, 2), [1, 0], [0, 1], xlabel="x", ylabel="y")
