"""Objects that are built on the student's side: networks, objectives, generators (see :class:`~advbn_lib.grading.task.Given`).

A builder is registered under its kind and gets the settings as keyword arguments:

>>> @given("network")
... def network(seed: int, width: int = 4): ...          # doctest: +SKIP
>>> student.call("train", Given("network", seed=3))      # doctest: +SKIP

The assignments' builders are in ``advbn_lib/assignments/given.py``, which is imported when the first Given is built.
Whoever reads the student's disk can read the builders; what must stay unknown travels as :func:`source`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

BUILDERS_OF_ASSIGNMENTS = "advbn_lib.assignments.given"
_builders: dict[str, Callable[..., Any]] = {}


def given(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the builder of ``kind``; ValueError if another one is registered already."""

    def register(builder: Callable[..., Any]) -> Callable[..., Any]:
        known = _builders.get(kind)
        if known is not None and (known.__module__, known.__qualname__) != (builder.__module__, builder.__qualname__):
            raise ValueError(f"two builders for {kind!r}: {known.__module__} and {builder.__module__}")
        _builders[kind] = builder
        return builder

    return register


def builders() -> Mapping[str, Callable[..., Any]]:
    """All builders, those of the assignments too."""
    if importlib.util.find_spec(BUILDERS_OF_ASSIGNMENTS.rpartition(".")[0]) is not None:
        importlib.import_module(BUILDERS_OF_ASSIGNMENTS)
    return MappingProxyType(_builders)


def build(kind: str, settings: Mapping[str, Any]) -> Any:
    """The object; KeyError for an unknown kind."""
    known = builders() if kind not in _builders else _builders
    if kind not in known:
        raise KeyError(f"no builder for {kind!r}; known are {', '.join(sorted(known))}")
    return known[kind](**settings)


@given("generator")
def generator(seed: int, device: str = "cpu") -> torch.Generator:
    """A seeded torch.Generator."""
    return torch.Generator(device).manual_seed(seed)


@given("source")
def source(code: str, name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """What ``code`` (Python source, sent by the check) defines as ``name``; called with ``settings`` unless they are None.

    For objects that the student should not find on the disk: a mutant, a defence. Neutral names in the code give away
    least.
    """
    namespace: dict[str, Any] = {"__name__": "given"}
    exec(compile(code, "<given>", "exec"), namespace)  # the check's own code, never the student's
    del code  # a submission can look at its callers' variables
    return namespace[name] if settings is None else namespace[name](**settings)
