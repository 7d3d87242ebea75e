"""What gives a record and is no training of a classifier: the loader's speed, the adversary's looks, detection, attacks, ..."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from advbn_lib import (
    arena_cost,
    benchmarks,
    detection_bench,
    digits_arena,
    mixing_bench,
    mixing_methods,
    records,
    same_numbers,
    segmentation_bench,
    smiles_bench,
    step_cost,
)
from advbn_lib.appearance_study import StudyConfig, study
from advbn_lib.attack_measurements import ATTACK_MEASUREMENTS
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.data.sets import load_images
from advbn_lib.decoder import DecoderConfig
from advbn_lib.digits_presets import DIGITS_PRESETS
from advbn_lib.experiments import FROM_SCRATCH
from advbn_lib.generation_measurements import GENERATION_MEASUREMENTS
from advbn_lib.measuring import Job, Measurement, Outcome
from advbn_lib.presets import PRESETS
from advbn_lib.provenance import code_hash, git_state, hardware, peak_memory_mib, versions
from advbn_lib.running import UNFLIPPED, check_seed, prepare, start_network
from advbn_lib.task_runs import ABOUT, METHODS, run_bench
from advbn_lib.training import Schedule

# ---- the loader's speed --------------------------------------------------------------------

SPEED_DATA = {"smoke": "digits", "cpu": "cifar10"}


def _loader_speed(job: Job) -> Outcome:
    measured = benchmarks.loader_speed(load_images(SPEED_DATA[job.preset], "train"), job.seed)
    return Outcome({"loader_speed": measured})


def _speed_config(preset: str) -> dict[str, Any]:
    sizes = {"batch_size": benchmarks.BATCH, "images": benchmarks.IMAGES, "rounds": benchmarks.ROUNDS}
    return {"data": SPEED_DATA[preset], **sizes}


# ---- the cost of a step --------------------------------------------------------------------

FROM_SCRATCH_NAMES = ("pretrain", *(experiment.name for experiment in FROM_SCRATCH))
COST_CODE = (
    "advbn_lib.step_cost", "advbn_lib.methods.feature_controls", "advbn_lib.methods.advprop", "advbn_lib.tasks.classification",
    "advbn_lib.models.cifar_resnet",
)  # fmt: skip
COST_PRESETS = ("smoke", "cpu_scratch", "gpu_scratch")


def _step_cost(job: Job) -> Outcome:
    methods, size = {}, PRESETS[job.preset]
    train_set = load_images(size.data, "train").first(size.pretraining_images)
    for name in FROM_SCRATCH_NAMES:
        start = prepare(name, job.preset, job.seed, str(job.device))
        network, weights = start_network(start)
        network = network.to(job.device, memory_format=torch.channels_last)
        methods[name] = start.experiment.method.build(network, train_set).to(job.device)
    loader = DeviceLoader(train_set, size.pretraining.batch_size, job.seed, job.device, flip=size.data not in UNFLIPPED)
    images, labels = next(iter(loader.epoch(0)))
    measured = step_cost.step_cost(methods, images, labels, plain="pretrain", rounds=step_cost.ROUNDS)
    data = {train_set.name: {"images": len(train_set), "sha256": train_set.checksum}}
    return Outcome({"step_cost": measured}, data=data, weights=weights)


def _cost_config(preset: str) -> dict[str, Any]:
    size = PRESETS[preset]
    methods = {experiment.name: asdict(experiment.method) for experiment in FROM_SCRATCH}
    sizes = {"batch_size": size.pretraining.batch_size, "rounds": step_cost.ROUNDS}
    return {"data": size.data, "network": size.network, **sizes, "methods": methods}


# ---- the adversary's looks -----------------------------------------------------------------

DECODERS = {
    "smoke": DecoderConfig(
        width=16, images=640, flip=False,
        schedule=Schedule(epochs=4, batch_size=32, lr=0.1, milestones=(3,), warmup=0.5, weight_decay=0.0),
    ),
    "cpu": DecoderConfig(),
    "gpu": DecoderConfig(width=64, images=None),
}  # fmt: skip
STUDIES = {
    "smoke": StudyConfig(layers=("layer1",), batch_size=64, batches=2, decoder=DECODERS["smoke"]),
    "cpu": StudyConfig(decoder=DECODERS["cpu"]),
    "gpu": StudyConfig(decoder=DECODERS["gpu"], batches=40),
}


def _appearance(job: Job) -> Outcome:
    preset = PRESETS[job.preset]
    start = prepare(
        "untouched", job.preset, job.seed, str(job.device),
        records_folder=job.records_folder, runs_folder=job.runs_folder, show_progress=job.show_progress,
    )  # fmt: skip
    network, weights = start_network(start)
    train_set, test_set = (load_images(preset.data, split) for split in ("train", "test"))
    tables, curves = study(
        network.to(job.device).eval(), train_set, test_set, STUDIES[job.preset], job.seed,
        job.runs_folder / "decoders", job.show_progress,
    )  # fmt: skip
    data = {images.name: {"images": len(images), "sha256": images.checksum} for images in (train_set, test_set)}
    return Outcome(tables, curves, data=data, weights=weights)


def _study_config(preset: str) -> dict[str, Any]:
    start = {name: getattr(PRESETS[preset], name) for name in ("data", "network", "start")}
    return {**start, **asdict(STUDIES[preset])}


# ---- detection and segmentation ------------------------------------------------------------

BENCHES = {"detection": detection_bench, "segmentation": segmentation_bench}
BENCH_CODE = ("advbn_lib.task_runs", "advbn_lib.methods.afan", "advbn_lib.methods.feature_controls")


def _bench_measurement(task: str, method: str) -> Measurement:
    """``detection_afan`` and so on: a task's bench, trained by one of the methods."""
    benches, modules = BENCHES[task].BENCHES, (BENCHES[task].__name__, *BENCH_CODE)
    name = f"{task}_{method}"

    def measure(job: Job) -> Outcome:
        folder = job.runs_folder / name / f"{job.preset}-s{job.seed}"
        ran = run_bench(
            benches[job.preset], method, job.seed, job.device, code_hash(modules), folder, job.show_progress
        )
        curves = {
            "clean_loss": [clean for clean, _ in ran.history.losses],
            "adversarial_loss": [adversarial for _, adversarial in ran.history.losses],
        }
        cost = {"train_seconds": round(ran.history.seconds, 2), "test_seconds": round(ran.test_seconds, 2)}
        return Outcome(ran.metrics, curves, cost, ran.data, ran.weights)

    return Measurement(
        name, f"{task} {ABOUT[method]}", tuple(benches), lambda preset: {"method": method, **asdict(benches[preset])},
        modules, measure, group=task,
    )  # fmt: skip


# ---- one method on one bench: mixing, smiles, all methods on coloured digits -----------------


def _on_bench(
    group: str, about: str, method: str, benches: Mapping[str, Any], run: Callable[..., Any], config: Callable[[str], dict[str, Any]],
) -> Measurement:  # fmt: skip
    """``mixing_advmix`` and so on: a bench with one of its methods.

    Args:
        run: from bench, method, seed, device, code, folder and whether to show progress to metrics, curves, cost, data and weights.
        config: what is chosen at a preset, besides the method.
    """
    modules, name = (run.__module__,), f"{group}_{method}"

    def measure(job: Job) -> Outcome:
        folder = job.runs_folder / name / f"{job.preset}-s{job.seed}"
        ran = run(benches[job.preset], method, job.seed, job.device, code_hash(modules), folder, job.show_progress)
        return Outcome(ran.metrics, ran.curves, ran.cost, ran.data, ran.weights)

    return Measurement(
        name, about, tuple(benches), lambda preset: {"method": method, **config(preset)}, modules, measure, group=group
    )


def _mixing_measurement(method: str) -> Measurement:
    benches = mixing_bench.BENCHES
    return _on_bench(
        "mixing", f"Color-MNIST under bias: {mixing_methods.ABOUT[method]}", method, benches, mixing_bench.run_mixing_bench,
        lambda preset: asdict(benches[preset]),
    )  # fmt: skip


def _smiles_measurement(method: str) -> Measurement:
    benches = smiles_bench.BENCHES
    return _on_bench(
        "smiles", f"smiles in planted light: {smiles_bench.ABOUT[method]}", method, benches, smiles_bench.run_smiles_bench,
        lambda preset: asdict(benches[preset]),
    )  # fmt: skip


def _digits_measurement(method: str) -> Measurement:
    arenas = DIGITS_PRESETS

    def config(preset: str) -> dict[str, Any]:
        own = {**asdict(arenas[preset]), "parts": [asdict(part) for part in arenas[preset].schedules(method)]}
        del own["epochs"]  # other methods', too; its own are those of its parts
        return own

    about = f"coloured digits, all methods side by side: {digits_arena.ABOUT[method]}"
    return _on_bench("digits", about, method, arenas, digits_arena.run_digits_arena, config)


# ---- all of them ---------------------------------------------------------------------------

MEASUREMENTS = {
    measurement.name: measurement
    for measurement in (
        Measurement(
            "loader_speed", "training images a second of our loader and of torch's, on the CPU",
            tuple(SPEED_DATA), _speed_config, ("advbn_lib.benchmarks",), _loader_speed, on_gpu=False, repeatable=False,
        ),
        Measurement(
            "step_cost", "seconds of a training step of A-FAN, its controls and AdvProp, beside plain training",
            COST_PRESETS, _cost_config, COST_CODE, _step_cost, repeatable=False,
        ),
        Measurement(
            "arena_step_cost", "seconds of a training step of every method of an arena: how many epochs the same time is worth",
            arena_cost.AT, arena_cost.config, arena_cost.CODE, arena_cost.measure, repeatable=False,
        ),
        Measurement(
            "appearance", "decoded worst-case features beside other changes of the same size: is it style or content?",
            tuple(STUDIES), _study_config, ("advbn_lib.appearance_study", "advbn_lib.models.cifar_resnet"), _appearance,
            headline=("pixel_change", "style_change", "edge_correlation", "accuracy"),
        ),
        *ATTACK_MEASUREMENTS,
        *(_bench_measurement(task, method) for task in BENCHES for method in METHODS),
        *map(_mixing_measurement, mixing_bench.METHODS),
        *map(_smiles_measurement, smiles_bench.METHODS),
        *map(_digits_measurement, digits_arena.METHODS),
        *GENERATION_MEASUREMENTS,
    )
}  # fmt: skip


def run_measurement(name: str, job: Job, again: bool = False) -> records.Record:
    """Measure, and write the record; unless ``again``, one of the same configuration and code is returned as it is.

    What the measurement kept in a folder of its own, trained weights above all, is used again; but with ``again`` the folder is moved
    aside, to a name that ends in ``.before``, and made anew.

    Raises:
        ValueError: no such measurement, or not at this preset.
    """
    measurement = MEASUREMENTS.get(name)
    if measurement is None or job.preset not in measurement.presets:
        possible = "; ".join(f"{m.name} at presets {', '.join(m.presets)}" for m in MEASUREMENTS.values())
        raise ValueError(f"measurements are {possible}; got {name!r} at {job.preset!r}")
    check_seed(job.seed)
    if not measurement.on_gpu:
        job = replace(job, device=torch.device("cpu"))
    config, code = config_of(name, job.preset, job.seed), code_hash(measurement.modules)
    path = records.path_of(name, job.preset, job.seed, job.records_folder)
    if measurement.repeatable and not again and path.exists():
        old = records.read(path)
        if old.config == config and same_numbers.today(old.code["hash"]) == code:
            return old
    if again:
        _move_aside(job.runs_folder / name / f"{job.preset}-s{job.seed}")
    started = time.perf_counter()
    outcome = measurement.measure(job)
    wall = round(time.perf_counter() - started, 2)
    cost = {**outcome.cost, "wall_seconds": wall, "peak_memory_mib": peak_memory_mib(job.device)}
    identity = {"config": config, "code": code, "data": outcome.data, "weights": outcome.weights.get("sha256")}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    record = records.Record(
        experiment=name, preset=job.preset, seed=job.seed, key=key, config=config,
        metrics=outcome.metrics, curves=outcome.curves, cost=cost, hardware=hardware(job.device), versions=versions(),
        code={"hash": code, **git_state()}, data=outcome.data, weights=outcome.weights,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    records.write(record, job.records_folder)
    return record


def _move_aside(folder: Path) -> None:
    """To a name of its own, in place of what was moved there before."""
    if folder.exists():
        before = folder.with_name(f"{folder.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)


def config_of(name: str, preset: str, seed: int) -> dict[str, Any]:
    """What the record of a measurement says was chosen, as JSON."""
    config = {"measurement": name, **MEASUREMENTS[name].config(preset), "seed": seed}
    return json.loads(json.dumps(config))  # tuples become lists, as when read from a file
