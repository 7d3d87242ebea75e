"""Experiments from the command line to the record: run, killed, resumed, run again."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, command_line, differing, tiny_images

from advbn_lib import provenance, records, running
from advbn_lib.__main__ import main
from advbn_lib.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from advbn_lib.confusion import accuracy_of, balanced_accuracy_of, commonest_answer_of, confusion
from advbn_lib.data import DataError
from advbn_lib.data.shifts import Shift
from advbn_lib.evaluation import accuracy
from advbn_lib.experiments import EXPERIMENTS, find
from advbn_lib.presets import PRESETS, ArenaPreset, Preset, choose_preset
from advbn_lib.provenance import state_checksum
from advbn_lib.training import Schedule
from advbn_lib.training_cost import KEPT_AS

NAMES = (
    "pretrain", "untouched", "clean_finetuning", "random_statistics", "advbn", "advbn_eps05", "advbn_shared_bn", "augmix",
    "advbn_augmix",
)  # fmt: skip
SMALL = Preset(
    "a test's own", "tiny", "resnet8", "pretrain", pretraining=Schedule(2, 8, 0.1), fine_tuning=Schedule(1, 8, 0.01),
    train_images=40, test_images=30, shifts=("clean", "contrast-3"),
)  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """``small(experiment)`` is a run of a second, in a temporary folder, at a preset ``smoke`` of this test's own."""
    monkeypatch.setitem(PRESETS, "smoke", SMALL)
    monkeypatch.setattr(
        running, "load_images", lambda name, split: tiny_images(50, seed=len(split), name=f"tiny/{split}")
    )

    def job(experiment: str, seed: int = 0, folder: str = "here") -> running.Run:
        folders = {"records_folder": tmp_path / folder / "records", "runs_folder": tmp_path / folder / "runs"}
        return running.prepare(experiment, "smoke", seed, "cpu", **folders, show_progress=False)

    return job


def comparable(record: records.Record) -> dict:
    """All of a record but the time it took, and when."""
    body = dataclasses.asdict(record)
    return {
        name: body[name]
        for name in ("experiment", "preset", "seed", "key", "config", "metrics", "curves", "data", "weights")
    }


def test_the_experiments_are_those_of_the_book():
    assert tuple(EXPERIMENTS)[: len(NAMES)] == NAMES and {"smoke", "cpu", "gpu"} <= set(PRESETS)


def branches_of(experiment) -> set[str]:
    """The BatchNorm sets that a test should go through, by the kind of method."""
    kind, two = type(experiment.method).__name__, {"clean", "adversarial"}
    if kind.startswith("Fused"):
        return two if kind == "FusedEnds" else two | {"fused"}
    if (
        kind not in ("Unchanged", "Random", "Mixed", "Adversarial", "AugmentedAdversarial")
        or experiment.stage != "fine_tuning"
    ):
        return {"clean"}
    # The configurations say either when it is not as in the paper.
    return two if getattr(experiment.method, "dual_bn", True) and experiment.method.layer != "layer3" else {"clean"}


# advbn_layer3 is right to warn: above the last stage there is no BatchNorm to double.
@pytest.mark.filterwarnings("ignore:CifarResNet has no BatchNorm above 'layer3'")
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_and_its_record_says_all(small, experiment):
    job = small(experiment)
    record = running.run(job)
    assert records.read(records.path_of(experiment, "smoke", 0, job.records_folder)) == record
    assert {branch: list(table) for branch, table in record.metrics["accuracy"].items()} == {
        branch: ["clean", "contrast-3"] for branch in branches_of(EXPERIMENTS[experiment])
    }
    epochs = {"none": 0, "pretraining": 2, "fine_tuning": 1}[EXPERIMENTS[experiment].stage]
    assert len(record.curves["clean_loss"]) == len(record.curves["adversarial_loss"]) == epochs
    assert all(math.isfinite(loss) for loss in record.curves["clean_loss"])
    assert (
        record.config["seed"] == 0 and record.config["method"]["kind"] == EXPERIMENTS[experiment].method.trains.__name__
    )
    assert {name: row["images"] for name, row in record.data.items()} == {
        "tiny/train": 50 if EXPERIMENTS[experiment].stage == "pretraining" else 40,
        "tiny/test": 30,
    }
    assert record.cost["wall_seconds"] > 0 and record.hardware["device"] == "cpu" and record.code["hash"] == job.code
    assert running.is_current(job, record)


def test_fine_tuning_starts_from_the_pretrained_weights_and_changes_them_above_the_cut_only(small):
    advbn = running.run(small("advbn"))
    jobs = {name: small(name) for name in ("pretrain", "advbn")}
    before, after = (
        read_checkpoint(jobs[name].folder / "final.pt")["parts"]["model"] for name in ("pretrain", "advbn")
    )
    assert advbn.weights["sha256"] == state_checksum(before)
    below = [name for name in before if name.split(".")[0] in ("conv1", "bn1", "layer1")]
    assert below and all(torch.equal(before[name], after[name]) for name in below)
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_untouched_is_the_pretrained_network(small):
    pretrained, untouched = running.run(small("pretrain")), running.run(small("untouched"))
    assert untouched.metrics == pretrained.metrics
    assert untouched.cost["train_seconds"] == 0


def test_the_same_run_is_not_done_twice(small, trainings):
    first = running.run(small("advbn"))
    assert trainings == ["PlainTraining", "AdvBN"]
    assert running.run(small("advbn")) == first
    assert trainings == ["PlainTraining", "AdvBN"]


def test_it_is_done_again_when_asked_and_comes_out_the_same(small, trainings):
    first = running.run(small("advbn"))
    again = running.run(small("advbn"), again=True)
    assert trainings == ["PlainTraining", "AdvBN", "AdvBN"]
    assert comparable(again) == comparable(first)


def test_another_machine_recomputes_the_record_from_its_configuration(small):
    first = running.run(small("random_statistics", seed=3))
    running.run(small("pretrain", seed=3, folder="there"))  # beforehand, and not on the way as above
    torch.rand(7)
    second = running.run(small("random_statistics", seed=3, folder="there"))
    assert comparable(first) == comparable(second)


def test_another_seed_is_another_run(small):
    first, second = (running.run(small("random_statistics", seed)) for seed in (0, 1))
    assert first.key != second.key and first.curves != second.curves and first.weights != second.weights


@pytest.mark.parametrize("what", ["configuration", "code", "data", "weights"])
def test_another_configuration_code_data_or_start_is_another_run(small, trainings, monkeypatch, what):
    first = running.run(small("clean_finetuning"))
    if what == "configuration":
        monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMALL, fine_tuning=Schedule(1, 8, 0.02)))
    elif what == "code":
        monkeypatch.setattr(running, "code_hash", lambda modules: "other")
    elif what == "data":
        monkeypatch.setattr(running, "load_images", lambda name, split: tiny_images(50, seed=7, name=f"tiny/{split}"))
    else:
        monkeypatch.setattr(running, "_network_of", lambda job, name: running.new_network("resnet8"))
    second = running.run(small("clean_finetuning"))
    assert trainings.count("CleanFineTuning") == 2 and second.key != first.key
    assert records.read(records.path_of("clean_finetuning", "smoke", 0, small("advbn").records_folder)) == second


def test_what_is_only_tested_more_or_less_is_another_run_too(small, monkeypatch):
    first = running.run(small("untouched"))
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMALL, shifts=("clean",)))
    assert not running.is_current(small("untouched"), first)
    assert list(running.run(small("untouched")).metrics["accuracy"]["clean"]) == ["clean"]


def test_a_new_shift_is_tested_without_training_again(small, trainings, monkeypatch):
    first = running.run(small("advbn"))
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMALL, shifts=("clean", "contrast-3", "grey")))
    second = running.run(small("advbn"))
    assert trainings == ["PlainTraining", "AdvBN"] and second.key != first.key
    assert second.curves == first.curves and second.cost["train_seconds"] == first.cost["train_seconds"]
    assert second.metric("accuracy/adversarial/contrast-3") == first.metric("accuracy/adversarial/contrast-3")
    assert "grey" in second.metrics["accuracy"]["clean"] and "style" in second.metrics["mean"]["clean"]


def test_damaged_weights_are_not_tested(small):
    running.run(small("clean_finetuning"))
    final = small("clean_finetuning").folder / "final.pt"
    final.write_bytes(final.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        running.train_method(small("clean_finetuning"))


def test_fine_tuning_can_use_images_that_pretraining_did_not(small, monkeypatch):
    changed = dataclasses.replace(SMALL, pretraining_images=30, train_images=20, first_train_image=30)
    monkeypatch.setitem(PRESETS, "smoke", changed)
    seen, after = (running.training_images(small(name)) for name in ("pretrain", "clean_finetuning"))
    everything = running.load_images("tiny", "train")
    assert torch.equal(torch.cat([seen.images, after.images]), everything.images)
    assert running.run(small("clean_finetuning")).data["tiny/train"]["images"] == 20


def test_each_severity_can_be_tested_on_another_part_of_the_images(small, monkeypatch):
    shifts = ("clean", *(f"contrast-{severity}" for severity in range(1, 6)))
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMALL, shifts=shifts, parts=5))
    record, job = running.run(small("untouched")), small("untouched")
    method, test = running.train_method(job).method, running.load_images("tiny", "test").first(30)
    for severity in range(1, 6):
        part = test.part(severity - 1, 5)
        expected = accuracy(method, part, Shift("contrast", severity))["clean"]
        assert len(part) == 6 and record.metric(f"accuracy/clean/contrast-{severity}") == expected
    assert record.metric("accuracy/clean/clean") == accuracy(method, test)["clean"]
    mean = sum(record.metric(f"accuracy/clean/contrast-{severity}") for severity in range(1, 6)) / 5
    assert record.metric("shift/clean/contrast") == pytest.approx(mean) == record.metric("mean/clean/digital")


def test_other_test_sets_are_tested_as_they_are(small, monkeypatch):
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMALL, elsewhere=("pacs/cartoon", "pacs/sketch")))
    sets = {
        "pacs/cartoon": tiny_images(20, seed=8, name="pacs/cartoon, all"),
        "pacs/sketch": tiny_images(20, seed=9, name="pacs/sketch, all"),
    }
    plain = running.load_images
    monkeypatch.setattr(running, "load_images", lambda name, split: sets.get(name) or plain(name, split))
    record = running.run(small("advbn"))
    assert record.data["pacs/sketch, all"]["sha256"] == sets["pacs/sketch"].checksum
    expected = accuracy(running.train_method(small("advbn")).method, sets["pacs/sketch"])
    assert {branch: record.metric(f"accuracy/{branch}/sketch") for branch in expected} == expected
    pair = [record.metric(f"accuracy/adversarial/{domain}") for domain in ("cartoon", "sketch")]
    assert record.metric("mean/adversarial/domains") == pytest.approx(sum(pair) / 2)
    for branch, counts in confusion(running.train_method(small("advbn")).method, sets["pacs/sketch"]).items():
        assert accuracy_of(counts) == pytest.approx(expected[branch])
        assert record.metric(f"balanced/{branch}/sketch") == balanced_accuracy_of(counts)


def test_an_answer_that_is_always_the_same_is_seen_as_such():
    one_sided = torch.tensor([[80, 0, 0], [15, 0, 0], [5, 0, 0]])
    assert accuracy_of(one_sided) == pytest.approx(0.8)
    assert balanced_accuracy_of(one_sided) == pytest.approx(1 / 3) and commonest_answer_of(one_sided) == 1
    absent = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # no image of the third class
    assert balanced_accuracy_of(absent) == pytest.approx((3 / 4 + 1) / 2)


def test_without_the_frost_pictures_nothing_is_trained_for_a_mean_that_needs_them(small, trainings, monkeypatch):
    def missing():
        raise DataError("no frost pictures here")

    monkeypatch.setattr(running, "frost_overlays", missing)
    running.run(small("untouched"))  # no frost in it
    trained = list(trainings)
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMALL, shifts=("clean", "frost-1", "contrast-3")))
    with pytest.raises(DataError, match="no frost pictures here"):
        running.run(small("advbn"))
    assert trainings == trained and not list(small("advbn").records_folder.glob("advbn/*"))


def test_without_the_library_of_another_attack_nothing_is_trained_for_an_arena(small, trainings, monkeypatch):
    def missing():
        raise ImportError("install torchattacks")

    fields = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL)}
    monkeypatch.setitem(PRESETS, "smoke", ArenaPreset(**fields))
    monkeypatch.setattr(running.attack_agreement, "libraries", missing)
    with pytest.raises(ImportError, match="install torchattacks"):
        running.run(small("advbn"))
    assert trainings == []


def test_a_record_stands_where_the_weights_that_it_starts_from_are_gone(small, trainings):
    first = running.run(small("advbn"))
    shutil.rmtree(small("advbn").runs_folder)
    trainings.clear()
    assert running.run(small("advbn")) == first and trainings == []


def test_a_record_stands_where_the_weights_that_it_starts_from_are_of_other_code(small, trainings, monkeypatch):
    first = running.run(small("advbn"))
    trainings.clear()
    monkeypatch.setattr(running, "TRAINING_CODE", (*running.TRAINING_CODE, "advbn_lib.plan"))
    monkeypatch.setattr(running.same_numbers, "today", lambda code_hash: small("advbn").code)
    assert running.run(small("advbn")) == first and trainings == []


def test_a_test_on_another_machine_or_with_other_versions_is_told_from_the_training(small, monkeypatch):
    running.train_method(small("pretrain"))
    old = running.versions()
    monkeypatch.setattr(running, "versions", lambda: {**old, "torch": "99.0"})
    monkeypatch.setattr(running, "hardware", lambda device: {**provenance.hardware(device), "cpu": "another"})
    record = running.run(small("pretrain"))
    assert record.versions == {**old, "test": {**old, "torch": "99.0"}}
    assert record.hardware["cpu"] != "another" == record.hardware["test"]["cpu"]
    monkeypatch.undo()
    record = running.run(small("pretrain"), again=True)
    assert "test" not in record.versions and "test" not in record.hardware


@pytest.mark.parametrize("name", ["mps", "meta"])
def test_other_devices_are_refused(small, name):
    with pytest.raises(ValueError, match=f"not on '{name}'"):
        running.choose_device(name)


def test_train_only_keeps_the_weights_for_a_later_test(tmp_path, trainings):
    arguments = [
        "--records",
        str(tmp_path / "records"),
        "run",
        "clean_finetuning",
        "--runs",
        str(tmp_path / "runs"),
        "--quiet",
    ]
    assert main([*arguments, "--train-only"]) == 0
    assert trainings == ["PlainTraining", "CleanFineTuning"] and not list(tmp_path.rglob("*.json"))
    assert main(arguments) == 0
    assert len(trainings) == 2 and len(list(tmp_path.rglob("*.json"))) == 1


def test_a_record_without_its_weights_is_recomputed_where_they_are_needed(small, trainings):
    running.run(small("pretrain"))
    shutil.rmtree(small("pretrain").runs_folder)
    running.run(small("untouched"))
    assert trainings == ["PlainTraining", "PlainTraining"]
    assert (small("pretrain").folder / "final.pt").exists()


@pytest.mark.parametrize("after", [1, 2, 6])
def test_a_run_that_was_stopped_goes_on_and_gives_the_same_record(small, monkeypatch, after):
    expected = running.run(small("advbn", folder="uninterrupted"))
    original, calls = running.accuracies, []

    def stopped(*arguments, **options):
        calls.append(None)
        if len(calls) == 1:  # after AdvBN's training, before its record
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(running, "accuracies", stopped)
    with pytest.raises(KeyboardInterrupt):
        running.run(small("advbn"))
    assert not records.path_of("advbn", "smoke", 0, small("advbn").records_folder).exists()
    torch.rand(after)
    assert comparable(running.run(small("advbn"))) == comparable(expected)


def test_a_damaged_record_is_not_passed_over(small):
    job = small("untouched")
    running.run(job)
    path = records.path_of("untouched", "smoke", 0, job.records_folder)
    path.write_text(path.read_text().replace("UTC", "GMT"))
    with pytest.raises(records.RecordError, match="changed after the run"):
        running.run(job)
    assert running.run(job, again=True) == records.read(path)


def test_too_few_images_are_refused(small, monkeypatch):
    monkeypatch.setitem(PRESETS, "smoke", dataclasses.replace(SMALL, train_images=51))
    with pytest.raises(DataError, match="images 0 to 50, but it has 50"):
        running.run(small("untouched"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", "smoke"), "no experiment 'nothing'; there are pretrain, untouched"), (("advbn", "huge"), "no preset 'huge'; there are smoke"),
        (("pretrain", "cpu"), "trains from scratch, but preset 'cpu' starts from published weights; presets for it: smoke"), (("advbn", "smoke", -1), "a seed goes from 0 to 2147483647, got -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        running.prepare(*arguments)


def test_the_preset_follows_the_machine_unless_it_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (choose_preset(), choose_preset("auto"), choose_preset("smoke")) == ("cpu", "cpu", "smoke")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (choose_preset(), choose_preset("cpu")) == ("gpu", "cpu")
    with pytest.raises(ValueError, match="no preset 'huge'"):
        choose_preset("huge")


def test_the_papers_values_are_those_of_the_experiment():
    method = find("advbn", "cpu")[0].method
    assert (method.eps, method.step_size, method.steps, method.dual_bn, method.layer) == (1.1, 0.2, 6, True, "layer1")
    random = find("random_statistics", "cpu")[0].method
    assert (random.eps, random.dual_bn, random.layer) == (1.1, True, "layer1")


# The command line


def test_a_smoke_run_from_the_command_line_writes_its_records(smoke_run):
    record = records.read(records.path_of("advbn", "smoke", 0, smoke_run / "records"))
    assert record.metric("accuracy/clean/clean") > 0.8  # digits are easy
    assert record.metric("accuracy/adversarial/clean") > 0.5
    assert record.data.keys() == {"digits/train", "digits/test"}
    assert sorted(path.name for path in (smoke_run / "records").rglob("*") if path.is_file()) == ["smoke-s0.json"]


def test_the_second_time_nothing_is_trained(smoke_run):
    before = {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*")}
    done = command_line(
        "--records", smoke_run / "records", "run", "advbn", "--runs", smoke_run / "runs", "--quiet", "--device", "cpu"
    )
    assert done.returncode == 0 and "smoke-s0.json" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in smoke_run.rglob("*")} == before


def wait_for_a_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(folder.glob("training-*.pt")):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_run_killed_by_the_system_and_started_again_gives_the_same_record_and_weights(smoke_run, tmp_path):
    shutil.copytree(
        smoke_run / "runs/pretrain", tmp_path / "runs/pretrain"
    )  # only the fine-tuning is run and killed here
    arguments = [
        "--records",
        tmp_path / "records",
        "run",
        "advbn",
        "--runs",
        tmp_path / "runs",
        "--quiet",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "advbn_lib", *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    try:
        wait_for_a_checkpoint(tmp_path / "runs" / "advbn" / "smoke-s0", process)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not records.path_of("advbn", "smoke", 0, tmp_path / "records").exists()
    done = command_line(*arguments)
    assert done.returncode == 0, done.stderr
    first, second = (
        records.read(records.path_of("advbn", "smoke", 0, folder / "records")) for folder in (smoke_run, tmp_path)
    )
    assert comparable(first) == comparable(second)
    weights = [
        read_checkpoint(folder / "runs" / "advbn" / "smoke-s0" / "final.pt")["parts"]["model"]
        for folder in (smoke_run, tmp_path)
    ]
    assert differing(*weights) == []


def test_list_names_every_experiment_and_the_records_there_are(smoke_run, capsys):
    assert main(["--records", str(smoke_run / "records"), "list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}:" in shown for name in (*NAMES, "loader_speed"))
    assert shown.count("smoke: seeds 0") == 1 and "older code" not in shown


def test_list_says_which_records_are_old(smoke_run, capsys, monkeypatch):
    monkeypatch.setattr(running, "code_hash", lambda modules: "newer")
    main(["--records", str(smoke_run / "records"), "list"])
    assert "smoke: seeds 0   (seeds 0: by older code or configuration)" in capsys.readouterr().out


def test_show_prints_the_record_and_how_to_recompute_it(smoke_run, capsys):
    assert main(["--records", str(smoke_run / "records"), "show", "advbn"]) == 0
    shown, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    assert records.Record(**json.loads(shown)) == records.read(
        records.path_of("advbn", "smoke", 0, smoke_run / "records")
    )
    assert "python -m advbn_lib run advbn --preset smoke --seed 0 --device cpu --threads 1 --again" in last


def test_report_gives_means_and_intervals_over_seeds(tmp_path, capsys):
    from test_records import record

    for seed, share in enumerate((0.70, 0.75, 0.83)):
        records.write(record(seed, clean=share), tmp_path)
    assert main(["--records", str(tmp_path), "report", "--preset", "smoke"]) == 0
    shown = capsys.readouterr().out
    assert "advbn (smoke, n = 3 seeds)" in shown and "untouched" not in shown
    row = next(line for line in shown.splitlines() if line.split()[:2] == ["clean", "clean"])
    assert "76.0 %" in row and "95 % interval 59.7 to 92.3" in row


def test_a_benchmark_is_run_and_reported_like_an_experiment(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("advbn_lib.benchmarks.ROUNDS", 1)
    assert main(["--records", str(tmp_path), "run", "loader_speed"]) == 0
    capsys.readouterr()
    record = records.read(records.path_of("loader_speed", "smoke", 0, tmp_path))
    assert record.metric("loader_speed/ratio") == pytest.approx(
        record.metric("loader_speed/images_per_second") / record.metric("loader_speed/torch_images_per_second")
    )
    assert main(["--records", str(tmp_path), "report", "--preset", "smoke"]) == 0
    assert "ratio" in capsys.readouterr().out


WRONG = [
    (["run", "nothing"], "no experiment 'nothing'; there are pretrain"), (["run", "advbn", "--preset", "huge"], "no preset 'huge'; there are smoke"),
    (["run", "advbn", "--seed", "-1"], "a seed goes from 0 to 2147483647, got -1"), (["run", "advbn", "--seed", str(2**70)], "a seed goes from 0 to 2147483647"),
    (["run", "pretrain", "--preset", "cpu"], "starts from published weights"), (["run", "advbn", "--device", "abacus"], "abacus"),
    (["run", "advbn", "--threads", "0"], "threads"), (["run", "loader_speed", "--preset", "gpu"], "at presets smoke, cpu"),
    (["run", "loader_speed", "--seed", "-1"], "a seed goes from 0 to 2147483647, got -1"), (["show", "nothing"], "nothing"),
    (["show", "advbn"], "there is no record"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(arguments)[:40] for arguments, _ in WRONG])
def test_what_the_user_can_mend_is_one_line_and_exit_code_1(tmp_path, capsys, arguments, message):
    assert main(["--records", str(tmp_path), *arguments]) == 1
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("advbn_lib: ") and "\n" not in shown and message in shown
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["report", "--preset", "huge"], "huge"), (["run", "advbn", "--seed", "x"], "'x'"), (["jump"], "'jump'"), ([], "COMMAND"), (["run"], "experiment")],
)  # fmt: skip
def test_what_is_not_a_command_shows_the_usage(capsys, arguments, named):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    shown = capsys.readouterr().err
    assert stopped.value.code == 2 and shown.startswith("usage: python -m advbn_lib") and named in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line_too(tmp_path, capsys):
    assert main(["--records", str(tmp_path), "run", "advbn", "--device", "cuda", "--runs", str(tmp_path)]) == 1
    shown = capsys.readouterr().err.strip()
    assert "\n" not in shown and "cuda" in shown.lower()


def test_output_that_nobody_reads_to_the_end_is_no_error(smoke_run):
    command = f"{sys.executable} -m advbn_lib --records {smoke_run / 'records'} show advbn | head -n 1"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "{\n" and done.stderr == ""


def test_errors_are_without_traceback_in_a_process_of_their_own(tmp_path):
    done = command_line("--records", tmp_path, "run", "advbn", "--preset", "huge")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("advbn_lib: no preset 'huge'") and done.stderr.count("\n") == 1


def test_an_interrupt_says_that_the_run_can_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("advbn_lib.__main__.run", interrupted)
    assert main(["--records", str(tmp_path), "run", "advbn"]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_a_record_says_what_its_training_took_and_keeps_it(small):
    first = running.run(small("advbn"))
    assert (
        0 < first.metric("cost/train_cpu_seconds") < 60
        and running.run(small("untouched")).cost["train_cpu_seconds"] == 0
    )
    tested_again = running.train_method(small("advbn")).cost
    assert round(tested_again.cpu_seconds, 2) == first.cost["train_cpu_seconds"]
    assert tested_again.memory_mib == first.cost["training_memory_mib"]


def test_seconds_of_computing_go_on_after_a_kill(small, monkeypatch):
    """Killed after its first epoch: what that took is in its checkpoint."""
    job, plain, kept = small("pretrain"), running.train, []

    def killed(method, *given, **options):
        def stop(history):
            kept.append(float(method.state_dict()[KEPT_AS]))
            raise KeyboardInterrupt

        return plain(method, *given, **options, after_epoch=stop)

    monkeypatch.setattr(running, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        running.train_method(job)
    monkeypatch.setattr(running, "train", plain)
    trained = running.train_method(job)
    assert trained.history.epoch == 2 and trained.cost.cpu_seconds > 0.8 * kept[0] > 0


def test_weights_of_before_cost_was_measured_are_tested_and_say_nothing_of_it(small):
    job = small("pretrain")
    running.train_method(job)
    final = job.folder / "final.pt"
    state = read_checkpoint(final)
    del state["progress"]["cost"]
    save_checkpoint(final, {"model": running.train_method(job).method.model}, state["progress"], state["key"])
    record = running.run(job)
    assert record.cost["train_cpu_seconds"] is record.cost["training_memory_mib"] is None
    assert record.metric("cost/train_seconds") > 0
