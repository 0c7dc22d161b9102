"""The history of several reports in the HTML: what is drawn is what the reports say."""

import json
import math
import re
from dataclasses import replace

import pytest

from harness.commands.main import main
from harness.judging.verdict import error
from harness.report import build, write
from harness.report.history import (
    CHART_HEIGHT,
    CHART_WIDTH,
    CHARTED,
    EDGE,
    LEAST_SPAN,
    MOST,
    Snapshot,
    history_section,
    sparkline,
)
from harness.report.words import LANGUAGES
from harness.tests.test_report import STACK, row_of, verdict

VERSIONS = ({"cann": "8.2", "torch_npu": "2.7.1"}, {"cann": "8.5", "torch_npu": "2.9.0"})


def row(rel_l2, case="mine", seed=1, **more):
    return replace(row_of(verdict(1e-3), case=case, seed=seed), rel_l2=rel_l2, cos_distance=rel_l2**2, **more)


FAILS = {"reasons": ("it is too large",), "criteria": ("rel_l2",)}


def report(day, *rows, versions=VERSIONS[0], backend="npu", **stack):
    made = build(rows, stack=STACK | versions | stack, backend=backend)
    return replace(made, created=f"2026-11-{day:02d}T08:00:00+00:00")


def snapshots(*reports):
    return [Snapshot.of(item) for item in reports]


def chart_of(history, key=("mine", "float32"), metric="rel_l2"):
    return sparkline(metric, [snapshot.points.get(key) for snapshot in history], history)


def circles(svg):
    """(x, y, title, whether it fails) of the points of a chart."""
    found = re.findall(r'<circle( class="bad")? r="\d" cx="([\d.]+)" cy="([\d.]+)"><title>(.*?)</title>', svg)
    return sorted((float(x), float(y), title, bool(kind)) for kind, x, y, title in found)


def test_the_points_are_the_largest_values_of_the_reports():
    errors = [(1e-4, 3e-4), (2e-4, 1e-4), (3e-2, 1e-3)]
    history = snapshots(*(report(day, *(row(e, seed=n) for n, e in enumerate(es))) for day, es in enumerate(errors, 1)))
    for metric, power in zip(CHARTED, (1, 2)):
        points, largest = circles(chart_of(history, metric=metric)), [max(es) ** power for es in errors]
        assert [point[0] for point in points] == [EDGE, CHART_WIDTH / 2, CHART_WIDTH - EDGE]
        assert [re.search(rf"{metric} (\S+), PASS", point[2])[1] for point in points] == [f"{e:.2e}" for e in largest]
        least, most = math.log(min(largest)), math.log(max(largest))
        for (_, y, _, _), value in zip(points, largest):
            share = (math.log(value) - least) / (most - least)
            assert y == pytest.approx(CHART_HEIGHT - EDGE - share * (CHART_HEIGHT - 2 * EDGE), abs=0.06)


@pytest.mark.parametrize(("factor", "fills"), [(LEAST_SPAN * 1.001, True), (LEAST_SPAN * 0.99, False)])
def test_a_small_change_looks_small(factor, fills):
    history = snapshots(report(1, row(1e-4)), report(2, row(factor * 1e-4)))
    heights = [point[1] for point in circles(chart_of(history))]
    assert (heights == [CHART_HEIGHT - EDGE, EDGE]) is fills


def test_a_row_that_is_missing_leaves_a_gap():
    there, away = row(1e-4), row(1e-4, case="other")
    history = snapshots(report(1, there), report(2, there), report(3, away), report(4, there), report(5, there))
    svg = chart_of(history)
    lines = [line.split() for line in re.findall(r'<polyline points="(.*?)"', svg)]
    assert list(map(len, lines)) == [2, 2] and len(circles(svg)) == 4
    assert len(circles(chart_of(history, key=("other", "float32")))) == 1


def test_a_row_that_could_not_be_compared_has_no_point_and_one_that_is_not_finite_stands_at_the_top():
    rows = [(row(1e-4),), (row_of(error("gone"), case="mine"),), (row(math.nan, **FAILS),), (row(0.0),)]
    history = snapshots(*(report(day, *several) for day, several in enumerate(rows, 1)))
    points = circles(chart_of(history))
    assert [point[1] for point in points] == [CHART_HEIGHT / 2, EDGE, CHART_HEIGHT - EDGE]
    assert "rel_l2 nan, FAIL" in points[1][2] and points[1][3]


def test_failing_points_and_new_versions_are_seen():
    bad = row(4e-4, seed=2, **FAILS)
    history = snapshots(report(1, row(1e-4)), report(2, row(1e-4)), report(3, row(1e-4), bad, versions=VERSIONS[1]))
    svg = chart_of(history)
    assert [point[3] for point in circles(svg)] == [False, False, True]
    assert "FAIL; cann 8.5, torch_npu 2.9.0" in circles(svg)[2][2]
    changes = re.findall(r"<line .*?<title>(.*?)</title>", svg)
    assert changes == ["cann 8.2, torch_npu 2.7.1, torch 2.13.0 → cann 8.5, torch_npu 2.9.0, torch 2.13.0"]


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_page_of_a_report_has_its_history(tmp_path, capsys, lang):
    """In the order in which they were made, whatever the order in which they are named; the report is in it once."""
    made = [report(day, row(1e-4 * day), row(1e-3, case="<b>&", **FAILS), driver=f"<i>{day}") for day in (1, 2, 3)]
    folders = [tmp_path / str(number) for number in range(3)]
    for folder, item in zip(folders, made):
        write(item, folder)
    newest = folders[2] / "precision.json"
    given = [str(path) for path in (folders[1], folders[2], folders[0] / "precision.json")]
    output = tmp_path / "page.html"
    assert main(["report", str(newest), "--lang", lang, "--output", str(output), "--history", *given]) == 0
    page = output.read_text(encoding="utf-8")
    assert f"<h2>{LANGUAGES[lang]['history']}</h2>" in page and "<b>" not in page and "<i>" not in page
    days = re.findall(r"<tr><td>(\d)</td><td>2026-11-(\d\d)T", page)
    assert days == [("1", "01"), ("2", "02"), ("3", "03")]
    table = page[page.index('id="history"') :].partition("</table>")[0]
    lines = re.findall(r"<tr><td>.*?</tr>", table)
    assert len(lines) == 2 and lines[0].startswith("<tr><td>&lt;b&gt;&amp;</td>")  # what fails comes first
    titles = [title for _, _, title, _ in circles(lines[1]) if "rel_l2" in title]
    assert [title[:18] for title in titles] == [f"{day}: rel_l2 {day}.00e-04" for day in (1, 2, 3)]
    assert " style=" not in page  # which the policy of the page would not apply


def test_a_page_shows_what_fails_and_what_changed_of_many_cases():
    names = [f"case {number}" for number in range(MOST + 50)]
    old = [row(1e-4, case=name) for name in names]
    new = [row(1e-4, case=name) for name in names]
    new[-1], new[-2] = row(2e-4, case=names[-1]), row(1e-4, case=names[-2], **FAILS)
    section = history_section(snapshots(report(1, *old), report(2, *new)), LANGUAGES["en"])
    lines = re.findall(r"<tr><td>(case \d+)</td>", section)
    assert len(lines) == MOST and lines[:3] == [names[-2], names[-1], names[0]]
    assert f"{MOST} of {MOST + 50} are shown." in section


def test_a_history_that_cannot_be_drawn_is_refused_in_one_line(tmp_path, capsys):
    reports = {"new": report(3, row(1e-4)), "card": report(1, row(1e-4), device="Ascend910B2")}
    reports["emulated"] = report(1, row(1e-4), backend="emulated")
    for name, item in reports.items():
        write(item, tmp_path / name)
    (tmp_path / "damaged.json").write_text(json.dumps({"schema": "precision-report/9"}))
    refused = {
        "card": "was measured on Ascend910B2 (npu) and the report on Ascend910B4 (npu)",
        "emulated": "was measured on Ascend910B4 (emulated)",
        "damaged.json": "has schema 'precision-report/9'",
        "absent.json": "no report at",
    }
    for name, words in refused.items():
        command = ["report", str(tmp_path / "new"), "--output", str(tmp_path / "page.html"), "--history"]
        assert main([*command, str(tmp_path / name)]) == 1
        told = capsys.readouterr().err
        assert words in told and name in told and len(told.splitlines()) == 1
        assert not (tmp_path / "page.html").exists()
    assert main(["report", str(tmp_path / "new"), "--history", str(tmp_path / "new")]) == 1
    assert "add --output report.html" in capsys.readouterr().err
