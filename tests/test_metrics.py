"""Corruption errors: against a reference, relative, and plain."""

import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advbn_lib.data.corruptions import CORRUPTIONS as COMPUTED
from advbn_lib.metrics import ALEXNET, CORRUPTIONS, Reference, mce, mean_error, relative_mce

rates = st.lists(st.floats(0, 1), min_size=5, max_size=5)
tested = st.dictionaries(st.sampled_from(CORRUPTIONS), rates, min_size=1)


def flat(error: float) -> list[float]:
    return [error] * 5


def test_alexnet_against_itself_is_100():
    error = mce({name: flat(value) for name, value in ALEXNET.errors.items()})
    assert error.value == pytest.approx(100) and error.corruptions == 15 and error.missing == ()
    assert all(part == pytest.approx(100) for part in error.by_corruption.values())
    assert error.reference == "AlexNet" and "AlexNet" in str(error)


def test_the_corruptions_are_those_computed_here():
    assert set(CORRUPTIONS) == set(COMPUTED) and len(CORRUPTIONS) == 15


def test_alexnets_errors_are_the_released_ones():
    """Spelled out in another order, as the released AdvBN script has them."""
    names = (
        "contrast elastic_transform jpeg_compression pixelate defocus_blur glass_blur motion_blur zoom_blur "
        "gaussian_noise impulse_noise shot_noise brightness fog frost snow"
    )
    values = (
        "0.853204 0.646056 0.606500 0.717840 0.819880 0.826268 0.785948 0.798360 "
        "0.886428 0.922640 0.894468 0.564592 0.819324 0.826572 0.866816"
    )
    assert dict(ALEXNET.errors) == dict(zip(names.split(), map(float, values.split()), strict=True))


def test_an_example_by_hand():
    reference = Reference("another", {"fog": 0.5, "snow": 0.8})
    error = mce({"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "snow": flat(0.2)}, reference)
    assert error.by_corruption == pytest.approx({"fog": 60.0, "snow": 25.0})
    assert error.value == pytest.approx(42.5) and error.reference == "another"


def test_what_is_missing_is_part_of_the_result():
    without_frost = {name: flat(value / 2) for name, value in ALEXNET.errors.items() if name != "frost"}
    error = mce(without_frost)
    assert (error.corruptions, error.missing) == (14, ("frost",)) and error.value == pytest.approx(50)
    assert "14 of 15" in str(error) and "without frost" in str(error)


@given(tested)
def test_mce_is_the_mean_of_quotients_in_any_order(errors):
    error = mce(errors)
    expected = fmean(fmean(values) / ALEXNET.errors[name] for name, values in errors.items())
    assert error.value == pytest.approx(100 * expected)
    assert set(error.by_corruption) | set(error.missing) == set(CORRUPTIONS)
    shuffled = list(errors)
    random.Random(0).shuffle(shuffled)
    assert mce({name: errors[name][::-1] for name in shuffled}).value == pytest.approx(error.value)


@given(tested)
def test_the_plain_mean_divides_by_nothing(errors):
    error = mean_error(errors)
    assert error.value == pytest.approx(100 * fmean(fmean(values) for values in errors.values()))
    assert error.reference is None and "AlexNet" not in str(error)
    assert len(error.missing) == 15 - len(errors)


def test_the_relative_error_of_the_reference_is_100():
    errors = {name: flat(value) for name, value in ALEXNET.errors.items()}
    assert relative_mce(errors, 0.4, ALEXNET, 0.4).value == pytest.approx(100)
    # Half the rise, from a better start.
    halved = {name: flat(0.2 + (value - 0.4) / 2) for name, value in ALEXNET.errors.items()}
    assert relative_mce(halved, 0.2, ALEXNET, 0.4).value == pytest.approx(50)


def test_a_reference_that_does_not_suffer_is_refused():
    with pytest.raises(ValueError, match="AlexNet does not rise under brightness"):
        relative_mce({"brightness": flat(0.5)}, 0.2, ALEXNET, 0.6)


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ({}, "no corruption"),
        ({"rain": flat(0.5)}, "unknown: rain; there are gaussian_noise"),
        ({"fog": [0.5] * 4}, "fog must have 5 error rates"),
        ({"fog": [0.5] * 6}, "fog must have 5 error rates"),
        ({"fog": flat(50.0)}, "from 0 to 1"),
        ({"fog": flat(-0.1)}, "from 0 to 1"),
        ({"fog": flat(math.nan)}, "from 0 to 1"),
    ],
)
@pytest.mark.parametrize("metric", [mce, mean_error])
def test_what_is_no_error_rate_is_refused(metric, errors, message):
    with pytest.raises(ValueError, match=message):
        metric(errors)
