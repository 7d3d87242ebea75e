"""Cut a classifier in two at a named layer, so that ``tail(features(x)) == model(x)``.

The model's forward is traced once with :mod:`torch.fx` in each mode. The two halves are functions that run on the model
itself: training a half trains the model, and a layer without parts that is replaced later (a BatchNorm by a dual one, say) is used
from then on. A block made of layers is taken apart when it is traced: replace blocks before the cut, and hang hooks on layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advbn_lib.dual_bn import DualBatchNorm
from advbn_lib.modes import evaluating

CANNOT_TRACE = (fx.proxy.TraceError, TypeError, RuntimeError, AttributeError, NotImplementedError)
Half = Callable[[nn.Module, Tensor], Tensor]


class SplitError(ValueError):
    """The model cannot be cut there; the message says why and what to try."""


@dataclass(frozen=True)
class Split:
    """A model seen as two halves.

    Attributes:
        model: the whole model, unchanged.
        layer: where it is cut: ``features`` ends with this layer's output.
        features_modules, tail_modules: names of the submodules that each half calls.
        nonnegative: whether the features were all >= 0 on the probe batch (they come out of a ReLU).
        batch_norm_first: whether the tail hands the features straight to a BatchNorm, which in train mode undoes any
            change of a channel's batch statistics.
    """

    model: nn.Module
    layer: str
    features_modules: tuple[str, ...]
    tail_modules: tuple[str, ...]
    nonnegative: bool
    batch_norm_first: bool
    _halves: dict[bool, tuple[Half, Half]]
    _tail_writes_to_its_input: bool

    def features(self, x: Tensor) -> Tensor:
        """Images (N,C,H,W) to the output of the layer (N,C',H',W')."""
        features = self._halves[self.model.training][0](self.model, x)
        _check_features(features, self.layer)
        return features

    def tail(self, features: Tensor) -> Tensor:
        """Output of the layer to logits (N,K)."""
        if self._tail_writes_to_its_input:  # an in-place ReLU right after the cut would change the caller's features
            features = features.clone()
        return self._halves[self.model.training][1](self.model, features)

    def tail_parameters(self) -> list[nn.Parameter]:
        """Parameters of the tail, each once, without those it shares with the features half."""
        below = {id(p) for p in self.features_parameters()}
        return [p for p in _parameters(self.model, self.tail_modules) if id(p) not in below]

    def features_parameters(self) -> list[nn.Parameter]:
        """Parameters of the features half, each once."""
        return _parameters(self.model, self.features_modules)


def split_at(model: nn.Module, layer: str, example: Tensor | None = None) -> Split:
    """Cut ``model`` behind ``layer``.

    Args:
        model: a classifier whose forward takes one batch of images, such as torchvision's and timm's.
        layer: a name from ``model.named_modules()``, e.g. ``"layer1"``. Its output must be N,C,H,W, and no other
            path may lead around it.
        example: a batch of images that the model accepts, to check the cut with; made up (2 images of 64x64, or of the size
            that a timm model declares) if None.

    A decision that the forward pass takes in Python, such as ``if torch.rand(1) < p``, is taken once, when the model is traced,
    unless it stands in a module of its own (as torchvision's and timm's stochastic depth do). Hooks of blocks (``"layer3"``) are not
    run by the halves, hooks of layers (``"layer3.0.conv1"``) are. Save ``model.state_dict()``: a traced method cannot be pickled.

    Raises:
        SplitError: unknown layer (near names are listed), a layer that is not the only way through or runs more than once,
            an output that is not N,C,H,W, or a model that cannot be traced.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, n=5, cutoff=0.4) or [n for n, _ in model.named_children()]
        raise SplitError(f"{type(model).__name__} has no layer {layer!r}; near names: {', '.join(near)}")
    graphs = {training: _cut(_trace(model, training), layer) for training in (True, False)}
    halves = {training: tuple(_as_function(model, graph) for graph in pair) for training, pair in graphs.items()}
    below, above = (_called_modules(model, pair) for pair in zip(*graphs.values()))
    probe = _probe(model, example)
    with evaluating(model), torch.no_grad():
        features, writes = _verify(model, layer, *halves[False], probe)
    return Split(
        model,
        layer,
        below,
        above,
        nonnegative=bool((features >= 0).all()),
        batch_norm_first=_batch_norm_first(model, graphs[True][1]),
        _halves=halves,
        _tail_writes_to_its_input=writes,
    )


class _Tracer(fx.Tracer):
    """Traces through composite modules, keeps simple ones (and all BatchNorms) whole, and remembers each module's output."""

    def __init__(self):
        super().__init__()
        self.outputs: dict[str, list] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # A module without children has no structure to cut. Kept whole, it also follows later changes of its own mode.
        return isinstance(m, (_BatchNorm, DualBatchNorm)) or not any(True for _ in m.children())

    def create_arg(self, a):
        # torch.fx would leave a tensor that the forward makes on the model, as an attribute. It goes into the graph instead.
        if isinstance(a, Tensor) and a not in self.tensor_attrs and not any(a is p for p in self._own_tensors()):
            return self.create_node("call_function", _constant(a), (), {})
        return super().create_arg(a)

    def _own_tensors(self):
        yield from self.root.parameters()
        yield from self.root.buffers()

    def call_module(self, m, forward, args, kwargs):
        depth = len(self.module_stack)
        try:
            output = super().call_module(m, forward, args, kwargs)
        except CANNOT_TRACE:  # this module decides by its data: keep it whole, and do not look inside
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
            output = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        self.outputs.setdefault(self.path_of_module(m), []).append(output)
        return output


def _constant(value: Tensor) -> Callable[[], Tensor]:
    def tensor_constant() -> Tensor:
        return value.clone()

    return tensor_constant


def _trace(model: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, list]]:
    tracer = _Tracer()
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        return tracer.trace(model), tracer.outputs
    except CANNOT_TRACE as error:
        raise SplitError(
            f"{type(model).__name__} cannot be traced ({error}). Its forward takes decisions that depend on the data; "
            "move such a part into a module of its own, which is then kept whole"
        ) from error
    finally:
        for module, mode in before:
            module.training = mode


def _cut(traced: tuple[fx.Graph, dict[str, list]], layer: str) -> tuple[fx.Graph, fx.Graph]:
    graph, outputs = traced
    results = outputs.get(layer, [])
    if len(results) != 1 or not isinstance(getattr(results[0], "node", None), fx.Node):
        why = {0: "does not run in the forward pass", 1: "does not return one tensor"}.get(
            len(results), f"runs {len(results)} times"
        )
        raise SplitError(f"cannot cut at {layer!r}: it {why}; choose a layer that runs once and returns one tensor")
    cut, logits = results[0].node, next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(logits, fx.Node) or (isinstance(logits.target, type) and issubclass(logits.target, tuple)):
        raise SplitError(
            "the model returns several tensors, not logits: build it without auxiliary outputs (aux_logits=False)"
        )
    above = _needed(logits, stop=cut)
    if any(node.op == "placeholder" for node in above):
        raise SplitError(
            f"cannot cut at {layer!r}: another path leads around it to the output (a shortcut, or a size that is read from the input); "
            "choose the end of a whole block or stage"
        )
    return _copy(graph, _needed(cut), cut), _copy(graph, above, logits, start=cut)


def _needed(result: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """The nodes that ``result`` is computed from, going back as far as ``stop``, which is left out."""
    needed, to_visit = set(), [result]
    while to_visit:
        node = to_visit.pop()
        if node is not stop and node not in needed:
            needed.add(node)
            to_visit.extend(node.all_input_nodes)
    return needed


def _copy(graph: fx.Graph, needed: set[fx.Node], result: fx.Node, start: fx.Node | None = None) -> fx.Graph:
    """A graph of the needed nodes that returns ``result``; ``start`` becomes its input."""
    half, copied = fx.Graph(), {}
    if start is not None:
        copied[start] = half.placeholder("features")
    for node in graph.nodes:
        if node in needed:
            copied[node] = half.node_copy(node, copied.__getitem__)
    half.output(copied[result])
    return half


def _as_function(model: nn.Module, graph: fx.Graph) -> Half:
    """The graph's code with the model as ``self``: it finds submodules by name at each call."""
    return type(fx.GraphModule(model, graph)).forward


def _called_modules(model: nn.Module, graphs: tuple[fx.Graph, ...]) -> tuple[str, ...]:
    """Names of the modules and bare parameters that the graphs use, and of what is inside these, but for BatchNorms'."""
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")}
    inside = tuple(f"{name}." for name in called)
    whole = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (_BatchNorm, DualBatchNorm)))
    modules = [n for n, _ in model.named_modules() if n in called or n.startswith(inside) and not n.startswith(whole)]
    return (*modules, *(name for name, _ in model.named_parameters() if name in called))


def _parameters(model: nn.Module, names: tuple[str, ...]) -> list[nn.Parameter]:
    modules, own = dict(model.named_modules()), dict(model.named_parameters())
    found = [p for name in names for p in (modules[name].parameters() if name in modules else [own[name]])]
    return list(dict.fromkeys(found))


def _probe(model: nn.Module, example: Tensor | None) -> Tensor:
    if example is not None:
        return example
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise SplitError(
            f"{type(model).__name__} has no convolution to take the input's channels from: pass example=, a batch of images"
        )
    declared = getattr(model, "pretrained_cfg", None) or {}
    channels, height, width = declared.get("input_size", (first.in_channels, 64, 64))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, height, width, generator=generator).to(first.weight)


def _verify(model: nn.Module, layer: str, features_half: Half, tail_half: Half, probe: Tensor) -> tuple[Tensor, bool]:
    """Features of the probe, and whether the tail changes them in place."""
    try:
        expected = model(probe)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise SplitError(
            f"the model does not accept a batch of shape {tuple(probe.shape)} ({error}): pass example=, a batch that it does"
        ) from error
    features = features_half(model, probe)
    _check_features(features, layer)
    square = probe.shape[-1] == probe.shape[-2]
    if square and features.shape[1] == features.shape[2] != features.shape[3]:
        raise SplitError(f"the output of {layer!r} is {tuple(features.shape)}: it looks like N,H,W,C, not N,C,H,W")
    before = features.clone()
    logits = tail_half(model, features)
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
        raise SplitError(f"cut at {layer!r}, the two halves do not give the model's output; choose another layer")
    return before, not torch.equal(before, features)


def _check_features(features: Tensor, layer: str) -> None:
    if not isinstance(features, Tensor) or features.dim() != 4:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise SplitError(f"the output of {layer!r} is {shape}, not N,C,H,W: channel statistics need a feature map")


def _batch_norm_first(model: nn.Module, tail: fx.Graph) -> bool:
    """Whether a BatchNorm is all that reads the features (through concatenation and pooling, as in DenseNet)."""
    modules = dict(model.named_modules())
    to_visit, readers = [next(iter(tail.nodes))], []
    while to_visit:
        for user in to_visit.pop().users:
            module = modules.get(user.target) if user.op == "call_module" else None
            if isinstance(module, (nn.AvgPool2d, nn.Identity, nn.Dropout)) or user.target in (torch.cat,):
                to_visit.append(user)
            else:
                readers.append(isinstance(module, (_BatchNorm, DualBatchNorm)))
    return bool(readers) and all(readers)
