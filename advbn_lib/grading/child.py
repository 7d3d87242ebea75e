"""The submission's process: ``python -m advbn_lib.grading.child REQUESTS REPLIES`` in a closed room.

Runs the notebook's cells and answers calls, one message after another, until the requests end. It is at the mercy of the
code that it runs; see :mod:`advbn_lib.grading.sandbox`.
"""

from __future__ import annotations

import linecache
import os
import re
import sys
import types
from typing import Any, BinaryIO

import torch

from advbn_lib.grading.answering import Desk, students_line
from advbn_lib.grading.wire import pack, unpack

_FOR_JUPYTER = re.compile(r"^(\s*)(?:[!%?]|[\w.\[\], ]+=\s*[!%]|\w[\w.]*\?{1,2}\s*$)")
_RUN_THE_REST = ("%%time", "%%timeit", "%%capture")


def main(requests: BinaryIO, replies: BinaryIO) -> None:
    """Serve until the requests end."""
    module = types.ModuleType("__main__")
    module.__dict__["display"] = lambda *values, **options: None
    sys.modules["__main__"] = module
    desk = Desk(module.__dict__)
    _send(replies, pack({"ready": torch.__version__}))
    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what went wrong before this line is the grader's concern, what is printed after it nobody's
        os.dup2(quiet, stream)
    while head := requests.read(8):
        _send(replies, _reply(requests.read(int.from_bytes(head, "big")), desk, module.__dict__))


def _reply(message: bytes, desk: Desk, namespace: dict[str, Any]) -> bytes:
    """The reply to a message, which no variable holds while the submission's code runs."""
    request, waiting = unpack(message), [message]
    del message
    if request["do"] == "run":
        waiting.clear()
        return _run(request, namespace)
    request.clear()
    return desk.answer(waiting.pop())


def _run(request: dict[str, Any], namespace: dict[str, Any]) -> bytes:
    """Run a cell; the reply says how many of its lines were for Jupyter, and which error ended it."""
    name = f"cell {request['number']}"
    skipped = 0
    try:
        source, skipped = without_jupyter(request["source"])
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec", dont_inherit=True), namespace)
    except (Exception, SystemExit) as error:
        where = students_line(error, namespace)
        if isinstance(error, SyntaxError) and error.filename == name:
            where = f"{name}, line {error.lineno}"
        return pack({"skipped": skipped, "error": type(error).__name__, "message": str(error)[:600], "where": where})
    return pack({"skipped": skipped})


def without_jupyter(source: str) -> tuple[str, int]:
    """Python's part of a cell, and the number of lines left out: ``!pip install x``, ``%matplotlib inline``, ``x?``.

    Lines that Python understands are never left out: a string may hold such lines.
    """
    first = source.lstrip().split(None, 1)[0] if source.strip() else ""
    if first.startswith("%%"):
        if first not in _RUN_THE_REST:
            return "", len(source.splitlines())
        head, _, rest = source.lstrip().partition("\n")
        rest, more = without_jupyter(rest)
        return "\n" + rest, more + 1
    try:
        compile(source, "cell", "exec", dont_inherit=True)
        return source, 0
    except SyntaxError:
        pass
    lines = source.split("\n")
    kept = [_FOR_JUPYTER.sub(r"\1pass  # ", line, count=1) if _FOR_JUPYTER.match(line) else line for line in lines]
    return "\n".join(kept), sum(old != new for old, new in zip(lines, kept, strict=True))


def _send(replies: BinaryIO, message: bytes) -> None:
    replies.write(len(message).to_bytes(8, "big"))
    replies.write(message)
    replies.flush()


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with os.fdopen(int(sys.argv[1]), "rb") as incoming, os.fdopen(int(sys.argv[2]), "wb") as outgoing:
        main(incoming, outgoing)
