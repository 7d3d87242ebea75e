"""AdvProp: training on worst-case images beside clean ones, each kind with a BatchNorm set of its own.

Source: Xie et al., "Adversarial Examples Improve Image Recognition" (CVPR 2020). Its aim is accuracy on clean images,
as A-FAN's; the perturbation is of pixels, so each step of the ascent runs the whole network.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.ascent import Ascended, Steps, ascend
from advbn_lib.dual_bn import second_batch_norm, use_branch
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.methods.base import Losses, Method
from advbn_lib.modes import evaluating
from advbn_lib.pixel_ball import PixelBall

UNIT = 1 / 255


class AdvProp(Method):
    """Training on clean images through the main BatchNorm set and on adversarial ones through the auxiliary set.

    Every other layer is shared. The adversary climbs the loss of the network with the auxiliary set. At test time the
    main set alone is used, so :attr:`branches` names the clean one only.

    The loss is ``clean_weight`` times the clean plus ``weight`` times the adversarial cross-entropy. The paper adds the
    two. With the halves that are the default here, as in A-FAN, the total has the scale of one cross-entropy: a
    learning rate then means what it means in plain training.

    Args:
        model: images (N,3,H,W), normalised, to logits (N,K). Its BatchNorms are replaced, in place, by
            :class:`~advbn_lib.dual_bn.DualBatchNorm` (unless ``dual_bn`` is False); ``model`` alone then uses the main
            set.
        mean, std: of each channel, in [0,1] units: what the images are normalised with.
        eps: the farthest that a pixel may change, in 1/255.
        step_size: how far it changes in one step of the ascent, in 1/255.
        steps: of the ascent. The paper's are 5; 1 is the cheap form.
        random_start: begin at random noise from the ball.
        weight, clean_weight: of the two losses.
        dual_bn: an auxiliary BatchNorm set; without it, both kinds of images share the main one.
        attack_mode: the model's mode during the ascent. ``"train"``: BatchNorm uses the batch, so that the attack is on
            the very function that is trained next. From random weights running statistics lag behind, and an attack on
            them is on another network. What it leaves behind is in the auxiliary set's running statistics, which no
            test uses (without ``dual_bn``, in the only set). ``"eval"``: running statistics, and no trace.

    Raises:
        ValueError: a bad eps, step or mode.
    """

    def __init__(
        self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], eps: float = 4.0,
        step_size: float = 1.0, steps: int = 5, *, random_start: bool = False, weight: float = 0.5,
        clean_weight: float = 0.5, dual_bn: bool = True, attack_mode: Literal["train", "eval"] = "train",
    ):  # fmt: skip
        if not 0.05 <= eps <= 255:  # the lower bound catches 4/255, which would mean a sixtieth of a grey level
            raise ValueError(f"eps is in 1/255, from 0.05 to 255: write 4 for 4/255; got {eps}")
        if attack_mode not in ("train", "eval"):
            raise ValueError(f"attack_mode is 'train' or 'eval', got {attack_mode!r}")
        ball, climb = PixelBall(eps * UNIT, mean, std), Steps(steps, step_size * UNIT, random_start=random_start)
        super().__init__(model)  # bad values were refused before the model is touched
        self.ball, self.steps, self.attack_mode = ball, climb, attack_mode
        self.weight, self.clean_weight = weight, clean_weight
        self.dual_bn = second_batch_norm(model, dual_bn)
        if dual_bn and not self.dual_bn:
            warnings.warn(
                f"{type(model).__name__} has no BatchNorm: there is no auxiliary set, both kinds share every layer",
                stacklevel=2,
            )

    def attack(self, images: Tensor, labels: Tensor) -> Ascended:
        """The worst change of these images: ``delta`` is one tensor (N,3,H,W), in [0,1] units of a pixel."""
        mode = evaluating(self.model) if self.attack_mode == "eval" else nullcontext()
        with mode, use_branch(self.model, "adversarial"):
            return ascend(lambda x: cross_entropies(self.model(x), labels), images, self.ball, self.steps)

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images, normalised; same shape, no graph."""
        return self.ball.apply(images, self.attack(images, labels).delta)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        perturbed = self.perturb(images, labels)
        with use_branch(self.model, "adversarial"):
            adversarial = F.cross_entropy(self.model(perturbed), labels)
        with use_branch(self.model, "clean"):
            clean = F.cross_entropy(self.model(images), labels)
        return Losses(self.clean_weight * clean + self.weight * adversarial, clean, adversarial)
