"""Detection: any Faster R-CNN of torchvision, cut in its backbone or at the vectors of its regions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss

from advbn_lib.tasks.base import Cut

ROI = "roi"
Images = list[Tensor]
Targets = list[dict[str, Tensor]]
Maps = dict[str, Tensor]


class Detection:
    """A detector under its own losses: objectness and boxes of the region proposals, classes and boxes of the regions.

    Inputs are a list of images (3,H,W; in [0,1]); targets, for each of them, ``boxes`` (n,4: left, top, right, bottom in pixels)
    and ``labels`` (n,; int64, 0 is the background). Which anchors and regions are looked at is drawn at random, anew in each pass.

    A layer is a child of the backbone (A-FAN's "SE"), or ``"roi"``: the vectors of the regions after the detector's ``box_head``
    ("SD"), one row a region. Behind ``"roi"`` there are the losses of the regions alone, as in the release's setting 1, and the
    regions are those drawn in the pass that made the features. In a backbone with a feature pyramid, what the pyramid takes from
    below the cut stays as it was and has no graph.

    Args:
        model: the detector. Its losses are computed in whatever mode its layers are.

    Raises:
        TypeError: another kind of model.
    """

    def __init__(self, model: FasterRCNN):
        if not isinstance(model, FasterRCNN):
            raise TypeError(f"Detection needs a torchvision FasterRCNN, got {type(model).__name__}")
        self.model = model

    def loss(self, inputs: Images, targets: Targets) -> Tensor:
        _check_targets(inputs, targets, self._classes())
        with _giving_losses(self.model):
            return torch.stack(list(self.model(inputs, targets).values())).sum()

    def cut(self, inputs: Images, targets: Targets, layer: str) -> Cut:
        self.check(layer)
        _check_targets(inputs, targets, self._classes())
        with torch.no_grad():
            images, targets = self.model.transform(inputs, targets)
            if layer == ROI:
                return self._cut_at_regions(images, targets)
            features, below = self._up_to(images.tensors, layer)
        if not isinstance(features, Tensor):
            raise ValueError(f"the output of {layer!r} is a {type(features).__name__}, not a tensor: cut elsewhere")

        def loss(x: Tensor) -> Tensor:
            # A copy: an in-place ReLU right after the cut would change the caller's features.
            return self._loss_of_maps(images, self._from(x.clone(), layer, below), targets)

        return Cut(features, loss)

    def check(self, layer: str) -> None:
        if layer not in self.layers():
            kind = type(self.model.backbone).__name__
            raise ValueError(f"the detector ({kind}) cannot be cut at {layer!r}; it can at {', '.join(self.layers())}")

    def layers(self) -> tuple[str, ...]:
        """Where the model can be cut, from the image on.

        A backbone of a kind that is not a chain of layers can be cut nowhere.
        """
        return (*(name for name, _ in _chain(self.model.backbone)), ROI)

    def _classes(self) -> int | None:
        """How many classes the model answers with, the background among them; None if its predictor does not say."""
        return getattr(getattr(self.model.roi_heads.box_predictor, "cls_score", None), "out_features", None)

    def _up_to(self, x: Tensor, layer: str) -> tuple[Tensor, Maps]:
        """Output of a layer of the backbone, and the maps that the backbone has given out by then."""
        given: Maps = OrderedDict()
        outputs = _outputs(self.model.backbone)
        for name, module in _chain(self.model.backbone):
            x = module(x)
            if name == layer:
                break
            if name in outputs:
                given[outputs[name]] = x
        return x, given

    def _from(self, x: Tensor, layer: str, below: Maps) -> Maps:
        """The backbone's maps, when the output of ``layer`` is ``x``."""
        backbone, outputs, given = self.model.backbone, _outputs(self.model.backbone), OrderedDict(below)
        names = [name for name, _ in _chain(backbone)]
        for place, (name, module) in enumerate(_chain(backbone)):
            if place > names.index(layer):
                x = module(x)
            if place >= names.index(layer) and name in outputs:
                given[outputs[name]] = x
        return backbone.fpn(given) if isinstance(backbone, BackboneWithFPN) else given

    def _loss_of_maps(self, images: ImageList, maps: Maps, targets: Targets) -> Tensor:
        with _giving_losses(self.model):
            proposals, of_proposals = self.model.rpn(images, maps, targets)
            _, of_regions = self.model.roi_heads(maps, proposals, images.image_sizes, targets)
        return torch.stack([*of_regions.values(), *of_proposals.values()]).sum(dim=0, keepdim=True)

    def _cut_at_regions(self, images: ImageList, targets: Targets) -> Cut:
        heads = self.model.roi_heads
        with _giving_losses(self.model):
            maps = self.model.backbone(images.tensors)
            maps = OrderedDict([("0", maps)]) if isinstance(maps, Tensor) else maps
            proposals, _ = self.model.rpn(images, maps, targets)
            regions, _, labels, boxes = heads.select_training_samples(proposals, targets)
        features = heads.box_head(heads.box_roi_pool(maps, regions, images.image_sizes))

        def loss(x: Tensor) -> Tensor:
            return torch.stack(fastrcnn_loss(*heads.box_predictor(x.clone()), labels, boxes)).sum(dim=0, keepdim=True)

        return Cut(features, loss)


def _chain(backbone: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that a backbone runs one after another; empty if it is not of that kind."""
    body = backbone.body if isinstance(backbone, BackboneWithFPN) else backbone
    chains = (nn.Sequential, IntermediateLayerGetter)
    # A subclass with a forward of its own may do anything.
    if not any(isinstance(body, kind) and type(body).forward is kind.forward for kind in chains):
        return []
    return list(body.named_children())


def _outputs(backbone: nn.Module) -> dict[str, str]:
    """``{layer: name of the map}`` that the backbone gives out."""
    body = backbone.body if isinstance(backbone, BackboneWithFPN) else backbone
    if isinstance(body, IntermediateLayerGetter):
        return dict(body.return_layers)
    return {_chain(body)[-1][0]: "0"}  # the name that torchvision gives to a single map


@contextmanager
def _giving_losses(model: FasterRCNN) -> Iterator[None]:
    """Inside the block the detector draws regions and computes losses, as in train mode; its layers keep their modes."""
    parts = [(module, module.training) for module in (model, model.rpn, model.roi_heads)]
    try:
        for module, _ in parts:
            module.training = True  # of the module itself: .train() would reach the BatchNorms in it
        yield
    finally:
        for module, training in parts:
            module.training = training


def _check_targets(inputs: Images, targets: Targets, classes: int | None) -> None:
    """Refuse targets that torchvision would stop at, or train on to no use.

    Raises:
        ValueError: the message names the image's place in the batch.
    """
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} images but {len(targets)} targets: give one target for each image")
    if not targets:
        raise ValueError("the batch has no image")
    for index, target in enumerate(targets):
        if "boxes" not in target or "labels" not in target:
            raise ValueError(f"image {index} of the batch: its target needs 'boxes' and 'labels', got {sorted(target)}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(
                f"image {index} of the batch: boxes must be floats (n,4), got {boxes.dtype} {tuple(boxes.shape)}"
            )
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"image {index} of the batch: {len(boxes)} boxes need as many int64 labels, got {labels.dtype} {tuple(labels.shape)}"
            )
    boxes, labels = (torch.cat([target[name] for target in targets]) for name in ("boxes", "labels"))
    sound = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & torch.isfinite(boxes).all(dim=1)
    known = (labels >= 1) & (labels < classes if classes else True)
    if not bool((sound & known).all()):  # one look for the whole batch: each makes the host wait for the device
        row = int((~(sound & known)).nonzero()[0])
        index = next(i for i in range(len(targets)) if sum(len(target["boxes"]) for target in targets[: i + 1]) > row)
        if not bool(sound[row]):
            raise ValueError(
                f"image {index} of the batch has the box {boxes[row].tolist()}: right must be above left and bottom above "
                "top, all finite; leave such boxes out when the data are loaded"
            )
        raise ValueError(
            f"image {index} of the batch has the label {int(labels[row])}: labels go from 1 to "
            f"{classes - 1 if classes else 'the number of classes'}, 0 is the background"
        )
