"""Trained networks that come with the library, so that a notebook need not train them: small files, each with a record.

``colour_mnist_32``: a StyleGAN of coloured digits at 32x32 pixels and an encoder into its codes, both trained at the preset ``cpu``
(experiments ``generator`` and ``encoding``). The checksum of the generator stands in its record, too.

Which generator is shipped was settled before the training: of seeds 0, 1, ..., the first whose made pictures have an FID of at most
:data:`WORST_FID`, and in which no digit is rarer than :data:`RAREST`, be all styles of one w or of two. A first one, trained with
StyleGAN's own share of mixed pictures (0.9), had nearly lost a digit; hence the smaller share at this preset.
"""

from __future__ import annotations

from pathlib import Path

from advbn_lib.models.stylegan import Generator, load_generator
from advbn_lib.style_encoder_file import load_encoder
from advbn_lib.style_encoding import StyleEncoder

FOLDER = Path(__file__).parent
COLOUR_MNIST = "colour_mnist_32"
WORST_FID = 0.2  # in the features of the bench's classifier
RAREST = 0.03  # share of the pictures made; about a third of what the rarest digit has among real ones


def shipped_generator(name: str = COLOUR_MNIST) -> Generator:
    """The generator of this name: on the CPU, in eval mode, frozen.

    Raises:
        CheckpointError: there is none of this name, or its file is damaged.
        ModuleNotFoundError: safetensors is not installed; the message says how to.
    """
    return load_generator(FOLDER / f"{name}.safetensors")


def shipped_encoder(generator: Generator, name: str = COLOUR_MNIST) -> StyleEncoder:
    """The encoder into this generator's codes: on the CPU, in eval mode, frozen.

    Raises:
        CheckpointError: there is none of this name, its file is damaged, or it belongs to another generator.
        ModuleNotFoundError: safetensors is not installed; the message says how to.
    """
    return load_encoder(FOLDER / f"{name}_encoder.safetensors", generator)
