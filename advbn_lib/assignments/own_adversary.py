"""Assignment 4, "Your own adversary": the public checks.

The training runs here, on the checks' side, with the library's own ascent. The student's set is asked for values
(:class:`Asked`), so it can neither touch the weights nor see labels or test images.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from advbn_lib.assignments.arena import Arena, Lamps, gains
from advbn_lib.assignments.small_digits import small_digits
from advbn_lib.assignments.telling import compare, several
from advbn_lib.grading.task import (
    Assignment,
    Check,
    Given,
    Kept,
    Student,
    Task,
    Wrong,
    expect,
    expect_close,
    expect_number,
    expect_tensor,
    matches,
)  # fmt: skip
from advbn_lib.perturbations import Delta

THRESHOLD = 0.08  # stated beforehand: mean - std of the gain, as a share of the test images
CLEAN_AT_LEAST = 0.85
SHORT = Arena(images=640, epochs=4, width=8, test_images=200)  # a first look
MOST_NUMBERS = 4096  # in the delta of one image
REMEMBERED = 60  # questions that are asked again at the end


@dataclass
class Asked:
    """A student's set, as a Perturbation of the library. Each answer is looked at before it is used.

    Attributes:
        student, kept, puller: whom to ask, which object, and what computes its gradient.
        asked: some of the questions to ``apply`` and the answers, to be compared with later ones.
    """

    student: Student
    kept: Kept
    puller: Kept
    asked: list[tuple[Tensor, Delta, Tensor]] = field(default_factory=list)
    questions: int = 0

    @property
    def per_sample(self) -> bool:
        return True

    def start(self, x: Tensor) -> Delta:
        return self.delta(self.student.on(self.kept, "start", x), "start(x)")

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Delta:
        seed = 0 if generator is None else int(torch.randint(0, 2**31, (1,), generator=generator))
        drawn = self.student.on(self.kept, "sample", x, Given("generator", seed=seed))
        return self.delta(drawn, "sample(x, generator)")

    def project(self, x: Tensor, delta: Delta) -> Delta:
        inside = self.delta(self.student.on(self.kept, "project", x, delta), "project(x, delta)")
        if [p.shape for p in inside] != [p.shape for p in delta]:
            raise Wrong("project(x, delta) should return a delta of the same shapes")
        return inside

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        return _Applied.apply(self, x, *delta)

    def value(self, x: Tensor, delta: Delta) -> Tensor:
        """What the student's ``apply`` makes of ``x``."""
        answer = self.student.on(self.kept, "apply", x, delta)
        answer = expect_tensor(answer, "apply(x, delta)", tuple(x.shape), x.dtype)
        self.questions += 1
        # Which ones are remembered must not be foreseen. Each has the same chance, however many there are.
        place = len(self.asked) if len(self.asked) < REMEMBERED else secrets.randbelow(self.questions)
        if place < REMEMBERED:
            self.asked[place : place + 1] = [(x.clone(), delta, answer)]
        return answer

    def gradient(self, x: Tensor, delta: Delta, upstream: Tensor) -> Delta:
        """The gradient of ``(apply(x, delta) * upstream).sum()`` in the delta."""
        parts = self.delta(
            self.student.on(self.puller, "pull", self.kept, x, delta, upstream), "the gradient of apply in delta"
        )
        if [p.shape for p in parts] != [p.shape for p in delta]:
            raise Wrong("the gradient of apply has other shapes than delta")
        return parts

    def same_answers(self) -> None:
        """Wrong if ``apply`` answers the remembered questions otherwise than before."""
        secrets.SystemRandom().shuffle(self.asked)
        for x, delta, answer in self.asked:
            if not matches(self.student.on(self.kept, "apply", x, delta), answer):
                raise Wrong(
                    "apply gives another answer to the same x and delta: it must be a function of these two alone"
                )

    def delta(self, got: object, what: str) -> Delta:
        if not isinstance(got, (tuple, list)) or not got:
            raise Wrong(f"{what} should be a tuple of tensors, also if there is one: (delta,)")
        parts = tuple(expect_tensor(part, f"a part of {what}") for part in got)
        expect(all(part.is_floating_point() for part in parts), f"{what} should hold floating-point numbers")
        expect(
            sum(part.numel() for part in parts) <= 200 * MOST_NUMBERS,
            f"{what} is too large: {MOST_NUMBERS} numbers an image at most",
        )
        return parts


class _Applied(torch.autograd.Function):
    """``apply`` of a set that is asked, with its gradient in the delta."""

    @staticmethod
    def forward(ctx, asked: Asked, x: Tensor, *delta: Tensor) -> Tensor:
        ctx.asked = asked
        ctx.save_for_backward(x, *delta)
        return asked.value(x, tuple(part.detach() for part in delta))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        x, *delta = ctx.saved_tensors
        return None, None, *ctx.asked.gradient(x, tuple(delta), upstream)


def asked_set(student: Student, name: str, *args: object) -> Asked:
    """The student's set ``name(*args)``, to be asked."""
    return Asked(student, student.keep(name, *args), student.make(Given("pull_back")))


def some_images(seed: int, count: int = 16) -> Tensor:
    """Training images (N,1,8,8), black and white pixels among them."""
    images = small_digits("train")[0]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]]


def _far(delta: Delta, seed: int, by: float) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return tuple(part + by * torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in delta)


def _closest(first: Delta, second: Delta) -> float:
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(first, second))


def starts_at_no_change(student: Student, name: str, args: tuple, x: Tensor) -> None:
    """``apply(x, start(x))`` is x, and the start is in the set."""
    one = asked_set(student, name, *args)
    start = one.start(x)
    expect_close(one.value(x, start), x, "apply(x, start(x))", "the start is where nothing changes", atol=1e-5)
    inside = one.project(x, start)
    expect(_closest(inside, start) < 1e-5, "project moves the start: 'no change' must be in the set")


def projects(student: Student, name: str, args: tuple, x: Tensor, seed: int) -> None:
    """Projecting twice is projecting once, and points of the set stay."""
    one = asked_set(student, name, *args)
    moved = False
    for by in (0.05, 1.0, 30.0):
        far = _far(one.start(x), seed, by)
        inside = one.project(x, far)
        again = one.project(x, inside)
        expect(
            _closest(inside, again) < 1e-4,
            "project(project(delta)) is not project(delta): a point of the set must stay where it is",
        )
        moved |= _closest(inside, far) > 1e-3
    expect(moved, "project never moves anything: then the set has no border, and the adversary may do what it likes")


def samples_inside(student: Student, name: str, args: tuple, x: Tensor, seed: int) -> None:
    """``sample`` draws from the set, with the generator's numbers."""
    one = asked_set(student, name, *args)

    def draw(number: int) -> Delta:
        return one.delta(one.student.on(one.kept, "sample", x, Given("generator", seed=number)), "sample(x, generator)")

    first, again, other = draw(seed), draw(seed), draw(seed + 1)
    expect([p.shape for p in first] == [p.shape for p in one.start(x)], "sample(x) and start(x) have different shapes")
    expect(_closest(one.project(x, first), first) < 1e-4, "sample(x) lies outside of the set: project moves it")
    expect(
        _closest(first, again) == 0,
        "two samples from generators of one seed differ: draw from the generator you are given",
    )
    expect(_closest(first, other) > 0, "samples from generators of two seeds are the same")
    student.seed(seed + 7)
    expect(
        _closest(first, draw(seed)) == 0,
        "the sample depends on torch's global random numbers: draw from the generator alone",
    )
    expect(not matches(one.value(x, first), x), "a random point of the set changes nothing")


def applies(student: Student, name: str, args: tuple, x: Tensor, seed: int) -> None:
    """``apply`` keeps shape and range, treats each image by itself, and the gradient is that of the values."""
    one = asked_set(student, name, *args)
    delta = one.project(x, _far(one.start(x), seed, 0.1))
    changed = one.value(x, delta)
    low, high = changed.min().item(), changed.max().item()
    expect(low >= -1e-5 and high <= 1 + 1e-5, f"the changed images go from {low:.2f} to {high:.2f}: cut them to [0, 1]")
    expect_close(
        one.value(x, delta), changed, "apply(x, delta), asked twice", "it must be a function of x and delta alone"
    )
    if all(len(part) == len(x) for part in delta):
        alone = one.value(x[:3], tuple(part[:3] for part in delta))
        expect_close(
            alone,
            changed[:3],
            "apply on three of the images",
            "an image's change must not depend on the others in the batch",
        )
    generator = torch.Generator().manual_seed(seed)
    upstream = torch.randn(x.shape, generator=generator)
    gradient = one.gradient(x, delta, upstream)
    largest = max(part.abs().max().item() for part in gradient)
    expect(
        largest > 0, "no gradient flows from the changed images to delta: no detach, no rounding, no no_grad in apply"
    )
    step = 1e-2
    towards = tuple(step * part / largest for part in gradient)
    ahead, behind = (
        (one.value(x, tuple(p + s * t for p, t in zip(delta, towards))).double() * upstream).sum().item()
        for s in (1.0, -1.0)
    )
    promised = 2 * sum((t.double() * g.double()).sum().item() for t, g in zip(towards, gradient))
    expect(
        0.5 * promised < ahead - behind < 1.5 * promised,
        "the gradient of apply is not the slope of its values: something between delta and the images is detached or rounded",
    )


def right_ball(student: Student, radius: float, x: Tensor, seed: int) -> None:
    """``PixelBall(radius)`` is the l-infinity ball, cut to images."""
    one = asked_set(student, "PixelBall", radius)
    far = _far((torch.zeros_like(x),), seed, 3 * radius)[0]
    inside = several(one.project(x, (far,)), 1, "PixelBall.project", "delta")[0]
    ball = far.clamp(-radius, radius)
    wanted = (x + ball).clamp(0, 1) - x
    mistakes = {
        "the ball is kept, the range of the images is not: x + delta must lie in [0, 1]": ball,
        "the range of the images is kept, the ball is not": (x + far).clamp(0, 1) - x,
        "the ball is around 0.5 or around black; it is around no change": (x + far).clamp(0, radius) - x,
        "this is the changed image; project returns a delta": (x + ball).clamp(0, 1),
    }
    compare(inside, wanted, f"PixelBall({radius}).project(x, delta)", mistakes, atol=1e-6)
    expect_close(one.value(x, (wanted,)), x + wanted, "PixelBall.apply(x, delta)", "the change is added to the image")
    drawn = one.sample(x, torch.Generator().manual_seed(seed))[0]
    expect(drawn.abs().max().item() > 0.9 * radius, "PixelBall.sample does not fill the ball")


def right_sure_gain(student: Student, values: list[float]) -> None:
    """``sure_gain`` is the mean minus the unbiased standard deviation."""
    got = torch.tensor(expect_number(student.call("sure_gain", list(values)), "sure_gain(gains)"), dtype=torch.float64)
    numbers = torch.tensor(values, dtype=torch.float64)
    mean, std = numbers.mean(), numbers.std()
    mistakes = {
        "the std is biased: divide by the number of seeds less one": mean - numbers.std(unbiased=False),
        "this is the standard error; how far a single seed can be off is the std": mean - std / len(values) ** 0.5,
        "this is the mean alone": mean,
        "this is mean plus std: the doubt must count against you": mean + std,
        "this is the variance taken away, not the std": mean - std.square(),
        "this is the worst seed; that gets worse the more seeds you take": numbers.min(),
    }
    compare(got, mean - std, "sure_gain(gains)", mistakes, atol=1e-9)


def sure_gain(more: list[float]) -> float:
    """Mean minus standard deviation (unbiased) over the seeds: a gain of which chance could make little."""
    values = torch.tensor(more, dtype=torch.float64)
    return (values.mean() - values.std()).item()


def beats_noise(
    student: Student, seeds: tuple[int, ...], arena: Arena, lamps: Lamps, threshold: float = THRESHOLD, shift: int = 0
) -> None:
    """Mean minus std over seeds of the gain over noise of the same size is above the threshold."""
    one = asked_set(student, "MySet")
    step_size = expect_number(student.look_at(one.kept, "step_size"), "step_size of your set")
    expect(step_size > 0, f"step_size must be above 0, not {step_size}")
    more, clean = gains(one, step_size, seeds, arena, lamps, shift)
    one.same_answers()
    found, worst = sure_gain(more), min(clean)
    expect(
        found > threshold,
        f"mean - std of the gain over noise as large is {100 * found:.1f} points; it must be above {100 * threshold:.0f} "
        f"(gains of the seeds: {', '.join(f'{100 * value:.1f}' for value in more)})",
    )
    expect(worst >= CLEAN_AT_LEAST, f"on clean images only {worst:.0%} are right; {CLEAN_AT_LEAST:.0%} must remain")


def _laws(name: str, args: tuple) -> tuple[Check, ...]:
    x = "some training images"
    return (
        Check(
            f"{name}: start",
            f"the start changes nothing ({x})",
            lambda s: starts_at_no_change(s, name, args, some_images(0)),
        ),
        Check(
            f"{name}: project",
            "twice is once, and there is a border",
            lambda s: projects(s, name, args, some_images(1), 1),
        ),
        Check(
            f"{name}: sample",
            "inside, and from the generator",
            lambda s: samples_inside(s, name, args, some_images(2), 2),
        ),
        Check(f"{name}: apply", "shape, range and gradient", lambda s: applies(s, name, args, some_images(3), 3)),
    )


ASSIGNMENT = Assignment(
    number=4,
    name="own_adversary",
    title="Your own adversary",
    tasks=(
        Task(
            "pixel_ball",
            "A set that you know",
            (
                Check(
                    "values", "project keeps to the ball and to [0, 1]", lambda s: right_ball(s, 0.1, some_images(4), 4)
                ),
                *_laws("PixelBall", (0.1,)),
            ),
        ),
        Task(
            "the_judge",
            "How a result is judged",
            (
                Check(
                    "sure gain",
                    "mean minus standard deviation over seeds",
                    lambda s: right_sure_gain(s, [0.04, 0.11, 0.05, 0.09]),
                ),
            ),
        ),
        Task("your_set", "Your own set", _laws("MySet", ())),
        Task(
            "the_result",
            "Better than noise",
            (
                Check(
                    "two seeds",
                    "a first look with two seeds and a short training: the gain is above 0",
                    lambda s: beats_noise(s, (0, 1), SHORT, Lamps(), threshold=0.0),
                    0.0,
                    seconds=200,
                ),
            ),
        ),
    ),
    withheld=("advbn_lib.pixel_ball", "advbn_lib.pixel_balls", "advbn_lib.assignments.own_adversary"),
)
