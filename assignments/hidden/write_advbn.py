"""Hidden checks of assignment 2: other seeds and settings, the edges, and the mutants that the notebook does not show."""

import torch

from advbn_lib.assignments.given import small_batch, small_tail
from advbn_lib.assignments.mutants import CORRECT, MUTANTS, SHOWN, layer_class
from advbn_lib.assignments.telling import compare, features, no_trace
from advbn_lib.assignments.write_advbn import (
    EXACT,
    SETTINGS,
    attack_after_an_error,
    attack_leaves_no_trace,
    branches_agree_at_first,
    branches_part,
    factors,
    features_are_constants,
    kills,
    layer_after_an_error,
    predict_leaves_no_trace,
    right_attack,
    right_change,
    right_layer_attack,
    right_losses,
    right_projection,
    right_random,
    right_step,
    right_training,
    stacked,
    unknown_branch,
    worth,
    wrong_branch_is_refused,
)  # fmt: skip
from advbn_lib.grading.task import Check, Given, expect, expect_close

# What a value cannot show: asked on the student's side by an object that the check sends.
PROBE = """
import torch


class Probe:
    def attack_without_gradients(self, layer, x, labels):
        with torch.no_grad():
            return layer.attack(x, labels)

    def graphs(self, layer, x, labels):
        return [part.requires_grad for part in layer.attack(x, labels)]

    def random_kept(self, layer, x, labels):
        torch.rand(3)
        before = torch.get_rng_state()
        layer.attack(x, labels)
        return torch.equal(before, torch.get_rng_state())

    def after_an_error(self, layer, x, labels):
        try:
            layer.attack(x, labels[:2])
        except Exception:
            return [p.requires_grad for p in layer.parameters()]
        return None

    def modes(self, layer, tail, x):
        tail[0].eval()
        before = [m.training for m in layer.modules()]
        layer.predict(x)
        layer.predict(x, "adversarial")
        return [m.training for m in layer.modules()] == before

    def momentum(self, tail):
        for m in tail.modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                m.momentum, m.eps = 0.5, 0.01
        return None
"""


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

    def probed(student, **mode):
        x, labels = small_batch(seed + 7)
        tail = student.make(Given("tail", seed=seed + 7, training=True, **mode))
        layer = student.keep("AdvBNLayer", tail, **SETTINGS)
        return student.make(Given("source", code=PROBE, name="Probe", settings={})), tail, layer, x, labels

    def without_gradients(student):
        probe, _, layer, x, labels = probed(student)
        outcome = student.attempt_on(probe, "attack_without_gradients", layer, x, labels)
        expect(
            outcome.error == "",
            "attack raises an error where the caller switched gradients off: switch them on around the loss, with "
            "torch.enable_grad()",
        )
        got, wanted = outcome.value, layer_class(CORRECT)(small_tail(seed + 7), **SETTINGS).attack(x.clone(), labels)
        expect_close(stacked(got, "attack"), torch.stack(wanted), "what attack finds under torch.no_grad()", **EXACT)

    def graphs(student):
        probe, _, layer, x, labels = probed(student)
        expect(
            student.on(probe, "graphs", layer, x, labels) == [False, False],
            "the factors that attack returns still require a gradient: project the detached factors (f.detach() + ...)",
        )

    def random_kept(student):
        probe, _, layer, x, labels = probed(student)
        expect(
            student.on(probe, "random_kept", layer, x, labels) is True,
            "after the attack torch's random numbers are others than before: neither draw from them nor seed them",
        )

    def flags_after_an_error(student):
        probe, _, layer, x, labels = probed(student)
        flags = student.on(probe, "after_an_error", layer, x, labels)
        expect(flags is not None, "attack with 6 images and 2 labels should raise an error")
        expect(
            all(flag is True for flag in flags),
            "when the attack fails, parameters stay frozen: restore requires_grad in a finally block",
        )

    def branch_after(student, how):
        probe, tail, layer, x, labels = probed(student)
        for step in range(2):  # the two sets part: the clean one learns from this batch alone
            student.on(tail, "__call__", 9 * x + 3)
        if how == "error":
            student.on(probe, "after_an_error", layer, x, labels)
        elif how == "attack":
            student.on(layer, "attack", x, labels)
        else:
            student.on(layer, "predict", x, "adversarial")
        alone = small_tail(seed + 7, training=True)
        for step in range(2):
            alone(9 * x + 3)
        student.on(student.make(Given("modes")), "set", tail, False)
        words = {"error": "an attack that failed", "attack": "attack", "predict": 'predict(x, "adversarial")'}[how]
        expect_close(
            student.on(tail, "__call__", x),
            alone.eval()(x),
            f"what the tail answers after {words}",
            "after each call it is on the clean set again (in a finally block), and it is the very tail that was passed in",
            **EXACT,
        )

    def the_very_tail(student):
        _, tail, layer, x, labels = probed(student)
        student.on(layer, "__call__", x, labels)
        alone = small_tail(seed + 7, training=True)
        alone(x)
        student.on(student.make(Given("modes")), "set", tail, False)
        expect_close(
            student.on(tail, "__call__", x),
            alone.eval()(x),
            "what the tail that you were given answers after a pass through the layer",
            "the layer works on this very tail, in place, and not on a copy",
            **EXACT,
        )

    def modes_after_predict(student):
        probe, tail, layer, x, _ = probed(student)
        expect(
            student.on(probe, "modes", layer, tail, x) is True,
            "after predict a module is not in the mode in which it was: write each one's mode down and put it back",
        )

    def copy_of_settings(student):
        first = 3 * small_batch(seed + 8)[0] + 1
        probe = student.make(Given("source", code=PROBE, name="Probe", settings={}))
        tail = student.make(Given("tail", seed=seed + 8, training=True))
        student.on(probe, "momentum", tail)
        learnt, fresh = small_tail(seed + 8, training=True), small_tail(seed + 8, training=True)
        for module in (*learnt.modules(), *fresh.modules()):
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum, module.eps = 0.5, 0.01
        learnt(first)
        student.call("add_second_batch_norm", tail)
        student.call("use_branch", tail, "adversarial")
        student.on(tail, "__call__", first)
        student.on(student.make(Given("modes")), "set", tail, False)
        for branch, alone in (("adversarial", learnt), ("clean", fresh)):
            student.call("use_branch", tail, branch)
            expect_close(
                student.on(tail, "__call__", first),
                alone.eval()(first),
                f"the {branch} branch after a batch for the adversarial one",
                "the second BatchNorm is a copy of the first, its momentum and eps included: copy.deepcopy",
                **EXACT,
            )

    def begins_on_clean(student):
        first = 3 * small_batch(seed + 9)[0] + 1
        tail = student.make(Given("tail", seed=seed + 9, training=True))
        student.call("add_second_batch_norm", tail)
        student.on(tail, "__call__", first)
        student.on(student.make(Given("modes")), "set", tail, False)
        student.call("use_branch", tail, "adversarial")
        expect_close(
            student.on(tail, "__call__", first),
            small_tail(seed + 9)(first),
            "the adversarial branch, which has not been used",
            "after add_second_batch_norm the clean set is in use",
            **EXACT,
        )

    def returned_losses(student):
        x, labels = small_batch(seed + 10)
        _, tail, layer, _, _ = probed(student)
        wanted = layer_class(CORRECT)(small_tail(seed + 7, training=True), **SETTINGS)(x.clone(), labels)
        got = student.call("training_step", layer, x, labels, 0.05)
        expect(
            isinstance(got, (tuple, list)) and len(got) == 2,
            "training_step should return two losses (clean, adversarial)",
        )
        expect(
            all(isinstance(part, float) for part in got),
            "training_step should return the losses as numbers: loss.item()",
        )
        compare(
            torch.tensor(got, dtype=torch.float64),
            torch.stack(wanted).detach(),
            "what training_step returns",
            {"the adversarial loss comes first": torch.stack(wanted[::-1]).detach()},
            **EXACT,
        )

    def factors_kept(student):
        (x, labels), now = small_batch(seed + 11), factors(seed + 11, reach=0.7)
        _, traces = student.call_and_look("ascent_step", Given("tail", seed=seed + 11), x, labels, *now, 0.7, 0.27)
        no_trace(traces, "ascent_step")

    def change_keeps_x(student):
        x = features(seed + 12, (3, 4, 5, 5), torch.float64, positive=True)
        _, traces = student.call_and_look("change_statistics", x, *factors(seed + 12))
        no_trace(traces, "change_statistics")

    found = {
        "the_set": (
            hidden("other features", "other shapes, one image, one channel", other_changes),
            hidden("dead channels", "channels that are constant", dead_change),
            hidden("other intervals", "eps below, at and above 1", other_projections),
            hidden("random factors", "another eps and seed", lambda s: right_random(s, seed, 0.4)),
            hidden("x is kept", "change_statistics leaves its input as it was", change_keeps_x, 0.5),
        ),
        "one_step": (
            hidden("small eps", "a small interval", lambda s: right_step(s, seed, 0.3, 0.2)),
            hidden("dead channel", "a channel without a gradient stays where it is",
                   lambda s: right_step(s, seed + 1, 1.1, 0.23, dead_channel=True)),
            hidden("border", "both factors are projected", lambda s: right_step(s, seed + 40, 0.3, 0.2, at_the_border=True), 0.5),
            hidden("factors are kept", "the step makes new factors and leaves the old", factors_kept, 0.5),
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
            hidden("settings", "the copy has the momentum and eps of the first", copy_of_settings, 0.5),
            hidden("begins clean", "after add_second_batch_norm the clean set is in use", begins_on_clean, 0.5),
            hidden("wrong name", "an unknown branch is refused with a ValueError", lambda s: wrong_branch_is_refused(s, seed)),
        ),
        "the_layer": (
            hidden("attack", "another tail", lambda s: right_layer_attack(s, seed)),
            hidden("losses", "another tail", lambda s: right_losses(s, seed + 1)),
            hidden("training", "three steps on another tail", lambda s: right_training(s, seed + 2, 3), 2.0),
            hidden("training in eval mode", "a layer in eval mode stays in it", lambda s: right_training(s, seed + 6, training=False)),
            hidden("unknown branch", "predict refuses it", lambda s: unknown_branch(s, seed)),
            hidden("constants", "no gradient flows into the features", lambda s: features_are_constants(s, seed + 7)),
            hidden("without gradients", "attack works where the caller switched gradients off", without_gradients, 0.5),
            hidden("no graph", "factors are returned without a gradient", graphs, 0.5),
            hidden("random numbers", "the attack leaves torch's random numbers alone", random_kept, 0.5),
            hidden("clean after attack", "the tail is on the clean set again", lambda s: branch_after(s, "attack"), 0.5),
            hidden("clean after predict", "the tail is on the clean set again", lambda s: branch_after(s, "predict"), 0.5),
            hidden("the very tail", "the layer works on the tail that it is given", the_very_tail, 0.5),
            hidden("modes after predict", "predict puts each module back", modes_after_predict, 0.5),
            hidden("returned losses", "training_step returns (clean, adversarial) from before the step", returned_losses, 0.5),
            hidden("flags after an error", "requires_grad comes back after an error", flags_after_an_error, 0.5),
            hidden("clean after an error", "the tail is on the clean set again", lambda s: branch_after(s, "error"), 0.5),
            hidden("after an error", "the clean set and the modes come back after an error", lambda s: layer_after_an_error(s, seed)),
            hidden("predict", "in eval mode, without a trace", lambda s: predict_leaves_no_trace(s, seed)),
        ),
    }  # fmt: skip
    others = [name for name in MUTANTS if name not in SHOWN]
    found["your_tests"] = tuple(
        hidden(f"finds {i}", "your tests fail on a wrong layer, and pass on a correct one",
               lambda s, name=name, i=i: kills(s, name, seed + i), worth(name), 60.0)
        for i, name in enumerate(others, start=1)
    )  # fmt: skip
    return found


CHECKS = checks(0)
