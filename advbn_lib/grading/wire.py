"""How questions and answers travel: plain values as JSON, followed by the tensors' bytes. Never a pickle.

:func:`unpack` reads what a hostile process sent. It builds only None, bool, int, float, str, list, tuple, dict, plain CPU
tensors, Given and Kept; sizes are checked before memory is taken, and everything else is :class:`BadMessage`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advbn_lib.grading.task import Given, Kept

MAX_JSON = 4 * 2**20
MAX_DEPTH = 40
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
        torch.float64, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_HEAD = 8  # bytes of the JSON's length


class BadMessage(ValueError):
    """What was to be sent, or was received, is no message of plain values."""


@dataclass
class _Parcel:
    blobs: list[bytes] = field(default_factory=list)


def pack(value: Any) -> bytes:
    """``value`` as bytes; BadMessage if there is something in it that is no plain value."""
    parcel = _Parcel()
    head = json.dumps(_wrapped(value, parcel, 0), separators=(",", ":")).encode()
    if len(head) > MAX_JSON:
        raise BadMessage(f"too much to send besides tensors: {len(head)} bytes; the most is {MAX_JSON}")
    return b"".join([len(head).to_bytes(_HEAD, "big"), head, *parcel.blobs])


def unpack(message: bytes) -> Any:
    """The value that :func:`pack` packed; BadMessage for anything else."""
    length = int.from_bytes(message[:_HEAD], "big")
    if length > min(MAX_JSON, len(message) - _HEAD):
        raise BadMessage("the message is cut short or its head is too long")
    try:
        tree = json.loads(message[_HEAD : _HEAD + length])
        reader = _Reader(message, _HEAD + length)
        value = reader.value(tree, 0)
    except BadMessage:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        RuntimeError,
    ) as error:  # RecursionError is a RuntimeError
        raise BadMessage(f"not a message: {type(error).__name__}") from None
    if reader.position != len(message):
        raise BadMessage("the message has bytes left over")
    return value


def _wrapped(value: Any, parcel: _Parcel, depth: int) -> Any:
    """The JSON tree of a value: scalars stand for themselves, the rest are lists that begin with a letter."""
    if depth > MAX_DEPTH:
        raise BadMessage(f"nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, int):
        return _small(int.__index__(value))
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Tensor):
        return _tensor(value, parcel)
    if isinstance(value, (list, tuple)):  # torch.Size is a tuple too
        return ["l" if isinstance(value, list) else "t", *(_wrapped(part, parcel, depth + 1) for part in value)]
    if isinstance(value, dict):
        pairs = [[_wrapped(key, parcel, depth + 1), _wrapped(part, parcel, depth + 1)] for key, part in value.items()]
        return ["d", *pairs]
    if isinstance(value, Given):
        return ["g", value.kind, _wrapped(dict(value.settings), parcel, depth + 1)]
    if isinstance(value, Kept):
        return ["k", value.number]
    raise BadMessage(f"a {type(value).__name__} is no plain value")


def _small(number: int) -> int:
    if number.bit_length() > 2048:
        raise BadMessage("an integer of more than 2048 bits")
    return number


def _tensor(value: Tensor, parcel: _Parcel) -> list:
    try:
        plain = value.detach()
        if plain.layout != torch.strided:
            plain = plain.to_dense()
        plain = plain.dequantize() if plain.is_quantized else plain
        plain = plain.as_subclass(Tensor).cpu().resolve_conj().resolve_neg().contiguous()
    except (RuntimeError, TypeError) as error:  # NotImplementedError, of a tensor without data, is a RuntimeError
        raise BadMessage(f"a tensor that cannot be read: {error}") from None
    name = str(plain.dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise BadMessage(f"a tensor of {plain.dtype} is not sent")
    parcel.blobs.append(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return ["x", name, list(plain.shape)]


class _Reader:
    """Walks the tree of a message, taking the tensors' bytes in turn."""

    def __init__(self, message: bytes, position: int) -> None:
        self.message, self.position = message, position

    def value(self, tree: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise BadMessage(f"nested more than {MAX_DEPTH} deep")
        if isinstance(tree, str):
            return tree.encode("utf-8", "replace").decode()  # half a surrogate pair could not be printed later
        if isinstance(tree, int):
            return tree if isinstance(tree, bool) else _small(tree)
        if not isinstance(tree, list):
            if isinstance(tree, dict):
                raise BadMessage("not a message: a JSON object")
            return tree
        kind, *parts = tree
        if kind == "l":
            return [self.value(part, depth + 1) for part in parts]
        if kind == "t":
            return tuple(self.value(part, depth + 1) for part in parts)
        if kind == "d":
            return {self.value(key, depth + 1): self.value(part, depth + 1) for key, part in parts}
        if kind == "x":
            return self.tensor(*parts)
        if kind == "k":
            return Kept(int(parts[0]))
        if kind == "g":
            settings = self.value(parts[1], depth + 1)
            return Given(str(parts[0]), **settings)
        raise BadMessage("not a message: an unknown mark")

    def tensor(self, name: str, shape: list) -> Tensor:
        dtype = _DTYPES[name]
        if len(shape) > 12 or not all(type(length) is int and 0 <= length < 2**31 for length in shape):
            raise BadMessage("a tensor of an impossible shape")
        size = math.prod(shape) * dtype.itemsize
        if size > len(self.message) - self.position:
            raise BadMessage("a tensor with fewer bytes than its shape needs")
        data = bytearray(self.message[self.position : self.position + size])
        self.position += size
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        if dtype == torch.bool:  # any byte but 0 and 1 would be an undefined bool
            return torch.frombuffer(data, dtype=torch.uint8).ne(0).reshape(shape)
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
