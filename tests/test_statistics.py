"""The statistics: properties that any mean and standard deviation has, and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib.statistics import BATCH, INSTANCE, POSITION, adain, mean, renormalise, scale_statistics, std

pytestmark = pytest.mark.filterwarnings("error")
any_axes = pytest.mark.parametrize("axes", [BATCH, INSTANCE, POSITION], ids=["batch", "instance", "position"])
few = settings(max_examples=25, deadline=None)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def feature_maps(draw) -> torch.Tensor:
    """N,C,H,W with 2 to 5 along each axis, of any scale and offset."""
    shape = [draw(st.integers(2, 5)) for _ in range(4)]
    scale, offset = 10 ** draw(st.floats(-2, 2)), draw(st.floats(-10, 10))
    return offset + scale * normal(draw(st.integers(0, 2**31)), *shape)


factors = st.floats(0.1, 10) | st.floats(-10, -0.1)


@any_axes
@given(x=feature_maps(), seed=st.integers(0, 2**31))
@few
def test_a_shift_moves_the_mean_and_not_the_standard_deviation(axes, x, seed):
    shift = normal(seed, *mean(x, axes).shape)
    torch.testing.assert_close(mean(x + shift, axes), mean(x, axes) + shift)
    torch.testing.assert_close(std(x + shift, axes, eps=0), std(x, axes, eps=0), rtol=1e-6, atol=1e-8)


@any_axes
@given(x=feature_maps(), factor=factors)
@few
def test_a_factor_multiplies_both(axes, x, factor):
    torch.testing.assert_close(mean(factor * x, axes), factor * mean(x, axes))
    torch.testing.assert_close(std(factor * x, axes, eps=0), abs(factor) * std(x, axes, eps=0))


@any_axes
@pytest.mark.parametrize("unbiased", [True, False])
def test_standard_deviation_is_numpys_with_eps_on_the_variance(axes, unbiased):
    x = normal(0, 3, 4, 5, 6)
    expected = np.sqrt(x.numpy().var(axes, ddof=int(unbiased), keepdims=True) + 0.1)
    np.testing.assert_allclose(std(x, axes, eps=0.1, unbiased=unbiased), expected, rtol=1e-12)


@any_axes
@given(x=feature_maps(), seed=st.integers(0, 2**31))
@few
def test_renormalise_gives_the_moments_that_were_asked_for(axes, x, seed):
    asked_mean = normal(seed, *mean(x, axes).shape)
    asked_std = normal(seed + 1, *asked_mean.shape).abs() + 0.1
    changed = renormalise(x, asked_mean, asked_std, axes, eps=0)
    torch.testing.assert_close(mean(changed, axes), asked_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std(changed, axes, eps=0), asked_std, rtol=1e-6, atol=1e-6)


@any_axes
@given(x=feature_maps(), factor=st.floats(0.1, 10), shift=st.floats(-10, 10))
@few
def test_renormalise_forgets_the_moments_that_were_there(axes, x, factor, shift):
    asked = torch.ones_like(mean(x, axes))
    first = renormalise(x, asked, 2 * asked, axes, eps=0)
    second = renormalise(factor * x + shift, asked, 2 * asked, axes, eps=0)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


@given(x=feature_maps())
@few
def test_adain_with_its_own_style_changes_nothing(x):
    torch.testing.assert_close(adain(x, x), x)


def test_adain_takes_the_moments_of_each_image_and_channel_of_the_style():
    content, style = normal(0, 2, 3, 8, 8), 5 + 3 * normal(1, 2, 3, 4, 6)
    changed = adain(content, style, eps=0)
    torch.testing.assert_close(mean(changed, INSTANCE), mean(style, INSTANCE))
    torch.testing.assert_close(std(changed, INSTANCE, eps=0), std(style, INSTANCE, eps=0))


@any_axes
@given(x=feature_maps())
@few
def test_scaling_by_one_changes_nothing(axes, x):
    ones = torch.ones_like(mean(x, axes))
    torch.testing.assert_close(scale_statistics(x, ones, ones, axes), x)


@any_axes
@given(x=feature_maps(), seed=st.integers(0, 2**31))
@few
def test_scaling_is_renormalising_to_the_scaled_moments(axes, x, seed):
    mean_factor, std_factor = (normal(seed + i, *mean(x, axes).shape) for i in range(2))
    asked = (mean_factor * mean(x, axes), std_factor * std(x, axes, eps=0))
    torch.testing.assert_close(
        scale_statistics(x, mean_factor, std_factor, axes), renormalise(x, *asked, axes, eps=0), rtol=1e-6, atol=1e-8
    )


def test_scaling_a_dead_channel_is_exact():
    x = torch.full((4, 1, 3, 3), 2.0)
    factor = torch.tensor(1.5).view(1, 1, 1, 1)
    assert torch.equal(scale_statistics(x, factor, factor), torch.full_like(x, 3.0))


@any_axes
def test_gradients_agree_with_finite_differences(axes):
    x = normal(0, 3, 2, 3, 2).requires_grad_()
    first, second = (normal(i, *mean(x, axes).shape).requires_grad_() for i in (1, 2))
    assert torch.autograd.gradcheck(lambda x: mean(x, axes), x)
    assert torch.autograd.gradcheck(lambda x: std(x, axes), x)
    assert torch.autograd.gradcheck(lambda *given: renormalise(*given, axes), (x, first, second))
    assert torch.autograd.gradcheck(lambda *given: scale_statistics(*given, axes), (x, first, second))


def test_gradient_of_adain_agrees_with_finite_differences():
    assert torch.autograd.gradcheck(
        adain, (normal(0, 2, 2, 3, 3).requires_grad_(), normal(1, 2, 2, 3, 3).requires_grad_())
    )


def test_gradient_of_the_standard_deviation_of_a_constant_map_is_finite():
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    std(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("shape", "axes"), [((1, 3, 1, 1), BATCH), ((4, 3, 1, 1), INSTANCE), ((4, 1, 5, 5), POSITION)])
def test_one_element_has_no_unbiased_standard_deviation(shape, axes):
    with pytest.raises(ValueError, match="one element"):
        std(torch.ones(shape), axes)
    assert std(torch.ones(shape), axes, unbiased=False).isfinite().all()
