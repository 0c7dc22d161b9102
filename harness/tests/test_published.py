"""Published numbers of real cards beside the expected ones."""

import math
from dataclasses import replace

import pytest

from harness import HarnessError
from harness.conformance import published
from harness.conformance.published import (
    CONTRADICTED,
    EXPLAINED,
    MEANINGLESS,
    NEEDS_WEIGHTS,
    published_rows,
    verdict_on,
)
from harness.tests.checkpoints import model, write

ROWS = published_rows()


def row(metric):
    return next(item for item in ROWS if item.metric == metric and item.weights != "one number")


@pytest.mark.parametrize(
    ("metric", "factor"), [("rel_l2", 2.0), ("mean_diff", 2.0), ("cos_distance", 2.0), ("max_diff", 4.0)]
)
def test_a_number_is_explained_within_its_factor_on_either_side(metric, factor):
    item = row(metric)
    inside, outside = 0.999 * factor, 1.001 * factor
    assert verdict_on(item, item.published * inside) == verdict_on(item, item.published / inside) == EXPLAINED
    assert verdict_on(item, item.published * outside) == verdict_on(item, item.published / outside) == CONTRADICTED
    assert verdict_on(item, 0.0) == verdict_on(item, math.nan) == CONTRADICTED
    assert verdict_on(item, None) == NEEDS_WEIGHTS


def test_effective_bits_are_explained_within_half_a_bit():
    item = row("bits")
    assert verdict_on(item, item.published + 0.49) == verdict_on(item, item.published - 0.49) == EXPLAINED
    assert verdict_on(item, item.published + 0.51) == verdict_on(item, item.published - 0.51) == CONTRADICTED


def test_a_cosine_over_one_number_is_never_counted():
    item = next(item for item in ROWS if item.weights == "one number")
    assert verdict_on(item, None) == verdict_on(item, 1.0) == MEANINGLESS


def test_operators_are_computed_and_models_need_their_weights(capsys):
    assert published.main([]) == 0
    said = capsys.readouterr().out
    operators = [item for item in ROWS if item.weights == "-"]
    assert f"{len(operators)} of {len(operators)} explained" in said
    assert said.count(NEEDS_WEIGHTS) == sum(item.weights not in ("-", "one number") for item in ROWS)
    assert MEANINGLESS in said and all(item.source in said for item in ROWS)


def test_a_model_is_measured_with_its_weights_and_a_wrong_number_is_contradicted(tmp_path, monkeypatch):
    folder = write(tmp_path / "small", dict(model().state_dict()))
    own = replace(row("mean_diff"), name="small", weights="small", published=1.0)
    monkeypatch.setattr(published, "published_rows", lambda: [own])
    (outcome,) = published.measure({"small": folder})
    assert outcome.verdict == CONTRADICTED and 0 < outcome.expected < 1e-2
    monkeypatch.setattr(published, "published_rows", lambda: [replace(own, published=outcome.expected * 1.5)])
    assert published.measure({"small": folder})[0].verdict == EXPLAINED


def test_exact_gelu_is_expected_where_the_card_had_it():
    exact = [item for item in ROWS if item.activation == "exact GELU"]
    assert exact and all(item.weights == "dinov2-large" for item in exact)


@pytest.mark.parametrize(("given", "said"), [("aimv2=nowhere", "no NAME=DIR"), ("aimv2", "no NAME=DIR")])
def test_weights_that_are_not_there_are_a_usage_error(capsys, given, said):
    with pytest.raises(SystemExit):
        published.main(["--weights", given])
    assert said in capsys.readouterr().err


def test_weights_of_no_published_number_are_refused(tmp_path):
    with pytest.raises(HarnessError, match=r"no published number is of mine; there are StructBERT"):
        published.measure({"mine": tmp_path})
