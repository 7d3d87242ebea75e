"""Data sets: read whole and right, or refused with a message that says how to mend it."""

import hashlib
import http.server
import json
import pickle
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_folder, tiny_images
from PIL import Image
from torchvision.datasets import CIFAR10

from advbn_lib.data import DATA_SETS, DataError, ImageSet, load_images
from advbn_lib.data.cifar10 import CLASSES, load_cifar10
from advbn_lib.data.digits import load_digits
from advbn_lib.data.images import data_root
from advbn_lib.models import CifarResNet, load_published_weights
from advbn_lib.weights import published_weights


def packed_pixels() -> np.ndarray:
    """10,000 made-up images (N,3,32,32), each different, cheap to compress."""
    index = np.arange(10_000)
    pixels = np.empty((10_000, 3, 32, 32), np.uint8)
    pixels[:, 0], pixels[:, 1] = (index % 256)[:, None, None], (index // 256)[:, None, None]
    pixels[:, 2] = np.arange(32)[:, None] * 4 + np.arange(32)[None, :] // 8  # tells rows from columns
    return pixels


def hexdigest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The test split in the packed form."""
    folder = tmp_path_factory.mktemp("packed") / "cifar10"
    folder.mkdir()
    pixels = packed_pixels()
    for i, part in enumerate(np.split(pixels, 10)):
        sheet = part.transpose(0, 2, 3, 1).reshape(25, 40, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(800, 1280, 3)
        Image.fromarray(sheet).save(folder / f"test_batch_{i}.webp", lossless=True, method=0)
    (folder / "labels.json").write_text(json.dumps({"labels": {"test_batch": (np.arange(10_000) % 10).tolist()}}))
    (folder / "array_checks.json").write_text(
        json.dumps({"sha256_of_uint8_10000x3072_array": {"test_batch": hexdigest(pixels.tobytes())}})
    )
    sign(folder)
    return folder


def sign(folder: Path) -> None:
    rows = [
        f"{hexdigest(path.read_bytes())}  {path.name}" for path in sorted(folder.iterdir()) if path.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("\n".join(rows) + "\n")


@pytest.fixture
def packed(whole, tmp_path) -> Path:
    """A copy to spoil: links to the files of :func:`whole`."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def replace(path: Path, content: bytes) -> None:
    """Other content for a file, without touching what it links to."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def truncate(path: Path) -> None:
    replace(path, path.read_bytes()[: path.stat().st_size // 2])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))


SPOIL = [Path.unlink, truncate, alter, lambda path: replace(path, b"")]
SPOILT = ["missing", "truncated", "altered", "empty"]


def test_packed_images_are_in_their_order_and_layout(packed):
    images = load_cifar10("test", packed.parent)
    assert torch.equal(images.images, torch.from_numpy(packed_pixels()))
    assert images.labels.tolist() == (np.arange(10_000) % 10).tolist()
    assert images.classes == CLASSES and images.name == "cifar10/test"


@pytest.mark.parametrize("spoil", SPOIL, ids=SPOILT)
@pytest.mark.parametrize("name", ["test_batch_7.webp", "labels.json", "array_checks.json"])
def test_a_bad_packed_file_is_named_with_a_way_to_mend_it(packed, name, spoil):
    spoil(packed / name)
    with pytest.raises(DataError, match=rf"{name}.*(copy|download)"):
        load_cifar10("test", packed.parent)


@pytest.mark.parametrize("spoil", SPOIL, ids=SPOILT)
def test_a_bad_list_of_checksums_is_refused(packed, spoil):
    spoil(packed / "SHA256SUMS")
    with pytest.raises(DataError, match=r"SHA256SUMS.*(copy|download)"):
        load_cifar10("test", packed.parent)


@pytest.mark.parametrize("kept", range(60, 130, 9))
def test_a_list_of_checksums_cut_anywhere_is_refused(packed, kept):
    replace(packed / "SHA256SUMS", (packed / "SHA256SUMS").read_bytes()[:kept])
    with pytest.raises(DataError, match=r"(copy|download)"):
        load_cifar10("test", packed.parent)


def test_exchanged_sheets_are_noticed_even_if_their_checksums_fit(packed):
    first, second = ((packed / f"test_batch_{i}.webp").read_bytes() for i in (0, 1))
    replace(packed / "test_batch_0.webp", second)
    replace(packed / "test_batch_1.webp", first)
    (packed / "SHA256SUMS").unlink()
    sign(packed)
    with pytest.raises(DataError, match="test_batch differ from array_checks.json"):
        load_cifar10("test", packed.parent)


def test_labels_that_are_too_few_are_refused(packed):
    replace(packed / "labels.json", json.dumps({"labels": {"test_batch": [0] * 9_999}}).encode())
    (packed / "SHA256SUMS").unlink()
    sign(packed)
    with pytest.raises(DataError, match="10000 images.*9999"):
        load_cifar10("test", packed.parent)


BATCH_NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.fixture
def official(tmp_path, monkeypatch) -> Path:
    """torchvision's form with 20 images a batch, and its checksums made to fit."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in BATCH_NAMES:
        batch = {
            "data": generator.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": generator.integers(0, 10, 20).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in BATCH_NAMES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return folder


def assert_is_the_official_set(images: ImageSet, folder: Path, names: list[str]) -> None:
    batches = [pickle.loads((folder / name).read_bytes()) for name in names]
    expected = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    assert torch.equal(images.images, torch.from_numpy(expected))
    assert images.labels.tolist() == sum((batch["labels"] for batch in batches), [])


def test_the_official_form_is_read_as_it_is(official):
    assert_is_the_official_set(load_cifar10("train", official.parent), official, BATCH_NAMES[:5])
    assert_is_the_official_set(load_cifar10("test", official.parent), official, ["test_batch"])


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("spoil", SPOIL, ids=SPOILT)
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_bad_official_file_is_named_with_a_way_to_mend_it(official, name, spoil, download):
    spoil(official / name)
    for split in ("train", "test"):
        with pytest.raises(DataError, match=rf"{name}.*(remove|download)"):
            load_cifar10(split, official.parent, download)


@pytest.fixture
def website(official, tmp_path, monkeypatch) -> Path:
    """The official archive behind a web address of this machine, and an empty folder to download it to."""
    archive = tmp_path / "site" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(official, CIFAR10.base_folder)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield archive
    server.shutdown()
    server.server_close()


def test_what_is_not_there_is_downloaded_once(website, official, tmp_path):
    root = tmp_path / "new"
    assert_is_the_official_set(load_cifar10("test", root), official, ["test_batch"])
    website.unlink()
    assert_is_the_official_set(load_cifar10("train", root), official, BATCH_NAMES[:5])


def test_a_download_that_broke_off_is_refused_and_mended_by_the_next(website, official, tmp_path):
    root, content = tmp_path / "new", website.read_bytes()
    website.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="could not be downloaded"):
        load_cifar10("test", root)
    website.write_bytes(content)
    assert_is_the_official_set(load_cifar10("test", root), official, ["test_batch"])


def test_without_internet_the_message_says_where_to_put_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
    with pytest.raises(DataError, match=r"could not be downloaded.*ADVBN_DATA"):
        load_cifar10("test", tmp_path)
    with pytest.raises(DataError, match="is missing"):
        load_cifar10("test", tmp_path, download=False)


def test_an_unknown_split_or_set_is_refused(packed):
    for load in (partial(load_cifar10, root=packed.parent), load_digits):
        with pytest.raises(ValueError, match="'train' or 'test', got 'val'"):
            load("val")
    with pytest.raises(DataError, match="no data set 'imagenet'.*cifar10, cifar100, colour_mnist"):
        load_images("imagenet", "test")


def test_the_environment_names_the_folder(packed, monkeypatch):
    monkeypatch.setenv("ADVBN_DATA", str(packed.parent))
    assert data_root() == packed.parent
    assert len(load_images("cifar10", "test")) == 10_000
    monkeypatch.delenv("ADVBN_DATA")
    assert data_root() == Path.home() / ".cache" / "advbn_lib"


def test_digits_are_fixed_balanced_and_split():
    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert (len(train), len(test)) == (1297, 500) and train.images.shape[1:] == (3, 32, 32)
    assert train.checksum == load_digits("train").checksum
    assert train.labels.bincount().min() > 100 and test.labels.bincount().min() > 30
    assert train.images.amin() == 0 and train.images.amax() == 255
    assert torch.equal(train.images[:, 0], train.images[:, 2])
    both = {image.numpy().tobytes() for image in (*train.images, *test.images)}
    assert len(both) == 1797  # no image is in both


def test_digits_need_no_order_of_their_own():
    """Labels belong to their images: a nearest-neighbour rule does well."""
    train, test = (load_digits(split) for split in ("train", "test"))
    distance = torch.cdist(test.images[:, 0].flatten(1).float(), train.images[:, 0].flatten(1).float())
    assert (train.labels[distance.argmin(1)] == test.labels).float().mean() > 0.95


GOOD = {"images": torch.zeros(4, 3, 2, 2, dtype=torch.uint8), "labels": torch.arange(4), "classes": tuple("abcd")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 2, 2)}, "uint8"),
        ({"images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8)}, "N,3,H,W"),
        ({"labels": torch.arange(3)}, r"4 images but \(3,\) labels"),
        ({"labels": torch.tensor([0, 1, 2, 4])}, "from 0 to 4, but there are 4 classes"),
        ({"labels": torch.tensor([0, 1, -1, 3])}, "from -1 to 3"),
        ({"images": torch.zeros(0, 3, 2, 2, dtype=torch.uint8), "labels": torch.arange(0)}, "no images"),
    ],
)
def test_a_set_that_does_not_fit_together_is_refused(change, message):
    with pytest.raises(DataError, match=f"mine: .*{message}"):
        ImageSet("mine", **{**GOOD, **change}, mean=(0, 0, 0), std=(1, 1, 1))


def test_the_first_images_keep_their_order_and_too_many_are_refused():
    images = tiny_images(20)
    assert torch.equal(images.first(7).images, images.images[:7]) and torch.equal(
        images.first(7).labels, images.labels[:7]
    )
    assert images.first(None) is images
    assert torch.equal(images.first(7, 5).images, images.images[5:12])
    assert torch.equal(images.first(None, 15).labels, images.labels[15:])
    for count, start in ((0, 0), (-1, 0), (21, 0), (6, 15), (3, -1), (None, 20)):
        with pytest.raises(DataError, match="asked for images .*, but it has 20"):
            images.first(count, start)


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_the_parts_share_the_images_out(parts):
    images = tiny_images(20)
    chosen = [images.part(index, parts) for index in range(parts)]
    assert sum(len(part) for part in chosen) == 20
    assert max(len(part) for part in chosen) - min(len(part) for part in chosen) <= 1
    for index, part in enumerate(chosen):
        assert torch.equal(part.images, images.images[index::parts]) and torch.equal(
            part.labels, images.labels[index::parts]
        )


@pytest.mark.parametrize(("index", "parts"), [(3, 3), (-1, 3), (0, 0), (0, 21)])
def test_a_part_that_is_not_there_is_refused(index, parts):
    with pytest.raises(DataError, match=f"no part {index} of {parts} of its 20 images"):
        tiny_images(20).part(index, parts)


def test_the_checksum_notices_one_pixel_and_one_label():
    images, pixel, label = (tiny_images(20) for _ in range(3))
    pixel.images[3, 1, 2, 2] ^= 1
    label.labels[5] = (label.labels[5] + 1) % 10
    assert images.checksum == tiny_images(20).checksum
    assert len({images.checksum, pixel.checksum, label.checksum}) == 3


def test_normalise_is_by_channel():
    images = tiny_images(4)
    expected = torch.stack([(images.images[:, c] / 255 - images.mean[c]) / images.std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(images.normalise(images.images / 255), expected)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_real_cifar10_is_whole(split):
    images = load_cifar10(split, data_folder())
    per_class = len(images) // 10
    assert len(images) == {"train": 50_000, "test": 10_000}[split]
    assert images.labels.bincount().tolist() == [per_class] * 10
    if split == "train":
        np.testing.assert_allclose(images.images.double().mean((0, 2, 3)) / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)


def test_the_published_network_reads_the_real_cifar10():
    folder = data_folder()
    test = load_cifar10("test", folder).first(1000)
    network = CifarResNet(20).eval()
    load_published_weights(network, published_weights("resnet20", folder))
    with torch.no_grad():
        right = network(test.normalise(test.images / 255)).argmax(1) == test.labels
    assert right.float().mean() > 0.9


def test_every_named_set_can_be_loaded_by_its_name():
    pacs = {f"pacs/{domain}" for domain in ("photo", "art_painting", "cartoon", "sketch")}
    levels = {
        f"colour_mnist/{level}"
        for level in ("0.005", "0.02", "0.025", "0.03", "0.035", "0.04", "0.045", "0.05", "unbiased")
    }
    assert (
        set(DATA_SETS) == {"cifar10", "cifar100", "digits", "mnist", "smiles", "svhn", "tiny_imagenet"} | pacs | levels
    )
