"""The limit of time of a row: a thread that ends a row which takes longer, with the stacks of all threads.

Where a thread keeps Python's lock, Python's own `faulthandler` ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FIRST = 3600.0  # seconds that the first row of a case may take,
LEAST_SECONDS = 600.0  # and a later one at least,
TIMES = 20  # or this many times as long as the longest of its case so far
STARTING = 60.0  # seconds more for the first row of a process, which imports what rows need
COMPILING = 1800.0  # seconds more for the first row of a case where operators are compiled when they are first called
_GRACE = 10.0  # seconds after which faulthandler acts, where this thread could not
FRAMES = 12  # of each thread's stack, the innermost


class Limits:
    """How long a row of a case may take, in seconds, from the option or from the rows that ended."""

    def __init__(self, option: float | None):
        self.option = option
        self._longest: dict[tuple[str, str], float] = {}

    def of(self, case: tuple[str, str], *, compiles: bool) -> float:
        """The limit for the next row of a case, given as its name and dtype."""
        first = case not in self._longest
        more = (0.0 if self._longest else STARTING) + (COMPILING if first and compiles else 0.0)
        if self.option is not None:
            return self.option + more
        return more + (FIRST if first else max(LEAST_SECONDS, TIMES * self._longest[case]))

    def took(self, case: tuple[str, str], seconds: float) -> None:
        """A row of the case ended after so long."""
        self._longest[case] = max(seconds, self._longest.get(case, 0.0))


class Watchdog:
    """Calls `ends(text)` from a thread of its own when a block takes longer than its limit; that ends the process.

    `stacks`: a file for the stacks that `faulthandler` writes, or None where that is not to act.
    """

    def __init__(self, ends: Callable[[str], None], stacks: Path | None):
        self._ends, self._stacks = ends, stacks
        self._changed = threading.Condition()
        self._until: float | None = None
        self._limit = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """A block that may take so long."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="row-timeout", daemon=True)
            self._thread.start()
        self._set(time.monotonic() + seconds, seconds)
        file = None
        if self._stacks is not None:
            file = self._stacks.open("w", encoding="utf-8")
            faulthandler.dump_traceback_later(seconds + _GRACE, exit=True, file=file)
        try:
            yield
        finally:
            self._set(None, 0.0)
            if file is not None and self._stacks is not None:
                faulthandler.cancel_dump_traceback_later()
                file.close()
                self._stacks.unlink(missing_ok=True)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _set(self, until: float | None, limit: float) -> None:
        with self._changed:
            self._until, self._limit = until, limit
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while True:
                left = None if self._until is None else self._until - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
                if self._closed:
                    return
            limit = self._limit
        self._ends(f"it did not end within {limit:g} s (--precision-row-timeout); {stacks_of_threads()}")


def stacks_of_threads() -> str:
    """The stacks of all other threads on one line, the innermost call first, the main thread before others."""
    own, main = threading.get_ident(), threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda pair: pair[0] != main)
    told = []
    for number, frame in frames:
        if number == own:
            continue
        calls = traceback.extract_stack(frame)[-FRAMES:]
        where = " < ".join(f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in reversed(calls))
        told.append(f"thread {names.get(number, number)}: {where}")
    return "; ".join(told)
