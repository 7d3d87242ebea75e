"""Landlock (Linux 5.13 and later): a process gives up all files but those that it lists. Needs no privilege."""

from __future__ import annotations

import ctypes
import os

from kernel import call

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _IOCTL = (1 << bit for bit in (0, 1, 2, 3, 14, 15))
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def version() -> int:
    """The kernel's version of Landlock; OSError without it."""
    return call("landlock_create_ruleset", None, 0, 1)


def restrict(readable: list[str], writable: list[str]) -> None:
    """Leave this process, and all that it becomes, these files and folders only. Needs "no new privileges"."""
    known = version()
    bits = 13 + (known >= 2) + (known >= 3) + (known >= 5)
    everything = (1 << bits) - 1
    rules = _Ruleset(everything, 0b11 if known >= 4 else 0, 0b11 if known >= 6 else 0)
    size = 8 if known < 4 else 16 if known < 6 else 24
    ruleset = call("landlock_create_ruleset", ctypes.byref(rules), size, 0)
    for paths, rights in ((readable, _EXECUTE | _READ_FILE | _READ_DIR), (writable, everything)):
        for path in paths:
            _allow(ruleset, path, rights & everything)
    call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no permission
    try:
        rule = _Beneath(rights if os.path.isdir(path) else rights & _FILE_RIGHTS, place)
        call("landlock_add_rule", ruleset, 1, ctypes.byref(rule), 0)
    finally:
        os.close(place)
