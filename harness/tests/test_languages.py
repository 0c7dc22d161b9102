"""The languages of reports and cards: each says the same, and none is named but in its own folder."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from harness import languages
from harness.languages import LANGUAGE_NAMES, sentences_of, words_of
from harness.plugin.options import OPTIONS
from harness.report.sentences import in_language

HARNESS = Path(languages.__file__).parents[1]
FIELDS = re.compile(r"\{(\w+)\}")


@pytest.mark.parametrize("part", ["report", "card"])
@pytest.mark.parametrize("name", LANGUAGE_NAMES)
def test_each_language_has_the_words_of_english(name, part):
    english, other = words_of(part)["en"], words_of(part)[name]
    assert english.keys() == other.keys() and other["lang"] == name
    for key, text in english.items():
        assert sorted(FIELDS.findall(text)) == sorted(FIELDS.findall(other[key])), key


@pytest.mark.parametrize("name", LANGUAGE_NAMES)
def test_a_sentence_names_what_its_english_names(name):
    for english, other in sentences_of(name):
        assert sorted(FIELDS.findall(english)) == sorted(FIELDS.findall(other)), english


def test_a_language_is_its_files_alone(tmp_path, monkeypatch):
    """A module that is put into the folder is a language; without sentences those of rows stay English."""
    module = tmp_path / "xx.py"
    shutil.copy(Path(languages.__file__).with_name("en.py"), module)
    monkeypatch.setattr(languages, "LANGUAGE_NAMES", (*LANGUAGE_NAMES, "xx"))
    monkeypatch.setattr(languages, "__path__", [*languages.__path__, str(tmp_path)])
    assert words_of("report")["xx"]["title"] == words_of("report")["en"]["title"]
    assert in_language("(up to 1.00e-02 allowed)", "xx") == "(up to 1.00e-02 allowed)"
    assert in_language("(up to 1.00e-02 allowed)", "zh") == "（最多允许 1.00e-02）"


def test_the_default_language_is_english():
    (asked,) = [option for option in OPTIONS if option.name == "lang"]
    assert LANGUAGE_NAMES[0] == "en" == asked.default and asked.settings["choices"] == LANGUAGE_NAMES
    assert list(LANGUAGE_NAMES[1:]) == sorted(LANGUAGE_NAMES[1:])


def test_no_other_code_names_a_language():
    """So that the help, the options and the reports take what the folder holds."""
    named = [
        path.relative_to(HARNESS)
        for path in HARNESS.rglob("*.py")
        if not {"tests", "languages"} & set(path.relative_to(HARNESS).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in set(LANGUAGE_NAMES) - {"en"}  # en is the default
    ]
    assert named == []
