"""scikit-learn's bundled handwritten digits, as 32x32 RGB: real data that need no network, for the ``smoke`` preset."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from advbn_lib.data.images import DataError, ImageSet

TRAIN_IMAGES = 1297
MEAN = STD = (0.5, 0.5, 0.5)


def load_digits(split: Literal["train", "test"]) -> ImageSet:
    """1,297 training or 500 test digits (UCI "Optical Recognition of Handwritten Digits"), in a fixed shuffled order.

    The 8x8 originals are enlarged bilinearly, and grey is repeated in the three channels.

    Raises:
        DataError: if scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', got {split!r}")
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    digits = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    order = order[:TRAIN_IMAGES] if split == "train" else order[TRAIN_IMAGES:]
    small = torch.tensor(digits.images[order], dtype=torch.float64).unsqueeze(1) * (255 / 16)
    large = (
        F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).round().clamp(0, 255).to(torch.uint8)
    )
    labels = torch.tensor(digits.target[order], dtype=torch.int64)
    return ImageSet(f"digits/{split}", large.repeat(1, 3, 1, 1), labels, tuple("0123456789"), MEAN, STD)
