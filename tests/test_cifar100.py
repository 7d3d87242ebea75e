"""CIFAR-100: read whole and right, or refused with a message that says how to mend it."""

import hashlib
import http.server
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR100

from advbn_lib.data import DataError, load_images
from advbn_lib.data.cifar100 import load_cifar100

COUNTS = {"train": 150, "test": 50}


def content(split: str) -> dict[str, object]:
    generator = np.random.default_rng(len(split))
    count = COUNTS[split]
    return {
        "filenames": [f"{i}.png" for i in range(count)],
        "batch_label": split,
        "fine_labels": ((7 * np.arange(count)) % 100).tolist(),
        "coarse_labels": (np.arange(count) % 20).tolist(),
        "data": generator.integers(0, 256, (count, 3072), dtype=np.uint8),
    }


META = {"fine_label_names": [f"thing {i}" for i in range(100)], "coarse_label_names": [f"kind {i}" for i in range(20)]}


@pytest.fixture
def official(tmp_path, monkeypatch) -> Path:
    """The published form with a few made-up images, and torchvision's checksums made to fit."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in COUNTS:
        write(folder / name, content(name))
    write(folder / "meta", META)
    sign(folder, monkeypatch)
    return folder


def write(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def sign(folder: Path, monkeypatch) -> None:
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5["meta"]})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(bytes(changed))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("inside", ["", "cifar100"])
def test_the_official_form_is_read_as_it_is(official, tmp_path, split, inside):
    if inside:
        (tmp_path / inside).mkdir()
        official.rename(tmp_path / inside / official.name)
    images, expected = load_cifar100(split, tmp_path), content(split)
    assert torch.equal(images.images, torch.from_numpy(expected["data"]).view(-1, 3, 32, 32))
    assert images.labels.tolist() == expected["fine_labels"] and images.labels.dtype == torch.int64
    assert images.classes == tuple(META["fine_label_names"]) and images.name == f"cifar100/{split}"


def test_torchvision_reads_the_same(official, tmp_path):
    theirs, ours = CIFAR100(tmp_path, train=False), load_cifar100("test", tmp_path)
    assert torch.equal(ours.images.permute(0, 2, 3, 1), torch.from_numpy(theirs.data))
    assert ours.labels.tolist() == theirs.targets and list(ours.classes) == theirs.classes


def test_it_is_a_data_set_by_name(official, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVBN_DATA", str(tmp_path))
    assert len(load_images("cifar100", "test")) == COUNTS["test"]


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("spoil", [Path.unlink, truncate, alter], ids=["missing", "truncated", "altered"])
@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_a_bad_file_is_named_with_a_way_to_mend_it(official, tmp_path, name, spoil, download):
    spoil(official / name)
    for split in COUNTS:
        with pytest.raises(DataError, match=rf"python/{name} is .*remove .*download"):
            load_cifar100(split, tmp_path, download)


class Bomb:
    """A pickle that does something when it is read."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_a_file_that_is_not_the_published_one_is_not_unpickled(official, tmp_path):
    trace = tmp_path / "was read"
    write(official / "test", Bomb(trace))
    with pytest.raises(DataError, match="test is damaged"):
        load_cifar100("test", tmp_path)
    assert not trace.exists()
    pickle.loads((official / "test").read_bytes())
    assert trace.exists()  # the test can fail


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("test", lambda c: {"data": c["data"], "labels": c["fine_labels"]}, "'labels', but no 'fine_labels'"),
        ("test", lambda c: {"fine_labels": c["fine_labels"]}, "but no 'data'"),
        ("test", lambda c: c["fine_labels"], "test holds list, but no 'data'"),
        ("test", lambda c: {**c, "data": c["data"][:, :-1]}, "not rows of 3x32x32 bytes"),
        ("test", lambda c: {**c, "data": c["data"].astype(np.float32)}, "not rows of 3x32x32 bytes"),
        ("test", lambda c: {**c, "fine_labels": c["fine_labels"][:-1]}, "50 images but .*49"),
        ("test", lambda c: {**c, "fine_labels": [100] * 50}, "labels go from 100 to 100"),
        ("meta", lambda c: {"label_names": c["fine_label_names"]}, "'label_names', but no 'fine_label_names'"),
        ("meta", lambda c: {"fine_label_names": c["fine_label_names"][:20]}, "meta names 20 classes, not 100"),
    ],
    ids=["labels", "no-data", "list", "columns", "floats", "fewer", "high", "meta", "few-names"],
)  # fmt: skip
def test_another_content_is_refused_even_if_its_checksum_fits(official, tmp_path, monkeypatch, name, spoil, message):
    write(official / name, spoil(content(name) if name in COUNTS else dict(META)))
    sign(official, monkeypatch)
    with pytest.raises(DataError, match=message):
        load_cifar100("test", tmp_path)


def test_a_truncated_pickle_is_refused_even_if_its_checksum_fits(official, tmp_path, monkeypatch):
    truncate(official / "test")
    sign(official, monkeypatch)
    with pytest.raises(DataError, match="test is no whole pickle.*remove"):
        load_cifar100("test", tmp_path)


@pytest.fixture
def website(official, tmp_path, monkeypatch) -> Path:
    """The official archive behind a web address of this machine."""
    archive = tmp_path / "site" / CIFAR100.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(official, CIFAR100.base_folder)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR100.filename}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield archive
    server.shutdown()
    server.server_close()


def test_what_is_not_there_is_downloaded_once(website, tmp_path):
    root = tmp_path / "new"
    assert len(load_cifar100("test", root)) == COUNTS["test"]
    website.unlink()
    assert len(load_cifar100("train", root)) == COUNTS["train"]


def test_a_download_that_broke_off_is_refused_and_mended_by_the_next(website, tmp_path):
    root, whole = tmp_path / "new", website.read_bytes()
    website.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="could not be downloaded.*ADVBN_DATA"):
        load_cifar100("test", root)
    website.write_bytes(whole)
    assert len(load_cifar100("test", root)) == COUNTS["test"]


def test_without_internet_the_message_says_where_to_put_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/nothing")
    with pytest.raises(DataError, match="could not be downloaded.*put cifar-100-python there"):
        load_cifar100("test", tmp_path)
    with pytest.raises(DataError, match="is missing"):
        load_cifar100("test", tmp_path, download=False)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
        load_cifar100("val", tmp_path)
