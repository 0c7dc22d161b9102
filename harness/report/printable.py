"""Text as it may be printed: nothing in it acts on a terminal, a page or the direction of reading."""

from __future__ import annotations

import unicodedata

_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}  # Unicode's control, format, surrogate, private and separator characters


def visible(text: str) -> str:
    """Text on one line that shows every character it holds: what would act on a terminal or turn the direction of
    reading stands as its number.

    >>> visible("a\\u202eb\\x1b[31m\\nc")
    'a\\\\u202eb\\\\x1b[31m c'
    """
    text = " ".join(text.split())
    if text.isascii() and text.isprintable():
        return text
    return "".join(item if unicodedata.category(item) not in _UNSEEN else _numbered(item) for item in text)


def _numbered(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
