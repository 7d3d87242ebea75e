"""Cutting real models by the name of a layer."""

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_same_traces, differing, traces
from torch import nn

from advbn_lib import SplitError, split_at

MODELS = [
    ("torchvision", "resnet18", "layer1"), ("torchvision", "resnet50", "layer1"), ("torchvision", "densenet121", "features.transition1"),
    ("torchvision", "efficientnet_b0", "features.2"), ("torchvision", "convnext_tiny", "features.1"),
    ("torchvision", "regnet_y_400mf", "trunk_output.block1"), ("torchvision", "mobilenet_v3_small", "features.1"),
    ("torchvision", "shufflenet_v2_x1_0", "stage2"), ("torchvision", "squeezenet1_1", "features.3"),
    ("timm", "resnet18", "layer1"), ("timm", "mobilenetv3_small_050", "blocks.0"), ("timm", "convnext_atto", "stages.0"),
    ("timm", "resnetv2_50", "stages.0"), ("timm", "mobilevit_xxs", "stages.0"),
]  # fmt: skip


def make(library: str, name: str) -> nn.Module:
    return torchvision.models.get_model(name, weights=None) if library == "torchvision" else timm.create_model(name)


class Net(nn.Module):
    """stem -> relu -> block -> pooled -> 5 classes."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.stem, self.relu, self.block, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), block, nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.block(self.relu(self.stem(x))).mean((2, 3)))


def halves_agree(model: nn.Module, layer: str, x: torch.Tensor) -> None:
    split = split_at(model, layer, x)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            torch.manual_seed(1)  # for dropout and stochastic depth
            whole = model(x)
            torch.manual_seed(1)
            halves = split.tail(split.features(x))
        torch.testing.assert_close(halves, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("library", "name", "layer"), MODELS, ids=[f"{library}-{name}" for library, name, _ in MODELS])
def test_the_halves_are_the_model(library, name, layer):
    halves_agree(make(library, name), layer, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("layer", ["relu", "layer1", "layer2", "layer3", "layer4", "layer1.0", "layer3.1"])
def test_the_halves_are_the_model_wherever_it_is_cut(layer):
    halves_agree(
        make("torchvision", "resnet18") if layer != "relu" else Net(nn.BatchNorm2d(8)), layer, torch.randn(2, 3, 32, 32)
    )


class FunctionalDropout(nn.Module):
    """Reads its mode in its own forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return F.dropout(self.inner(x), 0.5, self.training)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), FunctionalDropout()], ids=["layer", "function"])
def test_dropout_above_the_cut_follows_the_mode(dropout):
    split = split_at(Net(dropout), "relu")
    features = split.features(torch.randn(2, 3, 16, 16))
    split.model.train()
    assert not torch.equal(split.tail(features), split.tail(features))
    split.model.eval()
    assert torch.equal(split.tail(features), split.tail(features))


def test_a_layer_in_another_mode_than_the_model_keeps_it():
    model = Net(nn.BatchNorm2d(8))
    split = split_at(model, "relu")
    features = split.features(torch.randn(4, 3, 16, 16))
    model.train()
    model.block.eval()
    split.tail(features)
    assert model.block.num_batches_tracked == 0


def test_splitting_leaves_the_model_as_it_was():
    model = make("torchvision", "resnet18")
    model.layer3.eval()
    model.fc.weight.requires_grad_(False)
    before, attributes = traces(model), set(vars(model))
    split_at(model, "layer1")
    assert_same_traces(before, traces(model))
    assert set(vars(model)) == attributes


def test_a_refused_split_leaves_the_model_as_it_was():
    model = make("torchvision", "resnet18")
    model.layer3.eval()
    before = traces(model)
    with pytest.raises(SplitError):
        split_at(model, "fc")
    assert_same_traces(before, traces(model))


def test_a_model_that_makes_tensors_in_its_forward_gets_no_new_attribute():
    class Ramp(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x) * torch.arange(8.0).view(1, 8, 1, 1)

    model = Net(Ramp())
    attributes = set(vars(model))
    halves_agree(model, "relu", torch.randn(2, 3, 16, 16))
    assert set(vars(model)) == attributes


def test_a_split_model_can_be_copied_and_the_copy_is_independent():
    model = make("torchvision", "resnet18")
    split = split_at(model, "layer1")
    twin = copy.deepcopy(split)
    x = torch.randn(2, 3, 32, 32)
    model.eval(), twin.model.eval()
    expected = split.tail(split.features(x))
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert torch.equal(twin.tail(twin.features(x)), expected)
    assert differing(copy.deepcopy(model).state_dict(), model.state_dict()) == []


def test_a_split_follows_the_model_to_another_precision():
    model = Net(nn.BatchNorm2d(8))
    split = split_at(model, "relu")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model.double().eval()
    assert split.tail(split.features(x)).dtype == torch.float64
    torch.testing.assert_close(split.tail(split.features(x)), model(x), rtol=0, atol=0)


def test_a_split_follows_replaced_layers():
    model = make("torchvision", "resnet18").eval()
    split = split_at(model, "layer1")
    model.fc, model.conv1 = nn.Linear(512, 3), nn.Conv2d(1, 64, 3)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(split.tail(split.features(x)), model(x))
    assert split.tail(split.features(x)).shape == (2, 3)


def test_an_in_place_layer_above_the_cut_does_not_change_the_callers_features():
    split = split_at(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "0"
    )
    features = split.features(torch.randn(2, 3, 16, 16))
    before = features.clone()
    split.tail(features)
    assert (before < 0).any() and torch.equal(features, before)


def test_parameters_belong_to_one_half_each():
    model = make("torchvision", "resnet18")
    split = split_at(model, "layer1")
    below, above = ({id(p) for p in found} for found in (split.features_parameters(), split.tail_parameters()))
    assert not below & above
    assert below | above == {id(p) for p in model.parameters()}
    assert above == {id(p) for part in (model.layer2, model.layer3, model.layer4, model.fc) for p in part.parameters()}


def test_a_parameter_of_both_halves_is_not_the_tails():
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model[2].weight = model[0].weight
    assert [p is model[2].bias for p in split_at(model, "1").tail_parameters()] == [True]


@pytest.mark.parametrize(
    ("library", "name", "layer", "nonnegative", "first"),
    [
        ("torchvision", "resnet18", "layer1", True, False), ("torchvision", "resnet18", "bn1", False, False),
        ("torchvision", "densenet121", "features.transition1", False, True), ("torchvision", "densenet121", "features.denseblock1", False, True),
        ("timm", "resnetv2_50", "stages.0", False, True), ("torchvision", "convnext_tiny", "features.1", False, False),
    ],
)  # fmt: skip
def test_knows_the_sign_of_the_features_and_whether_batch_norm_reads_them(library, name, layer, nonnegative, first):
    split = split_at(make(library, name), layer)
    assert (split.nonnegative, split.batch_norm_first) == (nonnegative, first)


class Refuses(nn.Module):
    """A block that decides by its data, in a way that tracing cannot follow."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.norm = how, nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(x)
        if self.how == "if":
            return x if x.mean() > 0 else x + 1
        if self.how == "range":
            return torch.stack([x[i] for i in range(x.shape[0])])
        if self.how == "len":
            return x * len(x)
        return x * float(x.detach().mean())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("how", ["if", "range", "len", "float"])
def test_a_block_that_decides_by_its_data_is_kept_whole(how, nested):
    block = nn.Sequential(nn.Identity(), nn.Sequential(Refuses(how), nn.ReLU())) if nested else Refuses(how)
    halves_agree(Net(block), "relu", torch.randn(4, 3, 16, 16))


def test_parameters_of_a_block_that_is_kept_whole_are_the_tails():
    model = Net(Refuses("if"))
    above = split_at(model, "relu").tail_parameters()
    assert {id(p) for p in above} == {id(p) for part in (model.block, model.fc) for p in part.parameters()}


class Decides(Net):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


class Sequences(Net):
    """Its block works on N,L,C."""

    def forward(self, x):
        return self.fc(self.block(self.relu(self.stem(x)).flatten(2).transpose(1, 2)).mean(1))


class Branches(Net):
    def forward(self, x):
        return super().forward(x), x


class Shared(Net):
    """One ReLU, used twice."""

    def forward(self, x):
        return self.fc(self.relu(self.block(self.relu(self.stem(x)))).mean((2, 3)))


class ReadsInputSize(Net):
    def forward(self, x):
        return self.fc(F.interpolate(self.block(self.stem(x)), size=x.shape[2:]).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "layer", "message"),
    [
        (lambda: make("torchvision", "resnet18"), "layr1", r"no layer 'layr1'.*layer1"),
        (lambda: make("torchvision", "resnet18"), "zzz", r"no layer 'zzz'.*layer1"),
        (lambda: make("torchvision", "resnet18"), "", "no layer ''"),
        (lambda: make("torchvision", "resnet18"), "fc", r"'fc'.*\(2, 1000\).*not N,C,H,W"),
        (lambda: make("torchvision", "resnet18"), "layer1.0.relu", "runs 2 times"),
        (lambda: make("torchvision", "resnet18"), "layer1.0.conv1", "another path"),
        (lambda: make("torchvision", "densenet121"), "features.denseblock1.denselayer1", "another path"),
        (lambda: Shared(nn.Identity()), "relu", "runs 2 times"),
        (lambda: ReadsInputSize(nn.Identity()), "block", "another path.*size"),
        (lambda: Sequences(nn.Identity()), "block", r"\(2, 3844, 8\).*not N,C,H,W"),
        (lambda: Branches(nn.Identity()), "relu", "several tensors"),
        (lambda: Decides(nn.Identity()), "relu", "cannot be traced.*depend on the data"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), "0", "example="),
        (lambda: torchvision.models.googlenet(weights=None, init_weights=False), "inception3b", "auxiliary"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)), "0", r"\(2, 3, 64, 64\).*example="),
    ],
)
def test_a_cut_that_cannot_be_is_refused_with_the_reason(build, layer, message):
    with pytest.raises(SplitError, match=re.compile(message, re.DOTALL)):
        split_at(build(), layer)


def test_an_example_makes_a_model_of_another_size_cuttable():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    halves_agree(model, "1", torch.randn(2, 1, 8, 8))


def test_auxiliary_outputs_can_be_switched_off():
    model = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)
    halves_agree(model, "inception3b", torch.randn(2, 3, 64, 64))


def test_features_of_another_shape_are_refused_when_used():
    split = split_at(Net(nn.Identity()), "block")
    split.model.block = nn.Flatten(2)
    with pytest.raises(SplitError, match="not N,C,H,W"):
        split.features(torch.randn(2, 3, 16, 16))
