"""The style codes of a whole data set: improved image by image, checked, and kept in a folder.

It is done once, before any classifier is trained: the mixing adversary then only decodes. See :mod:`advbn_lib.style_encoding` for
the source and for what a code is. Three rules:

- Of an image the best code on the way is kept, and one that makes the perceptual distance worse than the start's is never taken.
- Codes are kept in half precision only if rounding the start costs next to nothing; the rules above are then about rounded codes.
- A part of the data set is a function of its own images and the seed alone: a run that was killed goes on, on a CPU bit for bit.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.files import atomic_write, sha256
from advbn_lib.progress import progress
from advbn_lib.provenance import code_hash, state_checksum
from advbn_lib.style_encoding import (
    CHUNK,
    PerceptualDistance,
    StyleEncoder,
    StyleGenerator,
    check_images,
    code_scale,
    mix,
    pictures,
    pixel_distance,
)

MANIFEST = "manifest.json"
FORMAT = 1
HALF_COSTS = 1e-3  # at most this share more perceptual distance, in the mean, for half precision


@dataclass(frozen=True)
class CodeSchedule:
    """How codes are improved: Adam on all codes of a part at once, the learning rate falling to 0 as a cosine.

    Args:
        steps: at least 1.
        lr: at the start, in units of w's spread.
        batch_size: images of a part, 2 or more. Each has its own steps, but for the partners of the mixing loss.
        perceptual, pixel: weights of the distances of the decoded image from the real one.
        mixing: weight of the squared error of the encoder's codes of mixed images, in units of w's spread; 0: none, and no encoder
            is needed.
        half: keep codes in half precision if that costs next to nothing.
    """

    steps: int = 100
    lr: float = 0.05
    batch_size: int = 64
    perceptual: float = 1.0
    pixel: float = 10.0
    mixing: float = 0.1
    half: bool = True

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 2 or not self.lr > 0:
            raise ValueError(
                f"steps must be at least 1, batch_size 2 and lr above 0: got {self.steps}, {self.batch_size}, {self.lr}"
            )
        if not self.perceptual > 0 or self.pixel < 0 or self.mixing < 0:
            raise ValueError(
                f"perceptual must be above 0, pixel and mixing 0 or more: got {self.perceptual}, {self.pixel}, {self.mixing}"
            )

    def rate(self, step: int) -> float:
        """Learning rate at a step, from 0 on."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes of a data set, in its order, and how near they come.

    Attributes:
        codes: float32, N,layers,latent (rounded, if they were kept in half precision).
        perceptual, pixel: distances (N,) of the decoded images from the real ones.
        start: the perceptual distance (N,) before the steps.
        half: whether they were kept in half precision.
    """

    codes: Tensor
    perceptual: Tensor
    pixel: Tensor
    start: Tensor
    half: bool

    def __len__(self) -> int:
        return len(self.codes)

    def to(self, device: torch.device | str) -> Codes:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ARRAYS}
        return Codes(**moved, half=self.half)


ARRAYS = tuple(field.name for field in fields(Codes) if field.name != "half")


@torch.no_grad()
def distances(
    generator: StyleGenerator, codes: Tensor, images: Tensor, distance: PerceptualDistance
) -> tuple[Tensor, Tensor]:
    """Perceptual and pixel distance (N,) of what codes decode to from images (uint8, N,3,R,R), in passes of :data:`CHUNK`."""
    perceptual, pixel = [], []
    for part, wanted in zip(codes.split(CHUNK), images.split(CHUNK), strict=True):
        made, real = pictures(generator, part), wanted.to(codes.device).float() / 255
        perceptual.append(distance(made, real))
        pixel.append(pixel_distance(made, real))
    return torch.cat(perceptual), torch.cat(pixel)


def optimise_codes(
    generator: nn.Module, images: ImageSet, start: Tensor, distance: PerceptualDistance, schedule: CodeSchedule = CodeSchedule(),
    encoder: StyleEncoder | None = None, seed: int = 0, folder: Path | None = None, show_progress: bool = True,
) -> Codes:  # fmt: skip
    """Better codes than ``start``, image by image.

    Args:
        generator: trained; it is not changed. ``distance`` and ``encoder`` are on its device.
        start: codes (N,layers,latent), as :func:`~advbn_lib.style_encoding.encode_images` gives them.
        encoder: for the mixing loss; needed unless ``schedule.mixing`` is 0.
        seed: of who is mixed with whom.
        folder: where each part is kept when it is done, with a manifest; see :func:`load_codes`. Parts that are there are not done
            again. None: nothing is kept.

    Returns:
        Codes on the generator's device. No image's perceptual distance is larger than that of its start.

    Raises:
        DataError: the images do not fit the generator; the folder has codes of other images, settings or networks, or damaged ones.
        ValueError: ``start`` does not fit, or there is no encoder for the mixing loss.
        FloatingPointError: a distance is not finite; the message names the images.
    """
    check_images(generator, images)
    shape = (len(images), generator.layers, generator.config.latent)
    if start.shape != shape:
        raise ValueError(f"start must be a code for each image, {shape}, got {tuple(start.shape)}: encode these images")
    if schedule.mixing and encoder is None:
        raise ValueError("the mixing loss needs the encoder: give it, or set mixing to 0")
    frozen = copy.deepcopy(generator).eval().requires_grad_(False)
    device = frozen.mean_w.device
    start = start.detach().to(device)
    half = schedule.half and _half_is_enough(frozen, start, images.images, distance)
    if half:
        start = start.half().float()
    store = (
        None
        if folder is None
        else _Store.open(folder, _about(frozen, images, start, distance, schedule, encoder, seed, half))
    )
    size, parts = schedule.batch_size, []
    # A last part of one image would have nobody to be mixed with: it joins the part before.
    ends = [end for end in range(size, len(images), size) if len(images) - end > 1] + [len(images)]
    for begin, end in progress(list(zip([0, *ends], ends)), "codes", show_progress):
        name = f"codes-{begin:06d}.npz"
        part = None if store is None else store.read(name)
        if part is None:
            pixels = images.images[begin:end].to(device).float() / 255
            random = torch.Generator().manual_seed((seed * 1_000_003 + begin) % 2**63)
            try:
                part = _optimise(frozen, pixels, start[begin:end], distance, schedule, encoder, random, half)
            except FloatingPointError as error:
                raise FloatingPointError(f"images {begin} to {end - 1} of {images.name}: {error}") from error
            if store is not None:
                store.write(name, part)
        parts.append(part.to(device))
    return _together(parts, half)


def load_codes(folder: Path, images: ImageSet | None = None) -> Codes:
    """Codes that :func:`optimise_codes` has kept, on the CPU.

    Args:
        images: checked to be those that the codes are of.

    Raises:
        DataError: there are none, not all, those of other images, or damaged ones; the message says how to mend it.
    """
    store = _Store(folder, _read_manifest(folder))
    about = store.manifest["about"]
    if images is not None and about["images"] != images.checksum:
        raise DataError(f"{folder} has the codes of other images than {images.name}: encode these, into another folder")
    parts = [store.read(name) for name in sorted(store.manifest["parts"])]
    found = sum(map(len, parts))
    if found != about["count"]:
        raise DataError(f"{folder} has the codes of {found} images of {about['count']}: let optimise_codes finish it")
    return _together(parts, about["half"])


# ---- the steps ------------------------------------------------------------------------------


def _optimise(
    generator: nn.Module, target: Tensor, start: Tensor, distance: PerceptualDistance, schedule: CodeSchedule,
    encoder: StyleEncoder | None, random: torch.Generator, half: bool,
) -> Codes:  # fmt: skip
    """The codes of a part; ``target`` are its images in [0,1]."""
    with torch.no_grad():
        features = distance.features(target)
    scale = code_scale(generator)
    offset = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([offset], lr=schedule.lr)
    best, first, lowest, finite = start, None, None, torch.ones((), dtype=torch.bool, device=start.device)
    for step in range(schedule.steps + 1):
        with torch.enable_grad():
            codes = start + scale * offset
            made = pictures(generator, codes)
            perceptual = distance.to_features(made, features)
            losses = schedule.perceptual * perceptual + schedule.pixel * pixel_distance(made, target)
            total = losses.sum()
            if schedule.mixing and step < schedule.steps:
                total = total + len(start) * schedule.mixing * _mixing_error(generator, encoder, codes, scale, random)
        finite &= torch.isfinite(total)
        if first is None:
            first, lowest = perceptual.detach(), losses.detach()
        better = (losses.detach() < lowest) & (perceptual.detach() <= first)
        best = torch.where(better[:, None, None], codes.detach(), best)
        lowest = torch.where(better, losses.detach(), lowest)
        if step < schedule.steps:
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            offset.grad = torch.autograd.grad(total, offset)[0]
            optimizer.step()
    if not bool(finite):
        raise FloatingPointError(
            "a distance is not finite: lower lr, and look at the start's codes and the classifier's features"
        )
    return _accepted(generator, best.half().float() if half else best, start, target, distance, half)


@torch.no_grad()
def _accepted(
    generator: nn.Module, found: Tensor, start: Tensor, target: Tensor, distance: PerceptualDistance, half: bool
) -> Codes:
    """What is kept: ``found``, which was just rounded, where that is no worse than the start; else the start."""
    before, after = (distance(pictures(generator, codes), target) for codes in (start, found))
    codes = torch.where((after <= before)[:, None, None], found, start)
    made = pictures(generator, codes)
    return Codes(codes, torch.minimum(before, after), pixel_distance(made, target), before, half)


def _mixing_error(
    generator: nn.Module, encoder: StyleEncoder, codes: Tensor, scale: Tensor, random: torch.Generator
) -> Tensor:
    """How far the codes of mixed images are from the codes that were mixed; the partner and the cut are drawn anew each time."""
    count, layers = codes.shape[:2]
    away = int(torch.randint(1, count, (), generator=random))
    cuts = torch.randint(1, layers, (count,), generator=random).to(codes.device)
    swapped = mix(codes, codes.roll(away, 0), cuts)
    return ((encoder(pictures(generator, swapped)) - swapped) / scale).square().mean()


def _half_is_enough(generator: nn.Module, start: Tensor, images: Tensor, distance: PerceptualDistance) -> bool:
    exact, rounded = (distances(generator, codes, images, distance)[0] for codes in (start, start.half().float()))
    return bool(rounded.mean() <= (1 + HALF_COSTS) * exact.mean())


def _together(parts: list[Codes], half: bool) -> Codes:
    return Codes(**{name: torch.cat([getattr(part, name) for part in parts]) for name in ARRAYS}, half=half)


# ---- the folder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Store:
    """A folder with parts, and a manifest that says what they are of, and their checksums."""

    folder: Path
    manifest: dict

    @classmethod
    def open(cls, folder: Path, about: dict) -> _Store:
        if not (folder / MANIFEST).exists():
            return cls(folder, {"format": FORMAT, "about": about, "parts": {}})
        manifest = _read_manifest(folder)
        if differing := [name for name in about if manifest["about"].get(name) != about[name]]:
            raise DataError(
                f"{folder} has codes that were made with another {', '.join(differing)}: choose another folder, or remove this one"
            )
        return cls(folder, manifest)

    def read(self, name: str) -> Codes | None:
        """A part, or None if it is not done.

        Raises:
            DataError: it is damaged or gone.
        """
        if name not in self.manifest["parts"]:
            return None
        path = self.folder / name
        if not path.exists() or sha256(path) != self.manifest["parts"][name]:
            raise DataError(f"{path} is damaged or gone: remove the folder, and encode again")
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {array: torch.from_numpy(arrays[array]).float() for array in ARRAYS}
        return Codes(**tensors, half=self.manifest["about"]["half"])

    def write(self, name: str, part: Codes) -> None:
        """Add a part; the manifest names it when it is whole."""
        arrays = {array: getattr(part, array).cpu().numpy() for array in ARRAYS}
        if part.half:
            arrays["codes"] = arrays["codes"].astype(np.float16)
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        with atomic_write(self.folder / name) as file:
            file.write(buffer.getbuffer())
        self.manifest["parts"][name] = hashlib.sha256(buffer.getbuffer()).hexdigest()
        with atomic_write(self.folder / MANIFEST) as file:
            file.write(json.dumps(self.manifest, indent=1, sort_keys=True).encode() + b"\n")


def _read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"there are no codes in {folder}: make them with optimise_codes") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove the folder, and encode again") from error
    known = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not known or not all(isinstance(manifest.get(part), dict) for part in ("about", "parts")):
        raise DataError(f"{path} is not a manifest of codes of format {FORMAT}: choose another folder")
    return manifest


def _about(
    generator: nn.Module, images: ImageSet, start: Tensor, distance: PerceptualDistance, schedule: CodeSchedule,
    encoder: StyleEncoder | None, seed: int, half: bool,
) -> dict:  # fmt: skip
    """What the codes are a function of."""
    networks = {"generator": generator, "distance": distance} | ({"encoder": encoder} if schedule.mixing else {})
    return {
        "images": images.checksum,
        "images' name": images.name,
        "count": len(images),
        "half": half,
        "seed": seed,
        "schedule": asdict(schedule),
        "start": state_checksum({"start": start}),
        "code": code_hash(["advbn_lib.style_codes"]),
        **{name: state_checksum(network.state_dict()) for name, network in networks.items()},
    }
