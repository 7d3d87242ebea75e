"""What a record says about where its numbers come from: code, machine, software."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import platform
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
WITHOUT_INFLUENCE = tuple(f"advbn_lib.{name}" for name in ("checkpoints", "files", "progress", "provenance"))  # on the numbers


def code_hash(modules: Iterable[str]) -> str:
    """Hash of these modules of the library (``"advbn_lib.training"``) and of all that they import from it.

    Comments, docstrings and blank lines do not count: explaining the code better does not make a run old. Nor do modules that
    only write files, draw bars or say where numbers come from.
    """
    seen: dict[str, str] = {}
    to_visit = list(modules)
    while to_visit:
        name = to_visit.pop()
        if name not in seen and name not in WITHOUT_INFLUENCE:
            source = _file_of(name).read_text(encoding="utf-8")
            seen[name] = _bare(source)
            to_visit += _imports(source)
    digest = hashlib.sha256()
    for name in sorted(seen):
        digest.update(f"{name}\n{seen[name]}\n".encode())
    return digest.hexdigest()


def git_state() -> dict[str, Any]:
    """``commit``, and whether the library's sources differ from it (``dirty``); both None outside a git checkout."""
    try:
        _git("ls-files", "--error-unmatch", "advbn_lib/__init__.py")  # else it is the checkout of another project
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "advbn_lib")
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(changed)}


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, as far as it matters for time and rounding."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "gpu": gpu,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "machine": platform.machine(),
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that compute."""
    packages = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **packages}


def peak_memory_mib(device: torch.device) -> float | None:
    """Most memory used so far: of the GPU, or of this process on a CPU (None where the system does not tell)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if sys.platform not in ("linux", "darwin"):
        return None
    import resource

    unit = 2**10 if sys.platform == "linux" else 2**20  # Linux counts in KiB, macOS in bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def state_checksum(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors of a ``state_dict``, names included."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _file_of(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache  # by the text, not the file: what an editor changes is read anew
def _imports(source: str) -> tuple[str, ...]:
    froms = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    return tuple(module for module in froms if module.startswith("advbn_lib."))


@cache
def _bare(source: str) -> str:
    """The source without comments, docstrings and blank lines; the same on every Python version."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node, clean=False) is not None
        ):
            docstring = node.body[0]
            for row in range(docstring.lineno, docstring.end_lineno + 1):
                lines[row - 1] = ""
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=PACKAGE.parent, check=True, capture_output=True, text=True
    ).stdout.strip()


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in listing.read_text().splitlines() if line.startswith("model name")]
        if listing.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
