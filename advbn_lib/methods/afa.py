"""AFA: one model for every attack strength, by fusing a clean and an adversarial BatchNorm set for each sample.

Source: "Adaptive Feature Alignment for Adversarial Training" (AFA, arXiv 2105.15157). **This is a reconstruction**: the abstract
says that a fusing weight is predicted in a dual-BN architecture, so that one model serves attacks of any strength. How it is
trained is not known to us, and there is no public code. Our choices, each with its reason:

- Two stages: first the end points (:class:`EndPoints`), then the weights between them (:class:`AFA`). It keeps apart what each
  is for, and the second stage trains few parameters. One stage is :class:`JointAFA`.
- The end points are trained with halves of the clean and the adversarial loss, as the released code of OAT does, the nearest
  published relative. The adversarial images are made against the set that they then train.
- In the second stage everything but the predictors is frozen, and in eval mode: BatchNorm statistics of a batch would tell a
  predictor which strengths are in it.
- Each sample's strength is drawn evenly from the whole numbers 0 to eps, in 1/255. 0 is among them, to guard clean accuracy.
- The attack is on the whole fused model: its gradient goes through the predictors. Held fixed, the weights would hide it.
- No loss says what the weight should be. The abstract has it learned automatically. As an ablation it can be told
  (``supervision``): can the strength be read from the features at all?

How two sets become one is in :mod:`advbn_lib.fused_bn`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.attacks import PGD
from advbn_lib.dual_bn import Branch, use_branch
from advbn_lib.fused_bn import Fusion, fuse_batch_norms, predictor_parameters, recorded_weights, use_fused
from advbn_lib.methods.base import Losses, Method
from advbn_lib.methods.pgd_training import UNIT, radius
from advbn_lib.modes import evaluating


class FusedMethod(Method):
    """What the stages share: a model whose BatchNorms fuse, and an attack on it.

    Args:
        model: normalised images (N,3,H,W) to logits (N,K). Its BatchNorms, single or dual, are replaced in place by
            :class:`~advbn_lib.fused_bn.FusedBatchNorm`; ``model`` alone then fuses. A model from another stage stays as it is.
        attack: how images are attacked, with the model in eval mode.
        eps: the largest radius, in 1/255 (of the l2 norm, if that is the attack's).
        fusion: how two sets become one; the same in each stage.

    Raises:
        ValueError, TypeError: eps is out of its range; see :func:`~advbn_lib.fused_bn.fuse_batch_norms`.
    """

    def __init__(self, model: nn.Module, attack: PGD, eps: float = 8.0, fusion: Fusion = Fusion()):
        radius(eps)  # refused before the model is touched
        super().__init__(model)
        fuse_batch_norms(model, fusion)
        self.attack, self.eps = attack, eps

    def predict(self, images: Tensor, branch: Branch | Literal["fused"] = "fused") -> Tensor:
        """Logits (N,K), fused or through one set. Weights that are forced, or recorded, by a block around it stay so."""
        with use_fused(self.model) if branch == "fused" else use_branch(self.model, branch):
            return self.model(images)

    def perturb(
        self, images: Tensor, labels: Tensor, branch: Branch | Literal["fused"] = "fused",
        strengths: Tensor | float | None = None,
    ) -> Tensor:  # fmt: skip
        """Adversarial images, normalised, against the model as ``branch`` says; same shape, no graph.

        Args:
            strengths: of each image (N,), or one for all, in 1/255; ``eps`` if None.

        Raises:
            ValueError: the largest of the strengths is out of its range, or looks like [0,1] units.
        """
        strengths = self.eps if strengths is None else strengths
        if strongest := float(torch.as_tensor(strengths).max()):  # 0 alone is no attack, and may be asked for
            radius(strongest)
        with evaluating(self.model):
            return self.attack.perturb(lambda x: self.predict(x, branch), images, labels, strengths * UNIT)

    def draw_strengths(self, images: Tensor) -> Tensor:
        """A strength for each image (N,), in 1/255: whole numbers from 0 to eps, each as likely."""
        return torch.randint(int(self.eps) + 1, (len(images),), device=images.device).to(images.dtype)


class EndPoints(FusedMethod):
    """Stage 1: clean images train the clean set, the strongest adversarial ones the other; every other layer is shared.

    The loss is ``clean_weight`` times the clean plus ``1 - clean_weight`` times the adversarial cross-entropy. The two kinds are
    forwarded apart. Predictors are not trained.

    Args:
        model, attack, eps, fusion: see :class:`FusedMethod`.
        clean_weight: above 0 and below 1.

    Raises:
        ValueError, TypeError: see :class:`FusedMethod`.
    """

    def __init__(
        self, model: nn.Module, attack: PGD, eps: float = 8.0, fusion: Fusion = Fusion(), clean_weight: float = 0.5
    ):
        _check_clean_weight(clean_weight)
        super().__init__(model, attack, eps, fusion)
        self.clean_weight = clean_weight

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        perturbed = self.perturb(images, labels, "adversarial")
        adversarial = F.cross_entropy(self.predict(perturbed, "adversarial"), labels)
        clean = F.cross_entropy(self.predict(images, "clean"), labels)
        return Losses(self.clean_weight * clean + (1 - self.clean_weight) * adversarial, clean, adversarial)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return _without(self.model.parameters(), predictor_parameters(self.model))

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ("clean", "adversarial")


class AFA(FusedMethod):
    """Stage 2: the predictors learn the fusing weights, on images attacked with strengths from 0 to eps. All else is frozen.

    Begin with a model whose end points are trained. The loss is the mean cross-entropy over all strengths; no part of it is the
    clean one, so :class:`~advbn_lib.methods.base.Losses` reports the same number as ``clean``.

    Args:
        model, attack, eps, fusion: see :class:`FusedMethod`; eps a whole number.
        supervision: times :func:`distance_from_told`, added to the loss; 0: the weights are told nothing.

    Raises:
        ValueError, TypeError: see :class:`FusedMethod`; eps is no whole number; supervision is negative.
    """

    def __init__(
        self, model: nn.Module, attack: PGD, eps: float = 8.0, fusion: Fusion = Fusion(), supervision: float = 0.0
    ):
        _check_whole(eps)
        if not supervision >= 0:
            raise ValueError(f"supervision is a weight in the loss, 0 or more; got {supervision}")
        super().__init__(model, attack, eps, fusion)
        self.supervision = supervision

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        loss = self.loss(images, labels, self.draw_strengths(images))
        return Losses(loss, loss)

    def loss(self, images: Tensor, labels: Tensor, strengths: Tensor) -> Tensor:
        """Mean cross-entropy of the fused model on images attacked with these strengths (N,), in 1/255, and what supervision adds."""
        frozen = _without(self.model.parameters(), predictor_parameters(self.model))
        with _without_gradients(frozen), evaluating(self.model):
            perturbed = self.perturb(images, labels, strengths=strengths)
            with recorded_weights(self.model, graph=True) as weights:
                loss = F.cross_entropy(self.predict(perturbed), labels)
        return loss + self.supervision * distance_from_told(weights, strengths / self.eps) if self.supervision else loss

    def trainable_parameters(self) -> list[nn.Parameter]:
        return predictor_parameters(self.model)

    @property
    def branches(self) -> tuple[str, ...]:
        return ("fused", "clean", "adversarial")


def distance_from_told(weights: Mapping[str, Tensor], told: Tensor) -> Tensor:
    """How far each layer's fusing weights (N,) are from what they should be (N,; 0 clean, 1 the strongest attack).

    The mean cross-entropy over layers and samples. It is least, but not 0, where a weight is the mean of ``told`` given what its
    predictor sees.
    """
    predicted = (
        torch.stack(list(weights.values())).float().clamp(1e-6, 1 - 1e-6)
    )  # in half precision a sigmoid may round to 1
    return -(told * predicted.log() + (1 - told) * (1 - predicted).log()).mean()


class JointAFA(EndPoints):
    """Both stages at once, as an ablation: the sum of their losses trains every parameter.

    The end points' part comes first: it moves the running statistics, which the fused part then uses. The reported losses are
    the clean one and, as the adversarial one, that of the fused model.

    Args:
        model, attack, eps, fusion, clean_weight: see :class:`EndPoints`; eps a whole number.

    Raises:
        ValueError, TypeError: see :class:`EndPoints`; eps is no whole number.
    """

    def __init__(
        self, model: nn.Module, attack: PGD, eps: float = 8.0, fusion: Fusion = Fusion(), clean_weight: float = 0.5
    ):
        _check_whole(eps)
        super().__init__(model, attack, eps, fusion, clean_weight)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        end_points = super().forward(images, labels)
        perturbed = self.perturb(images, labels, strengths=self.draw_strengths(images))
        fused = F.cross_entropy(self.predict(perturbed), labels)
        return Losses(end_points.total + fused, end_points.clean, fused)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def branches(self) -> tuple[str, ...]:
        return ("fused", "clean", "adversarial")


def _check_clean_weight(clean_weight: float) -> None:
    if not 0 < clean_weight < 1:
        raise ValueError(f"clean_weight must be above 0 and below 1, else one set is not trained; got {clean_weight}")


def _check_whole(eps: float) -> None:
    if eps >= 0.05 and eps % 1:
        raise ValueError(f"strengths are drawn from the whole numbers 0 to eps, in 1/255: eps must be one, got {eps}")


def _without(parameters: Iterable[nn.Parameter], left_out: list[nn.Parameter]) -> list[nn.Parameter]:
    out = {id(parameter) for parameter in left_out}
    return [parameter for parameter in parameters if id(parameter) not in out]


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside the block no graph leads to these: a backward pass afterwards gives them no gradient."""
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, old in zip(parameters, before):
            parameter.requires_grad_(old)
