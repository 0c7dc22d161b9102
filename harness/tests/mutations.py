"""Files that went wrong: a stored JSON text with one to three changes, drawn from a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES = (
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**70,
    -0.5,
    0.5,
    1e308,
    -1e308,
    5e-324,
    "nan",
    "inf",
    "-inf",
    "",
    "x",
    "PASS",
    "FAIL",
    "ERROR",
    "SKIPPED",
    "REGRESSED",
    "NEW",
    "KNOWN FAILURE",
    "NaN",
    "1e-3",
    "floor",
    "card",
    "a\nb",
    "\x1b[2J",
    "\udcff",
    "é漢",
    "<b>|*`",
    "x" * 500,
    [],
    {},
    [1],
    ["x"],
    [None],
    [[1, 2]],
    {"a": 1},
    {"": None},
    {"max_diff": 1e-3},
    {"rel_l2": "x"},
    "12:3",
    "1:2 3:x",
)
LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-",
    "{",
    "[" * 50,
    "1" * 60,
    '"\\ud800"',
    "0x10",
    "'x'",
    "undefined",
)


def mutated(text: str, count: int, seed: int = 0) -> Iterator[str]:
    """`count` texts that differ from `text`, a JSON document: in its values and names mostly, in its characters now and
    then.
    """
    draw = random.Random(seed)
    for _ in range(count):
        if draw.random() < 0.1:
            yield _by_characters(text, draw)
            continue
        changed = json.loads(text)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            _by_values(changed, draw)
        yield json.dumps(changed)


def damaged(text: str, count: int, seed: int = 0) -> Iterator[str]:
    """`count` texts that differ from `text` in their characters, and else are laid out as it is."""
    draw = random.Random(seed)
    for _ in range(count):
        yield _by_characters(text, draw)


def _by_values(document: Any, draw: random.Random) -> None:
    """Change one value, name or item somewhere in a document, in place."""
    holder = document
    while True:  # down to a place that is drawn at each level
        names = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not names:
            return
        name = draw.choice(names)
        inner = holder[name]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.1:
            break
        holder = inner
    kind = draw.random()
    if kind < 0.6:
        holder[name] = copy.deepcopy(draw.choice(VALUES))
    elif kind < 0.75:
        del holder[name]
    elif kind < 0.85 and isinstance(inner, (int, float)) and not isinstance(inner, bool):
        holder[name] = inner * draw.choice((-1, 0, 10, 1e300))
    elif isinstance(holder, list):
        holder.insert(name, copy.deepcopy(inner))
    else:
        other = f"{name}{draw.choice(('', ' ', '2', 's'))}" if kind < 0.92 else draw.choice(list(holder))
        holder[other] = holder.pop(name)


def _by_characters(text: str, draw: random.Random) -> str:
    place, kind = draw.randrange(len(text)), draw.random()
    if kind < 0.2:
        return text[:place]
    if kind < 0.4:
        return text[:place] + text[place + draw.randrange(1, 40) :]
    if kind < 0.6:
        return text[:place] + draw.choice(LITERALS) + text[place:]
    if kind < 0.7:  # a name twice, of which one would hide the other
        colon = text.index('": ', place % (len(text) // 2))
        name = text[text.rindex('"', 0, colon) : colon + 1]
        return text[: text.rindex('"', 0, colon)] + f"{name}: 1, " + text[text.rindex('"', 0, colon) :]
    if kind < 0.8:
        colon = text.index(": ", place % (len(text) // 2)) + 2
        return text[:colon] + "[" * 100_000 + "]" * 100_000 + ", " + text[colon:]
    if kind < 0.9:
        return text[place:] + text[:place]
    return text[:place] + draw.choice('{}[]",:0') + text[place + 1 :]
