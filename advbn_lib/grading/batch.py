"""Grading a folder of submissions: a result for each, a table of all, and nothing that one of them does stops the others."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from advbn_lib.files import atomic_write, sha256
from advbn_lib.grading.grade import GRADER_ERROR, Examination, checks_digest, failed, grade, write
from advbn_lib.grading.sandbox import Sandbox

TABLE = "points.csv"


@dataclass(frozen=True)
class Batch:
    """A folder of submissions and how to grade them.

    Attributes:
        folder: its notebooks are graded, those of folders in it too; nothing that begins with a dot.
        out: ``out/alice.json`` for ``folder/alice.ipynb``, and ``out/points.csv``, which names each result's file.
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
    """The notebooks in a folder, sorted: all that is called ``*.ipynb``, in small or large letters."""
    return [path for path in _visible(folder) if _is_notebook(path)]


def left_out(folder: Path, out: Path | None = None) -> list[Path]:
    """The other files in a folder, sorted, but for those in ``out``: perhaps somebody handed in a zip."""
    results = out.resolve() if out is not None else None
    return [
        path
        for path in _visible(folder)
        if not _is_notebook(path) and not path.is_dir() and (results is None or results not in path.resolve().parents)
    ]


def _visible(folder: Path) -> list[Path]:
    """What is in a folder and its folders, without what begins with a dot."""
    return sorted(
        path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def _is_notebook(path: Path) -> bool:
    return path.suffix.lower() == ".ipynb"


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
    places = result_places(batch, found)
    todo = {path: places[path] for path in found if batch.again or not is_current(places[path], path, exam)}
    steps = _one_by_one(batch, exam, todo) if batch.jobs == 1 else _in_workers(batch, exam, todo)
    try:
        with (
            tqdm(total=len(found), initial=len(found) - len(todo), unit="notebook", disable=not batch.progress) as bar,
            contextlib.closing(steps),
        ):
            for _ in steps:
                bar.update()
    finally:
        table = _write_table(batch, places)
    return table


@dataclass(frozen=True)
class Place:
    """Where a submission's result is: at ``usual``, or at ``spare`` if no file can be made there."""

    usual: Path
    spare: Path

    def write(self, result: Any) -> None:
        """Write the result; OSError if neither works."""
        try:
            write(result, self.usual)
        except OSError:  # a path that is too long, or something is in the way: a submission chooses its name
            write(result, self.spare)
        else:
            if self.spare != self.usual:
                self.spare.unlink(missing_ok=True)

    def read(self) -> tuple[Path, dict[str, Any]] | None:
        """The file and the result in it; None without one that can be read."""
        for path in dict.fromkeys((self.spare, self.usual)):  # the spare one is there only if it is the newer one
            try:
                known = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if isinstance(known, dict):
                return path, known
        return None


def result_places(batch: Batch, found: list[Path]) -> dict[Path, Place]:
    """Where each result goes. One that would be in the way of another one, or of the table, goes to its spare place."""
    names = {path: path.relative_to(batch.folder) for path in found}
    spares = {
        path: batch.out / f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.json" for path, name in names.items()
    }
    files, folders = {batch.out / TABLE, *spares.values()}, {batch.out}  # nobody may take the spare place of another
    places = {}
    for path, name in names.items():
        usual = batch.out / name.with_suffix(".json")
        above = {parent for parent in usual.parents if parent.is_relative_to(batch.out)}
        if usual in files | folders or above & files:
            usual, above = spares[path], {batch.out}
        files.add(usual)
        folders |= above
        places[path] = Place(usual, spares[path])
    return places


def is_current(place: Place, submission: Path, exam: Examination) -> bool:
    """Whether there is a result of this very file by these very checks."""
    found = place.read()
    try:
        digest = sha256(submission) if submission.is_file() and not submission.is_symlink() else ""
    except OSError:
        return False
    wanted = {
        "assignment": exam.assignment.name, "variant": exam.variant, "hidden": exam.hidden, "checks": checks_digest(),
        "sha256": digest,
    }  # fmt: skip
    if found is None or found[1].get("state") == GRADER_ERROR:
        return False
    return all(found[1].get(name) == value for name, value in wanted.items())


def _one_by_one(batch: Batch, exam: Examination, todo: dict[Path, Place]) -> Iterator[None]:
    if not todo:
        return
    with batch.make_sandbox() as sandbox:
        for path, place in todo.items():
            _grade_and_write(path, place, exam, sandbox)
            yield


def _in_workers(batch: Batch, exam: Examination, todo: dict[Path, Place]) -> Iterator[None]:
    """In worker processes. What was lost with a worker that broke is tried once more, each in a worker of its own."""
    batch.make_sandbox().close()  # is it refused? here it can be said
    lost = []
    with _pool(batch, min(batch.jobs, max(len(todo), 1))) as pool:
        waiting: dict[Future, Path] = {pool.submit(_work, path, place): path for path, place in todo.items()}
        for done in as_completed(waiting):
            try:
                done.result()
                yield
            except BrokenProcessPool:
                lost.append(waiting[done])
    for path in lost:
        with _pool(batch, 1) as pool:
            try:
                pool.submit(_work, path, todo[path]).result()
            except BrokenProcessPool:
                with batch.make_sandbox() as sandbox:
                    todo[path].write(failed(path, exam, sandbox, "the grader's worker broke twice"))
        yield


@contextlib.contextmanager
def _pool(batch: Batch, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes; an interrupt ends them at once, with their closed rooms."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start_worker, (batch,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


_worker: dict[str, object] = {}  # of a worker process: set once when it starts, as its initialiser can return nothing


def _start_worker(batch: Batch) -> None:
    _worker.update(batch=batch, exam=batch.make_exam(), ending=False, working=False)
    signal.signal(signal.SIGTERM, _end_worker)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches all processes; the first one then ends the others


def _end_worker(*_: object) -> None:
    if _worker["ending"] and _worker["working"]:
        return  # it is cleaning up already
    _worker["ending"] = True
    raise SystemExit(128 + signal.SIGTERM)  # so that the room is closed and its folder deleted


def _work(path: Path, place: Place) -> None:
    _worker["working"] = True
    try:
        if not _worker["ending"]:
            with _worker["batch"].make_sandbox() as sandbox:  # one for each: a worker process ends without cleaning up
                _grade_and_write(path, place, _worker["exam"], sandbox)
    finally:
        if _worker["ending"]:
            os._exit(128 + signal.SIGTERM)  # the pool would go on with what it has handed over already
        _worker["working"] = False


def _grade_and_write(path: Path, place: Place, exam: Examination, sandbox: Sandbox) -> None:
    try:
        result = grade(path, exam, sandbox)
    except Exception as error:  # a fault of the grader is one submission's, marked for a person, and not the others'
        result = failed(path, exam, sandbox, f"{type(error).__name__}: {error}")
    place.write(result)


def _write_table(batch: Batch, places: dict[Path, Place]) -> Path:
    """``points.csv``: a row for each submission that has a result."""
    results = [(path, *known) for path, place in places.items() if (known := place.read()) is not None]
    tasks = list(dict.fromkeys(task["name"] for _, _, result in results for task in result["tasks"]))
    first: dict[str, str] = {}
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["submission", "state", "points", "of", *tasks, "problem", "result", "same_code_as"])
    for path, file, result in results:
        points = {task["name"]: task["points"] for task in result["tasks"]}
        name = _harmless(str(path.relative_to(batch.folder)))
        twin = first.setdefault(result["code"], name) if result.get("code") else name
        row = [result["state"], result["points"], result["of"], *(points.get(task, 0.0) for task in tasks)]
        where = _harmless(str(file.relative_to(batch.out)))
        table.writerow([name, *row, _harmless(result["problem"]), where, "" if twin == name else twin])
    with atomic_write(batch.out / TABLE) as file:
        file.write(text.getvalue().encode("utf-8", "replace"))
    return batch.out / TABLE


def _harmless(text: str) -> str:
    """The text of a cell that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
