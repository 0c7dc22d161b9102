"""The names of criteria: which must be at least their limit, and which need the references."""

from __future__ import annotations

from harness.measure.comparison import METRICS_AT_LEAST

AT_LEAST = (*METRICS_AT_LEAST, "top1")
FLOORED = (
    "forecast_ratio",
    "token_ratio",
    "outlier_ratio",
    "gain_ratio",
    "shift_ratio",
    "slice_ratio",
    "unexplained_ratio",
)  # what needs the references
NEEDS_FLOOR = (*FLOORED, "undecided")
