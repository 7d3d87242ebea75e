"""What a fresh machine relies on: pins, the conda environment, the commands, the address, the wheel."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import stamp
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# What Colab's GPU runtime had in August 2026. The library must be content with it.
COLAB = {
    "torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128", "numpy": "2.1.3",
    "matplotlib": "3.10.0", "seaborn": "0.13.2", "tqdm": "4.67.3",
}  # fmt: skip


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def hidden(file: Path, folder: Path) -> bool:
    """What tools leave behind."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def text_files() -> list[Path]:
    """Every file of the project that a person could have typed something into."""
    skip = {".venv", "_build", "build", "dist", "runs", "data", "records", "__pycache__", ".git"}
    folders = [
        folder
        for folder in ROOT.iterdir()
        if folder.is_dir() and folder.name not in skip and not folder.name.startswith(".")
    ]
    folders += [ROOT / ".ci", ROOT / ".github"]
    files = [file for file in ROOT.iterdir() if file.is_file()]
    files += [file for folder in folders for file in folder.rglob("*") if file.is_file() and not hidden(file, folder)]
    return [
        file
        for file in files
        if file.suffix not in {".pyc", ".png", ".npz", ".safetensors"} and not file.parent.name.endswith(".egg-info")
    ]


def test_constraints_are_exact_and_hold_no_address():
    for line in pins():
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and requirement.url is None and not requirement.extras, line


def test_constraints_meet_every_requirement():
    exact = [Requirement(line) for line in pins()]
    wanted = project()["dependencies"] + sum(project()["optional-dependencies"].values(), [])
    for requirement in map(Requirement, wanted):
        (pin,) = [pin for pin in exact if pin.name.lower() == requirement.name.lower()]
        (version,) = [specifier.version for specifier in pin.specifier]
        assert requirement.specifier.contains(version), f"{requirement} but {pin}"


def test_conda_environment_equals_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.12", "pip"]
    editable, *rest = pip["pip"]
    assert editable == "-e .[book,test]"
    assert rest == pins(), "run `make lock`, which renews both files"


def test_library_has_lower_bounds_only_and_leaves_colab_alone():
    requirements = [Requirement(line) for line in project()["dependencies"]]
    assert {requirement.name for requirement in requirements} == set(COLAB)
    for requirement in requirements:
        assert [specifier.operator for specifier in requirement.specifier] == [">="]
        assert requirement.specifier.contains(COLAB[requirement.name]), requirement
    assert project()["requires-python"] == ">=3.11"


def test_jupyter_book_stays_below_version_2():
    (requirement,) = [
        Requirement(line) for line in project()["optional-dependencies"]["book"] if line.startswith("jupyter-book")
    ]
    assert requirement.specifier.contains("1.0.4.post1") and not requirement.specifier.contains("2.0")


def test_wheel_carries_the_records_and_nothing_else(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "advbn_lib", tree / "advbn_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    tree.joinpath("records/advbn").mkdir(parents=True)
    tree.joinpath("records/advbn/cpu-s0.json").write_text("{}")
    tree.joinpath("records/advbn/notes.txt").write_text("not a record")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
        str(tree),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    sources = [file.relative_to(ROOT).as_posix() for file in (ROOT / "advbn_lib").rglob("*.py")]
    data = (ROOT / "advbn_lib" / "data").glob("*")
    sources += [file.relative_to(ROOT).as_posix() for file in data if file.suffix in (".json", ".txt")]
    networks = (ROOT / "advbn_lib" / "generators").glob("*.safetensors")
    sources += [file.relative_to(ROOT).as_posix() for file in networks]
    sources.append("advbn_lib/same_numbers.json")
    assert sorted(names) == sorted([*sources, "advbn_lib/_records/advbn/cpu-s0.json"])


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make on this machine")
def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "3.11" in done.stderr and "PYTHON=/path/to/python" in done.stderr
    assert not tmp_path.joinpath("venv").exists()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
def test_ci_script_is_sound_and_builds_before_it_tests():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    lines = script.read_text().splitlines()
    assert lines.index("make book") < lines.index("make test")


@pytest.mark.parametrize("name", ["tests.yml", "publish.yml"])
def test_workflows_use_the_two_commands(name):
    workflow = yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    commands = " ".join(step.get("run", "") for step in job["steps"])
    assert "make book" in commands
    assert "make test" in commands if name == "tests.yml" else "book/stamp.py" in commands


def test_address_stands_in_one_place():
    """In _config.yml and, because Colab sees nothing else, in chapters and assignments, where stamping changes it."""
    address = stamp.current_address(ROOT)
    holders = {
        file.relative_to(ROOT).as_posix() for file in text_files() if address in file.read_text(encoding="utf-8")
    }
    installing = {file.relative_to(ROOT).as_posix() for file in stamp.installing(ROOT)}
    assert {name.split("/")[0] for name in installing} == {"notebooks", "assignments"}
    assert holders == {"_config.yml"} | installing


def test_notebooks_install_from_the_address_once():
    address = stamp.current_address(ROOT)
    for file in (file for file in stamp.installing(ROOT) if file.suffix == ".ipynb"):
        code = [
            "".join(cell["source"])
            for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
            if cell["cell_type"] == "code"
        ]
        assert re.findall(r"git\+(https://[^\s\"'@]+)", code[0]) == [address], file.name
        assert not any("github.com" in cell for cell in code[1:]), file.name


def test_links_of_assignments_work_in_a_single_copy():
    """An assignment is handed out as one file: its links are full addresses, and lead to files that there are."""
    address = stamp.current_address(ROOT)
    files = [file for file in stamp.installing(ROOT) if file.parts[-3] == "assignments"]
    found = 0
    for file in files:
        for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
            assert link.startswith(f"{address}/blob/HEAD/"), f"{file.name}: {link}"
            assert ROOT.joinpath(link.removeprefix(f"{address}/blob/HEAD/")).is_file(), link
            found += 1
    assert found >= 12


@pytest.fixture
def checkout(tmp_path):
    """The files that stamping may touch, in a folder of their own."""
    shutil.copy(ROOT / "_config.yml", tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "assignments", tmp_path / "assignments")
    return tmp_path


def test_stamp_changes_the_address_everywhere_and_back(checkout):
    before = {file: file.read_bytes() for file in checkout.rglob("*") if file.is_file()}
    old = stamp.current_address(checkout)
    stamp.stamp(checkout, "https://github.com/someone/a-fork.git", branch="gh-pages")
    config = yaml.safe_load((checkout / "_config.yml").read_text(encoding="utf-8"))
    assert config["repository"] == {"url": "https://github.com/someone/a-fork", "branch": "gh-pages"}
    for file in stamp.installing(checkout):
        text = file.read_text(encoding="utf-8")
        assert "git+https://github.com/someone/a-fork" in text and old not in text
    linking = (checkout / "assignments" / "student" / "2_write_advbn.ipynb").read_text(encoding="utf-8")
    assert "](https://github.com/someone/a-fork/blob/HEAD/notebooks/" in linking
    stamp.stamp(checkout, old, branch="main")
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize(
    "address", ["someone/a-fork", "http://github.com/a/b", "https://github.com/a", "https://github.com/a/b/c"]
)
def test_stamp_refuses_what_is_no_address(checkout, address):
    before = (checkout / "_config.yml").read_bytes()
    with pytest.raises(stamp.StampError, match="OWNER/REPO"):
        stamp.stamp(checkout, address)
    assert (checkout / "_config.yml").read_bytes() == before


def test_stamp_says_when_a_notebook_lacks_the_address(checkout):
    (checkout / "notebooks" / "99_odd.ipynb").write_text("{}")
    old = stamp.current_address(checkout)
    with pytest.raises(stamp.StampError, match="99_odd"):
        stamp.stamp(checkout, "https://github.com/someone/a-fork")
    assert stamp.current_address(checkout) == old
