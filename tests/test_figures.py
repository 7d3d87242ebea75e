"""The figures: they draw the numbers they are given, can be read without colour or sight, and leave matplotlib as it was."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import seaborn
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from advbn_lib import figures
from advbn_lib.data.shifts import Shift
from advbn_lib.records import Estimate

ALT = "Two lines that cross."
NAMES = (
    "image_grid", "channel_grid", "curves", "bars", "strips", "instance_and_batch", "sorted_factors", "against",
    "shift_gallery", "accuracy_dots", "difference_forest",
)  # fmt: skip
ESTIMATES = {"clean": Estimate(0.9, 0.88, 0.92, 3), "contrast-3": Estimate(0.5, 0.4, 0.6, 3)}
LINES = {"one": [1.0, 2.0, 3.0], "two": [3.0, 2.0, 1.0]}


def make_all() -> dict:
    images = torch.rand(3, 3, 8, 8)
    return {
        "image_grid": figures.image_grid({"a": images, "b": images}, ["x", "y", "z\nz"], title="t"),
        "channel_grid": figures.channel_grid(images[0], torch.rand(6, 8, 8), title="t"),
        "curves": figures.curves([0, 1, 2], LINES, xlabel="x", ylabel="y", title="t", level=("l", 2.0), upright=("u", 1.0)),
        "bars": figures.bars({"a": {"m": 1.0, "s": 2.0}, "b": {"m": 3.0, "s": 4.0}}, xlabel="x", title="t", level=("l", 2.0)),
        "strips": figures.strips({"a": [1.0, 2.0, 9.0], "b": [10.0]}, ylabel="y", title="t", log=True),
        "instance_and_batch": figures.instance_and_batch(torch.rand(5, 4), torch.rand(4), ylabel="y", title="t"),
        "sorted_factors": figures.sorted_factors({"m": torch.tensor([2.1, -0.1, 1.0])}, eps=1.1, title="t"),
        "shift_gallery": figures.shift_gallery(images[0], [Shift("clean"), Shift("contrast", 1), Shift("contrast", 5), Shift("grey")]),
        "accuracy_dots": figures.accuracy_dots({"AdvBN": ESTIMATES, "live": {"clean": 0.8, "contrast-3": 0.3}}, title="t"),
        "difference_forest": figures.difference_forest({"a - b": ESTIMATES, "a - c": ESTIMATES}),
        "against": figures.against(torch.arange(3.0), {"g": torch.tensor([1.0, 0.0, 2.0])}, xlabel="x", ylabel="y", title="t"),
    }  # fmt: skip


def decode(tag: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', tag)[1])))


# ---- on the page ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_becomes_an_image_with_alt_text(name):
    tag = figures.as_html(make_all()[name], ALT)
    picture = decode(tag)
    assert picture.format == "PNG" and picture.width == round(figures.WIDTH * figures.DPI)
    assert f'alt="{ALT}"' in tag and tag.count("<img") == 1
    assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    assert len(tag) < 400_000, "too heavy for a page"


def test_alt_text_is_escaped_and_on_one_line():
    tag = figures.as_html(make_all()["curves"], 'The "loss" <rises>\n   steeply & far')
    assert 'alt="The &quot;loss&quot; &lt;rises&gt; steeply &amp; far"' in tag


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_alt_text_is_refused(alt):
    with pytest.raises(ValueError, match="alt text"):
        figures.show(make_all()["curves"], alt)


def test_show_displays_html_and_words(monkeypatch):
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append((data, raw)))
    figure = make_all()["curves"]
    figures.show(figure, ALT)
    assert shown == [({"text/html": figures.as_html(figure, ALT), "text/plain": ALT}, True)]


def test_same_figure_same_bytes():
    torch.manual_seed(0)
    first = {name: figures.as_html(figure, ALT) for name, figure in make_all().items()}
    torch.manual_seed(0)
    assert first == {name: figures.as_html(figure, ALT) for name, figure in make_all().items()}


def test_nothing_global_changes():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        for figure in make_all().values():
            figures.as_html(figure, ALT)
        assert dict(matplotlib.rcParams) == before


def test_pyplot_is_not_loaded_for_a_figure():
    """Neither is IPython: the library does not need it."""
    code = (
        "import sys, torch\nfrom advbn_lib import figures\nimport matplotlib._pylab_helpers as helpers\n"
        "figures.as_html(figures.curves([0, 1], {'a': [0, 1]}, xlabel='x', ylabel='y'), 'alt')\n"
        "assert not helpers.Gcf.figs, 'a pyplot figure is open'\nassert 'IPython' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=figures.__file__.rpartition("/advbn_lib/")[0])


# ---- what is drawn -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["curves", "bars", "against", "sorted_factors", "instance_and_batch", "strips"])
def test_charts_are_labelled(name):
    ax = make_all()[name].axes[0]
    assert ax.get_title(loc="left") == "t"
    assert ax.get_xlabel() or [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_ylabel() or [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_curves_draw_the_values_with_colour_and_marker():
    ax = make_all()["curves"].axes[0]
    drawn = {line.get_label(): line for line in ax.lines}
    for name, values in LINES.items():
        assert drawn[name].get_ydata().tolist() == values and drawn[name].get_xdata().tolist() == [0, 1, 2]
    palette = [to_rgb(colour) for colour in seaborn.color_palette("colorblind")]
    assert {to_rgb(drawn[name].get_color()) for name in LINES} <= set(palette)
    assert len({drawn[name].get_marker() for name in LINES}) == len(LINES)
    assert list(drawn["l"].get_ydata()) == [2, 2] and list(drawn["u"].get_xdata()) == [1, 1]
    assert ax.get_ylim()[0] == 0


def test_bars_have_the_values_as_lengths_and_differ_without_colour():
    ax = make_all()["bars"].axes[0]
    lengths = {container.get_label(): [bar.get_width() for bar in container] for container in ax.containers}
    assert lengths == {"m": [1, 3], "s": [2, 4]}
    assert len({container[0].get_hatch() for container in ax.containers}) == 2
    assert ax.yaxis_inverted(), "the first group stands at the top"


def test_strips_show_every_value_and_the_median():
    ax = make_all()["strips"].axes[0]
    dots = [
        sorted(dot for _, dot in collection.get_offsets())
        for collection in ax.collections
        if len(collection.get_offsets())
    ]
    assert [1, 2, 9] in dots and [10] in dots
    bars = [
        path.vertices[0, 1]
        for collection in ax.collections
        for path in collection.get_paths()
        if len(path.vertices) == 2
    ]
    assert bars == [2, 10]
    assert ax.get_yscale() == "log"


def test_sorted_factors_are_sorted_between_the_ends():
    ax = make_all()["sorted_factors"].axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in ax.lines}
    assert lines["m"] == pytest.approx([-0.1, 1.0, 2.1])
    assert lines["end of the interval"] == pytest.approx([-0.1, -0.1]) and lines["no change"] == pytest.approx([1, 1])


def test_against_draws_pairs_and_the_diagonal():
    ax = make_all()["against"].axes[0]
    assert ax.collections[0].get_offsets().tolist() == [[0, 1], [1, 0], [2, 2]]
    assert list(ax.lines[0].get_xdata()) == list(ax.lines[0].get_ydata()) == [0, 2]


def test_instance_and_batch_draws_each_image_and_the_batch():
    values, batch = torch.rand(5, 4), torch.rand(4)
    ax = figures.instance_and_batch(values, batch, ylabel="y").axes[0]
    dots = [np.asarray(c.get_offsets())[:, 1] for c in ax.collections if len(c.get_offsets()) == 5]
    assert np.stack(dots, 1) == pytest.approx(values.numpy())
    bars = [path.vertices[0, 1] for c in ax.collections for path in c.get_paths() if len(path.vertices) == 2]
    assert bars == pytest.approx(batch.tolist())


def test_image_grid_shows_each_image_in_its_place():
    rows = {"a": torch.rand(2, 3, 4, 4), "b": torch.rand(2, 3, 4, 4)}
    figure = figures.image_grid(rows, ["left", "right"])
    shown = [torch.as_tensor(np.asarray(ax.images[0].get_array())).permute(2, 0, 1) for ax in figure.axes]
    torch.testing.assert_close(torch.stack(shown), torch.cat(list(rows.values())))
    assert [figure.axes[i].get_ylabel() for i in (0, 2)] == ["a", "b"]
    assert [figure.axes[i].get_title() for i in (0, 1)] == ["left", "right"]


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ({}, None, "no rows"),
        ({"a": torch.rand(2, 3, 4, 4), "b": torch.rand(3, 3, 4, 4)}, None, "a: 2, b: 3"),
        ({"a": torch.rand(2, 3, 4, 4)}, ["one"], "2 images a row, but 1"),
    ],
)
def test_image_grid_refuses_what_is_no_grid(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        figures.image_grid(rows, columns)


def test_channel_grid_shows_all_channels_on_one_scale():
    features = torch.rand(6, 8, 8)
    figure = figures.channel_grid(torch.rand(3, 8, 8), features, columns=4)
    visible = [ax for ax in figure.axes if ax.get_visible()]
    assert [ax.get_title() for ax in visible] == ["the image", *(f"channel {i}" for i in range(6))]
    assert {ax.images[0].get_clim() for ax in visible[1:]} == {(0.0, float(features.max()))}
    assert len(figure.axes) - len(visible) == 1


def test_accuracies_are_drawn_in_percent_with_their_intervals():
    axis = figures.accuracy_dots({"AdvBN": ESTIMATES}).axes[0]
    drawn = [tuple(np.round(line.get_xdata(), 6)) for line in axis.lines]
    assert (88.0, 92.0) in drawn and (40.0, 60.0) in drawn
    assert (90.0,) in drawn and (50.0,) in drawn
    assert [label.get_text() for label in axis.get_yticklabels()] == ["clean", "contrast, severity 3"]


def test_differences_say_how_many_seeds_and_where_zero_is():
    axis = figures.difference_forest({"a - b": ESTIMATES}).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["clean, n = 3", "contrast-3, n = 3"]
    assert [0, 0] in [list(line.get_xdata()) for line in axis.lines]


def test_the_gallery_puts_each_severity_in_its_column():
    image = torch.rand(3, 8, 8)
    figure = figures.shift_gallery(image, [Shift("clean"), Shift("brightness", 3), Shift("contrast", 1), Shift("contrast", 3)])
    shown = np.array([axis.images[0].get_array() for axis in figure.axes]).reshape(2, 3, 8, 8, 3)
    assert np.allclose(shown[:, 0], image.permute(1, 2, 0))
    assert np.allclose(shown[0, 1], 1), "brightness has no severity 1 here: the place stays white"
    assert shown[1, 2].std() < shown[1, 1].std() < shown[1, 0].std(), "less contrast to the right"


def test_a_table_is_markdown_and_its_rows_are_whole():
    text = figures.as_markdown(["a", "b"], [["1", "x|y"]])
    assert text == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    with pytest.raises(ValueError, match="2 cells"):
        figures.as_markdown(["a", "b"], [["1"]])
