"""AdvBN and its controls: what they train, what they leave alone, and what they leave behind."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_same_traces, batch, copy_of_state, differing, tiny_network, traces
from torch import nn

from advbn_lib import AdvBN, CleanFineTuning, PlainTraining, RandomStatistics, SplitError, single_branch, use_branch
from advbn_lib.methods import MixedStatistics
from advbn_lib.statistics import INSTANCE, mean, std

PERTURBING = [AdvBN, RandomStatistics, MixedStatistics]


def batches_seen(model: nn.Module) -> dict[str, int]:
    return {
        name.removesuffix(".num_batches_tracked"): int(value)
        for name, value in model.named_buffers()
        if name.endswith("num_batches_tracked")
    }


def below_the_cut(name: str) -> bool:
    return name.split(".")[0] in ("conv1", "bn1", "relu", "layer1")


def train_a_little(method, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
    method.train()
    for _ in range(steps):
        method(*batch()).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def used_before(model: nn.Module) -> nn.Module:
    """With running statistics that are not those of a new network."""
    model.train()
    for _ in range(5):
        model(1 + 2 * torch.randn(8, 3, 12, 12))
    return model


def test_the_papers_values_are_the_defaults():
    method = AdvBN(tiny_network())
    assert (method.split.layer, method.perturbation.eps, method.steps.size, method.steps.count) == (
        "layer1",
        1.1,
        0.2,
        6,
    )
    assert (method.steps.random_start, method.steps.keep, method.steps.direction) == (False, "last", "sign")
    assert method.perturbation.clamp_at_zero and not method.perturbation.per_image and method.dual_bn


@pytest.mark.parametrize("training", [True, False])
def test_the_attack_leaves_no_trace(training):
    method = AdvBN(used_before(tiny_network()))
    images, labels = batch()
    method.train(training)
    method(images, labels).total.backward()  # so that there are gradients to spoil
    method.model.layer3.train(not training)
    method.model.fc.weight.requires_grad_(False)
    features = method.features(images)
    before = traces(method.model)
    method.perturb(features, labels)
    assert_same_traces(before, traces(method.model))


@pytest.mark.parametrize("call", [1, 3, 6])
def test_an_error_inside_the_ascent_leaves_no_trace(call):
    method = AdvBN(used_before(tiny_network()))
    images, labels = batch()
    method.train()
    method.model.layer3.eval()
    calls = []

    def stop(*_):
        calls.append(None)
        if len(calls) == call:
            raise KeyboardInterrupt

    method.model.fc.register_forward_hook(stop)
    before = traces(method.model)
    with pytest.raises(KeyboardInterrupt):
        method(images, labels)
    assert_same_traces(before, traces(method.model))


def test_images_with_nan_are_refused_and_leave_no_trace():
    method = AdvBN(used_before(tiny_network()))
    images, labels = batch()
    images[0, 0, 0, 0] = float("nan")
    method.train()
    before = traces(method.model)
    with pytest.raises(FloatingPointError, match="step 0 of 6"):
        method(images, labels)
    assert_same_traces(before, traces(method.model))


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_out_of_range_are_refused(label):
    images, labels = batch()
    labels[3] = label
    with pytest.raises((IndexError, ValueError), match=str(label)):
        AdvBN(tiny_network())(images, labels)


@pytest.mark.parametrize("method_type", PERTURBING)
def test_batch_norm_moves_as_in_the_released_code(method_type):
    """Below the cut: never. Above it: each set once a step, none of them in the ascent."""
    method = method_type(used_before(tiny_network())).train()
    before = batches_seen(method.model)
    method(*batch())
    moved = {name: count - before[name] for name, count in batches_seen(method.model).items()}
    assert moved == {name: 0 if below_the_cut(name) else 1 for name in before}


@pytest.mark.parametrize("method_type", PERTURBING)
def test_each_batch_norm_set_sees_its_own_features(method_type):
    method = method_type(used_before(tiny_network())).train()
    images, labels = batch()
    features, random = method.features(images), torch.get_rng_state()
    perturbed = method.perturb(features, labels)
    block = method.model.layer2[0]
    old = block.bn1.clean.running_mean.clone()
    torch.set_rng_state(random)
    method(images, labels)
    for layer, inputs in ((block.bn1.clean, features), (block.bn1.adversarial, perturbed)):
        expected = 0.9 * old + 0.1 * block.conv1(inputs).mean((0, 2, 3))
        torch.testing.assert_close(layer.running_mean, expected.detach())


def test_the_attack_goes_through_the_adversarial_set_in_eval_mode():
    method = AdvBN(used_before(tiny_network())).train()
    features, labels = method.features(batch()[0]), batch()[1]
    losses = method.attack(features, labels).losses
    method.eval()
    with use_branch(method.model, "adversarial"):
        torch.testing.assert_close(losses[0], F.cross_entropy(method.split.tail(features), labels).detach())
    method.model.layer2[0].bn1.clean.weight.data.mul_(-1)
    assert torch.equal(method.attack(features, labels).losses, losses)
    method.model.layer2[0].bn1.adversarial.weight.data.mul_(-1)
    assert not torch.equal(method.attack(features, labels).losses, losses)


@pytest.mark.parametrize("method_type", PERTURBING)
def test_the_loss_is_the_sum_of_both_cross_entropies(method_type):
    method = method_type(used_before(tiny_network())).eval()
    images, labels = batch()
    method.model.layer2[0].bn1.adversarial.weight.data.mul_(0.5)  # so that the branches differ
    torch.manual_seed(1)
    perturbed = method.perturb(method.features(images), labels)
    torch.manual_seed(1)
    losses = method(images, labels)
    with use_branch(method.model, "adversarial"):
        adversarial = F.cross_entropy(method.split.tail(perturbed), labels)
    torch.testing.assert_close(losses.clean, F.cross_entropy(method.predict(images), labels))
    torch.testing.assert_close(losses.adversarial, adversarial)
    torch.testing.assert_close(losses.total, losses.clean + losses.adversarial)


@pytest.mark.parametrize("method_type", [*PERTURBING, CleanFineTuning])
def test_the_layers_below_the_cut_stay_frozen(method_type):
    method = method_type(used_before(tiny_network()), "layer1")
    before = copy_of_state(method.model)
    train_a_little(method)
    changed = differing(before, copy_of_state(method.model))
    assert changed and not [name for name in changed if below_the_cut(name)]
    learnt = {name for name in before if not below_the_cut(name)}
    assert learnt == set(changed)  # everything above, both BatchNorm sets included
    method(*batch()).total.backward()
    without = {name for name, p in method.model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in method.model.named_parameters() if below_the_cut(name)}


@pytest.mark.parametrize("method_type", [*PERTURBING, CleanFineTuning])
def test_a_prediction_in_train_mode_leaves_the_frozen_layers_alone(method_type):
    method = method_type(used_before(tiny_network()), "layer1").train()
    before = copy_of_state(method.model)
    method.predict(batch()[0])
    changed = differing(before, copy_of_state(method.model))
    assert changed and not [name for name in changed if below_the_cut(name)]
    method.eval()
    assert not any(module.training for module in method.modules())
    method.train()
    layers = {name: m for name, m in method.model.named_modules() if not list(m.children())}  # blocks have nothing of their own
    assert all(layer.training != below_the_cut(name) for name, layer in layers.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision_are_refused_with_what_to_do(dtype):
    with pytest.raises(ValueError, match="train inside torch.autocast"):
        AdvBN(tiny_network().to(dtype))


def test_what_is_not_trained_is_frozen_on_demand_and_then_processes_can_share_the_gradients(tmp_path):
    method = AdvBN(tiny_network())
    method.freeze_the_rest()
    on = {id(p) for p in method.model.parameters() if p.requires_grad}
    assert on == {id(p) for p in method.trainable_parameters()}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(method)
        for _ in range(3):  # the second step is the one that would wait for ever
            parallel(*batch()).total.backward()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method_type", [*PERTURBING, CleanFineTuning])
def test_the_optimiser_gets_the_parameters_above_the_cut(method_type):
    method = method_type(tiny_network(), "layer1")
    above = {id(p) for name, p in method.model.named_parameters() if not below_the_cut(name)}
    assert {id(p) for p in method.trainable_parameters()} == above


def test_the_features_are_those_of_the_network_in_eval_mode():
    model = used_before(tiny_network())
    method, (images, _) = AdvBN(model).train(), batch()
    features = method.features(images)
    model.eval()
    torch.testing.assert_close(features, model.layer1(model.relu(model.bn1(model.conv1(images)))))
    assert not features.requires_grad


def test_clean_fine_tuning_has_one_batch_norm_set_and_one_loss():
    method = CleanFineTuning(used_before(tiny_network()), "layer1").train()
    before, images_and_labels = batches_seen(method.model), batch()
    losses = method(*images_and_labels)
    moved = {name: count - before[name] for name, count in batches_seen(method.model).items()}
    assert moved == {name: 0 if below_the_cut(name) else 1 for name in before}
    assert losses.adversarial is None and losses.total is losses.clean and method.branches == ("clean",)


def test_with_one_shared_set_both_passes_move_it():
    method = AdvBN(used_before(tiny_network()), dual_bn=False).train()
    before = batches_seen(method.model)
    method(*batch())
    moved = {name: count - before[name] for name, count in batches_seen(method.model).items()}
    assert moved == {name: 0 if below_the_cut(name) else 2 for name in before}
    assert method.branches == ("clean",)


def test_plain_training_trains_everything():
    method = PlainTraining(tiny_network())
    before = copy_of_state(method.model)
    train_a_little(method)
    assert set(differing(before, copy_of_state(method.model))) == set(before)


def test_training_learns_both_kinds_of_features():
    method, (images, labels) = AdvBN(used_before(tiny_network(8))).train(), batch(16)
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1, momentum=0.9)
    history = []
    for _ in range(25):
        losses = method(images, labels)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses)
    assert history[-1].clean < 0.5 * history[0].clean and history[-1].adversarial < 0.7 * history[0].adversarial


def test_predict_uses_the_named_branch_and_puts_it_back():
    method, (images, _) = AdvBN(used_before(tiny_network())), batch()
    train_a_little(method)
    method.eval()
    clean, adversarial = (method.predict(images, branch) for branch in method.branches)
    assert method.branches == ("clean", "adversarial")
    assert torch.equal(method.model(images), clean) and not torch.equal(clean, adversarial)


def test_random_statistics_are_seeded_and_new_for_each_batch():
    method, (images, labels) = RandomStatistics(used_before(tiny_network())), batch()
    features = method.features(images)
    torch.manual_seed(5)
    first, second = method.perturb(features, labels), method.perturb(features, labels)
    torch.manual_seed(5)
    assert torch.equal(method.perturb(features, labels), first) and not torch.equal(first, second)


def test_random_statistics_come_from_advbns_set_and_do_not_look_at_the_labels():
    method, (images, _) = RandomStatistics(used_before(tiny_network())), batch()
    features = method.features(images)
    torch.manual_seed(5)
    perturbed = method.perturb(features, torch.zeros(8, dtype=torch.int64))
    torch.manual_seed(5)
    assert torch.equal(method.perturb(features, torch.ones(8, dtype=torch.int64)), perturbed)
    assert method.perturbation == AdvBN(tiny_network()).perturbation
    torch.manual_seed(5)
    assert torch.equal(perturbed, method.perturbation.apply(features, method.perturbation.sample(features)))


def test_mixed_statistics_lie_between_those_of_two_images_of_the_batch():
    """The definition, image by image: some share of its own mean, the rest of another image's, and the same share of the spread."""
    method, (images, labels) = MixedStatistics(used_before(tiny_network()), clamp_at_zero=False), batch()
    features = method.features(images)
    torch.manual_seed(5)
    mixed = method.perturb(features, labels)
    own, found = (torch.cat([mean(x, INSTANCE), std(x, INSTANCE)], 1).flatten(1).double() for x in (features, mixed))
    partners = []
    for image in range(len(images)):
        towards = own - own[image]
        shares = ((found[image] - own[image]) * towards).sum(1) / (towards * towards).sum(1).clamp_min(1e-12)
        left = (own[image] + shares[:, None] * towards - found[image]).norm(dim=1)
        partners.append(left.argmin().item())
        assert left.min() < 1e-3 * own[image].norm() and -1e-4 <= shares[partners[-1]] <= 1 + 1e-4
    assert len(set(partners)) > 2, "others, not one for all"
    torch.manual_seed(5)
    assert torch.equal(method.perturb(features, labels), mixed) and not torch.equal(
        method.perturb(features, labels), mixed
    )
    assert MixedStatistics(tiny_network()).perturb(features, labels).min() >= 0, "behind a ReLU"


def test_mixed_statistics_keep_the_image_or_take_another_s_style_whole_when_alpha_is_small():
    method, (images, labels) = MixedStatistics(used_before(tiny_network()), alpha=0.01, clamp_at_zero=False), batch()
    features = method.features(images)
    torch.manual_seed(5)
    found, own = mean(method.perturb(features, labels), INSTANCE).flatten(1), mean(features, INSTANCE).flatten(1)
    distance = torch.cdist(found.double(), own.double()).min(1).values
    assert (distance < 1e-3 * own.norm(dim=1)).sum() >= 7, "of 8; a share in between is rare"
    with pytest.raises(ValueError, match="alpha must be at least 0.01"):
        MixedStatistics(tiny_network(), alpha=0)


ARCHITECTURES = [
    ("torchvision/resnet18", "layer1", True),
    ("torchvision/resnet50", "layer1", True),
    ("torchvision/densenet121", "features.transition1", True),
    ("torchvision/efficientnet_b0", "features.2", True),
    ("torchvision/convnext_tiny", "features.1", False),
    ("timm/resnet18", "layer1", True),
    ("timm/efficientnet_lite0", "blocks.1", True),
    ("timm/mobilevit_xxs", "stages.0", True),
]


@pytest.mark.filterwarnings("ignore:the first thing above", "ignore:.*dual BN does not apply")
@pytest.mark.parametrize(("name", "layer", "dual"), ARCHITECTURES)
def test_runs_on_every_listed_architecture(name, layer, dual):
    library, _, model = name.partition("/")
    make = torchvision.models.get_model if library == "torchvision" else timm.create_model
    method = AdvBN(make(model, num_classes=10), layer).train()
    images, labels = batch(4, 64)
    losses = method.attack(method.features(images), labels).losses
    assert losses[-1] >= losses[0]
    total = method(images, labels).total
    total.backward()
    assert total.isfinite() and method.dual_bn == dual
    missing = [p.shape for p in method.trainable_parameters() if p.grad is None]
    assert missing == []


def test_a_network_without_batch_norm_runs_and_says_that_dual_bn_does_not_apply():
    with pytest.warns(UserWarning, match="ConvNeXt has no BatchNorm above 'features.1': dual BN does not apply"):
        method = AdvBN(torchvision.models.convnext_tiny(num_classes=10), "features.1")
    assert method.branches == ("clean",)


def test_a_second_method_on_a_model_finds_both_sets():
    model = tiny_network()
    AdvBN(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = AdvBN(model)  # as when a cell of a notebook is run twice
    assert second.dual_bn and second.branches == ("clean", "adversarial")
    with pytest.raises(ValueError, match=r"two BatchNorm sets already.*single_branch\(model, 'clean'\)"):
        AdvBN(model, dual_bn=False)
    assert not AdvBN(single_branch(model, "clean"), dual_bn=False).dual_bn


def test_says_when_a_batch_norm_would_undo_the_perturbation():
    with pytest.warns(UserWarning, match="BatchNorm.*undoes"):
        AdvBN(torchvision.models.densenet121(num_classes=10), "features.transition1")


def test_has_nothing_to_say_about_a_resnet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdvBN(tiny_network()), AdvBN(tiny_network(), dual_bn=False), RandomStatistics(tiny_network())


def test_batch_norms_in_a_block_that_is_kept_whole_are_doubled_too():
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.bn(self.conv(x))
            return x if x.mean() > 100 else x + 1

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        Decides(),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    method = AdvBN(model, "1").train()
    method(*batch())
    seen = batches_seen(model)
    assert len(seen) == 4 and set(seen.values()) == {1}


@pytest.mark.parametrize(
    "wrong", [{"eps": 0}, {"eps": -1}, {"steps": 0}, {"step_size": 0}, {"step_size": -1}, {"layer": "layer9"}], ids=str
)
def test_bad_arguments_are_refused_before_the_model_is_touched(wrong):
    model = tiny_network()
    before = traces(model)
    with pytest.raises(ValueError):
        AdvBN(model, **wrong)
    assert_same_traces(before, traces(model))


def test_a_layer_without_a_feature_map_is_refused():
    with pytest.raises(SplitError, match="not N,C,H,W"):
        AdvBN(tiny_network(), "flatten")


def test_the_clamp_follows_the_layer_unless_it_is_given():
    assert not AdvBN(tiny_network(), "bn1").perturbation.clamp_at_zero
    assert not AdvBN(tiny_network(), clamp_at_zero=False).perturbation.clamp_at_zero
    assert AdvBN(tiny_network(), "bn1", clamp_at_zero=True).perturbation.clamp_at_zero


def test_factors_per_image_can_be_asked_for():
    method, (images, labels) = AdvBN(tiny_network(), per_image=True), batch()
    mean_factor, _ = method.attack(method.features(images), labels).delta
    assert mean_factor.shape == (8, 4, 1, 1)


def test_a_random_start_can_be_asked_for():
    method, (images, labels) = AdvBN(used_before(tiny_network()), steps=1, step_size=0.01, random_start=True), batch()
    features = method.features(images)
    torch.manual_seed(1)
    first, second = (method.attack(features, labels).delta[0] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(method.attack(features, labels).delta[0], first) and not torch.equal(first, second)
