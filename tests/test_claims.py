"""The claims ledger: a verdict follows from the records and the criterion, and could have been another."""

from __future__ import annotations

from pathlib import Path

import pytest

from advbn_lib import appearance_study, claims, records
from advbn_lib.claims import Claim, Side
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.measurements import MEASUREMENTS
from advbn_lib.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "book" / "claims.yml"
METRIC = "mean/clean/corruptions"
CONTROLS = {
    "clean_finetuning", "random_statistics", "advbn_shared_bn", "augmix", "pretrain", "feature_noise", "unchanged_features",
    "extra_forwards", "advprop_5_steps",
}  # fmt: skip


def write(folder: Path, experiment: str, values: list[float]) -> None:
    for seed, value in enumerate(values):
        record = records.Record(
            experiment=experiment, preset="cpu", seed=seed, key="", config={}, metrics={"mean": {"clean": {"corruptions": value}}},
            curves={}, cost={}, hardware={}, versions={}, code={}, data={}, weights={}, created="",
        )  # fmt: skip
        records.write(record, folder)


def claim(above: float = 0.0) -> Claim:
    return Claim("c", "paper", "says", Side("advbn", METRIC), Side("clean_finetuning", METRIC), above)


@pytest.mark.parametrize(
    ("gains", "above", "verdict"),
    [
        ([0.010, 0.012, 0.011], 0.0, "holds at this scale"),
        ([-0.010, -0.012, -0.011], 0.0, "does not hold at this scale"),
        ([0.010, -0.012, 0.001], 0.0, "undecided at this scale"),
        ([-0.003, -0.002, -0.001], -0.005, "holds at this scale"),  # a loss smaller than what the criterion allows
        ([0.003, 0.002, 0.001], 0.01, "does not hold at this scale"),  # a gain smaller than what it asks
        ([0.5], 0.0, "undecided at this scale"),  # one seed decides nothing, however large the effect
    ],
)
def test_the_verdict_follows_from_the_interval(tmp_path, gains, above, verdict):
    baseline = [0.68, 0.70, 0.69][: len(gains)]
    write(tmp_path, "clean_finetuning", baseline)
    write(tmp_path, "advbn", [base + gain for base, gain in zip(baseline, gains, strict=True)])
    found = claims.decide(claim(above), "cpu", tmp_path)
    assert found.verdict == verdict
    assert found.effect.n == len(gains)
    assert found.effect.mean == pytest.approx(sum(gains) / len(gains))


def test_without_records_of_both_sides_it_is_not_run(tmp_path):
    write(tmp_path, "advbn", [0.7])
    found = claims.decide(claim(), "cpu", tmp_path)
    assert (found.verdict, found.effect) == ("not run", None)


def test_the_ledger_asks_for_experiments_and_metrics_that_exist():
    ledger = claims.read_claims(LEDGER)
    assert len(ledger) >= 5
    for entry in ledger:
        assert set(entry.presets) <= set(PRESETS)
        for side in (entry.first, entry.second):
            assert side.experiment in EXPERIMENTS or side.experiment in MEASUREMENTS
            for preset in entry.presets:
                for record in records.load(side.experiment, preset, ROOT / "records"):
                    assert -1 <= record.metric(side.metric) <= 1 or side.experiment == "step_cost"


def test_each_claim_is_held_against_a_control():
    for entry in claims.read_claims(LEDGER):
        assert entry.first != entry.second
        if entry.second.experiment == "appearance":
            assert entry.second.metric.split("/")[1] in appearance_study.CONTROLS
        elif entry.second.experiment == "step_cost":
            assert (
                "-cheaper-" in entry.id and entry.second.metric == "step_cost/ratio/afan"
            )  # the dearer one comes first
        elif entry.second.experiment in MEASUREMENTS:
            assert entry.second.experiment.endswith(("_plain", "_noise"))
        else:
            assert entry.second.experiment in CONTROLS | ({"afan"} if entry.id == "afan-reinjection-adds" else set())


@pytest.mark.parametrize("text", ["- {id: a}", "- {id: a, paper: b, says: c, first: {}, second: {}, above: 0}"])
def test_an_entry_without_its_fields_is_refused(tmp_path, text):
    path = tmp_path / "claims.yml"
    path.write_text(text)
    with pytest.raises(records.RecordError, match=r"claims\.yml"):
        claims.read_claims(path)


def test_an_id_stands_once(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text(LEDGER.read_text() + "\n" + LEDGER.read_text())
    with pytest.raises(records.RecordError, match="twice"):
        claims.read_claims(path)
