"""A small network for coloured digits, so small that many can be trained on a CPU."""

from __future__ import annotations

from torch import Tensor, nn


class DigitCNN(nn.Module):
    """Four 3x3 convolutions, each with BatchNorm and ReLU, the first three with a stride of 2; then one linear layer.

    Our choice: the networks of the paper are not known to us.

    Args:
        width: channels of the first convolution; the others have twice, four and four times as many.
        num_classes: length of the output.
        size: height and width of the images, a multiple of 8.

    Input N,3,size,size (normalised), output N,num_classes. Layers to cut at: ``layer1`` to ``layer4``.

    Raises:
        ValueError: a size that is no multiple of 8, or no class; and in ``forward``, images of another size.
    """

    def __init__(self, width: int = 8, num_classes: int = 10, size: int = 32):
        super().__init__()
        if size < 8 or size % 8 or width < 1 or num_classes < 1:
            raise ValueError(
                f"size must be a multiple of 8, width and num_classes at least 1; got {size}, {width} and {num_classes}"
            )
        self.size = size
        self.check = _OfSize(size)
        self.layer1 = _block(3, width, stride=2)
        self.layer2 = _block(width, 2 * width, stride=2)
        self.layer3 = _block(2 * width, 4 * width, stride=2)
        self.layer4 = _block(4 * width, 4 * width, stride=1)
        # Not averaged over positions: where a stroke is says which digit it belongs to.
        self.linear = nn.Linear(4 * width * (size // 8) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.check(x)))))
        return self.linear(out.flatten(1))


class _OfSize(nn.Module):
    """Lets images of one size pass. A module of its own: what decides by its input cannot be traced, and is then kept whole."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"this network takes images N,3,{self.size},{self.size}, got {tuple(x.shape)}: resize or pad them, "
                "or make the network for their size"
            )
        return x


def _block(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
