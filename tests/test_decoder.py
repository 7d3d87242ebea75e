"""The decoder: what it is, what it learns, and that its training can be killed."""

from dataclasses import replace

import pytest
import torch
from conftest import assert_same_traces, data_folder, differing, tiny_images, tiny_network, traces

from advbn_lib.appearance import edge_correlation, pixel_change
from advbn_lib.data.images import ImageSet
from advbn_lib.data.loader import DeviceLoader
from advbn_lib.decoder import Autoencoder, Decoder, DecoderConfig, DecoderTraining, train_decoder
from advbn_lib.training import Schedule

QUICK = DecoderConfig(width=8, images=128, schedule=Schedule(3, 16, 0.1, warmup=0.5, weight_decay=0.0))


def smooth_images(count: int = 128, size: int = 16) -> ImageSet:
    """Images that a small decoder can learn: smooth patches of colour."""
    rough = tiny_images(count)
    small = rough.images[:, :, :4, :4].float()
    large = torch.nn.functional.interpolate(small, size=size, mode="bilinear").round().to(torch.uint8)
    return ImageSet("smooth/train", large, rough.labels, rough.classes, rough.mean, rough.std)


@pytest.mark.parametrize(("layer", "doublings"), [("relu", 0), ("layer1", 0), ("layer2", 1), ("layer3", 2)])
def test_images_come_back_in_their_own_size(layer, doublings):
    images = tiny_images(size=16)
    autoencoder = Autoencoder(tiny_network(), images, DecoderConfig(layer, width=8))
    pixels = images.images[:5].float() / 255
    features = autoencoder.encode(pixels)
    assert features.shape[2] == 16 // 2**doublings
    assert autoencoder(features).shape == pixels.shape
    decoded = autoencoder.decode(100 * features)
    assert decoded.min() >= 0 and decoded.max() <= 1 and not decoded.requires_grad


def test_features_are_the_networks_own():
    images, network = tiny_images(size=16), tiny_network().train()
    autoencoder = Autoencoder(network, images, DecoderConfig("layer2", width=8))
    pixels = images.images[:5].float() / 255
    network.eval()
    with torch.no_grad():
        x = network.relu(network.bn1(network.conv1(images.normalise(pixels))))
        expected = network.layer2(network.layer1(x))
        torch.testing.assert_close(autoencoder.encode(pixels), expected)
        torch.testing.assert_close(autoencoder.classify(pixels), network(images.normalise(pixels)))


def test_a_size_that_doubling_does_not_reach_is_refused():
    with pytest.raises(ValueError, match=r"\(15, 15\).*'layer2' is \(8, 8\).*power of two"):
        Autoencoder(tiny_network(), tiny_images(size=15), DecoderConfig("layer2"))


@pytest.mark.parametrize("wrong", [{"width": 0}, {"depth": 0}, {"tv": -1.0}])
def test_configurations_that_make_no_decoder_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        DecoderConfig(**wrong)


def test_standardised_features_have_no_mean_and_a_deviation_of_one():
    features = 3 + 2 * torch.randn(64, 5, 8, 8)
    features[:, 4] = 7.0  # a dead channel
    decoder = Decoder(5, 0)
    decoder.standardise_like(features)
    standard = (features - decoder.mean) / decoder.std
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3)), torch.tensor([1.0, 1, 1, 1, 0]), atol=1e-3, rtol=0)


def test_padding_is_by_reflection_and_upsampling_nearest():
    decoder = Decoder(2, 1, width=4)
    convolutions = [layer for layer in decoder.layers if isinstance(layer, torch.nn.Conv2d)]
    assert {layer.padding_mode for layer in convolutions} == {"reflect"} and len(convolutions) == 5
    [upsampling] = [layer for layer in decoder.layers if isinstance(layer, torch.nn.Upsample)]
    assert upsampling.mode == "nearest"
    flat = decoder(torch.ones(1, 2, 8, 8)).detach()  # with zero padding the border would differ
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat))


def test_the_loss_is_the_papers():
    images = tiny_images(size=16)
    autoencoder = Autoencoder(tiny_network(), images, QUICK)
    pixels = images.images[:6].float() / 255
    losses = DecoderTraining(autoencoder, tv=1e-3)(images.normalise(pixels), images.labels[:6])
    decoded = autoencoder(autoencoder.encode(pixels)).detach()
    error = ((decoded - pixels) ** 2).mean()
    down = (decoded[:, :, 1:] - decoded[:, :, :-1]).abs().sum()
    across = (decoded[:, :, :, 1:] - decoded[:, :, :, :-1]).abs().sum()
    torch.testing.assert_close(losses.clean, error)
    torch.testing.assert_close(losses.total, error + 1e-3 * (down + across))


def test_it_learns_to_reconstruct():
    images = smooth_images()
    longer = replace(QUICK, schedule=replace(QUICK.schedule, epochs=25, lr=0.2))
    autoencoder, history = train_decoder(tiny_network(16), images, longer, show_progress=False)
    pixels = images.images.float() / 255
    error = pixel_change(pixels, autoencoder.decode(autoencoder.encode(pixels))).mean()
    grey = pixel_change(pixels, pixels.mean((0, 2, 3), keepdim=True).expand_as(pixels)).mean()
    assert error < grey / 3
    assert history.epoch == 25 and history.losses[-1][0] < history.losses[0][0]


def test_training_touches_nothing_but_the_decoder():
    network, images = tiny_network().train(), smooth_images()
    before = traces(network)
    autoencoder, _ = train_decoder(network, images, QUICK, show_progress=False)
    assert_same_traces(before, traces(network))
    assert all(name.startswith("decoder.") for name in autoencoder.state_dict())
    assert differing(autoencoder.split.model.state_dict(), network.state_dict()) == []
    assert not any(p.requires_grad for p in autoencoder.split.model.parameters())
    assert not autoencoder.training


def test_the_seed_decides_and_the_callers_random_state_does_not():
    network, images = tiny_network(), smooth_images()
    results = []
    for seed, start in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(start)
        autoencoder, _ = train_decoder(network, images, QUICK, seed, show_progress=False)
        results.append(autoencoder.state_dict())
    assert differing(results[0], results[1]) == []
    assert differing(results[0], results[2])


def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    network, images = tiny_network(), smooth_images()
    whole, _ = train_decoder(network, images, QUICK, show_progress=False)
    epoch = DeviceLoader.epoch

    def killed(self, number, start=0):
        if number == 2:
            raise KeyboardInterrupt
        return epoch(self, number, start)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DeviceLoader, "epoch", killed)
        train_decoder(network, images, QUICK, folder=tmp_path, show_progress=False)
    random = torch.get_rng_state()
    resumed, history = train_decoder(network, images, QUICK, folder=tmp_path, show_progress=False)
    assert differing(whole.state_dict(), resumed.state_dict()) == []
    assert len(history.losses) == 3 and torch.equal(torch.get_rng_state(), random)

    monkeypatch.setattr(DeviceLoader, "epoch", lambda *_: pytest.fail("a finished training is not repeated"))
    again, _ = train_decoder(network, images, QUICK, folder=tmp_path, show_progress=False)
    assert differing(whole.state_dict(), again.state_dict()) == []


def test_another_training_has_a_checkpoint_of_its_own(tmp_path):
    network, images = tiny_network(), smooth_images()
    short = DecoderConfig(width=8, depth=1, images=64, schedule=Schedule(1, 16, 0.1))
    train_decoder(network, images, short, folder=tmp_path, show_progress=False)
    train_decoder(network, images, short, 1, tmp_path, show_progress=False)
    train_decoder(tiny_network(), images, short, folder=tmp_path, show_progress=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_gradients_go_through_the_decoder_to_features_but_not_to_the_encoder():
    images = tiny_images(size=16)
    autoencoder = Autoencoder(tiny_network(), images, QUICK)
    features = autoencoder.encode(images.images[:3].float() / 255)
    assert not features.requires_grad
    features.requires_grad_()
    autoencoder.classify(autoencoder(features)).sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(p.grad is None for p in autoencoder.split.model.parameters())


def test_photographs_come_back_from_layer1_of_the_published_network(monkeypatch):
    monkeypatch.setenv("ADVBN_DATA", str(data_folder()))
    from advbn_lib.data import load_images
    from advbn_lib.models import CifarResNet
    from advbn_lib.models.cifar_resnet import load_published_weights
    from advbn_lib.weights import published_weights

    network = CifarResNet(20)
    load_published_weights(network, published_weights("resnet20"))
    config = DecoderConfig(width=16, images=1_000, schedule=Schedule(1, 16, 0.2, warmup=0.5, weight_decay=0.0))
    autoencoder, _ = train_decoder(network, load_images("cifar10", "train"), config, show_progress=False)
    pixels = load_images("cifar10", "test").images[:128].float() / 255
    decoded = autoencoder.decode(autoencoder.encode(pixels))
    assert pixel_change(pixels, decoded).mean() < 0.13
    assert edge_correlation(pixels, decoded).mean() > 0.75
