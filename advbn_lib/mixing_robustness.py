"""How many images a classifier still gets right when their style is mixed in the worst way.

Source: the robust accuracy of AdvMix (see :mod:`advbn_lib.style_mix`), with many restarts; a reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advbn_lib.ascent import Steps
from advbn_lib.methods.base import Method
from advbn_lib.mixing import Encoded, Mixer, worst_style
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress

CHUNK = 500  # fixed: the other images that a sample is mixed with depend on it
MIXING_SEED = 19_12_03192


@dataclass(frozen=True)
class MixingAttack:
    """The test's adversary.

    Args:
        eps: radius of the balls, in standard deviations of the bank.
        climb: how it walks within one; None: a random point of it.
        restarts: other images that are tried for each image.

    Raises:
        ValueError: no restart.
    """

    eps: float
    climb: Steps | None
    restarts: int = 20

    def __post_init__(self):
        if self.restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {self.restarts}")


def mixing_accuracy(
    method: Method, mixer: Mixer, test: Encoded, labels: Tensor, attack: MixingAttack, show_progress: bool = True
) -> list[float]:
    """Share of images, from 0 to 1, that are right as they are and after each restart so far: ``restarts + 1`` numbers.

    A wrong answer to one mixed image is enough, and the unchanged image counts too: the numbers never rise. An image is not
    attacked any more once it is lost.

    Args:
        mixer: its bank is to hold styles of images that neither the training nor ``test`` has (then ``test.places`` are -1).
        test, labels: on one device, with the bank, the decoder and the model.
    """
    kept = torch.zeros(attack.restarts + 1, dtype=torch.int64, device=labels.device)
    with evaluating(method):
        for start in progress(range(0, len(test), CHUNK), "mix", show_progress):
            chosen = slice(start, start + CHUNK)
            kept += _still_right(method, mixer, test[chosen], labels[chosen], attack, MIXING_SEED + start)
    return [count / len(test) for count in kept.tolist()]


def _still_right(
    method: Method, mixer: Mixer, batch: Encoded, labels: Tensor, attack: MixingAttack, seed: int
) -> Tensor:
    ball = mixer.bank.around(attack.eps)
    with torch.no_grad():
        right = method.predict(batch.images).argmax(1) == labels
    counts = [right.sum()]
    for restart in range(attack.restarts):
        generator = torch.Generator(labels.device).manual_seed(seed * 1000 + restart)
        left = right.nonzero()[:, 0]
        if len(left):
            style = worst_style(method.predict, mixer, batch[left], labels[left], ball, attack.climb, 1, generator)
            with torch.no_grad():
                answers = method.predict(mixer.images(batch.content[left], style)).argmax(1)
            right[left] = answers == labels[left]
        counts.append(right.sum())
    return torch.stack(counts)
