"""The claims ledger: a verdict follows from the records and the criterion, and could have been another."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from advbn_lib import appearance_study, claims, mixing_bench, plan, records, reported, smiles_bench
from advbn_lib.__main__ import NAMES, main
from advbn_lib.claims import Claim, Side
from advbn_lib.digits_presets import DIGITS_PRESETS
from advbn_lib.experiments import EXPERIMENTS
from advbn_lib.measurements import MEASUREMENTS

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "book" / "claims.yml"
METRIC = "mean/clean/corruptions"
CONTROLS = {
    "clean_finetuning", "random_statistics", "advbn_shared_bn", "augmix", "pretrain", "feature_noise", "unchanged_features",
    "extra_forwards", "advprop_5_steps", "afan_points", "end_points", "pgd_4", "pgd_8", "trades",
    "mixed_statistics", "plain_finetuning", "pgd_finetuning",
}  # fmt: skip
_MIXED = ("nominal", "randmix", "randmix_looks", "randmix_passes", "reconstruction", "linf", "mixup", "advmix")
# AdvMix is a control where it stands below the oracle.
MIXING_CONTROLS = {f"{bench}_{name}" for bench in ("mixing", "smiles", "stylegan") for name in _MIXED}
MIXING_CONTROLS |= {f"digits_{name}" for name in ("pgd", "randmix", "clean_finetuning", "random_statistics")}
# Of the looks: other changes of features. Of AFA: the clean end point, the attack it was trained on. Of smiles: the planted light.
IN_THE_SAME_RECORD = {*appearance_study.CONTROLS, "clean", "fused", "planted"}


HARDWARE = {"gpu": None, "cpu": "A chip", "threads": 1}


def write(folder: Path, experiment: str, values: list[float] | dict[int, float], cost: dict | None = None) -> None:
    """Records of the seeds 0, 1, ..., or of those named."""
    for seed, value in values.items() if isinstance(values, dict) else enumerate(values):
        record = records.Record(
            experiment=experiment, preset="cpu", seed=seed, key="", config={}, metrics={"mean": {"clean": {"corruptions": value}}},
            curves={}, cost=cost or {}, hardware=HARDWARE, versions={}, code={}, data={}, weights={}, created="",
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
        ([0.5], 0.0, "incomplete"),  # one seed decides nothing, however large the effect
        ([0.010, 0.011], 0.0, "incomplete"),  # as long as one that was planned is lacking
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
    if parts[-1] == "roughness":  # less of it is better: the rougher course comes first
        return "noise" in entry.first.metric.split("/")
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


@pytest.mark.parametrize(
    "wrong, told", [({"presets": "cpu"}, "presets must be a list"), ({"controls": "advbn"}, "controls must be a list"),
                    ({"above": None}, "above must be a number"), ({"above": "0"}, "above must be a number")],
)  # fmt: skip
def test_a_word_is_no_list_and_a_limit_is_a_number(tmp_path, wrong, told):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump([entry(**wrong)]))
    with pytest.raises(records.RecordError, match=f"'a' is not a claim: {told}"):
        claims.read_claims(path)


def test_an_id_stands_once(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump([entry(), entry(), entry(id="b")]))
    with pytest.raises(records.RecordError, match="'a' stands twice"):
        claims.read_claims(path)


@pytest.mark.parametrize("text", ["- {id: a", "- *nobody", "a: b", ""])
def test_what_is_no_list_of_entries_is_refused(tmp_path, text):
    path = tmp_path / "claims.yml"
    path.write_text(text)
    with pytest.raises(records.RecordError, match=r"claims\.yml"):
        claims.read_claims(path)


# ---- seeds that were planned


def test_a_verdict_needs_every_planned_seed_on_both_sides(tmp_path):
    assert claims.seeds_due(claim(), "cpu") == {0, 1, 2} == set(plan.SEEDS)
    write(tmp_path, "clean_finetuning", [0.68, 0.70, 0.69])
    write(tmp_path, "advbn", [0.60, 0.62, 0.61])
    assert claims.decide(claim(), "cpu", tmp_path).verdict == "does not hold at this scale"
    records.path_of("advbn", "cpu", 1, tmp_path).unlink()
    found = claims.decide(claim(), "cpu", tmp_path)
    assert (found.verdict, found.reason, found.effect.n) == ("incomplete", "2 of 3 seeds", 2)
    assert found.effect.mean == pytest.approx(-0.08) and "incomplete (2 of 3 seeds): -0.08" in claims.sentence(found)


def test_sides_without_a_seed_in_common_are_incomplete_and_no_error(tmp_path):
    write(tmp_path, "clean_finetuning", {0: 0.68})
    write(tmp_path, "advbn", {1: 0.6, 2: 0.6})
    found = claims.decide(claim(), "cpu", tmp_path)
    assert (found.verdict, found.effect, found.reason) == ("incomplete", None, "0 of 3 seeds")
    assert claims.sentence(found) == "incomplete (0 of 3 seeds)"


def test_seeds_beyond_the_planned_ones_do_not_count(tmp_path):
    write(tmp_path, "clean_finetuning", [0.68, 0.70, 0.69, 0.2, 0.2])
    write(tmp_path, "advbn", [0.60, 0.62, 0.61, 0.9, 0.9])
    found = claims.decide(claim(), "cpu", tmp_path)
    assert found.verdict == "does not hold at this scale" and found.effect.n == 3
    for seed in (0, 1, 2):
        records.path_of("advbn", "cpu", seed, tmp_path).unlink()
    assert claims.decide(claim(), "cpu", tmp_path).reason == "0 of 3 seeds"


def test_experiments_that_are_not_planned_are_decided_by_the_seeds_there_are(tmp_path):
    loose = dataclasses.replace(claim(), first=Side("mine", METRIC), second=Side("yours", METRIC))
    write(tmp_path, "mine", [0.70, 0.71])
    write(tmp_path, "yours", [0.60, 0.61])
    assert claims.seeds_due(loose, "cpu") is None
    assert claims.decide(loose, "cpu", tmp_path).verdict == "holds at this scale"
    for seed in (0, 1):
        records.path_of("yours", "cpu", seed, tmp_path).unlink()
    write(tmp_path, "yours", {5: 0.6})
    found = claims.decide(loose, "cpu", tmp_path)
    assert (found.verdict, found.reason, found.effect) == ("incomplete", "no seed in common", None)


# ---- what a claim needs


@pytest.mark.parametrize(
    ("needed", "verdict", "reason"),
    [
        ([0.70, 0.71, 0.72], "holds at this scale", ""),
        ([0.50, 0.51, 0.52], "undecided at this scale", "needs gain, which does not hold"),
        ([0.50, 0.90, 0.61], "undecided at this scale", "needs gain, which is undecided"),
        ([0.70, 0.71], "undecided at this scale", "needs gain, which is incomplete"),
        ([], "undecided at this scale", "needs gain, which was not run"),
    ],
)
def test_a_claim_whose_need_does_not_hold_cannot_hold(tmp_path, needed, verdict, reason):
    gain = Claim("gain", "paper", "says", Side("augmix", METRIC), Side("clean_finetuning", METRIC), 0.0)
    as_good = dataclasses.replace(claim(), needs=(gain,))
    write(tmp_path, "clean_finetuning", [0.60, 0.61, 0.62])
    write(tmp_path, "advbn", [0.70, 0.72, 0.71])
    write(tmp_path, "augmix", needed)
    found = claims.decide(as_good, "cpu", tmp_path)
    assert (found.verdict, found.reason) == (verdict, reason)
    assert found.effect.mean == pytest.approx(0.1), "the numbers are shown all the same"


def test_what_fails_by_itself_fails_whatever_it_needs(tmp_path):
    gain = Claim("gain", "paper", "says", Side("augmix", METRIC), Side("clean_finetuning", METRIC), 0.0)
    write(tmp_path, "clean_finetuning", [0.60, 0.61, 0.62])
    write(tmp_path, "advbn", [0.50, 0.52, 0.51])
    found = claims.decide(dataclasses.replace(claim(), needs=(gain,)), "cpu", tmp_path)
    assert (found.verdict, found.reason) == ("does not hold at this scale", "")


def test_a_share_of_nothing_is_no_gain_in_the_ledger():
    needs = {entry.id: {needed.id for needed in entry.needs} for entry in claims.read_claims(LEDGER)}
    assert "afan-clean-accuracy" in needs["afan-as-good-as-pixels"]
    assert "afan-as-good-as-pixels" in needs["afan-cheaper-than-pixels"]
    helps = [name for name in needs if name.startswith(("advbn-beats-", "afan-beats-", "advmix-beats-"))]
    assert len(helps) == 10 and all(needs[name] for name in helps), "it is the adversary that helps: so something does"


# ---- fields


def entry(**changed) -> dict:
    side = {"experiment": "advbn", "metric": METRIC}
    whole = {
        "id": "a", "paper": "P", "says": "s", "presets": ["cpu"], "protocol": "p", "first": side, "second": None, "above": 0.0,
        "controls": ["augmix"], "reported_why": "none",
    }  # fmt: skip
    return {name: value for name, value in {**whole, **changed}.items() if value != "gone"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"protocol": "gone"}, "protocol"),
        ({"controls": []}, "controls"),
        ({"reported_why": "gone"}, "reported_why"),
        ({"reported": ["advbn/guessed"]}, "has no advbn/guessed"),
        ({"needs": ["b"]}, "needs b, which must stand above"),
        ({"needs": ["a"]}, "needs a, which must stand above"),
        ({"written": "later"}, "before or after"),
        ({"mood": "good"}, "mood"),
        ({"presets": []}, "presets"),
        ({"presets": ["cqu"]}, "advbn has no preset cqu"),
        ({"second": {"experiment": "advnb", "metric": METRIC}}, "'advnb' is no experiment"),
    ],
)
def test_an_entry_says_all_that_is_asked(tmp_path, changed, message):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump([entry()]))
    assert claims.read_claims(path)[0].controls == ("augmix",)
    path.write_text(yaml.safe_dump([entry(**changed)]))
    with pytest.raises(records.RecordError, match=f"entry 'a' .*{message}"):
        claims.read_claims(path)


def test_what_is_needed_is_decided_at_the_same_scales(tmp_path):
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump([entry(), entry(id="b", needs=["a"])]))
    assert claims.read_claims(path)[1].needs == (claims.read_claims(path)[0],)
    path.write_text(yaml.safe_dump([entry(), entry(id="b", presets=["cpu", "gpu"], needs=["a"])]))
    with pytest.raises(records.RecordError, match="needs a, which is not decided at gpu"):
        claims.read_claims(path)


def test_every_claim_of_the_book_has_its_fields_and_they_name_what_exists():
    ledger = claims.read_claims(LEDGER)
    ids = {claim.id for claim in ledger}
    for claim in ledger:
        assert claim.protocol.endswith(".") and claim.controls and (claim.reported or claim.reported_why), claim.id
        assert set(claim.reported) <= set(reported.REPORTED), claim.id
        for control in claim.controls:
            assert " " in control or control in ids or control in EXPERIMENTS or control in MEASUREMENTS, control
            assert control != claim.id
        paired = claim.second and claim.second.experiment != claim.first.experiment
        assert not paired or claim.second.experiment in claim.controls, claim.id
    beyond_random = {f"advbn-{eps}looks-{what}-beyond-random" for eps in ("", "eps05-") for what in ("edges", "style")}
    afterwards = beyond_random | {"advbn-style-clean-branch", "afa-smooth"}
    assert {claim.id for claim in ledger if claim.written == "after"} == afterwards
    said = {key for claim in ledger for key in claim.reported}
    assert "advmix/celeba_smile_errors/advmix" in said and not any(key.startswith("afa/") for key in said)


def test_protocols_name_the_sizes_of_the_runs():
    protocol = {claim.id: claim.protocol for claim in claims.read_claims(LEDGER)}
    mixing, smiles = mixing_bench.BENCHES["cpu_mixing"], smiles_bench.BENCHES["cpu_smiles"]
    assert f"{mixing.pgd_eps:g}/255" in protocol["advmix-spurious-linf"]
    assert f"{smiles.pgd_eps:g}/255" in protocol["advmix-smiles-linf"]
    digits = {claim.id: claim.says for claim in claims.read_claims(LEDGER)}["arena-advmix-bias"]
    assert f"at {DIGITS_PRESETS['cpu_digits_arena'].pgd_eps:g}/255" in digits
    assert f"{100 * smiles.share:g} %" in protocol["advmix-smiles-nominal"]
    assert f"first {smiles.attacked} test faces" in protocol["advmix-smiles-robust"]
    assert f"{mixing.attack_restarts} restarts" in protocol["advmix-robust-randmix"]


def test_cost_is_training_and_test_by_machine(tmp_path):
    write(tmp_path, "clean_finetuning", [0.6, 0.6, 0.6])
    write(tmp_path, "advbn", {0: 0.7, 1: 0.7}, {"train_seconds": 3600, "test_seconds": 1800, "wall_seconds": 10})
    write(tmp_path, "advbn", {2: 0.7}, {"wall_seconds": 9000})
    found = claims.decide(claim(), "cpu", tmp_path)
    assert found.cost == (claims.Spent("A chip, 1 thread", pytest.approx((1.5 + 1.5 + 2.5) / 3)),)
    assert claims.cost_in_words(found) == "1.8 hours a run (A chip, 1 thread)"


def test_the_command_prints_what_is_behind_only_when_asked(tmp_path, capsys):
    write(tmp_path, "advbn", [0.7, 0.7, 0.7], {"train_seconds": 3600, "test_seconds": 0})
    path = tmp_path / "claims.yml"
    path.write_text(
        yaml.safe_dump([entry(), entry(id="b", needs=["a"], reported=["advbn/sketch/advbn"], written="after")])
    )
    asked = ["--records", str(tmp_path), "claims", "--file", str(path)]
    assert main(asked) == 0
    short = capsys.readouterr().out.splitlines()
    assert short[0] == "a (P): s" and short[1].startswith("    cpu: holds at this scale: 0.7") and len(short) == 4
    assert main([*asked, "--long"]) == 0
    said = capsys.readouterr().out
    for words in (
        "cost of the first side: 1 hours a run (A chip, 1 thread)", "Protocol: p", "augmix (AugMix, an augmentation",
        "ImageNet-Sketch accuracy, ResNet-50 on ImageNet: 27.9 %", "Needs: a.", "Written: after the records",
    ):  # fmt: skip
        assert words in said


def test_reported_numbers_of_the_same_thing_share_a_sentence():
    pair = reported.in_words(["advbn/sketch/standard", "advbn/sketch/advbn"])
    assert pair.startswith("ImageNet-Sketch accuracy, ResNet-50 on ImageNet: standard 24.1 %, advbn 27.9 % (README of")
    assert pair.count("README") == 1 and reported.in_words([]) == ""
    assert ": 21 % (abstract of the paper" in reported.in_words(["advmix/celeba_smile_errors/advmix"])
