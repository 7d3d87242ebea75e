"""DeepLab V3+, in the form of segmentation-models-pytorch, over an ImageNet encoder or over a CIFAR ResNet.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", ECCV 2018: atrous
spatial pyramid pooling (ASPP) over the encoder's last feature, whose output is enlarged and joined with a low-level feature
of 48 channels.

What differs from the network that A-FAN was released with: behind the ASPP there is one more convolution, which is depthwise
separable, as is the decoder's 3x3 convolution; corners are aligned when features are enlarged; initial weights of the head are
drawn uniformly. The same are: output stride 16, rates 6, 12 and 18, 256 and 48 channels, dropout 0.1 in the ASPP, BatchNorm
momentum 0.01 in the encoder.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from torch import Tensor, nn

from advbn_lib.models.cifar_resnet import CifarResNet, load_published_weights

INSTALL = "DeepLab V3+ comes from segmentation-models-pytorch: pip install 'advbn_lib[segmentation]'"
RELEASED_MOMENTUM = 0.01  # of BatchNorm's running statistics in the encoder


def deeplab_v3_plus(
    encoder: str = "resnet50", classes: int = 21, pretrained: bool = True, rates: tuple[int, int, int] = (6, 12, 18),
    channels: int = 256, dropout: float = 0.1,
) -> nn.Module:  # fmt: skip
    """segmentation-models-pytorch's DeepLabV3Plus at output stride 16; normalised images (N,3,H,W) to logits (N,K,H,W).

    Height and width must be multiples of 16 (train on crops of 512 where the released code has 513).

    Args:
        encoder: ``"resnet50"`` and ``"resnet101"`` are the paper's; also ``"resnet18"`` and its other plain ResNets.
        classes: K.
        pretrained: download ImageNet weights for the encoder.
        rates: of the ASPP's three dilated convolutions.
        channels: of the ASPP's output.
        dropout: at the ASPP's end.

    Raises:
        ModuleNotFoundError: segmentation-models-pytorch is not installed; the message says how to get it.
    """
    model = _smp().DeepLabV3Plus(
        encoder, encoder_weights="imagenet" if pretrained else None, encoder_output_stride=16, classes=classes,
        decoder_channels=channels, decoder_atrous_rates=rates, decoder_aspp_separable=False, decoder_aspp_dropout=dropout,
    )  # fmt: skip
    _set_momentum(model.encoder, RELEASED_MOMENTUM)
    return model


class CifarEncoder(nn.Module):
    """The layers of a :class:`CifarResNet` below its pooling, as an encoder: normalised images to a list of features.

    The features are the images, the stem's output, and the outputs of ``layer1`` to ``layer3``.

    Args:
        network: its layers are taken over, not copied.
        pool: halve the stem's output by max-pooling: a quarter of the cost.
    """

    def __init__(self, network: CifarResNet, pool: bool = True):
        super().__init__()
        self.conv1, self.bn1, self.relu = network.conv1, network.bn1, network.relu
        self.maxpool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.layer1, self.layer2, self.layer3 = network.layer1, network.layer2, network.layer3
        width = network.conv1.out_channels
        self.out_channels = (3, width, width, 2 * width, 4 * width)
        self.output_stride = 8 if pool else 4

    def forward(self, x: Tensor) -> list[Tensor]:
        stem = self.relu(self.bn1(self.conv1(x)))
        first = self.layer1(self.maxpool(stem))
        second = self.layer2(first)
        return [x, stem, first, second, self.layer3(second)]


class SmallDeepLab(nn.Module):
    """DeepLab V3+ that trains on one core: segmentation-models-pytorch's decoder over a CIFAR ResNet.

    Normalised images (N,3,H,W), sides multiples of the encoder's ``output_stride`` (8, or 4 without pooling), to logits (N,K,H,W).
    Its parts have the names that they have in segmentation-models-pytorch: ``encoder``, ``decoder``, ``segmentation_head``.

    Args:
        classes: K.
        depth, width: of the :class:`CifarResNet`.
        weights: file with the published CIFAR-10 weights of that depth; None: random weights.
        rates: of the ASPP's three dilated convolutions.
        channels: of the ASPP's output.
        dropout: at the ASPP's end.
        pool: see :class:`CifarEncoder`.
        momentum: of BatchNorm in the encoder. The released 0.01 remembers some hundred steps: in runs that are not much longer
            the running statistics lag behind, and methods that take more forward passes would look better for that alone.

    Raises:
        ModuleNotFoundError: segmentation-models-pytorch is not installed; the message says how to get it.
        ValueError: a depth that no CIFAR ResNet has, or weights of another network.
    """

    def __init__(
        self, classes: int, depth: int = 20, width: int = 16, weights: Path | None = None,
        rates: tuple[int, int, int] = (2, 4, 6), channels: int = 64, dropout: float = 0.1, pool: bool = True,
        momentum: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        smp = _smp()
        network = CifarResNet(depth, width)
        if weights is not None:
            load_published_weights(network, weights)
        self.encoder = CifarEncoder(network, pool)
        self.decoder = smp.decoders.deeplabv3.decoder.DeepLabV3PlusDecoder(
            self.encoder.out_channels, encoder_depth=4, out_channels=channels, atrous_rates=rates, output_stride=16,
            aspp_separable=False, aspp_dropout=dropout,
        )  # fmt: skip
        # At "output stride 16" the decoder enlarges the ASPP's output 4 times, which is the step from layer1 to layer3 here.
        self.segmentation_head = smp.base.SegmentationHead(
            channels, classes, kernel_size=1, upsampling=2 if pool else 1
        )
        smp.base.initialization.initialize_decoder(self.decoder)
        smp.base.initialization.initialize_head(self.segmentation_head)
        _set_momentum(self.encoder, momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.segmentation_head(self.decoder(self.encoder(x)))


def _set_momentum(encoder: nn.Module, momentum: float) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


def _smp() -> ModuleType:
    try:
        import segmentation_models_pytorch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error
    return segmentation_models_pytorch
