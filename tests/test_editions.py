"""The student's and the instructor's notebooks that one source gives."""

import json
from pathlib import Path

import pytest

from advbn_lib.grading import editions

SOURCE = '''# a note on the file
# %% [markdown]
# # Title
#
# Some *text*.
# %%
import torch

def shift(x):
    """Shift it."""
    ### BEGIN SOLUTION
    ### STUDENT: mu = ...  # which axes?
    ### STUDENT: for x in mu:
    ### STUDENT:     raise NotImplementedError("shift")
    mu = x.mean()
    return x - mu
    ### END SOLUTION

class Later:
    def forward(self, x):
        ### BEGIN SOLUTION
        return 42
        ### END SOLUTION
# %% tags=["instructor"]
# the rubric
rubric = 1
# %% [markdown] tags=["student"]
# Good luck
'''


def made(tmp_path: Path, text: str = SOURCE) -> dict[str, dict]:
    (tmp_path / "source").mkdir(parents=True, exist_ok=True)
    (tmp_path / "source" / "1_tiny.py").write_text(text)
    editions.build(tmp_path)
    return {name: json.loads((tmp_path / name / "1_tiny.ipynb").read_text()) for name in editions.EDITIONS}


def sources(notebook: dict) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"]]


def test_the_student_gets_no_solution_and_no_instructors_cell(tmp_path):
    title, code, luck = sources(made(tmp_path)["student"])
    assert title == "# Title\n\nSome *text*."
    assert luck == "Good luck"
    assert "x.mean()" not in code and "42" not in code and "###" not in code
    assert '    mu = ...  # which axes?\n    for x in mu:\n        raise NotImplementedError("shift")\n' in code
    assert '        raise NotImplementedError("forward is not written yet")' in code
    compile(code, "student", "exec")


def test_the_instructor_gets_the_solution_without_marks(tmp_path):
    _, code, rubric = sources(made(tmp_path)["instructor"])
    assert "    mu = x.mean()\n    return x - mu\n" in code and "return 42" in code
    assert "###" not in code and "which axes" not in code
    assert rubric == "# the rubric\nrubric = 1"
    compile(code, "instructor", "exec")


def test_the_notebooks_are_valid(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    for name in editions.EDITIONS:
        nbformat.validate(nbformat.from_dict(made(tmp_path)[name]))
        assert made(tmp_path)[name]["metadata"]["advbn"] == {"assignment": "tiny", "edition": name}


def test_they_are_written_again_only_when_the_source_changes(tmp_path):
    made(tmp_path)
    assert editions.out_of_date(tmp_path) == [] and editions.build(tmp_path) == []
    path = tmp_path / "source" / "1_tiny.py"
    path.write_text(path.read_text().replace("# the rubric", "# the new rubric"))
    assert editions.out_of_date(tmp_path) == [tmp_path / "instructor" / "1_tiny.ipynb"]
    (tmp_path / "student" / "1_tiny.ipynb").write_text("{}")
    assert len(editions.build(tmp_path)) == 2 and editions.out_of_date(tmp_path) == []


def test_windows_line_ends_make_the_same_notebook(tmp_path):
    first = made(tmp_path)
    (tmp_path / "source" / "1_tiny.py").write_bytes(SOURCE.replace("\n", "\r\n").encode())
    assert editions.out_of_date(tmp_path) == []
    assert first == made(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# %%\n### BEGIN SOLUTION\nx = 1\n", "without its end"),
        ("# %%\nx = 1\n### END SOLUTION\n", "take turns"),
        ("# %%\n### BEGIN SOLUTION\n### BEGIN SOLUTION\n### END SOLUTION\n", "take turns"),
        ("# %%\n### STUDENT: x\n", "outside a solution"),
        ("# %% [markdown]\nbare words\n", "without #"),
        ("# %% [slides]\n# x\n", "line 1"),
        ("# %% tags=[instructor]\nx = 1\n", "JSON list"),
        ("# %%\nCheck(hidden=True)\n", "hidden=True"),
        ("# %% [markdown]\n# ### BEGIN SOLUTION\n# 42\n", "BEGIN SOLUTION"),
    ],
)
def test_a_source_that_is_not_as_it_should_be_is_refused(tmp_path, text, says):
    with pytest.raises(ValueError, match=says):
        made(tmp_path, text)
    assert not (tmp_path / "student").exists()


def test_no_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no sources"):
        editions.build(tmp_path)
