"""The one inner maximisation: every adversary in this book runs this loop.

Source: projected gradient ascent (Madry et al., ICLR 2018, section 2.1). What differs between the methods is the
:class:`~advbn_lib.perturbations.Perturbation` set it walks in, not the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advbn_lib.perturbations import Delta, Perturbation


@dataclass(frozen=True)
class Steps:
    """How to climb.

    Args:
        count: number of gradient steps, at least 1.
        size: length of one step in the units of the perturbation, above 0.
        direction: ``"sign"`` of the gradient (l-inf steepest ascent) or the gradient divided by its l2 norm.
        random_start: begin at a random point of the set and not at "no change".
        keep: the ``"last"`` iterate, or the ``"best"`` one (costs one more forward pass).
    """

    count: int = 6
    size: float = 0.2
    direction: Literal["sign", "l2"] = "sign"
    random_start: bool = False
    keep: Literal["last", "best"] = "last"

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(
                f"the ascent needs at least 1 step, got {self.count}; for no ascent train without the adversary"
            )
        if not self.size > 0:
            raise ValueError(f"the step size must be above 0, got {self.size}")
        if self.direction not in ("sign", "l2") or self.keep not in ("last", "best"):
            raise ValueError(
                f"direction is 'sign' or 'l2' and keep 'last' or 'best', got {self.direction!r} and {self.keep!r}"
            )


@dataclass(frozen=True)
class Ascended:
    """What the ascent found: ``delta``, and the mean loss before each step (shape: steps, or steps + 1 if the best is kept)."""

    delta: Delta
    losses: Tensor


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    perturbation: Perturbation,
    steps: Steps = Steps(),
    generator: torch.Generator | None = None,
) -> Ascended:
    """Find a perturbation in the set that makes ``objective`` large.

    Args:
        objective: maps a perturbed ``x`` to one loss per sample (N,). Their sum is climbed.
        x: what is perturbed: features or images, N first. Treated as a constant.
        perturbation: the set; see :mod:`advbn_lib.perturbations`.
        generator: for the random start.

    No parameter receives a gradient: only the perturbation is differentiated.

    Raises:
        FloatingPointError: if a loss is NaN or infinite; the message names the step.
    """
    x = x.detach()
    delta = perturbation.sample(x, generator) if steps.random_start else perturbation.start(x)
    best, best_loss, history = delta, None, []
    with torch.enable_grad():
        for step in range(steps.count + (steps.keep == "best")):
            delta = tuple(part.detach().requires_grad_() for part in delta)
            losses = objective(perturbation.apply(x, delta))
            history.append(losses.detach().mean())
            if steps.keep == "best":
                best, best_loss = _better(perturbation, best, best_loss, delta, losses.detach())
            if step < steps.count:
                gradient = torch.autograd.grad(losses.sum(), delta)  # the sum: no 1/N to underflow in half precision
                delta = perturbation.project(x, _step(delta, gradient, steps))
    found = best if steps.keep == "best" else delta
    return Ascended(tuple(part.detach() for part in found), _finite(torch.stack(history)))


def _step(delta: Delta, gradient: Delta, steps: Steps) -> Delta:
    if steps.direction == "sign":
        return tuple(part.detach() + steps.size * grad.sign() for part, grad in zip(delta, gradient))
    norms = [grad.flatten(1).norm(dim=1).clamp_min(1e-12) for grad in gradient]
    return tuple(
        part.detach() + steps.size * grad / norm.view(-1, *[1] * (grad.dim() - 1))
        for part, grad, norm in zip(delta, gradient, norms)
    )


def _better(
    perturbation: Perturbation, best: Delta, best_loss: Tensor | None, delta: Delta, losses: Tensor
) -> tuple[Delta, Tensor]:
    """Keep the larger loss: of each sample where the set has one delta per sample, else of the batch."""
    score = losses if perturbation.per_sample else losses.mean()
    if best_loss is None:
        return delta, score
    wins = score > best_loss
    chosen = tuple(torch.where(wins.view(-1, *[1] * (new.dim() - 1)), new, old) for new, old in zip(delta, best))
    return chosen, torch.where(wins, score, best_loss)


def _finite(history: Tensor) -> Tensor:
    bad = (~torch.isfinite(history)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise FloatingPointError(
            f"the loss at ascent step {step} of {len(history)} is {history[step].item()}: "
            "check the input for NaN, lower the step size or eps, or run without mixed precision"
        )
    return history
