"""The stored CIFAR-10-C: read as published, or refused with a message that says how to mend it."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from advbn_lib.data import cifar10c
from advbn_lib.data.cifar10c import NAMES, cifar10c_available, load_cifar10c, stored_checksum
from advbn_lib.data.images import DataError

COUNT = 3  # images a severity
LABELS = np.array([7, 0, 9], np.uint8)


def pixels(name: str) -> np.ndarray:
    """Random images, others for each name: 5*COUNT,32,32,3."""
    return np.random.default_rng(NAMES.index(name)).integers(0, 256, (5 * COUNT, 32, 32, 3), np.uint8)


def save(folder: Path, **arrays: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with a small CIFAR-10-C of two corruptions."""
    save(tmp_path / "CIFAR-10-C", fog=pixels("fog"), spatter=pixels("spatter"), labels=np.tile(LABELS, 5))
    return tmp_path


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", ["fog", "spatter"])
def test_reads_the_images_of_one_severity_in_their_order(root, name, severity):
    images = load_cifar10c(name, severity, root, per_severity=COUNT)
    expected = pixels(name)[(severity - 1) * COUNT : severity * COUNT].transpose(0, 3, 1, 2)
    assert np.array_equal(images.images.numpy(), expected)
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == LABELS.tolist()
    assert images.classes[7] == "horse" and len(images.classes) == 10


def test_its_name_says_that_it_is_stored(root):
    assert load_cifar10c("fog", 4, root, per_severity=COUNT).name == "cifar10c/fog-4, stored"


def test_the_images_are_a_copy_and_the_file_stays(root):
    before = (root / "CIFAR-10-C" / "fog.npy").read_bytes()
    load_cifar10c("fog", 1, root, per_severity=COUNT).images.zero_()
    assert (root / "CIFAR-10-C" / "fog.npy").read_bytes() == before


def test_there_are_the_published_nineteen():
    assert len(set(NAMES)) == 19 and {"snow", "speckle_noise", "spatter"} < set(NAMES) and "labels" not in NAMES


@pytest.mark.parametrize(("name", "severity", "message"), [("haze", 1, "'haze'.*fog"), ("labels", 1, "'labels'"), ("fog", 0, "1 to 5, got 0"), ("fog", 6, "got 6")])  # fmt: skip
def test_an_unknown_name_or_severity_is_refused(root, name, severity, message):
    with pytest.raises(ValueError, match=message):
        load_cifar10c(name, severity, root, per_severity=COUNT)


def test_the_published_size_is_expected_unless_told_otherwise(root):
    with pytest.raises(
        DataError, match=r"fog.npy should hold uint8 \(50000, 32, 32, 3\), but holds .*\(15, 32, 32, 3\).*unpack"
    ):
        load_cifar10c("fog", 1, root)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("fog", np.zeros((15, 32, 32, 3), np.float32), "fog.npy should hold uint8.*but holds float32"),
        ("fog", np.zeros((15, 3, 32, 32), np.uint8), r"\(15, 3, 32, 32\)"),
        ("labels", np.zeros((15, 1), np.uint8), r"labels.npy should hold uint8 \(15,\)"),
        ("labels", np.arange(15, dtype=np.uint8) % 10, "the severities have different labels"),
        ("labels", np.full(15, 10, np.uint8), "labels go from 10 to 10"),
        ("fog", np.array([{}] * 15), "fog.npy is damaged"),  # would have to be unpickled
    ],
)  # fmt: skip
def test_a_file_of_the_wrong_kind_is_refused(root, file, array, message):
    save(root / "CIFAR-10-C", **{file: array})
    with pytest.raises(DataError, match=message):
        load_cifar10c("fog", 1, root, per_severity=COUNT)


@pytest.mark.parametrize("kept", [0, 5, 20, 100, 128, 5000])
@pytest.mark.parametrize("file", ["fog", "labels"])
def test_a_truncated_file_is_refused(root, file, kept):
    path = root / "CIFAR-10-C" / f"{file}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[: min(kept, len(whole) - 1)])
    with pytest.raises(DataError, match=f"{file}.npy is damaged.*unpack https://zenodo.org/records/2535967"):
        load_cifar10c("fog", 1, root, per_severity=COUNT)


@pytest.mark.parametrize("missing", ["fog", "labels"])
def test_a_missing_file_is_named_with_its_source(root, missing):
    (root / "CIFAR-10-C" / f"{missing}.npy").unlink()
    with pytest.raises(DataError, match=f"{missing}.npy is missing: unpack https://zenodo.org.*download=True"):
        load_cifar10c("fog", 1, root, per_severity=COUNT)


@pytest.fixture
def archive(tmp_path) -> bytes:
    """A small archive with all 19 corruptions, and a file that lies outside its folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, array in {**{name: pixels(name) for name in NAMES}, "labels": np.tile(LABELS, 5)}.items():
            file = io.BytesIO()
            np.save(file, array)
            member = tarfile.TarInfo(f"CIFAR-10-C/{name}.npy")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
        tar.addfile(tarfile.TarInfo("../elsewhere.npy"))
    return stream.getvalue()


def offered(monkeypatch, folder: Path, content: bytes, digest: str | None = None) -> None:
    """Have ``content`` downloaded from a folder instead of Zenodo."""
    folder.mkdir()
    (folder / "CIFAR-10-C.tar").write_bytes(content)
    monkeypatch.setattr(cifar10c, "URL", (folder / "CIFAR-10-C.tar").as_uri())
    monkeypatch.setattr(cifar10c, "SHA256", digest or hashlib.sha256(content).hexdigest())


def test_the_archive_is_downloaded_checked_and_unpacked(monkeypatch, tmp_path, archive):
    offered(monkeypatch, tmp_path / "server", archive)
    root = tmp_path / "new" / "data"
    assert not cifar10c_available(root)
    images = load_cifar10c("snow", 2, root, download=True, per_severity=COUNT)
    assert np.array_equal(images.images.numpy(), pixels("snow")[COUNT : 2 * COUNT].transpose(0, 3, 1, 2))
    assert cifar10c_available(root)
    assert {path.name for path in (root / "CIFAR-10-C").iterdir()} == {f"{name}.npy" for name in (*NAMES, "labels")}
    assert not list(tmp_path.rglob("elsewhere*"))


def test_an_archive_put_there_by_hand_is_enough(monkeypatch, tmp_path, archive):
    offered(monkeypatch, tmp_path / "data", archive)
    monkeypatch.setattr(cifar10c, "URL", "file:///nowhere")
    assert len(load_cifar10c("snow", 2, tmp_path / "data", per_severity=COUNT)) == COUNT


def test_the_checksum_needs_the_files_or_the_archive(monkeypatch, tmp_path, archive):
    with pytest.raises(DataError, match="gaussian_noise.npy is missing: unpack https://zenodo.org"):
        stored_checksum(tmp_path)
    offered(monkeypatch, tmp_path / "data", archive)
    assert len(stored_checksum(tmp_path / "data")) == 64 and cifar10c_available(tmp_path / "data")


def test_a_damaged_archive_is_refused_and_leaves_nothing(monkeypatch, tmp_path, archive):
    offered(monkeypatch, tmp_path / "server", archive[:-1], hashlib.sha256(archive).hexdigest())
    with pytest.raises(DataError, match="CIFAR-10-C.tar is missing and could not be downloaded.*by hand"):
        load_cifar10c("snow", 2, tmp_path / "data", download=True, per_severity=COUNT)
    assert list((tmp_path / "data").iterdir()) == []
    with pytest.raises(DataError, match="CIFAR-10-C.tar is damaged.*get it anew"):
        load_cifar10c("snow", 2, tmp_path / "server", per_severity=COUNT)
    assert not (tmp_path / "server" / "CIFAR-10-C").exists()


def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(cifar10c, "URL", (tmp_path / "nothing.tar").as_uri())
    with pytest.raises(DataError, match="could not be downloaded from file:.*put it there by hand"):
        load_cifar10c("snow", 2, tmp_path / "data", download=True)


def test_available_wants_all_fifteen_and_the_labels(root):
    assert not cifar10c_available(root)
    empty = {name: np.zeros(0) for name in NAMES if name not in ("fog", "speckle_noise", "gaussian_blur", "saturate")}
    save(root / "CIFAR-10-C", **empty)
    assert cifar10c_available(root)
    (root / "CIFAR-10-C" / "labels.npy").unlink()
    assert not cifar10c_available(root)
