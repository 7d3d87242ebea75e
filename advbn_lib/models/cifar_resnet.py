"""Residual networks for 32x32 images.

Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2: three stages of n basic
blocks with 16, 32 and 64 channels, and parameter-free (option A) shortcuts. Published weights for depth 20, 32 and 56:
github.com/akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Option A shortcut: take every second pixel, and pad the new channels with zeros."""

    def __init__(self, extra_channels: int):
        super().__init__()
        self.before = extra_channels // 2
        self.after = extra_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut(channels - in_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A CIFAR ResNet of depth 6n+2 (20, 32, 44, 56, 110; 8 is handy for tests).

    Args:
        depth: number of weighted layers; must be 6n+2.
        width: channels of the first stage (the paper: 16); the later ones have twice and four times as many.
        num_classes: length of the output.

    Input N,3,H,W (normalised), output N,num_classes. Layers to cut at: ``relu``, ``layer1``, ``layer2``, ``layer3``.
    """

    def __init__(self, depth: int = 20, width: int = 16, num_classes: int = 10):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 6n+2 (8, 14, 20, 32, 44, 56, 110), got {depth}")
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.flatten(self.pool(x)))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def load_published_weights(model: CifarResNet, path: Path) -> None:
    """Load akamaster's released weights (a dict with ``state_dict``, keys prefixed ``module.``) into ``model``.

    Raises:
        ValueError: if the file is for a network of another depth; the message names the first keys that do not fit.
    """
    released = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    renamed = {key.removeprefix("module.").replace("linear.", "fc."): value for key, value in released.items()}
    own = model.state_dict()
    differing = [
        k for k in own.keys() | renamed.keys() if k not in own or k not in renamed or own[k].shape != renamed[k].shape
    ]
    differing = [k for k in differing if not k.endswith("num_batches_tracked")]
    if differing:
        raise ValueError(
            f"{path.name} is for another network than this one: {len(differing)} entries differ, e.g. {sorted(differing)[:3]}"
        )
    model.load_state_dict(renamed, strict=False)


def resnet18_for_cifar(num_classes: int = 10) -> nn.Module:
    """torchvision's ResNet-18 with the usual 32x32 stem: a 3x3 convolution of stride 1 and no max-pooling.

    The official AdvBN code makes the same change when it is asked for 10 classes.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model
