"""Roles that put numbers into a page, each from its source.

``{run}`EXPERIMENT PRESET METRIC``` a measured value, from the run records
``{run-diff}`EXPERIMENT - EXPERIMENT PRESET METRIC [METRIC]``` a difference paired by seed
``{paper}`KEY``` a number that a paper reports, from ``advbn_lib.reported``

A first word ``?`` in the first two says that the runs may not have been made
yet: the page then says "not run". Without it, a missing record is a warning,
and the book is built with warnings as errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxRole

from advbn_lib import records, reported

from . import wording

logger = logging.getLogger(__name__)


class RoleError(Exception):
    """A role asks for what is not there; the message names what is."""


@dataclass(frozen=True)
class Query:
    """What a role asks for; ``other`` is the experiment to subtract, if any."""

    experiment: str
    preset: str
    metric: str
    other: str | None = None
    other_metric: str | None = None
    may_be_missing: bool = False


def parse_run(text: str) -> Query:
    """Read ``[?] EXPERIMENT PRESET METRIC``."""
    words, guarded = split_guard(text)
    if len(words) != 3:
        raise RoleError(f"{text!r} should read: EXPERIMENT PRESET METRIC")
    return Query(*words, may_be_missing=guarded)


def parse_difference(text: str) -> Query:
    """Read ``[?] EXPERIMENT - EXPERIMENT PRESET METRIC [METRIC]``."""
    words, guarded = split_guard(text)
    if len(words) not in (5, 6) or words[1] != "-":
        raise RoleError(f"{text!r} should read: EXPERIMENT - EXPERIMENT PRESET METRIC [METRIC]")
    experiment, _, other, preset, metric, *rest = words
    return Query(experiment, preset, metric, other, rest[0] if rest else metric, guarded)


def split_guard(text: str) -> tuple[list[str], bool]:
    words = text.split()
    return (words[1:], True) if words[:1] == ["?"] else (words, False)


def records_folder(app) -> Path:
    """The folder with the records this book shows."""
    return Path(app.srcdir) / app.config.advbn_records


def depend_on_records(env, folder: Path, used: list) -> None:
    """Make the page stale when a record it used changes, or when records come or go.

    A folder cannot be depended on, so the builder's list of records stands for it.
    """
    env.note_dependency(str(folder / "LIST"))
    for record in used:
        env.note_dependency(str(records.path_of(record.experiment, record.preset, record.seed, folder)))


def existing(folder: Path) -> str:
    """What can be asked for, in words."""
    found = sorted({f"{file.parent.name} {file.stem.rsplit('-s', 1)[0]}" for file in folder.glob("*/*.json")})
    return "there are records of: " + ", ".join(found) if found else "there are no records at all"


class NumberRole(SphinxRole):
    """What the roles share: ask, write, link; turn errors into located warnings."""

    def run(self):
        try:
            return [self.answer(self.text)], []
        except (RoleError, records.RecordError, KeyError, ValueError) as error:
            reason = error.args[0] if error.args else error
            logger.warning("{%s}`%s`: %s", self.name, self.text, reason, location=self.get_location(), type="advbn")
            return [nodes.inline("", f"[no number: {self.text}]", classes=["no-number"])], []

    def answer(self, text: str) -> nodes.Node:
        raise NotImplementedError

    def found(self, experiment: str, query: Query) -> list:
        """The records of one experiment; empty only if the page allowed for that."""
        folder = records_folder(self.env.app)
        runs = records.load(experiment, query.preset, folder)
        depend_on_records(self.env, folder, runs)
        if not runs and not query.may_be_missing:
            raise RoleError(f"no record of {experiment} {query.preset}; {existing(folder)}")
        return runs

    def link(self, words: str, query: Query) -> nodes.Node:
        """The words, leading to the experiment's place on the page of records."""
        target = addnodes.pending_xref(
            "", nodes.inline("", words), refdomain="std", reftype="ref", refexplicit=True, refwarn=True,
            reftarget=f"record-{query.experiment}-{query.preset}", refdoc=self.env.docname,
        )
        return nodes.inline("", "", target, classes=["run"])


class RunRole(NumberRole):
    def answer(self, text):
        query = parse_run(text)
        runs = self.found(query.experiment, query)
        if not runs:
            return nodes.inline("", "not run", classes=["run", "not-run"])
        estimate = records.aggregate(runs, query.metric)
        return self.link(wording.level(estimate, query.metric, query.preset), query)


class DifferenceRole(NumberRole):
    def answer(self, text):
        query = parse_difference(text)
        runs, others = self.found(query.experiment, query), self.found(query.other, query)
        if not runs or not others:
            return nodes.inline("", "not run", classes=["run", "not-run"])
        estimate = records.difference(runs, others, query.metric, query.other_metric)
        return self.link(wording.gap(estimate, query.metric, query.preset), query)


class PaperRole(NumberRole):
    def answer(self, text):
        number = reported.REPORTED.get(text.strip())
        if number is None:
            raise RoleError(f"no such number; there are: {', '.join(sorted(reported.REPORTED))}")
        self.env.note_dependency(str(Path(reported.__file__).resolve()))
        words = f"{number.value} {number.unit} (reported for {number.setting}; {number.source})"
        return nodes.abbreviation("", words, explanation=f"{number.what}: {number.how_known}", classes=["paper"])
