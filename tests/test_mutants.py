"""The wrong AdvBN layers of assignment 2: each is wrong in a way that can be seen, and the correct ones are not."""

import ast
import random

import pytest
import torch
from conftest import ROOT
from torch import nn

from advbn_lib.assignments.given import small_batch, small_tail
from advbn_lib.assignments.mutants import (
    ALL_CORRECT,
    CLASS,
    CORRECT,
    MUTANTS,
    ONLY_TOLD,
    SHOWN,
    SUBTLE,
    Mutant,
    layer_class,
)
from advbn_lib.assignments.rewriting import rewritten
from advbn_lib.assignments.write_advbn import EXACT, SETTINGS, trained, unseen, worth
from advbn_lib.grading import child
from advbn_lib.grading.answering import Desk
from advbn_lib.grading.asking import Asking
from advbn_lib.methods.advbn import AdvBN

torch.set_num_threads(1)


def solution_of_2() -> dict:
    """The names that the instructor's edition of assignment 2 defines."""
    from advbn_lib.grading.editions import instructor_edition, read_source

    namespace: dict = {}
    for cell in instructor_edition(read_source(ROOT / "assignments" / "source" / "2_write_advbn.py")):
        if cell.kind == "code" and "check(" not in cell.text:
            exec(compile(cell.text, "solution", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def solution() -> dict:
    return solution_of_2()


def test_there_are_enough_of_them_and_each_is_a_mistake_of_its_own():
    sources = [mutant.source for mutant in MUTANTS.values()]
    assert len(MUTANTS) >= 24 and len(set(sources)) == len(sources) and CORRECT not in sources
    assert len({mutant.mistake for mutant in MUTANTS.values()}) == len(MUTANTS)
    assert set(SHOWN) < set(MUTANTS) and set(SUBTLE) < set(MUTANTS) and not set(SUBTLE) & set(SHOWN)
    assert not set(ONLY_TOLD) & set(MUTANTS)
    for source in sources:
        ast.parse(source)
        assert issubclass(layer_class(source), nn.Module)


def test_a_piece_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="0 times"):
        _ = Mutant("none", (("no such piece", ""),)).source


@pytest.mark.parametrize("seed", range(6))
def test_the_correct_layers_agree(seed):
    x, labels = small_batch(seed)
    factors, values, predictions = [], [], []
    for source in ALL_CORRECT:
        layer = layer_class(source)(small_tail(seed, training=True), **SETTINGS)
        factors.append(torch.stack(layer.attack(x, labels)))
        values.append(torch.stack(layer(x, labels)).detach())
        fresh = layer_class(source)(small_tail(seed, training=True), **SETTINGS)
        predictions.append(trained(fresh, [small_batch(seed), small_batch(seed + 1)], x))
    for found in (factors, values, predictions):
        torch.testing.assert_close(found[0], found[1], **EXACT)


def test_the_correct_layer_is_the_librarys():
    class Whole(nn.Module):
        """A network whose upper part is a tail."""

        def __init__(self):
            super().__init__()
            self.below = nn.ReLU()
            self.above = small_tail(3)

        def forward(self, x):
            return self.above(self.below(x))

    x, labels = small_batch(3)
    method = AdvBN(Whole(), layer="below", eps=0.7, step_size=0.27, steps=4, example=x).train()
    layer = layer_class(CORRECT)(small_tail(3, training=True), **SETTINGS)
    torch.testing.assert_close(
        torch.stack(layer.attack(x, labels)), torch.stack(method.attack(x, labels).delta), **EXACT
    )
    losses = method(x, labels)
    torch.testing.assert_close(torch.stack(layer(x, labels)), torch.stack([losses.clean, losses.adversarial]), **EXACT)


@pytest.mark.parametrize("source", ALL_CORRECT)
def test_the_solutions_tests_pass_on_correct_layers(solution, source):
    solution["tests_of_mine"](layer_class(source))
    solution["tests_of_mine"](solution["AdvBNLayer"])


@pytest.mark.parametrize("name", MUTANTS)
def test_the_solutions_tests_find(solution, name):
    with pytest.raises((AssertionError, RuntimeError)):
        solution["tests_of_mine"](layer_class(rewritten(MUTANTS[name].source, random.Random(0))))


def test_the_small_tail_is_the_same_each_time_and_leaves_the_random_numbers_alone():
    torch.rand(1)
    before = torch.get_rng_state()
    first, second = small_tail(5), small_tail(5)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not any(module.training for module in first.modules())
    mixed = small_tail(5, training=True, mixed=True)
    assert mixed.training and not mixed[0].norm.training and mixed[2].training


def test_the_features_of_a_small_batch_are_above_zero():
    assert all(small_batch(seed)[0].min() > 0 for seed in range(20))


@pytest.mark.parametrize("layer", [*ALL_CORRECT, "solution"])
def test_a_correct_layer_is_safe_after_errors(solution, layer):
    """By a fair reading of the assignment: modes and the clean set come back, and no branch is made up."""
    x, labels = small_batch(0)
    make = solution["AdvBNLayer"] if layer == "solution" else layer_class(layer)

    def fail_in_call(number: int, call) -> None:
        tail = small_tail(0, training=True)
        one = make(tail, steps=2)
        for seed in range(2):
            one(*small_batch(seed))
        tail[3].eval()
        modes, calls = [module.training for module in tail.modules()], []

        def hook(*_):
            calls.append(None)
            if len(calls) == number:
                raise RuntimeError("on purpose")

        handle = tail[-1].register_forward_hook(hook)
        with pytest.raises((RuntimeError, ValueError), match="on purpose|branch|tuple.index"):
            call(one)
        handle.remove()
        assert [module.training for module in tail.modules()] == modes
        one.eval()
        torch.testing.assert_close(tail(x), one.predict(x))
        assert not torch.allclose(one.predict(x), one.predict(x, "adversarial"))

    for number in (1, 2, 3, 4):
        fail_in_call(number, lambda one: one(x, labels))
    fail_in_call(2, lambda one: one.attack(x, labels))
    fail_in_call(1, lambda one: one.predict(x, "adversarial"))
    fail_in_call(0, lambda one: one.predict(x, "other"))


def behaviour(source: str) -> list[torch.Tensor | str]:
    """What a layer of this source answers, one call after another; an error by its name."""
    x, labels = small_batch(2)
    torch.manual_seed(0)
    tail = small_tail(2, training=True)
    layer = layer_class(source)(tail, eps=0.7, step_size=0.27, steps=2)
    found = []
    for call in (
        lambda: torch.stack(layer.attack(x, labels)), lambda: torch.stack(layer(x, labels)), lambda: layer.predict(x),
        lambda: layer.predict(x, "adversarial"), lambda: layer.predict(x, "other"), lambda: layer.predict(x[:, :3]), lambda: tail(x),
    ):  # fmt: skip
        try:
            found.append(call().detach())
        except (RuntimeError, ValueError) as error:
            found.append(type(error).__name__)
    return found


@pytest.mark.parametrize("name", ["correct", "correct too", *MUTANTS, *ONLY_TOLD])
def test_a_layer_written_anew_does_the_same_and_looks_different(name):
    """A rewriting that broke a mutant would make a gift of it."""
    correct = dict(zip(("correct", "correct too"), ALL_CORRECT))
    source = correct.get(name) or {**MUTANTS, **ONLY_TOLD}[name].source
    one, two = (rewritten(source, random.Random(seed)) for seed in range(2))
    for before, after in zip(behaviour(source), behaviour(one), strict=True):
        assert type(before) is type(after)
        assert before == after if isinstance(before, str) else torch.equal(before, after)
    codes = [layer_class(text).attack.__code__ for text in (source, one, two)]
    assert len({(code.co_code, code.co_names, code.co_varnames) for code in codes}) == 3


SPY = """
import sys
def tests_of_mine(Layer):
    seen, frame = [], sys._getframe()
    while frame is not None:
        seen += [repr(value) for value in frame.f_locals.values()]
        if frame.f_code.co_name == "_reply":
            return any("class Layer" in text for text in seen), len(seen) > 5
        frame = frame.f_back
"""


def test_a_submission_does_not_find_the_layers_source_in_its_callers():
    namespace: dict = {"__name__": "__main__"}
    exec(SPY, namespace)

    class Inside(Asking):
        desk = Desk(namespace)

        def exchange(self, message):
            return child._reply(message, self.desk, namespace)

    assert Inside().call("tests_of_mine", unseen(CORRECT)) == (False, True)


PLAIN = """
def tests_of_mine(Layer):
    torch.manual_seed(1)
    torch.rand(1)
    for eps, steps in ((1.1, 6), (0.3, 3)):
        x, labels = small_batch(0)
        tail = small_tail(0, training=True)
        layer, mine = Layer(tail, eps, 0.23, steps), AdvBNLayer(small_tail(0, training=True), eps, 0.23, steps)
        state, random = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
        for f, w in zip(layer.attack(x, labels), attack(small_tail(0), x, labels, eps, 0.23, steps)):
            assert torch.allclose(f, w) and not f.requires_grad
        assert all(m.training for m in tail.modules()) and torch.equal(random, torch.get_rng_state())
        assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
        assert all(p.grad is None for p in tail.parameters())
        for seed in (0, 1):
            x, labels = small_batch(seed)
            one, other = training_step(layer, x, labels, 0.1), training_step(mine, x, labels, 0.1)
            assert torch.allclose(torch.tensor(one), torch.tensor(other))
        for branch in ("clean", "adversarial"):
            assert torch.allclose(layer.predict(x, branch), mine.predict(x, branch))
        assert all(m.training for m in tail.modules())
        leaf = x.clone().requires_grad_()
        sum(layer(leaf, labels)).backward()
        assert leaf.grad is None
"""


def test_a_plain_suite_gets_less_than_two_thirds_of_the_points(solution):
    """It looks at factors, losses, predictions and the plainest traces; the subtle mutants separate."""
    names = dict(solution)
    exec(compile(PLAIN, "plain", "exec"), names)

    def finds(name: str) -> bool:
        try:
            names["tests_of_mine"](layer_class(MUTANTS[name].source))
        except Exception:
            return True
        return False

    for source in ALL_CORRECT:
        names["tests_of_mine"](layer_class(source))
    missed = [name for name in MUTANTS if not finds(name)]
    share = 1 - sum(worth(name) for name in missed) / sum(worth(name) for name in MUTANTS)
    assert 0.3 < share < 0.67, missed
    assert set(missed) <= set(SUBTLE), set(missed) - set(SUBTLE)


def test_all_mutants_have_the_same_class_name():
    assert {layer_class(mutant.source).__name__ for mutant in MUTANTS.values()} == {CLASS}
