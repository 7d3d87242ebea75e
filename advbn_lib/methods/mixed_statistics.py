"""Another image's statistics, by chance and without an adversary: MixStyle, put into AdvBN's frame.

Source: Zhou, Yang, Qiao, Xiang, "Domain Generalization with MixStyle", ICLR 2021; released code
github.com/KaiyangZhou/mixstyle-release. There half of all batches are mixed, in one BatchNorm set, at several layers, and the whole
network learns. Here, as with AdvBN, each batch is seen unmixed and mixed, at one layer, and the layers above it learn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from advbn_lib.methods.base import PerturbedStatistics
from advbn_lib.statistics import INSTANCE, mean, renormalise, std


class MixedStatistics(PerturbedStatistics):
    """Each image's channel means and standard deviations are moved towards those of another image of the batch.

    A share of its own remains: one of Beta(alpha, alpha) for each image. With a small ``alpha`` most shares are near 0 or 1.

    Args:
        model, layer, dual_bn, clamp_at_zero, example: see :class:`~advbn_lib.methods.base.PerturbedStatistics`.
        alpha: at least 0.01; 0.1 as released. (Below, torch's draws are not those of the distribution any more.)

    Raises:
        ValueError: ``alpha`` is too small.
    """

    def __init__(
        self, model: nn.Module, layer: str = "layer1", alpha: float = 0.1, *, dual_bn: bool = True,
        clamp_at_zero: bool | None = None, example: Tensor | None = None,
    ):  # fmt: skip
        if not alpha >= 0.01:
            raise ValueError(f"alpha must be at least 0.01, got {alpha}; for no mixing use CleanFineTuning")
        super().__init__(model, layer, dual_bn=dual_bn, clamp_at_zero=clamp_at_zero, per_image=True, example=example)
        self.alpha = alpha

    def perturb(self, features: Tensor, labels: Tensor) -> Tensor:
        count = len(features)
        alpha = features.new_full((count, 1, 1, 1), self.alpha)
        share = torch.distributions.Beta(alpha, alpha).sample()
        other = torch.randperm(count, device=features.device)
        means, stds = mean(features, INSTANCE), std(features, INSTANCE)
        mixed = renormalise(
            features, share * means + (1 - share) * means[other], share * stds + (1 - share) * stds[other], INSTANCE
        )
        return mixed.clamp_min(0) if self.perturbation.clamp_at_zero else mixed
