"""Faster R-CNN in the form that A-FAN was released with ("C4"): the last stage of a residual network is the head.

Sources: Ren et al., "Faster R-CNN", NeurIPS 2015; He et al., CVPR 2016, for the last stage as the head of a region; the sizes are
those of the released A-FAN code (github.com/VITA-Group/CV_A-FAN). All but the last stage is the backbone, which the region
proposal network (RPN) reads. RoI-align cuts 14x14 features for each region, max-pooling makes them 7x7, the last stage runs on
these, and the maximum over what it gives is the vector that two linear layers turn into classes and boxes. Stem and first stage
are frozen, and so is every BatchNorm.

Two things differ from the release: torchvision's RPN has as many channels as the backbone, and its smooth L1 loss turns at 1/9,
which the release uses for COCO; for VOC it uses 1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from advbn_lib.data.cifar10 import MEAN, STD
from advbn_lib.data.images import DataError
from advbn_lib.models.cifar_resnet import CifarResNet, load_published_weights
from advbn_lib.weights import published_weights

IMAGENET_NETWORKS = ("resnet18", "resnet50", "resnet101")
CIFAR_NETWORKS = {"resnet8": 8, "resnet20": 20, "resnet32": 32, "resnet56": 56}  # and their depth
FROZEN = ("conv1", "bn1", "relu", "maxpool", "layer1")  # of the backbone


@dataclass(frozen=True)
class DetectorSizes:
    """Sizes, counts and thresholds; the defaults are those released for VOC2007.

    Args:
        min_side, max_side: of the images in pixels: the short side becomes ``min_side``, unless the long one would pass
            ``max_side``.
        anchors: sides of the square anchors in pixels; a ratio keeps the area.
        ratios: height by width of the anchors.
        anchors_per_image: anchors that the RPN's loss is computed on.
        regions_per_image: regions that the head's loss is computed on.
        proposals: that the RPN passes on for each image, in training and in a test.
        score: detections below it are not given. nms: of two detections of a class that overlap more than this
            (intersection over union) the weaker one is dropped.
        pool_stem: max-pool the stem's output, as networks for large images do; those for 32x32 images have no such layer.
        divisible: images are padded to sides that this divides.
    """

    min_side: int = 600
    max_side: int = 1000
    anchors: tuple[float, ...] = (128, 256, 512)
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    anchors_per_image: int = 256
    regions_per_image: int = 128
    proposals: tuple[int, int] = (2000, 300)
    score: float = 0.05
    nms: float = 0.3
    pool_stem: bool = True
    divisible: int = 32


VOC_SIZES = DetectorSizes()
COCO_SIZES = DetectorSizes(800, 1333, (64, 128, 256, 512), proposals=(2000, 1000))


def faster_rcnn(
    network: str,
    classes: Sequence[str],
    sizes: DetectorSizes = VOC_SIZES,
    pretrained: bool = True,
    root: Path | None = None,
) -> FasterRCNN:
    """A detector for images in [0,1] (3,H,W); it normalises and scales them itself.

    Args:
        network: ``"resnet50"``, ``"resnet101"`` or ``"resnet18"``, with torchvision's ImageNet weights; or ``"resnet20"``,
            ``"resnet32"`` or ``"resnet56"``, with published CIFAR-10 weights, whose first two stages are the backbone and whose
            third is the head; or, without weights, ``"resnet8"``.
        classes: names; the labels 1, 2, ... are theirs, 0 is the background.
        pretrained: start from these weights, which are downloaded if needed.
        root: where the CIFAR-10 weights are; default: see :func:`advbn_lib.data.images.data_root`.

    Raises:
        ValueError: there is no such network, or no published weights for it, or there are no classes.
        DataError: the weights are damaged, or cannot be downloaded.
    """
    if not classes:
        raise ValueError("name at least one class to detect")
    backbone, last_stage, channels = _stages(network, sizes.pool_stem, pretrained, root)
    head = nn.Sequential(
        OrderedDict(shrink=nn.MaxPool2d(2), stage=last_stage, maximum=nn.AdaptiveMaxPool2d(1), flatten=nn.Flatten())
    )
    for part in (backbone, head):
        freeze_batch_norm(part)
    for name, module in backbone.named_children():
        if name in FROZEN:
            module.requires_grad_(False)
    return FasterRCNN(
        backbone, min_size=sizes.min_side, max_size=sizes.max_side, image_mean=MEAN, image_std=STD,
        size_divisible=sizes.divisible,
        rpn_anchor_generator=AnchorGenerator((tuple(sizes.anchors),), (tuple(sizes.ratios),)),
        rpn_batch_size_per_image=sizes.anchors_per_image,
        rpn_post_nms_top_n_train=sizes.proposals[0], rpn_post_nms_top_n_test=sizes.proposals[1],
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=2),
        box_head=head, box_predictor=FastRCNNPredictor(channels, len(classes) + 1),
        box_batch_size_per_image=sizes.regions_per_image, box_score_thresh=sizes.score, box_nms_thresh=sizes.nms,
    )  # fmt: skip


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm inside ``module``, in place, by a fixed affine map with the same statistics and factors."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            state = child.state_dict()
            state.pop("num_batches_tracked", None)
            frozen.load_state_dict(state)
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze_batch_norm(child)


def _stages(network: str, pool_stem: bool, pretrained: bool, root: Path | None) -> tuple[nn.Sequential, nn.Module, int]:
    """The backbone, the last stage, and how many channels that gives."""
    if network in CIFAR_NETWORKS:
        whole = CifarResNet(CIFAR_NETWORKS[network])
        if pretrained:
            load_published_weights(whole, published_weights(network, root))
        stages, last_stage, below, channels = ("layer1", "layer2"), whole.layer3, 32, 64
    elif network in IMAGENET_NETWORKS:
        whole = _imagenet_network(network, pretrained)
        stages, last_stage, channels = ("layer1", "layer2", "layer3"), whole.layer4, whole.fc.in_features
        below = channels // 2
    else:
        raise ValueError(f"no network {network!r}; there are {', '.join((*IMAGENET_NETWORKS, *CIFAR_NETWORKS))}")
    layers = OrderedDict(conv1=whole.conv1, bn1=whole.bn1, relu=whole.relu)
    if pool_stem:
        layers["maxpool"] = nn.MaxPool2d(3, 2, padding=1)
    layers.update((name, getattr(whole, name)) for name in stages)
    backbone = nn.Sequential(layers)
    backbone.out_channels = below
    return backbone, last_stage, channels


def _imagenet_network(network: str, pretrained: bool) -> nn.Module:
    from torchvision import models

    try:
        return models.get_model(network, weights="IMAGENET1K_V1" if pretrained else None)
    except OSError as error:
        raise DataError(
            f"the ImageNet weights of {network} could not be downloaded ({error}): put torchvision's file into the folder "
            "'checkpoints' of torch.hub.get_dir() by hand, or use pretrained=False"
        ) from error
