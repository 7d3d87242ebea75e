"""Measured speed becomes a record; the papers' numbers keep their sources."""

from __future__ import annotations

import pytest
import torch

from advbn_lib import benchmarks, records
from advbn_lib.data import DeviceLoader, load_images
from advbn_lib.reported import REPORTED, gain


def test_the_loader_benchmark_writes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "ROUNDS", 1)
    record = benchmarks.run_benchmark("loader_speed", "smoke", 0, tmp_path)
    assert records.read(records.path_of("loader_speed", "smoke", 0, tmp_path)) == record
    measured = record.metrics["loader_speed"]
    assert measured["ratio"] == pytest.approx(measured["images_per_second"] / measured["torch_images_per_second"])
    assert measured["images_per_second"] > 0


def test_both_loaders_give_the_same_kind_of_batch():
    digits = load_images("digits", "train")
    own, own_labels = next(iter(DeviceLoader(digits, benchmarks.BATCH, 0).epoch(0)))
    other, labels = next(iter(benchmarks.torch_loader(digits, 0, 0)))
    assert own.shape == other.shape and own.dtype == other.dtype and own_labels.dtype == labels.dtype
    torch.testing.assert_close(own.mean(), other.mean(), atol=0.1, rtol=0)
    torch.testing.assert_close(own.std(), other.std(), atol=0.1, rtol=0)


@pytest.mark.parametrize(("name", "preset"), [("nonsense", "smoke"), ("loader_speed", "gpu")])
def test_unknown_benchmarks_are_refused(tmp_path, name, preset):
    with pytest.raises(ValueError, match="loader_speed"):
        benchmarks.run_benchmark(name, preset, 0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_reported_number_says_where_it_was_read():
    for number in REPORTED.values():
        assert number.source and number.how_known and number.setting and number.what


def test_the_gain_is_the_difference_of_the_two_rows():
    assert gain("imagenet_c_mce") == pytest.approx(72.7 - 76.7)
    assert gain("sketch") == pytest.approx(27.9 - 24.1)
