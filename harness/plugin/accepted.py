"""What a run does with accepted numbers and known failures: it compares its rows with them, or accepts its rows."""

from __future__ import annotations

import datetime
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

REQUIRED = "accepted"  # the criterion of a row that fails since nothing was accepted for it


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
        verdict = replace(verdict, marks=(*verdict.marks, change.kind))
        if change.kind in (baseline.REGRESSED, baseline.INCOMPARABLE):
            worse = Reason(criterion="baseline", text=f"{change.kind}: {change.text}")
            return replace(verdict, regressions=(*verdict.regressions, worse))
        if change.kind == baseline.NEW and self._run.options.baseline == "require":
            text = f"no accepted numbers, which --precision-baseline=require asks for: {change.text}"
            return replace(verdict, failures=(*verdict.failures, Reason(criterion=REQUIRED, text=text)))
        return verdict

    def entry(self, case: str, dtype: str, environment: dict):
        """The accepted rows of a case on this device; None where there are none. Raises: HarnessError for a damaged
        file.
        """
        from harness.upgrade import baseline

        return baseline.entry_of(baseline.read_baseline(self.baselines, case, dtype), **environment)

    def knows(self, case, seed: int | None, environment: dict) -> bool:
        """Whether an entry of the known failures speaks of a row."""
        from harness.report import device_key
        from harness.upgrade import known_failures as known

        device = device_key(**environment) if environment["stack"] else ""
        return known.entry_for(self.known, case.name, case.dtype, seed, device) is not None

    def settle(self, case, seed: int | None, verdict):
        """The verdict as the known failures see it, and the entry that speaks of it: marked where it fails as known,
        failed where it may not.
        """
        from harness.judging.verdict import Reason
        from harness.report import Row, device_key
        from harness.upgrade import known_failures as known

        if verdict.skips:  # it neither fails as known nor passes
            return verdict, None
        device = device_key(**self._run.environment)
        entry = known.entry_for(self.known, case.name, case.dtype, seed, device)
        required = any(reason.criterion == REQUIRED for reason in verdict.failures)
        if entry is None or verdict.regressions or required:  # worse than what was accepted is no known failure
            return verdict, entry
        row = Row.of(verdict, test="", case=case.name, dtype=case.dtype, seed=seed)
        text = known.complaint(entry, row, accepted=self.row(row), today=datetime.date.today())
        if text is None:
            return replace(verdict, marks=(*verdict.marks, known.KNOWN)), entry
        why = Reason(criterion="known", text=text)  # the first, since without it the row would be excused
        return replace(verdict, failures=(why, *verdict.failures)), entry

    def row(self, row):
        """A row as it was accepted, where this run is compared with it; None where there is none."""
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

    def check_names(self, *, whole: bool, bad: bool) -> bool:
        """Say which accepted cases have no row; that is `bad` for a `whole` run. Whether all is well."""
        from harness.report import device_key
        from harness.upgrade import baseline

        cases = {(row.case, row.dtype) for row in self._run.all_rows()}
        device = device_key(**self._run.environment)
        result = baseline.without_a_case(self.baselines, cases, device, whole=whole)
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

        whole = self.selects_all()
        well = self.check_names(whole=whole, bad=whole)
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
        """Write the rows of each case as its baseline, and merge them into the accepted report of this stack. Whether
        all was accepted.
        """
        from harness.errors import HarnessError
        from harness.upgrade import baseline

        folder = self._run.directory / "accepted" / baseline.stack_name(**self._run.environment)
        try:
            stored = _stored_report(folder)
        except HarnessError as error:
            self._run.terminal.note(
                f"nothing was accepted, since the accepted report cannot be read ({error}); restore it from version "
                f"control, or delete {folder}",
                bad=True,
            )
            return False
        collected, whole = self._run.all_rows(), self.selects_all()
        groups = self.groups()
        accepted = {
            name: rows for name, rows in groups.items() if self._accept_case(*name, rows, collected, whole=whole)
        }
        self.check_names(whole=whole, bad=False)
        if accepted:
            markdown = self._write_report(folder, stored, collected, set(accepted), whole=whole)
            count = sum(map(len, accepted.values()))
            self._run.terminal.note(f"accepted {count} rows into {self.baselines}; their report is {markdown}")
        return bool(accepted) and len(accepted) == len(groups)

    def _write_report(self, folder: Path, stored, collected: list, accepted: set, *, whole: bool) -> Path:
        """Write the accepted report: the rows of this run, merged into the `stored` ones. Returns the markdown."""
        from harness import report
        from harness.report.merge import renewed, stack_differences

        built = report.build(collected, performance=self._run.performance, **self._run.environment)
        merged = built if stored is None else renewed(stored, built, accepted=accepted, whole=whole)
        stayed = len({row.key for row in merged.rows} - {row.key for row in built.rows})
        if stayed:
            other = stack_differences(stored, built)
            other_stack = f", measured on another stack: {'; '.join(other)}" if other else ""
            self._run.terminal.note(f"{stayed} rows of earlier runs stay in the accepted report{other_stack}")
        _, markdown = report.write(merged, folder, lang=self._run.options.lang)
        return markdown

    def _accept_case(self, case, dtype, rows: list, collected: list, *, whole: bool) -> bool:
        """Write the rows of one case in one dtype; whether that was done. `collected`: all rows of the run. Accepted
        rows that did not run are dropped where the `whole` was run, or where they are of another stack.
        """
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
        environment = self._run.environment
        entry = baseline.entry_of(before, **environment)
        gone = baseline.absent_rows(entry, rows)
        names = ", ".join(f"seed {name}" for name in gone)
        here = baseline.stack_name(**environment)
        stays = bool(gone) and not whole and baseline.stack_name(entry.stack, environment["backend"]) == here
        if stays:
            note(f"{case} {dtype}: {len(gone)} rows that were accepted before did not run and stay: {names}")
        elif gone:
            text = f"{case} {dtype}: {len(gone)} rows that were accepted before did not run and are dropped: {names}"
            note(text, bad=True)
        kept = gone if stays else {}
        when = time.strftime("%Y-%m-%d")
        try:
            baseline.write_baseline(
                self.baselines, baseline.accepted(before, rows, when=when, kept=kept, **environment)
            )
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

    def say_unexcused(self) -> None:
        """Say of each row that did not pass, and of which an entry of the known failures names the case, why the entry
        does not excuse it.
        """
        from harness.report import device_key

        device = device_key(**self._run.environment) if self._run.environment["stack"] else ""
        for row in self._run.all_rows():
            entries = [item for item in self.known if row.is_bad and item.case == row.case]
            speaking = [item for item in entries if item.covers(row.case, row.dtype, row.seed, device)]
            for entry in speaking or entries:
                why = _why_unexcused(entry, row, device)
                if why:
                    text = f"{row.name}: the known failure {entry} ({entry.link}) does not excuse it: {why}"
                    self._run.terminal.note(text, bad=True)

    def say_stale(self) -> None:
        """Name the known failures that no row of this run is."""
        from harness.report import device_key

        if not self.selects_all():
            return  # the rows that they speak of were perhaps not selected
        rows, device = self._run.all_rows(), device_key(**self._run.environment)
        stale = [
            item for item in self.known if not any(item.covers(row.case, row.dtype, row.seed, device) for row in rows)
        ]
        if stale:
            self._run.terminal.note(
                f"{len(stale)} known failures are no rows of this run: {', '.join(map(str, stale))}"
            )


def _why_unexcused(entry: Any, row: Any, device: str) -> str:
    """Why an entry of a row's case does not excuse the row; "" where a reason of the row says it."""
    from harness.judging.status import Mark

    if "known" in row.criteria:
        return ""
    differing = [
        f"its {name} is {given} and the row's is {found}"
        for name, given, found in (("dtype", entry.dtype, row.dtype), ("device", entry.device, device))
        if given not in (None, found)
    ]
    if entry.seeds and row.seed not in entry.seeds:
        differing.append(f"its seeds are {', '.join(map(str, entry.seeds))} and the row's is {row.seed}")
    if differing:
        return "; ".join(differing)
    if REQUIRED in row.criteria:
        return "nothing was accepted for the row"
    if Mark.INCOMPARABLE in row.marks:
        return "the row cannot be compared with what was accepted"
    if "baseline" in row.criteria:
        return "the row is worse than what was accepted"
    return "no entry excuses a process or a device that is lost, a time limit, or an error in the code of the test"


def is_unlike_accepted(verdict) -> bool:
    """Whether a row does not pass for the lack of numbers that it can be compared with alone: nothing shows an error
    of the device.
    """
    from harness.judging.status import Mark

    others = [reason for reason in verdict.failures if reason.criterion != REQUIRED]
    if others or verdict.errors:
        return False
    return Mark.INCOMPARABLE in verdict.marks or bool(verdict.failures and not verdict.regressions)


def _stored_report(folder: Path):
    """The accepted report in a folder; None where there is none. Raises: HarnessError where it cannot be read."""
    from harness import report

    path = folder / report.JSON_NAME
    return report.load(path) if path.exists() else None


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
