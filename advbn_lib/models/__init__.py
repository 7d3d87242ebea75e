"""Networks the book trains: CIFAR residual networks, and others with a stem for small images, made to be cut at a named layer."""

from advbn_lib.models.cifar_resnet import CifarResNet, load_published_weights, resnet18_for_cifar
from advbn_lib.models.efficientnet import efficientnet_b0_for_cifar
from advbn_lib.models.networks import layer_of_stage

__all__ = ["CifarResNet", "efficientnet_b0_for_cifar", "layer_of_stage", "load_published_weights", "resnet18_for_cifar"]
