"""The command line of the paper's scale: ``[torchrun --nproc_per_node N] -m advbn_lib.paper train | test``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from advbn_lib import records
from advbn_lib.checkpoints import CheckpointError
from advbn_lib.data.imagenet import TEST_SETS
from advbn_lib.data.images import DataError
from advbn_lib.paper.distributed import Processes, process_group
from advbn_lib.paper.protocol import load_trained, table
from advbn_lib.paper.recipe import METHODS, PAPERS_WEIGHTS, PaperRecipe
from advbn_lib.paper.selection import weights_file
from advbn_lib.paper.testing import PaperTest, evaluate_paper
from advbn_lib.paper.training import PaperRun, train_paper

SHIFTED = [name for name in TEST_SETS if name != "imagenet"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command in this process; 0 if all went well, 1 after an error that the user can mend, which is printed."""
    options = _parser().parse_args(arguments)
    rank = os.environ.get("RANK", "0")
    try:
        with process_group(options.device) as processes:
            torch.backends.cudnn.benchmark = processes.device.type == "cuda"  # images have one size
            options.command(options, processes)
    except (ValueError, DataError, CheckpointError, FloatingPointError, OSError) as error:
        print(f"advbn_lib.paper, process {rank}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("advbn_lib.paper: stopped; the same command goes on from the last epoch that was saved", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    recipe = PaperRecipe()
    parser = argparse.ArgumentParser(prog="python -m advbn_lib.paper", description="AdvBN at the paper's scale.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--data", type=Path, help="the folder with ImageNet's train and val")
    common.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder for checkpoints and weights (default: runs)"
    )
    common.add_argument("--records", type=Path, help="folder of the records (default: the checkout's)")
    common.add_argument("--workers", type=int, default=4, help="reading processes of each process (default: 4)")
    common.add_argument("--device", help="cpu or cuda (default: GPUs if there are any)")
    common.add_argument("--partial", action="store_true", help="a trial: accept fewer than 1,000 classes")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--network", default=recipe.network, help=f"torchvision's name (default: {recipe.network})")
    common.add_argument("--crop", type=int, default=recipe.crop, help=f"side of the images (default: {recipe.crop})")

    training = commands.add_parser("train", parents=[common], help="fine-tune; a run that was killed is resumed")
    training.add_argument("--method", default=recipe.method, choices=METHODS)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument(
        "--weights", default=PAPERS_WEIGHTS, help="to start from: torchvision's name, a file, or none"
    )
    for name in ("layer", "eps", "feature_step", "epochs", "batch_size", "lr"):
        default = getattr(recipe, name)
        training.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default: {default}"
        )
    training.add_argument(
        "--milestones", type=int, nargs="*", default=recipe.milestones, help="epochs from which on the rate is a tenth"
    )
    training.set_defaults(command=_train)

    testing = commands.add_parser("test", parents=[common], help="test on ImageNet and its shifted versions")
    testing.add_argument(
        "--weights", default=PAPERS_WEIGHTS, help="a file that training has kept, or torchvision's name"
    )
    testing.add_argument(
        "--protocol", default="released", choices=("released", "clean"), help="which branch the first column shows"
    )
    for name in SHIFTED:
        testing.add_argument(f"--{name.replace('_', '-')}", type=Path, help="its folder, if you have it")
    testing.set_defaults(command=_test)
    return parser


def _train(options: argparse.Namespace, processes: Processes) -> None:
    if options.data is None:
        raise ValueError("say where ImageNet is: --data FOLDER")
    chosen = {name: getattr(options, name) for name in PaperRecipe.__dataclass_fields__ if hasattr(options, name)}
    chosen["milestones"] = tuple(options.milestones)
    run = PaperRun(
        PaperRecipe(**chosen), options.data, options.weights, options.runs, options.records, options.workers, options.partial,
        show_progress=not options.quiet,
    )  # fmt: skip
    record = train_paper(run, processes)
    if processes.first:
        print(_path(record, options))
        print(
            f"weights of the best epoch ({record.metrics['selection']['epoch']}): {weights_file(run.folder, 'best', record.key)}"
        )


def _test(options: argparse.Namespace, processes: Processes) -> None:
    folders = {"imagenet": options.data, **{name: getattr(options, name) for name in SHIFTED}}
    test = PaperTest(
        folders, options.runs, options.records, options.workers, partial=options.partial, show_progress=not options.quiet
    )  # fmt: skip
    with processes.one_by_machine():
        trained = load_trained(options.weights, options.network, options.crop)
    record = evaluate_paper(test, trained, processes)
    if processes.first:
        print(_path(record, options))
        print(table(record.metrics, record.config["test"]["not_tested"], options.protocol))


def _path(record: records.Record, options: argparse.Namespace) -> Path:
    return records.path_of(record.experiment, record.preset, record.seed, options.records)


if __name__ == "__main__":
    sys.exit(main())
