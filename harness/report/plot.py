"""A picture of a history: the error of each case over the stacks that it was measured on. Needs matplotlib (the extra
`plot`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.report.content import Report
    from harness.report.rows import Row

_MOST = 24  # cases that a picture shows: those that changed most
_ACROSS = 4


@dataclass(frozen=True, kw_only=True)
class Point:
    """The errors of one case in one dtype in one report, over its seeds."""

    least: float
    mean: float  # geometric
    largest: float
    failed: bool  # whether a row did


def plot_history(reports: Sequence[Report], error_of: Callable[[Row], float], path: Path) -> None:
    """Draw each case and dtype over the reports, oldest first: the geometric mean of its seeds' errors, their range,
    and the rows that fail.

    `error_of(row)` is the error that is followed. The ending of `path` says the kind of picture: .png, .svg, .pdf.

    Raises: HarnessError without matplotlib, for an ending that it does not know, or where no case has an error in two
    reports.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise HarnessError(
            "--plot needs matplotlib, which is not installed: pip install 'npu-accuracy-harness[plot]'"
        ) from None
    if path.suffix.lstrip(".") not in pyplot.figure().canvas.get_supported_filetypes():
        raise HarnessError(f"--plot {path}: no picture ends in {path.suffix!r}; name a .png, .svg or .pdf")
    series = {
        name: points
        for name, points in _series(reports, error_of).items()
        if sum(point is not None for point in points) > 1
    }
    if not series:
        raise HarnessError("--plot: no case has an error in two of the reports, so there is nothing to draw")
    chosen = sorted(series, key=lambda name: -_spread(series[name]))[:_MOST]
    labels = _labels(reports)
    down = math.ceil(len(chosen) / _ACROSS)
    figure, axes = pyplot.subplots(
        down, _ACROSS, figsize=(4 * _ACROSS, 2.6 * down + 1), squeeze=False, layout="constrained"
    )
    selection = f"{len(chosen)} of {len(series)} cases, those that changed most: " if len(chosen) < len(series) else ""
    figure.suptitle(
        f"{selection}relative L2 error to float64 on {reports[-1].stack.get('device')} ({reports[-1].backend})"
    )
    for axis, name in zip(axes.flat, chosen):
        _draw(axis, name, series[name], labels)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close("all")


def _draw(axis: Any, name: tuple[str, str], points: list[Point | None], labels: list[str]) -> None:
    there = [(index, point) for index, point in enumerate(points) if point is not None]
    at, means = [index for index, _ in there], [point.mean for _, point in there]
    axis.fill_between(at, [point.least for _, point in there], [point.largest for _, point in there], alpha=0.25)
    axis.plot(at, means, marker="o")
    failed = [(index, point.mean) for index, point in there if point.failed]
    axis.plot([index for index, _ in failed], [mean for _, mean in failed], "x", color="red", markersize=10)
    axis.set_title(", ".join(item for item in name if item), fontsize=8)
    axis.set_xticks(range(len(labels)), labels, fontsize=7, rotation=20, ha="right")
    axis.set_yscale("log")
    axis.set_ylim(min(point.least for _, point in there) / 1.5, max(point.largest for _, point in there) * 1.5)
    axis.tick_params(axis="y", which="both", labelsize=7)


def _series(reports: Sequence[Report], error_of: Callable[[Row], float]) -> dict[tuple[str, str], list[Point | None]]:
    """For each case and dtype a point per report; None where there is none."""
    result: dict[tuple[str, str], list[Point | None]] = {}
    for index, report in enumerate(reports):
        groups: dict[tuple[str, str], list[tuple[float, bool]]] = {}
        for row in report.rows:
            error = error_of(row)
            if math.isfinite(error) and error > 0:
                groups.setdefault((row.case, row.dtype or ""), []).append((error, not row.status.is_fine))
        for name, rows in groups.items():
            errors = [error for error, _ in rows]
            mean = math.exp(sum(map(math.log, errors)) / len(errors))
            result.setdefault(name, [None] * len(reports))[index] = Point(
                least=min(errors), mean=mean, largest=max(errors), failed=any(bad for _, bad in rows)
            )
    return result


def _spread(points: list[Point | None]) -> float:
    means = [math.log(point.mean) for point in points if point is not None]
    return max(means) - min(means)


def _labels(reports: Sequence[Report]) -> list[str]:
    """What tells the stacks apart, a line each; their number where nothing does."""
    names = [
        name
        for name in ("torch_npu", "cann", "torch", "driver")
        if len({str(item.stack.get(name)) for item in reports}) > 1
    ]
    return [
        "\n".join(f"{name} {report.stack.get(name)}" for name in names) or f"run {number}"
        for number, report in enumerate(reports, 1)
    ]
