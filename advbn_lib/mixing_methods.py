"""The methods that the benches of mixing compare, and the sizes that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from advbn_lib.attacks import PGD
from advbn_lib.data.images import ImageSet
from advbn_lib.methods.advmix import AdvMix, GreyTraining, Mixup, OnImages, RandMix, Recolour, Reconstruction
from advbn_lib.methods.base import Method
from advbn_lib.methods.baselines import PlainTraining
from advbn_lib.methods.pgd_training import PGDTraining
from advbn_lib.mixing import Decoder
from advbn_lib.style_mix import StyleBank
from advbn_lib.training import Schedule


@dataclass(frozen=True, kw_only=True)
class MixingSizes:
    """What every bench of mixing chooses.

    Args:
        attacked: how many of the first test images are mixed, with the colours of the test images after them.
        width: of :class:`~advbn_lib.models.digit_cnn.DigitCNN`.
        schedule: of each training.
        eps, steps, restarts: of AdvMix, see there. RandMix has the same eps, and with many looks as many restarts.
        clean_weight: of all methods with a clean and another loss, l-inf training among them.
        pgd_eps, pgd_steps: of l-inf training; the radius is in 1/255.
        attack_steps, attack_restarts: of the test's mixing, with the same eps.
    """

    attacked: int
    width: int
    schedule: Schedule
    eps: float = 0.3
    steps: int = 5
    restarts: int = 3
    clean_weight: float = 0.5
    pgd_eps: float = 25.5
    pgd_steps: int = 5
    attack_steps: int = 5
    attack_restarts: int = 20

    @property
    def passes(self) -> int:
        """Forward passes of AdvMix's ascents: each looks at its start and after every step.

        Its backward passes are not counted, nor the one that compares the restarts: RandMix pays that, too.
        """
        return self.restarts * (self.steps + 1)


Builder = Callable[[MixingSizes, nn.Module, Decoder, StyleBank, ImageSet], Method]


def mixed(kind: Callable[..., Method], *fields: str, **options: Any) -> Builder:
    """A builder of a :class:`~advbn_lib.methods.advmix.MixedTraining`.

    Args:
        kind: the class.
        fields: of the sizes that it takes, as ``name`` or ``name=field``; the weight of the clean loss is always among them.
        options: what it takes besides.
    """

    def build(sizes: MixingSizes, model: nn.Module, decoder: Decoder, bank: StyleBank, images: ImageSet) -> Method:
        chosen = {"clean_weight": sizes.clean_weight}
        for entry in fields:
            name, _, field = entry.partition("=")
            chosen[name] = getattr(sizes, field or name)
        return kind(model, decoder, bank, images.mean, images.std, **{**chosen, **options})

    return build


def _linf(sizes: MixingSizes, model: nn.Module, decoder: Decoder, bank: StyleBank, images: ImageSet) -> Method:
    attack = PGD(images.mean, images.std, sizes.pgd_steps, 2.5 / sizes.pgd_steps)
    return OnImages(PGDTraining(model, attack, sizes.pgd_eps, sizes.clean_weight))


METHODS: dict[str, Builder] = {
    "nominal": lambda sizes, model, decoder, bank, images: OnImages(PlainTraining(model)),
    "advmix": mixed(AdvMix, "eps", "steps", "restarts"),
    "randmix": mixed(RandMix, "eps"),
    "randmix_looks": mixed(RandMix, "eps", "looks=restarts"),
    "randmix_passes": mixed(RandMix, "eps", "looks=passes"),
    "reconstruction": mixed(Reconstruction),
    "mixup": lambda sizes, model, decoder, bank, images: OnImages(Mixup(model)),
    "linf": _linf,
    "recolour": mixed(Recolour),
    "grey": lambda sizes, model, decoder, bank, images: OnImages(GreyTraining(model, images.mean, images.std)),
    # ablations
    "advmix_mixed_alone": mixed(AdvMix, "eps", "steps", "restarts", clean_weight=0.0),
    "advmix_consistency": mixed(AdvMix, "eps", "steps", "restarts", consistency=1.0),
}
ABOUT = {
    "nominal": "plain training",
    "advmix": "AdvMix: the worst of several other images' colours, each moved in its ball",
    "randmix": "control: another image's colour, no ascent",
    "randmix_looks": "control: the worst of as many other images' colours, no ascent",
    "randmix_passes": "control: the worst of as many other images' colours as AdvMix makes passes, no ascent",
    "reconstruction": "control: decoded with the own colour",
    "mixup": "mixup of pixels",
    "linf": "l-inf adversarial training on pixels",
    "recolour": "oracle: colours drawn evenly from all there are",
    "grey": "plain training on grey images",
    "advmix_mixed_alone": "AdvMix without real images",
    "advmix_consistency": "AdvMix with a term for the same answer to both images",
}


def require_method(name: str, methods: dict[str, Builder]) -> Builder:
    """The builder of that name.

    Raises:
        ValueError: no such method.
    """
    if name not in methods:
        raise ValueError(f"methods are {', '.join(methods)}; got {name!r}")
    return methods[name]
