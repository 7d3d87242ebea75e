"""AugMix: mixtures of augmented images, and predictions that must agree on them; alone and together with AdvBN.

Source: Hendrycks, Mu, Cubuk, Zoph, Gilmer, Lakshminarayanan, "AugMix: A Simple Data Processing Method to Improve Robustness and
Uncertainty", ICLR 2020. The mixing is torchvision's, without the operations that are also test corruptions
(brightness, contrast, colour, sharpness), as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from advbn_lib.dual_bn import use_branch
from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.base import AboveTheCut, Losses


class Mixing(nn.Module):
    """Normalised images to AugMix mixtures of them, each image by itself.

    Args:
        mean, std: what the images were normalised with (3 values each, for [0,1] units).
        severity: 1 to 10, of the single operations.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], severity: int = 3):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.mix = v2.AugMix(severity=severity, all_ops=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """N,3,H,W to N,3,H,W, both normalised; random, from torch's global generator."""
        levels = ((images * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        with torch.autocast(images.device.type, enabled=False):  # else half precision would shake the pixels' places
            mixed = torch.stack([self.mix(image) for image in levels]).to(images.dtype) / 255
        return ((mixed - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def consistency_loss(tail: Callable[[Tensor], Tensor], features: Tensor, labels: Tensor, weight: float) -> Tensor:
    """AugMix's loss (section 3): cross-entropy of the clean images plus ``weight`` times the Jensen-Shannon divergence.

    Args:
        features: of the clean images and two mixtures of them, one after the other (3N,C,H,W); they share the batch statistics.
        labels: of the clean images (N,).
    """
    logits = tail(features).float()
    clean, *others = logits.softmax(1).chunk(3)
    middle = ((clean + others[0] + others[1]) / 3).clamp(1e-7, 1).log()
    divergence = sum(F.kl_div(middle, p, reduction="batchmean") for p in (clean, *others)) / 3
    return F.cross_entropy(logits[: len(labels)], labels) + weight * divergence


class AugMix(AboveTheCut):
    """The layers that AdvBN trains, trained with AugMix.

    Args:
        model, layer: as for :class:`~advbn_lib.methods.baselines.CleanFineTuning`.
        mixing: how images are mixed.
        weight: of the Jensen-Shannon divergence; 12 in the paper.
    """

    def __init__(self, model: nn.Module, layer: str, mixing: Mixing, weight: float = 12.0, example: Tensor | None = None):  # fmt: skip
        super().__init__(model, layer, example)
        self.mixing, self.weight = mixing, weight

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        features = self.features(torch.cat([images, self.mixing(images), self.mixing(images)]))
        clean = consistency_loss(self.split.tail, features, labels, self.weight)
        return Losses(clean, clean)


class AugMixAdvBN(AdvBN):
    """AdvBN whose clean branch trains with AugMix. The adversary perturbs the features of the clean images.

    The paper combines the two as well; how, in detail, we could not read, so this is our way.
    """

    def __init__(
        self, model: nn.Module, layer: str, mixing: Mixing, weight: float = 12.0, eps: float = 1.1, step_size: float = 0.2,
        steps: int = 6, example: Tensor | None = None,
    ):  # fmt: skip
        super().__init__(model, layer, eps, step_size, steps, example=example)
        self.mixing, self.weight = mixing, weight

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        features = self.features(torch.cat([images, self.mixing(images), self.mixing(images)]))
        perturbed = self.perturb(features[: len(images)], labels)
        with use_branch(self.model, "adversarial"):
            adversarial = F.cross_entropy(self.split.tail(perturbed), labels)
        with use_branch(self.model, "clean"):
            clean = consistency_loss(self.split.tail, features, labels, self.weight)
        return Losses(clean + adversarial, clean, adversarial)
