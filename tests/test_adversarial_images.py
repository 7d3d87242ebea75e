"""The exported test set: made as the paper makes it, checked when it is read, whole or not there."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, command_line, tiny_images, tiny_network, traces
from PIL import Image

from advbn_lib import adversarial_images as export_module
from advbn_lib.adversarial_images import (
    ExportConfig,
    attack_through_decoder,
    export,
    load_adversarial_images,
    read_manifest,
)
from advbn_lib.ascent import Steps
from advbn_lib.data.images import DataError
from advbn_lib.decoder import Autoencoder, DecoderConfig, train_decoder
from advbn_lib.perturbations import ChannelStatistics
from advbn_lib.training import Schedule

QUICK = DecoderConfig(width=8, depth=1, images=64, schedule=Schedule(1, 16, 0.05, weight_decay=0.0))
CONFIG = ExportConfig(batch_size=7, decoder=QUICK)
TRAIN, TEST = tiny_images(size=16), tiny_images(30, 16, seed=1, name="tiny/test")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_network()


def make(
    folder: Path, config: ExportConfig = CONFIG, model: torch.nn.Module | None = None, test=TEST, seed: int = 0
) -> Path:
    weights = {"source": "new, seed 0"}
    return export(folder, model or network(), weights, TRAIN, test, config, seed, show_progress=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "images"
    make(folder)
    return folder


@pytest.fixture
def own(made, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "images")


def by_hand(autoencoder: Autoencoder, x: torch.Tensor, labels: torch.Tensor, eps: float, step: float, steps: int):
    """The released script's loop, in its own words: classifier's loss on the decoded, normalised image that is not cut."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (TEST.mean, TEST.std))
    mu = x.mean((0, 2, 3), keepdim=True)
    a, b, losses = torch.ones_like(mu), torch.ones_like(mu), []
    for _ in range(steps):
        a, b = a.requires_grad_(), b.requires_grad_()
        image = autoencoder.decoder((b * (x - mu) + a * mu).clamp_min(0))
        loss = F.cross_entropy(autoencoder.split.model((image - mean) / std), labels)
        slopes = torch.autograd.grad(loss, (a, b))
        a, b = ((f.detach() + step * g.sign()).clamp(1 - eps, 1 + eps) for f, g in zip((a, b), slopes))
        losses.append(loss.item())
    return a, b, torch.tensor(losses)


def test_the_attack_is_the_papers_through_the_decoder():
    autoencoder, _ = train_decoder(network(), TRAIN, QUICK, show_progress=False)
    x, labels = autoencoder.encode(TEST.images[:8].float() / 255), TEST.labels[:8]
    found = attack_through_decoder(autoencoder, x, labels, ChannelStatistics(1.1), Steps(6, 0.2))
    a, b, losses = by_hand(autoencoder, x, labels, 1.1, 0.2, 6)
    torch.testing.assert_close(found.delta, (a, b))
    torch.testing.assert_close(found.losses, losses)
    assert losses[-1] > losses[0]


def test_both_conditions_come_back_as_they_were_made(made):
    autoencoder, _ = train_decoder(network(), TRAIN, QUICK, show_progress=False)
    order = TEST.labels.argsort(stable=True)
    wanted = {name: torch.zeros_like(TEST.images) for name in ("adversarial", "identical")}
    for chosen in order.split(7):
        x = autoencoder.encode(TEST.images[chosen].float() / 255)
        a, b, _ = by_hand(autoencoder, x, TEST.labels[chosen], 1.1, 0.2, 6)
        worst = ChannelStatistics(1.1).apply(x, (a, b))
        for name, features in {"adversarial": worst, "identical": x}.items():
            wanted[name][chosen] = (255 * autoencoder.decode(features)).round().to(torch.uint8)
    for name, images in wanted.items():
        found = load_adversarial_images(made, name)
        assert (found.images.int() - images.int()).abs().max() <= 1
        assert torch.equal(found.labels, TEST.labels) and found.classes == TEST.classes and found.mean == TEST.mean
        assert name in found.name and found.std == TEST.std
    assert not torch.equal(load_adversarial_images(made).images, load_adversarial_images(made, "identical").images)


def test_files_lie_in_folders_of_classes(made):
    files = sorted(made.rglob("*.png"))
    assert len(files) == 60 and (made / "adversarial" / "3" / "00013.png") in files
    for file in files:
        assert int(file.parent.name) == TEST.labels[int(file.stem)]
        with Image.open(file) as picture:
            assert picture.size == (16, 16) and picture.mode == "RGB"


def test_the_manifest_says_what_was_done(made):
    manifest = read_manifest(made)
    assert (
        manifest["config"]["eps"] == 1.1 and manifest["config"]["batch_size"] == 7 and manifest["config"]["seed"] == 0
    )
    assert manifest["data"]["tiny/test"] == {"images": 30, "sha256": TEST.checksum}
    assert len(manifest["weights"]["sha256"]) == len(manifest["decoder"]["sha256"]) == 64
    assert manifest["versions"].keys() >= {"torch", "python", "advbn_lib"}
    assert {(row["index"], row["label"]) for row in manifest["files"]} == set(enumerate(TEST.labels.tolist()))
    assert len(manifest["batches"]) == 5
    for factors in manifest["batches"]:
        assert all(-0.1001 <= value <= 2.1001 for values in factors.values() for value in values)
        assert {len(values) for values in factors.values()} == {4}


def test_batches_follow_the_classes_or_the_files(made, tmp_path):
    make(tmp_path / "mixed", replace(CONFIG, order="file"))
    classes = {}
    for folder in (made, tmp_path / "mixed"):
        batches = {}
        for row in read_manifest(folder)["files"]:
            batches.setdefault(row["batch"], set()).add(row["label"])
        classes[folder.name] = [len(labels) for labels in batches.values()]
    assert max(classes["images"]) == 3 and min(classes["mixed"][:-1]) == 7


def test_the_same_seed_gives_the_same_files(made, tmp_path):
    make(tmp_path / "again")
    make(tmp_path / "other", seed=1)
    first, again, other = (read_manifest(folder)["files"] for folder in (made, tmp_path / "again", tmp_path / "other"))
    assert first == again and first != other


def test_the_network_is_left_alone(tmp_path):
    model = network().train()
    before = traces(model)
    make(tmp_path / "images", model=model)
    assert_same_traces(before, traces(model))


# ---- whole or not there --------------------------------------------------------------------


def test_a_folder_with_something_in_it_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "train_decoder", lambda *_: pytest.fail("it should be refused before the work"))
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        make(folder)
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        make(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "images", "mine.txt"]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "images").mkdir()
    make(tmp_path / "images", test=TEST.first(7))
    assert len(load_adversarial_images(tmp_path / "images")) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_export_that_failed(tmp_path, monkeypatch, error):
    write, calls = export_module._write, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return write(*arguments)

    monkeypatch.setattr(export_module, "_write", failing)
    with pytest.raises(type(error)):
        make(tmp_path / "images")
    assert not list(tmp_path.iterdir()) and len(calls) == 4


# ---- what is read is checked ---------------------------------------------------------------


def some(folder: Path) -> Path:
    return folder / "adversarial" / "3" / "00013.png"


def flip_a_byte(folder: Path) -> None:
    content = bytearray(some(folder).read_bytes())
    content[-20] ^= 1
    some(folder).write_bytes(content)


def edit(folder: Path, change, digest: bool = False) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if digest:
        manifest["digest"] = export_module._digest(
            {name: value for name, value in manifest.items() if name != "digest"}
        )
    path.write_text(json.dumps(manifest))


DAMAGE = {
    "00013.png is damaged": flip_a_byte,
    "00013.png is missing": lambda folder: some(folder).unlink(),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is not JSON": lambda folder: (folder / "manifest.json").write_text("{"),
    "digest does not fit": lambda folder: edit(folder, lambda m: m["files"][0].update(label=9)),
    "not a manifest of format 1": lambda folder: edit(folder, lambda m: m.update(format=2), digest=True),
    "which is no file of an export": lambda folder: edit(
        folder, lambda m: m["files"][0].update(file="../secret.png"), digest=True
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_noticed_and_named(own, message):
    assert len(load_adversarial_images(own)) == 30
    DAMAGE[message](own)
    with pytest.raises(DataError, match=message) as caught:
        load_adversarial_images(own)
    assert "export-advbn" in str(caught.value)


def test_a_condition_that_there_is_not_is_refused(made):
    with pytest.raises(ValueError, match="adversarial, identical"):
        load_adversarial_images(made, "worse")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": "random"}, "'class' or 'file'"),
        ({"batch_size": 0}, "batch_size"),
        ({"layer": "layer2"}, "must agree"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ExportConfig(**wrong)


# ---- command line --------------------------------------------------------------------------


def test_it_is_one_command(smoke_run, tmp_path):
    here = shutil.copytree(smoke_run, tmp_path / "here")
    command = [
        "--records", here / "records", "export-advbn", "--out", here / "images", "--preset", "smoke", "--limit", 40,
        "--runs", here / "runs", "--quiet", "--device", "cpu",
    ]  # fmt: skip
    done = command_line(*command, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(here / "images" / "manifest.json")
    found = load_adversarial_images(here / "images")
    assert len(found) == 40 and read_manifest(here / "images")["weights"]["source"].startswith("pretrain, smoke")
    again = command_line(*command, cwd=here)
    assert again.returncode == 1 and "not an empty folder" in again.stderr and "Traceback" not in again.stderr
