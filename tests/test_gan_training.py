"""The training of a StyleGAN: that it learns, resumes bit for bit, and stops when it diverges."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import copy_of_state, differing, tiny_images
from PIL import Image

from advbn_lib import gan_training
from advbn_lib.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.gan_training import (
    Diverged,
    Draws,
    GANHistory,
    GANSchedule,
    as_png,
    move_average,
    new_networks,
    squared_slope,
    train_gan,
    training_key,
    training_pixels,
)
from advbn_lib.models.stylegan import Generator, GeneratorConfig

CPU = torch.device("cpu")
TINY = GeneratorConfig(resolution=8, channels=3, latent=6, width=4, mapping_layers=2)
QUICK = GANSchedule(12, batch_size=8, r1_every=4, won=1.1, lost=-0.1)  # far too short to say who wins


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    """So that short trainings look at their losses more than once."""
    monkeypatch.setattr(gan_training, "LOOK_EVERY", 4)


def two_colours(count: int = 64, seed: int = 0) -> ImageSet:
    """Flat red and flat blue pictures of 8x8 pixels, with some noise."""
    pixels = torch.zeros(count, 3, 8, 8)
    pixels[: count // 2, 0], pixels[count // 2 :, 2] = 200, 200
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed))
    pixels = (pixels + 20 * noise).to(torch.uint8)
    return ImageSet("two/train", pixels, torch.zeros(count, dtype=torch.int64), ("any",), (0.5,) * 3, (0.25,) * 3)


def trained(schedule: GANSchedule = QUICK, seed: int = 0, images: ImageSet | None = None, **options):
    return train_gan(images or two_colours(), TINY, schedule, seed, show_progress=False, **options)


def all_of(result) -> dict[str, torch.Tensor]:
    parts = {"generator": result.generator, "discriminator": result.discriminator}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


# ---- what it learns ------------------------------------------------------------------------


def test_it_learns_the_colours():
    schedule = GANSchedule(200, batch_size=16, lr=5e-3, r1=0.1, r1_every=4, average=500)
    result = trained(schedule)
    with torch.no_grad():
        pictures = result.generator.images(result.generator.wplus(result.generator.mapping(torch.randn(64, 6))))
    red, green, blue = pictures.mean((2, 3)).T
    assert green.mean() < 0.15
    assert ((red - blue).abs() > 0.3).float().mean() > 0.8  # mostly one colour or the other, hardly their mean
    assert result.history.step == 200 and len(result.history.curves["generator_loss"]) == 50


def test_two_trainings_are_one_and_other_seeds_are_others():
    images = two_colours()
    first, again, other = (trained(images=images, seed=seed) for seed in (0, 0, 1))
    assert differing(all_of(first), all_of(again)) == []
    assert first.history.curves == again.history.curves
    assert differing(all_of(first), all_of(other)) != []


def test_torchs_random_state_is_left_alone():
    before = torch.get_rng_state()
    trained(sample_every=4, after_samples=lambda step, pictures: None)
    assert torch.equal(before, torch.get_rng_state())


def test_every_parameter_is_trained():
    generator, discriminator = new_networks(TINY, 0, CPU)
    before = {"generator": copy_of_state(generator), "discriminator": copy_of_state(discriminator)}
    optimizers = [torch.optim.Adam(net.parameters(), 1e-3) for net in (generator, discriminator)]
    pixels = training_pixels(two_colours(), TINY)
    for step in range(2):  # in the first one noise has no strength and styles no bias to give a gradient to
        gan_training.gan_step(generator, discriminator, optimizers, pixels, QUICK, 0, step)
    assert set(differing(copy_of_state(generator), before["generator"])) == set(generator.state_dict())
    assert set(differing(copy_of_state(discriminator), before["discriminator"])) == set(discriminator.state_dict())
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_the_penalty_is_the_squared_gradient():
    weight = torch.randn(3 * 8 * 8)
    pictures = torch.randn(5, 3, 8, 8, requires_grad=True)
    penalty = squared_slope((pictures.flatten(1) @ weight).tanh(), pictures)
    factor = 1 - (pictures.flatten(1) @ weight).tanh().square()
    torch.testing.assert_close(penalty, (factor.square() * weight.square().sum()).mean())
    assert penalty.requires_grad


def test_the_penalty_is_applied_as_often_as_said_with_that_weight(monkeypatch):
    weights, losses = [], []
    monkeypatch.setattr(
        gan_training, "squared_slope", lambda logits, pictures: weights.append(1) or logits.sum() * 0 + 7
    )
    monkeypatch.setattr(gan_training, "update", lambda optimizer, loss: losses.append(loss.item()))
    trained(replace(QUICK, r1=3.0))
    assert len(weights) == 12 // 4
    discriminator_losses = torch.tensor(losses[::2])
    due = torch.arange(12) % 4 == 0
    without = discriminator_losses[~due].mean()
    torch.testing.assert_close(discriminator_losses[due] - 4 * 3.0 / 2 * 7, without.expand(3), rtol=0.2, atol=0.5)


@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_styles_cross_over_once(mixing):
    generator = Generator(replace(TINY, resolution=32))
    w, styles = Draws(0, 0, CPU, 400).styles(generator, mixing)
    first, second = w.chunk(2)
    from_first = (styles == first[:, None]).all(2)
    from_second = (styles == second[:, None]).all(2)
    assert (from_first ^ from_second).all()
    cuts = from_first.sum(1)
    assert torch.equal(from_first, torch.arange(8) < cuts[:, None])  # the first w up to the cut, the second from there
    assert cuts.unique().tolist() == ([8] if mixing == 0 else [1, 2, 3, 4, 5, 6, 7])


def test_a_share_of_styles_is_mixed():
    _, styles = Draws(0, 0, CPU, 2000).styles(Generator(TINY), 0.3)
    mixed = (styles[:, 0] != styles[:, -1]).any(1).float().mean()
    assert mixed == pytest.approx(0.3, abs=0.05)


def test_real_pictures_are_those_of_the_set():
    images = tiny_images(8, 12)
    drawn = Draws(0, 0, CPU, 500).real(images.images, mirror=False)
    pixels = ((drawn + 1) * 127.5).round().to(torch.uint8)
    numbers = (pixels[:, None] == images.images).flatten(2).all(2)
    assert (numbers.sum(1) == 1).all() and numbers.any(0).all()
    mirrored = Draws(0, 0, CPU, 500).real(images.images, mirror=True)
    turned = (mirrored != drawn).flatten(1).any(1)
    assert torch.equal(mirrored[turned], drawn[turned].flip(3)) and 0.4 < turned.float().mean() < 0.6


def test_the_moving_average_has_the_half_life_asked_for():
    average, generator = Generator(TINY), Generator(TINY)
    for parameter in average.parameters():
        torch.nn.init.zeros_(parameter)
    for parameter in generator.parameters():
        torch.nn.init.ones_(parameter)
    for step in range(10_000, 10_010):  # late: the short half-life of the start is over
        move_average(average, generator, replace(QUICK, average=80), step)  # ten steps of 8
    torch.testing.assert_close(average.constant, torch.full_like(average.constant, 0.5))
    assert torch.equal(average.mean_w, generator.mean_w)


# ---- checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("killed_at", [4, 8])
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path, monkeypatch, killed_at):
    images = two_colours()
    whole = trained(images=images)

    def save_and_die(path, parts, progress, key):
        save_checkpoint(path, parts, progress, key)
        if path.name.startswith("gan-") and progress["step"] == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gan_training, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            trained(images=images, folder=tmp_path, save_every=0.0)
    torch.rand(7)  # another process has another random state
    steps = []
    monkeypatch.setattr(gan_training, "move_average", lambda *a: steps.append(a[3]) or move_average(*a))
    resumed = trained(images=images, folder=tmp_path)
    assert steps == list(range(killed_at, 12))
    assert differing(all_of(whole), all_of(resumed)) == []
    assert whole.history.curves == resumed.history.curves


def test_a_finished_training_is_not_trained_again(tmp_path, monkeypatch):
    first = trained(folder=tmp_path, images=two_colours())
    monkeypatch.setattr(gan_training, "gan_step", lambda *a: pytest.fail("it trains again"))
    again = trained(folder=tmp_path, images=two_colours())
    assert differing(all_of(first), all_of(again)) == []
    assert again.history.curves == first.history.curves


def test_each_training_has_its_own_checkpoint():
    images = two_colours()
    keys = {
        training_key(images, TINY, QUICK, 0),
        training_key(images, TINY, QUICK, 1),
        training_key(images, TINY, replace(QUICK, lr=1e-4), 0),
        training_key(images, replace(TINY, width=5), QUICK, 0),
        training_key(two_colours(seed=1), TINY, QUICK, 0),
    }
    assert len(keys) == 5


def test_a_damaged_checkpoint_is_refused(tmp_path):
    images = two_colours()
    trained(folder=tmp_path, images=images)
    (path,) = tmp_path.glob("gan-*.pt")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        trained(folder=tmp_path, images=images)


# ---- divergence ----------------------------------------------------------------------------


def poisoned_from(step: int, monkeypatch) -> None:
    """From this step on the generator's weights are NaN."""
    original = gan_training.gan_step

    def gan_step(generator, *arguments):
        if arguments[-1] == step:
            with torch.no_grad():
                generator.constant.fill_(math.nan)
        return original(generator, *arguments)

    monkeypatch.setattr(gan_training, "gan_step", gan_step)


def test_nan_stops_the_training_and_the_last_good_state_is_kept(tmp_path, monkeypatch):
    images = two_colours()
    up_to_8 = trained(replace(QUICK, steps=8), images=images)
    poisoned_from(9, monkeypatch)
    with pytest.raises(Diverged, match="NaN or infinite, at step 12.*in order after step 8.*kept in good-") as caught:
        trained(folder=tmp_path, save_every=0.0, images=images)
    assert caught.value.step == 8
    assert differing(caught.value.generator.state_dict(), up_to_8.generator.state_dict()) == []
    (path,) = tmp_path.glob("gan-*.pt")
    state = read_checkpoint(path)
    assert state["progress"]["step"] == 8
    assert differing(state["parts"]["average"], up_to_8.generator.state_dict()) == []


@pytest.mark.parametrize("broken", [0, 1], ids=("generator", "discriminator"))
def test_a_weight_that_breaks_in_the_last_step_before_a_look_is_not_kept(tmp_path, monkeypatch, broken):
    """The losses of that step are still in order: they were computed before."""
    original = gan_training.gan_step

    def gan_step(*arguments):
        figures = original(*arguments)
        if arguments[-1] == 7:
            with torch.no_grad():
                next(arguments[broken].parameters()).fill_(math.inf)
        return figures

    monkeypatch.setattr(gan_training, "gan_step", gan_step)
    with pytest.raises(Diverged, match="a weight is NaN or infinite, at step 8.*in order after step 4"):
        trained(folder=tmp_path, save_every=0.0)
    for path in tmp_path.glob("*.pt"):
        state = read_checkpoint(path)
        assert state["progress"]["step"] == 4
        assert all(bool(value.isfinite().all()) for value in state["parts"]["average"].values())


def test_a_real_divergence_is_noticed():
    """No patched step: a learning rate with which the weights blow up."""
    with pytest.raises(Diverged) as caught:
        trained(replace(QUICK, steps=400, lr=1e18))
    assert all(bool(torch.isfinite(value).all()) for value in caught.value.generator.state_dict().values())


def test_a_discriminator_that_wins_for_good_stops_the_training(tmp_path, monkeypatch):
    """The generator does not learn, the discriminator does."""
    original = gan_training.update
    state = {"calls": 0}

    def update(optimizer, loss):
        state["calls"] += 1
        if state["calls"] % 2:
            original(optimizer, loss)

    monkeypatch.setattr(gan_training, "update", update)
    schedule = replace(QUICK, steps=2000, lr=1e-2, r1=0.0, won=0.99, lost=0.5, patience=40)
    with pytest.raises(Diverged, match="discriminator has won: at least 99.0% .* for 40 steps") as caught:
        trained(schedule, folder=tmp_path, save_every=0.0)
    (checkpoint,), (good,) = (list(tmp_path.glob(f"{name}-*.pt")) for name in ("gan", "good"))
    progress = read_checkpoint(checkpoint)["progress"]
    assert progress["step"] > caught.value.step and progress["won"] > 0  # a streak is no reason to lose the way so far
    kept = read_checkpoint(good)
    assert kept["progress"]["step"] == caught.value.step
    assert differing(kept["parts"]["average"], caught.value.generator.state_dict()) == []
    # Taken up again in the streak, it ends in the same way, with the same generator.
    state["calls"] -= state["calls"] % 2
    with pytest.raises(Diverged) as again:
        trained(schedule, folder=tmp_path, save_every=0.0)
    assert again.value.step == caught.value.step
    assert differing(again.value.generator.state_dict(), caught.value.generator.state_dict()) == []


def test_a_discriminator_that_loses_for_good_stops_the_training(monkeypatch):
    """The discriminator does not learn: it says the same of all pictures."""
    monkeypatch.setattr(gan_training, "update", lambda optimizer, loss: None)
    made = Generator.synthesis
    monkeypatch.setattr(Generator, "synthesis", lambda *a: 0 * made(*a) - 1)
    black = two_colours()
    black.images.zero_()
    with pytest.raises(Diverged, match="discriminator has lost: at most 53.0% .* for 20 steps"):
        trained(replace(QUICK, steps=200, won=0.999, lost=0.53, patience=20), images=black)


def test_streaks_are_broken_by_one_good_stretch():
    history, schedule = GANHistory(), replace(QUICK, won=0.999, lost=0.53, patience=8)
    won, even, lost = (torch.tensor([1.0, 1.0, *right]) for right in ((1, 1), (0.8, 0.7), (1, 0)))
    assert history.healthy
    assert history.add([won] * 4, schedule) is None and not history.healthy
    assert history.add([even] * 4, schedule) is None and history.healthy
    assert history.add([lost] * 4, schedule) is None and not history.healthy
    assert history.add([won] * 4, schedule) is None and (history.won, history.lost) == (4, 0)
    assert "has won" in history.add([won] * 4, schedule)
    assert history.curves["real_right"] == pytest.approx([1, 0.8, 1, 1, 1])


# ---- samples, and what is refused ----------------------------------------------------------


def test_samples_are_shown_and_written_as_it_goes(tmp_path):
    seen = {}
    result = trained(
        folder=tmp_path, sample_every=5, after_samples=lambda step, pictures: seen.update({step: pictures})
    )
    assert list(seen) == [5, 10, 12]
    assert all(pictures.shape == (64, 3, 8, 8) for pictures in seen.values())
    files = sorted(path.name for path in tmp_path.glob("*.png"))
    assert files == ["samples-0000005.png", "samples-0000010.png", "samples-0000012.png"]
    written = np.asarray(Image.open(tmp_path / files[-1]))
    first = seen[12][0].permute(1, 2, 0).numpy() * 255  # behind a border of one pixel
    assert np.abs(written[1:9, 1:9] - first).max() <= 0.5 + 1e-4
    assert not result.generator.training and not seen[12].requires_grad


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained()
    assert list(tmp_path.iterdir()) == []


def test_a_grey_generator():
    images = two_colours()
    grey = replace(images, images=images.images[:, :1].repeat(1, 3, 1, 1))
    config = replace(TINY, channels=1)
    assert torch.equal(training_pixels(grey, config), images.images[:, :1])
    result = train_gan(grey, config, QUICK, 0, show_progress=False)
    assert result.generator(torch.randn(2, 6)).shape == (2, 1, 8, 8)
    picture = Image.open(io.BytesIO(as_png(torch.rand(4, 1, 8, 8))))
    assert picture.size == (37, 10)


def test_a_class_without_a_picture_is_refused():
    images = replace(two_colours(), classes=("any", "none of these"))
    with pytest.raises(DataError, match="no image of none of these"):
        trained(images=images)


@pytest.mark.parametrize(
    ("size", "channels", "message"),
    [(16, 3, "16x16, but the generator's resolution is 8"), (8, 1, "coloured, but the generator is grey")],
)
def test_pictures_that_do_not_fit_are_refused(size, channels, message):
    images = two_colours()
    images = replace(images, images=images.images.repeat(1, 1, size // 8, size // 8))
    with pytest.raises(DataError, match=message):
        train_gan(images, replace(TINY, channels=channels), QUICK, 0, show_progress=False)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": 1}, {"lr": 0.0}, {"lr": math.nan}, {"r1": -1.0}, {"r1_every": 0}, {"mixing": 1.1},
     {"average": 0}, {"w_decay": 1.0}, {"won": 0.5, "lost": 0.6}, {"patience": 0}],
)  # fmt: skip
def test_schedules_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(QUICK, **wrong)
