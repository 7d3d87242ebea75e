"""Test sets of decoded worst-case features: CIFAR-10-AdvBN, made as ImageNet-AdvBN is.

Source: Shu et al., NeurIPS 2021, and the released code's script for ImageNet-AdvBN. As there, the loss that the
adversary climbs is a classifier's on the *decoded* image, normalised and not cut to [0,1]: the perturbation is of
features, the harm is to an image. The batches are read in class order, so that nearly all images that share a
perturbation are of one class. What differs: there the encoder is a VGG-19 of its own and the classifier another one;
here the encoder is the lower half of the classifier.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advbn_lib import __version__
from advbn_lib.ascent import Ascended, Steps, ascend
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.decoder import Autoencoder, DecoderConfig, train_decoder
from advbn_lib.files import sha256
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.perturbations import ChannelStatistics
from advbn_lib.progress import progress
from advbn_lib.provenance import state_checksum, versions

FORMAT = 1
CONDITIONS = ("adversarial", "identical")
FILE = re.compile(r"(?:adversarial|identical)/[\w-]+/\d+\.png")


@dataclass(frozen=True)
class ExportConfig:
    """How the images are made; the values of the released script, but for the network and the layer.

    Args:
        layer: whose features are perturbed and decoded.
        eps, step_size, steps: of the adversary.
        batch_size: images that share a perturbation.
        order: ``"class"``: batches in class order, as released; ``"file"``: in the data set's own order, classes mixed.
        decoder: its ``layer`` must be ``layer``.
    """

    layer: str = "layer1"
    eps: float = 1.1
    step_size: float = 0.2
    steps: int = 6
    batch_size: int = 32
    order: Literal["class", "file"] = "class"
    decoder: DecoderConfig = DecoderConfig()

    def __post_init__(self):
        if self.order not in ("class", "file"):
            raise ValueError(f"order is 'class' or 'file', got {self.order!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.decoder.layer != self.layer:
            raise ValueError(
                f"the decoder is for {self.decoder.layer!r}, the attack at {self.layer!r}: they must agree"
            )


def attack_through_decoder(
    autoencoder: Autoencoder, features: Tensor, labels: Tensor, perturbation: ChannelStatistics, steps: Steps
) -> Ascended:
    """The factors that are worst for the classifier's view of the decoded image.

    The same ascent and the same set as AdvBN's, but the loss goes on through the decoder: cross-entropy of the frozen
    network on the decoded image, normalised and not cut to [0,1].

    Args:
        features: N,C,h,w of the autoencoder's layer.
        labels: N.
    """
    return ascend(
        lambda x: cross_entropies(autoencoder.classify(autoencoder(x)), labels), features, perturbation, steps
    )


def export(
    folder: Path, network: nn.Module, weights: dict[str, Any], train_set: ImageSet, test_set: ImageSet,
    config: ExportConfig = ExportConfig(), seed: int = 0, decoders_folder: Path | None = None,
    show_progress: bool = True,
) -> Path:  # fmt: skip
    """Write both conditions of a test set as PNGs, and ``manifest.json``.

    The layout is ``folder/<condition>/<class>/<index in the test set>.png``; the conditions are ``adversarial`` and
    ``identical``, the decoded *unchanged* features: what is lost there is the decoder's doing. The manifest holds the
    configuration, checksums of data, weights and every file, the factors of each batch, and a digest of itself. The
    folder appears when all is written.

    Args:
        folder: new, or empty.
        network: a classifier on its device; not changed.
        weights: what its weights are, for the manifest, as :func:`advbn_lib.running.start_network` says it.
        train_set: the decoder is trained on it.
        test_set: what is decoded.
        seed: of the decoder.
        decoders_folder: see :func:`advbn_lib.decoder.train_decoder`.

    Returns:
        The path of the manifest.

    Raises:
        FileExistsError: the folder is there and not empty.
    """
    with _new_folder(folder) as unfinished:  # first: a folder in the way is told before the work
        autoencoder, _ = train_decoder(network, train_set, config.decoder, seed, decoders_folder, show_progress)
        order = torch.arange(len(test_set))
        if config.order == "class":
            order = test_set.labels.cpu().argsort(stable=True)
        files, batches = [], []
        for number, chosen in enumerate(progress(order.split(config.batch_size), "export", show_progress)):
            shown, factors = _decoded(autoencoder, test_set, chosen, config)
            batches.append(factors)
            for condition, pictures in shown.items():
                files += _write(unfinished, condition, test_set, chosen, pictures, number)
        manifest = {
            "format": FORMAT,
            "name": f"{test_set.name}, decoded",
            "config": {**asdict(config), "seed": seed},
            "data": {s.name: {"images": len(s), "sha256": s.checksum} for s in (train_set, test_set)},
            "weights": {**weights, "sha256": state_checksum(network.state_dict())},
            "decoder": {"sha256": state_checksum(autoencoder.decoder.state_dict())},
            "versions": {**versions(), "advbn_lib": __version__},
            "classes": list(test_set.classes),
            "normalisation": {"mean": list(test_set.mean), "std": list(test_set.std)},
            "batches": batches,
            "files": files,
        }
        manifest = {**manifest, "digest": _digest(manifest)}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    return folder / "manifest.json"


def load_adversarial_images(folder: Path, condition: Literal["adversarial", "identical"] = "adversarial") -> ImageSet:
    """The images of one condition, in the order of the test set that they were made from; everything is checked.

    Raises:
        DataError: a file is missing, damaged or of another size; the message names it.
    """
    from PIL import Image

    if condition not in CONDITIONS:
        raise ValueError(f"condition is one of {', '.join(CONDITIONS)}, got {condition!r}")
    manifest = read_manifest(folder)
    rows = [row for row in manifest["files"] if row["file"].startswith(f"{condition}/")]
    rows.sort(key=lambda row: row["index"])
    pictures = []
    for row in rows:
        path = folder / row["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing: {_mend(folder)}")
        if sha256(path) != row["sha256"]:
            raise DataError(f"{path} is damaged or altered (its SHA-256 is not the manifest's): {_mend(folder)}")
        with Image.open(path) as picture:
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            pictures.append(pixels.view(picture.height, picture.width, 3).permute(2, 0, 1))
    if len({tuple(picture.shape) for picture in pictures}) > 1:
        raise DataError(f"{folder}: the images of {condition!r} are not all of one size: {_mend(folder)}")
    labels = torch.tensor([row["label"] for row in rows])
    mean, std = (tuple(manifest["normalisation"][name]) for name in ("mean", "std"))
    name = f"{manifest['name']} ({condition})"
    return ImageSet(name, torch.stack(pictures), labels, tuple(manifest["classes"]), mean, std)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export, checked against its digest; the files are not looked at.

    Raises:
        DataError: it is missing, damaged, edited or of another format.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {_mend(folder)}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON ({error}): {_mend(folder)}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of format {FORMAT}: {_mend(folder)}")
    if _digest({name: value for name, value in manifest.items() if name != "digest"}) != manifest.get("digest"):
        raise DataError(f"{path} was altered (its digest does not fit): {_mend(folder)}")
    strange = [row["file"] for row in manifest["files"] if not FILE.fullmatch(row["file"])]
    if strange:
        raise DataError(f"{path} names {strange[0]!r}, which is no file of an export: {_mend(folder)}")
    return manifest


def _decoded(
    autoencoder: Autoencoder, test_set: ImageSet, chosen: Tensor, config: ExportConfig
) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Both conditions of a batch as uint8 (N,3,H,W) on the CPU, and its factors."""
    device = next(autoencoder.parameters()).device
    pixels, labels = (
        test_set.images[chosen.to(test_set.images.device)],
        test_set.labels[chosen.to(test_set.labels.device)],
    )
    x = autoencoder.encode(pixels.to(device).float() / 255)
    perturbation = ChannelStatistics(config.eps, autoencoder.split.nonnegative)
    steps = Steps(config.steps, config.step_size)
    delta = attack_through_decoder(autoencoder, x, labels.to(device), perturbation, steps).delta
    shown = {"adversarial": perturbation.apply(x, delta), "identical": x}
    images = {name: (255 * autoencoder.decode(values)).round().to(torch.uint8).cpu() for name, values in shown.items()}
    names = ("mean_factor", "std_factor")
    factors = {name: [round(value, 6) for value in part.flatten().tolist()] for name, part in zip(names, delta)}
    return images, factors


def _write(
    folder: Path, condition: str, test_set: ImageSet, chosen: Tensor, pictures: Tensor, batch: int
) -> list[dict[str, Any]]:
    """Write a batch; returns its rows of the manifest."""
    from torchvision.io import encode_png

    rows = []
    for index, picture in zip(chosen.tolist(), pictures):
        label = int(test_set.labels[index])
        name = f"{condition}/{test_set.classes[label]}/{index:05d}.png"
        content = encode_png(picture).numpy().tobytes()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        rows.append({"file": name, "index": index, "label": label, "batch": batch, "sha256": digest})
    return rows


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, which takes its name when the block ends well and is removed if not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there and not an empty folder: name another one, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _mend(folder: Path) -> str:
    return f"make {folder} anew with: python -m advbn_lib export-advbn --out FOLDER"
