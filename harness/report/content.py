"""A report: rows, and what they were measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import Any

from harness.judging.status import Mark, Status
from harness.report.cards import CardTotals, Quarantined, totals_of
from harness.report.rows import Row
from harness.typed_json import object_schema, reader_of, to_json

SCHEMA = "precision-report/1"

UNRUN = "not run: "  # how the reason of a row begins that a run did not reach
NOT_RUN = f"{UNRUN}the session ended before it"
STOPPED = "the device stopped computing at "  # the reason of a row on a device that no longer computes holds it


class _Outcome(str, Enum):
    """What a run came to, in one word; the gravest that is true of it."""

    FAILURES = "failures"  # rows FAIL, or could not be compared, or a planted fault never acted
    REGRESSIONS = "regressions"  # rows are within their limits and worse than accepted
    INFRASTRUCTURE = "infrastructure"  # all else passed, and rows were lost with a process, a card or a host
    NOTHING = "nothing measured"
    PASSED = "passed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A row of the performance table; times in milliseconds."""

    case: str
    dtype: str
    batch_size: int | None
    device: str
    n: int
    warmup: int
    avg_ms: float
    p50_ms: float
    p99_ms: float | None
    p90_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    first_ms: float | None = None  # the first forward, in which operators may be compiled
    task_queue: int | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rows, and what they were measured on. The counts are derived from the rows."""

    created: str
    backend: str | None
    stack: Mapping[str, Any]  # as `harness.devices.stack.Stack.to_dict` gives it
    rows: tuple[Row, ...]
    performance: tuple[Timed, ...] = ()
    shard: str | None = None  # "1/4" where the run was of a part of the tests
    idle_faults: tuple[str, ...] = ()  # a sentence for each planted fault that never acted
    quarantined: tuple[Quarantined, ...] = ()  # cards that no longer answered

    @property
    def cards(self) -> tuple[CardTotals, ...]:
        """The cards of rows that every card computed; empty without --precision-across-cards."""
        return totals_of(self.rows)

    @property
    def headline(self) -> dict[str, int]:
        """How many rows ended in each status, how many are NEW, and where there are some, how many fail as known."""
        result = {status.value: sum(row.status is status for row in self.rows) for status in Status}
        result[Mark.NEW.value] = sum(Mark.NEW in row.marks for row in self.rows)
        known = sum(Mark.KNOWN in row.marks for row in self.rows)
        return result | ({Mark.KNOWN.value: known} if known else {})

    @property
    def outcome(self) -> _Outcome:
        """Whether a run that does not pass is worth a second look, a ticket, or another try on another card."""
        bad = [row for row in self.rows if row.is_bad]
        ended = {item.after for item in self.quarantined}
        failing = [row for row in bad if not (_is_lost(row) or (row.status is Status.ERROR and row.name in ended))]
        if self.idle_faults or any(row.status is not Status.REGRESSED for row in failing):
            return _Outcome.FAILURES
        if any(row.status is Status.REGRESSED for row in bad):
            return _Outcome.REGRESSIONS
        if bad:
            return _Outcome.INFRASTRUCTURE
        measured = any(row.status is not Status.SKIPPED for row in self.rows)
        return _Outcome.PASSED if measured else _Outcome.NOTHING

    def head(self) -> dict[str, Any]:
        """All but the rows, as JSON holds it."""
        values: dict[str, Any] = {
            "schema": SCHEMA,
            "created": self.created,
            "backend": self.backend,
            "headline": self.headline,
        }
        values["outcome"] = self.outcome.value
        values |= {} if self.shard is None else {"shard": self.shard}
        values |= {"idle_faults": self.idle_faults} if self.idle_faults else {}
        values |= {"quarantined": self.quarantined} if self.quarantined else {}
        values |= {"cards": self.cards} if self.cards else {}
        head: dict[str, Any] = to_json(values | {"stack": self.stack, "performance": self.performance})
        return head

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self.head() | {"rows": [row.to_dict() for row in self.rows]}

    def __str__(self) -> str:
        return f"{len(self.rows)} rows on {self.stack.get('device')} ({self.backend})"


def _is_lost(row: Row) -> bool:
    """Whether a row is an ERROR because its process, its card or its host was lost."""
    dead = Mark.CRASHED in row.marks or Mark.HUNG in row.marks
    lost = dead or any(UNRUN in reason or STOPPED in reason for reason in row.reasons)
    return row.status is Status.ERROR and lost


def device_key(stack: Mapping[str, Any], backend: str | None) -> str:
    """The kind of device that numbers were measured on, on which alone they are compared with others: "Ascend910B4
    (emulated)".
    """
    return f"{stack.get('device')} ({backend})"


def now() -> str:
    """The time as reports hold it: UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def build(
    rows: Sequence[Row],
    *,
    stack: Mapping[str, Any],
    backend: str | None,
    performance: Sequence[Mapping[str, Any] | Timed] = (),
    shard: str | None = None,
    idle_faults: Sequence[str] = (),
    quarantined: Sequence[Quarantined] = (),
) -> Report:
    """The report of these rows, made now."""
    timed = tuple(item if isinstance(item, Timed) else Timed(**item) for item in performance)
    return Report(
        created=now(),
        backend=backend,
        stack=stack,
        rows=tuple(rows),
        performance=timed,
        shard=shard,
        idle_faults=tuple(idle_faults),
        quarantined=tuple(quarantined),
    )


@dataclass(frozen=True, kw_only=True)
class _StackOf:
    """What is read of a stored stack by name; the rest is shown as it is."""

    device: str | None = None
    faults: tuple[str, ...] | None = None
    environment: Mapping[str, Any] | None = None
    packages: Mapping[str, Any] | None = None


def stack_of_report(value: Any) -> Mapping[str, Any]:
    """A stored stack. Raises: Mismatch where it is none."""
    reader_of(_StackOf)(value)
    stack: dict[str, Any] = value
    return stack


_KINDS = {
    "created": str,
    "backend": str | None,
    "headline": Mapping[str, int],
    "stack": _StackOf,
    "performance": tuple[Timed, ...],
    "rows": tuple[Row, ...],
    "shard": str | None,
    "outcome": str | None,
    "idle_faults": tuple[str, ...],
    "rows_sha256": str | None,
    "quarantined": tuple[Quarantined, ...],
    "cards": tuple[CardTotals, ...],
}
_LATER = ("outcome", "shard", "idle_faults", "rows_sha256", "quarantined", "cards")  # names that a report need not hold
READERS = [(name, reader_of(kind)) for name, kind in _KINDS.items() if name not in ("stack", "rows")]
READERS += [("stack", stack_of_report), ("rows", reader_of(tuple[Any, ...]))]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a report."""
    schema = object_schema(_KINDS, [name for name in _KINDS if name not in _LATER])
    schema["properties"] = {"schema": {"const": SCHEMA}} | schema["properties"]
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": SCHEMA}
    return title | schema
