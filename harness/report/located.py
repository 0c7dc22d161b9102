"""A finding as rows, as markdown and as a picture of the error over the depth of a model."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from harness.report.document import Block, Table, Text, to_markdown
from harness.report.format import MISSING, difference, times
from harness.report.rows import Located, Ranked, Shown

RANKED = 10
WIDTH, HEIGHT, MARGIN = 900, 240, 46  # of the picture, in pixels


def located(finding: Any, repro: Any = None, picture: str | None = None) -> Located:
    """A finding as a row of the report holds it; `picture` is a file beside the report."""
    names = [each.name for each in fields(Ranked)]
    kept = tuple(Ranked(**{name: getattr(each, name) for name in names}) for each in finding.ranking(RANKED))
    shown = None
    if repro is not None:
        shown = Shown(
            folder=str(repro.folder), printed=repro.printed, shows=repro.shows, elements=tuple(repro.elements)
        )
    first = None if finding.first is None else finding.first.number
    return Located(
        said=finding.sentences(), first=first, operators=len(finding.steps), ranking=kept, repro=shown, picture=picture
    )


def unlocated(why: str) -> Located:
    """The same where there is no finding."""
    return Located(said=why)


def found_blocks(kept: Located) -> list[Block]:
    """A finding as blocks: the sentences, then the operators with the largest own errors, those that are wrong
    first.
    """
    rows = []
    for each in kept.ranking:
        shape = "x".join(map(str, each.shape)) or "scalar"
        numbers = (difference(each.own), times(each.ratio), difference(each.inherited))
        why = each.cause or (each.reasons or [each.note or MISSING])[0]
        rows.append((each.module or MISSING, each.operator, each.place, each.dtype, shape, *numbers, why))
    columns = ("module", "operator", "line", "dtype", "shape", "own", "own / floor", "with what it inherits", "cause")
    blocks: list[Block] = [Text(text=kept.said, strong=True), Table(columns=columns, rows=tuple(rows), numbers_from=5)]
    repro = kept.repro
    if repro:
        shown = (
            repro.printed.strip().replace("\n", "; ")
            if repro.shows
            else "which did not show it in a process of its own"
        )
        blocks.append(
            Text(
                text=f"Repro: {repro.folder}/repro.py ({repro.elements[1]} of {repro.elements[0]} input elements): "
                f"{shown}"
            )
        )
    return blocks


def found_text(kept: Located) -> str:
    """A finding as markdown."""
    return to_markdown(found_blocks(kept)).rstrip("\n")


def depth_picture(finding: Any) -> str:
    """The error over the operators of a forward, as SVG: with the CPU's inputs (own) and with the device's (what it
    inherits included).
    """
    series = {"own": [each.own for each in finding.steps], "inherited": [each.inherited for each in finding.steps]}
    values = [value for each in series.values() for value in each if 0 < value < math.inf]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (-8, 0)
    high = max(high, low + 1)
    count = max(len(finding.steps) - 1, 1)

    def at(number: int, value: float) -> tuple[float, float]:
        inside = min(max(value, 10.0**low), 10.0**high) if value == value else 10.0**low
        return MARGIN + (WIDTH - 2 * MARGIN) * number / count, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (
            math.log10(inside) - low
        ) / (high - low)

    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
            'font-size="11">'
        ),
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for power in range(low, high + 1, max((high - low) // 6, 1)):
        y = at(0, 10.0**power)[1]
        parts.append(
            f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/><text x="4" '
            f'y="{y + 4:.1f}">1e{power}</text>'
        )
    for name, colour in (("inherited", "#1f77b4"), ("own", "#ff7f0e")):
        points = " ".join(
            "{:.1f},{:.1f}".format(*at(number, value))
            for number, value in enumerate(series[name])
            if value == value and value > 0
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
    for each in finding.steps:
        if each.bad:
            x, y = at(each.number, each.own)
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="red"><title>{each.number}: {each.module} '
                f"{each.operator}</title></circle>"
            )
    parts.append(
        f'<text x="{MARGIN}" y="16">relative L2 difference to the CPU over {len(finding.steps)} operators: <tspan '
        'fill="#1f77b4">with what is inherited</tspan>, '
        f'<tspan fill="#ff7f0e">own</tspan>, <tspan fill="red">wrong</tspan></text></svg>'
    )
    return "\n".join(parts) + "\n"
