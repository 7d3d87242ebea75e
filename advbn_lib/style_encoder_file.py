"""The file of a trained encoder: safetensors in half precision, tied to the generator whose codes it gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from advbn_lib.checkpoints import CheckpointError
from advbn_lib.files import atomic_write
from advbn_lib.provenance import state_checksum
from advbn_lib.style_encoding import StyleEncoder

FORMAT = "advbn_lib style encoder 1"


def save_encoder(path: Path, encoder: StyleEncoder, generator: nn.Module, width: int, about: dict[str, Any]) -> None:
    """Write the weights, rounded to half precision, with the generator's checksum and ``about`` (JSON) in the file.

    Args:
        width: the encoder's, see :class:`~advbn_lib.style_encoding.StyleEncoder`.

    Raises:
        ModuleNotFoundError: safetensors is not installed; the message says how to.
    """
    state = {name: value.detach().cpu().half().contiguous() for name, value in encoder.state_dict().items()}
    written = {"format": FORMAT, "width": str(width), "about": json.dumps(about)}
    written |= {"generator": state_checksum(generator.state_dict()), "sha256": state_checksum(state)}
    content = _safetensors().torch.save(state, written)
    with atomic_write(path) as file:
        file.write(content)


def load_encoder(path: Path, generator: nn.Module) -> StyleEncoder:
    """The encoder of a file of :func:`save_encoder`: on the CPU, in eval mode, frozen.

    Raises:
        CheckpointError: the file is missing or damaged, or the encoder is of another generator.
        ModuleNotFoundError: safetensors is not installed; the message says how to.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no encoder file {path}: train one with train_encoder")
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            written = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}): fetch it again") from error
    if written.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no encoder file of this library: its metadata do not say {FORMAT!r}")
    if state_checksum(state) != written.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its weights do not have the checksum that it names; fetch it again")
    if state_checksum(generator.state_dict()) != written.get("generator"):
        raise CheckpointError(
            f"{path} is an encoder into the codes of another generator: load that one, or train an encoder"
        )
    encoder = StyleEncoder(generator, int(written["width"]))
    encoder.load_state_dict({name: value.float() for name, value in state.items()})
    return encoder.eval().requires_grad_(False)


def _safetensors():
    try:
        import safetensors.torch

        return safetensors
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("encoder files need safetensors: pip install 'advbn_lib[generation]'") from error
