"""The figures: they draw the numbers they are given, can be read without colour or sight, and leave matplotlib as it was."""

from __future__ import annotations

import base64
import io
import math
import re
import subprocess
import sys
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
import seaborn
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from advbn_lib import figures
from advbn_lib.data.shifts import CORRUPTIONS, STYLES, WITHOUT_SEVERITY, Shift
from advbn_lib.records import Estimate

ALT = "Two lines that cross."
NAMES = (
    "image_grid", "channel_grid", "curves", "bars", "strips", "instance_and_batch", "sorted_factors", "against",
    "shift_gallery", "accuracy_dots", "difference_forest", "dose", "difference_map", "accuracy_map",
)  # fmt: skip
ESTIMATES = {"clean": Estimate(0.9, 0.88, 0.92, 3), "contrast-3": Estimate(0.5, 0.4, 0.6, 3)}
# One that excludes zero, one that does not, one of a single seed.
SURE, UNSURE, SINGLE = (
    Estimate(0.031, 0.02, 0.042, 3),
    Estimate(-0.01, -0.03, 0.01, 3),
    Estimate(0.05, math.nan, math.nan, 1),
)
MAP = {"snow": {"a - b": SURE, "a - c": UNSURE}, "painting_boat": {"a - b": SINGLE}}
GROUPS = {"weather": ("snow", "frost"), "blur": ("zoom_blur",), "paintings": ("painting_boat",)}
LINES = {"one": [1.0, 2.0, 3.0], "two": [3.0, 2.0, 1.0]}


def makers() -> dict[str, Callable[[], Figure]]:
    """One figure of each kind."""
    images = torch.rand(3, 3, 8, 8)
    return {
        "image_grid": lambda: figures.image_grid({"a": images, "b": images}, ["x", "y", "z\nz"], title="t"),
        "channel_grid": lambda: figures.channel_grid(images[0], torch.rand(6, 8, 8), title="t"),
        "curves": lambda: figures.curves([0, 1, 2], LINES, xlabel="x", ylabel="y", title="t", level=("l", 2.0), upright=("u", 1.0)),
        "bars": lambda: figures.bars({"a": {"m": 1.0, "s": 2.0}, "b": {"m": 3.0, "s": 4.0}}, xlabel="x", title="t", level=("l", 2.0)),
        "strips": lambda: figures.strips({"a": [1.0, 2.0, 9.0], "b": [10.0]}, ylabel="y", title="t", log=True),
        "instance_and_batch": lambda: figures.instance_and_batch(torch.rand(5, 4), torch.rand(4), ylabel="y", title="t"),
        "sorted_factors": lambda: figures.sorted_factors({"m": torch.tensor([2.1, -0.1, 1.0])}, eps=1.1, title="t"),
        "shift_gallery": lambda: figures.shift_gallery(images[0], [Shift("clean"), Shift("contrast", 1), Shift("contrast", 5), Shift("grey")]),
        "accuracy_dots": lambda: figures.accuracy_dots({"AdvBN": ESTIMATES, "live": {"clean": 0.8, "contrast-3": 0.3}}, title="t"),
        "difference_forest": lambda: figures.difference_forest({"a - b": ESTIMATES, "a - c": ESTIMATES}),
        "dose": lambda: figures.dose([0.2, 0.5], {"a": [SURE, UNSURE], "b": [None, SINGLE]}, xlabel="x", ylabel="y", title="t", level=("l", 0.0)),
        "difference_map": lambda: figures.difference_map(MAP, "t", GROUPS),
        "accuracy_map": lambda: figures.accuracy_map({"snow": {"1": 0.9, "5": SURE}, "fog": {"1": 1.0, "5": 0.0}}, "t"),
        "against": lambda: figures.against(torch.arange(3.0), {"g": torch.tensor([1.0, 0.0, 2.0])}, xlabel="x", ylabel="y", title="t"),
    }  # fmt: skip


def make(name: str) -> Figure:
    return makers()[name]()


def decode(tag: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', tag)[1])))


# ---- on the page ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_becomes_an_image_with_alt_text(name):
    tag = figures.as_html(make(name), ALT)
    picture = decode(tag)
    assert picture.format == "PNG" and picture.width == round(figures.WIDTH * figures.DPI)
    assert f'alt="{ALT}"' in tag and tag.count("<img") == 1
    assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    assert len(tag) < 400_000, "too heavy for a page"


def test_alt_text_is_escaped_and_on_one_line():
    tag = figures.as_html(make("curves"), 'The "loss" <rises>\n   steeply & far')
    assert 'alt="The &quot;loss&quot; &lt;rises&gt; steeply &amp; far"' in tag


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_without_alt_text_is_refused(alt):
    with pytest.raises(ValueError, match="alt text"):
        figures.show(make("curves"), alt)


def test_show_displays_html_and_words(monkeypatch):
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append((data, raw)))
    figure = make("curves")
    figures.show(figure, ALT)
    assert shown == [({"text/html": figures.as_html(figure, ALT), "text/plain": ALT}, True)]


def test_same_figure_same_bytes():
    torch.manual_seed(0)
    first = {name: figures.as_html(figure(), ALT) for name, figure in makers().items()}
    torch.manual_seed(0)
    assert first == {name: figures.as_html(figure(), ALT) for name, figure in makers().items()}


def test_nothing_global_changes():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        before = dict(matplotlib.rcParams)
        for figure in makers().values():
            figures.as_html(figure(), ALT)
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


@pytest.mark.parametrize(
    "name", ["curves", "bars", "against", "sorted_factors", "instance_and_batch", "strips", "dose"]
)
def test_charts_are_labelled(name):
    ax = make(name).axes[0]
    assert ax.get_title(loc="left") == "t"
    assert ax.get_xlabel() or [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_ylabel() or [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]


def test_curves_draw_the_values_with_colour_and_marker():
    ax = make("curves").axes[0]
    drawn = {line.get_label(): line for line in ax.lines}
    for name, values in LINES.items():
        assert drawn[name].get_ydata().tolist() == values and drawn[name].get_xdata().tolist() == [0, 1, 2]
    palette = [to_rgb(colour) for colour in seaborn.color_palette("colorblind")]
    assert {to_rgb(drawn[name].get_color()) for name in LINES} <= set(palette)
    assert len({drawn[name].get_marker() for name in LINES}) == len(LINES)
    assert list(drawn["l"].get_ydata()) == [2, 2] and list(drawn["u"].get_xdata()) == [1, 1]
    assert ax.get_ylim()[0] == 0


def test_bars_have_the_values_as_lengths_and_differ_without_colour():
    ax = make("bars").axes[0]
    lengths = {container.get_label(): [bar.get_width() for bar in container] for container in ax.containers}
    assert lengths == {"m": [1, 3], "s": [2, 4]}
    assert len({container[0].get_hatch() for container in ax.containers}) == 2
    assert ax.yaxis_inverted(), "the first group stands at the top"


def test_strips_show_every_value_and_the_median():
    ax = make("strips").axes[0]
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
    ax = make("sorted_factors").axes[0]
    lines = {line.get_label(): np.asarray(line.get_ydata(), dtype=float) for line in ax.lines}
    assert lines["m"] == pytest.approx([-0.1, 1.0, 2.1])
    assert lines["end of the interval"] == pytest.approx([-0.1, -0.1]) and lines["no change"] == pytest.approx([1, 1])


def test_against_draws_pairs_and_the_diagonal():
    ax = make("against").axes[0]
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
    figure = figures.shift_gallery(
        image, [Shift("clean"), Shift("brightness", 3), Shift("contrast", 1), Shift("contrast", 3)]
    )
    shown = np.array([axis.images[0].get_array() for axis in figure.axes]).reshape(2, 3, 8, 8, 3)
    assert np.allclose(shown[:, 0], image.permute(1, 2, 0))
    assert np.allclose(shown[0, 1], 1), "brightness has no severity 1 here: the place stays white"
    assert shown[1, 2].std() < shown[1, 1].std() < shown[1, 0].std(), "less contrast to the right"


def pictures(figure) -> list[np.ndarray]:
    return [np.asarray(axis.images[0].get_array()) for axis in figure.axes]


def test_the_gallery_has_shifts_without_degrees_several_in_a_row():
    image = torch.rand(3, 8, 8)
    shifts = [Shift("hue", 1), Shift("hue", 2), *map(Shift, ("grey", "sepia", "inverted"))]
    figure = figures.shift_gallery(image, shifts, columns=2)
    assert [axis.get_title().replace("\n", " ") for axis in figure.axes] == [
        "unchanged", "severity 1", "severity 2", "grey", "sepia", "inverted",
    ]  # fmt: skip
    assert figure.axes[0].get_ylabel() == "hue"
    for picture, shift in zip(pictures(figure)[3:], shifts[2:]):
        assert np.allclose(picture, shift(image[None])[0].permute(1, 2, 0))
    tops = [round(axis.get_position().y0, 4) for axis in figure.axes[3:]]
    assert tops[0] == tops[1] > tops[2], "two in a row, the third below"


def test_the_gallery_of_shifts_without_degrees_begins_with_the_image_itself():
    image = torch.rand(3, 8, 8)
    figure = figures.shift_gallery(image, [Shift("clean"), Shift("grey")])
    assert [axis.get_title() for axis in figure.axes] == ["unchanged", "grey"]
    assert np.allclose(pictures(figure)[0], image.permute(1, 2, 0))


@pytest.mark.parametrize(
    "shifts",
    [
        [Shift(name, severity) for name in CORRUPTIONS if name != "frost" for severity in range(1, 6)],
        [Shift(name, 0 if name in WITHOUT_SEVERITY else 3) for name in STYLES],
    ],
    ids=["corruptions", "styles"],
)
def test_no_picture_of_a_gallery_covers_another_or_leaves_the_page(shifts):
    image = torch.rand(3, 32, 32)
    figure = figures.shift_gallery(image, shifts)
    boxes = [axis.get_position() for axis in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            assert one.x1 <= other.x0 or other.x1 <= one.x0 or one.y1 <= other.y0 or other.y1 <= one.y0
    names = {axis.get_ylabel().replace("\n", " ") for axis in figure.axes} | {
        axis.get_title().replace("\n", " ") for axis in figure.axes
    }
    assert {shift.name.replace("_", " ") for shift in shifts} <= names


def test_a_gallery_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no shift to show"):
        figures.shift_gallery(torch.rand(3, 8, 8), [Shift("clean")])


def test_more_series_than_markers_are_all_drawn():
    many = {f"method {i}": {"clean": Estimate(0.5 + i / 100, 0.4, 0.6, 3)} for i in range(13)}
    drawn = [line for line in figures.accuracy_dots(many).axes[0].lines if line.get_label() in many]
    assert len(drawn) == 13
    looks = {(to_rgb(line.get_color()), line.get_marker()) for line in drawn}
    assert len(looks) == 13, "two methods look alike"
    assert len(figures.difference_forest(many).axes[0].get_yticks()) == 13
    assert len(figures.dose([1, 2], {name: [0.1, 0.2] for name in many}, xlabel="x", ylabel="y").axes[0].lines) == 13


def test_a_dose_is_drawn_in_percent_with_upright_intervals():
    ax = make("dose").axes[0]
    named = {line.get_label(): line for line in ax.lines}
    assert named["a"].get_ydata() == pytest.approx([3.1, -1.0])
    assert np.isnan(named["b"].get_ydata()[0]) and named["b"].get_ydata()[1] == pytest.approx(5.0)
    upright = [tuple(np.round(line.get_ydata(), 6)) for line in ax.lines if len(set(line.get_xdata())) == 1]
    assert (2.0, 4.2) in upright and (-3.0, 1.0) in upright
    assert list(named["l"].get_ydata()) == [0, 0]
    assert named["a"].get_xdata() == pytest.approx([0.2, 0.5], abs=0.02)
    assert not np.allclose(named["a"].get_xdata(), named["b"].get_xdata()), "bars would hide each other"


def test_a_dose_over_words_and_one_that_does_not_fit():
    ax = figures.dose(["stem", "layer1"], {"a": [0.1, 0.2]}, xlabel="x", ylabel="y").axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["stem", "layer1"]
    assert list(ax.get_xticks()) == [0, 1]
    with pytest.raises(ValueError, match="a: 1 values for 2 places"):
        figures.dose([1, 2], {"a": [0.1]}, xlabel="x", ylabel="y")


def cells(figure) -> dict[tuple[float, float], object]:
    return {text.get_position(): text for text in figure.axes[0].texts}


def test_a_difference_map_marks_what_excludes_zero():
    figure = figures.difference_map(MAP, "t", GROUPS)
    ax = figure.axes[0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["weather", "snow", "paintings", "boat"], "groups without a row have no heading"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a - b", "a - c"]
    texts = {place: text.get_text() for place, text in cells(figure).items()}
    assert texts == {(0, 1): "+3.1 •", (1, 1): "\N{MINUS SIGN}1.0", (0, 3): "+5.0"}
    assert [text.get_fontweight() for text in cells(figure).values()] == ["bold", "normal", "normal"]


def test_a_difference_map_is_centred_on_zero():
    rows = {
        name: {"a": Estimate(mean, math.nan, math.nan, 1)} for name, mean in {"x": 0.0, "y": 0.02, "z": -0.04}.items()
    }
    figure = figures.difference_map(rows)
    nothing, gain, loss = (to_rgb(cell.get_facecolor()[0]) for cell in figure.axes[0].collections)
    assert min(nothing) > 0.95, "no difference is white"
    assert gain[2] > gain[0] and loss[0] > loss[2], "a gain is purple, a loss orange"
    assert min(gain) > min(loss), "twice as far, darker"


@pytest.mark.parametrize("name", ["difference_map", "accuracy_map"])
def test_text_stands_out_from_its_cell(name):
    values = [i / 20 for i in range(21)]
    rows = {
        f"row {i}": {"a": Estimate(2 * v - 1 if "diff" in name else v, math.nan, math.nan, 1)}
        for i, v in enumerate(values)
    }
    ax = getattr(figures, name)(rows).axes[0]

    def brightness(colour) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for cell, text in zip(ax.collections, ax.texts, strict=True):
        light, dark = sorted((brightness(cell.get_facecolor()[0]), brightness(text.get_color())), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text.get_text()} cannot be read"


def test_an_accuracy_map_has_a_percentage_in_each_cell():
    figure = make("accuracy_map")
    assert {place: text.get_text() for place, text in cells(figure).items()} == {
        (0, 0): "90", (1, 0): "3", (0, 1): "100", (1, 1): "0",
    }  # fmt: skip
    brightness = [sum(to_rgb(cell.get_facecolor()[0])) for cell in figure.axes[0].collections]
    assert sorted(range(4), key=brightness.__getitem__) == [3, 1, 0, 2], "higher is lighter"


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (SURE, True, "+3.1 ± 1.1"), (UNSURE, True, "\N{MINUS SIGN}1.0 ± 2.0"), (SINGLE, True, "+5.0"), (SINGLE, False, "5.0"),
        (Estimate(0.673, 0.669, 0.677, 5), False, "67.3 ± 0.4"), (Estimate(-0.0001, -0.01, 0.01, 3), True, "0.0 ± 1.0"),
    ],
)  # fmt: skip
def test_an_estimate_in_words(value, signed, text):
    assert figures.in_percent(value, signed).replace("\N{NO-BREAK SPACE}", " ") == text
    assert " " not in figures.in_percent(value, signed), "it may not be broken over two lines"


def test_what_excludes_zero():
    below = Estimate(-0.02, -0.03, -0.01, 3)
    assert [figures.excludes_zero(value) for value in (SURE, below, UNSURE, SINGLE)] == [True, True, False, False]


def test_a_table_can_be_folded_away(monkeypatch):
    display = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []
    monkeypatch.setattr(display, "display", lambda data, raw: shown.append(data))
    figures.show_table(["a"], [["1"]])
    figures.show_table(["a"], [["1"]], fold="all <of> them")
    table = figures.as_markdown(["a"], [["1"]])
    assert shown[0]["text/markdown"] == table
    assert shown[1]["text/markdown"] == f"<details><summary>all &lt;of&gt; them</summary>\n\n{table}\n\n</details>"
    assert shown[0]["text/plain"] == shown[1]["text/plain"] == "a\n1"


def test_a_table_is_markdown_and_its_rows_are_whole():
    text = figures.as_markdown(["a", "b"], [["1", "x|y"]])
    assert text == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    with pytest.raises(ValueError, match="2 cells"):
        figures.as_markdown(["a", "b"], [["1"]])
