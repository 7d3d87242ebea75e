"""SVHN: read whole and right, or refused with a message that says how to mend it."""

import builtins
import hashlib
import http.server
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import SVHN

from advbn_lib.data import DataError, load_images
from advbn_lib.data.svhn import load_svhn

scipy_io = pytest.importorskip("scipy.io")
COUNTS = {"train": 60, "test": 30}
NAMES = {split: f"{split}_32x32.mat" for split in COUNTS}


def content(split: str) -> dict[str, np.ndarray]:
    """In the published layout: 32,32,3,N bytes, and N,1 labels from 1 to 10."""
    count = COUNTS[split]
    pixels = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    return {"X": pixels, "y": (1 + np.arange(count, dtype=np.uint8) % 10)[:, None]}


def write(path: Path, value: dict[str, object]) -> None:
    scipy_io.savemat(path, value, do_compression=True)


@pytest.fixture
def official(tmp_path, monkeypatch) -> Path:
    """A folder with a few made-up images in the published form, and torchvision's checksums made to fit."""
    for split, name in NAMES.items():
        write(tmp_path / name, content(split))
    sign(tmp_path, monkeypatch)
    return tmp_path


def sign(folder: Path, monkeypatch, site: str = "http://127.0.0.1:9/") -> None:
    listed = {
        split: [site + name, name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
        for split, name in NAMES.items()
    }
    monkeypatch.setattr(SVHN, "split_list", listed)


@pytest.mark.parametrize("inside", ["", "svhn"])
@pytest.mark.parametrize("split", COUNTS)
def test_the_official_form_is_read_as_it_is(official, split, inside):
    if inside:
        (official / inside).mkdir()
        (official / NAMES[split]).rename(official / inside / NAMES[split])
    images, expected = load_svhn(split, official, download=False), content(split)
    assert images.name == f"svhn/{split}" and images.classes == tuple("0123456789")
    assert images.images.shape == (COUNTS[split], 3, 32, 32) and images.images.is_contiguous()
    for number in (0, 7):
        assert np.array_equal(images.images[number].permute(1, 2, 0).numpy(), expected["X"][..., number])
    assert images.labels[:12].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2], "class 10 of the file is the digit 0"


def test_torchvision_reads_the_same(official):
    theirs, ours = SVHN(str(official), split="test"), load_svhn("test", official)
    assert np.array_equal(ours.images.numpy(), theirs.data) and ours.labels.tolist() == theirs.labels.tolist()


def test_it_is_a_data_set_by_name(official, monkeypatch):
    monkeypatch.setenv("ADVBN_DATA", str(official))
    assert len(load_images("svhn", "test")) == COUNTS["test"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(bytes(changed))


@pytest.mark.parametrize(
    "spoil", [truncate, alter, lambda path: path.write_bytes(b"")], ids=["truncated", "altered", "empty"]
)
def test_a_damaged_file_is_named_with_what_differs_and_a_way_to_mend_it(official, spoil):
    path = official / NAMES["test"]
    spoil(path)
    found, expected = hashlib.md5(path.read_bytes()).hexdigest(), SVHN.split_list["test"][2]
    with pytest.raises(DataError, match=f"test_32x32.mat is damaged.*{found}, expected {expected}; remove .*download"):
        load_svhn("test", official)
    assert len(load_svhn("train", official)) == COUNTS["train"], "the other file is whole"


@pytest.mark.parametrize("cut", [0.02, 0.5, 0.98])
def test_a_truncated_file_is_refused_even_if_its_checksum_fits(official, monkeypatch, cut):
    path = official / NAMES["test"]
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    sign(official, monkeypatch)
    with pytest.raises(DataError, match="test_32x32.mat (is no whole MATLAB file|holds .* but no array).*remove"):
        load_svhn("test", official)


def test_a_file_of_another_kind_is_refused_even_if_its_checksum_fits(official, monkeypatch):
    for other in (b"", b"<html>moved</html>" * 20, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(400)):
        (official / NAMES["test"]).write_bytes(other)
        sign(official, monkeypatch)
        with pytest.raises(DataError, match="is no whole MATLAB file"):
            load_svhn("test", official)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: {"X": c["X"]}, "holds 'X', but no array 'y'"),
        (lambda c: {"images": c["X"], "y": c["y"]}, "'images', 'y', but no array 'X'"),
        (lambda c: {**c, "X": c["X"].transpose(3, 0, 1, 2)}, "shape 32,32,3,N"),
        (lambda c: {**c, "X": c["X"][:, :, :1]}, "shape 32,32,3,N"),
        (lambda c: {**c, "X": c["X"][..., 0]}, "shape 32,32,3,N"),
        (lambda c: {**c, "X": c["X"] / 255}, "no array of bytes"),
        (lambda c: {**c, "y": c["y"] - 1}, "labels go from 0 to 9.*should be 1 to 10"),
        (lambda c: {**c, "y": c["y"] + 1}, "labels go from 2 to 11.*should be 1 to 10"),
        (lambda c: {**c, "y": c["y"][:-1]}, "30 images but .*29"),
        (lambda c: {"X": c["X"][..., :0], "y": c["y"][:0]}, "no images|shape 32,32,3,N"),
    ],
    ids=["no-y", "no-X", "order", "grey", "one", "floats", "low", "high", "fewer", "none"],
)  # fmt: skip
def test_another_content_is_refused_even_if_its_checksum_fits(official, monkeypatch, spoil, message):
    write(official / NAMES["test"], spoil(content("test")))
    sign(official, monkeypatch)
    with pytest.raises(DataError, match=message):
        load_svhn("test", official)


@pytest.fixture
def website(official, tmp_path_factory, monkeypatch) -> Path:
    """The official files behind a web address of this machine."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(official))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    sign(official, monkeypatch, f"http://127.0.0.1:{server.server_port}/")
    yield official
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("inside", ["", "svhn"])
def test_what_is_not_there_is_downloaded_once(website, tmp_path_factory, inside):
    root = tmp_path_factory.mktemp("new")
    if inside:
        (root / inside).mkdir()
    assert len(load_svhn("test", root)) == COUNTS["test"]
    assert [path.name for path in (root / inside).iterdir()] == [NAMES["test"]]
    (website / NAMES["test"]).unlink()
    assert len(load_svhn("test", root)) == COUNTS["test"]


def test_a_download_that_broke_off_is_refused_and_mended_by_the_next(website, tmp_path_factory):
    root, path = tmp_path_factory.mktemp("new"), website / NAMES["test"]
    whole = path.read_bytes()
    truncate(path)
    with pytest.raises(DataError, match="could not be downloaded.*ADVBN_DATA"):
        load_svhn("test", root)
    path.write_bytes(whole)
    assert len(load_svhn("test", root)) == COUNTS["test"]


def test_without_internet_the_message_says_where_to_put_the_data(official, tmp_path_factory):
    root = tmp_path_factory.mktemp("new")
    with pytest.raises(DataError, match="could not be downloaded.*put it there"):
        load_svhn("test", root)
    with pytest.raises(DataError, match="test_32x32.mat is missing: put it there"):
        load_svhn("test", root, download=False)


def test_without_scipy_the_message_says_what_to_install(official, monkeypatch):
    original = builtins.__import__

    def without_scipy(name, *rest, **options):
        if name.startswith("scipy"):
            raise ModuleNotFoundError(name)
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(DataError, match="pip install scipy"):
        load_svhn("test", official)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test', got 'extra'"):
        load_svhn("extra", tmp_path)


def test_labels_are_whole_numbers(official):
    assert load_svhn("train", official).labels.dtype == torch.int64
