"""Build the book: run the notebooks, gather the pages, make the HTML.

    python book/build.py [--preset smoke|cpu|gpu]

Each step is skipped while its inputs are as they were. Everything lands in
``_build``: ``executed/<preset>/`` (notebooks with outputs), ``stage/`` (what
Sphinx reads, laid out like the repository) and ``html/`` (the book).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import exercises

from advbn_lib.files import atomic_write, sha256

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ("smoke", "cpu", "gpu")
KERNEL = "advbn-book"


class BuildError(Exception):
    """The book cannot be built; the message says why and how to mend it."""


@dataclass(frozen=True)
class Layout:
    """Where things lie, for the repository at ``root``."""

    root: Path

    @property
    def build(self) -> Path:
        return self.root / "_build"

    @property
    def stage(self) -> Path:
        return self.build / "stage"

    @property
    def html(self) -> Path:
        return self.build / "html"

    @property
    def records(self) -> Path:
        """As the library finds them: ``ADVBN_RECORDS``, if it is set, is another folder."""
        return Path(os.environ.get("ADVBN_RECORDS") or self.root / "records").resolve()

    def notebooks(self) -> list[Path]:
        return sorted((self.root / "notebooks").glob("*.ipynb"))

    def executed(self, preset: str) -> Path:
        return self.build / "executed" / preset


def choose_preset(asked: str | None, environment: dict[str, str]) -> tuple[str, str]:
    """Return the preset and the reason for it."""
    if asked:
        if asked not in PRESETS:
            raise BuildError(f"there is no preset {asked!r}; the presets are {', '.join(PRESETS)}")
        return asked, "as asked"
    data = environment.get("ADVBN_DATA")
    for folder in ("cifar10", "cifar-10-batches-py"):
        if data and (Path(data) / folder).is_dir():
            return "cpu", f"CIFAR-10 is in ADVBN_DATA ({folder})"
    return "smoke", "no CIFAR-10 in ADVBN_DATA; for real data set it, or say PRESET=cpu to download"


# ---- files ---------------------------------------------------------------------------------


def write_if_changed(path: Path, content: bytes) -> bool:
    """Write ``content`` in one step; leave the file alone if it is the same already."""
    if path.is_file() and path.read_bytes() == content:
        return False
    with atomic_write(path) as file:
        file.write(content)
    return True


def digest(files: Iterable[Path], base: Path, *words: str) -> str:
    """Hash the names (relative to ``base``) and contents of ``files``, and ``words``."""
    total = hashlib.sha256("\0".join(words).encode())
    for file in sorted(files):
        total.update(file.relative_to(base).as_posix().encode() + b"\0")
        total.update(sha256(file).encode())
    return total.hexdigest()


def sources(folder: Path, *patterns: str) -> list[Path]:
    """Files below ``folder`` that match, without what Python and editors leave behind."""
    found = {file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()}
    return sorted(
        file
        for file in found
        if not any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)
    )


# ---- running the notebooks -----------------------------------------------------------------


def notebook_key(layout: Layout, notebook: Path, preset: str) -> str:
    """What the outputs of a notebook depend on, as one hash."""
    inputs = [notebook, layout.root / "constraints.txt", layout.root / "book" / "claims.yml"]  # one shows verdicts
    inputs += sources(layout.root / "advbn_lib", "*.py", "*.json", "*.safetensors", "*.txt")
    measured = digest(sources(layout.records, "*.json"), layout.records)
    return digest(inputs, layout.root, "executed-1", preset, sys.version, measured)


def stored_key(executed: Path) -> str | None:
    """The key an executed notebook was made under; None if there is no such notebook."""
    if not executed.is_file():
        return None
    return json.loads(executed.read_text(encoding="utf-8"))["metadata"].get("advbn_book", {}).get("key")


def install_kernel(layout: Layout) -> None:
    """Describe a kernel that is this very interpreter, where only this build looks."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"],
        "display_name": "Python 3",
        "language": "python",
    }
    folder = layout.build / "jupyter"
    write_if_changed(folder / "kernels" / KERNEL / "kernel.json", json.dumps(spec, indent=1).encode())
    others = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), others]))


def run_notebook(layout: Layout, notebook: Path, preset: str, key: str) -> Path:
    """Run one notebook under ``preset`` and keep it, outputs and all, under ``key``."""
    import nbformat
    import papermill

    target = layout.executed(preset) / notebook.name
    partial = target.with_name(f"{notebook.stem}.partial.ipynb")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        node = papermill.execute_notebook(
            notebook,
            partial,
            parameters={"preset": preset},
            kernel_name=KERNEL,
            language="python",
            cwd=layout.root,
            progress_bar=False,
        )
    except papermill.PapermillExecutionError as error:
        raise BuildError(explain_failure(layout, notebook, partial, error)) from error
    strip_run_traces(node)
    join_streams(node)
    node.metadata["advbn_book"] = {"key": key, "preset": preset}
    write_if_changed(target, nbformat.writes(node).encode())
    partial.unlink()
    return target


def explain_failure(layout: Layout, notebook: Path, partial: Path, error) -> str:
    """Name the notebook, the cell (as counted in the source, from 1) and the error of a papermill failure."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    numbers = [number for number, cell in enumerate(cells, start=1) if "".join(cell["source"]) == error.source]
    place = f"cell {numbers[0]} of {len(cells)}" if numbers else "the cell of parameters"
    code = "\n".join(f"    {line}" for line in error.source.splitlines())
    return (
        f"{notebook.relative_to(layout.root)}: {place} failed with {error.ename}: {error.evalue}\n"
        f"{code}\n"
        f"The notebook as far as it went, with the whole traceback: {partial.relative_to(layout.root)}"
    )


def strip_run_traces(node) -> None:
    """Drop papermill's notes, which hold this machine's paths and the time of day, and hide the cell that it put in."""
    node.metadata.pop("papermill", None)
    for cell in node.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")


def join_streams(node) -> None:
    """One box for what a cell printed in one go. What it printed after a figure or a table stays below that."""
    for cell in node.cells:
        joined = []
        for output in cell.get("outputs", []):
            before = joined[-1] if joined else {}
            if output.output_type == "stream" and before.get("name") == output.name:
                before["text"] += output.text
            else:
                joined.append(output)
        if "outputs" in cell:
            cell.outputs = joined


def check_exercises(layout: Layout) -> None:
    """Raise ExerciseError if a notebook's exercises are not in the format: before the long runs, not after them."""
    for notebook in layout.notebooks():
        exercises.of_notebook(notebook)


def run_notebooks(layout: Layout, preset: str) -> list[Path]:
    """Run each notebook whose inputs changed; return them all, executed."""
    notebooks = layout.notebooks()
    if not notebooks:
        raise BuildError("there are no notebooks in notebooks/; is this a whole checkout?")
    install_kernel(layout)
    executed = []
    for notebook in notebooks:
        key = notebook_key(layout, notebook, preset)
        target = layout.executed(preset) / notebook.name
        if stored_key(target) == key:
            say(f"{notebook.name}: unchanged")
        else:
            say(f"{notebook.name}: running under {preset} ...")
            start = time.monotonic()
            run_notebook(layout, notebook, preset, key)
            say(f"{notebook.name}: done in {time.monotonic() - start:.0f} s")
        executed.append(target)
    return executed


# ---- gathering the pages -------------------------------------------------------------------


def stage(layout: Layout, executed: list[Path]) -> None:
    """Lay out what Sphinx reads like the repository, touching only what changed.

    Exercises become directives on the way (book/exercises.py); the notebooks of the repository stay plain Markdown.
    """
    root = layout.root
    files = [root / "_config.yml", *sources(root / "book", "*")]
    wanted = {file.relative_to(root): file.read_bytes() for file in files}
    measured = sources(layout.records, "*.json")
    wanted |= {Path("records") / file.relative_to(layout.records): file.read_bytes() for file in measured}
    wanted |= {Path("notebooks") / file.name: exercises.staged(file) for file in executed}
    wanted[Path("records/LIST")] = list_of_records(layout)
    for place, content in wanted.items():
        write_if_changed(layout.stage / place, content)
    for file in sources(layout.stage, "*"):
        if file.relative_to(layout.stage) not in wanted:
            file.unlink()


def list_of_records(layout: Layout) -> bytes:
    """Name and hash of each record: one file that changes when any record comes, goes or changes."""
    names = (f"{file.relative_to(layout.records)} {sha256(file)}\n" for file in sources(layout.records, "*.json"))
    return "".join(names).encode()


# ---- making the HTML -----------------------------------------------------------------------


def book_key(layout: Layout) -> str:
    """What the HTML depends on, as one hash."""
    inputs = sources(layout.stage, "*")
    own = [layout.root / "constraints.txt", *sources(layout.root / "advbn_lib", "*.py")]
    return digest(inputs, layout.stage, digest(own, layout.root), sys.version)


def make_html(layout: Layout) -> None:
    """Run jupyter-book, warnings as errors; replace the old HTML only by a whole new one.

    Every page is made anew: it takes seconds, and no page can keep a number,
    a title or a warning from an earlier build.
    """
    key, stamp = book_key(layout), layout.build / "html.key"
    if layout.html.is_dir() and stamp.is_file() and stamp.read_text() == key:
        say("pages: unchanged")
        return
    stamp.unlink(missing_ok=True)
    fresh = layout.build / "new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    jupyter_book = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", jupyter_book, "build", "-q", "-W", "-n", "--keep-going"]
    command += ["--config", str(layout.stage / "_config.yml")]
    command += ["--toc", str(layout.stage / "book/_toc.yml"), "--path-output", str(fresh), str(layout.stage)]
    say("pages: building ...")
    done = subprocess.run(command, cwd=layout.root, stdout=subprocess.PIPE, text=True)  # warnings go to stderr
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        raise BuildError("jupyter-book failed or warned; its messages stand above and each names a file")
    shutil.rmtree(layout.html, ignore_errors=True)
    os.replace(fresh / "_build" / "html", layout.html)
    shutil.rmtree(fresh)
    write_if_changed(stamp, key.encode())


def say(words: str) -> None:
    print(f"[book] {words}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the book into _build/html.")
    parser.add_argument("--preset", help="smoke, cpu or gpu; by default what this machine has the data for")
    options = parser.parse_args(arguments)
    layout = Layout(ROOT)
    try:
        preset, reason = choose_preset(options.preset or os.environ.get("PRESET"), dict(os.environ))
        say(f"preset {preset}: {reason}")
        check_exercises(layout)
        executed = run_notebooks(layout, preset)
        stage(layout, executed)
        make_html(layout)
    except (BuildError, exercises.ExerciseError) as error:
        print(f"[book] {error}", file=sys.stderr)
        return 1
    say(f"open {(layout.html / 'index.html').relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
