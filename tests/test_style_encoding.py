"""Images into style codes: with a generator that is linear, so that what must come out is known, and with the real one."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import assert_same_traces, copy_of_state, differing, tiny_images, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from advbn_lib import style_codes, style_encoding
from advbn_lib.checkpoints import CheckpointError
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.models.stylegan import Generator, GeneratorConfig
from advbn_lib.style_codes import Codes, CodeSchedule, distances, load_codes, optimise_codes
from advbn_lib.style_encoding import (
    EncoderSchedule,
    LayerFeatures,
    PerceptualDistance,
    StyleDecoder,
    StyleEncoder,
    check_images,
    encode_images,
    encoder_losses,
    mix,
    pictures,
    train_encoder,
)

# ---- a generator that is known ---------------------------------------------------------------


def _patterns() -> Tensor:
    """Orthogonal patterns of +1 and -1 (6,8,8), each with as many of both in the upper half as in the lower."""
    rows = torch.ones(1, 1)
    for _ in range(3):
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return torch.stack([torch.outer(rows[a], rows[b]) for a, b in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (2, 2))])


class LinearGenerator(nn.Module):
    """8x8 pixels, four styles of length three: position, shape, colour, and the colour's slope from top to bottom.

    The images are a linear function of the styles, each style in directions of its own: so each can be read off an image
    (:class:`Inverse`), the cut at 2 is an ideal split, and mean colours are those of the third style alone.
    """

    layers = 4

    def __init__(self):
        super().__init__()
        self.config = GeneratorConfig(resolution=8, latent=3)
        self.register_buffer("mean_w", torch.tensor([0.1, 0.0, -0.1]))
        slope = torch.ones(8, 8)
        slope[4:] = -1
        grey = _patterns().view(2, 3, 1, 8, 8).expand(-1, -1, 3, -1, -1)
        colour = torch.eye(3)[:, :, None, None]
        self.register_buffer("basis", 0.1 * torch.stack([*grey, 2 * colour.expand(3, 3, 8, 8), colour * slope]))

    def mapping(self, z: Tensor) -> Tensor:
        return self.mean_w + 0.5 * z

    def synthesis(self, wplus: Tensor) -> Tensor:
        return torch.einsum("nls,lschw->nchw", wplus, self.basis)


class Inverse(nn.Module):
    """The exact encoder of :class:`LinearGenerator`."""

    def __init__(self, generator: LinearGenerator):
        super().__init__()
        basis = generator.basis.flatten(2)
        self.register_buffer("dual", basis / basis.square().sum(-1, keepdim=True))
        self.register_buffer("scale", torch.full((3,), 0.5))

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("np,lsp->nls", (2 * images - 1).flatten(1), self.dual)


class Pools(nn.Module):
    """Feature maps: the images, and their means over squares of four pixels."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images, nn.functional.avg_pool2d(images, 2)]


def linear_images(count: int = 24, seed: int = 0) -> tuple[Tensor, ImageSet]:
    """Codes, and the images that they make, of three classes: which coordinate of the shape is 1."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    codes = 0.5 * torch.randn(count, 4, 3, generator=random)
    codes[:, 1] = 0.1 * codes[:, 1] + torch.eye(3)[labels]
    made = pictures(LinearGenerator(), codes)
    pixels = (255 * made).round().to(torch.uint8)
    return codes, ImageSet("linear", pixels, labels, ("a", "b", "c"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def distance_of(images: ImageSet) -> PerceptualDistance:
    return PerceptualDistance(Pools(), images.images.float() / 255)


def real_generator(resolution: int = 8, channels: int = 3) -> Generator:
    return Generator(GeneratorConfig(resolution, channels, latent=6, width=4, mapping_layers=2)).eval()


def small_images(count: int) -> ImageSet:
    """Random pixels, 8x8."""
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet("small", pixels, torch.arange(count) % 2, ("a", "b"), (0.5,) * 3, (0.25,) * 3)


SHORT = EncoderSchedule(steps=100, batch_size=8, lr=3e-3, width=4)


# ---- codes and pictures ----------------------------------------------------------------------


def test_mixing_takes_the_coarse_styles_of_one_and_the_fine_ones_of_the_other():
    content, style = torch.zeros(3, 4, 2), torch.ones(3, 4, 2)
    assert mix(content, style, 1)[:, :, 0].tolist() == [[0, 1, 1, 1]] * 3
    each = mix(content, style, torch.tensor([1, 3, 4]))
    assert each[:, :, 1].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("cuts", [[0, 1], [5, 1]])
def test_cuts_of_a_batch_that_are_out_of_range_are_refused(cuts):
    codes = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="cuts are from 1 to 4"):
        mix(codes, codes, torch.tensor(cuts))


@pytest.mark.parametrize("cut", [0, 4, -1])
def test_a_cut_that_leaves_nothing_on_one_side_is_refused(cut):
    codes = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=f"from 1 to 3 for this generator's 4: got {cut}"):
        mix(codes, codes, cut)
    with pytest.raises(ValueError, match=f"from 1 to 3 for this generator's 4: got {cut}"):
        StyleDecoder(LinearGenerator(), cut)


def test_codes_of_different_shapes_are_not_mixed():
    with pytest.raises(ValueError, match=r"of one shape: \(2, 4, 3\), \(2, 5, 3\)"):
        mix(torch.zeros(2, 4, 3), torch.zeros(2, 5, 3), 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_those_of_the_generator(channels):
    generator = real_generator(channels=channels)
    codes = 2 * torch.randn(4, generator.layers, 6)
    expected = generator.images(codes, colour=True)
    assert expected.min() == 0 or expected.max() == 1, "something is cut off"
    assert torch.allclose(pictures(generator, codes), expected, atol=1e-6)
    content, style = StyleDecoder(generator, 2).split(codes)
    assert torch.allclose(StyleDecoder(generator, 2).decode(content, style), expected, atol=1e-6)


def test_the_gradient_passes_the_cut_at_white_for_fitting_and_stops_there_for_attacks():
    generator = LinearGenerator()
    codes = torch.zeros(1, 4, 3)
    codes[0, 2] = 20  # far beyond white
    for_fitting, for_attacks = (codes.clone().requires_grad_() for _ in range(2))
    pictures(generator, for_fitting).sum().backward()
    decoder = StyleDecoder(generator, 2)
    decoder.decode(*decoder.split(for_attacks)).sum().backward()
    assert (for_fitting.grad[0, 2] > 0).all() and not for_attacks.grad.any()


def test_the_decoder_swaps_colours_and_keeps_shapes():
    codes, images = linear_images(6)
    decoder = StyleDecoder(LinearGenerator(), 2)
    content, style = decoder.split(codes)
    assert content.shape == (6, 2, 3) and style.shape == (6, 2, 3)
    swapped = decoder.decode(content, style.roll(1, 0))
    found = Inverse(LinearGenerator())(swapped)
    assert torch.allclose(found[:, :2], codes[:, :2], atol=1e-5)
    assert torch.allclose(found[:, 2:], codes.roll(1, 0)[:, 2:], atol=1e-5)


def test_the_decoder_gives_gradients_to_codes_and_none_to_the_generator():
    generator = real_generator()
    before = copy_of_state(generator)
    decoder = StyleDecoder(generator, 1)
    content, style = (part.requires_grad_() for part in decoder.split(torch.randn(2, generator.layers, 6)))
    decoder.decode(content, style).square().sum().backward()
    assert content.grad.any() and style.grad.any()
    assert all(parameter.grad is None for parameter in decoder.generator.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in generator.parameters())
    with torch.no_grad():
        generator.constant.zero_()
    assert not differing(before, decoder.generator.state_dict()), "it has a copy"
    assert decoder.to("meta").generator.constant.is_meta and not decoder.generator.constant.is_meta


def test_codes_that_were_cut_elsewhere_are_refused():
    decoder = StyleDecoder(LinearGenerator(), 1)
    with pytest.raises(
        ValueError, match=r"cut at 1, content is N,1,3 and style N,3,3: got \(2, 2, 3\) and \(2, 2, 3\)"
    ):
        decoder.decode(*StyleDecoder(LinearGenerator(), 2).split(torch.zeros(2, 4, 3)))
    with pytest.raises(ValueError, match="split the codes with this decoder"):
        decoder.decode(torch.zeros(3, 1, 3), torch.zeros(2, 3, 3))


def test_images_that_the_generator_cannot_make_are_refused():
    coloured, small = small_images(4), tiny_images(4, size=12)
    grey = ImageSet(
        "grey", coloured.images[:, :1].expand(-1, 3, -1, -1), coloured.labels, coloured.classes, (0.5,) * 3, (0.2,) * 3
    )
    check_images(real_generator(), coloured)
    check_images(real_generator(channels=1), grey)
    with pytest.raises(DataError, match="12x12, the generator makes 8x8"):
        check_images(real_generator(), small)
    with pytest.raises(DataError, match="in colour, the generator makes grey"):
        check_images(real_generator(channels=1), coloured)
    schedule = CodeSchedule(steps=1, mixing=0)
    distance, start = distance_of(coloured), torch.zeros(4, 4, 6)
    for images, channels in ((small, 3), (coloured, 1)):
        with pytest.raises(DataError):
            train_encoder(real_generator(channels=channels), images, distance, SHORT, show_progress=False)
        with pytest.raises(DataError):
            optimise_codes(real_generator(channels=channels), images, start, distance, schedule, show_progress=False)


# ---- the perceptual distance -----------------------------------------------------------------


def test_features_are_those_of_the_named_layers_of_a_frozen_copy():
    network, images = tiny_network(), tiny_images(6)
    before = traces(network)
    features = LayerFeatures(network, ["layer1", "layer3"], images.normalise).train()
    pixels = images.images.float() / 255
    first, second = features(pixels), features(pixels)
    assert [tuple(one.shape[1:]) for one in first] == [(4, 12, 12), (16, 3, 3)]
    assert all(torch.equal(a, b) for a, b in zip(first, second)), "its BatchNorms do not learn"
    assert_same_traces(before, traces(network))
    network.eval()
    below = network.layer1(network.relu(network.bn1(network.conv1(images.normalise(pixels)))))
    assert torch.allclose(first[0], below, atol=1e-6)


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no layer is called layer9: choose from conv1"):
        LayerFeatures(tiny_network(), ["layer1", "layer9"], tiny_images().normalise)
    with pytest.raises(ValueError, match="at least one layer"):
        LayerFeatures(tiny_network(), [], tiny_images().normalise)
    with pytest.raises(ValueError, match="a list of feature maps"):
        PerceptualDistance(nn.Flatten(), torch.rand(2, 3, 8, 8))


class Scaled(Pools):
    def __init__(self, factors: Tensor):
        super().__init__()
        self.factors = factors.view(1, 3, 1, 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [one * self.factors for one in super().forward(images)]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.5, 100), min_size=3, max_size=3), st.integers(0, 1000))
def test_the_scale_of_a_channel_does_not_matter(factors, seed):
    images, others, reference = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    plain = PerceptualDistance(Pools(), reference)(images, others)
    scaled = PerceptualDistance(Scaled(torch.tensor(factors)), reference)(images, others)
    assert torch.allclose(plain, scaled, rtol=0.02)  # but for what keeps dead channels from division by 0
    assert (plain > 0).all()


def test_the_distance_is_of_each_image_in_units_of_the_spread():
    reference = torch.rand(50, 3, 8, 8)
    distance = PerceptualDistance(Pools(), reference)
    images = torch.rand(3, 3, 8, 8)
    others = images.clone()
    others[1] += 0.1
    others[2] += 0.2
    found = distance(images, others)
    spreads = [one.transpose(0, 1).flatten(1).var(1) for one in Pools()(reference)]
    expected = sum((0.01 / spread).mean().item() for spread in spreads) / 2
    assert found.tolist() == pytest.approx([0, expected, 4 * expected], rel=0.01)
    assert torch.equal(distance.to_features(images, distance.features(others)), found)


# ---- the encoder -----------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [8, 32, 64])
def test_the_encoder_begins_with_the_mean_code(resolution):
    generator = real_generator(resolution)
    generator.mean_w.copy_(torch.randn(6))
    encoder = StyleEncoder(generator, width=2)
    codes = encoder(torch.rand(3, 3, resolution, resolution))
    assert codes.shape == (3, generator.layers, 6)
    assert torch.equal(codes, generator.mean_w.expand(3, generator.layers, 6))


def test_the_encoder_refuses_images_of_another_size():
    encoder = StyleEncoder(real_generator(), width=2)
    for shape in ((2, 3, 16, 16), (2, 1, 8, 8)):
        with pytest.raises(ValueError, match=r"takes N,3,8,8, got"):
            encoder(torch.zeros(shape))


def test_the_exact_encoder_has_no_loss_and_a_wrong_one_has():
    generator = LinearGenerator()
    codes, images = linear_images(8)
    real = pictures(generator, codes)

    def losses(encoder: nn.Module) -> style_encoding.EncoderLosses:
        return encoder_losses(encoder, generator, distance_of(images), real, SHORT, torch.Generator().manual_seed(0))

    exact = losses(Inverse(generator))
    assert max(getattr(exact, name).item() for name in style_encoding.PARTS) < 1e-9
    pale = Inverse(generator)
    pale.dual[2] *= 0.5  # reads half of the colour
    wrong = losses(pale)
    assert min(getattr(wrong, name).item() for name in style_encoding.PARTS) > 1e-4
    weights = (SHORT.code, SHORT.pixel, SHORT.perceptual, SHORT.mixing)
    total = sum(w * getattr(wrong, name).item() for w, name in zip(weights, style_encoding.PARTS[1:]))
    assert wrong.total.item() == pytest.approx(total, rel=1e-5)


class ReadsColour(Inverse):
    """Takes the position from the colour."""

    def forward(self, images: Tensor) -> Tensor:
        codes = super().forward(images)
        return torch.cat([codes[:, 2:3], codes[:, 1:]], 1)


def test_only_swapping_shows_that_content_was_read_off_the_style():
    generator = LinearGenerator()
    codes, images = linear_images(8)
    codes[:, 0] = codes[:, 2]  # on these images position and colour say the same
    found = encoder_losses(
        ReadsColour(generator),
        generator,
        distance_of(images),
        pictures(generator, codes),
        SHORT,
        torch.Generator().manual_seed(0),
    )
    assert max(found.pixel.item(), found.perceptual.item()) < 1e-9
    assert found.mixing.item() > 0.05


def test_training_learns_to_encode_and_to_swap():
    generator = LinearGenerator()
    codes, images = linear_images(64)
    before = torch.get_rng_state()
    schedule = EncoderSchedule(steps=300, batch_size=16, lr=3e-3, width=8)
    encoder, history = train_encoder(generator, images, distance_of(images), schedule, show_progress=False)
    assert torch.equal(before, torch.get_rng_state()), "no draw is from the global generator"
    assert len(history) == 6 and history[0].keys() == set(style_encoding.PARTS)
    assert all(history[-1][name] < 0.35 * history[0][name] for name in ("code", "pixel", "perceptual"))
    found = encode_images(encoder, images)
    held_out = linear_images(64, seed=1)[1]
    perceptual, _ = distances(generator, found, images.images, distance_of(images))
    of_mean, _ = distances(generator, generator.mean_w.expand_as(found), images.images, distance_of(images))
    assert perceptual.mean() < 0.35 * of_mean.mean()
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    perceptual, _ = distances(generator, encode_images(encoder, held_out), held_out.images, distance_of(images))
    assert perceptual.mean() < 0.5 * of_mean.mean()


def test_the_mixing_loss_makes_swapped_codes_come_back():
    generator = LinearGenerator()
    codes, images = linear_images(32)
    codes[:, 0] = codes[:, 2]
    pixels = (255 * pictures(generator, codes)).round().to(torch.uint8)
    biased = ImageSet("biased", pixels, images.labels, images.classes, images.mean, images.std)
    errors = {}
    for weight in (0.0, 1.0):
        schedule = EncoderSchedule(steps=150, batch_size=16, lr=3e-3, width=8, code=0.0, mixing=weight)
        encoder, history = train_encoder(generator, biased, distance_of(biased), schedule, show_progress=False)
        errors[weight] = history[-1]["mixing"]
    assert errors[1.0] < 0.5 * errors[0.0]


class Interrupting(Pools):
    """Stops at one of its calls, as a user may."""

    def __init__(self, at: int):
        super().__init__()
        self.calls, self.at = 0, at

    def forward(self, images: Tensor) -> list[Tensor]:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().forward(images)


def interrupting(images: ImageSet, at: int) -> PerceptualDistance:
    distance = distance_of(images)
    distance.net = Interrupting(at)
    return distance


def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path):
    generator, images = real_generator(), small_images(20)
    options = {"schedule": SHORT, "seed": 3, "save_every": 0, "show_progress": False}
    whole, history = train_encoder(generator, images, distance_of(images), **options)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(generator, images, interrupting(images, 2 * 70), folder=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 1
    before = torch.get_rng_state()
    resumed, again = train_encoder(generator, images, distance_of(images), folder=tmp_path, **options)
    assert torch.equal(before, torch.get_rng_state())
    assert not differing(whole.state_dict(), resumed.state_dict()) and history == again
    finished, _ = train_encoder(generator, images, interrupting(images, 1), folder=tmp_path, **options)
    assert not differing(whole.state_dict(), finished.state_dict()), "a finished training is not repeated"
    other, _ = train_encoder(generator, images, distance_of(images), **{**options, "seed": 4})
    assert differing(whole.state_dict(), other.state_dict())


def test_a_damaged_checkpoint_is_refused(tmp_path):
    generator, images = real_generator(), small_images(20)
    train_encoder(
        generator, images, distance_of(images), EncoderSchedule(2, 4, width=2), folder=tmp_path, show_progress=False
    )
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        train_encoder(
            generator, images, distance_of(images), EncoderSchedule(2, 4, width=2), folder=tmp_path, show_progress=False
        )


class Exploding(Pools):
    """Features that are not finite for pictures of a generator, but are for real images (whole levels)."""

    def forward(self, images: Tensor) -> list[Tensor]:
        real = ((255 * images).round() - 255 * images).abs().flatten(1).amax(1) < 1e-3
        return [torch.where(real[:, None, None, None], one, math.nan) for one in super().forward(images)]


def exploding(images: ImageSet) -> PerceptualDistance:
    return PerceptualDistance(Exploding(), images.images.float() / 255)


def test_losses_that_are_not_finite_stop_the_training_and_name_the_step(tmp_path):
    generator, images = real_generator(), small_images(20)
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 \(total nan, code .* perceptual nan.*lower lr"):
        train_encoder(generator, images, exploding(images), SHORT, folder=tmp_path, show_progress=False)
    assert not list(tmp_path.iterdir()), "nothing of it is kept"


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"mixing": -1.0},
        {"code": 0, "pixel": 0, "perceptual": 0, "mixing": 0},
    ],
)
def test_schedules_without_sense_are_refused(bad):
    with pytest.raises(ValueError, match="got"):
        EncoderSchedule(**bad)


# ---- codes of a data set ---------------------------------------------------------------------


def blurred(codes: Tensor) -> Tensor:
    """A start that is off."""
    return codes + 0.3 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(5))


def test_steps_find_the_codes_of_the_images():
    generator = LinearGenerator()
    codes, images = linear_images(20)
    schedule = CodeSchedule(steps=150, lr=0.1, batch_size=8, half=False)
    found = optimise_codes(
        generator, images, blurred(codes), distance_of(images), schedule, Inverse(generator), show_progress=False
    )
    assert len(found) == 20 and not found.half
    assert (found.codes - codes).abs().max() < 0.05 < (blurred(codes) - codes).abs().max()
    assert (found.perceptual < 0.02 * found.start).all()
    again = distances(generator, found.codes, images.images, distance_of(images))
    assert torch.allclose(again[0], found.perceptual, atol=1e-6) and torch.allclose(again[1], found.pixel, atol=1e-8)


class Shapes(nn.Module):
    """One feature map: the grey image without its mean. It sees no colour."""

    def forward(self, images: Tensor) -> list[Tensor]:
        grey = images.mean(1, keepdim=True)
        return [grey - grey.mean((2, 3), keepdim=True)]


@pytest.mark.parametrize("lr", [0.05, 3.0])
@pytest.mark.parametrize("half", [False, True])
def test_no_image_gets_worse_in_the_perceptual_distance(lr, half):
    codes, images = linear_images(20)
    distance = PerceptualDistance(Shapes(), images.images.float() / 255)
    start = codes.clone()
    start[10:, :2] += 0.2  # half of the images start with the right shape, all in the wrong colour
    start[:, 2] += 0.5
    schedule = CodeSchedule(steps=8, lr=lr, batch_size=8, pixel=1000.0, mixing=0, half=half)
    found = optimise_codes(LinearGenerator(), images, start, distance, schedule, show_progress=False)
    assert (found.perceptual <= found.start).all()
    again, _ = distances(LinearGenerator(), found.codes, images.images, distance)
    assert torch.allclose(again, found.perceptual, rtol=1e-4, atol=1e-9)
    if lr < 1:
        assert (found.perceptual[10:] < found.start[10:]).all() and (found.codes - start).abs().max() > 0.01


def test_what_rounding_made_worse_than_the_start_is_not_taken():
    codes, images = linear_images(6)
    target, found = images.images.float() / 255, codes.clone()
    start = codes.clone()
    found[:3] += 0.1
    start[3:] += 0.1
    kept = style_codes._accepted(LinearGenerator(), found, start, target, distance_of(images), True)
    assert torch.equal(kept.codes, codes)
    expected = distances(LinearGenerator(), codes, images.images, distance_of(images))
    assert torch.allclose(kept.perceptual, expected[0]) and torch.allclose(kept.pixel, expected[1])


class Far(LinearGenerator):
    """Its codes are so large that half precision has steps of a half."""

    def synthesis(self, wplus: Tensor) -> Tensor:
        return super().synthesis(wplus - 600)


def test_half_precision_only_where_the_loss_allows_it():
    codes, images = linear_images(8)
    schedule = CodeSchedule(steps=1, lr=1e-6, batch_size=8, mixing=0)

    def optimised(generator: nn.Module, start: Tensor) -> Codes:
        return optimise_codes(generator, images, start, distance_of(images), schedule, show_progress=False)

    near, far = optimised(LinearGenerator(), blurred(codes)), optimised(Far(), blurred(codes) + 600)
    assert near.half and torch.equal(near.codes, near.codes.half().float())
    assert not far.half and torch.allclose(far.codes, blurred(codes) + 600, atol=1e-3)


def test_parts_are_kept_and_a_killed_run_goes_on(tmp_path):
    generator = LinearGenerator()
    codes, images = linear_images(17)  # parts of 8 and 9: one image alone has no partner
    schedule = CodeSchedule(steps=5, batch_size=8)
    start, encoder, about = blurred(codes), Inverse(generator), {"seed": 1, "show_progress": False}
    whole = optimise_codes(generator, images, start, distance_of(images), schedule, encoder, **about)
    counting = interrupting(images, -1)
    optimise_codes(generator, images, start, counting, schedule, encoder, **about)
    with pytest.raises(KeyboardInterrupt):
        distance = interrupting(images, counting.net.calls - 3)
        optimise_codes(generator, images, start, distance, schedule, encoder, folder=tmp_path, **about)
    with pytest.raises(DataError, match="codes of 8 images of 17: let optimise_codes finish it"):
        load_codes(tmp_path)
    first = (tmp_path / "codes-000000.npz").stat().st_mtime_ns
    resumed = optimise_codes(generator, images, start, distance_of(images), schedule, encoder, folder=tmp_path, **about)
    assert (tmp_path / "codes-000000.npz").stat().st_mtime_ns == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes-000000.npz", "codes-000008.npz", "manifest.json"]
    for found in (resumed, load_codes(tmp_path, images)):
        assert all(
            torch.equal(getattr(found, name), getattr(whole, name))
            for name in ("codes", "perceptual", "pixel", "start")
        )
        assert found.half == whole.half
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["about"]["schedule"]["steps"] == 5 and manifest["about"]["images"] == images.checksum
    with np.load(tmp_path / "codes-000000.npz") as arrays:
        assert arrays["codes"].dtype == (np.float16 if whole.half else np.float32)


def test_a_folder_of_other_codes_is_refused(tmp_path):
    codes, images = linear_images(8)
    schedule = CodeSchedule(steps=1, batch_size=8, mixing=0)

    def again(**changed) -> Codes:
        given = {"generator": LinearGenerator(), "images": images, "start": codes, "distance": distance_of(images)} | {
            "schedule": schedule, "folder": tmp_path, "show_progress": False, **changed
        }  # fmt: skip
        return optimise_codes(**given)

    again()
    brighter = LinearGenerator()
    brighter.basis *= 1.01
    others = linear_images(8, seed=1)[1]
    for changed, named in (
        ({"schedule": CodeSchedule(steps=2, batch_size=8, mixing=0)}, "schedule"),
        ({"generator": brighter}, "generator"),
        ({"start": codes + 1}, "start"),
        ({"images": others}, "images"),
    ):
        with pytest.raises(DataError, match=f"made with another .*{named}.*choose another folder"):
            again(**changed)
    with pytest.raises(DataError, match="the codes of other images than linear"):
        load_codes(tmp_path, others)


def test_damaged_codes_are_refused(tmp_path):
    codes, images = linear_images(8)
    with pytest.raises(DataError, match="there are no codes in"):
        load_codes(tmp_path)
    schedule = CodeSchedule(steps=1, batch_size=8, mixing=0)
    options = {"folder": tmp_path, "show_progress": False}
    optimise_codes(LinearGenerator(), images, codes, distance_of(images), schedule, **options)
    path, manifest = tmp_path / "codes-000000.npz", tmp_path / "manifest.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for call in (
        lambda: load_codes(tmp_path),
        lambda: optimise_codes(LinearGenerator(), images, codes, distance_of(images), schedule, **options),
    ):
        with pytest.raises(DataError, match="codes-000000.npz is damaged or gone: remove the folder"):
            call()
    path.unlink()
    with pytest.raises(DataError, match="damaged or gone"):
        load_codes(tmp_path)
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(DataError, match="manifest.json is damaged"):
        load_codes(tmp_path)
    manifest.write_text('{"format": 0}')
    with pytest.raises(DataError, match="not a manifest of codes of format 1"):
        load_codes(tmp_path)


def test_bad_input_to_the_optimisation_is_refused(tmp_path):
    codes, images = linear_images(8)
    generator, distance = LinearGenerator(), distance_of(images)
    with pytest.raises(ValueError, match="the mixing loss needs the encoder"):
        optimise_codes(generator, images, codes, distance, CodeSchedule(), show_progress=False)
    schedule = CodeSchedule(steps=2, mixing=0)
    with pytest.raises(ValueError, match=r"a code for each image, \(8, 4, 3\), got \(7, 4, 3\)"):
        optimise_codes(generator, images, codes[:7], distance, schedule, show_progress=False)
    with pytest.raises(FloatingPointError, match="images 0 to 7 of linear: a distance is not finite"):
        optimise_codes(
            generator, images, blurred(codes), exploding(images), schedule, folder=tmp_path, show_progress=False
        )
    assert not list(tmp_path.iterdir())
    for bad in ({"steps": 0}, {"batch_size": 1}, {"lr": -1.0}, {"perceptual": 0.0}, {"mixing": -1.0}):
        with pytest.raises(ValueError, match="got"):
            CodeSchedule(**bad)


def test_the_way_is_open_from_images_to_codes_of_the_real_generator():
    generator = real_generator()
    with torch.no_grad():
        made = generator.images(generator.wplus(generator.mapping(torch.randn(24, 6))))
    pixels = (255 * made).round().to(torch.uint8)
    images = ImageSet("made", pixels, torch.arange(24) % 2, ("a", "b"), (0.5,) * 3, (0.25,) * 3)
    distance = PerceptualDistance(LayerFeatures(tiny_network(), ["layer1", "layer2"], images.normalise), made)
    before = copy_of_state(generator)
    encoder, history = train_encoder(generator, images, distance, SHORT, show_progress=False)
    assert history[-1]["perceptual"] < history[0]["perceptual"]
    start = encode_images(encoder, images)
    schedule = CodeSchedule(steps=10, batch_size=12)
    found = optimise_codes(generator, images, start, distance, schedule, encoder, show_progress=False)
    assert (found.perceptual <= found.start).all() and found.perceptual.mean() < 0.9 * found.start.mean()
    assert not differing(before, generator.state_dict()) and generator.constant.requires_grad
    moved = copy.deepcopy(found).to("cpu")
    assert torch.equal(moved.codes, found.codes)
