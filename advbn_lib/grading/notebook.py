"""Reading a submission: a notebook from a stranger."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

MAX_BYTES = 32 * 2**20
MAX_CELLS = 1000
MAX_SOURCE = 2**20


class Unreadable(ValueError):
    """The file is no notebook that can be run. The message says why, for the student."""


def read_file(path: Path) -> bytes:
    """The bytes of a regular file of bounded size; Unreadable for anything else (a link, a pipe, a folder)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise Unreadable(f"the file cannot be opened: {error.strerror}") from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise Unreadable("this is no file")
    with os.fdopen(descriptor, "rb") as file:
        if facts.st_size > MAX_BYTES:
            raise Unreadable(
                f"the file has {facts.st_size / 2**20:.0f} MB; the most is {MAX_BYTES / 2**20:.0f}. Clear its outputs and save it"
            )
        return file.read(MAX_BYTES)


def code_cells(content: bytes) -> list[str]:
    """The sources of a notebook's code cells, in order; Unreadable if it is none."""
    if not content.strip():
        raise Unreadable(
            "the file is empty. Save the notebook again in Jupyter, and look at the size of what you hand in"
        )
    try:
        notebook = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise Unreadable("the file is no notebook: it is no JSON. Save it again in Jupyter as .ipynb") from None
    if not isinstance(notebook, dict) or notebook.get("nbformat") != 4 or not isinstance(notebook.get("cells"), list):
        raise Unreadable("the file is no notebook of format 4. Save it again in a current Jupyter as .ipynb")
    if len(notebook["cells"]) > MAX_CELLS:
        raise Unreadable(f"the notebook has more than {MAX_CELLS} cells")
    sources = [
        _source(cell) for cell in notebook["cells"] if isinstance(cell, dict) and cell.get("cell_type") == "code"
    ]
    sources = [source for source in sources if source.strip()]
    if not sources:
        raise Unreadable("the notebook has no code")
    if sum(map(len, sources)) > MAX_SOURCE:
        raise Unreadable(f"the notebook has more than {MAX_SOURCE} characters of code")
    return sources


def _source(cell: dict) -> str:
    source = cell.get("source", "")
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        raise Unreadable("the notebook has a code cell without text")
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    return source.encode("utf-8", "replace").decode()
