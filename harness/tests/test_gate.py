"""judge(): every fault breaks the criterion that is meant for it, with words that say what, where and how much was allowed."""

import math

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.gate import Decisions, Reason, Verdict, error, skipped

LOOSE = Tolerance(max_diff=math.inf)


def pair(change):
    expected = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    changed = change(actual)
    return compare(actual if changed is None else changed, expected)


def criteria(verdict):
    return [reason.criterion for reason in verdict.failures]


def test_equal_tensors_pass_the_tightest_limits():
    verdict = judge(pair(lambda x: None), Tolerance(max_diff=0, mean_diff=0, cos_sim=1, rel_l2=0, max_diff_rms=0, token_cos_sim=1))
    assert verdict.status == "PASS" and verdict.passed and verdict.reasons == ()


def one_element(x):
    x.view(-1)[5] += 1.0


def everywhere(x):
    x.add_(0.1)


def tokens_reversed(x):
    return x.flip(1)


def scaled(x):
    x.mul_(1.01)


def one_token_negated(x):
    x[0, 3].neg_()


@pytest.mark.parametrize(
    ("change", "tolerance", "criterion"),
    [
        (one_element, Tolerance(max_diff=0.5), "max_diff"),
        (everywhere, Tolerance(mean_diff=0.05), "mean_diff"),
        (tokens_reversed, Tolerance(cos_sim=0.99), "cos_sim"),
        (scaled, Tolerance(rel_l2=1e-3), "rel_l2"),
        (one_element, Tolerance(max_diff_rms=0.5), "max_diff_rms"),
        (one_token_negated, Tolerance(token_cos_sim=0.9), "token_cos_sim"),
    ],
)
def test_each_limit_catches_its_fault(change, tolerance, criterion):
    verdict = judge(pair(change), tolerance)
    assert verdict.status == "FAIL"
    assert criteria(verdict) == [criterion]


def test_failure_says_what_where_and_how_much_is_allowed():
    def change(x):
        x[1, 7, 3] += 2.0

    verdict = judge(pair(change), Tolerance(max_diff=1e-2))
    assert str(verdict.reasons[0]) == "max_diff 2.00e+00 at (1, 7, 3) (up to 1.00e-02 allowed); a limit of 2.01e+00 would pass"
    verdict = judge({"features": pair(change), "pooled": pair(lambda x: None)}, Tolerance(max_diff=1e-2))
    assert str(verdict.reasons[0]).startswith("features: max_diff")
    assert verdict.output == "features" and verdict.comparison.max_diff == pytest.approx(2.0)


def test_nan_fails_every_limit_however_loose():
    def change(x):
        x[0, 1, 2] = math.nan

    limits = Tolerance(max_diff=math.inf, mean_diff=math.inf, cos_sim=0, rel_l2=math.inf, max_diff_rms=math.inf, token_cos_sim=0)
    verdict = judge(pair(change), limits)
    assert criteria(verdict) == ["finite", "max_diff", "mean_diff", "cos_sim", "rel_l2", "max_diff_rms", "token_cos_sim"]
    assert "at (0, 1, 2): nan where" in verdict.reasons[0].text


def test_nan_on_both_sides_is_no_pass():
    tensor = torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    verdict = judge(compare(tensor, tensor.clone()), LOOSE)
    assert verdict.status == "FAIL"
    assert "NaN on both sides" in verdict.reasons[0].text


def test_infinity_with_the_other_sign_fails_and_a_shared_one_does_not():
    tensor = torch.tensor([[1.0, math.inf], [2.0, 3.0]])
    assert judge(compare(tensor, tensor.clone()), LOOSE).passed
    flipped = tensor.clone()
    flipped[0, 1] = -math.inf
    assert "finite" in criteria(judge(compare(flipped, tensor), LOOSE))


def test_other_shape_and_other_dtype_fail_whatever_the_limits():
    assert criteria(judge(compare(torch.ones(2, 3), torch.ones(3, 2)), LOOSE)) == ["shape"]
    assert criteria(judge(compare(torch.ones(2, 3).half(), torch.ones(2, 3)), LOOSE)) == ["dtype"]


def test_integers_must_be_equal_whatever_the_limits():
    expected = torch.arange(10)
    actual = expected.clone()
    actual[4] = 99
    verdict = judge({"ids": compare(actual, expected), "logits": compare(torch.ones(2, 2), torch.ones(2, 2))}, LOOSE)
    assert verdict.status == "FAIL"
    assert "1 of 10 elements differ" in str(verdict.reasons[0]) and "99 where 4" in str(verdict.reasons[0])


def test_a_decision_that_flips_is_named():
    made = Decisions(count=200, agree=198, correct_actual=190, correct_expected=191, first=(17, 3, 8))
    verdict = judge(pair(lambda x: None), Tolerance(max_diff=1, top1=0.995), decisions=made)
    assert criteria(verdict) == ["top1"]
    assert "198 of 200" in verdict.reasons[0].text and "input 17: 3 where 8" in verdict.reasons[0].text
    assert judge(pair(lambda x: None), Tolerance(max_diff=1, top1=0.99), decisions=made).passed


def test_to_have_compared_nothing_is_an_error():
    assert Verdict().status == "ERROR"
    assert judge({}, LOOSE).status == "ERROR"
    assert "compared nothing" in str(Verdict().reasons[0])


def test_status_follows_from_the_reasons_by_gravity():
    found = {"output": pair(lambda x: None)}
    reason = (Reason(criterion="x", text="y"),)
    assert Verdict(comparisons=found).status == "PASS"
    assert Verdict(comparisons=found, regressions=reason).status == "REGRESSED"
    assert Verdict(comparisons=found, regressions=reason, failures=reason).status == "FAIL"
    assert error("crashed").status == "ERROR" and skipped("too big").status == "SKIPPED"


@pytest.mark.parametrize(
    ("limits", "word"),
    [({}, "would pass anything"), ({"max_diff": -1.0}, "zero or more"), ({"max_diff": math.nan}, "zero or more"), ({"cos_sim": 1.1}, "between")],
)
def test_a_tolerance_that_judges_nothing_or_nonsense_is_refused(limits, word):
    with pytest.raises(ValueError, match=word):
        Tolerance(**limits)
