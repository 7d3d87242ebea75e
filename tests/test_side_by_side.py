"""What is measured when all methods are compared: calibration, an attack that is not ours, and runs as long as each other."""

import dataclasses

import pytest
import torch
from conftest import tiny_images, tiny_network
from torch import nn

from advbn_lib import running
from advbn_lib.attacks import PGD
from advbn_lib.calibration import calibration, expected_calibration_error
from advbn_lib.experiments import TRAINED_ON, find
from advbn_lib.methods.afa import AFA
from advbn_lib.methods.base import Method
from advbn_lib.presets import PRESETS, ArenaPreset
from advbn_lib.side_by_side import Beside, side_by_side


def sure(confidence: float, right: int, wrong: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two classes, all for class 0 with this confidence, and labels of which ``wrong`` say class 1."""
    logit = torch.tensor(confidence).logit()
    return torch.stack([logit, torch.tensor(0.0)]).repeat(right + wrong, 1), torch.tensor([0] * right + [1] * wrong)


@pytest.mark.parametrize(
    ("confidence", "right", "wrong", "error"), [(0.75, 75, 25, 0.0), (0.9, 6, 4, 0.3), (0.55, 10, 0, 0.45)]
)
def test_calibration_error_is_the_gap_between_confidence_and_accuracy(confidence, right, wrong, error):
    assert expected_calibration_error(*sure(confidence, right, wrong)) == pytest.approx(error, abs=1e-6)


def test_gaps_of_bins_are_weighed_by_their_images_and_do_not_cancel_out():
    first, second = sure(0.9, 5, 5), sure(0.6, 30, 0)
    logits, labels = (torch.cat(parts) for parts in zip(first, second))
    assert expected_calibration_error(logits, labels) == pytest.approx((10 * 0.4 + 30 * 0.4) / 40, abs=1e-6)
    assert expected_calibration_error(logits, labels, bins=1) == pytest.approx(abs(35 / 40 - (9 + 18) / 40), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_equals_a_loop_over_bins(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = 3 * torch.randn(200, 7, generator=generator), torch.randint(7, (200,), generator=generator)
    confidence, answer = logits.softmax(1).max(1)
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            gap = (answer == labels)[inside].double().mean() - confidence[inside].double().mean()
            expected += inside.double().mean() * gap.abs()
    assert expected_calibration_error(logits, labels) == pytest.approx(float(expected), abs=1e-6)


def test_no_image_and_no_bin_are_refused():
    with pytest.raises(ValueError, match="a bin and an image"):
        expected_calibration_error(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="a bin and an image"):
        expected_calibration_error(*sure(0.9, 1, 1), bins=0)


def test_calibration_is_of_eval_mode_and_leaves_the_mode():
    method, images = Method(tiny_network()), tiny_images(40)
    method.train()
    found = calibration(method, images)
    normalised = images.normalise(images.images.float() / 255)
    with torch.no_grad():
        logits = method.eval().predict(normalised)
    assert found == {"clean": pytest.approx(expected_calibration_error(logits, images.labels), abs=1e-5)}


class Brightness(nn.Module):
    """Class 1 if the mean pixel is above 0: an l-infinity attack knows what to do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((1, 2, 3))
        return 50 * torch.stack([-mean, mean], 1)


def test_apgd_breaks_what_its_radius_reaches_and_nothing_else():
    pytest.importorskip("torchattacks")
    images = tiny_images(40)
    mean = images.normalise(images.images.float() / 255).mean((1, 2, 3))
    labels = (mean > 0).long()
    images = type(images)(images.name, images.images, labels, images.classes, images.mean, images.std)
    method, before = Method(Brightness()), torch.get_rng_state()
    # One step of the radius r moves the mean by r times the mean of 1/std.
    reach = sum(1 / value for value in images.std) / 3
    for radius in (1.0, 8.0):
        kept = (mean.abs() > radius / 255 * reach).double().mean().item()
        found = side_by_side(method, images, Beside(apgd_images=40, apgd_steps=5, radius=radius))
        assert found["apgd"] == {"clean": pytest.approx(kept, abs=0.051)}  # images at the edge of [0,1] move less
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_predicts_weights_is_attacked_as_it_is():
    pytest.importorskip("torchattacks")
    images = tiny_images(20)
    method = AFA(tiny_network(), PGD(images.mean, images.std, 1), eps=8.0)
    found = side_by_side(method, images, Beside(apgd_images=8, apgd_steps=2))
    assert set(found["apgd"]) == {"fused"} and set(found["calibration_error"]) == {"fused", "clean", "adversarial"}


def test_without_apgd_its_library_is_not_asked_for(monkeypatch):
    monkeypatch.setattr("advbn_lib.side_by_side.libraries", lambda: pytest.fail("asked for"))
    assert side_by_side(Method(Brightness()), tiny_images(8), Beside(apgd_images=0)).keys() == {"calibration_error"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"apgd_images": -1}, "at least 0"),
        ({"apgd_steps": 0}, "at least 1"),
        ({"radius": 0.03}, "write 8 for 8/255"),
        ({"bins": 0}, "at least 1"),
    ],
)
def test_bad_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Beside(**values)


def test_each_method_goes_on_from_the_same_network_for_as_long():
    sizes = {name: size for name, size in PRESETS.items() if isinstance(size, ArenaPreset)}
    assert set(sizes) == {"smoke_arena", "cpu_arena", "cpu_arena_compute", "gpu_arena"}
    for name, size in sizes.items():
        if size.epochs:
            continue  # matched in computing time instead
        for experiment in TRAINED_ON:
            found, at = find(experiment.name, name)
            lr = (
                0.1 if experiment.name == "afa_finetuning" else size.fine_tuning.lr
            )  # its predictors begin from nothing
            assert at.fine_tuning == dataclasses.replace(size.fine_tuning, lr=lr)
            assert found.stage == "fine_tuning" and at.start == "pretrain"


def test_epochs_of_an_experiment_can_be_others():
    size = PRESETS["cpu_arena"]
    longer = type(size)(**{**vars(size), "epochs": (("plain_finetuning", 9),)})
    schedule = longer.schedule_of("plain_finetuning")
    assert (schedule.epochs, schedule.milestones) == (9, (6,)) and schedule.lr == size.fine_tuning.lr
    assert longer.schedule_of("pgd_finetuning") == size.fine_tuning


def test_each_stage_is_trained_by_its_own_schedule(tmp_path, monkeypatch):
    """AFA's second stage starts from its first: that one has epochs and a rate of its own, also when the second one asks for it."""
    sizes = {"pretraining_images": 64, "train_images": 64, "shifts": ("clean",), "beside": Beside(apgd_images=0)}
    attacked = dataclasses.replace(PRESETS["smoke_arena"].attacked, images=8, strengths=(0, 8), cross_strengths=())
    epochs = (("end_points_finetuning", 3), ("afa_finetuning", 1))
    size = dataclasses.replace(PRESETS["smoke_arena"], epochs=epochs, attacked=attacked, **sizes)
    monkeypatch.setitem(PRESETS, "smoke_arena", size)
    monkeypatch.setattr(
        running, "load_images", lambda name, split: tiny_images(64, seed=len(split), name=f"tiny/{split}")
    )
    trained, original = [], running.train

    def noted(method, loader, schedule, *arguments, **options):
        trained.append((type(method).__name__, schedule.epochs, schedule.lr))
        return original(method, loader, schedule, *arguments, **options)

    monkeypatch.setattr(running, "train", noted)
    folders = {"records_folder": tmp_path / "records", "runs_folder": tmp_path / "runs"}
    for name in ("afa_finetuning", "end_points_finetuning"):
        record = running.run(running.prepare(name, "smoke_arena", 0, "cpu", **folders, show_progress=False))
    assert trained == [("PlainTraining", 4, 0.1), ("EndPoints", 3, 0.02), ("AFA", 1, 0.1)], (
        "the first stage is not trained again"
    )
    assert len(record.curves["clean_loss"]) == 3
