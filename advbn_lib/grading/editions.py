"""One source, two notebooks: the student's edition without the solutions, the instructor's with them.

The source is a Python file in cells, ``assignments/source/2_write_advbn.py``::

    # %% [markdown]
    # # Write AdvBN
    # %%
    def shift(x, mean_factor, std_factor):
        '''Multiply the channels' mean and std.'''
        ### BEGIN SOLUTION
        ### STUDENT: mu = ...  # over which axes?
        ### STUDENT: raise NotImplementedError("shift: two lines are missing")
        mu = x.mean((0, 2, 3), keepdim=True)
        return std_factor * (x - mu) + mean_factor * mu
        ### END SOLUTION
    # %% tags=["instructor"]
    # what only the instructor sees

In the student's edition the lines between the marks become those after ``### STUDENT:``, or, if there are none, a
``raise NotImplementedError``. Cells tagged ``instructor`` or ``student`` are in that edition alone. Hidden checks are in
neither: they are no part of a source.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from advbn_lib.files import atomic_write

EDITIONS = ("student", "instructor")
_HEAD = re.compile(
    r"^# %%(?:\s+\[(?P<kind>markdown|md|raw)\])?(?P<title>[^\[\]{}=]*?)(?:\s*tags=(?P<tags>\[.*\]))?\s*$"
)
_BEGIN, _END, _STUDENT = "### BEGIN SOLUTION", "### END SOLUTION", "### STUDENT:"


@dataclass(frozen=True)
class Cell:
    """A notebook's cell: "code" or "markdown", its text without a line end at its end, and its tags."""

    kind: str
    text: str
    tags: tuple[str, ...] = ()


def read_source(path: Path) -> list[Cell]:
    """The cells of a source; ValueError, with file and line, for one that is not as it should be."""
    cells: list[Cell] = []
    lines: list[str] = []
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line.startswith("# %%"):
            lines.append(line)
            continue
        _close(cells, lines, path)
        lines = []
        head = _HEAD.match(line)
        if head is None or head["kind"] == "raw":
            raise ValueError(
                f'{path}, line {number}: a cell begins with "# %%", "# %% [markdown]", or these with tags=["a"]'
            )
        try:
            tags = tuple(json.loads(head["tags"] or "[]"))
        except ValueError:
            raise ValueError(f"{path}, line {number}: tags are a JSON list of words") from None
        cells.append(Cell("markdown" if head["kind"] else "code", "", tags))
    _close(cells, lines, path)
    return [cell for cell in cells if cell.text]


def student_edition(cells: list[Cell]) -> list[Cell]:
    """The cells without solutions and without the instructor's."""
    return [
        dataclasses.replace(cell, text=_without_solution(cell.text)) if cell.kind == "code" else cell
        for cell in cells
        if "instructor" not in cell.tags
    ]


def instructor_edition(cells: list[Cell]) -> list[Cell]:
    """The cells with solutions, without the marks."""
    marks = (_BEGIN, _END, _STUDENT)
    return [
        dataclasses.replace(
            cell, text="\n".join(line for line in cell.text.split("\n") if not line.lstrip().startswith(marks))
        )
        for cell in cells
        if "student" not in cell.tags
    ]  # fmt: skip


def notebook(cells: list[Cell], assignment: str, edition: str) -> bytes:
    """The notebook's file: the same bytes for the same cells, without outputs."""
    content = {
        "cells": [_notebook_cell(number, cell) for number, cell in enumerate(cells, 1)],
        "metadata": {
            "advbn": {"assignment": assignment, "edition": edition},
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def editions(folder: Path) -> dict[Path, bytes]:
    """All notebooks that ``folder/source/*.py`` give: ``folder/student/1_name.ipynb``, ``folder/instructor/...``.

    Raises:
        ValueError: if there is no source, or something of a solution or a hidden check would be in a student's edition.
    """
    sources = sorted((folder / "source").glob("*.py"))
    if not sources:
        raise ValueError(f"no sources in {folder / 'source'}")
    made: dict[Path, bytes] = {}
    for source in sources:
        cells = read_source(source)
        name = re.sub(r"^\d+_", "", source.stem)
        for edition, make in zip(EDITIONS, (student_edition, instructor_edition), strict=True):
            made[folder / edition / f"{source.stem}.ipynb"] = notebook(make(cells), name, edition)
        _refuse_leaks(made[folder / "student" / f"{source.stem}.ipynb"].decode(), source)
    return made


def build(folder: Path) -> list[Path]:
    """Write the notebooks that are not up to date, and return their paths."""
    stale = out_of_date(folder)
    made = editions(folder)
    for path in stale:
        with atomic_write(path) as file:
            file.write(made[path])
    return stale


def out_of_date(folder: Path) -> list[Path]:
    """The notebooks that are missing or differ from what their sources give."""
    return [path for path, wanted in editions(folder).items() if not path.is_file() or path.read_bytes() != wanted]


def _close(cells: list[Cell], lines: list[str], path: Path) -> None:
    """Put the lines gathered since its head into the last cell."""
    text = "\n".join(lines).strip("\n")
    if not cells:
        return  # what is before the first cell is a note on the file itself
    cell = cells[-1]
    if cell.kind == "markdown":
        bare = [line for line in text.split("\n") if line and not line.startswith("#")]
        if bare:
            raise ValueError(f"{path}: a markdown line without # before it: {bare[0]!r}")
        text = "\n".join(line[2:] if line.startswith("# ") else line[1:] for line in text.split("\n"))
    else:
        _balanced(text, path)
    cells[-1] = dataclasses.replace(cell, text=text)


def _balanced(text: str, path: Path) -> None:
    inside = False
    for line in text.split("\n"):
        mark = line.strip()
        if mark in (_BEGIN, _END):
            if inside == (mark == _BEGIN):
                raise ValueError(f"{path}: {_BEGIN} and {_END} do not take turns in the cell that begins {text[:60]!r}")
            inside = not inside
        elif mark.startswith(_STUDENT) and not inside:
            raise ValueError(f"{path}: {_STUDENT} stands outside a solution: {mark!r}")
    if inside:
        raise ValueError(f"{path}: a solution without its end in the cell that begins {text[:60]!r}")


def _without_solution(text: str) -> str:
    kept: list[str] = []
    instead: list[str] | None = None  # while in a solution
    indent, name = "", ""
    for line in text.split("\n"):
        mark = line.strip()
        if found := re.match(r"\s*(?:def|class)\s+(\w+)", line):
            name = found[1] if instead is None else name
        if mark == _BEGIN:
            indent, instead = line[: len(line) - len(line.lstrip())], []
        elif mark == _END:
            default = f'raise NotImplementedError("{name or "this part"} is not written yet")'
            kept += [(indent + part).rstrip() for part in instead or [default]]
            instead = None
        elif instead is None:
            kept.append(line)
        elif mark.startswith(_STUDENT):
            instead.append(mark.removeprefix(_STUDENT).removeprefix(" "))
    return "\n".join(kept)


def _notebook_cell(number: int, cell: Cell) -> dict:
    metadata = {"tags": list(cell.tags)} if cell.tags else {}
    common = {"cell_type": cell.kind, "id": f"cell-{number:03d}", "metadata": metadata}
    source = cell.text.splitlines(keepends=True)
    if cell.kind == "markdown":
        return {**common, "source": source}
    return {**common, "execution_count": None, "outputs": [], "source": source}


def _refuse_leaks(student: str, source: Path) -> None:
    for word in (_BEGIN, _END, "hidden=True", "assignments/hidden"):
        if word in student:
            raise ValueError(f"{source}: the student's edition would have {word!r} in it")
