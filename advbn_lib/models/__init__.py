"""Networks the book trains: CIFAR residual networks, made to be cut at a named layer."""

from advbn_lib.models.cifar_resnet import CifarResNet, load_published_weights, resnet18_for_cifar

__all__ = ["CifarResNet", "load_published_weights", "resnet18_for_cifar"]
