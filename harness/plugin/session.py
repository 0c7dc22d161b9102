"""One run of pytest: its device, its rows, its report."""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest

from harness.plugin.accepted import Accepted, is_unlike_accepted
from harness.plugin.cards import cards_for_rows, check_across
from harness.plugin.cluster import is_spread
from harness.plugin.collected import choose_located, choose_shard, function_of, guessed, known_of
from harness.plugin.companion import Companions, superfluous
from harness.plugin.exit_status import complaints
from harness.plugin.fixtures import EXCUSED, PROPERTIES, ROWS, SKIPPED, uses_fixture
from harness.plugin.folder import Folder
from harness.plugin.locating import Locating
from harness.plugin.names import dtype_id, is_accuracy_test, row_name
from harness.plugin.opening import Opening, reason_not_to_open
from harness.plugin.options import options_of
from harness.plugin.planted import PlantedCounts, counts_of
from harness.plugin.quarantine import Quarantine
from harness.plugin.terminal import Terminal, header, terminal_summary
from harness.plugin.told import Told
from harness.plugin.turns import Turns
from harness.plugin.watchdog import Limits, Watchdog
from harness.plugin.workers import Workers, exit_status_of

ROW = "precision_row"  # the property that carries a whole row and where it was measured, as JSON
REQUEUED = "requeued"  # the outcome of a report on a test that another worker will run
HUNG_STATUS = 1  # the exit status of a process that ends because its row hangs
SHARED_REFERENCES = 1 << 30  # bytes of the CPU's outputs that workers share without --precision-reference-store
LOCATING = 3  # times the budget of locating that a row may take longer where its error is located
FORKED = "precision() was called in a process that the test forked, whose rows reach no report; call it in the test"


class Session:
    """One run of pytest: the device it opened, the tests it collected, the rows it holds."""

    def __init__(self, config: pytest.Config, opening: Opening, *, whole: bool, explicit: bool):
        self.config = config
        self.options = options_of(config)
        self.opening = opening
        self.whole = whole  # every test_precision is an accuracy test; else only those that use the fixture
        self.worker = getattr(config, "workerinput", {}).get("workerid")  # its name under pytest-xdist, else None
        self.directory = self.options.report or config.rootpath / "reports"
        self.collected: dict[str, dict] = {}  # accuracy tests in order: test id -> case, dtype, seed as far as known
        self.rows: dict[str, list] = {}  # the rows by test id
        self.performance: list[dict] = []
        self.environment: dict = {"backend": None, "stack": {}}
        self.written: tuple[Path, Path] | None = None
        self.report = None  # what was written last
        idle = bool(self.worker) or config.option.collectonly
        self.folder = Folder(self.directory, lang=self.options.lang, idle=idle)
        self._standing: dict[str, object] = {}  # rows of tests that have not ended, by test id
        self._brought: dict[str, set[str]] = {}  # the rows that reports have brought, as JSON, by test id
        self.planted: list = []  # faults, on the emulated device
        self.counts = PlantedCounts()  # how often they acted, here or in workers
        self._device = None  # once its faults are planted
        self._introduced = False  # whether pytest's header named the device
        self.accepted = Accepted(self, self.options.baselines or config.rootpath / "cases" / "baselines")
        self.locating = Locating(self)
        self.terminal = Terminal(config, lang=self.options.lang, quiet=bool(self.worker))
        self.models = None
        self._across = None  # the cards on which every row runs, once the device is open
        self._store = None
        self._timed: set = set()
        self.deselected = False  # whether an accuracy test was
        self._refused = False  # the session was stopped before its first test
        self.explicit = explicit  # the command line selects accuracy tests or holds an option of the harness
        self._turns = Turns()
        self._companions = Companions()
        self._workers = Workers(self.worker)
        self._workers.join(config)
        self._has_card = bool(getattr(config, "workerinput", {}).get("precision_has_card"))
        self.quarantine = Quarantine(config, self._workers)
        self._quarantined: dict[str, object] = {}  # cards that answer no more in a run on all cards, by their text
        self._earlier = None  # the run that this one resumes
        self.resumed_rows = 0  # rows of it that stand
        self._code: str | None = None  # of the run, once its tests are collected
        self._limits = Limits(self.options.row_timeout)
        self._watchdog: Watchdog | None = None
        self._running: tuple[str, dict] = ("", {})  # the test that runs, and its row
        self._crash = None  # the file into which a worker's crash is written: open as long as the process lives
        self.uncollected: dict[str, str] = {}  # files that could not be collected, and why
        self._pid = os.getpid()
        self._forked = mmap.mmap(-1, 1)  # shared with processes that a test forks: whether one of them asked for a row
        self._ended_attempts: set[str] = set()  # tests whose attempt ended and whose next one did not begin
        self._attempts: dict[str, int] = {}  # attempts of a test that failed and were followed by another, by test id
        self._late: list = []  # rows that were asked for after their test had ended
        self._why_again: dict[str, str] = {}  # why a test ran again on a cluster, by test id
        self._told = Told()
        self.spread = None  # with --precision-ray: what hands the rows to the cluster

    # -------- the device and the run

    def begin(self, *, explicit: bool) -> None:
        """Check the options, and open the device of a run that asks for one; `explicit` where the command line does.

        Raises: pytest.UsageError where an option cannot be, or where the device that an option names cannot run.
        """
        if self.explicit:
            self.folder.begin()
        self.accepted.read_known_failures()
        if not self.worker:
            self.check_options()  # here, since under pytest-xdist this process collects nothing
        if is_spread(self.config, self.config.option) and not self.config.option.collectonly:
            self._begin_spread()
            return
        if not explicit:
            return
        named = self.options.device != "auto" or bool(self.options.fault)
        if named and not self.worker and not self.config.option.collectonly:
            self._open_or_stop()
        else:
            self.open_for_collection()

    def _begin_spread(self) -> None:
        """Hand the rows to the Ray cluster. Raises: pytest.UsageError where that cannot be."""
        from harness.emulator import faults
        from harness.plugin.spread import Spread

        self.planted = [faults.parse(item) for item in self.options.fault]  # the workers plant them
        self.spread = Spread(self)
        self.config.pluginmanager.register(self.spread, "precision-spread")

    def open_for_collection(self) -> None:
        """Open the device before files of tests are imported; an error is for the accuracy tests that are collected."""
        if not self.opening.is_open:
            self.terminal.say(f"opening the device ({self.options.device})")
        self.opening.open()

    @property
    def device(self):
        """The device under test, with its faults planted.

        Raises: DeviceError when it cannot run here.
        """
        if self._device is None:
            self.open_for_collection()
            self._device = self.opening.device
            self._plant()
            self._across = cards_for_rows(self._device, self.options)
            self._read_stack()
        return self._device

    def header(self) -> list[str]:
        """The device, for pytest's header; nothing before it is open, or a second time."""
        if self.spread is not None:
            lines = [] if self._introduced else [f"accuracy: rows run on {self.spread.cluster.describe()}"]
        else:
            lines = [] if self._introduced else header(self.opening, self.options.device)
        self._introduced = self._introduced or bool(lines)
        return [self.terminal.in_language(line) for line in lines]

    def _plant(self) -> None:
        """Plant the faults that were asked for. Raises: DeviceError where the device is not an emulated one."""
        from harness.emulator import faults
        from harness.errors import DeviceError

        if self.options.fault and self._device.backend != "emulated":
            raise DeviceError(
                f"--precision-fault breaks an emulated device and this one is {self._device.name} "
                f"({self._device.backend}); add --precision-device=emulated"
            )
        self.planted = [faults.parse(item) for item in self.options.fault]
        for item in self.planted:
            item.when_first = lambda: self._workers.fault_acts(counts_of(self.planted))
            faults.plant(item)

    def pytest_unconfigure(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()
        self._workers.close()
        self.folder.end()
        if not self.planted or self.spread is not None:
            return
        from harness.emulator import faults

        for item in self.planted:
            faults.remove(item)

    def _read_stack(self) -> None:
        """Record where the run happens, switches included; read after a run, since models may change the switches."""
        self.environment = {"backend": self._device.backend, "stack": self._device.stack.to_dict()}

    def _open_models(self) -> None:
        from harness.reference import Models

        self.models = self.models or Models(store=self._store)

    def resumed(self, item: pytest.Item, case, seed: int | None):
        """The row of an earlier run that stands for this one, see `harness.plugin.resume`; None where it is to run."""
        from harness.judging.status import Mark
        from harness.report import jsonable

        if self._earlier is None or not len(self._earlier) or self.accepted.knows(case, seed, self.environment):
            return None
        self.device  # noqa: B018  its stack is compared
        self._open_models()
        how = dict(models=self.models, environment=jsonable(self.environment), code=self._code)
        row = self._earlier.row(item.nodeid, case, seed, **how)
        if row is None or (self.options.preset and row.preset != self.options.preset):
            return None
        if self.options.baseline == "require" and Mark.NEW in row.marks:  # it passed where that was allowed
            return None
        if self._across is not None and len(row.cards or ()) < len(self._across.cards):  # it ran on fewer cards
            return None
        self.resumed_rows += 1
        return row

    def measure(self, case, seed: int | None):
        """Run one case with one seed on the CPU and on the device."""
        from harness.run.validation import validate

        device = self.device
        self._open_models()
        self._told.take_over(case, self.models)
        name = row_name(case.name, case.dtype, seed)
        compiles = self.environment["stack"].get("jit_compile")
        first = " (jit_compile is on: the first run of a shape compiles)" if compiles else ""
        self.terminal.say(f"{name}: CPU, then {device.torch_device}{first}")
        options = {"rerun_reference": self.options.rerun_reference, "preset": self.options.preset}
        options["across"] = self._across
        with self._in_time(case, compiles=bool(compiles)):
            verdict = validate(case, seed, device, models=self.models, **options)
        slow = "" if verdict.evidence is None else verdict.evidence.slow_start
        if slow:
            why = " (jit_compile is on: the first run of a shape compiles its operators)" if compiles else ""
            self.terminal.say(f"{name}: {slow}{why}")
            self.terminal.note(f"{name}: {slow}{why}")
        self._read_stack()
        if verdict.skips:  # nothing ran
            return verdict
        verdict = replace(verdict, evidence=replace(verdict.evidence, code_sha256=self._code))
        if self.options.bench:
            self._time(case)
        return self.accepted.compared(case, seed, verdict)

    @contextmanager
    def _in_time(self, case, *, compiles: bool, more: float = 0.0):
        """A block of a row that ends the process where it takes longer than the row's limit, and `more` seconds."""
        from harness import last_operator

        key = (case.name, case.dtype)
        self._watchdog = self._watchdog or self._watching()
        last_operator.note("")
        began = time.monotonic()
        with self._watchdog.limit(self._limits.of(key, compiles=compiles) + more):
            yield
        if not more:
            self._limits.took(key, time.monotonic() - began)

    def _watching(self) -> Watchdog:
        """The watchdog of this process, and the file in which the device's operators are noted."""
        from harness import last_operator

        path_of = self._workers.path_of if self.worker else self.folder.path_of
        operator, crash = path_of("operator"), self._workers.path_of("crash")
        if operator is not None:
            last_operator.record_into(operator)
        if crash is not None:
            self._crash = crash.open("w", encoding="utf-8")
            faulthandler.enable(self._crash, all_threads=False)
        theirs = float(self.config.getini("faulthandler_timeout") or 0)  # pytest's own use of the one timer there is
        return Watchdog(self._end_hung, None if theirs else path_of("stacks"))

    def _end_hung(self, text: str) -> None:
        """End this process, whose row hangs: called in the watchdog's thread."""
        if self.worker:
            self._workers.hung(text)
            os._exit(HUNG_STATUS)
        nodeid, named = self._running
        from harness.judging.status import Mark

        row = self._unmeasured(nodeid, "error", text, **named)
        row = replace(row, marks=(*row.marks, Mark.HUNG))
        self._standing[nodeid] = row
        self.folder.row(row, final=False)
        self.folder.ended(nodeid)
        self._write(last=True)
        self.folder.end()
        with self.terminal.uncaptured():
            then = "The run ends with it; --precision-isolate goes on with the rows after it."
            told, after = (self.terminal.in_language(line) for line in (text, then))
            sys.__stderr__.write(f"\n{row.name} {told}\n{after}\nreport: {self.directory / 'precision.md'}\n")
        os._exit(HUNG_STATUS)

    def _keep(self, nodeid: str, row) -> None:
        """Let a row stand in the report before more is done with it, which may take long or end the process."""
        if not self.worker:
            self._standing[nodeid] = row
            self.folder.row(row, final=False)
            self._write()

    def _time(self, case) -> None:
        """The performance table's rows for a case, once per model and dtype."""
        from harness.run.timing import time_case

        key = (case.model, case.checkpoint, case.weights_seed, case.dtype)
        if key in self._timed:
            return
        self._timed.add(key)
        self.terminal.say(f"{case.name} {dtype_id(case.dtype)}: timing")
        self.performance += time_case(case, self.device, self.models)

    @property
    def is_stopped(self) -> bool:
        """Whether the device no longer computes."""
        return self._device is not None and bool(self._device.stopped)

    # -------- collection

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if self.options.companion == "auto" and (uses_fixture(item) or is_accuracy_test(item.nodeid)):
            known = known_of(item)
            made_inside = known["case"] == item.nodeid.partition("::")[0]
            self._companions.learn(function_of(item) if made_inside else known["case"], known["dtype"])

    def wants_companion(self, item: pytest.Item, case) -> bool:
        """Whether a case of which a row was measured is to be run in float32 too."""
        if self.options.companion == "off" or self._device is None or self.is_stopped:
            return False
        rows = item.stash.get(ROWS, [])
        measured = any(row.case == case.name and row.dtype == case.dtype and row.rel_l2 is not None for row in rows)
        return measured and self._companions.wants(case, function_of(item))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """With --precision-locate-case, that case's accuracy tests alone; with --precision-shard, a part of them."""
        try:
            choose_located(self.config, self.options, items)
        except pytest.UsageError:
            items.clear()  # pytest ends its collection with what is left, and none of it is to be a row
            raise
        if self.options.shard is not None:
            choose_shard(self.config, self.options.shard, self._shard_times, items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.worker:
            self.uncollected[report.nodeid] = _reason(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if uses_fixture(item) or (self.whole and is_accuracy_test(item.nodeid)):
                self.collected[item.nodeid] = known_of(item)
        if self.config.option.collectonly:
            return
        if self.collected:
            self._read_code()
        if self.worker:
            self._workers.tell(self.collected)
            if self.collected:
                self._open_store()
            return
        self._keep_uncollected()
        if not self.collected:
            return
        self._refused = True
        self.folder.check()
        self.folder.begin()
        self._open_store()
        self._open_or_stop()
        self._refused = False
        self.folder.collected(self.collected)

    def _read_code(self) -> None:
        """Read the digest of the run's code, and the run before where it is to be resumed."""
        from harness.plugin.resume import Earlier, code_of_run

        self._code = code_of_run()
        if self.options.resume:
            self.folder.begin()
            self._earlier = Earlier(self.directory)

    def _keep_uncollected(self) -> None:
        """A row for each file that could not be collected, where it holds accuracy tests or the command line asks for
        such tests.
        """
        for nodeid, text in self.uncollected.items():
            if self.explicit or "precision" in _source(self.config.rootpath / nodeid.partition("::")[0]):
                self.collected[nodeid] = {"case": nodeid or str(self.config.rootpath), "dtype": None, "seed": None}
                self.rows[nodeid] = [self._unmeasured(nodeid, "error", f"not collected: {text}")]

    def _open_or_stop(self) -> None:
        """A device that cannot run stops the session before the first test, with one message."""
        from harness.errors import DeviceError

        try:
            self.device  # noqa: B018
        except (DeviceError, ValueError) as error:
            raise pytest.UsageError(f"--precision-device={self.options.device}: {error}") from None

    def _open_store(self) -> None:
        from harness.errors import HarnessError
        from harness.reference.store import Store

        shared = self._workers.references
        if self.options.reference_store is None and shared is None:
            return
        try:
            named = self.options.reference_store
            self._store = Store(shared, limit=SHARED_REFERENCES) if named is None else Store(named)
        except HarnessError as error:
            if self.options.reference_store is not None:
                raise pytest.UsageError(f"--precision-reference-store: {error}") from None

    @cached_property
    def _shard_times(self) -> dict[str, float]:
        """The seconds of each test by the report of --precision-shard-times, read once. Raises: HarnessError."""
        from harness.plugin.shards import seconds_of

        return seconds_of(self.options.shard_times)

    def check_options(self) -> None:
        """Stop with one message where the user named a device or a directory that cannot be."""
        if self.options.report is not None:
            self.folder.check()
        if self.options.device != "auto":
            from harness.devices import parse_spec

            try:
                parse_spec(self.options.device)
            except ValueError as error:
                raise pytest.UsageError(f"--precision-device: {error}") from None
        check_across(self.options)
        if self.options.shard is not None:
            from harness.errors import HarnessError
            from harness.plugin.shards import parse_shard

            try:
                parse_shard(self.options.shard)
                _ = self._shard_times  # it is read here, where an error has its option beside it
            except (HarnessError, ValueError) as error:
                raise pytest.UsageError(f"--precision-shard: {error}") from None
        if self.options.fault and self.options.baseline == "accept":
            raise pytest.UsageError(
                "--precision-baseline=accept with --precision-fault: the numbers of a device that was broken "
                "on purpose are no baseline; leave one of them out"
            )
        if self.options.preset is not None:
            from harness.judging.presets import PRESETS

            if self.options.preset not in PRESETS:
                raise pytest.UsageError(
                    f"--precision-preset: there is no {self.options.preset!r}; there are {', '.join(PRESETS)}"
                )
        if self.options.fault:
            from harness.emulator import faults

            try:
                for item in self.options.fault:
                    faults.parse(item)
            except ValueError as error:
                raise pytest.UsageError(f"--precision-fault: {error}") from None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        self._workers.configure(node)
        self.quarantine.started(node)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node) -> None:
        self.quarantine.ready(node)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched) -> None:
        """A test that a worker gave back, since its device computes no more, is for another one."""
        if self._workers.ended(report.node).test == crashitem:
            with suppress(NotImplementedError):  # of --dist=loadfile and others: the row is an error that says so
                sched.mark_test_pending(crashitem)
                report.outcome = REQUEUED
        self.quarantine.settle(report.node)

    def pytest_report_teststatus(self, report: pytest.TestReport):
        return ("", "", "") if report.outcome == REQUEUED else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """In a worker whose card computes no more: give the test back, and end."""
        if not self._has_card or item.nodeid not in self.collected or reason_not_to_open():
            return
        unopened = self.opening.error is not None
        if unopened or self.is_stopped:
            seen = str(self.opening.error) if unopened else self._device.stopped
            self._workers.gives_back(item.nodeid, seen, unopened=unopened)
            os._exit(HUNG_STATUS)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        told = self._workers.collected()
        named = [nodeid for nodeid in ids if nodeid in told or (is_accuracy_test(nodeid) and not told)]
        self.collected_elsewhere({nodeid: told.get(nodeid) or guessed(nodeid) for nodeid in named})

    def collected_elsewhere(self, tests: Mapping[str, dict]) -> None:
        """The accuracy tests that workers collected, by id, with case, dtype and seed, and the files that they could
        not collect.
        """
        self._keep_uncollected()
        self.collected = dict(tests) | self.collected
        if self.collected:
            self.folder.check()
            self.folder.begin()
            self.folder.collected(self.collected)

    def measured_on(self) -> dict:
        """In a worker, once the tests are collected: where it measures, and the digest of the code.

        Raises: pytest.UsageError where its device cannot run.
        """
        from harness.report import jsonable

        self._open_or_stop()
        return {**jsonable(self.environment), "code": self._code}

    def hears_rows(self, listener: Callable[[Mapping], None]) -> None:
        """In a worker: `listener` is told case, dtype and seed of each row that begins."""
        self._workers.listener = listener

    def begins_with(self, told: Told) -> None:
        """In a worker of a cluster: what other workers measured of the models of the next test."""
        self._told = told

    def learned(self) -> dict:
        """In a worker of a cluster: what is known of the models of the last test, as `Told.facts`."""
        return {} if self.models is None else self._told.learned(self.models)

    # -------- tests

    @contextmanager
    def one_row(self, item: pytest.Item, case, seed: int | None):
        """The turn of one row: no other row runs meanwhile, whatever thread asks for it.

        Raises: RuntimeError when its test has ended, the row is an ERROR of that test then; and in a process that the
        test forked, which fails the test.
        """
        with self._turns.turn(item.nodeid) as in_time:
            named = {"case": case.name, "dtype": case.dtype, "seed": seed}
            if not in_time:
                text = "its test had ended before it began: a test must wait for the threads that it starts"
                self._late.append(self._unmeasured(item.nodeid, "error", text, **named))
                raise RuntimeError(f"{row_name(case.name, case.dtype, seed)}: {text}")
            if os.getpid() != self._pid:
                self._forked[0] = 1
                raise RuntimeError(f"{row_name(case.name, case.dtype, seed)}: {FORKED}")
            self._workers.running(item.nodeid, named)
            self._running = (item.nodeid, named)
            self.folder.running(item.nodeid, named)
            try:
                yield
            except (KeyboardInterrupt, SystemExit, pytest.exit.Exception) as raised:
                self.was_running(item.nodeid, named, raised)
                raise

    def was_running(self, test: str, named: Mapping, raised: BaseException) -> None:
        """A row that ran when `raised` ended the session; `named`: its case, dtype and seed where more is known."""
        text = f"it was running when the session ended ({type(raised).__name__})"
        self._standing[test] = self._unmeasured(test, "error", text, **named)
        self.folder.row(self._standing[test], final=False)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if nodeid in self.collected:
            self.folder.running(nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Forget what an earlier attempt of the test left, as pytest-rerunfailures makes."""
        left = item.stash.setdefault(PROPERTIES, [])
        item.user_properties[:] = [pair for pair in item.user_properties if not any(pair is other for other in left)]
        left.clear()
        for key in (ROWS, SKIPPED, EXCUSED):
            item.stash[key] = []
        self._turns.begin(item.nodeid)
        self._workers.begins()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item):
        """A test that is called an accuracy test and compared nothing is an error; so is one that passes although a row
        of it does not.
        """
        try:
            outcome = yield
        except (KeyboardInterrupt, SystemExit, pytest.exit.Exception):
            raise
        except BaseException:
            self._turns.end(item.nodeid)
            raise
        self._turns.end(item.nodeid)
        from harness.judging.status import Status

        rows = item.stash.get(ROWS, [])
        if item.nodeid in self.collected and not rows:
            from harness.judging.verdict import NOTHING

            pytest.fail(NOTHING.text, pytrace=False)
        if self._forked[0]:
            self._forked[0] = 0
            pytest.fail(FORKED, pytrace=False)
        hidden = [row for row in rows if row.is_bad]
        if hidden:
            lines = [f"{row.status} {row.name}: {'; '.join(row.reasons)}" for row in hidden]
            pytest.fail("\n".join(["the test went on although a row of it did not pass", *lines]), pytrace=False)
        skipped = dict.fromkeys(item.stash.get(SKIPPED, []))
        if skipped and all(row.status == Status.SKIPPED for row in rows):
            pytest.skip("; ".join(skipped))  # at the end: another row of the test may run
        excused = item.stash.get(EXCUSED, [])
        if excused:  # at the end: a later row of the test may fail by itself
            pytest.xfail("; ".join(excused))
        return outcome

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> None:
        """What carries a test's rows is in its report, also where the test cleared its properties."""
        there = {id(pair) for pair in item.user_properties}
        item.user_properties += [pair for pair in item.stash.get(PROPERTIES, []) if id(pair) not in there]

    def add_resumed(self, item: pytest.Item, row) -> None:
        """Attach a row of an earlier run to its test."""
        from harness.report import jsonable

        text = json.dumps({"row": row.to_dict(), "environment": jsonable(self.environment), "acted": {}})
        item.stash[PROPERTIES].append((ROW, text))
        item.stash[ROWS].append(row)

    def add_row(self, item: pytest.Item, case, seed: int | None, verdict, known=None) -> None:
        """Attach a verdict to its test: each number as a property for junit, the whole row as JSON; then look where it
        comes from.
        """
        from harness.report import Row, jsonable
        from harness.run.across import CRITERION as ACROSS_CARDS
        from harness.upgrade.known_failures import KNOWN

        result = Row.of(verdict, test=item.nodeid, case=case.name, dtype=case.dtype, seed=seed, known=known)
        stored = result.to_dict()
        more = {
            "environment": jsonable(self.environment),
            "acted": counts_of(self.planted),
            "process": self.worker or "",
            "quarantined": jsonable(self._stopped_cards(result)),
        }
        numbers = [
            (name, value) for name, value in stored.items() if isinstance(value, (int, float, str)) and name != "test"
        ]
        # pytest_runtest_makereport puts them into the test's report.
        item.stash[PROPERTIES] += [*numbers, (ROW, json.dumps({"row": stored, **more}))]
        item.stash[ROWS].append(result)
        self._workers.measured(result)
        of_cards = all(
            reason.criterion == ACROSS_CARDS for reason in verdict.reasons
        )  # not of the card that is located
        settled = verdict.passed or of_cards or KNOWN in verdict.marks or is_unlike_accepted(verdict)
        failed = not (settled or self._is_raised_elsewhere(result))
        if not verdict.skips and self.locating.wants(case, failed=failed):
            self._keep(item.nodeid, result)
            with self._in_time(case, compiles=False, more=LOCATING * self.options.locate_budget):
                result = replace(result, located=self.locating.locate(case, seed, result))
            item.stash[PROPERTIES][-1] = ROW, json.dumps({"row": result.to_dict(), **more})

    def _is_raised_elsewhere(self, row) -> bool:
        """Whether a row is the error of a case's own functions or of the CPU's side: there is nothing to locate on the
        device, and the reason says where it was raised.
        """
        from harness.judging.status import Status

        where = None if self._device is None else self._device.where
        return row.status is Status.ERROR and not any(where is not None and where in text for text in row.reasons)

    def _stopped_cards(self, row) -> list:
        """The cards that stopped in this row: in a run on all cards any of them, else the one of this process where it
        is lost.
        """
        from harness.devices.several import card_name
        from harness.report.cards import Quarantined

        stopped = [] if self._across is None else [card for card in self._across.cards if card.device.stopped]
        new = {card.name: (card.device.stopped, "the other cards go on") for card in stopped}
        if not stopped and self._device is not None and self._device.lost:
            name = card_name(self._device, devices=self.options.devices)
            new[name] = self._device.stopped, "it got no more rows"
        new = {name: how for name, how in new.items() if name not in self._quarantined}
        for name, (seen, then) in new.items():
            self._quarantined[name] = Quarantined(card=name, after=row.name, seen=seen, then=then)
        return [self._quarantined[name] for name in new]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker or report.outcome == REQUEUED:
            return
        from harness.report import Row

        texts = [value for name, value in report.user_properties if name == ROW]
        brought = [json.loads(item) for item in texts]
        if not brought and report.nodeid not in self.collected:
            return
        report.user_properties = [
            user_property for user_property in report.user_properties if user_property[0] != ROW
        ]  # junit has the numbers
        self.collected.setdefault(report.nodeid, guessed(report.nodeid))
        for item in brought:
            self.counts.take(item.get("process", ""), item["acted"])
        if (
            report.outcome == "rerun"
        ):  # another attempt comes, whose rows count: pytest-rerunfailures', or a new worker's
            if report.when == "???":
                self._why_again[report.nodeid] = str(report.longrepr)
            self._attempts[report.nodeid] = self._attempts.get(report.nodeid, 0) + 1
            self.rows.pop(report.nodeid, None)
            self._standing.pop(report.nodeid, None)
            self._brought.pop(report.nodeid, None)
            self._ended_attempts.add(report.nodeid)
            self.folder.dropped(report.nodeid)
            return
        if report.when == "setup":
            self._ended_attempts.discard(report.nodeid)
        elif report.nodeid in self._ended_attempts:  # the teardown of an attempt that does not count
            return
        rows = self.rows.setdefault(report.nodeid, [])
        before = len(rows)
        if brought:  # in any phase: a fixture may validate, and catch what its row raises
            there = self._brought.setdefault(report.nodeid, set())  # later phases, and subtests, bring the same again
            new = [item for text, item in zip(texts, brought) if text not in there]
            there.update(texts)
            host = getattr(getattr(report, "node", None), "host", None)  # of a worker in a cluster
            made = [Row.from_dict(item["row"], f"the row of {report.nodeid}") for item in new]
            rows += [self._marked(replace(row, host=host)) for row in made]
            if brought[-1]["environment"]["stack"] or not self.environment["stack"]:  # a worker may be without a card
                self.environment = brought[-1]["environment"]
                self.folder.environment(self.environment)
            if self.spread is None:  # which has asked the card, and names its host
                self._note_quarantined(brought)
        failing = [row for row in rows if not row.status.is_fine]
        if report.when == "???":  # pytest-xdist's word for a test whose worker died
            rows += self._of_the_dead(report)
        elif report.failed and not failing:
            rows.append(self._marked(self._unmeasured(report.nodeid, "error", _reason(report))))
        if report.skipped and not rows:
            rows.append(self._marked(self._unmeasured(report.nodeid, "skipped", _reason(report))))
        for row in rows[before:]:
            self.folder.row(row)
        if report.when in ("teardown", "???"):
            self.folder.ended(report.nodeid)
        if report.when == "teardown" or report.failed:
            self._write()

    def _note_quarantined(self, brought: list[dict]) -> None:
        """Remember the cards that answer no more, of a run on all cards."""
        from harness.report.cards import Quarantined

        for item in brought:
            self._quarantined |= {each["card"]: Quarantined(**each) for each in item.get("quarantined", [])}

    def _of_the_dead(self, report: pytest.TestReport) -> list:
        """The rows of a test whose worker died: those that were measured before, and that of the death."""
        from harness.report import Row
        from harness.report.located import unlocated

        death = getattr(report, "death", None)  # a worker's in a cluster
        if death is None:
            death = self._workers.death_of(report.node.gateway.id, report.nodeid, exit_status_of(report.node))
        self.counts.take(death.worker, death.acts)
        rows = [self._marked(Row.from_dict(row, f"a row of {report.nodeid}")) for row in death.rows]
        if rows and rows[-1].key == tuple(death.named.get(name) for name in ("case", "dtype", "seed")):
            return [*rows[:-1], replace(rows[-1], located=unlocated(f"It could not be located: {death.text}"))]
        last = self._unmeasured(report.nodeid, "error", death.text, **death.named)
        return [*rows, self._marked(replace(last, marks=(*last.marks, death.mark)))]

    def _marked(self, row):
        """The row with the mark RERUN where it is not of the test's first attempt."""
        from harness.judging.status import Mark

        if not self._attempts.get(row.test):
            return row
        notes = (*(row.notes or ()), *filter(None, [self._why_again.get(row.test)]))
        return replace(row, marks=(*row.marks, Mark.RERUN), notes=notes or None)

    def _unmeasured(self, nodeid: str, kind: str, text: str, **named):
        """The row of a test that brought no numbers; `named`: its case, dtype and seed where more is known than at
        collection.
        """
        from harness.judging import verdict
        from harness.report import Row

        return Row.of(
            getattr(verdict, kind)(text), test=nodeid, **(self.collected.get(nodeid) or guessed(nodeid)) | named
        )

    # -------- the report

    def all_rows(self) -> list:
        """A row for every accuracy test that was collected, in order; one that did not run says so."""
        return [row for nodeid in self.collected for row in self.rows.get(nodeid) or [self._not_run(nodeid)]]

    def _not_run(self, nodeid: str):
        from harness.report.content import NOT_RUN

        if nodeid not in self._standing:
            self._standing[nodeid] = self._unmeasured(nodeid, "error", NOT_RUN)
        return self._standing[nodeid]

    def _write(self, *, last: bool = False) -> None:
        """Write the report as it stands, where its turn has come; the journal has each row already."""
        from harness import report

        def build():
            more = {"performance": self.performance, "shard": self.options.shard}
            more["idle_faults"] = self.idle_faults() if last else ()
            more["quarantined"] = self.quarantine.all_cards(self._quarantined)
            return report.build(self.all_rows(), **more, **self._environment_now())

        done = self.folder.write(build, last=last)
        if done is not None:
            self.written, self.report = done

    def _environment_now(self) -> dict:
        """Where the rows were measured, with the planted faults as all processes count them."""
        from harness.emulator import faults

        stack = self.environment["stack"] or {}  # a row that raised left it unread
        if not self.options.fault:
            return self.environment
        names = [str(faults.parse(item)) for item in self.options.fault]
        ours = {name: self.counts.total(name) for name in names}
        effects = [faults.effect_text(text, calls=calls, hits=hits) for text, (calls, hits) in ours.items()]
        others = [
            text for text in stack.get("faults") or () if not text.startswith(tuple(f"{name} (" for name in ours))
        ]
        return self.environment | {"stack": stack | {"faults": [*effects, *others]}}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        self.quarantine.down(node, error)
        self.take_output(getattr(node, "workeroutput", {}))

    def take_output(self, output: Mapping[str, str]) -> None:
        """What a worker brings at its end."""
        from harness.report import Row

        self.performance += json.loads(output.get("precision_performance", "[]"))
        self._late += [
            Row.from_dict(row, "a late row of a worker") for row in json.loads(output.get("precision_late", "[]"))
        ]

    # -------- accepted numbers

    def replace_row(self, row, after) -> None:
        """Let `after` stand in the report in place of `row`."""
        self.rows[row.test] = [after if item is row else item for item in self.rows[row.test]]

    def _refuse_twins(self) -> None:
        """Rows of one name become errors, one would hide the other, and rows that repeat what another seed measured."""
        from harness.report.rows import without_repeats, without_twins

        for row in superfluous(self.all_rows()):
            self.rows[row.test] = [item for item in self.rows[row.test] if item is not row]
        rows = [row for row in self.all_rows() if row.test in self.rows]  # what did not run stands for itself
        twins = without_repeats(rows) | without_twins(rows)
        for row in rows:
            if id(row) in twins:
                self.replace_row(row, twins[id(row)])
                self.terminal.note(f"{row.name}: {twins[id(row)].reasons[-1]}", bad=True)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected = self.deselected or any(is_accuracy_test(item.nodeid) or uses_fixture(item) for item in items)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.worker:
            self.config.workeroutput["precision_performance"] = json.dumps(self.performance)
            self.config.workeroutput["precision_late"] = json.dumps([row.to_dict() for row in self._late])
            return
        for row in self._late:
            self.rows.setdefault(row.test, []).append(row)
        if self.rows:
            self._refuse_twins()
            self.accepted.say_stale()
            self.accepted.say_loose()
        well = True
        if self.rows and self.options.baseline != "off":
            well = self.accepted.accept() if self.options.baseline == "accept" else self.accepted.check_together()
            self.locating.together()
        if self.rows:
            self.accepted.say_unexcused()
        measures = not self.config.option.collectonly  # else the report of an earlier run stays
        if measures and (self.rows or (self.collected and self._device is not None and not self._refused)):
            self._write(last=True)
        self.folder.end()
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and measures:
            asked = (self.explicit and self.whole) or bool(self.collected)  # others may have tests of that name
            ran = session.exitstatus != pytest.ExitCode.NO_TESTS_COLLECTED
            problems = complaints(self.all_rows(), asked=asked, ran=ran)
            self.terminal.notes += [(text, True) for text in problems]
            if problems or not well or self.idle_faults():
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def idle_faults(self) -> list[str]:
        """A sentence for each planted fault that never acted: the run shows nothing about it."""
        from harness.emulator import faults

        if self.worker or not self.rows:
            return []
        self.counts.take("", counts_of(self.planted))  # of this process, whose row may hang
        asked = [faults.parse(item) for item in self.options.fault]
        return [faults.idle_text(item) for item in asked if self.counts.has_idle(str(item))]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session):
        """A SIGTERM, as a CI's time limit sends it, ends the run as Ctrl-C does: the report is written."""
        try:
            before = signal.signal(signal.SIGTERM, _interrupt)
        except ValueError:  # not the main thread
            return (yield)
        try:
            return (yield)
        finally:
            signal.signal(signal.SIGTERM, before)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminal_summary(self, terminalreporter)


def _interrupt(number, frame):
    raise KeyboardInterrupt("SIGTERM")


def _source(path: Path) -> str:
    """The text of a file; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _reason(report: pytest.TestReport) -> str:
    """What a report of a test that failed or was skipped says, on one line."""
    text = report.longrepr
    if isinstance(text, tuple):  # a skip: path, line, "Skipped: …"
        return str(text[2]).removeprefix("Skipped: ")
    crash = getattr(text, "reprcrash", None)
    return " ".join((crash.message if crash is not None else str(text)).split()).removeprefix("harness.errors.")
