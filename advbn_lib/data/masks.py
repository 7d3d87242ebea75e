"""Images with a class for every pixel: sets in memory, sets of files, and what their readers share."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from advbn_lib.data.cifar10 import MEAN, STD
from advbn_lib.data.images import DataError
from advbn_lib.files import sha256

IGNORE = 255  # in a mask: no label here, for training and for metrics alike
FILE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Masks(Protocol):
    """What loaders and metrics need of a set; :class:`MaskSet` and :class:`MaskFiles` have it."""

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class MaskSet:
    """Images of one size in memory, with their masks.

    Attributes:
        name: e.g. ``"camvid/train, 160x120"``.
        images: uint8, N,3,H,W.
        masks: uint8, N,H,W: classes from 0 to ``len(classes) - 1``, or ``IGNORE``.
        classes: their names.
        mean, std: of each channel, in [0,1] units: what the networks expect their input to be normalised with.

    Raises:
        DataError: shapes or types are others, a mask has an unknown class, or there is no image.
    """

    name: str
    images: Tensor
    masks: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 3:
            raise DataError(
                f"{self.name}: images must be uint8 and N,3,H,W, got {self.images.dtype} and {tuple(self.images.shape)}"
            )
        expected = (len(self.images), *self.images.shape[2:])
        if self.masks.dtype != torch.uint8 or tuple(self.masks.shape) != expected:
            raise DataError(
                f"{self.name}: masks must be uint8 and {expected}, got {self.masks.dtype} and {tuple(self.masks.shape)}"
            )
        if len(self.images) == 0:
            raise DataError(f"{self.name}: no images")
        _refuse_unknown(self.name, self.masks.cpu().numpy(), len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.masks[index]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of pixels and masks."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images.cpu().numpy()))
        digest.update(np.ascontiguousarray(self.masks.cpu().numpy()))
        return digest.hexdigest()

    @cached_property
    def left_out(self) -> dict[str, int]:
        """Counts of what neither trains nor is tested on; see :meth:`MaskFiles.left_out`."""
        unlabelled = (self.masks == IGNORE).flatten(1).sum(1)
        return _left_out(unlabelled.tolist(), self.masks[0].numel())

    def first(self, count: int | None) -> MaskSet:
        """The first ``count`` images; all if None.

        Raises:
            DataError: if there are fewer.
        """
        if count is None:
            return self
        if not 0 < count <= len(self):
            raise DataError(f"{self.name}: asked for {count} images, but it has {len(self)}")
        return dataclasses.replace(self, images=self.images[:count], masks=self.masks[:count])

    def to(self, device: torch.device | str) -> MaskSet:
        """The same set on another device."""
        return dataclasses.replace(self, images=self.images.to(device), masks=self.masks.to(device))


@dataclass(frozen=True, eq=False)
class MaskFiles:
    """Images and masks that are read when they are asked for: for big sets, and for images of many sizes.

    Attributes:
        name, classes, mean, std: see :class:`MaskSet`.
        pairs: an image file and its mask file, each.
        ids: from the numbers in the mask files to classes or ``IGNORE``; a number that is not in it is refused.
    """

    name: str
    pairs: tuple[tuple[Path, Path], ...]
    classes: tuple[str, ...]
    ids: Mapping[int, int]
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    def __post_init__(self):
        if not self.pairs:
            raise DataError(f"{self.name}: no images")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image (uint8, 3,H,W) and mask (uint8, H,W) in their own size.

        Raises:
            DataError: a file cannot be read, the two differ in size, or the mask has unknown numbers or no numbers.
        """
        image_path, mask_path = self.pairs[index]
        image, mask = read_image(image_path), read_mask(mask_path, self.ids, self.classes)
        if image.shape[1:] != mask.shape:
            raise DataError(
                f"{mask_path} is {_extent(mask)} but its image {image_path} is {_extent(image)} (width x height): "
                "the two belong to different images or were resized apart; copy both anew"
            )
        return torch.from_numpy(image), torch.from_numpy(mask)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over the names and the SHA-256 of all files."""
        digest = hashlib.sha256()
        for path in (path for pair in self.pairs for path in pair):
            digest.update(f"{path.name} {sha256(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def left_out(self) -> dict[str, int]:
        """Counts of what neither trains nor is tested on: reads every mask.

        ``unlabelled_pixels`` among ``pixels``, and ``unlabelled_images`` without a single label, which are warned about.
        """
        masks = [read_mask(path, self.ids, self.classes) for _, path in self.pairs]
        return _left_out([int((mask == IGNORE).sum()) for mask in masks], *(mask.size for mask in masks))

    def stacked(self, size: tuple[int, int] | None = None) -> MaskSet:
        """All images in memory, in one size.

        Args:
            size: (height, width); images are resized bilinearly with antialiasing, masks take the nearest pixel. None: as
                the files are.

        Raises:
            DataError: see :meth:`__getitem__`; or the sizes differ and none is given.
        """
        images, masks = zip(*(resized(*self[index], size) for index in range(len(self))))
        sizes = sorted({tuple(mask.shape) for mask in masks})
        if len(sizes) > 1:
            raise DataError(
                f"{self.name} has images of {len(sizes)} sizes, e.g. {sizes[0]} and {sizes[-1]}: give a size"
            )
        height, width = sizes[0]
        name = f"{self.name}, {width}x{height}"
        stack = MaskSet(name, torch.stack(images), torch.stack(masks), self.classes, self.mean, self.std)
        _ = stack.left_out  # warns about images without a label
        return stack


def resized(image: Tensor, mask: Tensor, size: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """uint8 image (3,H,W) and mask (H,W) in another (height, width)."""
    if size is None or tuple(mask.shape) == tuple(size):
        return image, mask
    smooth = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    nearest = F.interpolate(mask[None, None].float(), size, mode="nearest-exact")[0, 0]
    return smooth.round().clamp(0, 255).to(torch.uint8), nearest.to(torch.uint8)


def normalise(images: Tensor, masks: Masks) -> Tensor:
    """uint8 images (N,3,H,W) to what the networks expect."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (masks.mean, masks.std))
    return (images.float() / 255 - mean) / std


def read_image(path: Path) -> np.ndarray:
    """An image file of any mode as uint8, 3,H,W.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB")).transpose(2, 0, 1).copy()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: copy it anew") from error
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, depending on the file type
        raise DataError(f"{path} cannot be read as an image ({error}): copy it anew") from error


def read_mask(path: Path, ids: Mapping[int, int], classes: tuple[str, ...]) -> np.ndarray:
    """A mask file (PNG with one number a pixel: grey, or indices of a palette) as uint8, H,W.

    Raises:
        DataError: it is missing, no image, a colour image, or has numbers that are not in ``ids``.
    """
    try:
        with Image.open(path) as image:
            mode, numbers = image.mode, np.array(image)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: copy it anew") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a mask ({error}): copy it anew") from error
    if numbers.ndim != 2 or numbers.dtype.kind not in "iu":
        raise DataError(
            f"{path} is a picture of mode {mode}, but a mask has one number a pixel (mode P or L): "
            "use the label images, not the coloured ones, and do not convert them to RGB"
        )
    found, counts = np.unique(numbers, return_counts=True)
    unknown = {int(i): int(count) for i, count in zip(found, counts) if int(i) not in ids}
    if unknown:
        raise _unknown_ids(str(path), unknown, len(classes), sorted(ids))
    table = np.full(int(found.max()) + 1, IGNORE, dtype=np.uint8)
    for number in found.tolist():
        table[number] = ids[number]
    return table[numbers]


def pair_up(images: Mapping[str, Path], masks: Mapping[str, Path], name: str) -> tuple[tuple[Path, Path], ...]:
    """Images and masks by what their names share, in the order of these names.

    Raises:
        DataError: one has no counterpart.
    """
    alone = sorted(images.keys() ^ masks.keys())
    if alone:
        first = alone[0]
        what, path = ("mask", images[first]) if first in images else ("image", masks[first])
        raise DataError(
            f"{name}: {path} has no {what} ({len(alone)} files stand alone): copy both folders anew, or remove it"
        )
    return tuple((images[key], masks[key]) for key in sorted(images))


def files_in(folder: Path) -> list[Path]:
    """The image files of a folder, sorted.

    Raises:
        DataError: the folder is missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is missing: copy the data set anew, or set ADVBN_DATA to the folder that holds it")
    return [p for p in sorted(folder.iterdir()) if p.suffix.lower() in FILE_TYPES and not p.name.startswith(".")]


def by_name(paths: list[Path]) -> dict[str, Path]:
    """Files by their names without the file type.

    Raises:
        DataError: two have one name.
    """
    named: dict[str, Path] = {}
    for path in paths:
        if path.stem in named:
            raise DataError(f"{path} and {named[path.stem].name} are two files of one name: remove one")
        named[path.stem] = path
    return named


def check_sums(folder: Path, paths: list[Path], parts: tuple[str, ...]) -> None:
    """Compare files with ``SHA256SUMS`` of their folder, where there is one; ``parts`` are the folders that ``paths`` lie in.

    Raises:
        DataError: a file of these parts is missing, altered, or not listed.
    """
    listing = folder / "SHA256SUMS"
    if not listing.is_file():
        return
    mend = f"copy {folder} anew"
    expected = {}
    for number, line in enumerate(listing.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        row = re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line)
        if row is None:
            raise DataError(f"{listing} is damaged in line {number}: {mend}")
        if row[2].split("/")[0] in parts:
            expected[row[2]] = row[1]
    present = {path.relative_to(folder).as_posix(): path for path in paths}
    if expected.keys() != present.keys():
        name = min(expected.keys() ^ present.keys())
        raise DataError(f"{folder / name} is {'missing' if name in expected else 'not in SHA256SUMS'}: {mend}")
    for name, path in present.items():
        if sha256(path) != expected[name]:
            raise DataError(f"{path} is damaged or altered: its SHA-256 is not that of SHA256SUMS; {mend}")


def _left_out(unlabelled: list[int], *pixels: int) -> dict[str, int]:
    """Counts from the unlabelled pixels of each image, and the pixels of each (one number if all have the same)."""
    sizes = pixels * len(unlabelled) if len(pixels) == 1 else pixels
    empty = sum(count == size for count, size in zip(unlabelled, sizes))
    if empty:
        warnings.warn(
            f"{empty} of {len(unlabelled)} masks have no labelled pixel: their images teach and test nothing",
            stacklevel=3,
        )
    return {"pixels": sum(sizes), "unlabelled_pixels": sum(unlabelled), "unlabelled_images": empty}


def _extent(pixels: np.ndarray) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"


def _refuse_unknown(name: str, masks: np.ndarray, classes: int) -> None:
    counts = np.bincount(masks.ravel(), minlength=IGNORE + 1)
    unknown = {i: int(counts[i]) for i in range(classes, IGNORE) if counts[i]}
    if unknown:
        raise _unknown_ids(name, unknown, classes, [*range(classes), IGNORE])


def _unknown_ids(name: str, unknown: dict[int, int], classes: int, known: list[int]) -> DataError:
    listed = ", ".join(f"{i} ({count} pixels)" for i, count in list(unknown.items())[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    ranges = f"{known[0]} to {known[-1]}" if known == list(range(known[0], known[-1] + 1)) else f"{known}"
    return DataError(
        f"{name}: unknown ids in a mask: {listed}{more}. There are {classes} classes; the ids that are known are {ranges}: "
        "is this a mask of another data set, or was it resized with blending?"
    )
