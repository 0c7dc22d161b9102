"""What "the error is below 1 %" may mean: every current meaning, with its name, its formula and its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.report import Row


@dataclass(frozen=True, kw_only=True)
class ErrorMeaning:
    """One meaning of a relative error. `of` gives it of a row as a share, None where the row has none."""

    name: str
    formula: str
    of: Callable[[Row], float | None]


def _score(row: Row) -> float | None:
    return None if row.decisions is None or not row.decisions.count else 1 - row.decisions.top1


def _cosine(row: Row) -> float | None:
    """1 - cosine; none of a single number, whose cosine is 1 by construction."""
    return None if is_one_number(row) else row.cos_distance


def is_one_number(row: Row) -> bool:
    """Whether a row's output is one number, or one for each sample of a batch of one."""
    return row.shape is not None and math.prod(row.shape) == 1


MEANINGS = {
    "rel_l2": ErrorMeaning(name="relative L2", formula="‖NPU − CPU‖ / ‖CPU‖", of=lambda row: row.rel_l2),
    "wape": ErrorMeaning(name="mean |Δ| / mean |x|", formula="Σ|NPU − CPU| / Σ|CPU|", of=lambda row: row.wape),
    "mape": ErrorMeaning(name="MAPE", formula="mean(|NPU − CPU| / (|CPU| + 1e-7))", of=lambda row: row.mean_rel),
    "cosine": ErrorMeaning(name="1 − cos", formula="1 − ⟨NPU, CPU⟩ / (‖NPU‖ ‖CPU‖)", of=_cosine),
    "max_rel": ErrorMeaning(
        name="max relative", formula="max(|NPU − CPU| / (|CPU| + 1e-7))", of=lambda row: row.max_rel
    ),
    "score": ErrorMeaning(name="task score", formula="1 − top-1 agreement", of=_score),
}
ASKED = "rel_l2"
ONE_PERCENT = 0.01


@dataclass(frozen=True, kw_only=True)
class Relative:
    """The worst value of a meaning over the seeds of a case and dtype."""

    key: str
    name: str
    formula: str
    value: float | None  # as a share; None where the rows have none
    within: bool | None  # whether it is below the limit
    asked: bool  # whether this is the meaning that was asked for
    laxest: bool  # whether it is the smallest of the six


def relative_errors(rows: Sequence[Row], *, asked: str = ASKED, limit: float = ONE_PERCENT) -> list[Relative]:
    """All meanings of the worst row each. A NaN is the worst there is.

    >>> [item.within for item in relative_errors([])]
    [None, None, None, None, None, None]
    """
    worst: dict[str, float | None] = {}
    for key, meaning in MEANINGS.items():
        values = [value for row in rows if (value := meaning.of(row)) is not None]
        wrong = [value for value in values if math.isnan(value)]
        worst[key] = (wrong or [max(values)])[0] if values else None
    errors = [value for key, value in worst.items() if value is not None and key != "score" and value > 0]
    least = min(errors, default=None)
    return [
        Relative(
            key=key,
            name=meaning.name,
            formula=meaning.formula,
            value=worst[key],
            within=None if worst[key] is None else worst[key] < limit,
            asked=key == asked,
            laxest=least is not None and worst[key] == least,
        )
        for key, meaning in MEANINGS.items()
    ]
