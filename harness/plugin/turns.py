"""The rows of tests that start threads: one at a time, and none after its test has ended."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Gives each row its turn. Rows share the device, its generators and torch's modes, which other threads would
    disturb.
    """

    def __init__(self):
        self._running = threading.RLock()
        self._changed = threading.Condition()
        self._waiting: Counter[str] = Counter()  # rows of a test that have begun, or wait for their turn
        self._ended: set[str] = set()

    def begin(self, test: str) -> None:
        """The test may have rows, again where it ended before."""
        with self._changed:
            self._ended.discard(test)

    @contextmanager
    def turn(self, test: str) -> Iterator[bool]:
        """The turn of one row of `test`; False where the test has ended."""
        with self._changed:
            in_time = test not in self._ended
            self._waiting[test] += in_time
        if not in_time:
            yield False
            return
        try:
            with self._running:
                yield True
        finally:
            with self._changed:
                self._waiting[test] -= 1
                self._changed.notify_all()

    def end(self, test: str) -> None:
        """Wait for the rows of `test` that have begun or wait; later ones come too late."""
        with self._changed:
            while self._waiting[test]:
                self._changed.wait()
            self._ended.add(test)
