"""Hidden checks of assignment 2: other seeds and settings, the edges, and the mutants that the notebook does not show."""

import torch

from advbn_lib.assignments.given import small_batch, small_tail
from advbn_lib.assignments.mutants import MUTANTS, SHOWN
from advbn_lib.assignments.telling import features
from advbn_lib.assignments.write_advbn import (
    EXACT,
    attack_after_an_error,
    attack_leaves_no_trace,
    branches_agree_at_first,
    branches_part,
    factors,
    kills,
    predict_leaves_no_trace,
    right_attack,
    right_change,
    right_layer_attack,
    right_losses,
    right_projection,
    right_random,
    right_step,
    right_training,
    wrong_branch_is_refused,
)  # fmt: skip
from advbn_lib.grading.task import Check, Given, expect, expect_close


def hidden(name, says, run, points=1.0, seconds=30.0):
    return Check(f"hidden: {name}", says, run, points, hidden=True, seconds=seconds)


def checks(variant: int) -> dict[str, tuple[Check, ...]]:
    """The hidden checks of each task."""
    seed = 1000 * (variant + 1)

    def other_changes(student):
        for i, shape in enumerate([(2, 3, 4, 4), (5, 1, 3, 6), (1, 4, 7, 2)]):
            x = features(seed + i, shape, torch.float64, positive=True)
            right_change(student, x, *factors(seed + i, shape[1], reach=1.5))

    def dead_change(student):
        x = features(seed + 5, (3, 3, 4, 4), torch.float64, positive=True)
        x[:, 0], x[:, 1] = 0.0, 1.5
        right_change(student, x, *factors(seed + 5, 3))

    def other_projections(student):
        for eps in (0.25, 1.0, 2.5):
            right_projection(
                student, 4 * torch.randn((1, 50, 1, 1), generator=torch.Generator().manual_seed(seed)) + 1, eps
            )

    def frozen_tail(student):
        right_attack(student, seed + 1, steps=3, frozen=True)

    def one_attack_step(student):
        right_attack(student, seed + 2, eps=0.4, step_size=0.3, steps=1)

    def climbs(student):
        x, labels = small_batch(seed + 3)
        a, b = student.call("attack", Given("tail", seed=seed + 3), x, labels, 1.1, 0.23, 6)
        tail, loss = small_tail(seed + 3), torch.nn.functional.cross_entropy
        mean = x.mean((0, 2, 3), keepdim=True)
        after = loss(tail((b * (x - mean) + a * mean).clamp_min(0)), labels)
        before = loss(tail(x), labels)
        expect(after.item() > before.item(), "under the factors that attack finds the loss is not larger than before")

    def one_branch_at_a_time(student):
        first, second = small_batch(seed + 4)[0], 2 * small_batch(seed + 5)[0]
        tail = student.make(Given("tail", seed=seed + 4, training=True))
        student.call("add_second_batch_norm", tail)
        student.call("use_branch", tail, "adversarial")
        student.on(tail, "__call__", first)
        student.on(tail, "__call__", second)
        student.on(student.make(Given("modes")), "set", tail, False)
        student.call("use_branch", tail, "clean")
        got = student.on(tail, "__call__", first)
        expect_close(
            got,
            small_tail(seed + 4)(first),
            "the clean branch, after training on the other",
            "it should not have learnt",
            **EXACT,
        )

    found = {
        "the_set": (
            hidden("other features", "other shapes, one image, one channel", other_changes),
            hidden("dead channels", "channels that are constant", dead_change),
            hidden("other intervals", "eps below, at and above 1", other_projections),
            hidden("random factors", "another eps and seed", lambda s: right_random(s, seed, 0.4)),
        ),
        "one_step": (
            hidden("small eps", "a small interval", lambda s: right_step(s, seed, 0.3, 0.2)),
            hidden("dead channel", "a channel without a gradient stays where it is",
                   lambda s: right_step(s, seed + 1, 1.1, 0.23, dead_channel=True)),
        ),
        "the_attack": (
            hidden("other settings", "other eps, step size and number of steps",
                   lambda s: right_attack(s, seed, eps=0.5, step_size=0.17, steps=4, training=True)),
            hidden("one step", "a single step", one_attack_step),
            hidden("frozen tail", "a tail whose weights require no gradient", frozen_tail),
            hidden("climbs", "the loss is larger afterwards", climbs),
            hidden("modes", "each module has its own mode back", lambda s: attack_leaves_no_trace(s, seed, training=True, mixed=True)),
            hidden("eval mode", "a tail in eval mode stays in it", lambda s: attack_leaves_no_trace(s, seed + 1)),
            hidden("frozen flags", "a frozen tail stays frozen", lambda s: attack_leaves_no_trace(s, seed + 2, frozen=True)),
            hidden("after an error", "modes come back after an error too", lambda s: attack_after_an_error(s, seed)),
        ),
        "two_sets": (
            hidden("copies", "another tail", lambda s: branches_agree_at_first(s, seed)),
            hidden("apart", "another tail", lambda s: branches_part(s, seed + 1)),
            hidden("one at a time", "a branch that is not in use learns nothing", one_branch_at_a_time),
            hidden("wrong name", "an unknown branch is refused with a ValueError", lambda s: wrong_branch_is_refused(s, seed)),
        ),
        "the_layer": (
            hidden("attack", "another tail", lambda s: right_layer_attack(s, seed)),
            hidden("losses", "another tail", lambda s: right_losses(s, seed + 1)),
            hidden("training", "three steps on another tail", lambda s: right_training(s, seed + 2, 3), 2.0),
            hidden("predict", "in eval mode, without a trace", lambda s: predict_leaves_no_trace(s, seed)),
        ),
    }  # fmt: skip
    others = [name for name in MUTANTS if name not in SHOWN]
    found["your_tests"] = tuple(
        hidden(f"finds {i}", "your tests fail on a wrong layer, and pass on a correct one",
               lambda s, name=name, i=i: kills(s, name, seed + i), 0.25, 60.0)
        for i, name in enumerate(others, start=1)
    )  # fmt: skip
    return found


CHECKS = checks(0)
