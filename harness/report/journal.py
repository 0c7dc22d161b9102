"""The journal of a run: what happened, one JSON object a line, appended and flushed, so that nothing is lost.

It lies beside the report while the run goes on. A run that ends removes it, since the report then holds all of it;
where the process died, the report is made from the journal: its rows, and the test that ran when the process died.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import last_operator
from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.judging.verdict import error
from harness.report.content import NOT_RUN, Report, now, stack_of_report
from harness.report.rows import Row
from harness.typed_json import Mismatch

NAME = "precision.journal"
JOURNAL_SCHEMA = "precision-journal/1"
BESIDE = {"operator": "precision.journal.operator", "stacks": "precision.journal.stacks"}
DIED = "it was running when the process died"


class Busy(HarnessError):
    """Another run writes its report into the folder."""


class Journal:
    """The journal in `directory`, which this process alone writes until it is closed.

    Raises: Busy where another run writes there; OSError where nothing can be written.
    """

    def __init__(self, directory: Path):
        self.path = directory / NAME
        self._file = _locked(self.path)
        self._environment: Any = None

    def left_over(self) -> bool:
        """Whether a run that died left its lines here."""
        return os.fstat(self._file.fileno()).st_size > 0

    def start(self) -> None:
        """Begin an empty journal."""
        self._file.truncate(0)
        for name in BESIDE:
            self.beside(name).unlink(missing_ok=True)
        who = dict(pid=os.getpid(), host=socket.gethostname())  # for the run that finds it locked
        self._append(schema=JOURNAL_SCHEMA, created=now(), **who)

    def collected(self, tests: Mapping[str, Mapping[str, Any]]) -> None:
        """The tests of the run in their order: case, dtype and seed by test id, as far as they are known."""
        self._append(collected=tests)

    def running(self, test: str, named: Mapping[str, Any] | None = None) -> None:
        """A test begins, or one of its rows: its case, dtype and seed are then `named`."""
        self._append(running=test, **({"named": named} if named else {}))

    def row(self, row: Row, *, final: bool = True) -> None:
        """A row that was measured; where it is not `final`, it counts until one of its test that is comes."""
        self._append(**{"row" if final else "standing": row.to_dict()})

    def dropped(self, test: str) -> None:
        """The rows of a test do not count: another attempt of it begins."""
        self._append(dropped=test)

    def ended(self, test: str) -> None:
        """A test ended."""
        self._append(ended=test)

    def environment(self, environment: Mapping[str, Any]) -> None:
        """The backend and the stack from here on; nothing is written where they are as before."""
        if environment != self._environment:
            self._append(environment=environment)
            self._environment = dict(environment)

    def beside(self, name: str) -> Path:
        """A file for what this process leaves when it dies: "operator" or "stacks"."""
        return self.path.with_name(BESIDE[name])

    def close(self, *, remove: bool) -> None:
        """Let go of it; `remove` it where the report holds everything."""
        if remove:
            for name in BESIDE:
                self.beside(name).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)  # before the lock is given up, so that no other run's is removed
        self._file.close()

    def _append(self, **line: Any) -> None:
        self._file.write(json.dumps(line, ensure_ascii=True, default=str) + "\n")
        self._file.flush()


def _locked(path: Path) -> Any:
    """The file, open for appending and locked. Raises: Busy, OSError."""
    while True:
        file = path.open("a", encoding="utf-8")
        try:
            _lock(file, path)
        except BaseException:
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # a run that ended meanwhile removed it: this process holds a file without a name


def _lock(file: Any, path: Path) -> None:
    """Lock an open file for this process, where the system and the disk can; Raises: Busy."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        first = next(_lines(path), {})
        by = f" (process {first['pid']} on {first['host']}, since {first['created']})" if "pid" in first else ""
        raise Busy(
            f"another run{by} writes its report into {path.parent}; "
            "name another folder for this one, or wait for its end"
        ) from None
    except OSError:  # a disk without locks
        return


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a journal; a line that was cut off, by a full disk or a death in the middle of it, is left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                yield entry


def stacks_in(text: str) -> str:
    """What `faulthandler` wrote, on one line: the stacks of all threads, the innermost call first."""
    told = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(told)[:4000]


@dataclass(kw_only=True)
class _Told:
    """What a journal says, as it is read."""

    created: str = ""
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    standing: dict[str, Row] = field(default_factory=dict)
    running: dict[str, dict[str, Any]] = field(default_factory=dict)  # tests that began and did not end
    last_operator: str = ""  # what is said of it
    stacks: str = ""  # of a process that hung
    environment: dict[str, Any] = field(default_factory=lambda: {"backend": None, "stack": {}})

    def take(self, entry: Mapping[str, Any], where: str) -> None:
        """One line."""
        if "created" in entry:
            self.created = str(entry["created"])
        elif "collected" in entry:
            self.tests |= {test: dict(named) for test, named in entry["collected"].items()}
        elif "environment" in entry:
            stack_of_report(entry["environment"]["stack"])
            self.environment = {name: entry["environment"][name] for name in ("backend", "stack")}
        elif "running" in entry:
            self.running.setdefault(entry["running"], {}).update(entry.get("named") or {})
        elif "ended" in entry:
            self.running.pop(entry["ended"], None)
        elif "dropped" in entry:
            self.rows.pop(entry["dropped"], None)
            self.standing.pop(entry["dropped"], None)
        elif "standing" in entry:
            row = Row.from_dict(entry["standing"], where)
            self.standing[row.test] = row
        elif "row" in entry:
            row = Row.from_dict(entry["row"], where)
            self.rows.setdefault(row.test, []).append(row)

    def of_test(self, test: str) -> list[Row]:
        """The rows of a test: those that it brought, and that of its death or of its not having run."""
        rows = self.rows.get(test, [])
        if test not in self.running:
            return rows or [self.standing.get(test) or self._unmeasured(test, NOT_RUN)]
        if test in self.standing:  # measured, and the process died while its error was located
            return [*rows, self.standing[test]]
        how = f"; it did not end within its limit: {self.stacks}" if self.stacks else ""
        died = self._unmeasured(test, DIED + how + self.last_operator)
        return [*rows, replace(died, marks=(*died.marks, Mark.HUNG if self.stacks else Mark.CRASHED))]

    def _unmeasured(self, test: str, text: str) -> Row:
        named: dict[str, Any] = {"case": test.partition("::")[0], "dtype": None, "seed": None}
        named |= self.tests.get(test, {}) | self.running.get(test, {})
        return Row.of(error(text), test=test, case=named["case"], dtype=named["dtype"], seed=named["seed"])


def read_journal(path: Path) -> Report:
    """The report of a run that did not end, from its journal: a row for each test that was collected.

    Raises: HarnessError, in one sentence, where the file is no journal or holds a row that cannot be; OSError.
    """
    stacks = path.with_name(BESIDE["stacks"])
    told = _Told(
        last_operator=last_operator.description_in(path.with_name(BESIDE["operator"])),
        stacks=stacks_in(stacks.read_text(errors="replace")) if stacks.is_file() else "",
    )
    for number, entry in enumerate(_lines(path), 1):
        if number == 1 and entry.get("schema") != JOURNAL_SCHEMA:
            raise HarnessError(
                f"{path} has schema {entry.get('schema')!r} where {JOURNAL_SCHEMA!r} was expected; run the tests again"
            )
        try:
            told.take(entry, f"{path}: line {number}")
        except (Mismatch, AttributeError, KeyError, TypeError, ValueError) as raised:
            raise HarnessError(f"{path}: line {number} cannot be read ({raised}); run the tests again") from None
    tests = dict.fromkeys([*told.tests, *told.rows, *told.standing, *told.running])
    rows = tuple(row for test in tests for row in told.of_test(test))
    return Report(created=told.created or now(), rows=rows, **told.environment)
