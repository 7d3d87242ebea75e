"""A progress bar where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], label: str, show: bool = True, **options) -> Iterable[T]:
    """``items``, with a bar on standard error. Without tqdm, or with ``show`` False: just the items."""
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return items
    return tqdm(items, desc=label, dynamic_ncols=True, **options)
