"""The four assignments: their tasks with the public checks. The hidden checks lie in ``assignments/hidden``."""

from __future__ import annotations

import os


def looking() -> bool:
    """Whether a person runs the notebook. The grader runs it too, and skips pictures and long experiments."""
    return not os.environ.get("ADVBN_BEING_GRADED")
