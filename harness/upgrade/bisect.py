"""Between which two of an ordered list of stacks the numbers changed: the ends run first, then the middle. python -m
harness bisect STACKS.toml

    command = ".venv-{name}/bin/pytest -k precision --report={report}"    # of every stack without one of its own
    timeout = 3600                                                        # seconds; without it a run may take any time
    [[stack]]                                                             # two or more, the oldest first
    name = "2.9.0"
    [[stack]]
    name = "2.10.0 on the other NPU"
    command = "ssh card1 ./run.sh > {report}/precision.json"

A command runs in `sh`, in the current directory, and writes precision.json into {report}, an empty folder. Both
placeholders are quoted for the shell, so they stand outside of other quotes; {{ and }} are braces. The report decides
and the exit status does not: a failing row makes it 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from harness.errors import HarnessError
from harness.judging.status import Status
from harness.report import JSON_NAME, Report, Row, load, upgrade_text, write_text
from harness.report.document import Table, Text, to_markdown
from harness.report.format import NO_VALUE
from harness.upgrade.tables import only_known, read_toml
from harness.upgrade.transitions import BAD as WORSE
from harness.upgrade.transitions import TransitionKind, Upgrade, compare_reports

GOOD, _BAD, CANNOT, OTHER, UNTRIED = "good", "bad", "cannot run", "other device", "not needed"
GRACE = 5.0  # seconds that a command is given to end by itself


@dataclass(frozen=True, kw_only=True)
class StackCommand:
    """One environment of the list."""

    name: str
    command: str  # for the shell, with {name} and {report}
    timeout: float | None = None  # seconds

    @property
    def folder(self) -> str:
        """What its run is kept under: an edited entry has another."""
        key = hashlib.sha256(json.dumps([self.name, self.command, self.timeout]).encode()).hexdigest()
        return "".join(item if item.isalnum() or item in "-_." else "_" for item in self.name[:40]) + f"-{key[:16]}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a command did, beside what it wrote."""

    seconds: float
    status: int | None  # None: it was stopped at its time limit


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What a stack is, against the good end."""

    verdict: str
    why: str
    seconds: float
    report: Report | None = None  # with the rows that decide; None where there is nothing to compare


def read_stacks(path: Path) -> list[StackCommand]:
    """The stacks of a TOML file, in its order.

    Raises: HarnessError when it is not a list of two or more stacks, each with a name of its own and a command.
    """
    read = read_toml(
        path, f"no list of stacks at {path}; write a TOML file with a [[stack]] for each environment, the oldest first"
    )
    only_known(read, ("command", "timeout", "stack"), f"{path}")
    entries = read.get("stack", [])
    tables = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    if not tables or len(entries) < 2:
        result = "one" if tables and entries else "no"
        raise HarnessError(
            f"{path} holds {result} [[stack]] where two or more were expected; write one for each environment, "
            "the oldest first"
        )
    stacks = [_stack(entry, read, f"{path}: stack {number}") for number, entry in enumerate(entries, 1)]
    for name, count in Counter(stack.name for stack in stacks).items():
        if count > 1:
            raise HarnessError(f"{path}: {count} stacks are called {name!r}; give each a name of its own")
    return stacks


def _stack(entry: Mapping[str, Any], shared: Mapping[str, Any], where: str) -> StackCommand:
    only_known(entry, ("name", "command", "timeout"), where)
    name, command, timeout = (
        entry.get("name"),
        entry.get("command", shared.get("command")),
        entry.get("timeout", shared.get("timeout")),
    )
    if not (isinstance(name, str) and name.strip() and name.isprintable()):
        raise HarnessError(
            f"{where} has {'no name' if name is None else f'the name {name!r}'} where one line of text was "
            "expected; name it"
        )
    where = f"{where} ({name})"
    if not (isinstance(command, str) and command.strip()):
        result = "no command" if command is None else f"the command {command!r}"
        raise HarnessError(
            f"{where} has {result} where a line for the shell was expected; give it one, or one to all above "
            "the first [[stack]]"
        )
    try:
        fields = [item[1:] for item in string.Formatter().parse(command) if item[1] is not None]
    except ValueError as error:
        raise HarnessError(
            f"{where}: the braces of its command do not pair ({error}); write {{{{ and }}}} for those of the shell"
        ) from None
    for field, form, conversion in fields:
        if field not in ("name", "report") or form or conversion:
            raise HarnessError(
                f"{where}: {{{field}}} in its command is neither {{name}} nor {{report}}; write {{{{ and }}}} "
                "for braces of the shell"
            )
    if "report" not in (item[0] for item in fields):
        raise HarnessError(
            f"{where}: its command has no {{report}}, the folder that it must write {JSON_NAME} into; add it"
        )
    if timeout is not None and not (type(timeout) in (int, float) and 0 < timeout < math.inf):
        raise HarnessError(
            f"{where} has the timeout {timeout!r} where seconds above 0 were expected; correct it, or leave it out"
        )
    return StackCommand(name=name, command=command, timeout=timeout)


def _execute(stack: StackCommand, folder: Path) -> Run:
    """Run a stack's command in an emptied folder. What came of it is written last, so an interrupted run leaves nothing
    to believe.
    """
    (folder / "result.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    report = folder / "report"
    report.mkdir(parents=True)
    command = stack.command.format(name=shlex.quote(stack.name), report=shlex.quote(str(report)))
    begin = time.monotonic()
    with open(folder / "log.txt", "wb") as log:
        with _signals_deferred() as interrupts:  # one that is raised in Popen would leave the child behind
            process = subprocess.Popen(
                ["sh", "-c", command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            if interrupts:
                raise KeyboardInterrupt(signal.Signals(interrupts[0]).name)
            status = process.wait(stack.timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            seconds = time.monotonic() - begin
            _end(process)
    run = Run(seconds=seconds, status=status)
    write_text(
        folder / "result.json",
        json.dumps({"stack": asdict(stack), "run": asdict(run)}, indent=1, ensure_ascii=False) + "\n",
    )
    return run


def _end(process: subprocess.Popen[bytes]) -> None:
    """End all that a command started: nothing may compute beside the next stack. Asked first, since a container dies
    with a client that is asked.
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(process.pid, signal.SIGTERM)
            limit = time.monotonic() + GRACE
            while time.monotonic() < limit:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.02)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _stored_run(folder: Path) -> Run | None:
    """The run that a folder holds, if it came to its end."""
    try:
        return Run(**json.loads((folder / "result.json").read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_line(log: Path) -> str:
    """What a command said last."""
    lines = log.read_bytes()[-4096:].decode(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "nothing")


@contextlib.contextmanager
def _signals_deferred() -> Iterator[list[int]]:
    """Signals that interrupt and come in the block are put into the list instead; what is ignored stays ignored."""
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        yield arrived
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and a closed terminal interrupt as Ctrl-C does: the command that runs is ended too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    replaced = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def halve(good: int, bad: int, verdict: Callable[[int], str]) -> tuple[int, int]:
    """The last good and the first bad position from two ends on, as far as those between them have a verdict."""
    untested = list(range(good + 1, bad))
    while untested:
        middle = untested.pop(len(untested) // 2)
        result = verdict(middle)
        good, bad = middle if result == GOOD else good, middle if result == _BAD else bad
        untested = [item for item in untested if good < item < bad]
    return good, bad


class _Search:
    """A list of stacks, what was found of them, and the good end: the first that could run."""

    def __init__(self, stacks: Sequence[StackCommand], *, case: str | None, what: str, state: Path, retry: bool):
        self.stacks, self.case, self.what, self.state, self.retry = stacks, case, what, state.resolve(), retry
        self.found: dict[int, _Finding] = {}
        self.good: Report | None = None  # the report of the good end, with the rows that decide
        self.runs = 0

    def look(self, index: int) -> str:
        """The verdict on a stack: by what an earlier run left, else by a run."""
        stack = self.stacks[index]
        folder = self.state / stack.folder
        run = _stored_run(folder)
        stored = None if run is None else self._judged(run, folder)
        if stored is not None and self.retry and stored.verdict in (CANNOT, OTHER):
            stored = None
        self.runs += stored is None
        _say(f"{f'run {self.runs}' if stored is None else 'kept'}: {stack.name} … ", end="")
        try:
            result = self._judged(_execute(stack, folder), folder) if stored is None else stored
            self.found[index] = result
            _say(f"{result.verdict}: {result.why}", end="")
        finally:
            _say("")
        return result.verdict

    def ends(self) -> tuple[int, int]:
        """The first and the last position that can run.

        Raises: HarnessError when there are no two, or they ran on different kinds of device.
        """
        count = len(self.stacks)
        good = next((index for index in range(count) if self.look(index) != CANNOT), None)
        bad = (
            None
            if good is None
            else next((index for index in reversed(range(good + 1, count)) if self.look(index) != CANNOT), None)
        )
        if good is None or bad is None:
            able = "none" if good is None else f"only {self.stacks[good].name!r}"
            why = "; ".join(
                f"{self.stacks[item].name}: {found.why}"
                for item, found in sorted(self.found.items())
                if found.verdict == CANNOT
            )
            raise HarnessError(
                f"{able} of the {count} stacks can run where two are needed; mend them and add --retry ({why})"
            )
        if self.found[bad].verdict == OTHER:
            raise HarnessError(
                f"{self.stacks[bad].name!r} cannot be the bad end: {self.found[bad].why}; take it out, or run "
                "it where the others run"
            )
        return good, bad

    def _judged(self, run: Run, folder: Path) -> _Finding:
        """What a run shows. Raises: ValueError when the good end has no row of the case that was asked for."""
        path = folder / "report" / JSON_NAME
        ended = (
            f"stopped after {run.seconds:.0f} s, at its time limit"
            if run.status is None
            else f"exit status {run.status}"
        )
        try:
            if run.status is None or not path.exists():
                raise HarnessError("no report")
            return self._compared(load(path), run.seconds)
        except (HarnessError, OSError) as error:
            why = str(error)
        return _Finding(
            verdict=CANNOT, why=f"{why}; {ended}; it said last: {_last_line(folder / 'log.txt')}", seconds=run.seconds
        )

    def _compared(self, report: Report, seconds: float) -> _Finding:
        """A report, held against the good end by the rows that decide; the first that holds such rows is the good
        end.
        """
        rows = self._chosen(report)
        if not rows and self.good is None and _measured(report.rows):
            cases = ", ".join(sorted({str(row.case) for row in report.rows}))
            raise ValueError(
                f"--case {self.case} is no case and no part of a test id of the good end; it has the cases {cases}"
            )
        if not _measured(rows):
            reasons = "; ".join(dict.fromkeys(f"{row.status} {reason}" for row in rows for reason in row.reasons))
            raise HarnessError(f"nothing was measured: {reasons[:300] or 'no rows'}")
        report = replace(report, rows=tuple(rows))
        if self.good is None:
            self.good = report
            return _Finding(verdict=GOOD, why="the good end", seconds=seconds, report=report)
        try:
            upgrade = compare_reports(self.good, report)
        except HarnessError as error:
            return _Finding(verdict=OTHER, why=str(error), seconds=seconds)
        bad = upgrade.counts().keys() & WORSE if self.what == "worse" else _changed(upgrade, self.good, report)
        why = ", ".join(f"{count} {kind}" for kind, count in upgrade.counts().items())
        return _Finding(verdict=_BAD if bad else GOOD, why=why, seconds=seconds, report=report)

    def _chosen(self, report: Report) -> list[Row]:
        """The rows that decide: those of the case, or where the good end has no such case, of the tests whose id holds
        the name.
        """
        named = any(row.case == self.case for row in (self.good or report).rows)
        return [
            row
            for row in report.rows
            if self.case is None or (row.case == self.case if named else self.case in row.test)
        ]


def _measured(rows: Sequence[Row]) -> bool:
    return any(row.status not in (Status.ERROR, Status.SKIPPED) for row in rows)


def _changed(result: Upgrade, before: Report, after: Report) -> bool:
    """Whether anything is not as before, to the bit; of a row that fails on both sides the transition does not say."""
    old, new = ({(row.case, row.dtype, row.seed): row.actual_sha256 for row in item.rows} for item in (before, after))
    unchanged = (TransitionKind.IDENTICAL, TransitionKind.STILL, TransitionKind.KNOWN, TransitionKind.SKIPPED)
    moved = any(old[name] != new[name] for name in old.keys() & new.keys())
    return moved or any(transition.kind not in unchanged for transition in result.transitions)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def bisect(
    path: Path,
    *,
    case: str | None = None,
    what: str = "worse",
    state: Path = Path("reports/bisect"),
    retry: bool = False,
) -> tuple[str, bool]:
    """The two stacks between which the numbers changed, as markdown, and whether there are such. `what` is "worse" or
    "changed", by a bit.

    `case` is a case's name or a part of test ids. What ran is kept in `state` and not run again; with `retry`, what
    could not run is.

    Raises: HarnessError when the list is not one, or no two stacks can be compared; ValueError for a case that is not
    there.
    """
    search = _Search(read_stacks(path), case=case, what=what, state=state, retry=retry)
    names = [stack.name for stack in search.stacks]
    with _terminable():
        first, last = search.ends()
        if search.found[last].verdict == GOOD:
            answer = (
                f"good and bad end agree: {names[last]} is "
                f"{'no worse than' if what == 'worse' else 'to the bit as'} {names[first]}"
            )
            return _text(search, answer), False
        good, bad = halve(first, last, search.look)
    answer = f"the numbers changed between {names[good]} and {names[bad]}"
    for verdict, words in ((CANNOT, "could not be run"), (OTHER, "ran on another device")):
        between = [names[index] for index in range(good + 1, bad) if search.found[index].verdict == verdict]
        answer += f"; {', '.join(between)} {words}" if between else ""
    before, after = search.found[good].report, search.found[bad].report
    assert before is not None and after is not None, "what was compared has a report"
    upgrade = compare_reports(before, after)
    return f"{_text(search, answer)}\n\n{upgrade_text(upgrade, title=f'{names[good]} → {names[bad]}')}", True


def _text(search: _Search, answer: str) -> str:
    """The answer over the table of all stacks."""
    rows = []
    for index, stack in enumerate(search.stacks):
        result = search.found.get(index)
        rows.append(
            (stack.name, result.verdict, result.why, f"{result.seconds:.1f}")
            if result
            else (stack.name, UNTRIED, NO_VALUE, NO_VALUE)
        )
    runs = (
        f"{search.runs} runs, {len(search.found) - search.runs} kept from before, of {len(rows)} stacks; their "
        f"reports and logs are in {search.state}"
    )
    table = Table(columns=("stack", "verdict", "why", "seconds"), rows=tuple(rows), numbers_from=3)
    return to_markdown([Text(text=answer, strong=True), Text(text=runs), table]).rstrip("\n")
