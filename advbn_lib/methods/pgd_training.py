"""Adversarial training with one BatchNorm set: PGD-AT and TRADES, what AFA is compared with.

Sources: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018); Zhang et al.,
"Theoretically Principled Trade-off between Robustness and Accuracy" (TRADES, ICML 2019). Each defends against one strength,
chosen before training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.attacks import PGD, check_labels
from advbn_lib.methods.base import Losses, Method
from advbn_lib.modes import evaluating

UNIT = 1 / 255


def radius(eps: float) -> float:
    """A strength in 1/255 as a radius in [0,1] units.

    Raises:
        ValueError: it is negative, too large, or looks like [0,1] units.
    """
    if not 0.05 <= eps <= 255:  # the lower bound catches 8/255, which would mean a thirtieth of a grey level
        raise ValueError(f"eps is in 1/255, from 0.05 to 255: write 8 for 8/255; got {eps}")
    return eps * UNIT


class PGDTraining(Method):
    """Training on the worst images that the attack finds, and, with a clean weight, on clean ones beside them.

    The loss is ``(1 - clean_weight)`` times the adversarial plus ``clean_weight`` times the clean cross-entropy. At a clean
    weight of 0, as in Madry et al., the model sees no clean image; the clean loss that is reported is then the adversarial one.
    The two kinds are forwarded apart.

    Args:
        model: normalised images (N,3,H,W) to logits (N,K).
        attack: how the images are attacked, with the model in eval mode, as in the released code of OAT.
        eps: the radius, in 1/255 (of the l2 norm, if that is the attack's).
        clean_weight: from 0 to below 1.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(self, model: nn.Module, attack: PGD, eps: float = 8.0, clean_weight: float = 0.0):
        if not 0 <= clean_weight < 1:
            raise ValueError(
                f"clean_weight must be from 0 to below 1, got {clean_weight}; for clean images alone use PlainTraining"
            )
        found = radius(eps)
        super().__init__(model)
        self.attack, self.radius, self.clean_weight = attack, found, clean_weight

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images, normalised; same shape, no graph."""
        with evaluating(self.model):
            return self.attack.perturb(self.model, images, labels, self.radius)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        adversarial = F.cross_entropy(self.model(self.perturb(images, labels)), labels)
        if not self.clean_weight:
            return Losses(adversarial, adversarial, adversarial)
        clean = F.cross_entropy(self.model(images), labels)
        return Losses((1 - self.clean_weight) * adversarial + self.clean_weight * clean, clean, adversarial)


class TRADES(Method):
    """Training for right answers on clean images and for the same answer anywhere in the ball around them.

    The loss is the clean cross-entropy plus ``beta`` times KL(p(x) || p(x')), averaged over the batch. The attack climbs that
    divergence, with the model in eval mode. The reported adversarial loss is the cross-entropy at x', which is not trained on.

    Our choice: the ascent starts at a random point of the ball. At x itself the divergence has no gradient, so a random start
    is needed.

    Args:
        model, attack, eps: see :class:`PGDTraining`; the attack's loss is not used.
        beta: weight of the divergence, above 0.

    Raises:
        ValueError: a value is out of its range, or the attack has no random start.
    """

    def __init__(self, model: nn.Module, attack: PGD, eps: float = 8.0, beta: float = 6.0):
        if not beta > 0:
            raise ValueError(f"beta must be above 0, got {beta}; for clean images alone use PlainTraining")
        if not attack.random_start:
            raise ValueError(
                "at the clean image the divergence has no gradient: TRADES needs an attack with random_start=True"
            )
        found = radius(eps)
        super().__init__(model)
        self.attack, self.radius, self.beta = attack, found, beta

    def perturb(self, images: Tensor) -> Tensor:
        """Images whose answers differ most from the clean ones', normalised; same shape, no graph."""
        with evaluating(self.model):
            with torch.no_grad():
                clean = self.model(images)
            return self.attack.maximise(lambda x: divergences(clean, self.model(x)), images, self.radius)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        changed = self.perturb(images)
        clean, adversarial = self.model(images), self.model(changed)
        check_labels(clean, labels)
        loss = F.cross_entropy(clean, labels)
        total = loss + self.beta * divergences(clean, adversarial).mean()
        return Losses(total, loss, F.cross_entropy(adversarial, labels).detach())


def divergences(first: Tensor, second: Tensor) -> Tensor:
    """KL divergence of each sample (N,), in nats, of the second answer from the first; both are logits (N,K)."""
    first, second = first.log_softmax(1), second.log_softmax(1)
    return F.kl_div(second, first, reduction="none", log_target=True).sum(1)
