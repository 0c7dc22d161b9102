"""The sentences of reasons, findings, notes and references in the language of a report.

Rows keep their sentences in English, as JSON holds them; a Chinese report says them in Chinese by the patterns of
`languages/zh.txt`: English | Chinese, one a line. There {a} … {f} stand for one word each, {A} … {F} for any text, and
a pattern may be part of a sentence. Names, numbers, statuses, marks, code and what torch or CANN say stay as they are.
"""

from __future__ import annotations

import functools
import re

from harness.languages import sentences_of

LONGEST_TEXT = 2000  # characters of a text that are looked at: what is longer is what a program said
_FIELD = re.compile(r"\{[a-zA-Z]\}")
_LONGEST = 400  # characters of what stands for {A}


@functools.cache
def _patterns(language: str) -> tuple[tuple[str, re.Pattern[str], str], ...]:
    """The patterns, the longest first, since one may be part of another; before each the longest text of its own,
    without which it cannot match.
    """
    pairs = sorted(sentences_of(language), key=lambda pair: -len(pair[0]))
    return tuple((max(_FIELD.split(english), key=len), _compiled(english), other) for english, other in pairs)


def _compiled(english: str) -> re.Pattern[str]:
    parts = re.split(r"\{([a-zA-Z])\}", english)
    pattern = re.escape(parts[0])
    for index in range(1, len(parts), 2):
        name, after = parts[index], parts[index + 1]
        kind = r"[^\s;]" if name.islower() else "."
        end = "" if after or name.isupper() else "(?<![,:])"  # a word ends before the comma that follows it
        pattern += f"(?P<{name}>{kind}{{1,{_LONGEST}}}{'?' if after else ''}){end}"
        pattern += re.escape(after) + (r"(?!\d)" if after == "." else "")  # "1.001" is no end of a sentence
    if english[0] == "{":
        before = r"(?:^|(?<=[;:.→(。；：，] )|(?<=[。；：，（]))"
    else:
        before = r"(?<![A-Za-z0-9_.])" if english[0].isalnum() else ""
    after = r"(?![A-Za-z0-9_])" if english[-1].isalnum() or english[-1] == "}" else ""
    return re.compile(before + pattern + after)


@functools.lru_cache(maxsize=10_000)
def in_language(text: str, language: str) -> str:
    """A sentence of a row in the language of a report, as far as its parts are known there.

    >>> in_language("max_diff 5.00e+00 at (0, 3) (up to 1.00e-02 allowed); a limit of 5.01e+00 would pass", "zh")
    'max_diff 5.00e+00 位于 (0, 3)（最多允许 1.00e-02）；上限为 5.01e+00 时可以通过'
    """
    if not _patterns(language):
        return text
    text, rest = text[:LONGEST_TEXT], text[LONGEST_TEXT:]
    for literal, pattern, template in _patterns(language):
        if literal in text:
            text = pattern.sub(functools.partial(_filled, template), text)
    text = re.sub(r"(?<=[\u4e00-\u9fff）])([.;,:])(?: |$)", lambda found: _MARKS[found[1]], text)
    text = re.sub(r"([.;,:]) (?=[\u4e00-\u9fff])", lambda found: _MARKS[found[1]], text)
    return re.sub(r" (?=（)|(?<=[：；。，]) |(?<=[\u4e00-\u9fff）]) (?=[\u4e00-\u9fff])", "", text) + rest


_MARKS = {".": "。", ";": "；", ",": "，", ":": "："}


def _filled(template: str, result: re.Match[str]) -> str:
    return re.sub(r"\{([a-zA-Z])\}", lambda name: result[name[1]], template)
