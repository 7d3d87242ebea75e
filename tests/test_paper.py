"""The paper's scale, tried on a tiny tree: recipe, several processes, kill and resume, selection, test protocol, command line."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ENVIRONMENT, copy_of_state, differing
from test_imagenet_data import WNIDS, class_tree
from torch import nn

from advbn_lib import AdvBN, CleanFineTuning, DualBatchNorm, RandomStatistics, records
from advbn_lib.checkpoints import CheckpointError, read_checkpoint, save_checkpoint
from advbn_lib.data.imagenet import ImageNetFolder, ImageNetLoader, Share, find_parts, imagenet_r_wnids, imagenet_wnids
from advbn_lib.data.images import DataError
from advbn_lib.methods import AFAN, FeatureNoise, NoAugmentation, PlainTraining
from advbn_lib.metrics import ALEXNET
from advbn_lib.paper import accuracy, protocol, selection, training
from advbn_lib.paper.__main__ import main
from advbn_lib.paper.distributed import Distributed, Processes, process_group, synchronise
from advbn_lib.paper.protocol import RELEASED, load_trained
from advbn_lib.paper.recipe import METHODS, PaperRecipe, starting_network
from advbn_lib.paper.selection import RankCheckpoints, Selection, weights_file
from advbn_lib.paper.testing import PaperTest, evaluate_paper
from advbn_lib.paper.training import PaperRun, train_paper
from advbn_lib.training import History, train

# ShuffleNet: torchvision's smallest with BatchNorm. Everything else about a run is as at the paper's scale.
SMALL = PaperRecipe(network="shufflenet_v2_x0_5", layer="stage2", crop=32, epochs=2, batch_size=16, lr=0.01)
SMALL_OPTIONS = "--network shufflenet_v2_x0_5 --layer stage2 --crop 32 --epochs 2 --batch-size 16 --lr 0.01".split()
TRIAL_OPTIONS = ["--weights", "none", "--partial", "--workers", "0", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """Four classes: 32 training and 12 validation images."""
    folder = tmp_path_factory.mktemp("imagenet")
    class_tree(folder / "train", images=8)
    class_tree(folder / "val", images=3, seed=1)
    return folder


@pytest.fixture
def alone():
    """This process, as the only one."""
    with process_group("cpu") as processes:
        yield processes


def small_run(imagenet: Path, folder: Path, recipe: PaperRecipe = SMALL) -> PaperRun:
    return PaperRun(
        recipe, imagenet, "none", folder / "runs", folder / "records", workers=0, partial=True, show_progress=False
    )


def small_method(name: str = "advbn"):
    recipe = dataclasses.replace(SMALL, method=name)
    return recipe.build(starting_network(recipe.network, "none")[0])


# ---- the recipe ----------------------------------------------------------------------------


def test_the_recipe_is_the_papers():
    assert dataclasses.asdict(PaperRecipe()) == {
        "method": "advbn", "network": "resnet50", "layer": "layer1", "eps": 1.1, "step_size": 0.2, "steps": 6,
        "feature_step": 0.5, "feature_steps": 5, "epochs": 20,
        "batch_size": 256, "lr": 1e-3, "milestones": (10,), "gamma": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "crop": 224,
        "keep_every": 10, "seed": 0,
    }  # fmt: skip
    schedule = PaperRecipe().schedule(processes=4)
    assert schedule.batch_size == training.PAPERS_LOCAL_BATCH == 64
    assert [schedule.rate(epoch) for epoch in (0, 9.99, 10, 19.99)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url.endswith("resnet50-0676ba61.pth")


def test_resnet50_trains_what_the_released_code_trains():
    """25,381,864 parameters above the cut, BatchNorms counted twice: read off the released model."""
    method = PaperRecipe().build(starting_network("resnet50", "none")[0])
    assert sum(parameter.numel() for parameter in method.trainable_parameters()) == 25_381_864
    trained = {id(parameter) for parameter in method.trainable_parameters()}
    assert all(parameter.requires_grad == (id(parameter) in trained) for parameter in method.parameters())
    frozen = {name.split(".")[1] for name, parameter in method.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1"}
    dual = [name for name, module in method.model.named_modules() if isinstance(module, DualBatchNorm)]
    assert {name.split(".")[0] for name in dual} == {"layer2", "layer3", "layer4"}
    assert sum("downsample" in name for name in dual) == 3
    assert method.split.nonnegative and method.perturbation.clamp_at_zero
    assert (method.perturbation.eps, method.steps.size, method.steps.count) == (1.1, 0.2, 6)
    assert (method.steps.random_start, method.steps.keep, method.perturbation.per_image) == (False, "last", False)


def test_the_controls_are_those_of_the_book():
    types = {
        "advbn": AdvBN,
        "clean_finetuning": CleanFineTuning,
        "random_statistics": RandomStatistics,
        "advbn_shared_bn": AdvBN,
        "plain": NoAugmentation,
        "afan": AFAN,
        "feature_noise": FeatureNoise,
    }
    methods = {name: small_method(name) for name in METHODS}
    assert {name: type(method) for name, method in methods.items()} == types
    branches = {name: len(method.branches) for name, method in methods.items()}
    assert {name for name, count in branches.items() if count == 2} == {"advbn", "random_statistics"}
    assert set(branches.values()) == {1, 2}
    whole = {name for name, method in methods.items() if all(p.requires_grad for p in method.parameters())}
    assert whole == {"plain", "afan", "feature_noise"}, "AdvBN and its controls freeze what is below the cut"


def test_only_method_and_seed_may_differ_from_the_papers():
    assert PaperRecipe("random_statistics", seed=3).is_the_papers
    assert not PaperRecipe("afan").is_the_papers, "the recipe is AdvBN's"
    for change in ({"crop": 160}, {"epochs": 10}, {"eps": 0.5}, {"network": "resnet18"}, {"batch_size": 512}):
        assert not PaperRecipe(**change).is_the_papers
    run = PaperRun(PaperRecipe(), Path("."))
    assert run.preset({"local_batch": 64}) == "paper" and run.preset({"local_batch": 32}) == "trial"
    for change in ({"weights": "none"}, {"partial": True}, {"recipe": SMALL}):
        assert dataclasses.replace(run, **change).preset({"local_batch": 64}) == "trial"


def test_a_recipe_is_read_back_from_a_configuration():
    recipe = PaperRecipe("clean_finetuning", milestones=(3, 5), seed=2)
    config = json.loads(json.dumps({**dataclasses.asdict(recipe), "processes": 4}))
    assert PaperRecipe.from_config(config) == recipe


@pytest.mark.parametrize("wrong", [{"method": "afa"}, {"crop": 16}, {"keep_every": 0}], ids=str)
def test_a_bad_recipe_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PaperRecipe(**wrong)


def test_a_batch_that_the_processes_do_not_divide_is_refused():
    assert [PaperRecipe().local_batch(count) for count in (1, 4, 8)] == [256, 64, 32]
    with pytest.raises(ValueError, match="256 cannot be split over 3"):
        PaperRecipe().schedule(3)


# ---- the starting weights ------------------------------------------------------------------


def test_new_weights_depend_on_the_seed_alone():
    first, about = starting_network(SMALL.network, "none", seed=1)
    torch.manual_seed(99)
    again, same = starting_network(SMALL.network, "none", seed=1)
    assert differing(first.state_dict(), again.state_dict()) == [] and about == same
    assert (
        about["source"] == "new, seed 1"
        and starting_network(SMALL.network, "none", seed=2)[1]["sha256"] != about["sha256"]
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_from_a_file(tmp_path, wrapped):
    network, about = starting_network(SMALL.network, "none", seed=1)
    state, path = network.state_dict(), tmp_path / "own.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}} if wrapped else state, path)
    loaded, described = starting_network(SMALL.network, str(path))
    assert differing(state, loaded.state_dict()) == []
    assert described == {"source": "own.pth", "sha256": about["sha256"]}


def test_a_file_that_holds_other_things_is_named(tmp_path):
    path = tmp_path / "own.pth"
    for content in ({"fc.weight": torch.zeros(2, 2)}, torch.zeros(3), [1, 2]):
        torch.save(content, path)
        with pytest.raises(DataError, match=f"{path} holds no weights of this network"):
            starting_network(SMALL.network, str(path))
    for damaged in (b"", b"no weights", path.read_bytes()[:200]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{path} holds no weights of this network"):
            starting_network(SMALL.network, str(path))


def test_unknown_names_are_refused_and_near_ones_listed():
    with pytest.raises(ValueError, match="no classifier 'resnet51'; near names: .*resnet50"):
        starting_network("resnet51")
    with pytest.raises(
        ValueError, match="no file V7, and no published weights of that name for resnet50; there are IMAGENET1K_V1"
    ):
        starting_network("resnet50", "V7")


def test_without_a_network_connection_it_says_where_weights_go(monkeypatch, tmp_path):
    def offline(*arguments, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError, match=rf"resnet18-f37072fd\.pth into {tmp_path / 'hub' / 'checkpoints'}"):
        starting_network("resnet18")


class Killed(Exception):
    pass


# ---- one process ---------------------------------------------------------------------------


def test_alone_the_wrapped_method_trains_as_the_method_itself(imagenet, alone):
    results = []
    for wrap in (False, True):
        method = small_method()
        images = ImageNetFolder("t", imagenet / "train", training.training_transform(32), partial=True)
        loader, trained = ImageNetLoader(images, 16, 0), Distributed(method, alone) if wrap else method
        history = train(
            trained,
            loader,
            dataclasses.replace(SMALL.schedule(1), epochs=1),
            show_progress=False,
            precision=torch.float32,
        )
        results.append((copy_of_state(method), history.losses))
    assert differing(results[0][0], results[1][0]) == [] and results[0][1] == results[1][1]


def test_both_branches_become_synchronised():
    """SyncBatchNorm runs on GPUs only, in train mode; here: that all are replaced, and that in eval mode nothing has changed."""
    method = small_method()
    for module in method.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    images = torch.randn(4, 3, 32, 32)
    method.eval()
    before, parameters = method.predictions(images), [id(p) for p in method.trainable_parameters()]
    synchronised = synchronise(method)
    kinds = {type(module) for module in synchronised.modules() if "BatchNorm" in type(module).__name__}
    assert (
        kinds == {nn.SyncBatchNorm, DualBatchNorm}
        and [id(p) for p in synchronised.trainable_parameters()] == parameters
    )
    after = synchronised.predictions(images)
    assert set(after) == {"clean", "adversarial"} and all(torch.equal(before[name], after[name]) for name in after)
    assert not torch.equal(after["clean"], after["adversarial"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_record_says_all(imagenet, tmp_path, alone, method):
    run = small_run(imagenet, tmp_path, dataclasses.replace(SMALL, method=method, epochs=1, seed=3, keep_every=1))
    record = train_paper(run, alone)
    path = records.path_of(f"paper_{method}", "trial", 3, tmp_path / "records")
    assert records.read(path) == record
    branches = load_trained(str(weights_file(run.folder, "best", record.key))).method.branches
    assert set(record.metrics["accuracy"]) == set(branches)
    for shares in record.metrics["accuracy"].values():
        assert set(shares) == {"imagenet", "imagenet_last_epoch"} and all(0 <= share <= 1 for share in shares.values())
    assert record.config["local_batch"] == 16 and record.config["processes"] == 1 and record.config["classes"] == 4
    assert record.config["precision"] == "float32" and record.config["sync_batch_norm"] is False
    assert set(record.data) == {"imagenet/train", "imagenet/val"} and record.data["imagenet/train"]["images"] == 32
    assert len(record.curves["clean_loss"]) == len(record.curves["validation_accuracy"]) == 1
    assert (
        record.cost["train_seconds"] > 0
        and record.hardware["processes"] == 1
        and record.weights["source"] == "new, seed 3"
    )
    kept = {file.name.rsplit("-", 1)[0] for file in run.folder.glob("*.pt")}
    assert kept == {"best", "last", "epoch-1"}, "the checkpoints go when the record is there"


def test_the_same_run_is_not_done_twice(imagenet, tmp_path, alone, monkeypatch):
    run = small_run(imagenet, tmp_path, dataclasses.replace(SMALL, method="clean_finetuning", epochs=1))
    first = train_paper(run, alone)

    def killed(*arguments, **options):
        raise Killed

    monkeypatch.setattr(training, "train", killed)
    assert train_paper(run, alone) == first
    file = imagenet / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    content = file.read_bytes()
    file.write_bytes(content + b"\0")  # other data: another run
    try:
        with pytest.raises(Killed):
            train_paper(run, alone)
    finally:
        file.write_bytes(content)


def test_the_best_epoch_is_that_of_the_released_script(imagenet, tmp_path, alone, monkeypatch):
    """The first of the best validation accuracies through the clean branch; beside it every n-th epoch and the last."""
    right, asked = iter([1, 7, 7, 2]), []

    def counted(method, images, processes, branches, **options):
        asked.append((images.name, branches))
        return {"clean": next(right)}

    monkeypatch.setattr(selection, "right_answers", counted)
    recipe = dataclasses.replace(SMALL, epochs=4, keep_every=3)
    distributed = Distributed(recipe.build(starting_network(recipe.network, "none")[0]), alone)
    validation = ImageNetFolder("imagenet/val", imagenet / "val", training.evaluation_transform(True, 32), partial=True)
    chosen = Selection(distributed, validation, RankCheckpoints(tmp_path, "key", alone), recipe, {"word": "kept"})
    for epoch in range(1, 5):
        with torch.no_grad():
            distributed.method.model.fc.bias.fill_(epoch)
        chosen.checkpoints.current.write_bytes(b"")
        chosen(History(epoch=epoch))
    assert chosen.accuracies == [1 / 12, 7 / 12, 7 / 12, 2 / 12] and chosen.best_epoch == 2
    assert asked == [("imagenet/val", ("clean",))] * 4
    kept = {}
    for name in ("best", "epoch-3", "last"):
        state = read_checkpoint(chosen.weights_file(name))
        assert state["progress"]["word"] == "kept"
        kept[name] = state["progress"]["epoch"], float(state["parts"]["model"]["fc.bias"][0])
    assert kept == {"best": (2, 2.0), "epoch-3": (3, 3.0), "last": (4, 4.0)}
    assert not chosen.weights_file("epoch-1").exists()


@pytest.fixture(scope="module")
def uninterrupted(imagenet, tmp_path_factory) -> tuple[PaperRun, records.Record]:
    """A run with random statistics, whose random numbers must go on where they were when it is resumed."""
    run = small_run(imagenet, tmp_path_factory.mktemp("whole"), dataclasses.replace(SMALL, method="random_statistics"))
    with process_group("cpu") as processes:
        return run, train_paper(run, processes)


@pytest.mark.parametrize("where", ["before the validation", "after the weights are kept"])
def test_killed_around_a_validation_ends_as_uninterrupted(uninterrupted, imagenet, tmp_path, alone, monkeypatch, where):
    whole_run, whole = uninterrupted

    def killed(*arguments, **options):
        raise Killed

    run = small_run(imagenet, tmp_path / "killed", whole_run.recipe)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(selection, "right_answers" if where == "before the validation" else "atomic_write", killed)
        train_paper(run, alone)
    assert not (tmp_path / "killed" / "records").exists()
    torch.manual_seed(99)
    resumed = train_paper(run, alone)
    assert_same_result(whole, resumed, whole_run, run)


def assert_same_result(whole: records.Record, resumed: records.Record, first: PaperRun, second: PaperRun) -> None:
    assert resumed.key == whole.key and resumed.metrics == whole.metrics and resumed.curves == whole.curves
    for name in ("best", "last"):
        states = [read_checkpoint(weights_file(run.folder, name, whole.key)) for run in (first, second)]
        assert differing(*(state["parts"]["model"] for state in states)) == [], name
        assert states[0]["progress"] == states[1]["progress"]


# ---- several processes ---------------------------------------------------------------------

# The second process dies when it is to save its second epoch, and the first one has done so.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from advbn_lib import training
from advbn_lib.checkpoints import read_checkpoint
from advbn_lib.paper.distributed import process_group
from advbn_lib.paper.recipe import PaperRecipe
from advbn_lib.paper.training import PaperRun, train_paper

data, folder = map(Path, sys.argv[1:])
recipe = PaperRecipe(network="shufflenet_v2_x0_5", layer="stage2", crop=32, epochs=2, batch_size=16, lr=0.01)
save = training.save_checkpoint

def save_or_die(path, parts, progress, key):
    if folder / "killed" in path.parents and path.name.endswith("rank1.pt") and progress["epoch"] == 2:
        other = path.with_name(path.name.replace("rank1", "rank0"))
        while read_checkpoint(other)["progress"]["epoch"] < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, parts, progress, key)

training.save_checkpoint = save_or_die
with process_group("cpu") as processes:
    for name in ("whole", "killed"):
        train_paper(
            PaperRun(recipe, data, "none", folder / name / "runs", folder / name / "records", 0, True, False), processes
        )
"""


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    """Two processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *map(str, arguments),
    ]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def two_processes(imagenet, tmp_path_factory) -> Path:
    """A folder with ``whole``, an uninterrupted run, and ``killed``, one that was killed and has been resumed."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "killed.py"
    script.write_text(KILLED)
    done = torchrun(script, imagenet, folder)
    assert done.returncode != 0 and "SIGKILL" in done.stderr, done.stderr
    left = sorted((folder / "killed" / "runs").rglob("training-*rank?.pt"))
    assert [read_checkpoint(path)["progress"]["epoch"] for path in left] == [2, 1], "the processes are an epoch apart"
    assert not (folder / "killed" / "records").exists()
    places = ["--data", imagenet, "--runs", folder / "killed" / "runs", "--records", folder / "killed" / "records"]
    done = torchrun("-m", "advbn_lib.paper", "train", *SMALL_OPTIONS, *TRIAL_OPTIONS, *places)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SyncBatchNorm needs GPUs") == 1, done.stderr
    assert re.search(r"weights of the best epoch \(\d\): .*best-", done.stdout)
    return folder


def record_of(folder: Path) -> records.Record:
    return records.read(records.path_of("paper_advbn", "trial", 0, folder / "records"))


def test_killed_between_two_processes_saves_it_ends_as_uninterrupted(two_processes, imagenet):
    whole, killed = (record_of(two_processes / name) for name in ("whole", "killed"))
    runs = [small_run(imagenet, two_processes / name) for name in ("whole", "killed")]
    assert_same_result(whole, killed, *runs)
    assert not list((two_processes / "killed" / "runs").rglob("training-*"))
    assert killed.hardware["processes"] == killed.config["processes"] == 2 and killed.config["local_batch"] == 8


def test_two_processes_average_their_gradients(two_processes, imagenet):
    """The same run in one process, by hand: each half batch with its own attack, the first half's running statistics."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: a factor steps by the sign of its gradient, however small that is
    method = small_method()
    optimizer = torch.optim.SGD(method.trainable_parameters(), lr=SMALL.lr, momentum=0.9, weight_decay=1e-4)
    images = ImageNetFolder("t", imagenet / "train", training.training_transform(32), partial=True)
    loaders = [ImageNetLoader(images, 8, SMALL.seed, share=Share(rank, 2)) for rank in (1, 0)]
    method.train()
    losses = []
    for epoch in range(SMALL.epochs):
        for halves in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
            before = {name: buffer.clone() for name, buffer in method.named_buffers()}
            for half in halves:
                for name, buffer in method.named_buffers():
                    buffer.copy_(before[name])
                loss = method(*half)
                (loss.total / 2).backward()
                losses.append([loss.clean.item(), loss.adversarial.item()])
            optimizer.step()
            optimizer.zero_grad()
    torch.set_num_threads(threads)
    whole = record_of(two_processes / "whole")
    trained = read_checkpoint(weights_file(small_run(imagenet, two_processes / "whole").folder, "last", whole.key))
    for name, value in method.model.state_dict().items():
        torch.testing.assert_close(trained["parts"]["model"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    means = torch.tensor(losses).view(SMALL.epochs, -1, 2).mean(1)
    torch.testing.assert_close(means[:, 0], torch.tensor(whole.curves["clean_loss"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means[:, 1], torch.tensor(whole.curves["adversarial_loss"]), rtol=1e-4, atol=1e-5)


def test_what_two_processes_count_is_what_one_counts(two_processes, imagenet, alone):
    whole = record_of(two_processes / "whole")
    run = small_run(imagenet, two_processes / "whole")
    trained = load_trained(str(weights_file(run.folder, "best", whole.key)))
    validation = ImageNetFolder("v", imagenet / "val", training.evaluation_transform(True, 32), partial=True)
    right = accuracy.right_answers(trained.method, validation, alone, trained.method.branches, batch_size=5)
    assert {branch: count / 12 for branch, count in right.items()} == {
        branch: shares["imagenet"] for branch, shares in whole.metrics["accuracy"].items()
    }
    assert max(whole.curves["validation_accuracy"]) == whole.metrics["accuracy"]["clean"]["imagenet"]


@dataclasses.dataclass(frozen=True)
class OneOfSeveral(Processes):
    """A process whose fellows are not there, but have said what they have."""

    others: tuple = ()

    def gather(self, value):
        return [value, *self.others]


def checkpoints(folder: Path, previous: int | None, current: int | None, *others: list[int]) -> RankCheckpoints:
    found = RankCheckpoints(folder, "key", OneOfSeveral(0, 1 + len(others), 0, torch.device("cpu"), others))
    for path, epoch in ((found.previous, previous), (found.current, current)):
        if epoch is not None:
            save_checkpoint(path, {}, {"epoch": epoch}, "key")
    return found


@pytest.mark.parametrize(
    ("previous", "current", "others", "common"),
    [
        (None, None, [[]], 0), (None, 1, [[1]], 1), (None, 1, [[]], 0), (1, 2, [[1, 2]], 2), (1, 2, [[1]], 1), (2, 2, [[2, 3]], 2),
        (4, 5, [[5], [4, 5]], 5), (4, 5, [[4, 5], [4]], 4),
    ],
)  # fmt: skip
def test_processes_go_back_to_what_all_have(tmp_path, previous, current, others, common):
    found = checkpoints(tmp_path, previous, current, *others)
    assert found.align() == common
    if common:
        # Both: else a kill at the next epoch's end would leave them two apart.
        assert {read_checkpoint(path)["progress"]["epoch"] for path in (found.current, found.previous)} == {common}
    else:
        assert not found.current.exists() and not found.previous.exists()


@pytest.mark.parametrize(("previous", "current", "others"), [(4, 5, [[]]), (None, None, [[6, 7]]), (1, 2, [[4, 5]])])
def test_checkpoints_that_do_not_fit_together_are_refused_and_kept(tmp_path, previous, current, others):
    found = checkpoints(tmp_path, previous, current, *others)
    with pytest.raises(CheckpointError, match="do not fit together.*Can every machine see this folder"):
        found.align()
    assert found.current.exists() == (current is not None)


def test_a_damaged_checkpoint_is_named(tmp_path):
    found = checkpoints(tmp_path, None, 1)
    found.current.write_bytes(found.current.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"{found.current} is damaged"):
        found.align()


def test_a_file_system_without_links_will_do(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    found = checkpoints(tmp_path, None, 3)
    found.keep()
    assert found.previous.read_bytes() == found.current.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {found.previous.name, found.current.name}


def test_validations_of_another_run_are_refused(imagenet, tmp_path, alone):
    found = checkpoints(tmp_path, None, 3)
    chosen = Selection(None, None, dataclasses.replace(found, processes=alone), SMALL, {})
    (tmp_path / "selection-key.json").write_text("[0.5]")
    with pytest.raises(CheckpointError, match="has 1 validations, but the checkpoint is of epoch 3"):
        chosen.catch_up(3)


def test_processes_that_see_other_files_stop(imagenet, tmp_path, alone, monkeypatch):
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, "another listing"])
    with pytest.raises(DataError, match="imagenet/train: the processes see different files"):
        train_paper(small_run(imagenet, tmp_path), alone)


def test_devices_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match="cpu or cuda, got 'cuda:1'"), process_group("cuda:1"):
        pass
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"torch sees 0 GPU\(s\) here"), process_group("cuda"):
            pass


# ---- the test protocol ---------------------------------------------------------------------


def uneven(folder: Path, wnids=WNIDS, seed: int = 0) -> Path:
    """Two pictures of each class, but one of the third."""
    class_tree(folder, wnids, images=2, seed=seed)
    (folder / wnids[2] / f"{wnids[2]}_0.JPEG").unlink()
    return folder


@pytest.fixture(scope="module")
def shifted(tmp_path_factory) -> dict[str, Path | None]:
    """Every test set, small and uneven; ImageNet-C has one corruption of the fifteen, and one set is not there."""
    folder = tmp_path_factory.mktemp("shifted")
    inside = {
        "imagenet": "val", "imagenet_c": "fog/{}", "imagenet_instagram": "filter {}", "stylized_imagenet": "val",
        "imagenet_sketch": "sketch", "imagenet_r": ".",
    }  # fmt: skip
    for name, place in inside.items():
        for number in range(1, 6) if "{}" in place else (0,):
            wnids = imagenet_r_wnids()[:4] if name == "imagenet_r" else WNIDS
            uneven(folder / name / place.format(number), wnids, seed=number)
    return {**{name: folder / name for name in inside}, "imagenet_advbn": folder / "nowhere"}


# What the network below answers on every image: the second class of the tree, the third one, and where neither is allowed another.
CLEAN, ADVERSARIAL, OTHERWISE = WNIDS[1], WNIDS[2], imagenet_r_wnids()[3]
SHARES = {"clean": 2 / 7, "adversarial": 1 / 7}


@pytest.fixture(scope="module")
def two_branches(tmp_path_factory) -> Path:
    """Kept weights of a network that gives the same answer to everything, but another one through each branch."""
    method = small_method()
    last = [module for module in method.modules() if isinstance(module, DualBatchNorm)][-1]
    place = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
    with torch.no_grad():
        for branch, value in ((last.clean, 0.0), (last.adversarial, 1.0)):
            branch.weight.zero_()
            branch.bias.fill_(value)  # all that reaches the last layer
        method.model.fc.weight.zero_()
        method.model.fc.weight[place[ADVERSARIAL]] = 1
        method.model.fc.bias.zero_()
        method.model.fc.bias[place[CLEAN]], method.model.fc.bias[place[OTHERWISE]] = 3, 2
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    config = {**json.loads(json.dumps(dataclasses.asdict(SMALL))), "processes": 1, "local_batch": 16}
    about = {"preset": "trial", "config": config, "weights": {"source": "made up", "sha256": "0"}, "epoch": 2}
    save_checkpoint(path, {"model": method.model}, about, "a key of twelve and more")
    return path


def a_test(folders, tmp_path: Path) -> PaperTest:
    return PaperTest(folders, tmp_path / "runs", tmp_path / "records", workers=0, partial=True, show_progress=False)


@pytest.fixture(scope="module")
def tested(two_branches, shifted, tmp_path_factory) -> records.Record:
    folder = tmp_path_factory.mktemp("tested")
    with process_group("cpu") as processes:
        record = evaluate_paper(a_test(shifted, folder), load_trained(str(two_branches)), processes)
    assert records.read(records.path_of("paper_advbn", "trial", 0, folder / "records")) == record
    return record


@pytest.mark.parametrize("allowed", [None, (5, 17, 400, 999)])
def test_right_answers_are_those_of_each_image_by_itself(imagenet, alone, allowed):
    method = small_method().eval()
    images = ImageNetFolder("v", imagenet / "val", training.evaluation_transform(True, 32), partial=True)
    with torch.no_grad():
        outputs = {
            branch: torch.stack([method.predict(pixels[None], branch)[0] for pixels, _ in images])
            for branch in method.branches
        }
        method.model.fc.bias -= outputs["clean"].mean(0)  # else one class would win on all images
    right = {}
    for branch, logits in outputs.items():
        logits = logits - outputs["clean"].mean(0)
        choice = allowed or tuple(range(1000))
        answers = [max(choice, key=lambda index: row[index]) for row in logits.tolist()]
        right[branch] = sum(answer == label for answer, label in zip(answers, images.targets, strict=True))
    assert accuracy.right_answers(method, images, alone, method.branches, batch_size=5, logits=allowed) == right
    assert accuracy.right_answers(method, images, alone, ("clean",), logits=allowed) == {"clean": right["clean"]}
    assert method.training is False and (allowed is None or 0 < right["clean"] < len(images))


def test_every_set_is_tested_through_both_branches(tested, shifted):
    sets, parts = tested.metrics["shift"], tested.metrics["accuracy"]
    names = [part.name for name, folder in shifted.items() if folder.is_dir() for part in find_parts(name, folder)]
    assert len(names) == 14
    for branch, share in SHARES.items():
        assert set(sets[branch]) == set(shifted) - {"imagenet_advbn"} and set(parts[branch]) == set(names)
        for table in (sets[branch], parts[branch]):
            assert {name: value for name, value in table.items() if name != "imagenet_r"} == pytest.approx(
                {name: share for name in table if name != "imagenet_r"}
            )
        assert sets[branch]["imagenet_r"] == pytest.approx(2 / 7)  # among its own classes there is another first choice


def test_the_released_choice_is_that_of_the_released_script(tested):
    assert RELEASED == {
        "imagenet": "clean", "imagenet_c": "clean", "imagenet_instagram": "clean",
        "stylized_imagenet": "adversarial", "imagenet_sketch": "adversarial", "imagenet_advbn": "adversarial",
    }  # fmt: skip
    expected = {name: SHARES[branch] for name, branch in RELEASED.items() if name != "imagenet_advbn"}
    assert tested.metrics["shift"]["released"] == pytest.approx(expected)
    assert tested.config["test"]["released_branches"] == RELEASED


def test_what_is_not_there_is_named(tested):
    assert tested.config["test"]["not_tested"] == {"imagenet_advbn": "folder missing"}
    missing = tested.config["test"]["mce"]["missing_corruptions"]
    assert len(missing) == 14 and "fog" not in missing and tested.config["test"]["mce"]["reference"] == "AlexNet"
    for branch in ("clean", "adversarial"):
        error = (1 - SHARES[branch]) / ALEXNET.errors["fog"]
        assert tested.metrics["mce"][branch] == {"mce": pytest.approx(100 * error), "corruptions": 1}


def test_the_table_shows_both_branches_and_what_is_missing(tested):
    text = protocol.table(tested.metrics, tested.config["test"]["not_tested"])
    rows = {line.split()[0]: line for line in text.splitlines()[1:] if not line.startswith("imagenet_c,")}
    assert re.findall(r"\d+\.\d", rows["imagenet_sketch"]) == ["14.3", "28.6", "14.3"]
    assert re.findall(r"\d+\.\d", rows["imagenet_c"]) == ["28.6", "28.6", "14.3"]
    assert "not tested: folder missing" in rows["imagenet_advbn"] and "no choice" in rows["imagenet_r"]
    assert re.search(
        r"imagenet_c, adversarial +mCE \d+\.\d, relative to AlexNet, 1 of 15 corruptions \(without gaussian_noise", text
    )
    clean = protocol.table(tested.metrics, tested.config["test"]["not_tested"], "clean")
    (sketch,) = [line for line in clean.splitlines() if line.startswith("imagenet_sketch")]
    assert re.findall(r"\d+\.\d", sketch) == ["28.6", "28.6", "14.3"]


def test_a_test_goes_on_where_it_was_killed(two_branches, shifted, tmp_path, alone, monkeypatch, tested):
    test, counted = a_test(shifted, tmp_path), []
    original = accuracy.right_answers

    def dies_at_the_fourth(method, images, *arguments, **options):
        if len(counted) == 3:
            raise Killed
        counted.append(images.name)
        return original(method, images, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(protocol, "right_answers", dies_at_the_fourth)
        evaluate_paper(test, load_trained(str(two_branches)), alone)
    done = list(counted)
    monkeypatch.setattr(
        protocol,
        "right_answers",
        lambda m, images, *a, **o: counted.append(images.name) or original(m, images, *a, **o),
    )
    resumed = evaluate_paper(test, load_trained(str(two_branches)), alone)
    assert resumed.metrics == tested.metrics and len(counted) == len(set(counted)) and set(done) < set(counted)
    file = next((shifted["imagenet_sketch"] / "sketch").rglob("*.JPEG"))
    content = file.read_bytes()
    file.write_bytes(content + b"\0")  # other files: tested again
    try:
        counted.clear()
        evaluate_paper(test, load_trained(str(two_branches)), alone)
        assert counted == ["imagenet_sketch"]
    finally:
        file.write_bytes(content)


def test_results_are_added_to_the_record_of_the_training(uninterrupted, shifted, alone):
    run, trained = uninterrupted
    weights, folder = str(weights_file(run.folder, "best", trained.key)), run.runs_folder.parent
    first = evaluate_paper(
        a_test({"imagenet_sketch": shifted["imagenet_sketch"]}, folder), load_trained(weights), alone
    )
    both = evaluate_paper(a_test({"imagenet_c": shifted["imagenet_c"]}, folder), load_trained(weights), alone)
    assert (both.key, both.curves, both.weights) == (trained.key, trained.curves, trained.weights)
    assert both.cost["train_seconds"] == trained.cost["train_seconds"] and both.cost["test_seconds"] > 0
    assert both.metrics["selection"] == trained.metrics["selection"]
    for branch, shares in trained.metrics["accuracy"].items():
        assert shares.items() <= both.metrics["accuracy"][branch].items()
        assert both.metrics["shift"][branch]["imagenet_sketch"] == first.metrics["shift"][branch]["imagenet_sketch"]
    assert set(both.config["test"]["not_tested"]) == {
        "imagenet_instagram",
        "stylized_imagenet",
        "imagenet_r",
        "imagenet_advbn",
    }
    assert both.config["test"]["not_tested"]["imagenet_r"] == "no folder given"
    assert {"imagenet/train", "imagenet_sketch", "imagenet_c-fog-5"} <= set(both.data)
    assert train_paper(run, alone) == both  # the training is not done again, and the tests are not lost


def test_a_plain_network_is_tested_through_its_one_branch(shifted, tmp_path, alone):
    path = tmp_path / "plain.pth"
    torch.save(starting_network(SMALL.network, "none")[0].state_dict(), path)
    trained = load_trained(str(path), SMALL.network, 32)
    assert isinstance(trained.method, PlainTraining) and (trained.experiment, trained.preset) == (
        "paper_own_weights",
        "trial",
    )
    record = evaluate_paper(a_test({"imagenet_sketch": shifted["imagenet_sketch"]}, tmp_path), trained, alone)
    assert set(record.metrics["shift"]) == {"clean", "released"}
    assert record.metrics["shift"]["released"] == record.metrics["shift"]["clean"]
    assert load_trained("none", SMALL.network).experiment == "paper_untouched"
    other = evaluate_paper(
        a_test({"imagenet_sketch": shifted["imagenet_sketch"]}, tmp_path), load_trained(str(path), SMALL.network, 40), alone
    )  # fmt: skip
    assert other.key != record.key and other.config["crop"] == 40
    assert len(list((tmp_path / "runs").rglob("test-*.json"))) == 2, "what is counted at one crop is not taken for another"


def test_another_layout_stops_before_anything_is_tested(two_branches, shifted, tmp_path, alone, monkeypatch):
    monkeypatch.setattr(protocol, "right_answers", None)
    wrong = class_tree(tmp_path / "wrong" / "n", images=1).parent
    with pytest.raises(DataError, match="stylized_imagenet: there is no folder"):
        evaluate_paper(
            a_test({**shifted, "stylized_imagenet": wrong}, tmp_path), load_trained(str(two_branches)), alone
        )
    with pytest.raises(
        DataError, match=r"nothing to test on: imagenet \(no folder given\), imagenet_c \(folder missing\)"
    ):
        evaluate_paper(a_test({"imagenet_c": tmp_path / "nowhere"}, tmp_path), load_trained(str(two_branches)), alone)


def test_damaged_weights_are_named(two_branches, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes(two_branches.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=f"{path} is damaged"):
        load_trained(str(path))


# ---- the command line ----------------------------------------------------------------------


def test_train_and_test_by_the_command_line(imagenet, shifted, tmp_path, capsys):
    places = ["--data", str(imagenet), "--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records")]
    options = [*SMALL_OPTIONS, *TRIAL_OPTIONS, *places, "--method", "clean_finetuning", "--seed", "4"]
    assert main(["train", *options]) == 0
    printed = capsys.readouterr().out
    best = re.search(r"weights of the best epoch \(\d\): (.*)", printed)[1]
    assert (
        main(
            [
                "test",
                "--weights",
                best,
                "--imagenet-sketch",
                str(shifted["imagenet_sketch"]),
                *TRIAL_OPTIONS[2:],
                *places,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    record = records.read(tmp_path / "records" / "paper_clean_finetuning" / "trial-s4.json")
    assert (
        str(tmp_path / "records") in printed
        and f"{100 * record.metrics['shift']['clean']['imagenet_sketch']:.1f} %" in printed
    )
    assert "not tested: no folder given" in printed
    assert record.config["lr"] == 0.01 and record.config["seed"] == 4 and record.config["method"] == "clean_finetuning"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "say where ImageNet is: --data"),
        (["train", "--data", "nowhere"], "imagenet/train: there is no folder nowhere/train"),
        (["test", "--weights", "none", "--network", SMALL.network], "nothing to test on"),
        (["test", "--weights", "nowhere.pt"], "there is no file nowhere.pt"),
        (["train", "--data", "nowhere", "--crop", "8"], "crop must be at least 32"),
    ],
)
def test_errors_are_said_in_a_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("advbn_lib.paper, process 0:") and "Traceback" not in error
