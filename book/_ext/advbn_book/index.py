"""The directive ``{records-index}``: every run record, by experiment and preset."""

from __future__ import annotations

from itertools import groupby

from docutils import nodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from advbn_lib import records
from advbn_lib.digits_presets import DIGITS_PRESETS
from advbn_lib.presets import MEASURED_AT, PRESETS

from . import wording
from .roles import depend_on_records, existing, records_folder

logger = logging.getLogger(__name__)

FOLDED = {  # long tables, and what their boxes say
    "shift": "Each shift by itself",
    "accuracy": "Each severity by itself",
    "appearance": "Layer 1, eps 1.1",
    "appearance_eps_0.5": "Layer 1, eps 0.5",
    "appearance_layer2": "Layer 2, eps 1.1",
    "appearance_layer2_eps_0.5": "Layer 2, eps 0.5",
}
BY_BRANCH = ("accuracy", "mean", "shift", "balanced", "commonest_answer")


def duration(seconds: float) -> str:
    """'41 s', '12 min' or '3.5 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def measured(runs: list, group: str) -> nodes.Node:
    """What the runs of one experiment found together, in one group of metrics.

    Metrics by BatchNorm branch and shift make one row a shift and one column a branch; others one row each. What is nested deeper
    stands in a box.
    """
    found = runs[0].metrics[group]
    if depth(found) > 2:
        tables = [nested_table(runs, group, paths, names) for names, paths in by_names(found).items()]
        return folded(FOLDED.get(group, group.replace("_", " ").capitalize()), nodes.container("", *tables))
    if all(isinstance(value, dict) for value in found.values()):
        shifts = list(dict.fromkeys(shift for table in found.values() for shift in table))
        column = "{} BN" if group in BY_BRANCH else "{}"
        head = [group.replace("_", " "), *(column.format(branch).replace("_", " ") for branch in found)]
        rows = [
            [
                shift,
                *(cell(runs, f"{group}/{branch}/{shift}") if shift in table else "" for branch, table in found.items()),
            ]
            for shift in shifts
        ]
        return table_of(head, rows)
    return table_of([group, "measured"], [[name, cell(runs, f"{group}/{name}")] for name in found])


def depth(found: object) -> int:
    """How many keys lead to a number, at most."""
    return 1 + max(map(depth, found.values()), default=0) if isinstance(found, dict) else 0


def by_names(found: dict) -> dict[tuple[str, ...], list[str]]:
    """Paths to the innermost tables, by the names that these have: each makes one table, with a row for each path."""
    grouped: dict[tuple[str, ...], list[str]] = {}

    def walk(table: dict, path: str) -> None:
        numbers = tuple(name for name, value in table.items() if not isinstance(value, dict))
        if numbers:
            grouped.setdefault(numbers, []).append(path)
        for name, value in table.items():
            if isinstance(value, dict):
                walk(value, f"{path}/{name}".removeprefix("/"))

    walk(found, "")
    return grouped


def nested_table(runs: list, group: str, paths: list[str], names: tuple[str, ...]) -> nodes.table:
    rows = [
        [
            path.replace("/", ", ").replace("_", " "),
            *(cell(runs, "/".join(filter(None, (group, path, name)))) for name in names),
        ]
        for path in paths
    ]
    return table_of([group.replace("_", " "), *(name.replace("_", " ") for name in names)], rows)


def cell(runs: list, metric: str) -> str:
    """'93.1 % (92.9 to 93.3)', or without the interval for one run."""
    estimate = records.aggregate(runs, metric)
    value = wording.number(estimate.mean, metric) + (" %" if wording.is_accuracy(metric) else "")
    spread = wording.interval(estimate, metric).removeprefix("95 % interval ")
    return value if estimate.n < 2 else f"{value} ({spread})"


class RecordsIndex(SphinxDirective):
    """One section for each experiment and preset: what was found, and the runs behind it."""

    def run(self):
        folder = records_folder(self.env.app)
        try:
            everything = records.load_all(folder)
            depend_on_records(self.env, folder, everything)
            groups = groupby(everything, key=lambda record: (record.experiment, record.preset))
            sections = [self.section(experiment, preset, list(runs)) for (experiment, preset), runs in groups]
        except (records.RecordError, KeyError, ValueError) as error:
            logger.warning("{records-index}: %s", error, location=self.get_location(), type="advbn")
            return []
        return sections or [nodes.paragraph("", f"No runs yet: {existing(folder)}.")]

    def section(self, experiment: str, preset: str, runs: list) -> nodes.section:
        name = f"record-{experiment}-{preset}"
        section = nodes.section("", nodes.title("", f"{experiment}, {preset} scale"), ids=[nodes.make_id(name)])
        section["names"].append(name)
        self.state.document.note_explicit_target(section)
        spread = "with its 95 % interval" if len(runs) > 1 else "which gives no interval"
        size = PRESETS.get(preset) or DIGITS_PRESETS.get(preset)
        about = size.about if size else MEASURED_AT.get(preset)
        scale = f" Scale: {about}." if about else ""
        section += nodes.paragraph("", f"Mean over {wording.seeds(len(runs))}, {spread}.{scale}")
        for group in runs[0].metrics:
            found = measured(runs, group)
            section += folded(FOLDED[group], found) if group in FOLDED else found
        section += table_of(
            ["seed", "device", "wall time", "versions", "commit", "record"],
            [self.row(record) for record in runs],
        )
        return section

    def row(self, record) -> list:
        dirty = " (with local changes)" if record.code.get("dirty") else ""
        return [
            str(record.seed),
            f"{record.hardware['gpu'] or record.hardware['cpu']}, {record.hardware['threads']} threads",
            duration(record.cost["wall_seconds"]),
            ", ".join(f"{name} {version}" for name, version in sorted(record.versions.items())),
            str(record.code.get("commit") or "not recorded")[:10] + dirty,
            self.file_link(record),
        ]

    def file_link(self, record) -> nodes.reference:
        place = f"{record.experiment}/{record.preset}-s{record.seed}.json"
        up = "../" * self.env.docname.count("/")
        return nodes.reference("", "JSON", refuri=f"{up}_static/records/{place}", internal=False)


def folded(title: str, inside: nodes.Node) -> nodes.admonition:
    """A box that opens with a click: for what is too long to stand open."""
    return nodes.admonition("", nodes.title("", title), inside, classes=["dropdown"])


def table_of(head: list[str], rows: list[list]) -> nodes.table:
    """A plain table; a cell is a string or a node."""
    group = nodes.tgroup(cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", table_row(head))
    group += nodes.tbody("", *[table_row(row) for row in rows])
    return nodes.table("", group, classes=["records"])


def table_row(cells: list) -> nodes.row:
    row = nodes.row()
    for cell in cells:
        inside = nodes.Text(cell) if isinstance(cell, str) else cell
        row += nodes.entry("", nodes.paragraph("", "", inside))
    return row
