"""The bench of smiles: the plant is there in training and not in the test, and the record says what a plain computation says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder
from PIL import Image
from torchvision.datasets import CelebA

from advbn_lib.checkpoints import read_checkpoint
from advbn_lib.data import DataError
from advbn_lib.data.images import ImageSet
from advbn_lib.data.smiles import CLASSES, EDITIONS, MEAN, MIDDLE, STD, TINT, load_smiles
from advbn_lib.methods.advmix import OnImages, RandMix
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.mixing import ColourDecoder, Encoded
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.smiles_bench import (
    ABOUT,
    BENCHES,
    LEVELS,
    METHODS,
    METRICS,
    WITHOUT_STYLES,
    Relight,
    SmilesBench,
    chosen,
    greyed,
    levels_of,
    lit,
    robust_balanced_accuracy,
    run_smiles_bench,
)
from advbn_lib.style_mix import StyleBank
from advbn_lib.training import Schedule

CPU = torch.device("cpu")


def short(**changes) -> SmilesBench:
    small = dataclasses.replace(
        BENCHES["smoke_smiles"], images=(96, 60), attacked=30, attack_restarts=2,
        schedule=Schedule(epochs=1, batch_size=48, lr=0.05),
    )  # fmt: skip
    return dataclasses.replace(small, **changes)


def run(bench: SmilesBench, method: str = "randmix", seed: int = 0, folder=None, code: str = "code"):
    return run_smiles_bench(bench, method, seed, CPU, code, folder, show_progress=False)


def made_faces(count: int = 60, side: int = 16) -> ImageSet:
    """Noise; the first of every three "smiles"."""
    grey = torch.randint(0, 256, (count, 1, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    labels = (torch.arange(count) % 3 == 0).long()
    return ImageSet("made/train", grey.repeat(1, 3, 1, 1), labels, CLASSES, MEAN, STD)


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A folder of made faces of 64x64 in the layout of the authors."""
    random = np.random.default_rng(0)
    for part, count in zip(EDITIONS[1].parts, (30, 20)):
        folder = tmp_path / EDITIONS[1].folder / part
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (64, 64), dtype=np.uint8)).save(folder / f"{number}.png")
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_its_numbers_at_its_levels(method):
    pytest.importorskip("sklearn")
    ran, levels = run(short(), method), levels_of(method)
    assert ("none" in levels) == (method in WITHOUT_STYLES)
    groups = ran.metrics["smiles"]
    assert set(groups) == set(METRICS)
    for name, by_level in groups.items():
        in_light = name in ("agreeing", "conflicting", "robust")
        assert list(by_level) == [level for level in levels if level != "none" or not in_light]
        assert all(0 <= share <= 1 for share in by_level.values())
    for level in levels:
        assert len(ran.curves[f"clean_loss/{level}"]) == 1
        if level != "none":
            after = ran.curves[f"balanced_accuracy_after_restarts/{level}"]
            assert len(after) == 3 and after == sorted(after, reverse=True) and after[-1] == groups["robust"][level]
    # One test set serves both lights.
    assert len(ran.data) == (5 if "none" in levels else 3) and all(row["sha256"] for row in ran.data.values())
    assert method in ABOUT and ran.cost["train_seconds"] > 0
    json.dumps(dataclasses.asdict(ran), allow_nan=False)


@pytest.mark.parametrize("share", [0.95, 0.5, None])
def test_the_light_says_the_label_where_it_is_planted_and_nothing_elsewhere(share):
    faces = lit(made_faces(600), share, seed=1)
    warm = faces.colours[:, 0] > faces.colours[:, 2]
    right = (warm == (faces.images.labels == 1)).float()
    for label in range(2):
        members = faces.images.labels == label
        if share is None:
            assert (faces.colours == 1).all() and not faces.agrees.any()
            assert torch.equal(faces.images.images, made_faces(600).images)
        else:
            assert right[members].mean() == pytest.approx(share, abs=0.01)
            assert (faces.agrees == right.bool()).float().mean() > 0.99, "a tint in a thousand is between warm and cold"
    again = (faces.grey[:, None] * faces.colours[:, :, None, None]).round()
    assert torch.equal(faces.images.images.float(), again), "made of what it says"


def test_training_has_the_plant_and_the_test_has_not(monkeypatch):
    pytest.importorskip("sklearn")
    seen = []
    monkeypatch.setattr(
        "advbn_lib.smiles_bench.lit",
        lambda faces, share, seed: seen.append((faces.name, share)) or lit(faces, share, seed),
    )
    run(short(), "nominal")
    train, test = "digits/train", "digits/test"
    assert seen == [(train, 0.95), (test, 0.5), (train, 0.5), (test, 0.5), (train, None), (test, None)]


def test_a_planted_light_is_learned_and_harms():
    """Where grey says nothing and the light nearly all, a network goes by the light."""
    pytest.importorskip("sklearn")
    bench = short(images=(640, 200), schedule=Schedule(epochs=3, batch_size=64, lr=0.05), share=1.0)
    found = run(bench, "nominal").metrics["smiles"]
    assert found["agreeing"]["planted"] > 0.9 and found["conflicting"]["planted"] < 0.4
    assert found["conflicting"]["removed"] > found["conflicting"]["planted"] + 0.2


def test_the_record_says_what_a_plain_recomputation_says(tmp_path):
    pytest.importorskip("sklearn")
    bench = short()
    ran = run(bench, "nominal", seed=2, folder=tmp_path)
    kept = [read_checkpoint(path) for path in tmp_path.glob("level-*.pt")]
    assert len(kept) == 3
    planted_one = next(
        row for row in kept if row["progress"]["metrics"]["area"] == ran.metrics["smiles"]["area"]["planted"]
    )
    model = DigitCNN(4, 2, 32)
    model.load_state_dict(planted_one["parts"]["model"])
    test = lit(bench.faces("test", 2), 0.5, 2)
    with torch.no_grad():
        logits = model.eval()((test.images.images.float() / 255 - 0.5) / 0.5)
    right, labels = logits.argmax(1) == test.images.labels, test.images.labels

    def balanced(which: torch.Tensor) -> float:
        return sum(right[which & (labels == label)].float().mean().item() for label in (0, 1)) / 2

    score = (logits[:, 1] - logits[:, 0]).double()
    pairs = score[labels == 1][:, None] - score[labels == 0][None]
    everywhere = torch.ones_like(right)
    expected = {
        "balanced_accuracy": balanced(everywhere), "accuracy": right.float().mean().item(),
        "agreeing": balanced(test.agrees), "conflicting": balanced(~test.agrees),
        "area": ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item(),
    }  # fmt: skip
    for name, value in expected.items():
        assert ran.metrics["smiles"][name]["planted"] == pytest.approx(value, abs=1e-6), name
    first = torch.arange(len(test)) < bench.attacked
    start = ran.curves["balanced_accuracy_after_restarts/planted"][0]
    assert start == pytest.approx(balanced(first), abs=1e-6), "before the first restart: as they are"


def test_robust_accuracy_counts_each_class_the_same():
    """A network that always answers no smile: right of one class whatever the light, and never of the other."""

    class Never(torch.nn.Module):
        def forward(self, images):
            return torch.stack([images.mean((1, 2, 3)) * 0 + 1, images.mean((1, 2, 3)) * 0], 1)

    faces, bench = lit(made_faces(), 0.5, 0), short()
    method = OnImages(PlainTraining(Never()))
    attacked, others = chosen(faces, slice(24)), chosen(faces, slice(24, None))
    assert robust_balanced_accuracy(method, attacked, others, bench, False) == [0.5, 0.5, 0.5]
    with pytest.raises(DataError, match="no image of smile"):
        robust_balanced_accuracy(method, chosen(faces, faces.images.labels == 0), others, bench, False)


def test_the_oracle_draws_tints_evenly_from_cold_to_warm():
    faces = lit(made_faces(600), 1.0, 0)
    bank = StyleBank(faces.colours, faces.images.labels, (0.0, 1.0))
    oracle = Relight(DigitCNN(4, 2, 16), ColourDecoder(), bank, MEAN, STD)
    batch = Encoded(faces.images.images.float(), faces.grey.unsqueeze(1).float(), faces.colours, torch.arange(600))
    style = oracle.choose_style(batch, faces.images.labels)
    tints = (style - MIDDLE) / torch.tensor([TINT[0], 1.0, TINT[2]])
    assert torch.allclose(tints[:, 0], tints[:, 2], atol=1e-5) and (tints[:, 1] == 0).all()
    assert tints[:, 0].abs().max() <= 1 + 1e-5
    for label in range(2):
        assert torch.histc(tints[faces.images.labels == label, 0], 4, -1, 1).min() > 25, "whatever the label"


def test_colour_faces_become_grey():
    images = made_faces(4)
    colour = dataclasses.replace(images, images=torch.randint(0, 256, images.images.shape, dtype=torch.uint8))
    grey = greyed(colour)
    red, green, blue = colour.images.double().unbind(1)
    assert torch.equal(grey.images[:, 0], (0.299 * red + 0.587 * green + 0.114 * blue).round().to(torch.uint8))
    assert torch.equal(grey.images, grey.images[:, :1].repeat(1, 3, 1, 1)) and torch.equal(grey.labels, colour.labels)
    assert torch.equal(greyed(images).images, images.images), "grey stays as it is"
    lit(grey, 0.95, 0)


def test_killed_between_levels_and_within_one_it_ends_as_if_never_stopped(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    bench = short(schedule=Schedule(epochs=2, batch_size=48, lr=0.05))
    whole = run(bench)
    choose, calls = RandMix.choose_style, []

    def killed(self, batch, labels):
        calls.append(len(batch))
        if len(calls) == 4 + 3:  # two epochs of two steps at the first level, then the second epoch of the second one
            raise KeyboardInterrupt
        return choose(self, batch, labels)

    monkeypatch.setattr(RandMix, "choose_style", killed)
    with pytest.raises(KeyboardInterrupt):
        run(bench, folder=tmp_path)
    assert len(list(tmp_path.glob("level-*.pt"))) == 1 and len(list(tmp_path.glob("training-*.pt"))) == 1
    torch.manual_seed(99)
    calls = [0] * 100
    resumed = run(bench, folder=tmp_path)
    assert len(calls) == 100 + 2, "the level that is done is not done again, nor is the first epoch of the other one"
    assert resumed.curves == whole.curves and resumed.metrics == whole.metrics
    run(bench, folder=tmp_path, code="other code")
    assert len(list(tmp_path.glob("level-*.pt"))) == 4, "what other code left is not taken"


def test_the_seed_and_the_method_decide_and_nothing_else():
    pytest.importorskip("sklearn")
    first, again, other = (run(short(), seed=seed) for seed in (0, 0, 1))
    assert first.curves == again.curves and first.metrics == again.metrics
    assert first.curves != other.curves and first.weights["sha256"] != other.weights["sha256"]
    assert run(short(), "recolour").weights == first.weights, "all methods start from the same weights"


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="nominal, advmix, randmix"):
        run(short(), "randmix_passes")


def test_a_folder_of_faces_is_enough(tree, monkeypatch):
    monkeypatch.setattr(
        "advbn_lib.smiles_bench.load_smiles", lambda split, seed: load_smiles(split, seed, complete=False)
    )
    schedule = Schedule(epochs=1, batch_size=20, lr=0.05)
    bench = short(data_set="smiles", images=(None, None), attacked=5, schedule=schedule)
    ran = run(bench, "advmix")
    sizes = {name: row["images"] for name, row in ran.data.items()}
    assert set(sizes.values()) == {40, 10} and len(sizes) == 3
    splits = [bench.faces("test", seed).checksum for seed in (0, 1)]
    assert splits[0] != splits[1], "each seed has its own split"


def test_celeba_in_its_own_layout_is_enough(tmp_path, monkeypatch):
    """As for those who have it: the measurement's name and preset, on a small tree with torchvision's checksums made to fit."""
    from advbn_lib import measurements

    folder = tmp_path / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06}.jpg" for number in range(1, 49)]
    random = np.random.default_rng(0)
    for name in names:
        pixels = random.integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "img_align_celeba" / name)

    def rows(values) -> str:
        return "".join(f"{name} {value}\n" for name, value in zip(names, values))

    (folder / "list_attr_celeba.txt").write_text("48\nSmiling \n" + rows([1, -1] * 24))
    (folder / "list_eval_partition.txt").write_text(rows([0] * 28 + [2] * 20))
    (folder / "identity_CelebA.txt").write_text(rows(range(48)))
    (folder / "list_bbox_celeba.txt").write_text("48\nimage_id x_1 y_1 width height\n" + rows(["1 2 3 4"] * 48))
    (folder / "list_landmarks_align_celeba.txt").write_text("48\nlefteye_x lefteye_y\n" + rows(["69 109"] * 48))
    listed = [
        (where, hashlib.md5((folder / name).read_bytes()).hexdigest() if name.endswith(".txt") else md5, name)
        for where, md5, name in CelebA.file_list
    ]
    monkeypatch.setattr(CelebA, "file_list", listed)
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path))
    whole = BENCHES["gpu_smiles_celeba"]
    small = dataclasses.replace(
        whole, width=2, attacked=8, attack_restarts=1, attack_steps=1, steps=1, restarts=1,
        schedule=Schedule(epochs=1, batch_size=14, lr=0.05),
    )  # fmt: skip
    monkeypatch.setitem(BENCHES, "gpu_smiles_celeba", small)
    job = measurements.Job("gpu_smiles_celeba", 0, CPU, tmp_path / "records", tmp_path / "runs", False)
    record = measurements.run_measurement("smiles_advmix", job)
    assert {row["images"] for row in record.data.values()} == {28, 20}
    assert all(name.startswith("celeba/") and "grey" in name for name in record.data)
    assert 0 <= record.metric("smiles/robust/planted") <= 1


def test_the_real_faces_carry_the_plant():
    data_folder()
    bench = BENCHES["cpu_smiles"]
    train, test = bench.faces("train", 0), bench.faces("test", 0)
    assert train.images.shape[1:] == (3, 64, 64) and len(train) > 7_500 and len(test) > bench.attacked + 1_000
    assert lit(train, bench.share, 0).agrees.float().mean() == pytest.approx(bench.share, abs=0.001)
    agrees = lit(test, 0.5, 0).agrees
    for label in (0, 1):
        assert agrees[test.labels == label].float().mean() == pytest.approx(0.5, abs=0.001)
    assert torch.bincount(test.labels[: bench.attacked]).min() > 80, "both classes are attacked"


def test_the_sizes_that_runs_use():
    assert LEVELS == ("planted", "removed", "none") and BENCHES["cpu_smiles"].attack_restarts >= 20
    assert set(METHODS) == {
        "nominal", "advmix", "randmix", "randmix_looks", "reconstruction", "mixup", "linf", "recolour", "grey",
    }  # fmt: skip
