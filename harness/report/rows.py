"""One verdict as one row of the report: flat, JSON-able, floats at full precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from harness.gate import Comparison, Verdict

NUMBERS = (  # of a Comparison, in the order of the row
    "max_diff", "mean_diff", "cos_sim", "cos_distance", "rel_l2", "rms", "max_diff_rms", "token_cos_sim",
    "worst_index", "worst_actual", "worst_expected", "worst_token",
    "nan_actual", "nan_expected", "inf_actual", "inf_expected", "nonfinite_differ", "unequal",
)  # fmt: skip


def row(*, test: str, case: str, dtype: str | None, seed: int | None, verdict: Verdict) -> dict[str, Any]:
    """The row of one test: what ran, its verdict, the numbers of the output that stands for it, the digests."""
    found = verdict.comparison
    several = {name: numbers(each) for name, each in verdict.comparisons.items()} if len(verdict.comparisons) > 1 else {}
    return jsonable(
        {
            "test": test,
            "case": case,
            "dtype": dtype,
            "seed": seed,
            "output": verdict.output or None,
            "status": verdict.status,
            "marks": list(verdict.marks),
            "reasons": [str(reason) for reason in verdict.reasons],
            **(numbers(found) if found is not None else dict.fromkeys(("shape", "actual_dtype", *NUMBERS))),
            "outputs": several,
            "limits": verdict.tolerance.limits() if verdict.tolerance else {},
            "limits_reason": verdict.tolerance.reason if verdict.tolerance else "",
            "decisions": _decisions(verdict),
            **(asdict(verdict.evidence) if verdict.evidence else dict.fromkeys(EVIDENCE)),
        }
    )


EVIDENCE = ("weights", "reference", "inputs_sha256", "expected_sha256", "actual_sha256", "expected_ms", "actual_ms")


def numbers(found: Comparison) -> dict[str, Any]:
    """What a Comparison measured, as the row holds it."""
    return {"shape": found.shape, "actual_dtype": found.dtype, **{name: getattr(found, name) for name in NUMBERS}}


def _decisions(verdict: Verdict) -> dict[str, Any] | None:
    made = verdict.decisions
    if made is None:
        return None
    derived = {"top1": made.top1, "accuracy": made.accuracy, "expected_accuracy": made.expected_accuracy}
    return {"count": made.count, "agree": made.agree, **derived}


def jsonable(value: Any) -> Any:
    """`value` for JSON: tuples become lists, a number that is not finite becomes "nan", "inf" or "-inf"."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
