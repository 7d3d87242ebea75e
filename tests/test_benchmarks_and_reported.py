"""What is measured becomes a record; the papers' numbers keep their sources."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from conftest import ROOT

from advbn_lib import benchmarks, measurements, records
from advbn_lib.__main__ import main
from advbn_lib.appearance_study import CONTROLS
from advbn_lib.data import DeviceLoader, load_images
from advbn_lib.measurements import MEASUREMENTS, STUDIES, Job, Outcome, config_of, run_measurement
from advbn_lib.reported import REPORTED, gain

CPU = torch.device("cpu")


def test_the_loader_benchmark_writes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "ROUNDS", 1)
    record = run_measurement("loader_speed", Job("smoke", 0, CPU, tmp_path))
    assert records.read(records.path_of("loader_speed", "smoke", 0, tmp_path)) == record
    measured = record.metrics["loader_speed"]
    assert measured["ratio"] == pytest.approx(measured["images_per_second"] / measured["torch_images_per_second"])
    assert measured["images_per_second"] > 0 and record.config["rounds"] == 1


def test_the_cost_of_a_step_follows_from_what_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements.step_cost, "ROUNDS", 3)
    monkeypatch.setattr(
        measurements, "FROM_SCRATCH_NAMES", ("pretrain", "afan", "unchanged_features", "advprop_5_steps")
    )
    record = run_measurement("step_cost", Job("smoke", 0, CPU, tmp_path))
    assert records.read(records.path_of("step_cost", "smoke", 0, tmp_path)) == record
    ratio, seconds = (record.metrics["step_cost"][name] for name in ("ratio", "seconds"))
    assert ratio["pretrain"] == 1 and ratio["afan"] == pytest.approx(seconds["afan"] / seconds["pretrain"])
    assert 1 < ratio["unchanged_features"] < ratio["afan"] < ratio["advprop_5_steps"]


def test_both_loaders_give_the_same_kind_of_batch():
    digits = load_images("digits", "train")
    own, own_labels = next(iter(DeviceLoader(digits, benchmarks.BATCH, 0).epoch(0)))
    other, labels = next(iter(benchmarks.torch_loader(digits, 0, 0)))
    assert own.shape == other.shape and own.dtype == other.dtype and own_labels.dtype == labels.dtype
    torch.testing.assert_close(own.mean(), other.mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(own.std(), other.std(), atol=0.1, rtol=0)


@pytest.mark.parametrize(("name", "preset"), [("nonsense", "smoke"), ("loader_speed", "gpu"), ("appearance", "huge")])
def test_unknown_measurements_are_refused(tmp_path, name, preset):
    with pytest.raises(
        ValueError,
        match="loader_speed at presets smoke, cpu; step_cost at presets .*; appearance at presets smoke, cpu, gpu",
    ):
        run_measurement(name, Job(preset, 0, CPU, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def counted(monkeypatch) -> list[Job]:
    """The jobs that a measurement, instead of being made, was asked for."""
    asked = []

    def measure(job: Job) -> Outcome:
        asked.append(job)
        return Outcome({"appearance": {"noise": {"accuracy": 0.5}}})

    stand_in = dataclasses.replace(MEASUREMENTS["appearance"], measure=measure)
    monkeypatch.setitem(MEASUREMENTS, "appearance", stand_in)
    return asked


def test_what_is_repeatable_is_measured_once(tmp_path, counted, monkeypatch):
    job = Job("smoke", 0, CPU, tmp_path)
    first = run_measurement("appearance", job)
    assert run_measurement("appearance", job) == first and len(counted) == 1
    run_measurement("appearance", job, again=True)
    run_measurement("appearance", dataclasses.replace(job, seed=1))
    assert len(counted) == 3
    monkeypatch.setattr(measurements, "code_hash", lambda modules: "newer")
    assert run_measurement("appearance", job).code["hash"] == "newer" and len(counted) == 4
    monkeypatch.setitem(STUDIES, "smoke", dataclasses.replace(STUDIES["smoke"], steps=3))
    assert run_measurement("appearance", job).config["steps"] == 3 and len(counted) == 5


def test_what_is_measured_again_does_not_use_what_was_kept(tmp_path, counted):
    job = Job("smoke", 0, CPU, tmp_path / "records", tmp_path / "runs")
    own, other = job.runs_folder / "appearance" / "smoke-s0", job.runs_folder / "appearance" / "smoke-s1"
    for folder in (own, other):
        folder.mkdir(parents=True)
    for content in ("first", "second"):
        own.mkdir(exist_ok=True)
        (own / "final.pt").write_text(content)
        run_measurement("appearance", job, again=True)
        assert not own.exists() and (own.with_name("smoke-s0.before") / "final.pt").read_text() == content
    assert other.exists()


def test_speed_is_measured_anew_each_time_and_never_on_a_gpu(tmp_path, monkeypatch):
    seen = []
    stand_in = dataclasses.replace(
        MEASUREMENTS["loader_speed"],
        measure=lambda job: seen.append(job.device.type) or Outcome({"loader_speed": {"ratio": 2.0}}),
    )
    monkeypatch.setitem(MEASUREMENTS, "loader_speed", stand_in)
    for _ in range(2):
        run_measurement("loader_speed", Job("smoke", 0, torch.device("cuda"), tmp_path))
    assert seen == ["cpu", "cpu"]


def test_the_adversarys_looks_are_measured_from_the_command_line(smoke_run, tmp_path, capsys):
    """At the smoke preset, with the weights that an earlier run left."""
    folder = shutil.copytree(smoke_run, tmp_path / "here")
    command = [
        "--records",
        str(folder / "records"),
        "run",
        "appearance",
        "--runs",
        str(folder / "runs"),
        "--quiet",
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "adversarial/edge_correlation" in shown and "adversarial/luma_correlation" not in shown
    record = records.read(records.path_of("appearance", "smoke", 0, folder / "records"))
    assert record.config == config_of("appearance", "smoke", 0)
    assert record.metrics.keys() == {"appearance", "appearance_eps_0.5"} and record.data.keys() == {
        "digits/train",
        "digits/test",
    }
    table = record.metrics["appearance"]
    assert table.keys() == {"unchanged", "adversarial", "random", *CONTROLS}
    assert table["unchanged"]["edge_correlation"] > 0.9, "the decoder has learnt to decode"
    assert (
        table["adversarial"]["features_accuracy"]
        < table["random"]["features_accuracy"]
        < table["unchanged"]["features_accuracy"]
    )
    assert table["colour_cast"]["edge_correlation"] > table["noise"]["edge_correlation"]
    for name in CONTROLS.keys() - {"grey_blur"}:
        assert table[name]["pixel_change"] == pytest.approx(table["adversarial"]["pixel_change"], abs=0.002)
    assert record.metrics["appearance_eps_0.5"]["adversarial"]["pixel_change"] < table["adversarial"]["pixel_change"]
    assert len(record.curves["decoder_error_layer1"]) == STUDIES["smoke"].decoder.schedule.epochs
    assert main(["--records", str(folder / "records"), "report", "--preset", "smoke"]) == 0
    assert "noise/style_change" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(ROOT.glob("records/appearance/*.json")), ids=lambda path: path.stem)
def test_a_committed_record_is_of_todays_configuration(path):
    found = records.read(path)
    assert found.config == config_of("appearance", found.preset, found.seed)


def test_every_reported_number_says_where_it_was_read():
    for number in REPORTED.values():
        assert number.source and number.how_known and number.setting and number.what


def test_the_gain_is_the_difference_of_the_two_rows():
    assert gain("imagenet_c_mce") == pytest.approx(72.7 - 76.7)
    assert gain("sketch") == pytest.approx(27.9 - 24.1)
