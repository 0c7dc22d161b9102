"""Reports as one: those of several machines, nothing twice, nothing missing, one stack; and an accepted report with the
rows of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.report.content import UNRUN, Report
from harness.report.rows import Row

_OWN = ("card", "cpu", "device_count", "threads", "environment")  # what machines of one kind may have of their own
_SHOWN = 5  # names in a sentence


def merge(reports: Mapping[Path, Report], *, different_stacks: bool = False) -> Report:
    """One report of several, in their order; its stack is that of the first.

    Raises: HarnessError where a row is in two of them, a test was not run, a part of a sharded run is missing or there
    twice, or where they were measured on different stacks and `different_stacks` does not allow it.
    """
    first = next(iter(reports.values()))
    rows = [row for report in reports.values() for row in report.rows]
    twice = [" ".join(map(str, key)) for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise HarnessError(f"{_some(twice)} in more than one report; name each part of a run once")
    holes = [row.name for row in rows if any(UNRUN in reason for reason in row.reasons)]
    if holes:
        raise HarnessError(f"{_some(holes)} did not run; run that part again, or leave its report out")
    _check_parts(reports)
    differing = {path: stack_differences(first, report) for path, report in reports.items()}
    if any(differing.values()) and not different_stacks:
        path, texts = next((path, texts) for path, texts in differing.items() if texts)
        raise HarnessError(
            f"{path} was measured on another stack than {next(iter(reports))}: {'; '.join(texts)}; "
            "--different-stacks merges them all the same"
        )
    performance = tuple(item for report in reports.values() for item in report.performance)
    created = max(report.created for report in reports.values())
    idle = tuple(item for item in first.idle_faults if all(item in report.idle_faults for report in reports.values()))
    quarantined = tuple(item for report in reports.values() for item in report.quarantined)
    rows_and_times = replace(first, rows=tuple(rows), performance=performance, quarantined=quarantined)
    return replace(rows_and_times, created=created, shard=None, idle_faults=idle)


def renewed(
    stored: Report, run: Report, *, accepted: Collection[tuple[str, str | None]], whole: bool = False
) -> Report:
    """An accepted report with the rows of a run merged into it: a row of the run replaces that of its key, the others
    stay. Of a `whole` run nothing else stays.

    `accepted`: the cases, with their dtypes, of which the run's rows were accepted. A row of another case, or without
    numbers, is added where there was none, and replaces none.
    """
    before = {row.key: row for row in stored.rows}

    def replaces(row: Row) -> bool:
        return (row.case, row.dtype) in accepted and row.rel_l2 is not None

    new = [row if replaces(row) else before.get(row.key, row) for row in run.rows]
    there = {row.key: row for row in new}
    rows = new
    if not whole:
        rows = [there.pop(row.key, row) for row in stored.rows] + [row for row in new if row.key in there]
    functions = {name: place for place, name in enumerate(dict.fromkeys(map(_function, rows)))}
    rows = sorted(rows, key=lambda row: functions[_function(row)])  # those of one test function stand together
    timed = {(item.case, item.dtype, item.batch_size, item.device) for item in run.performance}
    old = [item for item in stored.performance if (item.case, item.dtype, item.batch_size, item.device) not in timed]
    performance = (*([] if whole else old), *run.performance)
    return replace(run, rows=tuple(rows), performance=performance)


def _function(row: Row) -> str:
    """The test function of a row: the id of its test without parameters."""
    return row.test.partition("[")[0]


def _check_parts(reports: Mapping[Path, Report]) -> None:
    """Raises: HarnessError where the parts are of one sharded run and not each is there once."""
    shards = [report.shard for report in reports.values()]
    if not any(shards):
        return
    whole = [path for path, report in reports.items() if report.shard is None]
    if whole:
        raise HarnessError(f"{whole[0]} is of no part of a run and the others are; leave it out")
    there = Counter(shard for shard in shards if shard)
    counts = {shard.partition("/")[2] for shard in there}
    if len(counts) > 1:
        raise HarnessError(f"the parts {', '.join(there)} are of different runs; name the parts of one")
    count = counts.pop()
    missing = [part for number in range(1, int(count) + 1) if (part := f"{number}/{count}") not in there]
    again = [part for part, times in there.items() if times > 1]
    if again:
        raise HarnessError(f"the part {again[0]} is there more than once; name each part once")
    if missing:
        raise HarnessError(f"the part {_some(missing)} of the run is missing; name its report too")


def stack_differences(first: Report, other: Report) -> list[str]:
    """What differs between the stacks of two reports, but for what each machine has of its own."""
    result = [] if first.backend == other.backend else [f"backend {first.backend} and {other.backend}"]
    names = dict.fromkeys([*first.stack, *other.stack])
    for name in names:
        values: Sequence[Any] = first.stack.get(name), other.stack.get(name)
        if name not in _OWN and values[0] != values[1]:
            result.append(f"{name} {values[0]} and {values[1]}")
    return result


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
