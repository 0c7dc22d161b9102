"""The tests of a run that wait for a worker: which worker runs which test, so that workers keep their models."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A test as the queue knows it."""

    group: str  # tests of one model; where that is not known before they run, of one function; else of one file
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A test for a worker, and the test that the same worker runs after it; None where that is not known."""

    test: str
    following: str | None = None


@dataclass(kw_only=True)
class _Rest:
    """Tests of one group that are left, in order."""

    tests: deque[str] = field(default_factory=deque)
    avoid: str = ""  # the host whose worker died with the first of them


class RowQueue:
    """Tests in their groups. A worker takes a group and runs it in order; when no group waits, it takes half of what
    another worker has left.

    Some facts of a model are measured once, with its first row (`harness.reference.models.Learned`). Another worker
    gets rows of a model only when they are known, so that a row has the same numbers whoever runs it.
    """

    def __init__(self, tests: Mapping[str, Queued]):
        """`tests`: by id, in the order of collection."""
        self._tests = dict(tests)
        groups: dict[str, _Rest] = {}
        for test, queued in tests.items():
            groups.setdefault(queued.group, _Rest()).tests.append(test)
        self._waiting = deque(groups.values())
        self._taken: dict[str, _Rest] = {}  # by worker: what it has left, the first of which it was told
        self._known: dict[str, set[str | None]] = {}  # dtypes of a group whose facts are known

    def take(self, worker: str, host: str, *, hosts: Collection[str]) -> Turn | None:
        """The next test for a worker on `host`; None where there is none for it now. `hosts`: those with workers."""
        own = self._taken.get(worker)
        if own is None or not own.tests:
            fits = (rest for rest in self._waiting if rest.avoid != host or set(hosts) <= {host})
            own = next(fits, None)
            if own is not None:
                self._waiting.remove(own)
            else:
                own = _Rest(tests=self._half_of_another())
            self._taken[worker] = own
        if not own.tests:
            return None
        own.avoid = ""
        test = own.tests.popleft()
        return Turn(test=test, following=own.tests[0] if own.tests else None)

    def _half_of_another(self) -> deque[str]:
        """Half of the longest rest that another worker has; that worker keeps the test that it was told comes next."""
        most: list[str] = []
        owner = _Rest()
        for rest in self._taken.values():
            free = [test for test in list(rest.tests)[1:] if self._is_free(test)]
            if len(free) > len(most):
                most, owner = free, rest
        moved = most[len(most) // 2 :]
        owner.tests = deque(test for test in owner.tests if test not in moved)
        return deque(moved)

    def _is_free(self, test: str) -> bool:
        """Whether any worker may run a test: what its group's first rows are to show is known."""
        queued = self._tests[test]
        known = self._known.get(queued.group, set())
        return bool(known) if queued.dtype is None else queued.dtype in known

    def learned(self, test: str, dtypes: Collection[str]) -> None:
        """The facts of a test's group in these dtypes are known."""
        self._known.setdefault(self._tests[test].group, set()).update(dtypes)

    def lost(self, worker: str, *, again: str | None = None, host: str = "") -> None:
        """A worker is no more: what it had left waits again. `again`: a test that is to run again before that, not on
        `host` where there is another.
        """
        rest = self._taken.pop(worker, None) or _Rest()
        if again is not None:
            rest.tests.appendleft(again)
            rest.avoid = host
        if rest.tests:
            self._waiting.appendleft(rest)
