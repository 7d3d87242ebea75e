"""Files that are whole or not there: checksums and atomic writes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that replaces ``path`` when the block ends well.

    After an error (a full disk, an interrupt) the old file is as it was, and nothing is left behind. Folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not named after the file: its name may be as long as a name can be.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".unfinished-", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
