"""The student's side of a check: finds the function, builds the arguments, calls, and packs the answer.

When grading, this runs in the student's process, where a hostile submission may have changed any of it. So nothing here
protects the grade: the grader believes no more than that the values came from that process.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from advbn_lib.grading.given import build
from advbn_lib.grading.task import Given, Kept, Trace
from advbn_lib.grading.wire import BadMessage, pack, unpack

_LONGEST = 600
_LONGEST_LINE, _MOST_LINES = 140, 4


class Desk:
    """Answers one message after another on a namespace (a notebook's variables)."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._kept: list[Any] = []

    def answer(self, message: bytes) -> bytes:
        """The reply: ``value`` (and ``traces``, ``gradient``), or ``error``, ``message``, ``where``, or ``missing``."""
        request = unpack(message)
        del (
            message
        )  # a submission can look at its callers' variables, and a message may hold what it is to judge unseen
        if request["do"] == "begin":
            self._kept.clear()
            return pack({"value": None})
        if request["do"] == "has":
            return pack({"value": request["name"] in self._namespace})
        if request["do"] == "call" and request["name"] not in self._namespace:
            return pack({"missing": request["name"]})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.pop("seed"))
            try:
                return self._packed(self._do(request))
            except (Exception, SystemExit) as error:  # whatever the student's code raises is an answer
                return pack(self._failure(error))

    def _packed(self, reply: dict[str, Any]) -> bytes:
        try:
            return pack(reply)
        except BadMessage as error:
            return pack({"unsendable": str(error), "type": type(reply["value"]).__name__})

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "make":
            return {"value": self._keep(self._built(request["given"]))}
        target = self._target(request)
        if request["do"] == "look":
            for part in request["name"].split("."):
                target = getattr(target, part)
            return {"value": target}
        args = [self._built(part) for part in request.pop("args")]
        kwargs = {name: self._built(part) for name, part in request.pop("kwargs").items()}
        to, weights, keep, watched = (request[name] for name in ("to", "weights", "keep", "watch"))
        request.clear()  # from here on the student's code runs
        if to is not None:
            return _with_gradient(target, args, kwargs, to, weights)
        watch = _Watch({**{str(i): part for i, part in enumerate(args)}, **kwargs}) if watched else None
        value = target(*args, **kwargs)
        traces = [(t.kind, t.argument, t.name) for t in watch.changes()] if watch else []
        return {"value": self._keep(value) if keep else value, "traces": traces}

    def _target(self, request: dict[str, Any]) -> Any:
        if request["do"] == "call":
            return self._namespace[request["name"]]
        held = self._kept[request["kept"].number]
        if request["do"] == "look" or request["name"] == "__call__":
            return held
        return getattr(held, request["name"])

    def _keep(self, value: Any) -> Kept:
        self._kept.append(value)
        return Kept(len(self._kept) - 1)

    def _built(self, part: Any) -> Any:
        if isinstance(part, Given):
            return build(part.kind, {name: self._built(value) for name, value in part.settings.items()})
        if isinstance(part, Kept):
            return self._kept[part.number]
        if isinstance(part, (list, tuple)):
            return type(part)(self._built(value) for value in part)
        if isinstance(part, dict):
            return {key: self._built(value) for key, value in part.items()}
        return part

    def _failure(self, error: BaseException) -> dict[str, Any]:
        return {
            "error": type(error).__name__,
            "message": str(error)[:_LONGEST],
            "where": students_line(error, self._namespace),
            "not_done": isinstance(error, NotImplementedError),
        }


def students_line(error: BaseException, namespace: Mapping[str, Any]) -> str:
    """The student's own lines on the way to the error, the last one first.

    ``cell 4, line 7: return x.std(), called at line 12: mean, std = both(x)``
    """
    lines = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals is namespace:
            file = frame.f_code.co_filename
            cell = f"{file}, " if file.startswith("cell ") else ""
            text = linecache.getline(file, line, frame.f_globals).strip()
            lines.append(f"{cell}line {line}" + (f": {text}" if text else ""))
    return ", called at ".join(line[:_LONGEST_LINE] for line in lines[: -_MOST_LINES - 1 : -1])[:_LONGEST]


def _with_gradient(target: Any, args: list, kwargs: dict, to: int | str, weights: Tensor | None) -> dict[str, Any]:
    holder = args if isinstance(to, int) else kwargs
    leaf = holder[to] = holder[to].detach().clone().requires_grad_()
    with torch.enable_grad():
        value = target(*args, **kwargs)
        if not isinstance(value, Tensor) or not value.requires_grad:
            return {"value": value, "gradient": None}
        total = (value if weights is None else value * weights).sum()
        (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return {"value": value, "gradient": gradient}


class _Watch:
    """What the arguments of a call looked like before it."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._before = self._snapshot()

    def _snapshot(self) -> dict[Trace, Any]:
        seen: dict[Trace, Any] = {Trace("random"): torch.get_rng_state()}
        for label, value in self._arguments.items():
            if isinstance(value, Tensor):
                seen[Trace("input", label)] = value.detach().clone()
                seen[Trace("flag", label)] = value.requires_grad
            elif isinstance(value, nn.Module):
                seen.update(_of_module(value, label))
        return seen

    def changes(self) -> list[Trace]:
        """The traces, in a fixed order."""
        after = self._snapshot()
        changed = [
            trace
            for trace in self._before.keys() | after.keys()
            if not _same(self._before.get(trace), after.get(trace))
        ]
        return sorted(changed, key=lambda trace: (trace.kind, trace.argument, trace.name))


def _of_module(module: nn.Module, label: str) -> dict[Trace, Any]:
    seen: dict[Trace, Any] = {}
    for name, buffer in module.named_buffers():
        seen[Trace("buffer", label, name)] = buffer.detach().clone()
    for name, parameter in module.named_parameters():
        seen[Trace("parameter", label, name)] = parameter.detach().clone()
        seen[Trace("gradient", label, name)] = None if parameter.grad is None else parameter.grad.clone()
        seen[Trace("flag", label, name)] = parameter.requires_grad
    for name, part in module.named_modules():
        seen[Trace("mode", label, name)] = part.training
        seen[Trace("hook", label, name)] = len(part._forward_hooks) + len(part._forward_pre_hooks)
    return seen


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return False
        return (
            torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))
            if first.is_floating_point()
            else torch.equal(first, second)
        )
    return type(first) is type(second) and first == second
