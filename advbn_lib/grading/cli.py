"""The commands ``assignments`` and ``grade`` of ``python -m advbn_lib``."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from advbn_lib.grading import batch, editions, export_gradescope
from advbn_lib.grading.catalogue import all_assignments, find, names
from advbn_lib.grading.grade import GRADED, Examination, examination, grade, text, write
from advbn_lib.grading.notebook import Unreadable, read_file
from advbn_lib.grading.sandbox import Limits, Sandbox, SandboxRefused

NOT_RUN_CODE, REFUSED_CODE = 2, 3
_FOLDER = Path("assignments")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add ``assignments`` and ``grade`` to the command line; each sets ``command`` to a function of the options."""
    assignments = commands.add_parser(
        "assignments", help="the graded notebooks: list them, build their editions, export"
    )
    actions = assignments.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="the assignments, their tasks and points")
    listing.set_defaults(command=_list)
    building = actions.add_parser("build", help="write the student's and the instructor's notebooks from their sources")
    building.add_argument("--folder", type=Path, default=_FOLDER, help="with source/ in it (default: assignments)")
    building.add_argument("--check", action="store_true", help="write nothing; fail if a notebook is out of date")
    building.set_defaults(command=_build)
    exporting = actions.add_parser("export", help="an autograder for a course system; it holds the hidden checks")
    exporting.add_argument("--to", choices=["gradescope"], default="gradescope")
    exporting.add_argument("--assignment", required=True)
    exporting.add_argument("--hidden", type=Path, default=_FOLDER / "hidden")
    exporting.add_argument("--variant", type=int, default=0)
    exporting.add_argument("--out", type=Path, required=True, help="the zip")
    exporting.add_argument("--weak-isolation", action="store_true")
    exporting.set_defaults(command=_export)

    grading = commands.add_parser(
        "grade", help="grade a submitted notebook, or a folder of them",
        epilog="Ends with 0 if graded (whatever the grade), 1 after an error that you can mend, 2 if the submission could "
        "not be run (it has a result, with 0 points), 3 if this machine cannot shut a submission in.",
    )  # fmt: skip
    grading.add_argument("submission", type=Path, help="a notebook, or a folder of notebooks")
    grading.add_argument("--out", type=Path, help="result.json for a notebook, a folder for a folder")
    grading.add_argument("--assignment", help="its name (default, for one notebook: the one that it says it is)")
    grading.add_argument("--hidden", type=Path, default=_FOLDER / "hidden", help="default: assignments/hidden")
    grading.add_argument("--public-only", action="store_true", help="without the hidden checks")
    grading.add_argument("--variant", type=int, default=0, help="of the hidden checks: another number, other inputs")
    grading.add_argument("--jobs", type=int, default=1, help="submissions of a folder at the same time (default: 1)")
    grading.add_argument("--again", action="store_true", help="grade also what has a current result")
    grading.add_argument("--data", type=Path, help="a folder of data sets that submissions may read")
    grading.add_argument("--seconds", type=float, default=Limits.total_seconds, help="for a submission (default: 1800)")
    grading.add_argument("--cell-seconds", type=float, default=Limits.cell_seconds, help="for a cell (default: 120)")
    grading.add_argument("--memory", type=float, default=Limits.memory / 2**30, help="in GB (default: 4)")
    grading.add_argument("--disk", type=int, default=Limits.disk // 2**20, help="in MB (default: 256)")
    grading.add_argument(
        "--threads", type=int, default=Limits.threads, help="of torch, for each submission (default: 1)"
    )
    grading.add_argument("--weak-isolation", action="store_true", help="go on though a submission is not well shut in")
    grading.add_argument("--quiet", action="store_true", help="no report and no progress bar")
    grading.set_defaults(command=_grade)


def run(arguments: list[str]) -> int:
    """These commands alone, without the rest of the program's; the exit status."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    options = parser.parse_args(arguments)
    try:
        options.command(options)
    except SystemExit as error:
        return error.code
    except (ValueError, OSError) as error:
        print(f"advbn_lib: {error}", file=sys.stderr)
        return 1
    return 0


def _list(options: argparse.Namespace) -> None:
    for assignment in all_assignments():
        points = sum(check.points for task in assignment.tasks for check in task.checks)
        print(f"{assignment.number} {assignment.name}: {assignment.title} ({points:g} points in public checks)")
        for task in assignment.tasks:
            print(f"    {task.name}: {task.title} ({len(task.checks)} public checks)")


def _build(options: argparse.Namespace) -> None:
    stale = editions.out_of_date(options.folder) if options.check else editions.build(options.folder)
    for path in stale:
        print(path)
    if options.check and stale:
        raise ValueError("these notebooks are out of date: run `python -m advbn_lib assignments build`")


def _export(options: argparse.Namespace) -> None:
    exam = examination(find(options.assignment), options.hidden, options.variant)
    print(export_gradescope.export(exam, options.hidden, options.out, options.weak_isolation))


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: the table is written, the rooms are closed, their folders are deleted."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set what a signal does
        return

    def end(number: int, frame: object) -> None:
        signal.signal(number, lambda *_: None)  # it is ending already
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _grade(options: argparse.Namespace) -> None:
    with _ended_in_order():
        _grade_all(options)


def _grade_all(options: argparse.Namespace) -> None:
    if not options.submission.exists():
        raise ValueError(f"{options.submission} is not there")
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    name = options.assignment or _claimed(options.submission)
    hidden = None if options.public_only else options.hidden
    make_exam = functools.partial(_examination, name, hidden, options.variant)
    exam = make_exam()
    secrets = tuple(path.resolve() for path in (hidden, options.submission, options.out) if path is not None)
    limits = Limits(
        memory=int(options.memory * 2**30), disk=options.disk * 2**20, cell_seconds=options.cell_seconds,
        total_seconds=options.seconds, threads=options.threads,
    )  # fmt: skip
    make_sandbox = functools.partial(
        Sandbox, limits, exam.assignment.withheld, secrets, options.data, None, options.weak_isolation
    )
    try:
        if options.submission.is_dir():
            if options.out is None:
                raise ValueError("a folder of submissions needs --out, a folder for the results")
            work = batch.Batch(
                options.submission, options.out, make_exam, make_sandbox, options.jobs, options.again, not options.quiet
            )
            for path in batch.left_out(options.submission, options.out):
                name = "".join(c if c.isprintable() else "?" for c in str(path))  # a stranger chose it
                print(f"advbn_lib: not graded, as it is called no notebook (.ipynb): {name}", file=sys.stderr)
            print(batch.grade_folder(work))
            return
        with make_sandbox() as sandbox:
            result = grade(options.submission, exam, sandbox)
    except SandboxRefused as error:
        print(f"advbn_lib: {error}", file=sys.stderr)
        raise SystemExit(REFUSED_CODE) from None
    if options.out is not None:
        write(result, options.out)
    if not options.quiet:
        print(text(result))
    if result.state != GRADED:
        raise SystemExit(NOT_RUN_CODE)


def _examination(name: str, hidden: Path | None, variant: int) -> Examination:
    return examination(find(name), hidden, variant)


def _claimed(submission: Path) -> str:
    """The assignment that a notebook says it is; ValueError if it does not say."""
    try:
        name = json.loads(read_file(submission).decode("utf-8-sig"))["metadata"]["advbn"]["assignment"]
    except (Unreadable, ValueError, KeyError, TypeError, RecursionError):
        name = None
    if name not in names():
        raise ValueError(f"say which assignment this is with --assignment: one of {', '.join(names())}")
    return name
