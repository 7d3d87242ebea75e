"""Leakage and colour transfer by cut: with a linear generator whose ideal split is known, and with the real one."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import tiny_images, tiny_network
from hypothesis import given, settings
from hypothesis import strategies as st
from test_style_encoding import LinearGenerator, linear_images, real_generator
from torch import Tensor, nn

from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.records import Estimate
from advbn_lib.style_encoding import StyleDecoder
from advbn_lib.style_splitting import (
    SwapMeasurement,
    correlation,
    ink_colour,
    mean_colour,
    measure_cuts,
    measure_swap,
    mix_grid,
    other_classes,
    paired_difference,
    propose_cut,
    share,
    train_label_classifier,
)
from advbn_lib.training import Schedule


class Judge(nn.Module):
    """Answers with the largest coordinate of the shape in a linear generator's image: never wrong, whatever the colour."""

    def __init__(self, images: ImageSet):
        super().__init__()
        self.register_buffer("shapes", LinearGenerator().basis[1])
        self.register_buffer("std", torch.tensor(images.std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,schw->ns", x * self.std, self.shapes)  # the mean has no part in it


def measured(count: int = 60, **options) -> tuple[dict[int, SwapMeasurement], ImageSet]:
    codes, images = linear_images(count)
    return measure_cuts(LinearGenerator(), codes, images, Judge(images), **options), images


def test_the_ideal_cut_leaks_nothing_and_transfers_all_colour():
    cuts, images = measured()
    assert list(cuts) == [1, 2, 3]
    ideal = cuts[2]
    assert (ideal.own.mean, ideal.kept.mean, ideal.leakage.mean, ideal.taken.mean, ideal.taken_before.mean) == (
        1,
        1,
        0,
        0,
        0,
    )
    assert ideal.colour.mean > 0.9999 and ideal.colour_r2.mean > 0.9999 and ideal.own_colour.mean > 0.9999
    assert abs(ideal.colour_kept.mean) < 0.3
    assert ideal.leakage.low < 0 < ideal.leakage.high and ideal.leakage.n == ideal.colour.n == len(images)


def test_a_cut_too_low_takes_the_label_along_and_one_too_high_leaves_the_colour_behind():
    cuts, _ = measured()
    low, high = cuts[1], cuts[3]
    assert (low.kept.mean, low.taken.mean, low.leakage.mean, low.taken_before.mean) == (0, 1, 1, 0)
    assert low.colour.mean > 0.9999
    assert high.leakage.mean == 0 and high.kept.mean == 1
    assert high.colour_kept.mean > 0.9999 and abs(high.colour.mean) < 0.3 and high.colour_r2.mean < 0


def test_one_decoder_gives_what_all_cuts_give():
    codes, images = linear_images(30)
    cuts = measure_cuts(LinearGenerator(), codes, images, Judge(images), seed=4)
    decoder = StyleDecoder(LinearGenerator(), 2)
    assert measure_swap(decoder, *decoder.split(codes), images, Judge(images), seed=4) == cuts[2]
    assert measure_swap(decoder, *decoder.split(codes), images, Judge(images), seed=5) != cuts[2]


def test_a_judge_that_errs_is_not_leakage():
    codes, images = linear_images(30)
    shifted = ImageSet("shifted", images.images, (images.labels + 1) % 3, images.classes, images.mean, images.std)
    cuts = measure_cuts(LinearGenerator(), codes, shifted, Judge(images))
    assert cuts[2].own.mean == cuts[2].kept.mean == cuts[2].leakage.mean == 0
    assert cuts[2].taken.mean == cuts[2].taken_before.mean > 0.2


def test_the_network_is_left_in_its_mode():
    codes, images = linear_images(12)
    judge = Judge(images).train()
    measure_cuts(LinearGenerator(), codes, images, judge)
    assert judge.training


# ---- the proposal ----------------------------------------------------------------------------


def leaking(*leakages: float) -> dict[int, SwapMeasurement]:
    def at(value: float) -> Estimate:
        return Estimate(value, value - 0.01, value + 0.01, 100)

    rest = dict.fromkeys(
        ("own", "kept", "taken", "taken_before", "colour", "colour_r2", "colour_kept", "own_colour"), at(0.5)
    )
    return {cut: SwapMeasurement(leakage=at(value), **rest) for cut, value in enumerate(leakages, 1)}


def test_the_proposal_is_the_largest_style_part_that_is_tight_enough():
    assert propose_cut(measured()[0]) == 2
    assert propose_cut(leaking(0.5, 0.1, 0.019, 0.0)) == 3
    assert propose_cut(leaking(0.5, 0.1, 0.019, 0.0), at_most=0.1) == 2
    assert propose_cut(leaking(0.5, 0.1, 0.019, 0.0), at_most=0) == 4
    assert propose_cut(leaking(-0.01, 0.1)) == 1


def test_no_cut_is_proposed_where_all_leak():
    with pytest.raises(ValueError, match="no cut costs 2 points of accuracy or less; the least is 10.0, at cut 2"):
        propose_cut(leaking(0.5, 0.1, 0.3))
    with pytest.raises(ValueError, match="at_most must be 0 or more"):
        propose_cut(leaking(0.5), at_most=-0.1)
    with pytest.raises(ValueError, match="got 0 cuts"):
        propose_cut({})


# ---- pairs, colours, numbers ------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 100))
def test_partners_are_of_other_classes(labels, seed):
    labels = torch.tensor(labels)
    if len(labels.unique()) == 1:
        with pytest.raises(DataError, match="are of class .*take others too"):
            other_classes(labels, seed)
    else:
        partners = other_classes(labels, seed)
        assert (labels[partners] != labels).all() and torch.equal(partners, other_classes(labels, seed))


def test_partners_are_drawn_evenly():
    labels = torch.tensor([0] * 3000 + [1, 2, 2])
    drawn = torch.bincount(other_classes(labels)[:3000], minlength=3003)[3000:]
    assert drawn.min() > 900, "each of the three others about a thousand times"


def test_the_colour_of_ink_does_not_depend_on_how_much_of_it_there_is():
    colour = torch.tensor([0.9, 0.3, 0.6]).view(1, 3, 1, 1)
    thin, thick = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    thin[..., 3:4], thick[..., 2:7] = 1, 1
    assert torch.allclose(ink_colour(thin * colour), ink_colour(thick * colour))
    assert torch.allclose(ink_colour(thin * colour)[0], colour.flatten())
    assert torch.allclose(mean_colour(thick * colour)[0], colour.flatten() * 5 / 8)
    assert torch.equal(ink_colour(torch.zeros(1, 3, 8, 8)), torch.zeros(1, 3)), "black has a colour too"


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 400), st.floats(0, 1), st.integers(0, 99))
def test_intervals_of_shares_have_a_width_and_their_value_in_them(count, chance, seed):
    hits = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < chance
    others = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1)) < 0.7
    one, two = share(hits), paired_difference(hits, others)
    assert one.mean == pytest.approx(hits.float().mean().item()) and two.mean == pytest.approx(
        (hits.float() - others.float()).mean().item(), abs=1e-6
    )
    for value, floor in ((one, 0), (two, -1)):
        assert floor <= value.low <= value.mean <= value.high <= 1 and value.low < value.high and value.n == count
    assert paired_difference(hits, hits).mean == 0


def test_intervals_are_those_of_the_books():
    # Wilson's for 8 of 10: .490 to .943. Agresti and Min's for 4 against 1 of 20 pairs that differ: .136 +- 1.96 * .1063.
    eight = share(torch.arange(10) < 8)
    assert (eight.low, eight.high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    first, second = torch.arange(20) < 9, (torch.arange(20) >= 4) & (torch.arange(20) < 10)
    found = paired_difference(first, second)
    p, q = 4.5 / 22, 1.5 / 22
    half = 1.959964 * math.sqrt((p + q - (p - q) ** 2) / 22)
    assert found.mean == pytest.approx(3 / 20)
    assert (found.low, found.high) == pytest.approx((p - q - half, p - q + half), abs=1e-6)


def test_intervals_cover_as_often_as_they_say():
    random, chance, hit = torch.Generator().manual_seed(0), 0.95, 0
    for _ in range(400):
        found = share(torch.rand(60, generator=random) < chance)
        hit += found.low <= chance <= found.high
    assert 0.91 <= hit / 400 <= 0.995


def test_correlation_and_r2_are_what_they_are_called():
    random = torch.Generator().manual_seed(0)
    wanted = torch.rand(400, 3, generator=random)
    noise = torch.rand(400, 3, generator=random)
    found = wanted + noise
    own, r2 = correlation(found, wanted)
    assert own.mean == pytest.approx(math.sqrt(0.5), abs=0.05) and own.low < own.mean < own.high
    assert 0.02 < own.high - own.low < 0.15
    pale, pale_r2 = correlation(0.5 * wanted + 0.25, wanted)
    assert pale.mean == pytest.approx(1) and pale_r2.mean < 0.8, "colours that are too pale have a lower R2"
    one = torch.stack([wanted[:, 0]] * 3, 1)
    expected = torch.corrcoef(torch.stack([found[:, 0], wanted[:, 0]]))[0, 1].item()
    assert correlation(torch.stack([found[:, 0]] * 3, 1), one)[0].mean == pytest.approx(expected, abs=1e-5)
    none, _ = correlation(torch.full((400, 3), 0.3), wanted)
    assert none.mean == pytest.approx(0, abs=1e-6)
    assert correlation(found, wanted, seed=3) == correlation(found, wanted, seed=3)


def test_images_of_one_colour_have_none_to_transfer():
    with pytest.raises(DataError, match="all images have the same colour"):
        correlation(torch.rand(5, 3), torch.full((5, 3), 0.25))


# ---- bad input -------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    codes, images = linear_images(12)
    generator, judge = LinearGenerator(), Judge(images)
    with pytest.raises(
        DataError, match=r"12 images and the generator 4 styles of length 3, but the codes are \(11, 4, 3\)"
    ):
        measure_cuts(generator, codes[:11], images, judge)
    with pytest.raises(DataError, match="12x12, the generator makes 8x8"):
        measure_cuts(generator, codes, tiny_images(12), judge)
    decoder = StyleDecoder(generator, 2)
    content, style = decoder.split(codes)
    with pytest.raises(DataError, match="12 images, but there are 11 contents and 12 styles"):
        measure_swap(decoder, content[:11], style, images, judge)
    one = ImageSet("one", images.images, torch.zeros_like(images.labels), images.classes, images.mean, images.std)
    with pytest.raises(DataError, match="all 12 images are of class 0"):
        measure_cuts(generator, codes, one, judge)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        measure_swap(decoder, content * math.nan, style, images, judge)


def test_a_judge_is_not_trained_without_a_class():
    images = tiny_images(40)
    schedule = Schedule(epochs=1, batch_size=8, lr=0.05)
    without = ImageSet("without", images.images[:8], images.labels[:8], images.classes, images.mean, images.std)
    network = tiny_network()
    with pytest.raises(DataError, match="without: no image of 8, 9"):
        train_label_classifier(network, without, schedule, show_progress=False)
    assert train_label_classifier(network, images, schedule, show_progress=False) is network and not network.training


# ---- pictures --------------------------------------------------------------------------------


def test_the_grid_has_contents_in_rows_and_styles_in_columns():
    codes, images = linear_images(12)
    decoder = StyleDecoder(LinearGenerator(), 2)
    content, style = decoder.split(codes)
    grid = mix_grid(decoder, content, style, images, rows=[0, 1], columns=[5, 6, 7])
    assert (
        grid.mixes.shape == (2, 3, 3, 8, 8)
        and grid.contents.shape == (2, 3, 8, 8)
        and grid.styles.shape == (3, 3, 8, 8)
    )
    assert torch.equal(grid.styles, images.images[[5, 6, 7]].float() / 255)
    for row, of in enumerate((0, 1)):
        for column, look in enumerate((5, 6, 7)):
            expected = decoder.decode(content[of : of + 1], style[look : look + 1])[0]
            assert torch.allclose(grid.mixes[row, column], expected, atol=1e-6)
    assert torch.allclose(mean_colour(grid.mixes[0]), mean_colour(grid.styles), atol=0.01), "colours of the columns"
    for rows in ([], [12], [-1]):
        with pytest.raises(ValueError, match="from 0 to 11"):
            mix_grid(decoder, content, style, images, rows, [0])


def test_the_real_generator_can_be_measured():
    generator = real_generator()
    codes = torch.randn(20, generator.layers, 6)
    made = (255 * generator.images(codes).detach()).round().to(torch.uint8)
    images = ImageSet("made", made, torch.arange(20) % 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3)
    cuts = measure_cuts(generator, codes, images, tiny_network(), colours=ink_colour)
    assert list(cuts) == [1, 2, 3] and all(cut.own == cuts[1].own for cut in cuts.values())
    assert cuts[1].own_colour.mean > 0.99 and cuts[1].colour.mean > cuts[3].colour.mean
