"""Dual batch normalisation with a fusing weight: each sample is normalised somewhere between the clean and the adversarial set.

Source: "Adaptive Feature Alignment for Adversarial Training" (AFA, arXiv 2105.15157). **This is a reconstruction.** Only the
abstract's mechanism is known to us: a fusing weight, predicted in a dual-BN architecture, because feature statistics move
smoothly with the attack's strength. There is no public code. Our choices, each with its reason:

- Outputs are fused, the simplest meaning of "fusing weight in dual BN"; other readings are in :data:`SHARED`.
- One weight per layer and sample: strength is one number, and statistics shift differently by depth.
- The predictor sees the layer's own input, pooled over positions, and is a small perceptron that ends in a sigmoid. Its last
  layer starts at zero, so that every weight is 0.5 at first and neither end point is favoured.
- Its input is in units of the clean set's running statistics, so that one learning rate suits all layers.
- When fusing, both sets use their running statistics, in train mode too, and update nothing. With batch statistics a sample's
  output would depend on the strengths that the others were attacked with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advbn_lib.dual_bn import BRANCHES, Branch, DualBatchNorm, replace_modules
from advbn_lib.statistics import INSTANCE, mean, std

Mix = Literal["output", "parameters", "statistics", "affine"]

# What the two sets share, for each way to mix them. With the rest shared, only the statistics or only the affine parameters differ.
SHARED: dict[Mix, tuple[str, ...]] = {
    "output": (),
    "parameters": (),
    "statistics": ("weight", "bias"),
    "affine": ("running_mean", "running_var", "num_batches_tracked"),
}


@dataclass(frozen=True)
class Fusion:
    """How two BatchNorm sets become one.

    Args:
        mix: ``"output"``: (1 - w) clean(x) + w adversarial(x). The others interpolate parameters and normalise once:
            ``"parameters"``: mean, variance, scale and offset; ``"statistics"``: mean and variance, and the sets share scale and
            offset; ``"affine"``: scale and offset, and the sets share mean and variance.
        weights: one for each ``"layer"`` and sample, or one for each sample in the whole ``"network"``, predicted at the first
            layer.
        moments: the predictor also sees the channels' standard deviations over positions, not their means alone.
        reduction: the predictor's hidden width is the number of channels divided by this, but at least 16. Our choice:
            pooled features differ little between images, so that a ReLU is likely to be off for all or on for all; with a few
            of them a layer's weight could not follow its input.
    """

    mix: Mix = "output"
    weights: Literal["layer", "network"] = "layer"
    moments: bool = False
    reduction: int = 16

    def __post_init__(self):
        if self.mix not in SHARED:
            raise ValueError(f"mix is one of {', '.join(SHARED)}; got {self.mix!r}")
        if self.weights not in ("layer", "network"):
            raise ValueError(f"weights is 'layer' or 'network', got {self.weights!r}")
        if self.reduction < 1:
            raise ValueError(f"reduction must be at least 1, got {self.reduction}")


class WeightPredictor(nn.Module):
    """Pooled features (N,F) to fusing weights (N,) from 0 (clean) to 1 (adversarial); 0.5 before training."""

    def __init__(self, features: int, hidden: int):
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.last(self.hidden(pooled).relu()).sigmoid().flatten()


class _Handed:
    """Hands the weights of one forward pass from the first layer to the others, where the network has one weight a sample."""

    weights: Tensor | None = None


class FusedBatchNorm(DualBatchNorm):
    """Two BatchNorms and a weight between them.

    ``branch`` is ``"fused"`` at first; :func:`~advbn_lib.dual_bn.use_branch` chooses an end point, and everything else that
    works on a dual BatchNorm works here. At weight 0 and 1 the fused output is that of the end points in eval mode, bit for bit.

    When fusing, no running statistic is updated and none of the batch is used, in whatever mode the layer is; in an end point
    the mode means what it means in any BatchNorm.

    Args:
        batch_norm: a BatchNorm2d, which becomes the clean set and is copied for the adversarial one; or a dual one, whose two
            sets are taken over (where ``fusion`` shares a part, the clean set's).
        fusion: how the sets are mixed.
        handed: for one weight in the network: where the first layer leaves it.
        first: whether this layer predicts; False: it takes the weight from ``handed``.

    Raises:
        TypeError: another kind of layer, such as one with an activation in it.
        ValueError: it has no running statistics, or nothing to mix.
    """

    branch: Branch | Literal["fused"]

    def __init__(
        self, batch_norm: _BatchNorm | DualBatchNorm, fusion: Fusion = Fusion(), handed: _Handed | None = None, first: bool = True
    ):  # fmt: skip
        dual = isinstance(batch_norm, DualBatchNorm)
        clean = batch_norm.clean if dual else batch_norm
        if type(clean) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            raise TypeError(f"only BatchNorm2d and SyncBatchNorm can be fused, got {type(clean).__name__}")
        if clean.running_mean is None:
            raise ValueError(
                "fusing needs running statistics, and this BatchNorm keeps none: build it with track_running_stats=True"
            )
        if fusion.mix == "affine" and not clean.affine:
            raise ValueError("mix='affine' has nothing to mix: this BatchNorm has no affine parameters")
        super().__init__(clean)
        if dual:
            self.adversarial = batch_norm.adversarial
        self.branch, self.fusion, self.handed = "fused", fusion, handed
        self.forced: Tensor | None = None
        self.listener = None
        channels = clean.num_features
        inputs, hidden = (1 + fusion.moments) * channels, max(channels // fusion.reduction, 16)
        self.predictor = WeightPredictor(inputs, hidden).to(clean.running_mean) if first else None
        self._share()
        self.train(batch_norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.branch != "fused":
            chosen = getattr(self, self.branch)
            # The same formula as when fusing: else the end points would differ from weights 0 and 1 by rounding.
            return chosen(x) if chosen.training or self._fuses_outputs else self._normalise(x, *_parameters(chosen))
        weights = self.fusing_weights(x)
        if self.listener is not None:
            self.listener(weights)
        weights = weights.view(-1, 1, 1, 1)
        if self._fuses_outputs:
            # lerp returns its first or second argument exactly where the weight is 0 or 1.
            return torch.lerp(_by_running(self.clean, x), _by_running(self.adversarial, x), weights.to(x.dtype))
        pairs = zip(_parameters(self.clean), _parameters(self.adversarial))
        return self._normalise(x, *(None if old is None else torch.lerp(old, new, weights) for old, new in pairs))

    def fusing_weights(self, x: Tensor) -> Tensor:
        """The weights (N,) that inputs (N,C,H,W) are fused with: forced ones, else predicted ones (with their graph).

        Raises:
            ValueError: as many weights are forced as another batch has samples.
            RuntimeError: with one weight in the network: the layer that predicts it has not run.
        """
        if self.forced is not None:
            if self.forced.dim() and len(self.forced) != len(x):
                raise ValueError(f"weights are forced for {len(self.forced)} samples, but this batch has {len(x)}")
            return self.forced.expand(len(x))
        if self.predictor is None:
            if self.handed is None or self.handed.weights is None:
                raise RuntimeError(
                    "the network's fusing weight is predicted at its first BatchNorm, which has not run before this one: "
                    "run the whole model, or use Fusion(weights='layer')"
                )
            return self.handed.weights
        weights = self.predictor(self._pooled(x)).to(self.clean.running_mean.dtype)
        if self.handed is not None:
            self.handed.weights = weights
        return weights

    def extra_repr(self) -> str:
        return f"branch={self.branch!r}, mix={self.fusion.mix!r}"

    @property
    def _fuses_outputs(self) -> bool:
        # With shared statistics, interpolating the affine parameters is fusing the outputs.
        return self.fusion.mix in ("output", "affine")

    def _pooled(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        clean = self.clean
        scale = (clean.running_var + clean.eps).rsqrt()
        pooled = [(mean(x, INSTANCE).flatten(1) - clean.running_mean) * scale]
        if self.fusion.moments:
            pooled.append(std(x, INSTANCE, clean.eps, unbiased=False).flatten(1) * scale - 1)
        return torch.cat(pooled, 1)

    def _normalise(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        normalised = (x - mean) * (variance + self.clean.eps).rsqrt()
        return (normalised if weight is None else normalised * weight + bias).to(x.dtype)

    def _share(self) -> None:
        for name in SHARED[self.fusion.mix]:
            setattr(self.adversarial, name, getattr(self.clean, name))

    def _apply(self, fn, recurse=True):
        # Moving a module to a device moves each buffer on its own: what was one tensor would become two.
        super()._apply(fn, recurse)
        self._share()
        return self


def fuse_batch_norms(model: nn.Module, fusion: Fusion = Fusion()) -> int:
    """Replace every BatchNorm of ``model``, single or dual, by a :class:`FusedBatchNorm`, in place.

    Returns:
        How many layers the model then has that fuse. Those that it had already stay as they are.

    Raises:
        ValueError: the model has no BatchNorm, has one without running statistics, or has layers that fuse in another way.
        TypeError: a kind of BatchNorm that cannot be fused.
    """
    fused = fused_layers(model)
    if fused:
        other = {layer.fusion for layer in fused.values()} - {fusion}
        if other:
            raise ValueError(f"the model fuses already, by {other.pop()}, not by {fusion}: begin with a fresh model")
        return len(fused)
    duals = {name: module for name, module in model.named_modules() if isinstance(module, DualBatchNorm)}
    inside = {id(getattr(dual, branch)) for dual in duals.values() for branch in BRANCHES}
    found = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and id(m) not in inside} | duals
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm to fuse. If its BatchNorms were folded into the convolutions for deployment, "
            "take the model from before that"
        )
    handed, new = _Handed() if fusion.weights == "network" else None, {}
    for module in [module for name, module in model.named_modules() if name in found]:  # in the model's order
        new[module] = FusedBatchNorm(module, fusion, handed, first=handed is None or not new)
    replace_modules(model, new)  # all could be made: only now is the model touched
    if handed is not None:
        model.register_forward_hook(_forget_weights, always_call=True)
    return len(new)


def unfuse_batch_norms(model: nn.Module) -> int:
    """Make each layer that fuses a plain :class:`~advbn_lib.dual_bn.DualBatchNorm` of its two sets, in place, without predictors.

    Returns:
        How many there were.
    """
    new = {}
    for layer in fused_layers(model).values():
        dual = DualBatchNorm(layer.clean)
        dual.adversarial = layer.adversarial
        new[layer] = dual.train(layer.training)
    replace_modules(model, new)
    return len(new)


def fused_layers(model: nn.Module) -> dict[str, FusedBatchNorm]:
    """The layers that fuse, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedBatchNorm)}


def predictor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the fusing weights are predicted with."""
    predictors = [layer.predictor for layer in fused_layers(model).values() if layer.predictor is not None]
    return [parameter for predictor in predictors for parameter in predictor.parameters()]


@contextmanager
def use_fused(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block ``model`` fuses its BatchNorm sets. Afterwards each layer is as before, also after an error."""
    layers = list(fused_layers(model).values())
    before = [layer.branch for layer in layers]
    try:
        for layer in layers:
            layer.branch = "fused"
        yield model
    finally:
        for layer, old in zip(layers, before):
            layer.branch = old


@contextmanager
def force_weights(model: nn.Module, weights: float | Tensor | Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Inside the block, layers that fuse do so with these weights and predict none. Afterwards as before, also after an error.

    Args:
        weights: from 0 (clean) to 1 (adversarial): one for all, one for each sample (N,), or a mapping with these for each layer,
            as :func:`recorded_weights` gives. An attack on a model with forced weights is weaker than one on the model itself.

    Raises:
        ValueError: a weight is out of [0,1], the mapping's names are not the model's layers, or none of its layers fuses.
    """
    layers = fused_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layer that fuses: call fuse_batch_norms on it first")
    if isinstance(weights, Mapping) and weights.keys() != layers.keys():
        raise ValueError(f"weights are for {sorted(weights)}, but the layers that fuse are {sorted(layers)}")
    if not isinstance(weights, Mapping):
        weights = dict.fromkeys(layers, weights)
    chosen = {name: _checked(weights[name]).to(layer.clean.running_mean) for name, layer in layers.items()}
    before = [layer.forced for layer in layers.values()]
    try:
        for name, layer in layers.items():
            layer.forced = chosen[name]
        yield model
    finally:
        for layer, old in zip(layers.values(), before):
            layer.forced = old


@contextmanager
def recorded_weights(model: nn.Module, graph: bool = False) -> Iterator[dict[str, Tensor]]:
    """Inside the block, the dict holds each layer's weights (N,) of the latest forward pass that fused, by name.

    Args:
        graph: keep their graph, so that a loss can be put on them; else they are detached.
    """
    layers, seen = fused_layers(model), {}
    before = [layer.listener for layer in layers.values()]
    try:
        for name, layer in layers.items():
            layer.listener = partial(_record, seen, name, graph)
        yield seen
    finally:
        for layer, old in zip(layers.values(), before):
            layer.listener = old


def _by_running(batch_norm: _BatchNorm, x: Tensor) -> Tensor:
    """What the BatchNorm gives in eval mode, whatever its mode."""
    return F.batch_norm(
        x, batch_norm.running_mean, batch_norm.running_var, batch_norm.weight, batch_norm.bias, False, 0.0, batch_norm.eps
    )  # fmt: skip


def _parameters(batch_norm: _BatchNorm) -> tuple[Tensor | None, ...]:
    """Running mean and variance, scale and offset: each 1,C,1,1, or None."""
    parts = batch_norm.running_mean, batch_norm.running_var, batch_norm.weight, batch_norm.bias
    return tuple(None if part is None else part.view(1, -1, 1, 1) for part in parts)


def _checked(weights: float | Tensor) -> Tensor:
    weights = torch.as_tensor(weights, dtype=None if isinstance(weights, Tensor) else torch.float64)
    if weights.dim() > 1 or not bool(((weights >= 0) & (weights <= 1)).all()):
        raise ValueError(
            f"a fusing weight is from 0 (clean) to 1 (adversarial), one for all or one for each sample (N,); got {weights}"
        )
    return weights


def _record(seen: dict[str, Tensor], name: str, graph: bool, weights: Tensor) -> None:
    seen[name] = weights if graph else weights.detach()


def _forget_weights(model: nn.Module, *_: object) -> None:
    for layer in fused_layers(model).values():
        if layer.handed is not None:
            layer.handed.weights = None
