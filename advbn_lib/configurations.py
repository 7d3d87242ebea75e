"""Methods with their settings, as frozen dataclasses that can be written into a record; each builds its method.

A record's hash does not cover this module, which imports every method: settings are fields, and a formula belongs to the module
of the method that it is for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from advbn_lib.attacks import PGD, training_step
from advbn_lib.data.images import ImageSet
from advbn_lib.fused_bn import Fusion, Mix
from advbn_lib.methods.advbn import AdvBN
from advbn_lib.methods.advprop import AdvProp
from advbn_lib.methods.afa import AFA, EndPoints, JointAFA
from advbn_lib.methods.afan import AFAN, FeatureAugmentation, Site, even_weight
from advbn_lib.methods.augmix import AugMix, AugMixAdvBN, Mixing
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import CleanFineTuning, PlainTraining, RandomStatistics, UnchangedStatistics
from advbn_lib.methods.feature_controls import ExtraForwards, FeatureNoise, UnchangedFeatures
from advbn_lib.methods.mixed_statistics import MixedStatistics
from advbn_lib.methods.pgd_training import TRADES, PGDTraining
from advbn_lib.models.networks import layer_of_stage
from advbn_lib.tasks.classification import Classification


@dataclass(frozen=True)
class Plain:
    """The whole network, on clean images."""

    trains: ClassVar[type[Method]] = PlainTraining

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return PlainTraining(model)


@dataclass(frozen=True)
class Clean:
    """Clean fine-tuning above ``layer``."""

    trains: ClassVar[type[Method]] = CleanFineTuning

    layer: str = "layer1"

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return CleanFineTuning(model, self.layer)


@dataclass(frozen=True)
class Unchanged:
    """Two BatchNorm sets, both trained on clean features: an ascent of no steps."""

    trains: ClassVar[type[Method]] = UnchangedStatistics

    layer: str = "layer1"

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return UnchangedStatistics(model, self.layer)


@dataclass(frozen=True)
class Random:
    """Random statistics of AdvBN's size, without ascent."""

    trains: ClassVar[type[Method]] = RandomStatistics

    layer: str = "layer1"
    eps: float = 1.1
    dual_bn: bool = True
    per_image: bool = False

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return RandomStatistics(model, **dataclasses.asdict(self))


@dataclass(frozen=True)
class Mixed:
    """Statistics moved towards those of another image, without ascent; MixStyle's released value."""

    trains: ClassVar[type[Method]] = MixedStatistics

    layer: str = "layer1"
    alpha: float = 0.1

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return MixedStatistics(model, **dataclasses.asdict(self))


@dataclass(frozen=True)
class Adversarial:
    """AdvBN; the paper's values."""

    trains: ClassVar[type[Method]] = AdvBN

    layer: str = "layer1"
    eps: float = 1.1
    step_size: float = 0.2
    steps: int = 6
    dual_bn: bool = True
    random_start: bool = False
    per_image: bool = False

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return AdvBN(model, **dataclasses.asdict(self))


@dataclass(frozen=True)
class Augmented:
    """AugMix above ``layer``; the weight of its divergence and its severity as in the paper."""

    trains: ClassVar[type[Method]] = AugMix

    layer: str = "layer1"
    weight: float = 12.0
    severity: int = 3

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return AugMix(model, self.layer, Mixing(images.mean, images.std, self.severity), self.weight)


@dataclass(frozen=True)
class AugmentedAdversarial:
    """AdvBN with AugMix in its clean branch."""

    trains: ClassVar[type[Method]] = AugMixAdvBN

    layer: str = "layer1"
    eps: float = 1.1
    step_size: float = 0.2
    steps: int = 6
    weight: float = 12.0
    severity: int = 3

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        mixing = Mixing(images.mean, images.std, self.severity)
        return AugMixAdvBN(model, self.layer, mixing, self.weight, self.eps, self.step_size, self.steps)


@dataclass(frozen=True)
class UnchangedFeatureMaps:
    """What A-FAN and its controls have in common: where they act and what they train on. By itself the control of no steps.

    Args:
        stage: of the network, whose output is perturbed.
        gamma, steps, points, mix, over: see :class:`~advbn_lib.methods.afan.Site`; those released for CIFAR-10. Half of the loss
            is for the clean images, and half is shared by the points.
    """

    trains: ClassVar[type[FeatureAugmentation]] = UnchangedFeatures
    built_with: ClassVar[tuple[str, ...]] = ("advbn_lib.tasks.classification", "advbn_lib.models.networks")

    stage: int = 1
    gamma: float = 0.5
    steps: int = 5
    points: int = 2
    mix: str = ""
    over: Literal["channels", "batch"] = "channels"

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return self.trains(Classification(model), [self.site(model)])

    def site(self, model: nn.Module) -> Site:
        """The place in this network."""
        layer, weight = layer_of_stage(model, self.stage), even_weight(self.points)
        return Site(layer, self.gamma, self.steps, self.points, self.mix, self.over, weight)


@dataclass(frozen=True)
class NoisyFeatureMaps(UnchangedFeatureMaps):
    """Uniform noise as large as A-FAN's steps can reach."""

    trains: ClassVar[type[FeatureAugmentation]] = FeatureNoise


@dataclass(frozen=True)
class ExtraPasses(UnchangedFeatureMaps):
    """A-FAN's forward passes, and no other trace of it."""

    trains: ClassVar[type[FeatureAugmentation]] = ExtraForwards


@dataclass(frozen=True)
class AdversarialFeatureMaps(UnchangedFeatureMaps):
    """A-FAN; ``attack_mode``: see :class:`~advbn_lib.methods.afan.AFAN`."""

    trains: ClassVar[type[FeatureAugmentation]] = AFAN

    attack_mode: Literal["train", "eval"] = "train"

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return AFAN(Classification(model), [self.site(model)], attack_mode=self.attack_mode)


@dataclass(frozen=True)
class AdversarialImages:
    """AdvProp; ``eps`` and ``step_size`` in 1/255 of a pixel's range."""

    trains: ClassVar[type[Method]] = AdvProp

    eps: float = 4.0
    step_size: float = 1.0
    steps: int = 5

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return AdvProp(model, images.mean, images.std, self.eps, self.step_size, self.steps)


@dataclass(frozen=True)
class Attacked:
    """PGD training, and what AFA and TRADES have in common with it: how images are attacked while training.

    Args:
        eps: the radius (AFA: the largest), l-infinity, in 1/255.
        steps: of the attack, from a random start. A preset may set it, see :class:`~advbn_lib.presets.AttackPreset`. How long
            one is: :func:`~advbn_lib.attacks.training_step`.
    """

    trains: ClassVar[type[Method]] = PGDTraining

    eps: float = 8.0
    steps: int = 7

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return self.trains(model, self.attack(images), self.eps)

    def attack(self, images: ImageSet) -> PGD:
        """On networks that are trained on ``images``."""
        return PGD(images.mean, images.std, self.steps, training_step(self.steps))


@dataclass(frozen=True)
class Traded(Attacked):
    """TRADES, with the weight of the divergence that its authors use."""

    trains: ClassVar[type[Method]] = TRADES

    beta: float = 6.0

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return TRADES(model, self.attack(images), self.eps, self.beta)


@dataclass(frozen=True)
class FusedEnds(Attacked):
    """AFA's first stage: the two BatchNorm sets. ``mix``, ``weights``, ``moments``: see :class:`~advbn_lib.fused_bn.Fusion`."""

    trains: ClassVar[type[Method]] = EndPoints

    mix: Mix = "output"
    weights: Literal["layer", "network"] = "layer"
    moments: bool = False

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        return self.trains(model, self.attack(images), self.eps, Fusion(self.mix, self.weights, self.moments))


@dataclass(frozen=True)
class FusedWeights(FusedEnds):
    """AFA's second stage: the weights between the two sets."""

    trains: ClassVar[type[Method]] = AFA

    supervision: float = 0.0

    def build(self, model: nn.Module, images: ImageSet) -> Method:
        fusion = Fusion(self.mix, self.weights, self.moments)
        return AFA(model, self.attack(images), self.eps, fusion, self.supervision)


@dataclass(frozen=True)
class FusedTogether(FusedEnds):
    """Both stages at once."""

    trains: ClassVar[type[Method]] = JointAFA


Configuration = (
    Plain | Clean | Unchanged | Random | Adversarial | Augmented | AugmentedAdversarial
    | UnchangedFeatureMaps | NoisyFeatureMaps | ExtraPasses | AdversarialFeatureMaps | AdversarialImages
    | Attacked | Traded | FusedEnds | FusedWeights | FusedTogether
)  # fmt: skip
