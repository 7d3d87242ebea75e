"""Can the strength of an attack be read from what AFA's predictors see? A linear probe, fitted for nothing but that.

If a fusing weight does not follow the strength, there are two reasons: it cannot be seen in the pooled features, or the predictor
did not learn to see it. A probe tells them apart. It is fitted afterwards, and the attack does not know of it, so what it reads is
more than a predictor can hope for whose attacker knows it. Our own addition: there is none in the paper's abstract.

Source of the idea: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (ICLR 2017, workshop).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from advbn_lib.attacks import PGD
from advbn_lib.data.images import ImageSet
from advbn_lib.fused_bn import WeightPredictor, fused_layers
from advbn_lib.methods.base import Method
from advbn_lib.methods.pgd_training import UNIT
from advbn_lib.modes import evaluating
from advbn_lib.progress import progress
from advbn_lib.robustness import spearman

ALL = "all"
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge regression, for standardised features


@dataclass(frozen=True)
class ProbeStudy:
    """What is attacked, and how.

    Args:
        strengths: of the attacks, in 1/255; 0: no attack. At least two.
        images: the first test images; half of them fit the probe, a quarter chooses its penalty, a quarter tests it. At least 16.
        steps: of PGD. batch_size: images at a time. seed: of the random starts.

    Raises:
        ValueError: a value is out of its range.
    """

    strengths: tuple[float, ...] = (0, 2, 4, 6, 8)
    images: int = 2000
    steps: int = 10
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self):
        if len(set(self.strengths)) < 2 or min(self.strengths) < 0:
            raise ValueError(
                f"strengths are two or more different ones, each 0 or more, in 1/255; got {self.strengths}"
            )
        if self.images < 16 or min(self.steps, self.batch_size) < 1:
            raise ValueError(f"at least 16 images, and steps and batch_size of at least 1; got {self}")


def strength_probe(
    method: Method, test: ImageSet, study: ProbeStudy = ProbeStudy(), show_progress: bool = True
) -> dict[str, dict[str, float]]:
    """How well a probe, and the model's own weights, follow the strength: rank correlations over images and strengths.

    Args:
        method: its model fuses BatchNorm sets with a predictor at each layer; attacked as a whole, in eval mode.
        test: images that the model was not trained on, on its device.

    Returns:
        ``probe`` and ``weights``: by layer, and :data:`ALL` for a probe that sees all layers, or the mean of the weights. On the
        last quarter of the images.

    Raises:
        ValueError: the model has no predictors.
        DataError: the test set has fewer images than the study asks for.
    """
    images = test.first(study.images)
    names = list(_predictors(method))
    if not names:
        raise ValueError("the model has no predictors of fusing weights: fuse its BatchNorms first (fuse_batch_norms)")
    attack = PGD(test.mean, test.std, steps=study.steps)
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    weights: dict[str, list[Tensor]] = {name: [] for name in names}
    with evaluating(method):
        for index, strength in enumerate(progress(study.strengths, "strengths", show_progress)):
            generator = torch.Generator(images.images.device).manual_seed(study.seed * 100_003 + index)
            with predictors_watched(method) as seen:
                for batch, labels in zip(images.images.split(study.batch_size), images.labels.split(study.batch_size)):
                    x = images.normalise(batch.float() / 255)
                    attacked = attack.perturb(method.predict, x, labels, strength * UNIT, generator)
                    for parts in seen.values():  # of the attack's own passes
                        parts.clear()
                    with torch.no_grad():
                        method.predict(attacked)
                    for name in names:
                        features[name].append(seen[name][0][0])
                        weights[name].append(seen[name][0][1])
    strengths = torch.tensor(study.strengths, dtype=torch.float64).repeat_interleave(len(images))
    whose = torch.arange(len(images)).repeat(len(study.strengths))  # the image that each row is of
    pooled = {name: torch.cat(parts).double() for name, parts in features.items()}
    chosen = {name: torch.cat(parts).double() for name, parts in weights.items()}
    pooled[ALL] = torch.cat([pooled[name] for name in names], 1)
    chosen[ALL] = torch.stack([chosen[name] for name in names]).mean(0)
    tested = whose >= len(images) * 3 // 4
    return {
        "probe": {name: probe(found, strengths, whose, len(images)) for name, found in pooled.items()},
        "weights": {name: spearman(found[tested], strengths[tested]) for name, found in chosen.items()},
    }


def probe(features: Tensor, strengths: Tensor, whose: Tensor, images: int) -> float:
    """Rank correlation of a ridge regression's answers with the strengths, on images that it was not fitted to.

    Args:
        features: (M,F). strengths: (M,). Both float64.
        whose: (M,), the number of the image that a row is of: no image is on both sides.
        images: how many there are.
    """
    fitted, choosing = whose < images // 2, (whose >= images // 2) & (whose < images * 3 // 4)
    tested = whose >= images * 3 // 4
    mean, std = features[fitted].mean(0), features[fitted].std(0).clamp_min(1e-12)
    features = (features - mean) / std
    target = strengths - strengths[fitted].mean()
    gram = features[fitted].T @ features[fitted] / int(fitted.sum())
    moment = features[fitted].T @ target[fitted] / int(fitted.sum())
    eye = torch.eye(len(gram), dtype=gram.dtype)
    answers = [features @ torch.linalg.solve(gram + penalty * eye, moment) for penalty in PENALTIES]
    best = min(answers, key=lambda answer: (answer - target)[choosing].square().mean().item())
    return spearman(best[tested], strengths[tested])


@contextmanager
def predictors_watched(method: Method) -> Iterator[Mapping[str, list[tuple[Tensor, Tensor]]]]:
    """Inside the block each predictor's inputs (N,F) and answers (N,) are kept, on the CPU; no hook stays, also after an error."""
    predictors = _predictors(method)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in predictors}
    hooks = []

    def look(name: str, inputs: tuple[Tensor], answer: Tensor) -> None:
        seen[name].append((inputs[0].detach().cpu(), answer.detach().cpu()))

    try:
        for name, predictor in predictors.items():
            hooks.append(predictor.register_forward_hook(lambda _, *found, name=name: look(name, *found)))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _predictors(method: Method) -> dict[str, WeightPredictor]:
    layers = fused_layers(method.model).items()
    return {name: layer.predictor for name, layer in layers if layer.predictor is not None}
