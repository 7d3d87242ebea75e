"""What the checks give to a student's functions: small networks, defences, and what asks a set for its gradient.

Both sides build from the same seeds, so a check computes its reference with the same weights without sending them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.assignments.defences import Defence, build_defence
from advbn_lib.assignments.small_digits import small_network
from advbn_lib.grading.given import given


class Block(nn.Module):
    """A convolution, a BatchNorm that is not in a Sequential, and a ReLU."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


@given("tail")
def small_tail(
    seed: int, channels: int = 4, classes: int = 5, training: bool = False, mixed: bool = False, frozen: bool = False,
    dtype: str = "float64",
) -> nn.Sequential:  # fmt: skip
    """The upper part of a small network: features (N,channels,H,W) to logits (N,classes). It has two BatchNorms.

    Its running statistics are those of a trained network: neither 0 and 1, nor those of the next batch.

    Args:
        training: the mode of all its modules; ``mixed``: the first BatchNorm is in the other mode.
        frozen: no parameter requires a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global numbers
        tail = nn.Sequential(
            Block(channels, 6), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(24, classes),
        ).to(getattr(torch, dtype))  # fmt: skip
    with torch.no_grad():
        for name, value in [*tail.named_parameters(), *tail.named_buffers()]:
            if value.is_floating_point():
                drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
                scale = value[0].numel() ** -0.5 if value.dim() > 1 else 0.3
                around_one = "running_var" in name or ("weight" in name and value.dim() == 1)
                value.copy_((1 + scale * drawn).abs() + 0.2 if around_one else 1.5 * scale * drawn)
    tail.train(training).requires_grad_(not frozen)
    if mixed:
        tail[0].norm.train(not training)
    return tail


def small_batch(seed: int, count: int = 6, channels: int = 4, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Features (count,channels,5,5), float64, and labels (count,) that fit :func:`small_tail`.

    All features are above 0. At 0 itself relu and clamp_min have different gradients, and both are right.
    """
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand((count, channels, 1, 1), generator=generator, dtype=torch.float64)
    spread = 0.5 + 2 * torch.rand((count, channels, 1, 1), generator=generator, dtype=torch.float64)
    x = 0.01 + level + spread * torch.rand((count, channels, 5, 5), generator=generator, dtype=torch.float64) ** 2
    return x, torch.randint(0, classes, (count,), generator=generator)


@given("defence")
def defence(kind: str, weights: Mapping[str, Tensor], seed: int = 0) -> Defence:
    """A defence of assignment 3 with these weights; ``seed`` is of its random numbers, if it has any."""
    return build_defence(kind, dict(weights), seed)


@given("losses")
def losses(weights: Mapping[str, Tensor], labels: Tensor) -> Callable[[Tensor], Tensor]:
    """A network without a defence, as the function from images to cross-entropies (N,)."""
    network = small_network(0)
    network.load_state_dict(dict(weights))
    network.eval().requires_grad_(False)
    return lambda images: F.cross_entropy(network(images), labels, reduction="none")


class PullBack:
    """Asks a perturbation set for the gradient in its delta."""

    def pull(self, perturbation: object, x: Tensor, delta: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        """The gradient of ``(apply(x, delta) * upstream).sum()`` in each part of ``delta``; zeros where there is none."""
        leaves = tuple(part.detach().clone().requires_grad_() for part in delta)
        with torch.enable_grad():
            changed = perturbation.apply(x, leaves)
            if not changed.requires_grad:
                return tuple(torch.zeros_like(leaf) for leaf in leaves)
            gradients = torch.autograd.grad((changed * upstream).sum(), leaves, allow_unused=True)
        return tuple(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients))


@given("pull_back")
def pull_back() -> PullBack:
    """Once per check: see :class:`PullBack`."""
    return PullBack()


class Modes:
    """Sets a module's mode; a module's own ``train`` returns the module, which no check can receive."""

    def set(self, module: nn.Module, training: bool) -> None:
        """All submodules to train or eval mode."""
        module.train(training)


class Probe:
    """Answers questions about gradients: what comes back to a check is a plain tensor, which has none."""

    def wants_gradient(self, values: object) -> bool:
        """Whether one of these tensors requires a gradient."""
        return any(value.requires_grad for value in values)

    def reaches_features(self, layer: nn.Module, features: Tensor, labels: Tensor) -> bool:
        """Whether a gradient flows from the layer's two losses to the features."""
        leaf = features.clone().requires_grad_()
        with torch.enable_grad():
            total = sum(layer(leaf, labels))
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        return gradient is not None


@given("probe")
def probe() -> Probe:
    """See :class:`Probe`."""
    return Probe()


@given("modes")
def modes() -> Modes:
    """See :class:`Modes`."""
    return Modes()
