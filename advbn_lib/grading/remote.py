"""The student in a process of its own: starts it, runs the notebook's cells in it, asks it, and outlives it."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from advbn_lib.grading.asking import Asking, _text
from advbn_lib.grading.sandbox import Room, Sandbox, SandboxRefused
from advbn_lib.grading.task import Dead, Kept
from advbn_lib.grading.wire import BadMessage, pack, unpack

_COMMAND = ["-B", "-m", "advbn_lib.grading.child"]
_MOST_ENDS = 2  # of the process in one function: then it is not asked again, so that restarts are left for the others


@dataclass(frozen=True)
class CellReport:
    """What came of a cell (numbered from 1 among the code cells): an error, or lines that were for Jupyter alone."""

    number: int
    error: str = ""
    message: str = ""
    where: str = ""
    skipped_lines: int = 0


class RemoteStudent(Asking):
    """Answers calls from a closed room.

    A process that ends is started again at the next check, without the cells during which one ended: what the other
    cells define can still be graded. A function in which it ended twice is not asked again, and costs no restart more.

    Attributes:
        cells: what came of the cells, the first time.
        spent: True if there are no restarts or no time left.
    """

    def __init__(self, sandbox: Sandbox, cells: list[str]) -> None:
        self.cells: list[CellReport] = []
        self._sandbox, self._limits, self._sources = sandbox, sandbox.limits, cells
        self._deadly: set[int] = set()
        self._ends: Counter[str] = Counter()
        self._made_by: dict[int, str] = {}
        self._starts = 0
        self._end = time.monotonic() + sandbox.limits.total_seconds
        self._seconds, self._until = sandbox.limits.total_seconds, self._end
        self._unasked = True  # since begin(): only then does a process started anew know as much as the old one
        self._line: _Line | None = None
        self._bring_up()

    @property
    def spent(self) -> bool:
        return time.monotonic() >= self._end or (self._line is None and self._starts > self._limits.restarts)

    def budget(self, seconds: float) -> None:
        """All answers from now on must come within so many seconds."""
        self._seconds = seconds
        self._until = min(self._end, time.monotonic() + seconds)

    def begin(self) -> None:
        """Start a check. The process hears of it, and is started again if it has ended, at the first question."""
        self._seed, self._unasked = 0, True
        self._made_by.clear()

    def _ask(self, **request: Any) -> dict[str, Any]:
        function = self._function(request)
        if self._ends[function] >= _MOST_ENDS:
            raise Dead(f"your code's process ended {_MOST_ENDS} times in `{function}`: it is not asked again")
        if self._unasked:
            if self._line is None and not self.spent:
                self._bring_up()
                self.budget(self._seconds)
            self._unasked = False
            super()._ask(do="begin")
        running = self._line is not None
        try:
            reply = super()._ask(**request)
        except Dead:
            self._ends[function] += bool(function) and running
            raise
        if isinstance(kept := reply.get("value"), Kept):
            self._made_by[kept.number] = function
        return reply

    def _function(self, request: dict[str, Any]) -> str:
        """The name of the student's function that a request runs; "" if it runs none, as far as is known."""
        if request["do"] == "call":
            return request["name"]
        if request["do"] != "on":
            return ""
        if owner := self._made_by.get(request["kept"].number):
            return owner if request["name"] == "__call__" else f"{owner}.{request['name']}"
        # An object of ours that is handed one of the student's.
        handed = (self._made_by.get(part.number) for part in request["args"] if isinstance(part, Kept))
        return next(filter(None, handed), "")

    def exchange(self, message: bytes) -> bytes:
        if self._line is None:
            if time.monotonic() >= self._end:
                raise Dead(f"the notebook used up its {self._limits.total_seconds:.0f} s before this check")
            if not self.spent:
                raise Dead("your code's process ended earlier in this check")
            raise Dead("your code's process ended before this check, too often to start it again")
        try:
            return self._line.exchange(message, self._until, self._limits.answer_bytes)
        except Dead:
            self.close()
            raise

    def give_up(self) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def _bring_up(self) -> None:
        """Start processes until one has come through all cells that do not end it."""
        first = not self.cells
        while self._line is None and not self.spent:
            self._starts += 1
            self._line = _Line(self._sandbox)
            for number, source in enumerate(self._sources, 1):
                if number in self._deadly:
                    continue
                report = self._run_cell(number, source)
                if first and number > len(self.cells):
                    self.cells.append(report)
                if self._line is None:
                    break
        if first:  # no start came so far
            self.cells += [
                CellReport(n, "NotRun", "an earlier cell used up the time")
                for n in range(len(self.cells) + 1, len(self._sources) + 1)
            ]

    def _run_cell(self, number: int, source: str) -> CellReport:
        until = min(self._end, time.monotonic() + self._limits.cell_seconds)
        try:
            reply = unpack(self._line.exchange(pack({"do": "run", "number": number, "source": source}), until, 2**20))
            if not isinstance(reply, dict):
                raise BadMessage("no reply")
        except (Dead, BadMessage) as error:
            self.close()
            self._deadly.add(number)
            return CellReport(number, "Ended", str(error))
        skipped = reply.get("skipped")
        texts = [_text(reply.get(part)) for part in ("error", "message", "where")]
        return CellReport(number, *texts, skipped_lines=skipped if isinstance(skipped, int) else 0)


class _Line:
    """The connection to one process: framed messages through two pipes, each with a deadline."""

    def __init__(self, sandbox: Sandbox) -> None:
        theirs_in, self._requests = os.pipe()
        self._replies, theirs_out = os.pipe()
        command = [*_COMMAND, str(theirs_in), str(theirs_out)]
        try:
            self._room: Room = sandbox.start(
                command, (theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        for descriptor in (self._requests, self._replies):
            os.set_blocking(descriptor, False)
        self._limits = sandbox.limits
        try:
            unpack(self._receive(time.monotonic() + sandbox.limits.start_seconds, 2**16))
        except (Dead, BadMessage) as error:
            os.set_blocking(self._room.process.stderr.fileno(), False)
            said = (self._room.process.stderr.read() or b"").decode(errors="replace").strip().rpartition("\n")[2]
            self.close()
            raise SandboxRefused(f"Python does not start in the closed room: {said or error}") from None

    def exchange(self, message: bytes, until: float, most: int) -> bytes:
        """Send and receive by the time ``until`` (of time.monotonic); Dead if it cannot be done."""
        started = time.monotonic()
        if self._speaks():
            raise Dead("your code's process answered before it was asked")
        waiting = memoryview(len(message).to_bytes(8, "big") + message)
        while waiting:
            self._wait(self._requests, select.POLLOUT, until, started)
            try:
                waiting = waiting[os.write(self._requests, waiting) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Dead(self._last_words()) from None
        reply = self._receive(until, most, started)
        if self._speaks():
            raise Dead("your code's process answered more than it was asked")
        return reply

    def close(self) -> None:
        """End the process."""
        if self._requests >= 0:
            os.close(self._requests)
            os.close(self._replies)
            self._requests = -1
        self._room.stop()

    def _receive(self, until: float, most: int, started: float | None = None) -> bytes:
        size = int.from_bytes(self._read(8, until, started), "big")
        if size > most:
            # Without its size, which a submission can choose: this is said of hidden checks too.
            raise Dead(f"your code's answer is too large; the most is {most / 2**20:.0f} MB")
        return self._read(size, until, started)

    def _read(self, size: int, until: float, started: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(self._replies, select.POLLIN, until, started)
            try:
                part = os.read(self._replies, min(size - len(parts), 2**20))
            except BlockingIOError:
                continue
            if not part:
                raise Dead(self._last_words())
            parts += part
        return bytes(parts)

    def _speaks(self) -> bool:
        """Whether there is something to read; the end of the process is nothing."""
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        return any(event & select.POLLIN for _, event in poll.poll(0))

    def _wait(self, descriptor: int, event: int, until: float, started: float | None) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left = until - time.monotonic()
        if left <= 0 or not poll.poll(1000 * left):
            seconds = until - (started or until)
            raise Dead(f"your code did not answer in time ({max(seconds, 0):.0f} s): is there an endless loop?")

    def _last_words(self) -> str:
        """Why the process is gone."""
        try:
            self._room.process.wait(timeout=5)  # the watcher needs a moment to see it
        except subprocess.TimeoutExpired:
            pass  # it closed its side but lives on: stop() ends it
        ended = self._room.stop()
        if ended["ended"] == "memory":
            return f"your code took more than {self._limits.memory / 2**30:.1f} GB of memory"
        if ended["ended"].startswith("exit"):
            return f"your code ended the process ({ended['ended']}): a function returns, it does not exit"
        return f"your code's process broke off ({ended['ended']})"
