"""What is kept of a training by several processes: checkpoints that fit together, and the epoch that counts.

Source: AdvBN's released training script keeps the weights with the best top-1 accuracy on clean validation images, read through
the clean BatchNorms, and those of every tenth epoch and the last.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from advbn_lib.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from advbn_lib.data.imagenet import ImageNetFolder
from advbn_lib.files import atomic_write
from advbn_lib.paper.accuracy import right_answers
from advbn_lib.paper.distributed import Distributed, Processes
from advbn_lib.paper.recipe import PaperRecipe
from advbn_lib.training import History


def weights_file(folder: Path, name: str, key: str) -> Path:
    """Where the weights ``best``, ``last``, ``epoch-10`` and so on of a run are kept."""
    return folder / f"{name}-{key[:12]}.pt"


@dataclass(frozen=True)
class RankCheckpoints:
    """A process's checkpoint, and the one before it.

    Each process saves by itself, at the end of an epoch. If the run is killed in between, some have saved and others have not;
    then all go back to the epoch before.
    """

    folder: Path
    key: str
    processes: Processes

    @property
    def current(self) -> Path:
        """What :func:`advbn_lib.training.train` writes and reads."""
        return self.folder / f"training-{self.key[:12]}-rank{self.processes.rank}.pt"

    @property
    def previous(self) -> Path:
        return self.current.with_suffix(".previous.pt")

    def keep(self) -> None:
        """Make the current checkpoint the previous one too. Call it when all processes have saved the same epoch."""
        _link(self.current, self.previous)

    def align(self) -> int:
        """Leave as the current one the newest checkpoint that all processes have, and return its epoch; 0: none, start anew.

        Raises:
            CheckpointError: a file is damaged, or the processes are more than an epoch apart.
        """
        mine = {
            read_checkpoint(path)["progress"]["epoch"]: path for path in (self.previous, self.current) if path.exists()
        }
        everybodys = [{0, *epochs} for epochs in self.processes.gather(sorted(mine))]
        common, newest = max(set.intersection(*everybodys)), max(set.union(*everybodys))
        if newest - common > 1:
            raise CheckpointError(
                f"the checkpoints in {self.folder} do not fit together: one process has been to epoch {newest}, but all have only "
                f"epoch {common}. Can every machine see this folder? If files are lost, remove it to start anew"
            )
        if common == 0:
            self.remove()
        elif mine[common] == self.current:
            self.keep()
        else:
            _link(self.previous, self.current)
        return common

    def remove(self) -> None:
        """Both files."""
        self.current.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def _link(old: Path, new: Path) -> None:
    """Another name for a file, in one step; a copy where the file system has no links."""
    temporary = new.with_suffix(".part")
    temporary.unlink(missing_ok=True)
    try:
        os.link(old, temporary)
    except OSError:
        shutil.copyfile(old, temporary)
    os.replace(temporary, new)


@dataclass
class Selection:
    """Validates after each epoch and keeps the weights that the recipe wants.

    Attributes:
        about: numbers and words that are stored beside the weights.
        accuracies: of each finished epoch, on clean validation images through the clean BatchNorms, from 0 to 1.
    """

    distributed: Distributed
    validation: ImageNetFolder
    checkpoints: RankCheckpoints
    recipe: PaperRecipe
    about: dict[str, object]
    workers: int = 0
    show_progress: bool = False
    accuracies: list[float] = field(default_factory=list)

    @property
    def processes(self) -> Processes:
        return self.checkpoints.processes

    @property
    def best_epoch(self) -> int:
        """From 1; of equally good ones the first."""
        return 1 + self.accuracies.index(max(self.accuracies))

    def weights_file(self, name: str) -> Path:
        """See :func:`weights_file`."""
        return weights_file(self.checkpoints.folder, name, self.checkpoints.key)

    @property
    def _state_file(self) -> Path:
        return self.checkpoints.folder / f"selection-{self.checkpoints.key[:12]}.json"

    def __call__(self, history: History) -> None:
        """After an epoch whose checkpoint is saved; for ``train(..., after_epoch=...)``."""
        self.processes.wait()
        self.checkpoints.keep()
        self._validate()

    def catch_up(self, epoch: int) -> None:
        """Take up the selection of a run that was killed; validate ``epoch`` if the run did not come to that.

        Raises:
            CheckpointError: the validations that are stored are not those of the epochs before.
        """
        stored = json.loads(self._state_file.read_text()) if self.processes.first and self._state_file.exists() else []
        self.accuracies = self.processes.from_first(stored) if epoch else []
        if len(self.accuracies) not in (epoch, epoch - 1) and epoch:
            raise CheckpointError(
                f"{self._state_file} has {len(self.accuracies)} validations, but the checkpoint is of epoch {epoch}: "
                f"remove {self.checkpoints.folder} to start anew"
            )
        if len(self.accuracies) < epoch:
            state = read_checkpoint(self.checkpoints.current)
            self.distributed.load_state_dict(state["parts"]["method"])
            self._validate()

    def _validate(self) -> None:
        self.distributed.take_running_statistics()
        right = right_answers(
            self.distributed.method, self.validation, self.processes, ("clean",), workers=self.workers,
            show_progress=self.show_progress and self.processes.first,
        )  # fmt: skip
        self.accuracies.append(right["clean"] / len(self.validation))
        if self.processes.first:
            self._write()

    def _write(self) -> None:
        """The weights first: killed before the list is written, the epoch is validated once more, to the same end."""
        epoch = len(self.accuracies)
        wanted = {"best": self.best_epoch == epoch, "last": epoch == self.recipe.epochs}
        wanted[f"epoch-{epoch}"] = epoch % self.recipe.keep_every == 0
        for name in (name for name, keep in wanted.items() if keep):
            model = {"model": self.distributed.method.model}
            save_checkpoint(self.weights_file(name), model, {**self.about, "epoch": epoch}, self.checkpoints.key)
        with atomic_write(self._state_file) as file:
            file.write(json.dumps(self.accuracies).encode())
