"""Hidden checks of assignment 1: other seeds, shapes and types, and the edges. ``variant`` changes the numbers."""

import torch

from advbn_lib.assignments.statistics_and_style import (
    BATCH,
    INSTANCE,
    constant_skewness,
    dead_channel,
    moments,
    one_element,
    right_adain,
    right_gradient,
    right_mix,
    right_renormalise,
    right_scaling,
    right_skewness,
    right_statistics,
    right_twin,
    right_type,
    untouched_input,
)  # fmt: skip
from advbn_lib.assignments.telling import features
from advbn_lib.grading.task import Check, expect_close


def hidden(name, says, run, points=1.0):
    return Check(f"hidden: {name}", says, run, points, hidden=True)


def factors(seed, channels, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.rand((1, channels, 1, 1), generator=generator, dtype=dtype) - 0.5 for _ in range(2))


def checks(variant: int) -> dict[str, tuple[Check, ...]]:
    """The hidden checks of each task."""
    seed = 1000 * (variant + 1)

    def several_statistics(student, name, axes):
        for i, shape in enumerate([(2, 3, 4, 4), (5, 1, 3, 7), (4, 6, 2, 9)]):
            right_statistics(student, name, axes, features(seed + i, shape, torch.float64))

    def other_eps(student, name, axes):
        right_statistics(student, name, axes, features(seed + 5, (3, 2, 4, 5), torch.float64), eps=0.3)

    def far_from_zero(student, name, axes):
        right_statistics(student, name, axes, features(seed + 6, (3, 2, 4, 5), torch.float64) - 50)

    def one_image(student):
        x = features(seed + 7, (1, 3, 4, 5), torch.float64)
        right_statistics(student, "batch_statistics", BATCH, x)

    def one_position_each(student):
        right_statistics(student, "batch_statistics", BATCH, features(seed + 8, (6, 3, 1, 1), torch.float64))

    def constant(student, name, axes):
        right_statistics(student, name, axes, torch.full((3, 2, 4, 4), -1.25, dtype=torch.float64))

    def other_sizes(student):
        right_adain(
            student, features(seed, (2, 3, 6, 5), torch.float64), features(seed + 1, (2, 3, 9, 4), torch.float64)
        )

    def one_style_for_all(student):
        x, style = features(seed + 2, (4, 3, 5, 5), torch.float64), features(seed + 3, (1, 3, 7, 7), torch.float64)
        right_renormalise(student, x, *moments(style, INSTANCE))

    def negative_mean(student):
        right_adain(student, features(seed + 4, (3, 2, 5, 5)) - 4, features(seed + 5, (3, 2, 5, 5)) - 9)

    def there_and_back(student):
        x, style = features(seed + 6, (3, 4, 5, 5), torch.float64), features(seed + 7, (3, 4, 5, 5), torch.float64)
        back = student.call("adain", student.call("adain", x, style), x)
        expect_close(
            back, x, "adain(adain(x, style), x)", "x with the style's statistics and back is x again", 1e-3, 1e-4
        )

    def scaling(student):
        right_scaling(student, features(seed + 8, (4, 5, 3, 6), torch.float64), *factors(seed, 5))

    def dead_scaling(student):
        x = features(seed + 9, (3, 3, 4, 4), torch.float64)
        x[:, 0] = 0.0
        x[:, 1] = 2.0
        right_scaling(student, x, *factors(seed + 1, 3))

    def scaling_of_one_number(student):
        right_scaling(student, features(seed + 10, (1, 2, 1, 1), torch.float64), *factors(seed + 2, 2))

    def no_factor(student):
        one = torch.ones(1, 3, 1, 1, dtype=torch.float64)
        right_scaling(student, features(seed + 11, (3, 3, 4, 4), torch.float64) - 3, one, one)

    def mixing(student):
        generator = torch.Generator().manual_seed(seed)
        order, weight = torch.randperm(5, generator=generator), torch.rand((5, 1, 1, 1), generator=generator)
        right_mix(student, features(seed + 12, (5, 3, 4, 6), torch.float64), order, weight.double())

    def all_of_another(student):
        zero = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
        right_mix(student, features(seed + 13, (3, 2, 4, 4), torch.float64), torch.tensor([1, 2, 0]), zero)

    def skewed(student, sign):
        right_skewness(student, sign * features(seed + 14, (4, 3, 6, 7), torch.float64))

    def twin(student, shape):
        right_twin(student, features(seed + 15, shape, torch.float64) - 2)

    return {
        "batch_statistics": (
            hidden("other shapes", "float64, other shapes", lambda s: several_statistics(s, "batch_statistics", BATCH)),
            hidden("eps", "eps is used, and under the root", lambda s: other_eps(s, "batch_statistics", BATCH)),
            hidden("negative", "means far below zero", lambda s: far_from_zero(s, "batch_statistics", BATCH)),
            hidden("one image", "a batch of one image is fine", one_image),
            hidden("one position", "and so is one position for each of several images", one_position_each),
            hidden("constant", "the std of a constant channel is the root of eps", lambda s: constant(s, "batch_statistics", BATCH)),
            hidden("one number", "a single number has no variance", lambda s: one_element(s, "batch_statistics", (1, 3, 1, 1))),
            hidden("type", "the result has the type of x", lambda s: right_type(s, "batch_statistics")),
        ),
        "instance_statistics": (
            hidden("other shapes", "float64, other shapes", lambda s: several_statistics(s, "instance_statistics", INSTANCE)),
            hidden("eps", "eps is used, and under the root", lambda s: other_eps(s, "instance_statistics", INSTANCE)),
            hidden("negative", "means far below zero", lambda s: far_from_zero(s, "instance_statistics", INSTANCE)),
            hidden("constant", "the std of a constant channel is the root of eps", lambda s: constant(s, "instance_statistics", INSTANCE)),
            hidden("type", "the result has the type of x", lambda s: right_type(s, "instance_statistics")),
        ),
        "adain": (
            hidden("other sizes", "content and style may differ in height and width", other_sizes),
            hidden("one style", "one style for several images", one_style_for_all),
            hidden("negative", "means below zero", negative_mean),
            hidden("dead channel", "a constant channel stays constant", lambda s: dead_channel(s, seed)),
            hidden("there and back", "to the style and back", there_and_back),
            hidden("no trace", "the arguments are as before",
                   lambda s: untouched_input(s, "adain", features(seed), features(seed + 1))),
        ),
        "scale_statistics": (
            hidden("other shapes", "float64, other shapes, factors below zero too", scaling),
            hidden("dead channels", "channels that are constant, without a NaN", dead_scaling),
            hidden("one number", "no std is needed, so one number is enough", scaling_of_one_number),
            hidden("no change", "factors of 1 change nothing", no_factor),
        ),
        "mix_styles": (
            hidden("other shapes", "float64, five images", mixing),
            hidden("all of another", "weight 0 is AdaIN with the other image", all_of_another),
        ),
        "what_is_left_out": (
            hidden("skewness", "other features", lambda s: skewed(s, 1.0)),
            hidden("negative skewness", "the tail on the other side", lambda s: skewed(s, -1.0)),
            hidden("constant", "0 for a constant channel", lambda s: constant_skewness(s, 0.3)),
            hidden("same style", "other features, odd sizes", lambda s: twin(s, (3, 2, 7, 5))),
            hidden("one image", "the same for a single image", lambda s: twin(s, (1, 3, 6, 6))),
        ),
        "gradients": (
            hidden("through", "other shapes", lambda s: right_gradient(s, seed, (3, 2, 5, 3), False)),
            hidden("frozen", "other shapes", lambda s: right_gradient(s, seed + 1, (3, 2, 5, 3), True)),
        ),
    }  # fmt: skip


CHECKS = checks(0)
