"""Assignments that grade themselves: checks in the notebook, and a grader that trusts a submission with nothing."""

from advbn_lib.grading.given import given
from advbn_lib.grading.local import LocalStudent, check
from advbn_lib.grading.task import (
    Assignment,
    Check,
    Dead,
    Given,
    Kept,
    NotDone,
    Outcome,
    Student,
    Task,
    Trace,
    Wrong,
    expect,
    expect_close,
    expect_number,
    expect_tensor,
    matches,
)

__all__ = [
    "Assignment", "Check", "Dead", "Given", "Kept", "LocalStudent", "NotDone", "Outcome", "Student", "Task", "Trace", "Wrong",
    "check", "expect", "expect_close", "expect_number", "expect_tensor", "given", "matches",
]  # fmt: skip
