"""Trained networks that come with the library, so that a notebook need not train them: small files, each with a record.

``colour_mnist_32``: a StyleGAN of coloured digits at 32x32 pixels and an encoder into its codes, both trained at the preset ``cpu``
with seed 0 (experiments ``generator`` and ``encoding``). The checksum of the generator stands in its record, too.
"""

from __future__ import annotations

from pathlib import Path

from advbn_lib.models.stylegan import Generator, load_generator
from advbn_lib.style_encoder_file import load_encoder
from advbn_lib.style_encoding import StyleEncoder

FOLDER = Path(__file__).parent
COLOUR_MNIST = "colour_mnist_32"


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
