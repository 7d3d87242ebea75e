"""Run records: what is written is what is read, and what was edited is noticed."""

import copy
import dataclasses
import functools
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from advbn_book import wording
from conftest import ROOT
from scipy import stats

from advbn_lib import mixing_bench, provenance, records, same_numbers
from advbn_lib.evaluation import family_means, shift_means
from advbn_lib.experiments import EXPERIMENTS, find
from advbn_lib.measurements import MEASUREMENTS, config_of
from advbn_lib.presets import PRESETS
from advbn_lib.records import Record, RecordError
from advbn_lib.robustness import areas
from advbn_lib.running import prepare

COMMITTED = sorted(ROOT.glob("records/*/*.json"))


def record(
    seed: int = 0, experiment: str = "advbn", preset: str = "smoke", clean: float = 0.9, adversarial: float = 0.8
) -> Record:
    return Record(
        experiment=experiment, preset=preset, seed=seed, key="abc", config={"eps": 1.1, "text": "ε – naïve"},
        metrics={"accuracy": {"clean": {"clean": clean, "contrast-3": 0.1 + 0.2}, "adversarial": {"clean": adversarial}}},
        curves={"clean_loss": [1.5, 0.1]}, cost={"train_seconds": 12, "peak_memory_mib": None}, hardware={"device": "cpu"}, versions={"torch": "2"},
        code={"hash": "def", "commit": None, "dirty": None}, data={}, weights={}, created="2026-01-01 00:00 UTC",
    )  # fmt: skip


def with_values(values, experiment: str = "advbn", branch: str = "clean") -> list[Record]:
    return [record(seed, experiment, **{branch: value}) for seed, value in enumerate(values)]


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = records.write(record(), tmp_path)
    assert path == tmp_path / "advbn" / "smoke-s0.json" == records.path_of("advbn", "smoke", 0, tmp_path)
    assert records.read(path) == record()
    assert [path.name for path in path.parent.iterdir()] == ["smoke-s0.json"]


def test_a_record_is_json_that_says_its_format(tmp_path):
    text = records.write(record(), tmp_path).read_text(encoding="utf-8")
    assert json.loads(text)["format"] == records.FORMAT and text.endswith("}\n") and "naïve" in text


def test_writing_again_replaces(tmp_path):
    records.write(record(), tmp_path)
    path = records.write(record(clean=0.95), tmp_path)
    assert records.read(path).metric("accuracy/clean/clean") == 0.95


def test_formatting_is_not_an_edit(tmp_path):
    path = records.write(record(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    assert records.read(path) == record()


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.9", "0.91"), ("1.1", "1.2"), ('"abc"', '"abd"'), ("12,", "11,"), ("UTC", "CET"), ('"seed": 0', '"seed": 1')],
)
def test_an_edit_by_hand_is_noticed(tmp_path, old, new):
    path = records.write(record(), tmp_path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RecordError, match=f"{path} was changed after the run.*restore it"):
        records.read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not a record"),
        ("{}", "not a record"),
        ('{"format": 2}', "not a record of format 1"),
        ('{"format": 1}', "digest"),
    ],
)
def test_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=f"{path}.*{message}"):
        records.read(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "file.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(RecordError, match="not JSON"):
        records.read(tmp_path / "file.json")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_half_a_record_is_refused(tmp_path, share):
    path = records.write(record(), tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(RecordError, match=str(path)):
        records.read(path)


@pytest.mark.parametrize("fields", ["too few", "too many"])
def test_a_record_with_other_fields_is_refused(tmp_path, fields):
    body = {"format": 1, **dataclasses.asdict(record())}
    body.pop("cost") if fields == "too few" else body.update(mood="good")
    path = tmp_path / "smoke-s0.json"
    path.write_text(json.dumps({**body, "digest": records._digest(body)}))
    with pytest.raises(RecordError, match="cost" if fields == "too few" else "mood"):
        records.read(path)


@pytest.mark.parametrize("name", ["advbn/smoke-s1.json", "advbn/cpu-s0.json", "clean_finetuning/smoke-s0.json"])
def test_a_record_under_another_name_is_refused(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(records.write(record(), tmp_path / "right").read_bytes())
    with pytest.raises(RecordError, match="its name should say so"):
        records.read(path)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(RecordError, match="there is no record .*nothing.json"):
        records.read(tmp_path / "nothing.json")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_not_written(tmp_path, bad):
    path = records.write(record(), tmp_path)
    with pytest.raises(ValueError):
        records.write(record(clean=bad), tmp_path)
    assert records.read(path) == record()


def test_loading_is_by_preset_and_in_order_of_the_seeds(tmp_path):
    for seed in (10, 2, 0):
        records.write(record(seed), tmp_path)
    records.write(record(5, preset="cpu"), tmp_path)
    records.write(record(1, "untouched"), tmp_path)
    assert [found.seed for found in records.load("advbn", "smoke", tmp_path)] == [0, 2, 10]
    assert [found.seed for found in records.load("advbn", "cpu", tmp_path)] == [5]
    assert records.load("advbn", "gpu", tmp_path) == records.load("nothing", "cpu", tmp_path) == []
    assert [(found.experiment, found.preset, found.seed) for found in records.load_all(tmp_path)] == [
        ("advbn", "cpu", 5), ("advbn", "smoke", 0), ("advbn", "smoke", 2), ("advbn", "smoke", 10), ("untouched", "smoke", 1),
    ]  # fmt: skip


def test_one_damaged_record_is_not_passed_over(tmp_path):
    records.write(record(0), tmp_path)
    records.write(record(1), tmp_path).write_text("{}")
    with pytest.raises(RecordError, match="s1.json"):
        records.load("advbn", "smoke", tmp_path)


def test_the_default_folder_is_the_checkouts_unless_named(tmp_path, monkeypatch):
    monkeypatch.delenv("ADVBN_RECORDS", raising=False)
    if (ROOT / "pyproject.toml").is_file():
        assert records.default_folder() == ROOT / "records"
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site-packages" / "advbn_lib" / "records.py"))
    assert records.default_folder() == tmp_path / "site-packages" / "advbn_lib" / "_records"
    monkeypatch.setenv("ADVBN_RECORDS", str(tmp_path))
    assert records.default_folder() == tmp_path
    assert records.write(record()) == tmp_path / "advbn" / "smoke-s0.json"


def test_a_metric_is_found_by_its_path():
    assert record().metric("accuracy/clean/contrast-3") == 0.1 + 0.2
    assert record().metric("cost/train_seconds") == 12.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("accuracy/clean/contrast-4", "at 'contrast-4' there is clean, contrast-3"), ("accurcy", "at 'accurcy' there is cost, accuracy"),
        ("accuracy/clean", "not a number.*contrast-3"), ("accuracy/clean/clean/more", "at 'more' there is a number"),
        ("cost/peak_memory_mib", "not a number"), ("", "no ''"),
    ],
)  # fmt: skip
def test_a_metric_that_is_not_there_is_refused_with_what_is(path, message):
    with pytest.raises(RecordError, match=message):
        record().metric(path)


@pytest.mark.parametrize("n", range(2, 41))
def test_the_interval_is_students(n):
    values = np.random.default_rng(n).normal(0.7, 0.1, n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    found = records.aggregate(with_values(values.tolist()), "accuracy/clean/clean")
    assert found.n == n and found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(low, abs=5e-4 * stats.sem(values) * 2) and found.high == pytest.approx(
        high, abs=5e-4 * stats.sem(values) * 2
    )


def test_one_value_has_no_interval():
    found = records.aggregate([record()], "accuracy/clean/clean")
    assert (found.mean, found.n) == (0.9, 1) and math.isnan(found.low) and math.isnan(found.high)


def test_no_value_has_no_mean():
    with pytest.raises(RecordError, match="run the experiment"):
        records.aggregate([], "accuracy/clean/clean")


def test_a_difference_is_paired_by_seed():
    first, second = [0.70, 0.75, 0.83], [0.60, 0.66, 0.72]
    found = records.difference(
        with_values(first)[::-1], with_values([*second, 0.1], "untouched"), "accuracy/clean/clean"
    )
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found.n == 3 and found.mean == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_a_difference_can_be_between_branches():
    found = records.difference(
        with_values([0.9, 0.8]), with_values([0.9, 0.8]), "accuracy/clean/clean", "accuracy/adversarial/clean"
    )
    assert found.mean == pytest.approx(0.05)


def test_no_seed_in_common_is_an_error():
    with pytest.raises(RecordError, match="no seed in common"):
        records.difference([record(0)], [record(1)], "accuracy/clean/clean")


def test_there_are_records_only_in_folders_that_mean_something():
    assert {path.parent.name for path in COMMITTED} <= {*EXPERIMENTS, *MEASUREMENTS}


# What a digest cannot show: it can be renewed. So a record must fit itself, and the configuration that it names.


def faults(found: Record) -> list[str]:
    """What is wrong with a record, in words."""
    return [
        *of_configuration(found),
        *of_means(found),
        *of_shares(found),
        *of_where_it_ran(found),
    ]


def of_configuration(found: Record) -> list[str]:
    if found.experiment in EXPERIMENTS:
        expected = prepare(found.experiment, found.preset, found.seed, "cpu").config
        return [] if found.config == expected else ["its configuration is not that of its name"]
    expected = config_of(found.experiment, found.preset, found.seed)
    recorded = {
        {"benchmark": "measurement"}.get(name, name): value for name, value in found.config.items()
    }  # renamed since
    if found.experiment == "step_cost":  # methods may have come since; what was timed is in the record
        timed = found.metrics["step_cost"]["seconds"]
        expected["methods"] = {name: method for name, method in expected["methods"].items() if name in timed}
    wrong = [] if recorded == expected else ["its configuration is not that of its name"]
    if "benchmark" in found.config or found.key == key_of(found):  # the oldest records have another kind of key
        return wrong
    return [*wrong, "its key is not that of configuration, code, data and weights"]


def key_of(found: Record) -> str:
    """The key of a measurement, by another road than the library's."""
    identity = {
        "config": found.config,
        "code": found.code["hash"],
        "data": found.data,
        "weights": found.weights.get("sha256"),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def of_means(found: Record) -> list[str]:
    """Numbers that follow from others in the record."""
    metrics, wrong = found.metrics, []
    if found.experiment in EXPERIMENTS:
        for group, function in (("mean", family_means), ("shift", shift_means)):
            if metrics[group] != {branch: function(shares) for branch, shares in metrics["accuracy"].items()}:
                wrong.append(f"{group} does not follow from accuracy")
    if "area" in metrics and found.experiment in EXPERIMENTS:
        curves = {
            name: {float(strength): share for strength, share in curve.items()}
            for name, curve in metrics["robust"].items()
        }
        if metrics["area"] != areas(curves, find(found.experiment, found.preset)[1].attacked):
            wrong.append("area does not follow from robust")
    for table in metrics.get("mixing", {}).values():
        levels = [share for level, share in table.items() if level not in ("unbiased", mixing_bench.BIASED)]
        if table[mixing_bench.BIASED] != pytest.approx(sum(levels) / len(levels)):
            wrong.append("mean_biased does not follow from the levels")
    if "step_cost" in metrics:
        seconds = metrics["step_cost"]["seconds"]
        if metrics["step_cost"]["ratio"] != {name: each / seconds["pretrain"] for name, each in seconds.items()}:
            wrong.append("ratio does not follow from seconds")
    if "iou" in metrics and metrics["segmentation"]["miou"] != pytest.approx(
        sum(metrics["iou"].values()) / len(metrics["iou"])
    ):
        wrong.append("miou does not follow from iou")
    if "classes" in metrics and metrics["detection"]["map"] != pytest.approx(
        sum(metrics["classes"].values()) / len(metrics["classes"])
    ):
        wrong.append("map does not follow from classes")
    return wrong


def of_shares(found: Record) -> list[str]:
    groups = {name: table for name, table in found.metrics.items() if wording.is_accuracy(name)}
    if "segmentation" in groups:
        groups["segmentation"] = {n: value for n, value in groups["segmentation"].items() if n != "absent_classes"}
    if "digits" in groups:
        groups["digits"] = {n: value for n, value in groups["digits"].items() if wording.is_accuracy(f"digits/{n}")}
    if found.experiment in EXPERIMENTS and not any(groups["accuracy"].values()):
        return ["it has no accuracy"]
    outside = [value for value in numbers(groups) if not 0 <= value <= 1]
    return [f"shares outside 0 to 1: {outside}"] if outside else []


def numbers(table: dict) -> list[float]:
    return [number for value in table.values() for number in (numbers(value) if isinstance(value, dict) else [value])]


def of_where_it_ran(found: Record) -> list[str]:
    wrong, hardware = [], found.hardware
    if not re.fullmatch("[0-9a-f]{64}", found.code["hash"]) or not re.fullmatch("[0-9a-f]{64}", found.key):
        wrong.append("a hash is not 64 hexadecimal digits")
    versions = {name: tuple(map(int, re.findall(r"\d+", text)[:2])) for name, text in found.versions.items() if name != "test"}
    if versions.keys() != LEAST_VERSIONS.keys() or any(
        versions[name] < least for name, least in LEAST_VERSIONS.items()
    ):
        wrong.append(f"versions {found.versions}")
    # No preset says how many threads; the workflow gives each run one. The loader's speed is that of the machine.
    if hardware["gpu"] is None and found.experiment != "loader_speed" and hardware["threads"] != 1:
        wrong.append(f"{hardware['threads']} threads")
    if not 1 <= hardware["threads"] <= hardware["cores"]:
        wrong.append(f"{hardware['threads']} threads on {hardware['cores']} cores")
    parts = [found.cost.get(name) for name in ("train_seconds", "test_seconds", "wall_seconds")]
    if any(part is not None and part < 0 for part in parts):
        wrong.append("a time below zero")
    if found.experiment in EXPERIMENTS and parts[2] != pytest.approx(parts[0] + parts[1], abs=0.01):
        wrong.append("wall_seconds are not those of training and test")
    return wrong


LEAST_VERSIONS = {"python": (3, 11), "torch": (2, 6), "torchvision": (0, 21), "numpy": (1, 26)}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_committed_record_can_be_read_and_fits_itself_and_its_configuration(path: Path):
    found = records.read(path)
    assert found.preset in PRESETS or found.preset in MEASUREMENTS[found.experiment].presets
    assert faults(found) == []


@functools.cache
def code_today(experiment: str, preset: str) -> str:
    if experiment in EXPERIMENTS:
        return prepare(experiment, preset, 0, "cpu").code
    return provenance.code_hash(MEASUREMENTS[experiment].modules)


def test_records_are_of_the_code_that_is_here():
    """Else a record that is lost and made again stands beside seeds that another code made."""
    old = {
        f"{path.parent.name}/{path.stem}"
        for path in COMMITTED
        if same_numbers.today((found := records.read(path)).code["hash"]) != code_today(found.experiment, found.preset)
    }
    assert old == set(), "run these again, or show in advbn_lib/same_numbers.json that their numbers are the same"


def test_changes_that_left_the_numbers_say_how_that_was_shown_and_lead_to_code_of_today():
    changes = json.loads(Path(same_numbers.__file__).with_suffix(".json").read_text())
    assert all(change["changed"] and change["shown"] for change in changes)
    pairs = [pair for change in changes for pair in change["before_and_after"]]
    assert len({before for before, _ in pairs}) == len(pairs) and all(
        len(word) == 64 for pair in pairs for word in pair
    )
    known = {code_today(found.experiment, found.preset) for found in map(records.read, COMMITTED)}
    assert {same_numbers.today(before) for before, _ in pairs} <= known
    assert same_numbers.today("another") == "another"


def test_seeds_of_one_experiment_were_run_by_the_same_code_and_threads():
    by_name: dict[tuple[str, str], set] = {}
    for path in COMMITTED:
        found = records.read(path)
        by_name.setdefault((found.experiment, found.preset), set()).add(
            (same_numbers.today(found.code["hash"]), found.hardware["threads"])
        )
    assert {name: ran for name, ran in by_name.items() if len(ran) > 1} == {}


def changed(found: Record, path: str, value) -> Record:
    """A copy with another value at e.g. ``"metrics/mean/clean/style"``."""
    body = copy.deepcopy(dataclasses.asdict(found))
    *way, last = path.split("/")
    table = body
    for part in way:
        table = table[part]
    assert last in table and table[last] != value
    table[last] = value
    return Record(**body)


EDITS = [
    ("advbn/cpu", "metrics/mean/clean/corruptions", 0.75, "mean does not follow"),
    ("advbn/cpu", "metrics/shift/clean/fog", 0.99, "shift does not follow"),
    ("advbn/cpu", "metrics/accuracy/clean/fog-3", 0.99, "mean does not follow"),
    ("advbn/cpu", "metrics/accuracy/clean/clean", 0.99, "shift does not follow"),
    ("advbn/cpu", "config/method/eps", 0.5, "configuration"),
    ("detection_afan/cpu", "metrics/detection/map_50", 1.2, "shares outside"),
    ("advbn/cpu", "config/seed", 1, "configuration"),
    ("advbn/cpu", "code/hash", "abc", "hexadecimal"),
    ("advbn/cpu", "versions/torch", "2.5.1", "versions"),
    ("advbn/cpu", "hardware/threads", 2, "2 threads"),
    ("advbn/cpu", "cost/train_seconds", 1.0, "wall_seconds"),
    ("pgd_8/cpu_attack", "metrics/area/clean", 0.4, "area does not follow"),
    ("pgd_8/cpu_attack", "metrics/robust/clean/8", 0.5, "area does not follow"),
    ("step_cost/cpu_scratch", "metrics/step_cost/ratio/afan", 1.5, "ratio does not follow"),
    ("segmentation_afan/cpu", "metrics/segmentation/miou", 0.6, "miou does not follow"),
    ("detection_afan/cpu", "metrics/detection/map", 0.9, "map does not follow"),
    ("detection_afan/cpu", "config/schedule/epochs", 60, "its key"),
    ("detection_afan/cpu", "code/hash", "0" * 64, "its key"),
]


@pytest.mark.parametrize(("name", "place", "value", "fault"), EDITS, ids=[f"{edit[0]}: {edit[1]}" for edit in EDITS])
def test_an_edit_with_a_renewed_digest_does_not_fit(tmp_path, name, place, value, fault):
    path = ROOT / "records" / f"{name}-s0.json"
    if not path.is_file():
        pytest.skip(f"there is no record {name}")
    found = records.read(path)
    written = records.write(changed(found, place, value), tmp_path)  # with a digest of its own
    assert records.read(written) != found, "the digest alone says nothing"
    assert any(fault in words for words in faults(records.read(written))), faults(records.read(written))


def test_who_renews_digest_and_key_is_told_by_the_configuration():
    path = ROOT / "records" / "detection_afan" / "cpu-s0.json"
    if not path.is_file():
        pytest.skip("there is no record of detection_afan")
    edited = changed(records.read(path), "config/schedule/epochs", 60)
    renewed = dataclasses.replace(edited, key=key_of(edited))
    assert faults(renewed) == ["its configuration is not that of its name"]
