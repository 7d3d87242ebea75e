"""What the tests share: small networks and data, snapshots of a model, and the command line as a subprocess."""

import os
import random
import subprocess
import sys
from pathlib import Path

if os.environ.get("PYTEST_XDIST_WORKER"):  # tests run side by side: the cores are shared out, before torch counts them
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

import numpy as np
import pytest
import torch
from torch import nn

import advbn_lib
from advbn_lib.data.images import ImageSet
from advbn_lib.models import CifarResNet

ROOT = Path(advbn_lib.__file__).resolve().parent.parent
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "ADVBN_RECORDS"},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, in whatever order the tests run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def data_folder() -> Path:
    """The folder with the real data sets; the test is skipped without it."""
    if not os.environ.get("ADVBN_DATA"):
        pytest.skip("ADVBN_DATA does not name a folder with the real data")
    return Path(os.environ["ADVBN_DATA"])


@pytest.fixture(scope="session")
def released() -> dict[str, np.ndarray]:
    """What the released CIFAR-10-C generator makes of 8 images."""
    path = Path(os.environ.get("ADVBN_GOLDEN", "")) / "cifar10c_first8.npz"
    if not path.is_file():
        pytest.skip("ADVBN_GOLDEN does not name a folder with cifar10c_first8.npz (it holds data-set images)")
    return dict(np.load(path))


def tiny_network(width: int = 4) -> CifarResNet:
    """A ResNet-8 for 10 classes."""
    return CifarResNet(8, width)


def tiny_images(count: int = 128, size: int = 12, seed: int = 0, name: str = "tiny/train") -> ImageSet:
    """Random pixels, and labels that depend on them, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 10
    pixels[torch.arange(count), labels % 3, labels] = 255
    return ImageSet(name, pixels, labels, tuple("0123456789"), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def batch(count: int = 8, size: int = 12, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images and labels."""
    return torch.randn(count, 3, size, size), torch.randint(0, classes, (count,))


def copy_of_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """The entries of two state dicts that are not the same bit for bit."""
    return [
        name
        for name in first.keys() | second.keys()
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]


def traces(model: nn.Module) -> dict[str, object]:
    """All that a method could leave behind in a model: tensors, modes, gradients, flags, branches; and the random state."""
    return {
        "state": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "branches": {name: module.branch for name, module in model.named_modules() if hasattr(module, "branch")},
        "gradients": {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "hooks": {name: len(module._forward_hooks) for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
    }


def assert_same_traces(before: dict[str, object], after: dict[str, object]) -> None:
    assert differing(before["state"], after["state"]) == []
    assert differing({"random": before["random"]}, {"random": after["random"]}) == []
    for kind in ("modes", "branches", "flags", "hooks"):
        assert before[kind] == after[kind], kind
    for name, gradient in before["gradients"].items():
        now = after["gradients"][name]
        assert (gradient is None and now is None) or torch.equal(gradient, now), f"gradient of {name}"


def command_line(*arguments: object, **options) -> subprocess.CompletedProcess:
    """``python -m advbn_lib ARGUMENTS`` to its end."""
    command = [sys.executable, "-m", "advbn_lib", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    """A folder with ``records`` and ``runs`` after AdvBN, and the pretraining it needs, ran at the smoke preset with seed 0."""
    folder = tmp_path_factory.mktemp("smoke")
    done = command_line(
        "--records",
        folder / "records",
        "run",
        "advbn",
        "--runs",
        folder / "runs",
        "--quiet",
        "--device",
        "cpu",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def trainings(monkeypatch) -> list:
    """Every call of the training loop from now on."""
    from advbn_lib import running

    calls, original = [], running.train

    def counted(method, *arguments, **options):
        calls.append(type(method).__name__)
        return original(method, *arguments, **options)

    monkeypatch.setattr(running, "train", counted)
    return calls
