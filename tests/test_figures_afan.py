"""The figures of the A-FAN chapters: they draw what they are given, and can be read without colour or sight."""

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
from matplotlib.patches import Rectangle
from PIL import Image

from advbn_lib import figures, figures_afan
from advbn_lib.figures_afan import Boxes
from advbn_lib.records import Estimate

SURE, SINGLE = Estimate(0.012, 0.004, 0.02, 3), Estimate(-0.005, math.nan, math.nan, 1)
POINTS = {"A-FAN": (5.5, SURE), "noise": (2.0, SINGLE)}
TRUTH = [Boxes(torch.tensor([[2.0, 3.0, 12.0, 13.0]]), ["RBC"]), Boxes(torch.empty(0, 4), [])]
FOUND = [Boxes(torch.tensor([[3.0, 3.0, 13.0, 12.0], [20.0, 1.0, 30.0, 9.0]]), ["RBC 0.9", "WBC 0.6"]), TRUTH[1]]
CLASSES = ("sky", "road", "tree")


def mask() -> torch.Tensor:
    """Sky above, road below, no tree, two rows without a label."""
    rows = torch.tensor([0] * 8 + [255] * 2 + [1] * 6, dtype=torch.uint8)
    return rows[:, None].expand(16, 20).clone()


def makers() -> dict[str, Callable[[], Figure]]:
    generator = torch.Generator().manual_seed(0)
    features, image = torch.rand(4, 8, 8, generator=generator), torch.rand(3, 16, 32, generator=generator)
    changed = {"worst": features + 0.01, "mixed": features - 0.002}
    return {
        "feature_changes": lambda: figures_afan.feature_changes(features, changed, [1, 3], "t"),
        "gain_against_time": lambda: figures_afan.gain_against_time(POINTS, xlabel="x", ylabel="y", title="t"),
        "boxes_on_images": lambda: figures_afan.boxes_on_images(
            [image] * 2, {"truth": TRUTH, "found": FOUND}, title="t"
        ),
        "masks_on_images": lambda: figures_afan.masks_on_images([image[:, :, :20]], {"truth": [mask()]}, CLASSES, "t"),
    }


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


def test_feature_changes_are_on_one_scale_with_zero_in_the_middle():
    figure = makers()["feature_changes"]()
    pictures = [ax.images[0] for ax in figure.axes if ax.images]
    drawn = [image for image in pictures if image.get_cmap().name == "PuOr"]
    assert len(drawn) == 4 and len(pictures) == 6
    assert [image.get_clim() for image in drawn] == [pytest.approx((-0.01, 0.01), rel=1e-4)] * 4
    means = [float(image.get_array().mean()) for image in drawn]
    assert means == pytest.approx([0.01, -0.002] * 2, rel=1e-3)


def test_feature_changes_refuse_what_cannot_be_drawn():
    features = torch.rand(4, 8, 8)
    with pytest.raises(ValueError, match=r"worst has shape \(4, 4, 8\)"):
        figures_afan.feature_changes(features, {"worst": features[:, :4]}, [0])
    with pytest.raises(ValueError, match="nothing was changed"):
        figures_afan.feature_changes(features, {"same": features}, [0])


def test_gain_against_time_draws_points_and_intervals_and_numbers_them():
    figure = makers()["gain_against_time"]()
    ax = figure.axes[0]
    lines = [line for line in ax.lines if line.get_label()[:1].isdigit()]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines] == [
        (5.5, pytest.approx(1.2)),
        (2.0, pytest.approx(-0.5)),
    ]
    assert [line.get_label() for line in lines] == ["1  A-FAN", "2  noise"]
    assert [text.get_text() for text in ax.texts] == ["1", "2"]
    assert len({(line.get_marker(), to_rgb(line.get_color())) for line in lines}) == 2
    bars = [
        list(line.get_ydata())
        for line in ax.lines
        if len(line.get_xdata()) == 2 and list(line.get_xdata()) == [5.5, 5.5]
    ]
    assert bars == [pytest.approx([0.4, 2.0])]
    assert ax.get_xlim()[0] < 2 and ax.get_xlim()[1] > 5.5


def test_times_of_any_unit_have_ticks():
    for times in ((60, 400), (0.01, 0.02), (1, 1.01), (1e-3, 1e4)):
        points = {str(number): (time, SURE) for number, time in enumerate(times)}
        ax = figures_afan.gain_against_time(points, xlabel="x", ylabel="y").axes[0]
        assert 1 <= len(ax.get_xticks()) <= 12


def test_numbers_of_no_class_are_unlabelled():
    masks = {"truth": [torch.tensor([[0, -1], [255, -100]]).repeat_interleave(8, 0)]}
    figure = figures_afan.masks_on_images([torch.rand(3, 16, 2)], masks, CLASSES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"0 {CLASSES[0]}", "no label"]


def test_gain_against_time_refuses_times_that_are_none():
    with pytest.raises(ValueError, match="no method"):
        figures_afan.gain_against_time({}, xlabel="x", ylabel="y")
    with pytest.raises(ValueError, match="above 0: noise"):
        figures_afan.gain_against_time({"noise": (0.0, SURE)}, xlabel="x", ylabel="y")


def test_boxes_are_where_they_are_said_to_be():
    figure = makers()["boxes_on_images"]()
    first, second = figure.axes[:2]
    outlines = [patch for patch in first.patches if isinstance(patch, Rectangle)]
    places = [(patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()) for patch in outlines]
    assert places[::2] == places[1::2], "each box has a light rim"
    assert places[::2] == [(2, 3, 10, 10), (3, 3, 10, 9), (20, 1, 10, 8)]
    assert [patch.get_linestyle() for patch in outlines[1::2]] == ["-", "--", "--"], "told apart without colour"
    assert [text.get_text() for text in first.texts] == ["RBC", "RBC 0.9", "WBC 0.6"]
    assert not second.patches and not second.texts
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truth", "found"]


def test_boxes_need_words_and_images():
    image = torch.rand(3, 8, 8)
    with pytest.raises(ValueError, match="truth: boxes of 2 images for 1 images"):
        figures_afan.boxes_on_images([image], {"truth": TRUTH})
    with pytest.raises(ValueError, match="needs its words"):
        figures_afan.boxes_on_images([image], {"truth": [Boxes(torch.zeros(2, 4), ["a"])]})


def test_masks_have_a_colour_and_a_number_a_class():
    figure = makers()["masks_on_images"]()
    ax = figure.axes[1]
    picture = ax.images[0].get_array()
    palette = figures_afan.class_colours(3)
    assert (
        np.allclose(picture[:8], palette[0])
        and np.allclose(picture[8:10], figures_afan.VOID)
        and np.allclose(picture[10:], palette[1])
    )
    placed = {text.get_text(): (text.get_position()[1], text.get_position()[0]) for text in ax.texts}
    assert placed.keys() == {"0", "1"}, "the tree is nowhere"
    assert placed["0"][0] < 8 and placed["1"][0] >= 10
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0 sky", "1 road", "no label"]


def test_the_number_stands_deep_inside_its_region():
    """In a ring of road around a tree, the middle of the road is in the tree; a thin spur is a poor place, too."""
    ring = torch.full((24, 32), 2)
    ring[2:22, 2:20] = 1
    ring[8:16, 6:14] = 0
    ring[11, 20:32] = 1
    ax = figures_afan.masks_on_images([torch.rand(3, 24, 32)], {"truth": [ring]}, CLASSES).axes[1]
    for text in ax.texts:
        column, row = text.get_position()
        around = ring[row - 1 : row + 2, column - 1 : column + 2]
        assert around.numel() == 9 and (around == int(text.get_text())).all()
    assert len(ax.texts) == 3


def test_a_region_that_fills_the_image_has_its_number():
    ax = figures_afan.masks_on_images([torch.rand(3, 9, 9)], {"truth": [torch.zeros(9, 9)]}, CLASSES).axes[1]
    assert [(text.get_text(), text.get_position()) for text in ax.texts] == [("0", (4, 4))]


def test_masks_and_images_must_be_as_many():
    with pytest.raises(ValueError, match="truth: 2 masks for 1 images"):
        figures_afan.masks_on_images([torch.rand(3, 16, 20)], {"truth": [mask(), mask()]}, CLASSES)


@pytest.mark.parametrize("count", [1, 10, 11, 21, 30])
def test_class_colours_differ(count):
    colours = figures_afan.class_colours(count)
    assert colours.shape == (count, 3) and colours.min() >= 0 and colours.max() <= 1
    assert len({tuple(colour.round(3)) for colour in colours}) == count
