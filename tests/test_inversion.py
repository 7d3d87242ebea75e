"""Finding the image that has given features."""

import pytest
import torch

from advbn_lib.inversion import invert, total_variation
from advbn_lib.models import CifarResNet
from advbn_lib.splitting import split_at

SHAPE = (3, 12, 12)


def images(count: int = 3) -> torch.Tensor:
    """Smooth images in [0,1]."""
    return torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), size=12, mode="bilinear")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_recovers_images_from_invertible_features():
    truth = images()
    found = invert(lambda x: 2 * x - 1, 2 * truth - 1, SHAPE, steps=300, tv=0, generator=generator())
    assert (found - truth).abs().max() < 0.01


def test_features_of_a_network_are_nearly_reached():
    split = split_at(CifarResNet(8).eval(), "relu")
    with torch.no_grad():
        target = split.features(images())
    found = invert(split.features, target, SHAPE, steps=200, generator=generator())
    with torch.no_grad():
        misfit = (split.features(found) - target).norm() / target.norm()
        start = (split.features(torch.full_like(found, 0.5)) - target).norm() / target.norm()
    assert misfit < 0.05 < start


def test_images_stay_in_range_and_carry_no_gradient():
    found = invert(lambda x: x, torch.full((2, *SHAPE), 3.0), SHAPE, steps=60, tv=0, generator=generator())
    assert found.max() == 1 and found.min() >= 0 and not found.requires_grad


def test_parameters_get_no_gradient():
    split = split_at(CifarResNet(8).eval(), "relu")
    invert(split.features, torch.rand(1, 16, 12, 12), SHAPE, steps=2)
    assert all(p.grad is None for p in split.model.parameters())


def test_images_do_not_influence_each_other():
    """Also not if their features differ a thousandfold in size."""
    target = torch.cat([images(1), 1000 * images(1)])
    scale = torch.tensor([1.0, 1000.0]).view(2, 1, 1, 1)
    together = invert(lambda x: scale * x, target, SHAPE, steps=300, tv=0, generator=generator())
    assert (together * scale - target)[0].abs().max() < 0.01
    assert (together - target / scale)[1].abs().max() < 0.01


def test_weight_of_the_prior_does_not_depend_on_the_size_of_the_features():
    truth = torch.rand(1, *SHAPE)
    small, large = (
        invert(lambda x, s=s: s * x, s * truth, SHAPE, steps=100, tv=0.1, generator=generator()) for s in (1, 1000)
    )
    torch.testing.assert_close(small, large, atol=0.01, rtol=0)
    exact = invert(lambda x: x, truth, SHAPE, steps=100, tv=0, generator=generator())
    assert total_variation(small) < 0.9 * total_variation(exact), "the prior should show here"


def test_prior_settles_what_the_features_leave_open():
    def average(x):
        return x.mean((2, 3), keepdim=True)

    target = torch.full((1, 3, 1, 1), 0.5)
    rough = invert(average, target, SHAPE, steps=100, tv=0, generator=generator())
    smooth = invert(average, target, SHAPE, steps=100, tv=1, generator=generator())
    assert total_variation(smooth) < 0.2 * total_variation(rough)


def test_same_seed_same_image():
    first, second, other = (
        invert(
            lambda x: x[:, :1],
            torch.rand(1, 1, 12, 12, generator=generator()),
            SHAPE,
            5,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_works_inside_no_grad():
    with torch.no_grad():
        found = invert(lambda x: x, torch.zeros(1, *SHAPE), SHAPE, steps=100, tv=0)
    assert found.abs().max() < 0.05


def test_total_variation_by_hand():
    x = torch.zeros(2, 1, 2, 3)
    x[0, 0, 0, 0] = 6.0
    assert total_variation(x).tolist() == [6 / 3 + 6 / 4, 0]


@pytest.mark.parametrize("steps", [0, -1])
def test_needs_a_step(steps):
    with pytest.raises(ValueError, match="at least 1 step"):
        invert(lambda x: x, torch.zeros(1, *SHAPE), SHAPE, steps)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 12, 12\).*\(1, 3, 1, 1\)"):
        invert(lambda x: x, torch.zeros(1, 3, 1, 1), SHAPE)
