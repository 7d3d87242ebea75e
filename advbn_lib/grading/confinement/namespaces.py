"""A view of the machine of its own: the files that are needed, read-only; no network; no other process."""

from __future__ import annotations

import ctypes
import os

from kernel import _libc, call

NEW_USER, NEW_PID, NEW_NET, NEW_MOUNT, NEW_IPC, NEW_UTS = (
    0x10000000,
    0x20000000,
    0x40000000,
    0x00020000,
    0x08000000,
    0x04000000,
)
_NOSUID, _NODEV, _NOEXEC, _RDONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 2, 4, 8, 1, 32, 4096, 16384, 1 << 18
_DETACH = 2
_ATTRIBUTES = 1 | 2 | 4  # read-only, nosuid, nodev
_DEVICES = ("null", "zero", "full", "random", "urandom")


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def unshare_processes() -> None:
    """The next child process, and its descendants, see and signal each other only. Makes a user namespace if need be."""
    if os.geteuid() == 0:
        try:
            call("unshare", NEW_PID)
            return
        except PermissionError:
            pass  # root without the capability, as in many containers
    user, group = os.geteuid(), os.getegid()
    call("unshare", NEW_USER | NEW_PID)
    for file, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)


def enter_view(root: str, readable: list[str], hidden: list[str], work: str, disk: int, owner: int) -> None:
    """Make a new file tree on the empty folder ``root`` and make it this process's own.

    Args:
        readable: files and folders that are there, at the same places, read-only.
        hidden: files and folders within those that are empty instead.
        work: a fresh folder there, in memory, the only one that can be written to.
        disk: bytes that fit into it.
        owner: user id of the folder.
    """
    call("unshare", NEW_MOUNT | NEW_NET | NEW_IPC | NEW_UTS)
    _mount("none", "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=4m,nr_inodes=4096,mode=755")
    for path in sorted(set(readable), key=lambda path: (path.count("/"), path)):
        _show(root, path)
    for path in hidden:
        _hide(root, path)
    os.makedirs(f"{root}/dev", exist_ok=True)
    for name in _DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}")
    os.makedirs(root + work, exist_ok=True)
    _mount("tmpfs", root + work, "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes=20000,mode=700,uid={owner}")
    if not os.path.lexists(f"{root}/dev/shm"):
        os.symlink(work, f"{root}/dev/shm")
    os.makedirs(f"{root}/proc", exist_ok=True)
    try:
        _mount("proc", f"{root}/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    except OSError:
        pass  # some containers forbid it; then there is no /proc, which is safe
    os.makedirs(f"{root}/etc", exist_ok=True)
    with open(f"{root}/etc/passwd", "w") as file:
        file.write(f"student:x:{owner}:{owner}::{work}:/bin/false\n")
    os.chdir(root)
    call("pivot_root", ".", ".")
    call("umount2", ".", _DETACH)
    os.chdir("/")
    _mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _show(root: str, path: str) -> None:
    real = os.path.realpath(path)
    if not os.path.exists(real):
        return
    for place in {real, path}:
        target = root + place
        if os.path.lexists(target):
            continue  # within a folder that is shown already
        _bind(real, target)
        attributes = _MountAttributes(_ATTRIBUTES, 0, 0, 0)
        call("mount_setattr", -100, target, 0x8000, ctypes.byref(attributes), ctypes.sizeof(attributes))


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    _mount(source, target, None, _BIND | _REC)


def _hide(root: str, path: str) -> None:
    target = root + path
    if os.path.isdir(target):
        _mount("tmpfs", target, "tmpfs", _NOSUID | _NODEV | _RDONLY, "size=4k,mode=755")
    elif os.path.exists(target):
        _mount("/dev/null", target, None, _BIND)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else ctypes.c_char_p(os.fsencode(word)) for word in (source, target, kind)]
    end = None if data is None else ctypes.c_char_p(os.fsencode(data))
    if _libc.mount(*words, ctypes.c_ulong(flags), end) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mount {target}: {os.strerror(error)}")
