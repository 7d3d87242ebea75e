"""Running one check on a student, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advbn_lib.grading.asking import Asking, Raised
from advbn_lib.grading.task import Check, Dead, NotDone, Wrong


@dataclass(frozen=True)
class Verdict:
    """The result of a check.

    Attributes:
        state: "passed", "wrong", "not done" (missing or NotImplementedError), or "ended" (the student's process was
            ended by itself or by a limit, or its answer could not be read), in a notebook also "not tried" (a check that it
            needs does not hold).
        message: what the student is told; of a check that passed, what it has to say, or "".
    """

    name: str
    says: str
    hidden: bool
    points: float
    of: float
    state: str
    message: str = ""


def judge(check: Check, student: Asking) -> Verdict:
    """Run the check. Whatever the answers make it raise is a verdict; only an interrupt comes through."""
    state, message = "passed", ""
    try:
        with torch.random.fork_rng(devices=[]):  # the same random numbers in whatever order, and none of the notebook's
            torch.manual_seed(0)
            student.begin()
            note = check.run(student)
            message = note if isinstance(note, str) else ""
    except NotDone as error:
        state, message = "not done", str(error)
    except Dead as error:
        state, message = "ended", str(error)
    except Raised as error:
        state, message = "wrong", error.public if check.hidden else str(error)
    except Wrong as error:
        state, message = "wrong", str(error)
    except Exception as error:  # an answer of a kind that the check did not think of
        kind = type(error).__name__
        state, message = "wrong", f"the check could not use your answer ({kind}): is it of the right kind?"
    points = check.points if state == "passed" else 0.0
    return Verdict(check.name, check.says, check.hidden, points, check.points, state, message)
