"""Detection and segmentation runs: one runner, every method, resumed as if never stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from advbn_lib import detection_bench, records, segmentation_bench
from advbn_lib.measurements import MEASUREMENTS, Job, config_of, run_measurement
from advbn_lib.methods import FeatureNoise
from advbn_lib.task_runs import METHODS, run_bench

pytest.importorskip("torchmetrics")
pytest.importorskip("segmentation_models_pytorch")
CPU = torch.device("cpu")
MAIN_METRIC = {"detection": "detection/map_50", "segmentation": "segmentation/miou"}


@pytest.mark.parametrize("task", MAIN_METRIC)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_record_on_both_tasks(task, method, tmp_path):
    name = f"{task}_{method}"
    job = Job("smoke", 0, CPU, tmp_path / "records", tmp_path / "runs", show_progress=False)
    record = run_measurement(name, job)
    assert records.read(records.path_of(name, "smoke", 0, tmp_path / "records")) == record
    assert 0 <= record.metric(MAIN_METRIC[task]) <= 1
    assert record.config == config_of(name, "smoke", 0) and record.config["method"] == method
    assert record.metric("cost/train_seconds") > 0 and record.cost["wall_seconds"] >= record.cost["train_seconds"]
    assert len(record.curves["clean_loss"]) == record.config["schedule"]["epochs"]
    assert all(row["sha256"] and row["images"] for row in record.data.values()) and len(record.data) == 2
    assert record.weights["sha256"]
    assert run_measurement(name, job) == record, "it is not trained again"


def test_the_seed_and_the_method_decide_and_nothing_else():
    bench = _short(segmentation_bench.BENCHES["smoke"])
    first, again, other = (run_bench(bench, "noise", seed, CPU, "code", show_progress=False) for seed in (0, 0, 1))
    assert first.history.losses == again.history.losses != other.history.losses
    assert first.metrics == again.metrics


@pytest.mark.parametrize(
    "bench", [detection_bench.BENCHES["smoke"], segmentation_bench.BENCHES["smoke"]], ids=MAIN_METRIC
)
def test_killed_and_resumed_is_as_if_never_stopped(bench, tmp_path, monkeypatch):
    bench = _short(bench)
    whole = run_bench(bench, "noise", 0, CPU, "code", show_progress=False)
    change, calls = FeatureNoise.change, []
    an_epoch = len(bench.loader(0, CPU)) * len(bench.sites)

    def killed(self, cut, site):
        calls.append(site)
        if len(calls) == an_epoch + 1:
            raise KeyboardInterrupt
        return change(self, cut, site)

    monkeypatch.setattr(FeatureNoise, "change", killed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(bench, "noise", 0, CPU, "code", tmp_path, show_progress=False)
    assert len(list(tmp_path.glob("training-*.pt"))) == 1, "it goes on from the first epoch's end"
    monkeypatch.setattr(FeatureNoise, "change", change)
    torch.manual_seed(99)
    resumed = run_bench(bench, "noise", 0, CPU, "code", tmp_path, show_progress=False)
    assert resumed.history.losses == whole.history.losses
    assert resumed.metrics == whole.metrics
    states = (resumed.model.state_dict(), whole.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_a_checkpoint_by_other_code_is_not_taken(tmp_path):
    bench = _short(segmentation_bench.BENCHES["smoke"])
    run_bench(bench, "plain", 0, CPU, "code", tmp_path, show_progress=False)
    run_bench(bench, "plain", 0, CPU, "other code", tmp_path, show_progress=False)
    assert len(list(tmp_path.glob("training-*.pt"))) == 2


def test_both_tasks_are_on_the_list():
    names = {f"{task}_{method}" for task in MAIN_METRIC for method in METHODS}
    assert names <= set(MEASUREMENTS)
    assert {preset for name in names for preset in MEASUREMENTS[name].presets} == {"smoke", "cpu"}


def _short(bench):
    """Two epochs of it."""
    return dataclasses.replace(bench, schedule=dataclasses.replace(bench.schedule, epochs=2))
