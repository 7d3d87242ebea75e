"""A Gradescope autograder: one zip that builds the machine, runs our grader, and gives the points in Gradescope's form.

Gradescope unpacks the zip into ``/autograder/source``, runs ``setup.sh`` once and ``run_autograder`` for each submission,
which lies in ``/autograder/submission``; it then reads ``/autograder/results/results.json``. The zip holds the hidden
checks: it is for the instructor alone.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import advbn_lib
from advbn_lib.files import atomic_write
from advbn_lib.grading.grade import Examination

_LIBRARY = Path(advbn_lib.__file__).resolve().parent
_SETUP = """#!/usr/bin/env bash
# Runs once, when Gradescope builds the machine. Needs an Ubuntu that has one of these Pythons.
set -euo pipefail
apt-get update
for python in python3.13 python3.12 python3.11; do
  if apt-get install -y "$python" "$python-venv"; then break; fi
done
"$python" -m venv /autograder/python
/autograder/python/bin/pip install --index-url https://download.pytorch.org/whl/cpu 'torch>=2.6' 'torchvision>=0.21'
/autograder/python/bin/pip install /autograder/source scikit-learn
# The submission runs as this machine's root without rights, or as nobody: no other user may read the checks.
chmod -R go-rwx /autograder/source
"""
_RUN = """#!/usr/bin/env bash
# Runs for each submission.
home="${{AUTOGRADER_HOME:-/autograder}}"
python="${{AUTOGRADER_PYTHON:-/autograder/python/bin/python}}"
cd "$home/source"
exec "$python" -m advbn_lib.grading.export_gradescope "$home" {assignment} {variant} {flags}
"""


def export(exam: Examination, hidden: Path, target: Path, weak: bool = False) -> Path:
    """Write the zip for an assignment.

    Args:
        hidden: folder of the hidden checks; the assignment's own file alone is packed.
        target: the zip's path.
        weak: whether to grade also where the machine cannot shut a submission in.

    Raises:
        ValueError: if the library is installed without the checkout's pyproject.toml, which is packed.
    """
    root = _LIBRARY.parent
    if not (root / "pyproject.toml").is_file():
        raise ValueError("the export packs the library's checkout: run it in one, not from an installed copy")
    name, flags = exam.assignment.name, "--weak-isolation" if weak else ""
    run = _RUN.format(assignment=name, variant=exam.variant, flags=flags)
    with atomic_write(target) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for script, text in (("setup.sh", _SETUP), ("run_autograder", run)):
            entry = zipfile.ZipInfo(script, (2020, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100755 << 16
            archive.writestr(entry, text)
        for extra in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            archive.write(root / extra, extra)
        for path in sorted(_LIBRARY.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.write(path, str(path.relative_to(root)))
        archive.write(hidden / f"{name}.py", f"hidden/{name}.py")
    return target


def gradescope_results(result: dict[str, Any]) -> dict[str, Any]:
    """A result file's content in Gradescope's form. Students see hidden checks when the grades are published."""
    tests = []
    for task in result["tasks"]:
        for check in task["checks"]:
            tests.append(
                {
                    "name": f"{task['title']}: {check['name']}",
                    "score": check["points"],
                    "max_score": check["of"],
                    "status": "passed" if check["state"] == "passed" else "failed",
                    "output": "\n".join(part for part in (check["says"], check["message"]) if part),
                    "visibility": "after_published" if check["hidden"] else "visible",
                }
            )
    problems = [
        f"cell {c['number']} ended with {c['error']}: {c['message']} {c['where']}".strip()
        for c in result["failed_cells"]
    ]
    output = "\n".join(part for part in (result["problem"], *problems) if part)
    return {"score": result["points"], "output": output, "execution_time": round(result["seconds"]), "tests": tests}


def main(arguments: list[str]) -> int:
    """Grade ``HOME/submission`` with ``HOME/source/hidden`` and write ``HOME/results/results.json``: what run_autograder does."""
    from advbn_lib.grading.cli import run  # which has this module's export

    home, name, variant, flags = Path(arguments[0]), arguments[1], arguments[2], arguments[3:]
    found = sorted(path for path in (home / "submission").rglob("*") if path.suffix.lower() == ".ipynb")
    own = home / "source" / "result.json"
    if len(found) != 1:
        content = {"score": 0, "output": f"Hand in exactly one notebook (.ipynb); there are {len(found)}.", "tests": []}
    else:
        words = ["grade", str(found[0]), "--assignment", name, "--hidden", str(home / "source" / "hidden"), "--quiet"]
        code = run([*words, "--variant", variant, "--out", str(own), *flags])
        if code not in (0, 2):
            return code  # no result: Gradescope tells the instructor that the autograder failed
        content = gradescope_results(json.loads(own.read_text()))
    with atomic_write(home / "results" / "results.json") as file:
        file.write(json.dumps(content, indent=1).encode())
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
