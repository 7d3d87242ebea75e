"""Hidden checks of assignment 4: the laws on other images, and the result with five seeds."""

import os

import torch

from advbn_lib.assignments.arena import Arena, Lamps
from advbn_lib.assignments.own_adversary import (
    SHORT,
    applies,
    beats_noise,
    projects,
    right_ball,
    right_sure_gain,
    samples_inside,
    some_images,
    starts_at_no_change,
)  # fmt: skip
from advbn_lib.grading.task import Check

QUICK = "ADVBN_QUICK_ARENA"  # for tests of the assignment itself: two seeds, a short training


def hidden(name, says, run, points=1.0, seconds=30.0):
    return Check(f"hidden: {name}", says, run, points, hidden=True, seconds=seconds)


def checks(variant: int) -> dict[str, tuple[Check, ...]]:
    """The hidden checks of each task."""
    seed = 100 * (variant + 1)
    quick = bool(os.environ.get(QUICK))
    arena = SHORT if quick else Arena()
    seeds = tuple(range(seed, seed + (2 if quick else 5)))

    def black_and_white():
        return (some_images(seed, 12) > 0.5).float()

    def laws(name, args):
        return (
            hidden(f"{name}: start", "other images", lambda s: starts_at_no_change(s, name, args, black_and_white())),
            hidden(f"{name}: project", "other images", lambda s: projects(s, name, args, black_and_white(), seed)),
            hidden(
                f"{name}: sample",
                "other images",
                lambda s: samples_inside(s, name, args, some_images(seed + 1, 5), seed),
            ),
            hidden(f"{name}: apply", "other images", lambda s: applies(s, name, args, some_images(seed + 2, 9), seed)),
            hidden(
                f"{name}: one image",
                "a single image",
                lambda s: starts_at_no_change(s, name, args, some_images(seed + 3, 1)),
            ),
        )

    def spread():
        return (0.1 * torch.randn(7, generator=torch.Generator().manual_seed(seed))).tolist()

    return {
        "pixel_ball": (
            hidden("values", "another radius, other images", lambda s: right_ball(s, 0.23, some_images(seed), seed)),
            hidden("black and white", "pixels that can go one way only", lambda s: right_ball(s, 0.3, black_and_white(), seed)),
            *laws("PixelBall", (0.17,)),
        ),
        "the_judge": (hidden("sure gain", "seven seeds, losses too", lambda s: right_sure_gain(s, spread())),),
        "your_set": laws("MySet", ()),
        "the_result": (
            hidden("some gain", "with the first two seeds, mean minus std of the gain is above 0",
                   lambda s: beats_noise(s, seeds[:2], arena, Lamps(), 0.0, seed), 4.0, 600.0),
            hidden("threshold", "with all seeds, it is above the threshold that was stated beforehand",
                   lambda s: beats_noise(s, seeds, arena, Lamps(), shift=seed), 8.0, 600.0),
        ),
    }  # fmt: skip


CHECKS = checks(0)
