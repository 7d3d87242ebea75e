"""AdvBN: find the channel means and standard deviations that hurt most, and train on them.

Source: Shu, Wu, Goldblum, Goldstein, "Encoding Robustness to Image Style via Adversarial Feature Perturbations",
NeurIPS 2021; released code github.com/azshue/AdvBN.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.ascent import Ascended, Steps, ascend
from advbn_lib.dual_bn import use_branch
from advbn_lib.methods.base import PerturbedStatistics
from advbn_lib.modes import evaluating

cross_entropies = partial(F.cross_entropy, reduction="none")


class AdvBN(PerturbedStatistics):
    """Adversarial batch normalisation, with the paper's values as defaults.

    >>> method = AdvBN(torchvision.models.resnet50(weights="IMAGENET1K_V1"))       # doctest: +SKIP
    >>> losses = method(images, labels)                                            # doctest: +SKIP
    >>> losses.total.backward()                                                    # doctest: +SKIP

    Args:
        model, layer, eps, dual_bn, clamp_at_zero, per_image, example: see
            :class:`~advbn_lib.methods.base.PerturbedStatistics`.
        step_size: how much a factor moves in one step of the ascent.
        steps: how many steps.
        random_start: begin at random factors and not at 1.
    """

    def __init__(
        self, model: nn.Module, layer: str = "layer1", eps: float = 1.1, step_size: float = 0.2, steps: int = 6, *,
        random_start: bool = False, dual_bn: bool = True, clamp_at_zero: bool | None = None, per_image: bool = False,
        example: Tensor | None = None,
    ):  # fmt: skip
        climb = Steps(steps, step_size, random_start=random_start)  # bad values are refused before the model is touched
        super().__init__(
            model, layer, eps, dual_bn=dual_bn, clamp_at_zero=clamp_at_zero, per_image=per_image, example=example
        )
        self.steps = climb

    def attack(self, features: Tensor, labels: Tensor) -> Ascended:
        """The worst factors for these features (N,C,H,W): ``delta`` is (mean_factor, std_factor), each 1,C,1,1.

        The tail runs in eval mode on the adversarial BatchNorms, and is left as it was.
        """
        with evaluating(self.model), use_branch(self.model, "adversarial"):
            return ascend(
                lambda x: cross_entropies(self.split.tail(x), labels), features, self.perturbation, self.steps
            )

    def perturb(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.perturbation.apply(features, self.attack(features, labels).delta)
