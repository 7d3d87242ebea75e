"""Attacks on images: projected gradient descent on the model, with restarts, and the worst of several attempts.

Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018). The loop is
:func:`advbn_lib.ascent.ascend`, as everywhere in this book.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from advbn_lib.ascent import Steps, ascend
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.pixel_balls import Norm, PixelBalls

Predict = Callable[[Tensor], Tensor]  # normalised images (N,C,H,W) to logits (N,K)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the best wrong logit is above the right one (N,); above 0 where the answer is wrong.

    Its gradient does not vanish where the network is very sure, as the cross-entropy's does.
    """
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits.gather(1, labels[:, None])[:, 0]


def training_step(steps: int) -> float:
    """Length of one of so many steps of a training's attack, as a share of the radius: 1.25 / steps, as in the released code of OAT."""
    return 1.25 / steps


LOSSES = {"cross_entropy": cross_entropies, "margin": margins}


@dataclass(frozen=True)
class PGD:
    """Projected gradient steps on the pixels of normalised images.

    Put the model into eval mode first (:func:`advbn_lib.modes.evaluating`): the attack does not change its mode.

    Args:
        mean, std: of each channel, in [0,1] units: what the images are normalised with.
        steps: how many, at least 1.
        step: length of one, as a share of the image's radius, above 0.
        norm: ``"linf"``: steps along the gradient's sign. ``"l2"``: along the gradient.
        random_start: begin at a random point of the ball and not at the image.
        keep: the ``"last"`` point, or of each image the one with the largest loss, ``"best"`` (one more forward pass).
        loss: what is climbed: ``"cross_entropy"``, or ``"margin"`` (:func:`margins`).

    Raises:
        ValueError: a value is out of its range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps: int = 20
    step: float = 0.25
    norm: Norm = "linf"
    random_start: bool = True
    keep: Literal["last", "best"] = "last"
    loss: Literal["cross_entropy", "margin"] = "cross_entropy"

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss is 'cross_entropy' or 'margin', got {self.loss!r}")
        _ = self.climb, self.balls(0.0)  # they refuse bad values

    @property
    def climb(self) -> Steps:
        """How it walks, in units of the radius."""
        direction = "sign" if self.norm == "linf" else "l2"
        return Steps(self.steps, self.step, direction, self.random_start, self.keep)

    def balls(self, radii: Tensor | float) -> PixelBalls:
        """The sets that it walks in."""
        return PixelBalls(radii, self.mean, self.std, self.norm)

    def maximise(
        self, objective: Predict, images: Tensor, radii: Tensor | float, generator: torch.Generator | None = None
    ) -> Tensor:
        """As :meth:`perturb`, for any loss of the images: ``objective`` maps images (N,C,H,W) to losses (N,)."""
        balls = self.balls(radii)
        found = ascend(objective, images, balls, self.climb, generator)
        return balls.apply(images.detach(), found.delta)

    def perturb(
        self, predict: Predict, images: Tensor, labels: Tensor, radii: Tensor | float, generator: torch.Generator | None = None
    ) -> Tensor:  # fmt: skip
        """Adversarial images, normalised; same shape, no graph. One climb, as in training.

        Args:
            predict: normalised images to logits (N,K). Gradients flow through all that it computes.
            images: normalised (N,C,H,W).
            labels: right classes (N,), int64, from 0 to K - 1.
            radii: of each image (N,), or one for all; in [0,1] units.
            generator: of the random start, on the images' device.

        Raises:
            ValueError: labels or radii are bad, or pixels are out of [0,1]; the message says how to mend it.
            FloatingPointError: a loss is NaN or infinite.
        """
        checked = False

        def objective(x: Tensor) -> Tensor:
            nonlocal checked
            logits = predict(x)
            if not checked:  # once: it makes the host wait for the device
                check_labels(logits, labels)
                checked = True
            return LOSSES[self.loss](logits, labels)

        return self.maximise(objective, images, radii, generator)


@dataclass(frozen=True, eq=False)
class Attacked:
    """What an attack made of a batch.

    Attributes:
        images: normalised (N,C,H,W).
        wrong: (N,), whether the answer to each is wrong. losses: (N,), its cross-entropy.
    """

    images: Tensor
    wrong: Tensor
    losses: Tensor


@torch.no_grad()
def judge(predict: Predict, images: Tensor, labels: Tensor) -> Attacked:
    """The model's answers to these images.

    Raises:
        ValueError: labels are out of range.
    """
    logits = predict(images)
    check_labels(logits, labels)
    return Attacked(images, logits.argmax(1) != labels, cross_entropies(logits, labels))


def worse(first: Attacked, second: Attacked) -> Attacked:
    """Of each sample, the attempt that did more harm: a wrong answer before a right one, then the larger loss.

    The loss alone does not do: a right answer that is unsure among many classes can have a larger one than a wrong answer.
    """
    wins = (second.wrong & ~first.wrong) | ((second.wrong == first.wrong) & (second.losses > first.losses))
    chosen = torch.where(wins[:, None, None, None], second.images, first.images)
    return Attacked(chosen, first.wrong | second.wrong, torch.where(wins, second.losses, first.losses))


def worst_case(
    attack: PGD, predict: Predict, images: Tensor, labels: Tensor, radii: Tensor | float, restarts: int = 1,
    generator: torch.Generator | None = None, surrogate: Predict | None = None,
) -> Attacked:  # fmt: skip
    """The most harmful of the unchanged images and of ``restarts`` attacks on them, of each sample: what evaluation counts.

    The unchanged image is in every ball, so accuracy never rises with the radius by an attack that failed.

    Args:
        attack, images, labels, radii, generator: see :meth:`PGD.perturb`.
        predict: the model that answers, in eval mode.
        restarts: climbs, each from another random point.
        surrogate: what is climbed, if not ``predict`` itself: another network, or this one with its fusing weights frozen. Only
            the answers of ``predict`` count.

    Raises:
        ValueError: as :meth:`PGD.perturb`; or restarts that would all be the same.
    """
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    if restarts > 1 and not attack.random_start:
        raise ValueError("without a random start all restarts are the same: set random_start, or restarts to 1")
    worst = judge(predict, images.detach(), labels)
    for _ in range(restarts):
        changed = attack.perturb(surrogate or predict, images, labels, radii, generator)
        worst = worse(worst, judge(predict, changed, labels))
    return worst


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that are not int64 (N,) from 0 to K - 1, for logits (N,K). ``cross_entropy`` takes some of them silently.

    Raises:
        ValueError: the message says how to mend it.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64, one for each of the logits (N,K): got {labels.dtype} of shape {tuple(labels.shape)} "
            f"for logits of shape {tuple(logits.shape)}"
        )
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels go from {low} to {high}, but the model has {logits.shape[1]} classes (0 to {logits.shape[1] - 1}): "
            "the labels are of another data set, or count from 1"
        )
