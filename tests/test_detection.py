"""Detection: the detector's form, the task adapter's cuts, A-FAN on it, average precision, and the bench."""

import dataclasses
import json
from collections import OrderedDict

import pytest
import torch
from conftest import assert_same_traces, data_folder, traces
from torch import nn
from torchvision.models.detection import (
    FasterRCNN,
    fasterrcnn_mobilenet_v3_large_fpn,
    fasterrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from advbn_lib.data.boxes import BoxSet
from advbn_lib.data.drawn_shapes import drawn_shapes
from advbn_lib.detection_bench import BENCHES, released_sites
from advbn_lib.detection_metrics import average_precision, detect
from advbn_lib.methods.afan import AFAN, Site
from advbn_lib.methods.feature_controls import FeatureNoise, UnchangedFeatures
from advbn_lib.models.faster_rcnn import DetectorSizes, faster_rcnn
from advbn_lib.tasks.detection import Detection
from advbn_lib.training import train

SIZES = DetectorSizes(64, 64, (16, 28), (1.0,), 32, 16, (50, 50), divisible=16)


def small_detector() -> FasterRCNN:
    return faster_rcnn("resnet8", ("disc", "square"), SIZES, pretrained=False)


def pyramid_detector() -> FasterRCNN:
    """As torchvision's own detectors: a pyramid on the four stages of a ResNet, here with live BatchNorms."""
    body = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2)
    names = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}
    backbone = BackboneWithFPN(body, names, [64, 128, 256, 512], 16)
    return FasterRCNN(
        backbone,
        3,
        min_size=64,
        max_size=64,
        rpn_post_nms_top_n_train=50,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=16,
    )


DETECTORS = {"C4": small_detector, "FPN": pyramid_detector}
CUTS = [("C4", "conv1"), ("C4", "bn1"), ("C4", "layer2"), ("FPN", "bn1"), ("FPN", "layer2"), ("FPN", "layer4")]


def a_batch(count: int = 2) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    shapes = drawn_shapes(count, 64)
    images = [image.float() / 255 for image in shapes.images]
    return images, [{"boxes": boxes, "labels": labels} for boxes, labels in zip(shapes.boxes, shapes.labels)]


def gradients(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("kind, layer", CUTS)
def test_unchanged_features_have_the_loss_of_the_whole_model(kind, layer):
    images, targets = a_batch()
    task = Detection(DETECTORS[kind]())
    torch.manual_seed(1)
    whole = task.loss(images, targets)
    torch.manual_seed(1)
    cut = task.cut(images, targets, layer)
    before = cut.features.clone()
    halves = cut.loss(cut.features)
    assert halves.shape == (1,) and not cut.features.requires_grad and len(cut.features) == len(images)
    torch.testing.assert_close(halves[0], whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(cut.features, before)  # FPN's bn1 is followed by a ReLU that works in place


@pytest.mark.parametrize("kind", DETECTORS)
def test_the_loss_of_the_whole_model_is_the_sum_that_torchvision_gives(kind):
    images, targets = a_batch()
    model = DETECTORS[kind]()
    task = Detection(model)
    torch.manual_seed(1)
    expected = model.train()(images, targets)
    torch.manual_seed(1)
    assert len(expected) == 4 and task.loss(images, targets).item() == pytest.approx(sum(expected.values()).item())


@pytest.mark.parametrize("kind", DETECTORS)
def test_at_the_regions_there_are_the_losses_of_the_regions(kind):
    images, targets = a_batch()
    model = DETECTORS[kind]().train()
    task = Detection(model)
    torch.manual_seed(1)
    expected = model(images, targets)
    torch.manual_seed(1)
    cut = task.cut(images, targets, "roi")
    loss = cut.loss(cut.features)
    assert cut.features.shape[1] == (64 if kind == "C4" else 1024) and 2 <= len(cut.features) <= 2 * 16
    assert loss.item() == pytest.approx((expected["loss_classifier"] + expected["loss_box_reg"]).item(), rel=1e-5)
    torch.testing.assert_close(cut.loss(cut.features), loss)  # the regions are drawn once
    loss.sum().backward()
    assert gradients(model) and all(name.startswith("roi_heads.box_predictor") for name in gradients(model))


@pytest.mark.parametrize("kind, layer, below", [("C4", "layer2", "conv1 layer1 layer2"), ("FPN", "layer2", "body.conv1 body.layer1 body.layer2")])  # fmt: skip
def test_gradients_reach_the_layers_above_the_cut_only(kind, layer, below):
    images, targets = a_batch()
    model = DETECTORS[kind]()
    cut = Detection(model).cut(images, targets, layer)
    features = cut.features.clone().requires_grad_()
    cut.loss(features).sum().backward()
    assert features.grad.abs().sum() > 0
    reached = gradients(model)
    assert {"rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"} <= reached
    assert not [name for name in reached if name.startswith(tuple(f"backbone.{part}" for part in below.split()))]
    if kind == "FPN":
        assert any(name.startswith("backbone.body.layer3") for name in reached)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", ["layer2", "roi"])
def test_the_model_is_left_as_it_was(training, layer):
    images, targets = a_batch()
    copies = [{name: value.clone() for name, value in target.items()} for target in targets]
    model = pyramid_detector().train(training)
    model.backbone.body.layer3.eval()  # a mode of its own
    if training:  # live BatchNorms update themselves in train mode: that is the mode's doing, not the cut's
        model.backbone.eval()
    task = Detection(model)
    before = traces(model)
    cut = task.cut(images, targets, layer)
    cut.loss(cut.features)
    task.loss(images, targets)
    after = traces(model) | {"random": before["random"]}  # the regions are drawn
    assert_same_traces(before, after)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(copies, targets) for name in a)


def test_layers_that_can_be_named():
    task = Detection(small_detector())
    assert task.layers() == ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "roi")
    assert Detection(pyramid_detector()).layers()[-5:] == ("layer1", "layer2", "layer3", "layer4", "roi")
    with pytest.raises(ValueError, match="cannot be cut at 'layer3'; it can at conv1, .*layer2, roi"):
        task.check("layer3")
    images, targets = a_batch()
    with pytest.raises(ValueError, match="cannot be cut at 'fpn'"):
        task.cut(images, targets, "fpn")
    with pytest.raises(TypeError, match="Detection needs a torchvision FasterRCNN, got Linear"):
        Detection(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="Detection needs a torchvision FasterRCNN, got RetinaNet"):
        Detection(retinanet_resnet50_fpn(weights=None, weights_backbone=None))


def test_a_backbone_that_is_no_chain_can_be_cut_at_the_regions():
    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 1

    model = small_detector()
    own = Own(OrderedDict(model.backbone.named_children()))
    model.backbone = own
    task, (images, targets) = Detection(model), a_batch()
    assert task.layers() == ("roi",) and task.cut(images, targets, "roi").features.dim() == 2


def test_targets_that_cannot_be_trained_on_are_refused():
    images, targets = a_batch()
    task = Detection(small_detector())
    flat = torch.tensor([[1.0, 1.0, 5.0, 5.0], [3.0, 4.0, 3.0, 9.0]])
    for second, message in (
        ({"boxes": flat, "labels": torch.tensor([1, 2])}, r"image 1 of the batch has the box \[3.0, 4.0, 3.0, 9.0\]"),
        ({"boxes": flat[:1] * float("nan"), "labels": torch.tensor([1])}, "image 1 of the batch has the box"),
        ({"boxes": flat[:1], "labels": torch.tensor([1, 2])}, "image 1 of the batch: 1 boxes need as many"),
        ({"boxes": flat[:1], "labels": torch.tensor([1.0])}, "int64 labels"),
        ({"boxes": flat[:1].int(), "labels": torch.tensor([1])}, "must be floats"),
        ({"boxes": flat[:1]}, "needs 'boxes' and 'labels'"),
    ):
        for run in (task.loss, lambda x, y: task.cut(x, y, "layer2")):
            with pytest.raises(ValueError, match=message):
                run(images, [targets[0], second])
    with pytest.raises(ValueError, match="2 images but 1 targets"):
        task.loss(images, targets[:1])


def test_images_without_objects_are_trained_on():
    images, _ = a_batch()
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]
    task = Detection(small_detector())
    assert torch.isfinite(task.loss(images, nothing))
    for layer in ("layer2", "roi"):
        cut = task.cut(images, nothing, layer)
        assert torch.isfinite(cut.loss(cut.features)).all()


def test_the_released_form_of_the_detector():
    model = faster_rcnn("resnet18", ("a", "b"), DetectorSizes(64, 96), pretrained=False)
    assert [
        name for name, _ in model.backbone.named_children()
    ] == "conv1 bn1 relu maxpool layer1 layer2 layer3".split()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules()) == 20
    learnt = {name.split(".")[1] for name, p in model.backbone.named_parameters(prefix="backbone") if p.requires_grad}
    assert learnt == {"layer2", "layer3"}
    task, (images, targets) = Detection(model), a_batch()
    assert task.cut(images, targets, "roi").features.shape[1] == 512
    assert task.cut(images, targets, "layer3").features.shape == (2, 256, 4, 4)  # stride 16
    assert model.roi_heads.nms_thresh == 0.3 and model.roi_heads.score_thresh == 0.05
    assert DetectorSizes().anchors == (128, 256, 512) and model.rpn._post_nms_top_n["testing"] == 300
    with pytest.raises(ValueError, match="no network 'vgg'; there are resnet18"):
        faster_rcnn("vgg", ("a",))
    with pytest.raises(ValueError, match="at least one class"):
        faster_rcnn("resnet8", ())


def test_freezing_keeps_what_batch_norm_computes():
    from advbn_lib.models import CifarResNet
    from advbn_lib.models.faster_rcnn import freeze_batch_norm

    network, images = CifarResNet(8, 4), torch.randn(4, 3, 16, 16)
    network.train()(images)  # statistics other than 0 and 1
    with torch.no_grad():
        expected = network.eval()(images)
        freeze_batch_norm(network)
        torch.testing.assert_close(network.train()(images), expected)


def test_torchvisions_own_detector_can_be_cut():
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    Detection(model).check("layer2")
    assert Detection(model).layers() == (
        "conv1",
        "bn1",
        "relu",
        "maxpool",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "roi",
    )


def torchvisions_mobile_detector() -> FasterRCNN:
    """With live BatchNorms, and several layers below the first one that the pyramid takes."""
    return fasterrcnn_mobilenet_v3_large_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96,
    )  # fmt: skip


def of_sizes(*sizes: tuple[int, int]) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    box = torch.tensor([[4.0, 6.0, 28.0, 30.0]])
    return [torch.rand(3, *size) for size in sizes], [{"boxes": box, "labels": torch.tensor([1])} for _ in sizes]


@pytest.mark.parametrize("training", [True, False])
def test_torchvisions_mobile_detector_has_the_same_loss_in_two_halves(training):
    model, (images, targets) = torchvisions_mobile_detector().train(training), of_sizes((64, 80), (72, 48))
    task = Detection(model)
    assert task.layers() == (*map(str, range(17)), "roi")
    modes = traces(model)["modes"]
    for layer in ("4", "13", "16"):
        torch.manual_seed(1)
        whole = task.loss(images, targets)
        torch.manual_seed(1)
        cut = task.cut(images, targets, layer)
        torch.testing.assert_close(cut.loss(cut.features)[0], whole, rtol=1e-5, atol=1e-6)
    assert traces(model)["modes"] == modes


def test_the_ascent_raises_the_loss_from_the_backbone_on():
    model, (images, targets) = torchvisions_mobile_detector().eval(), of_sizes((64, 64))
    task, site = Detection(model), Site("16", gamma=25.0, steps=2)
    cut = task.cut(images, targets, "16")
    before = traces(model)
    changed = AFAN(task, [site]).change(cut, site)
    assert_same_traces(before, traces(model) | {"random": before["random"]})  # the regions are drawn
    means = []
    for features in (cut.features, changed):
        torch.manual_seed(1)
        with torch.no_grad():
            means.append(torch.stack([cut.loss(features) for _ in range(3)]).mean())
    assert means[1] > means[0] + 0.05


def test_afan_takes_one_image_images_of_many_sizes_and_images_without_objects():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    sites = [Site("layer2", 1.0, 1, 3, "01", weight=0.2), Site("roi", 0.1, 1, weight=0.1)]
    for sizes in (((64, 64),), ((64, 64), (40, 96), (96, 33))):
        images, targets = of_sizes(*sizes)
        for each in (targets, [*targets[:-1], nothing]):
            model = pyramid_detector().train()
            losses = AFAN(Detection(model), sites, 0.5)(images, each)
            losses.total.backward()
            assert losses.total.isfinite()
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_afan_perturbs_both_sites_and_trains():
    images, targets = a_batch()
    sites, clean_weight = released_sites("layer2")
    assert [site.weight for site in sites] == pytest.approx([0.7 / 3, 0.1]) and clean_weight == pytest.approx(0.7 / 3)
    model = small_detector().train()
    task = Detection(model)
    method = AFAN(task, sites, clean_weight)
    for site, reach in zip(sites, (1 / 255, 0.1 / 255)):
        cut = task.cut(images, targets, site.layer)
        change = method.change(cut, site) - cut.features
        assert change.abs().max().item() == pytest.approx(reach, rel=1e-2)
    losses = method(images, targets)
    losses.total.backward()
    assert "backbone.layer2.0.conv1.weight" in gradients(model) and "backbone.layer1.0.conv1.weight" not in gradients(
        model
    )
    for control in (FeatureNoise, UnchangedFeatures):
        assert torch.isfinite(control(task, sites, clean_weight)(images, targets).total)


def test_the_ascent_raises_the_loss_of_the_regions():
    images, targets = a_batch()
    task = Detection(small_detector().train())
    site = dataclasses.replace(released_sites("layer2")[0][1], gamma=25.0)
    cut = task.cut(images, targets, "roi")
    changed = AFAN(task, (site,)).change(cut, site)
    assert cut.loss(changed).item() > cut.loss(cut.features).item()


def truth(count: int = 3, difficult: int | None = None) -> BoxSet:
    """Images with one box each, of alternating classes, and a last one with none."""
    images = tuple(torch.zeros(3, 40, 40, dtype=torch.uint8) for _ in range(count + 1))
    boxes = tuple(torch.tensor([[4.0, 4.0, 20.0, 20.0]]) for _ in range(count)) + (torch.zeros(0, 4),)
    labels = tuple(torch.tensor([1 + i % 2]) for i in range(count)) + (torch.zeros(0, dtype=torch.int64),)
    flags = tuple(torch.tensor([i == difficult]) for i in range(count)) + (torch.zeros(0, dtype=torch.bool),)
    return BoxSet("truth", images, boxes, labels, flags, ("a", "b", "c"))


def detections(boxes: BoxSet, keep=lambda index: True) -> list[dict[str, torch.Tensor]]:
    return [
        {
            "boxes": each if keep(i) else each[:0],
            "labels": label if keep(i) else label[:0],
            "scores": torch.ones(len(label) if keep(i) else 0) * 0.9,
        }
        for i, (each, label) in enumerate(zip(boxes.boxes, boxes.labels))
    ]


def test_average_precision_of_known_detections():
    pytest.importorskip("torchmetrics")
    boxes = truth(4)
    perfect = average_precision(detections(boxes), boxes)
    assert perfect["detection"] == pytest.approx({"map": 1.0, "map_50": 1.0, "map_75": 1.0})
    assert perfect["classes"] == pytest.approx({"a": 1.0, "b": 1.0})  # there is no object of class c
    half = average_precision(detections(boxes, lambda i: i not in (0, 1)), boxes)
    assert half["detection"]["map_50"] == pytest.approx(0.5, abs=0.01)
    assert average_precision(detections(boxes, lambda i: False), boxes)["detection"]["map"] == 0
    # Half of a box overlaps it by a half: found at the threshold of 0.5, not at 0.75.
    loose = detections(boxes)
    for each in loose:
        each["boxes"] = each["boxes"] * torch.tensor([1, 1, 1, 0.6]) + torch.tensor([0, 0, 0, 0.5])
    figures = average_precision(loose, boxes)["detection"]
    assert figures["map_50"] == pytest.approx(1.0) and figures["map_75"] == 0


def test_difficult_objects_and_empty_images_in_average_precision():
    pytest.importorskip("torchmetrics")
    easy, hard = truth(4), truth(4, difficult=0)
    missed = lambda boxes: average_precision(detections(boxes, lambda i: i != 0), boxes)["classes"]["a"]  # noqa: E731
    assert missed(hard) == pytest.approx(1.0) and missed(easy) == pytest.approx(0.5, abs=0.01)
    assert average_precision(detections(hard), hard)["classes"]["a"] == pytest.approx(1.0)  # nor is finding it wrong
    wrong = detections(easy)
    extra = torch.tensor([[1.0, 1.0, 9.0, 9.0]])
    wrong[-1] = {"boxes": extra, "labels": torch.tensor([1]), "scores": torch.tensor([0.99])}
    assert average_precision(wrong, easy)["classes"]["a"] < 0.99
    with pytest.raises(ValueError, match="no object to find"):
        average_precision(detections(truth(1, difficult=0)), truth(1, difficult=0))
    with pytest.raises(ValueError, match="5 images, but there are detections for 1"):
        average_precision(wrong[:1], easy)


def test_detecting_leaves_the_model_as_it_was():
    shapes = drawn_shapes(3, 64)
    model = small_detector().train()
    before = traces(model)
    found = detect(model, shapes, "cpu", batch_size=2, show_progress=False)
    assert_same_traces(before, traces(model))
    assert len(found) == 3 and all(each.keys() == {"boxes", "labels", "scores"} for each in found)


def test_the_smoke_bench_trains_and_evaluates():
    pytest.importorskip("torchmetrics")
    bench = BENCHES["smoke"]
    task, start = bench.task(0, "cpu")
    again, same = bench.task(0, "cpu")
    assert start == same != bench.task(1, "cpu")[1] and start.keys() == {"source", "sha256"}
    method = AFAN(task, bench.sites, bench.clean_weight)
    history = train(method, bench.loader(0, "cpu"), bench.schedule, show_progress=False, precision=torch.float32)
    assert len(history.losses) == bench.schedule.epochs
    figures = bench.evaluate(task.model, "cpu", show_progress=False)
    assert figures["detection"].keys() == {"map", "map_50", "map_75"}
    assert all(0 <= value <= 1 for value in figures["detection"].values())
    train_set, test_set = bench.data().values()
    assert train_set["sha256"] != test_set["sha256"] and (train_set["images"], test_set["images"]) == bench.images


def test_a_detector_learns_drawn_shapes():
    pytest.importorskip("torchmetrics")
    bench = dataclasses.replace(BENCHES["smoke"], images=(16, 4))
    task, _ = bench.task(0, "cpu")
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for epoch in range(8):
        for images, targets in bench.loader(0, "cpu").epoch(epoch):
            loss = task.loss(images, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_benches_can_be_written_down():
    assert {"smoke", "cpu"} == BENCHES.keys()
    for bench in BENCHES.values():
        assert json.loads(json.dumps(dataclasses.asdict(bench)))["sites"][0]["mix"] == "0011"


def test_the_cpu_bench_has_its_data_and_weights():
    data_folder()
    bench = dataclasses.replace(BENCHES["cpu"], images=(4, 2))
    with pytest.warns(UserWarning, match="2 boxes of no area"):
        images, targets = next(bench.loader(0, "cpu").epoch(0))
    assert images[0].shape == (3, 168, 224)
    task, start = bench.task(0, "cpu")
    assert start["source"].startswith("resnet20-12fca82f.th")
    assert torch.isfinite(task.loss(images, targets))
    pretrained, fresh = (
        dataclasses.replace(bench, pretrained=flag).task(0, "cpu")[0].model.backbone.layer1[0].conv1.weight
        for flag in (True, False)
    )
    assert not torch.equal(pretrained, fresh)
