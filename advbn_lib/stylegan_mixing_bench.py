"""AdvMix with a trained StyleGAN: on Color-MNIST under bias, the styles to mix with are the fine codes of real images.

The training images of each level of bias are put into the codes of a generator that has seen unbiased colours (a generator that has
seen only biased ones could not break the bias); the first ``cut`` styles of a code are the content, the others the style. All else
is as in :mod:`advbn_lib.mixing_bench`, but smaller: a pass through the generator costs far more than one through the classifier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advbn_lib.data.colour_mnist import EXTREME, UNBIASED, ColouredDigits
from advbn_lib.encoding_bench import BENCHES as ENCODING_BENCHES
from advbn_lib.encoding_bench import Tools, tools_of
from advbn_lib.generators import shipped_encoder
from advbn_lib.methods.advmix import climb_of
from advbn_lib.methods.base import Method
from advbn_lib.mixing import Mixer, worst_style
from advbn_lib.mixing_bench import Level, MixingBench, gathered, level_name, tested
from advbn_lib.mixing_methods import ABOUT as ABOUT_METHODS
from advbn_lib.mixing_methods import METHODS as ALL_METHODS
from advbn_lib.mixing_methods import MixingSizes, require_method
from advbn_lib.mixing_robustness import MIXING_SEED
from advbn_lib.mixing_trials import Material, MixingRun, once, train_on
from advbn_lib.modes import evaluating
from advbn_lib.provenance import state_checksum
from advbn_lib.style_codes import CodeSchedule, optimise_codes
from advbn_lib.style_encoding import StyleDecoder, StyleEncoder, encode_images, train_encoder
from advbn_lib.training import Schedule

METHODS = {
    name: ALL_METHODS[name]
    for name in (
        "nominal", "advmix", "randmix", "randmix_looks", "randmix_passes", "reconstruction", "mixup", "linf", "recolour",
    )
}  # fmt: skip
_OF_IMAGES = ("nominal", "mixup", "linf", "recolour")  # no generator is in them
ABOUT = {
    name: about if name in _OF_IMAGES else about.replace("colours", "styles").replace("colour", "style")
    for name, about in ABOUT_METHODS.items()
    if name in METHODS
}


@dataclass(frozen=True, kw_only=True)
class StyleGANMixingBench(MixingBench):
    """The sizes.

    Args:
        generator: preset of :mod:`advbn_lib.encoding_bench`: says generator and encoder. At ``"cpu_generator"`` those that come with
            the library are taken.
        cut: how many styles are content: the fewest with which swapping styles costs at most two points of accuracy, by
            :func:`~advbn_lib.style_splitting.propose_cut` from the record ``encoding``.
        codes: how the encoder's codes are improved.
        tested: how many of the first test images are encoded: those that are attacked, and the others whose styles are taken.

    All real test images count for the accuracy; no code of them is needed.
    """

    generator: str
    cut: int
    codes: CodeSchedule
    tested: int


@dataclass(frozen=True)
class Coder:
    """Images to codes, and back."""

    tools: Tools
    encoder: StyleEncoder
    decoder: StyleDecoder
    codes: CodeSchedule

    def material(self, digits: ColouredDigits, folder: Path | None, show_progress: bool) -> Material:
        """The images with codes of this generator, on the CPU.

        Args:
            folder: where the codes are kept; another one for each set of images.
        """
        device = self.encoder.mean_w.device
        images = digits.images.to(device)
        start = encode_images(self.encoder, images)
        found = optimise_codes(
            self.tools.generator, images, start, self.tools.distance, self.codes, self.encoder, 0, folder, show_progress
        )
        content, style = self.decoder.split(found.codes.cpu())
        return Material(digits.images, content.contiguous(), style.contiguous(), self.decoder)


def coder_of(
    bench: StyleGANMixingBench, device: torch.device, folder: Path | None, show_progress: bool = True
) -> Coder:
    """Generator, judge and encoder of the bench. What has to be trained first is kept in ``folder``."""
    tools = tools_of(bench.generator, device, folder, show_progress)
    if bench.generator == "cpu_generator":
        encoder = shipped_encoder(tools.generator.cpu()).to(device)
        tools.generator.to(device)
    else:
        unbiased = bench.digits("train", UNBIASED, 0).images
        schedule = ENCODING_BENCHES[bench.generator].encoder
        encoder, _ = train_encoder(
            tools.generator, unbiased, tools.distance, schedule, 0, folder, show_progress=show_progress
        )
    return Coder(tools, encoder, StyleDecoder(tools.generator, bench.cut), bench.codes)


def run_stylegan_mixing_bench(
    bench: StyleGANMixingBench, method_name: str, seed: int, device: torch.device, code: str, folder: Path | None = None,
    shared: Path | None = None, show_progress: bool = True,
) -> MixingRun:  # fmt: skip
    """Train and test one of ``METHODS`` at each level of bias; see :func:`advbn_lib.mixing_bench.run_mixing_bench`.

    Args:
        folder: for checkpoints and for the levels that are done; None: nothing is kept.
        shared: for what all methods share: networks, and the codes of a seed's images.

    Raises:
        ValueError: no such method.
    """
    require_method(method_name, METHODS)
    coder = coder_of(bench, device, shared, show_progress)
    rows = {}
    for level in bench.levels:
        rows[level_name(level)] = _level(
            bench, coder, method_name, level, seed, device, code, folder, shared, show_progress
        )
    weights = {
        "source": f"classifier: random, seed {seed}; generator and encoder: {bench.generator}",
        "sha256": next(iter(rows.values()))["weights"],
        "generator": state_checksum(coder.tools.generator.state_dict()),
        "encoder": state_checksum(coder.encoder.state_dict()),
    }
    run = gathered(rows, bench.levels, weights)
    kept = {name: row["label_kept"] for name, row in rows.items()}
    return dataclasses.replace(run, metrics={**run.metrics, "label_kept": kept})


def _level(
    bench: StyleGANMixingBench, coder: Coder, method_name: str, level: Level, seed: int, device: torch.device, code: str,
    folder: Path | None, shared: Path | None, show_progress: bool,
) -> dict[str, Any]:  # fmt: skip
    train_set, test = (bench.digits(split, level, seed) for split in ("train", "test"))
    data = {
        digits.images.name: {"images": len(digits), "sha256": digits.images.checksum} for digits in (train_set, test)
    }
    networks = [state_checksum(network.state_dict()) for network in (coder.tools.generator, coder.encoder)]
    sizes = {**dataclasses.asdict(bench), "levels": None}  # a level does not depend on which others there are
    identity = {"method": method_name, "level": level, "seed": seed, "code": code, "data": data, "bench": sizes}

    def trial(checkpoint: Path | None, key: str) -> tuple[nn.Module, dict[str, Any]]:
        kept = None if shared is None else shared / f"codes-{code[:8]}-{level_name(level)}-s{seed}"
        # The oracle draws colours: it needs to know them.
        exact = method_name == "recolour"
        shown = train_set if exact else coder.material(train_set, kept and kept / "train", show_progress)
        trained = train_on(shown, bench, METHODS[method_name], seed, device, checkpoint, key, show_progress)
        halves = _halves(
            coder.material(test.first(bench.tested), kept and kept / "test", show_progress), bench.attacked, device
        )
        row = tested(bench, trained, test.images.to(device), *halves, show_progress)
        row["label_kept"] = label_kept(bench, trained.method, coder.tools.judge, *halves)
        return trained.method.model, {**row, "data": data}

    return once(folder, identity | {"networks": networks}, trial)


def label_kept(
    sizes: MixingSizes, method: Method, judge: nn.Module, attacked: Material, others: Material
) -> dict[str, float]:
    """Share of mixed images in which the judge, who did not take part, still reads the label: a mixture must not change it.

    Args:
        attacked, others: as for the robust accuracy; on the models' device.

    Returns:
        ``real`` images; decoded with the ``own`` style, with a ``swapped`` one, with the ``worst`` one for the method's model as
        AdvMix's training searches it, and with the worst one ``for_judge``: part of the last may be the judge's own weakness.
    """
    images = attacked.images
    mixer = Mixer(attacked.decoder, others.bank(images.labels.device), images.mean, images.std)
    batch, ball, climb = attacked.batch(), mixer.bank.around(sizes.eps), climb_of(sizes.steps)
    draws = torch.Generator(images.labels.device).manual_seed(MIXING_SEED)

    def worst(predict: Callable[[Tensor], Tensor]) -> Tensor:
        return worst_style(predict, mixer, batch, images.labels, ball, climb, sizes.restarts, draws)

    with evaluating(method), evaluating(judge):
        styles = {
            "own": batch.style,
            "swapped": mixer.others(batch, draws),
            "worst": worst(method.predict),
            "for_judge": worst(judge),
        }
        with torch.no_grad():
            shown = {
                "real": batch.images,
                **{name: mixer.images(batch.content, style) for name, style in styles.items()},
            }
            return {
                name: (judge(each).argmax(1) == images.labels).double().mean().item() for name, each in shown.items()
            }


def _halves(tested: Material, attacked: int, device: torch.device) -> tuple[Material, Material]:
    """The images that are attacked, and the others, whose styles are taken; on the device."""
    first, others = slice(None, attacked), slice(attacked, None)
    return tuple(
        Material(
            tested.images.first(part.stop, part.start or 0).to(device), tested.content[part].to(device),
            tested.style[part].to(device), tested.decoder,
        )
        for part in (first, others)
    )  # fmt: skip


BENCHES: dict[str, StyleGANMixingBench] = {
    "smoke_generator": StyleGANMixingBench(
        data_set="digits", images=(128, 120), attacked=20, tested=60, width=4, levels=(0.02, UNBIASED), restarts=2, steps=1,
        schedule=Schedule(epochs=1, batch_size=64, lr=0.05), pgd_steps=2, attack_steps=1, attack_restarts=2,
        generator="smoke_generator", cut=4, codes=CodeSchedule(steps=2, batch_size=64),
    ),
    "cpu_generator": StyleGANMixingBench(
        data_set="mnist", images=(2_000, None), attacked=100, tested=400, width=8, levels=(EXTREME, 0.02, 0.035, UNBIASED),
        restarts=2, steps=2, attack_steps=2,
        schedule=Schedule(epochs=8, batch_size=128, lr=0.05, milestones=(5, 7), warmup=0.5, weight_decay=5e-4),
        generator="cpu_generator", cut=6, codes=CodeSchedule(steps=10),
    ),
}  # fmt: skip
