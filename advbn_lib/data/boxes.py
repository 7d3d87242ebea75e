"""Images with boxes around the objects in them: what every detection data set is turned into."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from advbn_lib.data.images import DataError

FILE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class BoxSet:
    """Images and the objects in them. An image may have no object.

    Attributes:
        name: e.g. ``"voc2007/trainval"``.
        images: each a uint8 tensor 3,H,W, or the path of a file, which is read when it is asked for.
        boxes: of each image, float32 (n,4): left, top, right, bottom in pixels, from 0 to the image's width and height. A box
            around the one pixel at the top left is (0, 0, 1, 1).
        labels: of each image, int64 (n,), from 1 to ``len(classes)``; 0 is the background.
        difficult: of each image, bool (n,): objects that a test does not count (VOC's flag).
        classes: their names, in the order of the labels.
        left_out: how much of the data set is not here, or not as it was, by reason.
    """

    name: str
    images: tuple[Tensor | Path, ...]
    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    difficult: tuple[Tensor, ...]
    classes: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not self.images:
            raise DataError(f"{self.name}: no images")
        if not len(self.images) == len(self.boxes) == len(self.labels) == len(self.difficult):
            raise DataError(f"{self.name}: images, boxes, labels and difficult flags must be as many as each other")
        for index, (boxes, labels, difficult) in enumerate(zip(self.boxes, self.labels, self.difficult)):
            _check_objects(f"{self.name}, image {index}", boxes, labels, difficult, len(self.classes))

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """One image: uint8, 3,H,W.

        Raises:
            DataError: its file is missing or no image.
        """
        image = self.images[index]
        return image if isinstance(image, Tensor) else read_image(image)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of pixels (of an image that is not in memory: of its file), boxes, labels, flags and class names."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for image, boxes, labels, difficult in zip(self.images, self.boxes, self.labels, self.difficult):
            if isinstance(image, Tensor):
                digest.update(str(tuple(image.shape)).encode() + image.cpu().contiguous().numpy().tobytes())
            else:
                digest.update(_bytes_of(image))
            digest.update(boxes.cpu().numpy().astype("<f4").tobytes() + labels.cpu().numpy().astype("<i8").tobytes())
            digest.update(difficult.cpu().numpy().tobytes())
        return digest.hexdigest()

    def first(self, count: int | None) -> BoxSet:
        """The first ``count`` images in the data set's own order; all if None.

        Raises:
            DataError: if there are fewer.
        """
        if count is None:
            return self
        if not 0 < count <= len(self):
            raise DataError(f"{self.name}: asked for {count} images, but it has {len(self)}")
        return self._only(range(count))

    def with_boxes(self) -> BoxSet:
        """Without the images that have no object; they are counted in ``left_out``."""
        kept = [index for index, boxes in enumerate(self.boxes) if len(boxes)]
        if not kept:
            raise DataError(f"{self.name}: none of its {len(self)} images has an object")
        reason, count = "images without objects", len(self) - len(kept)
        counts = {**self.left_out, reason: self.left_out.get(reason, 0) + count} if count else self.left_out
        return dataclasses.replace(self._only(kept), left_out=counts)

    def resized(self, min_side: int, max_side: int) -> BoxSet:
        """The same set in memory, each image scaled as :func:`resize` says."""
        pairs = [resize(self.image(i), boxes, min_side, max_side) for i, boxes in enumerate(self.boxes)]
        images, boxes = zip(*pairs)
        return dataclasses.replace(self, name=f"{self.name}, {min_side} px", images=images, boxes=boxes)

    def counts(self) -> dict[str, int]:
        """Objects of each class."""
        found = torch.cat(self.labels).bincount(minlength=len(self.classes) + 1).tolist()
        return dict(zip(self.classes, found[1:]))

    def _only(self, indices) -> BoxSet:
        parts = {
            name: tuple(getattr(self, name)[index] for index in indices)
            for name in ("images", "boxes", "labels", "difficult")
        }
        return dataclasses.replace(self, **parts)


def resize(image: Tensor, boxes: Tensor, min_side: int, max_side: int) -> tuple[Tensor, Tensor]:
    """Scale a uint8 image (3,H,W) so that its short side is ``min_side``, or its long side ``max_side`` if that is smaller.

    Bilinear, with antialiasing; the boxes (n,4) are scaled with it.
    """
    height, width = image.shape[1:]
    scale = min(min_side / min(height, width), max_side / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    if size == (height, width):
        return image, boxes
    pixels = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]
    factors = torch.tensor([size[1] / width, size[0] / height] * 2, device=boxes.device)
    return pixels.round().clamp(0, 255).to(torch.uint8), boxes * factors


def read_image(path: Path) -> Tensor:
    """An image file as uint8, 3,H,W; grey, palette and CMYK images become RGB. A turn noted in the file is not made.

    Raises:
        DataError: the file is missing, or damaged, or no image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy it there") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, depending on the file type
        raise DataError(f"{path} cannot be read as an image ({error}): copy it anew") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(path: Path) -> tuple[int, int]:
    """Width and height that an image file states, without reading its pixels.

    Raises:
        DataError: see :func:`read_image`.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}): copy it anew") from error


class Objects:
    """Collects the objects of one image after another, puts right what can be, and counts what is left out.

    Args:
        classes: names, in the order of the labels.
    """

    def __init__(self, classes: tuple[str, ...]):
        self.classes = classes
        self.left_out: Counter[str] = Counter()
        self.images: list[Path] = []
        self.boxes: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.difficult: list[Tensor] = []

    def start(self, image: Path, size: tuple[int, int]) -> None:
        """The next image, of this width and height."""
        self.images.append(image)
        self._rows: list[tuple[list[float], int, bool]] = []
        self._size = size

    def add(self, box: tuple[float, float, float, float], name: str, difficult: bool = False) -> None:
        """An object of the image: left, top, right, bottom."""
        if name not in self.classes:
            self.left_out["objects of other classes"] += 1
        elif not (box[2] > box[0] and box[3] > box[1]):
            self.left_out["boxes of no area"] += 1
        else:
            limits = [*self._size, *self._size]
            clipped = [min(max(value, 0.0), float(limit)) for value, limit in zip(box, limits)]
            if not (clipped[2] > clipped[0] and clipped[3] > clipped[1]):
                self.left_out["boxes outside their image"] += 1
                return
            self.left_out["boxes cut off at the edge of their image"] += clipped != list(box)
            self._rows.append((clipped, self.classes.index(name) + 1, difficult))

    def end(self) -> None:
        """No more objects in this image."""
        boxes, labels, difficult = zip(*self._rows) if self._rows else ((), (), ())
        self.boxes.append(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        self.labels.append(torch.tensor(labels, dtype=torch.int64))
        self.difficult.append(torch.tensor(difficult, dtype=torch.bool))

    def box_set(self, name: str) -> BoxSet:
        """All images, with one warning that says what was left out."""
        left_out = {reason: count for reason, count in sorted(self.left_out.items()) if count}
        if left_out:
            listed = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            warnings.warn(f"{name}: left out or changed: {listed}", stacklevel=4)
        lists = (self.images, self.boxes, self.labels, self.difficult)
        return BoxSet(name, *(tuple(each) for each in lists), self.classes, left_out)


def chosen_classes(known: tuple[str, ...], chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """``chosen``, or all that are known if None.

    Raises:
        ValueError: one is not known, or stands there twice; the message lists the known.
    """
    if chosen is None:
        return known
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen or len(set(chosen)) < len(chosen):
        wrong = f"no class {unknown[0]!r}" if unknown else "name each class once, and at least one"
        raise ValueError(f"{wrong}; there are {', '.join(known)}")
    return tuple(chosen)


def _check_objects(where: str, boxes: Tensor, labels: Tensor, difficult: Tensor, classes: int) -> None:
    if boxes.shape != (len(labels), 4) or boxes.dtype != torch.float32:
        raise DataError(
            f"{where}: boxes must be float32 and ({len(labels)},4), one a label, got {boxes.dtype} and {tuple(boxes.shape)}"
        )
    if labels.dtype != torch.int64 or difficult.shape != labels.shape or difficult.dtype != torch.bool:
        raise DataError(f"{where}: labels must be int64, and difficult flags bool and as many")
    if not bool(((boxes[:, 2:] > boxes[:, :2]) & torch.isfinite(boxes[:, 2:])).all()):
        raise DataError(f"{where}: every box needs a right above its left and a bottom above its top, all finite")
    if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= classes:
        raise DataError(f"{where}: labels must go from 1 to {classes}, got {sorted(set(labels.tolist()))}")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: copy it there") from None
