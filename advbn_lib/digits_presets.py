"""The sizes at which all methods are compared on coloured digits; apart from the code that runs them, as those of other experiments."""

from __future__ import annotations

import dataclasses

from advbn_lib.data.colour_mnist import UNBIASED
from advbn_lib.digits_arena import DigitsArena
from advbn_lib.robustness import StrengthTest
from advbn_lib.side_by_side import Beside
from advbn_lib.training import Schedule

_CPU = DigitsArena(
    "Color-MNIST, a small convolutional network trained for 8 epochs on 6,000 images at each of three levels of bias (methods that "
    "fine-tune: 4 plain epochs and 4 of theirs); tested on the first 2,000 test images, attacked on the first 500",
    data_set="mnist", images=(6_000, 2_000), width=8,
    schedule=Schedule(epochs=8, batch_size=128, lr=0.05, milestones=(5, 7), warmup=0.5, weight_decay=5e-4),
    shifts=(
        "gaussian_noise-3", "impulse_noise-3", "defocus_blur-5", "motion_blur-3", "fog-3", "brightness-3", "contrast-3",
        "elastic_transform-3", "grey", "inverted", "hue-3",
    ),
    attacked=StrengthTest(strengths=(0, 2, 8, 16), images=500, fixed_weights=(), cross_strengths=(16,), follow_up_to=16),
)  # fmt: skip
# Whole epochs that take about as long as 16 epochs of PGD training: with fewer, half of AugMix's epochs would not fit into the time.
# A test holds them against the records of arena_step_cost.
_AS_LONG_AS_PGD = (
    ("natural", 84), ("clean_finetuning", 92), ("random_statistics", 76), ("mixed_statistics", 64), ("advbn", 32), ("augmix", 6),
    ("advbn_augmix", 6), ("pgd", 16), ("afan", 20), ("afa", 14), ("randmix", 46), ("advmix", 6),
)  # fmt: skip
DIGITS_PRESETS: dict[str, DigitsArena] = {
    "smoke_digits_arena": DigitsArena(
        "scikit-learn's digits in colours and a tiny network, all methods: to see that everything runs",
        data_set="digits", images=(320, 200), width=4, levels=(0.02, UNBIASED),
        schedule=Schedule(epochs=2, batch_size=64, lr=0.05), shifts=("gaussian_noise-3", "contrast-3", "inverted"),
        attacked=StrengthTest(strengths=(0, 2, 8, 16), steps=3, images=64, fixed_weights=(), cross_strengths=(), follow_up_to=16),
        pgd_steps=2, mix_steps=2, mix_restarts=2, beside=Beside(apgd_images=0),  # which needs no library that Colab lacks
    ),
    "cpu_digits_arena": _CPU,
    "cpu_digits_arena_compute": dataclasses.replace(
        _CPU, epochs=_AS_LONG_AS_PGD,
        about="as cpu_digits_arena, but each method trains for as many epochs as take it about the time of 16 epochs of PGD training",
    ),
}  # fmt: skip
