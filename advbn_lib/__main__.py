"""The command line: ``python -m advbn_lib list | run | show | report | claims | plan | export-advbn | assignments | grade``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from advbn_lib import records
from advbn_lib.adversarial_images import ExportConfig, export
from advbn_lib.checkpoints import CheckpointError
from advbn_lib.claims import claims_file, cost_in_words, decide, details, read_claims, sentence
from advbn_lib.data.images import DataError
from advbn_lib.data.sets import load_images
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.grading.cli import add_commands
from advbn_lib.measurements import DECODERS, MEASUREMENTS, Job, run_measurement
from advbn_lib.plan import SCALES, costs, missing, planned
from advbn_lib.presets import PRESETS
from advbn_lib.running import Run, choose_device, is_current, prepare, run, start_network, train_method

# Of presets: some sizes are of measurements alone.
NAMES = list(dict.fromkeys([*PRESETS, *(preset for each in MEASUREMENTS.values() for preset in each.presets)]))


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 if all went well, 1 after an error that the user can mend, which is printed."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except BrokenPipeError:  # whoever read the output has seen enough (| head); what is left to flush has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, DataError, CheckpointError, FloatingPointError, ImportError, OSError) as error:
        print(f"advbn_lib: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("advbn_lib: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m advbn_lib", description="Run the book's experiments and look at their records."
    )
    parser.add_argument(
        "--records", type=Path, help="folder of the records (default: the checkout's, or the installed copy)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="experiments, presets, and which records there are")
    listing.set_defaults(command=_list)

    running = commands.add_parser("run", help="run an experiment and write its record; resumes a run that was killed")
    running.add_argument("experiment", help=f"one of {', '.join([*EXPERIMENTS, *MEASUREMENTS])}")
    running.add_argument("--preset", default="smoke", help=f"its size: {', '.join(NAMES)} (default: smoke)")
    running.add_argument("--seed", type=int, nargs="+", default=[0], help="one or more (default: 0)")
    running.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    running.add_argument(
        "--threads", type=int, help="CPU threads; results are the same bit for bit only with the same number"
    )
    running.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints (default: runs)")
    running.add_argument("--again", action="store_true", help="run also if there is a current record")
    running.add_argument("--train-only", action="store_true", help="keep the trained weights; a later run tests them")
    running.add_argument("--quiet", action="store_true", help="no progress bars")
    running.set_defaults(command=_run)

    showing = commands.add_parser("show", help="a record in full")
    showing.add_argument("experiment")
    showing.add_argument("--preset", default="smoke")
    showing.add_argument("--seed", type=int, default=0)
    showing.set_defaults(command=_show)

    exporting = commands.add_parser("export-advbn", help="write a test set of decoded worst-case features as PNGs")
    exporting.add_argument("--out", type=Path, required=True, help="a new folder")
    exporting.add_argument("--preset", default="cpu", choices=list(DECODERS), help="default: cpu")
    exporting.add_argument("--seed", type=int, default=0, help="of the decoder (default: 0)")
    exporting.add_argument("--limit", type=int, help="only the first so many test images (default: all)")
    exporting.add_argument(
        "--order", choices=["class", "file"], default="class", help="of the batches (default: class)"
    )
    exporting.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    exporting.add_argument("--runs", type=Path, default=Path("runs"), help="folder for checkpoints (default: runs)")
    exporting.add_argument("--quiet", action="store_true", help="no progress bars")
    exporting.set_defaults(command=_export)

    report = commands.add_parser("report", help="results over seeds, with 95 %% intervals")
    report.add_argument("--preset", default="cpu", choices=NAMES)
    report.set_defaults(command=_report)

    claims = commands.add_parser("claims", help="what the papers claim, and the verdicts of the records")
    claims.add_argument("--preset", help="only what is decided at this preset (default: at all of them)")
    claims.add_argument("--file", type=Path, help="the ledger (default: the checkout's book/claims.yml)")
    claims.add_argument(
        "--long", action="store_true", help="with protocol, controls, the paper's number, and what a run took"
    )
    claims.set_defaults(command=_claims)

    planning = commands.add_parser("plan", help="the runs that the book lacks, and what they will cost")
    planning.add_argument("--preset", default="cpu", choices=list(SCALES), help="the scale (default: cpu)")
    planning.add_argument("--seed", type=int, nargs="+", help="default: as many as the book has, three or more")
    planning.set_defaults(command=_plan)
    add_commands(commands)
    return parser


def _list(options: argparse.Namespace) -> None:
    for name, experiment in EXPERIMENTS.items():
        print(f"{name}: {experiment.about}")
        for preset in PRESETS:
            found = records.load(name, preset, options.records)
            if found:
                code = prepare(name, preset, 0, "cpu").code  # the same for each seed, and slow to hash
                old = [str(r.seed) for r in found if not is_current(prepare(name, preset, r.seed, "cpu"), r, code)]
                remark = f"   (seeds {', '.join(old)}: by older code or configuration)" if old else ""
                print(f"    {preset}: seeds {', '.join(str(r.seed) for r in found)}{remark}")
    for measurement in MEASUREMENTS.values():
        print(f"{measurement.name}: {measurement.about}")
        for preset in measurement.presets:
            if found := records.load(measurement.name, preset, options.records):
                print(f"    {preset}: seeds {', '.join(str(record.seed) for record in found)}")


def _run(options: argparse.Namespace) -> None:
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if options.train_only:
        if options.experiment in MEASUREMENTS:
            raise ValueError(f"{options.experiment} trains and measures in one: leave out --train-only")
        for seed in options.seed:
            train_method(_job(options, seed), options.again)
        return
    for seed in options.seed:
        record = _measurement(options, seed) if options.experiment in MEASUREMENTS else _experiment(options, seed)
        print(records.path_of(record.experiment, record.preset, record.seed, options.records))
        print(_rows([record]))


def _measurement(options: argparse.Namespace, seed: int) -> records.Record:
    job = Job(
        options.preset, seed, choose_device(options.device), options.records, options.runs, not options.quiet,
    )  # fmt: skip
    return run_measurement(options.experiment, job, options.again)


def _experiment(options: argparse.Namespace, seed: int) -> records.Record:
    return run(_job(options, seed), options.again)


def _job(options: argparse.Namespace, seed: int) -> Run:
    return prepare(
        options.experiment, options.preset, seed, options.device,
        records_folder=options.records, runs_folder=options.runs, show_progress=not options.quiet,
    )  # fmt: skip


def _show(options: argparse.Namespace) -> None:
    path = records.path_of(options.experiment, options.preset, options.seed, options.records)
    record = records.read(path)
    print(json.dumps(vars(record), indent=1))
    print(
        f"To recompute: python -m advbn_lib run {record.experiment} --preset {record.preset} --seed {record.seed} "
        f"--device {record.hardware['device']} --threads {record.hardware['threads']} --again"
    )


def _export(options: argparse.Namespace) -> None:
    job = prepare(
        "untouched", options.preset, options.seed, options.device,
        records_folder=options.records, runs_folder=options.runs, show_progress=not options.quiet,
    )  # fmt: skip
    train_set, test_set = (load_images(job.preset.data, split) for split in ("train", "test"))
    network, weights = start_network(job)
    manifest = export(
        options.out, network.to(job.device), weights, train_set, test_set.first(options.limit),
        ExportConfig(order=options.order, decoder=DECODERS[options.preset]), options.seed,
        options.runs / "decoders", not options.quiet,
    )  # fmt: skip
    print(manifest)


def _report(options: argparse.Namespace) -> None:
    for name in [*EXPERIMENTS, *MEASUREMENTS]:
        found = records.load(name, options.preset, options.records)
        if found:
            seeds = "seed" if len(found) == 1 else "seeds"
            try:
                rows = _rows(found)
            except records.RecordError as error:  # of one experiment: the others are still worth reading
                rows = f"    these records cannot be put together: {error}"
            print(f"{name} ({options.preset}, n = {len(found)} {seeds})\n{rows}")


def _claims(options: argparse.Namespace) -> None:
    if options.preset and options.preset not in NAMES:
        raise ValueError(f"no preset {options.preset!r}; there are {', '.join(NAMES)}")
    for claim in read_claims(options.file or claims_file()):
        presets = [preset for preset in claim.presets if options.preset in (None, preset)]
        if presets:
            print(f"{claim.id} ({claim.paper}): {claim.says}")
        for preset in presets:
            finding = decide(claim, preset, options.records)
            print(f"    {preset}: {sentence(finding)}")
            if options.long and finding.cost:
                print(f"        cost of the first side: {cost_in_words(finding)}")
        if presets and options.long:
            for title, text in details(claim):
                print(f"    {title}: {text}")


def _plan(options: argparse.Namespace) -> None:
    everything = planned(options.preset, options.seed)
    lacking = missing(everything, options.records)
    print(f"{options.preset}: {len(everything)} runs, {len(lacking)} without a record")
    for name, preset in dict.fromkeys((one.experiment, one.preset) for one in lacking):
        seeds = [str(one.seed) for one in lacking if (one.experiment, one.preset) == (name, preset)]
        print(f"    {name} ({preset}): {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}")
    estimates = costs(lacking, options.records, Path("runs"))
    if lacking and not estimates:
        print("What they will cost is not known: no run of their kind has a record.")
    for cost in estimates:
        print(cost)


def _rows(found: list[records.Record]) -> str:
    """A row for each number: accuracies in percent (means over severities, where there are several), measurements as they are."""
    rows, metrics = [], found[0].metrics
    for branch, table in metrics.get("accuracy", {}).items():
        means = [f"mean/{branch}/{family}" for family in metrics.get("mean", {}).get(branch, {})]
        shifts = [f"shift/{branch}/{shift}" for shift in metrics.get("shift", {}).get(branch, {})]
        for path in means + (shifts or [f"accuracy/{branch}/{shift}" for shift in table]):
            what = path.rpartition("/")[2] + (" (mean)" if path in means else "")
            rows.append(_row(f"{branch:12s} {what:26s}", records.aggregate(found, path), 100, " %"))
    name = found[0].experiment
    if name in MEASUREMENTS:
        measurement = MEASUREMENTS[name]
        group, wanted = measurement.group or name, measurement.headline
        paths = [path for path in _paths(metrics[group]) if not wanted or path.rpartition("/")[2] in wanted]
        rows += [_row(f"{path:45s}", records.aggregate(found, f"{group}/{path}"), 1, "", 3) for path in paths]
    return "\n".join(rows)


def _paths(metrics: dict) -> list[str]:
    """The paths of all numbers: ``"ratio"``, ``"noise/edge_correlation"``."""
    below = {name: _paths(value) if isinstance(value, dict) else [""] for name, value in metrics.items()}
    return [f"{name}/{path}".removesuffix("/") for name, paths in below.items() for path in paths]


def _row(label: str, value: records.Estimate, scale: float, unit: str, digits: int = 1) -> str:
    low, mean, high = (f"{scale * number:.{digits}f}" for number in (value.low, value.mean, value.high))
    interval = f"   95 % interval {low} to {high}" if value.n > 1 else ""
    return f"    {label} {mean:>8s}{unit}{interval}"


if __name__ == "__main__":
    sys.exit(main())
