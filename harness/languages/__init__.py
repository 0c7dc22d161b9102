"""The languages of reports and model cards: each is a module of this folder, named by its two letters, and NAME.txt.

The module holds `WORDS`, those of a report and those of a model card, with the keys of `en.py`. What rows say is
English, as their JSON holds it; NAME.txt says it in the language by patterns (`harness.report.sentences`). A language
without that file leaves those sentences in English.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

_FOLDER = Path(__file__).parent
_OTHERS = {path.stem for path in _FOLDER.glob("[a-z][a-z].py")} - {"en"}
LANGUAGE_NAMES = ("en", *sorted(_OTHERS))  # the first is the default


def words_of(part: str) -> dict[str, Mapping[str, str]]:
    """The words of every language, by its name, for what is written: a "report" or a "card"."""
    return {name: import_module(f"{__name__}.{name}").WORDS[part] for name in LANGUAGE_NAMES}


def sentences_of(name: str) -> list[tuple[str, str]]:
    """The sentences of rows in English and in this language, as NAME.txt holds them: English | other, one a line."""
    path = _FOLDER / f"{name}.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [(english, other.strip()) for english, _, other in (line.partition(" | ") for line in lines)]
