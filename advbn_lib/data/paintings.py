"""The colours of a painting, given to an image: each channel's histogram is matched to the painting's.

Histogram matching (Gonzalez and Woods, "Digital Image Processing", section 3.3) replaces a grey level by the painting's
level at the same quantile, in each channel apart. Shapes stay and the palette changes: a transfer of style that needs
no network. All it needs of a painting is three histograms, so those of six paintings travel with the library, in
``painting_histograms.json``, and not the pictures. :func:`write_histograms` made that file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from advbn_lib.data.images import DataError
from advbn_lib.files import atomic_write, sha256

HISTOGRAMS = Path(__file__).with_name("painting_histograms.json")
LEVELS = 256
NEURAL_STYLE = "jcjohnson/neural-style @ 07c4b8299f8fbdafec0c514fc820ff1d7ff62e46"
PYTORCH_ADAIN = "naoto0804/pytorch-AdaIN @ 47950d0e6656a95a80a4b105c4c0f58d38ef785c"


@dataclass(frozen=True)
class Painting:
    """Where a painting's histograms are from.

    Attributes:
        title, painter, year: of the work.
        file: the photograph that was counted.
        source: the repository that it is from; it was then scaled to at most 512 pixels a side.
        sha256: of the scaled file.
    """

    title: str
    painter: str
    year: str
    file: str
    source: str
    sha256: str


PAINTINGS: Mapping[str, Painting] = {
    "starry_night": Painting(
        "The Starry Night", "Vincent van Gogh", "1889", "starry_night_google.jpg", NEURAL_STYLE,
        "07b4e406173b459520d7861a73cad0e5482bb1df3441766d7b4d6581dc06c60b",
    ),
    "the_scream": Painting(
        "The Scream", "Edvard Munch", "1893", "the_scream.jpg", NEURAL_STYLE,
        "1cf38250815c39587eecc7cf3f504e463d4b4d7a86fa0afc317ca94cfa2c520b",
    ),
    # Also known as "The Shipwreck of the Minotaur", and dated 1805 where the photograph is from.
    "shipwreck": Painting(
        "The Wreck of a Transport Ship", "J. M. W. Turner", "about 1810", "shipwreck.jpg", NEURAL_STYLE,
        "9b1471edc020ee21c20033a4ca8b1db18fd4a51b9dce982b2d82aa9b1b5c622e",
    ),
    "composition_vii": Painting(
        "Tableau No. 2 / Composition No. VII", "Piet Mondrian", "1913", "mondrian.jpg", PYTORCH_ADAIN,
        "884bfe693e7dd43b87b90c90520d84838db03fcf9e6bea4e595c610fa6f0411b",
    ),
    "woman_with_hat": Painting(
        "Woman with a Hat", "Henri Matisse", "1905", "woman_with_hat_matisse.jpg", PYTORCH_ADAIN,
        "d7b8331e6ffdc4238f11e684e37e0d3e8aaec04715aab31a64379c4387726b04",
    ),
    "contrast_of_forms": Painting(
        "Contrast of Forms", "Fernand Léger", "1913", "contrast_of_forms.jpg", PYTORCH_ADAIN,
        "a8cb5c92a85a1572b636c8ee192fe71009957da910622618cfa1e13cf8f0715e",
    ),
}  # fmt: skip


def painting_histogram(name: str) -> Tensor:
    """How many pixels of a painting have each grey level: int64, 3,256 (channel, level), on the CPU.

    Args:
        name: one of ``PAINTINGS``.
    """
    if name not in PAINTINGS:
        raise ValueError(f"no painting {name!r}; there are {', '.join(PAINTINGS)}")
    return torch.tensor(_stored_histograms()[name], dtype=torch.int64)


def match_histogram(images: Tensor, histogram: Tensor) -> Tensor:
    """Images with another histogram, as ``skimage.exposure.match_histograms(image, painting, channel_axis=-1)`` gives.

    A level whose share of pixels at or below it is q becomes the level at which the painting reaches q, interpolated
    linearly between the levels that the painting has.

    Args:
        images: whole grey levels in [0,1] (others are rounded to those), N,3,H,W.
        histogram: int64, 3,256, e.g. :func:`painting_histogram`; on any device.

    Returns:
        Levels in [0,1], not rounded, N,3,H,W.
    """
    pixels = images.shape[2] * images.shape[3]
    levels = (images * (LEVELS - 1)).round().long().clamp(0, LEVELS - 1).flatten(2)
    counts = levels.new_zeros(*levels.shape[:2], LEVELS).scatter_add_(2, levels, torch.ones_like(levels))
    theirs = histogram.to(images.device).cumsum(1)
    # Quantiles as whole numbers, times (pixels of the painting) x (pixels of an image): the same on every device.
    quantiles = (counts.cumsum(2) * theirs[0, -1]).transpose(0, 1).flatten(1)  # 3, N * 256
    table = _levels_at(quantiles, theirs * pixels).to(images.dtype)
    table = table.unflatten(1, (-1, LEVELS)).transpose(0, 1)  # N, 3, 256
    return table.gather(2, levels).view_as(images) / (LEVELS - 1)


def _levels_at(quantiles: Tensor, cumulative: Tensor) -> Tensor:
    """The levels (3,M) at which ``cumulative`` (3,256) reaches ``quantiles`` (3,M), interpolated linearly."""
    above = torch.searchsorted(cumulative, quantiles)  # the first level that reaches it: one that the painting has
    reached_before = cumulative.gather(1, (above - 1).clamp_min(0))
    below = torch.searchsorted(cumulative, reached_before)  # the next lower level that the painting has
    first = (above == 0) | (reached_before == 0)  # no lower level: everything darker becomes the darkest
    gap = (cumulative.gather(1, above) - reached_before).clamp_min(1)
    share = (quantiles - reached_before).float() / gap
    return torch.where(first, above, below + share * (above - below))


@lru_cache(maxsize=1)
def _stored_histograms() -> dict[str, list[list[int]]]:
    """``{painting: 3 x 256 counts}`` from the file beside this module, checked."""
    mend = "install advbn_lib anew, or make the file with advbn_lib.data.paintings.write_histograms"
    try:
        stored = json.loads(HISTOGRAMS.read_text(encoding="utf-8"))
        histograms = {name: stored[name]["histogram"] for name in PAINTINGS}
        shapes = {name: np.array(counts, dtype=np.int64).shape for name, counts in histograms.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{HISTOGRAMS} is missing or damaged ({error!r}): {mend}") from error
    for name, shape in shapes.items():
        totals = {sum(channel) for channel in histograms[name]}
        if shape != (3, LEVELS) or len(totals) != 1:
            raise DataError(f"{HISTOGRAMS}: {name} has not 3 x {LEVELS} counts of one picture: {mend}")
    return histograms


def count_levels(path: Path) -> Tensor:
    """The histogram of an image file: int64, 3,256 (channel, level).

    Raises:
        DataError: the file is missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    except OSError as error:
        raise DataError(f"{path} is missing or no readable image ({error}): put the picture there") from error
    return torch.from_numpy(np.stack([np.bincount(channel, minlength=LEVELS) for channel in pixels.T]))


def write_histograms(folder: Path, path: Path = HISTOGRAMS) -> None:
    """Count the paintings in ``folder`` and write ``painting_histograms.json``, with where each is from.

    Args:
        folder: holds the files of ``PAINTINGS``, to the byte.
        path: the file to write.

    Raises:
        DataError: a file is missing, or is another than the one whose SHA-256 ``PAINTINGS`` gives.
    """
    entries = []
    for name, painting in PAINTINGS.items():
        picture = folder / painting.file
        counts = count_levels(picture).tolist()
        if sha256(picture) != painting.sha256:
            raise DataError(f"{picture} is not the file of PAINTINGS: its SHA-256 should be {painting.sha256}")
        fields = [f'"{field}": {json.dumps(value, ensure_ascii=False)}' for field, value in asdict(painting).items()]
        rows = ",\n      ".join(json.dumps(channel, separators=(",", ":")) for channel in counts)
        fields.append(f'"histogram": [\n      {rows}\n    ]')
        entries.append(f'  "{name}": {{\n    ' + ",\n    ".join(fields) + "\n  }")
    with atomic_write(path) as file:
        file.write(("{\n" + ",\n".join(entries) + "\n}\n").encode())
