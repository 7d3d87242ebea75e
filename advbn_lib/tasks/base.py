"""What a feature-level method needs of a task: a place to cut, the features there, and the loss from there on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """A batch on its way through the model, stopped at a layer.

    Attributes:
        features: output of the layer, without a graph; batch first (in a detection head: one row a region).
        loss: features of that shape to the loss of the rest of the model: one per sample (N,), or (1,) where the task knows only
            one for the batch. It may be called many times; each call runs the rest anew, in the mode the model is in.
    """

    features: Tensor
    loss: Callable[[Tensor], Tensor]


class Task(Protocol):
    """A model and its training loss. Inputs and targets are whatever the task's loader gives."""

    model: nn.Module

    def loss(self, inputs: Any, targets: Any) -> Tensor:
        """Training loss of a batch through the whole model: a scalar."""

    def cut(self, inputs: Any, targets: Any, layer: str) -> Cut:
        """Run the batch up to ``layer``, in the mode the model is in."""

    def check(self, layer: str) -> None:
        """Refuse a layer where the model cannot be cut.

        Raises:
            ValueError: the message lists the layers that can be named.
        """
