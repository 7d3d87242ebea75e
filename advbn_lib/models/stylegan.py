"""A small StyleGAN: the generator whose layers are set by styles, and its file.

Source: Karras, Laine and Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks" (CVPR 2019;
StyleGAN below): mapping network, one style a layer through AdaIN, noise inputs, truncation. Equalised learning rates and pixel
norm: Karras et al., "Progressive Growing of GANs" (ICLR 2018). Here a layer's style is a mean and a standard deviation for each
channel of each image, and setting it is :func:`advbn_lib.statistics.renormalise` over ``INSTANCE``: the formula of AdvBN, over
other axes and with the moments asked for by a network instead of an adversary.

Choices of this reconstruction, and why:

- no progressive growing: at 32 and 64 pixels all layers train together from the start;
- AdaIN as in the first StyleGAN, not the weight demodulation of its successor: the tie to AdvBN is the point here;
- a learned constant drawn at random: a constant of ones has no standard deviation for AdaIN to divide by;
- one unstyled 1x1 convolution makes the picture from the last features: colour can then be set by the last styles alone.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.checkpoints import CheckpointError
from advbn_lib.files import atomic_write
from advbn_lib.provenance import state_checksum
from advbn_lib.statistics import INSTANCE, renormalise

FORMAT = "advbn_lib generator 1"
START = 4  # pixels a side of the learned constant
Noise = Literal["random"] | list[Tensor] | None


@dataclass(frozen=True)
class GeneratorConfig:
    """Size of a generator and of the discriminator that it is trained against.

    Args:
        resolution: pixels a side of the pictures; a power of two, at least 8.
        channels: 3 for colour, 1 for grey.
        latent: length of z, of w and of each style.
        width: feature channels at the full resolution. Each halving of the resolution doubles them, to at most four times this.
        mapping_layers: linear layers from z to w.

    Raises:
        ValueError: a value is out of its range.
    """

    resolution: int = 32
    channels: int = 3
    latent: int = 64
    width: int = 16
    mapping_layers: int = 4

    def __post_init__(self):
        if not all(type(value) is int for value in asdict(self).values()):
            raise ValueError(f"all sizes of a generator are whole numbers, got {self}")
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(
                f"resolution must be a power of two from 8 on (8, 16, 32, 64, ...), got {self.resolution}: pad or resize the images"
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels is 3 for colour or 1 for grey, got {self.channels}")
        if min(self.latent, self.width, self.mapping_layers) < 1:
            raise ValueError(
                f"latent, width and mapping_layers must be at least 1, got {self.latent}, {self.width}, {self.mapping_layers}"
            )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """4, 8, ... up to the full one."""
        return tuple(2**power for power in range(2, self.resolution.bit_length()))

    @property
    def layers(self) -> int:
        """Number of styles: two at each resolution, ``2 * log2(resolution) - 2``."""
        return 2 * len(self.resolutions)

    def width_at(self, resolution: int) -> int:
        """Feature channels at a resolution."""
        return self.width * min(4, self.resolution // resolution)


class EqualLinear(nn.Module):
    """A linear layer with an equalised learning rate (progressive GAN, section 4.1).

    The weights are drawn from a unit normal and scaled when used, so that Adam, whose steps do not depend on the size of the
    gradient, moves all layers at the same relative speed. ``rate`` slows one layer down against the others.
    """

    def __init__(self, inputs: int, outputs: int, rate: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.rate)


class EqualConv(nn.Module):
    """A convolution with an equalised learning rate that keeps the size of the map."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.padding = 1 / math.sqrt(inputs * kernel**2), kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU that keeps the second moment of a normal input at about 1."""
    return math.sqrt(2) * F.leaky_relu(x, 0.2)


def upsample(x: Tensor) -> Tensor:
    """Twice the size, bilinear."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Mapping(nn.Module):
    """z (N,latent) to w (N,latent): pixel norm, then linear layers that learn at a hundredth of the rate (StyleGAN, appendix C)."""

    def __init__(self, latent: int, layers: int):
        super().__init__()
        self.latent = latent
        self.layers = nn.ModuleList(EqualLinear(latent, latent, rate=0.01) for _ in range(layers))

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z must be (N,{self.latent}) for this generator, got {tuple(z.shape)}")
        w = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()  # pixel norm: all z of one length
        for layer in self.layers:
            w = leaky(layer(w))
        return w


class StyledLayer(nn.Module):
    """One styled layer: (upsampling,) convolution, noise, leaky ReLU, AdaIN (StyleGAN, figure 1b).

    Args:
        inputs: channels that come in; None for the first layer, which has no convolution.
        outputs: channels that go out.
        latent: length of the style.
        up: double the size first.
    """

    def __init__(self, inputs: int | None, outputs: int, latent: int, up: bool = False):
        super().__init__()
        self.up = up
        self.conv = nn.Identity() if inputs is None else EqualConv(inputs, outputs, bias=False)
        self.noise_strength = nn.Parameter(torch.zeros(1, outputs, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, outputs, 1, 1))
        self.style = EqualLinear(latent, 2 * outputs)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        """Features (N,inputs,h,w), style (N,latent), noise (N,1,h',w') or None, to features (N,outputs,h',w')."""
        x = self.conv(upsample(x) if self.up else x)
        if noise is not None:
            x = x + self.noise_strength * noise
        x = leaky(x + self.bias)  # under autocast the convolution's half precision ends here
        mean, std = self.style(style).to(x.dtype)[:, :, None, None].chunk(2, dim=1)
        return renormalise(x, mean, 1 + std, INSTANCE)


class Generator(nn.Module):
    """Random numbers to pictures, by way of one style a layer.

    z (N,latent) --``mapping``--> w (N,latent) --``wplus``--> one w a layer (N,layers,latent) --``synthesis``--> pictures.

    The buffer ``mean_w`` (latent,) is a moving average of the w seen in training: :meth:`truncate` pulls towards it.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.mapping = Mapping(config.latent, config.mapping_layers)
        self.constant = nn.Parameter(torch.randn(1, config.width_at(START), START, START))
        self.styled = nn.ModuleList()
        inputs = None
        for resolution in config.resolutions:
            outputs = config.width_at(resolution)
            self.styled.append(StyledLayer(inputs, outputs, config.latent, up=resolution > START))
            self.styled.append(StyledLayer(outputs, outputs, config.latent))
            inputs = outputs
        self.to_picture = EqualConv(inputs, config.channels, kernel=1)
        self.register_buffer("mean_w", torch.zeros(config.latent))

    @property
    def layers(self) -> int:
        """Number of styles, coarse to fine."""
        return self.config.layers

    def wplus(self, w: Tensor) -> Tensor:
        """The same w (N,latent) for every layer: (N,layers,latent), a view."""
        if w.dim() != 2 or w.shape[1] != self.config.latent:
            raise ValueError(f"w must be (N,{self.config.latent}), got {tuple(w.shape)}")
        return w[:, None].expand(-1, self.layers, -1)

    def truncate(self, w: Tensor, psi: float) -> Tensor:
        """Pull w (N,latent or N,layers,latent) towards its mean: ``mean_w + psi * (w - mean_w)`` (StyleGAN, appendix B).

        psi below 1 trades variety for fidelity: 1 changes nothing, 0 always gives the mean picture.
        """
        return self.mean_w + psi * (w - self.mean_w)

    @torch.no_grad()
    def track(self, w: Tensor, decay: float) -> None:
        """Move ``mean_w`` towards the mean of w (N,latent): by a share of ``1 - decay``."""
        self.mean_w.lerp_(w.detach().mean(0), 1 - decay)

    def noise_shapes(self, count: int) -> list[tuple[int, int, int, int]]:
        """Shapes of the noise inputs of ``count`` pictures, one for each layer: (count,1,h,w)."""
        return [(count, 1, size, size) for size in self.config.resolutions for _ in range(2)]

    def synthesis(self, wplus: Tensor, noise: Noise = None, generator: torch.Generator | None = None) -> Tensor:
        """Styles (N,layers,latent), coarse to fine, to pictures (N,channels,resolution,resolution), in about [-1,1].

        Args:
            noise: None: without noise, so that equal styles give equal pictures; ``"random"``: fresh; or a list with a tensor for
                each layer, shaped as :meth:`noise_shapes` says.
            generator: of random noise, on the device of ``wplus``.

        Raises:
            ValueError: styles or noise have another shape.
        """
        if wplus.dim() != 3 or wplus.shape[1:] != (self.layers, self.config.latent):
            raise ValueError(
                f"styles must be (N,{self.layers},{self.config.latent}) for this generator, got {tuple(wplus.shape)}; "
                "wplus() makes them of one w (N,latent)"
            )
        noises = self._noises(wplus, noise, generator)
        x = self.constant.expand(len(wplus), -1, -1, -1)
        for layer, style, each in zip(self.styled, wplus.unbind(1), noises):
            x = layer(x, style, each)
        return self.to_picture(x)

    def images(
        self, wplus: Tensor, noise: Noise = None, generator: torch.Generator | None = None, colour: bool = False
    ) -> Tensor:
        """Pictures in [0,1], cut to that range: as :meth:`synthesis`; ``colour``: a grey generator repeats its channel 3 times.

        The cut has no gradient where the picture is out of range.
        """
        pictures = (self.synthesis(wplus, noise, generator).to(wplus.dtype) / 2 + 0.5).clamp(0, 1)
        return pictures.expand(-1, 3, -1, -1) if colour else pictures

    def forward(self, z: Tensor, noise: Noise = None, generator: torch.Generator | None = None) -> Tensor:
        """z (N,latent) to pictures in about [-1,1], all layers with the same w."""
        return self.synthesis(self.wplus(self.mapping(z)), noise, generator)

    def _noises(self, wplus: Tensor, noise: Noise, generator: torch.Generator | None) -> list[Tensor | None]:
        shapes = self.noise_shapes(len(wplus))
        if noise is None:
            return [None] * len(shapes)
        if isinstance(noise, str):
            if noise != "random":
                raise ValueError(f"noise is None, 'random' or a list of tensors, got {noise!r}")
            return [torch.randn(shape, generator=generator, device=wplus.device, dtype=wplus.dtype) for shape in shapes]
        if [tuple(each.shape) for each in noise] != shapes:
            raise ValueError(
                f"the noise must be {len(shapes)} tensors shaped {shapes}, got {[tuple(each.shape) for each in noise]}"
            )
        return list(noise)


def save_generator(path: Path, generator: Generator, about: dict[str, Any]) -> None:
    """Write the weights as a safetensors file, with configuration, checksum and ``about`` (JSON: how it was trained) in it.

    Raises:
        ModuleNotFoundError: safetensors is not installed; the message says how to.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in generator.state_dict().items()}
    written = {"format": FORMAT, "config": json.dumps(asdict(generator.config)), "about": json.dumps(about)}
    content = _safetensors().torch.save(state, {**written, "sha256": state_checksum(state)})
    with atomic_write(path) as file:
        file.write(content)


def load_generator(path: Path, config: GeneratorConfig | None = None) -> Generator:
    """The generator of a file of :func:`save_generator`: on the CPU, in eval mode, its weights frozen.

    Args:
        config: that it must have; None: whatever the file says.

    Raises:
        CheckpointError: the file is missing, damaged, or of another configuration.
        ModuleNotFoundError: safetensors is not installed; the message says how to.
    """
    written, state = _read(path)
    try:
        found = GeneratorConfig(**json.loads(written["config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has a configuration that this library does not know ({error})") from error
    if config is not None and found != config:
        wanted, has = asdict(config), asdict(found)
        differing = "; ".join(f"{name} {has[name]}, not {wanted[name]}" for name in has if has[name] != wanted[name])
        raise CheckpointError(
            f"{path} holds a generator of another configuration ({differing}): load the file that fits, or train one anew"
        )
    generator = Generator(found)
    own = {name: tuple(value.shape) for name, value in generator.state_dict().items()}
    if own != {name: tuple(value.shape) for name, value in state.items()}:
        raise CheckpointError(f"{path} does not hold the weights of the generator that its configuration describes")
    generator.load_state_dict(state)
    return generator.eval().requires_grad_(False)


def about_generator(path: Path) -> dict[str, Any]:
    """What :func:`save_generator` was told about the generator in this file.

    Raises:
        CheckpointError: the file is missing or damaged.
        ModuleNotFoundError: safetensors is not installed; the message says how to.
    """
    return json.loads(_read(path)[0]["about"])


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"there is no generator file {path}: train one, or fetch the file")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            written = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from error
    if written.get("format") != FORMAT or not {"config", "about", "sha256"} <= written.keys():
        raise CheckpointError(f"{path} is no generator file of this library: its metadata do not say {FORMAT!r}")
    if state_checksum(state) != written["sha256"]:
        raise CheckpointError(f"{path} is damaged: its weights do not have the checksum that it names; fetch it again")
    return written, state


def _safetensors():
    try:
        import safetensors.torch

        return safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("generator files need safetensors: pip install 'advbn_lib[generation]'") from error
