"""A part of the accuracy tests for one machine of several: the same parts on each, about equally long."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.errors import HarnessError


def parse_shard(text: str) -> tuple[int, int]:
    """The number of a part and how many there are: "2/4" is (2, 4). Raises: ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"{text!r} where a part such as 1/4 was expected: its number, from 1, and how many there are")
    return number, count


def parts(groups: Mapping[str, Sequence[str]], seconds: Mapping[str, float], count: int) -> list[list[str]]:
    """Share groups of tests, by name, among `count` parts: the longest group first, each to the part that is shortest.

    A group stays together, since its tests share a model. `seconds` of a test that is not in it: the mean of those that
    are, or one second. The answer depends on the arguments alone.

    >>> parts({"a": ["a1", "a2"], "b": ["b1"], "c": ["c1"]}, {"b1": 3.0}, 2)
    [['a1', 'a2'], ['b1', 'c1']]
    """
    known = [seconds[test] for tests in groups.values() for test in tests if test in seconds]
    usual = sum(known) / len(known) if known else 1.0
    length = {name: sum(seconds.get(test, usual) for test in tests) for name, tests in groups.items()}
    shares: list[list[str]] = [[] for _ in range(count)]
    totals = [0.0] * count
    for name in sorted(groups, key=lambda name: (-length[name], name)):
        smallest = totals.index(min(totals))
        shares[smallest] += groups[name]
        totals[smallest] += length[name]
    return shares


def seconds_of(path: Path | None) -> dict[str, float]:
    """How long each test of an earlier report ran, both sides, in seconds; empty without one. Raises: HarnessError."""
    from harness.report import load

    result: dict[str, float] = {}
    for row in () if path is None else load(path).rows:
        took = [item for item in (row.expected_ms, row.actual_ms) if item is not None]
        if took:
            result[row.test] = result.get(row.test, 0.0) + sum(took) / 1e3
    if path is not None and not result:
        raise HarnessError(f"{path} holds no row with a time; name the report of a whole run")
    return result
