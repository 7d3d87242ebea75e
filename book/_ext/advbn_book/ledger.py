"""The directives ``{claims-ledger}`` and ``{claims-not-holding}``: claims, their criteria, and the verdicts of the records."""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from advbn_lib import claims, records

from . import wording
from .index import duration, folded, table_of
from .roles import depend_on_records, records_folder

logger = logging.getLogger(__name__)
HOLDS, FAILS, INCOMPLETE, NOT_RUN = "holds at this scale", "does not hold at this scale", "incomplete", "not run"
WITHOUT_VERDICT = (NOT_RUN, INCOMPLETE)
EFFECT = "effect [95 % interval]"
BEHIND = "What is behind these verdicts: protocols, controls, the papers' numbers"


class Ledger(SphinxDirective):
    """What both directives share: with the option ``:papers: A, B`` only the claims of these papers, and errors are warnings."""

    option_spec = {"papers": directives.unchanged_required}

    def run(self):
        try:
            return self.shown(self.chosen(), records_folder(self.env.app))
        except (records.RecordError, OSError) as error:
            logger.warning("{%s}: %s", self.name, error, location=self.get_location(), type="advbn")
            return []

    def shown(self, chosen: list[claims.Claim], folder: Path) -> list[nodes.Node]:
        raise NotImplementedError

    def chosen(self) -> list[claims.Claim]:
        ledger = Path(self.env.srcdir) / "book" / "claims.yml"
        self.env.note_dependency(str(ledger))
        chosen = claims.read_claims(ledger)
        if "papers" not in self.options:
            return chosen
        papers = [name.strip() for name in self.options["papers"].split(",")]
        return [claim for claim in chosen if claim.paper in papers]

    def decided(self, claim: claims.Claim, preset: str, folder: Path) -> claims.Finding:
        finding = claims.decide(claim, preset, folder)
        for side in claim.sides:
            depend_on_records(self.env, folder, records.load(side.experiment, preset, folder))
        return finding

    def linked(self, finding: claims.Finding, words: str) -> nodes.Node:
        """Words that lead to the records of the claim's first side, if there are any."""
        if finding.effect is None:
            return nodes.inline("", words)
        target = f"record-{finding.claim.first.experiment}-{finding.preset}"
        return addnodes.pending_xref(
            "", nodes.inline("", words), refdomain="std", reftype="ref", refexplicit=True, refwarn=True, reftarget=target,
            refdoc=self.env.docname,
        )  # fmt: skip


class ClaimsLedger(Ledger):
    """``{claims-ledger} PRESET``: the claims in ``book/claims.yml`` that are decided at that preset.

    A narrow table with the verdicts, each effect a link to its records, and below it a box that opens, with what is behind them.
    """

    required_arguments = 1

    def shown(self, chosen, folder):
        preset = self.arguments[0]
        findings = [self.decided(claim, preset, folder) for claim in chosen if preset in claim.presets]
        machines = {one.machine for finding in findings for one in finding.cost}
        # the verdict early: a phone shows two columns
        rows = [
            [
                finding.claim.says,
                finding.in_words,
                self.linked(finding, effect(finding)),
                limit(finding.claim),
                cost(finding, machines),
            ]
            for finding in findings
        ]
        table = table_of(["claim", "verdict", EFFECT, "holds if above", "cost"], rows)
        return [table, *cost_note(machines), behind(findings)]


class ClaimsNotHolding(Ledger):
    """``{claims-not-holding}``: a table of the claims that were tested and do not hold, or are undecided, at any scale.

    What does not hold comes first. Each effect, with interval, seeds and scale, leads to its records. What lacks seeds is counted,
    but it has no verdict. A box below has what is behind them. With ``:not-run:`` a table of the claims that have no verdict yet, and
    where they are to get one.
    """

    option_spec = {**Ledger.option_spec, "not-run": directives.flag}

    def shown(self, chosen, folder):
        findings = [self.decided(claim, preset, folder) for claim in chosen for preset in claim.presets]
        if "not-run" in self.options:
            return self.not_run(findings)
        tested = [finding for finding in findings if finding.verdict not in WITHOUT_VERDICT]
        found = [finding for finding in tested if finding.verdict != HOLDS]
        lacking = sum(finding.verdict == INCOMPLETE for finding in findings)
        more = f" Not decided yet, for want of seeds: {lacking}." if lacking else ""
        if not found:
            words = "Every claim that was tested holds." if tested else "None of these claims has been tested yet."
            return [nodes.paragraph("", words + more)]
        found.sort(key=lambda finding: finding.verdict != FAILS)  # stable: the ledger's order within each verdict
        failing = sum(finding.verdict == FAILS for finding in found)
        tally = f"Does not hold: {failing}. Undecided: {len(found) - failing}."
        words = f"{len(found)} of {len(tested)} verdicts. {tally}"
        table = table_of(["claim", "verdict", EFFECT, "holds if above"], [self.row(finding) for finding in found])
        return [nodes.paragraph("", words + more), table, behind(found)]

    def row(self, finding: claims.Finding) -> list:
        claim = finding.claim
        link = self.linked(finding, f"{effect(finding)}, {finding.preset} scale")
        # the first paper's name is in the heading above
        under_its_name = self.options.get("papers", "").split(",")[0].strip() == claim.paper
        says = claim.says if under_its_name else f"{claim.paper}: {claim.says}"
        return [says, finding.in_words, link, limit(claim)]

    def not_run(self, findings: list[claims.Finding]) -> list[nodes.Node]:
        waiting: dict[str, list[str]] = {}
        for finding in findings:
            if finding.verdict in WITHOUT_VERDICT:
                words = f"{finding.claim.paper}: {finding.claim.says}"
                seeds = f" ({finding.reason})" if finding.reason else ""
                waiting.setdefault(words, []).append(f"{finding.preset}{seeds}")
        if not waiting:
            return [nodes.paragraph("", "Every claim has a verdict at every scale that it is decided at.")]
        return [table_of(["claim", "no verdict at"], [[words, ", ".join(at)] for words, at in waiting.items()])]


def behind(findings: list[claims.Finding]) -> nodes.admonition:
    """A box that opens, with what does not fit into a table: a definition for each claim."""
    listed = {finding.claim.id: finding.claim for finding in findings}
    return folded(BEHIND, nodes.definition_list("", *map(details_of, listed.values())))


def details_of(claim: claims.Claim) -> nodes.definition_list_item:
    told = [("Compared", compared(claim)), *claims.details(claim)]
    texts = [nodes.paragraph("", "", nodes.strong("", f"{title}: "), nodes.Text(text)) for title, text in told]
    term = nodes.term("", claim.says, nodes.Text(" "), nodes.literal("", claim.id))
    return nodes.definition_list_item("", term, nodes.definition("", *texts))


def cost_note(machines: set[str]) -> list[nodes.Node]:
    """What the column of costs is, below a table that has some."""
    words = "Cost: what one run of the experiment named first took, its training and its test; mean over its seeds"
    where = f", on {next(iter(machines))}" if len(machines) == 1 else ""
    return [nodes.paragraph("", f"{words}{where}.")] if machines else []


def cost(finding: claims.Finding, machines: set[str]) -> str:
    """``"9 min"``; with the machine, if the table has several."""
    return "; ".join(
        duration(3600 * one.hours) + (f" ({one.machine})" if len(machines) > 1 else "") for one in finding.cost
    )


def effect(finding: claims.Finding) -> str:
    """The effect with interval and seeds; of what lacks seeds, the effect so far. Or ``"not run"``."""
    if finding.effect is None:
        return NOT_RUN if finding.verdict == NOT_RUN else finding.reason
    return wording.brief(finding.effect, finding.claim.first.metric, paired=finding.claim.second is not None)


def limit(claim: claims.Claim) -> str:
    """What the interval must lie above."""
    metric, paired = claim.first.metric, claim.second is not None
    unit = (" points" if paired else " %") if wording.is_accuracy(metric) else ""
    return f"{wording.number(claim.above, metric, signed=paired) if claim.above else 0}{unit}"


def compared(claim: claims.Claim) -> str:
    """The sides, with a minus sign between them if there are two."""
    return " \N{MINUS SIGN} ".join(map(side_in_words, claim.sides))


def side_in_words(side: claims.Side) -> str:
    """``advbn, mean of corruptions, clean BN``; ``afa, fused, attacked at 8/255``; of others all but the group."""
    kind, *rest = side.metric.split("/")
    if kind == "robust":
        return f"{side.experiment}, {rest[0].replace('_', ' ')}, attacked at {rest[1]}/255"
    if kind == "area":
        return f"{side.experiment}, {rest[0].replace('_', ' ')}, mean over strengths"
    if kind not in ("accuracy", "mean"):
        return ", ".join([side.experiment, *(part.replace("_", " ") for part in rest)])
    branch, what = rest
    images = f"mean of {what}" if kind == "mean" else f"{what} images"
    return f"{side.experiment}, {images}, {branch} BN"
