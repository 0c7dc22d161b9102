"""compare_reports: every branch of what becomes of a row, and what is said of the stacks, without files."""

import datetime
import math

import pytest

from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.report import Report, Row
from harness.report.rows import UNKNOWN_CRITERION, Excuse
from harness.upgrade.transitions import BAD, EFFECTS, ORDER, TransitionKind, compare_reports

STACK = {"device": "Ascend910B4", "environment": {}, "packages": {}}
GRAVITY = (
    "NEW FAILURE",
    "REGRESSED",
    "NOT COMPARABLE",
    "MISSING",
    "STILL FAILING",
    "KNOWN FAILURE",
    "DRIFT",
    "IMPROVED",
    "FIXED",
    "NEW",
    "IDENTICAL",
    "SKIPPED",
)
EXCUSE = Excuse(reason="because", link="https://example.org/1", expires=datetime.date(2999, 1, 1))


def row(seed=0, error=1.0, digest="then", criteria=(), **more):
    given = dict(
        dtype="float32", inputs_sha256=f"in{seed}", weights="seeded:0", rel_l2=error, actual_sha256=f"{digest} {seed}"
    )
    given |= dict(criteria=tuple(criteria), reasons=tuple(f"{item} is off" for item in criteria))
    return Row(test=f"t::test[{seed}]", seed=seed, **({"case": "m"} | given | more))


def failing(*criteria, **more):
    return row(**{"criteria": criteria or ("max_diff",)} | more)


def skipped(**more):
    return row(criteria=("skip",), error=None, **more)


def broken(**more):
    return row(criteria=("run",), error=None, **more)


def known(*criteria, **more):
    return failing(*criteria, **{"marks": (Mark.KNOWN,), "known": EXCUSE} | more)


def report(rows, stack=STACK, backend="npu", created="2026-01-01T00:00:00+00:00"):
    return Report(rows=tuple(rows), stack=stack, backend=backend, created=created)


def upgrade(before, after, **more):
    stacks = {name: more.pop(name, STACK) for name in ("old", "new")}
    return compare_reports(
        report(before, stacks["old"]), report(after, stacks["new"], created="2026-01-02T00:00:00+00:00"), **more
    )


def became(before, after):
    (result,) = upgrade([] if before is None else [before], [] if after is None else [after]).transitions
    return result


def test_kinds_have_an_order_and_the_first_four_are_bad():
    assert tuple(item.value for item in ORDER) == GRAVITY == tuple(str(item) for item in TransitionKind)
    assert (
        tuple(item.value for item in BAD) == GRAVITY[:4] == tuple(item.value for item in TransitionKind if item.is_bad)
    )
    assert {item.value for item in TransitionKind if item.is_compared} == {
        "REGRESSED",
        "DRIFT",
        "IMPROVED",
        "FIXED",
        "IDENTICAL",
    }


KINDS = [  # before, after, what became of it, a part of what is said
    (row(), None, "MISSING", "it ran before and is not there now; run it"),
    (None, row(), "NEW", "it is new, PASS"),
    (None, skipped(), "NEW", "it is new, SKIPPED"),
    (None, failing(), "NEW FAILURE", "it is new, and FAIL: max_diff is off"),
    (None, known(), "KNOWN FAILURE", "it is new; because (https://example.org/1), until 2999-01-01"),
    (skipped(), skipped(), "SKIPPED", "it was skipped on both sides: skip is off"),
    (row(), skipped(), "MISSING", "PASS before, and its numbers are gone: it was skipped (skip is off)"),
    (failing(), skipped(), "MISSING", "FAIL before, and its numbers are gone"),
    (skipped(), row(), "NEW", "PASS, and it was skipped before"),
    (skipped(), failing(), "NEW FAILURE", "max_diff is off"),
    (row(), row(), "IDENTICAL", "every bit"),
    (row(), row(error=1.2, digest="now"), "DRIFT", "1.200 times"),
    (row(), row(error=1.6, digest="now"), "REGRESSED", "1.600 times"),
    (row(), row(error=0.5, digest="now"), "IMPROVED", "0.500 times"),
    (row(), row(weights="seeded:1"), "NOT COMPARABLE", "other weights"),
    (row(), failing(), "NEW FAILURE", "max_diff is off"),
    (row(), failing("baseline"), "REGRESSED", "baseline is off"),
    (row(), broken(), "NEW FAILURE", "run is off"),
    (row(), known(), "KNOWN FAILURE", "because (https://example.org/1)"),
    (failing("baseline"), row(), "FIXED", "REGRESSED before: baseline is off"),
    (failing(), row(error=1.2, digest="now"), "FIXED", "FAIL before: max_diff is off"),
    (failing(), row(error=1.6, digest="now"), "REGRESSED", "1.600 times"),
    (failing(), row(weights="seeded:1"), "NOT COMPARABLE", "other weights"),
    (broken(), row(weights="seeded:1"), "FIXED", "ERROR before"),
    (failing(), failing(), "STILL FAILING", "FAIL before: max_diff is off"),
    (failing(), failing(error=1.2, digest="now"), "STILL FAILING", "FAIL before: max_diff is off"),
    (failing(), failing(error=1.6, digest="now"), "REGRESSED", "FAIL before, and worse now: m float32 seed 0"),
    (failing(), failing(error=0.5, digest="now"), "STILL FAILING", "FAIL before"),
    (
        failing(),
        failing(inputs_sha256="x"),
        "NOT COMPARABLE",
        "FAIL before and now, of something else: m float32 seed 0",
    ),
    (failing(), known(), "KNOWN FAILURE", "because (https://example.org/1)"),
    (failing(), known(error=1.6, digest="now"), "REGRESSED", "and worse now"),
    (failing(), broken(), "NEW FAILURE", "FAIL before, and now it cannot be compared: run is off"),
    (broken(), broken(), "STILL FAILING", "ERROR before: run is off"),
    (broken(), failing(), "STILL FAILING", "ERROR before: max_diff is off"),
    (broken(), failing("shape", "dtype"), "STILL FAILING", "ERROR before"),
    (failing(), failing(error=math.nan), "NEW FAILURE", "FAIL before, and now its error is not finite"),
    (failing(), failing(error=math.inf), "NEW FAILURE", "now its error is not finite"),
    (failing(error=math.nan), failing(error=math.nan), "STILL FAILING", "FAIL before"),
    (failing(error=math.nan), failing(digest="now"), "STILL FAILING", "FAIL before"),
    (
        failing("max_diff"),
        failing("rel_l2", "rmse"),
        "STILL FAILING",
        "FAIL before: rel_l2 is off; rmse is off",
    ),  # limits of numbers are one way
    (
        failing("max_diff"),
        failing("shape", "dtype", "max_diff"),
        "NEW FAILURE",
        "FAIL before, and now it fails by dtype, shape too: shape is off",
    ),
    (failing("shape"), failing("max_diff"), "NEW FAILURE", "now it fails by a limit too"),
    (failing("shape", "dtype"), failing("shape"), "STILL FAILING", "FAIL before: shape is off"),
    (failing("max_diff"), failing("max_diff", "baseline"), "STILL FAILING", "FAIL before"),
    (failing("max_diff"), failing("max_diff", "known"), "STILL FAILING", "FAIL before"),
    (failing(UNKNOWN_CRITERION), failing("shape"), "STILL FAILING", "FAIL before: shape is off"),
]


@pytest.mark.parametrize(
    ("before", "after", "kind", "said"), KINDS, ids=[f"{number}-{item[2]}" for number, item in enumerate(KINDS)]
)
def test_what_became_of_a_row(before, after, kind, said):
    result = became(before, after)
    assert result.kind.value == kind and said in result.text
    one = after or before
    assert (result.case, result.dtype, result.seed) == (one.case, one.dtype, one.seed)
    assert result.before == (None if before is None else before.status) and result.after == (
        None if after is None else after.status
    )

    def error(side):
        return side.rel_l2 if side is not None and side.rel_l2 is not None and math.isfinite(side.rel_l2) else None

    assert (result.error_before, result.error_after) == (error(before), error(after))


def test_the_gravest_comes_first():
    before = [row(0), row(1), failing(seed=2), row(3), row(4)]
    after = [row(0), row(1, 1.2, "now"), failing(seed=2), row(3, 9.0, "now"), failing(seed=4), row(5)]
    result = upgrade(before, after)
    assert [transition.kind.value for transition in result.transitions] == [
        "NEW FAILURE",
        "REGRESSED",
        "STILL FAILING",
        "DRIFT",
        "NEW",
        "IDENTICAL",
    ]
    assert list(result.counts().items()) == [
        (item, 1) for item in ("NEW FAILURE", "REGRESSED", "STILL FAILING", "DRIFT", "NEW", "IDENTICAL")
    ]
    assert not result.passed
    kept = result.to_dict()
    assert (
        kept["schema"] == "precision-upgrade/1"
        and kept["passed"] is False
        and kept["counts"] == result.counts()
        and kept["notes"] == []
    )
    assert [item["kind"] for item in kept["transitions"]] == [
        transition.kind.value for transition in result.transitions
    ] and kept["stack"] == []
    assert kept["transitions"][0] | {"text": ""} == dict(
        kind="NEW FAILURE",
        case="m",
        dtype="float32",
        seed=4,
        before="PASS",
        after="FAIL",
        error_before=1.0,
        error_after=1.0,
        text="",
    )


def test_seeds_of_a_case_are_judged_together_and_cases_and_dtypes_apart():
    then = [row(seed) for seed in range(3)]
    now = [row(seed, 1.1, "now") for seed in range(3)]
    assert upgrade(then, now).counts() == {"REGRESSED": 3}
    for name in ("case", "dtype"):
        apart = [
            [row(seed, item.rel_l2, digest, **{name: f"m{seed}"}) for seed, item in enumerate(rows)]
            for rows, digest in ((then, "then"), (now, "now"))
        ]
        assert upgrade(*apart).counts() == {"DRIFT": 3}


def test_something_must_be_compared_and_nothing_may_be_bad():
    for before, after, passed in (
        ([row()], [row()], True),
        ([row()], [row(error=1.2, digest="now")], True),
        ([row()], [row(error=0.5, digest="now")], True),
        ([failing()], [row()], True),
        ([row(), failing(seed=1)], [row(), failing(seed=1)], True),
        ([failing()], [failing()], False),
        ([row(), row(1)], [row()], False),
        ([], [row()], False),
        ([row()], [row(), row(1)], True),
        ([skipped()], [skipped()], False),
    ):
        result = upgrade(before, after)
        assert result.passed is passed
        nothing = "no row was compared with numbers of before: nothing shows that they are right"
        assert (nothing in result.notes) is not any(transition.kind.is_compared for transition in result.transitions)


def test_a_subset_leaves_out_what_did_not_run():
    result = upgrade([row(0), row(1), row(2)], [row(0), row(5)], subset=True)
    assert result.left_out == 2 and result.counts() == {"NEW": 1, "IDENTICAL": 1} and result.passed
    assert result.notes == (
        "a subset was compared, as --subset asks: 2 rows of the older report did not run and were left out",
    )
    whole = upgrade([row(0)], [row(0)], subset=True)
    assert whole.left_out == 0 and whole.notes == (
        "a subset was compared, as --subset asks: it holds every row of the older report",
    )
    assert upgrade([row(0)], [row(0)]).left_out is None and upgrade([row(0)], [row(0)]).notes == ()


def test_looser_limits_and_planted_faults_are_complaints():
    result = upgrade([row(allowed={"rel_l2": 1.0})], [row(allowed={"rel_l2": 2.0})])
    assert result.complaints == (
        "m float32 is judged more loosely than before: rel_l2 2 where 1 was accepted; judge both by the same limits",
    )
    assert not result.passed and result.counts() == {"IDENTICAL": 1} and result.notes == result.complaints
    assert upgrade([row(allowed={"rel_l2": 1.0})], [row(allowed={"rel_l2": 1.0})]).complaints == ()
    assert upgrade([broken(allowed={"rel_l2": 1.0})], [broken(allowed={"rel_l2": 2.0})]).complaints == ()
    for side, which in (("old", "older"), ("new", "newer")):
        result = upgrade([row()], [row()], **{side: STACK | {"faults": ("aclnnExp:nan", "aclnnAdd:zero")}})
        assert result.complaints == (
            (
                f"the {which} report was measured on a device with planted faults (aclnnExp:nan; aclnnAdd:zero), "
                "so it says nothing of a sound one"
            ),
        )


def test_reports_of_two_devices_or_two_rows_of_a_name_are_refused():
    with pytest.raises(HarnessError, match=r"the reports come from Ascend910B4 \(npu\) and Ascend910B4 \(emulated\)"):
        compare_reports(report([row()]), report([row()], backend="emulated"))
    with pytest.raises(HarnessError, match=r"come from Ascend910B4 \(npu\) and Ascend910B2 \(npu\)"):
        compare_reports(report([row()]), report([row()], stack=STACK | {"device": "Ascend910B2"}))
    for before, after, which in (([row(), row()], [row()], "older"), ([row()], [row(), row()], "newer")):
        with pytest.raises(HarnessError, match=f"the {which} report: two rows are called"):
            upgrade(before, after)


def test_the_order_of_the_reports_is_told_by_their_times():
    first, second = report([row()]), report([row()], created="2026-01-01T00:00:01+00:00")
    assert (
        compare_reports(first, second).remarks == ()
        and "was made before the older one" in compare_reports(second, first).remarks[0]
    )
    assert "both reports are the same run" in compare_reports(first, first).remarks[0]
    assert compare_reports(first, report([row(error=1.1, digest="now")])).remarks == (), (
        "of one second, and not the same"
    )


# -------- the stacks

STACKS = [  # of the older and the newer, what they differ in
    ({"cann": "8.3"}, {"cann": "8.5"}, [("cann", "8.3", "8.5")]),
    ({"cann": "8.3"}, {"cann": "8.3"}, []),
    ({"threads": 1}, {}, [("threads", 1, "not recorded")]),
    ({}, {"threads": 1}, [("threads", "not recorded", 1)]),
    ({"threads": None}, {"threads": 1}, [("threads", None, 1)]),
    *[({"faults": nothing}, {}, []) for nothing in (None, (), [], "")],
    *[({}, {"card": nothing}, []) for nothing in (None, (), [], "")],
    ({"card": 0}, {}, [("card", 0, "not recorded")]),
    ({"environment": {"A": "1", "B": "2"}}, {"environment": {"A": "1", "B": "3"}}, [("environment.B", "2", "3")]),
    ({"environment": {"A": "1"}}, {"environment": {}}, [("environment.A", "1", None)]),
    ({"environment": {}}, {"environment": {"A": "1"}}, [("environment.A", None, "1")]),
    ({"environment": None}, {"environment": {"A": "1"}}, [("environment.A", None, "1")]),
    ({"packages": {"x": "1"}}, {"packages": {"x": "2"}}, [("packages.x", "1", "2")]),
    ({"b": 1, "a": 1}, {"c": 1, "a": 2}, [("b", 1, "not recorded"), ("a", 1, 2), ("c", "not recorded", 1)]),
]


@pytest.mark.parametrize(("old", "new", "result"), STACKS)
def test_what_two_stacks_differ_in(old, new, result):
    stacks = dict(old=STACK | old, new=STACK | new)
    assert list(upgrade([row()], [row()], **stacks).stack) == result


def test_a_table_that_an_older_report_lacks_is_not_recorded():
    lacking = {"device": "Ascend910B4"}
    full = STACK | {"environment": {"A": "1"}, "packages": {"x": "2"}}
    assert upgrade([row()], [row()], old=lacking, new=full).stack == (
        ("environment.A", "not recorded", "1"),
        ("packages.x", "not recorded", "2"),
    )
    assert upgrade([row()], [row()], old=full, new=lacking).stack == (
        ("environment.A", "1", "not recorded"),
        ("packages.x", "2", "not recorded"),
    )


def test_what_of_a_stack_changes_numbers_by_itself_is_said():
    old = STACK | {"conv_allow_hf32": True, "cann": "8.3", "environment": {"HCCL_DETERMINISTIC": "0", "HOME": "/a"}}
    new = STACK | {"conv_allow_hf32": False, "cann": "8.5", "environment": {"HCCL_DETERMINISTIC": "1", "HOME": "/b"}}
    result = upgrade([row()], [row()], old=old, new=new)
    assert result.effects == (
        "environment.HCCL_DETERMINISTIC: the order of sums between cards",
        "conv_allow_hf32: float32 operands of convolutions are rounded to HF32 or not",
    )
    assert len(result.stack) == 4 and result.to_dict()["stack"][0] == list(result.stack[0])
    assert all(text for text in EFFECTS.values())


# -------- cards


def test_the_cards_of_workers_are_those_of_the_rows_and_not_that_of_the_last_one():
    """Two runs on the same two cards, of which the last row ran on one and then on the other."""
    stacks = [{**STACK, "card": card} for card in ("card 0", "card 1")]
    old = [row(0, card="card 1"), row(1, card="card 0")]
    new = [row(0, 1.01, "now", card="card 0"), row(1, card="card 1")]
    result = upgrade(old, new, old=stacks[0], new=stacks[1])
    assert not result.stack and not result.effects
    texts = {item.seed: item.text for item in result.transitions}
    assert "accepted on card 1, measured on card 0" in texts[0] and "measured on" not in texts[1]


def test_another_card_is_a_difference_of_the_stacks_beside_its_rows():
    result = upgrade([row(card="card 0")], [row(0, 1.01, "now", card="card 3")])
    assert result.stack == (("card", "card 0", "card 3"),) and result.effects == ("card: another piece of hardware",)
    assert "so the card may be what changed" in result.transitions[0].text
