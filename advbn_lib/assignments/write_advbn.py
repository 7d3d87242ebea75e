"""Assignment 2, "Write AdvBN": the public checks.

Source of what is built: Shu et al., NeurIPS 2021 (AdvBN); Xie et al., CVPR 2020 (two sets of BatchNorm).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advbn_lib.assignments.given import small_batch, small_tail
from advbn_lib.assignments.mutants import ALL_CORRECT, CLASS, CORRECT, MUTANTS, ONLY_TOLD, SHOWN, SUBTLE, layer_class
from advbn_lib.assignments.rewriting import rewritten
from advbn_lib.assignments.telling import compare, compare_pairs, features, no_trace, refuses, several
from advbn_lib.grading.asking import Raised
from advbn_lib.grading.task import (
    Assignment,
    Check,
    Given,
    Student,
    Task,
    expect,
    expect_close,
    expect_number,
    expect_tensor,
    matches,
)  # fmt: skip

CLASSES = 5
FACTORS = ("mean factors", "std factors")
MOST_SECONDS = 10.0  # of a student's tests on one layer: there are more than a hundred runs, and 30 minutes for all
BATCH, INSTANCE = (0, 2, 3), (2, 3)
EXACT = {"rtol": 1e-7, "atol": 1e-7}
# Steps of 0.2 reach a factor of 0, where everything is cut off and rounding decides which way the next step goes.
STEP = 0.23
SETTINGS = {"eps": 0.7, "step_size": 0.27, "steps": 4}
# What an attack can get wrong that shows in its factors: a student's factors are compared with those of these mutants.
IN_THE_FACTORS = (
    "statistics_per_image", "statistics_over_n", "mean_not_taken_away", "mean_factor_added", "factors_swapped", "no_clamp",
    "descends", "std_descends", "mean_stays", "std_stays", "raw_gradient", "no_projection", "projection_around_zero",
    "projection_one_sided", "projection_not_below_zero", "one_step_too_few", "one_step_only", "step_size_ignored", "eps_ignored",
    "starts_at_zero", "labels_ignored", "returns_swapped", "ascent_in_train_mode", "zero_gradient_moves", *ONLY_TOLD,
)  # fmt: skip
IN_THE_LOSSES = (
    *IN_THE_FACTORS, "adversarial_on_clean_set", "clean_on_adversarial_set", "adversarial_is_clean", "losses_swapped",
    "losses_in_eval_mode", "losses_in_train_mode", "second_set_fresh",
)  # fmt: skip
IN_THE_PREDICTIONS = (
    *IN_THE_LOSSES,
    "one_set_for_both",
    "nested_forgotten",
    "adversarial_detached",
    "attack_on_clean_set",
)


def factors(seed: int, channels: int = 4, reach: float = 1.1) -> tuple[Tensor, Tensor]:
    """Factors in [1 - reach, 1 + reach]."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand((2, 1, channels, 1, 1), generator=generator, dtype=torch.float64)
    return tuple(1 + reach * (2 * draws - 1))


def change(x: Tensor, mean_factor: Tensor, std_factor: Tensor) -> Tensor:
    """The reference of the perturbation."""
    mean = x.mean(BATCH, keepdim=True)
    return (std_factor * (x - mean) + mean_factor * mean).clamp_min(0)


def right_change(student: Student, x: Tensor, mean_factor: Tensor, std_factor: Tensor) -> None:
    """``change_statistics`` is the formula, cut at 0."""
    got = student.call("change_statistics", x, mean_factor, std_factor)
    mean, own = x.mean(BATCH, keepdim=True), x.mean(INSTANCE, keepdim=True)
    mistakes = {
        "values below 0 are left: a ReLU's output is never negative, so cut it at 0": std_factor * (x - mean)
        + mean_factor * mean,
        "your mean is per image; here it is over N,H,W": (std_factor * (x - own) + mean_factor * own).clamp_min(0),
        "the two factors have changed places": change(x, std_factor, mean_factor),
        "mean_factor is multiplied with the mean, not added": (std_factor * (x - mean) + mean_factor).clamp_min(0),
        "take the mean away before you multiply by std_factor": (std_factor * x + mean_factor * mean).clamp_min(0),
        "values above the largest of x are cut off too; a ReLU has a lower end alone": change(
            x, mean_factor, std_factor
        ).clamp_max(x.max()),
        "x is cut off before the change; cut the result": std_factor * (x.clamp_min(0) - mean) + mean_factor * mean,
    }
    compare(got, change(x, mean_factor, std_factor), "change_statistics(x, ...)", mistakes, **EXACT)


def right_projection(student: Student, factor: Tensor, eps: float) -> None:
    """``project`` moves a factor to the nearest one in the interval."""
    got = student.call("project", factor, eps)
    mistakes = {
        "the interval is around 1, where nothing changes, not around 0": factor.clamp(-eps, eps),
        "the lower end is not kept": factor.clamp(max=1 + eps),
        "the upper end is not kept": factor.clamp(min=1 - eps),
        "eps is half the width of the interval: from 1 - eps to 1 + eps": factor.clamp(1 - eps / 2, 1 + eps / 2),
        "factors below 0 are in the set if eps is above 1": factor.clamp(max(0.0, 1 - eps), 1 + eps),
        "the interval does not end at 0 and 1 + eps, but at 1 - eps and 1 + eps": factor.clamp(0, 1 + eps),
    }
    compare(got, factor.clamp(1 - eps, 1 + eps), f"project(factor, eps={eps})", mistakes, rtol=1e-6, atol=1e-7)


def draw_of(student: Student, x: Tensor, eps: float, seed: int) -> list[Tensor]:
    """Two factors for each channel of ``x``, from a generator of this seed."""
    drawn = student.call("random_factors", x, eps, Given("generator", seed=seed))
    parts = several(drawn, 2, "random_factors(x, eps, generator)", "mean_factor, std_factor")
    return [expect_tensor(part, "a random factor", (1, x.shape[1], 1, 1)) for part in parts]


def right_random(student: Student, seed: int, eps: float, channels: int = 400) -> None:
    """``random_factors`` draws both factors of each channel uniformly from the interval."""
    x = torch.zeros(2, channels, 3, 3, dtype=torch.float64)

    def draw(number: int) -> list[Tensor]:
        return draw_of(student, x, eps, number)

    first, again = draw(seed), draw(seed)
    student.seed(seed + 1)
    elsewhere, other = draw(seed), draw(seed + 5)
    expect(
        not matches(first[0], first[1]),
        "the mean factors and the std factors are the same: draw them one after the other",
    )
    for part in first:
        away = part.double() - 1
        expect(
            away.abs().max().item() <= eps + 1e-6, f"a random factor is outside of [1 - eps, 1 + eps] with eps = {eps}"
        )
        expect(
            away.max().item() > 0.8 * eps and away.min().item() < -0.8 * eps,
            "the random factors do not fill the whole interval",
        )
        spread = away.std().item() / eps
        expect(
            0.5 < spread < 0.66,
            "the random factors are not uniform: all values of the interval should be equally likely",
        )
    expect(matches(first[0], again[0]), "with a generator of the same seed the factors should be the same")
    expect(
        matches(first[0], elsewhere[0]),
        "the factors come from torch's global random numbers: use the generator that you are given",
    )
    expect(not matches(first[0], other[0]), "with a generator of another seed the factors should be others")
    for part in first:
        expect(part.dtype == x.dtype, f"x is {x.dtype}, but a random factor is {part.dtype}: draw it in the type of x")
    single = draw_of(student, torch.zeros(2, 3, 3, 3), eps, seed)
    expect(single[0].dtype == torch.float32, f"x is torch.float32, but a random factor is {single[0].dtype}")
    globally = []
    for number in (seed + 2, seed + 3, seed + 2):
        student.seed(number)
        globally.append(
            expect_tensor(student.call("random_factors", x, eps)[0], "a random factor", (1, channels, 1, 1))
        )
    expect(
        matches(globally[0], globally[2]) and not matches(globally[0], globally[1]),
        "without a generator the factors should come from torch's global random numbers",
    )


@dataclass(frozen=True)
class Slip:
    """How a step is taken; each argument that is not the default is a mistake."""

    formula: Callable[[Tensor, Tensor, Tensor], Tensor] = change
    direction: Callable[[Tensor], Tensor] = torch.sign
    project: bool = True
    in_turn: bool = False
    stays: int | None = None
    back_to_front: bool = False


def step_reference(
    tail: nn.Module, x: Tensor, labels: Tensor, now: tuple[Tensor, Tensor], eps: float, step_size: float, slip: Slip = Slip()
) -> Tensor:  # fmt: skip
    """One ascent step: the two new factors, stacked."""

    def gradients(*factors: Tensor) -> tuple[Tensor, ...]:
        leaves = tuple(part.clone().requires_grad_() for part in factors)
        return torch.autograd.grad(F.cross_entropy(tail(slip.formula(x, *leaves)), labels), leaves)

    def moved(part: Tensor, gradient: Tensor) -> Tensor:
        new = part + step_size * slip.direction(gradient)
        return new.clamp(1 - eps, 1 + eps) if slip.project else new

    new = [moved(part, gradient) for part, gradient in zip(now, gradients(*now))]
    if slip.in_turn:
        new[1] = moved(now[1], gradients(new[0], now[1])[1])
    if slip.stays is not None:
        new[slip.stays] = now[slip.stays]
    return torch.stack(new[::-1] if slip.back_to_front else new)


def _free_change(x: Tensor, mean_factor: Tensor, std_factor: Tensor) -> Tensor:
    mean = x.mean(BATCH, keepdim=True)
    return std_factor * (x - mean) + mean_factor * mean


def _per_image_change(x: Tensor, mean_factor: Tensor, std_factor: Tensor) -> Tensor:
    mean = x.mean(INSTANCE, keepdim=True)
    return (std_factor * (x - mean) + mean_factor * mean).clamp_min(0)


def _never_zero(at_zero: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: torch.where(gradient == 0, at_zero, gradient.sign())


SLIPS = {
    "you go down: the adversary makes the loss larger, so add": Slip(direction=lambda gradient: -gradient.sign()),
    "the step follows the gradient itself; take its sign": Slip(direction=lambda gradient: gradient),
    "the step follows the gradient, divided by its length; take its sign": Slip(direction=lambda g: g / g.norm()),
    "the result can be outside of the interval: project it": Slip(project=False),
    "where the gradient is 0 the factor should stay: sign(0) is 0": Slip(direction=_never_zero(1.0)),
    "where the gradient is 0 the factor should stay, but it goes down: sign(0) is 0": Slip(direction=_never_zero(-1.0)),
    "the mean factors have not moved": Slip(stays=0),
    "the std factors have not moved": Slip(stays=1),
    "the gradient of the std factor is taken at the new mean factor: take both at the old ones": Slip(in_turn=True),
    "the factors are returned in the other order": Slip(back_to_front=True),
    "the changed features are not cut at 0": Slip(formula=_free_change),
    "the mean of the changed features is per image; here it is over N,H,W": Slip(formula=_per_image_change),
}


def right_step(
    student: Student, seed: int, eps: float, step_size: float, dead_channel: bool = False, at_the_border: bool = False,
    batches: int = 4,
) -> None:  # fmt: skip
    """``ascent_step`` goes up by the sign of the gradient, in both factors, and back into the set.

    A step is made of signs, and a few signs fit several mistakes. So there are several batches, and a cause is named only
    if it explains all of them.
    """
    got, settings = [], []
    for number in range(seed, seed + batches):
        (x, labels), now = small_batch(number), factors(number, reach=eps)
        if dead_channel:
            x[:, 1] = 0
        if at_the_border:
            now = tuple(1 + eps * (part - 1).sign() for part in now)
        found = student.call("ascent_step", Given("tail", seed=number), x, labels, *now, eps, step_size)
        got.append(stacked(found, "ascent_step", x.shape[1]))
        settings.append((small_tail(number), x, labels, now, eps, step_size))

    def taken(slip: Slip) -> Tensor:
        return torch.cat([step_reference(*setting, slip) for setting in settings], dim=1)

    mistakes = {tells: taken(slip) for tells, slip in SLIPS.items()}
    compare_pairs(torch.cat(got, dim=1), taken(Slip()), "ascent_step(...)", mistakes, FACTORS, **EXACT)


def step_without_gradient(student: Student, seed: int) -> None:
    """The new factors require no gradient, though the old ones may."""
    x, labels = small_batch(seed)
    kept = student.keep("ascent_step", Given("tail", seed=seed), x, labels, *factors(seed), 1.1, STEP)
    expect(
        not student.on(student.make(Given("probe")), "wants_gradient", kept),
        "the factors that ascent_step returns require a gradient: detach them, or all steps hang together",
    )


def stacked(got: object, what: str, channels: int = 4) -> Tensor:
    """Two factors (1,channels,1,1) as one tensor."""
    parts = several(got, 2, what, "mean_factor, std_factor")
    first, second = (expect_tensor(part, f"a factor of {what}") for part in parts)
    expect(first.shape == second.shape, f"the two factors of {what} have different shapes")
    expect_tensor(first, f"a factor of {what}", (1, channels, 1, 1))
    expect(
        first.dtype == second.dtype == torch.float64,
        f"the features are torch.float64, but the factors of {what} are {first.dtype} and {second.dtype}",
    )
    return torch.stack([first, second])


def of_mutants(names: Iterable[str], value: Callable[[type[nn.Module]], Tensor]) -> dict[str, Tensor | None]:
    """What each of these wrong layers gives, by its mistake."""
    found = {}
    for name in names:
        mutant = MUTANTS.get(name) or ONLY_TOLD[name]
        try:
            found[f"this is what comes out if {_lower(mutant.mistake)}"] = value(layer_class(mutant.source))
        except RuntimeError:  # its shapes do not fit here
            continue
    return found


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def right_attack(
    student: Student, seed: int, eps: float = 1.1, step_size: float = STEP, steps: int = 6, **mode: bool
) -> None:
    """``attack`` finds the factors that the reference finds; ``mode`` is of the tail (see ``small_tail``)."""

    def ask(number: int, drawn: int = 0) -> Tensor:
        student.seed(drawn)
        given = Given("tail", seed=number, **mode)
        return stacked(student.call("attack", given, *small_batch(number), eps, step_size, steps), "attack")

    def found(layer: type[nn.Module], number: int) -> Tensor:
        x, labels = small_batch(number)
        return torch.stack(layer(small_tail(number, **mode), eps, step_size, steps).attack(x, labels))

    compare_attacks(ask, found, seed, "what attack finds")


def compare_attacks(
    ask: Callable[..., Tensor], found: Callable[[type[nn.Module], int], Tensor], seed: int, what: str
) -> None:
    """The factors that ``ask`` gives are those of the correct layer. If not, three batches must agree on the cause."""
    correct, got = layer_class(CORRECT), ask(seed)
    if matches(got, found(correct, seed), **EXACT):
        return
    again = ask(seed, drawn=1)
    expect(
        matches(got, again, **EXACT),
        f"{what} changes with torch's random numbers: the ascent starts at 1, where nothing changes, and draws nothing",
    )
    seeds = (seed, seed + 300, seed + 301)
    got = torch.cat([got, *(ask(number) for number in seeds[1:])], dim=1)

    def over_seeds(layer: type[nn.Module]) -> Tensor:
        return torch.cat([found(layer, number) for number in seeds], dim=1)

    compare_pairs(got, over_seeds(correct), what, of_mutants(IN_THE_FACTORS, over_seeds), FACTORS, **EXACT)


def finds_something(found: object, seed: int, steps: int, **mode: bool) -> None:
    """Wrong if these are not the right factors: who does nothing leaves no trace, and that is worth nothing."""
    wanted = layer_class(CORRECT)(small_tail(seed, **mode), 1.1, STEP, steps).attack(*small_batch(seed))
    expect(
        matches(stacked(found, "attack"), torch.stack(wanted), **EXACT),
        "attack does not find the right factors yet (see the checks of its factors); this counts from then on",
    )


def attack_leaves_no_trace(student: Student, seed: int, **mode: bool) -> None:
    """After the attack tail, inputs and random numbers are as before."""
    x, labels = small_batch(seed)
    tail = student.make(Given("tail", seed=seed, **mode))
    found, traces = student.call_and_look("attack", tail, x, labels, 1.1, STEP, 3)
    finds_something(found, seed, 3, **mode)
    no_trace(traces, "attack")
    # The same by a value: in eval mode a tail whose running statistics moved answers differently.
    if not mode:
        expect_close(
            student.on(tail, "__call__", x), small_tail(seed)(x), "the tail's answer after the attack", **EXACT
        )


def attack_after_an_error(student: Student, seed: int) -> None:
    """If the tail raises, the modes come back all the same."""
    x, labels = small_batch(seed)
    tail = student.make(Given("tail", seed=seed, training=True))
    finds_something(student.call("attack", tail, x, labels, 1.1, STEP, 3), seed, 3)
    outcome = student.attempt("attack", tail, x, labels[:2], 1.1, STEP, 3)
    expect(outcome.error != "", "attack with 6 images and 2 labels should raise an error")
    modes = [student.look_at(tail, name) for name in ("training", "0.norm.training", "2.training")]
    expect(
        all(mode is True for mode in modes),
        "when the attack fails, the tail stays in eval mode: restore it in a finally block",
    )


def branches_agree_at_first(student: Student, seed: int) -> None:
    """A new second set is a copy: both branches answer as the tail did."""
    x, _ = small_batch(seed)
    tail = student.make(Given("tail", seed=seed))
    student.call("add_second_batch_norm", tail)
    wanted = small_tail(seed)(x)
    for branch in ("clean", "adversarial"):
        student.call("use_branch", tail, branch)
        got = student.on(tail, "__call__", x)
        hint = "the second set begins as a copy of the first, running statistics and weights included"
        expect_close(got, wanted, f"the {branch} branch right after add_second_batch_norm", hint, **EXACT)
    branches_part(student, seed)  # who does nothing has two equal branches, and that is worth nothing


def branches_part(student: Student, seed: int) -> None:
    """In train mode each branch learns from its own batches, and from no others."""
    first, second = small_batch(seed)[0], 3 * small_batch(seed + 1)[0] + 1
    tail = student.make(Given("tail", seed=seed, training=True))
    student.call("add_second_batch_norm", tail)
    for branch, x in (("clean", first), ("adversarial", second)):
        student.call("use_branch", tail, branch)
        student.on(tail, "__call__", x)
    wanted = {}
    for branch, x in (("clean", first), ("adversarial", second)):
        alone = small_tail(seed, training=True)
        alone(x)
        wanted[branch] = alone.eval()(first)
    both = small_tail(seed, training=True)
    both(first), both(second)
    shared = both.eval()(first)
    student.on(student.make(Given("modes")), "set", tail, False)
    for branch, other in (("clean", "adversarial"), ("adversarial", "clean")):
        student.call("use_branch", tail, branch)
        mistakes = {
            "the two branches share their running statistics: the second BatchNorm must be a deep copy": shared,
            "this is what the other branch should answer": wanted[other],
            "it has not learnt from its batch": small_tail(seed)(first),
        }
        compare(
            student.on(tail, "__call__", first),
            wanted[branch],
            f"the {branch} branch after training",
            mistakes,
            **EXACT,
        )


def wrong_branch_is_refused(student: Student, seed: int) -> None:
    """A typing mistake in the branch's name is no silent choice."""
    tail = student.make(Given("tail", seed=seed))
    student.call("add_second_batch_norm", tail)
    student.call("use_branch", tail, "adversarial")
    refuses(
        student.attempt("use_branch", tail, "adverserial"), 'use_branch(tail, "adverserial")', "there is no such branch"
    )


def _layer(student: Student, seed: int, settings: dict[str, float], **mode: bool) -> tuple[object, object]:
    tail = student.make(Given("tail", seed=seed, **mode))
    return tail, student.keep("AdvBNLayer", tail, **settings)


def right_layer_attack(student: Student, seed: int) -> None:
    """The layer's attack asks the adversarial set and finds what the reference finds."""

    def ask(number: int, drawn: int = 0) -> Tensor:
        student.seed(drawn)
        _, layer = _layer(student, number, SETTINGS, training=True)
        return stacked(student.on(layer, "attack", *small_batch(number)), "AdvBNLayer.attack")

    def found(kind: type[nn.Module], number: int) -> Tensor:
        x, labels = small_batch(number)
        return torch.stack(kind(small_tail(number, training=True), **SETTINGS).attack(x, labels))

    compare_attacks(ask, found, seed, "what AdvBNLayer.attack finds")


def right_losses(student: Student, seed: int) -> None:
    """Calling the layer gives the clean and the adversarial loss."""
    x, labels = small_batch(seed)
    _, layer = _layer(student, seed, SETTINGS, training=True)
    parts = several(
        student.on(layer, "__call__", x, labels), 2, "AdvBNLayer(...)(features, labels)", "clean, adversarial"
    )
    got = torch.tensor([expect_number(part, "a loss") for part in parts], dtype=torch.float64)

    def found(kind: type[nn.Module]) -> Tensor:
        return torch.stack(kind(small_tail(seed, training=True), **SETTINGS)(x.clone(), labels)).detach()

    wanted = found(layer_class(CORRECT))
    if not matches(got, wanted, **EXACT):
        mistakes = {
            "both are half as large as they should be: AdvBN adds the two losses, it takes no mean": wanted / 2,
            "they are sums over the images; take the means": wanted * len(x),
            **of_mutants(IN_THE_LOSSES, found),
        }
        compare_pairs(
            got,
            wanted,
            "the pair of losses (clean, adversarial)",
            mistakes,
            ("clean loss", "adversarial loss"),
            **EXACT,
        )


def features_are_constants(student: Student, seed: int) -> None:
    """No gradient flows from the losses into the features."""
    x, labels = small_batch(seed)
    _, layer = _layer(student, seed, SETTINGS, training=True)
    expect(
        not student.on(student.make(Given("probe")), "reaches_features", layer, x, labels),
        "a gradient flows from the losses into the features: they belong to frozen layers, so detach them",
    )


def layer_after_an_error(student: Student, seed: int) -> None:
    """If one of the layer's methods fails, the tail is on the clean set and in its modes all the same."""
    x, labels = small_batch(seed)
    tail, layer = _layer(student, seed, SETTINGS, training=True)
    student.call("training_step", layer, x, labels, 0.05)  # from here on the two sets differ
    student.on(student.make(Given("modes")), "set", layer, False)
    before = expect_tensor(student.on(tail, "__call__", x), "the tail's answer")
    narrow = small_batch(seed, channels=3)[0]
    failing = {
        "predict": lambda: student.attempt_on(layer, "predict", narrow, "adversarial"),
        "attack": lambda: student.attempt_on(layer, "attack", x, labels[:2]),
        "calling the layer": lambda: student.attempt_on(layer, "__call__", x, labels[:2]),
    }
    for what, fail in failing.items():
        expect(fail().error != "", f"{what} on features or labels of a wrong shape should raise an error")
        expect_close(
            student.on(tail, "__call__", x), before, f"the tail's answer after {what} has failed",
            "use the clean set again in a finally block", **EXACT,
        )  # fmt: skip
    student.on(student.make(Given("modes")), "set", layer, True)
    student.attempt_on(layer, "predict", narrow)
    expect(
        student.look_at(layer, "training") is True and student.look_at(tail, "training") is True,
        "when predict fails, the layer stays in eval mode: put the modes back in a finally block",
    )


def unknown_branch(student: Student, seed: int) -> None:
    """``predict`` refuses a branch that does not exist."""
    x, _ = small_batch(seed)
    _, layer = _layer(student, seed, SETTINGS)
    refuses(
        student.attempt_on(layer, "predict", x, "adverserial"), 'predict(x, "adverserial")', "there is no such branch"
    )


def right_training(student: Student, seed: int, steps: int = 2, **mode: bool) -> None:
    """After some training steps, in the mode of the tail, both branches predict what the reference predicts."""
    mode = mode or {"training": True}
    batches, (probe, _) = [small_batch(seed + i) for i in range(steps)], small_batch(seed + 50)
    tail = student.make(Given("tail", seed=seed, **mode))
    layer = student.keep("AdvBNLayer", tail, **SETTINGS)
    if not mode.get("training"):
        student.on(student.make(Given("modes")), "set", layer, False)  # a new module is in train mode itself
    for x, labels in batches:
        student.call("training_step", layer, x, labels, 0.05)
    got = torch.stack(
        [expect_tensor(student.on(layer, "predict", probe, b), "predict(...)") for b in ("clean", "adversarial")]
    )

    def found(
        kind: type[nn.Module], total: Callable[[Tensor, Tensor], Tensor] = torch.add, forget: bool = True,
        in_train_mode: bool = False,
    ) -> Tensor:  # fmt: skip
        layer = kind(small_tail(seed, **mode), **SETTINGS)
        return trained(layer.train() if in_train_mode else layer, batches, probe, total, forget)

    correct = layer_class(CORRECT)
    wanted = found(correct)
    if matches(got, wanted, **EXACT):
        return
    mistakes = {
        "the weights learn from the clean loss alone": found(correct, lambda clean, adversarial: clean),
        "the weights learn from the adversarial loss alone": found(correct, lambda clean, adversarial: adversarial),
        "the loss is the mean of the two; AdvBN's is their sum": found(
            correct, lambda clean, adversarial: (clean + adversarial) / 2
        ),
        "the gradients of earlier steps are still there: set them to None before backward": found(
            correct, forget=False
        ),
        "training_step switches to train mode; the layer should stay in the mode in which it is": found(
            correct, in_train_mode=True
        ),
        "the two sets share their weights and biases; each BatchNorm has its own": found(shares_weights),
        "the step goes up the loss: subtract": found(correct, lambda clean, adversarial: -clean - adversarial),
        **of_mutants(IN_THE_PREDICTIONS, found),
    }
    compare(
        got,
        wanted,
        f"what the two branches (clean, adversarial) predict after {steps} training steps",
        mistakes,
        **EXACT,
    )


def shares_weights(tail: nn.Module, **settings: float) -> nn.Module:
    """A wrong layer: the two BatchNorms of a pair have statistics of their own, but the same weight and bias."""
    layer = layer_class(CORRECT)(tail, **settings)
    for module in layer.modules():
        if hasattr(module, "norms"):
            module.norms["adversarial"].weight, module.norms["adversarial"].bias = (
                module.norms["clean"].weight, module.norms["clean"].bias,
            )  # fmt: skip
    return layer


def trained(
    layer: nn.Module, batches: list[tuple[Tensor, Tensor]], probe: Tensor, total: Callable[[Tensor, Tensor], Tensor] = torch.add,
    forget: bool = True, rate: float = 0.05,
) -> Tensor:  # fmt: skip
    """Predictions of both branches after plain SGD steps on these batches."""
    for x, labels in batches:
        if forget:
            layer.zero_grad(set_to_none=True)
        total(*layer(x.clone(), labels)).backward()
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return torch.stack([layer.predict(probe, branch) for branch in ("clean", "adversarial")]).detach()


def predict_leaves_no_trace(student: Student, seed: int) -> None:
    """``predict`` runs in eval mode and puts every module back."""
    x, _ = small_batch(seed)
    _, layer = _layer(student, seed, SETTINGS, training=True)
    first = expect_tensor(student.on(layer, "predict", x), "predict(x)", (len(x), CLASSES))
    expect_close(first, small_tail(seed)(x), "predict(x)", "it answers in eval mode, from the clean set", **EXACT)
    again = student.on(layer, "predict", x, "adversarial")
    expect_close(
        again,
        small_tail(seed)(x),
        'predict(x, "adversarial")',
        "a prediction must not move the running statistics",
        **EXACT,
    )
    expect(
        student.look_at(layer, "training") is True, "after predict the layer is not in the mode in which it was before"
    )


def unseen(source: str) -> Given:
    """The layer's class, written anew, so that nobody can recognise it by its code."""
    return Given("source", code=rewritten(source, random.SystemRandom()), name=CLASS)


def no_false_alarm(student: Student, source: str = CORRECT) -> float:
    """The student's tests pass on a correct layer; the seconds that they took."""
    started = time.monotonic()
    outcome = student.attempt("tests_of_mine", unseen(source))
    seconds = time.monotonic() - started
    if outcome.error:
        which = "a correct layer" if source is CORRECT else "a correct layer that is written in another way"
        where = f" at {outcome.where}" if outcome.where else ""
        own = "If they compare with functions of your own, do the checks of tasks 1 to 5 hold?"
        raise Raised(
            f"your tests fail on {which}: {outcome.error} {outcome.message}{where}. Test what every AdvBN layer must do, not "
            f"how it does it. {own}",
            f"your tests fail on {which}. {own}",
        )
    return seconds


def no_false_alarms(student: Student) -> str:
    """The tests pass on both correct layers, soon enough; how long they took."""
    seconds = max(no_false_alarm(student, source) for source in ALL_CORRECT)
    expect(
        seconds < MOST_SECONDS,
        f"your tests take {seconds:.1f} s on one layer; {MOST_SECONDS:.0f} s is the most, as grading runs them on many layers",
    )
    return f"your tests take {seconds:.1f} s on one layer (about 2 s are plenty; {MOST_SECONDS:.0f} s is the most)"


def kills(student: Student, name: str, order: int = 0) -> None:
    """The tests fail on the mutant and pass on the correct layers, in an order that they cannot know."""
    mutant = MUTANTS[name]
    runs = [(source, False) for source in ALL_CORRECT[order % 2 :][:1]] + [(mutant.source, True)]
    random.Random(f"{name} {order}").shuffle(runs)
    for source, wrong in runs:
        if not wrong:
            no_false_alarm(student, source)
        else:
            outcome = student.attempt("tests_of_mine", unseen(source))
            expect(outcome.error != "", f"a wrong layer passes all your tests. Its mistake: {mutant.mistake}")


def worth(name: str) -> float:
    """The points for finding this mutant: more for those that a short plain suite does not find."""
    return 0.75 if name in SUBTLE else 0.25


ASSIGNMENT = Assignment(
    number=2,
    name="write_advbn",
    title="Write AdvBN",
    tasks=(
        Task(
            "the_set",
            "What the adversary may do",
            (
                Check(
                    "change",
                    "features with other batch means and stds, cut at 0",
                    lambda s: right_change(s, features(0, (3, 4, 5, 5), torch.float64, positive=True), *factors(0)),
                ),
                Check(
                    "project",
                    "back into [1 - eps, 1 + eps]",
                    lambda s: right_projection(s, torch.linspace(-3, 5, 33).view(1, 33, 1, 1), 1.1),
                ),
                Check(
                    "random factors", "uniform in the interval, from the generator", lambda s: right_random(s, 3, 1.1)
                ),
            ),
        ),
        Task(
            "one_step",
            "One step up",
            (
                Check("step", "by the sign of the gradient, in both factors", lambda s: right_step(s, 1, 1.1, STEP)),
                Check(
                    "border",
                    "back into the set, from factors at its border",
                    lambda s: right_step(s, 11, 0.6, STEP, at_the_border=True),
                ),
                Check(
                    "no gradient, no step",
                    "a factor whose gradient is 0 stays where it is",
                    lambda s: right_step(s, 21, 1.1, STEP, dead_channel=True),
                ),
                Check("detached", "the new factors require no gradient", lambda s: step_without_gradient(s, 31)),
            ),
        ),
        Task(
            "the_attack",
            "The whole ascent",
            (
                Check("factors", "the worst factors after six steps", lambda s: right_attack(s, 2)),
                Check(
                    "eval mode",
                    "the same from a tail in train mode: the adversary asks in eval mode",
                    lambda s: right_attack(s, 3, training=True),
                ),
                Check(
                    "no trace",
                    "tail, inputs and random numbers are as before",
                    lambda s: attack_leaves_no_trace(s, 4, training=True, mixed=True),
                ),
            ),
        ),
        Task(
            "two_sets",
            "Two sets of batch normalisation",
            (
                Check("copies", "both branches begin as the tail was", lambda s: branches_agree_at_first(s, 5)),
                Check("apart", "each learns from its own batches", lambda s: branches_part(s, 6)),
            ),
        ),
        Task(
            "the_layer",
            "The layer and a training step",
            (
                Check("attack", "the layer's attack", lambda s: right_layer_attack(s, 7)),
                Check("losses", "the clean and the adversarial loss", lambda s: right_losses(s, 8)),
                Check(
                    "training",
                    "predictions of both branches after two training steps, one BatchNorm in eval mode",
                    lambda s: right_training(s, 9, training=True, mixed=True),
                ),
                Check("predict", "in eval mode, without a trace", lambda s: predict_leaves_no_trace(s, 12)),
                Check("unknown branch", "predict refuses it with a ValueError", lambda s: unknown_branch(s, 13)),
                Check("constants", "no gradient flows into the features", lambda s: features_are_constants(s, 14)),
            ),
        ),
        Task(
            "your_tests",
            "Tests that find mistakes",
            (
                Check(
                    "no false alarm",
                    "your tests pass on two correct layers",
                    no_false_alarms,
                    0.0,
                    seconds=60,
                ),
                *(
                    Check(
                        f"finds: {name}",
                        f"a layer that is wrong: {_lower(MUTANTS[name].mistake)}",
                        lambda s, name=name: kills(s, name),
                        worth(name),
                        seconds=60,
                        needs="no false alarm",
                    )
                    for name in SHOWN
                ),
            ),
        ),
    ),
    withheld=(
        "advbn_lib.statistics",
        "advbn_lib.perturbations",
        "advbn_lib.ascent",
        "advbn_lib.dual_bn",
        "advbn_lib.modes",
        "advbn_lib.methods",
        "advbn_lib.assignments.write_advbn",
        "advbn_lib.assignments.mutants",
    ),
)
