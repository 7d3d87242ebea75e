"""How the checks of the assignments tell a student what went wrong: by the name of the mistake, if it is a known one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from advbn_lib.grading.asking import Raised
from advbn_lib.grading.task import Outcome, Trace, Wrong, expect, expect_close, expect_tensor, matches

Mistakes = Mapping[
    str, Tensor | None
]  # what to tell, and the value that this mistake gives (None: it does not apply here)

TRACES = {
    "input": "it changed its input in place: work on new tensors (x + 1, not x += 1)",
    "random": "it drew from torch's global random numbers, so everything drawn later comes out differently",
    "buffer": "running statistics moved: something ran in train mode",
    "parameter": "a weight of the tail changed: only the factors may move",
    "mode": "a module is not in the mode it was in before: put each one back as it was",
    "gradient": "a parameter was left with a gradient: ask torch.autograd.grad for the factors' gradients alone",
    "flag": "requires_grad of a tensor or parameter is not what it was",
    "hook": "a hook was left on a module",
}


def features(
    seed: int, shape: tuple[int, ...] = (3, 4, 5, 6), dtype: torch.dtype = torch.float32, positive: bool = False
) -> Tensor:
    """Random features (N,C,H,W) whose means and spreads differ from image to image and from channel to channel."""
    generator = torch.Generator().manual_seed(seed)
    n, c = shape[:2]
    spread = 0.5 + 2 * torch.rand((n, c, 1, 1), generator=generator, dtype=torch.float64)
    level = 3 * torch.rand((n, c, 1, 1), generator=generator, dtype=torch.float64) - 1
    x = spread * torch.rand(shape, generator=generator, dtype=torch.float64) ** 2 + level
    return (x.clamp_min(0) if positive else x).to(dtype)


def compare(
    got: Any, wanted: Tensor, what: str, mistakes: Mistakes, hint: str = "", rtol: float = 1e-4, atol: float = 1e-5
) -> Tensor:
    """``got``, if it is close to ``wanted``; else Wrong, with the mistake's name if it has the value of a known one.

    If several known mistakes have this value, all of them are named, as possible causes.
    """
    expect_tensor(got, what)
    if matches(got, wanted, rtol, atol):
        return got
    fitting = [
        tells
        for tells, value in mistakes.items()
        # Where a mistake changes nothing, as on a symmetric input, it explains nothing.
        if value is not None and not matches(value, wanted, rtol, atol) and matches(got, value, rtol, atol)
    ]
    if len(fitting) == 1:
        raise Wrong(f"{what}: {fitting[0]}")
    if fitting:
        raise Wrong(f"{what}: this has more than one possible cause: {', or '.join(fitting)}")
    if got.shape != wanted.shape and got.numel() == wanted.numel():
        raise Wrong(
            f"{what} has the shape {tuple(got.shape)}, not {tuple(wanted.shape)}: keep the axes that you reduce over, "
            "with length 1 (keepdim=True)"
        )
    return expect_close(got, wanted, what, hint, rtol, atol)


def compare_pairs(
    got: Tensor, wanted: Tensor, what: str, mistakes: Mistakes, names: tuple[str, str], rtol: float, atol: float
) -> Tensor:
    """:func:`compare` for two quantities, stacked; if one of them is right, only the other one must fit a mistake."""
    expect_tensor(got, what, tuple(wanted.shape))
    right = [matches(one, other, rtol, atol) for one, other in zip(got, wanted)]
    if all(right) or not any(right):
        return compare(got, wanted, what, mistakes, "", rtol, atol)
    wrong = right.index(False)
    halves = {
        tells: value[wrong] for tells, value in mistakes.items() if value is not None and value.shape == wanted.shape
    }
    said = f"{what}: the {names[1 - wrong]} are right, the {names[wrong]} are not"
    return compare(got[wrong], wanted[wrong], said, halves, "", rtol, atol)


def several(got: Any, count: int, what: str, names: str) -> Sequence[Any]:
    """``got``, if it is a tuple or list of ``count``; else Wrong."""
    expect(
        isinstance(got, (tuple, list)) and len(got) == count,
        f"{what} should return {count} values ({names}), but it returned "
        + (f"{len(got)}" if isinstance(got, (tuple, list)) else f"a {type(got).__name__}"),
    )
    return got


def no_trace(traces: tuple[Trace, ...], what: str, allowed: tuple[str, ...] = ()) -> None:
    """Wrong, with what it means, if a call left something behind."""
    for trace in traces:
        if trace.kind not in allowed:
            where = f" ({trace.name})" if trace.name else ""
            raise Wrong(f"{what} leaves a trace{where}: {TRACES.get(trace.kind, trace.kind)}")


def refuses(outcome: Outcome, what: str, why: str, error: str = "ValueError") -> None:
    """Wrong unless the call ended with this error."""
    if outcome.error != error:
        public = f"{what} should raise {error}: {why}"
        raise Raised(public + (f" (it raised {outcome.error})" if outcome.error else ""), public)
