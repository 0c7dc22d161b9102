"""judge(): every fault breaks the criterion that is meant for it, with words that say what, where and how much was
allowed.
"""

import math

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.judging.presets import PRESETS
from harness.judging.references import References, slack
from harness.judging.verdict import Decisions, Reason, Verdict, error, skipped

LOOSE = Tolerance(max_diff=1e300)  # all but anything


def pair(change):
    expected = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    changed = change(actual)
    return compare(actual if changed is None else changed, expected)


def criteria(verdict):
    return [reason.criterion for reason in verdict.failures]


def test_equal_tensors_pass_the_tightest_limits():
    verdict = judge(
        pair(lambda x: None), Tolerance(max_diff=0, mean_diff=0, cos_sim=1, rel_l2=0, max_diff_rms=0, token_cos_sim=1)
    )
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
    assert (
        str(verdict.reasons[0])
        == "max_diff 2.00e+00 at (1, 7, 3) (up to 1.00e-02 allowed); a limit of 2.01e+00 would pass"
    )
    verdict = judge({"features": pair(change), "pooled": pair(lambda x: None)}, Tolerance(max_diff=1e-2))
    assert str(verdict.reasons[0]).startswith("features: max_diff")
    assert verdict.output == "features" and verdict.comparison.max_diff == pytest.approx(2.0)


def test_nan_fails_every_limit_however_loose():
    def change(x):
        x[0, 1, 2] = math.nan

    limits = Tolerance(
        max_diff=1e300, mean_diff=math.inf, cos_sim=0, rel_l2=math.inf, max_diff_rms=math.inf, token_cos_sim=0
    )
    verdict = judge(pair(change), limits)
    assert criteria(verdict) == [
        "finite",
        "max_diff",
        "mean_diff",
        "cos_sim",
        "rel_l2",
        "max_diff_rms",
        "token_cos_sim",
    ]
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
    result = {"output": pair(lambda x: None)}
    reason = (Reason(criterion="x", text="y"),)
    assert Verdict(comparisons=result).status == "PASS"
    assert Verdict(comparisons=result, regressions=reason).status == "REGRESSED"
    assert Verdict(comparisons=result, regressions=reason, failures=reason).status == "FAIL"
    assert error("crashed").status == "ERROR" and skipped("too big").status == "SKIPPED"


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ({}, "would pass anything"),
        ({"max_diff": -1.0}, "zero or more"),
        ({"max_diff": math.nan}, "zero or more"),
        ({"cos_sim": 1.1}, "between"),
    ],
)
def test_a_tolerance_that_judges_nothing_or_nonsense_is_refused(limits, word):
    with pytest.raises(ValueError, match=word):
        Tolerance(**limits)


# -------- presets

FLOOR = Tolerance(preset="floor")


def three(change=lambda y: y, *, dtype=torch.float16, shape=(2, 64, 32)):
    """What `judge` gets: a healthy half-precision result against the CPU's and against float64, after `change`."""
    golden = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def noisy(seed):
        return golden + 2e-3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    cpu, forecast, actual = noisy(1).to(dtype), noisy(2).to(dtype), change(noisy(3)).to(dtype)
    held = References(golden=compare(actual, golden), cpu=compare(cpu, golden), forecast=compare(forecast, golden))
    return compare(actual, cpu), {"output": held}


def on_floor(change=lambda y: y, tolerance=FLOOR, **more):
    comparison, references = three(change, **more)
    return judge(comparison, tolerance, references=references)


def changed(index, value):
    def change(y):
        y[index] = value
        return y

    return change


def flipped(y):
    top = y[0, 3].topk(2)
    y[0, 3, top.indices] = top.values.flip(0)
    return y


def test_a_healthy_result_passes_the_floor_at_a_ratio_of_one():
    verdict = on_floor()
    assert verdict.passed, verdict.reasons
    assert verdict.references["output"].ratios()["forecast_ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("change", "criterion"),
    [
        (lambda y: y + 6e-3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(9)), "forecast_ratio"),
        (lambda y: y * 1.0007, "gain_ratio"),
        (lambda y: y + 7e-4, "shift_ratio"),
        (changed((1, 5, 7), 0.05), "outlier_ratio"),
        (changed((1, 5), 0.0), "token_ratio"),
        (flipped, "flip_margin"),
    ],
)
def test_the_floor_has_a_check_for_each_kind_of_error(change, criterion):
    verdict = on_floor(change)
    assert verdict.status == "FAIL" and criterion in criteria(verdict)


def test_without_a_golden_reference_the_floor_fails():
    verdict = judge(three()[0], FLOOR)
    assert criteria(verdict) == ["golden"] and "no float64 reference" in verdict.reasons[0].text


def test_a_limit_replaces_that_of_the_preset_and_wants_a_reason():
    with pytest.raises(ValueError, match="another forecast_ratio needs a reason"):
        Tolerance(preset="floor", forecast_ratio=9.0)
    with pytest.raises(ValueError, match="no preset is called 'flor'; there are floor, sharp, card"):
        Tolerance(preset="flor")

    def change(y):
        return y + 6e-3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(9))

    result = on_floor(
        change, Tolerance(preset="floor", forecast_ratio=9.0, token_ratio=9.0, reason="a sum of a million")
    )
    assert result.passed and result.tolerance.reason == "a sum of a million"


def test_the_smallest_limit_that_would_pass_does_pass_and_a_smaller_one_does_not():
    comparison, _ = three()
    text = judge(comparison, Tolerance(mean_diff=1e-9)).reasons[0].text
    enough = float(text.rpartition("a limit of ")[2].removesuffix(" would pass"))
    assert judge(comparison, Tolerance(mean_diff=enough)).passed
    assert not judge(comparison, Tolerance(mean_diff=enough * 0.989)).passed
    text = judge(comparison, Tolerance(cos_sim=1.0)).reasons[0].text
    enough = float(text.rpartition("a limit of ")[2].removesuffix(" would pass"))
    assert judge(comparison, Tolerance(cos_sim=enough)).passed


def test_few_elements_have_more_slack():
    assert [slack(count) for count in (1, 10, 11, 500, 501, 999, 1000, 10**9)] == [10, 10, 5, 5, 3, 3, 2, 2]


def test_a_reference_that_overflows_is_named():
    golden = torch.full((4, 64), 1e5, dtype=torch.float64)
    cpu = golden.half()
    held = References(golden=compare(cpu, golden), cpu=compare(cpu, golden))
    verdict = judge(compare(cpu, cpu), FLOOR, references={"output": held})
    assert "float16 cannot hold this model" in str(verdict.reasons[0])


@pytest.mark.parametrize(
    ("preset", "passing", "failing"),
    [
        ("card", lambda y: y, lambda y: y + 0.02),
        ("cann", lambda y: y.sign() * (y.abs() + 5), lambda y: y * 1.02),
        ("dynamo", lambda y: y, lambda y: y * 1.1),
        ("pair", lambda y: y, lambda y: y * 1.001),
    ],
)
def test_each_preset_passes_and_fails(preset, passing, failing):
    golden = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    golden = passing(golden) if preset == "cann" else golden  # no element near zero

    def verdict(change):
        cpu, actual = golden.half(), change(golden).half()
        held = References(golden=compare(actual, golden), cpu=compare(cpu, golden))
        return judge(compare(actual, cpu), Tolerance(preset=preset), references={"output": held})

    assert verdict(lambda y: y * (1 + 2**-13)).passed
    assert verdict(failing).status == "FAIL"


def test_close_is_torch_testing():
    expected = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for scale in (1e-7, 1e-6, 1e-5, 1e-4):
        actual = expected + scale * torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        try:
            torch.testing.assert_close(actual, expected)
            said = True
        except AssertionError:
            said = False
        assert judge(compare(actual, expected), Tolerance(preset="close")).passed == said


def test_hf32_has_a_column_of_its_own_in_the_cann_standard():
    expected = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) + 1
    comparison = compare(expected * (1 + 2**-12), expected)
    golden = compare(expected.double(), expected.double())
    assert not judge(comparison, Tolerance(preset="cann")).passed
    assert judge(
        comparison,
        Tolerance(preset="cann"),
        references={"output": References(golden=golden, cpu=golden, modes=("HF32",))},
    ).passed


@pytest.mark.parametrize("preset", PRESETS)
def test_nan_fails_every_preset(preset):
    assert not on_floor(changed((0, 0, 0), math.nan), Tolerance(preset=preset)).passed


# -------- what passed, or was refused, by mistake once


def test_limits_that_judge_nothing_are_a_failure():
    x = torch.randn(64)
    assert criteria(judge(compare(x, -x), Tolerance(token_rel_l2=1e-3))) == ["limits"]
    assert criteria(judge(compare(x, -x), Tolerance(top1=0.9))) == ["top1"]
    assert "were compared; name the output" in judge(compare(x, x), Tolerance(top1=0.9)).reasons[0].text


def test_outputs_without_elements_are_no_pass():
    verdict = judge(compare(torch.ones(0, 4), torch.ones(0, 4)), LOOSE)
    assert criteria(verdict) == ["empty"]
    assert judge({"a": compare(torch.ones(0), torch.ones(0)), "b": compare(torch.ones(2), torch.ones(2))}, LOOSE).passed


def test_a_reference_of_zeros_is_judged_by_absolute_errors():
    golden = torch.zeros(64, 64, dtype=torch.float64)
    noise = [1e-9 * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def verdict(actual):
        held = References(
            golden=compare(actual, golden), cpu=compare(noise[1], golden), forecast=compare(noise[2], golden)
        )
        return judge(compare(actual, noise[1]), FLOOR, references={"output": held})

    assert verdict(noise[0]).passed
    assert verdict(noise[0] * 5).status == "FAIL"


def test_a_row_that_float64_has_as_zeros_is_no_alarm_and_hides_no_outlier():
    golden = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    golden[0] = golden[1] = 0

    def noisy(seed):
        result = golden + 1e-6 * torch.randn(64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        result[0] = 0
        return result.float()

    def verdict(actual):
        held = References(
            golden=compare(actual, golden), cpu=compare(noisy(1), golden), forecast=compare(noisy(2), golden)
        )
        return judge(compare(actual, noisy(1)), FLOOR, references={"output": held})

    assert verdict(noisy(3)).passed
    wrong = noisy(3)
    wrong[9, 9] += 5e-4
    assert "outlier_ratio" in criteria(verdict(wrong))


def test_elements_that_one_last_place_swaps_are_no_flip():
    expected = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)).half()
    expected[0, 7], expected[0, 8] = 1000.5, 1000.0
    actual = expected.clone()
    actual[0, 7], actual[0, 8] = 1000.0, 1000.5
    assert judge(compare(actual, expected), Tolerance(preset="pair")).passed
    actual[0, 8] = 1010.0
    assert (
        "flip_margin" in criteria(judge(compare(actual, expected), Tolerance(preset="pair")))
        or not judge(compare(actual, expected), Tolerance(preset="pair")).passed
    )


def test_float64_sums_in_another_order_pass_the_floor():
    a, b = (torch.randn(64, 256, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
    cpu = a @ b.T
    actual = sum(a[:, i : i + 1] @ b[:, i : i + 1].T for i in range(256))
    held = References(golden=compare(actual, cpu), cpu=compare(cpu, cpu))
    assert judge(compare(actual, cpu), FLOOR, references={"output": held}).passed


def test_a_float64_result_that_is_not_finite_is_named_as_such():
    golden = torch.ones(4, 64, dtype=torch.float64)
    golden[0, 0] = math.nan
    cpu = torch.ones(4, 64)
    held = References(golden=compare(cpu, golden), cpu=compare(cpu, golden))
    assert "of the float64 result are not finite where the CPU's float32 is" in str(
        judge(compare(cpu, cpu), FLOOR, references={"output": held}).reasons[0]
    )


@pytest.mark.parametrize(
    ("times", "passes"), [(1.99, True), (0.51, True), (2.01, False), (0.49, False), (100.0, False)]
)
def test_a_factor_that_a_cosine_cannot_see_is_seen(times, passes):
    expected = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).double()
    verdict = judge(compare(times * expected, expected), Tolerance(cos_sim=0.999, token_cos_sim=0.99))
    assert verdict.passed is passes
    if not passes:
        assert [failure.criterion for failure in verdict.failures] == [
            "scale"
        ] and f"{times:.3g} times" in verdict.reasons[0].text
    assert judge(
        compare(times * expected, expected), Tolerance(cos_sim=0.999, gain=1000.0)
    ).passed  # a limit that sees it decides
