"""The methods: each is a few lines over the one inner maximisation."""

from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.advprop import AdvProp
from advbn_lib.methods.afan import AFAN, FeatureAugmentation, Site
from advbn_lib.methods.alfa import LearnableAFAN
from advbn_lib.methods.augmix import AugMix, AugMixAdvBN, Mixing
from advbn_lib.methods.base import Losses, Method
from advbn_lib.methods.baselines import CleanFineTuning, PlainTraining, RandomStatistics, UnchangedStatistics
from advbn_lib.methods.feature_controls import ExtraForwards, FeatureNoise, NoAugmentation, UnchangedFeatures
from advbn_lib.methods.mixed_statistics import MixedStatistics

__all__ = [
    "AFAN", "AdvBN", "AdvProp", "AugMix", "AugMixAdvBN", "CleanFineTuning", "ExtraForwards", "FeatureAugmentation", "FeatureNoise",
    "LearnableAFAN", "Losses", "Method", "MixedStatistics", "Mixing", "NoAugmentation", "PlainTraining", "RandomStatistics", "Site",
    "UnchangedFeatures", "UnchangedStatistics",
]  # fmt: skip
