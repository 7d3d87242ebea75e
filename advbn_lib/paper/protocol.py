"""The paper's tests: ImageNet and its shifted versions, through the BatchNorm branch that the released script reads, and both.

Source: AdvBN's released test script. Which branch it reads is decided set by set, in advance, by what is known of the set: a choice
that a user who does not know the shift cannot make. So both branches are tested on every set, and the script's choice is one of
three columns.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from advbn_lib.checkpoints import DIGEST, read_checkpoint
from advbn_lib.data.imagenet import TEST_SETS, Part, find_parts
from advbn_lib.dual_bn import Branch
from advbn_lib.files import atomic_write
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.metrics import CorruptionError, mce
from advbn_lib.paper.accuracy import right_answers
from advbn_lib.paper.distributed import Processes
from advbn_lib.paper.recipe import PAPERS_WEIGHTS, PaperRecipe, starting_network

# ImageNet-R is not in the released script.
RELEASED: dict[str, Branch] = {
    "imagenet": "clean",
    "imagenet_c": "clean",
    "imagenet_instagram": "clean",
    "stylized_imagenet": "adversarial",
    "imagenet_sketch": "adversarial",
    "imagenet_advbn": "adversarial",
}


@dataclass(frozen=True)
class Trained:
    """A network to test, and what it is.

    Attributes:
        experiment, preset, seed, key: of its record.
        crop: side of the test images in pixels.
    """

    method: Method
    experiment: str
    preset: str
    seed: int
    key: str
    crop: int
    config: dict[str, Any]
    weights: dict[str, Any]


def load_trained(weights: str, network: str = "resnet50", crop: int = 224) -> Trained:
    """A network that :func:`advbn_lib.paper.training.train_paper` has kept, or a plain one.

    Args:
        weights: a kept file, such as ``best-....pt``; or as for :func:`~advbn_lib.paper.recipe.starting_network`: then ``network``
            and ``crop`` say which network it is, and it has one BatchNorm set, which counts as the clean one.

    Raises:
        CheckpointError, DataError, ValueError: the file is damaged, or there is no such network.
    """
    path = Path(weights)
    if path.is_file() and _is_checkpoint(path):
        state = read_checkpoint(path)
        about = state["progress"]
        recipe = PaperRecipe.from_config(about["config"])
        model, _ = starting_network(recipe.network, "none")
        method = recipe.build(model)
        model.load_state_dict(state["parts"]["model"])
        return Trained(
            method, f"paper_{recipe.method}", about["preset"], recipe.seed, state["key"], recipe.crop,
            about["config"], about["weights"],
        )  # fmt: skip
    model, about = starting_network(network, weights)
    kind = "paper_own_weights" if path.is_file() else "paper_untouched"
    papers = (network, str(weights), crop) == (PaperRecipe.network, PAPERS_WEIGHTS, PaperRecipe.crop)
    preset = "paper" if papers else "trial"
    config = {"network": network, "crop": crop}
    key = hashlib.sha256(json.dumps([about["sha256"], config], sort_keys=True).encode()).hexdigest()
    return Trained(PlainTraining(model), kind, preset, 0, key, crop, config, about)


def _is_checkpoint(path: Path) -> bool:
    """Whether this library wrote it: its checksum stands before torch's archive, which begins with PK."""
    with path.open("rb") as file:
        return file.read(DIGEST + 2)[DIGEST:] == b"PK"


@dataclass(frozen=True)
class Counts:
    """What came out on one part of a test set.

    Attributes:
        images, classes: how many were tested. listing: see :meth:`advbn_lib.data.imagenet.ImageNetFolder.listing`.
        right: right answers by branch. seconds: that it took.
    """

    images: int
    classes: int
    listing: str
    right: dict[str, int]
    seconds: float


def find_sets(
    folders: Mapping[str, Path | None], partial: bool = False
) -> tuple[dict[str, list[Part]], dict[str, str]]:
    """The parts of each set that there is, and why the others are not tested.

    Raises:
        DataError: a folder is there, but its layout is another.
    """
    parts, not_tested = {}, {}
    for name in TEST_SETS:
        folder = folders.get(name)
        if folder is None or not folder.is_dir():
            not_tested[name] = "no folder given" if folder is None else "folder missing"
            continue
        parts[name] = find_parts(name, folder)
        for part in parts[name]:
            part.check(partial)
    return parts, not_tested


def count_all(
    trained: Trained, parts: list[Part], processes: Processes, state_file: Path, *, batch_size: int = 64, workers: int = 0,
    partial: bool = False, show_progress: bool = False,
) -> dict[str, Counts]:  # fmt: skip
    """Right answers on each part. Every process calls it.

    What is counted is stored after each part: killed and started again, it goes on with the next one.

    Args:
        state_file: where; parts that it has, of the same files, are not tested again.
    """
    method = trained.method.to(processes.device)
    stored = json.loads(state_file.read_text()) if processes.first and state_file.exists() else {}
    counted = {name: Counts(**entry) for name, entry in processes.from_first(stored).items()}
    for part in parts:
        images = part.open(trained.crop, partial)
        listing = processes.from_first(images.listing() if processes.first else "")
        if part.name in counted and counted[part.name].listing == listing:
            continue
        started = time.perf_counter()
        right = right_answers(
            method, images, processes, method.branches, batch_size, workers, part.logits(), show_progress and processes.first
        )  # fmt: skip
        seconds = round(time.perf_counter() - started, 2)
        counted[part.name] = Counts(len(images), len(images.classes), listing, right, seconds)
        if processes.first:
            with atomic_write(state_file) as file:
                file.write(json.dumps({name: vars(counts) for name, counts in counted.items()}).encode())
    return {part.name: counted[part.name] for part in parts}


def summarise(parts: Mapping[str, list[Part]], counted: Mapping[str, Counts]) -> dict[str, Any]:
    """The metrics of a record: ``shift[branch][set]`` and ``accuracy[branch][part]``, shares from 0 to 1, and ``mce[branch]``.

    A set of several parts is their mean, each corruption and each filter counting once. Beside the branches stands
    ``shift["released"]``: the branch that the released script reads; for a network with one branch, that one.
    """
    branches = list(next(iter(counted.values())).right)
    accuracy = {
        branch: {name: counts.right[branch] / counts.images for name, counts in counted.items()} for branch in branches
    }
    sets = {
        branch: {name: fmean(accuracy[branch][part.name] for part in members) for name, members in parts.items()}
        for branch in branches
    }
    read = {name: RELEASED[name] if RELEASED[name] in branches else branches[0] for name in parts if name in RELEASED}
    metrics: dict[str, Any] = {
        "shift": {**sets, "released": {name: sets[branch][name] for name, branch in read.items()}}
    }
    if "imagenet_c" in parts:
        errors = {branch: corruption_error(accuracy[branch]) for branch in branches}
        metrics["mce"] = {
            branch: {"mce": error.value, "corruptions": error.corruptions} for branch, error in errors.items()
        }
    return {**metrics, "accuracy": accuracy}


def corruption_error(accuracy: Mapping[str, float]) -> CorruptionError:
    """The mCE of one branch's accuracies, against AlexNet."""
    errors: dict[str, list[float]] = {}
    for name, share in accuracy.items():
        if name.startswith("imagenet_c-"):
            errors.setdefault(name.split("-")[1], []).append(1 - share)
    return mce(errors)


def table(metrics: dict[str, Any], not_tested: Mapping[str, str], protocol: str = "released") -> str:
    """The results in words: a row for each set, its accuracy in percent by the protocol and through each branch.

    Args:
        protocol: ``"released"``, or ``"clean"``: the clean branch everywhere.
    """
    sets = {branch: row for branch, row in metrics["shift"].items() if branch != "released"}
    chosen = metrics["shift"][protocol]
    rows = [["", f"protocol: {protocol}", *sets]]
    for name in TEST_SETS:
        if name in not_tested:
            rows.append([name, f"not tested: {not_tested[name]}"])
        else:
            shares = [chosen.get(name), *(row[name] for row in sets.values())]
            rows.append([name, *("no choice" if share is None else f"{100 * share:.1f} %" for share in shares)])
    if "imagenet_c" not in not_tested:
        rows += [[f"imagenet_c, {branch}", f"  {corruption_error(metrics['accuracy'][branch])}"] for branch in sets]
    return "\n".join(f"{row[0]:28s}" + "".join(f"{cell:>20s}" for cell in row[1:]) for row in rows)
