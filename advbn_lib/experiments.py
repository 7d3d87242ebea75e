"""What can be run: a method with its settings, under a name. Configuration only; :mod:`advbn_lib.running` runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from advbn_lib.configurations import (
    Adversarial,
    AdversarialFeatureMaps,
    AdversarialImages,
    Attacked,
    Augmented,
    AugmentedAdversarial,
    Clean,
    Configuration,
    ExtraPasses,
    FusedEnds,
    FusedTogether,
    FusedWeights,
    Mixed,
    NoisyFeatureMaps,
    Plain,
    Random,
    Traded,
    Unchanged,
    UnchangedFeatureMaps,
)  # fmt: skip
from advbn_lib.presets import PRESETS, ArenaPreset, AttackPreset, Preset


@dataclass(frozen=True)
class Experiment:
    """A method and why it is run.

    Attributes:
        stage: whose schedule it is trained by.
        after: the experiment whose network it starts from; empty: what the stage starts from at the preset.
    """

    name: str
    about: str
    method: Configuration
    stage: Literal["none", "pretraining", "fine_tuning"] = "fine_tuning"
    after: str = ""


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
        ("afan_points", "A-FAN with a point half way, too", AdversarialFeatureMaps(points=3)),
        ("afan_mixed", "the same, with the statistics of the last point re-injected and not the point itself", AdversarialFeatureMaps(points=3, mix="01")),
        ("afan_mixed_batch", "afan_mixed with statistics per channel over the batch", AdversarialFeatureMaps(points=3, mix="01", over="batch")),
        ("feature_noise", "control: uniform noise on features, as large as A-FAN's steps reach", NoisyFeatureMaps()),
        ("unchanged_features", "control: A-FAN's loss with an ascent of no steps", UnchangedFeatureMaps()),
        ("extra_forwards", "control: A-FAN's forward passes and no more; they move BatchNorm's running statistics", ExtraPasses()),
        ("advprop_1_step", "control: adversarial images, one step, with a BatchNorm set of their own (AdvProp)", AdversarialImages(steps=1, eps=1.0)),
        ("advprop_5_steps", "control: adversarial images, five steps (AdvProp)", AdversarialImages(steps=5, eps=4.0)),
    )
)  # fmt: skip

# Trained on attacked images: can one model serve every strength?
ATTACKED = (
    *(
        Experiment(name, about, method, "pretraining")
        for name, about, method in (
            ("pgd_4", "control: PGD training at 4/255, the right thing for weak attacks", Attacked(4.0)),
            ("pgd_8", "control: PGD training at 8/255, the right thing for strong attacks", Attacked()),
            ("trades", "control: TRADES at 8/255", Traded()),
            ("end_points", "AFA's first stage: a BatchNorm set for clean images and one for attacks of 8/255", FusedEnds()),
            ("end_points_statistics", "the same, but the sets differ in their statistics alone", FusedEnds(mix="statistics")),
            ("end_points_affine", "the same, but the sets differ in scale and offset alone", FusedEnds(mix="affine")),
            ("afa_joint", "AFA in one stage: sets and fusing weights trained together", FusedTogether()),
        )
    ),
    *(
        Experiment(name, about, method, "fine_tuning", after)
        for name, after, about, method in (
            ("afa", "end_points", "AFA: fusing weights learned between the end points, for attacks of 0 to 8/255", FusedWeights()),
            ("afa_network", "end_points", "AFA with one weight for the whole network, predicted at its first layer", FusedWeights(weights="network")),
            ("afa_parameters", "end_points", "AFA that interpolates the sets' parameters, not their outputs", FusedWeights(mix="parameters")),
            ("afa_moments", "end_points", "AFA whose predictor also sees standard deviations", FusedWeights(moments=True)),
            ("afa_supervised", "end_points", "AFA whose weights are told the strength in training: can it be read from the features?", FusedWeights(supervision=1.0)),
            ("afa_statistics", "end_points_statistics", "AFA between sets that differ in their statistics alone", FusedWeights(mix="statistics")),
            ("afa_affine", "end_points_affine", "AFA between sets that differ in scale and offset alone", FusedWeights(mix="affine")),
        )
    ),
)  # fmt: skip

# For the comparison of all methods. Whole networks trained on, and a control above the cut; the others above it are in HEADLINE and
# ABLATIONS.
TRAINED_ON = (
    Experiment("plain_finetuning", "control: the whole network trained on, on clean images", Plain()),
    Experiment("pgd_finetuning", "the whole network trained on by PGD training at 8/255", Attacked()),
    Experiment("afan_finetuning", "the whole network trained on by A-FAN", AdversarialFeatureMaps()),
    Experiment("end_points_finetuning", "the whole network trained on by AFA's first stage", FusedEnds()),
    Experiment("afa_finetuning", "AFA's second stage after that", FusedWeights(), after="end_points_finetuning"),
    Experiment("mixed_statistics", "control: statistics mixed with another image's (MixStyle), no ascent", Mixed()),
)

EXPERIMENTS = {
    experiment.name: experiment for experiment in (*HEADLINE, *ABLATIONS, *FROM_SCRATCH, *ATTACKED, *TRAINED_ON)
}


def find(experiment: str, preset: str) -> tuple[Experiment, Preset]:
    """Look both up, each with what the other decides about it.

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
    found, size = EXPERIMENTS[experiment], PRESETS[preset]
    if isinstance(size, AttackPreset) and isinstance(found.method, Attacked):
        found = replace(found, method=replace(found.method, steps=size.attack_steps))
        if found.after:  # fixed weights between the same sets were tested with the experiment that it starts from
            size = replace(size, attacked=replace(size.attacked, fixed_weights=()))
    if isinstance(size, ArenaPreset):
        size = replace(size, fine_tuning=size.schedule_of(experiment), rates=(), epochs=())
    return found, size
