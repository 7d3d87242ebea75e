"""Grading a folder of submissions: a result for each, a table of all, and nothing that one of them does stops the others."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from advbn_lib.files import atomic_write, sha256
from advbn_lib.grading.grade import GRADER_ERROR, Examination, failed, grade, write
from advbn_lib.grading.sandbox import Sandbox

TABLE = "points.csv"


@dataclass(frozen=True)
class Batch:
    """A folder of submissions and how to grade them.

    Attributes:
        folder: its notebooks are graded, those of folders in it too; nothing that begins with a dot.
        out: ``out/alice.json`` for ``folder/alice.ipynb``, and ``out/points.csv``.
        make_exam, make_sandbox: called in each worker; with several jobs both must be picklable.
        jobs: submissions at the same time, each in a worker process of its own.
        again: grade also what has a result of the same file, checks and variant.
    """

    folder: Path
    out: Path
    make_exam: Callable[[], Examination]
    make_sandbox: Callable[[], Sandbox]
    jobs: int = 1
    again: bool = False
    progress: bool = True


def submissions(folder: Path) -> list[Path]:
    """The notebooks in a folder, sorted."""
    found = [
        path for path in folder.rglob("*.ipynb") if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    return sorted(found)


def grade_folder(batch: Batch) -> Path:
    """Grade what has no current result; returns the table's path. Goes on where an interrupted run stopped.

    Raises:
        ValueError: if there is no submission.
        SandboxRefused: if the isolation is refused.
    """
    found = submissions(batch.folder)
    if not found:
        raise ValueError(f"no notebook (*.ipynb) in {batch.folder}")
    exam = batch.make_exam()
    todo = [path for path in found if batch.again or not is_current(result_path(batch, path), path, exam)]
    try:
        with tqdm(total=len(found), initial=len(found) - len(todo), unit="notebook", disable=not batch.progress) as bar:
            for _ in _one_by_one(batch, exam, todo) if batch.jobs == 1 else _in_workers(batch, exam, todo):
                bar.update()
    finally:
        table = _write_table(batch, found)
    return table


def result_path(batch: Batch, submission: Path) -> Path:
    """Where a submission's result is."""
    return batch.out / submission.relative_to(batch.folder).with_suffix(".json")


def is_current(result: Path, submission: Path, exam: Examination) -> bool:
    """Whether there is a result of this very file by these very checks."""
    try:
        known = json.loads(result.read_text())
        digest = sha256(submission) if submission.is_file() and not submission.is_symlink() else ""
    except (OSError, ValueError):
        return False
    wanted = {"assignment": exam.assignment.name, "variant": exam.variant, "hidden": exam.hidden, "sha256": digest}
    return known.get("state") != GRADER_ERROR and all(known.get(name) == value for name, value in wanted.items())


def _one_by_one(batch: Batch, exam: Examination, todo: list[Path]) -> Iterator[None]:
    if not todo:
        return
    with batch.make_sandbox() as sandbox:
        for path in todo:
            _grade_and_write(batch, path, exam, sandbox)
            yield


def _in_workers(batch: Batch, exam: Examination, todo: list[Path]) -> Iterator[None]:
    """In worker processes. What was lost with a worker that broke is tried once more, each in a worker of its own."""
    batch.make_sandbox().close()  # is it refused? here it can be said
    lost = []
    with _pool(batch, min(batch.jobs, max(len(todo), 1))) as pool:
        waiting: dict[Future, Path] = {pool.submit(_work, path): path for path in todo}
        for done in as_completed(waiting):
            try:
                done.result()
                yield
            except BrokenProcessPool:
                lost.append(waiting[done])
    for path in lost:
        with _pool(batch, 1) as pool:
            try:
                pool.submit(_work, path).result()
            except BrokenProcessPool:
                with batch.make_sandbox() as sandbox:
                    write(failed(path, exam, sandbox, "the grader's worker broke twice"), result_path(batch, path))
        yield


def _pool(batch: Batch, jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (batch,))


_worker: dict[str, object] = {}  # of a worker process: set once when it starts, as its initialiser can return nothing


def _start_worker(batch: Batch) -> None:
    _worker.update(batch=batch, exam=batch.make_exam())


def _work(path: Path) -> None:
    with _worker["batch"].make_sandbox() as sandbox:  # one for each: a worker process ends without cleaning up
        _grade_and_write(_worker["batch"], path, _worker["exam"], sandbox)


def _grade_and_write(batch: Batch, path: Path, exam: Examination, sandbox: Sandbox) -> None:
    try:
        result = grade(path, exam, sandbox)
    except Exception as error:  # a fault of the grader is one submission's, marked for a person, and not the others'
        result = failed(path, exam, sandbox, f"{type(error).__name__}: {error}")
    write(result, result_path(batch, path))


def _write_table(batch: Batch, found: list[Path]) -> Path:
    """``points.csv``: a row for each submission that has a result."""
    results = [
        (path, json.loads(result_path(batch, path).read_text())) for path in found if result_path(batch, path).is_file()
    ]
    tasks = list(dict.fromkeys(task["name"] for _, result in results for task in result["tasks"]))
    first: dict[str, str] = {}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["submission", "state", "points", "of", *tasks, "problem", "same_file_as"])
    for path, result in results:
        points = {task["name"]: task["points"] for task in result["tasks"]}
        name = _harmless(str(path.relative_to(batch.folder)))
        twin = first.setdefault(result["sha256"], name) if result["sha256"] else name
        row = [result["state"], result["points"], result["of"], *(points.get(task, 0.0) for task in tasks)]
        table.writerow([name, *row, _harmless(result["problem"]), "" if twin == name else twin])
    with atomic_write(batch.out / TABLE) as file:
        file.write(text.getvalue().encode("utf-8", "replace"))
    return batch.out / TABLE


def _harmless(text: str) -> str:
    """The text of a cell that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
