"""Grading one submission: from a notebook to a result with partial credit."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

import advbn_lib
from advbn_lib.files import atomic_write
from advbn_lib.grading.judge import Verdict, judge
from advbn_lib.grading.notebook import Unreadable, code_cells, read_file
from advbn_lib.grading.remote import CellReport, RemoteStudent
from advbn_lib.grading.sandbox import Isolation, Sandbox
from advbn_lib.grading.task import Assignment, Check, Task

GRADED, NOT_RUN, GRADER_ERROR = "graded", "could not be run", "the grader failed"


@dataclass(frozen=True)
class TaskResult:
    """A task's verdicts, and the points they add up to."""

    name: str
    title: str
    points: float
    of: float
    checks: tuple[Verdict, ...]


@dataclass(frozen=True)
class Result:
    """A submission's grade.

    Attributes:
        state: "graded", "could not be run" (no notebook; 0 points) or "the grader failed" (look into it by hand).
        problem: why it is not graded, "" if it is.
        variant: the number that the hidden checks were made with.
        hidden: SHA-256 of the hidden checks' file, "" without one.
        submission, sha256: the file's name and digest.
        code: digest of the code cells alone, "" if there are none.
        failed_cells: the cells that raised an error or ended the process.
        skipped_lines: lines for Jupyter alone (``!``, ``%``), which are not run.
        isolation: what was in force.
        seconds: how long it took.
        checks: digest of the public checks' code and the grader's, see :func:`checks_digest`.
    """

    assignment: str
    title: str
    variant: int
    hidden: str
    submission: str
    sha256: str
    state: str
    problem: str
    points: float
    of: float
    tasks: tuple[TaskResult, ...]
    failed_cells: tuple[CellReport, ...] = ()
    skipped_lines: int = 0
    isolation: Isolation | None = None
    seconds: float = 0.0
    code: str = ""
    versions: dict[str, str] = field(default_factory=lambda: versions())
    checks: str = field(default_factory=lambda: checks_digest())


@dataclass(frozen=True)
class Examination:
    """An assignment with its hidden checks."""

    assignment: Assignment
    variant: int = 0
    hidden: str = ""


def examination(assignment: Assignment, hidden: Path | None, variant: int = 0) -> Examination:
    """The assignment with the hidden checks of ``hidden/<name>.py``: its ``checks(variant)``, or its ``CHECKS``.

    Args:
        hidden: folder; None for the public checks alone.

    Raises:
        ValueError: if the file is missing, or holds neither.
    """
    if hidden is None:
        return Examination(assignment, variant)
    path = hidden / f"{assignment.name}.py"
    if not path.is_file():
        raise ValueError(
            f"no hidden checks: {path} is not there. Name their folder with --hidden, or say --public-only"
        )
    content = path.read_bytes()
    spec = importlib.util.spec_from_file_location(f"hidden_checks_{assignment.name}", path)
    module = importlib.util.module_from_spec(spec)
    module.VARIANT = variant
    spec.loader.exec_module(module)
    if hasattr(module, "checks"):
        found: dict[str, tuple[Check, ...]] = module.checks(variant)
    elif hasattr(module, "CHECKS"):
        found = module.CHECKS
    else:
        raise ValueError(f"{path} defines neither checks(variant) nor CHECKS")
    return Examination(assignment.with_hidden(found), variant, hashlib.sha256(content).hexdigest())


def grade(submission: Path, exam: Examination, sandbox: Sandbox) -> Result:
    """Grade a notebook. Whatever is in it, there is a result.

    Raises:
        SandboxRefused: if no process can be started in the sandbox: the machine's fault, not the submission's.
    """
    started = time.monotonic()
    digest = ""
    try:
        content = read_file(submission)
        digest = hashlib.sha256(content).hexdigest()
        cells = code_cells(content)
    except Unreadable as error:
        return _empty(submission, exam, digest, NOT_RUN, str(error), sandbox.isolation)
    student = RemoteStudent(sandbox, cells)
    try:
        tasks = _graded(exam.assignment, student)
    finally:
        student.close()
    return Result(
        exam.assignment.name, exam.assignment.title, exam.variant, exam.hidden, _name(submission), digest, GRADED, "",
        sum(task.points for task in tasks), sum(task.of for task in tasks), tasks,
        tuple(cell for cell in student.cells if cell.error), sum(cell.skipped_lines for cell in student.cells),
        sandbox.isolation, round(time.monotonic() - started, 1), hashlib.sha256(json.dumps(cells).encode()).hexdigest(),
    )  # fmt: skip


def failed(submission: Path, exam: Examination, sandbox: Sandbox, problem: str) -> Result:
    """The result of a submission that the grader broke on: 0 points, and marked so that a person looks."""
    return _empty(submission, exam, "", GRADER_ERROR, problem, sandbox.isolation)


def _graded(assignment: Assignment, student: RemoteStudent) -> tuple[TaskResult, ...]:
    """Each task's result. All public checks come before the first hidden one.

    The message of a public check may repeat what the submission says. After a hidden check this could be hidden inputs,
    which it has remembered.
    """
    asked = [(task.name, check) for task in assignment.tasks for check in task.checks]
    verdicts: dict[tuple[str, str], Verdict] = {}
    for task, check in sorted(asked, key=lambda pair: pair[1].hidden):
        student.budget(check.seconds)
        verdicts[task, check.name] = judge(check, student)
    return tuple(_result(task, tuple(verdicts[task.name, c.name] for c in task.checks)) for task in assignment.tasks)


def _result(task: Task, verdicts: tuple[Verdict, ...]) -> TaskResult:
    return TaskResult(task.name, task.title, sum(v.points for v in verdicts), sum(v.of for v in verdicts), verdicts)


def _empty(submission: Path, exam: Examination, digest: str, state: str, problem: str, isolation: Isolation) -> Result:
    of = sum(check.points for task in exam.assignment.tasks for check in task.checks)
    return Result(
        exam.assignment.name, exam.assignment.title, exam.variant, exam.hidden, _name(submission), digest, state, problem, 0.0,
        of, (), isolation=isolation,
    )  # fmt: skip


def _name(path: Path) -> str:
    return "".join(c if c.isprintable() else "?" for c in path.name.encode("utf-8", "replace").decode())


def versions() -> dict[str, str]:
    """What the grader ran with."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "advbn_lib": advbn_lib.__version__}


@functools.cache
def checks_digest() -> str:
    """SHA-256 of the code of the public checks and of the grader: after a change of it a result is an old one."""
    library = Path(advbn_lib.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(path for part in ("assignments", "grading") for path in (library / part).rglob("*.py")):
        digest.update(
            f"{path.relative_to(library).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    return digest.hexdigest()


def write(result: Result, path: Path) -> None:
    """The result as JSON, whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(dataclasses.asdict(result), indent=1).encode() + b"\n")


def text(result: Result) -> str:
    """The result for people: a line for each check, and the message below it."""
    lines = [f"{result.submission}: {result.title}: {result.points:g} of {result.of:g} points"]
    if result.problem:
        lines.append(f"  {result.state}: {result.problem}")
    for cell in result.failed_cells:
        lines.append(
            f"  cell {cell.number} ended with {cell.error}: {cell.message} {cell.where and f'({cell.where})'}".rstrip()
        )
    for task in result.tasks:
        lines.append(f"  {task.title}: {task.points:g} of {task.of:g}")
        said = set()
        for verdict in task.checks:
            kind = "hidden, " if verdict.hidden else ""
            lines.append(
                f"    [{kind}{verdict.state}, {verdict.points:g} of {verdict.of:g}] {verdict.name}: {verdict.says}"
            )
            if verdict.message:
                again = verdict.message in said and len(verdict.message) > 60
                lines.append("        (the same message as above)" if again else f"        {verdict.message}")
                said.add(verdict.message)
    if result.isolation is not None and not result.isolation.strong:
        lines.append(f"  weak isolation: a submission could {'; '.join(result.isolation.open)}")
    return "\n".join(lines)
