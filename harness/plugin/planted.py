"""The planted faults of a run, counted over all of its processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def counts_of(planted: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Of each fault in this process, by its text: the calls that it matches, and those on which it acted."""
    return {str(item): (item.calls, item.hits) for item in planted}


class PlantedCounts:
    """How often faults acted, as the processes of a run tell it: with each row, and before a fault ends one of them.

    >>> counts = PlantedCounts()
    >>> counts.take("gw0", {"aclnnSilu:nan": (4, 1)})
    >>> counts.take("gw0", {"aclnnSilu:nan": (6, 2)})
    >>> counts.take("gw1", {"aclnnSilu:nan": (2, 0)})
    >>> counts.total("aclnnSilu:nan"), counts.total("aclnnExp:nan")
    ((8, 2), (0, 0))
    >>> counts.has_idle("aclnnSilu:nan"), counts.has_idle("aclnnExp:nan")  # of the second no process told anything
    (False, False)
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], tuple[int, int]] = {}  # by process and fault: calls, and acts

    def take(self, process: str, counts: Mapping[str, Sequence[int]]) -> None:
        """What a process counted since it began; a process is never behind what it told before."""
        for fault, (calls, hits) in counts.items():
            before = self._counts.get((process, fault), (0, 0))
            self._counts[process, fault] = (max(before[0], calls), max(before[1], hits))

    def total(self, fault: str) -> tuple[int, int]:
        """The calls that a fault matches in all processes, and those on which it acted."""
        told = [counts for (_, name), counts in self._counts.items() if name == fault]
        return sum(calls for calls, _ in told), sum(hits for _, hits in told)

    def has_idle(self, fault: str) -> bool:
        """Whether a fault was planted in some process, and acted in none."""
        return any(name == fault for _, name in self._counts) and not self.total(fault)[1]
