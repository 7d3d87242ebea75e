"""Exercises: plain Markdown in the notebooks, folded boxes in the book, code for the tests.

On Colab and in Jupyter a MyST directive is shown raw. So a notebook holds its
exercises as plain Markdown, in one cell:

    ## Exercises

    1. **Title.** What to do, on as many lines as it takes.

       <details><summary>Hint</summary>

       Any Markdown. The hint may be left out.

       </details>

       <details><summary>Solution</summary>

       Any Markdown; what stands in a fence of ``python`` must run at the end of the chapter.

       </details>

The lines of an exercise behind its first are blank or indented by three
spaces. The section ends with its cell, or at the first line at the margin,
behind the first exercise, that begins no exercise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

HEADING = re.compile(r"^## Exercises[ \t]*$", re.MULTILINE)
FIRST_LINE = re.compile(r"(\d+)\. \*\*([^*`$_\[\]]+[.?!])\*\* (\S.*)")
INDENT = "   "
OPEN = {"<details><summary>Hint</summary>": "hint", "<details><summary>Solution</summary>": "solution"}
CLOSE = "</details>"
FENCE = re.compile(r"^[ ]*(`{3,}|~{3,})(.*)$")
DIRECTIVE = re.compile(r"^\s*(?:`{3,}|~{3,}|:{3,})\{|\{[\w:-]+\}`", re.MULTILINE)


class ExerciseError(ValueError):
    """Exercises that are not in the book's format; the message names the notebook, the exercise and the rule."""


@dataclass(frozen=True)
class Exercise:
    """One exercise; its texts are Markdown without the indentation of the list."""

    number: int  # from 1, within its chapter
    title: str  # as written, with its full stop
    text: str
    hint: str | None
    solution: str

    @property
    def python(self) -> tuple[str, ...]:
        """The code of the solution, fence by fence."""
        return tuple(code for word, code in fences(self.solution) if word == "python")


@dataclass(frozen=True)
class Section:
    """A cell with exercises: what stands before them (heading included), they, and what stands behind them."""

    before: str
    exercises: tuple[Exercise, ...]
    after: str


# ---- reading -------------------------------------------------------------------------------


def parse(markdown: str, where: str = "this cell") -> Section | None:
    """Read the section of exercises in a cell; None if the cell has no line ``## Exercises``.

    ``where`` is the notebook, as errors name it. Raises ExerciseError where the section is not in the format.
    """
    headings = list(HEADING.finditer(markdown))
    if not headings:
        return None
    if len(headings) > 1:
        raise ExerciseError(f"{where}: one cell has the heading '## Exercises' {len(headings)} times; keep one")
    lines = markdown.splitlines()
    first = markdown[: headings[0].start()].count("\n") + 1
    start = next((i for i in range(first, len(lines)) if FIRST_LINE.match(lines[i])), None)
    foreign = next((i for i in range(first, len(lines)) if re.match(r"\d+\.", lines[i])), None)
    if start is None or foreign != start:
        line = "" if foreign is None else f", and not {lines[foreign]!r}"
        raise ExerciseError(f"{where}: the exercises must begin with '1. **Title.** Text'{line}")
    end = next((i for i in range(start, len(lines)) if ends_section(lines[i])), len(lines))
    exercises = tuple(read(group, number, where) for number, group in enumerate(groups(lines[start:end]), start=1))
    return Section("\n".join(lines[:start]).rstrip(), exercises, "\n".join(lines[end:]))


def ends_section(line: str) -> bool:
    """True of a line at the margin that begins no numbered item."""
    return bool(line.strip()) and not line.startswith(" ") and not re.match(r"\d+\.", line)


def groups(lines: list[str]) -> Iterator[list[str]]:
    """The lines of each exercise; a new one begins at each number at the margin."""
    starts = [i for i, line in enumerate(lines) if re.match(r"\d+\.", line)]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield lines[start:end]


def read(lines: list[str], number: int, where: str) -> Exercise:
    """Read one exercise, which must have this ``number``; raises ExerciseError with the rule that it breaks."""
    first = FIRST_LINE.fullmatch(lines[0].rstrip())
    place = f"{where}, exercise {number} ({first[2]})" if first else f"{where}, exercise {number}"
    if not first:
        raise ExerciseError(f"{place}: it must begin with '{number}. **Title.** Text', and not {lines[0]!r}")
    if int(first[1]) != number or number > 9:
        raise ExerciseError(f"{place}: its number is {first[1]}; count 1, 2, 3 ..., at most to 9")
    for line in lines[1:]:
        if line.strip() and not line.startswith(INDENT):
            raise ExerciseError(f"{place}: indent each line by three spaces, this one too: {line!r}")
    body = [first[3], *(line.removeprefix(INDENT).rstrip() for line in lines[1:])]
    parts = split(body, place)
    if DIRECTIVE.search("\n".join(body)):
        raise ExerciseError(f"{place}: no MyST directives or roles; Colab and Jupyter would show them raw")
    return Exercise(number, first[2], parts["text"], parts.get("hint"), parts["solution"])


def split(body: list[str], place: str) -> dict[str, str]:
    """Cut an exercise into its text, its hint if it has one, and its solution."""
    parts: dict[str, list[str]] = {"text": []}
    now, fence = "text", None
    for i, line in enumerate(body):
        fence = fence_after(line, fence)
        mark = fence is None and re.search(r"</?details|</?summary", re.sub(r"`[^`]*`", "", line))
        if mark:
            now = step(line, now, parts, place)
            if any(body[j].strip() for j in (i - 1, i + 1) if 0 <= j < len(body)):
                raise ExerciseError(f"{place}: put a blank line before and after {line.strip()!r}")
        elif now == "":
            if line.strip():
                raise ExerciseError(f"{place}: only a solution may follow a hint, and nothing a solution: {line!r}")
        else:
            parts[now].append(line)
    if now and now != "text":
        raise ExerciseError(f"{place}: its {now} is not closed with {CLOSE!r}")
    if "solution" not in parts:
        raise ExerciseError(f"{place}: it has no solution")
    texts = {name: "\n".join(lines).strip("\n") for name, lines in parts.items()}
    for name, text in texts.items():
        if not text.strip():
            raise ExerciseError(f"{place}: its {name} is empty")
    return texts


def step(line: str, now: str, parts: dict[str, list[str]], place: str) -> str:
    """The part that begins with a line of ``<details>`` or ``</details>``: hint, solution, or none ('')."""
    if line == CLOSE and now in ("hint", "solution"):
        return ""
    if line not in OPEN:
        marks = ", ".join(repr(mark) for mark in (*OPEN, CLOSE))
        raise ExerciseError(f"{place}: these lines must be one of {marks}, each in its turn, and not {line!r}")
    if now in ("hint", "solution") or "solution" in parts or OPEN[line] in parts:
        raise ExerciseError(f"{place}: at most one hint, then one solution, none within another; look at {line!r}")
    parts[OPEN[line]] = []
    return OPEN[line]


def fence_after(line: str, fence: str | None) -> str | None:
    """The fence that is open behind this line (three or more backticks or tildes), or None."""
    found = FENCE.match(line)
    if not found:
        return fence
    if fence is None:
        return found[1]
    closes = found[1][0] == fence[0] and len(found[1]) >= len(fence) and not found[2].strip()
    return None if closes else fence


def fences(markdown: str) -> Iterator[tuple[str, str]]:
    """The word behind each opening fence, and what the fence holds."""
    fence, word, held = None, "", []
    for line in markdown.splitlines():
        before, fence = fence, fence_after(line, fence)
        if before is None and fence is not None:
            word, held = FENCE.match(line)[2].strip(), []
        elif before is not None and fence is None:
            yield word, "\n".join(held)
        elif fence is not None:
            held.append(line)


def python_blocks(markdown: str, where: str = "this cell") -> list[str]:
    """The code of all solutions in a cell, in order."""
    section = parse(markdown, where)
    return [code for exercise in section.exercises for code in exercise.python] if section else []


def markdown_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]


def of_notebook(notebook: Path) -> tuple[Exercise, ...]:
    """The exercises of a notebook, none if it has none. Raises ExerciseError also where two cells have some."""
    found = [section for cell in markdown_cells(notebook) if (section := parse(cell, notebook.name))]
    if len(found) > 1:
        raise ExerciseError(f"{notebook.name}: {len(found)} cells have exercises; keep them all in one")
    return found[0].exercises if found else ()


# ---- writing for the book ------------------------------------------------------------------


def as_directives(markdown: str, chapter: int, where: str = "this cell") -> str:
    """The cell for the book: exercises as sphinx-exercise's directives, hints and solutions folded.

    A cell without exercises comes back as it is. ``chapter`` is part of the labels (``exercise-5-2``), which
    must differ in a book; the number that readers see is Sphinx's own.
    """
    section = parse(markdown, where)
    if section is None:
        return markdown
    boxes = [box for exercise in section.exercises for box in directives(exercise, chapter)]
    return "\n\n".join([section.before, *boxes, section.after]).strip("\n") + "\n"


def directives(exercise: Exercise, chapter: int) -> Iterable[str]:
    """The box of an exercise with its hint in it, and the box of its solution."""
    label = f"exercise-{chapter}-{exercise.number}"
    text = exercise.text
    if exercise.hint:
        text += "\n\n" + directive("dropdown", "Hint", {}, exercise.hint)
    yield directive("exercise", exercise.title.removesuffix("."), {"label": label}, text)
    yield directive("solution", label, {"label": f"{label}-solution", "class": "dropdown"}, exercise.solution)


def directive(name: str, argument: str, options: dict[str, str], content: str) -> str:
    """A MyST directive whose fence is longer than any in its content."""
    longest = max((len(run) for run in re.findall(r"`{3,}", content)), default=2)
    fence = "`" * (longest + 1)
    head = "".join(f":{key}: {value}\n" for key, value in options.items())
    return f"{fence}{{{name}}} {argument}\n{head}\n{content}\n{fence}"


def staged(notebook: Path) -> bytes:
    """An executed notebook as Sphinx reads it; the chapter is the number that its file name begins with."""
    number = re.match(r"\d+", notebook.stem)
    body = json.loads(notebook.read_text(encoding="utf-8"))
    changed = False
    for cell in body["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "markdown" or not HEADING.search(source):
            continue
        if number is None:
            raise ExerciseError(f"{notebook.name}: a notebook with exercises needs a name that begins with a number")
        cell["source"] = as_directives(source, int(number[0]), notebook.name)
        changed = True
    return json.dumps(body, indent=1, ensure_ascii=False).encode() + b"\n" if changed else notebook.read_bytes()


# ---- as a Sphinx extension -----------------------------------------------------------------


def with_ids_of_their_own(app, doctree) -> None:
    """Name the content of each box after its label: sphinx-exercise calls all alike, and an id must be unique in its page."""
    from docutils import nodes

    for section in doctree.findall(nodes.section):
        if section["ids"] in (["exercise-content"], ["solution-content"]):
            section["ids"] = [f"{section.parent['label']}-content"]


def setup(app):
    app.connect("doctree-read", with_ids_of_their_own)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
