"""AdvMix and its controls."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_traces, tiny_images, traces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advbn_lib.attacks import PGD
from advbn_lib.methods import advbn, advmix
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.methods.advmix import (
    AdvMix,
    GreyTraining,
    Mixup,
    OnImages,
    RandMix,
    Recolour,
    Reconstruction,
    jensen_shannon,
)
from advbn_lib.methods.afa import AFA
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.methods.pgd_training import PGDTraining
from advbn_lib.mixing import ColourDecoder, Encoded, MixingLoader
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.style_mix import StyleBank
from advbn_lib.training import Schedule, train

MEAN = STD = (0.5, 0.5, 0.5)
MIXED = {
    "advmix": AdvMix, "randmix": RandMix, "reconstruction": Reconstruction, "recolour": Recolour,
}  # fmt: skip


def coloured(count: int = 12, size: int = 8) -> tuple[Encoded, torch.Tensor, StyleBank]:
    content, style = torch.rand(count, 1, size, size), torch.rand(count, 3)
    images = (ColourDecoder().decode(content, style) - 0.5) / 0.5
    batch = Encoded(images, content, style, torch.arange(count))
    labels = torch.arange(count) % 10
    return batch, labels, StyleBank(style, labels, (0.0, 1.0))


def network() -> DigitCNN:
    return DigitCNN(2, 10, 8)


def make(kind, bank, model=None, **options):
    return kind(model or network(), ColourDecoder(), bank, MEAN, STD, **options)


def test_the_loop_is_the_one_that_advbn_runs():
    assert advbn.ascend is advmix.worst_style.__globals__["ascend"]
    assert ".backward(" not in inspect.getsource(advmix) and "autograd.grad" not in inspect.getsource(advmix)


@pytest.mark.parametrize("kind", MIXED.values(), ids=MIXED)
def test_mixed_images_keep_their_content_and_have_the_chosen_colour(kind):
    batch, labels, bank = coloured()
    method = make(kind, bank)
    grey, colour = ColourDecoder().encode(method.mix(batch, labels) * 0.5 + 0.5, tolerance=1e-5)
    top = batch.content.amax((1, 2, 3), keepdim=True)
    assert torch.allclose(grey, batch.content / top, atol=1e-4), "the same digit"
    own = (colour - batch.style * top[:, 0, 0]).abs().amax(1) < 1e-5
    assert bool(own.all() if kind is Reconstruction else not own.any())


def test_advmix_does_at_least_as_much_harm_as_its_controls():
    torch.manual_seed(1)
    batch, labels, bank = coloured(200)
    model = network().eval()
    losses = {}
    for name, method in {
        "one": make(RandMix, bank, model), "looks": make(RandMix, bank, model, looks=5),
        "advmix": make(AdvMix, bank, model, restarts=5),
    }.items():  # fmt: skip
        torch.manual_seed(2)
        losses[name] = cross_entropies(model(method.mix(batch, labels)), labels).mean().item()
    assert losses["one"] < losses["looks"] < losses["advmix"]


@pytest.mark.parametrize("kind", MIXED.values(), ids=MIXED)
def test_mixing_leaves_no_trace_in_the_model(kind):
    batch, labels, bank = coloured()
    model = network()
    model.train()
    method = make(kind, bank, model)
    state = torch.get_rng_state()
    before = traces(model)
    mixed = method.mix(batch, labels)
    assert not mixed.requires_grad
    torch.set_rng_state(state)
    assert_same_traces(before, traces(model))


def test_the_loss_is_the_weighted_sum_that_the_options_say():
    batch, labels, bank = coloured()
    for clean_weight, consistency in ((0.5, 0.0), (0.0, 0.0), (0.25, 1.0), (0.0, 1.0)):
        model = network().eval()
        method = make(Reconstruction, bank, model, clean_weight=clean_weight, consistency=consistency)
        losses = method(batch, labels)
        mixed = model(method.mix(batch, labels))
        clean = model(batch.images)
        wanted = clean_weight * F.cross_entropy(clean, labels) + (1 - clean_weight) * F.cross_entropy(mixed, labels)
        wanted = wanted + consistency * jensen_shannon(clean, mixed).mean()
        assert torch.allclose(losses.total, wanted, atol=1e-6)
        assert torch.allclose(losses.adversarial, F.cross_entropy(mixed, labels))


def test_without_a_clean_weight_no_real_image_is_seen():
    batch, labels, bank = coloured()
    broken = Encoded(torch.full_like(batch.images, float("nan")), batch.content, batch.style, batch.places)
    assert torch.isfinite(make(AdvMix, bank, clean_weight=0.0)(broken, labels).total)
    assert torch.isnan(make(AdvMix, bank, clean_weight=0.5)(broken, labels).total)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(0.1, 30))
def test_jensen_shannon_is_symmetric_and_from_0_to_log_2(seed, size):
    first, second = size * torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
    found = jensen_shannon(first, second)
    assert torch.allclose(found, jensen_shannon(second, first), atol=1e-5)
    assert bool(((found >= -1e-6) & (found <= 0.693148)).all())
    p, q = first.double().softmax(1), second.double().softmax(1)
    middle = (p + q) / 2
    wanted = 0.5 * ((p * (p / middle).log()).nan_to_num().sum(1) + (q * (q / middle).log()).nan_to_num().sum(1))
    assert torch.allclose(found.double(), wanted, atol=1e-4)


def test_only_the_model_is_trained_and_saved():
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def decode(self, content, style):
            return (content * self.layer(style)[:, :, None, None]).sigmoid()

    batch, labels, bank = coloured()
    decoder, model = Trained(), network()
    method = AdvMix(model, decoder, bank, MEAN, STD)
    method(batch, labels).total.backward()
    assert all(p.grad is None for p in decoder.parameters()) and all(p.grad is not None for p in model.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {"model"}
    assert len(method.trainable_parameters()) == len(list(model.parameters()))


def test_mixup_is_the_weighted_mean_of_two_images_and_of_their_losses(monkeypatch):
    batch, labels, _ = coloured()
    model = network().eval()
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n).flip(0))
    torch.manual_seed(3)
    share = torch.distributions.Beta(torch.tensor(1.0), torch.tensor(1.0)).sample()
    torch.manual_seed(3)
    found = Mixup(model)(batch.images, labels).total
    answers = model(share * batch.images + (1 - share) * batch.images.flip(0))
    wanted = share * F.cross_entropy(answers, labels) + (1 - share) * F.cross_entropy(answers, labels.flip(0))
    assert torch.allclose(found, wanted, atol=1e-6) and 0 < share < 1


def test_the_grey_model_cannot_tell_colours_of_the_same_lightness():
    content = torch.rand(4, 1, 8, 8)
    red, green = (torch.tensor(values).expand(4, 3) for values in ((0.587, 0.0, 0.0), (0.0, 0.299, 0.0)))
    first, second = ((ColourDecoder().decode(content, colour) - 0.5) / 0.5 for colour in (red, green))
    model = network().eval()
    method = GreyTraining(model, MEAN, STD)
    assert torch.allclose(method.predict(first), method.predict(second), atol=1e-5)
    assert not torch.allclose(model(first), model(second), atol=1e-3)
    labels = torch.arange(4)
    assert torch.allclose(method(first, labels).total, F.cross_entropy(method.predict(first), labels))


def test_methods_on_images_see_the_images_of_the_batch():
    batch, labels, _ = coloured()
    model = network().eval()
    plain = OnImages(PlainTraining(model))
    assert torch.equal(plain(batch, labels).total, F.cross_entropy(model(batch.images), labels))
    linf = OnImages(PGDTraining(model, PGD(MEAN, STD, 2, 1.0), 25.5, 0.5))
    assert linf(batch, labels).adversarial > plain(batch, labels).clean
    grey = OnImages(GreyTraining(model, MEAN, STD))
    assert torch.equal(grey.predict(batch.images), GreyTraining(model, MEAN, STD).predict(batch.images))
    fused = AFA(network(), PGD(MEAN, STD, 2, 1.0)).eval()
    assert torch.equal(OnImages(fused).predict(batch.images), fused.predict(batch.images, "fused"))
    assert torch.equal(OnImages(fused).predict(batch.images, "clean"), fused.predict(batch.images, "clean"))


@pytest.mark.parametrize("kind", MIXED.values(), ids=MIXED)
def test_training_runs_through_the_one_loop_and_learns(kind):
    torch.manual_seed(0)
    images = tiny_images(80, size=16)
    content, style = images.images[:, :1], images.images.float().mean((2, 3)) / 255
    method = make(kind, StyleBank(style, images.labels, (0.0, 1.0)), DigitCNN(2, 10, 16))
    loader = MixingLoader(images, content, style, 16, 0)
    history = train(method, loader, Schedule(4, 16, 0.05), show_progress=False, precision=torch.float32)
    assert len(history.losses) == 4 and history.losses[-1][0] < history.losses[0][0]


@pytest.mark.parametrize(
    "make_it, says",
    [
        (lambda bank: make(AdvMix, bank, eps=-1.0), "eps"),
        (lambda bank: make(AdvMix, bank, steps=0), "at least 1 step"),
        (lambda bank: make(AdvMix, bank, restarts=0), "at least 1 other image"),
        (lambda bank: make(RandMix, bank, looks=0), "at least 1 other image"),
        (lambda bank: make(AdvMix, bank, clean_weight=1.0), "PlainTraining"),
        (lambda bank: make(AdvMix, bank, consistency=-1.0), "consistency"),
        (lambda bank: Mixup(network(), 0.0), "alpha"),
        (lambda bank: DigitCNN(4, 10, 30), "multiple of 8"),
        (lambda bank: DigitCNN(4)(torch.rand(2, 3, 64, 64)), "resize or pad"),
        (lambda bank: DigitCNN(4)(torch.rand(2, 1, 32, 32)), "N,3,32,32"),
    ],
)
def test_bad_input_is_refused(make_it, says):
    with pytest.raises(ValueError, match=says):
        make_it(coloured()[2])
