"""DeepLab V3+, its cuts, the scores of masks, and the bench."""

import builtins
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, copy_of_state, differing, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

from advbn_lib.ascent import Steps, ascend
from advbn_lib.data.masks import IGNORE, MaskSet
from advbn_lib.feature_ball import FeatureBall
from advbn_lib.methods.afan import AFAN, Site
from advbn_lib.methods.feature_controls import ExtraForwards, FeatureNoise
from advbn_lib.models.deeplab import SmallDeepLab, deeplab_v3_plus
from advbn_lib.modes import evaluating
from advbn_lib.poly_schedule import PolySchedule
from advbn_lib.segmentation_bench import BENCHES, SegmentationBench, drawn_streets
from advbn_lib.segmentation_metrics import MaskScores, mask_confusion, predict_masks
from advbn_lib.tasks.segmentation import Segmentation, pixel_losses
from advbn_lib.training import train

smp = pytest.importorskip("segmentation_models_pytorch")
CLASSES = 5
SITES = ("layer1", "layer2", "layer3", "aspp", "concat")
every_site = pytest.mark.parametrize("layer", SITES)


def small(pool=True, dropout=0.0) -> SmallDeepLab:
    model = SmallDeepLab(CLASSES, depth=8, width=4, channels=8, pool=pool, dropout=dropout)
    for module in model.modules():  # statistics of their own, so that train and eval mode differ
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def some_batch(count=3, size=(16, 24)):
    masks = torch.randint(0, CLASSES, (count, *size))
    masks[:, :2], masks[0, 8:] = IGNORE, IGNORE  # the images have different numbers of labelled pixels
    return torch.randn(count, 3, *size), masks


def released_sites():
    return [Site("layer2", gamma=0.01, steps=1, points=3, mix="11", weight=0.1), Site("aspp", 0.4, 1, 2, weight=0.1)]


class TestLosses:
    def test_their_mean_is_the_mean_over_all_labelled_pixels(self):
        logits, (_, targets) = torch.randn(3, CLASSES, 16, 24), some_batch()
        losses = pixel_losses(logits, targets)
        assert losses.shape == (3,)
        torch.testing.assert_close(losses.mean(), F.cross_entropy(logits, targets, ignore_index=IGNORE))

    def test_an_image_or_a_batch_without_labels_has_loss_0(self):
        logits, (_, targets) = torch.randn(3, CLASSES, 16, 24, requires_grad=True), some_batch()
        targets[1] = IGNORE
        losses = pixel_losses(logits, targets)
        assert losses[1] == 0 and losses[0] > 0 and losses[2] > 0
        empty = pixel_losses(logits, torch.full_like(targets, IGNORE))
        empty.sum().backward()
        assert empty.tolist() == [0, 0, 0] and logits.grad.abs().max() == 0

    def test_masks_of_another_size_are_refused(self):
        with pytest.raises(ValueError, match="output stride divides"):
            pixel_losses(torch.randn(2, CLASSES, 16, 24), torch.zeros(2, 16, 16, dtype=torch.int64))


class TestCuts:
    @every_site
    @pytest.mark.parametrize("pool", [True, False])
    def test_unchanged_features_give_the_loss_of_the_whole_model(self, layer, pool):
        task, (images, masks) = Segmentation(small(pool).eval()), some_batch()
        cut = task.cut(images, masks, layer)
        losses = cut.loss(cut.features)
        assert losses.shape == (3,) and not cut.features.requires_grad and cut.features.shape[0] == 3
        torch.testing.assert_close(losses.mean(), task.loss(images, masks))
        torch.testing.assert_close(losses, pixel_losses(task.model(images), masks))

    @pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "layer4", "aspp", "concat"])
    def test_the_same_holds_for_the_encoders_of_the_library(self, layer):
        model = deeplab_v3_plus("resnet18", CLASSES, pretrained=False, channels=16)
        task, (images, masks) = Segmentation(model.eval()), some_batch(2, (32, 48))
        cut = task.cut(images, masks, layer)
        torch.testing.assert_close(cut.loss(cut.features).mean(), task.loss(images, masks))
        strides = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 16, "aspp": 16, "concat": 4}
        assert cut.features.shape[-2:] == (32 // strides[layer], 48 // strides[layer])

    @pytest.mark.parametrize("layer", ["layer2", "layer4", "aspp", "concat"])
    @pytest.mark.parametrize("training", [True, False])
    def test_an_encoder_of_another_stride_is_cut_too(self, layer, training):
        model = smp.DeepLabV3Plus(
            "resnet18", encoder_weights=None, encoder_output_stride=8, decoder_channels=16, classes=CLASSES
        )
        task, (images, masks) = Segmentation(model.train(training)), some_batch(2, (32, 48))
        torch.manual_seed(1)
        whole = task.loss(images, masks)
        torch.manual_seed(1)  # the ASPP has a dropout
        cut = task.cut(images, masks, layer)
        torch.testing.assert_close(cut.loss(cut.features).mean(), whole)

    def test_a_batch_of_one_and_a_batch_without_labels_are_trained_on(self):
        task, (images, masks) = Segmentation(small().eval()), some_batch()
        for inputs, targets in ((images[:1], masks[:1]), (images, torch.full_like(masks, IGNORE))):
            losses = AFAN(task, released_sites(), clean_weight=0.7)(inputs, targets)
            losses.total.backward()
            assert losses.total.isfinite() and all(p.grad.isfinite().all() for p in task.model.parameters())
        assert losses.total == 0

    def test_an_encoder_of_fewer_stages_is_cut_at_these(self):
        model = smp.DeepLabV3Plus("resnet18", 4, None, decoder_channels=16, classes=CLASSES, upsampling=4).eval()
        task, (images, masks) = Segmentation(model), some_batch(2, (32, 48))
        for layer in ("layer3", "aspp"):
            cut = task.cut(images, masks, layer)
            torch.testing.assert_close(cut.loss(cut.features).mean(), task.loss(images, masks))
        with pytest.raises(ValueError, match="'layer4'; it can at layer1, layer2, layer3, aspp, concat"):
            task.check("layer4")

    @pytest.mark.parametrize(
        ("layer", "without"),
        [
            ("layer1", ("encoder.conv1", "encoder.bn1", "encoder.layer1")),
            ("layer2", ("encoder.layer2",)),  # the low-level feature goes round the cut, with its graph
            ("layer3", ("encoder.layer2", "encoder.layer3")),
            ("aspp", ("encoder.layer2", "encoder.layer3", "decoder.aspp")),
            ("concat", ("encoder", "decoder.aspp", "decoder.block1")),
        ],
    )
    def test_which_parameters_a_loss_trains(self, layer, without):
        task, (images, masks) = Segmentation(small()), some_batch()
        cut = task.cut(images, masks, layer)
        (cut.loss(cut.features) + cut.loss(cut.features + 0.1)).mean().backward()
        untrained = {name for name, p in task.model.named_parameters() if p.grad is None}
        expected = {n for n, _ in task.model.named_parameters() if n.startswith(tuple(f"{w}." for w in without))}
        assert untrained == expected and expected

    @every_site
    def test_layers_below_the_cut_run_once_and_those_above_at_each_loss(self, layer):
        task, (images, masks) = Segmentation(small()), some_batch()
        counts = {name: 0 for name, _ in task.model.named_modules()}

        def count(name):
            return lambda *_: counts.__setitem__(name, counts[name] + 1)

        for name, module in task.model.named_modules():
            module.register_forward_hook(count(name))
        cut = task.cut(images, masks, layer)
        for _ in range(3):
            cut.loss(cut.features)
        position = SITES.index(layer)
        runs = {name: 1 if SITES.index(name) <= position else 3 for name in ("layer1", "layer2", "layer3")}
        assert {name: counts[f"encoder.{name}"] for name in runs} == runs and counts["encoder.conv1"] == 1
        assert counts["decoder.aspp"] == (1 if layer in ("aspp", "concat") else 3)
        assert counts["decoder.block1"] == (1 if layer == "concat" else 3)
        assert counts["decoder.block2"] == counts["segmentation_head"] == 3

    @every_site
    def test_a_perturbed_feature_is_what_the_rest_sees(self, layer):
        task, (images, masks) = Segmentation(small().eval()), some_batch()
        cut = task.cut(images, masks, layer)
        changed = cut.features + torch.randn_like(cut.features)
        name = {"aspp": "decoder.aspp", "concat": None}.get(layer, f"encoder.{layer}")
        if name is None:
            handle = task.model.decoder.block2.register_forward_pre_hook(lambda module, inputs: (changed,))
        else:
            handle = task.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: changed)
        expected = pixel_losses(task.model(images), masks)
        handle.remove()
        torch.testing.assert_close(cut.loss(changed), expected)

    @every_site
    def test_the_ascent_raises_the_loss_and_in_eval_mode_leaves_no_trace(self, layer):
        task, (images, masks) = Segmentation(small(dropout=0.5).train()), some_batch()
        with evaluating(task.model):
            before = traces(task.model)
            cut = task.cut(images, masks, layer)
            found = ascend(cut.loss, cut.features, FeatureBall(0.5), Steps(4, 0.1, keep="best"))
            higher = cut.loss(cut.features + found.delta[0])
            assert (higher > cut.loss(cut.features)).all() and found.delta[0].abs().max() <= 0.5
            assert_same_traces(before, traces(task.model))
        assert task.model.training

    @pytest.mark.parametrize("layer", ["layer4", "encoder.layer2", "", "head"])
    def test_an_unknown_layer_is_refused_with_the_known_ones(self, layer):
        task = Segmentation(small())
        with pytest.raises(ValueError, match="SmallDeepLab cannot be cut.*layer1, layer2, layer3, aspp, concat"):
            task.check(layer)
        with pytest.raises(ValueError, match="cannot be cut"):
            AFAN(task, [Site(layer)])
        with pytest.raises(ValueError, match="cannot be cut"):
            task.cut(*some_batch(), layer)

    def test_models_of_another_structure_are_refused(self):
        with pytest.raises(ValueError, match="Sequential has no encoder.*DeepLabV3Plus"):
            Segmentation(nn.Sequential(nn.Conv2d(3, 2, 1)))
        with pytest.raises(ValueError, match="has no decoder.block1, decoder.block2, decoder.up|has no decoder"):
            Segmentation(smp.DeepLabV3("resnet18", encoder_weights=None, decoder_channels=8))
        with pytest.raises(ValueError, match="DeepLabV3 has no encoder, .*segmentation-models-pytorch's DeepLabV3Plus"):
            Segmentation(deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4))
        with pytest.raises(ValueError, match="has no encoder.conv1"):
            Segmentation(smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, decoder_channels=8))
        with pytest.raises(ValueError, match="aux_params"):
            Segmentation(
                smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_channels=8, aux_params={"classes": 2})
            )


class TestMethods:
    def test_afan_with_the_released_settings_sums_what_it_says(self):
        task, (images, masks) = Segmentation(small()), some_batch()
        losses = AFAN(task, released_sites(), clean_weight=0.7)(images, masks)
        torch.testing.assert_close(losses.total, 0.7 * losses.clean + 0.3 * losses.adversarial)
        losses.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())

    def test_running_statistics_see_every_pass_in_train_mode(self):
        task, (images, masks) = Segmentation(small()), some_batch()
        AFAN(task, released_sites(), 0.7)(images, masks)
        seen = {name: int(b) for name, b in task.model.named_buffers() if name.endswith("num_batches_tracked")}
        # The stem: two cuts and the clean pass. Above the first site: its ascent and its 2 points, the other cut, the clean
        # pass. What is above both: 3 + 2 + 1.
        assert seen["encoder.bn1.num_batches_tracked"] == 3
        assert seen["encoder.layer3.0.bn1.num_batches_tracked"] == 5
        assert seen["decoder.block2.1.num_batches_tracked"] == 6

    def test_an_ascent_in_eval_mode_updates_no_statistics(self):
        task, (images, masks) = Segmentation(small()), some_batch()
        method = AFAN(task, released_sites()[1:], 0.7, attack_mode="eval")
        cut = task.cut(images, masks, "aspp")
        before = copy_of_state(task.model)
        method.attack(cut, method.sites[0])
        assert differing(before, copy_of_state(task.model)) == [] and task.model.training

    def test_extra_forwards_have_the_gradients_of_plain_training(self):
        task, (images, masks) = Segmentation(small()), some_batch()
        ExtraForwards(task, released_sites())(images, masks).total.backward()
        extra = {name: p.grad.clone() for name, p in task.model.named_parameters()}
        task.model.zero_grad()
        task.loss(images, masks).backward()
        for name, p in task.model.named_parameters():
            torch.testing.assert_close(p.grad, extra[name])

    def test_noise_trains_too(self):
        task, (images, masks) = Segmentation(small()), some_batch()
        losses = FeatureNoise(task, released_sites(), 0.7)(images, masks)
        losses.total.backward()
        assert losses.total.isfinite() and losses.adversarial != losses.clean


class TestModels:
    def test_the_papers_network(self):
        model = deeplab_v3_plus("resnet50", pretrained=False)
        assert model.decoder.block2[0][0].in_channels == 304 and model.encoder.output_stride == 16
        assert [conv[0].dilation[0] for conv in list(model.decoder.aspp[0].convs)[1:4]] == [6, 12, 18]
        momenta = {m.momentum for m in model.encoder.modules() if isinstance(m, nn.BatchNorm2d)}
        assert momenta == {0.01}
        assert model.decoder.aspp[0].project[3].p == 0.1 and model.segmentation_head[0].out_channels == 21

    @pytest.mark.parametrize(("pool", "size"), [(True, (16, 24)), (False, (12, 20))])
    def test_the_small_one_gives_logits_of_the_images_size(self, pool, size):
        model = small(pool).eval()
        assert model(torch.randn(2, 3, *size)).shape == (2, CLASSES, *size)
        assert size[0] % model.encoder.output_stride == 0

    def test_published_weights_are_taken_over(self, tmp_path):
        from advbn_lib.models.cifar_resnet import CifarResNet

        network = CifarResNet(8, 4)
        state = {f"module.{name.replace('fc.', 'linear.')}": v for name, v in network.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "weights.th")
        model = SmallDeepLab(CLASSES, depth=8, width=4, weights=tmp_path / "weights.th", channels=8)
        assert torch.equal(model.encoder.layer3[0].conv2.weight, network.layer3[0].conv2.weight)
        with pytest.raises(ValueError, match="for another network"):
            SmallDeepLab(CLASSES, depth=14, width=4, weights=tmp_path / "weights.th")

    def test_without_the_library_the_message_says_how_to_get_it(self, monkeypatch):
        real = builtins.__import__

        def refuse(name, *args, **kwargs):
            if name == "segmentation_models_pytorch":
                raise ModuleNotFoundError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'advbn_lib\[segmentation\]'"):
            SmallDeepLab(CLASSES)


class Answers(nn.Module):
    """A model whose answer is the class that the images' red value stands for."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.sizes = classes, []
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        assert not self.training
        self.sizes.append(tuple(x.shape))
        return F.one_hot((x[:, 0] * 255).round().long().clamp(0, self.classes - 1), self.classes).movedim(-1, 1).float()


def answered(truth, answers, classes=4) -> MaskSet:
    """A set on which :class:`Answers` gives these answers."""
    images = torch.stack([answers, answers, answers], 1).to(torch.uint8)
    names = tuple("abcdefgh"[:classes])
    return MaskSet("answered", images, truth.to(torch.uint8), names, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class TestScores:
    def test_by_hand(self):
        counts = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
        scores = MaskScores.of(counts, ("a", "b", "c"))
        assert scores.iou == pytest.approx({"a": 3 / 6, "b": 4 / 7}) and scores.absent == ("c",)
        assert scores.miou == pytest.approx((3 / 6 + 4 / 7) / 2) and scores.pixel_accuracy == pytest.approx(0.7)

    def test_a_class_that_is_only_answered_counts_as_missed(self):
        scores = MaskScores.of(torch.tensor([[3, 1], [0, 0]]), ("a", "b"))
        assert scores.iou == {"a": 0.75, "b": 0} and scores.absent == ()

    def test_without_a_labelled_pixel_there_is_no_score(self):
        scores = MaskScores.of(torch.zeros(2, 2, dtype=torch.int64), ("a", "b"))
        assert math.isnan(scores.miou) and math.isnan(scores.pixel_accuracy) and scores.absent == ("a", "b")

    @given(st.integers(0, 10_000))
    @settings(max_examples=15, deadline=None)
    def test_are_those_of_torchmetrics(self, seed):
        metrics = pytest.importorskip("torchmetrics.functional.classification")
        generator = torch.Generator().manual_seed(seed)
        truth, answers = torch.randint(0, 4, (2, 3, 9, 13), generator=generator)
        truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
        masks, model = answered(truth, answers), Answers(4).train()
        counts = mask_confusion(model, masks, "cpu", stride=4, chunk=2)
        expected = metrics.multiclass_confusion_matrix(answers, truth, 4, ignore_index=IGNORE)
        assert torch.equal(counts, expected) and model.training and model.bn.num_batches_tracked == 0
        iou = metrics.multiclass_jaccard_index(answers, truth, 4, average="none", ignore_index=IGNORE)
        scores = MaskScores.of(counts, masks.classes)
        assert list(scores.iou.values()) == pytest.approx(iou.tolist())
        assert model.sizes == [(2, 3, 12, 16), (1, 3, 12, 16)]  # filled up to multiples of the stride

    def test_images_of_many_sizes(self):
        class Mixed:
            name, classes, mean, std = "mixed", tuple("abcd"), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
            parts = [answered(*torch.randint(0, 4, (2, 1, *size))) for size in [(4, 8), (8, 4), (4, 8)]]

            def __len__(self):
                return 3

            def __getitem__(self, index):
                return self.parts[index][0]

        whole = mask_confusion(Answers(4), Mixed(), "cpu", stride=4)
        assert torch.equal(whole, sum(mask_confusion(Answers(4), part, "cpu", stride=4) for part in Mixed.parts))
        assert whole.sum() == 3 * 32

    def test_answers_have_the_size_of_the_image(self):
        model = small().eval()
        assert predict_masks(model, torch.randn(1, 3, 13, 21), 8).shape == (1, 13, 21)


class TestSchedule:
    def test_falls_to_the_smallest_rate(self):
        schedule = PolySchedule(epochs=10, batch_size=4, lr=0.01)
        assert schedule.rate(0) == 0.01 and schedule.rate(5) == pytest.approx(0.01 * 0.5**0.9)
        rates = [schedule.rate(step / 7) for step in range(71)]
        assert rates == sorted(rates, reverse=True) and rates[-1] == schedule.rate(12) == 1e-6

    def test_warms_up(self):
        schedule = PolySchedule(epochs=10, batch_size=4, lr=0.01, warmup=1, power=1)
        assert schedule.rate(0) == 0 and schedule.rate(0.5) == pytest.approx(0.5 * 0.01 * 0.95)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"milestones": (3,)}, "no milestones"), ({"power": -1}, "negative"), ({"min_lr": -1}, "negative"), ({"epochs": 0}, "at least 1")],
    )  # fmt: skip
    def test_bad_settings_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            PolySchedule(**({"epochs": 2, "batch_size": 1, "lr": 0.1} | options))


class TestBench:
    @pytest.fixture(scope="class")
    def bench(self):
        return BENCHES["smoke"]

    def test_settings_can_be_written_down(self):
        for bench in BENCHES.values():
            assert json.loads(json.dumps(dataclasses.asdict(bench)))["schedule"]["power"] == 0.9
            assert all(side % 8 == 0 for side in bench.crop)

    def test_a_task_is_a_function_of_its_seed(self, bench):
        before = torch.get_rng_state()
        (first, source), (_, again), (_, other) = (bench.task(seed, "cpu") for seed in (0, 0, 1))
        assert source == again != other and set(source) == {"source", "sha256"}
        assert torch.equal(before, torch.get_rng_state())
        for site in bench.sites:
            first.check(site.layer)

    def test_data_are_described(self, bench):
        described = bench.data()
        assert [entry["images"] for entry in described.values()] == [24, 12]
        assert len({entry["sha256"] for entry in described.values()}) == 2
        assert all(entry["unlabelled_pixels"] > 0 for entry in described.values())

    def test_a_run_learns_and_is_tested(self, bench):
        task, _ = bench.task(0, "cpu")
        method = AFAN(task, bench.sites, bench.clean_weight)
        before = bench.evaluate(task.model, "cpu", False)
        history = train(method, bench.loader(0, "cpu"), bench.schedule, show_progress=False, precision=torch.float32)
        after = bench.evaluate(task.model, "cpu", False)
        assert history.losses[-1][0] < 0.5 * history.losses[0][0]
        assert after["segmentation"]["miou"] > before["segmentation"]["miou"] + 0.2
        assert set(after["iou"]) == {"sky", "ground", "house"} and after["segmentation"]["absent_classes"] == 0
        assert task.model.training

    def test_streets_are_drawn_from_their_seed(self):
        assert drawn_streets(3, seed=4).checksum == drawn_streets(3, seed=4).checksum != drawn_streets(3).checksum
        masks = drawn_streets(20).masks
        assert set(masks.unique().tolist()) == {0, 1, 2, IGNORE}

    def test_bad_settings_are_refused(self):
        schedule = PolySchedule(epochs=1, batch_size=2, lr=0.1)
        with pytest.raises(ValueError, match="source is 'camvid' or 'drawn'"):
            SegmentationBench(schedule, source="voc")
        with pytest.raises(ValueError, match="how many train_images"):
            SegmentationBench(schedule, source="drawn")
