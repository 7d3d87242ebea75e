"""The notebooks: they run from top to bottom under ``smoke``, and they are committed the way readers need them."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import torch.nn.functional as F
from exercises import ExerciseError, of_notebook, parse
from nbformat import NotebookNode
from torch import Tensor

from advbn_lib import AdvBN, ChannelStatistics
from advbn_lib.ascent import ascend
from advbn_lib.data.images import ImageSet
from advbn_lib.methods import AFAN, Site
from advbn_lib.methods.advbn import cross_entropies
from advbn_lib.methods.advmix import climb_of
from advbn_lib.mixing import ColourDecoder, Mixer
from advbn_lib.models import CifarResNet
from advbn_lib.models.digit_cnn import DigitCNN
from advbn_lib.splitting import split_at
from advbn_lib.statistics import adain
from advbn_lib.style_mix import StyleBank
from advbn_lib.tasks import Classification

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 120  # of computing, summed over threads: a minute on two idle cores; other programs do not count
INSTALL = re.compile(
    r"# On Colab this installs the book's small library, in seconds\. Elsewhere it does nothing\.\n"
    r"import importlib\.util\n\n"
    r'if importlib\.util\.find_spec\("advbn_lib"\) is None:\n'
    r'    %pip install --quiet "advbn_lib(\[[a-z,]+\])? @ git\+https://[\w./-]+"'
)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def cells(notebook: NotebookNode, kind: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


# ---- running -------------------------------------------------------------------------------


def with_solutions(path: Path) -> NotebookNode:
    """A notebook, and behind it the code of its exercises' solutions, a cell each; the last of each must show something."""
    notebook = read(path)
    for exercise in of_notebook(path):
        for left, source in zip(reversed(range(len(exercise.python))), exercise.python, strict=True):
            tags = ["solution"] if left else ["solution", "answer"]
            notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tags}))
    return notebook


def computed() -> float:
    """Seconds of computing of all processes that this one started and that have ended, kernels among them."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(scope="session")
def executed(tmp_path_factory):
    """A function that runs a notebook and then its solutions, far from the checkout, without data or network, once."""
    import papermill

    folder, done = tmp_path_factory.mktemp("notebooks"), {}
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "test"}
    kernel = folder / "jupyter" / "kernels" / "advbn-test"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({**spec, "language": "python"}))
    nowhere = "http://127.0.0.1:9"  # a download would fail at once
    surroundings = {
        "JUPYTER_PATH": str(folder / "jupyter"), "PYTHONPATH": str(ROOT), "ADVBN_DATA": str(folder / "no-data"),
        "http_proxy": nowhere, "https_proxy": nowhere, "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere,
    }  # fmt: skip

    def run(path: Path) -> tuple[NotebookNode, float]:
        if path not in done:
            work = folder / path.stem
            work.mkdir(exist_ok=True)
            start = computed()
            with pytest.MonkeyPatch.context() as patch:
                for name, value in surroundings.items():
                    patch.setenv(name, value)
                notebook = papermill.execute_notebook(
                    with_solutions(path), folder / path.name, {"preset": "smoke", "seed": 0}, kernel_name="advbn-test",
                    cwd=work, progress_bar=False,
                )  # fmt: skip
            done[path] = notebook, computed() - start
            assert os.listdir(work) == [], "a notebook leaves files where it is run"
        return done[path]

    return run


def records_on_disk() -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in (ROOT / "records").rglob("*") if "smoke" in file.name}


@every_notebook
def test_runs_under_smoke_in_time(executed, path):
    before = records_on_disk()
    _, seconds = executed(path)
    print(f"{path.name}: {seconds:.0f} s of computing under smoke")
    assert 1 < seconds < MOST_SECONDS, "less than a second: the kernel was not counted"
    assert records_on_disk() == before, "a notebook must not write into the checkout's records"


@every_notebook
def test_solutions_run_and_show_an_answer(executed, path):
    notebook, _ = executed(path)
    tagged = {
        tag: [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])] for tag in ("solution", "answer")
    }
    assert len(tagged["answer"]) >= 2
    assert all(cell.execution_count for cell in tagged["solution"])
    for cell in tagged["answer"]:
        assert cell.outputs, f"a solution that shows nothing:\n{cell.source}"


@every_notebook
def test_shows_no_warnings_and_only_figures_with_alt_text(executed, path):
    notebook, _ = executed(path)
    outputs = [output for cell in cells(notebook, "code") for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    pictures = [tag for page in pages for tag in re.findall(r"<img[^>]*>", page)]
    assert pictures, "a chapter without a picture"
    for tag in pictures:
        assert len(re.search(r'alt="([^"]*)"', tag)[1]) > 40, f"alt text says too little: {tag[:200]}"
    raw = [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]
    assert raw == [], "show figures with advbn_lib.figures.show, which adds alt text"


# ---- form ----------------------------------------------------------------------------------


def well_formed(prose: list[NotebookNode]) -> bool:
    """Whether at most one cell has exercises, in the format of book/exercises.py."""
    try:
        return sum(parse(cell.source) is not None for cell in prose) <= 1
    except ExerciseError:
        return False


def faults(notebook: NotebookNode) -> list[str]:
    """What is wrong with the form of a notebook."""
    code, prose = cells(notebook, "code"), cells(notebook, "markdown")
    text = "\n\n".join(cell.source for cell in prose)
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    headings = re.findall(r"^# .+", text, re.MULTILINE)
    checks = {
        "has outputs": any(cell.outputs or cell.execution_count is not None for cell in code),
        "has metadata of a run": set(notebook.metadata) != {"kernelspec", "language_info"}
        or any(set(cell.metadata) - {"tags"} for cell in notebook.cells),
        "is not for the kernel python3": notebook.metadata.get("kernelspec", {}).get("name") != "python3",
        "does not begin with its title": notebook.cells[0].cell_type != "markdown" or not notebook.cells[0].source.startswith("# "),
        "has not one title": len(headings) != 1,
        "does not begin with the install cell": not INSTALL.fullmatch(code[0].source),
        "installs more": any(re.search(r"pip\s+install|conda\s+install|apt(-get)?\s+install", cell.source) for cell in code[1:]),
        "has not one cell tagged parameters": len(tagged) != 1,
        "lacks preset or seed": not tagged or re.findall(r"^(\w+) =", tagged[0].source, re.MULTILINE) != ["preset", "seed"],
        "has MyST directives or roles": bool(re.search(r"^\s*(```|:::+)\{|\{[\w:-]+\}`", text, re.MULTILINE)),
        "does not say time and cost": not all(word in notebook.cells[0].source for word in ("How long it takes", "What it costs")),
        "has no exercises": not re.search(r"^## Exercises", text, re.MULTILINE),
        "has exercises in another form": not well_formed(prose),
        "does not say where to go next": "Where to go next" not in prose[-1].source,
    }  # fmt: skip
    return [fault for fault, found in checks.items() if found]


@every_notebook
def test_form(path):
    assert faults(read(path)) == []


DAMAGE = {
    "has outputs": lambda notebook: cells(notebook, "code")[-1].update(outputs=[nbformat.v4.new_output("stream", text="1")]),
    "has metadata of a run": lambda notebook: notebook.metadata.update(papermill={}),
    "is not for the kernel python3": lambda notebook: notebook.metadata.kernelspec.update(name="venv"),
    "does not begin with its title": lambda notebook: notebook.cells.insert(0, nbformat.v4.new_markdown_cell("Hello")),
    "has not one title": lambda notebook: notebook.cells.insert(5, nbformat.v4.new_markdown_cell("# Another title")),
    "does not begin with the install cell": lambda notebook: cells(notebook, "code")[0].update(source="import torch"),
    "installs more": lambda notebook: cells(notebook, "code")[4].update(source="!pip install timm"),
    "has not one cell tagged parameters": lambda notebook: cells(notebook, "code")[4].metadata.update(tags=["parameters"]),
    "lacks preset or seed": lambda notebook: cells(notebook, "code")[1].update(source="seed = 0"),
    "has MyST directives or roles": lambda notebook: cells(notebook, "markdown")[2].update(source=":::{note}\nHello\n:::"),
    "does not say time and cost": lambda notebook: notebook.cells[0].update(source="# Title"),
    "has no exercises": lambda notebook: [cell.update(source="x") for cell in cells(notebook, "markdown") if "## Exercises" in cell.source],
    "has exercises in another form": lambda notebook: cells(notebook, "markdown")[-1].update(
        source=cells(notebook, "markdown")[-1].source.replace("<summary>Solution</summary>", "<summary>Answer</summary>", 1)
    ),
    "does not say where to go next": lambda notebook: cells(notebook, "markdown")[-1].update(source="The end."),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGE)
def test_each_fault_is_noticed(fault):
    notebook = copy.deepcopy(read(ROOT / "notebooks" / "02_advbn_from_scratch.ipynb"))
    DAMAGE[fault](notebook)
    assert fault in faults(notebook)


# ---- what the notebooks teach is what the library does -------------------------------------


def run_cell(notebook: str, containing: str, **names) -> dict:
    """The names that one cell of a notebook defines, given others."""
    [cell] = [cell for cell in cells(read(ROOT / "notebooks" / notebook), "code") if containing in cell.source]
    exec(compile(cell.source, notebook, "exec"), names)
    return names


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eps", [0.5, 1.1])
def test_ascent_by_hand_is_the_librarys(seed, eps):
    torch.manual_seed(seed)
    network = CifarResNet(8, width=4).double().eval()
    images, labels = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (16,))
    climb = run_cell("02_advbn_from_scratch.ipynb", "def climb(", torch=torch, F=F, Tensor=Tensor)["climb"]
    split = split_at(network, "layer1", images[:2])
    x = split.features(images).detach()
    a, b, losses = climb(split.tail, x, labels, eps=eps)

    method = AdvBN(copy.deepcopy(network), "layer1", eps=eps, example=images[:2])
    attack = method.attack(x, labels)
    torch.testing.assert_close((a, b), attack.delta, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), attack.losses, rtol=0, atol=1e-9)
    assert losses[-1] > losses[0]
    assert all(p.grad is None for p in network.parameters())


def test_change_by_hand_is_the_librarys():
    names = {"torch": torch, "F": F, "Tensor": Tensor}
    notebook = read(ROOT / "notebooks" / "02_advbn_from_scratch.ipynb")
    [source] = [cell.source for cell in cells(notebook, "code") if "def change(" in cell.source]
    exec(source[: source.index("@torch.no_grad()")], names)
    x = torch.rand(8, 5, 6, 6, dtype=torch.float64)
    a, b = torch.rand(2, 1, 5, 1, 1, dtype=torch.float64) * 2.2 - 0.1
    torch.testing.assert_close(names["change"](x, a, b), ChannelStatistics(1.1).apply(x, (a, b)), rtol=0, atol=1e-12)


def test_adain_by_hand_is_the_librarys():
    notebook = read(ROOT / "notebooks" / "01_style_lives_in_statistics.ipynb")
    [source] = [
        cell.source for cell in cells(notebook, "code") if "swapped = " in cell.source and "from_library" in cell.source
    ]
    lines = source[source.index("x_mean, x_std") : source.index("from_library")]
    names = {"x": torch.rand(3, 5, 6, 7, dtype=torch.float64), "y": torch.rand(3, 5, 4, 4, dtype=torch.float64)}
    exec(lines, names)
    torch.testing.assert_close(names["swapped"], adain(names["x"], names["y"]), rtol=0, atol=1e-12)
    assert not torch.allclose(names["swapped"], names["x"])


@pytest.mark.parametrize("seed", range(3))
def test_afans_ascent_by_hand_is_the_librarys(seed):
    torch.manual_seed(seed)
    network = CifarResNet(8, width=4).double().eval()
    images, labels = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (16,))
    climb = run_cell("07_afan_from_scratch.ipynb", "def climb(", torch=torch, F=F, Tensor=Tensor)["climb"]
    task, site = Classification(network, images[:2]), Site("layer1", gamma=20.0)
    cut = task.cut(images, labels, "layer1")
    delta, losses = climb(task.split("layer1").tail, cut.features, labels, gamma=20.0)
    attack = AFAN(task, [site]).attack(cut, site)
    torch.testing.assert_close(delta, attack.delta[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), attack.losses, rtol=0, atol=1e-9)
    assert losses[-1] > losses[0] and delta.abs().max() <= site.reach + 1e-12
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_advmix_ascent_by_hand_is_the_librarys(seed):
    torch.manual_seed(seed)
    network = DigitCNN(4).double().eval()
    content, labels = torch.rand(8, 1, 32, 32, dtype=torch.float64), torch.randint(0, 10, (8,))
    bank = StyleBank(torch.rand(40, 3), torch.randint(0, 10, (40,)), bounds=(0.0, 1.0))
    centres = bank.draw(8).double()
    images = ImageSet(
        "none", torch.zeros(1, 3, 32, 32, dtype=torch.uint8), labels[:1], tuple("0123456789"), (0.5,) * 3, (0.5,) * 3
    )
    names = {
        "torch": torch, "F": F, "bank": bank, "ColourDecoder": ColourDecoder, "LIVE": SimpleNamespace(eps=0.3, steps=4),
        "train_set": SimpleNamespace(images=images),
    }  # fmt: skip
    climb = run_cell("12_advmix.ipynb", "def climb(", **names)["climb"]
    mixer, ball = Mixer(ColourDecoder(), bank, images.mean, images.std), bank.around(0.3)
    torch.manual_seed(100 + seed)
    by_hand, losses = climb(network, content, labels, centres)
    torch.manual_seed(100 + seed)
    found = ascend(
        lambda style: cross_entropies(network(mixer.images(content, style)), labels), centres, ball, climb_of(4)
    )
    torch.testing.assert_close(by_hand, ball.apply(centres, found.delta), rtol=0, atol=1e-6)  # the bank is in float32
    unchanged = cross_entropies(network(mixer.images(content, centres)), labels)
    assert (losses >= unchanged.detach()).float().mean() > 0.7, "the ascent should do better than its centre, mostly"
