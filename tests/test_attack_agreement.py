"""Our projected gradient descent beside that of two public libraries, on the same model and images."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_traces, tiny_images, tiny_network, traces

from advbn_lib.attack_agreement import INSTALL, Agreement, Normalised, _descents, agreement, libraries
from advbn_lib.attacks import PGD, judge
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.fused_bn import fuse_batch_norms
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.training import Schedule, train

TEST = tiny_images(96, seed=1, name="tiny/test")
IMAGES, LABELS = TEST.images.float() / 255, TEST.labels
CONFIG = Agreement(12 / 255, steps=5, step=0.3, rounds=2, subset=32, apgd_steps=5, queries=20, batch_size=60)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    method = PlainTraining(tiny_network(8))
    loader = DeviceLoader(tiny_images(256), 32, 0, padding=0, flip=False)
    train(method, loader, Schedule(5, 32, 0.05), show_progress=False, precision=torch.float32)
    return method.model.eval()


@pytest.fixture(scope="module")
def both():
    for name in ("torchattacks", "foolbox"):
        pytest.importorskip(name, reason=f"{name} is not installed: {INSTALL}")
    return libraries()


@pytest.fixture(scope="module")
def compared(network, both):
    return agreement({"plain": network}, IMAGES, LABELS, TEST.mean, TEST.std, CONFIG)


def test_the_libraries_agree_within_sampling_error(compared):
    row = compared["plain"]
    assert row["accuracy_clean"] > 0.8 and row["accuracy_ours"] < row["accuracy_clean"] - 0.2
    for name in ("torchattacks", "foolbox"):
        assert row[f"difference_{name}"] == pytest.approx(row["accuracy_ours"] - row[f"accuracy_{name}"])
        # At least one image's worth: with a random start, one more or less can be broken.
        assert abs(row[f"difference_{name}"]) <= 3 * max(row[f"error_{name}"], 1 / 96)


def test_from_the_image_itself_they_find_the_same_pixels(network, both):
    """Without a random start nothing is left to chance: each step is the same, up to rounding."""
    torchattacks, foolbox = both
    model = Normalised(network, TEST.mean, TEST.std).eval()
    radius, length = CONFIG.radius, CONFIG.step * CONFIG.radius
    theirs = torchattacks.PGD(model, eps=radius, alpha=length, steps=3, random_start=False)(IMAGES, LABELS)
    third = foolbox.attacks.LinfPGD(abs_stepsize=length, steps=3, random_start=False)
    criterion = foolbox.criteria.Misclassification(LABELS)
    third = third.run(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), IMAGES, criterion, epsilon=radius)
    pgd = PGD(TEST.mean, TEST.std, 3, CONFIG.step, random_start=False)
    ours = model.pixels(pgd.perturb(network, model.normalise(IMAGES), LABELS, radius))
    for other in (theirs, third):
        same = (ours - other).abs() < 1e-5  # a gradient of next to 0 can have either sign
        assert same.float().mean() > 0.99


def test_each_library_stays_in_the_ball_and_follows_its_seed(network, both):
    model = Normalised(network, TEST.mean, TEST.std).eval().requires_grad_(False)
    try:
        for name, attack in _descents(model, TEST.mean, TEST.std, CONFIG, *both).items():
            first, again, other = (attack(IMAGES[:8], LABELS[:8], seed) for seed in (0, 0, 1))
            assert (first - IMAGES[:8]).abs().max() <= CONFIG.radius + 1e-6, name
            assert first.min() > -1e-6 and first.max() < 1 + 1e-6, name
            assert torch.equal(first, again) and not torch.equal(first, other), name
            assert judge(model, first, LABELS[:8]).losses.sum() > judge(model, IMAGES[:8], LABELS[:8]).losses.sum()
    finally:
        network.requires_grad_(True)


def test_all_numbers_are_there_and_the_worst_is_the_worst(compared):
    row = compared["plain"]
    assert json.loads(json.dumps(compared)) == compared
    libraries_ = {f"{kind}_{name}" for kind in ("difference", "error", "ratio") for name in ("torchattacks", "foolbox")}
    ours = {f"{kind}_{name}" for kind in ("accuracy", "seconds") for name in ("ours", "torchattacks", "foolbox")}
    subset = {f"subset_{name}" for name in ("ours", "apgd_ce", "apgd_dlr", "square", "all")}
    assert row.keys() == libraries_ | ours | subset | {"accuracy_clean"}
    assert row["subset_all"] <= min(row[name] for name in subset)
    assert all(row[f"seconds_{name}"] > 0 for name in ("ours", "torchattacks", "foolbox"))
    assert row["ratio_foolbox"] == pytest.approx(row["seconds_ours"] / row["seconds_foolbox"])


def test_our_descent_is_not_much_slower(compared):
    """A loose bound, because the network here is so small that what is beside it counts; the record has the ratio of a real one."""
    assert compared["plain"]["ratio_torchattacks"] < 2 and compared["plain"]["ratio_foolbox"] < 2


def test_models_and_random_numbers_stay_as_they_are(network, both):
    network.train()
    before = traces(network)
    agreement({"plain": network}, IMAGES[:8], LABELS[:8], TEST.mean, TEST.std, replace(CONFIG, rounds=1, subset=4))
    assert_same_traces(before, traces(network))
    network.eval()


def test_a_model_that_fuses_can_be_compared(network, both):
    model = tiny_network(8)
    model.load_state_dict(network.state_dict())
    fuse_batch_norms(model)
    config = replace(CONFIG, rounds=1, steps=2)
    row = agreement({"afa": model}, IMAGES[:16], LABELS[:16], TEST.mean, TEST.std, config, crossed=False)["afa"]
    assert row["accuracy_ours"] <= row["accuracy_clean"] and "subset_all" not in row


@pytest.mark.parametrize("missing", ["torchattacks", "foolbox"])
def test_a_missing_library_is_named_with_the_remedy(missing, network, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"(?s){missing}.*pip install --no-deps torchattacks foolbox eagerpy"):
        agreement({"plain": network}, IMAGES, LABELS, TEST.mean, TEST.std, CONFIG)


@pytest.mark.parametrize("wrong", [IMAGES * 255, IMAGES - 0.5, IMAGES[:0]], ids=["units", "normalised", "none"])
def test_images_out_of_range_are_refused(wrong, network, both):
    with pytest.raises(ValueError, match=r"give images in \[0,1\]"):
        agreement({"plain": network}, wrong, LABELS, TEST.mean, TEST.std, CONFIG)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"radius": 8}, "8/255 and not 8"), ({"radius": 0}, "above 0"), ({"rounds": 0}, "at least 1"), ({"steps": 0}, "at least 1")],
    ids=str,
)  # fmt: skip
def test_a_bad_comparison_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Agreement(**wrong)
