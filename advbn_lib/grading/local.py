"""``check("assignment.task")`` in the notebook: the public checks of a task, on the notebook's own functions, at once."""

from __future__ import annotations

import os
import sys
from typing import Any

from advbn_lib.grading.answering import Desk
from advbn_lib.grading.asking import Asking
from advbn_lib.grading.catalogue import find
from advbn_lib.grading.judge import Verdict, judge
from advbn_lib.grading.task import Task

BEING_GRADED = "ADVBN_BEING_GRADED"
_MARKS = {"passed": "ok   ", "wrong": "WRONG", "not done": "to do", "ended": "WRONG", "not tried": "  -  "}


class LocalStudent(Asking):
    """The student in this very process.

    Messages are packed and unpacked as when grading, so a check sees the same values, and can change none of the
    notebook's.
    """

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._desk = Desk(namespace)

    def exchange(self, message: bytes) -> bytes:
        return self._desk.answer(message)


def check(name: str, namespace: dict[str, Any] | None = None) -> None:
    """Run the public checks of ``"assignment.task"`` and print what they say.

    Args:
        namespace: where the functions are; the caller's variables if None.

    Raises:
        ValueError: if there is no such task.
    """
    if os.environ.get(BEING_GRADED):
        return  # the grader asks for itself, later
    assignment, _, task = name.partition(".")
    try:
        wanted = find(assignment).task(task)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    student = LocalStudent(sys._getframe(1).f_globals if namespace is None else namespace)
    print(report(wanted.title, verdicts_of(wanted, student)))


def verdicts_of(task: Task, student: LocalStudent) -> list[Verdict]:
    """The verdicts of the public checks; what needs a check that does not hold is not tried."""
    found: dict[str, Verdict] = {}
    for one in task.checks:
        if one.hidden:
            continue
        if one.needs and found[one.needs].state != "passed":
            found[one.name] = Verdict(one.name, one.says, False, 0.0, one.points, "not tried")
        else:
            found[one.name] = judge(one, student)
    return list(found.values())


def report(title: str, verdicts: list[Verdict]) -> str:
    """The verdicts as text: a line each, and the message below where there is one."""
    lines = [title]
    for verdict in verdicts:
        lines.append(f"  {_MARKS[verdict.state]}  {verdict.name}: {verdict.says}")
        if verdict.message:
            lines.append(f"         {verdict.message}")
    passed = sum(verdict.state == "passed" for verdict in verdicts)
    if any(verdict.state == "not tried" for verdict in verdicts):
        lines.append("  (-: not tried, because a check above does not hold)")
    return "\n".join([*lines, f"  {passed} of {len(verdicts)} public checks hold"])
