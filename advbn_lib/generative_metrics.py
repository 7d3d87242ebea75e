"""How like the real pictures made ones are: FID, KID, precision and recall, in the features of a stated classifier.

All three compare two clouds of features. The published figures of other works use the features of an Inception network trained
on ImageNet; ours use those of a classifier of the very data, so they compare generators of this book with each other and with
nothing else. Always look at the same figures for real pictures against other real pictures beside them.

Sources: FID, Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (NeurIPS 2017),
equation 6; KID, Binkowski et al., "Demystifying MMD GANs" (ICLR 2018), section 4; precision and recall, Kynkaanniemi et al.,
"Improved Precision and Recall Metric for Assessing Generative Models" (NeurIPS 2019), section 2. FID and KID by torchmetrics.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from advbn_lib.data.images import DataError, ImageSet
from advbn_lib.models.stylegan import Generator
from advbn_lib.modes import evaluating
from advbn_lib.splitting import split_at

Features = Callable[[Tensor], Tensor]  # pictures in [0,1] (N,3,H,W) to features (N,F)
NEIGHBOURS = 3  # as in Kynkaanniemi et al.
KID_SUBSETS = 100  # as in Binkowski et al.
KID_SUBSET = 1_000


def classifier_features(network: nn.Module, layer: str, images: ImageSet) -> Features:
    """The output of a layer of a classifier, averaged over positions, as a function of pictures in [0,1] (N,3,H,W).

    Args:
        network: is in eval mode while it computes.
        layer: e.g. ``"layer3"``; see :func:`advbn_lib.splitting.split_at`.
        images: says how the network's input is normalised.

    Raises:
        SplitError: the network cannot be cut there.
    """
    device = next(network.parameters()).device
    with evaluating(network):
        split = split_at(network, layer, images.normalise(images.images[:2].to(device).float() / 255))

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        with evaluating(network):
            found = split.features(images.normalise(pictures.to(device)))
        return found.mean((2, 3))

    return features


def real_pictures(images: ImageSet, batch_size: int = 250) -> Iterator[Tensor]:
    """The pictures of a set in [0,1], in batches."""
    return (part.float() / 255 for part in images.images.split(batch_size))


def made_pictures(
    generator: Generator, count: int, seed: int, psi: float = 1.0, batch_size: int = 250
) -> Iterator[Tensor]:
    """``count`` pictures of the generator in [0,1] (N,3,R,R), in batches, with random noise; grey ones repeated to 3 channels.

    Args:
        psi: of the truncation; 1: none.
    """
    device = generator.mean_w.device
    draws = torch.Generator(device).manual_seed(seed)
    for start in range(0, count, batch_size):
        shape = (min(batch_size, count - start), generator.config.latent)
        with torch.no_grad():
            w = generator.mapping(torch.randn(shape, generator=draws, device=device))
            pictures = generator.images(generator.wplus(generator.truncate(w, psi)), "random", draws, colour=True)
        yield pictures


def collect(features: Features, pictures: Iterable[Tensor]) -> Tensor:
    """Features (N,F) of all pictures, on the CPU in double precision.

    Raises:
        FloatingPointError: a feature is NaN or infinite.
    """
    found = torch.cat([features(part).cpu().double() for part in pictures])
    if not bool(torch.isfinite(found).all()):
        raise FloatingPointError("a feature is NaN or infinite: the pictures or the classifier's weights are damaged")
    return found


def quality(
    features: Features, real: ImageSet, generator: Generator, count: int, seed: int, psi: float = 1.0
) -> dict[str, float]:
    """:func:`compare` of ``real`` with ``count`` pictures of the generator.

    Raises:
        DataError: the real pictures have another size than the made ones.
        ValueError: too few of either; see :func:`fid`.
    """
    size, resolution = tuple(real.images.shape[2:]), generator.config.resolution
    if size != (resolution, resolution):
        raise DataError(
            f"{real.name}: the pictures are {size[0]}x{size[1]}, but the generator makes {resolution}x{resolution}"
        )
    made = collect(features, made_pictures(generator, count, seed, psi))
    return compare(collect(features, real_pictures(real)), made, seed)


def compare(real: Tensor, made: Tensor, seed: int = 0) -> dict[str, float]:
    """``fid``, ``kid``, ``kid_std``, ``precision`` and ``recall`` of features (N,F) and (M,F).

    Args:
        seed: of KID's subsets.

    Raises:
        ValueError: as :func:`fid`.
        ModuleNotFoundError: torchmetrics is not installed; the message says how to.
    """
    kid_mean, kid_std = kid(real, made, seed=seed)
    precision, recall = precision_recall(real, made)
    return {"fid": fid(real, made), "kid": kid_mean, "kid_std": kid_std, "precision": precision, "recall": recall}


def fid(real: Tensor, made: Tensor) -> float:
    """Squared Frechet distance between normal distributions with the means and covariances of the features (N,F) and (M,F).

    It is never below 0 but for rounding, and too large for few pictures: compare figures of equal N and M alone.

    Raises:
        ValueError: the features do not fit each other, or there are not more pictures than features, so that a covariance is
            singular.
        ModuleNotFoundError: torchmetrics is not installed; the message says how to.
    """
    _check(real, made)
    if min(len(real), len(made)) <= real.shape[1]:
        raise ValueError(
            f"the covariance of {real.shape[1]} features needs more pictures than that, got {len(real)} real and {len(made)} "
            "made ones: take more pictures, or a layer with fewer channels"
        )
    metric = _torchmetrics().fid.FrechetInceptionDistance(feature=_AsTheyAre(real.shape[1]))
    return _filled(metric, real, made).compute().item()


def kid(
    real: Tensor, made: Tensor, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy of the features (N,F) and (M,F) under the kernel ``(x.y / F + 1)**3``, unbiased.

    Unbiased: for equal distributions it is 0 on average, so it may be below 0, and it does not depend on the number of pictures.

    Returns:
        Mean and standard deviation over random subsets. They share pictures: the deviation is no standard error of the mean.

    Args:
        subset_size: pictures of each kind a subset; all there are if fewer.
        seed: of the subsets.

    Raises:
        ValueError: the features do not fit each other.
        ModuleNotFoundError: torchmetrics is not installed; the message says how to.
    """
    _check(real, made)
    image = _torchmetrics()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all")  # we hold them anyway
        metric = image.kid.KernelInceptionDistance(
            feature=_AsTheyAre(real.shape[1]), subsets=subsets, subset_size=min(subset_size, len(real), len(made))
        )
    with torch.random.fork_rng(devices=[]):  # it draws the subsets from torch's own generator
        torch.manual_seed(seed)
        mean, deviation = _filled(metric, real, made).compute()
    return mean.item(), deviation.item()


def precision_recall(real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares from 0 to 1: of the made pictures that look real, and of the real ones that could have been made.

    A picture counts if its features lie in the other kind's region: the balls around each picture's features that reach to its
    k-th nearest neighbour of its own kind.

    Args:
        real, made: features (N,F) and (M,F).
        neighbours: k.

    Raises:
        ValueError: the features do not fit each other, or no more than k pictures of a kind.
    """
    _check(real, made)
    if not 1 <= neighbours < min(len(real), len(made)):
        raise ValueError(
            f"neighbours is from 1 to one less than the pictures of a kind ({len(real)} and {len(made)}), got {neighbours}"
        )
    return _covered(made, real, neighbours), _covered(real, made, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int, chunk: int = 1_000) -> float:
    """Share of ``points`` in a ball of at least one of ``centres``."""
    # A point is its own nearest neighbour, at distance 0: the k-th other one is number k + 1.
    radii = torch.cat([_distances(part, centres).kthvalue(neighbours + 1).values for part in centres.split(chunk)])
    inside = [(_distances(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return torch.cat(inside).double().mean().item()


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # Not by way of a matrix product, whose rounding would put a point outside its own ball.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _check(real: Tensor, made: Tensor) -> None:
    if real.dim() != 2 or made.dim() != 2 or real.shape[1] != made.shape[1]:
        raise ValueError(
            f"features must be (N,F) and (M,F), got {tuple(real.shape)} and {tuple(made.shape)}: take both from the same layer"
        )
    if min(len(real), len(made)) < 2:
        raise ValueError(f"at least 2 pictures of each kind are needed, got {len(real)} and {len(made)}")
    if not (real.isfinite().all() and made.isfinite().all()):
        raise ValueError(
            "some features are NaN or infinite: look at the pictures, and at the network that they are the features of"
        )


class _AsTheyAre(nn.Module):
    """The extractor that torchmetrics asks for: we give it features, not pictures."""

    def __init__(self, features: int):
        super().__init__()
        self.num_features = features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _filled(metric, real: Tensor, made: Tensor):
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return metric


def _torchmetrics():
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.kid  # by its module: the package shows KID only where torch-fidelity is installed

        return torchmetrics.image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"FID and KID need torchmetrics ({error}): pip install torchmetrics") from error
