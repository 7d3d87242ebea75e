"""The claims ledger: verdicts computed from records by criteria that were fixed before the runs (``book/claims.yml``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from advbn_lib import records
from advbn_lib.records import Estimate, RecordError

Verdict = Literal["holds at this scale", "does not hold at this scale", "undecided at this scale", "not run"]


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a metric of an experiment."""

    experiment: str
    metric: str


@dataclass(frozen=True)
class Claim:
    """What a paper says, and the comparison that decides: ``first`` minus ``second``, paired by seed, must exceed ``above``.

    Without ``second``, ``first`` itself must. It is decided at each of ``presets`` by itself.
    """

    id: str
    paper: str
    says: str
    first: Side
    second: Side | None
    above: float
    presets: tuple[str, ...] = ("cpu",)

    @property
    def sides(self) -> tuple[Side, ...]:
        """One or two."""
        return (self.first,) if self.second is None else (self.first, self.second)


@dataclass(frozen=True)
class Finding:
    """A claim at a preset; ``effect`` is None if it was not run."""

    claim: Claim
    preset: str
    verdict: Verdict
    effect: Estimate | None


def claims_file() -> Path:
    """The ledger of the checkout that the library is in.

    Raises:
        FileNotFoundError: the library is installed without one.
    """
    path = Path(__file__).resolve().parent.parent / "book" / "claims.yml"
    if not path.is_file():
        raise FileNotFoundError(
            "the claims are in book/claims.yml of a checkout, and this is none: clone the repository"
        )
    return path


def read_claims(path: Path) -> list[Claim]:
    """The claims in a ledger file.

    Raises:
        RecordError: an entry lacks a field, or an id stands twice.
    """
    import yaml

    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        sides = [{side: Side(**row[side]) if row[side] else None for side in ("first", "second")} for row in rows]
        claims = [Claim(**{**row, "presets": tuple(row["presets"]), **pair}) for row, pair in zip(rows, sides)]
        if not all(claim.first for claim in claims):
            raise TypeError("it has no first side")
    except (TypeError, KeyError) as error:
        raise RecordError(f"{path}: an entry is not a claim: {error}") from error
    if len({claim.id for claim in claims}) < len(claims):
        raise RecordError(f"{path}: an id stands twice")
    return claims


def decide(claim: Claim, preset: str, folder: Path | None = None) -> Finding:
    """The verdict: holds if the whole 95 % interval is above the criterion, does not if it is wholly below, else undecided."""
    first, *others = (records.load(side.experiment, preset, folder) for side in claim.sides)
    if not first or not all(others):
        return Finding(claim, preset, "not run", None)
    if claim.second is None:
        effect = records.aggregate(first, claim.first.metric)
    else:
        effect = records.difference(first, others[0], claim.first.metric, claim.second.metric)
    if effect.low > claim.above:
        verdict: Verdict = "holds at this scale"
    elif effect.high < claim.above:
        verdict = "does not hold at this scale"
    else:  # also for one seed, whose interval is NaN
        verdict = "undecided at this scale"
    return Finding(claim, preset, verdict, effect)


def sentence(finding: Finding) -> str:
    """E.g. ``"undecided at this scale: 0.004, 95 % interval -0.004 to 0.011, n = 3; the limit is 0"``, as plain text."""
    effect = finding.effect
    if effect is None:
        return finding.verdict
    interval = f", 95 % interval {effect.low:.3g} to {effect.high:.3g}" if effect.n > 1 else ""
    return f"{finding.verdict}: {effect.mean:.3g}{interval}, n = {effect.n}; the limit is {finding.claim.above:g}"
