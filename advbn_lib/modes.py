"""Put a model into another mode for a while, and put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Inside the block all submodules are in eval mode; afterwards each one has its own mode back, also after an error.

    BatchNorm then uses its running statistics and does not update them, which is how the ascent leaves no trace.
    """
    before = [(module, module.training) for root in modules for module in root.modules()]
    try:
        for root in modules:
            root.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
