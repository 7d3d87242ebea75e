"""What an assignment is made of: tasks, checks, and the student whom a check questions.

A check never touches the student's objects. It asks a :class:`Student` to call a function by its name and gets the value
back; in the notebook the student is :class:`~advbn_lib.grading.local.LocalStudent`, when grading it is a process of its
own (:class:`~advbn_lib.grading.remote.RemoteStudent`), and the check is the same. So a check holds the reference and the
judgement, and what comes back is None, bool, int, float, str, list, tuple, dict or torch.Tensor, and nothing else.

>>> def no_change_without_a_shift(student):
...     x = torch.randn(2, 3, 4, 4)
...     got = student.call("shift", x, torch.ones(3), torch.ones(3))
...     expect_close(got, x, "shift(x, 1, 1)", "factors of 1 change nothing")
>>> check = Check("no change", "factors of 1 change nothing", no_change_without_a_shift)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor


class Wrong(AssertionError):
    """A wrong answer. The message is for the student and should teach: name the mistake, not only the difference."""


class NotDone(Wrong):
    """The student has not written it yet: the name is missing, or it raises NotImplementedError."""


class Dead(Wrong):
    """The student's process ended, or was ended (time, memory, output), before it answered."""


@dataclass(frozen=True)
class Given:
    """An argument that is built on the student's side, by the builder registered for ``kind`` (see ``given.py``).

    >>> student.call("ascent", Given("network", seed=3), x)     # doctest: +SKIP

    The settings are plain values and tensors, or other ``Given``s.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, kind: str, /, **settings: Any) -> None:
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "settings", MappingProxyType(dict(settings)))


@dataclass(frozen=True)
class Kept:
    """A handle for an object that stays on the student's side; it can be an argument of later calls."""

    number: int


@dataclass(frozen=True)
class Trace:
    """One thing that a call left behind.

    Attributes:
        kind: "input" (a tensor argument was changed in place), "flag" (its requires_grad), "random" (torch's random state),
            or of a Given or Kept argument that is a module: "buffer", "parameter", "mode" (train/eval), "gradient", "flag" (requires_grad),
            "hook".
        argument: which argument: "0", "1", ... or the keyword; "" for the random state.
        name: of the buffer, parameter or module; "" for a tensor argument and the random state.
    """

    kind: str
    argument: str = ""
    name: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a call ended: with a value, or with an error.

    Attributes:
        value: what was returned (None after an error).
        error: name of the exception's class, "" without one.
        message: the exception's message, shortened.
        where: the student's own line, for example ``cell 4, line 7: return x.std()``; "" if unknown.
    """

    value: Any = None
    error: str = ""
    message: str = ""
    where: str = ""


class Student(Protocol):
    """Answers calls. Arguments are plain values, tensors, :class:`Given` or :class:`Kept` (also within lists and dicts).

    Each call starts from the same seed of torch's random numbers, 0 unless :meth:`seed` changed it. What comes back are
    plain values and plain tensors (CPU, no gradient, no subclass).

    All calls raise NotDone if the name is missing or raises NotImplementedError, Wrong after another error or if the
    result is no plain value, Dead if the student's process ended.
    """

    def has(self, name: str) -> bool:
        """Whether the student defined ``name``."""

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The value of ``name(*args, **kwargs)``."""

    def attempt(self, name: str, *args: Any, **kwargs: Any) -> Outcome:
        """As :meth:`call`, but an error that the function raises is an answer too (NotDone and Dead are still raised)."""

    def call_and_look(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Trace, ...]]:
        """The value, and what the call left behind, as the student's side saw it.

        A dishonest student's process could hide traces, though not change values: where it can be done, ask for values.
        """

    def call_with_gradient(
        self, name: str, *args: Any, to: int | str = 0, weights: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The value, a tensor, and the gradient of ``(value * weights).sum()`` in argument ``to``; None: it has none.

        Args:
            to: position or keyword of a floating-point tensor argument.
            weights: broadcastable to the value; ones if None.
        """

    def keep(self, name: str, *args: Any, **kwargs: Any) -> Kept:
        """As :meth:`call`, but the result stays on the student's side."""

    def make(self, given: Given) -> Kept:
        """Build a Given that stays on the student's side, to be used in several calls."""

    def on(self, kept: Kept, method: str, *args: Any, **kwargs: Any) -> Any:
        """The value of ``kept.method(*args, **kwargs)``; ``"__call__"`` calls the object itself."""

    def attempt_on(self, kept: Kept, method: str, *args: Any, **kwargs: Any) -> Outcome:
        """As :meth:`on`, but an error that the method raises is an answer too, as in :meth:`attempt`."""

    def look_at(self, kept: Kept, attribute: str) -> Any:
        """The value of ``kept.attribute``; dots go deeper (``"bn.running_mean"``)."""

    def seed(self, seed: int) -> None:
        """The seed from which later calls of this check start."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Attributes:
        name: short, unique in its task.
        says: what must hold, in a sentence; shown with the result, for a hidden check too.
        run: questions the student; raises Wrong if it does not hold, returns if it does: None, or what there is to say.
        points: what it is worth.
        hidden: used for grading only, never in the student's notebook.
        seconds: the most that the student's answers may take, all together.
        needs: name of an earlier check of the task. In a notebook this one is not tried if that one does not hold.
    """

    name: str
    says: str
    run: Callable[[Student], str | None]
    points: float = 1.0
    hidden: bool = False
    seconds: float = 30.0
    needs: str = ""

    def __post_init__(self) -> None:
        if not self.points >= 0 or not self.seconds > 0:
            raise ValueError(f"check {self.name!r}: points must be at least 0 and seconds more than 0")


@dataclass(frozen=True)
class Task:
    """A part of an assignment; the student runs its public checks with ``check("assignment.task")``."""

    name: str
    title: str
    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        names = [check.name for check in self.checks]
        _unique(names, f"checks of task {self.name!r}")
        for place, check in enumerate(self.checks):
            if check.needs and check.needs not in names[:place]:
                raise ValueError(f"check {check.name!r} needs {check.needs!r}, which is no check before it")


@dataclass(frozen=True)
class Assignment:
    """A graded notebook.

    Attributes:
        number, name, title: 2, "write_advbn", "Write AdvBN". The module of the same name holds it as ``ASSIGNMENT``.
        tasks: with their public checks. The hidden ones are added when grading, see :meth:`with_hidden`.
        withheld: modules of the library that a submission may not import, because they are the solution; they are left
            out of the copy of the library that the graded process sees (``"advbn_lib.statistics"``; a package's name
            withholds all in it). Builders in ``advbn_lib/assignments/given.py`` cannot import them either.
    """

    number: int
    name: str
    title: str
    tasks: tuple[Task, ...]
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _unique([task.name for task in self.tasks], f"tasks of assignment {self.name!r}")

    def task(self, name: str) -> Task:
        """The task of that name; KeyError if there is none."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise KeyError(f"{self.name} has no task {name!r}; it has {', '.join(task.name for task in self.tasks)}")

    def with_hidden(self, hidden: Mapping[str, tuple[Check, ...]]) -> Assignment:
        """The assignment with hidden checks after the public ones of each task.

        Raises:
            KeyError: for a task that does not exist.
            ValueError: if a check is not marked ``hidden``, or has a name that is taken.
        """
        for name, checks in hidden.items():
            self.task(name)
            if open_ones := [check.name for check in checks if not check.hidden]:
                raise ValueError(f"hidden checks must say hidden=True: {', '.join(open_ones)} of {self.name}.{name}")
        tasks = tuple(Task(t.name, t.title, (*t.checks, *hidden.get(t.name, ()))) for t in self.tasks)
        return Assignment(self.number, self.name, self.title, tasks, self.withheld)


def _unique(names: list[str], what: str) -> None:
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{what}: {', '.join(sorted(twice))} stands there twice")


def expect(holds: bool, message: str) -> None:
    """Raise Wrong with the message unless it holds."""
    if not holds:
        raise Wrong(message)


def expect_tensor(
    got: Any, what: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``got``, if it is a tensor of that shape and type with finite values; else Wrong, saying what it is instead."""
    expect(isinstance(got, Tensor), f"{what} should be a tensor, but it is {_described(got)}")
    if shape is not None:
        expect(tuple(got.shape) == tuple(shape), f"{what} should have the shape {tuple(shape)}, not {tuple(got.shape)}")
    if dtype is not None:
        expect(got.dtype == dtype, f"{what} should be {dtype}, not {got.dtype}")
    if got.is_floating_point() and not got.isfinite().all():
        bad = int((~got.isfinite()).sum())
        raise Wrong(f"{what} has {bad} values of {got.numel()} that are infinite or not a number")
    return got


def expect_number(got: Any, what: str) -> float:
    """``got`` as a finite float, if it is a number or a tensor with one element; else Wrong."""
    if isinstance(got, Tensor) and got.numel() == 1 and not got.is_complex():
        got = got.item()
    expect(
        isinstance(got, (int, float)) and not isinstance(got, bool),
        f"{what} should be a number, but it is {_described(got)}",
    )
    try:
        number = float(got)
    except OverflowError:
        raise Wrong(f"{what} is too large") from None
    expect(abs(number) < float("inf"), f"{what} is {number}: infinite or not a number")
    return number


def expect_close(got: Any, wanted: Tensor, what: str, hint: str = "", rtol: float = 1e-4, atol: float = 1e-5) -> Tensor:
    """``got``, if it is a finite tensor of ``wanted``'s shape and close to it; else Wrong with the hint.

    Compares in float64; the type is not compared (see :func:`expect_tensor`).
    """
    expect_tensor(got, what, tuple(wanted.shape))
    difference = (got.double() - wanted.double()).abs()
    if (difference > atol + rtol * wanted.double().abs()).any():
        hint = f" ({hint})" if hint else ""
        raise Wrong(f"{what} is off by up to {difference.max().item():.3g}{hint}")
    return got


def matches(got: Any, wanted: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Whether ``got`` is what :func:`expect_close` accepts: to recognise a known mistake and name it."""
    try:
        expect_close(got, wanted, "", rtol=rtol, atol=atol)
    except Wrong:
        return False
    return True


def _described(value: Any) -> str:
    if value is None:
        return "None (is a return missing?)"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
