"""Semantic segmentation: DeepLab V3+ under pixel-wise cross-entropy, cut in its encoder or in its decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.data.masks import IGNORE
from advbn_lib.tasks.base import Cut

CHAIN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")  # of an encoder, in this order
LOW = "layer1"  # its output goes on to layer2, and past everything else into the decoder
DECODER_SITES = ("aspp", "concat")


class Segmentation:
    """DeepLab V3+ under cross-entropy, averaged over all labelled pixels of the batch.

    Can be cut behind a stage of the encoder (``"layer1"``, ``"layer2"``, ...; A-FAN's SE), behind what the decoder enlarges
    (``"aspp"``), or behind the joint feature that its last convolutions see (``"concat"``; both are A-FAN's SD).

    The low-level feature, the output of ``layer1``, goes round every cut but ``"layer1"`` and ``"concat"``. As in the released
    code it keeps its graph: the losses of such a cut train the stem and ``layer1`` through it. They share one graph there, so
    add them up before ``backward()``.

    Args:
        model: segmentation-models-pytorch's DeepLabV3Plus over a plain ResNet, or
            :class:`~advbn_lib.models.deeplab.SmallDeepLab`.

    Raises:
        ValueError: a model of another structure.
    """

    def __init__(self, model: nn.Module):
        _check_structure(model)
        self.model = model
        # One feature of each stage, and before them the images and the stem: encoders may have layers beyond their last stage.
        self.encoder_sites = tuple(f"layer{stage}" for stage in range(1, len(model.encoder.out_channels) - 1))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Images (N,3,H,W; normalised) and masks (N,H,W; int64, ``IGNORE`` where there is no label) to a scalar."""
        return pixel_losses(self.model(inputs), targets).mean()

    def cut(self, inputs: Tensor, targets: Tensor, layer: str) -> Cut:
        self.check(layer)
        if layer in self.encoder_sites:
            return self._cut_encoder(inputs, targets, layer)
        low = self._run(inputs, None, LOW)
        with torch.no_grad():
            deep = self.model.decoder.aspp(self._run(low, LOW, self.encoder_sites[-1]))
            features = deep if layer == "aspp" else self._concat(deep, low)
        if layer == "aspp":
            return Cut(features, self._losses(targets, lambda x: self._concat(x, low)))
        return Cut(features, self._losses(targets, lambda x: x))

    def check(self, layer: str) -> None:
        """Refuse a layer where the model cannot be cut.

        Raises:
            ValueError: the message lists the layers that can be named.
        """
        known = (*self.encoder_sites, *DECODER_SITES)
        if layer not in known:
            raise ValueError(f"{type(self.model).__name__} cannot be cut at {layer!r}; it can at {', '.join(known)}")

    def _cut_encoder(self, inputs: Tensor, targets: Tensor, layer: str) -> Cut:
        def concat(x: Tensor, low: Tensor) -> Tensor:
            return self._concat(self.model.decoder.aspp(self._run(x, layer, self.encoder_sites[-1])), low)

        if layer == LOW:  # what is perturbed is the low-level feature itself, on both of its ways
            with torch.no_grad():
                features = self._run(inputs, None, LOW)
            return Cut(features, self._losses(targets, lambda x: concat(x, x)))
        low = self._run(inputs, None, LOW)
        with torch.no_grad():
            features = self._run(low, LOW, layer)
        return Cut(features, self._losses(targets, lambda x: concat(x, low)))

    def _losses(self, targets: Tensor, join: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Features at the cut to losses; ``join`` brings them to the decoder's joint feature."""

        def loss(features: Tensor) -> Tensor:
            logits = self.model.segmentation_head(self.model.decoder.block2(join(features)))
            return pixel_losses(logits, targets)

        return loss

    def _run(self, x: Tensor, after: str | None, until: str) -> Tensor:
        """The encoder's layers behind ``after`` (None: from the images on), up to ``until``."""
        start = 0 if after is None else CHAIN.index(after) + 1
        for name in CHAIN[start : CHAIN.index(until) + 1]:
            if hasattr(self.model.encoder, name):
                x = getattr(self.model.encoder, name)(x)
        return x

    def _concat(self, deep: Tensor, low: Tensor) -> Tensor:
        decoder = self.model.decoder
        deep, low = decoder.up(deep), decoder.block1(low)
        if deep.shape[-2:] != low.shape[-2:]:
            raise ValueError(
                f"the decoder's features are {tuple(deep.shape[-2:])} and {tuple(low.shape[-2:])} (H,W): "
                "crop images and masks to sides that the network's output stride divides"
            )
        return torch.cat([deep, low], dim=1)


def pixel_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each image: (N,K,H,W) and (N,H,W) to (N,).

    Scaled so that their mean is the mean over all labelled pixels of the batch. An image without a labelled pixel has loss 0,
    and so has a batch without one.

    Raises:
        ValueError: logits and masks are of different sizes.
    """
    if logits.shape[-2:] != targets.shape[-2:] or len(logits) != len(targets):
        raise ValueError(
            f"logits are {tuple(logits.shape)} (N,K,H,W) but masks {tuple(targets.shape)} (N,H,W): "
            "crop images and masks to sides that the network's output stride divides"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"masks must be int64, got {targets.dtype}: masks.long()")
    pixels = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    labelled = (targets != IGNORE).sum().clamp_min(1)
    return pixels.flatten(1).sum(1) * (len(logits) / labelled)


def _check_structure(model: nn.Module) -> None:
    needed = {
        "": ("encoder", "decoder", "segmentation_head"),
        "encoder.": ("conv1", "bn1", "relu", "layer1", "layer2", "layer3"),
        "decoder.": ("aspp", "up", "block1", "block2"),
    }
    modules = {name for name, _ in model.named_modules()}
    missing = [prefix + name for prefix, names in needed.items() for name in names if prefix + name not in modules]
    unknown = [name for name, _ in model.encoder.named_children() if name not in CHAIN] if not missing else []
    if missing or unknown:
        why = f"has no {', '.join(missing)}" if missing else f"has encoder.{unknown[0]}, which no plain ResNet has"
        raise ValueError(
            f"{type(model).__name__} {why}: Segmentation needs segmentation-models-pytorch's DeepLabV3Plus "
            "over a plain ResNet (resnet18 to resnet152), see advbn_lib.models.deeplab"
        )
    if any(isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Sigmoid)) for module in model.segmentation_head.modules()):
        raise ValueError("the segmentation head ends in an activation, but the loss takes logits: build it with activation=None")
    if getattr(model, "classification_head", None) is not None:
        raise ValueError("the model has a classification head, which has no loss here: build it without aux_params")
