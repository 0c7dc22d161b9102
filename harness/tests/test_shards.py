"""Parts of a run on several machines, and the one report that is made of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.commands.main import main
from harness.errors import HarnessError
from harness.judging.verdict import error
from harness.plugin.shards import parse_shard, parts
from harness.report import Row, build, load
from harness.report.content import NOT_RUN
from harness.report.merge import merge
from harness.tests.test_plugin import CASE, run, stored, torch_npu_is_imported, user, write  # noqa: F401

CASES = (
    CASE
    + """
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", [case(name) for name in "abcde"], ids=lambda case: case.name)
def test_precision(precision, case, seed):
    precision(case, seed)

def test_other(): pass
"""
)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", ""])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ValueError, match="where a part such as 1/4 was expected"):
        parse_shard(text)


def test_the_parts_are_about_equally_long_whole_and_the_same_each_time():
    groups = {f"g{n}": [f"g{n}-{seed}" for seed in range(3)] for n in range(20)}
    seconds = {f"g{n}-{seed}": 1.0 + n * n for n in range(20) for seed in range(3)}
    shares = parts(groups, seconds, 4)
    assert sorted(test for share in shares for test in share) == sorted(seconds)
    assert all(
        len({share for share, tests in enumerate(shares) if set(group) & set(tests)}) == 1 for group in groups.values()
    )
    totals = [sum(seconds[test] for test in share) for share in shares]
    assert max(totals) - min(totals) <= 0.1 * max(totals)
    assert shares == parts(dict(reversed(groups.items())), seconds, 4)
    assert parse_shard("2/4") == (2, 4)


def test_two_parts_make_the_report_of_a_whole_run(user):
    write(user, CASES)
    for part in ("1/2", "2/2"):
        result = run(user, "-k", "precision", "--shard", part, "--report", f"part{part[0]}")
        assert result.ret == 0
    first, second = (stored(user, directory=f"part{number}") for number in (1, 2))
    cases = [{row["case"] for row in report["rows"]} for report in (first, second)]
    assert cases[0] | cases[1] == set("abcde") and not cases[0] & cases[1] and min(map(len, cases)) == 2
    assert (first["shard"], second["shard"]) == ("1/2", "2/2")
    places = [str(user.path / f"part{number}") for number in (1, 2)]
    assert main(["merge", *places, "--output", str(user.path / "whole")]) == 0
    merged = load(user.path / "whole")
    assert merged.shard is None and sorted({row.case for row in merged.rows}) == list("abcde")
    assert merged.rows == load(user.path / "part1").rows + load(user.path / "part2").rows
    assert "10 PASS" in (user.path / "whole" / "precision.md").read_text()


def test_a_bad_part_is_a_usage_error_before_any_test(user):
    write(user, CASES)
    result = run(user, "-k", "precision", "--shard", "3/2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "1/4 was expected" in result.stderr.str()
    result = run(user, "-k", "precision", "--shard", "1/2", "--shard-times", "nowhere.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "no report at" in result.stderr.str()


def a_report(*cases, shard=None, text="why", **stack):
    rows = [Row.of(error(text), test=f"t::{case}", case=case, dtype="float32", seed=1) for case in cases]
    return build(rows, stack={"device": "some", "card": cases[0]} | stack, backend="npu", shard=shard)


@pytest.mark.parametrize(
    "reports, words",
    [
        ((a_report("a"), a_report("b", "a")), "a float32 1 in more than one report"),
        ((a_report("a"), a_report("b", text=NOT_RUN)), "b float32 seed 1 did not run"),
        (
            (a_report("a"), a_report("b", torch="2.9")),
            "on another stack than 0: torch None and 2.9; --different-stacks",
        ),
        ((a_report("a", shard="1/3"), a_report("b", shard="3/3")), "the part 2/3 of the run is missing"),
        ((a_report("a", shard="1/2"), a_report("b", shard="1/2")), "the part 1/2 is there more than once"),
        ((a_report("a", shard="1/2"), a_report("b", shard="2/3")), "are of different runs"),
        ((a_report("a", shard="1/1"), a_report("b")), "1 is of no part of a run"),
    ],
    ids=["twice", "hole", "stack", "missing", "again", "runs", "no part"],
)
def test_what_makes_no_whole_report_is_refused(reports, words):
    with pytest.raises(HarnessError, match=words):
        merge({Path(str(number)): report for number, report in enumerate(reports)})


def test_other_cards_and_allowed_stacks_are_merged():
    reports = {Path("0"): a_report("a", shard="2/2"), Path("1"): a_report("b", shard="1/2")}
    assert [row.case for row in merge(reports).rows] == ["a", "b"]
    reports[Path("1")] = replace(reports[Path("1")], stack={"device": "other"})
    assert [row.case for row in merge(reports, different_stacks=True).rows] == ["a", "b"]


def test_an_older_report_has_no_part(tmp_path):
    stored = a_report("a").to_dict()
    assert "shard" not in stored
    (tmp_path / "precision.json").write_text(json.dumps(stored))
    assert load(tmp_path).shard is None
