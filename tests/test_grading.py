"""Checks, answers, the notebook's ``check``, and grading honest submissions. See test_grading_hostile.py for the others."""

import json
import math
import re
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import assert_same_traces, traces
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from advbn_lib.grading import (
    Assignment,
    Check,
    Given,
    LocalStudent,
    NotDone,
    Task,
    Trace,
    Wrong,
    check,
    expect,
    expect_close,
    expect_number,
    expect_tensor,
    local,
    matches,
)  # fmt: skip
from advbn_lib.grading import grade as grading
from advbn_lib.grading.child import without_jupyter
from advbn_lib.grading.export_gradescope import export, gradescope_results
from advbn_lib.grading.judge import judge
from advbn_lib.grading.notebook import MAX_BYTES, Unreadable, code_cells, read_file
from advbn_lib.grading.task import Kept
from advbn_lib.grading.wire import BadMessage, pack, unpack

CODE = """
import torch
from torch import nn

def double(x):
    return 2 * x

def broken(x):
    raise KeyError("no such channel")

def later(x):
    raise NotImplementedError

def careless(net, x):
    x.add_(1)
    return net(x) + torch.rand(1)

def detached(x, scale):
    return x.detach() * scale

class Layer:
    size = 3
    def __call__(self, x):
        return self.size * x
    def half(self, x):
        return x / 2
"""


def student(code: str = CODE) -> LocalStudent:
    namespace: dict = {}
    exec(compile(code, "cell 1", "exec"), namespace)
    found = LocalStudent(namespace)
    found.begin()
    return found


def doubles(s) -> None:
    x = torch.randn(5)
    expect_close(s.call("double", x), 2 * x, "double(x)", "twice, not once")


DOUBLE = Check("doubles", "double(x) is 2 x", doubles)
SECRET = Check("doubles again", "double(x) is 2 x for other x", doubles, points=2, hidden=True)
TINY = Assignment(1, "tiny", "Tiny", (Task("double", "Double it", (DOUBLE,)),))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda part: st.lists(part) | st.tuples(part, part) | st.dictionaries(st.text() | st.integers(), part),
    max_leaves=20,
)


def alike(first, second) -> bool:
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(alike(first[k], second[k]) for k in first)
        )
    return type(first) is type(second) and first == second


@settings(max_examples=60, deadline=None)
@for_all(plain)
def test_plain_values_travel_unchanged(value):
    assert alike(unpack(pack(value)), value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(), torch.zeros(0, 4), torch.tensor(3.5), torch.tensor([True, False]),
        torch.tensor([0.1, -2.0, 3.0]).bfloat16(), torch.tensor([1 + 2j, 3 - 1j]).conj(), torch.arange(5).expand(3, 5),
        torch.eye(3).to_sparse(), torch.tensor([float("nan"), float("inf")]), nn.Parameter(torch.ones(2)),
    ],
    ids=("turned", "empty", "number", "bool", "bfloat16", "complex", "expanded", "sparse", "not finite", "parameter"),
)  # fmt: skip
def test_tensors_travel_as_plain_tensors(tensor):
    got = unpack(pack({"a": [tensor, Kept(3)]}))["a"]
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    assert type(got[0]) is torch.Tensor and not got[0].requires_grad and got[1] == Kept(3)
    assert got[0].dtype == dense.dtype and got[0].shape == dense.shape
    assert torch.equal(torch.nan_to_num(got[0]), torch.nan_to_num(dense))


def test_what_is_no_plain_value_is_not_sent():
    deep = []
    for _ in range(100):
        deep = [deep]
    endless: list = []
    endless.append(endless)
    for value in (
        object(),
        {1, 2},
        b"x",
        lambda: 0,
        nn.Linear(1, 1),
        [object()],
        deep,
        endless,
        2**5000,
        "x" * 10**7,
        torch.ones(2, device="meta"),
    ):
        with pytest.raises(BadMessage):
            pack(value)


def message(tree: object, blobs: bytes = b"") -> bytes:
    head = json.dumps(tree).encode()
    return len(head).to_bytes(8, "big") + head + blobs


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff" * 8, b"\0" * 8, message({"a": 1}), message(["x", "float32", [10**9, 10**9]]), message(["x", "float32", [2]], b"abc"),
        message(["x", "float32", [-1]]), message(["x", "float32", [1.0]], b"abcd"), message(["x", "object", [1]], b"abcd"),
        message(["x", "float32", [2]], b"\0" * 9), message(["q"]), message(["d", [["l"], 1]]), message([]), message([3]),
        message(["x", "float32", [1] * 70], b"\0" * 4), message(["d", 3]), message(["g", "a", ["l"]]), message(["k", "x"]),
        b"\0" * 6 + b"\xff\xff" + b"[" * 65535, message(["x", "float32", "12"]), message(["x", "float32"]),
    ],
)  # fmt: skip
def test_a_damaged_message_is_refused(data):
    with pytest.raises(BadMessage):
        unpack(data)


@settings(max_examples=150, deadline=None)
@for_all(st.binary(max_size=60), st.recursive(st.none() | st.integers() | st.floats() | st.sampled_from(
    ["l", "t", "d", "x", "k", "g", "float32", "bool"]), lambda part: st.lists(part, max_size=4), max_leaves=12))  # fmt: skip
def test_no_message_does_more_than_be_refused(blobs, tree):
    for data in (blobs, message(tree, blobs)):
        try:
            unpack(data)
        except BadMessage:
            pass


def test_half_a_surrogate_pair_can_be_printed_in_the_end():
    assert unpack(b"\0" * 7 + b"\x08" + b'"\\ud800"').encode() == b"?"


def test_a_call_gives_the_value_and_an_error_teaches():
    s = student()
    assert torch.equal(s.call("double", torch.ones(3)), 2 * torch.ones(3))
    assert s.has("double") and not s.has("treble")
    with pytest.raises(NotDone, match="`treble` is not there"):
        s.call("treble")
    with pytest.raises(NotDone, match="`later` is not written yet"):
        s.call("later", 1)
    with pytest.raises(Wrong, match=r"`broken` raised KeyError: 'no such channel' \(cell 1, line 9"):
        s.call("broken", 1)
    with pytest.raises(Wrong, match="no check can read, a Layer"):
        s.call("Layer")
    found = s.attempt("broken", 1)
    assert (found.error, found.message) == ("KeyError", "'no such channel'")
    with pytest.raises(NotDone):
        s.attempt("later", 1)


@pytest.mark.parametrize(
    ("wanted", "defined", "says"),
    [
        ("attack", "\u0430ttack", r"`a` \(letter 1\) of another alphabet"),
        ("change", "\u0441h\u0430nge", r"`c` \(letter 1\), `a` \(letter 3\)"),
        ("AdvBNLayer", "AdvBN1ayer", None),
        ("AdvBNLayer", "AdvBnlayer", None),
        ("AdvBNLayer", "advbnlayer", "small and large"),
        ("use_branch", "usebranch", "underscores"),
        ("all_scale", "al1_scale", "`1` for `l`"),
    ],
)
def test_a_name_that_looks_alike_is_told_of(wanted, defined, says):
    for stub in ("", f"def {wanted}(): raise NotImplementedError\n"):
        with pytest.raises(NotDone) as told:
            student(f"{stub}def {defined}(): return 1\n").call(wanted)
        alike = "looks alike" in str(told.value)
        assert alike == (says is not None) and re.search(says or "", str(told.value))
        with pytest.raises(NotDone) as told:
            student(f"{stub}def another(): return 1\n").call(wanted)
        assert "looks alike" not in str(told.value)


def test_a_call_starts_from_the_same_random_numbers_and_leaves_the_notebooks_alone():
    s = student("import torch\ndef draw():\n    return torch.rand(3)\n")
    before = torch.get_rng_state()
    first, again = s.call("draw"), s.call("draw")
    s.seed(1)
    other = s.call("draw")
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_check_cannot_be_fooled_by_changing_its_input():
    x = torch.randn(2, 3, 4, 4)
    untouched = x.clone()
    s = student()
    net = s.make(
        Given(
            "source", code="from torch import nn\ndef make(n): return nn.BatchNorm2d(n)", name="make", settings={"n": 3}
        )
    )
    _, seen = s.call_and_look("careless", net, x)
    assert torch.equal(x, untouched)
    assert Trace("input", "1") in seen and Trace("random") in seen and Trace("buffer", "0", "running_mean") in seen
    assert {trace.kind for trace in seen} == {"input", "random", "buffer"}
    assert s.call_and_look("double", x)[1] == ()


def test_objects_stay_on_the_students_side():
    s = student()
    layer = s.keep("Layer")
    assert s.look_at(layer, "size") == 3 and s.on(layer, "half", 4.0) == 2.0 and s.on(layer, "__call__", 2) == 6
    generator = s.make(Given("generator", seed=3))
    assert s.on(generator, "initial_seed") == 3


def test_gradients():
    s, x = student(), torch.randn(4)
    value, gradient = s.call_with_gradient("double", x, weights=torch.arange(4.0))
    assert torch.equal(value, 2 * x) and torch.equal(gradient, 2 * torch.arange(4.0))
    assert s.call_with_gradient("detached", x, scale=torch.ones(4))[1] is None
    _, gradient = s.call_with_gradient("detached", x, scale=torch.ones(4), to="scale")
    assert torch.equal(gradient, x)


def test_expectations_say_what_is_wrong():
    x = torch.ones(2, 3)
    for got, says in [
        (None, "None .is a return missing"), ([1.0], "a list"), (torch.ones(3), r"shape \(2, 3\), not \(3,\)"),
        (x * float("nan"), "6 values of 6 that are infinite or not a number"), (x + 1, r"off by up to 1 \(a hint\)"),
    ]:  # fmt: skip
        with pytest.raises(Wrong, match=says):
            expect_close(got, x, "f(x)", "a hint")
    assert matches(x, x + 1e-7) and not matches(x + 1, x) and not matches("x", x)
    with pytest.raises(Wrong, match="should be torch.float64"):
        expect_tensor(x, "f(x)", dtype=torch.float64)
    for bad in (True, "3", float("inf"), torch.ones(2), torch.tensor(float("nan")), 10**400):
        with pytest.raises(Wrong):
            expect_number(bad, "f(x)")
    assert expect_number(torch.tensor([2]), "f(x)") == 2.0


def test_verdicts():
    assert judge(DOUBLE, student()).state == "passed"
    wrong = judge(DOUBLE, student("def double(x): return x"))
    assert (wrong.state, wrong.points) == ("wrong", 0) and "twice, not once" in wrong.message
    assert judge(DOUBLE, student("")).state == "not done"
    confused = Check("c", "c", lambda s: expect(s.call("double", torch.ones(1)) > 0, "no"))
    verdict = judge(confused, student("def double(x): return 'x'"))
    assert verdict.state == "wrong" and "TypeError" in verdict.message


def test_a_hidden_checks_verdict_repeats_nothing_that_the_submission_says():
    tells = "def double(x): raise ValueError(f'the hidden x is {x}')"
    assert "the hidden x is" in judge(DOUBLE, student(tells)).message
    assert judge(SECRET, student(tells)).message == "`double` raised an error"
    names_it = "def double(x): return type(f'x{float(x[0])}', (), {})()"
    assert judge(SECRET, student(names_it)).message == "`double` returned what no check can read"


def test_checks_draw_the_same_whatever_was_drawn_before():
    seen = []
    draw = Check("d", "d", lambda s: seen.append(torch.rand(3)))
    for count in (0, 5):
        torch.rand(count)
        judge(draw, student())
    assert torch.equal(*seen)


def test_check_in_a_notebook_reports_and_leaves_no_trace(monkeypatch, capsys):
    monkeypatch.setattr(local, "find", {"tiny": TINY}.__getitem__)
    net = nn.BatchNorm2d(2)
    before = traces(net)
    notebook = {"check": check, "double": lambda x: x}
    exec("check('tiny.double')", notebook)
    said = capsys.readouterr().out
    assert "WRONG  doubles" in said and "twice, not once" in said and "0 of 1 public checks hold" in said
    check("tiny.double", {"double": lambda x: 2 * x})
    assert "1 of 1 public checks hold" in capsys.readouterr().out
    assert_same_traces(before, traces(net))
    with pytest.raises(ValueError, match="no task 'treble'"):
        check("tiny.treble", {})
    monkeypatch.setenv(local.BEING_GRADED, "1")
    check("tiny.double", {})
    assert capsys.readouterr().out == ""


def test_hidden_checks_are_added_only_where_they_fit():
    whole = TINY.with_hidden({"double": (SECRET,)})
    assert [c.name for c in whole.task("double").checks] == ["doubles", "doubles again"]
    with pytest.raises(KeyError, match="treble"):
        TINY.with_hidden({"treble": ()})
    with pytest.raises(ValueError, match="hidden=True"):
        TINY.with_hidden({"double": (Check("x", "x", doubles),)})
    with pytest.raises(ValueError, match="twice"):
        TINY.with_hidden({"double": (Check("doubles", "x", doubles, hidden=True),)})


def test_hidden_checks_come_from_their_file(tmp_path):
    (tmp_path / "tiny.py").write_text(
        "from advbn_lib.grading import Check\n"
        "def checks(variant):\n"
        "    return {'double': (Check(f'variant {variant}', 'x', lambda s: None, hidden=True),)}\n"
    )
    exam = grading.examination(TINY, tmp_path, 7)
    assert exam.assignment.task("double").checks[1].name == "variant 7" and len(exam.hidden) == 64
    assert grading.examination(TINY, None).assignment is TINY
    with pytest.raises(ValueError, match="no hidden checks"):
        grading.examination(TINY, tmp_path / "elsewhere")
    (tmp_path / "tiny.py").write_text("")
    with pytest.raises(ValueError, match="neither"):
        grading.examination(TINY, tmp_path)


def notebook(*cells: str) -> bytes:
    kept = [{"cell_type": "code", "source": cell.splitlines(keepends=True)} for cell in cells]
    return json.dumps(
        {"nbformat": 4, "metadata": {}, "cells": [{"cell_type": "markdown", "source": "x"}, *kept]}
    ).encode()


def test_reading_a_notebook():
    assert code_cells(notebook("a = 1\nb = 2", "", "c")) == ["a = 1\nb = 2", "c"]
    assert code_cells(b"\xef\xbb\xbf" + notebook("a\r\nb")) == ["a\nb"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"), (b" \n", "is empty"), (b"{", "no JSON"), (b"[" * 100_000, "no JSON"), (b"\xff\xfe", "no JSON"), (b"[]", "format 4"),
        (b'{"nbformat": 3, "worksheets": []}', "format 4"), (b'{"nbformat": 4, "cells": 5}', "format 4"), (notebook(), "no code"),
        (b'{"nbformat": 4, "cells": [{"cell_type": "code", "source": [1]}]}', "without text"), (notebook(*["x"] * 1001), "1000 cells"),
        (notebook("x" * 2**21), "characters of code"), (b'{"nbformat": 4, "cells": [3, null, {"cell_type": "code"}]}', "no code"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_notebook_says_so(content, says):
    with pytest.raises(Unreadable, match=says):
        code_cells(content)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    import os

    large, link, pipe = tmp_path / "large.ipynb", tmp_path / "link.ipynb", tmp_path / "pipe.ipynb"
    with large.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    link.symlink_to(large)
    os.mkfifo(pipe)
    for path, says in (
        (large, "MB"),
        (link, "cannot be opened"),
        (pipe, "no file"),
        (tmp_path, "no file|cannot be opened"),
    ):
        with pytest.raises(Unreadable, match=says):
            read_file(path)


@pytest.mark.parametrize(
    ("cell", "left", "skipped"),
    [
        ("x = 5\ny = x % 3", "x = 5\ny = x % 3", 0),
        ("%matplotlib inline\nx = 1", "pass  # matplotlib inline\nx = 1", 1),
        ("if True:\n    !pip install torch\ny = 2", None, 1),
        ("files = !ls\ny = 2", None, 1),
        ("torch.std?\ny = 2", None, 1),
        ('text = """\n!not a line for a shell\n%nor this\n"""', None, 0),
        ("%%bash\nrm -rf /", "", 2),
        ("%%time\ny = 2", "\ny = 2", 1),
    ],
)
def test_lines_for_jupyter_are_left_out_and_counted(cell, left, skipped):
    source, count = without_jupyter(cell)
    assert count == skipped
    assert left is None or source == left
    names: dict = {}
    exec(source, names)
    assert "y = 2" not in cell or names["y"] == 2
    assert skipped or "text" not in cell or names["text"] == "\n!not a line for a shell\n%nor this\n"


def test_the_export_for_gradescope(tmp_path):
    (tmp_path / "tiny.py").write_text("CHECKS = {}\n")
    (tmp_path / "other.py").write_text("CHECKS = {}\n")
    path = export(grading.examination(TINY, tmp_path, 7), tmp_path, tmp_path / "autograder.zip")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        run = archive.read("run_autograder").decode()
        assert archive.getinfo("setup.sh").external_attr >> 16 & 0o111
    assert {"setup.sh", "run_autograder", "pyproject.toml", "advbn_lib/grading/grade.py", "hidden/tiny.py"} <= set(
        names
    )
    assert "hidden/other.py" not in names and not any("__pycache__" in name for name in names)
    assert "tiny 7" in run and "{" not in run.replace("${", "")


def test_gradescopes_form():
    result = {
        "points": 1.0, "of": 3.0, "problem": "", "seconds": 2.4,
        "failed_cells": [{"number": 2, "error": "KeyError", "message": "k", "where": ""}],
        "tasks": [{"title": "Double", "checks": [
            {"name": "a", "says": "it is", "message": "", "points": 1.0, "of": 1.0, "state": "passed", "hidden": False},
            {"name": "b", "says": "it is", "message": "no", "points": 0.0, "of": 2.0, "state": "wrong", "hidden": True},
        ]}],
    }  # fmt: skip
    form = gradescope_results(result)
    assert form["score"] == 1.0 and "cell 2 ended with KeyError" in form["output"]
    assert [(t["score"], t["max_score"], t["visibility"], t["status"]) for t in form["tests"]] == [
        (1.0, 1.0, "visible", "passed"), (0.0, 2.0, "after_published", "failed"),
    ]  # fmt: skip


def test_library_modules_can_be_withheld(tmp_path):
    from advbn_lib.grading.sandbox import _copy_library

    _copy_library(tmp_path / "advbn_lib", ("advbn_lib.statistics", "advbn_lib.methods"))
    assert not (tmp_path / "advbn_lib" / "statistics.py").exists() and not (tmp_path / "advbn_lib" / "methods").exists()
    assert not list(tmp_path.rglob("statistics.*.pyc"))
    assert "__getattr__" in (tmp_path / "advbn_lib" / "__init__.py").read_text()
    assert (tmp_path / "advbn_lib" / "ascent.py").read_bytes() == Path(grading.advbn_lib.__file__).with_name(
        "ascent.py"
    ).read_bytes()
