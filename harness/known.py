"""Known failures: rows that fail by a reviewed entry of a file, until its day.

    [[known]]
    case = "attention, mask bool"                  # its name
    dtype = "float16"                              # optional: without it every dtype
    seeds = [42]                                   # optional: without it every seed
    device = "Ascend910B4 (npu)"                   # optional: without it every device
    criteria = ["outlier_ratio"]                   # optional: what it may fail by; without it anything
    reason = "the fused kernel reads past the mask"
    link = "https://gitcode.com/Ascend/pytorch/issues/88"
    expires = 2027-01-31                           # the last day on which it holds
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.gate import Mark
from harness.tables import only_known, read_toml

KNOWN = Mark.KNOWN
KEYS = ("case", "dtype", "seeds", "device", "criteria", "reason", "link", "expires")


@dataclass(frozen=True, kw_only=True)
class Known:
    """One entry."""

    case: str
    reason: str
    link: str
    expires: datetime.date
    dtype: str | None = None
    seeds: tuple[int, ...] = ()
    device: str | None = None
    criteria: tuple[str, ...] = ()

    def covers(self, case: str, dtype: str | None, seed: int | None, device: str) -> bool:
        """Whether the entry speaks of a row."""
        return self.case == case and self.dtype in (None, dtype) and (not self.seeds or seed in self.seeds) and self.device in (None, device)

    def expired(self, today: datetime.date) -> bool:
        return today > self.expires

    def allows(self, criteria: Collection[str]) -> bool:
        """Whether the entry speaks of failing by these."""
        return not self.criteria or set(criteria) <= set(self.criteria)

    def __str__(self) -> str:
        return " ".join([self.case, *([self.dtype] if self.dtype else []), *(f"seed {each}" for each in self.seeds)])


def read_known(path: Path) -> list[Known]:
    """The entries of a file.

    Raises: HarnessError for a file that is not such a list, an entry that lacks a case, a reason, a link or a day, or one that is there twice.
    """
    read = read_toml(path, f"no known failures at {path}; write the file, or leave the option out")
    only_known(read, ("known",), f"{path}")
    entries = read.get("known", [])
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise HarnessError(f"{path} holds {type(entries).__name__} as `known` where a list was expected; write [[known]] above each entry")
    found = [_entry(each, f"{path}: entry {number}") for number, each in enumerate(entries, 1)]
    for index, each in enumerate(found):
        if any((each.case, each.dtype, each.seeds, each.device) == (other.case, other.dtype, other.seeds, other.device) for other in found[:index]):
            raise HarnessError(f"{path}: {each} is there twice; keep one")
    return found


def _entry(entry: Mapping[str, Any], where: str) -> Known:
    only_known(entry, KEYS, where)
    for name in ("case", "reason", "link", *(name for name in ("dtype", "device") if name in entry)):
        if not (isinstance(entry.get(name), str) and entry[name].strip()):
            raise HarnessError(f"{where} has {entry.get(name)!r} as its {name} where text was expected; an entry names a case, a reason, a link and the day it expires")
    if not entry["link"].startswith(("https://", "http://")):
        raise HarnessError(f"{where} has the link {entry['link']!r} where an address was expected, where the failure is followed up: https://…")
    day = entry.get("expires")
    if not isinstance(day, datetime.date) or isinstance(day, datetime.datetime):
        raise HarnessError(f"{where} has {day!r} as the day it expires where a date was expected; write expires = 2027-01-31, without quotes")
    for name, kind in (("seeds", int), ("criteria", str)):
        if not (isinstance(entry.get(name, []), list) and all(type(each) is kind for each in entry.get(name, []))):
            raise HarnessError(f"{where} has {entry[name]!r} as its {name} where a list of {'numbers' if kind is int else 'names'} was expected")
    return Known(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


def entry_for(entries: Iterable[Known], case: str, dtype: str | None, seed: int | None, device: str) -> Known | None:
    """The entry that speaks of a row; the one that says more where there are several."""
    found = [each for each in entries if each.covers(case, dtype, seed, device)]
    return max(found, key=lambda each: (bool(each.seeds), each.dtype is not None, each.device is not None), default=None)


def complaint(entry: Known, *, failed: bool, criteria: Collection[str], today: datetime.date) -> str | None:
    """Why a row does not pass as the known failure that it is listed as; None where it does."""
    where = f"the known failure {entry} ({entry.reason}; {entry.link})"
    if not failed:
        return f"UNEXPECTED PASS of {where}; take the entry out, so that the failure cannot come back unseen"
    if entry.expired(today):
        return f"{where} expired on {entry.expires}; mend it, or review the entry and give it a new day"
    if not entry.allows(criteria):
        others = ", ".join(sorted(set(criteria) - set(entry.criteria)))
        return f"{where} may fail by {', '.join(entry.criteria)}; this one fails by {others} as well"
    return None
