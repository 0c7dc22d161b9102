"""Numbers and counts as the reports print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MISSING = "–"


def counts(headline: Mapping[str, int]) -> str:
    """The counts that are not zero: "15 PASS, 3 FAIL"."""
    return ", ".join(f"{count} {status}" for status, count in headline.items() if count)


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
        return MISSING
    return value if isinstance(value, str) else form.format(value)  # "nan" and "inf" are strings in the JSON
