"""Which limits could come down: each beside the worst that was found, over stored reports. python -m harness ratchet
REPORT.json…
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.judging.checks import checks_of
from harness.judging.criteria import AT_LEAST
from harness.report.document import Table, Text, to_markdown
from harness.report.rejudge import judged_again
from harness.report.rows import Row

ROOM = 2.0  # times the worst that was found is left to the next run: errors of other seeds scatter less
WORTH = 0.8  # of the limit, above which it is left alone


@dataclass(frozen=True, kw_only=True)
class Loose:
    """One limit of one case in one dtype."""

    case: str
    dtype: str | None
    name: str
    limit: float
    worst: float  # found
    rows: int  # that it was found in
    could_be: float


def loose(rows: Iterable[Row], *, every: bool = False) -> list[Loose]:
    """The limits that leave more than `ROOM` to the worst that was found, over all rows that pass; with `every` those
    of presets too.

    A limit that holds from below, such as a cosine, is measured by what it lacks to 1.

    Raises: HarnessError when a row cannot be judged again.
    """
    result: dict[tuple[str, str | None, str], list[tuple[float, float]]] = {}
    for row in rows:
        verdict = judged_again(row)
        own = verdict.tolerance.limits() if verdict.tolerance else {}
        for check in checks_of(verdict) if verdict.passed else []:
            if (every or check.name in own) and math.isfinite(check.found):
                result.setdefault((row.case, row.dtype, check.name), []).append((check.found, check.limit))
    proposed = (_proposed(*key, pairs) for key, pairs in result.items())
    return [item for item in proposed if item is not None]


def _proposed(case: str, dtype: str | None, name: str, pairs: list[tuple[float, float]]) -> Loose | None:
    if name in AT_LEAST:
        worst, limit = min(found for found, _ in pairs), max(limit for _, limit in pairs)
        lacking = _up(max(1 - worst, 0.0) * ROOM)
        could = 1 - lacking
        worth = lacking < (1 - limit) * WORTH
    else:
        worst, limit = max(found for found, _ in pairs), min(limit for _, limit in pairs)
        could = _up(worst * ROOM)
        worth = could < limit * WORTH
    return (
        Loose(case=case, dtype=dtype, name=name, limit=limit, worst=worst, rows=len(pairs), could_be=could)
        if worth
        else None
    )


def _up(value: float) -> float:
    """Two digits, rounded up."""
    if value <= 0:
        return 0.0
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / step - 1e-9) * step:.1e}")


def ratchet_text(result: Sequence[Loose]) -> str:
    """The limits that could come down, as markdown."""
    headline = (
        f"{len(result)} limits could come down to {ROOM:g} times the worst that was found"
        if result
        else "No limit could come down."
    )
    rows = tuple(
        (
            row.case,
            row.dtype or "–",
            row.name,
            f"{row.limit:.6g}",
            f"{row.worst:.6g}",
            f"{row.could_be:.6g}",
            str(row.rows),
        )
        for row in result
    )
    columns = ("case", "dtype", "limit", "now", "worst found", "could be", "rows")
    return to_markdown(
        [Text(text=headline, strong=True), *([Table(columns=columns, rows=rows, numbers_from=3)] if rows else [])]
    ).rstrip("\n")
