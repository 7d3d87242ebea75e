"""Experiments with attacked images: what a preset decides, AFA's two stages, and what stands in a record."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import tiny_images

from advbn_lib import running
from advbn_lib.configurations import Attacked
from advbn_lib.experiments import ATTACKED, EXPERIMENTS, find
from advbn_lib.fused_bn import fused_layers
from advbn_lib.presets import PRESETS, AttackPreset
from advbn_lib.robustness import StrengthTest
from advbn_lib.training import Schedule

SMALL = AttackPreset(
    "a test's own", "tiny", "resnet8", "pretrain", pretraining=Schedule(1, 8, 0.1), fine_tuning=Schedule(1, 8, 0.1),
    pretraining_images=24, train_images=24, shifts=("clean",), attack_steps=2, precision="float32",
    attacked=StrengthTest(strengths=(0, 4, 8), steps=2, images=20, fixed_weights=(0.0, 1.0), cross_strengths=(8,)),
)  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """``small(experiment)`` is a run of a second, at a preset ``smoke_attack`` of this test's own."""
    monkeypatch.setitem(PRESETS, "smoke_attack", SMALL)
    monkeypatch.setattr(
        running, "load_images", lambda name, split: tiny_images(30, seed=len(split), name=f"tiny/{split}")
    )

    def job(experiment: str) -> running.Run:
        folders = {"records_folder": tmp_path / "records", "runs_folder": tmp_path / "runs"}
        return running.prepare(experiment, "smoke_attack", 0, "cpu", **folders, show_progress=False)

    return job


def test_a_second_stage_comes_after_a_first_one_that_shares_the_same_parts():
    for experiment in ATTACKED:
        assert (experiment.stage == "fine_tuning") == bool(experiment.after)
        if experiment.after:
            first = EXPERIMENTS[experiment.after]
            assert first.stage == "pretraining" and first.method.eps == experiment.method.eps
            # Outputs and parameters can be fused between the same sets; the others share some of their parts.
            shared = {"parameters": "output"}.get(experiment.method.mix, experiment.method.mix)
            assert first.method.mix == shared


@pytest.mark.parametrize("preset", [name for name, size in PRESETS.items() if isinstance(size, AttackPreset)])
def test_the_preset_says_how_long_attacks_in_training_are(preset):
    for experiment in ATTACKED:
        assert find(experiment.name, preset)[0].method.steps == PRESETS[preset].attack_steps
    assert find("afa", preset)[1].attacked.fixed_weights == () != find("afa_joint", preset)[1].attacked.fixed_weights
    assert find("pretrain", preset)[0] is EXPERIMENTS["pretrain"]
    assert find("pgd_8", "cpu_scratch")[0].method == Attacked()


def test_the_second_stage_trains_the_weights_between_sets_that_stay_as_they_were(small, trainings):
    first = running.train_method(small("end_points"))
    record = running.run(small("afa_network"))
    assert trainings == ["EndPoints", "AFA"] and record.weights["source"] == "end_points, smoke_attack, seed 0"
    second = running.train_method(small("afa_network")).method.model
    assert len(trainings) == 2
    layers = fused_layers(second)
    for name, layer in fused_layers(first.method.model).items():
        for old, new in ((layer.clean, layers[name].clean), (layer.adversarial, layers[name].adversarial)):
            assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values()))
    assert [layer.predictor is not None for layer in layers.values()] == [True] + [False] * 6
    assert layers["bn1"].predictor.last.weight.any()


def test_a_record_says_how_the_network_stands_attacks(small, trainings):
    metrics = running.run(small("afa")).metrics
    assert set(metrics["accuracy"]) == {"fused", "clean", "adversarial"}
    assert set(metrics["robust"]) == {"fused", "frozen_weights", "worst_case"}
    assert metrics["robust"]["worst_case"]["8"] <= metrics["robust"]["fused"]["8"] <= metrics["robust"]["fused"]["0"]
    assert -1 <= metrics["weight_follows"]["all"] <= 1
    ends = running.run(small("end_points")).metrics
    assert set(ends["robust"]) == {"fixed_0", "fixed_1"} and ends["area"]["best_fixed"] <= ends["area"]["oracle"]
    plain = running.run(small("pretrain")).metrics
    assert set(plain["robust"]) == {"clean", "worst_case"} and "weights" not in plain
    assert plain["area"].keys() == {"clean"}
    assert trainings == ["EndPoints", "AFA", "PlainTraining"]


def test_another_attack_makes_another_record_of_the_same_training(small, trainings, monkeypatch):
    old = running.run(small("pgd_8"))
    changed = dataclasses.replace(SMALL, attacked=dataclasses.replace(SMALL.attacked, steps=3))
    monkeypatch.setitem(PRESETS, "smoke_attack", changed)
    new = running.run(small("pgd_8"))
    assert new.key != old.key and trainings == ["PGDTraining"]
    assert new.config["attacked"]["steps"] == 3 and new.config["method"]["steps"] == 2
