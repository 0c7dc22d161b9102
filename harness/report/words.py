"""The words of the report by language; what rows say, which is English, is in that language by `sentences`."""

from __future__ import annotations

from collections.abc import Mapping

from harness.languages import words_of
from harness.report.sentences import in_language

LANGUAGES = words_of("report")
EN = LANGUAGES["en"]


def told(text: str, words: Mapping[str, str]) -> str:
    """A sentence of a row, which is English, in the report's language."""
    return in_language(text, words["lang"])
