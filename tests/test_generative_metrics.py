"""FID, KID, precision and recall where the right answer is known."""

import math

import pytest
import torch
from conftest import assert_same_traces, tiny_images, tiny_network, traces
from hypothesis import given, settings
from hypothesis import strategies as st

from advbn_lib.data.images import DataError
from advbn_lib.generative_metrics import (
    classifier_features,
    collect,
    compare,
    fid,
    kid,
    made_pictures,
    precision_recall,
    quality,
    real_pictures,
)
from advbn_lib.models.stylegan import Generator, GeneratorConfig

TINY = GeneratorConfig(resolution=16, latent=6, width=4, mapping_layers=2)


def cloud(count: int, features: int = 4, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(count, features, dtype=torch.double) + shift


def exactly(features: torch.Tensor, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """The features moved so that their sample mean is ``mean`` and their sample covariance ``root @ root.T``."""
    centred = features - features.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(centred.T.cov()), centred.T, upper=False).T
    return white @ root.T + mean


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_fid_is_the_distance_of_the_two_normal_distributions(seed):
    torch.manual_seed(seed)
    means, roots = torch.randn(2, 3, dtype=torch.double), torch.randn(2, 3, 3, dtype=torch.double)
    real, made = (exactly(cloud(40, 3), mean, root) for mean, root in zip(means, roots))
    first, second = (root @ root.T for root in roots)
    # The symmetric form of the same trace: tr (A^1/2 B A^1/2)^1/2, by eigenvalues of symmetric matrices alone.
    values, vectors = torch.linalg.eigh(first)
    half = vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(half @ second @ half).clamp_min(0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + first.trace() + second.trace() - 2 * cross
    assert fid(real, made) == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)


def test_fid_of_scaled_and_shifted_features():
    """For made = a * real + b with covariance I: F * ((1 - a)**2 + b**2), by hand."""
    real = exactly(cloud(50), torch.zeros(4, dtype=torch.double), torch.eye(4, dtype=torch.double))
    assert fid(real, real) == pytest.approx(0, abs=1e-6)
    assert fid(real, 3 * real) == pytest.approx(4 * 4)
    assert fid(real, real + 2) == pytest.approx(4 * 4)
    assert fid(real, 1.5 * real + 1) == pytest.approx(4 * (0.25 + 1))


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def test_kid_of_all_pictures_is_the_u_statistic():
    real, made = cloud(30), cloud(30, shift=0.5)
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    within = sum((kernel(x, x)[i, j] for x in (real, made) for i, j in pairs)) / len(pairs)
    expected = within - 2 * kernel(real, made).mean()
    mean, deviation = kid(real, made, subsets=3)
    assert mean == pytest.approx(expected.item()) and deviation == pytest.approx(0, abs=1e-9)


def test_kid_is_unbiased():
    """Over many draws of few pictures its mean is the true value, 0 here; the biased estimate is far above."""
    draws = [(cloud(8, 2), cloud(8, 2)) for _ in range(400)]
    values = torch.tensor([kid(real, made, subsets=1)[0] for real, made in draws])
    error = values.std() / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * error
    biased = [kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean() for x, y in draws]
    assert torch.stack(biased).mean() > 20 * error  # so the test above could have failed


def test_kid_of_a_shift_is_the_true_one():
    """One feature, kernel (xy + 1)**3, real N(0,1), made N(m,1): the squared differences of the first three moments, weighted."""
    m = 0.7
    moments = [m, m**2, m**3 + 3 * m]  # E made**k - E real**k
    expected = 3 * moments[0] ** 2 + 3 * moments[1] ** 2 + moments[2] ** 2
    found, spread = kid(cloud(20_000, 1), cloud(20_000, 1, shift=m), subsets=40, subset_size=500)
    assert found == pytest.approx(expected, abs=5 * spread / math.sqrt(40))


def test_kid_is_repeatable_and_leaves_torchs_random_state():
    real, made = cloud(60), cloud(60)
    before = torch.get_rng_state()
    values = [kid(real, made, subsets=5, subset_size=20, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert torch.equal(before, torch.get_rng_state())


def test_precision_and_recall_of_known_sets():
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, 100.0], [100.0, 100.0]], dtype=torch.double)
    real = torch.cat([mode + cloud(50, 2) for mode in modes])
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 1e4) == (0, 0)
    # Half of the modes, each made picture a copy of a real one: all look real, half of the real ones are out of reach.
    assert precision_recall(real, real[:100]) == (1, 0.5)
    # All modes, and as many pictures far from any.
    junk = cloud(200, 2) + 1e4
    assert precision_recall(real, torch.cat([real, junk])) == (0.5, 1)


def test_precision_and_recall_change_roles_with_the_sets():
    real, made = cloud(150), cloud(90, scale=0.5)
    precision, recall = precision_recall(real, made)
    assert precision_recall(made, real) == (recall, precision)
    assert precision > recall  # narrow in the middle of wide: it looks real, but does not reach everything


def test_precision_against_the_definition():
    real, made, k = cloud(25, 2), cloud(20, 2, scale=1.5), 3
    inside = [
        any((point - centre).norm() <= (real - centre).norm(dim=1).sort().values[k] for centre in real)
        for point in made
    ]
    assert precision_recall(real, made, k)[0] == pytest.approx(sum(inside) / 20)
    assert 0 < sum(inside) < 20


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="same layer"):
        fid(cloud(30, 4), cloud(30, 5))
    with pytest.raises(ValueError, match="4 features needs more pictures.*got 4 real and 30"):
        fid(cloud(4), cloud(30))
    with pytest.raises(ValueError, match="at least 2"):
        kid(cloud(1), cloud(30))
    with pytest.raises(ValueError, match="neighbours is from 1"):
        precision_recall(cloud(3), cloud(30))
    broken = cloud(30)
    broken[3, 1] = float("nan")
    for measure in (fid, kid, precision_recall):
        with pytest.raises(ValueError, match="NaN or infinite"):
            measure(cloud(30), broken)


# ---- of pictures ---------------------------------------------------------------------------


def test_features_are_those_of_the_classifier_and_leave_no_trace():
    images, network = tiny_images(size=16), tiny_network().train()
    before = traces(network)
    found = collect(classifier_features(network, "layer2", images), real_pictures(images, 50))
    assert_same_traces(before, traces(network))
    network.eval()
    with torch.no_grad():
        x = network.relu(network.bn1(network.conv1(images.normalise(images.images.float() / 255))))
        expected = network.layer2(network.layer1(x)).mean((2, 3))
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_quality_of_a_generator(channels):
    images, generator = tiny_images(size=16), Generator(GeneratorConfig(16, channels, 6, 4, 2))
    features = classifier_features(tiny_network(), "layer1", images)
    found = quality(features, images, generator, 60, seed=3)
    assert set(found) == {"fid", "kid", "kid_std", "precision", "recall"}
    assert found == quality(features, images, generator, 60, seed=3)
    assert found["fid"] > 0 and 0 <= found["precision"] <= 1 and 0 <= found["recall"] <= 1
    halves = collect(features, real_pictures(images)).chunk(2)
    assert compare(*halves)["fid"] < found["fid"]


def test_made_pictures_are_as_many_as_asked_for_and_the_same_again():
    generator = Generator(TINY)
    first, again = (torch.cat(list(made_pictures(generator, 25, 0, batch_size=10))) for _ in range(2))
    assert first.shape == (25, 3, 16, 16) and torch.equal(first, again) and not first.requires_grad
    assert 0 <= first.min() and first.max() <= 1
    mean_picture = torch.cat(list(made_pictures(generator, 3, 0, psi=0.0)))
    torch.testing.assert_close(mean_picture[0], mean_picture[1], rtol=0, atol=1e-5)  # noise has no strength yet


def test_pictures_of_another_size_are_refused():
    images = tiny_images(size=12)
    with pytest.raises(DataError, match="12x12, but the generator makes 16x16"):
        quality(lambda pictures: pictures.mean((2, 3)), images, Generator(TINY), 10, 0)


def test_damaged_features_are_refused():
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        collect(lambda pictures: pictures.mean((2, 3)), [torch.full((2, 3, 4, 4), math.nan)])
