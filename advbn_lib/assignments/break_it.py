"""Assignment 3, "Break it": the public checks.

A check gives the student's attack a defence and held-out images, and then looks itself: are the images within the radius
and in [0,1], and how many does its own copy of the defence still get right?
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from advbn_lib.assignments.defences import KINDS, REASONS, SHOWN_IMAGES, make_defence, shown_images, weights_of
from advbn_lib.assignments.small_digits import small_digits
from advbn_lib.grading.task import Assignment, Check, Given, Student, Task, Wrong, expect, expect_tensor

RADIUS = 0.2
ROUNDING = 1e-5  # of float32
DRAWS = 5  # of a defence's random numbers


def given_defence(kind: str, seed: int, draws: int = 0) -> Given:
    """The same for the student's side."""
    return Given("defence", kind=kind, weights=weights_of(kind, seed), seed=draws)


def held_out_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Test images that the notebook does not show."""
    images, labels = (part[SHOWN_IMAGES:] for part in small_digits("test"))
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return images[chosen], labels[chosen]


def within_the_radius(got: object, images: Tensor, radius: float) -> Tensor:
    """The student's images, if they are images and near enough; else Wrong."""
    got = expect_tensor(got, "the attack's result", tuple(images.shape), images.dtype)
    low, high = got.min().item(), got.max().item()
    expect(-ROUNDING <= low and high <= 1 + ROUNDING, f"the pixels go from {low:.3f} to {high:.3f}: cut them to [0, 1]")
    far = (got - images).abs().max().item()
    expect(
        far <= radius + ROUNDING, f"a pixel has moved by {far:.4f}; the radius is {radius}: project back into the ball"
    )
    return got.clamp(0, 1)


@torch.no_grad()
def accuracy(defence: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, draws: int = DRAWS) -> float:
    """Share of right answers, over several draws of the defence's random numbers."""
    return sum((defence(images).argmax(1) == labels).float().mean().item() for _ in range(draws)) / draws


def remains(
    student: Student, name: str, kind: str, most: float, seed: int = 0, images: tuple[Tensor, Tensor] | None = None
) -> None:
    """At most a share ``most`` of the answers is still right after the student's attack."""
    x, labels = shown_images() if images is None else images
    draws = 7919 * (seed + 1)  # the defence's random numbers when it answers are not those of the attack
    got = student.call(name, given_defence(kind, seed, draws + 1), x, labels, RADIUS)
    attacked = within_the_radius(got, x, RADIUS)
    left = accuracy(make_defence(kind, seed, draws), attacked, labels)
    clean = accuracy(make_defence(kind, seed, draws), x, labels)
    expect(
        left <= most,
        f"after your attack the defence is right on {left:.0%} of {len(x)} images (before: {clean:.0%}); "
        f"{most:.0%} or fewer should be left",
    )


def right_pgd(student: Student, seed: int, most: float = 0.1, images: tuple[Tensor, Tensor] | None = None) -> None:
    """``pgd`` breaks an undefended network (given as the function that maps images to losses)."""
    x, labels = shown_images() if images is None else images
    losses = Given("losses", weights=weights_of("confident", seed), labels=labels)
    got = within_the_radius(student.call("pgd", losses, x, RADIUS), x, RADIUS)
    network = make_defence("confident", seed).network
    left, moved = accuracy(network, got, labels, 1), (got - x).abs().max().item()
    expect(moved > 0, "pgd returns the images unchanged")
    expect(
        left <= most,
        f"against a network without a defence {left:.0%} of the answers are still right; {most:.0%} or fewer should be",
    )


def keeps_the_radius(student: Student, seed: int) -> None:
    """``pgd`` keeps to other radii too, also where images touch 0 and 1."""
    x, labels = held_out_images(20, seed)
    losses = Given("losses", weights=weights_of("confident", seed % 2), labels=labels)
    for radius in (0.05, 0.6):
        within_the_radius(student.call("pgd", losses, x, radius), x, radius)


def right_zero_gradients(student: Student, seed: int, images: tuple[Tensor, Tensor] | None = None) -> None:
    """``zero_gradients`` says for which images the gradient of the cross-entropy is exactly 0."""
    x, labels = shown_images(40) if images is None else images
    for kind in KINDS:
        got = expect_tensor(
            student.call("zero_gradients", given_defence(kind, seed, 3), x, labels), "zero_gradients(...)", (len(x),)
        )
        expect(got.dtype == torch.bool, f"zero_gradients should return a truth value for each image, not {got.dtype}")
        defence = make_defence(kind, seed, 3)
        leaf = x.clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(defence(leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, leaf)
        largest = gradient.flatten(1).abs().amax(1)
        # Where the loss is almost flat, rounding decides: those images do not count.
        sure = (largest == 0) & (gradient == 0).flatten(1).all(1) | (largest > 1e-12)
        wrong = int(((got != (largest == 0)) & sure).sum())
        expect(
            wrong <= len(x) // 20,
            f"for the defence {kind!r} your answer is wrong on {wrong} of {len(x)} images: "
            "take each image's own gradient of the cross-entropy, and ask whether all its numbers are 0",
        )


def known_reasons(student: Student) -> None:
    """The reasons are from the list."""
    for kind in KINDS:
        reason = student.call("reason", kind)
        expect(
            isinstance(reason, str) and reason in REASONS, f"reason({kind!r}) should be one of: {', '.join(REASONS)}"
        )
    answers = [student.call("reason", kind) for kind in KINDS]
    expect(len(set(answers)) == len(answers), "the three defences have three different reasons")


def right_labels_only(student: Student, name: str, kind: str) -> None:
    """The attack changes neither its images nor its labels."""
    x, labels = shown_images(10)
    _, traces = student.call_and_look(name, given_defence(kind, 0), x, labels, RADIUS)
    for trace in traces:
        if trace.kind == "input":
            raise Wrong(f"{name} changes its images or labels in place: work on a copy")


def _defence_task(name: str, title: str, kind: str) -> Task:
    attack = f"attack_{kind}"
    return Task(
        name,
        title,
        (
            Check(
                "half",
                "at most 50 % of the answers are still right",
                lambda s: remains(s, attack, kind, 0.5),
                seconds=60,
            ),
            Check(
                "broken",
                "at most 15 % of the answers are still right",
                lambda s: remains(s, attack, kind, 0.15),
                seconds=60,
            ),
        ),
    )


ASSIGNMENT = Assignment(
    number=3,
    name="break_it",
    title="Break it",
    tasks=(
        Task(
            "pgd",
            "A plain attack",
            (
                Check(
                    "breaks",
                    "at most 10 % are left of a network without a defence",
                    lambda s: right_pgd(s, 0),
                    seconds=60,
                ),
            ),
        ),
        Task(
            "diagnosis",
            "Where is the gradient?",
            (
                Check(
                    "zero gradients",
                    "for which images the gradient is exactly 0",
                    lambda s: right_zero_gradients(s, 0),
                    seconds=60,
                ),
                Check("reasons", "three different reasons from the list", known_reasons, 0.0),
            ),
        ),
        _defence_task("confident", "The confident network", "confident"),
        _defence_task("rounded", "The rounded image", "rounded"),
        _defence_task("experts", "The ten experts", "experts"),
    ),
    withheld=(
        "advbn_lib.attacks",
        "advbn_lib.ascent",
        "advbn_lib.pixel_ball",
        "advbn_lib.pixel_balls",
        "advbn_lib.assignments.break_it",
    ),
)
