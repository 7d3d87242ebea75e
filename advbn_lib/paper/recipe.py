"""The paper's training recipe, and the networks that it starts from.

Source: AdvBN's released code (github.com/azshue/AdvBN), its ResNet-50 configuration and training script.
"""

from __future__ import annotations

import dataclasses
import difflib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from advbn_lib.data.images import DataError
from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.afan import AFAN, Site
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import CleanFineTuning, RandomStatistics
from advbn_lib.methods.feature_controls import FeatureNoise, NoAugmentation
from advbn_lib.provenance import state_checksum
from advbn_lib.tasks.classification import Classification
from advbn_lib.training import Schedule

ABOVE_THE_CUT = ("advbn", "clean_finetuning", "random_statistics", "advbn_shared_bn")  # AdvBN and its controls
WHOLE_NETWORK = {"plain": NoAugmentation, "afan": AFAN, "feature_noise": FeatureNoise}  # A-FAN and its controls
METHODS = (*ABOVE_THE_CUT, *WHOLE_NETWORK)
CLASSES = 1000
PAPERS_WEIGHTS = "IMAGENET1K_V1"  # torchvision's name for the ResNet-50 weights that begin their SHA-256 with 0676ba61


@dataclass(frozen=True)
class PaperRecipe:
    """All that is chosen for a training, with the paper's values.

    Args:
        method: ``"advbn"``, or one of its controls at the same scale. ``"afan"``, ``"feature_noise"`` and ``"plain"`` train the
            whole network. A-FAN's paper trained on ImageNet too, but we do not know with which schedule: choose ``epochs``, ``lr``
            and ``milestones`` yourself.
        network, layer: torchvision's name of the network, and where it is cut. For AdvBN everything up to this layer is frozen.
        eps, step_size, steps: of AdvBN's adversary. ``eps`` also holds for random statistics.
        feature_step, feature_steps: of A-FAN's: ``gamma`` and ``steps`` of :class:`~advbn_lib.methods.afan.Site`, as released
            for CIFAR-10.
        epochs, lr, milestones, gamma, momentum, weight_decay: see :class:`~advbn_lib.training.Schedule`.
        batch_size: images a step, all processes together.
        crop: side of the training and test images in pixels.
        keep_every: the weights of each so many epochs are kept, beside the best and the last.
    """

    method: str = "advbn"
    network: str = "resnet50"
    layer: str = "layer1"
    eps: float = 1.1
    step_size: float = 0.2
    steps: int = 6
    feature_step: float = 0.5
    feature_steps: int = 5
    epochs: int = 20
    batch_size: int = 256
    lr: float = 1e-3
    milestones: tuple[int, ...] = (10,)
    gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    crop: int = 224
    keep_every: int = 10
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"no method {self.method!r}; there are {', '.join(METHODS)}")
        if self.crop < 32 or self.keep_every < 1:
            raise ValueError(
                f"crop must be at least 32 and keep_every at least 1, got {self.crop} and {self.keep_every}"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PaperRecipe:
        """The recipe that the configuration of a record tells of."""
        chosen = {field.name: config[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**chosen, "milestones": tuple(chosen["milestones"])})

    @property
    def is_the_papers(self) -> bool:
        """Whether nothing but the choice of AdvBN or a control of it, and the seed, differs from AdvBN's paper."""
        return self.method in ABOVE_THE_CUT and dataclasses.replace(self, method="advbn", seed=0) == PaperRecipe()

    def build(self, model: nn.Module) -> Method:
        """The method, on ``model``, with the parameters of what is frozen marked so.

        Raises:
            SplitError: the network has no such layer, or cannot be cut there.
        """
        method = self._method(model)
        method.freeze_the_rest()  # else processes would wait for gradients that never come
        return method

    def _method(self, model: nn.Module) -> Method:
        if self.method in WHOLE_NETWORK:
            site = Site(self.layer, self.feature_step, self.feature_steps)
            return WHOLE_NETWORK[self.method](Classification(model), [site])
        if self.method == "clean_finetuning":
            return CleanFineTuning(model, self.layer)
        if self.method == "random_statistics":
            return RandomStatistics(model, self.layer, self.eps)
        return AdvBN(model, self.layer, self.eps, self.step_size, self.steps, dual_bn=self.method == "advbn")

    def local_batch(self, processes: int) -> int:
        """Images a step of one process. AdvBN's perturbation is shared by these, and by no others.

        Raises:
            ValueError: the processes do not divide the batch.
        """
        if self.batch_size % processes:
            raise ValueError(f"a batch of {self.batch_size} cannot be split over {processes} processes evenly")
        return self.batch_size // processes

    def schedule(self, processes: int) -> Schedule:
        """For :func:`advbn_lib.training.train`, in each of so many processes."""
        return Schedule(
            self.epochs, self.local_batch(processes), self.lr, self.milestones, self.gamma,
            momentum=self.momentum, weight_decay=self.weight_decay,
        )  # fmt: skip


def starting_network(
    name: str, weights: str | Path = PAPERS_WEIGHTS, seed: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """A torchvision classifier for ImageNet's classes, and what its weights are (``source`` and ``sha256``).

    Args:
        name: torchvision's name of the network.
        weights: torchvision's name of published weights (downloaded if needed, checked by their hash), ``"none"`` for new ones
            drawn with ``seed``, or a file that holds a state dict.

    Raises:
        ValueError: no such network, or no such weights for it.
        DataError: the file is damaged or of another network, or nothing can be downloaded.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5) or known[:5]
        raise ValueError(f"torchvision has no classifier {name!r}; near names: {', '.join(near)}")
    torch.manual_seed(seed)
    network = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    if str(weights) == "none":
        source = f"new, seed {seed}"
    elif Path(weights).is_file():
        _load_file(network, Path(weights))
        source = Path(weights).name
    else:
        network.load_state_dict(_published(name, str(weights)))
        source = f"torchvision, {weights}"
    return network, {"source": source, "sha256": state_checksum(network.state_dict())}


def _published(name: str, weights: str) -> dict[str, torch.Tensor]:
    published = torchvision.models.get_model_weights(name)
    if weights not in published.__members__:
        raise ValueError(
            f"there is no file {weights}, and no published weights of that name for {name}; there are "
            f"{', '.join(published.__members__)}, or none"
        )
    try:
        return published[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{weights} of {name} could not be downloaded ({error}): put {Path(published[weights].url).name} into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}, or name a file with weights"
        ) from error


def _load_file(network: nn.Module, path: Path) -> None:
    """A state dict, bare or under ``state_dict``, its names with or without ``module.`` before them."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    except (pickle.UnpicklingError, RuntimeError, AttributeError, EOFError) as error:
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        raise DataError(f"{path} holds no weights of this network ({reason})") from error
