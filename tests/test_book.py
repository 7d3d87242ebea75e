"""The book's machinery: numbers on pages come from records, notebooks run once, a failure says where."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import statistics
from pathlib import Path

import build
import pytest
import scipy.stats
from advbn_book import wording
from docutils import nodes
from sphinx.testing.util import SphinxTestApp
from typed_numbers import typed_numbers

from advbn_lib import records, reported
from advbn_lib.records import Estimate, Record

ROOT = Path(__file__).resolve().parent.parent
METRIC = "accuracy/clean/contrast-3"
# Phrases that may stand in the prose, exactly so, and why their numbers are no results.
ALLOWED = {
    "95 %": "the level of every interval",
    "an `eps` of 0.5 instead of 1.1": "settings to try in an exercise",
    r"over $\epsilon$ from 0.1 to 1.1": "settings to try in an exercise",
}
ROLE = re.compile(r"\{(run|run-diff|paper)\}`([^`]+)`")


def record(experiment: str, seed: int, accuracy: float, preset: str = "cpu") -> Record:
    return Record(
        experiment=experiment, preset=preset, seed=seed, key="key", config={},
        metrics={"accuracy": {"clean": {"clean": 0.9, "contrast-3": accuracy}}, "speed": {"images_per_second": 12345.6}},
        curves={}, cost={"wall_seconds": 754.0}, hardware={"gpu": None, "cpu": "a small CPU", "threads": 2}, versions={"torch": "2.11.0"},
        code={"commit": "0123456789abcdef", "dirty": False}, data={}, weights={}, created="2026-01-01",
    )  # fmt: skip


ACCURACIES = {"advbn": (0.701, 0.712, 0.735), "clean_finetuning": (0.65, 0.645, 0.66)}


@pytest.fixture
def source(tmp_path):
    """A book of two pages with six records."""
    folder = tmp_path / "src"
    for experiment, accuracies in ACCURACIES.items():
        for seed, accuracy in enumerate(accuracies):
            records.write(record(experiment, seed, accuracy), folder / "records")
    listing(folder)
    folder.joinpath("conf.py").write_text("extensions = ['myst_parser', 'advbn_book']\nnitpicky = True\n")
    folder.joinpath("index.md").write_text("# Page\n\n```{toctree}\nall\n```\n")
    folder.joinpath("all.md").write_text("# Records\n\n```{records-index}\n```\n")
    return folder


def listing(folder: Path) -> None:
    """What build.py writes beside the records it gathers."""
    names = sorted(file.name for file in folder.glob("records/*/*.json"))
    folder.joinpath("records/LIST").write_text("\n".join(names))


def make(source: Path, page: str | None = None) -> tuple[str, str, str]:
    """Build; return the text of the first page, the text of the records page, and the warnings."""
    if page is not None:
        source.joinpath("index.md").write_text(f"# Page\n\n{page}\n\n```{{toctree}}\nall\n```\n")
    app = SphinxTestApp(srcdir=source)
    try:
        app.build()
        out = Path(app.outdir)
        pages = [html.unescape(re.sub(r"<[^>]+>", "", (out / name).read_text())) for name in ("index.html", "all.html")]
        return *pages, app.warning.getvalue()
    finally:
        app.cleanup()


def interval(values) -> tuple[float, float]:
    """A 95 % t interval by another road than the library's."""
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, statistics.mean(values), scipy.stats.sem(values))
    return 100 * low, 100 * high


def test_run_shows_what_the_records_say(source):
    page, _, warnings = make(source, f"We get {{run}}`advbn cpu {METRIC}`.")
    values = ACCURACIES["advbn"]
    low, high = interval(values)
    mean = 100 * statistics.mean(values)
    assert f"We get {mean:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = 3 seeds, cpu scale)." in page
    assert warnings == ""


def test_metrics_in_metrics_stand_in_a_box_a_row_for_each_path(source):
    deep = {
        "pretrain": {
            "chance": {"share": 0.25},
            "attack": {"mean": {"share": 0.5, "shift": 1.5}, "all": {"share": 0.75, "shift": 2.5}},
        }
    }
    nested = dataclasses.replace(
        record("study", 0, 0.5), metrics={"statistics": deep, "robust": {"fused": {"0": 0.6, "8": 0.3}}}
    )
    records.write(nested, source / "records")
    listing(source)
    _, page, warnings = make(source)
    words = page.split()
    assert warnings == "" and "Statistics" in words
    for row in (
        "pretrain, chance 0.250",
        "pretrain, attack, mean 0.500 1.50",
        "pretrain, attack, all 0.750 2.50",
        "8 30.0 %",
    ):
        assert row in " ".join(words)


def test_difference_is_paired_by_seed(source):
    page, _, warnings = make(source, f"{{run-diff}}`clean_finetuning - advbn cpu {METRIC}`")
    values = [b - a for a, b in zip(ACCURACIES["advbn"], ACCURACIES["clean_finetuning"], strict=True)]
    low, high = interval(values)
    text = f"{100 * statistics.mean(values):+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, paired by seed, n = 3 seeds, cpu scale)"
    assert text.replace("-", wording.MINUS) in page
    assert warnings == ""


def test_numbers_lead_to_their_records(source):
    make(source, f"{{run}}`advbn cpu {METRIC}`")
    out = source / "_build" / "html"
    assert 'href="all.html#record-advbn-cpu"' in (out / "index.html").read_text()
    page = (out / "all.html").read_text()
    assert 'id="record-advbn-cpu"' in page
    for link in re.findall(r'href="(_static/records/[^"]+)"', page):
        assert records.read(out / link).experiment in ACCURACIES
    assert page.count('href="_static/records/') == 6


def test_records_page_lists_every_run(source):
    _, page, warnings = make(source)
    for words in (
        "advbn, cpu scale",
        "clean_finetuning, cpu scale",
        "a small CPU, 2 threads",
        "13 min",
        "torch 2.11.0",
        "0123456789",
        "12,300",
    ):
        assert words in page
    assert warnings == ""


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (
            f"{{run}}`nothing cpu {METRIC}`",
            "no record of nothing cpu; there are records of: advbn cpu, clean_finetuning cpu",
        ),
        (f"{{run}}`advbn gpu {METRIC}`", "no record of advbn gpu"),
        ("{run}`advbn cpu accuracy/clean/snow-3`", "contrast-3"),
        ("{run}`? advbn cpu accuracy/clean/snow-3`", "contrast-3"),
        ("{run}`advbn cpu`", "EXPERIMENT PRESET METRIC"),
        (f"{{run-diff}}`advbn nothing cpu {METRIC}`", "EXPERIMENT - EXPERIMENT"),
        (f"{{run-diff}}`advbn - nothing cpu {METRIC}`", "no record of nothing cpu"),
        ("{paper}`nobody/said/this`", "no such number"),
    ],
)
def test_what_is_not_there_is_a_warning_that_names_what_is(source, role, message):
    page, _, warnings = make(source, role)
    assert message in warnings and "index.md" in warnings
    assert "[no number:" in page


def test_a_page_may_say_not_run_yet(source):
    page, _, warnings = make(
        source, f"So far: {{run}}`? advbn gpu {METRIC}` and {{run-diff}}`? advbn - nothing cpu {METRIC}`."
    )
    assert "So far: not run and not run." in page
    assert warnings == ""


def test_an_edited_record_stops_the_build(source):
    file = source / "records/advbn/cpu-s0.json"
    file.write_text(file.read_text().replace("0.701", "0.801"))
    _, _, warnings = make(source, f"{{run}}`advbn cpu {METRIC}`")
    assert "cpu-s0.json" in warnings


def test_paper_number_says_where_it_is_from(source):
    key, number = next(iter(reported.REPORTED.items()))
    page, _, warnings = make(source, f"{{paper}}`{key}`")
    assert str(number.value) in page and number.source in page
    assert html.escape(number.how_known) in (source / "_build/html/index.html").read_text()
    assert warnings == ""


def test_incremental_build_shows_new_numbers(source):
    before, listed, _ = make(source, f"{{run}}`advbn cpu {METRIC}`")
    records.write(record("advbn", 3, 0.2), source / "records")
    records.write(record("other", 0, 0.5), source / "records")
    listing(source)
    for file in (source / "records/LIST",):
        os.utime(file, (file.stat().st_mtime + 5,) * 2)  # some file systems count whole seconds
    after, relisted, _ = make(source)
    assert "n = 3 seeds" in before and "n = 4 seeds" in after
    assert "other, cpu scale" not in listed and "other, cpu scale" in relisted


# ---- wording -------------------------------------------------------------------------------


def test_wording_of_one_seed_claims_no_interval():
    text = wording.level(Estimate(0.5, float("nan"), float("nan"), 1), METRIC, "gpu")
    assert text == "50.0 % (no interval, n = 1 seed, gpu scale)"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (5.914, "5.91"),
        (0.01234, "0.0123"),
        (9.999, "10.0"),
        (1234.5, "1,230"),
        (-42.21, f"{wording.MINUS}42.2"),
    ],
)
def test_other_metrics_have_three_digits(value, text):
    assert wording.number(value, "ratio") == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0312, "+3.1"),
        (-0.0005, f"{wording.MINUS}0.1"),
        (-0.00029, f"{wording.MINUS}0.03"),  # a limit just below zero: "-0.0" would hide why a claim is undecided
        (0.0001, "+0.01"),
        (-1e-6, "0.0"),
        (0.0, "0.0"),
    ],
)
def test_differences_next_to_zero_keep_their_side(share, text):
    assert wording.number(share, METRIC, signed=True) == text


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ValueError, match="ratio"):
        wording.number(float("nan"), "ratio")


# ---- no number typed by hand ---------------------------------------------------------------


def pages() -> dict[str, str]:
    """Source of every page: prose, and the markdown cells of the notebooks."""
    found = {
        file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in (ROOT / "book").glob("*.md")
    }
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        found[file.relative_to(ROOT).as_posix()] = "\n\n".join(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
    return found


def test_no_result_is_typed_by_hand():
    assert len(pages()) >= 4
    found = {place: typed_numbers(text, ALLOWED) for place, text in pages().items()}
    assert {place: numbers for place, numbers in found.items() if numbers} == {}, (
        "take these from a record ({run}, {run-diff}), from advbn_lib/reported.py ({paper}), or, if they are no results, add them to ALLOWED with the reason"
    )


@pytest.mark.parametrize(
    "text",
    [
        "AdvBN gets 91.7 %.", "AdvBN gets 91.7%.", "about 70 per cent of them", "a gain of 3.1 points", "$91.7\\%$ is better",
        "The accuracy is 0.917 now.", "Its accuracy is 0.917.", "accuracy $0.9 \\pm 0.1$", "72.7 ± 0.3", "| method | accuracy |\n|---|---|\n| AdvBN | 91.7 |",
        "It is 5.9x faster.", "5 times slower than before", ":::{note}\nAn error of 8.3 is left.\n:::", "```{note}\nHalf: 50 %.\n```",
    ],
)  # fmt: skip
def test_typed_results_are_noticed(text):
    assert typed_numbers("Before.\n\n" + text + "\n\nAfter.")


@pytest.mark.parametrize(
    "text",
    [
        "{run}`advbn cpu accuracy/clean/contrast-3` right", "`accuracy = 0.917`", "```\naccuracy 91.7 %\n```", "steps of 0.2, six of them",
        "Python 3.12 and PyTorch 2.11.0", "factors $1-\\epsilon$, $\\epsilon = 1.1$, hurt accuracy", "see [the page](https://example.org/91.7%25)",
        "32x32 images, 10 classes, 170 MB",
    ],
)  # fmt: skip
def test_settings_and_code_are_left_alone(text):
    assert typed_numbers(text) == []


def test_allowed_phrases_are_needed_and_exact():
    everything = "\n\n".join(pages().values())
    for phrase in ALLOWED:
        assert len(typed_numbers(everything, ALLOWED.keys() - {phrase})) > len(typed_numbers(everything, ALLOWED)), (
            f"nothing needs {phrase!r}"
        )
    assert typed_numbers("95.5 % and 95 % and 195 %", ALLOWED) == ["95.5 %", "195 %"]


def test_every_number_on_the_real_pages_equals_its_records(tmp_path):
    """Each role of every page, rendered; then computed again from the JSON files alone."""
    roles = sorted(
        {
            match.groups()
            for text in pages().values()
            for match in ROLE.finditer(text)
            if not match[2].startswith("EXPERIMENT")
        }
    )
    roles = [role for role in roles if not role[1].startswith("? EXPERIMENT")]
    if (ROOT / "records").is_dir():
        shutil.copytree(ROOT / "records", tmp_path / "records")
    tmp_path.joinpath("conf.py").write_text("extensions = ['myst_parser', 'advbn_book']\n")
    tmp_path.joinpath("index.md").write_text(
        "# Page\n\n" + "".join(f"- {{{name}}}`{text}`\n" for name, text in roles) + "\n```{records-index}\n```\n"
    )
    app = SphinxTestApp(srcdir=tmp_path)
    app.build()
    items = [item.astext() for item in app.env.get_doctree("index").findall(nodes.list_item)]
    app.cleanup()
    assert app.warning.getvalue() == ""
    assert len(items) == len(roles)
    for (name, text), shown in zip(roles, items, strict=True):
        if name == "paper":
            assert shown.split()[0] == str(reported.REPORTED[text].value)
        elif shown != "not run":
            assert shown.split()[0] == recomputed(name, text, ROOT / "records"), f"{{{name}}}`{text}`"


def recomputed(name: str, text: str, folder: Path) -> str:
    """The number a role should show, from the JSON files and nothing else."""
    words = [word for word in text.split() if word not in ("?", "-")]
    if name == "run":
        values = [value for _, value in read_values(folder, words[0], words[1], words[2])]
        return shown_number(statistics.mean(values), words[2], signed=False)
    first, second = (dict(read_values(folder, words[i], words[2], words[-1 if i else 3])) for i in (0, 1))
    return shown_number(
        statistics.mean(first[seed] - second[seed] for seed in first.keys() & second.keys()), words[3], signed=True
    )


def read_values(folder: Path, experiment: str, preset: str, metric: str):
    for file in folder.glob(f"{experiment}/{preset}-s*.json"):
        body = json.loads(file.read_text())
        value = {"cost": body["cost"], **body["metrics"]}
        for part in metric.split("/"):
            value = value[part]
        yield body["seed"], value


def shown_number(value: float, metric: str, signed: bool) -> str:
    if metric.startswith(("accuracy/", "mean/")):
        if signed and abs(value) < 0.0005:
            return f"{100 * value:+.2f}".replace("-", wording.MINUS) if abs(value) >= 0.00005 else "0.0"
        return f"{100 * value:{'+' if signed else ''}.1f}".replace("-", wording.MINUS)
    return wording.number(value, metric, signed)


# ---- building ------------------------------------------------------------------------------


def test_preset_follows_the_data(tmp_path):
    assert build.choose_preset(None, {})[0] == "smoke"
    assert build.choose_preset(None, {"ADVBN_DATA": str(tmp_path)})[0] == "smoke"
    for folder in ("cifar10", "cifar-10-batches-py"):
        tmp_path.joinpath(folder).mkdir()
        assert build.choose_preset(None, {"ADVBN_DATA": str(tmp_path)})[0] == "cpu"
        tmp_path.joinpath(folder).rmdir()
    assert build.choose_preset("gpu", {})[0] == "gpu"
    with pytest.raises(build.BuildError, match="smoke, cpu, gpu"):
        build.choose_preset("huge", {})


def notebook(*cells: str) -> str:
    body = {
        "cells": [],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    for number, cell in enumerate(cells):
        tags = ["parameters"] if cell.startswith("preset") else []
        body["cells"].append(
            {
                "cell_type": "code",
                "id": f"cell{number}",
                "metadata": {"tags": tags},
                "source": cell,
                "outputs": [],
                "execution_count": None,
            }
        )
    return json.dumps(body)


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """A repository with one short notebook and one record."""
    for name in ("notebooks", "advbn_lib", "records/advbn", "book"):
        tmp_path.joinpath(name).mkdir(parents=True)
    tmp_path.joinpath("constraints.txt").touch()
    tmp_path.joinpath("_config.yml").write_text("title: A book\n")
    tmp_path.joinpath("book/intro.md").write_text("# Intro\n")
    tmp_path.joinpath("book/claims.yml").write_text("[]\n")
    tmp_path.joinpath("advbn_lib/code.py").write_text("one = 1\n")
    tmp_path.joinpath("records/advbn/cpu-s0.json").write_text("{}")
    tmp_path.joinpath("notebooks/01_first.ipynb").write_text(
        notebook("preset = None", "import os\nprint(preset, os.getpid())")
    )
    monkeypatch.setenv("JUPYTER_PATH", "")
    return build.Layout(tmp_path)


def output_of(executed: list[Path]) -> str:
    return "".join(json.loads(executed[0].read_text())["cells"][-1]["outputs"][0]["text"])


def test_notebooks_run_again_only_when_an_input_changes(layout):
    first = output_of(build.run_notebooks(layout, "smoke"))
    assert first.startswith("smoke ")
    assert output_of(build.run_notebooks(layout, "smoke")) == first
    layout.root.joinpath("records/advbn/cpu-s1.json").write_text("{}")
    second = output_of(build.run_notebooks(layout, "smoke"))
    assert second != first
    layout.root.joinpath("advbn_lib/code.py").write_text("one = 2\n")
    third = output_of(build.run_notebooks(layout, "smoke"))
    assert third != second
    layout.root.joinpath("book/claims.yml").write_text("[{}]\n")
    assert output_of(build.run_notebooks(layout, "smoke")) != third
    assert output_of(build.run_notebooks(layout, "cpu")).startswith("cpu ")


def test_the_book_is_made_of_the_records_that_the_library_reads(layout, monkeypatch, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "afan").mkdir()
    (elsewhere / "afan" / "cpu-s7.json").write_text("{}")
    notebook, before = layout.notebooks()[0], {}
    before["records"] = build.notebook_key(layout, notebook, "smoke")
    layout.root.joinpath("advbn_lib/made.safetensors").write_bytes(b"weights")
    before["weights"] = build.notebook_key(layout, notebook, "smoke")
    monkeypatch.setenv("ADVBN_RECORDS", str(elsewhere))
    assert len({*before.values(), build.notebook_key(layout, notebook, "smoke")}) == 3
    build.stage(layout, [])
    staged = {path.relative_to(layout.stage).as_posix() for path in layout.stage.glob("records/*/*")}
    assert staged == {"records/afan/cpu-s7.json"} and b"cpu-s7" in (layout.stage / "records/LIST").read_bytes()


def test_executed_notebooks_hold_no_trace_of_the_machine(layout):
    (executed,) = build.run_notebooks(layout, "smoke")
    text = executed.read_text()
    assert str(layout.root) not in text and "papermill" not in json.loads(text)["metadata"]


def test_failing_cell_is_named_and_leaves_the_old_result(layout):
    (executed,) = build.run_notebooks(layout, "smoke")
    before = executed.read_bytes()
    layout.root.joinpath("notebooks/01_first.ipynb").write_text(
        notebook("preset = None", "one = 1", "raise ValueError('no such image')")
    )
    with pytest.raises(
        build.BuildError, match=r"notebooks/01_first\.ipynb: cell 3 of 3 failed with ValueError: no such image"
    ) as caught:
        build.run_notebooks(layout, "smoke")
    assert "raise ValueError" in str(caught.value)
    assert executed.read_bytes() == before


def test_no_notebooks_is_an_error(layout):
    layout.root.joinpath("notebooks/01_first.ipynb").unlink()
    with pytest.raises(build.BuildError, match="whole checkout"):
        build.run_notebooks(layout, "smoke")


def test_what_a_cell_prints_stays_where_it_was_printed():
    nbformat = pytest.importorskip("nbformat")
    new = nbformat.v4
    text = lambda words, name="stdout": new.new_output("stream", name=name, text=words)  # noqa: E731
    figure = new.new_output("display_data", {"text/plain": "a figure"})
    cell = new.new_code_cell(
        "", outputs=[text("a\n"), text("b\n"), figure, text("c\n"), text("d\n", "stderr"), text("e\n")]
    )
    node = new.new_notebook(cells=[new.new_markdown_cell("words"), cell])
    build.join_streams(node)
    found = [output.get("text", "figure") for output in node.cells[1].outputs]
    assert found == ["a\nb\n", "figure", "c\n", "d\n", "e\n"]
    nbformat.validate(node)


def test_stage_touches_only_what_changed(layout):
    executed = [layout.root / "notebooks/01_first.ipynb"]
    build.stage(layout, executed)
    times = {file: file.stat().st_mtime_ns for file in build.sources(layout.stage, "*")}
    assert {file.relative_to(layout.stage).as_posix() for file in times} == {
        "_config.yml", "book/claims.yml", "book/intro.md", "notebooks/01_first.ipynb", "records/LIST", "records/advbn/cpu-s0.json",
    }  # fmt: skip
    layout.root.joinpath("records/advbn/cpu-s0.json").unlink()
    layout.root.joinpath("book/intro.md").write_text("# Other\n")
    build.stage(layout, executed)
    after = {file: file.stat().st_mtime_ns for file in build.sources(layout.stage, "*")}
    changed = {file.relative_to(layout.stage).as_posix() for file in times if times[file] != after.get(file)}
    assert changed == {"book/intro.md", "records/LIST", "records/advbn/cpu-s0.json"}


def test_record_fields_used_on_pages_exist():
    """The page of records reads these by name."""
    assert {"hardware", "cost", "versions", "code", "metrics"} <= {field.name for field in dataclasses.fields(Record)}
