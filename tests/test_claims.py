"""The claims ledger: a verdict follows from the records and the criterion, and could have been another."""

from __future__ import annotations

from pathlib import Path

import pytest

from advbn_lib import appearance_study, claims, records
from advbn_lib.__main__ import NAMES
from advbn_lib.claims import Claim, Side
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.measurements import MEASUREMENTS

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "book" / "claims.yml"
METRIC = "mean/clean/corruptions"
CONTROLS = {
    "clean_finetuning", "random_statistics", "advbn_shared_bn", "augmix", "pretrain", "feature_noise", "unchanged_features",
    "extra_forwards", "advprop_5_steps", "afan_points", "end_points", "pgd_4", "pgd_8", "trades",
}  # fmt: skip
_MIXED = ("nominal", "randmix", "randmix_looks", "randmix_passes", "reconstruction", "linf", "mixup", "advmix")
# AdvMix is a control where it stands below the oracle.
MIXING_CONTROLS = {f"{bench}_{name}" for bench in ("mixing", "smiles", "stylegan") for name in _MIXED}
# Of the looks: other changes of features. Of AFA: the clean end point, the attack it was trained on. Of smiles: the planted light.
IN_THE_SAME_RECORD = {*appearance_study.CONTROLS, "clean", "fused", "planted"}


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
        assert set(entry.presets) <= set(NAMES)
        for side in entry.sides:
            assert side.experiment in EXPERIMENTS or side.experiment in MEASUREMENTS
            for preset in entry.presets:
                for record in records.load(side.experiment, preset, ROOT / "records"):
                    assert -1 <= record.metric(side.metric) <= 1 or side.experiment == "step_cost"


def is_held_against_a_control(entry: Claim) -> bool:
    if entry.second is None:
        return entry.above > 0  # more than what nothing would give
    experiment, parts = entry.second.experiment, entry.second.metric.split("/")
    if experiment == "step_cost":
        return "-cheaper-" in entry.id and parts[-1] == "afan"  # the dearer one comes first
    if experiment == entry.first.experiment:  # parts of one record
        return entry.first != entry.second and not IN_THE_SAME_RECORD.isdisjoint(parts)
    if experiment in MEASUREMENTS:
        return experiment.endswith(("_plain", "_noise")) or experiment in MIXING_CONTROLS
    return experiment in CONTROLS


def test_each_claim_is_held_against_a_control():
    assert [entry.id for entry in claims.read_claims(LEDGER) if not is_held_against_a_control(entry)] == []


def test_a_claim_about_one_side_is_decided_by_its_own_interval(tmp_path):
    alone = Claim("c", "paper", "says", Side("advbn", METRIC), None, 0.5)
    assert claims.decide(alone, "cpu", tmp_path).verdict == "not run"
    write(tmp_path, "advbn", [0.6, 0.61, 0.62])
    found = claims.decide(alone, "cpu", tmp_path)
    assert found.verdict == "holds at this scale" and found.effect.mean == pytest.approx(0.61)
    assert claims.decide(Claim("c", "paper", "says", Side("advbn", METRIC), None, 0.7), "cpu", tmp_path).verdict == (
        "does not hold at this scale"
    )


@pytest.mark.parametrize(
    "text",
    [
        "- {id: a, paper: b, says: c, presets: [cpu], first: null, second: null, above: 0}",
        "- {id: a}",
        "- {id: a, paper: b, says: c, first: {}, second: {}, above: 0}",
    ],
)
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
