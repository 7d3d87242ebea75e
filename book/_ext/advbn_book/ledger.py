"""The directive ``{claims-ledger}``: each claim, its criterion, and the verdict computed from the records."""

from __future__ import annotations

from pathlib import Path

from docutils.parsers.rst import directives
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from advbn_lib import claims, records

from . import wording
from .index import table_of
from .roles import depend_on_records, records_folder

logger = logging.getLogger(__name__)


class ClaimsLedger(SphinxDirective):
    """``{claims-ledger} PRESET``: a table of the claims in ``book/claims.yml`` that are decided at that preset.

    With the option ``:papers: A, B`` only the claims of these papers.
    """

    required_arguments = 1
    option_spec = {"papers": directives.unchanged_required}

    def run(self):
        preset, folder = self.arguments[0], records_folder(self.env.app)
        ledger = Path(self.env.srcdir) / "book" / "claims.yml"
        self.env.note_dependency(str(ledger))
        try:
            chosen = [claim for claim in claims.read_claims(ledger) if preset in claim.presets]
            if "papers" in self.options:
                papers = [name.strip() for name in self.options["papers"].split(",")]
                chosen = [claim for claim in chosen if claim.paper in papers]
            findings = [claims.decide(claim, preset, folder) for claim in chosen]
            for finding in findings:
                for side in (finding.claim.first, finding.claim.second):
                    depend_on_records(self.env, folder, records.load(side.experiment, preset, folder))
            rows = [self.row(finding) for finding in findings]
        except (records.RecordError, OSError) as error:
            logger.warning("{claims-ledger}: %s", error, location=self.get_location(), type="advbn")
            return []
        return [table_of(["the paper says", "verdict", "effect", "compared", "holds if above"], rows)]

    def row(self, finding: claims.Finding) -> list[str]:
        claim, metric = finding.claim, finding.claim.first.metric
        compared = f"{side_in_words(claim.first)} \N{MINUS SIGN} {side_in_words(claim.second)}"
        effect = "not run" if finding.effect is None else wording.gap(finding.effect, metric, finding.preset)
        unit = " points" if wording.is_accuracy(metric) else ""
        limit = f"{wording.number(claim.above, metric, signed=True)}{unit}"
        return [claim.says, finding.verdict, effect, compared, limit]  # the verdict early: a phone shows two columns


def side_in_words(side: claims.Side) -> str:
    """``advbn, mean of corruptions, clean BN``; of others all but the group, ``appearance, noise, style change``."""
    kind, *rest = side.metric.split("/")
    if kind not in ("accuracy", "mean"):
        return ", ".join([side.experiment, *(part.replace("_", " ") for part in rest)])
    branch, what = rest
    images = f"mean of {what}" if kind == "mean" else f"{what} images"
    return f"{side.experiment}, {images}, {branch} BN"
