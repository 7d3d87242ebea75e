"""A probe of the strength: it reads what is there, on images it has not seen, and nothing where there is nothing."""

import pytest
import torch
from conftest import assert_same_traces, tiny_images, tiny_network, traces

from advbn_lib.attacks import PGD
from advbn_lib.data.images import DataError
from advbn_lib.fused_bn import fuse_batch_norms, fused_layers
from advbn_lib.methods.afa import AFA
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.strength_probe import ALL, ProbeStudy, predictors_watched, probe, strength_probe

TEST = tiny_images(64, seed=1, name="tiny/test")
STUDY = ProbeStudy(strengths=(0, 4, 8), images=48, steps=2, batch_size=20)


def fused_method() -> AFA:
    network = tiny_network()
    fuse_batch_norms(network)
    return AFA(network, PGD(TEST.mean, TEST.std, 2))


def rows(images: int = 400, strengths: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """The strength and the image of each row."""
    whose = torch.arange(images).repeat(strengths)
    return torch.arange(strengths).double().repeat_interleave(images), whose


def test_a_probe_reads_a_shift_that_is_small_beside_the_spread_of_a_channel():
    strengths, whose = rows()
    features = torch.randn(len(whose), 30, dtype=torch.float64)
    features += 0.3 * strengths[:, None]
    assert probe(features, strengths, whose, 400) > 0.85


def test_a_probe_reads_nothing_where_there_is_nothing():
    strengths, whose = rows()
    assert abs(probe(torch.randn(len(whose), 30, dtype=torch.float64), strengths, whose, 400)) < 0.15


def test_what_tells_images_apart_is_no_strength():
    """Each image has features of its own, the same at every strength: learning them by heart is of no use."""
    strengths, whose = rows()
    assert abs(probe(torch.randn(400, 300, dtype=torch.float64)[whose], strengths, whose, 400)) < 0.05


def test_the_strength_is_read_from_a_network_and_nothing_stays_on_it():
    method = fused_method().train()
    before = traces(method.model)
    found = strength_probe(method, TEST, STUDY, show_progress=False)
    assert_same_traces(before, traces(method.model))
    names = [*fused_layers(method.model), ALL]
    assert list(found["probe"]) == list(found["weights"]) == names
    assert all(-1 <= value <= 1 for part in found.values() for value in part.values())
    assert set(found["weights"].values()) == {0.0}  # untrained predictors say a half of everything
    assert found == strength_probe(method, TEST, STUDY, show_progress=False)


def test_a_predictor_that_follows_is_seen_to_follow():
    """One layer's predictor is made to answer with the mean of its input, and the attack with the same."""
    method = fused_method().eval()
    name, layer = next(iter(fused_layers(method.model).items()))
    layer.predictor.register_forward_hook(lambda _, inputs, answer: inputs[0].mean(1).sigmoid())
    with predictors_watched(method) as seen, torch.no_grad():
        method.predict(TEST.normalise(TEST.images.float() / 255))
    pooled, weights = seen[name][0]
    torch.testing.assert_close(weights, pooled.mean(1).sigmoid())


def test_hooks_go_after_an_error():
    method = fused_method()
    with pytest.raises(KeyError), predictors_watched(method):
        raise KeyError
    assert not any(layer.predictor._forward_hooks for layer in fused_layers(method.model).values())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="fuse its BatchNorms first"):
        strength_probe(PlainTraining(tiny_network()), TEST, STUDY, show_progress=False)
    with pytest.raises(DataError):
        strength_probe(fused_method(), TEST, ProbeStudy(images=65), show_progress=False)


@pytest.mark.parametrize("wrong", [{"strengths": (8, 8)}, {"strengths": (-1, 2)}, {"images": 8}, {"steps": 0}])
def test_studies_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError):
        ProbeStudy(**wrong)
