"""The program: shut a child process in, start the command in it, and keep watch until it ends.

Reads a JSON configuration (see :class:`advbn_lib.grading.sandbox.Sandbox`) from the file descriptor named by its one
argument. Ends the child when the ``lifeline`` descriptor closes (the grader is gone, or asks for it) or when it has more
memory than it may. Writes one line of JSON to ``report``: why the child ended, or what could not be set up.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

if sys.platform == "linux":  # all at once: later the files are out of sight
    import kernel
    import landlock
    import namespaces
    import seccomp

_PROBLEM = 120  # exit status of a child that could not be shut in
_THREADS = 256  # where the user is nobody else: the kernel counts all that a user runs


def main() -> int:
    descriptor = int(sys.argv[1])
    with os.fdopen(descriptor, "rb") as file:
        config = json.load(file)
    os.set_inheritable(config["report"], False)
    os.set_inheritable(config["lifeline"], False)
    try:
        if "namespaces" in config["layers"]:
            namespaces.unshare_processes()
    except OSError as error:
        return _tell(config, ended="setup", problem=str(error))
    child = os.fork()
    if child == 0:
        try:
            _become(config)
        except BaseException as error:
            _tell(config, ended="setup", problem=f"{type(error).__name__}: {error}")
        os._exit(_PROBLEM)
    for kept in config["keep"]:
        os.close(kept)
    return _watch(config, child)


def _watch(config: dict, child: int) -> int:
    """Wait for the child's end, and see to it that there is one."""
    why, looked = "", 0.0
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        gone, _, _ = select.select([config["lifeline"]], [], [], 0.02)
        if gone and not why:
            why = "stopped"
            _kill(child)
        if not why and time.monotonic() - looked > 0.1:
            looked = time.monotonic()
            if _memory(child) > config["memory"]:
                why = "memory"
                _kill(child)
    _kill(child, group_only=True)
    code = os.waitstatus_to_exitcode(status)
    if code == _PROBLEM:
        return _PROBLEM  # it has told itself
    return _tell(config, ended=why or (f"signal {-code}" if code < 0 else f"exit {code}"), problem="")


def _kill(child: int, group_only: bool = False) -> None:
    """The child and, where it could have children of its own, its process group."""
    for kill in (os.killpg,) if group_only else (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _memory(child: int) -> int:
    """Bytes of the child's own, which no file holds; 0 where there is no /proc."""
    try:
        with open(f"/proc/{child}/status") as file:
            rows = dict(line.split(":", 1) for line in file if line.startswith("Rss"))
    except (OSError, ValueError):
        return 0
    return sum(int(rows.get(name, "0 kB").split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def _become(config: dict) -> None:
    """Give up all rights but those that are left to the child, and turn into the command."""
    os.setsid()
    layers, work, user = config["layers"], config["work"], os.geteuid()
    if "namespaces" in layers:
        if user == 0 and _has_other_users():
            user = config["user"]
        namespaces.enter_view(config["root"], config["readable"], config["hidden"], work, config["disk"], user)
    _limit(config)
    if user != os.geteuid():
        resource.setrlimit(resource.RLIMIT_NPROC, (_THREADS, _THREADS))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform == "linux":
        _drop_capabilities()
        kernel.prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
        kernel.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; after the change of user, which clears it
    if "landlock" in layers:
        landlock.restrict([*config["readable"], f"/proc/{os.getpid()}"], [work, "/dev/null"])
    os.chdir(work)
    for kept in config["keep"]:
        os.set_inheritable(kept, True)
    if "seccomp" in layers:
        seccomp.restrict()
    os.execve(config["command"][0], config["command"], config["environment"])


def _has_other_users() -> bool:
    """Whether root can become somebody else: not in a user namespace that has root alone, which is nobody outside."""
    with open("/proc/self/uid_map") as file:
        return sum(int(line.split()[2]) for line in file) > 1


def _limit(config: dict) -> None:
    """The resource limits, soft and hard."""
    wanted = {
        "RLIMIT_CORE": 0,
        "RLIMIT_DATA": config["memory"],
        "RLIMIT_FSIZE": config["disk"],
        "RLIMIT_NOFILE": 256,
        "RLIMIT_CPU": config["cpu"],
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, most in wanted.items():
        if hasattr(resource, name):
            kind = getattr(resource, name)
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
    if not {"seccomp", "namespaces"} & set(config["layers"]) and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (3 * config["memory"] + 2**33,) * 2)


def _drop_capabilities() -> None:
    """All of root's powers, for good; a no-op for others."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Data(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

    try:
        kernel.prctl(28, 0b101111)  # PR_SET_SECUREBITS: root is nothing special, locked; capabilities are not kept
        for capability in range(64):
            kernel.prctl(24, capability)  # PR_CAPBSET_DROP
    except OSError:
        pass  # no right to drop what is not there, or the last capability is passed
    nothing = (Data * 2)()
    kernel.call("capset", ctypes.byref(Header(0x20080522, 0)), ctypes.byref(nothing))


def _tell(config: dict, **facts: str) -> int:
    os.write(config["report"], json.dumps(facts).encode() + b"\n")
    return _PROBLEM if facts["ended"] == "setup" else 0


if __name__ == "__main__":
    sys.exit(main())
