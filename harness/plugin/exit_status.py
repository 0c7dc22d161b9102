"""Why a run must not end with status 0, whatever pytest counts: the exit status is the report's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.report import Row

_SHOWN = 5  # rows that are named


def complaints(rows: Sequence[Row], *, asked: bool, ran: bool = True) -> list[str]:
    """One sentence for each reason why a run in which no test failed must fail; empty where there is none.

    `asked`: the run selected accuracy tests, or gave an option of the harness. Such a run must measure something.
    `ran`: a test ran.
    """
    from harness.judging.status import Status

    bad = [row for row in rows if row.is_bad]
    if bad:
        names = ", ".join(f"{row.status} {row.name}" for row in bad[:_SHOWN]) + (" …" if len(bad) > _SHOWN else "")
        advice = (
            "a failure that is to be accepted belongs into cases/known_failures.toml, with a link and a day "
            "(pytest's xfail has neither)"
        )
        return [f"{_count(bad)} did not pass, and pytest counts no failure: {names}; {advice}"]
    if not asked or any(row.status != Status.SKIPPED for row in rows):
        return []
    if rows:
        return [f"nothing was measured: {_count(rows)} skipped"]
    if not ran:
        return ["no accuracy test matches; nothing was measured"]
    return ["nothing was measured: no test handed a case to the `precision` fixture"]


def _count(rows: Sequence[Row]) -> str:
    return f"{len(rows)} row{'' if len(rows) == 1 else 's'}"
