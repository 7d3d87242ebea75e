"""Hidden checks of assignment 3: the same attacks on networks of other trainings and on images that the notebook does not show."""

from advbn_lib.assignments.break_it import (
    held_out_images,
    keeps_the_radius,
    remains,
    right_labels_only,
    right_pgd,
    right_zero_gradients,
)  # fmt: skip
from advbn_lib.assignments.defences import KINDS
from advbn_lib.grading.task import Check, expect

WHY = {"confident": "the loss saturates", "rounded": "a step function", "experts": "a detached part"}
IMAGES = 150


def hidden(name, says, run, points=1.0, seconds=60.0):
    return Check(f"hidden: {name}", says, run, points, hidden=True, seconds=seconds)


def checks(variant: int) -> dict[str, tuple[Check, ...]]:
    """The hidden checks of each task."""
    seed = variant + 1

    def broken(student, kind, most):
        remains(student, f"attack_{kind}", kind, most, seed, held_out_images(IMAGES, seed))

    def why(student, kind):
        expect(student.call("reason", kind) == WHY[kind], f"the reason for {kind!r} is another one")

    def defence(kind):
        return (
            hidden("half", "at most 50 % on held-out images, another training", lambda s: broken(s, kind, 0.5), 2.0),
            hidden("broken", "at most 15 % on held-out images, another training", lambda s: broken(s, kind, 0.15), 2.0),
            hidden(
                "no trace",
                "images and labels are as before",
                lambda s: right_labels_only(s, f"attack_{kind}", kind),
                0.5,
            ),
        )

    return {
        "pgd": (
            hidden("breaks", "another network, other images", lambda s: right_pgd(s, seed, 0.1, held_out_images(IMAGES, seed))),
            hidden("radius", "small and large radii are kept", lambda s: keeps_the_radius(s, seed)),
        ),
        "diagnosis": (
            hidden("zero gradients", "another training, other images",
                   lambda s: right_zero_gradients(s, seed, held_out_images(40, seed))),
            *(hidden(f"reason for {kind}", "the reason is the right one", lambda s, kind=kind: why(s, kind)) for kind in KINDS),
        ),
        **{kind: defence(kind) for kind in KINDS},
    }  # fmt: skip


CHECKS = checks(0)
