"""How far two tensors are apart: numbers, and no verdict."""

from harness.measure.comparison import CLOSE, DYNAMO, Comparison, Cosine, Count, Share, Size, compare
from harness.measure.slices import Slice, worst_slices

__all__ = ["CLOSE", "DYNAMO", "Comparison", "Cosine", "Count", "Share", "Size", "Slice", "compare", "worst_slices"]
