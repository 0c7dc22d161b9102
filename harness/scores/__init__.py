"""Scores of datasets as other tools write them: lm_eval, evalscope, AISBench and OpenCompass, or two columns."""

from harness.scores.reading import read_scores

__all__ = ["read_scores"]
