"""How far two tensors are apart: numbers, and no verdict."""

from harness.measure.comparison import (
    CLOSE,
    DYNAMO,
    WORST,
    Comparison,
    Cosine,
    Count,
    Share,
    Size,
    compare,
    compare_all,
)
from harness.measure.scatter import RUNS, Scatter, scatter_of
from harness.measure.slices import Slice, worst_slices

__all__ = [
    "CLOSE",
    "DYNAMO",
    "RUNS",
    "WORST",
    "Comparison",
    "Cosine",
    "Count",
    "Scatter",
    "Share",
    "Size",
    "Slice",
    "compare",
    "compare_all",
    "scatter_of",
    "worst_slices",
]
