"""What a run does with accepted numbers and known failures: it compares its rows with them, or accepts its rows."""

from __future__ import annotations

import datetime
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest


class Accepted:
    """The accepted numbers and the known failures of one run; `run` has its rows."""

    def __init__(self, run: Any, baselines: Path):
        self._run = run
        self.baselines = baselines
        self.known: list[Any] = []  # the entries of the known failures

    @property
    def is_checked(self) -> bool:
        """Whether rows are compared with accepted numbers."""
        return self._run.options.baseline in ("check", "require")

    def compared(self, case, seed: int | None, verdict):
        """The verdict with what became of the row since its baseline; what all seeds share is judged at the end."""
        from harness.judging.verdict import Reason
        from harness.report import Row
        from harness.upgrade import baseline

        if not self.is_checked:
            return verdict
        result = Row.of(verdict, test="", case=case.name, dtype=case.dtype, seed=seed)
        change = baseline.verdicts([result], self.entry(case.name, case.dtype, self._run.environment))[0]
        failing = [baseline.REGRESSED, baseline.INCOMPARABLE]
        if self._run.options.baseline == "require":
            failing.append(baseline.NEW)
        bad = (Reason(criterion="baseline", text=f"{change.kind}: {change.text}"),) if change.kind in failing else ()
        return replace(verdict, marks=(*verdict.marks, change.kind), regressions=(*verdict.regressions, *bad))

    def entry(self, case: str, dtype: str, environment: dict):
        """The accepted rows of a case on this device; None where there are none. Raises: HarnessError for a damaged
        file.
        """
        from harness.upgrade import baseline

        return baseline.entry_of(baseline.read_baseline(self.baselines, case, dtype), **environment)

    def knows(self, case, seed: int | None, environment: dict) -> bool:
        """Whether an entry of the known failures speaks of a row."""
        from harness.upgrade import baseline
        from harness.upgrade import known_failures as known

        device = baseline.case_key(**environment) if environment["stack"] else ""
        return known.entry_for(self.known, case.name, case.dtype, seed, device) is not None

    def settle(self, case, seed: int | None, verdict):
        """The verdict as the known failures see it, and the entry that speaks of it: marked where it fails as known,
        failed where it may not.
        """
        from harness.judging.verdict import Reason
        from harness.report import Row
        from harness.upgrade import baseline
        from harness.upgrade import known_failures as known

        if verdict.skips:  # it neither fails as known nor passes
            return verdict, None
        device = baseline.case_key(**self._run.environment)
        entry = known.entry_for(self.known, case.name, case.dtype, seed, device)
        if entry is None or verdict.regressions:  # worse than what was accepted is no known failure
            return verdict, entry
        row = Row.of(verdict, test="", case=case.name, dtype=case.dtype, seed=seed)
        text = known.complaint(entry, row, accepted=self.row(row), today=datetime.date.today())
        if text is None:
            return replace(verdict, marks=(*verdict.marks, known.KNOWN)), entry
        return replace(verdict, failures=(*verdict.failures, Reason(criterion="known", text=text))), entry

    def row(self, row):
        """A row as it was accepted, where this run is held against what was; None where there is none."""
        from harness.errors import HarnessError
        from harness.upgrade import baseline

        if not self.is_checked:
            return None
        try:
            entry = self.entry(row.case, row.dtype, self._run.environment)
        except HarnessError:
            return None  # the row is an error that says so
        return None if entry is None else entry.rows.get(baseline.seed_of(row))

    def read_known_failures(self) -> None:
        from harness.errors import HarnessError
        from harness.upgrade.known_failures import read_known

        named = self._run.options.known_failures
        usual = self._run.config.rootpath / "cases" / "known_failures.toml"
        if named is None and not usual.exists():
            return
        try:
            self.known = read_known(named or usual)
        except HarnessError as error:
            raise pytest.UsageError(f"--precision-known-failures: {error}") from None

    def groups(self) -> dict[tuple[str, str], list]:
        """The rows that brought numbers, by case and dtype."""
        groups: dict[tuple[str, str], list] = {}
        for row in self._run.all_rows():
            if row.rel_l2 is not None:
                groups.setdefault((row.case, row.dtype), []).append(row)
        return groups

    def check_names(self, *, bad: bool) -> bool:
        """Say which accepted rows no case of this run has; it is `bad` where the whole was run. Whether all is well."""
        from harness.upgrade import baseline

        cases = {(row.case, row.dtype) for row in self._run.all_rows()}
        result = baseline.without_a_case(self.baselines, cases, baseline.case_key(**self._run.environment))
        self._run.terminal.notes += [(text, bad) for text in result]
        return not (result and bad)

    def selects_all(self) -> bool:
        """Whether this run is of all accuracy tests, so that what has no row has no case."""
        from harness.plugin.selection import selects_all

        ran = all(row.key[0] == row.case and row.test in self._run.rows for row in self._run.all_rows())
        return ran and not self._run.deselected and selects_all(self._run.config, self.baselines.parent)

    def check_together(self) -> bool:
        """Hold all seeds of each case against its baseline; a row that is worse with the others becomes REGRESSED.
        Whether all is well.
        """
        from harness.errors import HarnessError
        from harness.upgrade import baseline

        well = self.check_names(bad=self.selects_all())
        for (case, dtype), rows in self.groups().items():
            try:
                entry = self.entry(case, dtype, self._run.environment)
            except HarnessError:
                continue  # its rows are errors that say so
            settled = baseline.settled_entries(rows, entry)
            for row, after in zip(rows, settled):
                self._run.replace_row(row, after)
                if len(after.reasons) > len(row.reasons):
                    self._run.terminal.note(after.baseline.text, bad=True)
                    well = False
                elif after.baseline.kind in (baseline.IMPROVED, baseline.DRIFT):
                    self._run.terminal.note(f"{after.baseline.kind}: {after.baseline.text}")
            loose = [] if self._run.options.preset else baseline.loosened(entry, rows)
            if loose:
                self._run.terminal.note(
                    f"{case} {dtype} is judged more loosely than when it was accepted: {', '.join(loose)}; "
                    "put the limit back, or --precision-baseline=accept",
                    bad=True,
                )
                well = False
            absent = baseline.absent(entry, rows)
            if absent:
                self._run.terminal.note(
                    f"{len(absent)} accepted rows of {case} {dtype} did not run: {', '.join(absent)}"
                )
        return well

    def accept(self) -> bool:
        """Write the rows of each case as its baseline, and the report beside them under the stack's name. Whether all
        was accepted.
        """
        from harness import report
        from harness.upgrade import baseline

        collected = self._run.all_rows()
        groups = self.groups()
        accepted = [rows for name, rows in groups.items() if self._accept_case(*name, rows, collected)]
        self.check_names(bad=False)
        if accepted:
            built = report.build(collected, performance=self._run.performance, **self._run.environment)
            _, markdown = report.write(
                built,
                self._run.directory / "accepted" / baseline.stack_name(**self._run.environment),
                lang=self._run.options.lang,
            )
            count = sum(map(len, accepted))
            self._run.terminal.note(f"accepted {count} rows into {self.baselines}; their report is {markdown}")
        return bool(accepted) and len(accepted) == len(groups)

    def _accept_case(self, case, dtype, rows: list, collected: list) -> bool:
        """Write the rows of one case in one dtype; whether that was done. `collected`: all rows of the run."""
        from harness.errors import HarnessError
        from harness.upgrade import baseline

        note = self._run.terminal.note
        failed = _failed(case, dtype, rows, collected)
        if failed:
            note(
                f"{case} {dtype} is not accepted: {failed} of its rows did not pass; a baseline "
                "of a failure would hide it: mend it, or enter it in the known failures",
                bad=True,
            )
            return False
        try:
            before = baseline.read_baseline(self.baselines, case, dtype)
        except HarnessError as error:
            note(f"{error}; it is written anew")
            before = None
        gone = baseline.absent(baseline.entry_of(before, **self._run.environment), rows)
        if gone:
            note(
                f"{case} {dtype}: {len(gone)} rows that were accepted before did not run and are "
                f"dropped: {', '.join(gone)}",
                bad=True,
            )
        when = time.strftime("%Y-%m-%d")
        try:
            baseline.write_baseline(self.baselines, baseline.accepted(before, rows, when=when, **self._run.environment))
        except HarnessError as error:
            note(str(error), bad=True)
            return False
        return True

    def say_loose(self) -> None:
        """Say how many limits could come down, of those that a case sets itself."""
        from harness.errors import HarnessError
        from harness.upgrade.ratchet import loose

        try:
            result = loose(row for row in self._run.all_rows() if row.limits)
        except HarnessError:
            return  # an odd row: the command says which
        if result:
            self._run.terminal.note(
                f"{len(result)} limits could come down: python -m harness ratchet "
                f"{self._run.directory / 'precision.json'}"
            )

    def say_stale(self) -> None:
        """Name the known failures that no row of this run is."""
        from harness.upgrade.baseline import case_key

        rows, device = self._run.all_rows(), case_key(**self._run.environment)
        stale = [
            item for item in self.known if not any(item.covers(row.case, row.dtype, row.seed, device) for row in rows)
        ]
        if stale:
            self._run.terminal.note(
                f"{len(stale)} known failures are no rows of this run: {', '.join(map(str, stale))}"
            )


def _failed(case, dtype, rows: list, collected: list) -> int:
    """How many rows of a case in a dtype did not pass. Of an error that came before its case nobody knows more than
    its file: it counts for the cases of that file.
    """
    from harness.judging.status import Mark, Status

    files = {_file(row) for row in rows}

    def counts(row) -> bool:
        own = (row.case, row.dtype) == (case, dtype) and row.status in (Status.FAIL, Status.ERROR)
        return own or (row.case in files and row.status is Status.ERROR)

    return sum(Mark.KNOWN not in row.marks and counts(row) for row in collected)


def _file(row) -> str:
    return row.test.partition("::")[0]
