"""A filter of system calls that cannot be taken off again: what a submission has no use for is refused.

Refused calls fail with "operation not permitted", which Python shows as PermissionError. No new process, no network, no
signal to another process, no look into another process, no file modes and times, no memory outside the limits.
"""

from __future__ import annotations

import ctypes
import errno
import os

from kernel import MACHINE, number, prctl

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE_THREAD = 0x10000
_SET_OWNER = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: they make the kernel send a signal to any process
_OWN_ONLY = ("kill", "tgkill")  # with the process's own id only
_SELF_ONLY = ("prlimit64", "sched_setaffinity")  # with 0, which is the process itself
_REFUSED = (
    "fork", "vfork", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo",
    "pidfd_open", "pidfd_getfd", "pidfd_send_signal", "process_madvise", "process_mrelease", "setpriority", "sched_setparam",
    "sched_setscheduler", "sched_setattr", "ioprio_set", "migrate_pages", "move_pages", "socket", "memfd_create", "memfd_secret",
    "shmget", "shmat", "msgget", "semget", "mq_open", "mount", "umount2", "pivot_root", "chroot", "unshare", "setns",
    "mount_setattr", "open_tree", "move_mount", "fsopen", "fsconfig", "fsmount", "fspick", "bpf", "perf_event_open",
    "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register", "keyctl", "add_key", "request_key",
    "open_by_handle_at", "name_to_handle_at", "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat",
    "truncate", "utime", "utimes", "futimesat", "utimensat", "setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr",
    "fremovexattr",
)  # fmt: skip


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("true", ctypes.c_uint8),
        ("false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction))]


def restrict() -> None:
    """Put the filter on this process and all that it becomes. Needs "no new privileges"."""
    lines = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_EQUAL, 1, 0, _MACHINES[MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    refuse = (_RETURN, 0, 0, _ERROR | errno.EPERM)
    if MACHINE == "x86_64":
        lines += [(_AT_LEAST, 0, 1, 0x40000000), refuse]  # the x32 table: the same calls under other numbers
    for name in _REFUSED:
        lines += _when(name, [refuse])
    lines += _when(
        "clone3", [(_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    )  # its flags are out of reach: libc then uses clone
    lines += _when("clone", [_argument(0), (_ANY_BIT, 1, 0, _CLONE_THREAD), refuse, (_RETURN, 0, 0, _ALLOW)])
    for name in _OWN_ONLY:
        lines += _when(name, [_argument(0), (_EQUAL, 1, 0, os.getpid()), refuse, (_RETURN, 0, 0, _ALLOW)])
    for name in _SELF_ONLY:
        lines += _when(name, [_argument(0), (_EQUAL, 1, 0, 0), refuse, (_RETURN, 0, 0, _ALLOW)])
    owner = [part for command in _SET_OWNER for part in ((_EQUAL, 0, 1, command), refuse)]
    lines += _when("fcntl", [_argument(1), *owner, (_RETURN, 0, 0, _ALLOW)])
    lines.append((_RETURN, 0, 0, _ALLOW))
    code = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    program = _Program(len(lines), code)
    prctl(22, 2, ctypes.byref(program))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _argument(index: int) -> tuple[int, int, int, int]:
    return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * index)  # the low half, on a little-endian machine


def _when(name: str, lines: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """The lines, behind a test that jumps over them for any other call."""
    return [] if number(name) < 0 else [(_EQUAL, 0, len(lines), number(name)), *lines]
