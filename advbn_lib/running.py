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

from advbn_lib import attack_agreement, records, same_numbers
from advbn_lib.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from advbn_lib.confusion import accuracy_of, balanced_accuracy_of, commonest_answer_of, confusion
from advbn_lib.data.cifar10c import load_cifar10c, stored_checksum
from advbn_lib.data.frost import frost_overlays
from advbn_lib.data.images import ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.data.sets import DATA_SETS, load_images
from advbn_lib.data.shifts import Shift, parse_shift
from advbn_lib.evaluation import accuracies, family_means, shift_means
from advbn_lib.experiments import Experiment, find
from advbn_lib.fused_bn import unfuse_batch_norms
from advbn_lib.methods.base import Method
from advbn_lib.models.cifar_resnet import CifarResNet, load_published_weights, resnet18_for_cifar
from advbn_lib.models.efficientnet import efficientnet_b0_for_cifar
from advbn_lib.presets import ArenaPreset, AttackPreset, Preset
from advbn_lib.provenance import code_hash, git_state, hardware, peak_memory_mib, state_checksum, versions
from advbn_lib.robustness import strength_test
from advbn_lib.side_by_side import side_by_side
from advbn_lib.training import History, Schedule, precision_on, train
from advbn_lib.training_cost import TrainingCost, metered
from advbn_lib.weights import published_weights

# What decides about trained weights, and what besides about a record: the method's own module comes on top. Not this module, which
# is about records and folders: what it hands on (schedule, seed, starting weights) stands in the configuration. Nor the readers
# of data sets: a set's checksum says what was read.
TRAINING_CODE = ("advbn_lib.training", "advbn_lib.data.loader", "advbn_lib.models.cifar_resnet", "advbn_lib.weights")
TESTING_CODE = ("advbn_lib.evaluation",)
# A mirrored digit is none, or another one.
UNFLIPPED = ("digits", "svhn", "mnist", *(name for name in DATA_SETS if name.startswith("colour_mnist/")))
FOR_CIFAR = {"resnet18": resnet18_for_cifar, "efficientnet_b0": efficientnet_b0_for_cifar}  # networks for 32x32 images


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
        """Its checkpoints; a preset that only tests on other files (``cpu_stored``) shares those of the one it is made from."""
        return self.runs_folder / self.experiment.name / f"{self.preset_name.removesuffix('_stored')}-s{self.seed}"

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
        del config["about"]  # words
        return json.loads(json.dumps(config))  # tuples become lists, as when read from a file

    @property
    def precision(self) -> torch.dtype:
        """What convolutions compute in, in training and in tests."""
        return torch.float32 if self.preset.precision == "float32" else precision_on(self.device)

    @property
    def schedule(self) -> Schedule | None:
        """None: nothing is trained."""
        return {"none": None, "pretraining": self.preset.pretraining, "fine_tuning": self.preset.fine_tuning}[
            self.experiment.stage
        ]

    @property
    def training_code(self) -> str:
        """Hash of the code that its weights depend on."""
        return code_hash([*TRAINING_CODE, *self._method_code])

    @property
    def code(self) -> str:
        """Hash of the code that its numbers depend on."""
        elsewhere = ["advbn_lib.confusion"] if self.preset.elsewhere else []
        attacked = ["advbn_lib.robustness"] if isinstance(self.preset, AttackPreset) else []
        beside = ["advbn_lib.side_by_side"] if isinstance(self.preset, ArenaPreset) else []
        return code_hash([*TRAINING_CODE, *TESTING_CODE, *elsewhere, *attacked, *beside, *self._method_code])

    @property
    def _method_code(self) -> tuple[str, ...]:
        method = self.experiment.method
        return (method.trains.__module__, *getattr(method, "built_with", ()))


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained method.

    Attributes:
        history: of its losses. key: equal keys, equal weights.
        data: what it was trained on. weights: what it started from.
        hardware, versions, peak_memory_mib: of the training; the peak is that of the process.
        cost: of the training alone; its numbers are None for weights of before they were measured.
    """

    method: Method
    history: History
    key: str
    data: dict[str, Any]
    weights: dict[str, Any]
    hardware: dict[str, Any]
    versions: dict[str, str]
    peak_memory_mib: float | None
    cost: TrainingCost


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
    """Train, test, and write the record; from a checkpoint on if there is one.

    If there is a record of the same configuration, code and data, and of the same starting weights if those are in the runs folder,
    it is returned and nothing is run. If the training was done before with the same key, its weights (``final.pt``) are taken and
    only tested: a new shift costs no new training. Unless ``again`` is True.

    Raises:
        DataError: something that the tests need is missing. Said before the training, as the next.
        ImportError: so is the library that another attack comes from.
    """
    path = records.path_of(job.experiment.name, job.preset_name, job.seed, job.records_folder)
    shifts, tests = _shifts(job.preset), test_sets(job)
    described = {images.name: _describe(images) for images in tests.values()}
    if job.preset.corruptions == "stored":
        described |= {"CIFAR-10-C, stored files": {"sha256": stored_checksum()}}
    if isinstance(job.preset, ArenaPreset) and job.preset.beside.apgd_images:
        attack_agreement.libraries()
    if path.exists() and not again and _stands(job, old := records.read(path), described):
        return old
    trained = train_method(job, again)
    started = time.perf_counter()
    main, *elsewhere = tests.values()
    table = accuracies(
        trained.method, main, shifts, job.show_progress, parts=job.preset.parts, precision=job.precision,
        stored=load_cifar10c if job.preset.corruptions == "stored" else None,
    )  # fmt: skip
    more = _test_elsewhere(trained.method, elsewhere, table, job.precision)
    if isinstance(job.preset, AttackPreset):
        more |= strength_test(trained.method, main, job.preset.attacked, job.show_progress)
    if isinstance(job.preset, ArenaPreset):
        more |= side_by_side(trained.method, main, job.preset.beside, job.precision)
    record = _record(job, trained, table, more, described, round(time.perf_counter() - started, 4))
    records.write(record, job.records_folder)
    return record


def train_method(job: Run, again: bool = False) -> Trained:
    """The experiment's method, trained; read from ``final.pt`` if that was written by the same training, unless ``again``."""
    train_set, (network, weights) = training_images(job), start_network(job)
    key = _training_key(job, train_set, weights)
    torch.manual_seed(job.seed)
    network = network.to(job.device, memory_format=torch.channels_last)
    method = job.experiment.method.build(network, train_set).to(job.device)
    final, parts = job.folder / "final.pt", {"model": method.model}
    if again or not final.exists() or read_checkpoint(final)["key"] != key:
        history, cost = _train(job, method, train_set, key)
        done = {"history": dataclasses.asdict(history), "hardware": _machine(job), "memory": peak_memory_mib(job.device)}
        done["versions"] = versions()
        done["cost"] = dataclasses.asdict(cost)
        save_checkpoint(final, parts, done, key)
        _checkpoint(job, key).unlink(missing_ok=True)
    done = load_checkpoint(final, parts, key)
    data = {train_set.name: _describe(train_set)}
    cost = TrainingCost(**done["cost"]) if "cost" in done else TrainingCost(None, None)
    return Trained(
        method, History(**done["history"]), key, data, weights, done["hardware"], done.get("versions", versions()), done["memory"], cost
    )  # fmt: skip


def training_images(job: Run) -> ImageSet:
    """What the run trains on."""
    images, size = load_images(job.preset.data, "train"), job.preset
    if job.experiment.stage == "pretraining":
        return images.first(size.pretraining_images)
    return images.first(size.train_images, size.first_train_image)


def test_sets(job: Run) -> dict[str, ImageSet]:
    """What the run is tested on, by name: first the set that is shifted, then those of ``elsewhere``, on the run's device."""
    main = load_images(job.preset.data, "test").first(job.preset.test_images)
    sets = [main, *(load_images(name, "test") for name in job.preset.elsewhere)]
    return {images.name: images.to(job.device) for images in sets}


def _shifts(preset: Preset) -> list[Shift]:
    """Those of the preset. A mean without frost would stand beside means with it, so all of them can be made, or there is an error."""
    shifts = [parse_shift(text) for text in preset.shifts]
    if preset.corruptions == "computed" and any(shift.name == "frost" for shift in shifts):
        frost_overlays()
    return shifts


def _stands(job: Run, old: records.Record, described: dict[str, Any]) -> bool:
    """Whether the record is what the run would write, as far as can be told without training what it starts from."""
    train_set = training_images(job)
    if not is_current(job, old) or old.data != {train_set.name: _describe(train_set), **described}:
        return False
    if old.hardware.get("precision") != str(job.precision).removeprefix("torch."):
        return False
    before = _begins_with(job)
    if before and not _is_trained(_other(job, before)):
        return True
    return old.weights == start_network(job)[1]


def _is_trained(job: Run) -> bool:
    """Whether ``train_method`` would find its weights, and those that it starts from, and train nothing."""
    before, final = _begins_with(job), job.folder / "final.pt"
    if not final.exists() or (before and not _is_trained(_other(job, before))):
        return False
    return read_checkpoint(final)["key"] == _training_key(job, training_images(job), start_network(job)[1])


def _test_elsewhere(
    method: Method, sets: list[ImageSet], table: dict[str, dict[str, float]], precision: torch.dtype
) -> dict[str, dict[str, dict[str, float]]]:
    """Add accuracies on other test sets to ``table``; return what says more of sets whose classes are not equally frequent."""
    balance = {name: {branch: {} for branch in table} for name in ("balanced", "commonest_answer")} if sets else {}
    for images in sets:
        for branch, counts in confusion(method, images, precision).items():
            table[branch][_domain(images)] = accuracy_of(counts)
            balance["balanced"][branch][_domain(images)] = balanced_accuracy_of(counts)
            balance["commonest_answer"][branch][_domain(images)] = commonest_answer_of(counts)
    return balance


def _record(
    job: Run, trained: Trained, table: dict[str, dict[str, float]], more: dict[str, Any], tested_on: dict[str, Any],
    test_seconds: float,
) -> records.Record:  # fmt: skip
    losses, train_seconds = trained.history.losses, round(trained.history.seconds, 2)
    computing = trained.cost.cpu_seconds
    return records.Record(
        experiment=job.experiment.name,
        preset=job.preset_name,
        seed=job.seed,
        key=_key(job, trained.key, tested_on),
        config=job.config,
        metrics={
            "mean": {branch: family_means(shares) for branch, shares in table.items()},
            "shift": {branch: shift_means(shares) for branch, shares in table.items()},
            **more,
            "accuracy": table,
        },
        curves={
            "clean_loss": [clean for clean, _ in losses],
            "adversarial_loss": [adversarial for _, adversarial in losses],
        },
        cost={
            "train_seconds": train_seconds,
            "train_cpu_seconds": None if computing is None else round(computing, 2),
            "test_seconds": test_seconds,
            "wall_seconds": round(train_seconds + test_seconds, 4),
            "peak_memory_mib": trained.peak_memory_mib,
            "training_memory_mib": trained.cost.memory_mib,
        },
        hardware=_of_both(trained.hardware, _machine(job)),
        versions=_of_both(trained.versions, versions()),
        code={"hash": job.code, **git_state()},
        data={**trained.data, **tested_on},
        weights=trained.weights,
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
        ValueError: there is no such device here, or it is neither CPU nor CUDA.
    """
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if gpu else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"no device {name!r}: say cpu, cuda or cuda:NUMBER") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"runs are made on cpu or cuda, not on {name!r}: their records must be comparable")
    if device.type == "cuda" and (not gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"no device {name!r}: torch sees {torch.cuda.device_count()} GPU(s) here")
    return device


def start_network(job: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The network that the run starts from, and what its weights are (``source`` and ``sha256``)."""
    torch.manual_seed(job.seed)
    classes = len(load_images(job.preset.data, "train").classes)
    network = new_network(job.preset.network, classes)
    start = job.preset.pretraining_start if job.experiment.stage == "pretraining" else job.preset.start
    if job.experiment.after:
        network = _network_of(job, job.experiment.after)
        unfuse_batch_norms(network)  # AFA's stages may fuse in different ways: what they share is the two sets
        source = f"{job.experiment.after}, {job.preset_name}, seed {job.seed}"
    elif start == "new":
        source = f"new, seed {job.seed}"
    elif start == "published":
        path = published_weights(job.preset.network)
        published = new_network(job.preset.network)
        load_published_weights(published, path)
        source = path.name
        if classes == 10:
            network = published
        else:
            published.fc = network.fc
            network, source = published, f"{path.name}, but a new last layer, seed {job.seed}"
    else:
        network.load_state_dict(_network_of(job, "pretrain").state_dict())
        source = f"pretrain, {job.preset_name}, seed {job.seed}"
    return network, {"source": source, "sha256": state_checksum(network.state_dict())}


def new_network(name: str, classes: int = 10) -> nn.Module:
    """``"resnet8"`` (for smoke tests), ``"resnet20"`` and so on (CIFAR ResNets), or another of ``FOR_CIFAR``."""
    if name in FOR_CIFAR:
        return FOR_CIFAR[name](classes)
    return CifarResNet(int(name.removeprefix("resnet")), num_classes=classes)


def is_current(job: Run, record: records.Record, code: str | None = None) -> bool:
    """Whether the record is of this configuration and this code (data and starting weights are compared when it runs).

    Args:
        code: ``job.code``, if it is known: hashing takes a while.
    """
    return record.config == job.config and same_numbers.today(record.code["hash"]) == (code or job.code)


def _network_of(job: Run, name: str) -> nn.Module:
    return train_method(_other(job, name)).method.model


def _begins_with(job: Run) -> str | None:
    """The experiment whose weights it starts from, if it starts from any."""
    start = job.preset.pretraining_start if job.experiment.stage == "pretraining" else job.preset.start
    return job.experiment.after or ("pretrain" if start == "pretrain" else None)


def _other(job: Run, name: str) -> Run:
    """Another experiment at the same preset and seed; the preset decides for each by itself how long it trains."""
    experiment, size = find(name, job.preset_name)
    return dataclasses.replace(job, experiment=experiment, preset=size)


def _of_both(training: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    """What the training ran on, and as ``"test"`` what the test did, if that was something else."""
    return training if test == training else {**training, "test": test}


def _machine(job: Run) -> dict[str, Any]:
    return {**hardware(job.device), "precision": str(job.precision).removeprefix("torch.")}


def _train(job: Run, method: Method, train_set: ImageSet, key: str) -> tuple[History, TrainingCost]:
    if job.schedule is None:
        return History(), TrainingCost()
    loader = DeviceLoader(
        train_set, job.schedule.batch_size, job.seed, job.device, flip=job.preset.data not in UNFLIPPED
    )
    with metered(job.device, kept_with=method) as cost:
        history = train(
            method,
            loader,
            job.schedule,
            _checkpoint(job, key),
            key,
            show_progress=job.show_progress,
            precision=job.precision,
        )
    return history, cost


def _checkpoint(job: Run, key: str) -> Path:
    return job.folder / f"training-{key[:12]}.pt"  # by its key: one of an older configuration is not in the way


def _describe(images: ImageSet) -> dict[str, Any]:
    return {"images": len(images), "sha256": images.checksum, "mean": list(images.mean), "std": list(images.std)}


def _domain(images: ImageSet) -> str:
    """``"art_painting"`` for ``"pacs/art_painting..."``."""
    return images.name.split("/")[1].split(",")[0]


def _training_key(job: Run, train_set: ImageSet, weights: dict[str, Any]) -> str:
    return _digest({
        "method": job.config["method"],
        "stage": job.experiment.stage,
        "network": job.preset.network,
        "schedule": job.schedule and dataclasses.asdict(job.schedule),
        "precision": str(job.precision),
        "seed": job.seed,
        "code": job.training_code,
        "data": _describe(train_set),
        "weights": weights["sha256"],
    })  # fmt: skip


def _key(job: Run, training_key: str, tested_on: dict[str, Any]) -> str:
    return _digest({"config": job.config, "code": job.code, "training": training_key, "data": tested_on})


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
