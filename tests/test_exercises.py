"""Exercises: the format of the notebooks is read exactly, becomes folded boxes in the book, and no chapter lacks a solution."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import build
import exercises
import pytest
from bs4 import BeautifulSoup
from exercises import Exercise, ExerciseError, as_directives, of_notebook, parse, python_blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from sphinx.testing.util import SphinxTestApp

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CELL = """\
## What to remember

1. A numbered list before the heading is none of ours.

## Exercises

Take your time.

1. **Overshooting.** Plot the loss over *one* step,
   from $0$ to $\\epsilon$. See [the chapter](page.md).

   <details><summary>Hint</summary>

   `climb(1)`, and `<details>` in a sentence is only a word.

   </details>

   <details><summary>Solution</summary>

   ```python
   sizes = [0.1]
   for size in sizes:

       print("</details>", size)
   ```

   - It falls: $\\frac{a}{b}$.

   ```text
   not to be run
   ```

   ```python
   print(sizes)
   ```

   </details>

2. **Why?** Think.

   <details><summary>Solution</summary>

   Prose.

   </details>

**Where to go next.** Away.

1. A numbered list behind the section is none of ours.
"""


# ---- reading -------------------------------------------------------------------------------


def test_a_section_is_read():
    section = parse(CELL)
    first, second = section.exercises
    assert (first.number, first.title, second.number, second.title) == (1, "Overshooting.", 2, "Why?")
    assert first.text == "Plot the loss over *one* step,\nfrom $0$ to $\\epsilon$. See [the chapter](page.md)."
    assert first.hint == "`climb(1)`, and `<details>` in a sentence is only a word."
    assert first.solution.startswith("```python\nsizes = [0.1]\n") and first.solution.endswith("print(sizes)\n```")
    assert (second.text, second.hint, second.solution) == ("Think.", None, "Prose.")
    assert section.before.endswith("Take your time.") and section.before.startswith("## What to remember")
    assert section.after.startswith("**Where to go next.**") and section.after.endswith("none of ours.")


def test_code_of_solutions_keeps_its_indentation_and_leaves_other_fences_out():
    first, second = python_blocks(CELL)
    assert first == 'sizes = [0.1]\nfor size in sizes:\n\n    print("</details>", size)'
    assert second == "print(sizes)"


def test_cells_without_exercises_are_left_alone():
    for text in ("", "# Title\n", "### Exercises\n", "The heading `## Exercises` in a sentence.", "1. **One.** Two."):
        assert parse(text) is None and as_directives(text, 1) == text and python_blocks(text) == []


SOLUTION = "<details><summary>Solution</summary>"
DAMAGE = {
    "no solution": (f"   {SOLUTION}\n\n   Prose.\n\n   </details>\n", "", "exercise 2 (Why?): it has no solution"),
    "an empty solution": ("   Prose.\n", "\n", "exercise 2 (Why?): its solution is empty"),
    "a solution left open": ("   Prose.\n\n   </details>\n", "   Prose.\n", "exercise 2 (Why?): its solution is not closed"),
    "text behind the solution": ("   Prose.\n\n   </details>\n", "   Prose.\n\n   </details>\n\n   More.\n", "nothing a solution: 'More.'"),
    "two solutions": ("   Prose.\n\n   </details>\n", f"   Prose.\n\n   </details>\n\n   {SOLUTION}\n\n   More.\n\n   </details>\n", "one hint, then one solution"),
    "a hint behind the solution": ("   Prose.\n\n   </details>\n", "   Prose.\n\n   </details>\n\n   <details><summary>Hint</summary>\n\n   More.\n\n   </details>\n", "one hint, then one solution"),
    "a fold in a fold": ("   Prose.\n", f"   Prose.\n\n   {SOLUTION}\n\n   More.\n\n   </details>\n", "none within another"),
    "another summary": ("<summary>Hint</summary>", "<summary>Help</summary>", "exercise 1 (Overshooting.): these lines must be one of"),
    "no blank line": ("   Prose.\n\n   </details>", "   Prose.\n   </details>", "put a blank line before and after '</details>'"),
    "words beside the mark": ("   Prose.\n\n   </details>", "   Prose.\n\n   </details> done", "each in its turn"),
    "a gap in the numbers": ("2. **Why?**", "3. **Why?**", "exercise 2 (Why?): its number is 3"),
    "a title without a stop": ("**Overshooting.**", "**Overshooting**", "must begin with '1. **Title.** Text'"),
    "no title": ("2. **Why?** Think.", "2. Think.", "exercise 2: it must begin with '2. **Title.** Text'"),
    "markup in a title": ("**Why?**", "**Why `x`?**", "exercise 2: it must begin with"),
    "too little indentation": ("   Prose.\n", "  Prose.\n", "indent each line by three spaces, this one too: '  Prose.'"),
    "a directive": ("   Prose.\n", "   ```{note}\n   Prose.\n   ```\n", "exercise 2 (Why?): no MyST directives"),
    "a role": ("   Prose.\n", "   {run}`x`\n", "exercise 2 (Why?): no MyST directives"),
    "two headings": ("Take your time.", "## Exercises", "'## Exercises' 2 times"),
    "no exercise": (CELL[CELL.index("1. **Over") :], "", "the exercises must begin with '1. **Title.** Text'"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_what_breaks_the_format_is_refused_and_named(name):
    old, new, message = DAMAGE[name]
    assert old in CELL
    with pytest.raises(ExerciseError, match=re.escape(message)) as caught:
        as_directives(CELL.replace(old, new, 1), 5, "05_chapter.ipynb")
    assert str(caught.value).startswith("05_chapter.ipynb")


def as_markdown(items: list[Exercise]) -> str:
    """The notebook's form of some exercises, written independently of the reader."""
    lines = ["## Exercises", ""]
    for item in items:
        parts = [f"{item.number}. **{item.title}** {item.text}"]
        for word, text in (("Hint", item.hint), ("Solution", item.solution)):
            if text is not None:
                parts += [f"<details><summary>{word}</summary>", text, "</details>"]
        first, *rest = "\n\n".join(parts).splitlines()
        lines += [first, *(f"   {line}" if line else "" for line in rest), ""]
    return "\n".join(lines)


WORD = st.tuples(st.sampled_from("abxyz"), st.text("abcxyz(),=+-*/ .$\\", max_size=20)).map(
    lambda pair: "".join(pair).strip()
)
PROSE = st.lists(WORD, min_size=1, max_size=4).map("\n\n".join)
CODE = st.lists(st.sampled_from(["x = 1", "for i in x:", "    print(i)", "", "# `a`", "</details>", "2. **No.** exercise"]), min_size=1).map(
    lambda lines: "```python\n" + "\n".join(lines) + "\n```"
)  # fmt: skip
MIXED = st.lists(st.one_of(PROSE, CODE), min_size=1, max_size=4).map("\n\n".join)
TITLE = st.tuples(st.sampled_from("abc"), st.text("abcxyz ", max_size=12), st.sampled_from(".?!")).map("".join)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TITLE, PROSE, st.none() | PROSE, MIXED), min_size=1, max_size=4))
def test_reading_undoes_writing(drawn):
    items = [Exercise(number, *parts) for number, parts in enumerate(drawn, start=1)]
    markdown = as_markdown(items)
    assert parse(markdown).exercises == tuple(items)
    blocks = [block for item in items for block in re.findall(r"```python\n(.*?)\n```", item.solution, re.DOTALL)]
    assert python_blocks(markdown) == blocks
    assert (
        as_directives(markdown, 3).count("{exercise} ") == as_directives(markdown, 3).count("{solution} ") == len(items)
    )


# ---- in the book ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> BeautifulSoup:
    """The cell in a book of one chapter, made with the extensions that the book uses for it."""
    source = tmp_path_factory.mktemp("book")
    source.joinpath("conf.py").write_text(
        "extensions = ['myst_parser', 'sphinx_design', 'sphinx_togglebutton', 'sphinx_exercise', 'exercises']\n"
        "exercise_style = 'solution_follow_exercise'\nmyst_enable_extensions = ['dollarmath']\nnitpicky = True\n"
    )
    source.joinpath("index.md").write_text("# Book\n\n```{toctree}\n:numbered:\npage\n```\n")
    source.joinpath("page.md").write_text("# Chapter\n\n" + as_directives(CELL, 1))
    app = SphinxTestApp(srcdir=source)
    try:
        app.build()
        assert app.warning.getvalue() == ""
        return BeautifulSoup(Path(app.outdir, "page.html").read_text(encoding="utf-8"), "html.parser")
    finally:
        app.cleanup()


def test_exercises_are_numbered_boxes_with_a_folded_hint(page):
    boxes = page.select("div.exercise.admonition")
    titles = [" ".join(box.select_one(".admonition-title").text.split()) for box in boxes]
    assert titles == ["Exercise 1.1 (Overshooting)", "Exercise 1.2 (Why?)"]
    (hint,) = boxes[0].select("details")
    assert not hint.has_attr("open") and "climb(1)" in hint.text
    assert boxes[0].select_one(".math") and boxes[0].select_one("a[href='#']")
    assert not boxes[1].select("details")


def test_solutions_are_folded_boxes_behind_their_exercises(page):
    boxes = page.select("div.exercise.admonition, div.solution.admonition")
    assert [box["class"][0] for box in boxes] == ["exercise", "solution"] * 2
    for box in boxes[1::2]:
        assert "dropdown" in box["class"], "sphinx-togglebutton folds what has this class"
        assert box.select_one(".admonition-title").text == "Solution"
    code = boxes[1].select("div.highlight-python")
    assert [block.text.strip().splitlines()[-1] for block in code] == ['    print("</details>", size)', "print(sizes)"]
    assert boxes[1].select_one("ul .math") and "not to be run" in boxes[1].text


def test_ids_are_unique(page):
    ids = [element["id"] for element in page.select("[id]")]
    assert {"exercise-1-1", "exercise-1-1-solution"} <= set(ids)
    assert len(ids) == len(set(ids))


def test_what_stands_around_the_exercises_stays_outside(page):
    inside = " ".join(box.text for box in page.select("div.exercise, div.solution"))
    for words in ("Take your time.", "Where to go next.", "none of ours"):
        assert words in page.text and words not in inside
    assert [heading.text.split(".")[-1].strip("# \N{PILCROW SIGN}") for heading in page.select("h2")] == [
        " What to remember".strip(), "Exercises"
    ]  # fmt: skip


def test_the_book_has_the_extensions():
    config = (ROOT / "_config.yml").read_text(encoding="utf-8")
    for words in (
        "- sphinx_exercise",
        "- exercises",
        "- sphinx_togglebutton",
        "- sphinx_design",
        "exercise_style: solution_follow_exercise",
    ):
        assert re.search(rf"^\s*{re.escape(words)}\b", config, re.MULTILINE), words


# ---- on the way to the book ----------------------------------------------------------------


def notebook_file(folder: Path, *cells: str, name: str = "05_chapter.ipynb") -> Path:
    body = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    for number, source in enumerate(cells):
        lines = source.splitlines(keepends=True)
        body["cells"].append({"cell_type": "markdown", "id": f"c{number}", "metadata": {}, "source": lines})
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(body), encoding="utf-8")
    return file


def test_staging_changes_only_the_cell_with_exercises(tmp_path):
    file = notebook_file(tmp_path, "# Title\n\nÜber $x$", CELL, "The end.")
    before = file.read_bytes()
    old, new = json.loads(before), json.loads(exercises.staged(file))
    assert file.read_bytes() == before
    assert [cell == was for cell, was in zip(new["cells"], old["cells"], strict=True)] == [True, False, True]
    assert new["cells"][1]["source"] == as_directives(CELL, 5)
    assert ":label: exercise-5-2\n" in new["cells"][1]["source"]


def test_staging_leaves_other_notebooks_as_they_are_byte_by_byte(tmp_path):
    file = notebook_file(tmp_path, "# Title", "No exercises.")
    assert exercises.staged(file) == file.read_bytes()


def test_the_stage_of_the_book_holds_directives(tmp_path):
    layout = build.Layout(tmp_path)
    file = notebook_file(tmp_path / "notebooks", "# Title", CELL)
    for folder in ("book", "records"):
        tmp_path.joinpath(folder).mkdir()
    tmp_path.joinpath("_config.yml").write_text("title: A book\n")
    build.stage(layout, [file])
    assert "{exercise} Overshooting" in (layout.stage / "notebooks" / file.name).read_text()
    assert "{exercise}" not in file.read_text()


def test_a_bad_exercise_stops_the_build_before_anything_runs(tmp_path, monkeypatch, capsys):
    notebook_file(tmp_path / "notebooks", "# Title", CELL.replace("Prose.", ""))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert build.main(["--preset", "smoke"]) == 1
    assert "05_chapter.ipynb, exercise 2 (Why?): its solution is empty" in capsys.readouterr().err
    assert not tmp_path.joinpath("_build").exists()


def test_exercises_in_two_cells_and_in_a_file_without_a_number_are_refused(tmp_path):
    with pytest.raises(ExerciseError, match="2 cells have exercises"):
        of_notebook(notebook_file(tmp_path, CELL, CELL))
    with pytest.raises(ExerciseError, match="a name that begins with a number"):
        exercises.staged(notebook_file(tmp_path, CELL, name="chapter.ipynb"))


# ---- the real chapters ---------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_chapter_has_exercises_with_solutions(path):
    found = of_notebook(path)
    assert len(found) >= 3
    for exercise in found:
        assert len(exercise.solution) > 150, f"{exercise.title} the solution says too little"
        for code in exercise.python:
            ast.parse(code)
            assert max(map(len, code.splitlines())) <= 140, f"{exercise.title} a line is too wide"
    assert sum(bool(exercise.python) for exercise in found) * 2 >= len(found), "too few solutions can be run"


def test_labels_are_unique_in_the_book():
    labels = []
    for path in NOTEBOOKS:
        for cell in json.loads(exercises.staged(path))["cells"]:
            if cell["cell_type"] == "markdown":
                labels += re.findall(r"^:label: (\S+)$", "".join(cell["source"]), re.MULTILINE)
    assert len(labels) == len(set(labels)) >= 2 * 3 * len(NOTEBOOKS)
