"""The stages of a network, by the names that its layers have."""

from __future__ import annotations

from torch import nn


def layer_of_stage(model: nn.Module, stage: int) -> str:
    """Name of the layer that ends a stage, counted from 1: ``layer1`` of a ResNet, ``features.2`` of an EfficientNet.

    Raises:
        ValueError: the network has no stage of that number, or names its stages otherwise.
    """
    names = {name for name, _ in model.named_modules()}
    for name in (f"layer{stage}", f"features.{stage + 1}"):  # features.0 is the stem
        if name in names:
            return name
    raise ValueError(
        f"{type(model).__name__} has neither layer{stage} nor features.{stage + 1}: name the layer itself, as Site does"
    )
