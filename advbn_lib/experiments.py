"""What can be run: a method with its settings, under a name. Configuration only; :mod:`advbn_lib.running` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from advbn_lib.configurations import (
    Adversarial,
    AdversarialFeatureMaps,
    AdversarialImages,
    Augmented,
    AugmentedAdversarial,
    Clean,
    Configuration,
    ExtraPasses,
    NoisyFeatureMaps,
    Plain,
    Random,
    Unchanged,
    UnchangedFeatureMaps,
)  # fmt: skip
from advbn_lib.presets import PRESETS, Preset


@dataclass(frozen=True)
class Experiment:
    """A method and why it is run."""

    name: str
    about: str
    method: Configuration
    stage: Literal["none", "pretraining", "fine_tuning"] = "fine_tuning"


HEADLINE = (
    Experiment(
        "pretrain", "plain training from scratch: what others start from, or are compared with", Plain(), "pretraining"
    ),
    Experiment("untouched", "the starting point itself, only tested", Plain(), "none"),
    Experiment("clean_finetuning", "control: the same layers, trained as long, on clean features", Clean()),
    Experiment("random_statistics", "control: random statistics of the same size, no ascent", Random()),
    Experiment("advbn", "AdvBN with the paper's eps, step size and steps", Adversarial()),
    Experiment("advbn_eps05", "AdvBN with a smaller set: eps 0.5", Adversarial(eps=0.5)),
    Experiment(
        "advbn_shared_bn",
        "control: AdvBN with one BatchNorm set for both kinds of features",
        Adversarial(dual_bn=False),
    ),
    Experiment("augmix", "control: AugMix, an augmentation of images", Augmented()),
    Experiment("advbn_augmix", "AdvBN with AugMix in its clean branch", AugmentedAdversarial()),
)

ABLATIONS = (
    Experiment("unchanged_statistics", "no step, no random start: both branches train on clean features", Unchanged()),
    *(
        Experiment(f"{kind}_{where}", f"{about}, cut at {layer} and not at layer1", method(layer=layer))
        for where, layer in (("stem", "relu"), ("layer2", "layer2"), ("layer3", "layer3"))
        for kind, about, method in (
            ("clean", "clean fine-tuning", Clean),
            ("random", "random statistics", Random),
            ("advbn", "AdvBN", Adversarial),
        )
    ),
    Experiment("random_eps05", "control for advbn_eps05: random statistics with eps 0.5", Random(eps=0.5)),
    Experiment("advbn_eps02", "AdvBN with eps 0.2", Adversarial(eps=0.2)),
    Experiment("random_eps02", "control for advbn_eps02: random statistics with eps 0.2", Random(eps=0.2)),
    Experiment(
        "advbn_1_step", "AdvBN with one step of the usual size, which goes as far as eps 0.2", Adversarial(steps=1)
    ),
    Experiment("advbn_1_long_step", "AdvBN with one step as long as eps", Adversarial(steps=1, step_size=1.1)),
    Experiment("advbn_3_steps", "AdvBN with three steps of twice the usual size", Adversarial(steps=3, step_size=0.4)),
    Experiment("advbn_random_start", "AdvBN that starts the ascent at random factors", Adversarial(random_start=True)),
    Experiment("advbn_per_image", "AdvBN with statistics and factors for each image", Adversarial(per_image=True)),
    Experiment(
        "random_per_image", "control for advbn_per_image: random factors for each image", Random(per_image=True)
    ),
)

# Trained from scratch, as long as "pretrain": does adversarial augmentation help on clean images?
FROM_SCRATCH = tuple(
    Experiment(name, about, method, "pretraining")
    for name, about, method in (
        ("afan", "A-FAN as released for CIFAR-10: five steps behind stage 1", AdversarialFeatureMaps()),
        ("afan_eval_mode", "A-FAN whose ascent runs in eval mode and leaves no trace", AdversarialFeatureMaps(attack_mode="eval")),
        ("afan_mixed", "A-FAN with a point half way, and the statistics of the last one re-injected", AdversarialFeatureMaps(points=3, mix="01")),
        ("afan_mixed_batch", "the same, with statistics per channel over the batch", AdversarialFeatureMaps(points=3, mix="01", over="batch")),
        ("feature_noise", "control: uniform noise on features, as large as A-FAN's steps reach", NoisyFeatureMaps()),
        ("unchanged_features", "control: A-FAN's loss with an ascent of no steps", UnchangedFeatureMaps()),
        ("extra_forwards", "control: A-FAN's forward passes and no more; they move BatchNorm's running statistics", ExtraPasses()),
        ("advprop_1_step", "control: adversarial images, one step, with a BatchNorm set of their own (AdvProp)", AdversarialImages(steps=1, eps=1.0)),
        ("advprop_5_steps", "control: adversarial images, five steps (AdvProp)", AdversarialImages(steps=5, eps=4.0)),
    )
)  # fmt: skip

EXPERIMENTS = {experiment.name: experiment for experiment in (*HEADLINE, *ABLATIONS, *FROM_SCRATCH)}


def find(experiment: str, preset: str) -> tuple[Experiment, Preset]:
    """Look both up.

    Raises:
        ValueError: there is no such experiment or preset (all are listed), or the preset has no such stage.
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(f"no experiment {experiment!r}; there are {', '.join(EXPERIMENTS)}")
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    if EXPERIMENTS[experiment].stage == "pretraining" and PRESETS[preset].pretraining is None:
        possible = ", ".join(name for name, size in PRESETS.items() if size.pretraining is not None)
        raise ValueError(
            f"{experiment!r} trains from scratch, but preset {preset!r} starts from published weights; presets for it: {possible}"
        )
    return EXPERIMENTS[experiment], PRESETS[preset]
