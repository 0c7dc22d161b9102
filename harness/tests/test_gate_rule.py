"""What the judge says and derives beside its limits: statuses, reasons, places, what stands for a row."""

import itertools
import math
from dataclasses import replace

import pytest

from harness.judging.checks import checks_of, judge
from harness.judging.presets import Check
from harness.judging.references import CONSTANT, ROUNDOFF, References, bits, is_floating
from harness.judging.status import CHANGES, Mark, Status, leads_to, status_of
from harness.judging.tolerance import Tolerance, without_forecast
from harness.judging.verdict import Decisions, Evidence, Reason, Verdict, error, skipped
from harness.measure import DYNAMO
from harness.measure.slices import Slice
from harness.tests.test_limits import FLOOR, RMS, healthy, numbers, references

LOOSE = Tolerance(max_diff=1e300)


def judged(result, tolerance=LOOSE, **more):
    return judge(result, tolerance, **more)


def reasons(verdict):
    return [(failure.criterion, failure.found, failure.allowed) for failure in verdict.failures]


# -------- statuses


def test_a_status_is_the_gravest_that_a_reason_leads_to():
    order = (Status.ERROR, Status.SKIPPED, Status.FAIL, Status.REGRESSED)
    for count in range(5):
        for kinds in itertools.combinations(order, count):
            for compared in (True, False):
                expected = kinds[0] if kinds else Status.PASS
                if not compared and expected in (Status.PASS, Status.REGRESSED):
                    expected = Status.ERROR
                assert status_of(kinds, compared=compared) is expected
    assert [leads_to(item) for item in ("run", "skip", "baseline", "max_diff", "x")] == [
        "ERROR",
        "SKIPPED",
        "REGRESSED",
        "FAIL",
        "FAIL",
    ]


def test_words_are_their_text_and_have_signs():
    assert [(str(item), item.is_fine, item.sign) for item in Status] == [
        ("PASS", True, "✅"),
        ("FAIL", False, "❌"),
        ("REGRESSED", False, "❌"),
        ("ERROR", False, "❌"),
        ("SKIPPED", True, "⏭"),
    ]
    assert (
        {item for item in Mark if item.is_change}
        == set(CHANGES)
        == {"IDENTICAL", "DRIFT", "REGRESSED", "IMPROVED", "NEW", "NOT COMPARABLE"}
    )


def test_a_verdict_orders_its_reasons_and_is_named_by_them():
    one, two, three, four = (Reason(criterion=item, text=item) for item in "abcd")
    result = Verdict(
        comparisons={"output": numbers()}, failures=(three,), regressions=(four,), errors=(one,), skips=(two,)
    )
    assert result.reasons == (one, two, three, four) and result.status is Status.ERROR and not result.passed
    assert (
        Verdict(comparisons={"output": numbers()}).passed and Verdict(comparisons={"output": numbers()}).reasons == ()
    )
    assert (
        [reason.criterion for reason in Verdict().reasons] == ["run"]
        and Verdict().output == ""
        and Verdict().comparison is None
    )
    assert (error("a").errors[0].criterion, skipped("b").skips[0].criterion, str(error("a").reasons[0])) == (
        "run",
        "skip",
        "a",
    )
    assert str(Reason(criterion="x", text="y", output="z")) == "z: y"


def test_the_output_that_failed_first_stands_for_a_row_else_the_one_furthest_off():
    near, far, unknown = numbers(rel_l2=1e-3), numbers(rel_l2=1e-2), numbers(rel_l2=math.nan)
    assert judged({"a": near, "b": far, "c": near}).output == "b" and judged({"a": far, "b": near}).output == "a"
    assert judged({"a": far, "b": unknown}).output == "b"
    assert judged({"a": far, "b": replace(near, expected_shape=(9,))}).output == "b"
    tolerance = Tolerance(max_diff=1.0)
    failing = judged({"a": far, "b": replace(near, max_diff=2.0), "c": replace(near, max_diff=3.0)}, tolerance)
    assert (
        failing.output == "b"
        and failing.comparison.max_diff == 2.0
        and [failure.output for failure in failing.failures] == ["b", "c"]
    )
    top1 = judged({"a": near, "b": far}, Tolerance(max_diff=1.0, top1=1.0), decisions=Decisions(count=2, agree=1))
    assert top1.output == "b" and [
        failure.output for failure in judged(replace(near, max_diff=9.0), tolerance).failures
    ] == [""]


# -------- what fails without a limit


def test_what_fails_whatever_the_limits_says_how_much():
    assert reasons(judged(numbers(expected_shape=(3,)))) == [("shape", None, None)]
    assert reasons(judged(numbers(dtype="float32", expected_dtype="float16"))) == [("dtype", None, None)]
    assert reasons(judged(numbers(nonfinite_differ=3, worst_index=(0,), worst_actual=1.0, worst_expected=2.0))) == [
        ("finite", 3, 0)
    ]
    assert reasons(judged(numbers(nan_expected=2))) == [("finite", None, None)]
    assert reasons(judged(numbers(nan_expected=2, nonfinite_differ=1))) == [("finite", 1, 0)]
    whole = numbers(dtype="int64", expected_dtype="int64", max_diff=1e9)
    assert reasons(judged(whole)) == [] and reasons(judged(replace(whole, unequal=4))) == [("equal", 4, 0)]
    assert reasons(judged(numbers(max_diff=2.0), Tolerance(max_diff=1.0))) == [("max_diff", 2.0, 1.0)]
    assert reasons(judged(numbers(), Tolerance(max_diff=1.0, top1=0.75), decisions=Decisions(count=4, agree=2))) == [
        ("top1", 0.5, 0.75)
    ]
    assert reasons(judged(numbers(), Tolerance(max_diff=1.0, top1=0.75))) == [("top1", None, None)]
    assert reasons(judged({"a": numbers(0), "b": numbers(0)})) == [("empty", None, None)]
    assert reasons(judged({"a": numbers(0), "b": numbers(1)})) == [] and reasons(judged({})) == []
    assert reasons(judged({"a": numbers(0), "b": numbers(0, expected_shape=(5,))})) == [("shape", None, None)]
    assert reasons(judged(numbers(tokens=False), Tolerance(token_rel_l2=1.0))) == [("limits", None, None)]
    assert reasons(judged(numbers(tokens=False), Tolerance(token_rel_l2=1.0, max_diff=1.0))) == []
    assert (
        reasons(judged(numbers(), Tolerance(preset="floor")))
        == reasons(judged(numbers(), Tolerance(forecast_ratio=2.0)))
        == [("golden", None, None)]
    )
    assert reasons(judged(numbers(), Tolerance(undecided=0.5, max_diff=1.0))) == [("golden", None, None)]


def test_a_cpu_whose_result_is_not_finite_fails_the_row_and_says_which_side_it_was():
    held = References(golden=numbers(), cpu=numbers(nonfinite_differ=5))
    cases = {
        "of the float64 result are not finite where the CPU's float32 is": [
            dict(nan_expected=1),
            dict(inf_expected=2, inf_actual=1),
            dict(nan_expected=1, inf_expected=1, nan_actual=1),
        ],
        "of the CPU's own result are not finite where float64 is": [
            dict(nan_actual=1),
            dict(inf_actual=1),
            dict(inf_actual=1, nan_expected=1),
            dict(nan_actual=1, inf_actual=2, inf_expected=2),
        ],
    }
    for words, counts in cases.items():
        for count in counts:
            verdict = judged(numbers(), references={"output": replace(held, cpu=replace(held.cpu, **count))})
            assert reasons(verdict) == [("finite", 5, 0)] and f"5 elements {words}" in verdict.failures[0].text
    assert reasons(judged(numbers(nonfinite_differ=1), references={"output": held})) == [("finite", 1, 0)]
    assert reasons(judged(numbers(), references={"output": replace(held, cpu=numbers())})) == []


def test_marks_of_a_verdict_are_those_of_its_failures():
    wide = references(cpu=healthy(rel_l2=0.3), forecast=healthy(rel_l2=0.3))
    assert judged(numbers(), Tolerance(preset="floor"), references={"output": wide}).marks == (Mark.UNDECIDABLE,)
    assert judged(numbers(), Tolerance(preset="floor"), references={"output": references()}).marks == ()


# -------- what is in force


def test_checks_of_a_verdict_are_all_that_judged_it():
    both = {"a": numbers(max_diff=1.0), "b": numbers(max_diff=2.0)}
    result = checks_of(
        judged(
            both
            | {"c": numbers(dtype="int64", expected_dtype="int64"), "d": numbers(0), "e": numbers(expected_shape=(2,))}
        )
    )
    assert [(item.name, item.found, item.limit) for item in result] == [
        ("max_diff", 1.0, 1e300),
        ("max_diff", 2.0, 1e300),
    ]
    assert checks_of(Verdict()) == [] and checks_of(judged(numbers(), Tolerance(preset="floor"))) == []
    made = checks_of(judged(numbers(), Tolerance(top1=0.5), decisions=Decisions(count=4, agree=3)))
    assert [(item.name, item.found, item.limit) for item in made] == [("top1", 0.75, 0.5)]
    assert checks_of(judged(numbers(), Tolerance(top1=0.5))) == []


def test_a_limit_of_ones_own_stands_in_place_of_the_presets():
    tolerance = Tolerance(preset="card", max_diff=7.0, rel_l2=3.0, reason="a test")
    result = checks_of(judged(numbers(), tolerance))
    assert [(item.name, item.limit) for item in result] == [("cos_sim", 0.99), ("max_diff", 7.0), ("rel_l2", 3.0)]
    floor = Tolerance(preset="floor", undecided=0.25, reason="a test")
    limits = [
        (item.name, item.limit) for item in checks_of(judged(numbers(), floor, references={"output": references()}))
    ]
    assert limits.count(("undecided", 0.25)) == 1 and [name for name, _ in limits].count("undecided") == 1
    own = Tolerance(forecast_ratio=9.0)
    assert [
        (item.name, item.limit) for item in checks_of(judged(numbers(), own, references={"output": references()}))
    ] == [("undecided", 0.5), ("forecast_ratio", 9.0)]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "would pass anything"),
        ({"undecided": 0.5}, "would pass anything"),
        ({"max_diff": math.inf}, "would pass anything"),
        ({"cos_sim": 0}, "would pass anything"),
        ({"cos_sim": 0, "max_diff": math.inf, "undecided": 0.1}, "would pass anything"),
        ({"preset": "flor"}, "no preset is called"),
        ({"preset": "floor", "rel_l2": 1.0}, "needs a reason"),
        ({"cos_sim": 1 + 1e-9}, "between 0 and 1"),
        ({"top1": -0.1}, "between 0 and 1"),
        ({"matched": 2}, "between 0 and 1"),
        ({"token_cos_sim": 1.5}, "between 0 and 1"),
        ({"max_diff": -1e-9}, "zero or more"),
        ({"undecided": math.nan, "rel_l2": 1}, "zero or more"),
    ],
)
def test_tolerances_that_judge_nothing_or_cannot_be_are_refused(limits, words):
    with pytest.raises(ValueError, match=words):
        Tolerance(**limits)


def test_tolerances_at_their_bounds_are_taken():
    for limits in (
        {"max_diff": 0},
        {"cos_sim": 1},
        {"cos_sim": 0.5},
        {"max_diff": 0.5, "cos_sim": 0},
        {"gain": 2.0},
        {"preset": "card"},
        {"forecast_ratio": 1.5},
    ):
        assert Tolerance(**limits).limits() == {name: limit for name, limit in limits.items() if name != "preset"}
    assert Tolerance(preset="card", max_diff=0, reason="exact").limits() == {"max_diff": 0}


def test_without_a_forecast_what_needs_one_goes_and_the_rest_stays():
    def without(dtype="float16", **tolerance):
        return without_forecast(Tolerance(**tolerance), "why", dtype)

    for kept in (dict(preset="card"), dict(rel_l2=1.0), dict(preset="pair", rel_l2=0.1, reason="r")):
        assert without(**kept) == Tolerance(**kept)
    for preset in ("floor", "sharp"):
        assert without(preset=preset) == Tolerance(preset="pair", reason="why; judged by preset pair")
    assert without(forecast_ratio=2.0) == Tolerance(preset="pair", reason="why; judged by preset pair")
    assert without(forecast_ratio=2.0, max_diff=1.0) == Tolerance(
        max_diff=1.0, reason="why; judged by the limits that need none"
    )
    assert without(preset="card", undecided=0.1, reason="r") == Tolerance(
        preset="card", reason="r; why; judged by preset card"
    )
    assert without(preset="floor", max_diff=1.0, token_ratio=9.0, reason="r") == Tolerance(
        preset="pair", max_diff=1.0, reason="r; why; judged by preset pair"
    )
    wide = without("float32", preset="floor", rel_l2=0.5, reason="r")
    assert wide.limits() == {"rel_l2": 0.5, "token_rel_l2": 2**-9, "max_scaled": 2**-7, "gain": 2**-13, "shift": 2**-13}
    assert wide.reason == "r; why; judged by preset pair with the budget of HF32, which may be on"
    assert without("float32", preset="card", undecided=0.1, reason="r").limits() == {}


# -------- decisions and evidence


def test_shares_of_decisions():
    made = Decisions(count=8, agree=6, correct_actual=4, correct_expected=2)
    assert (made.top1, made.accuracy, made.expected_accuracy) == (0.75, 0.5, 0.25)
    blank = Decisions(count=0, agree=0)
    assert math.isnan(blank.top1) and blank.accuracy is blank.expected_accuracy is None
    verdict = judged(numbers(), Tolerance(top1=1.0), decisions=replace(made, first=(3, 1, 2)))
    assert (
        verdict.failures[0].text == "top-1 decisions agree on 6 of 8 inputs (at least 100.0% required); "
        "the first that differs is input 3: 1 where 2 was expected"
    )


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (3000.0, 1000.0, True),
        (2999.0, 1000.0, False),
        (1500.0, 500.0, True),
        (1499.0, 499.0, True),
        (1499.0, 500.0, False),
        (1499.5, 499.8, False),
        (None, 1.0, False),
        (1200.0, 200.0, True),
        (1199.0, 200.0, False),
        (9000.0, 4000.0, False),
    ],
)
def test_a_first_run_that_compiles_takes_three_times_and_a_second_more(first, second, says):
    evidence = Evidence(
        weights="",
        reference="",
        inputs_sha256="",
        expected_sha256="",
        actual_sha256="",
        expected_ms=1.0,
        actual_ms=second,
        first_run_ms=first,
    )
    assert (evidence.slow_start != "") is says
    assert not says or evidence.slow_start.startswith(
        f"the first run took {first / 1000:.1f} s, the second {second / 1000:.3g} s; the first is not timed"
    )


# -------- the words


def check(result, limit=1.0, name="max_diff", where=""):
    return Check(name=name, found=result, limit=limit, where=where)


@pytest.mark.parametrize(
    ("result", "enough"),
    [
        (2.0, "; a limit of 2.00e+00 would pass"),
        (1.2345, "; a limit of 1.24e+00 would pass"),
        (9.999, "; a limit of 1.00e+01 would pass"),
        (1.2345e-7, "; a limit of 1.24e-07 would pass"),
        (math.nan, "; no limit would pass"),
        (math.inf, "; no limit would pass"),
        (1e-300, "; a limit of 1.00e-300 would pass"),
        (0.0, ""),
        (9e-301, ""),
    ],
)
def test_the_smallest_limit_that_would_pass_is_said(result, enough):
    assert check(result, 1e-9).text == f"max_diff {result:.2e} (up to 1.00e-09 allowed){enough}"


@pytest.mark.parametrize(
    ("result", "enough"),
    [
        (0.98765432199, "; a limit of 0.987654321 would pass"),
        (0.0, "; a limit of 0.000000000 would pass"),
        (-0.25, "; no limit would pass"),
        (math.nan, "; no limit would pass"),
    ],
)
def test_the_largest_limit_that_would_pass_is_said(result, enough):
    assert (
        check(result, 0.99, "cos_sim", "at token (3,)").text
        == f"cos_sim {result:.9f} at token (3,) (at least 0.99 required){enough}"
    )


def test_an_undecidable_row_names_what_would_decide_it():
    text = check(0.6123, 0.5, "undecided").text
    assert "an error of 0.612 times the output would pass (up to 0.5 allowed)" in text and "undecided=0.62," in text
    assert (
        "undecided=inf," in check(math.inf, 0.5, "undecided").text
        and "undecided=inf," in check(math.nan, 0.5, "undecided").text
    )


def test_checks_hold_at_their_limit_and_nan_never():
    assert check(1.0).holds and not check(1.1).holds and not check(math.nan).holds and check(0.9).holds
    assert (
        check(1.0, name="cos_sim").holds
        and not check(0.9, name="cos_sim").holds
        and not check(math.nan, name="matched").holds
    )


PLACES = {
    "max_diff": "at (0, 7)",
    "max_diff_rms": "at (0, 7)",
    "token_cos_sim": "at token (1,)",
    "token_rel_l2": "at token (2,)",
    "flip_margin": "at row (3,)",
    "rel_l2": "",
    "gain": "",
    "cos_sim": "",
}


def test_each_check_says_where():
    result = numbers(worst_index=(0, 7), worst_token=(1,), worst_token_diff=(2,), first_flip=(3,))
    verdict = judged(result, Tolerance(**dict.fromkeys(PLACES, 0.5)))
    assert {item.name: item.where for item in checks_of(verdict)} == PLACES
    part = Slice(where="row 5", count=1000, error=0.125, healthy=FLOOR)
    held = replace(references(slices=(part,)), golden=replace(result, rel_l2=2.0**-9))
    where = {
        item.name: item.where
        for item in checks_of(judged(numbers(), Tolerance(preset="sharp"), references={"output": held}))
    }
    assert (
        where["outlier_ratio"] == "at (0, 7)"
        and where["token_ratio"] == "at token (2,)"
        and where["flip_margin"] == "at row (3,)"
    )
    assert (
        where["forecast_ratio"] == "with 9.0 effective bits where a healthy device keeps 7.0"
        and where["slice_ratio"] == "at row 5, off by 0.12 of its own norm"
    )
    assert where["gain_ratio"] == where["shift_ratio"] == where["undecided"] == where["unexplained_ratio"] == ""


@pytest.mark.parametrize(
    ("device", "floor", "words"),
    [
        (0.0, FLOOR, "with all effective bits where a healthy device keeps 7.0"),
        (FLOOR, 0.0, "with 7.0 effective bits where a healthy device keeps all"),
        (math.nan, FLOOR, ""),
        (FLOOR, math.nan, ""),
        (math.inf, FLOOR, ""),
        (math.nan, math.nan, ""),
    ],
)
def test_effective_bits_are_said_where_both_errors_are_numbers(device, floor, words):
    held = References(golden=numbers(rel_l2=device), cpu=healthy(rel_l2=floor))
    result = checks_of(judged(numbers(), Tolerance(preset="floor"), references={"output": held}))
    assert result[0].where == words


def test_bits_are_the_logarithm_of_an_error():
    assert (
        (bits(0), bits(0.25), bits(2.0)) == (math.inf, 2.0, -1.0)
        and math.isnan(bits(math.nan))
        and math.isnan(bits(-1.0))
    )
    assert [item for item in ("float32", "bfloat16", "complex64", "int8", "bool", "uint8") if is_floating(item)] == [
        "float32",
        "bfloat16",
        "complex64",
    ]


# -------- references


def test_the_floor_of_each_dtype():
    assert ROUNDOFF == dict(
        float32=2**-24, float16=2**-11, bfloat16=2**-8, float64=2**-46, complex64=2**-24, complex128=2**-46
    )
    assert DYNAMO == dict(float32=1e-3, float64=1e-3, float16=1e-2, bfloat16=1e-2)
    rare = numbers(dtype="complex64", expected_dtype="complex64", dynamo_atol=1e-3)
    assert checks_of(judged(rare, Tolerance(preset="dynamo"), references={"output": references()})) == []
    assert (
        len(
            checks_of(
                judged(
                    replace(rare, dynamo_atol=1.1e-3), Tolerance(preset="dynamo"), references={"output": references()}
                )
            )
        )
        == 1
    )
    assert [item.limit for item in checks_of(judged(rare, Tolerance(preset="close")))] == [1e-5]
    other = numbers(dtype="float8_e4m3fn", expected_dtype="float8_e4m3fn")
    assert [item.limit for item in checks_of(judged(other, Tolerance(preset="close")))] == [0.0]
    assert checks_of(judged(other, Tolerance(preset="cann")))[0].limit == math.nextafter(2**-13, 0)
    assert checks_of(judged(other, Tolerance(preset="pair")))[0].limit == 2**-13


@pytest.mark.parametrize("sign", [1, -1])
def test_the_floor_is_of_sizes_and_signs_do_not_cancel(sign):
    held = References(
        golden=numbers(gain=FLOOR), cpu=healthy(gain=sign * FLOOR), forecast=healthy(gain=-sign * FLOOR / 2)
    )
    assert (
        held.floor("gain") == FLOOR and References(golden=numbers(), cpu=healthy(gain=sign * 0.5)).floor("gain") == 0.5
    )
    assert held.ratios()["gain_ratio"] == FLOOR / (FLOOR + FLOOR / 16 + 2**-24)
    assert replace(held, golden=numbers(gain=-FLOOR)).ratios()["gain_ratio"] == held.ratios()["gain_ratio"]


def test_ratios_over_nothing():
    exact = numbers(dtype="float8_e4m3fn", expected_dtype="float8_e4m3fn")  # of whose last place nobody speaks
    held = References(golden=replace(exact, rel_l2=1.0, gain=0.0), cpu=exact, unexplained=0.0)
    ratios = held.ratios()
    assert (
        ratios["forecast_ratio"] == math.inf
        and ratios["token_ratio"] == ratios["gain_ratio"] == ratios["unexplained_ratio"] == ratios["slice_ratio"] == 0.0
    )
    assert math.isnan(replace(held, unexplained=None).ratios()["unexplained_ratio"])
    nothing = References(
        golden=numbers(rms=0.0, rmse=1.0, max_diff=3.0),
        cpu=numbers(rmse=0.5, max_diff=0.5),
        forecast=numbers(rmse=0.25, max_diff=1.0),
    )
    assert nothing.ratios() == dict(
        forecast_ratio=2.0,
        token_ratio=3.0,
        outlier_ratio=3.0,
        gain_ratio=0.0,
        shift_ratio=0.0,
        slice_ratio=0.0,
        unexplained_ratio=0.0,
    )
    assert "undecided" not in [
        item.name
        for item in checks_of(judged(numbers(rms=0.0), Tolerance(preset="floor"), references={"output": nothing}))
    ]


def part(error, healthy=FLOOR, count=1000, magnitude=False, where=""):
    return Slice(
        where=where or f"{error} of {count}", count=count, error=error * FLOOR, healthy=healthy, magnitude=magnitude
    )


def worst(*parts):
    return references(slices=parts).worst_slice


def test_the_worst_part_is_the_one_that_is_furthest_beyond_what_its_elements_allow():
    few, many = part(9.0, count=8), part(3.5)  # allowed 15 and 3
    assert worst(few, many) == worst(many, few) == many and worst() is None
    assert worst(part(2.0), part(1.0)) == part(2.0)
    wide = part(100.0, magnitude=True)
    assert worst(wide, many) == many, "one with a place where one is beyond"
    assert worst(wide, part(3.0)) == wide, "and at its limit it is not beyond"
    assert worst(wide, part(200.0, magnitude=True)) == part(200.0, magnitude=True)
    checks = {
        item.name: item
        for item in checks_of(
            judged(numbers(), Tolerance(preset="floor"), references={"output": references(slices=(few, many))})
        )
    }
    assert (checks["slice_ratio"].found, checks["slice_ratio"].limit) == (3.5, 3.0)
    checks = {
        item.name: item
        for item in checks_of(
            judged(numbers(), Tolerance(preset="floor"), references={"output": references(slices=(few,))})
        )
    }
    assert (checks["slice_ratio"].found, checks["slice_ratio"].limit) == (9.0, 15.0)


def test_a_part_is_held_against_at_least_a_quarter_of_a_last_place():
    held = references()
    for healthy_error, expected in ((0.0, 2.0), (2.0**-26, 2.0), (2.0**-25, 2.0), (2.0**-24, 1.0)):
        assert held.slice_ratio(Slice(where="", count=9, error=2.0**-24, healthy=healthy_error)) == expected


def test_what_the_forecast_leaves_unexplained_is_held_against_the_cpu_and_the_ties():
    for ties, known in ((None, math.sqrt(2) * FLOOR), (0.0, math.sqrt(2) * FLOOR), (FLOOR, (math.sqrt(2) + 1) * FLOOR)):
        assert references(unexplained=1.0, ties=ties).ratios()["unexplained_ratio"] == pytest.approx(
            1 / known, rel=1e-15
        )
    tiny = references(unexplained=2.0**-25, cpu=numbers())
    assert tiny.ratios()["unexplained_ratio"] == 1.0
    blank = references(unexplained=None, forecast=None)
    assert "unexplained_ratio" not in [
        item.name for item in checks_of(judged(numbers(), Tolerance(preset="sharp"), references={"output": blank}))
    ]


@pytest.mark.parametrize(("name", "share"), [("gain", 1.0), ("shift", 2.0)])
def test_a_shared_factor_and_shift_have_a_sixteenth_of_the_floor_of_many_elements(name, share):
    for count, part_of in ((1000, 1 / 16), (999, 1.0)):
        held = references(count, device={name: FLOOR * share})
        allowed = part_of * FLOOR + CONSTANT
        assert held.ratios()[f"{name}_ratio"] == FLOOR / allowed
        beside = references(count, device={name: FLOOR * share}, cpu=healthy(count, **{name: FLOOR * share}))
        near = FLOOR * share / (FLOOR * share + share * allowed)
        assert beside.ratios()[f"{name}_ratio"] == pytest.approx(near, rel=1e-15)


@pytest.mark.parametrize("name", ["gain", "shift"])
@pytest.mark.parametrize(
    ("dtype", "constant"),
    [("float32", 2**-24), ("float16", 2**-24), ("bfloat16", 2**-24), ("complex64", 2**-24), ("float64", 2**-46)],
)
def test_a_rounded_constant_may_be_shared_by_all_elements(name, dtype, constant):
    """Beside a healthy run that is exact, where the floor is a quarter of a last place."""
    allowed = constant + ROUNDOFF[dtype] / 2 / 16
    size = RMS if name == "shift" else 1.0
    for ratio in (2.0, 2.0 + 1e-9):
        device = numbers(1000, dtype, **{name: -ratio * allowed * size})
        held = References(golden=device, cpu=numbers(1000, dtype))
        verdict = judge(numbers(1000, dtype), Tolerance(preset="floor"), references={"output": held})
        assert [failure.criterion for failure in verdict.failures] == ([] if ratio == 2.0 else [f"{name}_ratio"])


def test_a_flip_is_held_against_the_largest_error_or_a_last_place():
    def limit(**more):
        held = references(**more)
        return {
            item.name: item.limit
            for item in checks_of(judged(numbers(), Tolerance(preset="floor"), references={"output": held}))
        }["flip_margin"]

    assert limit() == 4 * FLOOR and limit(cpu=healthy(max_diff=0.5)) == 2.0 == limit(forecast=healthy(max_diff=0.5))
    exact = dict(cpu=healthy(max_diff=0.0), forecast=healthy(max_diff=0.0))
    assert limit(**exact) == 4 * 2**-24 * 2 and limit(device=dict(flip_value=-8.0), **exact) == 4 * 2**-24 * 8 == limit(
        device=dict(flip_value=8.0), **exact
    )
    assert limit(device=dict(flip_value=1.0), **exact) == 4 * 2**-24 * 2
