"""A generator of coloured digits: trained, and judged in the features of a classifier that is trained beside it.

Figures without a scale say little, so each is taken four times: of the generator's pictures, of such that have the coarse styles of
one w and the fine styles of another, of real pictures that it was trained on (as good as a generator can be), and of an untrained
generator's. The measures are of :mod:`advbn_lib.generative_metrics`; one more is of this book, :func:`colour_from_class`: may one
tell a digit by its colour?
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advbn_lib.data.colour_mnist import UNBIASED, ColouredDigits, coloured, coloured_digits
from advbn_lib.data.digits import load_digits
from advbn_lib.data.images import ImageSet
from advbn_lib.gan_training import GANHistory, GANSchedule, new_networks, train_gan
from advbn_lib.generative_metrics import classifier_features, collect, compare, made_pictures, real_pictures
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.models.stylegan import Generator, GeneratorConfig, save_generator
from advbn_lib.modes import evaluating
from advbn_lib.provenance import state_checksum
from advbn_lib.style_encoding import mix
from advbn_lib.style_splitting import ink_colour, train_label_classifier
from advbn_lib.training import Schedule

JUDGED_AT = "layer4"  # of DigitCNN: its last features
SURE = 0.9  # a probability; the judge is sure of a picture above it


@dataclass(frozen=True)
class GeneratorBench:
    """The sizes.

    Args:
        data_set: ``"mnist"``, or scikit-learn's ``"digits"`` for smoke tests; in colours that say nothing about the digit.
        config, schedule: of the generator.
        judge_width, judge_schedule: of the classifier.
        pictures: how many of each kind are judged; the first of the training and of the test set.
    """

    data_set: Literal["mnist", "digits"]
    config: GeneratorConfig
    schedule: GANSchedule
    judge_width: int
    judge_schedule: Schedule
    pictures: int


@dataclass(frozen=True)
class GeneratorRun:
    """What a run gave; see :class:`advbn_lib.records.Record`. ``generator`` is the trained one."""

    generator: Generator
    metrics: dict[str, Any]
    curves: dict[str, list[float]]
    cost: dict[str, float]
    data: dict[str, Any]
    weights: dict[str, Any]


def unbiased_digits(data_set: Literal["mnist", "digits"], split: Literal["train", "test"]) -> ColouredDigits:
    """Digits in colours drawn evenly from all there are. Always the same ones: a generator's seed does not change its data.

    Raises:
        DataError: the data are missing.
    """
    if data_set == "mnist":
        return coloured_digits(split, UNBIASED)
    digits = load_digits(split)
    return coloured(digits.images[:, 0].contiguous(), digits.labels, split, UNBIASED)


def train_judge(
    images: ImageSet, width: int, schedule: Schedule, device: torch.device, folder: Path | None = None, show_progress: bool = True
) -> DigitCNN:  # fmt: skip
    """A classifier of coloured digits whose colours say nothing, in eval mode. Its seed is always 0: one judge for all.

    Args:
        folder: for its checkpoint.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = DigitCNN(width, len(images.classes), images.images.shape[-1])
    network = network.to(device, memory_format=torch.channels_last)
    checkpoint = folder and folder / f"judge-{images.checksum[:12]}-{width}.pt"
    return train_label_classifier(network, images, schedule, 0, checkpoint=checkpoint, show_progress=show_progress)


def train_generator(
    bench: GeneratorBench, seed: int, device: torch.device, folder: Path | None = None, show_progress: bool = True
) -> tuple[Generator, GANHistory]:
    """The bench's generator; a finished training in ``folder`` is not repeated. See :func:`advbn_lib.gan_training.train_gan`."""
    images = unbiased_digits(bench.data_set, "train").images
    trained = train_gan(
        images, bench.config, bench.schedule, seed, device, folder, sample_every=500, show_progress=show_progress
    )
    return trained.generator, trained.history


def run_generator_bench(
    bench: GeneratorBench, seed: int, device: torch.device, folder: Path | None = None, show_progress: bool = True
) -> GeneratorRun:
    """Train a generator and judge it.

    Args:
        folder: for checkpoints, sample grids, and at the end ``generator.safetensors``; None: nothing is kept.
    """
    train_set, test = (unbiased_digits(bench.data_set, split).images for split in ("train", "test"))
    generator, history = train_generator(bench, seed, device, folder, show_progress)
    judge = train_judge(train_set, bench.judge_width, bench.judge_schedule, device, folder, show_progress)
    untrained, _ = new_networks(bench.config, seed, device)
    looked_at = {
        "made": lambda: made_pictures(generator, bench.pictures, seed),
        "mixed": lambda: mixed_pictures(generator, bench.pictures, seed),
        "real": lambda: real_pictures(train_set.first(bench.pictures)),
        "untrained": lambda: made_pictures(untrained, bench.pictures, seed),
    }
    features = classifier_features(judge, JUDGED_AT, test)
    wanted = collect(features, real_pictures(test.first(bench.pictures)))
    metrics = {
        kind: compare(wanted, collect(features, pictures())) | judged(judge, test, pictures())
        for kind, pictures in looked_at.items()
    }
    data = {images.name: {"images": len(images), "sha256": images.checksum} for images in (train_set, test)}
    checksum = state_checksum(generator.state_dict())
    if folder is not None:
        about = {"images": train_set.name, "images_sha256": train_set.checksum, "seed": seed, "steps": history.step}
        save_generator(folder / "generator.safetensors", generator, about)
    weights = {"source": f"trained from random weights, seed {seed}", "sha256": checksum}
    cost = {"train_seconds": round(history.seconds, 2)}
    return GeneratorRun(generator, {"generator": metrics}, history.curves, cost, data, weights)


@torch.no_grad()
def mixed_pictures(generator: Generator, count: int, seed: int, batch_size: int = 250) -> Iterator[Tensor]:
    """As :func:`~advbn_lib.generative_metrics.made_pictures`, but the first half of the styles is of one w, the other of a second."""
    device = generator.mean_w.device
    draws = torch.Generator(device).manual_seed(seed)
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        z = torch.randn(2 * size, generator.config.latent, generator=draws, device=device)
        coarse, fine = generator.wplus(generator.mapping(z)).chunk(2)
        yield generator.images(mix(coarse, fine, generator.layers // 2), "random", draws, colour=True)


@torch.no_grad()
def judged(network: nn.Module, images: ImageSet, pictures: Iterable[Tensor]) -> dict[str, Any]:
    """What a classifier makes of pictures in [0,1].

    Args:
        images: says how the network's input is normalised.

    Returns:
        ``sure``: share of pictures to which it gives a class with a probability above :data:`SURE`; ``given``: the share of each
        class, by name; ``rarest_class``: the smallest of them; ``colour_from_class``: see there, with the class that it gives.
    """
    device = next(network.parameters()).device
    sure, given, colours = [], [], []
    with evaluating(network):
        for part in pictures:
            part = part.to(device)
            probability, label = network(images.normalise(part)).softmax(1).max(1)
            sure.append(probability > SURE)
            given.append(label)
            colours.append(ink_colour(part))
    given = torch.cat(given)
    shares = (torch.bincount(given, minlength=len(images.classes)).double() / len(given)).tolist()
    return {
        "sure": torch.cat(sure).float().mean().item(),
        "given": dict(zip(images.classes, shares)),
        "rarest_class": min(shares),
        "colour_from_class": colour_from_class(torch.cat(colours), given),
    }


def colour_from_class(colours: Tensor, labels: Tensor) -> float:
    """Share of the variance of colours (N,3) that lies between the classes (labels N): 0 if colour says nothing about the class.

    Channels are taken together. A little more than 0 is chance: (classes - 1) / (N - 1) on average.
    """
    colours = colours.double()
    centred = colours - colours.mean(0)
    total = centred.square().sum()
    between = sum(
        len(members) * members.mean(0).square().sum()
        for label in labels.unique()
        for members in [centred[labels == label]]
    )
    return (between / total.clamp_min(1e-12)).item()


BENCHES: dict[str, GeneratorBench] = {
    "smoke_generator": GeneratorBench(
        "digits", GeneratorConfig(32, latent=8, width=2, mapping_layers=2), GANSchedule(steps=20, batch_size=8),
        judge_width=4, judge_schedule=Schedule(epochs=2, batch_size=64, lr=0.05), pictures=100,
    ),
    "cpu_generator": GeneratorBench(
        "mnist", GeneratorConfig(32), GANSchedule(steps=15_000, batch_size=32, mixing=0.3),
        judge_width=16, judge_schedule=Schedule(epochs=3, batch_size=128, lr=0.05, milestones=(2,), warmup=0.5), pictures=5_000,
    ),
    "gpu_generator": GeneratorBench(
        "mnist", GeneratorConfig(32, width=32), GANSchedule(steps=60_000, batch_size=64, mixing=0.3),
        judge_width=16, judge_schedule=Schedule(epochs=3, batch_size=128, lr=0.05, milestones=(2,), warmup=0.5), pictures=10_000,
    ),
}  # fmt: skip
