"""Classification: any torchvision or timm classifier, cut at a named layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.splitting import Split, split_at
from advbn_lib.tasks.base import Cut


class Classification:
    """A classifier under cross-entropy.

    Args:
        model: images (N,3,H,W) to logits (N,K).
        example: a batch of images, for models that do not accept 64x64 (see :func:`~advbn_lib.splitting.split_at`).
    """

    def __init__(self, model: nn.Module, example: Tensor | None = None):
        self.model, self.example = model, example
        self._splits: dict[str, Split] = {}

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs), targets)

    def cut(self, inputs: Tensor, targets: Tensor, layer: str) -> Cut:
        split = self.split(layer)
        with torch.no_grad():
            features = split.features(inputs)
        return Cut(features, lambda x: F.cross_entropy(split.tail(x), targets, reduction="none"))

    def check(self, layer: str) -> None:
        self.split(layer)

    def split(self, layer: str) -> Split:
        """The model cut behind ``layer``.

        Raises:
            SplitError: see :func:`~advbn_lib.splitting.split_at`.
        """
        if layer not in self._splits:
            self._splits[layer] = split_at(self.model, layer, self.example)
        return self._splits[layer]
