"""Checkpoints that are whole or not there, and that hold tensors and numbers only.

A file is the SHA-256 of what follows it, then what ``torch.save`` writes; ``weights_only=True`` reads it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any, Protocol

import torch

from advbn_lib.files import atomic_write

DIGEST = hashlib.sha256().digest_size


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run; the message says how to mend it."""


class Stateful(Protocol):
    """A module, an optimiser, a gradient scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def save_checkpoint(path: Path, parts: dict[str, Stateful], progress: dict[str, Any], key: str) -> None:
    """Write ``parts``, ``progress`` (numbers and lists) and the state of torch's random generators.

    The old checkpoint stays until the new one is complete. ``key`` names the run that it belongs to.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = {name: part.state_dict() for name, part in parts.items()}
    state = {"key": key, "progress": progress, "parts": states, "cpu_rng": torch.get_rng_state(), "cuda_rng": cuda}
    buffer = io.BytesIO()  # torch.save would report a full disk as an internal error
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.write(buffer.getbuffer())


def load_checkpoint(path: Path, parts: dict[str, Stateful], key: str) -> dict[str, Any]:
    """Restore ``parts`` and the random generators in place, and return the progress.

    Raises:
        CheckpointError: the file is damaged, or its key is another.
    """
    state = read_checkpoint(path)
    if state.get("key") != key:
        raise CheckpointError(
            f"{path} belongs to another run (another configuration, code or data): move it away to start anew"
        )
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    torch.set_rng_state(state["cpu_rng"])
    if state["cuda_rng"] and torch.cuda.device_count() == len(state["cuda_rng"]):
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["progress"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The raw contents, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    content = path.read_bytes()
    if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
        raise CheckpointError(f"{path} is damaged or no checkpoint of this library: remove it to start anew")
    try:
        state = torch.load(io.BytesIO(content[DIGEST:]), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no checkpoint ({error}): remove it to start anew") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint: remove it to start anew")
    return state
