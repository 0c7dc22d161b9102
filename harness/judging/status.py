"""Statuses and marks of a row, and the status that follows from its reasons."""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum


class _Word(str, Enum):
    """A word of the report: a member is the text that JSON holds."""

    def __str__(self) -> str:
        return str(self.value)


class Status(_Word):
    """What became of a row, from its reasons: see `status_of`."""

    PASS = "PASS"
    FAIL = "FAIL"  # a criterion is broken
    REGRESSED = "REGRESSED"  # within the tolerance, and worse than what was accepted
    ERROR = "ERROR"  # nothing could be compared
    SKIPPED = "SKIPPED"  # not run, by intent

    @property
    def is_fine(self) -> bool:
        """Whether a row may end so without being a failure."""
        return self in (Status.PASS, Status.SKIPPED)

    @property
    def sign(self) -> str:
        """The sign before it in a table."""
        return {Status.PASS: "✅", Status.SKIPPED: "⏭"}.get(self, "❌")


class Mark(_Word):
    """What a reader of a row must know besides its status."""

    NONDETERMINISTIC = "NONDETERMINISTIC"  # device reruns differ
    NEAR_TIE = "NEAR TIE"  # a token, class or index differs where two numbers lie closer than they are known
    UNFELT = "SWITCH NOT FELT"  # the device is as exact as if HF32 or TF32, which its switches allow, were off
    FELL_BACK = "FELL BACK"  # an operator of the device's run was computed by the CPU
    ON_HOST = "ON HOST"  # the model's own code brings values from the device and computes with them on the CPU
    UNDECIDABLE = "UNDECIDABLE"  # healthy runs differ by too much to decide
    COMPANION = "COMPANION"  # the float32 row that the harness adds to a case in half dtypes alone
    CRASHED = "CRASHED"  # its process died
    HUNG = "HUNG"  # it did not end in its time
    RERUN = "RERUN"  # the test ran more than once; the row is of its last attempt
    KNOWN = "KNOWN FAILURE"  # it fails by a reviewed entry of the known failures
    NEW = "NEW"  # no accepted baseline; from here on, what became of the row since its baseline
    IDENTICAL = "IDENTICAL"  # every bit as accepted
    DRIFT = "DRIFT"  # other bits, no worse than chance would make it
    REGRESSED = "REGRESSED"  # worse than accepted
    IMPROVED = "IMPROVED"  # better than accepted
    INCOMPARABLE = "NOT COMPARABLE"  # other weights or inputs, or no numbers on one side

    @property
    def is_change(self) -> bool:
        """Whether it says what became of the row since its baseline."""
        return self in CHANGES


CHANGES = (Mark.IDENTICAL, Mark.DRIFT, Mark.REGRESSED, Mark.IMPROVED, Mark.NEW, Mark.INCOMPARABLE)
STATUSES = tuple(Status)
GRAVEST = (Status.FAIL, Status.ERROR, Status.REGRESSED, Status.PASS, Status.SKIPPED)  # the gravest first
NEW, NONDETERMINISTIC, NEAR_TIE, UNFELT, FELL_BACK = (
    Mark.NEW,
    Mark.NONDETERMINISTIC,
    Mark.NEAR_TIE,
    Mark.UNFELT,
    Mark.FELL_BACK,
)
# The status that a reason leads to, by its criterion; every criterion that is not here leads to FAIL.
LEADS_TO = {"run": Status.ERROR, "skip": Status.SKIPPED, "baseline": Status.REGRESSED}


def leads_to(criterion: str) -> Status:
    """The status that a reason with this criterion leads to, where none is graver."""
    return LEADS_TO.get(criterion, Status.FAIL)


def status_of(kinds: Collection[Status], *, compared: bool) -> Status:
    """The status of a row whose reasons lead to `kinds`; `compared` says whether it brought numbers. The one place that
    decides it.

    An error is graver than a skip, a skip than a failure, a failure than a regression. To have compared nothing is an
    ERROR.
    """
    for item in (Status.ERROR, Status.SKIPPED, Status.FAIL):
        if item in kinds:
            return item
    if not compared:
        return Status.ERROR
    return Status.REGRESSED if Status.REGRESSED in kinds else Status.PASS
