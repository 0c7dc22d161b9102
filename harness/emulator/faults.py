"""Faults on demand: `with fault("aclnnSilu", kind="scale", by=1.001) as planted: …; planted.hits`."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

KINDS = ("scale", "offset", "nan", "swap_rows", "unwritten", "missing", "error")


@dataclass
class Fault:
    """One planted fault: the operators it acts on, what it does there, and how often it did."""

    pattern: str
    kind: str
    by: float = 1.0  # factor of "scale", summand of "offset"
    at: int = 0  # flat index of "nan"; first of the two rows of "swap_rows"
    nth: int | None = None  # only the nth call that matches, counted from 1; None: every one
    calls: int = 0  # that matched
    hits: int = 0  # on which it acted
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"no kind of fault is called {self.kind!r}; there are {', '.join(KINDS)}")

    def strikes(self, name: str) -> bool:
        """Whether it acts on this call, which is counted."""
        if not fnmatchcase(name, self.pattern):
            return False
        with self._lock:
            self.calls += 1
            if self.nth is not None and self.calls != self.nth:
                return False
            self.hits += 1
            return True

    def apply(self, results: list) -> list:
        """The operator's results with the fault in the first of them."""
        first, *rest = results
        return [getattr(self, f"_{self.kind}")(first), *rest]

    def _scale(self, result):
        return (result.double() * self.by).to(result.dtype)

    def _offset(self, result):
        return (result.double() + self.by).to(result.dtype)

    def _nan(self, result):
        changed = result.clone()
        changed.view(-1)[self.at] = float("nan")
        return changed

    def _swap_rows(self, result):
        changed = result.contiguous().clone()
        rows = changed.view(-1, changed.shape[-1])
        rows[[self.at, self.at + 1]] = rows[[self.at + 1, self.at]]
        return changed

    def _unwritten(self, result):
        return None

    def _error(self, result):
        raise RuntimeError("error code 507011 (a planted fault)")


_planted: list[Fault] = []


def for_call(name: str) -> Fault | None:
    """The fault that acts on this call of an operator, if any."""
    return next((each for each in _planted if each.strikes(name)), None)


@contextmanager
def fault(pattern: str, kind: str, **options):
    """Plant a fault in the operators whose name matches (as file names do) while the block runs.

    Raises: ValueError for an unknown kind.
    """
    planted = Fault(pattern, kind, **options)
    _planted.append(planted)
    try:
        yield planted
        _drain()
    finally:
        _planted.remove(planted)


def _drain() -> None:
    """Wait for the queue: an operator is captured when it is called or later, in the queue's thread."""
    import torch

    if hasattr(torch, "npu") and torch.npu.is_initialized():
        torch.npu.synchronize()
