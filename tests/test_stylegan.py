"""The StyleGAN's two networks: that a layer's style is its moments, that equal inputs give equal pictures, and its file."""

import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from conftest import differing
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib.checkpoints import CheckpointError
from advbn_lib.models.style_discriminator import Discriminator, downsample, minibatch_std
from advbn_lib.models.stylegan import (
    EqualConv,
    EqualLinear,
    Generator,
    GeneratorConfig,
    about_generator,
    load_generator,
    save_generator,
    upsample,
)
from advbn_lib.statistics import INSTANCE, mean, std

TINY = GeneratorConfig(resolution=16, channels=3, latent=6, width=4, mapping_layers=2)


def tiny_generator(config: GeneratorConfig = TINY) -> Generator:
    """With noise that matters: at the start of a training its strength is 0."""
    generator = Generator(config)
    for layer in generator.styled:
        torch.nn.init.constant_(layer.noise_strength, 0.3)
    return generator


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("resolution", "layers"), [(8, 4), (16, 6), (32, 8), (64, 10)])
def test_sizes(resolution, layers, channels):
    config = replace(TINY, resolution=resolution, channels=channels)
    generator = Generator(config)
    assert generator.layers == layers == 2 * math.log2(resolution) - 2
    pictures = generator(torch.randn(3, 6), "random")
    assert pictures.shape == (3, channels, resolution, resolution)
    assert Discriminator(config)(pictures).shape == (3,)
    assert generator.images(generator.wplus(torch.randn(2, 6)), colour=True).shape == (2, 3, resolution, resolution)


def test_widths_double_as_the_resolution_halves_up_to_four_times():
    config = GeneratorConfig(64, width=5)
    assert [config.width_at(size) for size in config.resolutions] == [20, 20, 20, 10, 5]


@pytest.mark.parametrize("resolution", [0, 4, 24, 28, 33, -8])
def test_resolutions_that_are_no_power_of_two_are_refused(resolution):
    with pytest.raises(ValueError, match=f"power of two.*{resolution}.*pad or resize"):
        GeneratorConfig(resolution)


@pytest.mark.parametrize("wrong", [{"channels": 2}, {"latent": 0}, {"width": 0}, {"mapping_layers": 0}])
def test_other_sizes_that_make_no_generator_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(TINY, **wrong)


@pytest.mark.parametrize("wrong", [{"resolution": 32.0}, {"latent": "64"}, {"width": True}])
def test_sizes_are_whole_numbers(wrong):
    with pytest.raises(ValueError, match="whole numbers"):
        replace(TINY, **wrong)


def test_a_style_is_the_mean_and_standard_deviation_of_each_channel():
    generator = tiny_generator()
    seen = []
    for layer in generator.styled:
        layer.register_forward_hook(lambda layer, inputs, out: seen.append((layer.style(inputs[1]), out)))
    generator.synthesis(torch.randn(3, 6, 6), "random")
    assert len(seen) == 6
    for style, features in seen:
        asked_mean, asked_std = style.chunk(2, 1)
        torch.testing.assert_close(mean(features, INSTANCE)[:, :, 0, 0], asked_mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(std(features, INSTANCE)[:, :, 0, 0], (1 + asked_std).abs(), rtol=1e-2, atol=1e-3)


def test_the_last_style_changes_the_picture_pixel_by_pixel_alone():
    """It is a scale and a shift of the last features, so the picture changes by an affine map of those, the same everywhere."""
    generator = tiny_generator(replace(TINY, width=1))  # one feature channel at the end: each colour is affine in it
    styles = torch.randn(1, 6, 6).repeat(2, 1, 1)
    styles[1, -1] += 1
    first, second = generator.synthesis(styles)[:, 0].flatten(1)
    fitted = torch.stack([first, torch.ones_like(first)], 1)
    solution = torch.linalg.lstsq(fitted, second[:, None]).solution
    assert not torch.allclose(first, second, atol=1e-3)
    torch.testing.assert_close(fitted @ solution, second[:, None], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", range(6))
def test_every_style_has_its_own_effect_on_its_own_picture(layer):
    generator = tiny_generator()
    styles = torch.randn(2, 6, 6)
    changed = styles.clone()
    changed[1, layer] += 1
    before, after = generator.synthesis(styles), generator.synthesis(changed)
    torch.testing.assert_close(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-4


def test_noise():
    generator, styles = tiny_generator(), torch.randn(2, 6, 6)
    quiet = generator.synthesis(styles)
    assert torch.equal(quiet, generator.synthesis(styles))
    zeros = [torch.zeros(shape) for shape in generator.noise_shapes(2)]
    torch.testing.assert_close(generator.synthesis(styles, zeros), quiet)
    drawn = [generator.synthesis(styles, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.allclose(drawn[0], drawn[2])
    assert not torch.allclose(drawn[0], quiet)
    again = torch.Generator().manual_seed(1)
    noise = [torch.randn(shape, generator=again) for shape in generator.noise_shapes(2)]
    assert torch.equal(generator.synthesis(styles, noise), drawn[0])


def test_styles_and_noise_of_another_shape_are_refused():
    generator = tiny_generator()
    with pytest.raises(ValueError, match=r"\(N,6,6\).*\(2, 5, 6\).*wplus"):
        generator.synthesis(torch.randn(2, 5, 6))
    with pytest.raises(ValueError, match=r"\(N,6\), got \(2, 7\)"):
        generator.wplus(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"z must be \(N,6\).*\(2, 7\)"):
        generator(torch.randn(2, 7))
    with pytest.raises(ValueError, match="6 tensors"):
        generator.synthesis(torch.randn(2, 6, 6), [torch.zeros(2, 1, 4, 4)])
    with pytest.raises(ValueError, match="'random'"):
        generator.synthesis(torch.randn(2, 6, 6), "some")


def test_pictures_are_cut_to_their_range_and_grey_is_repeated():
    generator = tiny_generator(replace(TINY, channels=1))
    generator.to_picture.weight.data *= 10
    styles = torch.randn(4, 6, 6)
    raw, pictures, coloured = (
        generator.synthesis(styles),
        generator.images(styles),
        generator.images(styles, colour=True),
    )
    assert raw.min() < -1 and raw.max() > 1 and pictures.min() == 0 and pictures.max() == 1
    torch.testing.assert_close(pictures, ((raw + 1) / 2).clamp(0, 1))
    assert torch.equal(coloured, pictures.repeat(1, 3, 1, 1))


def test_pictures_can_be_differentiated_by_their_styles():
    generator = tiny_generator(replace(TINY, resolution=8)).double()
    styles = torch.randn(1, 4, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda styles: generator.synthesis(styles), styles, fast_mode=True)


def test_under_autocast_the_moments_stay_those_of_the_style():
    generator, styles = tiny_generator(), torch.randn(2, 6, 6)
    exact = generator.images(styles)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = generator.images(styles)
    assert rounded.dtype == exact.dtype
    assert (rounded - exact).abs().max() < 0.1 and (rounded - exact).abs().mean() < 0.01


@settings(max_examples=20, deadline=None)
@given(psi=st.floats(-1, 2), dims=st.sampled_from([(3, 6), (3, 6, 6)]))
def test_truncation_pulls_towards_the_mean(psi, dims):
    generator = Generator(TINY)
    generator.mean_w.copy_(torch.arange(6.0))
    w = torch.randn(dims)
    torch.testing.assert_close(generator.truncate(w, psi) - generator.mean_w, psi * (w - generator.mean_w))
    assert torch.equal(generator.truncate(w, 0.0), generator.mean_w.expand(dims))


def test_the_mean_of_w_is_tracked():
    generator = Generator(TINY)
    w = generator.mapping(torch.randn(2000, 6))
    for _ in range(60):
        generator.track(w, 0.9)
    torch.testing.assert_close(generator.mean_w, w.detach().mean(0), rtol=0.01, atol=0.01)


def test_the_mapping_sees_the_direction_of_z_alone():
    generator, z = Generator(TINY), torch.randn(5, 6)
    torch.testing.assert_close(generator.mapping(z), generator.mapping(7 * z))
    w = generator.mapping(torch.randn(2000, 6))
    assert 0.3 < w.square().mean() < 3  # neither vanishes nor explodes on the way


@pytest.mark.parametrize("layer", [EqualLinear(200, 50), EqualLinear(200, 50, rate=0.01), EqualConv(50, 20)])
def test_equalised_layers_keep_the_size_of_their_input(layer):
    x = torch.randn(64, 200) if isinstance(layer, EqualLinear) else torch.randn(8, 50, 12, 12)
    inner = layer(x) if x.dim() == 2 else layer(x)[:, :, 1:-1, 1:-1]  # zero padding makes the border smaller
    assert inner.std().item() == pytest.approx(1, rel=0.1)
    used = layer.weight.std().item() * layer.scale
    assert used == pytest.approx(1 / math.sqrt(layer.weight[0].numel()), rel=0.1)


def test_a_slowed_layer_learns_at_its_share_of_the_rate():
    moved = []
    for rate in (1.0, 0.01):
        layer = EqualLinear(6, 6, rate)
        before, x = layer(torch.eye(6)).detach(), torch.randn(9, 6)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-3)
        layer(x).square().sum().backward()
        optimizer.step()
        moved.append((layer(torch.eye(6)) - before).abs().max().item())
    assert moved[1] == pytest.approx(0.01 * moved[0], rel=0.5)


def test_up_and_down_sampling_are_linear_interpolation():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).repeat(1, 1, 8, 1)
    torch.testing.assert_close(upsample(ramp)[0, 0, 0, 1:-1], torch.arange(0.25, 7, 0.5))
    torch.testing.assert_close(downsample(ramp)[0, 0, 0], torch.arange(0.5, 8, 2))


def test_minibatch_standard_deviation():
    x = torch.randn(12, 5, 4, 4)
    found = minibatch_std(x, 4)
    assert found.shape == (12, 1, 4, 4)
    for first in range(3):
        group = x[first::3]
        expected = (group.var(0, unbiased=False) + 1e-8).sqrt().mean()
        torch.testing.assert_close(found[first::3], expected.expand(4, 1, 4, 4))


@pytest.mark.parametrize(("count", "groups"), [(1, 1), (2, 1), (5, 5), (6, 2), (8, 2)])
def test_minibatch_standard_deviation_of_any_count(count, groups):
    x = torch.randn(count, 5, 4, 4)
    found = minibatch_std(x)
    assert len(found.unique()) <= groups
    same = minibatch_std(x[:1].repeat(count, 1, 1, 1))
    assert same.max() < 1e-3


def test_the_discriminator_sees_that_all_pictures_are_one():
    discriminator = Discriminator(TINY)
    different = torch.randn(4, 3, 16, 16)
    same = different[:1].repeat(4, 1, 1, 1)
    assert abs(discriminator(different)[0] - discriminator(same)[0]) > 1e-4


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 32, 32), (2, 3, 16, 8), (3, 16, 16)])
def test_the_discriminator_refuses_other_pictures(shape):
    with pytest.raises(ValueError, match="pictures must be N,3,16,16"):
        Discriminator(TINY)(torch.zeros(shape))


# ---- its file ------------------------------------------------------------------------------


def test_a_saved_generator_comes_back(tmp_path):
    generator = tiny_generator()
    generator.track(torch.randn(4, 6), 0.5)
    path = tmp_path / "folder" / "generator.safetensors"
    save_generator(path, generator, {"steps": 7, "data": "tiny"})
    found = load_generator(path, TINY)
    assert found.config == TINY and differing(found.state_dict(), generator.state_dict()) == []
    assert not found.training and not any(each.requires_grad for each in found.parameters())
    assert about_generator(path) == {"steps": 7, "data": "tiny"}
    styles = torch.randn(2, 6, 6)
    assert torch.equal(found.images(styles), generator.images(styles))
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_generator_of_another_configuration_is_refused(tmp_path):
    path = tmp_path / "generator.safetensors"
    save_generator(path, Generator(TINY), {})
    with pytest.raises(CheckpointError, match=r"another configuration \(resolution 16, not 32; channels 3, not 1\)"):
        load_generator(path, replace(TINY, resolution=32, channels=1))


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "generator.safetensors"
    with pytest.raises(CheckpointError, match="there is no generator file"):
        load_generator(path)
    save_generator(path, Generator(TINY), {})
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[: len(whole) // 2], whole[:-1], b"not a file of ours at all" * 9):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_generator(path)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="checksum"):
        load_generator(path)


def rewritten(path, **changes: str) -> None:
    """The same file with other metadata (None: taken out)."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    metadata = {name: value for name, value in {**metadata, **changes}.items() if value is not None}
    safetensors.torch.save_file(state, path, metadata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, "no generator file"),
        ({"format": "another"}, "no generator file"),
        ({"sha256": None}, "no generator file"),
        ({"config": "{"}, "does not know"),
        ({"config": json.dumps({"size": 3})}, "does not know"),
        ({"config": json.dumps({"resolution": 30})}, "does not know.*power of two"),
        ({"config": "[]"}, "does not know"),
        ({"config": json.dumps({"resolution": 16, "latent": 6, "width": 8, "mapping_layers": 2})}, "does not hold the weights"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_generator_is_refused(tmp_path, changes, message):
    path = tmp_path / "generator.safetensors"
    save_generator(path, Generator(TINY), {})
    rewritten(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_generator(path)
