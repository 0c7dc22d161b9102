"""Every constant and branch of the rule that holds a run against its baseline: at it and beyond it, either way.

The constants are restated here, so that none can change unseen.
"""

import json
import math
from dataclasses import replace

import pytest

from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.report import Row
from harness.report.format import tally
from harness.report.rows import Numbers
from harness.upgrade import baseline

STACK = {"device": "Ascend910B4", "torch_npu": "2.9.0", "cann": "8.5.0 (emulated)", "torch": "2.9.0"}
TINY = 1e-9  # relative, far above what a quotient loses by its rounding
RUN = dict(test="t::test[m]", case="m", weights="seeded:0")


def row(seed=0, error=1.0, digest="then", dtype="float32", **more):
    given = dict(
        dtype=dtype,
        seed=seed,
        inputs_sha256=f"in{seed}",
        rel_l2=error,
        golden_rel_l2=error,
        actual_sha256=f"{digest} {seed}",
    )
    return Row(**(RUN | given | more))


def entry(rows):
    return baseline.Entry(rows={baseline.seed_of(item): item for item in rows})


def became(now, then):
    return [verdict.kind for verdict in baseline.verdicts(now, entry(then))]


def changed(ratios, now=None, then=None):
    """What becomes of rows, one a seed, whose errors are so many times the accepted ones."""
    after = [row(seed, ratio, "now", **(now or {})) for seed, ratio in enumerate(ratios)]
    return became(after, [row(seed, **(then or {})) for seed in range(len(ratios))])


# -------- one row by itself


def sides(factor):
    """Just within a factor and just beyond it, growing and shrinking, and what each is."""
    within, beyond = factor * (1 - TINY), factor * (1 + TINY)
    return [(within, "DRIFT"), (beyond, "REGRESSED"), (1 / within, "DRIFT"), (1 / beyond, "IMPROVED")]


SUMS = dict(cpu_golden_rel_l2=0.5)  # the accepted error, 1, is twice the CPU's


@pytest.mark.parametrize(
    ("factor", "now", "then"),
    [
        (1.5, {}, {}),
        (2.0, {}, SUMS),
        (1.5, {}, dict(cpu_golden_rel_l2=0.5 * (1 - TINY))),
        (1.5, SUMS, {}),  # the accepted run's error counts, not this one's
        (1.5, dict(dtype="float16"), SUMS),
        (1.5, dict(shape=(1000,)), {}),
        (3.0, dict(shape=(999,)), {}),
        (3.0, dict(shape=(3, 167)), {}),
        (5.0, dict(shape=(500,)), {}),
        (5.0, dict(shape=(11,)), {}),
        (10.0, dict(shape=(2, 5)), {}),
        (10.0, dict(shape=()), {}),
        (10.0, dict(shape=(10,)), SUMS),
    ],
)
def test_the_factor_from_which_a_change_counts_by_itself(factor, now, then):
    for ratio, kind in [*sides(factor), (factor, "DRIFT"), (1 / factor, "DRIFT")]:
        assert changed([ratio], now, then) == [kind], ratio


def test_one_row_of_sums_makes_all_rows_of_a_case_rows_of_sums():
    rows = [row(0, 1.9, "now"), row(1, 1.0, "now")]
    assert became(rows, [row(0), row(1, **SUMS)]) == ["DRIFT", "DRIFT"]
    assert became(rows, [row(0), row(1)]) == ["REGRESSED", "DRIFT"]
    three = [row(seed, 1.2, "now") for seed in range(3)]
    assert became(three, [row(0), row(1), row(2, **SUMS)]) == ["DRIFT"] * 3


def test_an_error_of_zero_that_grows_is_worse_and_one_that_stays_is_not():
    assert became([row(error=1e-30, digest="now")], [row(error=0.0)]) == ["REGRESSED"]
    assert became([row(error=0.0, digest="now")], [row(error=1e-30)]) == ["IMPROVED"]
    (result,) = baseline.verdicts([row(error=0.0, digest="now")], entry([row(error=0.0)]))
    assert (result.kind, result.ratio) == ("DRIFT", 1.0) and "to every digit, though the bits are others" in result.text
    (result,) = baseline.verdicts([row(error=1.25, digest="now")], entry([row()]))
    assert (result.kind, result.ratio) == ("DRIFT", 1.25) and "every digit" not in result.text
    assert "error to float64 1.250e+00 where 1.000e+00 was accepted (1.250 times)" in result.text


# -------- all seeds together


@pytest.mark.parametrize(("least", "then"), [(1.03, {}), (2.0, SUMS)])
def test_the_factor_from_which_a_change_that_all_seeds_share_counts(least, then):
    for factor, kind in sides(least):
        assert changed([factor] * 4, {}, then) == [kind] * 4
    for sign in (1, -1):  # at the factor itself there is no change, and beyond it there is one way
        assert (
            baseline._shared([sign * math.log(least)] * 4, least) == 0
            and baseline._shared([sign * math.log(least) * (1 + TINY)] * 4, least) == sign
        )
    assert changed([1.04] * 3) == ["REGRESSED"] * 3 and changed([1 / 1.04] * 3) == ["IMPROVED"] * 3
    assert changed([1.04] * 2) == ["DRIFT"] * 2, "three seeds are needed"
    assert changed([1.4, 1.4, 1.4]) == ["REGRESSED"] * 3 and changed([1.4, 1.4, 1.4], {}, SUMS) == ["DRIFT"] * 3


def test_a_change_that_is_shared_names_its_mean_and_the_seeds():
    ratios = [1.04, 1.05, 1.06]
    now, then = [row(seed, ratio, "now") for seed, ratio in enumerate(ratios)], [row(seed) for seed in range(3)]
    mean = math.prod(ratios) ** (1 / 3)
    for result in baseline.verdicts(now, entry(then)):
        assert f", {mean:.3f} times on average over 3 seeds; find out what changed, or accept it" in result.text
    for result in baseline.verdicts([row(seed, 1 / 1.05, "now") for seed in range(3)], entry(then)):
        assert "so that it cannot be lost again" in result.text
    for ratio in (1.6, 1 / 1.6):  # beyond what counts by itself too
        for result in baseline.verdicts([row(seed, ratio, "now") for seed in range(3)], entry(then)):
            assert f"{ratio:.3f} times on average over 3 seeds" in result.text
    (alone,) = baseline.verdicts([row(0, 1.6, "now")], entry(then))
    assert "on average" not in alone.text and "find out what changed" in alone.text


def test_a_seed_that_went_the_other_way_is_not_blamed():
    result = changed([1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 0.99])
    assert result == ["REGRESSED"] * 7 + ["DRIFT"]
    result = changed([1 / 1.2] * 7 + [1.01])
    assert result == ["IMPROVED"] * 7 + ["DRIFT"]
    assert changed([1.2] * 7 + [1.0]) == ["REGRESSED"] * 7 + ["DRIFT"]


def test_seeds_with_the_same_inputs_are_one_sample():
    then = [row(seed) for seed in range(4)]
    same = [row(seed, 1.04, "now", inputs_sha256="in") for seed in range(4)]
    accepted = [row(seed, inputs_sha256="in") for seed in range(4)]
    assert became(same, accepted) == ["DRIFT"] * 4
    two = [row(seed, 1.04, "now", inputs_sha256=f"in{seed % 2}") for seed in range(4)]
    assert became(two, [row(seed, inputs_sha256=f"in{seed % 2}") for seed in range(4)]) == ["DRIFT"] * 4
    assert became([row(seed, 1.04, "now") for seed in range(4)], then) == ["REGRESSED"] * 4
    rows = [
        row(0, 1.0, "now", inputs_sha256="in"),
        row(1, 1.04, "now", inputs_sha256="in"),
        row(2, 1.04, "now"),
        row(3, 1.04, "now"),
    ]
    first = became(rows, [row(0, inputs_sha256="in"), row(1, inputs_sha256="in"), row(2), row(3)])
    assert first == ["DRIFT"] * 4, "the first of a sample stands for it"


def test_rows_that_cannot_be_divided_are_no_samples():
    then = [row(seed) for seed in range(5)]
    now = [
        row(0, math.nan, "now"),
        row(1, 0.0, "now"),
        row(2, 1.04, "now"),
        row(3, 1.04, "now"),
        row(4, weights="seeded:1", digest="now"),
    ]
    assert became(now, then) == ["NOT COMPARABLE", "IMPROVED", "DRIFT", "DRIFT", "NOT COMPARABLE"]
    then[1] = row(1, 0.0)
    assert became([now[0], row(1, 1.0, "now"), *now[2:]], then) == [
        "NOT COMPARABLE",
        "REGRESSED",
        "DRIFT",
        "DRIFT",
        "NOT COMPARABLE",
    ]


def tail(limit, freedom):
    """P(T > limit) of Student's t, by Simpson's rule over its density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    steps, width = 2000, limit / 2000
    heights = [scale * (1 + (step * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for step in range(steps + 1)]
    shares = [4 if step % 2 else 2 for step in range(steps + 1)]
    shares[0] = shares[steps] = 1
    return 0.5 - width / 3 * sum(height * share for height, share in zip(heights, shares))


FREEDOMS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30)  # those of the table, below which the next lower one holds


def test_students_points_are_those_of_one_percent():
    assert tuple(baseline.STUDENT) == (*FREEDOMS, 10**9)
    for freedom in FREEDOMS:
        assert tail(baseline.STUDENT[freedom], freedom) == pytest.approx(0.01, rel=3e-3)
    assert math.erfc(baseline.STUDENT[10**9] / math.sqrt(2)) / 2 == pytest.approx(0.01, rel=3e-3)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 21, 22, 31, 32])
def test_a_shared_change_must_stand_out_of_its_scatter_by_students_point(count):
    freedom = max(item for item in FREEDOMS if item <= count - 1)
    mean = 0.5
    for sign, times, expected in ((1, 1.001, 1), (1, 0.999, 0), (-1, 1.001, -1), (-1, 0.999, 0)):
        spread = mean * math.sqrt(count) / (baseline.STUDENT[freedom] * times)  # the sample's standard deviation
        half = spread * math.sqrt((count - 1) / (count - count % 2))
        logs = [mean + half, mean - half] * (count // 2) + [mean] * (count % 2)
        assert baseline._shared([sign * log for log in logs], 1.03) == expected


# -------- reruns that differ


@pytest.mark.parametrize(
    ("ratio", "now", "then", "kind"),
    [
        (1.6, 0.2 * (1 + TINY), 0.0, "DRIFT"),
        (1.6, 0.2 * (1 - TINY), 0.0, "REGRESSED"),  # three times the larger difference
        (1.6, 0.0, 0.2 * (1 + TINY), "DRIFT"),
        (1.6, 0.0, 0.2 * (1 - TINY), "REGRESSED"),
        (0.4, 0.2 * (1 + TINY), 0.1, "DRIFT"),
        (0.4, 0.2 * (1 - TINY), 0.1, "IMPROVED"),
        (2.0, 9.0, 0.0, "DRIFT"),
        (2.0 + 1e-9, 9.0, 0.0, "REGRESSED"),  # and it may not grow by more than the accepted error
        (2.25, 9.0, 0.25, "DRIFT"),
        (2.25 + 1e-9, 9.0, 0.25, "REGRESSED"),  # and the accepted difference
    ],
)
def test_what_the_reruns_differ_by_excuses_a_change(ratio, now, then, kind):
    reruns = [{"rerun": {"rel_l2": size} if size else {}} for size in (now, then)]
    assert changed([ratio], *reruns) == [kind]


# -------- parts of a row


def parts(error, count=1000, digest="now", dtype="float32", rerun=0.0, **more):
    outputs = {"a": Numbers(rel_l2=1.0, shape=(2000,)), "b": Numbers(rel_l2=error, shape=(count,))}
    return [
        row(0, 1.0, digest, dtype=dtype, output="a", outputs=outputs, rerun={"rel_l2": rerun} if rerun else {}, **more)
    ]


@pytest.mark.parametrize(("count", "factor"), [(1000, 4.0), (501, 4.0), (500, 5.0), (11, 5.0), (10, 10.0)])
def test_another_output_may_be_four_times_off_or_the_slack_of_its_elements(count, factor):
    before = 2.0**-6
    for error, kind in ((factor * before, "DRIFT"), (factor * before * (1 + TINY), "REGRESSED")):
        assert became(parts(error, count), parts(before, count, "then")) == [kind]
    assert became(parts(math.nan, count), parts(before, count, "then")) == ["DRIFT"]
    assert became(parts(factor, count), parts(math.nan, count, "then")) == ["DRIFT"]


@pytest.mark.parametrize(("dtype", "roundoff"), [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_another_output_is_never_held_against_less_than_half_a_last_place(dtype, roundoff):
    for error, kind in ((4 * roundoff, "DRIFT"), (4 * roundoff * (1 + TINY), "REGRESSED")):
        assert became(parts(error, dtype=dtype), parts(0.0, digest="then", dtype=dtype)) == [kind]


def test_another_output_may_scatter_by_three_times_what_reruns_differ():
    for now, then in ((0.25, 0.0), (0.0, 0.25), (0.25, 0.125)):
        for error, kind in ((0.75 + 2**-6, "DRIFT"), (0.76 + 2**-6, "REGRESSED")):
            assert became(parts(error, rerun=now), parts(2**-6, digest="then", rerun=then)) == [kind]


def test_a_row_that_improved_by_itself_is_worse_where_another_output_is():
    (result,) = baseline.verdicts(
        [row(0, 0.1, "now", outputs=parts(1.0)[0].outputs)], entry([row(0, outputs=parts(2**-6)[0].outputs)])
    )
    assert result.kind == "REGRESSED" and result.ratio == 0.1
    assert (
        result.text
        == "m float32 seed 0: output b is off by 1.000e+00 where 1.562e-02 was accepted; find out what changed, "
        "or accept it with --precision-baseline=accept"
    )


def test_the_worst_token_has_the_slack_of_its_width():
    def tokens(error, width, digest="now", **more):
        return [row(0, 1.0, digest, shape=(2, 2000, width), token_rel_l2=error, **more)]

    for width, factor in ((1000, 4.0), (500, 5.0), (8, 10.0)):
        for error, kind in ((factor / 64, "DRIFT"), (factor / 64 * (1 + TINY), "REGRESSED")):
            assert became(tokens(error, width), tokens(1 / 64, width, "then")) == [kind]
    (result,) = baseline.verdicts(tokens(1.0, 1000, output="y"), entry(tokens(0.01, 1000, "then", output="y")))
    assert "the worst token of y is off by" in result.text
    (result,) = baseline.verdicts(tokens(1.0, 1000), entry(tokens(0.01, 1000, "then")))
    assert "the worst token of the output is off by" in result.text
    assert became([row(0, 1.0, "now", shape=(), token_rel_l2=1.0)], [row(shape=(), token_rel_l2=0.01)]) == ["DRIFT"]


# -------- what can be compared


def normed(norm, digest="now", **more):
    return row(0, 1.0, digest, **(dict(rms=norm, cpu_golden_rel_l2=1e-3, shape=(8, 500), output="y") | more))


@pytest.mark.parametrize(
    ("now", "then", "allowed"),
    [(1e-3, 1e-3, 4e-3 + 1e-6), (0.0, 1e-3, 2e-3 + 1e-6), (1e-3, 0.0, 2e-3 + 1e-6), (0.0, 0.0, 1e-6)],
)
def test_two_results_of_the_cpu_may_differ_by_twice_what_both_are_off(now, then, allowed):
    before = normed(2.0, "then", cpu_golden_rel_l2=then)
    for sign in (1, -1):
        for factor, comparable in ((1 - 1e-7, True), (1 + 1e-7, False)):
            (result,) = baseline.verdicts(
                [normed(2.0 * (1 + sign * allowed * factor), cpu_golden_rel_l2=now)], entry([before])
            )
            assert (result.kind != "NOT COMPARABLE") is comparable
            assert (
                comparable
                or "the CPU's result is another one than was accepted: its root mean square is" in result.text
            )


@pytest.mark.parametrize(
    "more",
    [
        dict(output="z"),
        dict(shape=(500, 8)),
        dict(parted="at 3"),
        dict(rms=None),
        dict(rms=math.nan),
        dict(cpu_golden_rel_l2=None),
        dict(cpu_golden_rel_l2=math.inf),
    ],
)
def test_norms_say_nothing_where_they_are_of_something_else_or_not_known(more):
    for now, then in ((normed(9.0, **more), normed(1.0, "then")), (normed(1.0), normed(9.0, "then", **more))):
        assert became([now], [then])[0] != "NOT COMPARABLE"
    assert became([normed(9.0)], [normed(0.0, "then")])[0] != "NOT COMPARABLE"
    assert became([normed(9.0)], [normed(1.0, "then")]) == ["NOT COMPARABLE"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (dict(weights="seeded:1"), "ran with other weights (seeded:1) than were accepted (seeded:0)"),
        (dict(weights_sha256="b" * 20), f"ran with other weights ({'b' * 16}) than were accepted ({'a' * 16})"),
        (dict(inputs_sha256="x"), "ran with other inputs (x) than were accepted (in0)"),
    ],
)
def test_other_weights_and_inputs_are_named_by_their_digests(more, words):
    then = row(weights_sha256="a" * 20)
    (result,) = baseline.verdicts([row(0, 1.0, "now", **(dict(weights_sha256="a" * 20) | more))], entry([then]))
    assert result.kind == "NOT COMPARABLE" and result.text.startswith(
        f"m float32 seed 0 {words}; its numbers cannot be compared"
    )
    assert not baseline.same_subject(row(**(dict(weights_sha256="a" * 20) | more)), then)


def test_rows_of_before_the_weights_had_a_digest_are_compared():
    for now, then in ((None, "a"), ("a", None), (None, None), ("a", "a")):
        assert became([row(0, 1.0, "now", weights_sha256=now)], [row(weights_sha256=then)]) == ["DRIFT"]
        assert baseline.same_subject(row(weights_sha256=now), row(weights_sha256=then))


@pytest.mark.parametrize("digest", ["inputs_sha256", "actual_sha256", "weights"])
def test_a_row_without_a_digest_is_not_compared(digest):
    """It is the same on both sides, since another one would be other inputs."""
    for now, then in ((None, None), *(((None, "then 0"), ("now 0", None)) if digest == "actual_sha256" else ())):
        (result,) = baseline.verdicts([row(**{digest: now})], entry([row(**{digest: then})]))
        assert (
            result.kind == "NOT COMPARABLE"
            and f"has no {digest}, now or as accepted" in result.text
            and result.text.endswith("run it again with this version")
        )


def test_errors_that_are_not_finite_are_not_compared():
    for now, then in ((math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)):
        (result,) = baseline.verdicts([row(0, now, "now")], entry([row(0, then)]))
        assert (
            result.kind == "NOT COMPARABLE"
            and f"no finite error to compare, {now} now and {then} accepted" in result.text
        )


@pytest.mark.parametrize("number", ["rel_l2", "max_diff", "mean_diff"])
def test_numbers_of_the_same_bits_agree_to_one_in_a_million(number):
    def same(value, out="out"):
        return row(**{"max_diff": 1.0, "mean_diff": 1.0, number: value, "expected_sha256": out})

    for factor, kind in (
        (1 + 9e-7, "IDENTICAL"),
        (1 + 1.1e-6, "NOT COMPARABLE"),
        (1 / (1 + 9e-7), "IDENTICAL"),
        (1 / (1 + 1.1e-6), "NOT COMPARABLE"),
    ):
        (result,) = baseline.verdicts([same(3.0 * factor)], entry([same(3.0)]))
        assert result.kind == kind and (
            kind == "IDENTICAL" or f"every bit is as accepted, and {number} is" in result.text
        )
    for factor, kind in ((1 + 1e-6 + 5e-13, "IDENTICAL"), (1 + 1e-6 + 2e-12, "NOT COMPARABLE")):  # of the larger one
        assert became([same(3.0 * factor)], [same(3.0)]) == became([same(3.0)], [same(3.0 * factor)]) == [kind]
    for now, then, kind in (
        (math.nan, math.nan, "IDENTICAL"),
        (math.nan, 1.0, "NOT COMPARABLE"),
        (0.0, 0.0, "IDENTICAL"),
        (math.inf, math.inf, "IDENTICAL"),
        (0.0, 1e-9, "NOT COMPARABLE"),
    ):
        assert became([same(now)], [same(then)]) == [kind]
    if number != "rel_l2":
        assert became([same(None)], [same(1.0)]) == became([same(1.0)], [same(None)]) == ["IDENTICAL"]
    for now, then in (
        ("other", "out"),
        (None, None),
        ("out", None),
    ):  # numbers against other results of the CPU may differ
        (result,) = baseline.verdicts([same(9.0, now)], entry([same(1.0, then)]))
        assert (result.kind, result.ratio) == (
            "IDENTICAL",
            1.0,
        ) and "every bit of the device's output as accepted" in result.text
    (result,) = baseline.verdicts([same(1.0)], entry([same(1.0)]))
    assert (result.ratio, result.text) == (1.0, "m float32 seed 0: every bit as accepted")


def test_another_result_of_the_cpu_is_said():
    for now, then, said in (("a", "b", True), ("a", "a", False), (None, "a", False), ("a", None, False)):
        (result,) = baseline.verdicts([row(0, 1.0, "now", expected_sha256=now)], entry([row(expected_sha256=then)]))
        assert ("against another result of the CPU than was accepted" in result.text) is said


def test_a_row_that_was_not_accepted_is_new():
    assert became([row(7, 1.0, "now")], [row(0)]) == ["NEW"]
    result = baseline.verdicts([row(0, 1.0, "now"), row(1)], None)
    assert [item.kind for item in result] == ["NEW", "NEW"] and result[0].ratio is None


# -------- rows as they are left


def test_a_row_that_is_worse_has_a_reason_and_its_mark_says_so():
    now = [row(0, 9.0, "now", marks=(Mark.NEW, Mark.FELL_BACK)), row(1, 1.0, "then", marks=(Mark.NEW,))]
    worse, same = baseline.settled_entries(iter(now), entry([row(0), row(1)]))
    assert (
        worse.status == "REGRESSED"
        and worse.criteria == ("baseline",)
        and worse.reasons[0].startswith("REGRESSED: m float32 seed 0: error to float64")
    )
    assert (
        worse.marks == (Mark.REGRESSED, Mark.FELL_BACK)
        and worse.baseline.kind == "REGRESSED"
        and worse.baseline.ratio == 9.0
    )
    assert (
        same.status == "PASS"
        and same.criteria == ()
        and same.marks == (Mark.IDENTICAL,)
        and same.baseline.kind == "IDENTICAL"
    )
    (failing,) = baseline.settled_entries(
        [row(0, 9.0, "now", criteria=("max_diff",), reasons=("too far",))], entry([row(0)])
    )
    assert failing.criteria == ("max_diff",) and failing.baseline.kind == "REGRESSED"
    known = dict(criteria=("max_diff",), reasons=("too far",), marks=(Mark.KNOWN, Mark.NEW))
    (worse,) = baseline.settled_entries([row(0, 9.0, "now", **known)], entry([row(0)]))
    assert worse.criteria == ("max_diff", "baseline") and worse.marks == (Mark.REGRESSED,)
    (still,) = baseline.settled_entries([row(0, 1.0, "now", **known)], entry([row(0)]))
    assert still.criteria == ("max_diff",) and still.marks == (Mark.KNOWN, Mark.DRIFT)


def test_limits_loosen_by_a_digit_and_absent_rows_are_named():
    then = entry([row(1, allowed={"rel_l2": 1.0, "cos_sim": 0.5}), row(2)])
    for now, said in (
        ({"rel_l2": 1.0, "cos_sim": 0.5}, 0),
        ({"rel_l2": 1 + TINY, "cos_sim": 0.5 - TINY}, 2),
        ({"rel_l2": 0.9, "cos_sim": 0.6}, 0),
        ({}, 2),
    ):
        assert len(baseline.loosened(then, [row(1, allowed=now), row(2, allowed=now), row(3, allowed=now)])) == said
    assert baseline.absent(then, [row(2)]) == ["seed 1"] and baseline.absent(
        then, [row(1), row(2)]
    ) == [] == baseline.absent(None, [])
    assert baseline.seed_of(row(None)) == "-" and baseline.seed_of(row(7)) == "7"


def test_an_entry_is_of_one_device_and_replaced_whole():
    first = baseline.accepted(None, [row(0), row(1)], stack=STACK, backend="npu", when="2026-01-01")
    both = baseline.accepted(first, [row(2)], stack=STACK, backend="emulated", when="2026-01-02")
    again = baseline.accepted(both, [row(3)], stack=STACK, backend="npu", when="2026-01-03")
    kept = {name: (item.accepted, tuple(item.rows), dict(item.stack)) for name, item in again.entries.items()}
    assert kept == {
        "Ascend910B4 (npu)": ("2026-01-03", ("3",), STACK),
        "Ascend910B4 (emulated)": ("2026-01-02", ("2",), STACK),
    }
    assert (again.case, again.dtype) == ("m", "float32") and tuple(first.entries) == ("Ascend910B4 (npu)",)
    assert baseline.entry_of(again, STACK, "npu").accepted == "2026-01-03"
    assert baseline.entry_of(again, STACK, "cuda") is None is baseline.entry_of(None, STACK, "npu")


@pytest.mark.parametrize(
    ("more", "backend", "name"),
    [
        ({}, "npu", "ascend910b4_torch_npu-2.9.0_cann-8.5.0"),
        ({}, "emulated", "ascend910b4-emulated_torch_npu-2.9.0_cann-8.5.0"),
        ({"cann": None}, None, "ascend910b4_torch_npu-2.9.0"),
        ({"torch_npu": None, "cann": None, "device": "H 100"}, "cuda", "h_100-cuda_torch-2.9.0"),
    ],
)
def test_a_stack_has_a_name_that_can_be_a_folders(more, backend, name):
    assert baseline.stack_name(STACK | more, backend) == name


# -------- files


def test_the_longest_name_of_a_file_is_a_name_and_one_byte_more_gets_a_digest(tmp_path):
    for count, plain in ((150 - len("-float32"), True), (151 - len("-float32"), False)):
        path = baseline.path_of(tmp_path, "x" * count, "float32")
        assert (path.name == f"{'x' * count}-float32.json") is plain
        assert plain or (
            path.name.startswith("x" * (count) + "-float3"[: 150 - count])
            and len(path.name) == 150 + 1 + 8 + len(".json")
        )
    assert baseline.path_of(tmp_path, "a-b_c.d", None).name == "a-b_c.d-None.json"
    assert baseline.path_of(tmp_path, "a b", "float32").name == "a_b-float32-b859db68.json"


def kept(case, **more):
    return baseline.accepted(None, [row(case=case, **more)], stack=STACK, backend="npu", when="2026-01-01")


def test_a_file_is_whole_and_readable_as_text(tmp_path):
    path = baseline.write_baseline(tmp_path / "a" / "b", kept("é漢"))
    text = path.read_text()
    assert (
        path.parent == tmp_path / "a" / "b"
        and text.endswith("}\n")
        and "é漢" in text
        and '\n "schema": "precision-baseline/1"' in text
    )
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    stored = json.loads(text)
    assert stored["case"] == "é漢" and stored["dtype"] == "float32" and list(stored["entries"]) == ["Ascend910B4 (npu)"]
    entry = stored["entries"]["Ascend910B4 (npu)"]
    assert (
        entry["accepted"] == "2026-01-01"
        and entry["stack"] == STACK
        and list(entry["rows"]["0"]) == list(baseline.STORED_FIELDS)
    )
    assert baseline.write_baseline(tmp_path / "a" / "b", kept("é漢", seed=5)) == path and list(
        baseline.read_baseline(path.parent, "é漢", "float32").entries["Ascend910B4 (npu)"].rows
    ) == ["5"]


def test_a_file_of_before_digests_in_names_moves_and_a_damaged_one_is_written_anew(tmp_path):
    plain = baseline.path_of(tmp_path, "a_b", "float32")
    plain.write_text(
        json.dumps(kept("a b").to_dict())
    )  # an older version's file of another case, under this case's name
    baseline.write_baseline(tmp_path, kept("a_b"))
    assert (
        baseline.read_baseline(tmp_path, "a_b", "float32").case == "a_b"
        and baseline.read_baseline(tmp_path, "a b", "float32").case == "a b"
    )
    own = baseline.path_of(tmp_path, "a b", "float32")
    accepted = baseline.write_baseline(tmp_path, kept("a b", seed=7))
    assert accepted == own and plain.exists()
    plain.write_text(json.dumps(kept("a b").to_dict()))
    baseline.write_baseline(tmp_path, kept("a_b"))
    assert list(baseline.read_baseline(tmp_path, "a b", "float32").entries["Ascend910B4 (npu)"].rows) == ["7"], (
        "a file of its own is newer"
    )
    plain.write_text("{")
    with pytest.raises(HarnessError, match="is damaged"):
        baseline.read_baseline(tmp_path, "a_b", "float32")
    baseline.write_baseline(tmp_path, kept("a b"))
    assert plain.read_text() == "{", "a damaged file of another name is left alone"
    baseline.write_baseline(tmp_path, kept("a_b"))
    assert baseline.read_baseline(tmp_path, "a_b", "float32").case == "a_b"


def test_an_older_file_of_another_dtype_or_case_is_not_this_cases(tmp_path):
    (tmp_path / "a_b-float32.json").write_text(json.dumps(kept("a b", dtype="float16").to_dict()))
    assert baseline.read_baseline(tmp_path, "a b", "float32") is None
    baseline.write_baseline(tmp_path, kept("a b"))
    assert (tmp_path / "a_b-float32.json").exists()
    assert (
        baseline.read_baseline(tmp_path, "x " * 130, "float32") is None
        and baseline.read_baseline(tmp_path / "none", "m", "float32") is None
    )
    baseline.write_baseline(tmp_path, kept("x " * 130))
    assert baseline.read_baseline(tmp_path, "x " * 130, "float32").case == "x " * 130


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    (tmp_path / "m-float32.json").mkdir()
    with pytest.raises(HarnessError, match=r"m-float32.json cannot be read \(.*\); restore it from version control"):
        baseline.read_baseline(tmp_path, "m", "float32")
    (tmp_path / "n-float32.json").write_text("[1]")
    with pytest.raises(HarnessError, match="has schema None where 'precision-baseline/1' was expected"):
        baseline.read_baseline(tmp_path, "n", "float32")


def test_each_file_without_a_case_is_named(tmp_path):
    for case in ("a", "b", "c"):
        baseline.write_baseline(tmp_path, kept(case))
    (tmp_path / "0.json").write_text("{")
    result = baseline.without_a_case(tmp_path, {("b", "float32")}, "Ascend910B4 (npu)")
    assert (
        len(result) == 3
        and "is damaged" in result[0]
        and "called a float32, of which 1 rows" in result[1]
        and "called c float32" in result[2]
    )


def test_rows_of_a_file_are_filled_with_what_it_says_once(tmp_path):
    stored = kept("m").to_dict()
    (rows,) = [item["rows"] for item in stored["entries"].values()]
    rows["-"] = {"status": "FAIL", "criteria": ["max_diff", "rel_l2"], "rel_l2": 1.0}
    result = baseline._baseline(json.loads(json.dumps(stored)))
    (entry,) = result.entries.values()
    assert entry.rows["-"].case == "m" and entry.rows["-"].dtype == "float32" and entry.rows["-"].seed is None
    assert entry.rows["-"].reasons == ("accepted so",) * 2 and entry.rows["0"].rel_l2 == 1.0
    rows["-"] = {"status": "FAIL", "criteria": "max_diff"}
    with pytest.raises(ValueError):
        baseline._baseline(json.loads(json.dumps(stored)))


@pytest.mark.parametrize(("length", "fits"), [(254, True), (255, True), (256, False)])
def test_an_older_file_may_have_the_longest_name_that_a_file_can(tmp_path, length, fits):
    case = "x" * (length - len("/-float32.json")) + "/"
    older = tmp_path / f"{case[:-1]}_-float32.json"
    if fits:
        older.write_text(json.dumps(kept(case).to_dict()))
    assert (baseline.read_baseline(tmp_path, case, "float32") is not None) is fits
    path = baseline.write_baseline(tmp_path, kept(case))
    assert list(tmp_path.iterdir()) == [path] and baseline.read_baseline(tmp_path, case, "float32").case == case


# -------- another card


@pytest.mark.parametrize("ratio, kind", [(1.01, "DRIFT"), (9.0, "REGRESSED"), (0.1, "IMPROVED")])
def test_a_change_on_another_card_names_both(ratio, kind):
    then = row(card="NPU 0 chip 0, serial A")
    (change,) = baseline.verdicts([row(0, ratio, "now", card="NPU 3 chip 0, serial B")], entry([then]))
    assert change.kind == kind
    said = "; accepted on NPU 0 chip 0, serial A, measured on NPU 3 chip 0, serial B, so the card may be what changed"
    assert change.text.endswith(said)


@pytest.mark.parametrize(
    "now, then",
    [
        (dict(card="A"), dict(card="A")),
        (dict(card=None), dict(card="A")),
        (dict(card="B"), dict(card=None)),
        (dict(card="B", actual_sha256="then 0", rel_l2=1.0, golden_rel_l2=1.0), dict(card="A")),
    ],
    ids=["the same card", "unknown now", "unknown then", "the same bits"],
)
def test_one_card_or_the_same_bits_are_not_spoken_of(now, then):
    (change,) = baseline.verdicts([row(0, 1.01, "now", **now)], entry([row(**then)]))
    assert "accepted on" not in change.text


def test_a_baseline_of_an_older_version_has_the_card_of_its_stack():
    older = replace(entry([row()]), stack={"card": "NPU 0 chip 0"})
    (change,) = baseline.verdicts([row(0, 9.0, "now", card="NPU 1 chip 0")], older)
    assert "accepted on NPU 0 chip 0, measured on NPU 1 chip 0" in change.text


def test_the_card_of_each_row_is_accepted_with_it(tmp_path):
    rows = [row(seed, card=f"emulated card {seed}") for seed in (0, 1)]
    accepted = baseline.accepted(None, rows, stack=STACK, backend="npu", when="2026-11-27")
    baseline.write_baseline(tmp_path, accepted)
    read = baseline.read_baseline(tmp_path, "m", "float32").entries["Ascend910B4 (npu)"]
    assert {name: item.card for name, item in read.rows.items()} == {"0": "emulated card 0", "1": "emulated card 1"}


@pytest.mark.parametrize(
    ("digest", "ratio"), [("then", 1.0), ("now", 1.1), ("now", 0.1)], ids=["bits", "drift", "better"]
)
def test_a_row_that_newly_leaves_the_device_is_not_comparable_whatever_its_numbers(digest, ratio):
    away = dict(marks=(Mark.ON_HOST,))
    kind = became([row(1, ratio, digest)], [row(1)])
    assert kind[0] in ("IDENTICAL", "DRIFT", "IMPROVED")
    assert became([row(1, ratio, digest, **away)], [row(1)]) == ["NOT COMPARABLE"]
    assert became([row(1, ratio, digest, **away)], [row(1, **away)]) == kind  # it was accepted so
    assert became([row(1, ratio, digest)], [row(1, **away)]) == kind  # and is on the device now
    fails = dict(reasons=("x",), criteria=("max_diff",), **away)
    assert became([row(1, ratio, digest, **fails)], [row(1)]) == kind  # it has a reason of its own
    assert became([row(1, **away), row(2)], [row(1), row(2)]) == ["NOT COMPARABLE", "IDENTICAL"]


def test_a_row_that_newly_leaves_the_device_says_so():
    assert baseline.change_of(row(1, marks=(Mark.ON_HOST,)), entry([row(1)])).text == (
        "m float32 seed 1: the model's own code computes on the CPU what it did not when it was accepted, so its "
        "numbers say less of the device; run the accepted code, or --precision-baseline=accept"
    )


def test_the_headline_counts_the_rows_that_computed_on_the_host():
    rows = [row(1), row(2, marks=(Mark.ON_HOST,)), row(3, marks=(Mark.ON_HOST, Mark.NEW))]
    assert tally(rows) == "3 PASS (1 NEW, 2 ON HOST)"
