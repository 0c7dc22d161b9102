"""Known failures: rows that fail by a reviewed entry of a file, until its day.

    [[known]]
    case = "attention, mask bool"                  # its name
    dtype = "float16"                              # optional: without it every dtype
    seeds = [42]                                   # optional: without it every seed
    device = "Ascend910B4 (npu)"                   # optional: without it every device
    error = 1.2e-2                                 # optional: its relative L2 error when it was entered; see below
    criteria = ["outlier_ratio"]                   # optional: what it may fail by, "run" for an error; see below
    reason = "the fused kernel reads past the mask"
    link = "https://gitcode.com/Ascend/pytorch/issues/88"
    expires = 2027-01-31                           # the last day on which it holds

Without `criteria` an entry excuses what was accepted and nothing worse. Where the row has accepted numbers
(--precision-baseline=accept keeps those of known failures too): the criteria that it failed by then, with an error that
is no regression. Where it has none: numbers beyond their limits alone (no NaN, no other shape, no fallback, no crash),
with a relative L2 error of at most `GROWTH` times `error`, or of `_MOST` where the entry gives none.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.judging.tolerance import NUMERIC
from harness.report.rows import UNKNOWN_CRITERION, Row
from harness.upgrade.tables import only_known, read_toml

KNOWN = Mark.KNOWN
_KEYS = ("case", "dtype", "seeds", "device", "error", "criteria", "reason", "link", "expires")
GROWTH = 1.5  # times the error that an entry gives
_MOST = (
    2.0  # relative L2 error of a row that has no accepted numbers: an output of the expected size cannot be further off
)


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
    error: float | None = None
    criteria: tuple[str, ...] = ()

    def covers(self, case: str, dtype: str | None, seed: int | None, device: str) -> bool:
        """Whether the entry speaks of a row."""
        return (
            self.case == case
            and self.dtype in (None, dtype)
            and (not self.seeds or seed in self.seeds)
            and self.device in (None, device)
        )

    def expired(self, today: datetime.date) -> bool:
        return today > self.expires

    def __str__(self) -> str:
        return " ".join([self.case, *([self.dtype] if self.dtype else []), *(f"seed {seed}" for seed in self.seeds)])


def read_known(path: Path) -> list[Known]:
    """The entries of a file.

    Raises: HarnessError for a file that is not such a list, an entry that lacks a case, a reason, a link or a day, or
    one that is there twice.
    """
    read = read_toml(path, f"no known failures at {path}; write the file, or leave the option out")
    only_known(read, ("known",), f"{path}")
    entries = read.get("known", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise HarnessError(
            f"{path} holds {type(entries).__name__} as `known` where a list was expected; write [[known]] "
            "above each entry"
        )
    result = [_entry(entry, f"{path}: entry {number}") for number, entry in enumerate(entries, 1)]
    for index, row in enumerate(result):
        if any(
            (row.case, row.dtype, row.seeds, row.device) == (other.case, other.dtype, other.seeds, other.device)
            for other in result[:index]
        ):
            raise HarnessError(f"{path}: {row} is there twice; keep one")
    return result


def _entry(entry: Mapping[str, Any], where: str) -> Known:
    only_known(entry, _KEYS, where)
    for name in ("case", "reason", "link", *(name for name in ("dtype", "device") if name in entry)):
        if not (isinstance(entry.get(name), str) and entry[name].strip()):
            raise HarnessError(
                f"{where} has {entry.get(name)!r} as its {name} where text was expected; an entry names a "
                "case, a reason, a link and the day it expires"
            )
    if not entry["link"].startswith(("https://", "http://")):
        raise HarnessError(
            f"{where} has the link {entry['link']!r} where an address was expected, where the failure is "
            "followed up: https://…"
        )
    day = entry.get("expires")
    if not isinstance(day, datetime.date) or isinstance(day, datetime.datetime):
        raise HarnessError(
            f"{where} has {day!r} as the day it expires where a date was expected; write expires = 2027-01-31, "
            "without quotes"
        )
    for name, kind in (("seeds", int), ("criteria", str)):
        if not (isinstance(entry.get(name, []), list) and all(type(item) is kind for item in entry.get(name, []))):
            raise HarnessError(
                f"{where} has {entry[name]!r} as its {name} where a list of "
                f"{'numbers' if kind is int else 'names'} was expected"
            )
    error = entry.get("error", 0.0)
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 <= error < math.inf:
        raise HarnessError(f"{where} has {error!r} as its error where a relative L2 error such as 1.2e-2 was expected")
    checked: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()
    }
    return Known(**checked)


def entry_for(entries: Iterable[Known], case: str, dtype: str | None, seed: int | None, device: str) -> Known | None:
    """The entry that speaks of a row; the one that says more where there are several."""
    result = [entry for entry in entries if entry.covers(case, dtype, seed, device)]
    return max(
        result, key=lambda value: (bool(value.seeds), value.dtype is not None, value.device is not None), default=None
    )


def complaint(entry: Known, row: Row, *, accepted: Row | None, today: datetime.date) -> str | None:
    """Why a row does not pass as the known failure that it is listed as; None where it does. `accepted` is the row as
    it was accepted.
    """
    where = f"the known failure {entry} ({entry.reason}; {entry.link})"
    if row.status.is_fine:
        return f"UNEXPECTED PASS of {where}; take the entry out, so that the failure cannot come back unseen"
    if entry.expired(today):
        return f"{where} expired on {entry.expires}; mend it, or review the entry and give it a new day"
    allowed = _allowed(entry, accepted)
    others = sorted({item for item in row.criteria if item not in allowed})
    if others and entry.criteria:
        return f"{where} may fail by {', '.join(entry.criteria)}; this one fails by {', '.join(others)} as well"
    if others:
        return (
            f"{where} excuses what was accepted and nothing worse; this one fails by {', '.join(others)} as well: "
            "mend it, or review the entry and name what it may fail by, criteria = "
            f"{list(dict.fromkeys(row.criteria))}".replace("'", '"')
        )
    most = _largest(entry, accepted)
    if most is None or row.error <= most:
        return None
    return (
        f"{where} excuses a relative L2 error of up to {most:.3g}, and this one has {row.error:.3g}: mend it, "
        "or review the entry and give it the error that is known, error = …"
    )


def _allowed(entry: Known, accepted: Row | None) -> set[str]:
    """The criteria that a row may fail by."""
    if entry.criteria:
        return set(entry.criteria)
    if accepted is None or accepted.status.is_fine or UNKNOWN_CRITERION in accepted.criteria:
        return set(NUMERIC)
    then = set(accepted.criteria)
    return then | NUMERIC if then & NUMERIC else then


def _largest(entry: Known, accepted: Row | None) -> float | None:
    """The largest error that is excused; None where the baseline decides, or the criteria do."""
    if entry.error is not None:
        return GROWTH * entry.error
    return None if accepted is not None or entry.criteria else _MOST


def settled(entry: Known, row: Row, *, accepted: Row | None, today: datetime.date) -> Row:
    """A row as the entry that speaks of it leaves it: marked where it fails as known, with one more reason, the first,
    where it may not.
    """
    text = complaint(entry, row, accepted=accepted, today=today)
    return replace(row, marks=(*row.marks, KNOWN)) if text is None else row.because("known", text, first=True)
