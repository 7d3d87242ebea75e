"""Real images in a generator's codes, and where to cut the codes into content and style: measured.

An encoder is trained, test images are encoded and their codes improved step by step; then, for every cut, the styles of images of
different classes are swapped (:mod:`advbn_lib.style_splitting`). Grey times colour, which is an exact decoder of these images, says
what an ideal cut would give with the same judge.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advbn_lib.data.images import ImageSet
from advbn_lib.generator_bench import BENCHES as GENERATOR_BENCHES
from advbn_lib.generator_bench import train_generator, train_judge, unbiased_digits
from advbn_lib.generators import shipped_generator
from advbn_lib.mixing import ColourDecoder
from advbn_lib.models.stylegan import Generator
from advbn_lib.modes import evaluating
from advbn_lib.provenance import state_checksum
from advbn_lib.style_codes import CodeSchedule, distances, optimise_codes
from advbn_lib.style_encoder_file import save_encoder
from advbn_lib.style_encoding import (
    EncoderSchedule,
    LayerFeatures,
    PerceptualDistance,
    StyleEncoder,
    encode_images,
    pictures,
    train_encoder,
)
from advbn_lib.style_splitting import SwapMeasurement, ink_colour, measure_cuts, measure_swap, share

PERCEIVED_AT = ("layer1", "layer2", "layer3")  # layers of the judge that the perceptual distance looks at
REFERENCE = 256  # real images that the distance takes its units from


@dataclass(frozen=True)
class EncodingBench:
    """The sizes.

    Args:
        generator: preset of :mod:`advbn_lib.generator_bench`: says data and judge. At ``"cpu_generator"`` the generator that comes
            with the library is taken; at others one is trained.
        encoder, codes: how the encoder is trained, and the codes improved.
        images: how many of the first test images are encoded.
    """

    generator: Literal["smoke_generator", "cpu_generator"]
    encoder: EncoderSchedule
    codes: CodeSchedule
    images: int


@dataclass(frozen=True)
class EncodingRun:
    """What a run gave; see :class:`advbn_lib.records.Record`. ``encoder`` is the trained one."""

    encoder: StyleEncoder
    metrics: dict[str, Any]
    curves: dict[str, list[float]]
    cost: dict[str, float]
    data: dict[str, Any]
    weights: dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """What codes are made with: the frozen generator, its judge, and the distance in the judge's features."""

    generator: Generator
    judge: nn.Module
    distance: PerceptualDistance


def tools_of(generator: str, device: torch.device, folder: Path | None, show_progress: bool = True) -> Tools:
    """Generator and judge of a preset of :mod:`advbn_lib.generator_bench`, and a perceptual distance.

    Args:
        folder: for what is trained; a finished training in it is not repeated.
    """
    bench = GENERATOR_BENCHES[generator]
    train_set = unbiased_digits(bench.data_set, "train").images
    if generator == "cpu_generator":
        network = shipped_generator().to(device)
    else:
        network, _ = train_generator(bench, 0, device, folder, show_progress)
    judge = train_judge(train_set, bench.judge_width, bench.judge_schedule, device, folder, show_progress)
    reference = train_set.first(REFERENCE).to(device).images.float() / 255
    distance = PerceptualDistance(LayerFeatures(judge, PERCEIVED_AT, train_set.normalise), reference).to(device)
    return Tools(network.eval().requires_grad_(False), judge, distance)


def run_encoding_bench(
    bench: EncodingBench, seed: int, device: torch.device, folder: Path | None = None, show_progress: bool = True
) -> EncodingRun:
    """Train an encoder, encode test images, and measure every cut.

    Args:
        seed: of the encoder, and of who is mixed with whom.
        folder: for checkpoints, and at the end ``encoder.safetensors``; None: nothing is kept.
    """
    data_set = GENERATOR_BENCHES[bench.generator].data_set
    tools = tools_of(bench.generator, device, folder, show_progress)
    train_set = unbiased_digits(data_set, "train").images
    test = unbiased_digits(data_set, "test").first(bench.images).to(device)
    started = time.perf_counter()
    encoder, history = train_encoder(
        tools.generator, train_set, tools.distance, bench.encoder, seed, folder, show_progress=show_progress
    )
    trained = time.perf_counter() - started
    first = encode_images(encoder, test.images)
    found = optimise_codes(
        tools.generator, test.images, first, tools.distance, bench.codes, encoder, seed, show_progress=show_progress
    )
    cost = {"train_seconds": round(trained, 2), "test_seconds": round(time.perf_counter() - started - trained, 2)}
    metrics = {
        "encoding": {
            "real": {"accuracy": right_answers(tools.judge, test.images, test.images.images.float() / 255)},
            "encoder": _quality(tools, first, test.images),
            "optimised": _quality(tools, found.codes, test.images),
        },
        "cuts": _all_cuts(tools, {"encoder": first, "optimised": found.codes}, test.images, seed),
        "ideal": summary(
            measure_swap(
                ColourDecoder(), test.grey.unsqueeze(1).float() / 255, test.colours, test.images, tools.judge, seed=seed,
                colours=ink_colour,
            )
        ),
    }  # fmt: skip
    if folder is not None:
        about = {"images": train_set.name, "seed": seed, "schedule": asdict(bench.encoder)}
        save_encoder(folder / "encoder.safetensors", encoder, tools.generator, bench.encoder.width, about)
    data = {images.name: {"images": len(images), "sha256": images.checksum} for images in (train_set, test.images)}
    weights = {"source": "the generator", "sha256": state_checksum(tools.generator.state_dict())}
    curves = {part: [look[part] for look in history] for part in history[0]}
    return EncodingRun(encoder, metrics, curves, cost, data, weights)


def summary(measured: SwapMeasurement) -> dict[str, float]:
    """The figures without their intervals over images: a record's intervals are over seeds."""
    return {name: getattr(measured, name).mean for name in SwapMeasurement.__dataclass_fields__}


@torch.no_grad()
def right_answers(judge: nn.Module, images: ImageSet, made: Tensor) -> float:
    """Share of pictures in [0,1] (N,3,H,W) that the judge gives the images' labels."""
    with evaluating(judge):
        answers = torch.cat([judge(images.normalise(part)).argmax(1) for part in made.split(250)])
    return share(answers == images.labels).mean


@torch.no_grad()
def _quality(tools: Tools, codes: Tensor, images: ImageSet) -> dict[str, float]:
    perceptual, pixel = distances(tools.generator, codes, images.images, tools.distance)
    made = torch.cat([pictures(tools.generator, part).clamp(0, 1) for part in codes.split(250)])
    return {
        "perceptual": perceptual.mean().item(),
        "pixel": pixel.mean().item(),
        "accuracy": right_answers(tools.judge, images, made),
    }


def _all_cuts(tools: Tools, codes: Mapping[str, Tensor], images: ImageSet, seed: int) -> dict[str, Any]:
    return {
        name: {
            str(cut): summary(measured)
            for cut, measured in measure_cuts(
                tools.generator, each, images, tools.judge, seed=seed, colours=ink_colour
            ).items()
        }
        for name, each in codes.items()
    }


BENCHES: dict[str, EncodingBench] = {
    "smoke_generator": EncodingBench(
        "smoke_generator", EncoderSchedule(steps=10, batch_size=8, width=2), CodeSchedule(steps=3, batch_size=32), images=64
    ),
    "cpu_generator": EncodingBench("cpu_generator", EncoderSchedule(steps=2_500), CodeSchedule(steps=50), images=500),
}  # fmt: skip
