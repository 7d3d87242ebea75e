"""What the comparison of all methods measures beside accuracy: calibration, and an attack that is not ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advbn_lib.attack_agreement import Normalised, libraries
from advbn_lib.attacks import judge
from advbn_lib.calibration import calibration
from advbn_lib.data.images import ImageSet
from advbn_lib.methods.base import Method
from advbn_lib.modes import evaluating


@dataclass(frozen=True)
class Beside:
    """How much of it.

    Args:
        apgd_images: how many of the first test images APGD attacks; 0: it is left out.
        apgd_steps: of its ascent.
        radius: of its l-infinity ball, in 1/255.
        bins: of confidence, see :func:`~advbn_lib.calibration.expected_calibration_error`.
        batch_size: images at a time.

    Raises:
        ValueError: a value is out of its range.
    """

    apgd_images: int = 200
    apgd_steps: int = 50
    radius: float = 8.0
    bins: int = 15
    batch_size: int = 100

    def __post_init__(self):
        if self.apgd_images < 0 or min(self.apgd_steps, self.bins, self.batch_size) < 1:
            raise ValueError(
                f"apgd_steps, bins and batch_size are at least 1, and apgd_images is at least 0; got {self}"
            )
        if not 0.05 <= self.radius <= 255:
            raise ValueError(f"the radius is in 1/255, to 255 at most: write 8 for 8/255; got {self.radius}")


class Through(nn.Module):
    """A method's model as one way from images to logits, for attacks that want a module."""

    def __init__(self, method: Method, branch: str):
        super().__init__()
        self.method, self.branch = method, branch

    def forward(self, images: Tensor) -> Tensor:
        return self.method.predict(images, self.branch)


def side_by_side(
    method: Method, test: ImageSet, config: Beside = Beside(), precision: torch.dtype = torch.float32
) -> dict[str, dict[str, float]]:
    """Two groups of metrics, each by branch: ``calibration_error`` of all test images, and ``apgd`` unless it is left out.

    ``apgd`` is the share of right answers under APGD (Croce and Hein, ICML 2020) with the cross-entropy, from 0 to 1; an image that
    is answered wrongly unchanged counts as broken. The attack is torchattacks'. A model that predicts fusing weights is attacked as
    it is, through them, and not through its end points.

    Raises:
        ImportError: APGD is wanted, and torchattacks is not installed; the message says how to install it.
    """
    measured = {"calibration_error": calibration(method, test, config.bins, precision)}
    if not config.apgd_images:
        return measured
    attacked = ("fused",) if "fused" in method.branches else method.branches
    images = test.first(config.apgd_images)
    return {**measured, "apgd": {branch: _apgd(method, branch, images, config) for branch in attacked}}


def _apgd(method: Method, branch: str, test: ImageSet, config: Beside) -> float:
    torchattacks, _ = libraries()
    device, right = test.images.device, 0
    model = Normalised(Through(method, branch), test.mean, test.std).to(device)
    with evaluating(model), _seeded(device):
        attack = torchattacks.APGD(
            model, norm="Linf", eps=config.radius / 255, steps=config.apgd_steps, loss="ce", seed=0
        )
        for images, labels in zip(test.images.split(config.batch_size), test.labels.split(config.batch_size)):
            pixels = images.float() / 255
            changed = attack(pixels, labels)
            with torch.no_grad():
                broken = judge(model, pixels, labels).wrong | judge(model, changed, labels).wrong
            right += (~broken).sum().item()
    return right / len(test)


def _seeded(device: torch.device) -> torch.random.fork_rng:
    """Inside the block torch's global random numbers may be used up: the library takes no generator. Afterwards as before."""
    return torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else [])
