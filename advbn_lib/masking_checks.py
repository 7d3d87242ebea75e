"""Signs that a model hides its gradient from an attack, rather than being robust.

Where gradients are hidden (gradient masking), an attack that follows them fails, and an evaluation with it flatters. The
weaknesses are still there: an attack that needs no gradient, or one made on another model, finds them.

Sources: Athalye, Carlini and Wagner, "Obfuscated Gradients Give a False Sense of Security" (ICML 2018), for the signs by
behaviour; Carlini et al., "On Evaluating Adversarial Robustness" (2019), for what to try. The search without gradients follows
the idea of Andriushchenko et al., "Square Attack" (ECCV 2020). The checks of the gradient itself (whether it is the slope,
whether answers jump) and the climb that is blind to the scale of each logit are our own addition.

Passing all checks does not prove a model robust. Failing one says that its measured robustness is not to be believed yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from types import MappingProxyType

import torch
from torch import Tensor

from advbn_lib.attacks import LOSSES, PGD, Attacked, Predict, check_labels, judge, worse
from advbn_lib.pixel_balls import PixelBalls

# What chance may do: a comparison fails if sampling alone would show as much in fewer than LEVEL of all cases.
LEVEL = 0.005
# Shares of images that an honest model may have.
ALLOWED = 0.02  # broken by the weaker of two attacks alone: no attack with few steps finds everything
MARGIN_ALLOWED = 0.08  # broken by climbing the margin alone, which often finds a little more
PER_LOGIT_ALLOWED = 0.05  # broken by climbing along each logit's own direction alone
GAIN_ALLOWED = 0.12  # broken by much more effort alone; above it the usual attack has not converged
UNLIMITED_ALLOWED = 0.05  # answered rightly when every image is allowed
FLAT_ALLOWED = 0.05  # without a gradient, or whose loss an attack does not raise
FALLING_ALLOWED = 0.25  # whose loss is smaller under the stronger of two attacks
SLOPE_ALLOWED = 0.2  # whose gradient leaves UNEXPLAINED or more open
JUMP_ALLOWED = 0.1  # near which the answer jumps

UNEXPLAINED = 0.1  # share of the slopes' squares; honest models leave far less over a 50th of the radius
JUMP = 0.1  # share of a change that takes place within 1 / 2**HALVINGS of the way
HALVINGS = 12
DIRECTIONS = 16
REPEAT_TOLERANCE = 0.01  # share of the logits' range
FEWEST_IMAGES = 32


@dataclass(frozen=True)
class Check:
    """One sign, looked for.

    Attributes:
        name: of the check. passed: whether nothing was found.
        says: what was seen, what it means, and, if it failed, what to do.
        numbers: what was measured, for a table, as far as it is finite. Accuracies and shares are from 0 to 1.
    """

    name: str
    passed: bool
    says: str
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """A check without its name."""

    passed: bool
    says: str
    numbers: dict[str, float]


@dataclass(frozen=True)
class Effort:
    """How hard the checks try.

    Args:
        steps: of the usual attack, the one that an evaluation would report.
        more_steps: of a longer one. restarts: of the usual one.
        unlimited_steps: of the attack that may make any image.
        noise: random points of the ball that are tried. queries: forward passes of the search without gradients.

    Raises:
        ValueError: a value is too small.
    """

    steps: int = 20
    more_steps: int = 100
    restarts: int = 4
    unlimited_steps: int = 50
    noise: int = 50
    queries: int = 500

    def __post_init__(self):
        if (
            min(self.restarts, self.unlimited_steps, self.noise, self.queries) < 1
            or not 4 <= self.steps < self.more_steps
        ):
            raise ValueError(f"every effort is at least 1, steps at least 4 and fewer than more_steps; got {self}")


def masking_checks(
    predict: Predict, images: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], radius: float,
    others: Mapping[str, Predict] = {}, generator: torch.Generator | None = None, effort: Effort = Effort(),
    only: Collection[str] = (),
) -> tuple[Check, ...]:  # fmt: skip
    """Look for signs of a hidden gradient. Every check is made, also if others fail.

    One attack is compared with another on the same images. What counts is how many images the weaker one alone breaks: the check
    fails if, at a share of :data:`ALLOWED`, so many would come up less often than at :data:`LEVEL` (binomial). With few images
    only coarse masks are found: take 100 or more, most of them answered rightly.

    Args:
        predict: normalised images (N,C,H,W) to logits (N,K); the model in eval mode. For a model that fuses: the whole of it, with
            its predictors.
        images: normalised, one batch. labels: right classes (N,), int64.
        mean, std: of each channel, in [0,1] units: what the images are normalised with.
        radius: of the l-infinity ball in which robustness is claimed, in [0,1] units, such as 8/255.
        others: models by name, from which attacks are transferred: another network for the same task, or this one with its
            fusing weights forced.
        generator: of the random starts and the search, on the images' device.
        effort: how hard to try.
        only: names of the checks to make; empty: all.

    Returns:
        ``gradient``, ``slope``, ``jumps``, ``loss``, ``strength``, ``unlimited``, ``one_step``, ``effort``, ``margin``,
        ``per_logit``, ``noise``, ``search``, a ``transfer from ...`` for each of ``others``, and ``repeat``.

    Raises:
        ValueError: labels or radius are bad, pixels are out of [0,1], or there are fewer than 32 images.
    """
    if len(images) < FEWEST_IMAGES:
        raise ValueError(f"with {len(images)} images nothing can be told from chance: give at least {FEWEST_IMAGES}")
    if not radius > 0:
        raise ValueError(f"the radius must be above 0, in [0,1] units, got {radius}")
    PixelBalls(radius, mean, std).start(images)  # it refuses bad radii and images
    transfers = {f"transfer from {name}": partial(_transfer, name, other) for name, other in others.items()}
    checks = {**CHECKS, **transfers, "repeat": _repeat}  # the last asks again after all that the others did
    unknown = set(only) - checks.keys()
    if unknown:
        raise ValueError(f"no check {', '.join(sorted(unknown))}; there are {', '.join(checks)}")
    chosen = {name: check for name, check in checks.items() if name in only or not only}
    with _full_precision(images.device):
        case = _Case(_connected(predict), images.detach(), labels, mean, std, radius, effort, generator)
        check_labels(case.logits, labels)  # the first look, which the last check compares with
        return tuple(_made(name, check, case) for name, check in chosen.items())


# ---- the attacks -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Case:
    """A model, images, and attacks on them."""

    predict: Predict
    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    radius: float
    effort: Effort
    generator: torch.Generator | None

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.predict(self.images)

    @cached_property
    def clean(self) -> Attacked:
        return judge(self.predict, self.images, self.labels)

    @cached_property
    def usual(self) -> Attacked:
        """What the attack of an evaluation finds. The unchanged images do not count: it shows what the attack does."""
        return self.attack(self.effort.steps)

    @cached_property
    def by_strength(self) -> dict[str, Attacked]:
        """The unchanged images, and the usual attack with half, once, twice and four times the radius."""
        found = {"none": self.clean}
        for name, factor in (("half", 0.5), ("radius", 1), ("twice", 2), ("four_times", 4)):
            reach = min(factor * self.radius, 1.0)
            found[name] = self.usual if factor == 1 else self.attack(self.effort.steps, radius=reach)
        return found

    def attack(
        self, steps: int, step: float = 0.25, radius: float | None = None, loss: str = "cross_entropy", start: bool = True,
        surrogate: Predict | None = None,
    ) -> Attacked:  # fmt: skip
        pgd = PGD(self.mean, self.std, steps, step, random_start=start, loss=loss)
        reach = self.radius if radius is None else radius
        found = pgd.perturb(surrogate or self.predict, self.images, self.labels, reach, self.generator)
        return judge(self.predict, found, self.labels)

    @cached_property
    def by_margin(self) -> Attacked:
        """The worse of the unchanged images and of an attack that climbs the margin."""
        return worse(self.clean, self.attack(self.effort.steps, loss="margin"))

    def attack_per_logit(self) -> Attacked:
        """An attack along the direction of the best wrong logit, less that of the right one, each brought to length 1.

        A function of each logit alone that only rises (a squashing of large ones, say) does not change these directions, however
        small it makes a gradient.
        """

        def objective(x: Tensor) -> Tensor:
            logits = self.predict(x)
            right = logits.gather(1, self.labels[:, None])[:, 0]
            rival = logits.scatter(1, self.labels[:, None], -torch.inf).amax(1)
            lengths = (
                torch.autograd.grad(part.sum(), x, retain_graph=True)[0].flatten(1).norm(dim=1)
                for part in (rival, right)
            )
            # The value is 0, the gradient is that of the logit divided by its length.
            up, down = (
                (part - part.detach()) / length.clamp_min(1e-20) for part, length in zip((rival, right), lengths)
            )
            return up - down

        pgd = PGD(self.mean, self.std, self.effort.steps, random_start=True)
        return judge(self.predict, pgd.maximise(objective, self.images, self.radius, self.generator), self.labels)

    @property
    def balls(self) -> PixelBalls:
        return PixelBalls(self.radius, self.mean, self.std)

    def moved(self, delta: Tensor) -> Tensor:
        """The images changed by ``delta`` (in units of the radius), as far as the ball allows."""
        return self.balls.apply(self.images, self.balls.project(self.images, (delta,)))

    def signs(self, *shape: int) -> Tensor:
        """Random -1 and 1."""
        drawn = torch.randint(2, shape, generator=self.generator, device=self.images.device)
        return (2 * drawn - 1).to(self.images.dtype)


def random_noise(case: _Case) -> Attacked:
    """The worst of the unchanged images and of random points of the ball: half of these in it, half of them corners."""
    worst = case.clean
    for number in range(case.effort.noise):
        if number % 2:
            delta = case.signs(*case.images.shape)
        else:
            (delta,) = case.balls.sample(case.images, case.generator)
        worst = worse(worst, judge(case.predict, case.moved(delta), case.labels))
    return worst


@torch.no_grad()
def square_search(case: _Case) -> Attacked:
    """The worst that a random search finds: it sets squares of the image to a corner of the ball, and keeps what helps.

    It starts from vertical stripes. The squares become smaller. It sees logits, and no gradients.
    """
    count, channels, height, width = case.images.shape
    queries, size = case.effort.queries, max(height, width)
    delta = case.signs(count, channels, 1, width).expand(case.images.shape)
    best = LOSSES["margin"](case.predict(case.moved(delta)), case.labels)
    rows, columns = (torch.arange(length, device=case.images.device) for length in (height, width))
    for query in range(queries):
        side = max(1, round(size * 0.6 * 0.5 ** (4 * query / queries)))
        top, left = (_corner(case, length, side) for length in (height, width))
        inside = _between(rows, top, side)[:, None, :, None] & _between(columns, left, side)[:, None, None, :]
        candidate = torch.where(inside, case.signs(count, channels, 1, 1), delta)
        margin = LOSSES["margin"](case.predict(case.moved(candidate)), case.labels)
        better = margin > best
        delta, best = torch.where(better[:, None, None, None], candidate, delta), torch.where(better, margin, best)
    return worse(case.clean, judge(case.predict, case.moved(delta), case.labels))


def _corner(case: _Case, length: int, side: int) -> Tensor:
    high = max(length - side, 0) + 1
    return torch.randint(high, (len(case.images), 1), generator=case.generator, device=case.images.device)


def _between(positions: Tensor, first: Tensor, side: int) -> Tensor:
    return (positions >= first) & (positions < first + side)


def _connected(predict: Predict) -> Predict:
    """Where no path leads from the logits to the images, a gradient of 0 and not an error."""

    def connected(images: Tensor) -> Tensor:
        logits = predict(images)
        return logits + 0 * images.flatten(1).sum(1, keepdim=True) if images.requires_grad else logits

    return connected


# ---- comparisons -----------------------------------------------------------------------------


def more_than(count: int, total: int, share: float) -> bool:
    """Whether ``count`` of ``total`` is more than ``share``, beyond sampling error: so many come up in fewer than :data:`LEVEL`."""
    return count > share * total and _tail(count, total, share) < LEVEL


def _tail(count: int, total: int, share: float) -> float:
    """P(at least ``count``) of a binomial."""
    logs = (
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        + k * math.log(share) + (total - k) * math.log1p(-share)
        for k in range(count, total + 1)
    )  # fmt: skip
    return math.fsum(math.exp(value) for value in logs)


def _only(weaker: Attacked, stronger: Attacked) -> int:
    """How many images the weaker attack breaks and the stronger one does not."""
    return int((weaker.wrong & ~stronger.wrong).sum())


def _accuracy(found: Attacked) -> float:
    return 1 - found.wrong.double().mean().item()


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Inside the block all computes in float32: TensorFloat-32's rounding is larger than the differences that slopes are of."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def _made(name: str, check: Callable[[_Case], _Seen], case: _Case) -> Check:
    try:
        seen = check(case)
    except FloatingPointError as error:  # a mask, too: an attack that meets NaN ends there
        return Check(name, False, f"The attack met a loss that is NaN or infinite, and cannot go on: {error}.")
    numbers = {key: value for key, value in seen.numbers.items() if math.isfinite(value)}  # JSON knows no others
    return Check(name, seen.passed, seen.says, numbers)


def _weaker_finds_more(
    weaker: Attacked, case: _Case, what: str, advice: str, allowed: float = ALLOWED, beside: Attacked | None = None
) -> _Seen:
    """Fails if ``weaker``, described by ``what``, breaks images that the usual attack does not, beyond ``allowed`` of them.

    Args:
        beside: another attack along the gradient; what it breaks does not count either.
    """
    usual = worse(case.clean, case.usual)
    only, total = _only(weaker, usual if beside is None else worse(usual, beside)), len(case.images)
    passed = not more_than(only, total, allowed)
    seen = f"{only} of {total} images are broken by {what} and not by {case.effort.steps} steps along the gradient"
    says = f"{seen}, no more than chance allows." if passed else f"{seen}. {advice}"
    numbers = {"accuracy": _accuracy(weaker), "accuracy_usual": _accuracy(case.usual), "only_weaker": only / total}
    return _Seen(passed, says, numbers)


# ---- the checks ------------------------------------------------------------------------------


def _gradient(case: _Case) -> _Seen:
    """There is a gradient: at the images, at random points of the ball, and where the attack ended."""
    (noise,) = case.balls.sample(case.images, case.generator)
    points = {"image": case.images, "noise": case.balls.apply(case.images, (noise,)), "attacked": case.usual.images}
    found = {name: _gradients(case, x).abs().flatten(1).amax(1) for name, x in points.items()}
    flat = {name: _share(largest == 0) for name, largest in found.items()}
    bad = max(_share(~largest.isfinite()) for largest in found.values())
    passed = max(flat.values()) <= FLAT_ALLOWED and bad == 0
    says = (
        f"The loss has no gradient at {max(flat.values()):.0%} of the images, or of points near them, and one that is NaN or infinite "
        f"at {bad:.0%}."
    )
    if not passed:
        says += (
            " An attack cannot move there. Look for rounding, thresholds, detach() or no_grad() on the way, and for logits so large "
            "that the softmax is 0 or 1. Attack a smooth stand-in, or climb the margin."
        )
    return _Seen(passed, says, {**{f"zero_{name}": s for name, s in flat.items()}, "not_finite": bad})


def _gradients(case: _Case, x: Tensor, loss: str = "cross_entropy") -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(LOSSES[loss](case.predict(x), case.labels).sum(), x)[0]


def _slope(case: _Case) -> _Seen:
    """The gradient says how the answer changes: slopes measured along random directions are those that it claims.

    Measured by differences over a 50th of the radius, half way to what the attack found.
    """
    points = (case.images + case.usual.images) / 2
    with torch.no_grad():  # the best wrong class stays the same one, so that there is no kink where it changes
        rival = case.predict(points).scatter(1, case.labels[:, None], -torch.inf).argmax(1)

    def lead(x: Tensor) -> Tensor:
        logits = case.predict(x)
        return logits.gather(1, rival[:, None])[:, 0] - logits.gather(1, case.labels[:, None])[:, 0]

    x = points.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(lead(x).sum(), x)
    std = torch.tensor(case.std, device=points.device, dtype=points.dtype).view(1, -1, 1, 1)
    claimed, measured = [], []
    with torch.no_grad():
        for _ in range(DIRECTIONS):
            move = case.signs(*points.shape) * (case.radius / 100) / std
            claimed.append(2 * (gradient * move).flatten(1).sum(1))
            measured.append(lead(points + move) - lead(points - move))
    claimed, measured = torch.stack(claimed).double(), torch.stack(measured).double()
    unexplained = (measured - claimed).square().sum(0) / measured.square().sum(
        0
    )  # NaN where nothing moves: flat, not wrong
    wrong = _share((unexplained > UNEXPLAINED) | ~claimed.isfinite().all(0))
    passed = wrong <= SLOPE_ALLOWED
    says = f"At {wrong:.0%} of the images the gradient explains less than {1 - UNEXPLAINED:.0%} of how the answer changes with the pixels."
    if not passed:
        says += (
            " So it is not the gradient of what the model computes. Look for a backward pass that is not that of its forward "
            "pass (straight-through rounding, a custom autograd function), for detach() on a part of the way, and for noise."
        )
    return _Seen(passed, says, {"wrong": wrong, "unexplained": unexplained.nanmedian().item()})


def _jumps(case: _Case) -> _Seen:
    """Answers change gradually, towards what the attack found and towards random noise of four times the radius.

    The way is halved again and again, and each time the half with the larger change is kept. Where answers change gradually, what
    is left in the end is next to nothing.
    """
    (noise,) = PixelBalls(min(4 * case.radius, 1.0), case.mean, case.std).project(
        case.images, (case.signs(*case.images.shape),)
    )
    far = PixelBalls(min(4 * case.radius, 1.0), case.mean, case.std).apply(case.images, (noise,))
    shares = {"attacked": _jump(case, case.usual.images), "noise": _jump(case, far)}
    found = {name: _share(left > JUMP) for name, left in shares.items()}
    passed = max(found.values()) <= JUMP_ALLOWED
    says = f"The answers jump on the way from {max(found.values()):.0%} of the images to others near them."
    if not passed:
        says += (
            " There is a step, or something close to it, that no gradient shows. Look for rounding, hard thresholds (also in what "
            "chooses a fusing weight) and very steep activations. Attack each side of the threshold, or a smooth stand-in."
        )
    return _Seen(passed, says, found)


@torch.no_grad()
def _jump(case: _Case, end: Tensor) -> Tensor:
    """Which share (N,) of the change of logits between the images and ``end`` takes place in the last of the halves."""
    low, high = (
        torch.zeros(len(end), device=end.device, dtype=end.dtype),
        torch.ones(len(end), device=end.device, dtype=end.dtype),
    )

    def at(t: Tensor) -> Tensor:
        return case.predict(torch.lerp(case.images, end, t.view(-1, 1, 1, 1)))

    first, last = at(low), at(high)
    whole = (last - first).norm(dim=1)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        between = at(middle)
        before, after = (between - first).norm(dim=1), (last - between).norm(dim=1)
        whole, left = torch.maximum(whole, torch.maximum(before, after)), before >= after
        low, high = torch.where(left, low, middle), torch.where(left, middle, high)
        first, last = (torch.where(left[:, None], *pair) for pair in ((first, between), (between, last)))
    return ((last - first).norm(dim=1) / whole).nan_to_num(0.0)


def _loss(case: _Case) -> _Seen:
    """The loss rises with the strength of the attack."""
    found = list(case.by_strength.values())
    falling = {
        f"falls_at_{name}": _share(after.losses < before.losses)
        for name, before, after in zip(("half", "radius", "twice", "four_times"), found, found[1:])
    }
    # Where the network is very sure, the loss is rounded to 0 before and after: the margin says whether anything moved.
    margins = [LOSSES["margin"](case.predict(x), case.labels).detach() for x in (case.images, case.usual.images)]
    stuck = _share((case.usual.losses <= case.clean.losses) & (margins[1] <= margins[0]))
    held = more_than(round(stuck * len(margins[0])), len(margins[0]), FLAT_ALLOWED)
    passed = max(falling.values()) <= FALLING_ALLOWED and not held
    says = f"The attack does not raise the loss of {stuck:.0%} of the images; with more strength it falls again for up to {max(falling.values()):.0%}."  # fmt: skip
    if not passed:
        says += " What may change the image more finds less: the attack is led astray, or cannot move. Do not report its accuracy alone."
    return _Seen(passed, says, {"stuck": stuck, **falling})


def _strength(case: _Case) -> _Seen:
    """Accuracy never rises with the strength of the attack."""
    found = case.by_strength
    attempts, total = list(found.values()), len(case.images)
    only = max(_only(before, after) for before, after in zip(attempts, attempts[1:]))
    passed = not more_than(only, total, ALLOWED)
    says = f"Up to {only} of {total} images are broken by one strength and not by the next larger one"
    says += ", no more than chance allows." if passed else (
        ". The larger ball has the smaller one in it, so this is the attack's failure. The model may recognise strong attacks: "
        "attack it through whatever does that."
    )  # fmt: skip
    return _Seen(passed, says, {f"accuracy_{name}": _accuracy(attempt) for name, attempt in found.items()})


def _unlimited(case: _Case) -> _Seen:
    """An attack that may make any image breaks everything."""
    steps = case.effort.unlimited_steps
    right = reduce(worse, [case.attack(steps, 0.1, 1.0, loss, start=False) for loss in LOSSES])
    left = _accuracy(right)
    passed = not more_than(round(left * len(case.images)), len(case.images), UNLIMITED_ALLOWED)
    says = f"When every image is allowed, {left:.0%} are still answered rightly."
    if not passed:
        says += (
            " Among all images there are always some with another answer, and the gradient does not lead there: it is hidden. Or "
            "the model gives one answer to everything."
        )
    return _Seen(passed, says, {"accuracy": left})


def _one_step(case: _Case) -> _Seen:
    """One step along the gradient's sign (FGSM) breaks nothing that many steps do not."""
    advice = (
        "The gradient at the image is a better guide than those on the way: the surface is crumpled there, or training had only "
        "one step and the model learned to hide from many (catastrophic overfitting). Attack with more restarts and smaller steps."
    )
    return _weaker_finds_more(case.attack(1, 1.0, start=False), case, "one step", advice)


def _effort(case: _Case) -> _Seen:
    """More steps and restarts never help the defence, and do not find much more: the usual attack has converged."""
    effort = case.effort
    fewer = case.attack(effort.steps // 2)
    more = case.attack(effort.more_steps, max(0.02, 2.5 / effort.more_steps))
    restarted = reduce(worse, [case.attack(effort.steps) for _ in range(effort.restarts)], case.usual)
    helped, total = max(_only(fewer, case.usual), _only(case.usual, more)), len(case.images)
    usual = worse(case.clean, case.usual)
    gained = _only(worse(more, restarted), usual)
    helps, weak = more_than(helped, total, ALLOWED), more_than(gained, total, GAIN_ALLOWED)
    says = f"{helped} of {total} images escape if the attack takes more steps; {gained} more are broken by restarts and many steps."
    if helps:
        says += " More effort must not help the defence: the gradient leads astray, or answers are random."
    if weak:
        says += f" So {effort.steps} steps flatter this model by far. Report the attack with more steps and restarts."
    numbers = {
        "accuracy_fewer_steps": _accuracy(fewer), "accuracy_usual": _accuracy(case.usual),
        "accuracy_more_steps": _accuracy(more), "accuracy_restarts": _accuracy(restarted), "escaped": helped / total,
        "gained": gained / total,
    }  # fmt: skip
    return _Seen(not (helps or weak), says, numbers)


def _margin(case: _Case) -> _Seen:
    """Climbing the margin finds hardly more than climbing the cross-entropy."""
    advice = (
        "The cross-entropy is flat where the model is very sure, and the margin is not: look at the size of the logits. "
        "Report the attack on the margin."
    )
    return _weaker_finds_more(case.by_margin, case, "climbing the margin", advice, MARGIN_ALLOWED)


def _per_logit(case: _Case) -> _Seen:
    """Climbing along each logit's own direction finds hardly more than the cross-entropy, and nothing beside that and the margin."""
    advice = (
        "Something makes the gradients of some logits small: a squashing function at the end, or saturated units before it. Attack "
        "without it, and report the attack that is blind to the logits' scale."
    )
    found, what = case.attack_per_logit(), "climbing along each logit's own direction"
    seen = _weaker_finds_more(found, case, what, advice, PER_LOGIT_ALLOWED)
    beside = _weaker_finds_more(found, case, f"{what}, not by climbing the margin", advice, beside=case.by_margin)
    numbers = {**seen.numbers, "only_beside_margin": beside.numbers["only_weaker"]}
    return replace(seen if beside.passed else beside, numbers=numbers)


def _noise(case: _Case) -> _Seen:
    """Random noise breaks nothing that the attack does not."""
    advice = "What blind chance finds, the gradient should: it is hidden or wrong, or answers are random."
    return _weaker_finds_more(random_noise(case), case, f"{case.effort.noise} draws of random noise", advice)


def _search(case: _Case) -> _Seen:
    """A search without gradients breaks nothing that the attack does not."""
    advice = "What can be found without a gradient should be found with it: it is hidden or wrong. Report the search's accuracy too."
    return _weaker_finds_more(square_search(case), case, f"{case.effort.queries} queries without a gradient", advice)


def _transfer(name: str, other: Predict, case: _Case) -> _Seen:
    """What is made on another model breaks nothing that the attack on the model itself does not."""
    advice = "A stand-in shows the way better than the model's own gradient, which is hidden or wrong. Count the worse of both."
    found = worse(case.clean, case.attack(case.effort.steps, surrogate=_connected(other)))
    return _weaker_finds_more(found, case, f"the attack made on {name}", advice)


def _repeat(case: _Case) -> _Seen:
    """The same image has the same answer: asked again after all attacks, in another order, in a smaller batch, with a gradient."""
    images, half = case.images, len(case.images) // 2
    with torch.no_grad():
        again = {
            "again": case.predict(images),
            "order": case.predict(images.flip(0)).flip(0),
            "batch": torch.cat([case.predict(images[:half]), case.predict(images[half:])]),
        }
    with torch.enable_grad():
        again["gradient"] = case.predict(images.detach().clone().requires_grad_()).detach()
    scale = (case.logits.amax(1) - case.logits.amin(1)).mean()
    found = {name: ((logits - case.logits).abs().max() / scale).item() for name, logits in again.items()}
    passed = all(value <= REPEAT_TOLERANCE for value in found.values())  # NaN fails
    says = f"Asked again, the answers change by up to {max(found.values()):.2%} of the logits' range."
    if not passed:
        says += (
            " They depend on chance, on the other images of the batch, on what was asked before, or on whether a gradient is taken. "
            "Put the model into eval mode. If noise is part of the defence, attack the mean of many answers."
        )
    return _Seen(passed, says, found)


CHECKS: Mapping[str, Callable[[_Case], _Seen]] = MappingProxyType(
    {
        "gradient": _gradient, "slope": _slope, "jumps": _jumps, "loss": _loss, "strength": _strength,
        "unlimited": _unlimited, "one_step": _one_step, "effort": _effort, "margin": _margin, "per_logit": _per_logit,
        "noise": _noise, "search": _search,
    }
)  # fmt: skip
