"""Submissions that attack the grader: the grade is right, the grader survives, nothing outside is touched.

Each scene is a notebook that is graded in a real closed room. Most run in both kinds of room, that of namespaces and that of
Landlock; where the kernel has not the one or the other, its tests are skipped.
"""

import functools
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
from advbn_lib.grading.grade import GRADED, NOT_RUN, Examination, Result, grade, text, write
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
        user=lambda: os.setuid(0) is None and os.getuid() == 0 and os.listdir("/root/") is None,
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
        "leave": "ended the process", "killed": "broke off|ended the process", "boast": "too large", "garbage": "could not be read",
        "twice": "could not be read|more than it was asked", "hang_up": "ended the process|broke off", "large": "too large",
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
    exam, answers = asking("many", seconds=30)
    result = grade(notebook(tmp_path, RIGHT, code), exam, short)
    assert answers.get("many", 0) < 5000 and result.tasks[0].points == 1


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
