"""How far two tensors are apart: numbers, and no verdict."""

from harness.measure.comparison import CLOSE, DYNAMO, Comparison, Cosine, Count, Share, Size, compare

__all__ = ["CLOSE", "DYNAMO", "Comparison", "Cosine", "Count", "Share", "Size", "compare"]
