"""The methods: each is a few lines over the one inner maximisation."""

from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.base import Losses, Method
from advbn_lib.methods.baselines import CleanFineTuning, PlainTraining, RandomStatistics

__all__ = ["AdvBN", "CleanFineTuning", "Losses", "Method", "PlainTraining", "RandomStatistics"]
