"""MNIST: read whole and right, or refused with a message that says how to mend it."""

import gzip
import hashlib
import http.server
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder, tiny_images
from torchvision.datasets import MNIST

from advbn_lib.data import DataError, mnist
from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.mnist import grey_digits, load_mnist

COUNTS = {"train": 40, "test": 20}
RAW = Path("MNIST") / "raw"


def content(split: str) -> tuple[np.ndarray, np.ndarray]:
    count = COUNTS[split]
    random = np.random.default_rng(count)
    return random.integers(0, 256, (count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    """In the published layout: 0, 0, 8, the number of dimensions, the sizes, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def sign(folder: Path, monkeypatch, site: str = "http://127.0.0.1:9/") -> None:
    """Make the known checksums those of the packed files in a folder."""
    names = {split: [name for name, _ in files] for split, files in mnist.FILES.items()}
    files = {
        split: tuple((name, md5(gzip.decompress((folder / f"{name}.gz").read_bytes()))) for name in listed)
        for split, listed in names.items()
    }
    monkeypatch.setattr(mnist, "FILES", files)
    packed = [f"{name}.gz" for listed in names.values() for name in listed]
    monkeypatch.setattr(MNIST, "resources", [(name, md5((folder / name).read_bytes())) for name in packed])
    monkeypatch.setattr(MNIST, "mirrors", [site])


@pytest.fixture
def official(tmp_path, monkeypatch) -> Path:
    """A folder with a few made-up digits in the published form, and checksums made to fit."""
    (tmp_path / RAW).mkdir(parents=True)
    for split, listed in mnist.FILES.items():
        for (name, _), array in zip(listed, content(split)):
            (tmp_path / RAW / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    sign(tmp_path / RAW, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("form", ["packed", "plain", "packed again"])
@pytest.mark.parametrize("inside", ["", "mnist"])
@pytest.mark.parametrize("split", COUNTS)
def test_the_official_form_is_read_as_it_is(official, split, inside, form):
    for path in (official / RAW).iterdir():
        unpacked = gzip.decompress(path.read_bytes())
        if form == "plain":
            path.with_suffix("").write_bytes(unpacked)
            path.unlink()
        elif form == "packed again":
            path.write_bytes(gzip.compress(unpacked, compresslevel=1))
    if inside:
        (official / inside).mkdir()
        (official / "MNIST").rename(official / inside / "MNIST")
    images, (pixels, labels) = load_mnist(split, official, download=False), content(split)
    assert images.name == f"mnist/{split}" and images.classes == tuple("0123456789")
    assert images.images.shape == (COUNTS[split], 3, 32, 32) and images.labels.dtype == torch.int64
    assert images.labels.tolist() == labels.tolist()
    for channel in range(3):
        assert np.array_equal(images.images[:, channel, 2:30, 2:30].numpy(), pixels)
    border = images.images.clone()
    border[:, :, 2:30, 2:30] = 0
    assert not border.any()


def test_torchvision_reads_the_same(official):
    for path in (official / RAW).iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    theirs, (grey, labels) = MNIST(str(official), train=False), grey_digits("test", official)
    assert torch.equal(grey[:, 2:30, 2:30], theirs.data) and torch.equal(labels, theirs.targets)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_digits(path: Path) -> None:
    path.write_bytes(gzip.compress(idx(255 - content("test")[0])))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, r"t10k-images-idx3-ubyte.gz is no whole gzip file.*remove .*download"),
        (lambda path: path.write_bytes(b""), r"t10k-images-idx3-ubyte.gz is (no whole gzip|damaged).*remove"),
        (lambda path: path.write_bytes(b"<html>moved</html>"), r"is no whole gzip file.*remove"),
        (other_digits, r"t10k-images-idx3-ubyte.gz is damaged or altered: .* bytes with MD5 .*, expected .*remove"),
    ],
    ids=["truncated", "empty", "page", "altered"],
)
def test_a_damaged_file_is_named_with_what_differs_and_a_way_to_mend_it(official, spoil, message):
    spoil(official / RAW / "t10k-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=message):
        load_mnist("test", official)
    assert len(load_mnist("train", official)) == COUNTS["train"], "the other files are whole"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], "is no IDX file of bytes, or not a whole one"),
        (lambda data: data + b"\0", "is no IDX file of bytes, or not a whole one"),
        (lambda data: data[:9], "is no IDX file of bytes, or not a whole one"),
        (lambda data: b"\0\0\x0d" + data[3:], "is no IDX file of bytes"),
        (lambda data: b"", "is no IDX file of bytes"),
        (lambda data: idx(np.zeros((20, 27, 28), np.uint8)), r"have shape \(20, 27, 28\).*expected N,28,28"),
        (lambda data: idx(np.zeros((19, 28, 28), np.uint8)), r"labels \(20,\), expected"),
    ],
    ids=["short", "long", "head", "floats", "empty", "size", "fewer"],
)
def test_another_content_is_refused_even_if_its_checksum_fits(official, monkeypatch, spoil, message):
    path = official / RAW / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(spoil(gzip.decompress(path.read_bytes()))))
    sign(official / RAW, monkeypatch)
    with pytest.raises(DataError, match=message):
        load_mnist("test", official)


@pytest.fixture
def website(official, monkeypatch) -> Path:
    """The official files behind a web address of this machine."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(official / RAW))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/", f"http://127.0.0.1:{server.server_port}/"])
    yield official / RAW
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("inside", ["", "mnist"])
def test_what_is_not_there_is_downloaded_once_from_the_mirror_that_answers(website, tmp_path_factory, inside):
    root = tmp_path_factory.mktemp("new")
    if inside:
        (root / inside).mkdir()
    assert len(load_mnist("test", root)) == COUNTS["test"]
    there = sorted(path.name for path in (root / inside / RAW).iterdir())
    assert there == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    for path in website.iterdir():
        path.unlink()
    assert len(load_mnist("test", root)) == COUNTS["test"]


def test_a_download_that_broke_off_is_refused_and_mended_by_the_next(website, tmp_path_factory):
    root, path = tmp_path_factory.mktemp("new"), website / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    truncate(path)
    with pytest.raises(DataError, match="could not be downloaded.*ADVBN_DATA"):
        load_mnist("test", root)
    path.write_bytes(whole)
    assert len(load_mnist("test", root)) == COUNTS["test"]


def test_without_internet_the_message_says_where_to_put_the_data(official, tmp_path_factory):
    root = tmp_path_factory.mktemp("new")
    with pytest.raises(DataError, match="could not be downloaded.*put it there"):
        load_mnist("test", root)
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz is missing: put it there"):
        load_mnist("train", root, download=False)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'train' or 'test', got 'extra'"):
        load_mnist("extra", tmp_path)


@pytest.mark.parametrize("missing", [0, 4, 9])
def test_a_set_that_lacks_a_class_is_refused(missing):
    images = tiny_images(100)
    assert require_all_classes(images) is images
    kept = images.labels != missing
    fewer = type(images)("tiny/fewer", images.images[kept], images.labels[kept], *_rest(images))
    with pytest.raises(DataError, match=f"tiny/fewer: no image of {missing} among its 90 images: take more"):
        require_all_classes(fewer)
    with pytest.raises(DataError, match="no image of 5, 6, 7, 8, 9 among its 5 images"):
        require_all_classes(images.first(5))


def _rest(images) -> tuple:
    return images.classes, images.mean, images.std


def test_the_real_digits_are_the_published_ones():
    if not (data_folder() / "mnist").is_dir():
        pytest.skip("ADVBN_DATA holds no mnist")
    images = load_mnist("test", download=False)
    assert torch.bincount(images.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert images.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert len(load_mnist("train", download=False)) == 60_000
