"""The CIFAR networks, and the published weights for them."""

import hashlib

import pytest
import torch
from conftest import data_folder

from advbn_lib import split_at, weights
from advbn_lib.data import DataError
from advbn_lib.models import CifarResNet, load_published_weights, resnet18_for_cifar
from advbn_lib.models.cifar_resnet import PadShortcut
from advbn_lib.running import new_network
from advbn_lib.weights import published_weights


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_has_the_papers_number_of_parameters(depth, parameters):
    """He et al., CVPR 2016, table 6, in millions."""
    assert count(CifarResNet(depth)) / 1e6 == pytest.approx(parameters, abs=0.04)


@pytest.mark.parametrize("depth", [0, 2, 7, 18, 21, -4])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth):
    with pytest.raises(ValueError, match=rf"6n\+2.*got {depth}"):
        CifarResNet(depth)


def test_stages_halve_the_size_and_double_the_channels():
    model, x = CifarResNet(8, width=4, num_classes=7).eval(), torch.randn(2, 3, 32, 32)
    shapes = {
        layer: tuple(split_at(model, layer, x).features(x).shape) for layer in ("relu", "layer1", "layer2", "layer3")
    }
    assert shapes == {
        "relu": (2, 4, 32, 32),
        "layer1": (2, 4, 32, 32),
        "layer2": (2, 8, 16, 16),
        "layer3": (2, 16, 8, 8),
    }
    assert model(x).shape == (2, 7)


def test_the_shortcut_takes_every_second_pixel_and_adds_channels_of_zeros():
    x = torch.randn(2, 4, 6, 6)
    out = PadShortcut(4)(x)
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert not out[:, :2].any() and not out[:, 6:].any()


def test_resnet18_for_small_images_keeps_their_size_to_the_first_stage():
    model, x = resnet18_for_cifar().eval(), torch.randn(2, 3, 32, 32)
    assert split_at(model, "layer1", x).features(x).shape == (2, 64, 32, 32)
    assert model(x).shape == (2, 10)


def test_networks_are_made_by_name():
    assert count(new_network("resnet20")) == count(CifarResNet(20))
    assert count(new_network("resnet18")) == count(resnet18_for_cifar())


def released_file(model: CifarResNet, path) -> None:
    """Under the names that the released files have."""
    state = {f"module.{name}".replace("fc.", "linear."): value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, path)


def test_released_weights_are_loaded_all(tmp_path):
    given, model = CifarResNet(8), CifarResNet(8)
    released_file(given, tmp_path / "w.th")
    load_published_weights(model, tmp_path / "w.th")
    for name, value in given.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize(
    "other",
    [CifarResNet(14), CifarResNet(8, width=8), CifarResNet(8, num_classes=5)],
    ids=["deeper", "wider", "classes"],
)
def test_weights_of_another_network_are_refused_and_nothing_is_loaded(tmp_path, other):
    released_file(other, tmp_path / "w.th")
    model = CifarResNet(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="w.th is for another network.*e.g. "):
        load_published_weights(model, tmp_path / "w.th")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def website(tmp_path, monkeypatch):
    """A folder with a network's weights where they would be downloaded from."""
    content = b"weights"
    name = f"resnet20-{hashlib.sha256(content).hexdigest()[:8]}.th"
    monkeypatch.setattr(weights, "PUBLISHED", {"resnet20": name})
    monkeypatch.setattr(weights, "SOURCE", (tmp_path / "site").as_uri())
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / name).write_bytes(content)
    return tmp_path / "site" / name


def test_weights_are_downloaded_once(website, tmp_path):
    path = published_weights("resnet20", tmp_path / "data")
    assert path.read_bytes() == b"weights"
    website.unlink()
    assert published_weights("resnet20", tmp_path / "data") == path


def test_damaged_weights_are_named_with_a_way_to_mend_them(website, tmp_path):
    path = published_weights("resnet20", tmp_path / "data")
    path.write_bytes(b"weighty")
    with pytest.raises(DataError, match=f"{path} is damaged.*remove it"):
        published_weights("resnet20", tmp_path / "data")


@pytest.mark.parametrize("site", ["missing", "another file"])
def test_weights_that_cannot_be_downloaded_are_named_and_no_half_is_left(website, tmp_path, site):
    website.unlink() if site == "missing" else website.write_bytes(b"captive portal")
    with pytest.raises(DataError, match=f"{website.name} is missing and could not be downloaded.*put the file there"):
        published_weights("resnet20", tmp_path / "data")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_there_are_no_published_weights_for_other_networks():
    with pytest.raises(ValueError, match="'resnet8'.*resnet20"):
        published_weights("resnet8")


@pytest.mark.parametrize("network", weights.PUBLISHED)
def test_the_real_released_weights_fit(network):
    load_published_weights(new_network(network), published_weights(network, data_folder()))
