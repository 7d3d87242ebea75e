"""Balls of several radii in a batch, and attacks in them."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advbn_lib.attacks import PGD, Attacked, cross_entropies, judge, margins, worse, worst_case
from advbn_lib.pixel_ball import PixelBall
from advbn_lib.pixel_balls import PixelBalls

few = settings(max_examples=25, deadline=None)
norms = pytest.mark.parametrize("norm", ["linf", "l2"])
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MEANS, STDS = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - MEANS.to(pixels)) / STDS.to(pixels)


def images(count: int = 6, size: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalised, with a third of the pixels black or white."""
    return normalised((1.5 * torch.rand(count, 3, size, size, dtype=dtype) - 0.25).clamp(0, 1))


def grey(count: int = 6, size: int = 8) -> torch.Tensor:
    return normalised(torch.full((count, 3, size, size), 0.5))


def labels(count: int = 6) -> torch.Tensor:
    return torch.arange(count) % 10


def in_pixels(x: torch.Tensor) -> torch.Tensor:
    return x * STDS.to(x) + MEANS.to(x)


def change(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """In [0,1] units of a pixel."""
    return (y - x) * STDS.to(x)


def length(difference: torch.Tensor, norm: str) -> torch.Tensor:
    return difference.flatten(1).abs().amax(1) if norm == "linf" else difference.flatten(1).norm(dim=1)


def radii(norm: str, count: int = 6) -> torch.Tensor:
    """From 0 up."""
    return torch.arange(count) * {"linf": 2 / 255, "l2": 0.2}[norm]


def network() -> nn.Module:
    model = tiny_network()
    for _ in range(3):
        model(images(16))
    return model.eval()


# The set


@given(seed=st.integers(0, 2**31), far=st.floats(0.01, 100), norm=st.sampled_from(["linf", "l2"]))
@few
def test_each_image_is_projected_into_its_own_ball(seed, far, norm):
    torch.manual_seed(seed)
    x = images(dtype=torch.float64)
    balls = PixelBalls(radii(norm).double(), MEAN, STD, norm)
    inside = balls.project(x, (far * torch.randn_like(x),))
    y = balls.apply(x, inside)
    assert (length(change(x, y), norm) <= balls.radii + 1e-12).all()
    pixels = balls.pixels.pixels(y)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    torch.testing.assert_close(balls.project(x, inside)[0], inside[0], rtol=1e-12, atol=0)
    assert torch.equal(y[0], x[0])  # a radius of 0
    if norm == "linf" and far > 10:
        assert (length(change(x, y), norm)[1:] > 0.9 * radii(norm)[1:]).all()


@given(seed=st.integers(0, 2**31), radius=st.floats(0.001, 1))
@few
def test_with_one_radius_the_l_infinity_ball_is_that_of_pixel_ball(seed, radius):
    torch.manual_seed(seed)
    x = images(dtype=torch.float64)
    one, many = PixelBall(radius, MEAN, STD), PixelBalls(radius, MEAN, STD)
    far = torch.randn_like(x)
    torch.testing.assert_close(
        many.apply(x, many.project(x, (far,))), one.apply(x, one.project(x, (radius * far,))), rtol=0, atol=1e-12
    )
    drawn, again = (ball.sample(x, torch.Generator().manual_seed(seed)) for ball in (many, one))
    torch.testing.assert_close(many.apply(x, drawn), one.apply(x, again), rtol=0, atol=1e-12)


def test_an_l2_projection_keeps_the_direction_where_the_image_leaves_room():
    x, far = grey(2), torch.randn(2, 3, 8, 8)
    balls = PixelBalls(torch.tensor([0.5, 0.1]), MEAN, STD, "l2")
    y = balls.apply(x, balls.project(x, (far,)))
    expected = torch.tensor([0.5, 0.1]).view(2, 1, 1, 1) * F.normalize(far.flatten(1)).view_as(far)
    torch.testing.assert_close(change(x, y), expected, rtol=1e-4, atol=1e-6)


@norms
def test_random_starts_are_in_the_ball_and_fill_it(norm):
    x = grey(4000, 1)
    drawn = PixelBalls(0.25, MEAN, STD, norm).sample(x, torch.Generator().manual_seed(1))[0]
    lengths = length(drawn, norm)
    assert lengths.max() <= 1 + 1e-6 and drawn.mean(0).abs().max() < 0.05
    # The share of the volume within a length t is t**3, with three pixel values.
    counts = torch.histc(lengths**3, bins=8, min=0, max=1)
    assert counts.sum() >= 3999 and (counts - 500).abs().max() < 5 * 500**0.5
    again = PixelBalls(0.25, MEAN, STD, norm).sample(x, torch.Generator().manual_seed(1))[0]
    assert torch.equal(drawn, again)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"radii": -0.1}, "a radius is 0 or more.*-0.1"),
        ({"radii": torch.tensor([0.1, -0.1])}, "a radius is 0 or more"),
        ({"radii": float("nan")}, "a radius is 0 or more"),
        ({"radii": torch.tensor([0.1, float("inf")]), "norm": "l2"}, "a radius is 0 or more"),
        ({"radii": 8}, r"8 looks like 0\.\.255 units: divide by 255"),
        ({"radii": torch.tensor([0.0, 4.0])}, r"4 looks like 0\.\.255 units"),
        ({"radii": torch.zeros(2, 1)}, r"one for each image \(N,\)"),
        ({"radii": torch.zeros(0)}, r"one for each image \(N,\)"),
        ({"norm": "l1"}, "'linf' or 'l2', got 'l1'"),
        ({"mean": (0.5,)}, "a value for each channel"),
    ],
    ids=str,
)
def test_bad_balls_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PixelBalls(**{"radii": 0.1, "mean": MEAN, "std": STD, **wrong})


@pytest.mark.parametrize("of", [PixelBalls.start, PixelBalls.sample], ids=["start", "sample"])
def test_balls_that_do_not_fit_the_images_are_refused(of):
    with pytest.raises(ValueError, match="5 radii for 6 images"):
        of(PixelBalls(torch.zeros(5), MEAN, STD), images())
    with pytest.raises(ValueError, match="pixels go from .* not from 0 to 1.*normalised with"):
        of(PixelBalls(0.1, MEAN, STD), 255 * images())
    with pytest.raises(ValueError, match=r"128 reaches from every image.*0\.\.255 units; divide by 255"):
        of(PixelBalls(128, MEAN, STD, "l2"), images(6, 32))
    of(PixelBalls(3.0, MEAN, STD, "l2"), images(6, 32))


# PGD


def test_one_step_is_fgsm():
    model, x, y = network(), images(), labels()
    found = PGD(MEAN, STD, steps=1, step=1.0, random_start=False).perturb(model, x, y, 4 / 255)
    x.requires_grad_()
    F.cross_entropy(model(x), y, reduction="sum").backward()
    pixels = in_pixels(x).detach()
    expected = normalised((pixels + 4 / 255 * x.grad.sign()).clamp(0, 1))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@norms
def test_steps_agree_with_the_textbook_loop(norm):
    """On images in [0,1] with a network that normalises them: Madry et al.'s loop, written out."""
    model, x, y, radius = network().double(), images(dtype=torch.float64), labels(), {"linf": 8 / 255, "l2": 0.5}[norm]
    found = PGD(MEAN, STD, 5, 0.3, norm, random_start=False).perturb(model, x, y, radius)
    clean = in_pixels(x)
    pixels = clean.clone()
    for _ in range(5):
        pixels.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(normalised(pixels)), y, reduction="sum"), pixels)
        if norm == "linf":
            moved = pixels.detach() + 0.3 * radius * gradient.sign()
            offset = (moved - clean).clamp(-radius, radius)
        else:
            moved = pixels.detach() + 0.3 * radius * F.normalize(gradient.flatten(1)).view_as(gradient)
            offset = (moved - clean).flatten(1).renorm(2, 0, radius).view_as(clean)
        pixels = (clean + offset).clamp(0, 1)
    # torch's renorm leaves a margin of 1e-7 inside the ball
    torch.testing.assert_close(found, normalised(pixels), rtol=0, atol={"linf": 1e-9, "l2": 1e-5}[norm])


@norms
def test_each_image_is_attacked_as_in_a_batch_of_its_own(norm):
    model, x, y = network().double(), images(dtype=torch.float64), labels()
    attack = PGD(MEAN, STD, 4, norm=norm, random_start=False)
    found = attack.perturb(model, x, y, radii(norm))
    alone = [attack.perturb(model, x[i : i + 1], y[i : i + 1], radii(norm)[i].item()) for i in range(6)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-6)


@norms
@pytest.mark.parametrize("random_start", [False, True])
def test_attacked_images_are_images_in_the_ball_and_worse(norm, random_start):
    model, x, y = network(), images(), labels()
    found = PGD(MEAN, STD, 10, norm=norm, random_start=random_start).perturb(model, x, y, radii(norm))
    assert (length(change(x, found), norm) <= radii(norm) + 1e-6).all()
    pixels = in_pixels(found)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    assert torch.equal(found[0], x[0]) and not found.requires_grad
    assert (judge(model, found, y).losses > judge(model, x, y).losses)[1:].all()


@norms
def test_a_radius_of_zero_returns_the_images(norm):
    x = images()
    for pixels in (x, normalised(torch.zeros(6, 3, 8, 8)), normalised(torch.ones(6, 3, 8, 8))):
        assert torch.equal(PGD(MEAN, STD, 3, norm=norm).perturb(network(), pixels, labels(), 0.0), pixels)


def test_the_best_point_is_at_least_as_bad_as_the_last_one():
    model, x, y = network(), images(), labels()
    last, best = (
        judge(model, PGD(MEAN, STD, 6, 1.0, random_start=False, keep=keep).perturb(model, x, y, 0.1), y).losses
        for keep in ("last", "best")
    )
    assert (best >= last).all() and (best > last).any()


def test_the_attack_leaves_no_trace():
    model, x, y = network(), images(), labels()
    before = traces(model)
    PGD(MEAN, STD, 2).perturb(model, x, y, 4 / 255, torch.Generator().manual_seed(0))
    assert_same_traces(before, traces(model))


def test_the_generator_decides_the_start():
    model, x, y, attack = network(), images(), labels(), PGD(MEAN, STD, 2)
    first, same, other = (attack.perturb(model, x, y, 0.1, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_sure_network_hides_its_gradient_from_the_cross_entropy_and_not_from_the_margin():
    model, x = network(), images()
    y = model(x).argmax(1)

    def sure(inputs: torch.Tensor) -> torch.Tensor:
        logits = model(inputs)
        return 1e5 * (logits - logits.detach().mean())

    moved = {
        loss: change(x, PGD(MEAN, STD, 3, random_start=False, loss=loss).perturb(sure, x, y, 0.1)).abs().amax((1, 2, 3))
        for loss in ("cross_entropy", "margin")
    }
    assert (moved["cross_entropy"] < 1e-6).sum() >= 3 and (moved["margin"] > 0.05).all()


def test_a_margin_is_the_best_wrong_logit_above_the_right_one():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert margins(logits, torch.tensor([0, 2, 1])).tolist() == [-1.0, 1.0, 0.0]


# The worst of several


def attempt(wrong: list[bool], losses: list[float], mark: float) -> Attacked:
    return Attacked(torch.full((len(wrong), 1, 1, 1), mark), torch.tensor(wrong), torch.tensor(losses))


def test_a_wrong_answer_is_worse_than_a_larger_loss():
    first = attempt([False, True, False, True], [2.0, 1.0, 1.0, 1.0], 0.0)
    second = attempt([True, False, False, True], [1.0, 2.0, 2.0, 0.5], 1.0)
    for one, other in ((first, second), (second, first)):
        found = worse(one, other)
        assert found.wrong.tolist() == [True, True, False, True]
        assert found.losses.tolist() == [1.0, 1.0, 2.0, 1.0]
        assert found.images.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_restarts_keep_the_worst_of_each_sample():
    model, x = network(), images(16)
    y, attack, generator = model(x).argmax(1), PGD(MEAN, STD, 1, 0.5), torch.Generator().manual_seed(2)
    attempts = [judge(model, x, y)]
    attempts += [judge(model, attack.perturb(model, x, y, 0.06, generator), y) for _ in range(4)]
    found = worst_case(attack, model, x, y, 0.06, restarts=4, generator=torch.Generator().manual_seed(2))
    wrong, losses = (torch.stack([getattr(one, name) for one in attempts]) for name in ("wrong", "losses"))
    assert torch.equal(found.wrong, wrong.any(0)) and wrong.any() and not wrong.all()
    expected = torch.where(wrong == wrong.any(0), losses, -1).amax(0)
    assert torch.equal(found.losses, expected) and len({int(i) for i in losses.argmax(0)}) > 1
    again = judge(model, found.images, y)
    assert torch.equal(again.wrong, found.wrong)
    torch.testing.assert_close(again.losses, found.losses)


def test_an_attack_that_helps_is_not_counted():
    """Each image is in its own ball: what is wrong without an attack stays wrong."""
    model, x = network(), images()
    y = (model(x).argmax(1) + 1) % 10
    attack = PGD(MEAN, STD, 10, random_start=False)
    helped = attack.perturb(lambda z: -model(z), x, y, 0.3)
    assert not judge(model, helped, y).wrong.all()
    assert worst_case(attack, model, x, y, 0.3, surrogate=lambda z: -model(z)).wrong.all()


def test_a_surrogate_is_climbed_and_the_model_judges():
    torch.manual_seed(3)
    model, other, x, y = network(), network(), images(), labels()
    attack = PGD(MEAN, STD, 5, random_start=False)
    found = worst_case(attack, model, x, y, 0.05, surrogate=other)
    transferred = attack.perturb(other, x, y, 0.05)
    expected = worse(judge(model, x, y), judge(model, transferred, y))
    assert torch.equal(found.images, expected.images) and torch.equal(found.losses, expected.losses)
    assert found.losses.sum() < worst_case(attack, model, x, y, 0.05).losses.sum()


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor([0, 1, 2, 3, 4, 10]), r"labels go from 0 to 10, but the model has 10 classes \(0 to 9\)"),
        (torch.tensor([-100, 1, 2, 3, 4, 5]), "labels go from -100 to 5"),
        (torch.zeros(5, dtype=torch.int64), r"labels must be int64, one for each.*\(5,\)"),
        (torch.zeros(6), "labels must be int64.*float32"),
        (torch.zeros(6, 10), "labels must be int64"),
    ],
    ids=["above", "below", "count", "type", "one-hot"],
)
def test_bad_labels_are_refused(wrong, message):
    model, x = network(), images()
    for call in (lambda: PGD(MEAN, STD).perturb(model, x, wrong, 0.1), lambda: judge(model, x, wrong)):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"step": 0.0}, "step size must be above 0"),
        ({"keep": "first"}, "'last' or 'best'"),
        ({"norm": "l1"}, "'linf' or 'l2'"),
        ({"loss": "dlr"}, "'cross_entropy' or 'margin', got 'dlr'"),
        ({"std": (0.0, 1.0, 1.0)}, "std above 0"),
    ],
    ids=str,
)
def test_a_bad_attack_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PGD(**{"mean": MEAN, "std": STD, **wrong})


@pytest.mark.parametrize(
    ("restarts", "start", "message"), [(0, True, "at least 1"), (2, False, "all restarts are the same")]
)
def test_restarts_that_do_nothing_are_refused(restarts, start, message):
    with pytest.raises(ValueError, match=message):
        worst_case(PGD(MEAN, STD, random_start=start), network(), images(), labels(), 0.1, restarts)


def test_a_network_that_returns_nan_is_refused():
    with pytest.raises(FloatingPointError, match="ascent step 0"):
        PGD(MEAN, STD).perturb(lambda x: network()(x) * float("nan"), images(), labels(), 0.1)


def test_the_losses_are_cross_entropies():
    model, x, y = network(), images(), labels()
    torch.testing.assert_close(judge(model, x, y).losses, cross_entropies(model(x), y))
