"""Run an experiment and write its record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advbn_lib import records
from advbn_lib.checkpoints import read_checkpoint, save_checkpoint
from advbn_lib.data.images import ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.data.sets import load_images
from advbn_lib.data.shifts import parse_shift
from advbn_lib.evaluation import accuracies, family_means
from advbn_lib.experiments import Experiment, Preset, find
from advbn_lib.methods.base import Method
from advbn_lib.models.cifar_resnet import CifarResNet, load_published_weights, resnet18_for_cifar
from advbn_lib.provenance import code_hash, git_state, hardware, peak_memory_mib, state_checksum, versions
from advbn_lib.training import History, precision_on, train
from advbn_lib.weights import published_weights

# What goes into a record's key, beside the method's own module. Not this module, which is about records and folders: what it
# hands on (schedule, seed, starting weights) stands in the configuration.
USED_BY_EVERY_RUN = tuple(
    f"advbn_lib.{name}" for name in ("training", "evaluation", "models.cifar_resnet", "data.sets", "weights")
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment at one preset with one seed, on one device.

    Args:
        records_folder: where records are; None: :func:`advbn_lib.records.default_folder`.
        runs_folder: where checkpoints are kept.
    """

    experiment: Experiment
    preset_name: str
    preset: Preset
    seed: int
    device: torch.device
    records_folder: Path | None = None
    runs_folder: Path = Path("runs")
    show_progress: bool = True

    @property
    def folder(self) -> Path:
        """Its checkpoints."""
        return self.runs_folder / self.experiment.name / f"{self.preset_name}-s{self.seed}"

    @property
    def config(self) -> dict[str, Any]:
        """All that was chosen, as JSON."""
        method = {"kind": self.experiment.method.trains.__name__, **dataclasses.asdict(self.experiment.method)}
        config = {
            "method": method,
            "stage": self.experiment.stage,
            "seed": self.seed,
            **dataclasses.asdict(self.preset),
        }
        return json.loads(json.dumps(config))  # tuples become lists, as when read from a file

    @property
    def code(self) -> str:
        """Hash of the code that it uses."""
        return code_hash([*USED_BY_EVERY_RUN, self.experiment.method.trains.__module__])


def prepare(
    experiment: str, preset: str, seed: int = 0, device: str | None = None, *,
    records_folder: Path | None = None, runs_folder: Path = Path("runs"), show_progress: bool = True,
) -> Run:  # fmt: skip
    """A :class:`Run` by names; on the GPU if there is one and ``device`` is None.

    Raises:
        ValueError: unknown experiment or preset, a seed or a device that cannot be used.
    """
    check_seed(seed)
    found, size = find(experiment, preset)
    return Run(found, preset, size, seed, choose_device(device), records_folder, runs_folder, show_progress)


def run(job: Run, again: bool = False) -> records.Record:
    """Do the run, from its checkpoint on if there is one, and write its record.

    If a record with the same key is there already, it is returned and nothing is run, unless ``again`` is True. The
    checkpoint is removed when the record is written; the final weights stay, in ``final.pt``.
    """
    started = time.perf_counter()
    train_set, test_set = (load_images(job.preset.data, split) for split in ("train", "test"))
    train_set, test_set = train_set.first(job.preset.train_images), test_set.first(job.preset.test_images)
    network, weights = start_network(job)
    data = {images.name: {"images": len(images), "sha256": images.checksum} for images in (train_set, test_set)}
    key = _key(job, data, weights)
    path = records.path_of(job.experiment.name, job.preset_name, job.seed, job.records_folder)
    if path.exists() and not again and (old := records.read(path)).key == key:
        return old
    torch.manual_seed(job.seed)
    method = job.experiment.method.build(network.to(job.device, memory_format=torch.channels_last)).to(job.device)
    checkpoint = job.folder / f"training-{key[:12]}.pt"  # by its key: one of an older configuration is not in the way
    history = _train(job, method, train_set, checkpoint, key)
    trained = time.perf_counter()
    accuracy = accuracies(method, test_set.to(job.device), map(parse_shift, job.preset.shifts), job.show_progress)
    tested = time.perf_counter()
    save_checkpoint(job.folder / "final.pt", {"model": method.model}, {}, key)
    cost = {
        "train_seconds": round(history.seconds, 2),
        "test_seconds": round(tested - trained, 2),
        "wall_seconds": round(tested - started, 2),
        "peak_memory_mib": peak_memory_mib(job.device),
    }
    record = _record(job, key, accuracy, history, cost, data, weights)
    records.write(record, job.records_folder)
    checkpoint.unlink(missing_ok=True)
    return record


def _record(
    job: Run, key: str, accuracy: dict, history: History, cost: dict, data: dict, weights: dict
) -> records.Record:
    return records.Record(
        experiment=job.experiment.name,
        preset=job.preset_name,
        seed=job.seed,
        key=key,
        config=job.config,
        metrics={"accuracy": accuracy, "mean": {branch: family_means(table) for branch, table in accuracy.items()}},
        curves={
            "clean_loss": [clean for clean, _ in history.losses],
            "adversarial_loss": [adversarial for _, adversarial in history.losses],
        },
        cost=cost,
        hardware={**hardware(job.device), "precision": str(precision_on(job.device)).removeprefix("torch.")},
        versions=versions(),
        code={"hash": job.code, **git_state()},
        data=data,
        weights=weights,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take.

    Raises:
        ValueError: it is not from 0 to 2**31 - 1.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"a seed goes from 0 to {2**31 - 1}, got {seed}")


def choose_device(name: str | None = None) -> torch.device:
    """The device of this name; without one, the GPU if there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"no device {name!r}: say cpu, cuda or cuda:NUMBER") from error
    if device.type == "cuda" and (not gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"no device {name!r}: torch sees {torch.cuda.device_count()} GPU(s) here")
    return device


def start_network(job: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The network that the run starts from, and what its weights are (``source`` and ``sha256``)."""
    torch.manual_seed(job.seed)
    network = new_network(job.preset.network)
    if job.experiment.stage == "pretraining":
        source = f"new, seed {job.seed}"
    elif job.preset.start == "published":
        path = published_weights(job.preset.network)
        load_published_weights(network, path)
        source = path.name
    else:
        network.load_state_dict(_pretrained(job))
        source = f"pretrain, {job.preset_name}, seed {job.seed}"
    return network, {"source": source, "sha256": state_checksum(network.state_dict())}


def new_network(name: str) -> nn.Module:
    """``"resnet8"`` (for smoke tests), ``"resnet20"`` and so on (CIFAR ResNets), or ``"resnet18"`` with a 32x32 stem; 10 classes."""
    if name == "resnet18":
        return resnet18_for_cifar()
    return CifarResNet(int(name.removeprefix("resnet")))


def is_current(job: Run, record: records.Record) -> bool:
    """Whether the record is of this configuration and this code (data and starting weights are compared when it runs)."""
    return record.config == job.config and record.code["hash"] == job.code


def _pretrained(job: Run) -> dict[str, torch.Tensor]:
    experiment, _ = find("pretrain", job.preset_name)
    before = dataclasses.replace(job, experiment=experiment)
    record, final = run(before), before.folder / "final.pt"
    if not final.exists() or read_checkpoint(final)["key"] != record.key:
        record = run(before, again=True)  # the record is here (it is committed), but not the weights
    return read_checkpoint(final)["parts"]["model"]


def _train(job: Run, method: Method, train_set: ImageSet, checkpoint: Path, key: str) -> History:
    schedule = {"none": None, "pretraining": job.preset.pretraining, "fine_tuning": job.preset.fine_tuning}[
        job.experiment.stage
    ]
    if schedule is None:
        return History()
    loader = DeviceLoader(train_set, schedule.batch_size, job.seed, job.device, flip=job.preset.data != "digits")
    return train(method, loader, schedule, checkpoint, key, show_progress=job.show_progress)


def _key(job: Run, data: dict[str, Any], weights: dict[str, Any]) -> str:
    identity = {"config": job.config, "code": job.code, "data": data, "weights": weights["sha256"]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
