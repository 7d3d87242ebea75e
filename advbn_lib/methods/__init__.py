"""The methods: each is a few lines over the one inner maximisation."""

from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.augmix import AugMix, AugMixAdvBN, Mixing
from advbn_lib.methods.base import Losses, Method
from advbn_lib.methods.baselines import CleanFineTuning, PlainTraining, RandomStatistics, UnchangedStatistics

__all__ = [
    "AdvBN", "AugMix", "AugMixAdvBN", "CleanFineTuning", "Losses", "Method", "Mixing", "PlainTraining", "RandomStatistics",
    "UnchangedStatistics",
]  # fmt: skip
