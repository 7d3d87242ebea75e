"""Running all tests of a suite, also after one has failed, and telling all that failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable


def run_all(subject: object, *tests: Callable[[object], None]) -> None:
    """Call each test with ``subject``.

    Raises:
        NotImplementedError: if a test did.
        AssertionError: if some tests raised an error; the message names them, with their lines and errors.
    """
    failed = [found for test in tests if (found := _failure(test, subject))]
    if failed:
        raise AssertionError(f"{len(failed)} of {len(tests)} tests fail: " + "; ".join(failed))


def _failure(test: Callable[[object], None], subject: object) -> str:
    """What went wrong in the test, with the line of the test itself; "" if nothing did."""
    try:
        test(subject)
    except NotImplementedError:  # something is not written yet: no test can say anything
        raise
    except Exception as error:  # whatever a test raises says that it failed
        name, code = getattr(test, "__name__", "a test"), getattr(test, "__code__", None)
        own = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code is code]
        where = f" (line {own[0]} of its cell)" if own else ""
        return f"{name}{where}: {type(error).__name__} {str(error)[:100]}".rstrip()
    return ""
