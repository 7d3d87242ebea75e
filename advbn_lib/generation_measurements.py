"""What is measured of a generator, of an encoder into its codes, and of training on mixes that it makes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from advbn_lib import encoding_bench, generator_bench
from advbn_lib.measuring import Job, Measurement, Outcome


def _generator(job: Job) -> Outcome:
    folder = job.runs_folder / "generator" / f"{job.preset}-s{job.seed}"
    bench = generator_bench.BENCHES[job.preset]
    ran = generator_bench.run_generator_bench(bench, job.seed, job.device, folder, job.show_progress)
    return Outcome(ran.metrics, ran.curves, ran.cost, ran.data, ran.weights)


def _encoding(job: Job) -> Outcome:
    folder = job.runs_folder / "encoding" / f"{job.preset}-s{job.seed}"
    bench = encoding_bench.BENCHES[job.preset]
    ran = encoding_bench.run_encoding_bench(bench, job.seed, job.device, folder, job.show_progress)
    return Outcome(ran.metrics, ran.curves, ran.cost, ran.data, ran.weights)


def _encoding_config(preset: str) -> dict[str, Any]:
    bench = encoding_bench.BENCHES[preset]
    return {**asdict(bench), "trained": asdict(generator_bench.BENCHES[bench.generator])}


GENERATION_MEASUREMENTS = (
    Measurement(
        "generator", "a StyleGAN of coloured digits: how near its pictures are to real ones, and is their colour independent?",
        tuple(generator_bench.BENCHES), lambda preset: asdict(generator_bench.BENCHES[preset]),
        ("advbn_lib.generator_bench",), _generator,
    ),
    Measurement(
        "encoding", "real digits in the generator's codes: how near, and which cut parts the digit from its colour?",
        tuple(encoding_bench.BENCHES), _encoding_config, ("advbn_lib.encoding_bench",), _encoding,
    ),
)  # fmt: skip
