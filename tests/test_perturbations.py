"""The set that AdvBN walks in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib import ChannelStatistics
from advbn_lib.statistics import BATCH, INSTANCE, mean, std

few = settings(max_examples=25, deadline=None)
sets = st.builds(ChannelStatistics, eps=st.floats(0.01, 3), clamp_at_zero=st.booleans(), per_image=st.booleans())


def features(seed: int, n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(perturbation=sets, seed=st.integers(0, 2**31), far=st.floats(0.1, 100))
@few
def test_projection_ends_inside_and_is_idempotent(perturbation, seed, far):
    x = features(seed)
    delta = tuple(far * (part - 0.5) for part in perturbation.sample(x, torch.Generator().manual_seed(seed)))
    inside = perturbation.project(x, delta)
    assert all(((part - 1).abs() <= perturbation.eps + 1e-12).all() for part in inside)
    assert all(torch.equal(a, b) for a, b in zip(inside, perturbation.project(x, inside)))


@given(perturbation=sets, seed=st.integers(0, 2**31))
@few
def test_projection_moves_no_point_of_the_set_and_moves_others_to_the_nearest(perturbation, seed):
    x, generator = features(seed), torch.Generator().manual_seed(seed)
    inside = perturbation.sample(x, generator)
    assert all(torch.equal(a, b) for a, b in zip(inside, perturbation.project(x, inside)))
    too_far = tuple(torch.full_like(part, 1 + 2 * perturbation.eps) for part in inside)
    for part in perturbation.project(x, too_far):
        torch.testing.assert_close(part, torch.full_like(part, 1 + perturbation.eps))


@given(perturbation=sets, seed=st.integers(0, 2**31))
@few
def test_the_start_is_no_change(perturbation, seed):
    x = features(seed)
    torch.testing.assert_close(perturbation.apply(x, perturbation.start(x)), x)


@pytest.mark.parametrize(("per_image", "axes", "shape"), [(False, BATCH, (1, 3, 1, 1)), (True, INSTANCE, (4, 3, 1, 1))])
def test_applying_multiplies_the_moments(per_image, axes, shape):
    perturbation, x = ChannelStatistics(clamp_at_zero=False, per_image=per_image), features(0)
    delta = perturbation.sample(x, torch.Generator().manual_seed(0))
    assert [tuple(part.shape) for part in delta] == [shape, shape] and perturbation.per_sample == per_image
    changed = perturbation.apply(x, delta)
    torch.testing.assert_close(mean(changed, axes), delta[0] * mean(x, axes))
    torch.testing.assert_close(std(changed, axes, eps=0), delta[1].abs() * std(x, axes, eps=0))


def test_the_clamp_cuts_at_zero_and_nothing_else():
    x = features(0)
    delta = (torch.full((1, 3, 1, 1), 0.2), torch.full((1, 3, 1, 1), 2.0))
    free, clamped = (ChannelStatistics(clamp_at_zero=clamp).apply(x, delta) for clamp in (False, True))
    assert (free < 0).any()
    assert torch.equal(clamped, free.clamp_min(0))


def test_draws_fill_the_set_evenly_and_are_repeatable():
    perturbation, x = ChannelStatistics(0.5), torch.rand(2, 4000, 2, 2)
    first, again = (perturbation.sample(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(*first)
    for part in first:
        counts = torch.histc(part, bins=10, min=0.5, max=1.5)
        assert counts.sum() == 4000  # none outside
        assert (counts - 400).abs().max() < 100  # 5 standard deviations


@pytest.mark.parametrize("eps", [0, -0.1, float("nan")])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(ValueError, match=f"eps must be above 0, got {eps}"):
        ChannelStatistics(eps)
