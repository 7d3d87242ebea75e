"""Data sets that lack a class."""

from __future__ import annotations

import torch

from advbn_lib.data.images import DataError, ImageSet


def require_all_classes(images: ImageSet) -> ImageSet:
    """The same set, if each of its classes has an image in it.

    A classifier trained without a class never names it. Mixing draws the styles of other classes, so with a class missing it
    also mixes less than its name says. Neither shows in the loss, so it is checked before.

    Raises:
        DataError: names the classes that have no image.
    """
    counts = torch.bincount(images.labels.cpu(), minlength=len(images.classes))
    missing = [name for name, count in zip(images.classes, counts.tolist()) if count == 0]
    if missing:
        raise DataError(
            f"{images.name}: no image of {', '.join(missing)} among its {len(images):,} images: take more of them, or images in a "
            "mixed order, or leave the class out of the list of classes"
        )
    return images
