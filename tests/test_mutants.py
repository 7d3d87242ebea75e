"""The wrong AdvBN layers of assignment 2: each is wrong in a way that can be seen, and the correct ones are not."""

import ast

import pytest
import torch
from conftest import ROOT
from torch import nn

from advbn_lib.assignments.given import small_batch, small_tail
from advbn_lib.assignments.mutants import ALL_CORRECT, CLASS, CORRECT, MUTANTS, SHOWN, Mutant, layer_class
from advbn_lib.assignments.write_advbn import EXACT, SETTINGS, trained
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
    assert set(SHOWN) < set(MUTANTS)
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
        solution["tests_of_mine"](layer_class(MUTANTS[name].source))


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


def test_all_mutants_have_the_same_class_name():
    assert {layer_class(mutant.source).__name__ for mutant in MUTANTS.values()} == {CLASS}
