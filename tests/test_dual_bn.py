"""Two sets of BatchNorm in one model."""

import pytest
import timm
import torch
import torchvision
from conftest import batch, copy_of_state, differing, tiny_network
from torch import nn

from advbn_lib import AdvBN, DualBatchNorm, add_second_batch_norm, single_branch, use_branch
from advbn_lib.fused_bn import fuse_batch_norms, fused_layers, unfuse_batch_norms


def dual_network() -> nn.Module:
    """With branches that differ."""
    model = tiny_network()
    add_second_batch_norm(model)
    for layer in duals(model):
        nn.init.uniform_(layer.adversarial.weight)
        nn.init.uniform_(layer.adversarial.running_mean)
    return model.eval()


def duals(model: nn.Module) -> list[DualBatchNorm]:
    return [module for module in model.modules() if isinstance(module, DualBatchNorm)]


def test_every_batch_norm_is_replaced_and_counted():
    model = tiny_network()
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert add_second_batch_norm(model) == count == len(duals(model)) == 7


def test_only_the_named_ones_are_replaced():
    model = tiny_network()
    assert add_second_batch_norm(model, ["layer2.0.bn1", "layer2.0.conv1", "nothing"]) == 1
    assert isinstance(model.layer2[0].bn1, DualBatchNorm) and isinstance(model.bn1, nn.BatchNorm2d)


def test_the_second_set_begins_as_a_copy_statistics_included():
    model = tiny_network()
    model(batch()[0])  # moves the running statistics
    images, _ = batch()
    expected = model.eval()(images)
    add_second_batch_norm(model)
    for branch in ("clean", "adversarial"):
        with use_branch(model, branch):
            assert torch.equal(model(images), expected)
    for layer in duals(model):
        assert differing(layer.clean.state_dict(), layer.adversarial.state_dict()) == []
        assert layer.clean.weight is not layer.adversarial.weight


@pytest.mark.parametrize(("used", "unused"), [("clean", "adversarial"), ("adversarial", "clean")])
def test_training_one_branch_leaves_the_other(used, unused):
    model = dual_network().train()
    before = copy_of_state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with use_branch(model, used):
        model(batch()[0]).square().sum().backward()
    optimizer.step()
    changed = differing(before, copy_of_state(model))
    assert not [name for name in changed if f".{unused}." in name]
    for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert f"layer3.0.bn2.{used}.{part}" in changed


def test_clean_is_the_branch_outside_any_block():
    model, (images, _) = dual_network(), batch()
    with use_branch(model, "clean"):
        clean = model(images)
    with use_branch(model, "adversarial"):
        adversarial = model(images)
    assert torch.equal(model(images), clean) and not torch.equal(clean, adversarial)


def test_the_branch_comes_back_after_an_error_and_when_nested():
    model = dual_network()
    with pytest.raises(KeyError), use_branch(model, "adversarial"):
        with use_branch(model, "clean"):
            assert {layer.branch for layer in duals(model)} == {"clean"}
        assert {layer.branch for layer in duals(model)} == {"adversarial"}
        raise KeyError
    assert {layer.branch for layer in duals(model)} == {"clean"}


@pytest.mark.parametrize("branch", ["clean", "adversarial"])
def test_a_single_branch_predicts_the_same_under_the_original_keys(branch):
    plain, model, (images, _) = tiny_network(), dual_network(), batch()
    before = copy_of_state(model)
    alone = single_branch(model, branch)
    with use_branch(model, branch):
        expected = model(images)
    assert torch.equal(alone(images), expected)
    assert alone.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(alone.state_dict())
    assert torch.equal(plain.eval()(images), expected)
    assert differing(before, copy_of_state(model)) == []


def test_adding_twice_does_nothing_more():
    model = dual_network()
    before = copy_of_state(model)
    assert add_second_batch_norm(model) == 0
    assert differing(before, copy_of_state(model)) == []


class TwoNames(nn.Module):
    """Its BatchNorms stand in it by themselves and in a sequence, as in many networks for domain adaptation."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.features = nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.conv2, self.bn2)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.features(x).relu().mean((2, 3)))


def test_a_batch_norm_with_two_names_is_replaced_under_both():
    model = TwoNames()
    images = batch()[0]
    assert add_second_batch_norm(model, ["bn2"]) == 1
    assert model.features[4] is model.bn2 is duals(model)[0] and isinstance(model.features[1], nn.BatchNorm2d)
    nn.init.constant_(model.bn2.adversarial.bias, 1.0)
    with use_branch(model.eval(), "adversarial"):
        adversarial = model(images)
    assert not torch.equal(model(images), adversarial)
    plain = single_branch(model, "adversarial")
    assert duals(plain) == [] and torch.equal(plain(images), adversarial)
    assert fuse_batch_norms(model) == 2 and model.features[4] is model.bn2 in fused_layers(model).values()
    assert unfuse_batch_norms(model) == 2 and model.features[4] is model.bn2
    with use_branch(model, "adversarial"):
        assert torch.equal(model(images), adversarial)


def test_both_halves_and_the_model_use_the_same_set_of_a_batch_norm_with_two_names():
    method = AdvBN(TwoNames(), "features.2").eval()
    nn.init.constant_(method.model.bn2.adversarial.bias, 1.0)
    images = batch()[0]
    assert torch.allclose(method.predictions(images)["adversarial"], method.predict(images, "adversarial"))


def test_modes_are_kept():
    model = tiny_network().train()
    model.layer2.eval()
    add_second_batch_norm(model)
    assert model.layer1[0].bn1.clean.training and model.layer1[0].bn1.adversarial.training
    assert not model.layer2[0].bn1.training and not model.layer2[0].bn1.adversarial.training


def test_timms_batch_norm_with_activation_is_doubled_as_a_whole():
    model = timm.create_model("mobilenetv3_small_050").eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    assert add_second_batch_norm(model) > 0
    assert any("BatchNormAct2d" in type(layer.clean).__name__ for layer in duals(model))
    with use_branch(model, "adversarial"):
        assert torch.equal(model(images), expected)


def test_a_network_without_batch_norm_has_none_to_double():
    assert add_second_batch_norm(torchvision.models.convnext_tiny(weights=None)) == 0


@pytest.mark.parametrize("call", [single_branch, lambda model, branch: use_branch(model, branch).__enter__()])
def test_an_unknown_branch_is_refused(call):
    with pytest.raises(ValueError, match="'clean' or 'adversarial', got 'dirty'"):
        call(dual_network(), "dirty")
