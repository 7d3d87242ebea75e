"""What the methods share: train the layers above a cut, on clean features and maybe on perturbed ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.dual_bn import Branch, second_batch_norm, use_branch
from advbn_lib.modes import evaluating
from advbn_lib.perturbations import ChannelStatistics
from advbn_lib.splitting import split_at


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies of a batch, as scalars; ``adversarial`` is None for a method without that branch."""

    total: Tensor
    clean: Tensor
    adversarial: Tensor | None = None


class Method(nn.Module):
    """A classifier and a way to train it: ``method(images, labels)`` gives :class:`Losses`.

    The training loop needs no more than this: ``forward``, ``trainable_parameters``, and for evaluation ``predict``.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser updates."""
        return list(self.model.parameters())

    def freeze_the_rest(self) -> None:
        """Turn off the gradients of what is not trained. ``DistributedDataParallel`` needs it: it waits for those that are on."""
        trained = {id(parameter) for parameter in self.trainable_parameters()}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def predict(self, images: Tensor, branch: Branch = "clean") -> Tensor:
        """Logits (N,K) through one BatchNorm set, in whatever mode the model is."""
        with use_branch(self.model, branch):
            return self.model(images)

    def predictions(self, images: Tensor) -> dict[Branch, Tensor]:
        """Logits (N,K) through each of :attr:`branches`."""
        return {branch: self.predict(images, branch) for branch in self.branches}

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of the model that differ."""
        return ("clean",)


class AboveTheCut(Method):
    """Trains the layers above ``layer`` only. The ones below are frozen: no gradient, and in eval mode, also after ``train()``.

    Raises:
        ValueError: the weights are in half precision.
    """

    def __init__(self, model: nn.Module, layer: str, example: Tensor | None = None):
        if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
            raise ValueError("the weights are in half precision: keep them in float32, and train inside torch.autocast")
        super().__init__(model)
        self.split = split_at(model, layer, example)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        above, modules = set(self.split.tail_modules), dict(self.model.named_modules())
        for name in self.split.features_modules:
            if name in modules and name not in above:
                modules[name].eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Output (N,C,H,W) of the frozen layers."""
        with evaluating(self.model):
            features = self.split.features(images)
        # In half precision a factor of 2.1 would be rounded by more than a per cent, and statistics with it.
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return self.split.tail_parameters()


class PerturbedStatistics(AboveTheCut):
    """Training on clean features and on features with other channel statistics; a subclass says which statistics.

    Args:
        model: a classifier. Its BatchNorms above ``layer`` are replaced, in place, by
            :class:`~advbn_lib.dual_bn.DualBatchNorm` (unless ``dual_bn`` is False); ``model`` alone then uses the clean ones.
            Those that are dual already, from a method before, stay as they are: for a new start take a new model. Make the
            optimizer after the method, from its ``trainable_parameters``: the second set is new.
        layer: whose output is perturbed.
        eps: how far the factors on mean and standard deviation may go from 1.
        dual_bn: a second BatchNorm set for the perturbed features.
        clamp_at_zero: cut perturbed features at 0; None: if the layer's output is never negative.
        per_image: statistics and factors per image, not per batch.
        example: a batch of images, for models that do not accept 64x64 (see :func:`~advbn_lib.splitting.split_at`).

    Raises:
        SplitError, ValueError: see :func:`~advbn_lib.splitting.split_at`, :class:`~advbn_lib.perturbations.ChannelStatistics`,
            :func:`~advbn_lib.dual_bn.second_batch_norm`.
    """

    def __init__(
        self, model: nn.Module, layer: str = "layer1", eps: float = 1.1, *, dual_bn: bool = True,
        clamp_at_zero: bool | None = None, per_image: bool = False, example: Tensor | None = None,
    ):  # fmt: skip
        perturbation = ChannelStatistics(eps, True, per_image)  # a bad eps is refused before the model is touched
        super().__init__(model, layer, example)
        clamp = self.split.nonnegative if clamp_at_zero is None else clamp_at_zero
        self.perturbation = ChannelStatistics(perturbation.eps, clamp, per_image)
        self.dual_bn = second_batch_norm(model, dual_bn, self.split.tail_modules)
        if dual_bn and not self.dual_bn:
            _warn(
                f"{type(model).__name__} has no BatchNorm above {layer!r}: dual BN does not apply, both branches share every layer"
            )
        if self.split.batch_norm_first and not per_image:
            _warn(
                f"the first thing above {layer!r} is a BatchNorm: in train mode it undoes a change of batch statistics; cut elsewhere"
            )

    def perturb(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features (N,C,H,W) with other channel statistics; same shape, no gradient."""
        raise NotImplementedError(f"{type(self).__name__} must say how it perturbs")

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        features = self.features(images)
        perturbed = self.perturb(features, labels)
        with use_branch(self.model, "adversarial"):
            adversarial = F.cross_entropy(self.split.tail(perturbed), labels)
        with use_branch(self.model, "clean"):
            clean = F.cross_entropy(self.split.tail(features), labels)
        return Losses(clean + adversarial, clean, adversarial)

    def predictions(self, images: Tensor) -> dict[Branch, Tensor]:
        features = self.split.features(images)  # the branches differ above the cut only
        logits = {}
        for branch in self.branches:
            with use_branch(self.model, branch):
                logits[branch] = self.split.tail(features)
        return logits

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ("clean", "adversarial") if self.dual_bn else ("clean",)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
