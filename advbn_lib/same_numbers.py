"""Changes of the code that left all numbers as they were: a record from before such a change is as good as one from after it.

A record holds a hash of the code behind its numbers (:func:`advbn_lib.provenance.code_hash`), and code that has changed makes it old.
``same_numbers.json`` lists the exceptions: what was changed, how it was shown that no number of the book moves, and the hashes
before and after.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path


def today(code_hash: str) -> str:
    """The hash that this one has become by changes that left the numbers as they were; itself, if there was none."""
    later, seen = _later(), {code_hash}
    while code_hash in later:
        code_hash = later[code_hash]
        if code_hash in seen:
            raise ValueError(f"same_numbers.json goes in a circle at {code_hash}")
        seen.add(code_hash)
    return code_hash


@cache
def _later() -> dict[str, str]:
    changes = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    pairs = [pair for change in changes for pair in change["before_and_after"]]
    return dict(pairs)
