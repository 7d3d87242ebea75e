"""The checks' side: a :class:`~advbn_lib.grading.task.Student` that sends each call as a message and reads the reply."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from advbn_lib.grading.lookalikes import lookalikes
from advbn_lib.grading.task import Dead, Given, Kept, NotDone, Outcome, Trace, Wrong
from advbn_lib.grading.wire import BadMessage, pack, unpack

_LONGEST = 600


class Raised(Wrong):
    """The student's code raised an error or returned no plain value.

    ``public`` is the part of the message that the student's code has not written itself: all that may be shown for a
    hidden check, or a submission could print the hidden inputs there.
    """

    def __init__(self, message: str, public: str) -> None:
        super().__init__(message)
        self.public = public


class Asking:
    """Implements Student on top of :meth:`exchange`, which a subclass has."""

    _seed = 0

    def exchange(self, message: bytes) -> bytes:
        """Send a message to the student's side, return the reply; Dead if none comes."""
        raise NotImplementedError

    def give_up(self) -> None:
        """What came was no answer: whatever comes next cannot be believed to be one."""

    def begin(self) -> None:
        """Start a check: nothing is kept from the one before, and the seed is 0."""
        self._seed = 0
        self._ask(do="begin")

    def has(self, name: str) -> bool:
        return self._ask(do="has", name=name).get("value") is True

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._value(self._call(name, args, kwargs), name)

    def attempt(self, name: str, *args: Any, **kwargs: Any) -> Outcome:
        return self._outcome(self._call(name, args, kwargs), name)

    def call_and_look(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Trace, ...]]:
        reply = self._call(name, args, kwargs, watch=True)
        value = self._value(reply, name)
        return value, _traces(reply.get("traces"))

    def call_with_gradient(
        self, name: str, *args: Any, to: int | str = 0, weights: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        reply = self._call(name, args, kwargs, to=to, weights=weights)
        value, gradient = self._value(reply, name), reply.get("gradient")
        if not isinstance(value, Tensor) or not (gradient is None or isinstance(gradient, Tensor)):
            raise Wrong(f"`{name}` should return a tensor, but it returned a {type(value).__name__}")
        return value, gradient

    def keep(self, name: str, *args: Any, **kwargs: Any) -> Kept:
        return _handle(self._value(self._call(name, args, kwargs, keep=True), name))

    def make(self, given: Given) -> Kept:
        return _handle(self._value(self._ask(do="make", given=given), given.kind))

    def on(self, kept: Kept, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._value(self._on(kept, method, args, kwargs), method)

    def attempt_on(self, kept: Kept, method: str, *args: Any, **kwargs: Any) -> Outcome:
        return self._outcome(self._on(kept, method, args, kwargs), method)

    def look_at(self, kept: Kept, attribute: str) -> Any:
        return self._value(self._ask(do="look", kept=kept, name=attribute), attribute)

    def seed(self, seed: int) -> None:
        self._seed = seed

    def _call(self, name: str, args: tuple, kwargs: dict, **options: Any) -> dict[str, Any]:
        settings = {"keep": False, "watch": False, "to": None, "weights": None, **options}
        return self._ask(do="call", name=name, args=list(args), kwargs=kwargs, **settings)

    def _on(self, kept: Kept, method: str, args: tuple, kwargs: dict) -> dict[str, Any]:
        settings = {"keep": False, "watch": False, "to": None, "weights": None}
        return self._ask(do="on", kept=kept, name=method, args=list(args), kwargs=kwargs, **settings)

    def _outcome(self, reply: dict[str, Any], name: str) -> Outcome:
        """The reply's value, or its error as a value."""
        if "error" in reply and reply.get("not_done") is not True:
            return Outcome(None, *(_text(reply.get(part)) for part in ("error", "message", "where")))
        return Outcome(self._value(reply, name))

    def _ask(self, **request: Any) -> dict[str, Any]:
        message = pack({**request, "seed": self._seed})
        try:
            reply = unpack(self.exchange(message))
            if not isinstance(reply, dict):
                raise BadMessage("it is no reply")
        except BadMessage as error:
            self.give_up()
            raise Dead(f"your code's answer could not be read: {error}") from None
        return reply

    def _value(self, reply: dict[str, Any], name: str) -> Any:
        """The reply's value, or the error it tells of."""
        if "missing" in reply:
            raise NotDone(f"`{name}` is not there: define it under this very name{self._hint(name)}")
        if reply.get("not_done") is True:
            raise NotDone(f"`{name}` is not written yet{self._hint(name)}")
        if "unsendable" in reply:
            public = f"`{name}` returned what no check can read"
            raise Raised(f"{public}, a {_text(reply.get('type'))}: {_text(reply['unsendable'])}", public)
        if "error" in reply:
            error, message, where = (_text(reply.get(part)) for part in ("error", "message", "where"))
            raise Raised(
                f"`{name}` raised {error}: {message}" + (f" ({where})" if where else ""), f"`{name}` raised an error"
            )
        return reply.get("value")

    def _hint(self, name: str) -> str:
        """A remark on a name that is there and looks like this one, which may be why this one is not."""
        for other, difference in lookalikes(name):
            if self.has(other):
                return f". A name that looks alike is there, with {difference}: type the name anew"
        return ""


def _text(value: Any) -> str:
    """A string of the student's, safe to print: one line, no control characters."""
    text = value if isinstance(value, str) else ""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST]).strip()


def _traces(value: Any) -> tuple[Trace, ...]:
    if not isinstance(value, list) or not all(
        isinstance(trace, tuple) and len(trace) == 3 and all(isinstance(part, str) for part in trace) for trace in value
    ):
        raise Dead("your code's answer could not be read: its traces are damaged")
    return tuple(Trace(*trace) for trace in value)


def _handle(value: Any) -> Kept:
    if not isinstance(value, Kept):
        raise Dead("your code's answer could not be read: no handle")
    return value
