"""Handwritten digits of 8x8 pixels and a network that learns them in seconds: what assignments 3 and 4 compute with."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.data.digits import load_digits

CLASSES = 10


def small_digits(split: str) -> tuple[Tensor, Tensor]:
    """Images in [0,1] (N,1,8,8), float32, and labels (N,) of scikit-learn's digits; 1,297 to train and 500 to test.

    Raises:
        DataError: scikit-learn is not installed.
    """
    images, labels = _loaded(split)
    return images.clone(), labels.clone()


@lru_cache(maxsize=2)
def _loaded(split: str) -> tuple[Tensor, Tensor]:
    found = load_digits(split)
    return F.avg_pool2d(found.images[:, :1].float() / 255, 4), found.labels


def small_network(seed: int, width: int = 16) -> nn.Sequential:
    """Two convolutions and a linear layer: images (N,1,8,8) to logits (N,10). Changes no global random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * width, CLASSES),
        )  # fmt: skip


def optimiser(network: nn.Module) -> torch.optim.Optimizer:
    """SGD as all trainings of these assignments use it."""
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def trained_network(seed: int, noise: float = 0.0, epochs: int = 8, width: int = 16) -> nn.Sequential:
    """The network, trained on the digits, in eval mode and without gradients. Seconds.

    Args:
        noise: standard deviation of the Gaussian noise on the training images.
    """
    images, labels = small_digits("train")
    network, generator = small_network(seed, width), torch.Generator().manual_seed(seed)
    optimizer = optimiser(network)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            x = images[chosen]
            x = (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)
            loss = F.cross_entropy(network(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)
