"""The controls of A-FAN: what it must beat before its adversary can be given the credit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advbn_lib.feature_ball import FeatureBall
from advbn_lib.methods.afan import FeatureAugmentation, Site
from advbn_lib.methods.base import Losses
from advbn_lib.tasks.base import Cut


class FeatureNoise(FeatureAugmentation):
    """A-FAN without the adversary: uniform noise as large as its steps can reach."""

    def change(self, cut: Cut, site: Site) -> Tensor:
        ball = FeatureBall(site.reach)
        return ball.apply(cut.features, ball.sample(cut.features))


class UnchangedFeatures(FeatureAugmentation):
    """A-FAN with an ascent of no steps: the layers above the site train on the clean features twice."""

    def change(self, cut: Cut, site: Site) -> Tensor:
        return cut.features


class ExtraForwards(FeatureAugmentation):
    """As many forward passes as A-FAN takes, all on clean features, and the clean loss alone.

    In train mode each of them updates BatchNorm's running statistics: that is all they do.
    """

    def forward(self, inputs: Any, targets: Any) -> Losses:
        with torch.no_grad():
            for site in self.sites:
                cut = self.task.cut(inputs, targets, site.layer)
                for _ in range(site.steps + site.points - 1):
                    cut.loss(cut.features)
        clean = self.task.loss(inputs, targets)
        return Losses(clean, clean)


class NoAugmentation(FeatureAugmentation):
    """The task's own loss alone."""

    def forward(self, inputs: Any, targets: Any) -> Losses:
        clean = self.task.loss(inputs, targets)
        return Losses(clean, clean)
