"""The controls: what AdvBN must beat before its adversary can be given the credit."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from advbn_lib.methods.base import AboveTheCut, Losses, Method, PerturbedStatistics


class PlainTraining(Method):
    """The whole network on clean images: how a starting point is made."""

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        clean = F.cross_entropy(self.model(images), labels)
        return Losses(clean, clean)


class CleanFineTuning(AboveTheCut):
    """The layers that AdvBN trains, trained just as long on clean features alone."""

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        clean = F.cross_entropy(self.split.tail(self.features(images)), labels)
        return Losses(clean, clean)


class RandomStatistics(PerturbedStatistics):
    """AdvBN without the adversary: the factors are drawn uniformly from the same set, anew for each batch."""

    def perturb(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.perturbation.apply(features, self.perturbation.sample(features))


class UnchangedStatistics(PerturbedStatistics):
    """AdvBN with an ascent of no steps: both branches see the clean features. What the second BatchNorm set does by itself."""

    def perturb(self, features: Tensor, labels: Tensor) -> Tensor:
        return features
