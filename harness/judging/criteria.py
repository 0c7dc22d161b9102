"""The names of criteria: which must be at least their limit, and which need the references."""

from __future__ import annotations

AT_LEAST = ("cos_sim", "token_cos_sim", "matched", "top1")
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
