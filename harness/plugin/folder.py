"""The folder that a run writes its report into: its lock, the report of the run before, the journal and the files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


class Folder:
    """The folder of one run. Nothing is written before `begin`, and nothing where `worker` is true."""

    def __init__(self, directory: Path, *, lang: str, idle: bool):
        self.directory, self.lang = directory, lang
        self._idle = idle  # in a worker of pytest-xdist, and where tests are only listed
        self._journal: Any = None
        self._writer: Any = None
        self._told = 0  # how many tests the journal knows
        self._unsaved = False  # whether the journal has more than the report
        self.notes: list[str] = []  # of an earlier run, for the terminal
        self.earlier: Path | None = None  # the markdown of the run before, where this run put it aside

    def begin(self) -> None:
        """Take the folder for this run and put the report of an earlier run aside; again: nothing.

        A run that ends early must not leave an earlier report for its own. Where the earlier run died, its report is
        made from its journal first.

        Raises: pytest.UsageError where another run writes there, or nothing can be written.
        """
        from harness.report import journal, retire

        if self._idle or self._journal is not None or not self.directory.is_dir():
            return
        try:
            opened = journal.Journal(self.directory)
        except journal.Busy as error:
            raise pytest.UsageError(f"--precision-report: {error}") from None
        except OSError:
            opened = None  # `check` says so, or what comes next
        try:
            if opened is not None and opened.left_over():
                self._finish(opened.path)
            self.earlier = retire(self.directory)
        except OSError as error:
            raise pytest.UsageError(
                f"--precision-report {self.directory}: cannot put the report of an earlier run aside "
                f"({error.strerror}); name a directory that can be written"
            ) from None
        if opened is None:
            self.check()
            opened = journal.Journal(self.directory)
        opened.start()
        self._journal = opened

    def _finish(self, path: Path) -> None:
        """Make the report of a run that died, from its journal."""
        from harness.errors import HarnessError
        from harness.report import write
        from harness.report.journal import read_journal

        try:
            report = read_journal(path)
            if report.rows:
                write(report, self.directory, lang=self.lang)
        except HarnessError as error:
            previous = path.with_name("precision-previous.journal")
            shutil.copyfile(path, previous)
            self.notes.append(f"the journal of an earlier run is kept as {previous}, since {error}")

    def check(self) -> None:
        """Make the folder. Raises: pytest.UsageError where nothing can be written into it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory, prefix=".probe.") as file:
                file.write(b"-")
        except OSError as error:
            raise pytest.UsageError(
                f"--precision-report {self.directory}: cannot write there ({error.strerror}); name a directory "
                "that can be written"
            ) from None

    def collected(self, tests: Mapping[str, Mapping[str, Any]]) -> None:
        """The tests of this run, in order; told again where there are more."""
        if len(tests) > self._told:
            self._told = len(tests)
            self._say("collected", tests)

    def running(self, test: str, named: Mapping[str, Any] | None = None) -> None:
        """A test begins, or the row `named` of it."""
        self._say("running", test, named)

    def row(self, row: Any, *, final: bool = True) -> None:
        """A row that was measured; where it is not `final`, more of it is to come."""
        self._say("row", row, final=final)

    def dropped(self, test: str) -> None:
        """The rows of a test do not count: another attempt of it begins."""
        self._say("dropped", test)

    def ended(self, test: str) -> None:
        """A test ended."""
        self._say("ended", test)

    def environment(self, environment: Mapping[str, Any]) -> None:
        """The backend and the stack from here on."""
        self._say("environment", environment)

    def _say(self, name: str, *values: Any, **more: Any) -> None:
        if self._journal is None:
            return
        self._unsaved = True
        try:
            getattr(self._journal, name)(*values, **more)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, build: Callable[[], Any], *, last: bool = False) -> tuple[tuple[Path, Path], Any] | None:
        """Write the report that `build` gives: the `last` time, and before it where its turn has come.

        Returns the paths of both files and the report; None where it was not its turn. Raises: pytest.UsageError.
        """
        from harness import report

        self._writer = self._writer or report.Writer(self.directory, self.lang)
        if not last and not self._writer.is_due:
            return None
        built = build()
        try:
            paths = self._writer.write(built, last=last)
        except OSError as error:
            raise self._unwritable(error) from None
        self._unsaved = self._unsaved and not last
        return paths, built

    def _unwritable(self, error: OSError) -> pytest.UsageError:
        return pytest.UsageError(f"--precision-report {self.directory}: cannot write the report ({error})")

    def path_of(self, name: str) -> Path | None:
        """A file beside the journal, for what a process that dies leaves; None where there is no journal."""
        return None if self._journal is None else self._journal.beside(name)

    def end(self) -> None:
        """Give the folder back; the journal goes where the report holds all that it does."""
        if self._journal is not None:
            self._journal.close(remove=not self._unsaved)
            self._journal = None
