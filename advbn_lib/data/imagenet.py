"""ImageNet and its shifted versions, read from the folders that they come in.

A class is a folder named by its WordNet number (wnid), such as ``n01440764``; its index is the place of that number among
ImageNet's 1,000 sorted ones. What lies where, below the folder of a set:

==================  ==============================================  ===================  =================
set                 layout                                          preprocessing        classes
==================  ==============================================  ===================  =================
imagenet            ``train/<wnid>/*`` and ``val/<wnid>/*``         resize, then crop    1,000
imagenet_c          ``<corruption>/<severity>/<wnid>/*``, or that   crop                 1,000
                    below ``noise``, ``blur``, ``weather`` and
                    ``digital``, as the archives are named
imagenet_instagram  ``<filter>/<wnid>/*``, 20 filters               resize, then crop    1,000
stylized_imagenet   ``val/<wnid>/*``                                crop                 1,000
imagenet_sketch     ``sketch/<wnid>/*``                             resize, then crop    1,000
imagenet_r          ``<wnid>/*``                                    resize, then crop    200 of the 1,000
imagenet_advbn      ``<wnid>/*``                                    crop                 1,000
==================  ==============================================  ===================  =================

Sources: layouts and preprocessing are those of AdvBN's released test script (Resize 256 and CenterCrop 224, or CenterCrop 224
alone for sets that are stored at 224 or 256 pixels); of ImageNet-R, those of its authors' script, github.com/hendrycks/imagenet-r.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from advbn_lib.data.images import DataError
from advbn_lib.metrics import CORRUPTIONS, SEVERITIES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP, RESIZE = 224, 256
Transform = Callable[[Image.Image], Tensor]


@lru_cache(maxsize=1)
def imagenet_wnids() -> tuple[str, ...]:
    """The 1,000 classes by WordNet number; the place is the class index."""
    return tuple(wnid for wnid, _ in _classes())


@lru_cache(maxsize=1)
def imagenet_r_wnids() -> tuple[str, ...]:
    """The 200 of them that ImageNet-R has."""
    return tuple(wnid for wnid, in_r in _classes() if in_r)


def _classes() -> list[tuple[str, bool]]:
    lines = Path(__file__).with_name("imagenet_wnids.txt").read_text(encoding="utf-8").splitlines()
    return [(line[:9], line.endswith(" r")) for line in lines if not line.startswith("#")]


def training_transform(crop: int = CROP) -> Transform:
    """Random crop of random size and shape, scaled to ``crop`` pixels; random flip; normalised."""
    random = [transforms.RandomResizedCrop(crop), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*random, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def evaluation_transform(resize: bool, crop: int = CROP) -> Transform:
    """The middle ``crop`` pixels, normalised; with ``resize`` after scaling the shorter side to 256/224 of that."""
    middle = [transforms.CenterCrop(crop)] if resize else [_LargeEnough(crop), transforms.CenterCrop(crop)]
    scale = [transforms.Resize(round(crop * RESIZE / CROP))] if resize else []
    return transforms.Compose([*scale, *middle, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


class _TooSmall(ValueError):
    """An image has fewer pixels than are to be cut out of it."""


@dataclass(frozen=True)
class _LargeEnough:
    """Refuses an image that a centre crop would have to pad with black."""

    size: int

    def __call__(self, image: Image.Image) -> Image.Image:
        if min(image.size) < self.size:
            raise _TooSmall(f"it has {image.size[0]}x{image.size[1]} pixels, too few for a crop of {self.size}")
        return image


def class_folders(name: str, folder: Path, expected: tuple[str, ...], partial: bool = False) -> list[str]:
    """The class folders in ``folder``, sorted.

    Raises:
        DataError: no such folder; something else stands in it; or classes are missing and ``partial`` is False.
    """
    layout = f"one folder for each of {len(expected):,} classes, named by WordNet number, such as {expected[0]}"
    if not folder.is_dir():
        raise DataError(f"{name}: there is no folder {folder}; it should hold {layout}")
    with os.scandir(folder) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    unknown = sorted(set(found) - set(expected))
    if unknown or not found:
        there = f"{_some(unknown)} is not among them" if unknown else "it holds no folder"
        raise DataError(f"{name}: {folder} should hold {layout}; {there}")
    missing = sorted(set(expected) - set(found))
    if missing and not partial:
        raise DataError(
            f"{name}: {folder} lacks {len(missing)} of {len(expected):,} classes ({_some(missing)}): "
            "copy them too, or say that a part of the set will do (partial, on the command line --partial)"
        )
    return found


class ImageNetFolder(ImageFolder):
    """Images in class folders, with ImageNet's class indices as labels.

    Args:
        name: e.g. ``"imagenet/val"``.
        folder: what holds the class folders.
        transform: see :func:`training_transform`, :func:`evaluation_transform`.
        classes: the wnids that must all be there; None: ImageNet's 1,000.
        partial: accept fewer of these classes, for a trial.

    Raises:
        DataError: no such folder, another layout, unknown, missing or empty classes. On access: an image cannot be read.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        transform: Transform,
        classes: tuple[str, ...] | None = None,
        partial: bool = False,
    ):
        self.name, self._expected, self._partial = name, classes or imagenet_wnids(), partial
        class_folders(
            name, folder, self._expected, partial
        )  # torchvision would report a missing folder in its own words
        try:
            super().__init__(str(folder), transform)
        except FileNotFoundError as error:  # torchvision's word for class folders without images
            raise DataError(f"{name}: {error}; copy these classes anew, or remove their folders") from error

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """The class folders, and the class index of each."""
        found = class_folders(self.name, Path(directory), self._expected, self._partial)
        index = {wnid: place for place, wnid in enumerate(imagenet_wnids())}
        return found, {wnid: index[wnid] for wnid in found}

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image (3,H,W), transformed, and its class index."""
        try:
            return super().__getitem__(index)
        except (OSError, SyntaxError, _TooSmall) as error:  # SyntaxError: Pillow's word for a damaged PNG
            raise DataError(f"{self.name}: {self.samples[index][0]} cannot be used ({error}): copy it anew") from error

    def listing(self, sizes: bool = True) -> str:
        """SHA-256 of all file names below the folder, in order, and of the sizes in bytes. The pixels are not read.

        Reading all of ImageNet would take longer than an epoch; so two sets with equal names and sizes count as equal.
        """
        digest = hashlib.sha256()
        for path, _ in self.samples:
            size = os.path.getsize(path) if sizes else 0
            digest.update(f"{Path(path).relative_to(self.root).as_posix()}\0{size}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Part:
    """A folder of class folders to test on.

    Attributes:
        name: of the set, and of the part if it has several: ``"imagenet_sketch"``, ``"imagenet_c-fog-3"``.
        resize: whether images are resized before the crop.
        classes: predictions are restricted to these wnids; None: all 1,000 compete.
    """

    name: str
    folder: Path
    resize: bool
    classes: tuple[str, ...] | None = None

    def check(self, partial: bool = False) -> None:
        """Look at the class folders, not yet into them.

        Raises:
            DataError: see :func:`class_folders`.
        """
        class_folders(self.name, self.folder, self.classes or imagenet_wnids(), partial)

    def open(self, crop: int = CROP, partial: bool = False) -> ImageNetFolder:
        """The images, preprocessed.

        Raises:
            DataError: see :class:`ImageNetFolder`.
        """
        return ImageNetFolder(self.name, self.folder, evaluation_transform(self.resize, crop), self.classes, partial)

    def logits(self) -> tuple[int, ...] | None:
        """The class indices that predictions are restricted to; None: no restriction."""
        if self.classes is None:
            return None
        return tuple(place for place, wnid in enumerate(imagenet_wnids()) if wnid in self.classes)


def find_parts(name: str, folder: Path) -> list[Part]:
    """The parts of a test set (one of ``TEST_SETS``) that lies in ``folder``.

    Corruptions of ImageNet-C that are not there are left out; see :attr:`advbn_lib.metrics.CorruptionError.missing`.

    Raises:
        ValueError: no such set.
        DataError: no such folder, or not the documented layout.
    """
    if name not in TEST_SETS:
        raise ValueError(f"no test set {name!r}; there are {', '.join(TEST_SETS)}")
    if not folder.is_dir():
        raise DataError(f"{name}: there is no folder {folder}")
    return TEST_SETS[name](folder)


def _corrupted(folder: Path) -> list[Part]:
    parts = []
    for corruption in CORRUPTIONS:
        places = [place for place in (folder / corruption, *sorted(folder.glob(f"*/{corruption}"))) if place.is_dir()]
        if len(places) > 1:
            raise DataError(f"imagenet_c: {corruption} stands in {places[0]} and in {places[1]}: remove one")
        for severity in range(1, SEVERITIES + 1) if places else ():
            if not (places[0] / str(severity)).is_dir():
                raise DataError(
                    f"imagenet_c: {places[0]} should hold the severities 1 to {SEVERITIES}; {severity} is missing"
                )
            parts.append(Part(f"imagenet_c-{corruption}-{severity}", places[0] / str(severity), resize=False))
    if not parts:
        raise DataError(
            f"imagenet_c: {folder} should hold <corruption>/<severity>/<wnid>, with corruptions such as {CORRUPTIONS[0]}"
        )
    return parts


def _filtered(folder: Path) -> list[Part]:
    filters = sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith("."))
    if not filters or filters[0].name in imagenet_wnids():
        raise DataError(
            f"imagenet_instagram: {folder} should hold one folder for each filter, and these the class folders"
        )
    return [Part(f"imagenet_instagram-{place.name}", place, resize=True) for place in filters]


def _sketches(folder: Path) -> list[Part]:
    inner = folder / "sketch"
    return [Part("imagenet_sketch", inner if inner.is_dir() else folder, resize=True)]


TEST_SETS: dict[str, Callable[[Path], list[Part]]] = {
    "imagenet": lambda folder: [Part("imagenet", folder / "val", resize=True)],
    "imagenet_c": _corrupted,
    "imagenet_instagram": _filtered,
    "stylized_imagenet": lambda folder: [Part("stylized_imagenet", folder / "val", resize=False)],
    "imagenet_sketch": _sketches,
    "imagenet_r": lambda folder: [Part("imagenet_r", folder, resize=True, classes=imagenet_r_wnids())],
    "imagenet_advbn": lambda folder: [Part("imagenet_advbn", folder, resize=False)],
}


@dataclass(frozen=True)
class Share:
    """Which of several processes reads: each takes its own images."""

    rank: int = 0
    processes: int = 1


class ImageNetLoader:
    """Shuffled, augmented training batches; each process gets its share of every epoch. For :func:`advbn_lib.training.train`.

    Order and augmentation are functions of (seed, epoch, image) alone: a resumed run sees the same pixels, however many workers
    read. As in AdvBN's released code the last batch of an epoch may be smaller, and processes get equally many images (a few
    are repeated where they do not divide).

    Args:
        images: with a :func:`training_transform`.
        batch_size: images a batch of one process.
        workers: reading processes beside this one; 0: read here.
    """

    def __init__(
        self, images: ImageNetFolder, batch_size: int, seed: int, device: torch.device | str = "cpu",
        share: Share = Share(), workers: int = 0,
    ):  # fmt: skip
        if not 0 < batch_size <= math.ceil(len(images) / share.processes):
            raise ValueError(
                f"batch_size must be from 1 to {math.ceil(len(images) / share.processes)}, a process's share of {images.name}; "
                f"got {batch_size}"
            )
        self.device, self.batch_size, self.workers = torch.device(device), batch_size, workers
        # Spread out, because the sampler adds the epoch to its seed: seed 0 in epoch 1 must not be seed 1 in epoch 0.
        self._sampler = DistributedSampler(images, share.processes, share.rank, shuffle=True, seed=seed * 100_003)
        self._images = _Seeded(images, seed)

    def __len__(self) -> int:
        """Batches an epoch."""
        return math.ceil(len(self._sampler) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch from ``start`` on: images (N,3,crop,crop; float, normalised) and labels (N,)."""
        self._sampler.set_epoch(epoch)
        order = [(epoch, index) for index in self._sampler]
        batches = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, len(self))]
        yield from _read(self._images, self.device, self.workers, batch_sampler=batches)


class _Seeded(Dataset):
    """Images by (epoch, index), with the random numbers of a transform fixed by both and the seed."""

    def __init__(self, images: ImageNetFolder, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):  # without workers the training's own random numbers must not notice
            torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * 10_000_019 + index) % 2**63)
            return self.images[index]


def evaluation_batches(
    images: ImageNetFolder,
    batch_size: int,
    device: torch.device | str = "cpu",
    share: Share = Share(),
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A process's share of the images, each once and in order: batches of images (N,3,crop,crop) and labels (N,)."""
    mine = Subset(images, range(share.rank, len(images), share.processes))
    yield from _read(mine, torch.device(device), workers, batch_size=batch_size)


def _read(images: Dataset, device: torch.device, workers: int, **batching) -> Iterator[tuple[Tensor, Tensor]]:
    # A generator of its own: else the loader would draw the workers' seeds from the training's random numbers.
    options = {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "generator": torch.Generator().manual_seed(0),
    }
    for pixels, labels in DataLoader(images, **options, **batching):
        yield pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
