"""The network that tells real pictures from made ones, in the training of a :class:`~advbn_lib.models.stylegan.Generator`.

Source: minibatch standard deviation from Karras et al., "Progressive Growing of GANs" (ICLR 2018), section 3; residual blocks
from Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020), section 4.1. No normalisation: it would
hide the very statistics that the generator's styles set.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.models.stylegan import START, EqualConv, EqualLinear, GeneratorConfig, leaky


def downsample(x: Tensor) -> Tensor:
    """Half the size, bilinear: at this factor each output is the mean of 2x2 inputs."""
    return F.avg_pool2d(x, 2)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and half the size, beside a 1x1 convolution of the halved input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = EqualConv(inputs, inputs)
        self.conv2 = EqualConv(inputs, outputs)
        self.shortcut = EqualConv(inputs, outputs, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = leaky(self.conv2(downsample(leaky(self.conv1(x)))))
        return (out + self.shortcut(downsample(x))) / math.sqrt(2)


class Discriminator(nn.Module):
    """Pictures (N,channels,resolution,resolution), in about [-1,1], to logits (N,): high means real.

    Args:
        config: of the generator that it is trained against.
        group: pictures that the minibatch standard deviation is taken over; less where N is no multiple of it.
    """

    def __init__(self, config: GeneratorConfig, group: int = 4):
        super().__init__()
        self.config, self.group = config, group
        sizes = config.resolutions[::-1]
        self.from_picture = EqualConv(config.channels, config.width_at(sizes[0]), kernel=1)
        self.blocks = nn.Sequential(
            *(ResidualBlock(config.width_at(size), config.width_at(size // 2)) for size in sizes[:-1])
        )
        width = config.width_at(START)
        self.conv = EqualConv(width + 1, width)
        self.hidden = EqualLinear(width * START**2, width)
        self.logit = EqualLinear(width, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (N,).

        Raises:
            ValueError: pictures of another size or number of channels.
        """
        expected = (self.config.channels, self.config.resolution, self.config.resolution)
        if pictures.dim() != 4 or tuple(pictures.shape[1:]) != expected:
            raise ValueError(f"pictures must be N,{','.join(map(str, expected))}, got {tuple(pictures.shape)}")
        x = self.blocks(leaky(self.from_picture(pictures)))
        x = leaky(self.conv(torch.cat([x, minibatch_std(x, self.group)], dim=1)))
        return self.logit(leaky(self.hidden(x.flatten(1)))).squeeze(1)


def minibatch_std(x: Tensor, group: int = 4) -> Tensor:
    """How much the pictures of a group differ: one map (N,1,h,w) that is constant over each group.

    It is the standard deviation over the group, averaged over channels and pixels. Pictures i, i + N/g, i + 2N/g, ... form a
    group of g, the largest divisor of N up to ``group``. With N of 1 it is next to 0.
    """
    count = len(x)
    size = max(divisor for divisor in range(1, group + 1) if count % divisor == 0)
    variance = x.view(size, count // size, *x.shape[1:]).var(0, unbiased=False)
    spread = (variance + 1e-8).sqrt().mean((1, 2, 3))
    return spread.repeat(size).view(count, 1, 1, 1).expand(-1, 1, *x.shape[2:])
