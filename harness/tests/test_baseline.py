"""Baselines: what is kept, what a change is called, and that nothing is accepted or passed over in silence."""

import json
import math

import pytest

from harness import baseline
from harness.errors import HarnessError
from harness.report import Row

STACK = {"device": "Ascend910B4", "cann": "8.5.0"}


def row(seed=42, error=1e-4, digest=None, **more):
    given = dict(
        test="", case="m", dtype="float32", seed=seed, weights="seeded:0", inputs_sha256=f"in{seed}", rel_l2=error,
        golden_rel_l2=error, actual_sha256=digest or f"{error}",
    )  # fmt: skip
    return Row(**given | more)


def rows(errors, **more):
    return [row(seed=seed, error=error, **more) for seed, error in enumerate(errors)]


def entry_of(accepted):
    stored = baseline.accepted(None, accepted, stack=STACK, backend="npu", when="2026-01-01")
    return stored.entries["Ascend910B4 (npu)"]


def kinds(now, then):
    return [each.kind for each in baseline.verdicts(now, entry_of(then))]


FIVE = [1.00e-4, 1.10e-4, 0.90e-4, 1.05e-4, 0.97e-4]


def test_the_same_bits_are_identical_whatever_the_numbers_say():
    assert kinds(rows(FIVE), rows(FIVE)) == ["IDENTICAL"] * 5


def test_without_a_baseline_a_row_is_new_and_says_how_to_accept_it():
    (found,) = baseline.verdicts([row()], None)
    assert found.kind == "NEW" and "--precision-baseline=accept" in found.text and "m float32 seed 42" in found.text


def test_a_small_drift_that_all_seeds_share_is_a_regression():
    assert kinds(rows([each * 1.05 for each in FIVE]), rows(FIVE)) == ["REGRESSED"] * 5
    assert kinds(rows([each / 1.05 for each in FIVE]), rows(FIVE)) == ["IMPROVED"] * 5


def test_one_noisy_seed_and_scatter_are_drift():
    assert kinds(rows([FIVE[0] * 1.3, *FIVE[1:]]), rows(FIVE)) == ["DRIFT"] + ["IDENTICAL"] * 4
    scattered = [each * factor for each, factor in zip(FIVE, (1.03, 0.98, 1.04, 0.97, 1.01))]
    assert kinds(rows(scattered), rows(FIVE)) == ["DRIFT"] * 5


def test_a_shared_change_too_small_to_matter_is_drift():
    assert kinds(rows([each * 1.01 for each in FIVE]), rows(FIVE)) == ["DRIFT"] * 5


def test_one_seed_that_is_much_worse_is_a_regression_by_itself():
    assert kinds(rows([FIVE[0] * 1.6, *FIVE[1:]]), rows(FIVE)) == ["REGRESSED"] + ["IDENTICAL"] * 4


def test_with_few_seeds_only_a_large_change_counts():
    assert kinds([row(error=1.4e-4)], [row(error=1e-4)]) == ["DRIFT"]
    assert kinds([row(error=1.6e-4)], [row(error=1e-4)]) == ["REGRESSED"]
    assert kinds([row(error=0.6e-4)], [row(error=1e-4)]) == ["IMPROVED"]
    assert kinds([row(error=1e-9)], [row(error=0.0)]) == ["REGRESSED"]


def test_a_change_within_the_noise_of_reruns_is_drift():
    assert kinds(rows([each * 1.05 for each in FIVE], rerun={"rel_l2": 1e-5}), rows(FIVE)) == ["DRIFT"] * 5


@pytest.mark.parametrize(("change", "word"), [({"weights": "seeded:1"}, "other weights"), ({"inputs_sha256": "x"}, "other inputs")])
def test_other_weights_or_inputs_are_not_comparable(change, word):
    (found,) = baseline.verdicts([row(**change)], entry_of([row()]))
    assert found.kind == "NOT COMPARABLE" and word in found.text


def test_numbers_that_are_not_finite_are_not_comparable():
    assert kinds([row(error=math.nan, digest="x")], [row()]) == ["NOT COMPARABLE"]
    assert math.isnan(baseline.error_of(Row(test="", case="m", dtype=None, seed=None)))


def test_emulated_numbers_never_meet_a_card_nor_another_model():
    stored = baseline.accepted(None, [row()], stack=STACK, backend="emulated", when="2026-01-01")
    stored = baseline.accepted(stored, [row(error=2e-4)], stack=STACK, backend="npu", when="2026-01-02")
    assert sorted(stored.entries) == ["Ascend910B4 (emulated)", "Ascend910B4 (npu)"]
    assert stored.entries["Ascend910B4 (emulated)"].rows["42"].rel_l2 == 1e-4
    assert baseline.key_of(STACK | {"device": "Ascend910B2"}, "npu") not in stored.entries


def test_a_file_comes_back_as_it_was_and_a_damaged_or_newer_one_is_refused(tmp_path):
    path = baseline.path_of(tmp_path, "a model/with:odd name", "float32")
    assert path.parent == tmp_path and baseline.load(path) is None
    stored = baseline.accepted(None, rows(FIVE), stack=STACK, backend="npu", when="2026-01-01")
    path.write_text(json.dumps(stored.to_dict()))
    assert baseline.load(path).to_dict() == stored.to_dict()
    for text, word in (("{", "is damaged"), (json.dumps(stored.to_dict() | {"schema": "precision-baseline/2"}), "has schema 'precision-baseline/2'"), ('{"schema": "precision-baseline/1"}', "lacks its entries")):
        path.write_text(text)
        with pytest.raises(HarnessError, match=word):
            baseline.load(path)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({"rel_l2": 1e-3}, {"rel_l2": 1e-3}, []),
        ({"rel_l2": 1e-3}, {"rel_l2": 1e-4}, []),
        ({"rel_l2": 1e-3}, {"rel_l2": 1e-2}, ["rel_l2 0.01 where 0.001 was accepted"]),
        ({"cos_sim": 0.99}, {"cos_sim": 0.999}, []),
        ({"cos_sim": 0.99}, {"cos_sim": 0.9}, ["cos_sim 0.9 where 0.99 was accepted"]),
        ({"rel_l2": 1e-3}, {}, ["no rel_l2 where 0.001 was accepted"]),
        ({"forecast_ratio": 2.0}, {"forecast_ratio": 2.0, "unexplained_ratio": 2.0}, []),
        ({}, {"rel_l2": 1.0}, []),
    ],
)
def test_a_limit_that_is_looser_than_accepted_is_named(then, now, said):
    entry = baseline.Entry(rows={"1": row(1, allowed=then)})
    assert baseline.loosened(entry, [row(1, allowed=now)]) == said
    assert baseline.loosened(None, [row(1, allowed=now)]) == []


def test_the_error_of_one_number_may_change_by_chance():
    assert baseline._chance(row(shape=())) == baseline._chance(row(shape=(1,))) == 10.0 and baseline._chance(row(shape=(4, 500))) == 1.0
