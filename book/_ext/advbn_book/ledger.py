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
                for side in finding.claim.sides:
                    depend_on_records(self.env, folder, records.load(side.experiment, preset, folder))
            rows = [self.row(finding) for finding in findings]
        except (records.RecordError, OSError) as error:
            logger.warning("{claims-ledger}: %s", error, location=self.get_location(), type="advbn")
            return []
        return [table_of(["claim", "verdict", "effect", "compared", "holds if above"], rows)]

    def row(self, finding: claims.Finding) -> list[str]:
        claim, metric = finding.claim, finding.claim.first.metric
        paired = claim.second is not None
        compared = " \N{MINUS SIGN} ".join(map(side_in_words, claim.sides))
        in_words = wording.gap if paired else wording.level
        effect = "not run" if finding.effect is None else in_words(finding.effect, metric, finding.preset)
        unit = (" points" if paired else " %") if wording.is_accuracy(metric) else ""
        limit = f"{wording.number(claim.above, metric, signed=paired)}{unit}"
        return [claim.says, finding.verdict, effect, compared, limit]  # the verdict early: a phone shows two columns


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
