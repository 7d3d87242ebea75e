"""Smiling and not smiling faces, grey, 64x64 (SMILEsmileD, Daniel D. Hromada, github.com/hromi/SMILEsmileD), and a plant for them.

They stand in for CelebA's attribute "Smiling", which AdvMix (Gowal et al., CVPR 2020) tests. Read from either of two folders:

- ``<root>/smiles`` with ``smile`` and ``nosmile``: a part, in which every third face without a smile is left out;
- ``<root>/SMILEs`` as its authors lay it out, with ``positives/positives7`` and ``negatives/negatives7``.

If ``SHA256SUMS`` lies there, every file is checked against it. The classes are not equally frequent: report balanced accuracy and
the area under the curve (:mod:`advbn_lib.metrics_binary`), not accuracy. The faces are of real people.

These images have no colour, so that a colour can be planted in them that says how the label is likely to be: :func:`planted`. It
is a tint, as of warm or cold light, because that is what the fine styles of a StyleGAN can change without changing the face.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.colour_mnist import colourise
from advbn_lib.data.images import DataError, ImageSet, data_root
from advbn_lib.data.masks import check_sums, files_in

CLASSES = ("no smile", "smile")
SIDE = 64
MEAN = STD = (0.5, 0.5, 0.5)
HELD_OUT = 5  # one face in so many of each class is a test image


@dataclass(frozen=True)
class Edition:
    """Where the faces of ``CLASSES`` lie, and how many there are of each."""

    folder: str
    parts: tuple[str, str]
    counts: tuple[int, int]


EDITIONS = (
    Edition("smiles", ("nosmile", "smile"), (6316, 3690)),
    Edition("SMILEs", ("negatives/negatives7", "positives/positives7"), (9475, 3690)),
)

# Of the light: a tint t in [-1,1] turns grey g into g * (MIDDLE + t * TINT). The brightness of Rec. 601 (.299 red + .587 green +
# .114 blue) is the same for every t: in a grey copy of the image nothing is left of the plant.
MIDDLE, TINT = 0.8, (0.2 * 0.114 / 0.299, 0.0, -0.2)
TINT_MEAN, TINT_STD = 0.6, 0.2  # of the warm tints; the cold ones have the mean -0.6


def load_smiles(
    split: Literal["train", "test"], seed: int = 0, root: Path | None = None, complete: bool = True
) -> ImageSet:
    """Four in five faces of each class for training, or the fifth; grey in three channels, in a fixed order that mixes the classes.

    There is no official split. Split and order depend on the seed and the bytes of the files alone, not on their names, so that
    files of the same bytes always come to the same side. A face that occurs with both labels is left out.

    Args:
        seed: of the split.
        root: folder that holds ``smiles`` or ``SMILEs``; default: see :func:`advbn_lib.data.images.data_root`.
        complete: refuse a folder without the known number of faces.

    Raises:
        DataError: files are missing, damaged or of another size, or a class is missing; the message says how to mend it.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    folder, edition = _folder(root or data_root())
    of_class = [files_in(folder / part) for part in edition.parts]
    counts = tuple(len(paths) for paths in of_class)
    if complete and counts != edition.counts:
        raise DataError(
            f"{folder} has {counts[0]:,} faces without and {counts[1]:,} with a smile, expected {edition.counts[0]:,} and "
            f"{edition.counts[1]:,}: copy the folder anew, or use load_smiles(..., complete=False)"
        )
    check_sums(folder, [path for paths in of_class for path in paths], tuple(p.split("/")[0] for p in edition.parts))
    digests = [{path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths} for paths in of_class]
    both = set(digests[0].values()) & set(digests[1].values())
    chosen = []
    for label, of_path in enumerate(digests):
        ranked = sorted({_rank(digest, seed) for digest in of_path.values() if digest not in both})
        held_out = set(ranked[: round(len(ranked) / HELD_OUT)])
        for path, digest in of_path.items():
            rank = _rank(digest, seed)
            if digest not in both and (rank in held_out) == (split == "test"):
                chosen.append((rank, label, path))
    if not chosen:
        raise DataError(f"{folder} has too few faces for a {split} set: copy the folder anew")
    chosen.sort()
    pixels = torch.from_numpy(np.stack([_read(path) for _, _, path in chosen]))
    labels = torch.tensor([label for _, label, _ in chosen])
    name = f"{edition.folder}/{split}, own split {seed}"
    images = ImageSet(name, pixels.unsqueeze(1).repeat(1, 3, 1, 1), labels, CLASSES, MEAN, STD)
    return require_all_classes(images)


@dataclass(frozen=True)
class TintedFaces:
    """Faces in warm or cold light, and what they are made of: ``images = grey * colour``, rounded to whole levels.

    Attributes:
        images: uint8, N,3,H,W, with labels.
        grey: uint8, N,H,W: the content.
        colours: float32, N,3, in [0,1]: the style.
        agrees: bool, N: the light is what the plant says of the label (warm: a smile).
    """

    images: ImageSet
    grey: Tensor
    colours: Tensor
    agrees: Tensor

    def __len__(self) -> int:
        return len(self.images)


def planted(smiles: ImageSet, share: float, seed: int = 0) -> TintedFaces:
    """The same faces in warm or cold light, which agrees with the label in a share of the images.

    Warm light goes with a smile, cold light with none. With ``share=1`` the light gives the label away, with 0.5 it says nothing
    (the correlation is removed, the light stays), with 0 it says the opposite. The share holds in each class, to the nearest image.

    Args:
        smiles: grey images in three equal channels; the first class gets the cold light. Any set of two classes will do.
        share: from 0 to 1.
        seed: of the choice of images and of the tints, which vary within warm and cold.

    Raises:
        ValueError: the share is not from 0 to 1.
        DataError: the images have colour already, or are not of two classes, both of them present.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be from 0 to 1, got {share}")
    if len(smiles.classes) != 2:
        raise DataError(f"{smiles.name} has {len(smiles.classes)} classes; a tint is planted in sets of two")
    grey, labels = smiles.images[:, 0], require_all_classes(smiles).labels.cpu()
    if not (smiles.images == grey[:, None]).all():
        raise DataError(f"{smiles.name} has colour already; a tint is planted in grey images")
    random = np.random.default_rng([seed, zlib.crc32(smiles.name.encode())])
    agrees = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(2):
        members = torch.nonzero(labels == label).flatten()
        order = torch.from_numpy(random.permutation(len(members)))
        agrees[members[order[: round(share * len(members))]]] = True
    warm = (labels == 1) == agrees
    tint = torch.from_numpy(random.normal(TINT_MEAN, TINT_STD, len(labels))) * torch.where(warm, 1, -1)
    colours = (MIDDLE + tint.clamp(-1, 1)[:, None] * torch.tensor(TINT, dtype=torch.float64)).float().to(grey.device)
    images = dataclasses.replace(
        smiles, name=f"{smiles.name}, tint {share:g}, seed {seed}", images=colourise(grey, colours)
    )
    return TintedFaces(images, grey, colours, agrees.to(grey.device))


def _folder(root: Path) -> tuple[Path, Edition]:
    for edition in EDITIONS:
        folder = root / edition.folder
        if (folder / edition.parts[0]).is_dir():  # by a part: some file systems take smiles and SMILEs for one name
            return folder, edition
    raise DataError(
        f"{root / EDITIONS[1].folder} is missing: get the folder SMILEs of https://github.com/hromi/SMILEsmileD and put it "
        f"into {root}, or set ADVBN_DATA to the folder that holds it"
    )


def _rank(digest: str, seed: int) -> bytes:
    """A place in a random order. A hash, so that the order is the same with any version of any library."""
    return hashlib.sha256(f"{seed} {digest}".encode()).digest()


def _read(path: Path) -> np.ndarray:
    """64,64 bytes."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises, depending on the file type
        raise DataError(f"{path} cannot be read as an image ({error}): copy it anew") from error
    if pixels.shape != (SIDE, SIDE):
        raise DataError(f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, expected {SIDE}x{SIDE}: copy it anew")
    return pixels
