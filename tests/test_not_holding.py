"""The directive ``{claims-not-holding}``: what does not hold is listed, with its effect, and nothing that holds is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from test_book import METRIC, listing, make, record, source  # noqa: F401  (a fixture)

from advbn_lib import records
from advbn_lib.claims import read_claims

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "book" / "did_not_reproduce.md").read_text(encoding="utf-8")


def claim(
    name: str, first: str, second: str | None, above: float = 0.0, paper: str = "AdvBN", presets=("cpu",)
) -> dict:
    sides = {"first": first, "second": second}
    named = {side: experiment and {"experiment": experiment, "metric": METRIC} for side, experiment in sides.items()}
    return {"id": name, "paper": paper, "says": f"Says {name}.", "presets": list(presets), **named, "above": above}


@pytest.fixture
def ledger(source):  # noqa: F811
    """A claim for each verdict: advbn has 0.701, 0.712, 0.735 and clean_finetuning 0.65, 0.645, 0.66."""
    for seed, accuracy in enumerate((0.70, 0.64, 0.67)):
        records.write(record("mixed", seed, accuracy), source / "records")
    listing(source)
    entries = [
        claim("holding", "advbn", "clean_finetuning"),
        claim("undecided", "mixed", "clean_finetuning", paper="A-FAN"),
        claim("failing", "clean_finetuning", "advbn", presets=("cpu", "gpu")),
        claim("alone", "advbn", None, above=0.9),
        claim("waiting", "nothing", "advbn", paper="AFA"),
    ]
    source.joinpath("book").mkdir()
    source.joinpath("book", "claims.yml").write_text(yaml.safe_dump(entries))
    return source


DIRECTIVE = "```{claims-not-holding}\n%s```"


def test_what_does_not_hold_is_listed_first_then_what_is_undecided(ledger):
    page, _, warnings = make(ledger, DIRECTIVE % "")
    assert warnings == ""
    places = [page.index(f"Says {name}.") for name in ("failing", "alone", "undecided")]
    assert places == sorted(places) and "3 of 4 verdicts." in page
    assert "Says holding." not in page and "Says waiting." not in page
    assert "\N{MINUS SIGN}6.4 points (95 % interval" in page and "paired by seed, n = 3 seeds, cpu scale)" in page
    assert "71.6 % (95 % interval" in page and "90.0 %" in page, "a claim of one side, and its limit"
    html = (ledger / "_build" / "html" / "index.html").read_text()
    assert 'href="all.html#record-clean-finetuning-cpu"' in html, "effects lead to their records"


def test_papers_can_be_chosen(ledger):
    page, _, warnings = make(ledger, DIRECTIVE % ":papers: A-FAN\n")
    assert warnings == "" and "Says undecided." in page and "Says failing." not in page


def test_what_was_not_run_is_listed_with_its_scales(ledger):
    page, _, warnings = make(ledger, DIRECTIVE % ":not-run:\n")
    assert warnings == ""
    assert re.search(r"AdvBN: Says failing\.\s+gpu\s", page) and re.search(r"AFA: Says waiting\.\s+cpu\s", page)
    assert "Says undecided." not in page


def test_nothing_tested_and_nothing_failing_are_said_in_words(ledger):
    assert "None of these claims has been tested yet." in make(ledger, DIRECTIVE % ":papers: AFA\n")[0]
    entries = [claim("holding", "advbn", "clean_finetuning")]
    ledger.joinpath("book", "claims.yml").write_text(yaml.safe_dump(entries))
    page = make(ledger, DIRECTIVE % "" + "\n\n" + DIRECTIVE % ":not-run:\n")[0]
    assert "Every claim that was tested holds." in page and "Every claim has a verdict" in page


def test_a_damaged_ledger_is_a_warning(ledger):
    ledger.joinpath("book", "claims.yml").write_text("- {id: a}")
    assert "claims-not-holding" in make(ledger, DIRECTIVE % "")[2]


def test_the_page_has_a_table_for_every_paper_and_marks_every_reason():
    papers = {paper.strip() for found in re.findall(r":papers: (.+)", PAGE) for paper in found.split(",")}
    assert papers == {claim.paper for claim in read_claims(ROOT / "book" / "claims.yml")}
    reasons = re.findall(r"^- \*\*.+?\*\*(.*?)(?=^- |^#|\Z)", PAGE.split("## AdvBN", 1)[1], re.MULTILINE | re.DOTALL)
    assert len(reasons) > 15
    for reason in reasons:
        tested, guessed = "*Tested*" in reason, "*Untested guess" in reason
        assert tested != guessed, f"one mark: {reason[:80]}"
        assert tested == ("{run" in reason), f"what is tested has its numbers, a guess has none: {reason[:80]}"
