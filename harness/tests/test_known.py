"""Known failures: an entry excuses the row that it names, until its day, and nothing else."""

import datetime
import json
import math
from dataclasses import replace

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.judging.verdict import error
from harness.report import Row, build
from harness.report.rows import UNKNOWN_CRITERION
from harness.report.text import conclusion_of
from harness.report.words import LANGUAGES
from harness.tests.needs import needs_torch_npu, skip_without_torch_npu
from harness.tests.test_plugin import CASE, stored, torch_npu_is_imported, user  # noqa: F401
from harness.upgrade.known_failures import complaint, entry_for, read_known, settled

ENTRY = """
[[known]]
case = "small"
dtype = "float32"
reason = "the kernel drops the tail"
link = "https://example.org/88"
expires = 2999-12-31
"""
TODAY = datetime.date(2026, 11, 25)


@pytest.fixture
def entries(tmp_path):
    def read(text):
        path = tmp_path / "known_failures.toml"
        path.write_text(text)
        return read_known(path)

    return read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[known]", "is not TOML"),
        ("other = 1", "holds 'other'; what is known there is known"),
        ("known = 3", "holds int as `known` where a list was expected"),
        (ENTRY.replace('case = "small"', ""), "entry 1 has None as its case where text was expected"),
        (ENTRY.replace('reason = "the kernel drops the tail"', 'reason = " "'), "has ' ' as its reason"),
        (
            ENTRY.replace("https://example.org/88", "somewhere"),
            "has the link 'somewhere' where an address was expected",
        ),
        (ENTRY.replace("2999-12-31", '"2999-12-31"'), "as the day it expires where a date was expected"),
        (ENTRY.replace("expires = 2999-12-31", ""), "has None as the day it expires"),
        (ENTRY + "until = 3\n", "holds 'until'"),
        (ENTRY + 'seeds = ["one"]\n', "as its seeds where a list of numbers was expected"),
        (ENTRY + "criteria = 1\n", "as its criteria where a list of names was expected"),
        (ENTRY + ENTRY, "small float32 is there twice; keep one"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_with_its_reason(entries, text, words):
    with pytest.raises(HarnessError) as refused:
        entries(text)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_an_entry_speaks_of_the_rows_that_it_names(entries):
    result = entries(
        ENTRY
        + "seeds = [42]\ndevice = 'Ascend910B4 (npu)'\n"
        + ENTRY.replace('dtype = "float32"\n', "").replace("the kernel", "another")
    )
    device = "Ascend910B4 (npu)"
    assert entry_for(result, "small", "float32", 42, device) is result[0]  # the one that says more
    assert entry_for(result, "small", "float32", 43, device) is result[1]
    assert entry_for(result, "small", "float16", 42, "Ascend910B4 (emulated)") is result[1]
    assert entry_for(result, "smaller", "float32", 42, device) is None


def failing(*criteria, error=1e-2, **more):
    """A row that fails by these, with this relative L2 error."""
    given = dict(
        test="t",
        case="small",
        dtype="float32",
        seed=1,
        rel_l2=error,
        golden_rel_l2=error,
        reasons=criteria,
        criteria=criteria,
    )
    return Row(**given | more)


def said(entry, row, *, accepted=None, today=TODAY):
    return complaint(entry, row, accepted=accepted, today=today)


def test_an_entry_excuses_until_its_day_and_by_its_criteria_alone(entries):
    (entry,) = entries(ENTRY.replace("2999-12-31", "2026-11-25") + "criteria = ['max_diff', 'cos_sim']\n")
    assert said(entry, failing("max_diff")) is None
    assert "expired on 2026-11-25; mend it" in said(
        entry, failing("max_diff"), today=TODAY + datetime.timedelta(days=1)
    )
    assert "this one fails by finite as well" in said(entry, failing("max_diff", "finite"))
    assert said(entry, failing()).startswith(
        "UNEXPECTED PASS of the known failure small float32 (the kernel drops the tail; https://example.org/88)"
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (failing("max_diff", "cos_sim"), None),
        (failing("forecast_ratio", error=2.0), None),
        (failing("forecast_ratio", error=2.01), "excuses a relative L2 error of up to 2, and this one has 2.01"),
        (failing("rel_l2", error=99.0), "excuses a relative L2 error of up to 2, and this one has 99"),
        (failing("rel_l2", error=math.nan), "excuses a relative L2 error of up to 2, and this one has nan"),
        (
            failing("finite", "max_diff", error=math.nan),
            (
                "fails by finite as well: mend it, or review the entry and name what it may fail by, criteria = "
                '["finite", "max_diff"]'
            ),
        ),
        (failing("shape"), "fails by shape as well"),
        (failing("fallback", error=0.0), "fails by fallback as well"),
        (
            failing("run", rel_l2=None, golden_rel_l2=None),
            'fails by run as well: mend it, or review the entry and name what it may fail by, criteria = ["run"]',
        ),
        (failing("equal"), "fails by equal as well"),
    ],
)
def test_without_criteria_and_accepted_numbers_an_entry_excuses_numbers_alone(entries, row, words):
    (entry,) = entries(ENTRY)
    result = said(entry, row)
    assert result is None if words is None else words in result
    after = settled(entry, row, accepted=None, today=TODAY)
    assert (Mark.KNOWN in after.marks) == (words is None) and (after.criteria[:1] == ("known",)) == (words is not None)


def test_an_entry_that_gives_its_error_excuses_half_as_much_again(entries):
    (entry,) = entries(ENTRY + "error = 1e-2\n")
    assert said(entry, failing("rel_l2", error=1.5e-2)) is None
    assert "excuses a relative L2 error of up to 0.015, and this one has 0.0151" in said(
        entry, failing("rel_l2", error=1.51e-2)
    )
    (entry,) = entries(ENTRY + 'error = 10\ncriteria = ["finite"]\n')
    assert said(entry, failing("finite", error=15.0)) is None and said(entry, failing("finite", error=15.1)) is not None
    for text in ('"much"', "-1", "nan", "inf", "true"):
        with pytest.raises(HarnessError, match="as its error where a relative L2 error such as 1.2e-2 was expected"):
            entries(ENTRY + f"error = {text}\n")


def test_with_accepted_numbers_an_entry_excuses_what_was_accepted(entries):
    """How large the error may be is then the baseline's to say: a regression is no known failure."""
    (entry,) = entries(ENTRY)
    assert said(entry, failing("max_diff", error=50.0), accepted=failing("rel_l2", error=50.0)) is None
    assert said(entry, failing("shape"), accepted=failing("shape")) is None
    assert "fails by finite as well" in said(entry, failing("max_diff", "finite"), accepted=failing("max_diff"))
    assert "fails by run as well" in said(
        entry, failing("run", rel_l2=None, golden_rel_l2=None), accepted=failing("max_diff")
    )
    assert "fails by max_diff as well" in said(entry, failing("max_diff"), accepted=failing("fallback"))
    for accepted in (failing(), failing(UNKNOWN_CRITERION)):  # it passed then, or an older version kept no criteria
        assert (
            said(entry, failing("max_diff"), accepted=accepted) is None
            and said(entry, failing("finite"), accepted=accepted) is not None
        )


# -------- as a user lives it

MODEL = (
    CASE
    + """
import os
TWO = [case(name=name, tolerance=Tolerance(preset="card")) for name in ("small", "other")]

@pytest.mark.parametrize("each", TWO, ids=lambda each: each.name)
@pytest.mark.parametrize("seed", [1, 2, 3], ids=lambda seed: f"seed{seed}")
def test_precision(precision, plant_fault, each, seed):
    if each.name == "small" and os.environ.get("BROKEN"):
        plant_fault("aclnnAddmm", **json_of(os.environ["BROKEN"]))
    precision(each, seed)

def json_of(text):
    import json
    return json.loads(text)
"""
)
BROKEN = json.dumps({"kind": "scale", "by": 1.5})


@pytest.fixture
def session(user, monkeypatch):
    """Runs pytest on a model whose `small` is broken, with known failures as given."""
    skip_without_torch_npu()
    user.makepyfile(test_model=MODEL)
    monkeypatch.setenv("BROKEN", BROKEN)
    folder = user.path / "cases"
    folder.mkdir()

    def run(known, *more):
        (folder / "known_failures.toml").write_text(known)
        result = user.runpytest_inprocess("--device", "emulated", *more)
        rows = stored(user)["rows"] if result.ret in (0, 1) else []
        return result, {(row["case"], row["seed"]): row for row in rows}

    return run


def test_a_known_failure_is_shown_and_does_not_fail(user, session):
    result, rows = session(ENTRY)
    assert result.ret == 0
    result.assert_outcomes(passed=3, xfailed=3)
    assert (
        rows["small", 1]["status"] == "FAIL"
        and "KNOWN FAILURE" in rows["small", 1]["marks"]
        and rows["small", 1]["reasons"]
    )
    assert rows["small", 1]["known"] == {
        "reason": "the kernel drops the tail",
        "link": "https://example.org/88",
        "expires": "2999-12-31",
    }
    assert rows["other", 1]["status"] == "PASS" and rows["other", 1]["known"] is None
    assert stored(user)["headline"] | {"NEW": 0} == {
        "PASS": 3,
        "FAIL": 3,
        "REGRESSED": 0,
        "ERROR": 0,
        "SKIPPED": 0,
        "NEW": 0,
        "KNOWN FAILURE": 3,
    }
    text = (user.path / "reports" / "precision.md").read_text()
    assert (
        "## Known failures" in text and "the kernel drops the tail (https://example.org/88), until 2999-12-31" in text
    )
    assert "Rows that did not pass" not in text and "Rows that fail as known: 3." in text
    result, _ = session(ENTRY, "-n", "2")
    assert result.ret == 0
    result.assert_outcomes(passed=3, xfailed=3)


def test_a_known_failure_that_expired_passes_or_fails_otherwise_is_a_failure(session, monkeypatch):
    result, rows = session(ENTRY.replace("2999", "2020"))
    assert result.ret == 1
    result.assert_outcomes(passed=3, failed=3)
    assert "expired on 2020-12-31" in rows["small", 1]["reasons"][0] and rows["small", 1]["criteria"][0] == "known"
    result, rows = session(ENTRY + 'criteria = ["cos_sim"]\n')
    assert result.ret == 1 and "this one fails by max_diff as well" in rows["small", 1]["reasons"][0]
    monkeypatch.delenv("BROKEN")
    result, rows = session(ENTRY)
    assert (
        result.ret == 1 and rows["small", 1]["status"] == "FAIL" and "UNEXPECTED PASS" in rows["small", 1]["reasons"][0]
    )
    result, rows = session(ENTRY + "seeds = [7]\n")
    assert result.ret == 0 and "1 known failures are no rows of this run: small float32 seed 7" in result.stdout.str()


def test_a_report_of_known_failures_alone_says_that_they_were_compared():
    expected = torch.ones(2, 2)
    failed = judge(compare(expected + 1, expected), Tolerance(max_diff=0.1))
    known = Row.of(replace(failed, marks=(Mark.KNOWN,)), test="t", case="c", dtype="float32", seed=1)
    for lang, words in (("en", "Rows that fail as known: 1."), ("zh", "1 行")):
        text = conclusion_of(build([known], stack={}, backend="npu"), LANGUAGES[lang])
        assert words in text and LANGUAGES[lang]["nothing"] not in text
    dead = Row.of(replace(error("gone"), marks=(Mark.KNOWN,)), test="t", case="c", dtype="float32", seed=1)
    assert "Nothing was compared." in conclusion_of(build([dead], stack={}, backend="npu"), LANGUAGES["en"])


def test_an_entry_that_does_not_excuse_a_row_says_why(session):
    entry = ENTRY.replace('dtype = "float32"', 'dtype = "float16"')
    result, _ = session(entry, "--locate=off")
    words = (
        "small float32 seed 1: the known failure small float16 (https://example.org/88) does not excuse it: its dtype"
    )
    assert result.ret == 1 and f"{words} is float16 and the row's is float32" in result.stdout.str()
    result, _ = session(ENTRY, "--baseline=require", "--locate=off")
    assert result.ret == 1 and "does not excuse it: nothing was accepted for the row" in result.stdout.str()
    result, _ = session(ENTRY + "seeds = [7]\n", "-k", "precision and other")  # the others are not selected
    assert result.ret == 0 and "are no rows of this run" not in result.stdout.str()


def test_an_error_can_be_known_too(session, monkeypatch):
    monkeypatch.setenv("BROKEN", json.dumps({"kind": "error"}))
    result, rows = session("")
    assert result.ret == 1 and rows["small", 1]["status"] == "ERROR"
    result, rows = session(ENTRY)  # which excuses numbers
    assert (
        result.ret == 1 and rows["small", 1]["status"] == "ERROR" and "KNOWN FAILURE" not in rows["small", 1]["marks"]
    )
    assert "this one fails by run as well" in rows["small", 1]["reasons"][-1]
    result, rows = session(ENTRY + 'criteria = ["run"]\n')
    assert result.ret == 0 and rows["small", 1]["status"] == "ERROR" and "KNOWN FAILURE" in rows["small", 1]["marks"]


def test_a_known_failure_is_accepted_and_must_not_become_worse(user, session, monkeypatch):
    result, _ = session("", "--baseline=accept")
    assert result.ret == 1 and "small float32 is not accepted: 3 of its rows did not pass" in result.stdout.str()
    assert (
        session(ENTRY, "--baseline=accept")[0].ret == 0
        and (user.path / "cases" / "baselines" / "small-float32.json").exists()
    )
    result, rows = session(ENTRY)
    assert result.ret == 0 and rows["small", 1]["marks"] == ["IDENTICAL", "KNOWN FAILURE"]
    monkeypatch.setenv("BROKEN", json.dumps({"kind": "scale", "by": 2.5}))
    result, rows = session(ENTRY)
    assert result.ret == 1 and "KNOWN FAILURE" not in rows["small", 1]["marks"]
    assert any("REGRESSED" in reason for reason in rows["small", 1]["reasons"])


def test_a_file_that_cannot_be_read_stops_the_session(session):
    result, _ = session("[[known]")
    assert (
        result.ret == pytest.ExitCode.USAGE_ERROR
        and "--precision-known-failures: " in result.stderr.str()
        and "is not TOML" in result.stderr.str()
    )
    result, _ = session("", "--known-failures", "nowhere.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "no known failures at nowhere.toml" in result.stderr.str()


@needs_torch_npu
def test_a_known_failure_does_not_hide_the_next_row_of_its_test(user):
    (user.path / "cases").mkdir()
    (user.path / "cases" / "known_failures.toml").write_text(ENTRY)
    user.makepyfile(
        test_model=CASE
        + """
def test_precision(precision):
    precision(case(name="small", tolerance=Tolerance(max_diff=0.0)), 1)
    precision(case(name="other", tolerance=Tolerance(max_diff=0.0)), 1)
"""
    )
    result = user.runpytest_inprocess("--device", "emulated")
    rows = {row["case"]: row for row in stored(user)["rows"]}
    assert (
        result.ret == 1
        and set(rows) == {"small", "other"}
        and "KNOWN FAILURE" in rows["small"]["marks"]
        and rows["other"]["status"] == "FAIL"
    )
