"""The report's pictures, as SVG: the error over the depth of a model, and how often which difference occurs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from harness.measure.comparison import edge
from harness.report.printable import visible
from harness.report.words import EN

_WIDTH, _HEIGHT, MARGIN = 900, 240, 46  # of a picture, in pixels


def depth_picture(finding: Any, words: Mapping[str, str] = EN) -> str:
    """The error over the operators of a forward, as SVG: with the CPU's inputs (own) and with the device's (what it
    inherits included). `words`: those of the report's language.
    """
    series = {"own": [step.own for step in finding.steps], "inherited": [step.inherited for step in finding.steps]}
    values = [value for item in series.values() for value in item if 0 < value < math.inf]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (-8, 0)
    high = max(high, low + 1)
    count = max(len(finding.steps) - 1, 1)

    def at(number: int, value: float) -> tuple[float, float]:
        inside = min(max(value, 10.0**low), 10.0**high) if value == value else 10.0**low
        return MARGIN + (_WIDTH - 2 * MARGIN) * number / count, _HEIGHT - MARGIN - (_HEIGHT - 2 * MARGIN) * (
            math.log10(inside) - low
        ) / (high - low)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
            'font-size="11">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for power in range(low, high + 1, max((high - low) // 6, 1)):
        y = at(0, 10.0**power)[1]
        parts.append(
            f'<line x1="{MARGIN}" x2="{_WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/><text x="4" '
            f'y="{y + 4:.1f}">1e{power}</text>'
        )
    for name, colour in (("inherited", "#1f77b4"), ("own", "#ff7f0e")):
        points = " ".join(
            "{:.1f},{:.1f}".format(*at(number, value))
            for number, value in enumerate(series[name])
            if value == value and value > 0
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    for step in finding.steps:
        if step.bad:
            x, y = at(step.number, step.own)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="red"><title>'
                f"{escape(visible(f'{step.number}: {step.module} {step.operator}'))}</title></circle>"
            )
    parts.append(
        f'<text x="{MARGIN}" y="16">{escape(words["depth_caption"].format(count=len(finding.steps)))} '
        f'<tspan fill="#1f77b4">{escape(words["located_inherited"])}</tspan>, '
        f'<tspan fill="#ff7f0e">{escape(words["located_own"])}</tspan>, '
        f'<tspan fill="red">{escape(words["depth_wrong"])}</tspan></text></svg>'
    )
    return "\n".join(parts) + "\n"


def histogram_picture(histogram: Sequence[tuple[int, int]], words: Mapping[str, str] = EN) -> str:
    """How many elements differ by how much: bars over |difference| on a logarithmic axis, their heights logarithmic
    too, since few elements matter as much as many. `histogram`: (bin, elements), as `Comparison.histogram`; "" where
    no element differs.
    """
    bins = {number: count for number, count in histogram if edge(number) > 0 and count}
    if not bins:
        return ""
    first, last = min(bins), max(bins)
    step = (_WIDTH - 2 * MARGIN) / (last - first + 1)
    unit = (_HEIGHT - 2 * MARGIN) / math.log1p(max(bins.values()))
    base = _HEIGHT - MARGIN
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, count in bins.items():
        high = unit * math.log1p(count)
        left, wide = MARGIN + step * (number - first), max(step - 0.5, 0.5)
        parts.append(
            f'<rect x="{left:.1f}" y="{base - high:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="#1f77b4">'
            f"<title>{count} from {edge(number):.2e}</title></rect>"
        )
    parts.append(
        f'<text x="{MARGIN}" y="{base + 16}">{edge(first):.1e}</text>'
        f'<text x="{_WIDTH - MARGIN}" y="{base + 16}" text-anchor="end">{edge(last + 1):.1e}</text>'
        f'<text x="{MARGIN}" y="16">{escape(words["histogram_caption"])}</text></svg>'
    )
    return "".join(parts)
