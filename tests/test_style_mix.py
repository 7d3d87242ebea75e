"""AdvMix's set: the ball around another image's style, and the bank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib.ascent import Steps, ascend
from advbn_lib.style_mix import StyleBank, StyleMix

SHAPES = ((6, 3), (6, 2, 4))


def bank(count: int = 5, *shape: int, bounds: tuple[float, float] | None = None) -> StyleBank:
    """Codes of which each says its own place."""
    codes = torch.arange(count, dtype=torch.float32).view(-1, *[1] * len(shape or (3,))).expand(count, *(shape or (3,)))
    return StyleBank(codes / count, torch.arange(count) % 2, bounds)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_other_image_s_style_itself(shape):
    x = torch.rand(shape)
    ball = StyleMix(0.4, torch.rand(1, *shape[1:]))
    assert torch.equal(ball.apply(x, ball.start(x)), x)


@settings(max_examples=40, deadline=None)
@given(
    eps=st.floats(0, 3), seed=st.integers(0, 999), far=st.floats(0.1, 50), shape=st.sampled_from(SHAPES),
    bounds=st.sampled_from([None, (0.0, 1.0)]),
)  # fmt: skip
def test_projected_points_are_in_the_ball_and_in_the_bounds_and_stay_where_they_are(eps, seed, far, shape, bounds):
    generator = torch.Generator().manual_seed(seed)
    x, scale = torch.rand(shape, generator=generator), torch.rand(1, *shape[1:], generator=generator)
    x[0] = (x[0] > 0.5).float()  # some centres are on a bound
    scale[..., 0] = 0.0  # a coordinate that never differs
    ball = StyleMix(eps, scale, bounds)
    wild = (far * torch.randn(shape, generator=generator),)
    for delta in (ball.project(x, wild), ball.sample(x, generator)):
        moved = ball.apply(x, delta)
        assert bool(((moved - x).abs() <= eps * scale + 1e-5).all())
        assert torch.equal(moved[..., 0], x[..., 0])
        if bounds:
            assert bool(((moved >= 0) & (moved <= 1)).all())
        assert all(torch.allclose(a, b) for a, b in zip(ball.project(x, delta), delta))


def test_the_random_draw_fills_the_ball():
    x = torch.full((4000, 2), 0.5)
    scale = torch.tensor([[1.0, 0.5]])
    moved = StyleMix(0.2, scale).apply(x, StyleMix(0.2, scale).sample(x, torch.Generator().manual_seed(0))) - 0.5
    assert torch.allclose(moved.amax(0), torch.tensor([0.2, 0.1]), atol=0.002)
    assert torch.allclose(moved.std(0), torch.tensor([0.2, 0.1]) / 3**0.5, rtol=0.05)


def test_a_linear_loss_is_climbed_to_the_corner_of_the_ball():
    x, slope = torch.rand(5, 3), torch.tensor([1.0, -2.0, 0.5])
    scale = torch.tensor([[0.3, 0.1, 0.2]])
    ball = StyleMix(0.5, scale)
    found = ascend(lambda style: (style * slope).sum(1), x, ball, Steps(5, 0.5, random_start=True, keep="best"))
    assert torch.allclose(ball.apply(x, found.delta), x + 0.5 * scale * slope.sign())


@pytest.mark.parametrize("bounds, wanted", [(None, 1.1), ((0.0, 1.0), 1.0)])
def test_bounds_cut_the_ball(bounds, wanted):
    x, ball = torch.full((2, 3), 0.9), StyleMix(0.2, None, bounds)
    found = ascend(lambda style: style.sum(1), x, ball, Steps(3, 1.0))
    assert torch.allclose(ball.apply(x, found.delta), torch.tensor(wanted))


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 6), seed=st.integers(0, 999))
def test_no_sample_is_given_its_own_style(count, seed):
    own = torch.arange(count).repeat(20)
    drawn = bank(count).draw(len(own), torch.Generator().manual_seed(seed), own)
    assert not bool((drawn == bank(count).styles[own]).all(1).any())


def test_every_other_style_is_as_likely():
    styles, draws = bank(5), 20_000
    own = torch.full((draws,), 2)
    own[draws // 2 :] = -1
    drawn = (styles.draw(draws, torch.Generator().manual_seed(0), own)[:, 0] * 5).round().long()
    in_it, outside = (torch.bincount(part, minlength=5) / (draws // 2) for part in drawn.split(draws // 2))
    assert torch.allclose(in_it, torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25]), atol=0.02)
    assert torch.allclose(outside, torch.full((5,), 0.2), atol=0.02), "a sample that is not in the bank may get any"


def test_eps_has_no_unit_of_its_own():
    codes = torch.rand(50, 3)
    small, large = StyleBank(codes, torch.zeros(50).long()), StyleBank(1000 * codes, torch.zeros(50).long())
    delta = (torch.ones(50, 3),)
    moved = [b.around(0.3).apply(b.styles, delta) - b.styles for b in (small, large)]
    assert torch.allclose(1000 * moved[0], moved[1], rtol=1e-3)
    assert torch.allclose(moved[0], 0.3 * codes.std(0).expand(50, 3), atol=1e-6)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: StyleMix(-0.1), "eps"),
        (lambda: StyleMix(float("nan")), "eps"),
        (lambda: StyleMix(0.1, torch.tensor([[1.0, float("nan")]])), "NaN among the style codes"),
        (lambda: StyleMix(0.1, None, (1.0, 0.0)), "bounds"),
        (lambda: StyleBank(torch.rand(1, 3), torch.zeros(1).long()), "at least two"),
        (lambda: StyleBank(torch.rand(4, 3), torch.zeros(3).long()), "one label each"),
        (lambda: StyleBank(torch.full((4, 3), float("nan")), torch.zeros(4).long()), "encode those images again"),
        (lambda: StyleBank(torch.full((4, 3), 200.0), torch.zeros(4).long(), (0.0, 1.0)), "0..255"),
        (lambda: bank(5).draw(3, None, torch.zeros(4).long()), "one place for each"),
    ],
)
def test_bad_input_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
