"""Where to cut a generator's styles into content and style, by measurement: label leakage and colour transfer.

Source: Gowal et al. (AdvMix, CVPR 2020): the part of the code that is mixed must not carry the label. How they chose the cut is not
known to us; this is our measurement. For each image i another one j **of another class** is drawn, and j's style put on i's content:

- a classifier should still answer i's label. What it loses against i with its own style is the *leakage*. How often it answers j's
  label shows where the label went;
- the colour of the mix should be that of image j, and no longer that of image i.

Measure on images whose colour does not tell the label (Color-MNIST with uniform colours), with a classifier of such images:
otherwise colour alone changes its answers, and that looks like leakage. What an ideal split would give is measured in the same way,
with an exact decoder where there is one: :func:`measure_swap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor, nn

from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.mixing import Decoder
from advbn_lib.modes import evaluating
from advbn_lib.records import Estimate
from advbn_lib.style_encoding import CHUNK, StyleDecoder, check_images
from advbn_lib.training import Schedule, train

RESAMPLES = 1000
Z = NormalDist().inv_cdf(0.975)
Colours = Callable[[Tensor], Tensor]  # images in [0,1] (N,3,H,W) to one colour each (N,3)


# ---- colours --------------------------------------------------------------------------------


def mean_colour(images: Tensor) -> Tensor:
    """Mean of each channel (N,3) of images N,3,H,W."""
    return images.mean((2, 3))


def ink_colour(images: Tensor) -> Tensor:
    """Mean of each channel (N,3), pixels weighted by their brightest channel: the colour of a drawing on black.

    The plain mean would say how thick the strokes are too, and that is content.
    """
    weight = images.amax(1, keepdim=True)
    return (images * weight).sum((2, 3)) / weight.sum((2, 3)).clamp_min(1e-6)


# ---- one decoder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SwapMeasurement:
    """What swapping styles did. Intervals (95 %) are over images; ``n`` is their number.

    Attributes:
        own: share of right answers to images that were decoded with their own style.
        kept: share of mixes that are answered with the label of the content's image. An ideal split gives ``own``.
        leakage: ``own - kept``, image by image. An ideal split gives 0.
        taken: share of mixes that are answered with the label of the style's image.
        taken_before: share of the same contents, with their own style, that are answered with that label: what an ideal split gives.
        colour: correlation of the mixes' colours with those of the styles' images, over all channels together. An ideal split comes
            near ``own_colour``, if the colour of an image does not depend on its content.
        colour_r2: the variance of the styles' images' colours that the mixes' colours have; 1 is all, below 0 worse than none.
        colour_kept: correlation of the mixes' colours with those of the contents' images. An ideal split gives about 0.
        own_colour: correlation of the colours of images decoded with their own style with those of the images.
    """

    own: Estimate
    kept: Estimate
    leakage: Estimate
    taken: Estimate
    taken_before: Estimate
    colour: Estimate
    colour_r2: Estimate
    colour_kept: Estimate
    own_colour: Estimate


def measure_swap(
    decoder: Decoder, content: Tensor, style: Tensor, images: ImageSet, network: nn.Module, *, seed: int = 0,
    colours: Colours = mean_colour,
) -> SwapMeasurement:  # fmt: skip
    """Swap the styles of images of different classes and see what became of label and colour.

    With an exact decoder (grey times colour) this says what an ideal split gives, with the same classifier and the same pairs.

    Args:
        content, style: codes of the images, N first, on the images' device, as the decoder takes them.
        network: normalised images to logits; put into eval mode for the time.
        seed: of the pairs and of the resampling.
        colours: the colour of an image: :func:`mean_colour`, or :func:`ink_colour` for digits on black.

    Raises:
        DataError: fewer than two classes, codes of another number of images, or images that are all of one colour.
        FloatingPointError: a logit is not finite.
    """
    if not len(content) == len(style) == len(images):
        raise DataError(
            f"{images.name} has {len(images)} images, but there are {len(content)} contents and {len(style)} styles"
        )
    partners = other_classes(images.labels, seed)
    own = _look(decoder, content, style, images, network, colours)
    mixed = _look(decoder, content, style[partners], images, network, colours)
    return _compare(own, mixed, partners, images, seed, colours)


def measure_cuts(
    generator: nn.Module, codes: Tensor, images: ImageSet, network: nn.Module, *, seed: int = 0, colours: Colours = mean_colour,
) -> dict[int, SwapMeasurement]:  # fmt: skip
    """:func:`measure_swap` for each cut from 1 to layers - 1, with the same pairs.

    Args:
        codes: of the images (N,layers,latent), on their device, where generator and network are too.

    Raises:
        DataError: also if images and generator do not fit.
    """
    check_images(generator, images)
    if codes.shape != (len(images), generator.layers, generator.config.latent):
        raise DataError(
            f"{images.name} has {len(images)} images and the generator {generator.layers} styles of length "
            f"{generator.config.latent}, but the codes are {tuple(codes.shape)}: encode these images with this generator"
        )
    partners = other_classes(images.labels, seed)
    decoders = {cut: StyleDecoder(generator, cut) for cut in range(1, generator.layers)}
    own = _look(decoders[1], *decoders[1].split(codes), images, network, colours)  # the same for every cut
    found = {}
    for cut, decoder in decoders.items():
        content, style = decoder.split(codes)
        mixed = _look(decoder, content, style[partners], images, network, colours)
        found[cut] = _compare(own, mixed, partners, images, seed, colours)
    return found


def propose_cut(cuts: Mapping[int, SwapMeasurement], at_most: float = 0.02) -> int:
    """The cut with the largest style part whose leakage is at most ``at_most``, a share of 1: .02 are two points of accuracy.

    It is a proposal: look at the pictures and at the colours, and take another cut where they say so.

    Raises:
        ValueError: no cut is that tight; the message has the tightest. Or a negative ``at_most``.
    """
    if not cuts or at_most < 0:
        raise ValueError(f"there must be cuts, and at_most must be 0 or more: got {len(cuts)} cuts and {at_most}")
    tight = [cut for cut in sorted(cuts) if cuts[cut].leakage.mean <= at_most]
    if not tight:
        best = min(cuts, key=lambda cut: cuts[cut].leakage.mean)
        raise ValueError(
            f"no cut costs {100 * at_most:g} points of accuracy or less; the least is {100 * cuts[best].leakage.mean:.1f}, at "
            f"cut {best}: allow more, or train the generator or the encoder for longer"
        )
    return tight[0]


def other_classes(labels: Tensor, seed: int = 0) -> Tensor:
    """For each image the number of another one, drawn among those of the other classes: int64 (N,), on the labels' device.

    Raises:
        DataError: there is one class only.
    """
    on_cpu, random = labels.cpu(), torch.Generator().manual_seed(seed)
    partners = torch.empty_like(on_cpu)
    for label in on_cpu.unique():
        others = (on_cpu != label).nonzero()[:, 0]
        if len(others) == 0:
            raise DataError(
                f"all {len(labels)} images are of class {int(label)}: styles are swapped between classes, take others too"
            )
        own = on_cpu == label
        partners[own] = others[torch.randint(len(others), (int(own.sum()),), generator=random)]
    return partners.to(labels.device)


def train_label_classifier(
    network: nn.Module, images: ImageSet, schedule: Schedule, seed: int = 0, *, padding: int = 2, flip: bool = False,
    checkpoint: Path | None = None, show_progress: bool = True,
) -> nn.Module:  # fmt: skip
    """``network``, trained in place to tell the classes of ``images``, in eval mode: the judge of :func:`measure_cuts`.

    Args:
        network: normalised images to logits; it says the device.
        images: such as colour does not tell the class of.
        seed: of order and augmentation.
        padding, flip: see :class:`~advbn_lib.data.loader.DeviceLoader`.
        checkpoint: see :func:`advbn_lib.training.train`.

    Raises:
        DataError: a class has no image.
        FloatingPointError: the loss is not finite.
    """
    require_all_classes(images)
    device = next(network.parameters()).device
    loader = DeviceLoader(images, schedule.batch_size, seed, device, padding=padding, flip=flip)
    method = PlainTraining(network)
    key = f"label classifier, {images.checksum}, {schedule}, {seed}, {padding}, {flip}"
    train(method, loader, schedule, checkpoint, key, show_progress=show_progress, precision=torch.float32)
    return network.eval()


# ---- pictures -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MixGrid:
    """Pictures of mixes, in [0,1].

    Attributes:
        contents: real images, rows,3,H,W. styles: real images, columns,3,H,W.
        mixes: rows,columns,3,H,W: each row's content with each column's style.
    """

    contents: Tensor
    styles: Tensor
    mixes: Tensor


@torch.no_grad()
def mix_grid(
    decoder: Decoder, content: Tensor, style: Tensor, images: ImageSet, rows: list[int], columns: list[int]
) -> MixGrid:
    """Content of the images ``rows`` with the style of the images ``columns``.

    Args:
        content, style: codes of all images, N first, on their device.
        rows, columns: numbers of images.

    Raises:
        ValueError: no rows or columns, or no such image.
    """
    if not rows or not columns or not all(0 <= one < len(images) for one in [*rows, *columns]):
        raise ValueError(
            f"rows and columns are numbers of images, from 0 to {len(images) - 1}: got {rows} and {columns}"
        )
    lines = [decoder.decode(content[row].expand(len(columns), *content.shape[1:]), style[columns]) for row in rows]
    real = images.images.float() / 255
    return MixGrid(real[rows], real[columns], torch.stack(lines))


# ---- numbers --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Look:
    """What decoded images are answered with (N,), and their colours (N,3)."""

    answers: Tensor
    colours: Tensor


@torch.no_grad()
def _look(
    decoder: Decoder, content: Tensor, style: Tensor, images: ImageSet, network: nn.Module, colours: Colours
) -> _Look:
    answers, seen, finite = [], [], []
    with evaluating(network):
        for part in zip(content.split(CHUNK), style.split(CHUNK), strict=True):
            made = decoder.decode(*part)
            logits = network(images.normalise(made))
            finite.append(torch.isfinite(logits).all())
            answers.append(logits.argmax(1))
            seen.append(colours(made))
    if not bool(torch.stack(finite).all()):
        raise FloatingPointError(
            "the classifier's logits are not finite: are there NaN in the codes, or in the generator?"
        )
    return _Look(torch.cat(answers), torch.cat(seen))


def _compare(
    own: _Look, mixed: _Look, partners: Tensor, images: ImageSet, seed: int, colours: Colours
) -> SwapMeasurement:
    labels, styles = images.labels, images.labels[partners]
    real = torch.cat([colours(part.float() / 255) for part in images.images.split(CHUNK)])
    of_style, r2 = correlation(mixed.colours, real[partners], seed)
    of_content, _ = correlation(mixed.colours, real, seed)
    of_own, _ = correlation(own.colours, real, seed)
    right, still = own.answers == labels, mixed.answers == labels
    return SwapMeasurement(
        own=share(right),
        kept=share(still),
        leakage=paired_difference(right, still),
        taken=share(mixed.answers == styles),
        taken_before=share(own.answers == styles),
        colour=of_style,
        colour_r2=r2,
        colour_kept=of_content,
        own_colour=of_own,
    )


def share(hits: Tensor) -> Estimate:
    """Share of True among ``hits`` (N,), with Wilson's 95 % interval: it has a width also where all or none are."""
    n, mean = len(hits), hits.float().mean().item()
    middle, half = mean + Z**2 / (2 * n), Z * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return Estimate(mean, min(max(low, 0.0), mean), max(min(high, 1.0), mean), n)


def paired_difference(first: Tensor, second: Tensor) -> Estimate:
    """Share of True in ``first`` minus that in ``second`` (both N,), paired, with a 95 % interval.

    The interval is that of Agresti and Min ("Simple improved confidence intervals for comparing matched proportions", 2005): the
    usual one after half an image is added to each of the four possible pairs. It has a width also where the two agree throughout.
    """
    n = len(first)
    lost, won = ((one & ~other).sum().item() for one, other in ((first, second), (second, first)))
    p, q = (lost + 0.5) / (n + 2), (won + 0.5) / (n + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    mean = (lost - won) / n
    return Estimate(mean, min(max(p - q - half, -1.0), mean), max(min(p - q + half, 1.0), mean), n)


def correlation(found: Tensor, wanted: Tensor, seed: int = 0) -> tuple[Estimate, Estimate]:
    """Correlation of colours (both N,3), and the share R^2 of the variance of ``wanted`` that ``found`` has.

    Channels are taken together: covariances and variances are summed over them, each about its channel's mean. R^2 is 1 minus the
    squared distances over the variance of ``wanted``: unlike the correlation, it sees colours that are too pale. The 95 %
    intervals are the quantiles over 1,000 draws of N images with replacement.

    Raises:
        DataError: ``wanted`` are all the same.
    """
    x, y = found.detach().double().cpu(), wanted.detach().double().cpu()
    if float(y.var(0, unbiased=False).sum()) < 1e-8:
        raise DataError(
            "all images have the same colour, so none can be transferred: measure on images that differ in it"
        )
    moments = torch.stack([x, y, x * x, y * y, x * y, (x - y) ** 2], 1)  # N, 6, channels
    random = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(x), (RESAMPLES, len(x)), generator=random)
    weights = torch.zeros(RESAMPLES, len(x), dtype=torch.double).scatter_add_(
        1, draws, torch.ones_like(draws, dtype=torch.double)
    )
    resampled = (weights @ moments.flatten(1) / len(x)).view(RESAMPLES, *moments.shape[1:])
    values = _correlation_and_r2(moments.mean(0, keepdim=True))[0].tolist()
    bounds = _correlation_and_r2(resampled).quantile(torch.tensor([0.025, 0.975], dtype=torch.double), 0).T.tolist()
    one, other = (
        Estimate(value, min(low, value), max(high, value), len(x)) for value, (low, high) in zip(values, bounds)
    )
    return one, other


def _correlation_and_r2(means: Tensor) -> Tensor:
    """From the means of x, y, xx, yy, xy and (x - y)^2 (K,6,channels): correlation and R^2 (K,2)."""
    x, y, xx, yy, xy, squared = means.unbind(1)
    variance_x, variance_y = ((square - mean**2).sum(1).clamp_min(0) for mean, square in ((x, xx), (y, yy)))
    # Where all x are the same there is no correlation: 0, not rounding errors divided by each other.
    together = (xy - x * y).sum(1) / (variance_x * variance_y).sqrt().clamp_min(1e-6)
    return torch.stack([together, 1 - squared.sum(1) / variance_y.clamp_min(1e-12)], 1)
