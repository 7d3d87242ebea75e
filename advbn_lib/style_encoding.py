"""Real images into a generator's style codes: a perceptual distance, an encoder, and a decoder cut into content and style.

Source: Gowal et al., "Achieving Robustness in the Wild via Adversarial Mixing with Disentangled Representations" (AdvMix, CVPR
2020): images are put into the latent space of a StyleGAN with a perceptual and a mixing loss. **This is a reconstruction**: there
is no public code, and what the losses were is not known to us. Our choices, each with its reason:

- The code of an image is one style vector for each layer (W+), not one for all (W): a small generator reaches few real images
  through one vector.
- A network gives the code first; :mod:`advbn_lib.style_codes` can then improve it image by image. One pass costs less than a
  hundred steps, and mixed images can be encoded again, which is what the mixing loss needs.
- The encoder learns from generated images too: their codes are known.
- The mixing loss: the coarse styles of one image with the fine styles of another decode to an image, and the code of that image
  should be these styles again. It is the style-swap loss of autoencoders, in place of a mixing loss that we do not know.
- Perceptual distances are taken in a classifier that is stated, not in LPIPS: weights of others are not at hand everywhere.
- Images are decoded without noise inputs, so that a code is one image.

Codes are W+: N, layers, latent. Images are in [0,1], N,3,R,R; a grey generator's are repeated to three channels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.checkpoints import load_checkpoint, save_checkpoint
from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.progress import progress
from advbn_lib.provenance import code_hash, state_checksum
from advbn_lib.statistics import BATCH, std

LOOK_EVERY = 50  # steps between looks at the losses: each look makes the host wait for the device
CHUNK = 250  # images in a pass without gradient
DRAWS = 4096  # of z, for the spread of the generator's codes


class GeneratorSize(Protocol):
    """What is read of a generator's configuration."""

    resolution: int
    channels: int
    latent: int


class StyleGenerator(Protocol):
    """What is needed of a generator; :class:`advbn_lib.models.stylegan.Generator` is one, an ``nn.Module``."""

    config: GeneratorSize
    layers: int
    mean_w: Tensor

    def mapping(self, z: Tensor) -> Tensor: ...

    def synthesis(self, wplus: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Tensor]: ...


# ---- codes and pictures ---------------------------------------------------------------------


def pictures(generator: StyleGenerator, wplus: Tensor) -> Tensor:
    """Images in [0,1] of codes, to fit codes with: cut to [0,1], but the gradient goes through the cut as if it were not there.

    A pixel that is too light or too dark can so be mended. An attack needs the true gradient: :meth:`StyleDecoder.decode`.
    """
    raw = (generator.synthesis(wplus) + 1) / 2
    return (raw + (raw.clamp(0, 1) - raw).detach()).expand(-1, 3, -1, -1)


def mix(content: Tensor, style: Tensor, cut: int | Tensor) -> Tensor:
    """Codes with the first ``cut`` styles of ``content`` and the others of ``style``; a tensor (N,) has a cut for each image.

    Raises:
        ValueError: the codes differ in shape, or a cut is not from 1 to layers - 1; in a tensor it may be ``layers``: all content.
    """
    if content.shape != style.shape or content.dim() != 3:
        raise ValueError(
            f"content and style must be codes N,layers,latent of one shape: {tuple(content.shape)}, {tuple(style.shape)}"
        )
    if isinstance(cut, int):
        check_cut(cut, content.shape[1])
    elif not 1 <= int(cut.min()) <= int(cut.max()) <= content.shape[1]:
        raise ValueError(f"cuts are from 1 to {content.shape[1]}, which is all content; got {cut.tolist()}")
    places = torch.arange(content.shape[1], device=content.device)
    coarse = places < torch.as_tensor(cut, device=content.device).reshape(-1, 1)
    return torch.where(coarse[:, :, None], content, style)


def check_cut(cut: int, layers: int) -> None:
    """Refuse a cut that leaves the content or the style without a layer.

    Raises:
        ValueError: the message has the range.
    """
    if not 1 <= cut < layers:
        raise ValueError(
            f"the cut is the number of coarse styles, from 1 to {layers - 1} for this generator's {layers}: got {cut}"
        )


def check_images(generator: StyleGenerator, images: ImageSet) -> None:
    """Refuse images that the generator cannot make.

    Raises:
        DataError: they have another size, or colours for a generator of grey images.
    """
    size, config = tuple(images.images.shape[2:]), generator.config
    if size != (config.resolution, config.resolution):
        raise DataError(
            f"{images.name} has images of {size[0]}x{size[1]}, the generator makes {config.resolution}x{config.resolution}: "
            "resize or pad the images, or load the generator that was trained on their size"
        )
    if config.channels not in (1, 3):
        raise DataError(
            f"the generator makes images of {config.channels} channels: only grey (1) and colour (3) can be encoded"
        )
    if config.channels == 1 and not bool((images.images == images.images[:, :1]).all()):
        raise DataError(
            f"{images.name} is in colour, the generator makes grey images: load one that was trained in colour, or make the "
            "images grey (three equal channels)"
        )


@torch.no_grad()
def code_scale(generator: StyleGenerator) -> Tensor:
    """Standard deviation of each coordinate of w (latent,) over random z: the unit in which codes are compared and moved."""
    z = torch.randn(DRAWS, generator.config.latent, generator=torch.Generator().manual_seed(0))
    return generator.mapping(z.to(generator.mean_w)).std(0).clamp_min(1e-4)


class StyleDecoder:
    """A generator cut in two: coarse styles are the content, fine ones the style.

    The generator is copied and frozen: gradients go to the codes only.

    Args:
        generator: trained.
        cut: how many coarse styles are content, from 1 to layers - 1. :func:`advbn_lib.style_splitting.propose_cut` finds one.

    Raises:
        ValueError: no such cut.
    """

    def __init__(self, generator: nn.Module, cut: int):
        check_cut(cut, generator.layers)
        self.generator = copy.deepcopy(generator).eval().requires_grad_(False)
        self.cut = cut

    def split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (N,layers,latent) to content (N,cut,latent) and style (N,layers - cut,latent)."""
        return codes[:, : self.cut], codes[:, self.cut :]

    def decode(self, content: Tensor, style: Tensor) -> Tensor:
        """Images in [0,1] (N,3,R,R) of content (N,cut,latent) and style (N,layers - cut,latent), with gradient to both.

        Raises:
            ValueError: other shapes, as those of codes cut elsewhere.
        """
        layers, latent = self.generator.layers, self.generator.config.latent
        wanted = (self.cut, latent), (layers - self.cut, latent)
        if (content.shape[1:], style.shape[1:]) != wanted or len(content) != len(style):
            raise ValueError(
                f"cut at {self.cut}, content is N,{self.cut},{latent} and style N,{layers - self.cut},{latent}: got "
                f"{tuple(content.shape)} and {tuple(style.shape)}; split the codes with this decoder"
            )
        raw = self.generator.synthesis(torch.cat([content, style], 1))
        return ((raw + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)

    def to(self, device: torch.device | str) -> StyleDecoder:
        """The same decoder on another device."""
        return StyleDecoder(copy.deepcopy(self.generator).to(device), self.cut)


# ---- the perceptual distance ----------------------------------------------------------------


class LayerFeatures(nn.Module):
    """The outputs of some layers of a classifier, for images in [0,1].

    The classifier is copied, frozen and in eval mode.

    Args:
        classifier: of normalised images.
        layers: names of its submodules, each with an output N,C,H,W.
        normalise: images in [0,1] to what the classifier expects: ``ImageSet.normalise``.

    Raises:
        ValueError: no layers, or the classifier has no submodule of that name.
    """

    def __init__(self, classifier: nn.Module, layers: Sequence[str], normalise: Callable[[Tensor], Tensor]):
        super().__init__()
        self.classifier = copy.deepcopy(classifier).eval().requires_grad_(False)
        self.normalise, self._maps = normalise, []
        modules = dict(self.classifier.named_modules())
        if unknown := [name for name in layers if name not in modules]:
            raise ValueError(f"no layer is called {', '.join(unknown)}: choose from {', '.join(filter(None, modules))}")
        if not layers:
            raise ValueError("name at least one layer of the classifier")
        for name in layers:
            modules[name].register_forward_hook(lambda module, arguments, output: self._maps.append(output))

    def train(self, mode: bool = True) -> LayerFeatures:
        return super().train(False)  # its BatchNorms must not learn

    def forward(self, images: Tensor) -> list[Tensor]:
        self._maps.clear()
        self.classifier(self.normalise(images))
        maps = list(self._maps)
        self._maps.clear()
        return maps


class PerceptualDistance(nn.Module):
    """Mean squared difference of feature maps, each channel in units of its own standard deviation.

    So a channel counts the same whatever its scale, a layer the same however many channels it has. (LPIPS divides by the length of
    the feature vector at each position instead, and has learned weights.)

    Args:
        features: maps images in [0,1] to a list of feature maps N,C,H,W, as :class:`LayerFeatures` does. Kept as it is: freeze it.
        reference: images in [0,1] (N,3,R,R) that the standard deviations are taken from, some hundred of the data set's.

    Raises:
        ValueError: ``features`` gives no feature maps.
    """

    def __init__(self, features: nn.Module, reference: Tensor):
        super().__init__()
        self.net = features
        with torch.no_grad():
            maps = self.net(reference)
        if not isinstance(maps, list | tuple) or not maps or any(one.dim() != 4 for one in maps):
            raise ValueError("features must give a list of feature maps N,C,H,W, one or more")
        for number, one in enumerate(maps):
            self.register_buffer(f"scale{number}", std(one, BATCH, eps=1e-4))  # a dead channel is divided by 0.01

    def features(self, images: Tensor) -> list[Tensor]:
        """The feature maps of images in [0,1] (N,3,R,R), each divided by its channels' standard deviations."""
        return [one / self.get_buffer(f"scale{number}") for number, one in enumerate(self.net(images))]

    def to_features(self, images: Tensor, features: list[Tensor]) -> Tensor:
        """Distance (N,) of images from others whose :meth:`features` were kept."""
        pairs = zip(self.features(images), features, strict=True)
        return torch.stack([(own - other).square().flatten(1).mean(1) for own, other in pairs]).mean(0)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance (N,) of each image (N,3,R,R) from the other of the same number; the gradient goes to the first only."""
        with torch.no_grad():
            features = self.features(others)
        return self.to_features(images, features)


def pixel_distance(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference (N,) of images in [0,1], N,3,R,R."""
    return (images - others).square().flatten(1).mean(1)


# ---- the encoder ----------------------------------------------------------------------------


class StyleEncoder(nn.Module):
    """Images in [0,1] (N,3,R,R) to codes (N,layers,latent): convolutions down to 4x4, then one linear layer.

    What it gives is an offset from the generator's mean w, in units of w's spread; it begins with the mean. There is no
    normalisation layer: colour and brightness, which are style, are in the statistics that it would take away.

    Args:
        generator: says the sizes, the mean and the spread.
        width: channels of the first convolution; twice as many each time the size is halved, up to 8 times.
    """

    def __init__(self, generator: StyleGenerator, width: int = 16):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        config = generator.config
        self.resolution, self.shape = config.resolution, (generator.layers, config.latent)
        self.register_buffer("mean_w", generator.mean_w.detach().clone())
        self.register_buffer("scale", code_scale(generator).cpu())
        parts, channels = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)], width
        for _ in range(int(math.log2(config.resolution)) - 2):
            wider = min(2 * channels, 8 * width)
            parts += [nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2)]
            parts += [nn.Conv2d(channels, wider, 3, 2, padding=1), nn.LeakyReLU(0.2)]
            channels = wider
        self.layers = nn.Sequential(*parts, nn.Flatten())
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, 0.2)
                nn.init.zeros_(module.bias)
        self.last = nn.Linear(16 * channels, math.prod(self.shape))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Codes of images.

        Raises:
            ValueError: images of another size, or not of three channels.
        """
        if images.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(
                f"this encoder takes N,3,{self.resolution},{self.resolution}, got {tuple(images.shape)}: resize the images, "
                "or train an encoder for a generator of their size"
            )
        offset = self.last(self.layers(2 * images - 1)).view(-1, *self.shape)
        return self.mean_w + self.scale * offset


@torch.no_grad()
def encode_images(encoder: StyleEncoder, images: ImageSet) -> Tensor:
    """Codes (N,layers,latent) of a whole data set, on the encoder's device."""
    device = encoder.mean_w.device
    return torch.cat([encoder(part.to(device).float() / 255) for part in images.images.split(CHUNK)])


@dataclass(frozen=True)
class EncoderSchedule:
    """How an encoder is trained: Adam, the learning rate falling to 0 as a cosine.

    Args:
        steps, batch_size: each step sees ``batch_size`` generated and as many real images; at least 1 and 2.
        lr: at the start.
        width: see :class:`StyleEncoder`.
        code: weight of the squared error of the codes of generated images, in units of w's spread.
        pixel, perceptual: weights of the distances between real images and what their codes decode to.
        mixing: weight of the squared error of the codes of mixed images, in units of w's spread.
    """

    steps: int = 3000
    batch_size: int = 32
    lr: float = 1e-3
    width: int = 16
    code: float = 1.0
    pixel: float = 10.0
    perceptual: float = 1.0
    mixing: float = 0.5

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 2 or not self.lr > 0:
            raise ValueError(
                f"steps must be at least 1, batch_size 2 (styles are swapped within it) and lr above 0: got {self.steps}, "
                f"{self.batch_size} and {self.lr}"
            )
        weights = {name: getattr(self, name) for name in ("code", "pixel", "perceptual", "mixing")}
        if min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise ValueError(f"weights must be 0 or more, and one above 0; got {weights}")

    def rate(self, step: int) -> float:
        """Learning rate at a step, from 0 on."""
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class EncoderLosses:
    """The parts of the loss, unweighted, as scalars; ``total`` is weighted."""

    total: Tensor
    code: Tensor
    pixel: Tensor
    perceptual: Tensor
    mixing: Tensor


PARTS = tuple(field.name for field in fields(EncoderLosses))


def encoder_losses(
    encoder: StyleEncoder, generator: StyleGenerator, distance: PerceptualDistance, real: Tensor, schedule: EncoderSchedule,
    random: torch.Generator,
) -> EncoderLosses:  # fmt: skip
    """The losses of one step.

    Args:
        real: images in [0,1], N,3,R,R, in random order: each gets the style of the one after it.
        random: on the CPU, so that the draws are the same on every device.
    """
    count, layers = len(real), generator.layers
    with torch.no_grad():
        known = _random_codes(generator, count, random)
        generated = pictures(generator, known)
    code = _code_error(encoder, encoder(generated), known)

    own = encoder(real)
    decoded = pictures(generator, own)
    pixel, perceptual = pixel_distance(decoded, real).mean(), distance(decoded, real).mean()

    cuts = torch.randint(1, layers, (count,), generator=random).to(real.device)
    swapped = mix(own, own.roll(-1, 0), cuts)
    # The gradient goes to the codes too, not only to the second encoding: it pulls them to where swapping works.
    mixing = _code_error(encoder, encoder(pictures(generator, swapped)), swapped)

    total = schedule.code * code + schedule.pixel * pixel + schedule.perceptual * perceptual + schedule.mixing * mixing
    return EncoderLosses(total, code, pixel, perceptual, mixing)


def train_encoder(
    generator: nn.Module, images: ImageSet, distance: PerceptualDistance, schedule: EncoderSchedule = EncoderSchedule(),
    seed: int = 0, folder: Path | None = None, save_every: float = 60.0, show_progress: bool = True,
) -> tuple[StyleEncoder, list[dict[str, float]]]:  # fmt: skip
    """A trained encoder on the generator's device, and the mean losses of each :data:`LOOK_EVERY` steps.

    Args:
        generator: trained; it is not changed.
        images: real ones, of the generator's size, at least one of each class. Labels are not used for more than that.
        distance: on the generator's device.
        seed: of the encoder's first weights and of all draws.
        folder: where a checkpoint is kept, about every ``save_every`` seconds. A training that was killed is resumed (on a CPU it
            ends bit for bit as if it had not been), and a finished one is not repeated. None: nothing is kept.

    Raises:
        DataError: the images do not fit the generator, see :func:`check_images`, or a class has none.
        FloatingPointError: a loss is not finite; the message says when.
        CheckpointError: the checkpoint is damaged.
    """
    check_images(generator, require_all_classes(images))
    frozen = copy.deepcopy(generator).eval().requires_grad_(False)
    device = frozen.mean_w.device
    with torch.random.fork_rng([]):  # first weights are drawn on the CPU; all else has its own generators
        torch.manual_seed(seed)
        encoder = StyleEncoder(frozen, schedule.width).to(device)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=schedule.lr, betas=(0.9, 0.99))
    key = _key(frozen, images, distance, schedule, seed)
    checkpoint = None if folder is None else folder / f"style_encoder-{key[:12]}.pt"
    parts, state = {"encoder": encoder, "optimizer": optimizer}, {"step": 0, "history": []}
    if checkpoint is not None and checkpoint.exists():
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # it brings its own random state
            state = load_checkpoint(checkpoint, parts, key)
    history, first, saved, waiting = state["history"], state["step"], time.perf_counter(), []
    pixels = images.images.to(device)
    for step in progress(range(first, schedule.steps), "encoder", show_progress):
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        random = _draws(seed, step)
        chosen = torch.randint(len(pixels), (schedule.batch_size,), generator=random).to(device)
        losses = encoder_losses(encoder, frozen, distance, pixels[chosen].float() / 255, schedule, random)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        optimizer.step()
        waiting.append(torch.stack([getattr(losses, name).detach() for name in PARTS]))
        last = step + 1 == schedule.steps
        if last or (step + 1) % LOOK_EVERY == 0:
            history.append(_means(waiting, step))
            waiting.clear()
            if checkpoint is not None and (last or time.perf_counter() - saved > save_every):
                save_checkpoint(checkpoint, parts, {"step": step + 1, "history": history}, key)
                saved = time.perf_counter()
    return encoder.eval().requires_grad_(False), history


def _random_codes(generator: StyleGenerator, count: int, random: torch.Generator) -> Tensor:
    """Codes of two random w each, one above the other: the generator was trained with such mixtures too."""
    z = torch.randn(2 * count, generator.config.latent, generator=random).to(generator.mean_w)
    first, second = generator.mapping(z)[:, None].expand(-1, generator.layers, -1).chunk(2)
    cuts = torch.randint(1, generator.layers + 1, (count,), generator=random)  # at ``layers`` the first w is alone
    return mix(first, second, cuts.to(first.device))


def _code_error(encoder: StyleEncoder, codes: Tensor, wanted: Tensor) -> Tensor:
    return F.mse_loss(codes / encoder.scale, wanted / encoder.scale)


def _draws(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def _means(waiting: list[Tensor], step: int) -> dict[str, float]:
    """The mean of each part over the steps that wait.

    Raises:
        FloatingPointError: one is not finite.
    """
    values = torch.stack(waiting)
    bad = (~torch.isfinite(values)).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        found = ", ".join(f"{name} {value:g}" for name, value in zip(PARTS, values[row].tolist()))
        raise FloatingPointError(
            f"the encoder's loss is not finite at step {step + 1 - len(waiting) + row} ({found}): lower lr, and look at what the "
            "generator and the classifier of the perceptual distance make of these images"
        )
    return dict(zip(PARTS, values.mean(0).tolist()))


def _key(
    generator: nn.Module, images: ImageSet, distance: PerceptualDistance, schedule: EncoderSchedule, seed: int
) -> str:
    states = [state_checksum(module.state_dict()) for module in (generator, distance)]
    identity = [states, images.checksum, asdict(schedule), seed, code_hash(["advbn_lib.style_encoding"])]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
