"""How the errors of each case went over several reports, as small charts in a page: drawn as SVG, without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from harness.errors import HarnessError
from harness.judging.status import GRAVEST, Status
from harness.report.browser import in_html
from harness.report.content import device_key
from harness.report.format import NO_VALUE, difference_text, tally
from harness.typed_json import shown

if TYPE_CHECKING:
    from harness.report.content import Report
    from harness.report.rows import Row

MOST = 200  # cases that a page shows: those that fail, then those that changed most
CHART_WIDTH, CHART_HEIGHT, EDGE = 240, 48, 6  # of a chart, in pixels
LEAST_SPAN = 1.5  # largest over smallest value of an axis, at least
MOST_NUMBERS = 10  # on an axis
CHARTED = ("rel_l2", "cos_distance")  # of a row, that are followed
VERSIONS = ("cann", "torch_npu", "torch", "driver")  # of a stack, that tell two reports apart

CaseKey = tuple[str, str]  # case and dtype


@dataclass(frozen=True, kw_only=True)
class ChartPoint:
    """One case in one dtype in one report: the largest of each metric over its rows, and the gravest status."""

    values: Mapping[str, float]  # by metric; one that no row has is left out, one that a row has as NaN is NaN
    status: Status

    @property
    def failed(self) -> bool:
        return not self.status.is_fine

    def text(self, metric: str) -> str:
        """Such as "1.73e-03", "nan", or "–" where there is no such value."""
        return difference_text(self.values[metric]) if metric in self.values else NO_VALUE


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a history needs of a report."""

    created: str
    device: str  # "Ascend910B4 (npu)"
    versions: Mapping[str, str]
    counts: str  # "18 PASS, 2 FAIL"
    points: Mapping[CaseKey, ChartPoint]

    @classmethod
    def of(cls, report: Report) -> Snapshot:
        rows: dict[CaseKey, list[Row]] = {}
        for row in report.rows:
            rows.setdefault((row.case, row.dtype or NO_VALUE), []).append(row)
        return cls(
            created=report.created,
            device=device_key(report.stack, report.backend),
            versions={name: str(report.stack[name]) for name in VERSIONS if report.stack.get(name)},
            counts=tally(report.rows),
            points={key: _point(several) for key, several in rows.items()},
        )

    @property
    def label(self) -> str:
        """The versions on one line: "cann 8.5.1, torch_npu 2.9.0"."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items()) or NO_VALUE


def _point(rows: Sequence[Row]) -> ChartPoint:
    values = {}
    for metric in CHARTED:
        there = [value for row in rows if (value := getattr(row, metric)) is not None]
        if there:
            values[metric] = math.nan if any(map(math.isnan, there)) else max(there)
    return ChartPoint(values=values, status=min((row.status for row in rows), key=GRAVEST.index))


def by_date(report: Snapshot, older: Mapping[str, Snapshot]) -> list[Snapshot]:
    """The report and those of its history, by name, in the order in which they were made.

    Raises: HarnessError where one was measured on another device or backend than the report.
    """
    for name, snapshot in older.items():
        if snapshot.device != report.device:
            raise HarnessError(
                f"--history: {name} was measured on {shown(snapshot.device)} and the report on "
                f"{shown(report.device)}; a history is of one kind of device: leave that report out"
            )
    return sorted([*older.values(), report], key=lambda snapshot: snapshot.created)


# -------- as HTML


def history_section(history: Sequence[Snapshot], words: Mapping[str, str]) -> str:
    """The reports, and a chart of each metric for each case and dtype."""
    keys = dict.fromkeys(key for snapshot in reversed(history) for key in snapshot.points)
    series = {key: [snapshot.points.get(key) for snapshot in history] for key in keys}
    chosen = sorted(series, key=lambda key: _interest(series[key]), reverse=True)[:MOST]
    intro = words["history_intro"]
    if len(chosen) < len(series):
        intro += words["between"] + words["history_some"].format(shown=len(chosen), total=len(series))
    texts = (words["case"], "dtype", words["result"])
    head = "".join(f"<th>{in_html(text)}</th>" for text in texts)
    head += "".join(f'<th>{metric}{_axis(history)}</th><th class="number">{words["newest"]}</th>' for metric in CHARTED)
    lines = "\n".join(_line(key, series[key], history) for key in chosen)
    return (
        f"<h2>{words['history']}</h2><p>{in_html(intro)}</p>{_reports(history, words)}"
        f'<div class="box"><table id="history"><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table></div>'
    )


def _interest(points: Sequence[ChartPoint | None]) -> tuple[bool, float]:
    """What a case is shown before others by: whether it fails in the newest report, and how much its error changed."""
    known = [point.values.get("rel_l2") for point in points if point is not None]
    errors = [math.log(error) for error in known if error is not None and 0 < error < math.inf]
    newest = points[-1]
    return newest is not None and newest.failed, max(errors) - min(errors) if errors else 0.0


def _reports(history: Sequence[Snapshot], words: Mapping[str, str]) -> str:
    """The reports by the numbers that stand on the axis."""
    columns = ("#", words["created"], *VERSIONS, words["result"])
    head = "".join(f"<th>{in_html(column)}</th>" for column in columns)
    lines = []
    for number, snapshot in enumerate(history, 1):
        versions = [snapshot.versions.get(name, NO_VALUE) for name in VERSIONS]
        cells = (str(number), snapshot.created, *versions, snapshot.counts or NO_VALUE)
        lines.append("<tr>" + "".join(f"<td>{in_html(cell)}</td>" for cell in cells) + "</tr>")
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _line(key: CaseKey, points: Sequence[ChartPoint | None], history: Sequence[Snapshot]) -> str:
    newest = points[-1]
    status = NO_VALUE if newest is None else newest.status.value
    cells = [f"<td>{in_html(key[0])}</td><td>{in_html(key[1])}</td>", f'<td class="status {status}">{status}</td>']
    for metric in CHARTED:
        now = NO_VALUE if newest is None else newest.text(metric)
        cells.append(f'<td>{sparkline(metric, points, history)}</td><td class="number">{now}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def sparkline(metric: str, points: Sequence[ChartPoint | None], history: Sequence[Snapshot]) -> str:
    """A metric of one case over the reports, on a logarithmic axis of its own, as SVG. A report without the row, or
    without the number, leaves a gap; a value that is not finite stands at the top, zero at the bottom.
    """
    values = [None if point is None else point.values.get(metric) for point in points]
    height = _scale([value for value in values if value is not None])
    at = [None if value is None else (_across(index, history), height(value)) for index, value in enumerate(values)]
    parts = [_changes(history)]
    for there, run in groupby(at, key=lambda place: place is not None):
        if there:
            line = " ".join(f"{place[0]:.1f},{place[1]:.1f}" for place in run if place is not None)
            parts.append(f'<polyline points="{line}"/>')
    for index, (place, point, snapshot) in enumerate(zip(at, points, history), 1):
        if place is not None and point is not None:
            kind = ' class="bad" r="4"' if point.failed else ' r="3"'
            text = f"{index}: {metric} {point.text(metric)}, {point.status}; {snapshot.label}; {snapshot.created}"
            circle = f'<circle{kind} cx="{place[0]:.1f}" cy="{place[1]:.1f}">'
            parts.append(f"{circle}<title>{in_html(text)}</title></circle>")
    size = f'width="{CHART_WIDTH}" height="{CHART_HEIGHT}"'
    return f'<svg class="chart" {size} role="img" aria-label="{metric}">{"".join(parts)}</svg>'


def _scale(values: Sequence[float]) -> Callable[[float], float]:
    """How far from the top a value is drawn, in pixels. The axis spans the values, and `LEAST_SPAN` at least, so that a
    change by chance looks as small as it is.
    """
    logs = [math.log(value) for value in values if 0 < value < math.inf]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    middle, half = (low + high) / 2, max(high - low, math.log(LEAST_SPAN)) / 2

    def height(value: float) -> float:
        if not value < math.inf:  # NaN too
            return EDGE
        share = (math.log(value) - middle) / half if value > 0 else -1.0
        return CHART_HEIGHT / 2 - share * (CHART_HEIGHT / 2 - EDGE)

    return height


def _across(index: int, history: Sequence[Snapshot]) -> float:
    """The horizontal place of a report, in pixels."""
    return EDGE + (CHART_WIDTH - 2 * EDGE) * index / max(len(history) - 1, 1)


def _changes(history: Sequence[Snapshot]) -> str:
    """A line before each report whose versions differ from those of the report before it."""
    lines = []
    for index, (before, after) in enumerate(zip(history, history[1:])):
        if before.versions != after.versions:
            x = (_across(index, history) + _across(index + 1, history)) / 2
            text = in_html(f"{before.label} → {after.label}")
            lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{CHART_HEIGHT}"><title>{text}</title></line>')
    return "".join(lines)


def _axis(history: Sequence[Snapshot]) -> str:
    """The numbers of the reports above the charts, as many as there is room for; their versions as tooltips."""
    step = math.ceil(len(history) / MOST_NUMBERS)
    numbers = []
    for index in range(0, len(history), step):
        text = f"{history[index].label}; {history[index].created}"
        place = f'x="{_across(index, history):.1f}" y="12" text-anchor="middle"'
        numbers.append(f"<text {place}>{index + 1}<title>{in_html(text)}</title></text>")
    return f'<svg class="axis" width="{CHART_WIDTH}" height="16" role="img">{"".join(numbers)}</svg>'
