"""The closed room that a submission runs in.

A submission is hostile code until proven otherwise. The checks, the references and the hidden inputs stay in the grader's
process; the submission runs in another one, started fresh, and answers calls (:mod:`advbn_lib.grading.remote`). This
module is about what that other process can reach. On Linux it is shut in by layers, of which the strongest that work
without special rights are used:

``namespaces``
    A file tree of its own: Python and the system's libraries read-only, a copy of this library without what the assignment
    withholds, and one empty folder in memory to write to, of limited size. Nothing else exists: no checkout, no hidden
    checks, no other submission, no result. No network, not even to this machine. No process to be seen but its own. If the
    grader is root, the submission is a user without a name and without rights.
``landlock``
    Where namespaces are refused (many containers): the kernel denies all files but the same ones. What lies elsewhere
    cannot be read, though its name, size and date can be seen. The folder to write to is on the disk; a file of it is limited,
    its sum is not.
``seccomp``
    Always, with either: no new process or program that outlives the submission (one process, threads only), no socket, no
    signal to and no look into another process, no change of file modes, owners and times, no memory that is not counted.
limits
    Memory, size of files, open files, processor time, time for each answer; no core dumps. 256 threads, where the grader is
    root and gives the submission a user of its own; else their number is bounded by their memory alone. The memory limit is on the
    process's own memory, watched ten times a second; a jump between two looks is cut by the limit on private memory.

What is in force is tried out, not assumed: before the first submission a probe tries to read the hidden checks, to reach a
listener on this machine, to signal the grader, to start a process and to write outside its folder (:func:`Sandbox.probe`).
If any of it succeeds, the grader refuses to work, unless it is told ``--weak-isolation``; then the result says what is not
held. On macOS and Windows nothing of this is there.

What it does not cover: a flaw in the kernel; side channels (time, caches, load), so a submission can slow its neighbours on
the same processors; reading the public checks and the library, which students have anyway; a graphics card, which is not
handed in; in the ``landlock`` layer filling the disk with many files. A submission also decides all that its own process
says: values are judged, but what it reports of *side effects* (``call_and_look``) is only its own word.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import site
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import advbn_lib
from advbn_lib.grading.local import BEING_GRADED

_LIBRARY = Path(advbn_lib.__file__).resolve().parent
_CONFINEMENT = Path(__file__).resolve().parent / "confinement"
_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime",
    "/etc/fonts", "/etc/mime.types", "/sys/devices/system/cpu",
)  # fmt: skip
_DEVICES = (
    "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat",
)  # fmt: skip
_CHOICES = (("namespaces", "seccomp"), ("landlock", "seccomp"))
_FIRST_USER, _USERS = 40_000, 20_000
_FOLDERS, _LOCK = "advbn-room-", "lock"
_YOUNG, _OLD = 60.0, 86_400.0  # seconds: a folder that is being made; one without a lock that nobody comes back for


class SandboxRefused(RuntimeError):
    """This machine cannot shut a submission in well enough."""


@dataclass(frozen=True)
class Limits:
    """What a submission may use.

    Attributes:
        memory, disk: bytes: the process's own memory; the folder it writes to (each file, in the landlock layer).
        cell_seconds: for one cell of the notebook.
        total_seconds: for the whole grading of a submission.
        start_seconds: for Python and torch to start, before the submission's code runs.
        answer_bytes: the largest answer to a check.
        restarts: how often a process that ended is started again, without the cell that ended it; for one function twice.
        threads: of torch.
    """

    memory: int = 4 * 2**30
    disk: int = 256 * 2**20
    cell_seconds: float = 120.0
    total_seconds: float = 1800.0
    start_seconds: float = 180.0
    answer_bytes: int = 128 * 2**20
    restarts: int = 24
    threads: int = 1

    def __post_init__(self) -> None:
        if self.memory < 2**29:
            raise ValueError(f"torch alone needs half a GB: memory is {self.memory} bytes")
        if (
            min(self.disk, self.cell_seconds, self.total_seconds, self.start_seconds, self.answer_bytes, self.threads)
            <= 0
        ):
            raise ValueError("limits must be more than 0")


@dataclass(frozen=True)
class Isolation:
    """What was in force.

    Attributes:
        layers: of "namespaces", "landlock", "seccomp".
        held, open: what the probe could not do, and what it could.
    """

    layers: tuple[str, ...]
    held: tuple[str, ...]
    open: tuple[str, ...]

    @property
    def strong(self) -> bool:
        """Whether the probe could do nothing of what it tried."""
        return not self.open


@dataclass
class Sandbox:
    """Makes closed rooms, one for each start. Use it as a context manager: it has temporary files.

    Args:
        limits: of each room.
        withheld: modules of the library that are left out of the rooms' copy.
        secrets: files and folders that must not be readable (the hidden checks, the submissions).
        data: a folder with data sets that may be read; ADVBN_DATA names it to the submission.
        layers: None to try namespaces, then landlock; () for none.
        weak: go on though the probe finds something open.

    Raises:
        SandboxRefused: if the isolation is not strong and ``weak`` is not said.
    """

    limits: Limits = field(default_factory=Limits)
    withheld: tuple[str, ...] = ()
    secrets: tuple[Path, ...] = ()
    data: Path | None = None
    layers: tuple[str, ...] | None = None
    weak: bool = False

    def __post_init__(self) -> None:
        _delete_abandoned(Path(tempfile.gettempdir()))
        self._folder = Path(tempfile.mkdtemp(prefix=_FOLDERS)).resolve()
        self._lock: int | None = None
        try:
            self._lock = _locked(self._folder / _LOCK)
            (self._folder / "root").mkdir()
            _copy_library(self._folder / "library" / "advbn_lib", self.withheld)
            self.isolation = self._choose()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the temporary files."""
        _delete(self._folder)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def start(self, command: list[str], keep: tuple[int, ...] = (), **streams: int) -> Room:
        """Start ``python COMMAND`` in a new room; ``keep`` are descriptors that it inherits."""
        return self._start(self.isolation.layers, command, keep, **streams)

    def probe(self, layers: tuple[str, ...]) -> Isolation:
        """Try to break out of a room with these layers, and report what was held; SandboxRefused if it cannot be made."""
        outside = self._folder / "outside"
        outside.write_text("secret")
        secrets = [
            str(outside),
            *(str(path) for path in self.secrets if os.path.exists(path)),
            *map(str, _secrets_of_checkout()),
        ]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            facts = json.dumps(
                {"secrets": secrets, "port": listener.getsockname()[1], "grader": os.getpid(), "write": str(outside)}
            )
            room = self._start(
                layers, ["-I", "-S", "-c", _PROBE, facts], stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            try:
                out, errors = room.process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                out, errors = b"", b"no answer within 60 s"
            finally:
                ended = room.stop()
        try:
            found = json.loads(out)
        except ValueError:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise SandboxRefused(
                f"{', '.join(layers) or 'no layer'}: {ended.get('problem') or last or ended}"
            ) from None
        held = tuple(name for name, broken in found.items() if not broken)
        return Isolation(layers, held, tuple(name for name, broken in found.items() if broken))

    def _choose(self) -> Isolation:
        problems = []
        choices = _CHOICES if self.layers is None else (self.layers,)
        if sys.platform != "linux":
            choices = ((),) if not self.layers else choices
        best = None
        for layers in choices:
            try:
                found = self.probe(layers)
            except SandboxRefused as error:
                problems.append(str(error))
                continue
            if found.strong:
                return found
            problems.append(f"{', '.join(layers) or 'no layer'}: the probe could {'; '.join(found.open)}")
            if best is None or len(found.open) < len(best.open):
                best = found
        if self.weak:
            return best if best is not None else self.probe(())
        raise SandboxRefused(
            "this machine cannot shut a submission in: "
            + " | ".join(problems)
            + ". Grade on Linux, in a container or a "
            "virtual machine that you can throw away, or say --weak-isolation if you trust the submissions."
        )

    def _start(self, layers: tuple[str, ...], command: list[str], keep: tuple[int, ...] = (), **streams: int) -> Room:
        work = Path("/tmp/work") if "namespaces" in layers else Path(tempfile.mkdtemp(prefix="work-", dir=self._folder))
        readable = self._readable()
        secrets = [path for path in self._all_secrets() if any(path.is_relative_to(shown) for shown in readable)]
        if "landlock" in layers:
            readable = [*(part for path in readable for part in _without(path, secrets)), *map(Path, _DEVICES)]
        report_read, report_write = os.pipe()
        life_read, life_write = os.pipe()
        config_read, config_write = os.pipe()
        config = {
            "layers": list(layers), "root": str(self._folder / "root"), "work": str(work),
            "readable": [str(path) for path in readable], "hidden": [str(path) for path in secrets],
            "memory": self.limits.memory, "disk": self.limits.disk, "cpu": int(self.limits.total_seconds * self.limits.threads) + 60,
            "user": _FIRST_USER + os.getpid() % _USERS, "keep": list(keep), "report": report_write, "lifeline": life_read,
            "command": [sys.executable, *command], "environment": self._environment(work),
        }  # fmt: skip
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CONFINEMENT), str(config_read)],
                pass_fds=(config_read, report_write, life_read, *keep), stdin=subprocess.DEVNULL, start_new_session=True,
                env={"PATH": "/usr/bin:/bin"}, **streams,
            )  # fmt: skip
        finally:
            for descriptor in (config_read, report_write, life_read):
                os.close(descriptor)
        # From a thread: the configuration may be longer than the pipe holds, and the program may end before it reads.
        writer = threading.Thread(target=_write_all, args=(config_write, json.dumps(config).encode()), daemon=True)
        writer.start()
        return Room(process, life_write, report_read, None if "namespaces" in layers else work)

    def _readable(self) -> list[Path]:
        """Files and folders that a room can read, outermost first, none within another."""
        python = [sys.prefix, sys.exec_prefix, sys.base_prefix, Path(sys.executable).resolve().parent]
        if site.ENABLE_USER_SITE:
            python.append(site.getusersitepackages())
        python += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
        wanted = [Path(path) for path in (*_SYSTEM, *python)]
        wanted += [path.resolve() for path in wanted]  # both where a link is and where it leads
        wanted += [self._folder / "library", *([self.data.resolve()] if self.data else [])]
        shown: list[Path] = []
        for path in sorted(
            {path for path in wanted if os.path.exists(path) and path != Path("/")}, key=lambda path: len(path.parts)
        ):
            if not any(
                path.is_relative_to(outer) and path.resolve().is_relative_to(outer.resolve()) for outer in shown
            ):
                shown.append(path)
        return shown

    def _all_secrets(self) -> list[Path]:
        installed = [
            Path(entry) / "advbn_lib" for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")
        ]
        paths = [*self.secrets, *_secrets_of_checkout(), *(path for path in installed if os.path.exists(path))]
        return sorted({path.resolve() for path in paths})

    def _environment(self, work: Path) -> dict[str, str]:
        threads = str(self.limits.threads)
        environment = {
            "PATH": "/usr/bin:/bin", "HOME": str(work), "TMPDIR": str(work), "LANG": "C.UTF-8", "MPLBACKEND": "Agg",
            "MPLCONFIGDIR": str(work), "PYTHONPATH": str(self._folder / "library"), "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads, BEING_GRADED: "1",
        }  # fmt: skip
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        if self.data:
            environment["ADVBN_DATA"] = str(self.data.resolve())
        return environment


class Room:
    """A started process, shut in."""

    def __init__(self, process: subprocess.Popen, lifeline: int, report: int, work: Path | None) -> None:
        self.process = process
        self._lifeline, self._report, self._work = lifeline, report, work
        self._ended: dict[str, str] | None = None

    def stop(self) -> dict[str, str]:
        """End all of it, if it has not ended; says how it ended: ``ended`` ("exit 0", "signal 11", "memory", "stopped")."""
        if self._ended is not None:
            return self._ended
        if self.process.poll() is None:
            os.close(self._lifeline)
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        else:
            os.close(self._lifeline)
        with os.fdopen(self._report, "rb") as file:
            os.set_blocking(file.fileno(), False)
            said = file.read() or b""
        try:
            self._ended = json.loads(said.decode().partition("\n")[0])
        except ValueError:
            self._ended = {"ended": f"exit {self.process.returncode}", "problem": ""}
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        if self._work is not None:
            _delete(self._work)
        return self._ended


def _secrets_of_checkout() -> list[Path]:
    """What a room must not see of the checkout: solutions stand in it."""
    root = _LIBRARY.parent
    found = [_LIBRARY]
    if (root / "pyproject.toml").is_file():
        found += [root / name for name in ("assignments", "notebooks", "tests", "book", ".git")]
    return [path for path in found if os.path.exists(path)]


def _without(path: Path, secrets: list[Path]) -> list[Path]:
    """``path``, or its parts that are no secrets if there are secrets in it."""
    if path in secrets:
        return []
    if not any(secret.is_relative_to(path) for secret in secrets):
        return [path]
    return [part for below in path.iterdir() for part in _without(below, secrets)]


def _copy_library(target: Path, withheld: tuple[str, ...]) -> None:
    """A copy of this library without the withheld modules, whose packages load their parts when they are asked for."""
    absent = {Path(*module.split(".")[1:]) for module in withheld}

    def left_out(folder: str, names: list[str]) -> list[str]:
        place = Path(folder).relative_to(_LIBRARY)
        out = [
            name for name in names if place / name in absent or (name.endswith(".py") and place / name[:-3] in absent)
        ]
        if place.name == "__pycache__":
            out += [name for name in names if place.parent / name.split(".")[0] in absent]
        return [*out, *(name for name in names if name == "_records" or name.endswith(".ipynb"))]

    shutil.copytree(_LIBRARY, target, ignore=left_out)
    for module in target.rglob("__init__.py"):
        if "grading" not in module.relative_to(target).parts:
            module.write_text(_lazy(module.read_text()))
    target.parent.chmod(0o755)


def _lazy(source: str) -> str:
    """A package's ``__init__`` whose ``from x import y`` happen when y is asked for; as it was if it does more than that."""
    tree = ast.parse(source)
    eager, late = [], {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.startswith("advbn_lib."):
            for name in node.names:
                if name.name == node.module.rpartition(".")[2] or name.name == "*":
                    return source  # the module of that name would stand in the way
                late[name.asname or name.name] = (node.module, name.name)
        elif isinstance(node, (ast.Expr, ast.Assign)):
            eager.append(ast.unparse(node))
        elif not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            return source
    eager.append(
        f"_LATE = {late!r}\n\n\ndef __getattr__(name):\n    if name not in _LATE:\n        raise AttributeError(name)\n"
        "    import importlib\n    module, there = _LATE[name]\n    return getattr(importlib.import_module(module), there)\n"
    )
    return "\n".join(eager)


def _write_all(descriptor: int, data: bytes) -> None:
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except BrokenPipeError:
        pass  # the program ended early; what it says of that is in its report


def _delete(folder: Path) -> None:
    """Delete a folder, however deep a submission made it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:
        pass  # a thousand folders in each other; the next line has no such limit
    if folder.exists() and os.name == "posix":
        subprocess.run(["rm", "-rf", "--", str(folder)], check=False, stderr=subprocess.DEVNULL)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock on a file until it is closed or this process ends; None if it is held, or cannot be."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _delete_abandoned(place: Path) -> None:
    """Delete the folders of graders that were killed before they could do it: they are ours, and nobody holds their lock."""
    for folder in place.glob(f"{_FOLDERS}*"):
        try:
            facts = folder.lstat()
            age = time.time() - facts.st_mtime
            if fcntl is None or not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or age < _YOUNG:
                continue
            if not (folder / _LOCK).exists():
                if age > _OLD:
                    _delete(folder)
            elif (lock := _locked(folder / _LOCK)) is not None:
                _delete(folder)
                os.close(lock)
        except OSError:
            continue  # another grader was faster


_PROBE = """
import json, os, socket, sys
facts = json.loads(sys.argv[1])
def works(attempt):
    try:
        return bool(attempt())
    except BaseException:
        return False
def read(path):
    if os.path.isdir(path):
        return os.listdir(path)
    with open(path, "rb") as file:
        return file.read(1)
def write():
    with open(facts["write"], "a") as file:
        return file.write("x")
def child():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return True
def signal():
    os.kill(facts["grader"], 0)
    return True
def look():
    with open("/proc/%d/environ" % facts["grader"], "rb") as file:
        return file.read(1)
def limits():
    import resource
    return resource.prlimit(facts["grader"], resource.RLIMIT_NOFILE)
def memory():
    import resource
    return resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY
tries = {
    "read what is secret": lambda: any(works(lambda: read(path)) for path in facts["secrets"]),
    "write outside its folder": write,
    "reach the network": lambda: socket.create_connection(("127.0.0.1", facts["port"]), 2),
    "start a process": child,
    "signal the grader": signal,
    "look into the grader": look,
    "change the grader's limits": limits,
    "take memory without limit": memory,
}
print(json.dumps({name: works(attempt) for name, attempt in tries.items()}))
"""
