"""A correct AdvBN layer, written in two ways, and wrong ones: what the tests that students write are tested with.

A mutant is the correct layer's source with one small change. All of them are sent to the student's side as source with the
same neutral class name, each time written anew (see :mod:`~advbn_lib.assignments.rewriting`), so a test must tell them by
what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from advbn_lib.grading.given import build

CLASS = "Layer"

CORRECT = """
import copy

import torch
import torch.nn.functional as F
from torch import nn


class Dual(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norms = nn.ModuleDict({"clean": norm, "adversarial": copy.deepcopy(norm)})
        self.branch = "clean"

    def forward(self, x):
        return self.norms[self.branch](x)


def make_dual(module):
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, Dual(child).train(child.training))
        else:
            make_dual(child)


class Layer(nn.Module):
    def __init__(self, tail, eps=1.1, step_size=0.2, steps=6):
        super().__init__()
        make_dual(tail)
        self.tail, self.eps, self.step_size, self.steps = tail, eps, step_size, steps

    def choose(self, branch):
        if branch not in ("clean", "adversarial"):
            raise ValueError(f"there is no branch {branch!r}")
        for module in self.tail.modules():
            if isinstance(module, Dual):
                module.branch = branch

    def change(self, x, mean_factor, std_factor):
        mean = x.mean((0, 2, 3), keepdim=True)
        changed = std_factor * (x - mean) + mean_factor * mean
        return changed.clamp_min(0)

    def project(self, factor):
        return factor.clamp(1 - self.eps, 1 + self.eps)

    def attack(self, features, labels):
        x = features.detach()
        before = [(module, module.training) for module in self.tail.modules()]
        try:
            self.tail.eval()
            self.choose("adversarial")
            mean_factor = x.new_ones(1, x.shape[1], 1, 1)
            std_factor = x.new_ones(1, x.shape[1], 1, 1)
            for _ in range(self.steps):
                mean_factor.requires_grad_()
                std_factor.requires_grad_()
                with torch.enable_grad():
                    loss = F.cross_entropy(self.tail(self.change(x, mean_factor, std_factor)), labels)
                    mean_grad, std_grad = torch.autograd.grad(loss, (mean_factor, std_factor))
                mean_factor = self.project(mean_factor.detach() + self.step_size * mean_grad.sign())
                std_factor = self.project(std_factor.detach() + self.step_size * std_grad.sign())
        finally:
            for module, training in before:
                module.training = training
            self.choose("clean")
        return mean_factor, std_factor

    def forward(self, features, labels):
        x = features.detach()
        mean_factor, std_factor = self.attack(x, labels)
        perturbed = self.change(x, mean_factor, std_factor)
        try:
            self.choose("adversarial")
            adversarial = F.cross_entropy(self.tail(perturbed), labels)
        finally:
            self.choose("clean")
        clean = F.cross_entropy(self.tail(x), labels)
        return clean, adversarial

    @torch.no_grad()
    def predict(self, features, branch="clean"):
        self.choose(branch)
        modes = [(module, module.training) for module in self.tail.modules()]
        try:
            self.tail.eval()
            return self.tail(features)
        finally:
            for module, mode in modes:
                module.training = mode
            self.choose("clean")
"""

# The same layer in another hand: the factors are one tensor, the second BatchNorms lie beside the first ones, the gradient
# is that of a sum, and the clean loss is computed first.
CORRECT_TOO = """
import contextlib
from copy import deepcopy

import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Pair(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = first
        self.second = deepcopy(first)
        self.training = first.training
        self.use_second = False

    def forward(self, z):
        if self.use_second:
            return self.second(z)
        return self.first(z)


class Layer(nn.Module):
    def __init__(self, tail, eps=1.1, step_size=0.2, steps=6):
        super().__init__()
        for name, module in list(tail.named_modules()):
            if type(module) is nn.BatchNorm2d:
                parent, _, own = name.rpartition(".")
                setattr(tail.get_submodule(parent), own, Pair(module))
        self.tail = tail
        self.radius = eps
        self.stride = step_size
        self.count = steps

    @contextlib.contextmanager
    def state(self, second, evaluate):
        pairs = [m for m in self.tail.modules() if isinstance(m, Pair)]
        modes = {m: m.training for m in self.tail.modules()}
        try:
            for pair in pairs:
                pair.use_second = second
            if evaluate:
                self.tail.train(False)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for pair in pairs:
                pair.use_second = False

    def shifted(self, z, factors):
        centre = torch.mean(z, dim=(0, 2, 3), keepdim=True)
        return torch.relu(factors[1] * z + (factors[0] - factors[1]) * centre)

    def attack(self, features, labels):
        z = features.clone().detach()
        offset = torch.zeros((2, 1, z.shape[1], 1, 1), dtype=z.dtype, device=z.device)
        with self.state(True, True):
            for _ in range(self.count):
                with torch.enable_grad():
                    offset = offset.detach().requires_grad_(True)
                    total = cross_entropy(self.tail(self.shifted(z, 1 + offset)), labels, reduction="sum")
                    slope = torch.autograd.grad(total, offset)[0]
                offset = torch.clip(offset.detach() + self.stride * torch.sign(slope), -self.radius, self.radius)
        return tuple(1 + offset.detach())

    def forward(self, features, labels):
        z = features.clone().detach()
        worst = torch.stack(self.attack(z, labels))
        clean = cross_entropy(self.tail(z), labels)
        with self.state(True, False):
            adversarial = cross_entropy(self.tail(self.shifted(z, worst)), labels)
        return clean, adversarial

    def predict(self, features, branch="clean"):
        second = ("clean", "adversarial").index(branch)
        with torch.no_grad(), self.state(second, True):
            return self.tail(features)
"""

ALL_CORRECT = (CORRECT, CORRECT_TOO)


@dataclass(frozen=True)
class Mutant:
    """A wrong layer.

    Attributes:
        mistake: what is wrong, in words for the student.
        changes: (old, new) pieces of the correct source; each old one stands there exactly once.
    """

    mistake: str
    changes: tuple[tuple[str, str], ...]

    @property
    def source(self) -> str:
        """The layer's source with the changes; ValueError if a piece is not there exactly once."""
        text = CORRECT
        for old, new in self.changes:
            if text.count(old) != 1:
                raise ValueError(f"{old!r} stands {text.count(old)} times in the correct layer, not once")
            text = text.replace(old, new)
        return text


def layer_class(source: str) -> type[nn.Module]:
    """The layer that ``source`` defines, for use on the checks' own side."""
    return build("source", {"code": source, "name": CLASS})


def _mutant(mistake: str, *changes: tuple[str, str]) -> Mutant:
    return Mutant(mistake, changes)


_MEAN = "mean = x.mean((0, 2, 3), keepdim=True)"
_CHANGED = "changed = std_factor * (x - mean) + mean_factor * mean"
_MEAN_STEP = "mean_factor = self.project(mean_factor.detach() + self.step_size * mean_grad.sign())"
_STD_STEP = "std_factor = self.project(std_factor.detach() + self.step_size * std_grad.sign())"
_GRAD = "mean_grad, std_grad = torch.autograd.grad(loss, (mean_factor, std_factor))"
_ONES = ("mean_factor = x.new_ones(1, x.shape[1], 1, 1)", "std_factor = x.new_ones(1, x.shape[1], 1, 1)")
_CLAMP = "return factor.clamp(1 - self.eps, 1 + self.eps)"
_COPY = '{"clean": norm, "adversarial": copy.deepcopy(norm)}'
_ATTACK_MODE = 'self.tail.eval()\n            self.choose("adversarial")'
_RESTORE = (
    "            for module, training in before:\n                module.training = training\n            self.choose"
)
_ADVERSARIAL = 'self.choose("adversarial")\n            adversarial = F.cross_entropy(self.tail(perturbed), labels)'
_CLEAN = 'self.choose("clean")\n        clean = F.cross_entropy(self.tail(x), labels)'
_IN_FORWARD = "\n        finally:\n            " + _CLEAN
_PREDICT = "self.tail.eval()\n            return self.tail(features)"
_PUT_BACK = "            for module, mode in modes:\n                module.training = mode\n"
_AFTER_PREDICT = "        finally:\n" + _PUT_BACK
_AFTER_ATTACK = "        finally:\n            for module, training in before:"
_NOT_CAUGHT = "        except ZeroDivisionError:\n            raise\n"  # what follows is done after success only
_UNKNOWN = 'if branch not in ("clean", "adversarial"):\n            raise ValueError(f"there is no branch {branch!r}")'
_UP = "torch.where({} >= 0, 1.0, -1.0)"
_RESULT = "        return mean_factor, std_factor\n"

MUTANTS: MappingProxyType[str, Mutant] = MappingProxyType(
    {
        # the formula
        "statistics_per_image": _mutant(
            "the mean is over H,W of each image, not over N,H,W", (_MEAN, "mean = x.mean((2, 3), keepdim=True)")
        ),
        "statistics_over_n": _mutant("the mean is over N alone", (_MEAN, "mean = x.mean((0,), keepdim=True)")),
        "statistics_over_everything": _mutant(
            "one mean for all channels", (_MEAN, "mean = x.mean((0, 1, 2, 3), keepdim=True)")
        ),
        "mean_not_taken_away": _mutant(
            "the whole feature is multiplied by std_factor, its mean too",
            (_CHANGED, "changed = std_factor * x + mean_factor * mean - mean"),
        ),
        "mean_factor_added": _mutant(
            "mean_factor is added and not multiplied with the mean",
            (_CHANGED, "changed = std_factor * (x - mean) + mean_factor - 1 + mean"),
        ),
        "factors_swapped": _mutant(
            "mean_factor and std_factor have changed places in the formula",
            (_CHANGED, "changed = mean_factor * (x - mean) + std_factor * mean"),
        ),
        "no_clamp": _mutant("changed features may be below 0", ("return changed.clamp_min(0)", "return changed")),
        "writes_to_features": _mutant(
            "the caller's features are changed in place",
            (_MEAN, "mean = x.mean((0, 2, 3), keepdim=True)\n        x -= 0.01 * mean"),
        ),
        # the ascent
        "descends": _mutant(
            "it goes down: the sign is flipped",
            (_MEAN_STEP, _MEAN_STEP.replace("+ self", "- self")),
            (_STD_STEP, _STD_STEP.replace("+ self", "- self")),
        ),
        "std_descends": _mutant("the std factors go down the loss", (_STD_STEP, _STD_STEP.replace("+ self", "- self"))),
        "mean_stays": _mutant("the mean factors never move", (_MEAN_STEP, "mean_factor = mean_factor.detach()")),
        "std_stays": _mutant("the std factors never move", (_STD_STEP, "std_factor = std_factor.detach()")),
        "raw_gradient": _mutant(
            "the step follows the gradient itself and not its sign",
            (_MEAN_STEP, _MEAN_STEP.replace(".sign()", "")),
            (_STD_STEP, _STD_STEP.replace(".sign()", "")),
        ),
        "no_projection": _mutant("nothing keeps the factors in the interval", (_CLAMP, "return factor")),
        "projection_around_zero": _mutant(
            "the interval is around 0, not around 1", (_CLAMP, "return factor.clamp(-self.eps, self.eps)")
        ),
        "projection_one_sided": _mutant(
            "only the upper end of the interval is kept", (_CLAMP, "return factor.clamp(max=1 + self.eps)")
        ),
        "projection_not_below_zero": _mutant(
            "factors below 0 are cut off, though eps above 1 allows them",
            (_CLAMP, "return factor.clamp(max(0, 1 - self.eps), 1 + self.eps)"),
        ),
        "one_step_too_few": _mutant(
            "it takes one step too few", ("for _ in range(self.steps):", "for _ in range(max(self.steps - 1, 1)):")
        ),
        "one_step_only": _mutant(
            "it takes one step, whatever it is told", ("for _ in range(self.steps):", "for _ in range(1):")
        ),
        "step_size_ignored": _mutant(
            "the step size is always 0.2",
            (
                "self.tail, self.eps, self.step_size, self.steps = tail, eps, step_size, steps",
                "self.tail, self.eps, self.step_size, self.steps = tail, eps, 0.2, steps",
            ),
        ),
        "eps_ignored": _mutant(
            "eps is always 1.1",
            (
                "self.tail, self.eps, self.step_size, self.steps = tail, eps, step_size, steps",
                "self.tail, self.eps, self.step_size, self.steps = tail, 1.1, step_size, steps",
            ),
        ),
        "starts_at_zero": _mutant(
            "it starts from factors of 0, not of 1", *((one, one.replace("ones", "zeros")) for one in _ONES)
        ),
        "starts_at_random": _mutant(
            "it starts from random factors",
            *(
                (
                    one,
                    one.replace(
                        "x.new_ones(1, x.shape[1], 1, 1)",
                        "1 + 0.5 * (torch.rand_like(x.new_ones(1, x.shape[1], 1, 1)) - 0.5)",
                    ),
                )
                for one in _ONES
            ),
        ),
        "factors_per_image": _mutant(
            "each image has factors of its own; AdvBN's batch shares them",
            *((one, one.replace("x.new_ones(1,", "x.new_ones(len(x),")) for one in _ONES),
        ),
        "labels_ignored": _mutant(
            "the adversary climbs the loss of the network's own answers, not of the labels",
            (
                "loss = F.cross_entropy(self.tail(self.change(x, mean_factor, std_factor)), labels)",
                "logits = self.tail(self.change(x, mean_factor, std_factor))\n                    loss = F.cross_entropy(logits, logits.argmax(1))",
            ),
        ),
        "returns_swapped": _mutant(
            "attack returns the std factors first", (_RESULT, "        return std_factor, mean_factor\n")
        ),
        "no_detach": _mutant(
            "the factors that attack returns still require a gradient",
            (_RESULT, "        return mean_factor.requires_grad_(), std_factor.requires_grad_()\n"),
        ),
        # traces
        "ascent_in_train_mode": _mutant(
            "the ascent runs in train mode: it moves the running statistics, and sees another network",
            (_ATTACK_MODE, 'self.tail.train()\n            self.choose("adversarial")'),
        ),
        "mode_not_restored": _mutant(
            "after the attack the tail stays in eval mode", (_RESTORE, "            self.choose")
        ),
        "train_after_attack": _mutant(
            "after the attack everything is in train mode, whatever it was before",
            (_RESTORE, "            self.tail.train()\n            self.choose"),
        ),
        "error_leaves_a_trace": _mutant(
            "if the attack fails, the tail stays in eval mode",
            (_AFTER_ATTACK, _AFTER_ATTACK.replace("        finally:\n", _NOT_CAUGHT + "        else:\n")),
        ),
        "parameters_get_gradients": _mutant(
            "the attack leaves gradients in the tail's parameters",
            (
                _GRAD,
                "loss.backward(inputs=[mean_factor, std_factor, *self.tail.parameters()])\n                    mean_grad, std_grad = mean_factor.grad, std_factor.grad",
            ),
        ),
        "parameters_frozen": _mutant(
            "the attack freezes the tail's parameters and leaves them so",
            (_ATTACK_MODE, "self.tail.requires_grad_(False)\n            " + _ATTACK_MODE),
        ),
        "seeds_everything": _mutant(
            "the attack seeds torch's global random numbers",
            (
                "        x = features.detach()\n        before",
                "        torch.manual_seed(0)\n        x = features.detach()\n        before",
            ),
        ),
        "branch_not_restored": _mutant(
            "after the attack the tail runs on the adversarial BatchNorms",
            (
                '            self.choose("clean")\n        return mean_factor',
                "            pass\n        return mean_factor",
            ),
        ),
        # two sets of BatchNorm
        "one_set_for_both": _mutant(
            "the two BatchNorm sets are one and the same", (_COPY, '{"clean": norm, "adversarial": norm}')
        ),
        "second_set_fresh": _mutant(
            "the second set starts from nothing, not as a copy",
            (_COPY, '{"clean": norm, "adversarial": nn.BatchNorm2d(norm.num_features).to(norm.weight)}'),
        ),
        "nested_forgotten": _mutant(
            "only the BatchNorms at the top are doubled, not those inside blocks",
            ("            make_dual(child)", "            pass"),
        ),
        "attack_on_clean_set": _mutant(
            "the attack asks the clean BatchNorms", (_ATTACK_MODE, 'self.tail.eval()\n            self.choose("clean")')
        ),
        "adversarial_on_clean_set": _mutant(
            "the adversarial loss goes through the clean BatchNorms",
            (_ADVERSARIAL, _ADVERSARIAL.replace('"adversarial"', '"clean"')),
        ),
        "clean_on_adversarial_set": _mutant(
            "the clean loss goes through the adversarial BatchNorms",
            (_CLEAN, _CLEAN.replace('"clean"', '"adversarial"')),
        ),
        # the two losses
        "adversarial_is_clean": _mutant(
            "the adversarial loss is that of the unchanged features",
            (_ADVERSARIAL, _ADVERSARIAL.replace("perturbed", "x")),
        ),
        "adversarial_detached": _mutant(
            "no gradient flows from the adversarial loss to the weights",
            ("return clean, adversarial", "return clean, adversarial.detach()"),
        ),
        "losses_swapped": _mutant(
            "the adversarial loss is returned first", ("return clean, adversarial", "return adversarial, clean")
        ),
        "losses_in_eval_mode": _mutant(
            "the two losses are computed in eval mode, so BatchNorm never learns",
            (
                "        perturbed = self.change(x, mean_factor, std_factor)\n",
                "        perturbed = self.change(x, mean_factor, std_factor)\n        self.tail.eval()\n",
            ),
        ),
        "gradient_into_features": _mutant(
            "a gradient flows into the features, which belong to frozen layers",
            ("        x = features.detach()\n        mean_factor", "        x = features\n        mean_factor"),
        ),
        # predict
        "predict_in_train_mode": _mutant("predict runs in train mode", (_PREDICT, _PREDICT.replace("eval", "train"))),
        "predict_leaves_eval_mode": _mutant(
            "predict leaves the tail in eval mode",
            (
                _AFTER_PREDICT,
                "        finally:\n",
            ),
        ),
        "predict_ignores_branch": _mutant(
            "predict always takes the clean set",
            ("        self.choose(branch)\n", '        self.choose(branch)\n        self.choose("clean")\n'),
        ),
        "predict_leaves_its_branch": _mutant(
            "after predict the tail stays on the set that predict was asked for",
            (_PUT_BACK + '            self.choose("clean")\n', _PUT_BACK),
        ),
        "predict_takes_any_branch": _mutant(
            "predict answers from the clean set if the branch's name is unknown",
            (_UNKNOWN, 'branch = branch if branch == "adversarial" else "clean"'),
        ),
        "predict_error_leaves_a_trace": _mutant(
            "if predict fails, the tail stays in eval mode",
            (
                "        finally:\n" + _PUT_BACK,
                "        except Exception:\n            modes = []\n            raise\n        finally:\n" + _PUT_BACK,
            ),
        ),
        # what shows only where nobody looks
        "losses_in_train_mode": _mutant(
            "the two losses are computed in train mode, whatever the mode of the layer is",
            (
                "        perturbed = self.change(x, mean_factor, std_factor)\n",
                "        perturbed = self.change(x, mean_factor, std_factor)\n        self.tail.train()\n",
            ),
        ),
        "loss_error_leaves_its_branch": _mutant(
            "if the adversarial loss fails, the tail stays on the adversarial BatchNorms",
            (_IN_FORWARD, "\n" + _NOT_CAUGHT + "        " + _CLEAN),
        ),
        "attack_error_leaves_its_branch": _mutant(
            "if the attack fails, the tail stays on the adversarial BatchNorms",
            (
                '                module.training = training\n            self.choose("clean")\n        return mean_factor',
                '                module.training = training\n        self.choose("clean")\n        return mean_factor',
            ),
        ),
        "zero_gradient_moves": _mutant(
            "a factor whose gradient is 0 moves up",
            (_MEAN_STEP, _MEAN_STEP.replace("mean_grad.sign()", _UP.format("mean_grad"))),
            (_STD_STEP, _STD_STEP.replace("std_grad.sign()", _UP.format("std_grad"))),
        ),
        "gradients_must_be_on": _mutant(
            "the attack fails if the caller has switched gradients off", ("with torch.enable_grad():", "if True:")
        ),
        "goes_on_from_the_last_batch": _mutant(
            "the ascent starts where that of the batch before ended",
            (_ONES[0], "mean_factor = getattr(self, 'last', x.new_ones(1, x.shape[1], 1, 1)).clone()"),
            (_RESULT, "        self.last = mean_factor.clone()\n" + _RESULT),
        ),
        "second_set_has_default_settings": _mutant(
            "the second BatchNorms have PyTorch's momentum, whatever the first ones have",
            (
                _COPY + ")\n",
                _COPY + ')\n        self.norms["adversarial"].momentum = 0.1\n',
            ),
        ),
        "old_gradients_lost": _mutant(
            "the attack deletes gradients that were in the tail's parameters before",
            (_ATTACK_MODE, "self.tail.zero_grad()\n            " + _ATTACK_MODE),
        ),
    }
)

# A short plain suite (factors, losses, predictions in train mode) does not find these. They count more.
SUBTLE = (
    "projection_not_below_zero", "error_leaves_a_trace", "train_after_attack", "branch_not_restored", "parameters_frozen",
    "predict_leaves_its_branch", "predict_takes_any_branch", "predict_error_leaves_a_trace", "losses_in_train_mode",
    "loss_error_leaves_its_branch", "attack_error_leaves_its_branch", "zero_gradient_moves", "gradients_must_be_on",
    "second_set_has_default_settings", "old_gradients_lost",
)  # fmt: skip

# Mistakes of a student's own layer that are told by name. They are not among those that the tests are judged by.
_STD_AT_NEW_MEAN = (
    "with torch.enable_grad():  # again, at the new mean factor\n"
    "                    loss = F.cross_entropy(self.tail(self.change(x, mean_factor, std_factor)), labels)\n"
    "                    (std_grad,) = torch.autograd.grad(loss, (std_factor,))\n                "
)
ONLY_TOLD: MappingProxyType[str, Mutant] = MappingProxyType(
    {
        "std_gradient_at_new_mean": _mutant(
            "the gradient of the std factor is taken at the new mean factor, not at the old one",
            (_STD_STEP, _STD_AT_NEW_MEAN + _STD_STEP),
        ),
        "mean_gradient_at_new_std": _mutant(
            "the gradient of the mean factor is taken at the new std factor, not at the old one",
            (
                _MEAN_STEP + "\n                " + _STD_STEP,
                "old = mean_factor\n                " + _STD_STEP + "\n                with torch.enable_grad():\n"
                "                    loss = F.cross_entropy(self.tail(self.change(x, old, std_factor)), labels)\n"
                "                    (mean_grad,) = torch.autograd.grad(loss, (old,))\n                " + _MEAN_STEP,
            ),
        ),
        "mean_raw_gradient": _mutant(
            "the mean factors follow the gradient itself and not its sign",
            (_MEAN_STEP, _MEAN_STEP.replace(".sign()", "")),
        ),
        "std_raw_gradient": _mutant(
            "the std factors follow the gradient itself and not its sign", (_STD_STEP, _STD_STEP.replace(".sign()", ""))
        ),
        "mean_not_projected": _mutant(
            "nothing keeps the mean factors in the interval",
            (_MEAN_STEP, _MEAN_STEP.replace("self.project(", "(")),
        ),
        "std_not_projected": _mutant(
            "nothing keeps the std factors in the interval",
            (_STD_STEP, _STD_STEP.replace("self.project(", "(")),
        ),
    }
)

# What a student's notebook checks at once. All the others are for grading.
SHOWN = (
    "statistics_per_image", "no_clamp", "descends", "no_projection", "ascent_in_train_mode", "mode_not_restored",
    "one_set_for_both", "adversarial_is_clean",
)  # fmt: skip
