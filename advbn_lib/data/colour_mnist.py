"""Color-MNIST: in training the colour of a digit says which digit it is; in the test it says nothing.

Protocol: Kim et al., "Learning Not to Learn: Training Deep Neural Networks with Biased Data" (LNTL), CVPR 2019. Each class has a
mean colour. A training image is a grey digit times one colour, drawn around the mean colour of its own class; a test image the same
with the mean colour of a class drawn at random, all ten alike. The smaller the variance, the more the colour gives away.

What is known of it, and how:

- The variances .02 to .05 in steps of .005 (of a channel in [0,1]; standard deviations .141 to .224): from the authors' code.
- The palette; that a channel outside ]0,1[ is drawn again, not clipped; and that a test colour is drawn around the mean of a
  random class with the variance of the training set: from two implementations by others, who both say that they follow the
  supplement of the paper. The authors' arrays and the supplement itself were not at hand.
- Not known: whether the arrays hold grey edges of strokes or binary ones. Here the edges are grey, as MNIST has them.

The extreme variance .005 and the unbiased set, whose colours are uniform, are additions of this book. Images are 32x32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.images import ImageSet
from advbn_lib.data.mnist import CLASSES, MEAN, STD, grey_digits

# Mean colours of the digits 0 to 9: red, green, blue, of 255.
PALETTE = (
    (220, 20, 60), (0, 128, 128), (253, 233, 16), (0, 149, 182), (237, 145, 33),
    (145, 30, 188), (70, 240, 240), (250, 197, 187), (210, 245, 60), (128, 0, 0),
)  # fmt: skip
VARIANCES = (0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05)
EXTREME = 0.005
UNBIASED = None

TestColours = Literal["palette", "uniform"]


@dataclass(frozen=True)
class ColouredDigits:
    """Coloured digits and what they are made of: ``images = grey * colour``, rounded to whole levels.

    Attributes:
        images: uint8, N,3,32,32, with labels.
        grey: uint8, N,32,32: the content.
        colours: float32, N,3, in [0,1], whole multiples of 1/255: the style.
    """

    images: ImageSet
    grey: Tensor
    colours: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int | None, start: int = 0) -> ColouredDigits:
        """``count`` digits from number ``start`` on; see :meth:`advbn_lib.data.images.ImageSet.first`."""
        images = self.images.first(count, start)
        end = start + len(images)
        return ColouredDigits(images, self.grey[start:end], self.colours[start:end])

    def to(self, device: torch.device | str) -> ColouredDigits:
        """The same digits on another device."""
        return ColouredDigits(self.images.to(device), self.grey.to(device), self.colours.to(device))

    def recoloured(self, colours: Tensor) -> ColouredDigits:
        """The same digits in other colours (float, N,3, in [0,1]); they are rounded to whole levels."""
        colours = (colours * 255).round() / 255
        images = dataclasses.replace(self.images, images=colourise(self.grey, colours))
        return ColouredDigits(images, self.grey, colours)


def colour_mnist(
    split: Literal["train", "test"], variance: float | None, seed: int = 0, test_colours: TestColours = "palette",
    root: Path | None = None, download: bool = True,
) -> ImageSet:  # fmt: skip
    """The images of :func:`coloured_digits`."""
    return coloured_digits(split, variance, seed, test_colours, root, download).images


def coloured_digits(
    split: Literal["train", "test"], variance: float | None, seed: int = 0, test_colours: TestColours = "palette",
    root: Path | None = None, download: bool = True,
) -> ColouredDigits:  # fmt: skip
    """60,000 training or 10,000 test digits in MNIST's order, each in one colour.

    The colours depend on the split, the variance and the seed alone. Sets of one seed are made from the same random numbers: from
    one variance to another only the spread changes.

    Args:
        variance: of each channel in [0,1] around its mean, e.g. one of ``VARIANCES``, or ``EXTREME``; ``None``: every colour of
            every image is uniform in the cube, in both splits.
        test_colours: ``"palette"``: as in LNTL, around the mean colour of a class drawn at random, whatever the digit;
            ``"uniform"``: uniform in the cube, so that one test set serves all variances.
        root, download: see :func:`advbn_lib.data.mnist.load_mnist`.

    Raises:
        ValueError: an unknown split or reading of the test colours, or a variance that is not above 0.
        DataError: MNIST is missing or damaged, or lacks a class; the message says how to mend it.
    """
    grey, labels = grey_digits(split, root, download)
    return coloured(grey, labels, split, variance, seed, test_colours, "colour_mnist")


def coloured(
    grey: Tensor, labels: Tensor, split: Literal["train", "test"], variance: float | None, seed: int = 0,
    test_colours: TestColours = "palette", name: str = "coloured digits",
) -> ColouredDigits:  # fmt: skip
    """Any grey digits (uint8, N,H,W, on the CPU) in colours by the same protocol; see :func:`coloured_digits`."""
    if variance is not None and not variance > 0:
        raise ValueError(f"the variance must be above 0, or None for an unbiased set; got {variance}")
    if test_colours not in ("palette", "uniform"):
        raise ValueError(f"test_colours is 'palette' or 'uniform', got {test_colours!r}")
    random = np.random.default_rng([seed, ("train", "test").index(split)])
    ranks = torch.from_numpy(random.random((len(labels), 3)))
    others = torch.from_numpy(random.integers(0, len(CLASSES), len(labels)))
    of_class = labels if split == "train" else others
    uniform = variance is None or (split == "test" and test_colours == "uniform")
    colours = ranks if uniform else _around(torch.tensor(PALETTE)[of_class] / 255, variance, ranks)
    colours = (colours * 255).round().float() / 255
    name = f"{name}/{split}, {'uniform' if uniform else f'variance {variance:g}'}, seed {seed}"
    images = ImageSet(name, colourise(grey, colours), labels, CLASSES, MEAN, STD)
    return ColouredDigits(require_all_classes(images), grey, colours)


def colourise(grey: Tensor, colours: Tensor) -> Tensor:
    """Grey images (uint8, N,H,W) times colours (float, N,3, in [0,1]): uint8, N,3,H,W, rounded."""
    pixels = torch.empty(len(grey), 3, *grey.shape[1:], dtype=torch.uint8, device=grey.device)
    for channel in range(3):  # in turn: all at once would need four times the memory of the result more
        pixels[:, channel] = (grey * colours[:, channel, None, None].float()).round().to(torch.uint8)
    return pixels


def _around(means: Tensor, variance: float, ranks: Tensor) -> Tensor:
    """Values in ]0,1[ from normal distributions of these means and this variance, cut off at 0 and 1.

    Drawing again whatever falls outside gives the same distribution. Here a uniform number, the value's rank among all that may
    come, goes through the inverse of the distribution function: one pass, and one random number a value.
    """
    means, deviation = means.double(), variance**0.5
    below, up_to_one = (torch.special.ndtr((bound - means) / deviation) for bound in (0.0, 1.0))
    return (means + deviation * torch.special.ndtri(below + ranks * (up_to_one - below))).clamp(0, 1)
