"""Our attack beside those of two public libraries: torchattacks and foolbox.

On the same model and images, with the same radius, steps and step length, projected gradient descent should find the same up to
the chance of its random start, and ours should not be slower. On a subset, attacks that we have not written are tried: APGD
with two losses (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free
Attacks", ICML 2020) and Square (Andriushchenko et al., ECCV 2020), which needs no gradient.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from advbn_lib.attacks import PGD, judge

Attack = Callable[[Tensor, Tensor, int], Tensor]  # images in [0,1], labels and a seed to changed images in [0,1]

INSTALL = "pip install --no-deps torchattacks foolbox eagerpy GitPython gitdb smmap"


@dataclass(frozen=True)
class Agreement:
    """What is compared.

    Args:
        radius: of the l-infinity ball, in [0,1] units.
        steps, step: of projected gradient descent; the length of a step is a share of the radius.
        rounds: how often each library runs. The fastest run counts as its time, the first one as its result.
        subset: how many of the first images the other attacks are tried on. apgd_steps, queries: their effort.
        batch_size: images at a time. seed: of the random starts.

    Raises:
        ValueError: a value is out of its range.
    """

    radius: float = 8 / 255
    steps: int = 20
    step: float = 0.25
    rounds: int = 3
    subset: int = 128
    apgd_steps: int = 50
    queries: int = 1000
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.radius <= 1:
            raise ValueError(
                f"the radius is above 0 and at most 1, in [0,1] units (8/255 and not 8); got {self.radius}"
            )
        if min(self.steps, self.rounds, self.subset, self.apgd_steps, self.queries, self.batch_size) < 1:
            raise ValueError(f"steps, rounds, subset, apgd_steps, queries and batch_size are at least 1; got {self}")


class Normalised(nn.Module):
    """A model of images in [0,1] (N,C,H,W), from one of normalised images: what other libraries' attacks work on."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images))

    def normalise(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    def pixels(self, images: Tensor) -> Tensor:
        """Normalised images back in [0,1]."""
        return images * self.std + self.mean


def agreement(
    predict_modules: Mapping[str, nn.Module], images01: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...],
    config: Agreement = Agreement(), crossed: bool = True,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Compare the attacks on each model. Copies in eval mode are attacked; the models stay as they are, and so do random states.

    Args:
        predict_modules: models by name: normalised images (N,C,H,W) to logits (N,K), on the images' device.
        images01: (N,C,H,W) in [0,1], float32. labels: right classes (N,), int64.
        mean, std: of each channel, in [0,1] units: what the models expect their input to be normalised with.
        crossed: whether to try the other attacks, too.

    Returns:
        Of each model:

        - ``accuracy_clean``, and ``accuracy_ours``, ``accuracy_torchattacks``, ``accuracy_foolbox`` under each library's
          projected gradient descent.
        - ``difference_...`` of the other two: our accuracy minus theirs, and ``error_...``, its standard error: the root of the
          number of images that only one of both breaks, divided by the number of images.
        - ``seconds_...`` of the fastest round, of which they take turns, and ``ratio_...``: our seconds divided by theirs. On a GPU by
          the clock. On a CPU seconds of computing, summed over threads.
        - If ``crossed``: ``subset_ours``, ``subset_apgd_ce``, ``subset_apgd_dlr``, ``subset_square``: accuracies on the subset, and
          ``subset_all``: of each image the worst of these. There an image that is answered wrongly unchanged counts as broken.

    Raises:
        ImportError: torchattacks or foolbox is not installed; the message says how to install them.
        ValueError: labels do not fit, or images are not in [0,1].
    """
    torchattacks, foolbox = libraries()
    if images01.numel() == 0 or images01.min() < 0 or images01.max() > 1:
        raise ValueError("give images in [0,1], not normalised and not 0 to 255, and one at least")
    table = {}
    for name, module in predict_modules.items():
        model = Normalised(copy.deepcopy(module), mean, std).to(images01.device).eval().requires_grad_(False)
        attacks = _descents(model, mean, std, config, torchattacks, foolbox)
        row = _side_by_side(model, attacks, images01, labels, config)
        if crossed:
            row |= _crossed(model, attacks["ours"], images01, labels, config, torchattacks)
        table[name] = row
    return table


def libraries() -> tuple[ModuleType, ModuleType]:
    """torchattacks and foolbox.

    Raises:
        ImportError: one of them, or what it needs, is not installed.
    """
    try:
        import foolbox
        import torchattacks
    except ImportError as error:
        raise ImportError(
            f"{error}. The comparison needs torchattacks and foolbox: {INSTALL}. Leave out their dependencies, as here: torchattacks "
            "asks for old versions of requests and tqdm. Besides they use requests and scipy, of any version"
        ) from error
    return torchattacks, foolbox


def _descents(
    model: Normalised, mean: tuple[float, ...], std: tuple[float, ...], config: Agreement, torchattacks: ModuleType,
    foolbox: ModuleType,
) -> dict[str, Attack]:  # fmt: skip
    """Projected gradient descent of each library, with the same radius, steps and step."""
    length = config.step * config.radius
    pgd = PGD(mean, std, config.steps, config.step)

    def ours(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(images.device).manual_seed(seed)
        return model.pixels(pgd.perturb(model.model, model.normalise(images), labels, config.radius, generator))

    other = torchattacks.PGD(model, eps=config.radius, alpha=length, steps=config.steps, random_start=True)
    third = foolbox.attacks.LinfPGD(abs_stepsize=length, steps=config.steps, random_start=True)

    def by_torchattacks(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        with _seeded(seed, images.device):
            return other(images, labels)

    def by_foolbox(images: Tensor, labels: Tensor, seed: int) -> Tensor:
        with _seeded(seed, images.device):
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
            return third.run(wrapped, images, foolbox.criteria.Misclassification(labels), epsilon=config.radius)

    return {"ours": ours, "torchattacks": by_torchattacks, "foolbox": by_foolbox}


def _side_by_side(
    model: Normalised, attacks: Mapping[str, Attack], images: Tensor, labels: Tensor, config: Agreement
) -> dict[str, float]:
    clean = _wrong(model, images, labels, config)
    wrong, seconds = {}, dict.fromkeys(attacks, math.inf)
    few = images[: config.batch_size], labels[: config.batch_size]
    for attack in attacks.values():  # not timed: the first passes are slower
        attack(*few, config.seed)
    for number in range(config.rounds):
        for name, attack in attacks.items():
            start = _now(images.device)
            changed = _in_batches(attack, images, labels, config, config.seed + number)
            seconds[name] = min(seconds[name], _now(images.device) - start)
            wrong.setdefault(name, _wrong(model, changed, labels, config))
    row = {
        "accuracy_clean": _accuracy(clean),
        **{f"accuracy_{name}": _accuracy(found) for name, found in wrong.items()},
    }
    for name in attacks.keys() - {"ours"}:
        row[f"difference_{name}"] = row["accuracy_ours"] - row[f"accuracy_{name}"]
        row[f"error_{name}"] = (wrong["ours"] ^ wrong[name]).sum().item() ** 0.5 / len(images)
        row[f"ratio_{name}"] = seconds["ours"] / seconds[name]
    return row | {f"seconds_{name}": value for name, value in seconds.items()}


def _crossed(
    model: Normalised, ours: Attack, images: Tensor, labels: Tensor, config: Agreement, torchattacks: ModuleType
) -> dict[str, float]:
    images, labels = images[: config.subset], labels[: config.subset]
    common = {"norm": "Linf", "eps": config.radius, "seed": config.seed}
    attacks = {
        "apgd_ce": torchattacks.APGD(model, steps=config.apgd_steps, loss="ce", **common),
        "apgd_dlr": torchattacks.APGD(model, steps=config.apgd_steps, loss="dlr", **common),
        "square": torchattacks.Square(model, n_queries=config.queries, **common),
    }
    clean = _wrong(model, images, labels, config)
    wrong = {"ours": _wrong(model, _in_batches(ours, images, labels, config, config.seed), labels, config)}
    for name, attack in attacks.items():
        with _seeded(config.seed, images.device):
            changed = _in_batches(lambda x, y, _seed, run=attack: run(x, y), images, labels, config, config.seed)
        wrong[name] = _wrong(model, changed, labels, config)
    wrong = {name: found | clean for name, found in wrong.items()}
    wrong["all"] = torch.stack([*wrong.values()]).any(0)
    return {f"subset_{name}": _accuracy(found) for name, found in wrong.items()}


def _in_batches(attack: Attack, images: Tensor, labels: Tensor, config: Agreement, seed: int) -> Tensor:
    pairs = zip(images.split(config.batch_size), labels.split(config.batch_size))
    return torch.cat([attack(*pair, seed * 1000 + number) for number, pair in enumerate(pairs)])


def _wrong(model: nn.Module, images: Tensor, labels: Tensor, config: Agreement) -> Tensor:
    """Which images (N,) are answered wrongly."""
    pairs = zip(images.split(config.batch_size), labels.split(config.batch_size))
    return torch.cat([judge(model, *pair).wrong for pair in pairs])


def _accuracy(wrong: Tensor) -> float:
    return 1 - wrong.double().mean().item()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block torch's global random numbers begin at ``seed``: these libraries take no generator. Afterwards as before."""
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _now(device: torch.device) -> float:
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
