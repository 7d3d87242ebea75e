"""The training of a small StyleGAN: two networks against each other, in one flat loop.

Source: non-saturating loss from Goodfellow et al., "Generative Adversarial Nets" (NeurIPS 2014), section 3; R1 from Mescheder,
Geiger and Nowozin, "Which Training Methods for GANs do actually Converge?" (ICML 2018); style mixing and the moving average of w
from Karras et al., "A Style-Based Generator Architecture for Generative Adversarial Networks" (CVPR 2019), section 3.1 and
appendix B; lazy R1 from Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (CVPR 2020), section 3.1; moving
average of the generator's weights from Karras et al., "Progressive Growing of GANs" (ICLR 2018).

Choices of this reconstruction, and why:

- the pictures of a step serve both networks: the discriminator learns on them, then the generator through the changed
  discriminator. That saves one pass through the generator;
- every draw of a step is a function of (seed, step) alone, so that a resumed training continues as if it had not been killed;
- float32 throughout: the second derivatives of R1 do not last in half precision.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.checkpoints import load_checkpoint, save_checkpoint
from advbn_lib.data.classes import require_all_classes
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.files import atomic_write
from advbn_lib.models.style_discriminator import Discriminator
from advbn_lib.models.stylegan import Generator, GeneratorConfig
from advbn_lib.progress import progress
from advbn_lib.provenance import code_hash

LOOK_EVERY = 50  # steps between looks at the losses: each look makes the host wait for the device
SAMPLES = 64  # pictures of a sample grid


@dataclass(frozen=True)
class GANSchedule:
    """How a generator is trained.

    Args:
        steps: updates of each network.
        batch_size: real pictures a step, and as many made ones. At least 2: the discriminator compares pictures.
        lr: learning rate of both Adams, whose betas are 0 and 0.99.
        r1: weight of the penalty on the discriminator's gradient at real pictures; 0: none.
        r1_every: steps between penalties, each with ``r1_every`` times the weight (lazy regularisation).
        mixing: share of the made pictures that have the styles of two w, with a crossover at a random layer.
        average: half-life of the generator's moving average, in pictures; at the start shorter: a twentieth of the pictures so far.
        w_decay: of the moving average of w, a step.
        mirror: show half of the real pictures mirrored; not for digits.
        won: the discriminator wins a stretch of ``LOOK_EVERY`` steps if this share of its answers, or more, is right; above 1: never.
        lost: it loses a stretch if no more than this share is right; below 0: never. Guessing gives 0.5, with
            some spread: the default is a little above.
        patience: steps in a row, all won or all lost, after which the training has diverged.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int
    batch_size: int = 16
    lr: float = 2e-3
    r1: float = 0.2
    r1_every: int = 8
    mixing: float = 0.9
    average: float = 10_000
    w_decay: float = 0.995
    mirror: bool = False
    won: float = 0.999
    lost: float = 0.53
    patience: int = 2_000

    def __post_init__(self):
        if min(self.steps, self.r1_every, self.patience) < 1 or self.batch_size < 2:
            raise ValueError(
                "steps, r1_every and patience must be at least 1 and batch_size at least 2, "
                f"got {self.steps}, {self.r1_every}, {self.patience} and {self.batch_size}"
            )
        if not self.lr > 0 or not self.average > 0 or not self.r1 >= 0:
            raise ValueError(
                f"lr and average must be above 0 and r1 at least 0, got {self.lr}, {self.average}, {self.r1}"
            )
        if not (0 <= self.mixing <= 1 and 0 <= self.w_decay < 1 and self.lost < self.won):
            raise ValueError(
                "mixing is from 0 to 1, w_decay from 0 to below 1, and lost below won, "
                f"got {self.mixing}, {self.w_decay}, {self.lost} and {self.won}"
            )


@dataclass
class GANHistory:
    """Where a training stands and what it has seen: what a resumed run needs beside the weights.

    Attributes:
        step: the next one. seconds: spent on training so far.
        curves: for each stretch of ``LOOK_EVERY`` steps (the last may be shorter) the means of ``NAMES``.
        won, lost: steps in a row, up to now, that the discriminator has won or lost.
    """

    NAMES = ("discriminator_loss", "generator_loss", "real_right", "made_right")

    step: int = 0
    seconds: float = 0.0
    curves: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in GANHistory.NAMES})
    won: int = 0
    lost: int = 0

    def add(self, waiting: list[Tensor], schedule: GANSchedule) -> str | None:
        """Take figures (``NAMES``) over from the device; what is wrong, in words, if the training has diverged."""
        means, count = torch.stack(waiting).mean(0).tolist(), len(waiting)
        waiting.clear()
        for name, value in zip(self.NAMES, means):
            self.curves[name].append(value)
        right = (means[2] + means[3]) / 2
        self.won = self.won + count if right >= schedule.won else 0
        self.lost = self.lost + count if right <= schedule.lost else 0
        if not all(math.isfinite(value) for value in means):
            return "a loss is NaN or infinite"
        if self.won >= schedule.patience:
            return (
                f"the discriminator has won: at least {schedule.won:.1%} of its answers were right for {self.won} steps"
            )
        if self.lost >= schedule.patience:
            return f"the discriminator has lost: at most {schedule.lost:.1%} of its answers were right for {self.lost} steps"
        return None

    @property
    def healthy(self) -> bool:
        """Neither network is winning for good as far as one can see."""
        return self.won == self.lost == 0


@dataclass(frozen=True)
class TrainedGAN:
    """What :func:`train_gan` gives: the moving average of the generator, in eval mode, the discriminator, and the history."""

    generator: Generator
    discriminator: Discriminator
    history: GANHistory


class Diverged(RuntimeError):
    """A training of a generator was stopped, because it would not have recovered.

    Attributes:
        generator: the moving average as it was last in order. step: after how many steps that was.
    """

    def __init__(self, message: str, generator: Generator, step: int):
        super().__init__(message)
        self.generator, self.step = generator, step


class Draws:
    """All that one step draws, a function of (seed, step, device) alone."""

    def __init__(self, seed: int, step: int, device: torch.device, count: int):
        self.generator = torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)
        self.device, self.count = device, count

    def real(self, pixels: Tensor, mirror: bool) -> Tensor:
        """Pictures of the set (M,C,R,R; uint8), in [-1,1]: N,C,R,R. With replacement."""
        chosen = torch.randint(len(pixels), (self.count,), generator=self.generator, device=self.device)
        pictures = pixels[chosen].float() / 127.5 - 1
        return torch.where(self._share(0.5)[:, None, None, None], pictures.flip(3), pictures) if mirror else pictures

    def styles(self, generator: Generator, mixing: float) -> tuple[Tensor, Tensor]:
        """w (2 * N,latent), and styles (N,layers,latent) of which a share of ``mixing`` cross over from one w to another."""
        z = torch.randn(2 * self.count, generator.config.latent, generator=self.generator, device=self.device)
        w = generator.mapping(z)
        first, second = (generator.wplus(part) for part in w.chunk(2))
        cut = torch.randint(1, generator.layers, (self.count,), generator=self.generator, device=self.device)
        cut = torch.where(self._share(mixing), cut, generator.layers)
        layer = torch.arange(generator.layers, device=self.device)
        return w, torch.where((layer < cut[:, None])[:, :, None], first, second)

    def _share(self, share: float) -> Tensor:
        return torch.rand(self.count, generator=self.generator, device=self.device) < share


def train_gan(
    images: ImageSet, config: GeneratorConfig, schedule: GANSchedule, seed: int, device: torch.device | str = "cpu",
    folder: Path | None = None, sample_every: int = 1_000, after_samples: Callable[[int, Tensor], None] | None = None,
    save_every: float = 60.0, show_progress: bool = True,
) -> TrainedGAN:  # fmt: skip
    """Train a generator of pictures like ``images``, from the checkpoint in ``folder`` on if there is one of this very training.

    Killed and started again, it ends as if it had not been: on a CPU bit for bit. It does not depend on torch's own random state.

    Args:
        images: are kept on the device, as uint8.
        folder: for a checkpoint of the training and a copy of the last generator in order, both written about every ``save_every``
            seconds, and for sample grids, ``samples-STEP.png``; None: nothing is written.
        sample_every: steps between grids of the same 64 made pictures.
        after_samples: called with each step and its grid (64,C,R,R), in [0,1] and on the device. A resumed run calls it again
            for the steps that it repeats.

    Raises:
        DataError: the pictures have another size or other channels than the configuration, or a class has none: what is not
            shown is not made. Pictures without labels are of one class.
        Diverged: a loss or a weight is NaN or infinite, or one network has won for good, as ``schedule`` says; it carries the last
            generator in order, and names the file in ``folder`` that has it.
        CheckpointError: the checkpoint is damaged.
    """
    device = torch.device(device)
    pixels = training_pixels(require_all_classes(images), config).to(device)
    generator, discriminator = new_networks(config, seed, device)
    average = copy.deepcopy(generator).eval().requires_grad_(False)
    optimizers = [
        torch.optim.Adam(net.parameters(), schedule.lr, betas=(0.0, 0.99)) for net in (generator, discriminator)
    ]
    parts = {"generator": generator, "discriminator": discriminator, "average": average}
    parts |= {"generator_adam": optimizers[0], "discriminator_adam": optimizers[1]}
    key = training_key(images, config, schedule, seed)
    checkpoint = None if folder is None else folder / f"gan-{key[:12]}.pt"
    resume = checkpoint is not None and checkpoint.exists()
    history = GANHistory(**load_checkpoint(checkpoint, parts, key)) if resume else GANHistory()
    good = Good(average, history.step, key, None if folder is None else folder / f"good-{key[:12]}.pt")
    waiting, looked, saved = [], time.perf_counter(), time.perf_counter()
    steps = range(history.step, schedule.steps)
    for step in progress(steps, "generator", show_progress, initial=history.step, total=schedule.steps):
        waiting.append(gan_step(generator, discriminator, optimizers, pixels, schedule, seed, step))
        move_average(average, generator, schedule, step)
        history.step = step + 1
        over = history.step == schedule.steps
        if over or history.step % LOOK_EVERY == 0:
            problem = history.add(waiting, schedule) or not_finite(generator, discriminator)
            now = time.perf_counter()
            history.seconds, looked = history.seconds + now - looked, now
            if problem is not None:
                raise good.diverged(problem, history.step)
            if history.healthy:
                good.keep(average, history.step)
            if checkpoint is not None and (over or now - saved > save_every):
                good.save()
                save_checkpoint(checkpoint, parts, asdict(history), key)
                looked = saved = time.perf_counter()
        if over or history.step % sample_every == 0:
            show_samples(average, history.step, seed, folder, after_samples)
    return TrainedGAN(average, discriminator.eval(), history)


def gan_step(
    generator: Generator, discriminator: Discriminator, optimizers: list[torch.optim.Optimizer], pixels: Tensor,
    schedule: GANSchedule, seed: int, step: int,
) -> Tensor:  # fmt: skip
    """One update of the discriminator, then one of the generator; their figures (``GANHistory.NAMES``), on the device."""
    draws = Draws(seed, step, pixels.device, schedule.batch_size)
    real = draws.real(pixels, schedule.mirror)
    w, styles = draws.styles(generator, schedule.mixing)
    generator.track(w, schedule.w_decay)
    made = generator.synthesis(styles, "random", draws.generator)

    # The discriminator: high on real pictures, low on made ones, and flat around the real ones.
    penalised = schedule.r1 > 0 and step % schedule.r1_every == 0
    on_real = discriminator(real.requires_grad_(penalised))
    on_made = discriminator(made.detach())
    loss = F.softplus(-on_real).mean() + F.softplus(on_made).mean()
    penalty = schedule.r1_every * schedule.r1 / 2 * squared_slope(on_real, real) if penalised else 0.0
    update(optimizers[1], loss + penalty)

    # The generator: what it made should look real to the changed discriminator.
    discriminator.requires_grad_(False)
    generator_loss = F.softplus(-discriminator(made)).mean()
    update(optimizers[0], generator_loss)
    discriminator.requires_grad_(True)
    right = [(on_real > 0).float().mean(), (on_made < 0).float().mean()]
    return torch.stack([loss.detach(), generator_loss.detach(), *right])


def squared_slope(logits: Tensor, pictures: Tensor) -> Tensor:
    """Squared length of the logits' gradient at each picture, averaged; can itself be differentiated (R1)."""
    (slope,) = torch.autograd.grad(logits.sum(), pictures, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


@torch.no_grad()
def move_average(average: Generator, generator: Generator, schedule: GANSchedule, step: int) -> None:
    """Pull the moving average towards the generator as it is after ``step``."""
    half_life = min(schedule.average, 0.05 * (step + 1) * schedule.batch_size)
    share = 1 - 0.5 ** (schedule.batch_size / half_life)
    for old, new in zip(average.parameters(), generator.parameters()):
        old.lerp_(new, share)
    average.mean_w.copy_(generator.mean_w)  # an average already


def not_finite(*networks: nn.Module) -> str | None:
    """What is wrong, in words, if a weight of a network is NaN or infinite. A loss shows it only one step later."""
    finite = [torch.isfinite(weight).all() for network in networks for weight in network.parameters()]
    return None if bool(torch.stack(finite).all()) else "a weight is NaN or infinite"


class Good:
    """A copy of the moving average as it was last in order, in memory and, by :meth:`save`, in a file.

    Args:
        average, step: what to begin with; a file of the same training goes before it.
        key: of the training. path: of the file; None: there is none.
    """

    def __init__(self, average: Generator, step: int, key: str, path: Path | None):
        self.generator, self.step, self.key, self.path = copy.deepcopy(average), step, key, path
        if step and path is not None and path.exists():
            self.step = load_checkpoint(path, {"average": self.generator}, key)["step"]

    def keep(self, average: Generator, step: int) -> None:
        self.generator.load_state_dict(average.state_dict())
        self.step = step

    def save(self) -> None:
        if self.path is not None:
            save_checkpoint(self.path, {"average": self.generator}, {"step": self.step}, self.key)

    def diverged(self, problem: str, step: int) -> Diverged:
        self.save()
        kept = "that state is kept" if self.path is None else f"that state is kept in {self.path.name}"
        return Diverged(
            f"{problem}, at step {step}. The generator was last in order after step {self.step}: {kept}. Try a lower learning rate; "
            "a larger r1 if the discriminator wins, a smaller one if it loses; or another seed",
            self.generator, self.step,
        )  # fmt: skip


@torch.no_grad()
def show_samples(
    average: Generator, step: int, seed: int, folder: Path | None, after_samples: Callable[[int, Tensor], None] | None
) -> None:
    """Make the sample grid of a step: into the folder, and to the callback."""
    if folder is None and after_samples is None:
        return
    draws = torch.Generator().manual_seed(seed)  # on the CPU: the same z on every device
    device = average.mean_w.device
    z = torch.randn(SAMPLES, average.config.latent, generator=draws).to(device)
    noise = [torch.randn(shape, generator=draws).to(device) for shape in average.noise_shapes(SAMPLES)]
    pictures = average.images(average.wplus(average.mapping(z)), noise)
    if folder is not None:
        with atomic_write(folder / f"samples-{step:07d}.png") as file:
            file.write(as_png(pictures))
    if after_samples is not None:
        after_samples(step, pictures)


def as_png(pictures: Tensor, columns: int = 8) -> bytes:
    """Pictures in [0,1] (N,C,R,R) side by side, as the content of a PNG file."""
    from torchvision.io import encode_png
    from torchvision.utils import make_grid

    grid = make_grid(pictures.detach().cpu(), nrow=columns, padding=1)
    return encode_png((grid * 255).round().to(torch.uint8)).numpy().tobytes()


def training_pixels(images: ImageSet, config: GeneratorConfig) -> Tensor:
    """The pictures as the configuration has them: uint8, N,channels,resolution,resolution.

    Raises:
        DataError: they have another size; or the configuration is grey and they are not.
    """
    size = tuple(images.images.shape[2:])
    if size != (config.resolution, config.resolution):
        raise DataError(
            f"{images.name}: the pictures are {size[0]}x{size[1]}, but the generator's resolution is {config.resolution}: "
            "pad or resize them, or choose the resolution that fits"
        )
    if config.channels == 3:
        return images.images
    if not bool((images.images == images.images[:, :1]).all()):
        raise DataError(f"{images.name}: the pictures are coloured, but the generator is grey: set channels to 3")
    return images.images[:, :1].contiguous()


def new_networks(config: GeneratorConfig, seed: int, device: torch.device) -> tuple[Generator, Discriminator]:
    """Generator and discriminator with weights drawn from ``seed``; torch's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Generator(config).to(device), Discriminator(config).to(device)


def training_key(images: ImageSet, config: GeneratorConfig, schedule: GANSchedule, seed: int) -> str:
    """SHA-256 that names a training: pictures, configuration, schedule, seed, and the code of this module."""
    identity = {
        "data": images.checksum, "config": asdict(config), "schedule": asdict(schedule), "seed": seed,
        "code": code_hash(["advbn_lib.gan_training"]),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
