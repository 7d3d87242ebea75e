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
    said = {"protocol": f"Protocol of {name}.", "controls": ["augmix"], "reported": ["advbn/sketch/advbn"]}
    return {
        "id": name,
        "paper": paper,
        "says": f"Says {name}.",
        "presets": list(presets),
        **named,
        "above": above,
        **said,
    }


@pytest.fixture
def ledger(source):  # noqa: F811
    """A claim for each verdict: advbn has 0.701, 0.712, 0.735, clean_finetuning 0.65, 0.645, 0.66."""
    for seed, accuracy in enumerate((0.70, 0.64, 0.67)):
        records.write(record("afan", seed, accuracy), source / "records")
    listing(source)
    entries = [
        claim("holding", "advbn", "clean_finetuning"),
        claim("undecided", "afan", "clean_finetuning", paper="A-FAN"),
        claim("failing", "clean_finetuning", "advbn", presets=("cpu", "gpu")),
        claim("alone", "advbn", None, above=0.9),
        claim("waiting", "afa", "advbn", paper="AFA"),
    ]
    source.joinpath("book").mkdir()
    source.joinpath("book", "claims.yml").write_text(yaml.safe_dump(entries))
    return source


DIRECTIVE = "```{claims-not-holding}\n%s```"


def test_what_does_not_hold_is_listed_first_then_what_is_undecided(ledger):
    page, _, warnings = make(ledger, DIRECTIVE % "")
    assert warnings == ""
    places = [page.index(f"Says {name}.") for name in ("failing", "alone", "undecided")]
    assert places == sorted(places) and "3 of 4 verdicts. Does not hold: 2. Undecided: 1." in page
    assert "Says holding." not in page and "Says waiting." not in page
    table, behind = " ".join(page.split()).split("What is behind these verdicts", 1)
    assert "claim verdict effect [95 % interval] holds if above" in table
    minus = "\N{MINUS SIGN}"
    assert (
        f"Compared: clean_finetuning, contrast-3 images, clean BN {minus} advbn, contrast-3 images, clean BN" in behind
    )
    assert "\N{MINUS SIGN}6.4 points [" in page and "], n = 3, cpu scale" in page
    assert "71.6 % [" in page and "90.0 %" in page, "a claim of one side, and its limit"
    html = (ledger / "_build" / "html" / "index.html").read_text()
    assert 'href="all.html#record-clean-finetuning-cpu"' in html, "effects lead to their records"


def test_papers_can_be_chosen(ledger):
    page, _, warnings = make(ledger, DIRECTIVE % ":papers: A-FAN\n")
    assert warnings == "" and "Says undecided." in page and "Says failing." not in page
    assert "A-FAN: Says" not in page, "the paper's name is in the heading above"
    page, _, _ = make(ledger, DIRECTIVE % ":papers: AdvBN, A-FAN\n")
    assert "A-FAN: Says undecided." in page and "AdvBN: Says" not in page


def test_what_was_not_run_is_listed_with_its_scales(ledger):
    page, _, warnings = make(ledger, DIRECTIVE % ":not-run:\n")
    assert warnings == ""
    assert re.search(r"AdvBN: Says failing\.\s+gpu\s", page) and re.search(r"AFA: Says waiting\.\s+cpu\s", page)
    assert "Says undecided." not in page


def test_what_lacks_seeds_has_no_verdict_and_stands_with_what_was_not_run(ledger):
    ledger.joinpath("records/advbn/cpu-s1.json").unlink()
    listing(ledger)
    page, _, warnings = make(ledger, DIRECTIVE % "")
    assert warnings == "" and "Says failing." not in page and "Says alone." not in page
    assert "1 of 1 verdicts. Does not hold: 0. Undecided: 1. Not decided yet, for want of seeds: 3." in page
    page, _, warnings = make(ledger, DIRECTIVE % ":not-run:\n")
    assert warnings == "" and re.search(r"Says failing\.\s+cpu \(2 of 3 seeds\), gpu\s", page)


def test_sides_without_a_seed_in_common_do_not_stop_the_page(ledger):
    for seed in (1, 2):
        ledger.joinpath(f"records/advbn/cpu-s{seed}.json").unlink()
    ledger.joinpath("records/clean_finetuning/cpu-s0.json").unlink()
    listing(ledger)
    page, _, warnings = make(ledger, "```{claims-ledger} cpu\n```\n\n" + DIRECTIVE % ":not-run:\n")
    assert warnings == "" and page.count("incomplete (0 of 3 seeds)") == 2 and "cpu (0 of 3 seeds)" in page


def test_the_ledger_shows_verdicts_and_folds_what_is_behind_them(ledger):
    entries = yaml.safe_load(ledger.joinpath("book/claims.yml").read_text())
    leaning = claim("leaning", "advbn", "clean_finetuning") | {"needs": ["failing"], "written": "after"}
    ledger.joinpath("book/claims.yml").write_text(yaml.safe_dump([*entries, leaning]))
    page, _, warnings = make(ledger, "```{claims-ledger} cpu\n```")
    words = " ".join(page.split())
    assert warnings == ""
    table, behind = words.split("What is behind these verdicts", 1)
    assert "claim verdict effect [95 % interval] holds if above cost" in table
    assert "undecided at this scale (needs failing, which does not hold) +6.4 points [" in table
    assert "13 min" in table and "Cost: what one run" in table and "on a small CPU, 2 threads." in table
    assert "Says holding. holdingCompared: advbn, contrast-3 images, clean BN" in behind
    for said in (
        "Protocol: Protocol of leaning.", "Controls: augmix (AugMix, an augmentation of images)",
        "number: ImageNet-Sketch accuracy, ResNet-50 on ImageNet: 27.9 %", "Needs: failing.",
        "Written: after the records had been seen",
    ):  # fmt: skip
        assert said in behind and said not in table
    html = (ledger / "_build" / "html" / "index.html").read_text()
    assert re.search(r'class="[^"]*dropdown', html) and "<dl" in html
    assert 'href="all.html#record-advbn-cpu"' in html, "effects lead to their records"


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
