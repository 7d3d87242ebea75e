"""EfficientNet for 32x32 images.

Source: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (ICML 2019).
"""

from __future__ import annotations

from torch import nn


def efficientnet_b0_for_cifar(num_classes: int = 10) -> nn.Module:
    """torchvision's EfficientNet-B0 with a first convolution of stride 1, the usual change for 32x32 images.

    The last feature map is then 2x2 and not a single position. Dropout and stochastic depth are as for ImageNet. Input
    N,3,H,W (normalised), output N,num_classes; layers to cut at: ``features.0`` to ``features.8``.
    """
    from torchvision.models import efficientnet_b0

    model = efficientnet_b0(num_classes=num_classes)
    model.features[0][0].stride = (1, 1)
    return model
