"""Does the adversary change style and keep content? Its features, decoded, beside other changes of the same size.

Every comparison is with the decoded *unchanged* features and not with the original image, so that the decoder's own
error is not counted as the adversary's. And it is made at equal pixel change: image by image, each control is made as
strong as the adversary was on that image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.appearance import change_as_much, luma, measure, pixel_change, to_grey_levels
from advbn_lib.ascent import Steps, ascend
from advbn_lib.data.images import ImageSet
from advbn_lib.decoder import Autoencoder, DecoderConfig, train_decoder
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.perturbations import ChannelStatistics
from advbn_lib.progress import progress

Table = dict[str, dict[str, float]]
BLUR = 2.0  # pixels: standard deviation of the grey blur
MOST = {"grey_blur": 1.0}  # greatest strength: past a blurred copy there is no blur
# What the controls of equal size are, for tables and captions.
CONTROLS = {
    "random_as_large": "random factors of the same set, decoded, and moved towards or off the unchanged image",
    "noise": "Gaussian noise on every pixel and colour",
    "pixel_attack": "one step along the sign of the pixels' gradient (l-infinity)",
    "grey_blur": "towards a grey, blurred copy, at most all the way: smaller where the adversary changes more",
    "colour_cast": "one random colour added everywhere: the purest change of style",
}


@dataclass(frozen=True)
class StudyConfig:
    """What is measured.

    Args:
        layers: where features are taken, changed and decoded.
        epsilons: sizes of the adversary's interval; 1.1 is the paper's.
        step_size, steps: of its ascent.
        batch_size: images that share a perturbation.
        batches: how many batches of test images, drawn by the seed.
        decoder: its ``layer`` is replaced by each of ``layers``.
    """

    layers: tuple[str, ...] = ("layer1", "layer2")
    epsilons: tuple[float, ...] = (1.1, 0.5)
    step_size: float = 0.2
    steps: int = 6
    batch_size: int = 128
    batches: int = 8
    decoder: DecoderConfig = DecoderConfig()

    def group(self, layer: str, eps: float) -> str:
        """Name of the table of a layer and an eps: ``appearance``, then e.g. ``appearance_layer2_eps_0.5``."""
        parts = ["appearance"]
        if layer != self.layers[0]:
            parts.append(layer)
        if eps != self.epsilons[0]:
            parts.append(f"eps_{eps:g}")
        return "_".join(parts)


def study(
    network: nn.Module, train_set: ImageSet, test_set: ImageSet, config: StudyConfig, seed: int = 0,
    decoders_folder: Path | None = None, show_progress: bool = True,
) -> tuple[dict[str, Table], dict[str, list[float]]]:  # fmt: skip
    """Train a decoder for each layer, and measure.

    Args:
        network: the starting network, on its device; it is not changed.
        decoders_folder: see :func:`advbn_lib.decoder.train_decoder`.

    Returns:
        ``tables[group][condition][measure]`` with the means over all images, see :meth:`StudyConfig.group` and
        :func:`compare`; and the squared error of each decoder by epoch.
    """
    tables, curves = {}, {}
    for layer in config.layers:
        decoder = replace(config.decoder, layer=layer)
        autoencoder, history = train_decoder(network, train_set, decoder, seed, decoders_folder, show_progress)
        curves[f"decoder_error_{layer}"] = [error for error, _ in history.losses]
        for eps in config.epsilons:
            group = config.group(layer, eps)
            batches = list(_batches(test_set, config.batch_size, config.batches, seed, autoencoder))
            parts = [
                compare(autoencoder, images, labels, eps, config.step_size, config.steps, seed + number)
                for number, (images, labels) in enumerate(progress(batches, group, show_progress))
            ]
            tables[group] = _means(parts)
    return tables, curves


def compare(
    autoencoder: Autoencoder, images: Tensor, labels: Tensor, eps: float = 1.1, step_size: float = 0.2, steps: int = 6,
    seed: int = 0,
) -> dict[str, dict[str, Tensor]]:  # fmt: skip
    """One batch under the adversary and its controls.

    Args:
        images, labels: in [0,1] (N,3,H,W), and (N,).
        seed: of random factors, noise and colours.

    Returns:
        ``results[condition][measure]``, a tensor (N,) each. The conditions are those of :func:`changed_images`. The
        measures are those of :data:`advbn_lib.appearance.MEASURES`, from the decoded unchanged features to the
        condition (for ``unchanged``: from the original images, so the decoder's own error), and ``accuracy``: whether
        the network is right about the image. Where features were decoded, ``features_accuracy`` is the same for the
        features themselves, and ``misfit`` says how well the image shows them, see :func:`misfit`. The controls of
        equal size also have ``adversary_moves_style_more`` (by ``style_change``), ``adversary_keeps_edges_more`` (by
        ``edge_correlation``) and ``adversary_does_both``.
    """
    shown, features = changed_images(autoencoder, images, labels, eps, step_size, steps, seed)
    results = {}
    for name, after in shown.items():
        before = images if name == "unchanged" else shown["unchanged"]
        results[name] = {**measure(before, after), "accuracy": _right(autoencoder, after, labels)}
        if name in features:
            with torch.no_grad():
                answers = autoencoder.split.tail(features[name]).argmax(1)
            results[name]["features_accuracy"] = (answers == labels).float()
            results[name]["misfit"] = misfit(autoencoder, after, features[name])
    adversary = results["adversarial"]
    for name in CONTROLS:
        style = adversary["style_change"] > results[name]["style_change"]
        edges = adversary["edge_correlation"] > results[name]["edge_correlation"]
        results[name] |= {
            "adversary_moves_style_more": style.float(),
            "adversary_keeps_edges_more": edges.float(),
            "adversary_does_both": (style & edges).float(),
        }
    return results


def changed_images(
    autoencoder: Autoencoder, images: Tensor, labels: Tensor, eps: float = 1.1, step_size: float = 0.2, steps: int = 6,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """The images that :func:`compare` measures, on whole grey levels, and the features of those that were decoded.

    ``unchanged``, ``adversarial`` and ``random`` are decoded features. The attack is AdvBN's own, on the features,
    through the tail of the network in eval mode. The others are ``CONTROLS``: as large as the adversary's change of
    that image, where ``MOST`` lets them.
    """
    x, tail = autoencoder.encode(images), autoencoder.split.tail
    perturbation = ChannelStatistics(eps, autoencoder.split.nonnegative)
    attack = ascend(lambda z: cross_entropies(tail(z), labels), x, perturbation, Steps(steps, step_size))
    generator = torch.Generator(x.device).manual_seed(seed)
    features = {
        "unchanged": x,
        "adversarial": perturbation.apply(x, attack.delta),
        "random": perturbation.apply(x, perturbation.sample(x, generator)),
    }
    shown = {name: to_grey_levels(autoencoder.decode(values)) for name, values in features.items()}
    before = shown["unchanged"]
    size = pixel_change(before, shown["adversarial"])
    random = {"generator": generator, "device": before.device, "dtype": before.dtype}
    directions = {
        "random_as_large": shown["random"] - before,
        "noise": torch.randn(before.shape, **random),
        "pixel_attack": _gradient(autoencoder, before, labels).sign(),
        "grey_blur": _blurred(luma(before))[:, None] - before,
        "colour_cast": torch.randn(len(before), 3, 1, 1, **random).expand_as(before),
    }
    for name, direction in directions.items():
        shown[name] = to_grey_levels(change_as_much(before, direction, size, MOST.get(name, 64.0)))
    return shown, features


@torch.no_grad()
def misfit(autoencoder: Autoencoder, images: Tensor, features: Tensor) -> Tensor:
    """How far the features of decoded images (N,3,H,W) are from those that were decoded (N,C,h,w): (N,), 0: the same.

    The length of the difference over the length of ``features``. Near 1 or above, the image does not show them.
    """
    difference = (autoencoder.encode(images) - features).flatten(1).norm(dim=1)
    return difference / features.flatten(1).norm(dim=1).clamp_min(1e-12)


def _batches(
    test_set: ImageSet, size: int, count: int, seed: int, autoencoder: Autoencoder
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(autoencoder.parameters()).device
    drawn = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(seed))[: size * count]
    for chosen in drawn.split(size):
        yield test_set.images[chosen].to(device).float() / 255, test_set.labels[chosen].to(device)


def _gradient(autoencoder: Autoencoder, images: Tensor, labels: Tensor) -> Tensor:
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(autoencoder.classify(images), labels, reduction="sum")
        return torch.autograd.grad(loss, images)[0]


def _blurred(maps: Tensor) -> Tensor:
    """N,H,W after a Gaussian blur with reflected borders."""
    reach = int(3 * BLUR)
    bell = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * BLUR**2))
    bell = (bell / bell.sum()).to(maps)
    padded = F.pad(maps[:, None], [reach] * 4, mode="reflect")
    return F.conv2d(padded, torch.outer(bell, bell)[None, None])[:, 0]


@torch.no_grad()
def _right(autoencoder: Autoencoder, images: Tensor, labels: Tensor) -> Tensor:
    return (autoencoder.classify(images).argmax(1) == labels).float()


def _means(parts: list[dict[str, dict[str, Tensor]]]) -> Table:
    table: Table = defaultdict(dict)
    for condition, measures in parts[0].items():
        for name in measures:
            values = torch.cat([part[condition][name] for part in parts])
            table[condition][name] = values.double().mean().item()
    return dict(table)
