"""A second set of batch normalisation: clean and adversarial inputs have different statistics, so each gets its own.

Source: Xie et al., "Adversarial Examples Improve Image Recognition" (AdvProp, CVPR 2020); AdvBN's released code, where every
BatchNorm above the perturbed layer exists twice and everything else is shared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Branch = Literal["clean", "adversarial"]
BRANCHES: tuple[Branch, ...] = ("clean", "adversarial")


class DualBatchNorm(nn.Module):
    """Two BatchNorms, of which one is in use. The adversarial one begins as a copy of the clean one, running statistics included.

    Wraps any ``_BatchNorm`` (torch's, SyncBatchNorm, timm's ``BatchNormAct2d``). Choose with :func:`use_branch`.

    What resets all BatchNorms and forwards the model once, such as ``torch.optim.swa_utils.update_bn``, leaves the set that is not
    in use without statistics. Call it on :func:`single_branch` of the model.
    """

    def __init__(self, batch_norm: _BatchNorm):
        super().__init__()
        self.clean = batch_norm
        self.adversarial = copy.deepcopy(batch_norm)
        self.branch: Branch = "clean"

    def forward(self, x: Tensor) -> Tensor:
        return self.adversarial(x) if self.branch == "adversarial" else self.clean(x)

    def extra_repr(self) -> str:
        return f"branch={self.branch!r}"


def add_second_batch_norm(model: nn.Module, names: Iterable[str] | None = None) -> int:
    """Replace BatchNorms of ``model`` by :class:`DualBatchNorm`, in place.

    Args:
        names: which submodules (as in ``named_modules``); all BatchNorms if None. Names of other modules are passed over, and
            so are layers that are dual already.

    Returns:
        How many layers were replaced. 0 means that dual BN does not apply (as for ConvNeXt, which has LayerNorm).
    """
    wanted = None if names is None else set(names)
    new = {
        module: DualBatchNorm(module).train(module.training)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (wanted is None or name in wanted) and not _inside_dual(model, name)
    }
    replace_modules(model, new)
    return len(new)


def second_batch_norm(model: nn.Module, wanted: bool, names: Iterable[str] | None = None) -> bool:
    """Give these layers a second set if it is wanted, and say whether any of them has one. Sets that are there already stay.

    Raises:
        ValueError: it is not wanted, and it is there.
    """
    within = None if names is None else set(names)
    if wanted:
        add_second_batch_norm(model, within)
    found = any(
        isinstance(m, DualBatchNorm) and (within is None or name in within) for name, m in model.named_modules()
    )
    if found and not wanted:
        raise ValueError(
            f"{type(model).__name__} has two BatchNorm sets already, so dual_bn=False would train both: take a fresh model, or "
            "single_branch(model, 'clean')"
        )
    return found


def single_branch(model: nn.Module, branch: Branch) -> nn.Module:
    """A copy of ``model`` that has one plain BatchNorm again wherever it had two: for deployment, or to save under the old keys."""
    _check(branch)
    model = copy.deepcopy(model)
    replace_modules(model, {m: getattr(m, branch) for m in model.modules() if isinstance(m, DualBatchNorm)})
    return model


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put ``new[module]`` wherever ``model`` has ``module``, in place: it may stand there under several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children gives each child once
            if child in new:
                setattr(parent, name, new[child])


@contextmanager
def use_branch(model: nn.Module, branch: Branch) -> Iterator[nn.Module]:
    """Inside the block, ``model`` normalises with this branch. Afterwards each layer is as before, also after an error."""
    _check(branch)
    layers = [module for module in model.modules() if isinstance(module, DualBatchNorm)]
    before = [layer.branch for layer in layers]
    try:
        for layer in layers:
            layer.branch = branch
        yield model
    finally:
        for layer, old in zip(layers, before):
            layer.branch = old


def _inside_dual(model: nn.Module, name: str) -> bool:
    parent_name, _, _ = name.rpartition(".")
    return bool(name) and isinstance(model.get_submodule(parent_name), DualBatchNorm)


def _check(branch: str) -> None:
    if branch not in BRANCHES:
        raise ValueError(f"branch is 'clean' or 'adversarial', got {branch!r}")
