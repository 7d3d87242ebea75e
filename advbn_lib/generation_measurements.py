"""What is measured of a generator, of an encoder into its codes, and of training on mixes that it makes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from advbn_lib import encoding_bench, generator_bench, stylegan_mixing_bench
from advbn_lib.measuring import Job, Measurement, Outcome
from advbn_lib.provenance import code_hash


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


def _stylegan_mixing(method: str) -> Measurement:
    """``stylegan_advmix`` and so on: Color-MNIST under bias, mixed by the generator, with one of the methods."""
    modules, benches = ("advbn_lib.stylegan_mixing_bench",), stylegan_mixing_bench.BENCHES

    def measure(job: Job) -> Outcome:
        run = f"{job.preset}-s{job.seed}"
        ran = stylegan_mixing_bench.run_stylegan_mixing_bench(
            benches[job.preset], method, job.seed, job.device, code_hash(modules), job.runs_folder / f"stylegan_{method}" / run,
            job.runs_folder / "stylegan" / job.preset, job.show_progress,
        )  # fmt: skip
        return Outcome(ran.metrics, ran.curves, ran.cost, ran.data, ran.weights)

    return Measurement(
        f"stylegan_{method}", f"Color-MNIST under bias, mixed by a StyleGAN: {stylegan_mixing_bench.ABOUT[method]}",
        tuple(benches), lambda preset: {"method": method, **asdict(benches[preset])}, modules, measure, group="mixing",
    )  # fmt: skip


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
    *map(_stylegan_mixing, stylegan_mixing_bench.METHODS),
)  # fmt: skip
