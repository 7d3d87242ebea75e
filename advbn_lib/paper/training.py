"""A training at the paper's scale, from the folders of ImageNet to the record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from advbn_lib import records
from advbn_lib.checkpoints import read_checkpoint
from advbn_lib.data.imagenet import ImageNetFolder, ImageNetLoader, evaluation_transform, training_transform
from advbn_lib.data.images import DataError
from advbn_lib.paper.accuracy import right_answers
from advbn_lib.paper.distributed import Distributed, Processes
from advbn_lib.paper.recipe import PAPERS_WEIGHTS, PaperRecipe, starting_network
from advbn_lib.paper.selection import RankCheckpoints, Selection
from advbn_lib.provenance import code_hash, git_state, hardware, peak_memory_mib, versions
from advbn_lib.training import History, train

PAPERS_LOCAL_BATCH = 64  # 256 images on 4 GPUs
# What decides the numbers of a training. Not this module: what it hands on stands in the configuration.
USED = ("advbn_lib.training", "advbn_lib.paper.recipe", "advbn_lib.paper.selection")


@dataclass(frozen=True)
class PaperRun:
    """A recipe, where its data are, and where results go.

    Args:
        data: the folder that holds ImageNet's ``train`` and ``val``.
        weights: see :func:`~advbn_lib.paper.recipe.starting_network`.
        runs_folder: for checkpoints and weights; every machine must see it.
        records_folder: None: :func:`advbn_lib.records.default_folder`.
        workers: reading processes of each process.
        partial: accept fewer than the 1,000 classes, for a trial.
    """

    recipe: PaperRecipe
    data: Path
    weights: str = PAPERS_WEIGHTS
    runs_folder: Path = Path("runs")
    records_folder: Path | None = None
    workers: int = 4
    partial: bool = False
    show_progress: bool = True

    @property
    def experiment(self) -> str:
        return f"paper_{self.recipe.method}"

    @property
    def folder(self) -> Path:
        """Its checkpoints and weights."""
        return self.runs_folder / self.experiment / f"s{self.recipe.seed}"

    def preset(self, config: dict[str, Any]) -> str:
        """``"paper"`` if all is as in the paper, the number of images that share a perturbation included, else ``"trial"``."""
        same = self.recipe.is_the_papers and self.weights == PAPERS_WEIGHTS and not self.partial
        return "paper" if same and config["local_batch"] == PAPERS_LOCAL_BATCH else "trial"


def train_paper(run: PaperRun, processes: Processes) -> records.Record:
    """Train, from the checkpoints on if there are any, validate after each epoch, and write the record. Every process calls it.

    If the record of the same run is there already, it is returned and nothing is run. The weights of the best epoch, of every
    tenth and of the last stay in the run's folder, in files that :func:`advbn_lib.checkpoints.read_checkpoint` reads.

    Raises:
        ValueError: the batch cannot be split over the processes.
        DataError, SplitError, CheckpointError, FloatingPointError: see the parts.
    """
    started = time.perf_counter()
    recipe, schedule = run.recipe, run.recipe.schedule(processes.count)
    train_set, validation = _open(run, processes)
    with processes.one_by_machine():
        network, weights = starting_network(recipe.network, run.weights, recipe.seed)
    distributed = Distributed(recipe.build(network), processes)
    config = _config(run, distributed, processes, len(train_set.classes))
    data = _listings(processes, train_set, validation)
    code = code_hash(USED)
    key = _key(config, data, weights, code)
    preset = run.preset(config)
    done = processes.from_first(_existing(run, preset, key) if processes.first else None)
    if done is not None:
        return done
    torch.manual_seed(
        recipe.seed * 100_003 + processes.rank
    )  # random statistics, like the attack's, belong to the process
    loader = ImageNetLoader(
        train_set, schedule.batch_size, recipe.seed, processes.device, processes.share, run.workers
    )  # fmt: skip
    checkpoints = RankCheckpoints(run.folder, key, processes)
    show = run.show_progress and processes.first
    about = {"preset": preset, "config": config, "weights": weights}
    selection = Selection(distributed, validation, checkpoints, recipe, about, run.workers, show)
    selection.catch_up(checkpoints.align())
    history = train(
        distributed, loader, schedule, checkpoints.current, key,
        save_every=math.inf,  # by the clock, processes would save different steps
        show_progress=show, precision=torch.float32, after_epoch=selection,
    )  # fmt: skip
    metrics = _metrics(selection, run.workers)
    cost = _cost(history, started, processes)
    record = records.Record(
        experiment=run.experiment, preset=preset, seed=recipe.seed, key=key, config=config, metrics=metrics,
        curves=_curves(history, selection, processes), cost=cost, hardware=_hardware(processes), versions=versions(),
        code={"hash": code, **git_state()}, data=data, weights=weights,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip
    if processes.first:
        records.write(record, run.records_folder)
    processes.wait()  # a checkpoint goes only when the record is there
    checkpoints.remove()
    return record


def _open(run: PaperRun, processes: Processes) -> tuple[ImageNetFolder, ImageNetFolder]:
    """The training and the validation set; all processes must see the same files."""
    crop = run.recipe.crop
    train_set = ImageNetFolder("imagenet/train", run.data / "train", training_transform(crop), partial=run.partial)
    validation = ImageNetFolder("imagenet/val", run.data / "val", evaluation_transform(True, crop), partial=run.partial)
    for images in (train_set, validation):
        if len(set(processes.gather(images.listing(sizes=False)))) > 1:
            raise DataError(
                f"{images.name}: the processes see different files in {images.root}: copy the set to every machine in full"
            )
    return train_set, validation


def _config(run: PaperRun, distributed: Distributed, processes: Processes, classes: int) -> dict[str, Any]:
    config = {
        **dataclasses.asdict(run.recipe),
        "processes": processes.count,
        "local_batch": run.recipe.local_batch(processes.count),
        "sync_batch_norm": distributed.synchronised,
        "precision": "float32",
        "classes": classes,
    }
    return json.loads(json.dumps(config))  # tuples become lists, as when read from a file


def _listings(processes: Processes, *sets: ImageNetFolder) -> dict[str, Any]:
    """Counts, and a hash of names and sizes: hashing the pixels of all of ImageNet would take too long."""
    found = {}
    for images in sets:
        digest = processes.from_first(images.listing() if processes.first else "")
        found[images.name] = {
            "images": len(images),
            "classes": len(images.classes),
            "sha256_of_names_and_sizes": digest,
        }
    return found


def _key(config: dict[str, Any], data: dict[str, Any], weights: dict[str, Any], code: str) -> str:
    identity = {"config": config, "code": code, "data": data, "weights": weights["sha256"]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _existing(run: PaperRun, preset: str, key: str) -> records.Record | None:
    path = records.path_of(run.experiment, preset, run.recipe.seed, run.records_folder)
    record = records.read(path) if path.exists() else None
    return record if record is not None and record.key == key else None


def _metrics(selection: Selection, workers: int) -> dict[str, Any]:
    """Validation accuracies of the last epoch and of the best one, which is left in the network, through each branch."""
    method, validation = selection.distributed.method, selection.validation
    accuracy: dict[str, dict[str, float]] = {branch: {} for branch in method.branches}
    for name, file in (("imagenet_last_epoch", "last"), ("imagenet", "best")):
        selection.processes.wait()  # the first process may still be writing
        method.model.load_state_dict(read_checkpoint(selection.weights_file(file))["parts"]["model"])
        right = right_answers(method, validation, selection.processes, method.branches, workers=workers)
        for branch, count in right.items():
            accuracy[branch][name] = count / len(validation)
    sets = {branch: {"imagenet": shares["imagenet"]} for branch, shares in accuracy.items()}
    sets["released"] = dict(sets["clean"])  # the released test script reads clean images so too
    return {"shift": sets, "selection": {"epoch": selection.best_epoch}, "accuracy": accuracy}


def _curves(history: History, selection: Selection, processes: Processes) -> dict[str, list[float]]:
    losses = processes.sum(torch.tensor(history.losses, dtype=torch.float64)) / processes.count
    clean, adversarial = losses.T.tolist()
    return {"clean_loss": clean, "adversarial_loss": adversarial, "validation_accuracy": selection.accuracies}


def _cost(history: History, started: float, processes: Processes) -> dict[str, Any]:
    memory = [value for value in processes.gather(peak_memory_mib(processes.device)) if value is not None]
    return {
        "train_seconds": round(history.seconds, 2),
        "wall_seconds": round(time.perf_counter() - started, 2),
        "peak_memory_mib": max(memory, default=None),
    }


def _hardware(processes: Processes) -> dict[str, Any]:
    tf32 = processes.device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return {
        **hardware(processes.device),
        "processes": processes.count,
        "precision": "float32",
        "tf32_convolutions": tf32,
    }
