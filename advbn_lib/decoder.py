"""Look at features: a small decoder that turns a layer's output back into images.

Source: the autoencoder behind ImageNet-AdvBN in the released AdvBN code: a frozen encoder, a mirrored decoder with
reflection padding and nearest upsampling, trained to reconstruct. There the encoder is a VGG-19 up to relu4_1; here it
is the lower half of the very classifier that is attacked. :func:`advbn_lib.inversion.invert` needs no training and is
slower per image.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.data.images import ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.methods.base import Losses, Method
from advbn_lib.modes import evaluating
from advbn_lib.provenance import code_hash, state_checksum
from advbn_lib.splitting import split_at
from advbn_lib.statistics import mean, std
from advbn_lib.training import History, Schedule, train

PROBE = 512  # training images that the features' moments are taken from


@dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is and how it is trained.

    Args:
        layer: whose output is decoded.
        width: channels of its convolutions.
        depth: convolutions at each resolution, before the last one to three channels.
        tv: weight of the summed differences between neighbouring pixels; see :class:`DecoderTraining`.
        images: how many of the first training images are used; None: all.
        schedule: of the training. No weight decay: it would outweigh a squared error this small.
        flip: mirror half of the images; not for digits.
    """

    layer: str = "layer1"
    width: int = 32
    depth: int = 2
    tv: float = 1e-8
    images: int | None = 5_000
    schedule: Schedule = Schedule(epochs=6, batch_size=32, lr=0.2, milestones=(5,), warmup=0.5, weight_decay=0.0)
    flip: bool = True

    def __post_init__(self):
        if self.width < 1 or self.depth < 1 or self.tv < 0:
            raise ValueError(
                f"width and depth must be at least 1 and tv at least 0, got {self.width}, {self.depth}, {self.tv}"
            )


class Decoder(nn.Module):
    """Features (N,C,h,w) to images (N,3,h * 2**doublings, w * 2**doublings), in about [0,1] but not cut to it.

    ``depth`` 3x3 convolutions with ReLUs at each resolution, nearest upsampling in between, and one convolution to
    three channels. All pad by reflection. The features are first standardised, channel by channel, with fixed moments.

    Args:
        channels: C.
        doublings: how often the size is doubled.
        width, depth: see :class:`DecoderConfig`.
    """

    def __init__(self, channels: int, doublings: int, width: int = 32, depth: int = 2):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))
        layers: list[nn.Module] = []
        for stage in range(doublings + 1):
            if stage:
                layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            for _ in range(depth):
                layers += [_convolution(channels, width), nn.ReLU()]
                channels = width
        last = _convolution(channels, 3)
        nn.init.constant_(last.bias, 0.5)  # begin at grey
        self.layers = nn.Sequential(*layers, last)

    @torch.no_grad()
    def standardise_like(self, features: Tensor) -> None:
        """Take the fixed moments from these features (N,C,h,w)."""
        self.mean.copy_(mean(features))
        self.std.copy_(std(features, eps=1e-4))  # a dead channel is divided by 0.01

    def forward(self, features: Tensor) -> Tensor:
        return self.layers((features - self.mean) / self.std)


class Autoencoder(nn.Module):
    """A frozen encoder, the part of ``network`` below and with ``layer``, and a :class:`Decoder` for its output.

    The encoder is a copy: ``network`` is neither changed nor kept. It is no part of ``state_dict``.

    Args:
        network: a classifier of images that ``images`` normalises.
        images: a training set: it says how images are normalised, how large they are, and the features' moments.
        config: of the decoder.

    Raises:
        SplitError: see :func:`advbn_lib.splitting.split_at`.
        ValueError: the size of the images is not the feature map's times a power of two.
    """

    def __init__(self, network: nn.Module, images: ImageSet, config: DecoderConfig = DecoderConfig()):
        super().__init__()
        frozen = copy.deepcopy(network).eval().requires_grad_(False)
        device = next(frozen.parameters()).device
        probe = images.images[:PROBE].to(device).float() / 255
        self.images = images
        self.split = split_at(frozen, config.layer, images.normalise(probe[:2]))
        features = self.encode(probe)
        doublings = _doublings(images.images.shape[2:], features.shape[2:], config.layer)
        decoder = Decoder(features.shape[1], doublings, config.width, config.depth)
        self.decoder = decoder.to(device, memory_format=torch.channels_last)
        self.decoder.standardise_like(features)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [0,1] (N,3,H,W) to features (N,C,h,w), without gradient."""
        return self.split.features(self.images.normalise(images))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N,C,h,w) to images (N,3,H,W), not cut to [0,1], with gradient: what an attack goes through."""
        return self.decoder(features)

    @torch.no_grad()
    def decode(self, features: Tensor) -> Tensor:
        """Features (N,C,h,w) to images in [0,1] (N,3,H,W), without gradient."""
        with evaluating(self):
            return self(features).clamp(0, 1)

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N,K) of the whole frozen network for images of about [0,1] (N,3,H,W), with gradient to the images."""
        return self.split.model(self.images.normalise(images))


class DecoderTraining(Method):
    """Trains the decoder: squared error, and a little total variation. Labels are not used.

    The loss is ``mean((decoded - image)**2) + tv * sum(|horizontal| and |vertical| differences of decoded)``. As in the
    released code the first term is a mean over the batch and all pixels, and the second a *sum* over them, so its
    weight grows with both: the released 1e-8 was for images of 256x256.
    """

    def __init__(self, autoencoder: Autoencoder, tv: float = 1e-8):
        super().__init__(autoencoder)
        self.tv = tv
        images = autoencoder.images
        self._mean, self._std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.mean, images.std))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.model.decoder.parameters())

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        wanted = images * self._std.to(images) + self._mean.to(images)  # the loader normalises; the decoder gives [0,1]
        decoded = self.model(self.model.encode(wanted)).float()
        error = F.mse_loss(decoded, wanted)
        variation = decoded.diff(dim=2).abs().sum() + decoded.diff(dim=3).abs().sum()
        return Losses(error + self.tv * variation, error)


def train_decoder(
    network: nn.Module, images: ImageSet, config: DecoderConfig = DecoderConfig(), seed: int = 0,
    folder: Path | None = None, show_progress: bool = True,
) -> tuple[Autoencoder, History]:  # fmt: skip
    """A trained autoencoder around ``network``, on the network's device, and the history of its squared error.

    Args:
        images: the training set; ``config.images`` of them are used.
        seed: of the decoder's initial weights, and of order and mirroring.
        folder: where its checkpoint is kept. A training that was killed is resumed, and a finished one is not repeated;
            network, images, configuration, seed and code must be the same. None: nothing is kept.

    Raises:
        SplitError, ValueError, DataError: see :class:`Autoencoder`; fewer images than asked for.
        FloatingPointError: the error is not finite: lower the learning rate.
    """
    images = images.first(config.images)
    device = next(network.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a checkpoint brings its own random state
        torch.manual_seed(seed)
        autoencoder = Autoencoder(network, images, config)
        loader = DeviceLoader(images, config.schedule.batch_size, seed, device, padding=0, flip=config.flip)
        key = _key(autoencoder, images, config, seed)
        checkpoint = None if folder is None else folder / f"decoder-{key[:12]}.pt"
        method = DecoderTraining(autoencoder, config.tv)
        history = train(method, loader, config.schedule, checkpoint, key, show_progress=show_progress)
    autoencoder.eval()
    return autoencoder, history


def _convolution(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, padding_mode="reflect")


def _doublings(images: torch.Size, features: torch.Size, layer: str) -> int:
    count = (images[0] // features[0]).bit_length() - 1
    if count < 0 or any(wide != narrow * 2**count for wide, narrow in zip(images, features)):
        raise ValueError(
            f"images are {tuple(images)} and the output of {layer!r} is {tuple(features)}: a decoder doubles sizes, so "
            "the first must be the second times a power of two; choose another layer"
        )
    return count


def _key(autoencoder: Autoencoder, images: ImageSet, config: DecoderConfig, seed: int) -> str:
    network = state_checksum(autoencoder.split.model.state_dict())
    identity = [asdict(config), seed, network, images.checksum, code_hash(["advbn_lib.decoder"])]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
