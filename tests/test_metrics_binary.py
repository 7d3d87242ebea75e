"""Metrics of two classes, against their definitions."""

import pytest
import torch
from conftest import tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib.data import ImageSet
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.metrics_binary import area_under_curve, binary_metrics, measure_binary


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_share_of_pairs_in_the_right_order(drawn):
    scores = torch.tensor([float(score) for score, _ in drawn])
    labels = torch.tensor([int(label) for _, label in drawn])
    ones, zeros = scores[labels == 1], scores[labels == 0]
    if not len(ones) or not len(zeros):
        with pytest.raises(ValueError, match="both classes, 0 and 1, must occur"):
            area_under_curve(scores, labels)
        return
    higher, tied = (ones[:, None] > zeros).double(), (ones[:, None] == zeros).double()
    assert area_under_curve(scores, labels) == pytest.approx((higher + tied / 2).mean().item(), abs=1e-12)
    assert area_under_curve(-scores, labels) == pytest.approx(1 - area_under_curve(scores, labels), abs=1e-12)
    assert area_under_curve(scores.exp(), labels) == area_under_curve(scores, labels), "order alone counts"


def test_a_network_that_always_says_no_gets_a_half():
    labels = torch.tensor([0] * 63 + [1] * 37)
    metrics = binary_metrics(torch.tensor([[1.0, 0.0]]).repeat(100, 1), labels)
    assert (metrics.accuracy, metrics.balanced_accuracy, metrics.area) == (0.63, 0.5, 0.5)


def test_the_two_classes_count_the_same():
    labels = torch.tensor([0] * 8 + [1] * 2)
    logits = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 2 + [[0.0, 2.0], [0.5, 0.0]])
    metrics = binary_metrics(logits, labels)
    assert metrics.accuracy == pytest.approx(0.7) and metrics.balanced_accuracy == pytest.approx((6 / 8 + 1 / 2) / 2)
    assert metrics.area == pytest.approx((8 + 6) / 16)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 1, 1]), "must be N each"),
        (torch.zeros(3), torch.tensor([0, 1]), "must be N each"),
        (torch.tensor([0.0, float("nan")]), torch.tensor([0, 1]), "1 of 2 scores are not a number"),
        (torch.zeros(3), torch.tensor([0, 1, 2]), r"no other; got \[0, 1, 2\]"),
        (torch.zeros(2), torch.tensor([1, 1]), r"must occur and no other; got \[1\]"),
    ],
)
def test_bad_input_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        area_under_curve(scores, labels)


def test_logits_of_more_classes_are_refused():
    with pytest.raises(ValueError, match=r"shape N,2, got \(4, 3\)"):
        binary_metrics(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))


def test_a_method_is_measured_on_all_images_and_left_as_it_was():
    pixels = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)
    labels = (pixels[:, 0].float().mean((1, 2)) > 127).long()
    test = ImageSet("two", pixels, labels, ("no", "yes"), (0.5,) * 3, (0.5,) * 3)
    network = tiny_network()
    network.fc = torch.nn.Linear(network.fc.in_features, 2)
    method = PlainTraining(network).train()
    found = measure_binary(method, test)
    assert method.training and list(found) == list(method.branches)
    network.eval()
    with torch.no_grad():
        expected = binary_metrics(network(test.normalise(pixels.float() / 255)), labels)
    for branch in method.branches:
        assert found[branch].area == pytest.approx(expected.area, abs=1e-3)
        assert found[branch].accuracy == pytest.approx(expected.accuracy, abs=0.01)
