"""Assignment 1, "Statistics and style": the public checks.

Formulas: AdaIN, equation 8 of Huang and Belongie (ICCV 2017); MixStyle (Zhou et al., ICLR 2021); the unbiased variance plus
eps is that of :mod:`advbn_lib.statistics`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advbn_lib.assignments.telling import compare, features, refuses, several
from advbn_lib.grading.task import Assignment, Check, Student, Task, Wrong, expect, expect_close, expect_tensor, matches

EPS = 1e-5
INSTANCE, BATCH = (2, 3), (0, 2, 3)
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # for float64
FLOAT = {"rtol": 1e-4, "atol": 1e-5}


def moments(x: Tensor, axes: tuple[int, ...], eps: float = EPS) -> tuple[Tensor, Tensor]:
    """The reference: mean, and root of the unbiased variance plus eps."""
    return x.mean(axes, keepdim=True), (x.var(axes, keepdim=True) + eps).sqrt()


def renormalised(x: Tensor, new_mean: Tensor, new_std: Tensor, eps: float = EPS) -> Tensor:
    """The reference of AdaIN's formula, over H,W."""
    mean, std = moments(x, INSTANCE, eps)
    return new_std * (x - mean) / std + new_mean


def tolerance(x: Tensor) -> dict[str, float]:
    """How close an answer must be: float64 shows computations in float32."""
    return EXACT if x.dtype == torch.float64 else FLOAT


NAMES = {
    BATCH: "of a batch are over N,H,W: one number per channel",
    INSTANCE: "of an instance are over H,W: one number per image and channel",
}


def right_statistics(student: Student, name: str, axes: tuple[int, ...], x: Tensor, eps: float = EPS) -> None:
    """``name(x, eps)`` is mean and std over these axes."""
    mean, std = several(student.call(name, x, eps=eps), 2, f"{name}(x)", "mean, std")
    wanted_mean, wanted_std = moments(x, axes, eps)
    kept = {"keepdim": True}
    others = {
        "are over N,H,W": BATCH, "are over H,W of each image": INSTANCE, "are over C (per position)": (1,),
        "are over N alone": (0,), "are over all axes": (0, 1, 2, 3), "are over N,C,H (an axis too early)": (0, 1, 2),
    }  # fmt: skip
    told = {f"your numbers {text}; statistics {NAMES[axes]}": other for text, other in others.items() if other != axes}
    compare(mean, wanted_mean, "the mean", {text: x.mean(o, **kept) for text, o in told.items()}, **tolerance(x))
    variance = x.var(axes, **kept)
    variants = {text: _std(x, other, eps) for text, other in told.items()}
    variants |= {
        "you divide by the number of elements (biased); the book's variance divides by one fewer": (
            x.var(axes, unbiased=False, **kept) + eps
        ).sqrt(),
        "eps is added to the variance, under the root, not to the std": variance.sqrt() + eps,
        "eps is missing: add it to the variance, under the root": variance.sqrt(),
        "this is the variance; take the root": variance + eps,
        "eps goes in as it is, not squared": (variance + eps**2).sqrt(),
        "this is the mean of the images' stds; the std over N,H,W also sees how far the images' means lie apart": (
            _std(x, INSTANCE, eps).mean(0, **kept) if axes == BATCH and x[0, 0].numel() > 1 else None
        ),
    }
    compare(std, wanted_std, "the std", variants, **tolerance(x))


def _std(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor | None:
    count = torch.tensor([x.shape[axis] for axis in axes]).prod()
    return moments(x, axes, eps)[1] if count > 1 else None


def one_element(student: Student, name: str, shape: tuple[int, ...]) -> None:
    """With one element the unbiased variance is undefined: the function says so and returns no NaN."""
    outcome = student.attempt(name, features(7, shape))
    refuses(
        outcome, f"{name} of a tensor of shape {shape}", "there is one element to take the variance of, and 1 - 1 is 0"
    )


def right_type(student: Student, name: str) -> None:
    """Half precision in, half precision out, and so on."""
    for dtype in (torch.float32, torch.float64):
        for part in several(student.call(name, features(3, dtype=dtype)), 2, f"{name}(x)", "mean, std"):
            expect_tensor(part, f"{name} of {dtype} features", dtype=dtype)


def right_renormalise(student: Student, x: Tensor, new_mean: Tensor, new_std: Tensor) -> None:
    """``renormalise`` is the formula."""
    got = student.call("renormalise", x, new_mean, new_std)
    mean, std = moments(x, INSTANCE)
    batch_mean, batch_std = moments(x, BATCH)
    biased = (x.var(INSTANCE, keepdim=True, unbiased=False) + EPS).sqrt()
    mistakes = {
        "your statistics are over N,H,W; AdaIN's are per image": new_std * (x - batch_mean) / batch_std + new_mean,
        "the old mean is not taken away": new_std * x / std + new_mean,
        "the old std is not divided out": new_std * (x - mean) + new_mean,
        "you divide by the variance, not by the std": new_std * (x - mean) / std.square() + new_mean,
        "the new mean is not added": new_std * (x - mean) / std,
        "new_mean and new_std have changed places": new_mean * (x - mean) / std + new_std,
        "the new mean is multiplied by new_std: add it last": new_std * ((x - mean) / std + new_mean),
        "your std is biased (divides by HW, not by HW - 1)": new_std * (x - mean) / biased + new_mean,
    }
    compare(got, renormalised(x, new_mean, new_std), "renormalise(x, new_mean, new_std)", mistakes, **tolerance(x))


def right_adain(student: Student, content: Tensor, style: Tensor) -> None:
    """``adain`` has the layout of the content and the statistics of the style."""
    got = student.call("adain", content, style)
    wanted = renormalised(content, *moments(style, INSTANCE))
    batch_mean, batch_std = moments(content, BATCH)
    style_mean, style_std = moments(style, BATCH)
    mistakes = {
        "content and style have changed places: the layout is the content's, the statistics are the style's": renormalised(
            style, *moments(content, INSTANCE)
        ),
        "your std is over N,H,W; AdaIN's is per image": style_std * (content - batch_mean) / batch_std + style_mean,
        "the style's statistics are over N,H,W; AdaIN takes those of the one style image": renormalised(
            content, style_mean, style_std
        ),
        "this is the content itself: its own statistics came back": content,
    }
    compare(got, wanted, "adain(content, style)", mistakes, **tolerance(content))


def dead_channel(student: Student, seed: int) -> None:
    """A constant channel takes the style's mean and stays constant: no NaN, nothing blown up."""
    content, style = features(seed, dtype=torch.float64), features(seed + 1, dtype=torch.float64)
    content[:, 1] = 0.75
    got = expect_tensor(
        student.call("adain", content, style), "adain with a channel that is constant", tuple(content.shape)
    )
    wanted = style[:, 1].mean((1, 2), keepdim=True).expand_as(got[:, 1])
    expect_close(
        got[:, 1], wanted, "a constant channel of the content", "it has nothing to spread out; only its mean changes"
    )


def right_scaling(student: Student, x: Tensor, mean_factor: Tensor, std_factor: Tensor) -> None:
    """``scale_statistics`` multiplies the batch's mean and std, with no division."""
    got = student.call("scale_statistics", x, mean_factor, std_factor)
    mean = x.mean(BATCH, keepdim=True)
    own = x.mean(INSTANCE, keepdim=True)
    mistakes = {
        "your mean is per image; here it is over N,H,W, one per channel": std_factor * (x - own) + mean_factor * own,
        "mean_factor is multiplied with the mean, not added": std_factor * (x - mean) + mean_factor,
        "the two factors have changed places": mean_factor * (x - mean) + std_factor * mean,
        "the mean is scaled by std_factor as well: take it away before you multiply": std_factor * x
        + mean_factor * mean,
        "the mean comes back unchanged: multiply it by mean_factor": std_factor * (x - mean) + mean,
    }
    compare(got, std_factor * (x - mean) + mean_factor * mean, "scale_statistics", mistakes, **tolerance(x))


def right_mix(student: Student, x: Tensor, order: Tensor, weight: Tensor) -> None:
    """``mix_styles`` gives each image a mixture of its own statistics and another's."""
    got = student.call("mix_styles", x, order, weight)
    mean, std = moments(x, INSTANCE)
    mixed_variance = (weight * std.square() + (1 - weight) * std[order].square()).sqrt()
    mixed_mean = weight * mean + (1 - weight) * mean[order]
    mixed_std = weight * std + (1 - weight) * std[order]
    mistakes = {
        "weight belongs to the image's own statistics, 1 - weight to the other's": renormalised(
            x, (1 - weight) * mean + weight * mean[order], (1 - weight) * std + weight * std[order]
        ),
        "you mix the variances; MixStyle mixes the stds": renormalised(x, mixed_mean, mixed_variance),
        "you mix the images themselves; only their statistics are mixed": weight * x + (1 - weight) * x[order],
        "you mix the AdaIN result with the image": weight * x + (1 - weight) * renormalised(x, mean[order], std[order]),
        "the layout is another image's: renormalise x, not x[order]": renormalised(x[order], mixed_mean, mixed_std),
        "only the means are mixed": renormalised(x, mixed_mean, std),
        "only the stds are mixed": renormalised(x, mean, mixed_std),
    }
    compare(got, renormalised(x, mixed_mean, mixed_std), "mix_styles(x, order, weight)", mistakes, **tolerance(x))


def third_moment(x: Tensor, eps: float = 1e-8) -> Tensor:
    """The reference of the skewness."""
    centred = x - x.mean(INSTANCE, keepdim=True)
    return centred.pow(3).mean(INSTANCE, keepdim=True) / (centred.square().mean(INSTANCE, keepdim=True) + eps).pow(1.5)


def right_skewness(student: Student, x: Tensor) -> None:
    """``skewness`` is the third standardised moment of each image and channel."""
    got = student.call("skewness", x)
    wanted = third_moment(x)
    centred = x - x.mean(INSTANCE, keepdim=True)
    scale = (x.var(INSTANCE, keepdim=True) + 1e-8).sqrt()
    batch = x - x.mean(BATCH, keepdim=True)
    mistakes = {
        "it is not standardised: divide by the std to the third": centred.pow(3).mean(INSTANCE, keepdim=True),
        "the std is unbiased here; this moment divides by the number of elements throughout": (
            centred.pow(3).mean(INSTANCE, keepdim=True) / scale.pow(3)
        ),
        "it is over N,H,W; we want one number per image and channel": (
            batch.pow(3).mean(BATCH, keepdim=True) / batch.square().mean(BATCH, keepdim=True).pow(1.5)
        ),
        "the sign is lost: no absolute value": wanted.abs(),
        "the mean is not taken away first": x.pow(3).mean(INSTANCE, keepdim=True) / scale.pow(3),
        "this is the fourth moment (kurtosis)": (
            centred.pow(4).mean(INSTANCE, keepdim=True) / centred.square().mean(INSTANCE, keepdim=True).square()
        ),
    }  # fmt: skip
    compare(got, wanted, "skewness(x)", mistakes, rtol=1e-4, atol=1e-5)


def constant_skewness(student: Student, value: float) -> None:
    """A constant channel has no skewness."""
    got = student.call("skewness", torch.full((2, 3, 4, 4), value, dtype=torch.float64))
    expect_close(
        got, torch.zeros(2, 3, 1, 1, dtype=torch.float64), "the skewness of a constant channel", "it should be 0"
    )


def right_twin(student: Student, x: Tensor) -> None:
    """``same_style`` keeps mean and std and turns the skewness round."""
    got = expect_tensor(student.call("same_style", x), "same_style(x)", tuple(x.shape))
    expect(not matches(got, x), "same_style(x) is x: it should be another feature map with the same means and stds")
    for (have, wanted), name in zip(zip(moments(got, INSTANCE), moments(x, INSTANCE)), ("mean", "std")):
        off = (have - wanted).abs().max().item()
        if not matches(have, wanted, 1e-3, 1e-4):
            batch = matches(got.mean(BATCH), x.mean(BATCH), 1e-3, 1e-4)
            why = ": only those of the batch are; keep each image's" if batch else ""
            raise Wrong(f"the {name} of a channel moved by up to {off:.3g}{why}")
    before, after = third_moment(x), third_moment(got)
    skewed = before.abs() > 0.3
    turned = (after * before < 0) & (after.abs() > 0.5 * before.abs())
    expect(
        bool(turned[skewed].all()), "mean and std are right, but the skewness of some channel has not changed its sign"
    )


def right_gradient(student: Student, seed: int, shape: tuple[int, ...], frozen: bool) -> None:
    """``normalise`` has the right value, and the right gradient for ``frozen``."""
    x = features(seed, shape, torch.float64)
    weights = features(seed + 100, shape, torch.float64)
    got, gradient = student.call_with_gradient("normalise", x, frozen=frozen, weights=weights)
    mean, std = moments(x, INSTANCE)
    compare(
        got,
        (x - mean) / std,
        "normalise(x)",
        {"your statistics are over N,H,W; here they are per image": _by_batch(x)},
        **EXACT,
    )
    if gradient is None:
        raise Wrong(
            f"normalise(x, frozen={frozen}) has no gradient in x at all: freeze the statistics only (mean.detach()), not the result"
        )
    ways = {(m, s): _gradient(x, weights, m, s) for m in (True, False) for s in (True, False)}
    wanted = ways.pop((frozen, frozen))
    mistakes = {
        "no gradient flows through mean and std: do not detach them here": None if frozen else ways.get((True, True)),
        "the gradient flows through mean and std: detach both": ways.get((False, False)) if frozen else None,
        "the mean is frozen and the std is not": ways[(True, False)],
        "the std is frozen and the mean is not": ways[(False, True)],
    }
    compare(gradient, wanted, f"the gradient of normalise(x, frozen={frozen})", mistakes, **EXACT)


def _by_batch(x: Tensor) -> Tensor:
    mean, std = moments(x, BATCH)
    return (x - mean) / std


def _gradient(x: Tensor, weights: Tensor, freeze_mean: bool, freeze_std: bool) -> Tensor:
    leaf = x.clone().requires_grad_()
    mean, std = moments(leaf, INSTANCE)
    mean, std = mean.detach() if freeze_mean else mean, std.detach() if freeze_std else std
    return torch.autograd.grad((weights * (leaf - mean) / std).sum(), leaf)[0]


def untouched_input(student: Student, name: str, *args: object) -> None:
    """The function leaves its arguments as they were."""
    _, traces = student.call_and_look(name, *args)
    expect(not any(t.kind == "input" for t in traces), f"`{name}` changes its input in place: work on new tensors")


def _factors(seed: int, channels: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.rand((1, channels, 1, 1), generator=generator, dtype=dtype) for _ in range(2))


def _weights(seed: int, count: int) -> Tensor:
    return torch.rand((count, 1, 1, 1), generator=torch.Generator().manual_seed(seed))


ASSIGNMENT = Assignment(
    number=1,
    name="statistics_and_style",
    title="Statistics and style",
    tasks=(
        Task(
            "batch_statistics",
            "Mean and std of a batch",
            (
                Check(
                    "values",
                    "means and stds are over N,H,W, with the unbiased variance plus eps",
                    lambda s: right_statistics(s, "batch_statistics", BATCH, features(0)),
                ),
            ),
        ),
        Task(
            "instance_statistics",
            "Mean and std of each image",
            (
                Check(
                    "values",
                    "means and stds are over H,W of each image",
                    lambda s: right_statistics(s, "instance_statistics", INSTANCE, features(1)),
                ),
                Check(
                    "one position",
                    "a variance of one number is refused with a ValueError",
                    lambda s: one_element(s, "instance_statistics", (2, 3, 1, 1)),
                ),
            ),
        ),
        Task(
            "adain",
            "AdaIN",
            (
                Check(
                    "renormalise",
                    "renormalise gives each image and channel the new mean and std",
                    lambda s: right_renormalise(s, features(2), *moments(features(3), INSTANCE)),
                ),
                Check(
                    "adain",
                    "the layout is the content's, the statistics are the style's",
                    lambda s: right_adain(s, features(2), features(3)),
                ),
            ),
        ),
        Task(
            "scale_statistics",
            "Two knobs",
            (
                Check(
                    "values",
                    "the batch mean is multiplied by one factor, the batch std by the other",
                    lambda s: right_scaling(s, features(4), *_factors(0)),
                ),
            ),
        ),
        Task(
            "mix_styles",
            "Mix styles",
            (
                Check(
                    "values",
                    "each image gets a mixture of its own statistics and another image's",
                    lambda s: right_mix(s, features(5), torch.tensor([2, 0, 1]), _weights(0, 3)),
                ),
            ),
        ),
        Task(
            "what_is_left_out",
            "What mean and std leave out",
            (
                Check(
                    "skewness",
                    "the third standardised moment of each image and channel",
                    lambda s: right_skewness(s, features(6, (3, 4, 8, 8), torch.float64)),
                ),
                Check(
                    "same style",
                    "another feature map with the same means and stds, and the opposite skewness",
                    lambda s: right_twin(s, features(7, (3, 4, 8, 8), torch.float64)),
                ),
            ),
        ),
        Task(
            "gradients",
            "Gradients through statistics",
            (
                Check(
                    "through",
                    "with frozen=False the gradient flows through mean and std too",
                    lambda s: right_gradient(s, 8, (2, 3, 4, 5), False),
                ),
                Check(
                    "frozen",
                    "with frozen=True mean and std count as constants",
                    lambda s: right_gradient(s, 9, (2, 3, 4, 5), True),
                ),
            ),
        ),
    ),
    withheld=("advbn_lib.statistics", "advbn_lib.assignments.statistics_and_style"),
)
