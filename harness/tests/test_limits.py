"""Every limit of the judge: its value, and that what is at it passes, what is beyond it fails, and NaN fails.

The tests are made from where the limits are declared (`PRESETS`, `Tolerance`), and their values are restated here, so
that neither a limit nor the comparison with it can change unseen.
"""

import math
from dataclasses import fields, replace

import pytest

from harness.judging.checks import checks_of, hangs_on_slack, judge
from harness.judging.criteria import AT_LEAST, FLOORED
from harness.judging.preset_names import NEED_FORECAST, NEED_OTHER_TIES, NEED_REFERENCES, PRESET_NAMES
from harness.judging.presets import PRESETS, check_of
from harness.judging.references import CONSTANT, References, slack
from harness.judging.tolerance import LIMITS, Tolerance, without_forecast
from harness.judging.verdict import Decisions
from harness.measure import WORST, Comparison
from harness.measure.slices import Slice

DTYPES = ("float32", "float16", "bfloat16", "float64")
COUNTS = (1, 10, 11, 500, 501, 999, 1000)
SLACK = {1: 10.0, 10: 10.0, 11: 5.0, 500: 5.0, 501: 3.0, 999: 3.0, 1000: 2.0, 10**9: 2.0}
HALF = {"float32": 2**-24, "float16": 2**-11, "bfloat16": 2**-8, "float64": 2**-46}  # half a last place, relative
FLOOR = 2**-7  # the error of the healthy run
SCATTER = math.sqrt(2) * FLOOR  # of two orders of sums
RMS = 2.0
below = math.nextafter

# -------- the numbers


def numbers(count=1000, dtype="float32", tokens=True, **more):
    """The numbers of an output without any error; a power of two wherever something is divided by it."""
    shape = (1, count) if tokens else (count,)
    nothing = {field.name: 0.0 for field in fields(Comparison)}
    places = {
        "worst_index": None,
        "worst_token": (0,) if tokens else None,
        "worst_token_diff": (0,) if tokens else None,
    }
    nothing |= {"histogram": (), "first_flip": None, **places}
    nothing |= {"cos_sim": 1.0, "token_cos_sim": 1.0, "matched": 1.0, "rms": RMS}
    counts = {
        "nan_actual": 0,
        "nan_expected": 0,
        "inf_actual": 0,
        "inf_expected": 0,
        "nonfinite_differ": 0,
        "unequal": 0,
    }
    sides = dict(shape=shape, expected_shape=shape, dtype=dtype, expected_dtype=dtype)
    return Comparison(**(nothing | counts | sides | {"flips": 0} | more))


def healthy(count=1000, dtype="float32", tokens=True, **more):
    """What a healthy run loses: `FLOOR` by every measure, and no factor and no shift that all elements share."""
    errors = dict(rel_l2=FLOOR, token_rel_l2=FLOOR, max_scaled=FLOOR, max_diff=FLOOR, rmse=FLOOR)
    return numbers(count, dtype, tokens, **(errors | more))


def references(count=1000, dtype="float32", tokens=True, device=None, **more):
    own = numbers(count, dtype, tokens, **(device or {}))
    return References(
        **(dict(golden=own, cpu=healthy(count, dtype, tokens), forecast=healthy(count, dtype, tokens)) | more)
    )


def limits_of(preset, dtype="float32", count=1000, tokens=True, found=None, held=None):
    """The limits that a preset sets: name and limit."""
    found = numbers(count, dtype, tokens, **(found or {}))
    verdict = judge(found, Tolerance(preset=preset), references={"output": held or references(count, dtype, tokens)})
    return {check.name: check.limit for check in checks_of(verdict)}


# -------- what the limits are


@pytest.mark.parametrize("count", SLACK)
def test_the_slack_of_each_number_of_elements(count):
    assert slack(count) == SLACK[count]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("preset", ["floor", "sharp"])
def test_the_limits_in_floors(preset, count, dtype):
    times = SLACK[count]
    part = Slice(where="row 0", count=count, error=FLOOR, healthy=FLOOR)
    held = references(count, dtype, unexplained=FLOOR, slices=(part,))
    expected = {"forecast_ratio": times, "token_ratio": 1.5 * times, "outlier_ratio": 2 * times, "gain_ratio": times}
    expected |= {"shift_ratio": times, "slice_ratio": 1.5 * times, "undecided": 0.5}
    expected |= {"flip_margin": 2 * times * max(FLOOR, HALF[dtype] * RMS)}
    expected |= {"unexplained_ratio": times} if preset == "sharp" else {}
    assert limits_of(preset, dtype, count, held=held) == expected


def test_the_limits_of_a_dtype_that_no_table_names():
    other = "float8_e4m3fn"  # nothing is known of its last place
    flipped = references(1000, other, device={"flip_value": 1e6})
    assert limits_of("floor", other, held=flipped)["flip_margin"] == 2 * 2 * FLOOR
    assert limits_of("dynamo", other, found={"dynamo_atol": 1e-3}) == {}
    beyond = limits_of("dynamo", other, found={"dynamo_atol": below(1e-3, 1)})
    assert beyond == {"rmse": pytest.approx(2 * FLOOR + 1e-4, rel=1e-12)}
    assert limits_of("close", other) == {"close_atol": 0.0}
    assert limits_of("pair", other) == limits_of("pair", "float32")
    assert limits_of("pair", other, found={"flip_value": 1e6})["flip_margin"] == 0.0
    error = {"gain": FLOOR / 16 + CONSTANT, "rel_l2": FLOOR}
    assert references(1000, other, device=error).ratios()["gain_ratio"] == 1.0
    nothing = numbers(1000, other)
    assert references(1000, other, device={"rel_l2": 1e-9}, cpu=nothing, forecast=None).ratios()["forecast_ratio"] == (
        math.inf
    )


FEW = 10  # elements: the slack is 10, and of many elements it is 2
ON_SLACK = {  # by what the device errs, the most that the slack of many elements lets pass
    "rel_l2": 2 * FLOOR,
    "token_rel_l2": 1.5 * 2 * FLOOR,
    "max_scaled": 2 * 2 * FLOOR,
    "gain": 2 * (FLOOR + CONSTANT),
    "shift": 2 * (FLOOR + CONSTANT) * RMS,
    "flip_margin": 2 * 2 * FLOOR,
}
ON_SLACK_OF_NOTHING = {"rmse": 2 * FLOOR, "max_diff": 1.5 * 2 * FLOOR}  # where nothing but zeros was expected


@pytest.mark.parametrize("name", [*ON_SLACK, *ON_SLACK_OF_NOTHING])
def test_a_verdict_on_few_elements_hangs_on_their_slack_by_each_measure(name):
    """From the limit for many elements on, and up to five times that, the limit for few."""
    limit = (ON_SLACK | ON_SLACK_OF_NOTHING)[name]
    nothing = {"rms": 0.0} if name in ON_SLACK_OF_NOTHING else {}
    for times, passes, hangs in ((1 - 1e-9, True, False), (1 + 1e-9, True, True), (5 - 1e-9, True, True)):
        held = references(FEW, device={name: times * limit} | nothing)
        verdict = judge(numbers(FEW), Tolerance(preset="floor"), references={"output": held})
        assert (verdict.passed, hangs_on_slack(verdict)) == (passes, hangs), times
    held = references(FEW, device={name: 5 * limit * (1 + 1e-9)} | nothing)
    verdict = judge(numbers(FEW), Tolerance(preset="floor"), references={"output": held})
    assert not verdict.passed and not hangs_on_slack(verdict)


def test_of_several_outputs_one_with_few_elements_is_enough_to_hang_on():
    error = {"rel_l2": 3 * FLOOR}
    few, many = references(FEW, device=error), references(1000)
    verdict = judge({"a": numbers(FEW), "b": numbers()}, Tolerance(preset="floor"), references={"a": few, "b": many})
    assert verdict.passed and hangs_on_slack(verdict)
    assert not hangs_on_slack(replace(verdict, tolerance=None))


@pytest.mark.parametrize(("gain", "fails"), [(1.0, False), (-0.5, False), (1 + 1e-9, True), (-0.5 - 1e-9, True)])
def test_a_factor_of_two_either_way_is_the_most_that_a_cosine_alone_lets_pass(gain, fails):
    verdict = judge(numbers(gain=gain), Tolerance(cos_sim=0.999))
    assert [failure.criterion for failure in verdict.failures] == (["scale"] if fails else [])


def test_a_flat_output_has_no_tokens():
    assert "token_ratio" not in limits_of("floor", tokens=False) and "token_rel_l2" not in limits_of(
        "pair", tokens=False
    )


def test_the_model_cards_limits():
    for dtype in DTYPES:
        assert limits_of("card", dtype) == {"max_diff": 1e-2, "cos_sim": 0.99}


@pytest.mark.parametrize(("dtype", "modes", "budget"), [
    ("float32", (), 2**-13), ("float32", ("HF32",), 2**-11), ("float16", (), 2**-10), ("bfloat16", (), 2**-7),
    ("float16", ("HF32",), 2**-10), ("float64", (), 2**-13),
])  # fmt: skip
def test_canns_limits_are_below_its_budget(dtype, modes, budget):
    result = limits_of("cann", dtype, held=references(dtype=dtype, modes=modes))
    assert result == {"mean_rel": below(budget, 0), "max_rel": below(10 * budget, 0)}


@pytest.mark.parametrize(
    ("dtype", "atol"), [("float32", 1e-5), ("float16", 1e-5), ("bfloat16", 1e-5), ("float64", 1e-7)]
)
def test_torch_testings_limits(dtype, atol):
    import torch

    assert limits_of("close", dtype) == {"close_atol": atol}
    with pytest.raises(AssertionError) as refused:  # torch's own words name its absolute tolerance
        torch.testing.assert_close(
            torch.ones(1, dtype=getattr(torch, dtype)), torch.zeros(1, dtype=getattr(torch, dtype))
        )
    assert f"up to {atol:g} allowed" in str(refused.value).replace("1e-05", f"{1e-5:g}").replace("1e-07", f"{1e-7:g}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "times"), [(1, 10), (10, 10), (11, 8), (500, 8), (501, 3), (999, 3), (1000, 2)])
def test_the_compilers_limits(dtype, count, times):
    own = 1e-2 if dtype in ("float16", "bfloat16") else 1e-3
    times = 3 if times == 2 and own == 1e-2 else times
    assert limits_of("dynamo", dtype, count, found={"dynamo_atol": own}) == {}
    result = limits_of("dynamo", dtype, count, found={"dynamo_atol": below(own, 1)})
    assert result == {"rmse": pytest.approx(times * FLOOR + own / 10, rel=1e-12)}


@pytest.mark.parametrize(("dtype", "budget"), [
    ("float32", 2**-13), ("float16", 2**-10), ("bfloat16", 2**-7), ("float64", 2**-32),
])  # fmt: skip
def test_the_limits_of_two_tensors_alone(dtype, budget):
    expected = {"rel_l2": budget, "token_rel_l2": 4 * budget, "max_scaled": 16 * budget}
    expected |= {"gain": budget / 4, "shift": budget / 4, "flip_margin": 0.0}
    assert limits_of("pair", dtype) == expected
    assert limits_of("pair", dtype, found={"rmse": 2**-9})["flip_margin"] == 2**-5
    assert limits_of("pair", dtype, found={"flip_value": -4.0})["flip_margin"] == 32 * HALF[dtype]


def test_without_a_forecast_float32_has_the_budget_of_hf32():
    for dtype, budget in (("float32", 2**-11), ("float16", 2**-10), ("bfloat16", 2**-7)):
        verdict = judge(numbers(dtype=dtype), without_forecast(Tolerance(preset="floor"), "no rules", dtype))
        limits = {check.name: check.limit for check in checks_of(verdict)}
        assert [limits[name] / budget for name in ("rel_l2", "token_rel_l2", "max_scaled", "gain", "shift")] == [
            1,
            4,
            16,
            0.25,
            0.25,
        ]


# -------- at a limit, beyond it, and NaN

GOLDEN = {  # a limit in floors: the number of the device's error, and the floor that it is held against
    "forecast_ratio": ("rel_l2", FLOOR),
    "token_ratio": ("token_rel_l2", FLOOR),
    "outlier_ratio": ("max_scaled", FLOOR),
    "gain_ratio": ("gain", FLOOR / 16 + CONSTANT),
    "shift_ratio": ("shift", (FLOOR / 16 + CONSTANT) * RMS),
    "flip_margin": ("flip_margin", 1.0),
}
SIGNED = ("gain", "shift", "gain_ratio", "shift_ratio")


def judged(name, measured, tolerance, count=1000):
    """The verdict where the number behind the limit `name` is `measured`, in its unit, and all else is without
    error.
    """
    result, device, more = numbers(count), {}, {"unexplained": 0.0}
    floored = name in FLOORED or tolerance.preset in ("floor", "sharp")
    if name == "slice_ratio":
        more["slices"] = (Slice(where="row 0", count=count, error=measured * FLOOR, healthy=FLOOR),)
    elif name == "unexplained_ratio":
        more |= dict(unexplained=measured * SCATTER)
    elif name == "undecided":
        error = measured / SLACK[count]
        more |= dict(cpu=healthy(count, rel_l2=error), forecast=healthy(count, rel_l2=error))
    elif floored:
        field, floor = GOLDEN[name]
        device[field] = measured * floor
    elif name == "shift":
        result = replace(result, shift=measured * RMS)
    elif name == "max_diff_rms":
        result = replace(result, max_diff=measured * RMS)
    else:
        result = replace(result, **{name: measured})
    return judge(result, tolerance, references={"output": references(count, device=device, **more)})


def criteria(verdict):
    return [failure.criterion for failure in verdict.failures]


def beyond(name, limit):
    if name == "unexplained_ratio":  # its scatter is no power of two
        return limit * (1 + 1e-9)
    return math.nextafter(limit, -math.inf if name in AT_LEAST else math.inf)


PRESET_LIMITS = [
    (preset, name)
    for preset in PRESETS
    for name in limits_of(
        preset, held=references(unexplained=0.0, slices=(Slice(where="", count=1000, error=0.0, healthy=FLOOR),))
    )
]


@pytest.mark.parametrize(("preset", "name"), PRESET_LIMITS)
def test_what_a_preset_allows_has_two_sides(preset, name):
    tolerance, count = Tolerance(preset=preset), 1000
    part = Slice(where="", count=count, error=0.0, healthy=FLOOR)
    limit = limits_of(preset, count=count, held=references(count, unexplained=0.0, slices=(part,)))[name]
    sides = (1.0, -1.0) if name in SIGNED else (1.0,)
    for sign in sides:
        assert criteria(judged(name, sign * limit, tolerance)) == []
        assert criteria(judged(name, sign * beyond(name, limit), tolerance)) == [name]
    if name != "undecided":  # a floor that is NaN makes the ratios NaN, which fail by their own names
        assert name in criteria(judged(name, math.nan, tolerance))


OWN = [name for name in LIMITS if name not in ("top1",)]


@pytest.mark.parametrize("name", OWN)
def test_a_limit_of_ones_own_has_two_sides(name):
    limit = 0.75 if name in AT_LEAST else 0.375
    more = {"rel_l2": 1.0, "undecided": limit} if name == "undecided" else {name: limit}
    if name in FLOORED:
        more["undecided"] = math.inf
    tolerance = Tolerance(**more, **({"forecast_ratio": math.inf} if name == "undecided" else {}), reason="a test")
    for sign in (1.0, -1.0) if name in SIGNED else (1.0,):
        assert criteria(judged(name, sign * limit, tolerance)) == []
        assert criteria(judged(name, sign * beyond(name, limit), tolerance)) == [name]
    if name != "undecided":
        assert name in criteria(judged(name, math.nan, tolerance))


def test_top1_has_two_sides():
    tolerance = Tolerance(top1=0.75, reason="a test")
    for agree, expected in ((3, []), (2, ["top1"]), (4, [])):
        verdict = judge(numbers(), tolerance, decisions=Decisions(count=4, agree=agree))
        assert criteria(verdict) == expected
    assert criteria(judge(numbers(), tolerance, decisions=Decisions(count=0, agree=0))) == ["top1"]


def test_every_preset_that_has_a_name_has_checks():
    assert tuple(PRESETS) == PRESET_NAMES
    assert set(NEED_OTHER_TIES) < set(NEED_FORECAST) < set(NEED_REFERENCES) < set(PRESET_NAMES)


def test_every_limit_is_tried():
    assert {name for _, name in PRESET_LIMITS} | set(OWN) | {"top1"} >= set(LIMITS)
    assert {preset for preset, _ in PRESET_LIMITS} == set(PRESETS) - {"dynamo"}  # it has none without an error


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_compilers_limit_allows_has_two_sides(dtype):
    own = 1e-2 if dtype in ("float16", "bfloat16") else 1e-3
    limit = (3 if own == 1e-2 else 2) * FLOOR + own / 10
    for rmse, expected in ((limit * (1 - 1e-9), []), (limit * (1 + 1e-9), ["rmse"]), (math.nan, ["rmse"])):
        held = references(dtype=dtype, device={"rmse": rmse})
        verdict = judge(numbers(dtype=dtype, dynamo_atol=1.0), Tolerance(preset="dynamo"), references={"output": held})
        assert criteria(verdict) == expected


# -------- the floor


@pytest.mark.parametrize(("name", "field", "limit"), [
    ("forecast_ratio", "rel_l2", 2.0), ("token_ratio", "token_rel_l2", 3.0), ("outlier_ratio", "max_scaled", 4.0),
])  # fmt: skip
@pytest.mark.parametrize("larger", ["cpu", "forecast"])
def test_the_floor_is_the_larger_of_two_healthy_errors(name, field, limit, larger):
    other = healthy(**{field: FLOOR / 4})
    for error, expected in ((limit * FLOOR, []), (beyond(name, limit) * FLOOR, [name])):
        held = references(device={field: error}, **{"forecast" if larger == "cpu" else "cpu": other})
        assert criteria(judge(numbers(), Tolerance(preset="floor"), references={"output": held})) == expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_floor_is_below_a_quarter_of_a_last_place(dtype):
    exact = numbers(dtype=dtype)
    for ratio, expected in ((2.0, []), (below(2.0, 3), ["forecast_ratio"])):
        held = References(golden=numbers(dtype=dtype, rel_l2=ratio * HALF[dtype] / 2), cpu=exact, forecast=exact)
        assert criteria(judge(exact, Tolerance(preset="floor"), references={"output": held})) == expected


def test_a_shared_factor_may_be_a_sixteenth_of_the_floor_from_a_thousand_elements_on():
    for count, share in ((1000, 1 / 16), (999, 1.0)):
        limit = SLACK[count] * (FLOOR * share + CONSTANT)
        for gain, expected in ((limit, []), (limit * (1 + 1e-9), ["gain_ratio"])):
            held = references(count, device={"gain": gain})
            assert criteria(judge(numbers(count), Tolerance(preset="floor"), references={"output": held})) == expected


def test_a_factor_that_a_healthy_run_has_is_allowed_beside_it():
    held = {
        gain: references(device={"gain": gain}, cpu=healthy(gain=-FLOOR)) for gain in (2 * FLOOR * 17 / 16, 2.2 * FLOOR)
    }
    result = [
        criteria(judge(numbers(), Tolerance(preset="floor"), references={"output": item})) for item in held.values()
    ]
    assert result == [[], ["gain_ratio"]]


def test_where_nothing_was_expected_the_error_itself_is_held_against_the_floors():
    for field, name, limit in (("rmse", "forecast_ratio", 2.0), ("max_diff", "token_ratio", 3.0)):
        for error, expected in ((limit * FLOOR, []), (beyond(name, limit) * FLOOR, [name])):
            held = references(device={field: error, "rms": 0.0})
            result = criteria(judge(numbers(rms=0.0), Tolerance(preset="floor"), references={"output": held}))
            assert result == expected


def test_hf32_is_felt_where_the_device_loses_an_eighth_of_what_it_would_cost():
    """`SWITCH NOT FELT`: the forecast loses far more than the CPU, and the device far less than the forecast."""
    forecast = healthy(rel_l2=1.0)

    def unfelt(device, cpu, **more):
        return References(
            golden=numbers(rel_l2=device), cpu=healthy(rel_l2=cpu), forecast=forecast, **({"modes": ("HF32",)} | more)
        ).unfelt

    assert not unfelt(1 / 8, 1 / 8) and unfelt(below(1 / 8, 0), 1 / 8)  # the device's side of the limit
    assert unfelt(0.01, 1 / 8) and not unfelt(
        0.01, below(1 / 8, 1)
    )  # the CPU's: such a mode costs too little to be missed
    assert not unfelt(0.01, 0.01, modes=()) and not unfelt(math.nan, 0.01)
    assert not References(golden=numbers(), cpu=healthy(), forecast=None, modes=("HF32",)).unfelt


def test_what_the_forecast_leaves_unexplained_may_be_twice_the_scatter_of_two_orders_of_sums():
    scatter = math.sqrt(2) * FLOOR
    for ties, more in ((None, 0.0), (FLOOR, FLOOR)):
        for times, expected in ((1.999, []), (2.001, ["unexplained_ratio"])):
            held = references(unexplained=times * (scatter + more), ties=ties)
            assert criteria(judge(numbers(), Tolerance(preset="sharp"), references={"output": held})) == expected
    blank = references(unexplained=None)
    assert "unexplained_ratio" in criteria(judge(numbers(), Tolerance(preset="sharp"), references={"output": blank}))
    blank = references(unexplained=None, forecast=None)
    assert criteria(judge(numbers(), Tolerance(preset="sharp"), references={"output": blank})) == []


def test_a_limit_says_where_the_worst_is_as_its_metric_declares():
    comparison = numbers(worst_index=(0, 7), worst_token=(3,), worst_token_diff=(4,), first_flip=(5,))
    told = {
        name: check_of(comparison, name, 0.0, 1.0).where
        for name in ("max_diff", "max_diff_rms", "outlier_ratio", "token_cos_sim", "token_rel_l2", "token_ratio")
    }
    assert told == {
        "max_diff": "at (0, 7)",
        "max_diff_rms": "at (0, 7)",
        "outlier_ratio": "at (0, 7)",
        "token_cos_sim": "at token (3,)",
        "token_rel_l2": "at token (4,)",
        "token_ratio": "at token (4,)",
    }
    assert check_of(comparison, "flip_margin", 0.0).where == "at row (5,)"
    assert check_of(comparison, "mean_diff", 0.0).where == ""
    assert {name for name, (place, _) in WORST.items() if not hasattr(comparison, place)} == set()
