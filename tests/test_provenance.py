"""What a record says about its code: a hash that follows the code, and not its comments."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_network

from advbn_lib import provenance
from advbn_lib.running import prepare

MODULES = ["advbn_lib.training", "advbn_lib.methods.advbn", "advbn_lib.evaluation"]


@pytest.fixture
def library(tmp_path) -> Path:
    """A copy of the library, to change."""
    return Path(
        shutil.copytree(ROOT / "advbn_lib", tmp_path / "advbn_lib", ignore=shutil.ignore_patterns("__pycache__"))
    )


def code_hash(library: Path, modules=MODULES) -> str:
    """Computed by the copy's own code, without importing the rest of it."""
    spec = importlib.util.spec_from_file_location("copied_provenance", library / "provenance.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.code_hash(modules)


def edit(path: Path, old: str, new: str) -> None:
    source = path.read_text(encoding="utf-8")
    assert old in source
    path.write_text(source.replace(old, new, 1), encoding="utf-8")


def test_the_hash_does_not_depend_on_the_place_or_the_order(library):
    assert code_hash(library) == provenance.code_hash(MODULES) == provenance.code_hash(reversed(MODULES))


def test_the_hash_depends_on_the_modules():
    assert len({provenance.code_hash([name]) for name in MODULES}) == 3


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ascent.py", "    x = x.detach()\n", "    x = x.detach()  # a comment\n"),
        ("ascent.py", "    x = x.detach()\n", "\n    # a comment\n    x = x.detach()\n\n\n"),
        ("ascent.py", '"""How to climb.', '"""Another text\n    of several lines.'),
        ("ascent.py", '"""The one inner', '"""# No comment, "but" a docstring: the one inner'),
        ("ascent.py", "from __future__", "# a comment\n\nfrom __future__"),
    ],
    ids=["comment", "lines", "class docstring", "module docstring", "head"],
)
def test_comments_docstrings_and_blank_lines_do_not_count(library, name, old, new):
    before = code_hash(library)
    edit(library / name, old, new)
    assert code_hash(library) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("ascent.py", "x = x.detach()", "x = x.detach().clone()"), ("ascent.py", "size: float = 0.2", "size: float = 0.3"),
        ("ascent.py", "    x = x.detach()\n", "    pass\n    x = x.detach()\n"), ("ascent.py", "    x = x.detach()\n", '    "# text"\n    x = x.detach()\n'),
    ],
    ids=["code", "default", "statement", "string that is no docstring"],
)  # fmt: skip
def test_code_counts(library, name, old, new):
    before = code_hash(library)
    edit(library / name, old, new)
    assert code_hash(library) != before


def test_a_hash_sign_in_a_string_is_not_a_comment(library):
    path = library / "ascent.py"
    path.write_text(path.read_text(encoding="utf-8") + '\nCOLOUR = "red # 1"\n', encoding="utf-8")
    before = code_hash(library)
    edit(path, "# 1", "# 2")
    assert code_hash(library) != before


USED = [
    "training", "evaluation", "statistics", "ascent", "perturbations", "splitting", "dual_bn", "modes", "weights",
    "methods/base", "methods/advbn", "models/cifar_resnet", "data/loader", "data/shifts", "data/images", "data/corruptions", "data/jpeg",
    "data/motion", "data/plasma", "data/resampling", "data/frost", "data/styles", "data/paintings",
]  # fmt: skip


@pytest.mark.parametrize("name", USED)
def test_a_run_of_advbn_depends_on_all_the_code_that_it_uses(library, name, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", library)
    job = prepare("advbn", "smoke", device="cpu")
    before = job.code
    path = library / f"{name}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nEXTRA = 1\n", encoding="utf-8")
    assert job.code != before


@pytest.mark.parametrize(
    "name",
    [
        "claims", "reported", "records", "benchmarks", "measurements", "appearance", "decoder", "appearance_study",
        "adversarial_images", "__main__", "provenance", "checkpoints", "files", "progress", "running", "experiments",
        "data/sets", "data/cifar10", "data/digits", "data/pacs", "data/cifar10c", "data/svhn",
        "data/mnist", "data/colour_mnist", "data/smiles", "side_by_side", "calibration", "plan",
        "data/tiny_imagenet", "strength_statistics", "robustness", "fused_bn", "attacks", "figures_afa",  # the records hold a checksum of what they read
    ],
)  # fmt: skip
def test_a_run_of_advbn_does_not_depend_on_what_cannot_change_its_numbers(library, name, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", library)
    job = prepare("advbn", "smoke", device="cpu")
    before = job.code
    path = library / f"{name}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nEXTRA = 1\n", encoding="utf-8")
    assert job.code == before


BY_ANOTHER_PYTHON = """
import importlib.util, sys, types
sys.modules["torch"] = types.ModuleType("torch")  # not needed for the hash, and not installed everywhere
spec = importlib.util.spec_from_file_location("copied_provenance", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.code_hash(sys.argv[2:]))
"""


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_every_python_computes_the_same_hash(python):
    found = shutil.which(python)
    if not found or subprocess.run([found, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no working {python} here")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [found, "-c", BY_ANOTHER_PYTHON, str(ROOT / "advbn_lib" / "provenance.py"), *MODULES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == provenance.code_hash(MODULES), done.stderr


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(library, monkeypatch) -> Path:
    """A git checkout with the copy in it."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    git(library.parent, "init", "-q")
    git(library.parent, "add", ".")
    git(library.parent, "commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "PACKAGE", library)
    return library.parent


def test_git_state_is_the_commit_and_whether_the_library_differs(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.git_state() == {"commit": commit, "dirty": False}
    (checkout / "notes.txt").write_text("not the library")
    assert provenance.git_state() == {"commit": commit, "dirty": False}
    edit(checkout / "advbn_lib" / "ascent.py", "0.2", "0.3")
    assert provenance.git_state() == {"commit": commit, "dirty": True}


def test_outside_a_checkout_there_is_no_commit(library, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", library)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(library.parent.parent))
    assert provenance.git_state() == {"commit": None, "dirty": None}


def test_an_installed_library_is_not_of_the_checkout_around_it(checkout, monkeypatch):
    """A virtual environment often lies inside some other project's checkout."""
    installed = checkout / ".venv" / "site-packages" / "advbn_lib"
    shutil.copytree(checkout / "advbn_lib", installed)
    (checkout / ".gitignore").write_text(".venv/\n")
    monkeypatch.setattr(provenance, "PACKAGE", installed)
    assert provenance.git_state() == {"commit": None, "dirty": None}


def test_without_git_there_is_no_commit(library, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state() == {"commit": None, "dirty": None}


def test_machine_and_software_are_named():
    machine = provenance.hardware(torch.device("cpu"))
    assert machine["device"] == "cpu" and machine["gpu"] is None and machine["cpu"]
    assert machine["threads"] == torch.get_num_threads() and machine["cores"] == os.cpu_count()
    assert provenance.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert provenance.versions().keys() == {"python", "torch", "torchvision", "numpy"}


def test_peak_memory_is_that_of_this_process():
    peak = provenance.peak_memory_mib(torch.device("cpu"))
    assert 50 < peak < 200_000


def test_the_checksum_of_weights_notices_values_and_names_but_not_layout():
    model = tiny_network()
    before = provenance.state_checksum(model.state_dict())
    assert provenance.state_checksum(model.to(memory_format=torch.channels_last).state_dict()) == before
    renamed = {f"x{name}": value for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.fc.bias[0] += 1
    assert len({before, provenance.state_checksum(model.state_dict()), provenance.state_checksum(renamed)}) == 3
