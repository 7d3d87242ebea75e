"""Decoders, batches with codes, the search for the worst style, and accuracy under mixing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import tiny_images
from torch import nn

from advbn_lib.ascent import Steps
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.methods.base import Method
from advbn_lib.mixing import ColourDecoder, Encoded, Mixer, MixingLoader, worst_style
from advbn_lib.mixing_robustness import MixingAttack, mixing_accuracy
from advbn_lib.style_mix import StyleBank

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLIMB = Steps(4, 0.6, random_start=True, keep="best")


class Redness(nn.Module):
    """Two classes: the redder an image, the surer it says 0. No weight, so that worst cases can be worked out."""

    def forward(self, x):
        red = x[:, 0].mean((1, 2)) - x[:, 1].mean((1, 2))
        return torch.stack([8 * red, torch.zeros_like(red)], 1)


def colours(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))


def mixer(styles: torch.Tensor, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)) -> Mixer:
    return Mixer(ColourDecoder(), StyleBank(styles, torch.zeros(len(styles)).long(), (0.0, 1.0)), mean, std)


def encoded(count: int, places: int | None = None) -> Encoded:
    content, style = 0.5 + 0.5 * torch.rand(count, 1, 4, 4), colours(count, 1)
    own = torch.arange(count) if places is None else torch.full((count,), places)
    return Encoded(ColourDecoder().decode(content, style), content, style, own)


def test_the_colour_decoder_is_grey_times_colour():
    content, style = torch.rand(2, 1, 5, 6), torch.rand(2, 3)
    images = ColourDecoder().decode(content, style)
    assert images.shape == (2, 3, 5, 6)
    assert torch.equal(images[1, 2], content[1, 0] * style[1, 2])


def test_encoding_and_decoding_give_the_image_back_and_the_codes_where_the_content_reaches_white():
    content, style = torch.rand(8, 1, 6, 6), 0.2 + 0.8 * torch.rand(8, 3)
    content[:, 0, 2, 3] = 1.0
    style[0] = 0.0  # black: nothing is left to encode
    images = ColourDecoder().decode(content, style)
    grey, colour = ColourDecoder().encode(images)
    assert torch.allclose(ColourDecoder().decode(grey, colour), images, atol=1e-6)
    assert torch.allclose(colour, style, atol=1e-6) and torch.allclose(grey[1:], content[1:], atol=1e-5)
    assert bool((grey[0] == 0).all())
    rounded = (images * 255).round() / 255
    assert float((ColourDecoder().decode(*ColourDecoder().encode(rounded)) - rounded).abs().max()) < 1.5 / 255


def test_images_of_several_colours_are_refused():
    with pytest.raises(ValueError, match="train a generator"):
        ColourDecoder().encode(torch.rand(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"\(N,1,H,W\)"):
        ColourDecoder().decode(torch.rand(2, 3, 5, 5), torch.rand(2, 3))


def loader(seed: int = 0) -> tuple[MixingLoader, torch.Tensor, torch.Tensor]:
    images = tiny_images(40)
    content, style = images.images[:, :1], torch.arange(40.0)[:, None].repeat(1, 3)
    return MixingLoader(images, content, style, 8, seed), content, style


def test_a_batch_s_images_codes_and_places_belong_together_and_come_in_the_usual_order():
    batches, content, style = loader()
    plain = DeviceLoader(tiny_images(40), 8, 0, padding=0, flip=False)
    for (batch, labels), (images, usual) in zip(batches.epoch(1), plain.epoch(1), strict=True):
        assert torch.equal(batch.images, images) and torch.equal(labels, usual)
        assert torch.equal(batch.style, style[batch.places])
        assert torch.equal(batch.content, content[batch.places].float() / 255)
        assert torch.equal(batch.style[:, 0].long(), batch.places)


def test_a_batch_depends_on_seed_epoch_and_number_alone():
    batches, _, _ = loader()
    whole = [batch.places for batch, _ in batches.epoch(3)]
    resumed = [batch.places for batch, _ in batches.epoch(3, start=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], resumed, strict=True))
    assert not torch.equal(whole[0], next(iter(batches.epoch(4)))[0].places)
    assert not torch.equal(whole[0], next(iter(loader(seed=1)[0].epoch(3)))[0].places)


def test_codes_of_another_set_are_refused():
    images = tiny_images(40)
    with pytest.raises(ValueError, match="encode this very set"):
        MixingLoader(images, images.images[:30, :1], colours(40), 8, 0)


def test_mixed_images_are_normalised_as_the_classifier_wants_them():
    images = tiny_images(16)
    grey, style = torch.rand(16, 1, 12, 12), colours(16)
    mixed = mixer(style, images.mean, images.std).images(grey, style)
    assert torch.allclose(mixed, images.normalise(ColourDecoder().decode(grey, style)), atol=1e-6)


@pytest.mark.parametrize("climb", [None, CLIMB])
@pytest.mark.parametrize("restarts", [1, 3])
def test_the_worst_style_is_in_a_ball_around_another_image_s(climb, restarts):
    styles, batch = colours(6, seed=3), encoded(6)
    mix, labels = mixer(styles), torch.zeros(6).long()
    ball = mix.bank.around(0.3)
    style = worst_style(Redness(), mix, batch, labels, ball, climb, restarts)
    assert style.shape == (6, 3) and not style.requires_grad
    within = ((style[:, None] - styles[None]).abs() <= 0.3 * mix.bank.scale + 1e-6).all(2)
    others = within & ~torch.eye(6).bool()
    assert bool(others.any(1).all()), "each is near the style of a sample that is not itself"


def test_the_ascent_finds_the_corner_that_a_linear_model_fears_most():
    styles = 0.5 + 0.1 * (colours(2) - 0.5)
    batch, labels = encoded(4, places=0), torch.zeros(4).long()  # the other one is the bank's second
    mix = mixer(styles)
    style = worst_style(Redness(), mix, batch, labels, mix.bank.around(0.5), CLIMB)
    wanted = styles[1] + 0.5 * mix.bank.scale[0] * torch.tensor([-1.0, 1.0, 0.0])  # less red, more green
    assert torch.allclose(style[:, :2], wanted[:2].expand(4, 2), atol=1e-5)


def test_more_looks_are_worse_and_the_ascent_is_worse_than_looks_without_it():
    mix, batch, labels = mixer(colours(50)), encoded(40, places=-1), torch.zeros(40).long()
    ball = mix.bank.around(0.5)

    def loss(climb, restarts):
        style = worst_style(Redness(), mix, batch, labels, ball, climb, restarts, torch.Generator().manual_seed(1))
        return cross_entropies(Redness()(mix.images(batch.content, style)), labels).mean()

    one, three = loss(None, 1), loss(None, 3)
    assert one < three < loss(CLIMB, 3) and one < loss(CLIMB, 1)


def test_no_parameter_of_the_decoder_or_the_model_gets_a_gradient():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def decode(self, content, style):
            return (content * self.layer(style)[:, :, None, None]).sigmoid()

    decoder, model, styles = Trained(), nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), colours(6)
    mix = dataclasses.replace(mixer(styles), decoder=decoder)
    worst_style(model, mix, encoded(6), torch.zeros(6).long(), mix.bank.around(0.3), CLIMB, 2)
    assert all(p.grad is None and p.requires_grad for module in (decoder, model) for p in module.parameters())


def test_restarts_below_one_are_refused():
    mix = mixer(colours(6))
    with pytest.raises(ValueError, match="restarts"):
        worst_style(Redness(), mix, encoded(6), torch.zeros(6).long(), mix.bank.around(0.3), None, 0)
    with pytest.raises(ValueError, match="restarts"):
        MixingAttack(0.3, None, 0)


@pytest.mark.parametrize("climb", [None, CLIMB])
def test_more_restarts_never_raise_the_accuracy_and_fewer_give_its_beginning(climb):
    method, batch = Method(Redness()), encoded(60, places=-1)
    labels = (torch.rand(60) < 0.5).long()
    few, many = (
        mixing_accuracy(method, mixer(colours(30)), batch, labels, MixingAttack(0.3, climb, restarts), False)
        for restarts in (5, 20)
    )
    assert len(many) == 21 and many[:6] == few
    assert all(later <= earlier for earlier, later in zip(many, many[1:])) and many[-1] < many[0]
    clean = (Redness()(batch.images).argmax(1) == labels).float().mean()
    assert many[0] == pytest.approx(clean.item())


def test_a_model_that_sees_no_colour_loses_nothing_and_one_that_sees_nothing_else_loses_all():
    class Shape(nn.Module):
        def forward(self, x):
            light = x.sum(1) / x.sum((1, 2, 3))[:, None, None]
            return torch.stack([light[:, 0].sum(1), light[:, 1].sum(1)], 1)

    content = torch.zeros(30, 1, 4, 4)
    labels = torch.arange(30) % 2
    content[torch.arange(30), 0, labels] = 1.0
    style = 0.1 + 0.9 * colours(30)
    batch = Encoded(ColourDecoder().decode(content, style), content, style, torch.full((30,), -1))
    attack = MixingAttack(0.3, CLIMB, 20)
    mix = mixer(0.1 + 0.9 * colours(30, seed=2))
    assert mixing_accuracy(Method(Shape()), mix, batch, labels, attack, False) == [1.0] * 21
    by_colour = (Redness()(batch.images).argmax(1)).long()
    after = mixing_accuracy(Method(Redness()), mix, batch, by_colour, attack, False)
    assert after[0] == 1.0 and after[-1] == 0.0


def test_the_evaluation_leaves_the_method_in_its_mode():
    method = Method(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 2))).train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    mixing_accuracy(
        method, mixer(colours(6)), encoded(6, -1), torch.zeros(6).long(), MixingAttack(0.3, CLIMB, 2), False
    )
    assert method.training and all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
