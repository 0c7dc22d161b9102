"""Numbers and counts as the reports print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from harness.judging.status import STATUSES, Mark, Status

if TYPE_CHECKING:
    from harness.report.rows import Row

NO_VALUE = "–"
_COUNTED = (Mark.KNOWN, Mark.NEW, Mark.IDENTICAL, Mark.DRIFT, Mark.IMPROVED, Mark.INCOMPARABLE, Mark.ON_HOST)


def counts(headline: Mapping[str, int]) -> str:
    """The counts that are not zero: "15 PASS, 3 FAIL"."""
    return ", ".join(f"{count} {status}" for status, count in headline.items() if count)


def tally(rows: Iterable[Row], order: Iterable[Status] = STATUSES) -> str:
    """How many rows ended in each status, and in brackets how many of these have a mark of a baseline, of a known
    failure, or of numbers that passed through the host: "3 PASS (1 NEW, 2 IDENTICAL), 4 FAIL (2 KNOWN FAILURE)".
    """
    rows, parts = list(rows), []
    for status in order:
        of = [row for row in rows if row.status is status]
        if not of:
            continue
        marks = [f"{count} {mark}" for mark in _COUNTED if (count := sum(mark in row.marks for row in of))]
        parts.append(f"{len(of)} {status}" + (f" ({', '.join(marks)})" if marks else ""))
    return ", ".join(parts)


def difference_text(value: Any) -> str:
    return number(value, "{:.2e}")


def cosine(value: Any) -> str:
    return number(value, "{:.9f}")  # at six decimals every good cosine reads 1.000000


def times(value: Any) -> str:
    return number(value, "{:.3g}")


def share(value: Any) -> str:
    return number(value, "{:.2%}")


def number(value: Any, form: str) -> str:
    if value is None:
        return NO_VALUE
    return value if isinstance(value, str) else form.format(value)  # "nan" and "inf" are strings in the JSON
