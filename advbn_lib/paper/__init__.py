"""The paper's own scale: AdvBN on ImageNet, with a ResNet-50, on several GPUs.

    torchrun --nproc_per_node 4 -m advbn_lib.paper train --data /path/to/imagenet
    torchrun --nproc_per_node 4 -m advbn_lib.paper test --data /path/to/imagenet --imagenet-c /path/to/ImageNet-C ...

:mod:`~advbn_lib.paper.recipe` says what is trained, :mod:`~advbn_lib.paper.distributed` how several processes do it together,
:mod:`~advbn_lib.paper.selection` which epoch counts, :mod:`~advbn_lib.paper.training` puts these together, and
:mod:`~advbn_lib.paper.protocol` tests. This project has not run it at that scale.
"""
