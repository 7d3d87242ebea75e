"""Submissions that attack the grader: the grade is right, the grader survives, nothing outside is touched.

Each scene is a notebook that is graded in a real closed room. Most run in both kinds of room, that of namespaces and that of
Landlock; where the kernel has not the one or the other, its tests are skipped.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT

from advbn_lib.grading import Assignment, Check, Task, expect_close
from advbn_lib.grading.batch import Batch, grade_folder
from advbn_lib.grading.cli import run
from advbn_lib.grading.export_gradescope import export
from advbn_lib.grading.grade import GRADED, NOT_RUN, Examination, Result, failed, grade, text, write
from advbn_lib.grading.sandbox import Limits, Sandbox, SandboxRefused

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="closed rooms need Linux")

LAYERS = {"namespaces": ("namespaces", "seccomp"), "landlock": ("landlock", "seccomp")}
RIGHT = "def double(x):\n    return 2 * x"
LIMITS = Limits(memory=2 * 2**30, disk=8 * 2**20, cell_seconds=20, total_seconds=240, answer_bytes=2**20)
SHORT = Limits(memory=2 * 2**30, disk=8 * 2**20, cell_seconds=2, total_seconds=240, answer_bytes=2**20)
THE_SECRET = "the-answer-that-no-submission-may-see"


def doubles(student) -> None:
    x = torch.randn(5)
    expect_close(student.call("double", x), 2 * x, "double(x)")


def trebles(student) -> None:
    x = torch.randn(5)
    expect_close(student.call("treble", x), 3 * x, "treble(x)")


TINY = Assignment(
    1, "tiny", "Tiny",
    (
        Task("double", "Double", (Check("doubles", "2 x", doubles, seconds=20),)),
        Task("treble", "Treble", (Check("trebles", "3 x", trebles, points=2, hidden=True, seconds=4),)),
        Task("again", "Double again", (Check("doubles", "2 x", doubles, points=4, seconds=20),)),
    ),
)  # fmt: skip


def tiny_examination() -> Examination:
    return Examination(TINY)


def asking(*functions: str, seconds: float = 60) -> tuple[Examination, dict]:
    """An examination that calls these functions, and where it puts what they return."""
    answers: dict = {}

    def ask(student) -> None:
        for name in functions:
            answers[name] = student.call(name)

    task = Task("ask", "Ask", (Check("answers", "they return", ask, seconds=seconds),))
    return Examination(Assignment(1, "asked", "Asked", (*TINY.tasks[:1], task))), answers


def notebook(folder: Path, *cells: str, name: str = "submission.ipynb") -> Path:
    path = folder / name
    path.write_text(json.dumps({"nbformat": 4, "cells": [{"cell_type": "code", "source": cell} for cell in cells]}))
    return path


@pytest.fixture(scope="module")
def secrets(tmp_path_factory) -> Path:
    """A folder with hidden checks, as an instructor would have it."""
    folder = tmp_path_factory.mktemp("hidden")
    (folder / "tiny.py").write_text(f"# {THE_SECRET}\nCHECKS = {{}}\n")
    return folder


def room(layers: str, secrets: Path, limits: Limits = LIMITS) -> Sandbox:
    try:
        return Sandbox(limits, (), (secrets,), layers=LAYERS[layers])
    except SandboxRefused as error:
        pytest.skip(f"this machine has no {layers}: {error}")


@pytest.fixture(scope="module", params=LAYERS)
def sandbox(request, secrets):
    with room(request.param, secrets) as made:
        yield made


@pytest.fixture(scope="module")
def short(secrets):
    """The strongest room of this machine, with short limits."""
    try:
        made = Sandbox(SHORT, (), (secrets,))
    except SandboxRefused as error:
        pytest.skip(str(error))
    with made:
        yield made


def states(result: Result) -> dict[str, str]:
    return {task.name: task.checks[0].state for task in result.tasks}


ATTEMPTS = '''
import json, os, signal, socket, sys, threading
from pathlib import Path

FACTS = json.loads("""{facts}""")


def works(attempt):
    try:
        return bool(attempt())
    except BaseException:
        return False


def kill(pid, number):
    os.kill(pid, number)
    return True


def signals():
    grader, launcher = FACTS["grader"], os.getppid()
    return [
        f"{{pid}} {{number}}"
        for pid in (grader, launcher, -1, 0, -os.getpgrp())
        for number in (signal.SIGCONT, signal.SIGSTOP, signal.SIGTERM, signal.SIGKILL)
        if works(lambda: kill(pid, number))
    ]


def fork():
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.execv("/bin/sleep", ["sleep", "{mark}"])
    return True


def processes():
    import multiprocessing, subprocess
    tries = dict(
        fork=fork,
        popen=lambda: subprocess.Popen(["/bin/sleep", "{mark}"], start_new_session=True),
        system=lambda: os.system("sleep {mark} &") == 0,
        spawn=lambda: os.posix_spawn("/bin/sleep", ["sleep", "{mark}"], {{}}),
        pool=lambda: multiprocessing.get_context("fork").Process(target=print).start() is None,
        bomb=lambda: any(works(fork) for _ in range(1000)),
    )
    return [name for name, attempt in tries.items() if works(attempt)]


def network():
    def udp():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            return s.sendto(b"x", ("127.0.0.1", FACTS["udp"]))
    def unix():
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(FACTS["unix"])
            return True
    tries = dict(tcp=lambda: socket.create_connection(("127.0.0.1", FACTS["tcp"]), 2), udp=udp, unix=unix)
    return [name for name, attempt in tries.items() if works(attempt)]


def listing(path):
    return os.listdir(path)


def reading():
    found = [path for path in FACTS["secret_files"] if works(lambda: open(path, "rb").read(1))]
    found += [path for path in FACTS["secret_folders"] if works(lambda: os.listdir(path))]
    for start in [*sys.path, "/tmp", "/home", "/root", "/srv", "/proc/1/root/tmp", "/proc/self/root/tmp", "/proc/self/cwd/.."]:
        for folder, _, names in os.walk(start):
            if "/proc/" in folder[5:] or folder.count("/") > 12:
                continue
            for name in names:
                path = os.path.join(folder, name)
                if name == "tiny.py" or (name == "bob.json" and works(lambda: open(path).read(1))):
                    found.append(path)
    for pid in [FACTS["grader"], os.getppid()]:
        for part in ("mem", "environ", "maps", "cmdline", "fd", "cwd", "root"):
            place = f"/proc/{{pid}}/{{part}}"
            if works(lambda: os.listdir(place) if part in ("fd", "cwd", "root") else open(place, "rb").read(1)):
                found.append(place)
    for number in range(256):
        if works(lambda: b"{secret}" in os.pread(number, 10**6, 0)):
            found.append(f"descriptor {{number}}")
    found += [name for name, value in os.environ.items() if "hidden" in value or "{secret}" in value]
    return found


def writing():
    done = []
    for path in FACTS["write"]:
        if works(lambda: open(path, "w").write('{{"points": 100}}')):
            done.append("wrote " + path)
        if works(lambda: open(path, "r+b").truncate(0) is None):
            done.append("emptied " + path)
        for name in ("remove", "rmdir", "chmod", "utime", "truncate", "rename", "link", "chown", "mkdir"):
            more = dict(chmod=(0o777,), utime=((0, 0),), truncate=(0,), rename=(path + "x",), link=("mine",), chown=(1, 1))
            if works(lambda: getattr(os, name)(path, *more.get(name, ())) is None):
                done.append(name + " " + path)
    return done


def inside():
    Path("mine").mkdir(exist_ok=True)
    Path("mine/a.txt").write_text("a")
    os.rename("mine/a.txt", "b.txt")
    here = Path("b.txt").read_text()
    import shutil
    shutil.rmtree(os.getcwd(), ignore_errors=True)
    return here


def filling():
    written = 0
    try:
        with open("large", "wb") as file:
            for _ in range(100):
                written += file.write(bytes(2**20))
    except OSError:
        pass
    finally:
        if os.path.exists("large"):
            os.remove("large")
    return written


def limits():
    import ctypes, resource
    libc = ctypes.CDLL(None, use_errno=True)
    tries = dict(
        grader=lambda: resource.prlimit(FACTS["grader"], resource.RLIMIT_NOFILE, (3, 3)) is not None,
        parent=lambda: os.getppid() and resource.prlimit(os.getppid(), resource.RLIMIT_CPU) is not None,
        data=lambda: resource.setrlimit(resource.RLIMIT_DATA, (-1, -1)) is None,
        trace=lambda: libc.ptrace(16, FACTS["grader"], 0, 0) == 0,
        memfd=lambda: os.memfd_create("x"),
        # Without namespaces it is the grader's user, root perhaps, and then root without a single capability.
        user=lambda: os.setuid(0) is None and os.setgroups([]) is None,
        unshare=lambda: libc.unshare(0x10000000) == 0,
        mount=lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0,
        owner=lambda: __import__("fcntl").fcntl(0, 8, FACTS["grader"]) == 0,
    )
    return [name for name, attempt in tries.items() if works(attempt)]
'''
NAMES = ("signals", "processes", "network", "reading", "writing", "limits", "inside", "filling")


@pytest.fixture(scope="module")
def escape(sandbox, secrets, tmp_path_factory):
    """What a submission that tries everything reports, and what it was after."""
    folder = tmp_path_factory.mktemp("escape")
    others = folder / "results"
    others.mkdir()
    (others / "bob.json").write_text('{"points": 1}')
    library = Path(grade.__code__.co_filename).resolve().parents[1]
    checkout = library.parent
    wanted = [checkout / name for name in ("assignments", "tests", "notebooks", "advbn_lib/grading", ".git")]
    write_to = [
        others / "bob.json",
        others / "result.json",
        secrets / "tiny.py",
        folder,
        library / "statistics.py",
        "/usr/x",
        "/etc/x",
    ]
    mark = str(10_000_000 + os.getpid())
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(folder / "s"))
        unix.listen()
        facts = {
            "grader": os.getpid(), "tcp": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": str(folder / "s"),
            "secret_files": [str(secrets / "tiny.py"), str(others / "bob.json"), str(library / "statistics.py")],
            "secret_folders": [str(secrets), str(folder), *(str(path) for path in wanted if path.exists())],
            "write": [str(path) for path in write_to],
        }  # fmt: skip
        exam, answers = asking(*NAMES, seconds=120)
        started = time.monotonic()
        code = ATTEMPTS.format(facts=json.dumps(facts), mark=mark, secret=THE_SECRET)
        result = grade(notebook(folder, RIGHT, code), exam, sandbox)
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert result.tasks[0].points == 1, text(result)
    return answers, result, {"seconds": time.monotonic() - started, "left": mark in left, "bob": others / "bob.json"}


@pytest.mark.parametrize("name", NAMES[:6])
def test_nothing_outside_the_room_is_in_reach(escape, name):
    answers, result, _ = escape
    assert answers.get(name) == [], text(result)


def test_nothing_outside_was_changed_and_nothing_lives_on(escape):
    _, _, facts = escape
    assert facts["bob"].read_text() == '{"points": 1}'
    assert sorted(path.name for path in facts["bob"].parent.iterdir()) == ["bob.json"]
    assert not facts["left"] and facts["seconds"] < 180


def test_inside_its_folder_a_submission_may_do_as_it_likes_up_to_its_size(escape):
    answers, _, _ = escape
    assert answers["inside"] == "a"
    assert 0 < answers["filling"] <= LIMITS.disk


def test_the_grader_is_told_what_was_in_force(escape, sandbox):
    _, result, _ = escape
    assert result.isolation == sandbox.isolation and result.isolation.strong and "seccomp" in result.isolation.layers


def test_what_was_right_still_counts_when_cells_and_calls_never_end(short, tmp_path):
    endless = "def treble(x):\n    while True:\n        pass"
    stubborn = "while True:\n    try:\n        while True: print('x' * 10**6)\n    except BaseException: pass"
    path = notebook(tmp_path, "while True: pass", RIGHT, "import os; os._exit(0)", stubborn, endless)
    started = time.monotonic()
    result = grade(path, Examination(TINY), short)
    assert states(result) == {"double": "passed", "treble": "ended", "again": "passed"}, text(result)
    assert result.points == 5 and time.monotonic() - started < 200
    assert [cell.number for cell in result.failed_cells] == [1, 3, 4]
    assert "endless loop" in result.failed_cells[0].message and "exit 0" in result.failed_cells[1].message
    assert "endless loop" in result.tasks[1].checks[0].message


def test_a_call_that_ends_the_process_costs_that_check_alone(short, tmp_path):
    code = """
import mmap, os, signal, sys, torch

def leave(): os._exit(0)
def killed(): os.kill(os.getpid(), signal.SIGKILL); os.abort()
def boast(): os.write(int(sys.argv[2]), b"\\xff" * 8)
def garbage(): os.write(int(sys.argv[2]), b"\\0" * 7 + b"\\5" + b"[[[[[")
def twice(): os.write(int(sys.argv[2]), (2).to_bytes(8, "big") + b"{}")
def hang_up(): os.close(int(sys.argv[2])); os.close(int(sys.argv[1]))
def large(): return torch.zeros(10**6)
"""
    says = {
        "leave": "ended the process", "killed": "broke off|ended the process", "boast": "too large",
        # After what it wrote itself comes the true answer: whether that is there already is a matter of chance.
        "garbage": "could not be read|more than it was asked", "twice": "could not be read|more than it was asked",
        "hang_up": "ended the process|broke off", "large": "too large",
    }  # fmt: skip
    checks = tuple(Check(name, name, lambda s, name=name: s.call(name), seconds=20) for name in says)
    exam = Examination(Assignment(1, "a", "A", (Task("ends", "Ends", checks), TINY.tasks[2])))
    result = grade(notebook(tmp_path, RIGHT, code), exam, short)
    for verdict in result.tasks[0].checks:
        assert verdict.state == "ended" and re.search(says[verdict.name], verdict.message), text(result)
    assert result.points == 4, text(result)


def test_an_answer_before_the_question_is_none(short, tmp_path):
    early = """
import os, sys
from advbn_lib.grading.wire import pack
reply = pack({"value": None})
os.write(int(sys.argv[2]), (len(reply).to_bytes(8, "big") + reply) * 3)
"""
    result = grade(notebook(tmp_path, RIGHT, early), Examination(TINY), short)
    assert states(result) == {"double": "passed", "treble": "not done", "again": "passed"}, text(result)


def test_memory_that_python_does_not_see_is_bounded_too(secrets, tmp_path):
    code = """
import mmap
kept = []
while True:
    kept.append(mmap.mmap(-1, 2**27))
    for _ in range(2**4):
        kept[-1].write(bytes(2**23))
"""
    try:
        made = Sandbox(Limits(memory=2**30, cell_seconds=50), (), (secrets,))
    except SandboxRefused as error:
        pytest.skip(str(error))
    with made:
        result = grade(notebook(tmp_path, RIGHT, code), Examination(TINY), made)
    assert result.points == 5 and "1.0 GB of memory" in result.failed_cells[0].message, text(result)


def test_answers_that_are_no_plain_values_are_wrong_and_harmless(short, tmp_path):
    code = """
import torch, sys, builtins

class Evil:
    def __reduce__(self): return (exec, ("raise SystemExit",))
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __float__(self): return 0.0
    def __array__(self, *a): raise RuntimeError
class Close(torch.Tensor):
    def __sub__(self, other): return torch.zeros(5)
    def __torch_function__(self, f, types, args=(), kwargs=None): return torch.zeros(5)
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__

def evil(): return Evil()
def nested():
    x = []
    for _ in range(10**5): x = [x]
    return x
def endless():
    x = []
    x.append(x)
    return x
def large(): return "x" * 10**9
def numbers(): return torch.tensor([float("nan"), float("inf")])
def subclass(): return torch.ones(5).as_subclass(Close)
def texts(): return [Text("a"), {"k": Text("b")}, True, 10**100]
def printed(): return "\\x1b[2J\\ud800 points: 100"
def leave(): sys.exit(0)
def stop(): raise type("\\x1b[2J", (Exception,), {})("\\n" * 10**6)
def wide(): return torch.ones(1).expand(10**6, 10**6)
"""
    seen: dict = {}
    names = ("evil", "nested", "endless", "large", "numbers", "subclass", "texts", "printed", "leave", "stop", "wide")

    def ask(name, student) -> None:
        seen[name] = student.call(name)

    checks = tuple(Check(name, name, functools.partial(ask, name), seconds=20) for name in names)
    result = grade(notebook(tmp_path, code), Examination(Assignment(1, "a", "A", (Task("t", "T", checks),))), short)
    passed = {verdict.name for verdict in result.tasks[0].checks if verdict.state == "passed"}
    assert passed == {"numbers", "subclass", "texts", "printed"}, text(result)
    assert type(seen["subclass"]) is torch.Tensor and type(seen["texts"][0]) is str and seen["texts"][3] == 10**100
    seen["printed"].encode()
    assert all("\x1b" not in verdict.message and "\n" not in verdict.message for verdict in result.tasks[0].checks)
    write(result, tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["points"] == 4


def test_a_submission_that_patches_everything_and_searches_its_process_gains_nothing(short, tmp_path):
    code = """
import gc, sys, torch
import advbn_lib.grading as g
from advbn_lib.grading import answering, asking, child, judge, task, wire
torch.allclose = torch.equal = lambda *a, **k: True
for module in (g, task, asking, judge):
    for name in ("expect", "expect_close", "expect_tensor", "matches", "judge"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: True)
judge.Verdict.points = 100
task.Check.run = lambda *a: None
sys.modules["advbn_lib.grading.judge"] = None

def found():
    frames, names = sys._getframe(), []
    while frames:
        names += [f"{frames.f_code.co_filename}:{n}" for n, v in frames.f_locals.items() if "Check" in type(v).__name__]
        frames = frames.f_back
    names += [type(o).__name__ for o in gc.get_objects() if type(o).__name__ in ("Check", "Task", "Assignment", "Examination")]
    names += [n for n in sys.modules if "hidden" in n or n.endswith(".grade")]
    return [n for n in names if "hidden_checks" in n or not n.startswith("/")]
def treble(x): return 2.9 * x
"""
    exam, answers = asking("found")
    exam = Examination(Assignment(1, "a", "A", (*exam.assignment.tasks, TINY.tasks[1])))
    result = grade(notebook(tmp_path, RIGHT, code), exam, short)
    assert answers["found"] == [] and result.points == 2, text(result)
    assert states(result)["treble"] == "wrong"
    answer_all = """
from advbn_lib.grading.answering import Desk
from advbn_lib.grading.wire import pack
Desk.answer = lambda self, message: pack({"value": None, "points": 100, "state": "passed", "traces": []})
"""
    assert grade(notebook(tmp_path, answer_all), Examination(TINY), short).points == 0


def test_hidden_inputs_do_not_come_out_in_the_result(short, tmp_path):
    code = """
def treble(x):
    said = f"seen-{[round(v, 3) for v in x.tolist()]}"
    print(said)
    open("seen.txt", "w").write(said)
    raise type(said, (Exception,), {})(said)
"""
    result = grade(notebook(tmp_path, RIGHT, code), Examination(TINY), short)
    assert states(result)["treble"] == "wrong"
    assert "seen-" not in text(result) and "seen-" not in str(result)


def test_hidden_inputs_do_not_come_out_in_a_public_check_that_stands_after_them(short, tmp_path):
    code = """
seen = []
def treble(x):
    seen.append(x.sum().item())
    open("seen.txt", "a").write("seen")
    return 3 * x
def double(x):
    import os
    if seen or os.path.exists("seen.txt"):
        raise ValueError(f"seen-{seen}")
    return 2 * x
"""
    result = grade(notebook(tmp_path, code), Examination(TINY), short)
    assert result.points == 7 and "seen-" not in str(result), text(result)
    assert [task.name for task in result.tasks] == ["double", "treble", "again"]
    both = Task("both", "Both", (*TINY.tasks[1].checks, *TINY.tasks[0].checks))  # a hidden check before a public one
    result = grade(notebook(tmp_path, code), Examination(Assignment(1, "a", "A", (both,))), short)
    assert [check.name for check in result.tasks[0].checks] == ["trebles", "doubles"] and result.points == 3, text(
        result
    )


def test_the_size_of_an_answer_that_is_too_large_tells_nothing(short, tmp_path):
    code = "import os, sys\ndef treble(x): os.write(int(sys.argv[2]), (123 * 2**20 * 1000).to_bytes(8, 'big'))"
    result = grade(notebook(tmp_path, RIGHT, code), Examination(TINY), short)
    assert states(result)["treble"] == "ended" and "too large" in text(result) and "123" not in text(result)


def test_functions_that_end_the_process_leave_restarts_for_the_others(short, tmp_path):
    code = """
import os
def attack(): os._exit(1)
def wrapped(): attack()
class Layer:
    def attack(self): attack()
    def other(self): return 1
"""

    def ask_layer(student) -> None:
        layer = student.keep("Layer")
        assert student.on(layer, "other") == 1
        student.on(layer, "attack")

    ends = [lambda s: s.call("attack"), lambda s: s.call("wrapped"), ask_layer]
    checks = tuple(Check(f"{n} {i}", "x", run, seconds=20) for n in range(10) for i, run in enumerate(ends))
    exam = Examination(Assignment(1, "a", "A", (Task("ends", "Ends", checks), TINY.tasks[2])))
    limits = dataclasses.replace(SHORT, restarts=6)
    result = grade(notebook(tmp_path, RIGHT, code), exam, _With(short, limits))
    assert result.points == 4, text(result)
    said = [check.message for check in result.tasks[0].checks]
    assert all("ended the process (exit 1)" in message for message in said[:6]), said
    for number, name in enumerate(("`attack`", "`wrapped`", "`Layer.attack`")):
        assert all(f"2 times in {name}: it is not asked again" in message for message in said[6 + number :: 3]), said


class _With:
    """A sandbox with other limits for the grader's side."""

    def __init__(self, sandbox: Sandbox, limits: Limits) -> None:
        self.isolation, self.start, self.limits = sandbox.isolation, sandbox.start, limits


def test_what_an_assignment_withholds_of_the_library_cannot_be_had(secrets, tmp_path):
    code = """
import glob, importlib, os, sys

def withheld():
    found = []
    for name in ("advbn_lib.statistics", "advbn_lib.perturbations"):
        try:
            found.append(importlib.import_module(name).__name__)
        except ImportError:
            pass
    for start in sys.path:
        found += glob.glob(f"{start}/advbn_lib/**/statistics.*", recursive=True)
    return found

def there():
    from advbn_lib import SplitError
    from advbn_lib.models import CifarResNet
    return [SplitError.__name__, CifarResNet.__name__]
"""
    try:
        made = Sandbox(SHORT, ("advbn_lib.statistics",), (secrets,))
    except SandboxRefused as error:
        pytest.skip(str(error))
    exam, answers = asking("withheld", "there")
    with made:
        result = grade(notebook(tmp_path, RIGHT, code), exam, made)
    assert answers == {"withheld": [], "there": ["SplitError", "CifarResNet"]}, text(result)


def test_memory_within_python_is_an_error_of_that_cell(short, tmp_path):
    result = grade(
        notebook(tmp_path, "x = bytearray(10**11)", RIGHT, "import torch\ny = torch.ones(10**11)"),
        Examination(TINY),
        short,
    )
    assert result.points == 5 and [cell.error for cell in result.failed_cells] == ["MemoryError", "RuntimeError"], text(
        result
    )


def test_threads_without_end_are_bounded(short, tmp_path):
    code = """
import threading, time
threading.stack_size(32768)
def many():
    count = 0
    try:
        for _ in range(100_000):
            threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
            count += 1
    except RuntimeError:
        pass
    return count
"""
    others = sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines()) > 1
    if os.geteuid() != 0 or not others or "namespaces" not in short.isolation.layers:
        pytest.skip("a submission has a user of its own only if the grader is root and the room has namespaces")
    exam, answers = asking("many", seconds=30)
    result = grade(notebook(tmp_path, RIGHT, code), exam, short)
    assert 10 < answers["many"] < 256 and result.tasks[0].points == 1


def test_notebooks_for_jupyter_run_without_it(short, tmp_path):
    cells = [
        "%pip install torch\n!rm -rf /\nimport torch",
        "name = input('your name? ')",
        "1 / 0",
        "def (",
        RIGHT,
        "display(torch.ones(1))",
    ]
    result = grade(notebook(tmp_path, *cells), Examination(TINY), short)
    assert result.points == 5 and result.skipped_lines == 2
    assert [(cell.number, cell.error) for cell in result.failed_cells] == [
        (2, "EOFError"),
        (3, "ZeroDivisionError"),
        (4, "SyntaxError"),
    ]
    assert "cell 3, line 1: 1 / 0" in result.failed_cells[1].where


def test_no_isolation_is_refused_unless_it_is_asked_for(secrets):
    with pytest.raises(SandboxRefused, match="--weak-isolation"):
        Sandbox(LIMITS, (), (secrets,), layers=())
    with Sandbox(LIMITS, (), (secrets,), layers=(), weak=True) as weak:
        assert not weak.isolation.strong and "read what is secret" in weak.isolation.open


def test_nothing_is_left_behind(secrets, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    with room("landlock", secrets) as made:
        exam, _ = asking("deep")
        deep = "import os\ndef deep():\n    for _ in range(3000):\n        os.mkdir('d'); os.chdir('d')"
        assert grade(notebook(tmp_path, deep), exam, made).tasks[1].points == 1
    assert [path.name for path in tmp_path.iterdir()] == ["submission.ipynb"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_room_closes_when_the_grader_is_killed(secrets, tmp_path):
    mark = tmp_path / "mark.py"
    mark.write_text(
        "import sys, time\nfrom pathlib import Path\nfrom advbn_lib.grading.sandbox import Limits, Sandbox\n"
        "s = Sandbox(Limits())\nroom = s.start(['-I', '-S', '-c', 'import time; time.sleep(1000)'])\n"
        "time.sleep(1)\nprint(room.process.pid, s._folder, flush=True)\ntime.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, str(mark)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as grader:
        launcher, folder = grader.stdout.readline().split()
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        grader.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in [launcher, *children]):
        time.sleep(0.1)
    subprocess.run(["rm", "-rf", folder], check=True)
    assert children and not any(Path(f"/proc/{pid}").exists() for pid in [launcher, *children])


def test_folders_of_killed_graders_are_deleted_and_no_others(secrets, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def age(folder: Path, seconds: float) -> None:
        os.utime(folder, (time.time() - seconds,) * 2)

    folders = {name: tmp_path / f"advbn-room-{name}" for name in ("killed", "young", "unlocked", "old", "other")}
    for folder in folders.values():
        (folder / "deep" / "er").mkdir(parents=True)
    for name in ("killed", "young", "other"):
        (folders[name] / "lock").touch()
    folders["other"] = folders["other"].rename(tmp_path / "others-room")
    for name, seconds in (("killed", 3600), ("unlocked", 3600), ("old", 10**6), ("other", 10**6)):
        age(folders[name], seconds)
    link = tmp_path / "advbn-room-link"
    link.symlink_to(folders["other"])
    with make_room(secrets) as running:
        age(running._folder, 10**6)
        with make_room(secrets):
            assert (running._folder / "library").is_dir()
    left = {name for name, folder in folders.items() if (folder / "deep" / "er").is_dir()}
    assert left == {"young", "unlocked", "other"} and link.is_symlink()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_grader_that_is_told_to_end_writes_its_table_and_leaves_nothing(tmp_path, jobs):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    (folder / "alice.ipynb").touch()
    for name in ("bob", "carol", "dora", "eve"):
        notebook(folder, "while True: pass", name=f"{name}.ipynb")
    words = ["grade", folder, "--out", out, "--assignment", "statistics_and_style", "--public-only", "--jobs", jobs]
    environment = {**ENVIRONMENT, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-m", "advbn_lib", *map(str, words)], env=environment, stderr=subprocess.PIPE, text=True
    ) as grader:
        end = time.monotonic() + 100
        while time.monotonic() < end and grader.poll() is None and not (out / "alice.json").exists():
            time.sleep(0.1)
        while time.monotonic() < end and grader.poll() is None and not list(tmp_path.glob("advbn-room-*")):
            time.sleep(0.1)
        time.sleep(2)  # into a submission
        started = time.monotonic()
        grader.send_signal(signal.SIGTERM)
        errors = grader.stderr.read()
    if grader.returncode == 3:
        pytest.skip(errors)
    assert grader.returncode == 128 + signal.SIGTERM, errors
    assert time.monotonic() - started < 60
    rows = (out / "points.csv").read_text().splitlines()
    assert len(rows) == 2 and rows[1].startswith(f"alice.ipynb,{NOT_RUN},0.0") and "the file is empty" in rows[1]
    assert list(tmp_path.glob("advbn-room-*")) == []
    assert str(tmp_path) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def make_room(secrets: Path) -> Sandbox:
    return Sandbox(SHORT, (), (secrets,))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_is_graded_whatever_is_in_it(tmp_path, secrets, jobs, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # for the workers
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # for this process
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "later").mkdir(parents=True)
    (folder / ".ipynb_checkpoints").mkdir()
    notebook(folder, RIGHT, name="alice.ipynb")
    notebook(folder, RIGHT, name="=cmd.ipynb")
    notebook(folder / "later", "import os; os._exit(1)", name="carol.ipynb")
    notebook(folder / ".ipynb_checkpoints", RIGHT, name="alice.ipynb")
    (folder / "bob.ipynb").write_text("{")
    (folder / "link.ipynb").symlink_to(secrets / "tiny.py")
    (folder / "notes.txt").write_text("x")
    batch = Batch(folder, out, tiny_examination, functools.partial(make_room, secrets), jobs, progress=False)
    table = grade_folder(batch).read_text()
    rows = {row.split(",")[0]: row.split(",") for row in table.splitlines()}
    assert rows["alice.ipynb"][:4] == ["alice.ipynb", GRADED, "5.0", "7.0"]
    assert rows["later/carol.ipynb"][1:4] == [GRADED, "0.0", "7.0"]
    assert rows["bob.ipynb"][1:4] == rows["link.ipynb"][1:4] == [NOT_RUN, "0.0", "7.0"]
    assert THE_SECRET not in table and len(rows) == 6
    assert {rows["alice.ipynb"][-1], rows["'=cmd.ipynb"][-1]} == {"", "'=cmd.ipynb"}  # the same file twice
    assert list(tmp_path.glob("advbn-room-*")) == []
    (out / "bob.json").write_text("{")
    asked: list[Path] = []
    if jobs == 1:
        from advbn_lib.grading import batch as module

        real = module.grade
        monkeypatch.setattr(module, "grade", lambda path, *rest: asked.append(path) or real(path, *rest))
        assert grade_folder(batch).read_text() == table
        assert {path.name for path in asked} == {"bob.ipynb"}  # the others have results


def rows_of(table: Path) -> dict[str, dict[str, str]]:
    with table.open(newline="") as file:
        return {row["submission"]: row for row in csv.DictReader(file)}


def instant(batch_folder: Path, out: Path, monkeypatch, asked: list[Path] | None = None, **options) -> Batch:
    """A batch whose grades come without a closed room: a point for each letter of the file's name."""
    from advbn_lib.grading import batch as module

    def grade_at_once(path, exam, sandbox):
        if asked is not None:
            asked.append(path)
        content = path.read_bytes() if path.is_file() else b""
        found = failed(path, exam, sandbox, "")
        return dataclasses.replace(
            found, state=GRADED, points=float(len(path.name)), sha256=hashlib.sha256(content).hexdigest()
        )

    monkeypatch.setattr(module, "grade", grade_at_once)
    return Batch(batch_folder, out, tiny_examination, _NoRoom, progress=False, **options)


class _NoRoom:
    isolation = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_no_name_of_a_submission_stops_the_others(tmp_path, monkeypatch):
    folder, out, asked = tmp_path / "in", tmp_path / "out", []
    names = ["a" * 249 + ".ipynb", "bob.ipynb", "bob.json/x.ipynb", "carol.ipynb", "points.csv/x.ipynb", "zoe.ipynb"]
    names += ["ANNA.IPYNB", "anna2.ipynb", "bob.IPYNB", "deep.json/a/b.ipynb", "deep.ipynb"]
    names.append(hashlib.sha256(b"carol.ipynb").hexdigest()[:16] + ".ipynb")  # would be where carol's may have to go
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (out / "carol.json").mkdir(parents=True)  # something is in the way
    batch = instant(folder, out, monkeypatch, asked)
    rows = rows_of(grade_folder(batch))
    assert set(rows) == set(names) and sorted(asked) == sorted(folder / name for name in names)
    for name, row in rows.items():
        known = json.loads((out / row["result"]).read_text())
        assert (known["submission"], float(row["points"])) == (Path(name).name, len(Path(name).name)), name
        assert known["sha256"] == hashlib.sha256(name.encode()).hexdigest()
    assert len({row["result"] for row in rows.values()}) == len(names)
    assert rows["zoe.ipynb"]["result"] == "zoe.json" and rows["ANNA.IPYNB"]["result"] == "ANNA.json"
    asked.clear()
    assert rows_of(grade_folder(batch)) == rows and asked == []
    (out / "carol.json").rmdir()
    assert rows_of(grade_folder(dataclasses.replace(batch, again=True)))["carol.ipynb"]["result"] == "carol.json"
    assert not list(out.rglob("*.part"))


def test_a_result_of_older_checks_is_not_current(tmp_path, monkeypatch):
    from advbn_lib.grading import batch as module

    asked: list[Path] = []
    batch = instant(tmp_path, tmp_path / "out", monkeypatch, asked)
    notebook(tmp_path, RIGHT, name="alice.ipynb")
    grade_folder(batch)
    grade_folder(batch)
    assert len(asked) == 1
    monkeypatch.setattr(module, "checks_digest", lambda: "another")
    grade_folder(batch)
    assert len(asked) == 2


def test_the_digest_of_the_checks_covers_their_code(tmp_path, monkeypatch):
    from advbn_lib.grading import grade as module

    for part in ("assignments", "grading/confinement", "data"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(module.advbn_lib, "__file__", str(tmp_path / "__init__.py"))
    digest = module.checks_digest.__wrapped__
    seen = [digest()]
    for name in ("assignments/a.py", "assignments/b.py", "grading/confinement/a.py"):
        (tmp_path / name).write_text("x = 2\n")
        seen.append(digest())
    assert len(set(seen)) == 4
    (tmp_path / "data" / "a.py").write_text("x = 2\n")
    assert digest() == seen[-1]


def test_copies_are_told_by_their_code(short, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    copy = json.loads(notebook(folder, RIGHT, name="alice.ipynb").read_text())
    copy["metadata"] = {"authors": ["bob"]}
    copy["cells"].append({"cell_type": "markdown", "source": "my own words"})
    (folder / "bob.ipynb").write_text(json.dumps(copy))
    notebook(folder, RIGHT + "  # mine", name="carol.ipynb")
    for name in ("dora", "eve"):
        (folder / f"{name}.ipynb").touch()
    batch = Batch(folder, tmp_path / "out", lambda: Examination(TINY), lambda: short, progress=False)
    monkeypatch.setattr(Sandbox, "close", lambda self: None)  # it is used again
    rows = rows_of(grade_folder(batch))
    assert [rows[f"{name}.ipynb"]["same_code_as"] for name in ("alice", "bob", "carol", "dora", "eve")] == [
        "", "alice.ipynb", "", "", "",
    ]  # fmt: skip
    assert "the file is empty" in rows["eve.ipynb"]["problem"]


def test_what_is_not_graded_is_listed(tmp_path, monkeypatch, capsys):
    from advbn_lib.grading import cli

    folder, out = tmp_path / "in", tmp_path / "in" / "out"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("homework.zip", "b/notes\x1b[2J", ".git/x", ".hidden", "A.IPYNB"):
        (folder / name).write_text("x")
    monkeypatch.setattr(cli, "find", {"tiny": TINY}.__getitem__)
    monkeypatch.setattr(cli, "Sandbox", lambda *arguments: _NoRoom())
    instant(folder, out, monkeypatch)
    words = ("grade", folder, "--out", out, "--assignment", "tiny", "--public-only", "--quiet")
    for _ in range(2):  # the second time there are results in the folder
        assert run_command(*words) == 0
        said = capsys.readouterr().err.splitlines()
        assert [line.rpartition(": ")[2] for line in said] == [
            str(folder / "b/notes?[2J"),
            str(folder / "homework.zip"),
        ]
    assert list(rows_of(out / "points.csv")) == ["A.IPYNB"]


def test_one_failure_of_the_grader_stops_nobody_else(tmp_path, secrets, monkeypatch):
    from advbn_lib.grading import batch as module

    for name in ("alice", "bob"):
        notebook(tmp_path, RIGHT, name=f"{name}.ipynb")

    def breaks(path, exam, sandbox):
        if path.stem == "alice":
            raise RuntimeError("a bug")
        return real(path, exam, sandbox)

    real = module.grade
    monkeypatch.setattr(module, "grade", breaks)
    batch = Batch(tmp_path, tmp_path / "out", tiny_examination, functools.partial(make_room, secrets), progress=False)
    table = grade_folder(batch).read_text()
    assert "alice.ipynb,the grader failed,0.0" in table and "RuntimeError: a bug" in table
    assert "bob.ipynb,graded,5.0" in table


def run_command(*words: object) -> int:
    """The command line's exit status."""
    return run([str(word) for word in words])


def test_exit_codes_and_the_result_file(tmp_path, secrets, monkeypatch, capsys):
    from advbn_lib.grading import cli

    monkeypatch.setattr(cli, "find", {"tiny": TINY}.__getitem__)
    monkeypatch.setattr(cli, "names", lambda: ["tiny"])
    (tmp_path / "bad.ipynb").write_text("{")
    right = notebook(tmp_path, RIGHT)
    common = ("--assignment", "tiny", "--hidden", secrets)
    assert run_command("grade", right, "--out", tmp_path / "r.json", *common, "--variant", 3) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["points"], result["of"], result["variant"], result["state"]) == (5, 7, 3, "graded")
    assert result["isolation"]["open"] == [] and result["versions"]["torch"] == torch.__version__
    assert "5 of 7 points" in capsys.readouterr().out
    assert run_command("grade", tmp_path / "bad.ipynb", "--out", tmp_path / "b.json", *common) == 2
    assert json.loads((tmp_path / "b.json").read_text())["points"] == 0
    assert run_command("grade", tmp_path / "nobody.ipynb", *common) == 1
    assert run_command("grade", right, "--hidden", secrets) == 1  # which assignment?
    assert run_command("grade", right, "--assignment", "tiny", "--hidden", tmp_path) == 1
    assert run_command("grade", tmp_path, *common) == 1  # a folder without --out

    def refuse(*arguments):
        raise SandboxRefused("not here")

    monkeypatch.setattr(cli, "Sandbox", refuse)
    assert run_command("grade", right, *common) == 3


def test_the_gradescope_zip_grades_where_it_is_unpacked(tmp_path, secrets):
    home = tmp_path / "autograder"
    for name in ("source", "submission", "results"):
        (home / name).mkdir(parents=True)
    with zipfile.ZipFile(export(tiny_examination(), secrets, tmp_path / "a.zip")) as archive:
        archive.extractall(home / "source")
    package = home / "source" / "advbn_lib" / "assignments"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "tiny.py").write_text(
        "import torch\nfrom advbn_lib.grading import Assignment, Check, Task, expect_close\n"
        "def doubles(s): expect_close(s.call('double', torch.ones(2)), 2 * torch.ones(2), 'double(x)')\n"
        "ASSIGNMENT = Assignment(9, 'tiny', 'Tiny', (Task('d', 'Double', (Check('doubles', '2 x', doubles),)),))\n"
    )
    script = home / "source" / "run_autograder"
    environment = {**ENVIRONMENT, "PYTHONPATH": "", "AUTOGRADER_HOME": str(home), "AUTOGRADER_PYTHON": sys.executable}
    for cells, score in (((), 0), ((RIGHT,), 1)):
        if cells:
            notebook(home / "submission", *cells)
        done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode == 3:
            pytest.skip(done.stderr)
        assert done.returncode == 0, done.stderr
        assert json.loads((home / "results" / "results.json").read_text())["score"] == score
