"""The report: full numbers in the JSON, honest words in the markdown, whole files or none."""

import datetime
import json
import math
from dataclasses import replace

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.judging.verdict import Evidence, error, skipped
from harness.report import Row, build, load, render, rerender, row, write
from harness.report.content import NOT_RUN
from harness.report.document import Table, Text, to_markdown
from harness.report.rows import Excuse

STACK = {
    "device": "Ascend910B4",
    "torch": "2.13.0",
    "conv_allow_hf32": True,
    "driver": None,
    "environment": {"TASK_QUEUE_ENABLE": "1"},
}


def verdict(change=0.0, limit=1e-2, **more):
    expected = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    actual = expected.clone()
    actual[0, 3, 4] += change
    return judge(compare(actual, expected), Tolerance(max_diff=limit, reason="because"), **more)


def row_of(verdict, seed=42, **more):
    given = {
        "test": f"cases/test_x.py::test_x[float32-seed{seed}]",
        "case": "x-large",
        "dtype": "float32",
        "seed": seed,
    }
    return row(**(given | more), verdict=verdict)


def report(*rows, backend="emulated", performance=()):
    return build(rows, stack=STACK, backend=backend, performance=performance)


def test_json_keeps_every_digit_and_no_nan_literal(tmp_path):
    found = verdict(1.0)
    stored = report(row_of(found), row_of(verdict(math.nan), seed=1), row_of(verdict(math.inf), seed=2))
    path, _ = write(stored, tmp_path)
    text = path.read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"literal {name}"))
    rows = load(path).rows
    assert rows[0].max_diff == found.comparison.max_diff
    assert rows[0].cos_sim == found.comparison.cos_sim
    assert math.isnan(rows[1].max_diff) and rows[2].max_diff == math.inf
    assert [each["max_diff"] for each in json.loads(text)["rows"][1:]] == ["nan", "inf"]
    assert rows[0].worst_index == (0, 3, 4)


def test_headline_counts_what_the_rows_say():
    stored = report(
        row_of(verdict()),
        row_of(verdict(1.0), seed=1),
        row_of(error("crashed"), seed=2),
        row_of(skipped("why"), seed=3),
    )
    assert stored.headline == {"PASS": 1, "FAIL": 1, "REGRESSED": 0, "ERROR": 1, "SKIPPED": 1, "NEW": 0}
    assert stored.to_dict()["schema"] == "precision-report/1"


def test_markdown_of_an_emulated_run_starts_by_saying_so():
    text = render(report(row_of(verdict())))
    assert text.splitlines()[0].startswith("**EMULATED")
    assert "nothing about hardware" in text.splitlines()[0]
    assert "EMULATED" not in render(report(row_of(verdict()), backend="npu"))


def test_a_stored_row_without_a_cosine_beside_one_that_has_it_is_shown():
    stored = [row_of(verdict(1e-3 * seed), seed=seed).to_dict() for seed in (1, 2, 3)]
    least = min(each["cos_sim"] for each in stored[1:])
    stored[0]["cos_sim"] = None
    assert f"{least:.9f}" in render(report(*map(Row.from_dict, stored))).splitlines()[-3]
    for each in stored:
        each["cos_sim"] = None
    assert all(render(report(*map(Row.from_dict, stored)), lang=lang) for lang in ("en", "zh"))


def test_markdown_holds_the_columns_of_a_model_card():
    text = render(report(row_of(verdict(1e-3)), row_of(verdict(5.0), seed=123)))
    header = next(line for line in text.splitlines() if "max_diff" in line and line.startswith("|"))
    assert [cell.strip() for cell in header.strip("|").split("|")][:4] == ["seed", "max_diff", "mean_diff", "cos_sim"]
    passed, failed = (
        next(line for line in text.splitlines() if line.startswith("|") and f" {seed} |" in line) for seed in (42, 123)
    )
    assert "✅ PASS" in passed and "1.00e-03" in passed
    assert "❌ FAIL" in failed
    assert "max_diff 5.00e+00 at (0, 3, 4) (up to 1.00e-02 allowed)" in text
    assert "Limits: max_diff ≤ 1.00e-02. because" in text
    assert "1 of 2 rows did not pass" in text


def test_a_report_without_failures_concludes_with_the_worst_numbers():
    text = render(report(row_of(verdict(1e-3)), row_of(verdict(2e-3), seed=1)))
    worst = verdict(2e-3).comparison.rel_l2
    assert f"All 2 rows pass on Ascend910B4: largest rel_l2 {worst:.2e}" in text


def test_weights_are_named_in_words():
    def evidence(weights):
        digests = dict.fromkeys(("inputs_sha256", "expected_sha256", "actual_sha256"), "0")
        return Evidence(weights=weights, reference="CPU float32", expected_ms=1.0, actual_ms=1.0, **digests)

    from dataclasses import replace

    seeded = render(report(row_of(replace(verdict(), evidence=evidence("seeded:7")))))
    assert "random, seed 7; no checkpoint was given" in seeded
    assert "Reference: CPU float32." in seeded
    assert "checkpoint, sha256 abc." in render(report(row_of(replace(verdict(), evidence=evidence("abc")))))


def test_performance_table_and_its_caveat():
    timing = {
        "case": "x",
        "dtype": "float32",
        "batch_size": 1,
        "device": "cpu",
        "n": 20,
        "warmup": 3,
        "avg_ms": 10.0,
        "p50_ms": 9.0,
        "p99_ms": None,
    }
    text = render(report(row_of(verdict()), performance=[timing]))
    assert "| x " in text and " – |" in text
    assert "times say nothing about hardware" in text
    assert "times say nothing" not in render(report(row_of(verdict()), performance=[timing], backend="npu"))


def test_chinese_report_has_the_same_numbers():
    stored = report(row_of(verdict(1e-3)))
    chinese = render(stored, lang="zh")
    assert chinese.startswith("**EMULATED") and "精度评测" in chinese and "1.00e-03" in chinese
    assert "Accuracy" not in chinese


def test_html_escapes_and_keeps_long_cells(tmp_path):
    stored = report(row_of(error("<script>alert(1)</script> " + "x" * 80), case="<b>case</b>"))
    write(stored, tmp_path)
    assert rerender(tmp_path / "precision.json", output=tmp_path / "page.html") is None
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "<b>case" not in page
    assert "x" * 80 in page


def test_cells_cannot_break_the_table():
    text = to_markdown([Table(columns=("a|b", "c"), rows=(("1|2\n3", "*x*"),)), Text(text="a `b` <c>")])
    assert "1\\|2 3" in text and "\\*x\\*" in text and "&lt;c>" in text
    assert len(text.splitlines()) == 5


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    write(report(row_of(verdict())), tmp_path)
    before = (tmp_path / "precision.json").read_text()
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(report(row_of(verdict()), row_of(verdict(), seed=1)), tmp_path)
    assert (tmp_path / "precision.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["precision.json", "precision.md"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json", "it is not JSON"),
        ("[]", "schema None"),
        ('{"schema": "precision-report/9"}', "'precision-report/9'"),
        ('{"schema": "precision-report/1"}', "lacks backend, created, headline"),
    ],
    ids=["text", "list", "newer", "empty"],
)
def test_a_file_that_is_no_report_is_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "precision.json"
    path.write_text(content)
    with pytest.raises(HarnessError, match=words):
        load(path)
    with pytest.raises(HarnessError, match="no report at"):
        load(tmp_path / "absent.json")


# -------- the outcome in one word


@pytest.mark.parametrize(
    "rows, word",
    [
        ((), "nothing measured"),
        (("SKIPPED",), "nothing measured"),
        (("PASS", "SKIPPED"), "passed"),
        (("KNOWN", "PASS"), "passed"),
        (("PASS", "lost"), "infrastructure"),
        (("gone", "PASS"), "infrastructure"),
        (("crashed", "PASS"), "infrastructure"),
        (("REGRESSED", "lost"), "regressions"),
        (("REGRESSED", "FAIL", "lost"), "failures"),
        (("ERROR", "PASS"), "failures"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "none",
)
def test_the_outcome_is_the_gravest_thing_that_is_true(tmp_path, rows, word):
    base = Row.of(error("why"), test="t", case="c", dtype="float32", seed=1)
    known = Excuse(reason="r", link="l", expires=datetime.date(2030, 1, 1))
    made = {
        "PASS": dict(criteria=(), reasons=(), rel_l2=0.1),
        "FAIL": dict(criteria=("rel_l2",), rel_l2=0.1),
        "REGRESSED": dict(criteria=("baseline",), rel_l2=0.1),
        "SKIPPED": dict(criteria=("skip",)),
        "ERROR": {},
        "KNOWN": dict(criteria=("rel_l2",), rel_l2=0.1, marks=(Mark.KNOWN,), known=known),
        "lost": dict(reasons=(NOT_RUN,)),
        "gone": dict(reasons=("DeviceError: the device stopped computing at c float32 seed 1: 507035; restart it",)),
        "crashed": dict(marks=(Mark.CRASHED,)),
    }
    report = build([replace(base, seed=n, **made[each]) for n, each in enumerate(rows)], stack={}, backend="cpu")
    assert report.outcome == word
    write(report, tmp_path)
    assert json.loads((tmp_path / "precision.json").read_text())["outcome"] == word
    assert load(tmp_path).outcome == word
