"""One run of pytest: its device, its rows, its report."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from harness.plugin.checkpoints import run_of
from harness.plugin.companion import Companions, superfluous
from harness.plugin.exit_status import complaints
from harness.plugin.fixtures import EXCUSED, PROPERTIES, ROWS, SKIPPED, uses_fixture
from harness.plugin.names import SHORT_DTYPE, dtype_id, is_accuracy_test, row_name
from harness.plugin.opening import Opening
from harness.plugin.options import options_of
from harness.plugin.turns import Turns
from harness.plugin.workers import Workers

ROW = "precision_row"  # the property that carries a whole row and where it was measured, as JSON
LOG_EVERY = 10.0  # seconds between progress lines where output is not a terminal


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
        self._report = None  # what was written last
        self._writer = None
        self._standing: dict[str, object] = {}  # rows of tests that have not ended, by test id
        self._brought: dict[str, set[str]] = {}  # the rows that reports have brought, as JSON, by test id
        self.planted: list = []  # faults, on the emulated device
        self._acted: set[str] = set()  # those that did, here or in a worker, as text
        self._device = None  # once its faults are planted
        self._introduced = False  # whether pytest's header named the device
        self.baselines = self.options.baselines or config.rootpath / "cases" / "baselines"
        self._cases: dict[tuple[str, str], object] = {}  # by name and dtype
        self._found: set[tuple[str, str]] = set()  # cases that were located, by name and dtype
        self._spent = 0.0  # seconds on locating
        self._unlocated = 0  # failing rows that the budget left out
        self.known: list = []  # the entries of the known failures
        self.said: list[tuple[str, bool]] = []  # of the baselines, for the terminal: a line, and whether it is bad
        self._models = None
        self._store = None
        self._timed: set = set()
        self._deselected = False  # whether an accuracy test was
        self._refused = False  # the session was stopped before its first test
        self.explicit = explicit  # the command line selects accuracy tests or holds an option of the harness
        self._turns = Turns()
        self._companions = Companions()
        self._workers = Workers(self.worker)
        self._workers.join(config)
        self._uncollected: dict[str, str] = {}  # files that could not be collected, and why
        self._ended_attempts: set[str] = set()  # tests whose attempt ended and whose next one did not begin
        self._attempts: dict[str, int] = {}  # attempts of a test that failed and were followed by another, by test id
        self._late: list = []  # rows that were asked for after their test had ended
        self._retired = False  # the report of an earlier run was put aside
        self._began = time.perf_counter()
        self._said = -math.inf  # when the last progress line was written

    # -------- the device and the run

    def begin(self, *, explicit: bool) -> None:
        """Check the options, and open the device of a run that asks for one; `explicit` where the command line does.

        Raises: pytest.UsageError where an option cannot be, or where the device that an option names cannot run.
        """
        if self.explicit:
            self._retire()
        self.read_known_failures()
        if not self.worker:
            self.check_options()  # here, since under pytest-xdist this process collects nothing
        if not explicit:
            return
        named = self.options.device != "auto" or bool(self.options.fault)
        if named and not self.worker and not self.config.option.collectonly:
            self._open_or_stop()
        else:
            self.open_for_collection()

    def open_for_collection(self) -> None:
        """Open the device before files of tests are imported; an error is for the accuracy tests that are collected."""
        if not self.opening.is_open:
            self.say(f"opening the device ({self.options.device})")
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
            self._read_stack()
        return self._device

    def header(self) -> list[str]:
        """The device, why it is this one, and its switches, for pytest's header; nothing before it is open, or a second
        time.
        """
        if self._introduced or (not self.opening.is_open and self.opening.error is None):
            return []
        self._introduced = True
        if self.opening.error is not None:
            return [f"accuracy: no device ({self.options.device}): {self.opening.error}"]
        device = self.opening.device
        stack = device.stack.to_dict()
        card = f", card {stack['card']}" if stack.get("card") else ""
        switches = [f"{name} {'on' if value else 'off'}" for name, value in stack.items() if isinstance(value, bool)]
        switches += [f"{name}={value}" for name, value in stack["environment"].items()]
        switches.append(f"{stack['threads']} threads")
        return [
            f"accuracy: {device.torch_device} is {device.name}{card}, {device.backend}: {device.reason}",
            f"accuracy: {', '.join(switches)}",
        ]

    def _retire(self) -> None:
        """Put the report of an earlier run aside, so that a run that ends early does not leave it for its own."""
        from harness.report import retire

        if self.worker or self._retired or self.config.option.collectonly:
            return
        self._retired = True
        try:
            retire(self.directory)
        except OSError as error:
            text = (
                f"cannot put the report of an earlier run aside ({error.strerror}); name a directory that can be "
                "written"
            )
            raise pytest.UsageError(f"--precision-report {self.directory}: {text}") from None

    def _plant(self) -> None:
        """Plant the faults that were asked for. Raises: DeviceError where the device is not an emulated one."""
        from harness.emulator import faults
        from harness.errors import DeviceError

        if self.options.fault and self._device.backend != "emulated":
            raise DeviceError(
                f"--precision-fault breaks an emulated device and this one is {self._device.name} "
                f"({self._device.backend}); add --precision-device=emulated"
            )
        self.planted = [faults.parse(each) for each in self.options.fault]
        for each in self.planted:
            faults.plant(each)

    def pytest_unconfigure(self) -> None:
        self._workers.close()
        if not self.planted:
            return
        from harness.emulator import faults

        for each in self.planted:
            faults.remove(each)

    def _read_stack(self) -> None:
        """Record where the run happens, switches included; read after a run, since models may change the switches."""
        self.environment = {"backend": self._device.backend, "stack": self._device.stack.to_dict()}

    def measure(self, case, seed: int | None):
        """Run one case with one seed on the CPU and on the device."""
        from harness.reference import Models
        from harness.run.validation import validate

        device = self.device
        self._models = self._models or Models(store=self._store)
        name = row_name(case.name, case.dtype, seed)
        compiles = self.environment["stack"].get("jit_compile")
        first = " (jit_compile is on: the first run of a shape compiles)" if compiles else ""
        self.say(f"{name}: CPU, then {device.torch_device}{first}")
        options = {"rerun_reference": self.options.rerun_reference, "preset": self.options.preset}
        verdict = validate(case, seed, device, models=self._models, **options)
        if verdict.evidence is not None and verdict.evidence.compiled:
            self.say(f"{name}: {verdict.evidence.compiled}")
            self.said.append((f"{name}: {verdict.evidence.compiled}", False))
        self._read_stack()
        if verdict.skips:  # nothing ran
            return verdict
        if self.options.bench:
            self._time(case)
        return self._held_against_baseline(case, seed, verdict)

    def _held_against_baseline(self, case, seed: int | None, verdict):
        """The verdict with what became of the row since its baseline; what all seeds share is judged at the end."""
        from harness.judging.verdict import Reason
        from harness.report import Row
        from harness.upgrade import baseline

        if self.options.baseline != "check":
            return verdict
        found = Row.of(verdict, test="", case=case.name, dtype=case.dtype, seed=seed)
        change = baseline.verdicts([found], self._entry(case.name, case.dtype, self.environment))[0]
        bad = (
            (Reason(criterion="baseline", text=f"{change.kind}: {change.text}"),)
            if change.kind in (baseline.REGRESSED, baseline.INCOMPARABLE)
            else ()
        )
        return replace(verdict, marks=(*verdict.marks, change.kind), regressions=(*verdict.regressions, *bad))

    def _entry(self, case: str, dtype: str, environment: dict):
        """The accepted rows of a case on this device; None where there are none. Raises: HarnessError for a damaged
        file.
        """
        from harness.upgrade import baseline

        return baseline.entry_of(baseline.read(self.baselines, case, dtype), **environment)

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
        device = baseline.key_of(**self.environment)
        entry = known.entry_for(self.known, case.name, case.dtype, seed, device)
        if entry is None or verdict.regressions:  # worse than what was accepted is no known failure
            return verdict, entry
        row = Row.of(verdict, test="", case=case.name, dtype=case.dtype, seed=seed)
        text = known.complaint(entry, row, accepted=self._accepted_row(row), today=datetime.date.today())
        if text is None:
            return replace(verdict, marks=(*verdict.marks, known.KNOWN)), entry
        return replace(verdict, failures=(*verdict.failures, Reason(criterion="known", text=text))), entry

    def _accepted_row(self, row):
        """A row as it was accepted, where this run is held against what was; None where there is none."""
        from harness.errors import HarnessError
        from harness.upgrade import baseline

        if self.options.baseline != "check":
            return None
        try:
            entry = self._entry(row.case, row.dtype, self.environment)
        except HarnessError:
            return None  # the row is an error that says so
        return None if entry is None else entry.rows.get(baseline.seed_of(row))

    def wants_location(self, case, *, failed: bool) -> bool:
        """Whether to look where a row comes from: it fails, was not located with another seed, and the budget is not
        spent; or it was asked for.
        """
        self._cases[case.name, case.dtype] = case
        every, key = self.options.locate_case is not None, (case.name, case.dtype)
        if self.options.locate == "off" or not (failed or every) or (key in self._found and not every):
            return False
        if self._device is not None and self._device.stopped:
            return False
        if self._spent >= self.options.locate_budget and not every:
            self._unlocated += 1
            return False
        self._found.add(key)
        return True

    def _keep(self, nodeid: str, row) -> None:
        """Let a row stand in the report before more is done with it, which may take long or end the process."""
        if not self.worker:
            self._standing[nodeid] = row
            self._write()

    def locate(self, case, seed: int | None, row):
        """Where a row's error comes from, as the report holds it."""
        began, counted = time.monotonic(), [(each, each.calls, each.hits) for each in self.planted]
        every = self.options.locate_case is not None
        try:
            return self._locate(case, seed, math.inf if every else self.options.locate_budget - self._spent, row)
        except Exception as error:  # noqa: BLE001  a row that failed must not be lost because its cause was not found
            from harness.report.located import unlocated

            return unlocated(f"It could not be located: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            self._spent += time.monotonic() - began
            for each, calls, hits in counted:  # what a fault did to the row itself is what the report says
                each.calls, each.hits = calls, hits

    def _locate(self, case, seed: int | None, limit: float, row):
        from harness.errors import HarnessError
        from harness.locate import locate
        from harness.locate.repro import write_repro
        from harness.report import write_text
        from harness.report.located import depth_picture, located

        level = self.options.locate
        self.say(f"{row_name(case.name, case.dtype, seed)}: locating, by {'operators' if level == 'auto' else level}")
        began, how = time.monotonic(), dict(models=self._models, level=level, limit=limit, row=_symptom(row))
        finding = locate(case, seed, self.device, backward=self.options.locate_backward, **how)
        if finding.first is None and finding.has_gradients:
            try:
                finding = locate(case, seed, self.device, backward=True, **how)
            except HarnessError as error:  # what the first look found stands without the gradients
                self.said.append((f"{case.name}: the gradients of its operators were not looked at: {error}", False))
        self._spent -= finding.compiling
        name = re.sub(r"[^\w.-]", "_", f"{case.name}-{case.dtype}" + ("" if seed is None else f"-seed{seed}"))
        folder, repro, picture = self.directory / "repro" / name, None, None
        if finding.trial is not None:
            title = f"{finding.first.name} on {self.device.name}: {finding.first.reasons[0]}"
            try:
                more = dict(
                    stack=self.environment["stack"],
                    faults=[str(each) for each in self.planted],
                    seconds=limit - (time.monotonic() - began),
                )
                repro = write_repro(finding.trial, folder, title=title, **more)
            except Exception as error:  # noqa: BLE001  the finding stands without it
                self.said.append(
                    (
                        (
                            f"no repro of {finding.first.name}: {type(error).__name__}: "
                            f"{' '.join(str(error).split())[:200]}"
                        ),
                        False,
                    )
                )
        if finding.level == "operators" and finding.steps:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "depth.svg", depth_picture(finding))
            picture = f"repro/{name}/depth.svg"
        return located(finding, repro, picture)

    def _time(self, case) -> None:
        """The performance table's rows for a case, once per model and dtype."""
        from harness.timing import time_case

        key = (case.model, case.checkpoint, case.weights_seed, case.dtype)
        if key in self._timed:
            return
        self._timed.add(key)
        self.say(f"{case.name} {dtype_id(case.dtype)}: timing")
        self.performance += time_case(case, self.device, self._models)

    def say(self, text: str) -> None:
        """A progress line: on a terminal overwritten by the next, in a log at most one every `LOG_EVERY` seconds."""
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        now = time.perf_counter() - self._began
        if terminal is None or self.worker or self.config.option.verbose < 0:
            return
        if not terminal.isatty and now - self._said < LOG_EVERY:
            return
        self._said = now
        line = f"[{now:5.1f} s] {text}"
        with self._uncaptured():
            if terminal.isatty:
                terminal.rewrite(line[: terminal._tw.fullwidth - 1], erase=True)
            else:
                terminal.ensure_newline()
                terminal.write_line(line)

    @contextmanager
    def _uncaptured(self):
        capture = self.config.pluginmanager.get_plugin("capturemanager")
        if capture is None:
            yield
            return
        with capture.global_and_fixture_disabled():
            yield

    # -------- collection

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if self.options.companion == "auto" and (uses_fixture(item) or is_accuracy_test(item.nodeid)):
            known = _known(item)
            made_inside = known["case"] == item.nodeid.partition("::")[0]
            self._companions.learn(_function(item) if made_inside else known["case"], known["dtype"])

    def wants_companion(self, item: pytest.Item, case) -> bool:
        """Whether a case of which a row was measured is to be run in float32 too."""
        if self.options.companion == "off" or self._device is None or self._device.stopped:
            return False
        rows = item.stash.get(ROWS, [])
        measured = any(row.case == case.name and row.dtype == case.dtype and row.rel_l2 is not None for row in rows)
        return measured and self._companions.wants(case, _function(item))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """With --precision-locate-case, the accuracy tests of that case alone."""
        wanted, seed = self.options.locate_case, self.options.locate_seed
        if wanted is None:
            return
        known = {id(item): _known(item) for item in items if is_accuracy_test(item.nodeid)}
        cases = {id(item): _cases_of(item, known[id(item)]) for item in items if id(item) in known}
        named = any(wanted in each for each in cases.values())
        chosen = [
            item
            for item in items
            if id(item) in known and (wanted in cases[id(item)] if named else wanted in item.nodeid)
        ]
        chosen = [item for item in chosen if seed is None or known[id(item)]["seed"] == seed]
        if not chosen:
            cases = ", ".join(sorted(set().union(*cases.values())))
            raise pytest.UsageError(
                f"no accuracy test is of the case {wanted!r}, or has it in its "
                f"id{'' if seed is None else f', with seed {seed}'}; the cases are {cases or 'none'}"
            )
        self.config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.worker:
            self._uncollected[report.nodeid] = _reason(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            if uses_fixture(item) or (self.whole and is_accuracy_test(item.nodeid)):
                self.collected[item.nodeid] = _known(item)
        if self.config.option.collectonly:
            return
        if self.worker:
            self._workers.tell(self.collected)
            if self.collected:
                self._open_store()
            return
        self._keep_uncollected()
        if not self.collected:
            return
        self._retire()
        self._refused = True
        self.check_directory()
        self._open_store()
        self._open_or_stop()
        self._refused = False

    def _keep_uncollected(self) -> None:
        """A row for each file that could not be collected, where it holds accuracy tests or the command line asks for
        such tests.
        """
        for nodeid, text in self._uncollected.items():
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

        if self.options.reference_store is None:
            return
        try:
            self._store = Store(self.options.reference_store)
        except HarnessError as error:
            raise pytest.UsageError(f"--precision-reference-store: {error}") from None

    def read_known_failures(self) -> None:
        from harness.errors import HarnessError
        from harness.upgrade.known_failures import read_known

        named, usual = self.options.known_failures, self.config.rootpath / "cases" / "known_failures.toml"
        if named is None and not usual.exists():
            return
        try:
            self.known = read_known(named or usual)
        except HarnessError as error:
            raise pytest.UsageError(f"--precision-known-failures: {error}") from None

    def check_options(self) -> None:
        """Stop with one message where the user named a device or a directory that cannot be."""
        if self.options.report is not None:
            self.check_directory()
        if self.options.device != "auto":
            from harness.devices import parse_spec

            try:
                parse_spec(self.options.device)
            except ValueError as error:
                raise pytest.UsageError(f"--precision-device: {error}") from None
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
                for each in self.options.fault:
                    faults.parse(each)
            except ValueError as error:
                raise pytest.UsageError(f"--precision-fault: {error}") from None

    def check_directory(self) -> None:
        """Stop with one message, before anything ran, where the report could not be written."""
        probe = self.directory / f".probe.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise pytest.UsageError(
                f"--precision-report {self.directory}: cannot write there ({error.strerror}); name a directory "
                "that can be written"
            ) from None

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        self._workers.configure(node)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        told = self._workers.collected()
        for nodeid in ids:
            if nodeid in told or (is_accuracy_test(nodeid) and not told):
                self.collected.setdefault(nodeid, told.get(nodeid) or _guessed(nodeid))
        if self.collected:
            self._retire()

    # -------- tests

    @contextmanager
    def one_row(self, item: pytest.Item, case, seed: int | None):
        """The turn of one row: no other row runs meanwhile, whatever thread asks for it.

        Raises: RuntimeError when its test has ended; the row is an ERROR of that test then.
        """
        with self._turns.turn(item.nodeid) as in_time:
            named = {"case": case.name, "dtype": case.dtype, "seed": seed}
            if not in_time:
                text = "its test had ended before it began: a test must wait for the threads that it starts"
                self._late.append(self._unmeasured(item.nodeid, "error", text, **named))
                raise RuntimeError(f"{row_name(case.name, case.dtype, seed)}: {text}")
            self._workers.running(item.nodeid, named)
            try:
                yield
            except (KeyboardInterrupt, SystemExit, pytest.exit.Exception) as raised:
                text = f"it was running when the session ended ({type(raised).__name__})"
                self._standing[item.nodeid] = self._unmeasured(item.nodeid, "error", text, **named)
                raise

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Forget what an earlier attempt of the test left, as pytest-rerunfailures makes."""
        left = item.stash.setdefault(PROPERTIES, [])
        item.user_properties[:] = [pair for pair in item.user_properties if not any(pair is other for other in left)]
        left.clear()
        for key in (ROWS, SKIPPED, EXCUSED):
            item.stash[key] = []
        self._turns.begin(item.nodeid)

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

    def add_row(self, item: pytest.Item, case, seed: int | None, verdict, known=None) -> None:
        """Attach a verdict to its test: each number as a property for junit, the whole row as JSON; then look where it
        comes from.
        """
        from harness.report import Row, jsonable
        from harness.upgrade.known_failures import KNOWN

        found = Row.of(verdict, test=item.nodeid, case=case.name, dtype=case.dtype, seed=seed, known=known)
        acted = [str(each) for each in self.planted if each.hits]
        environment = jsonable(self.environment)

        def carried() -> tuple[str, str]:
            return ROW, json.dumps({"row": found.to_dict(), "environment": environment, "acted": acted})

        numbers = [
            (name, value)
            for name, value in found.to_dict().items()
            if isinstance(value, (int, float, str)) and name != "test"
        ]
        place = len(item.user_properties) + len(numbers)
        item.user_properties += [*numbers, carried()]
        item.stash[PROPERTIES] += item.user_properties[place - len(numbers) :]
        item.stash[ROWS].append(found)
        if not verdict.skips and self.wants_location(case, failed=not verdict.passed and KNOWN not in verdict.marks):
            self._keep(item.nodeid, found)
            found = replace(found, located=self.locate(case, seed, found))
            item.user_properties[place] = carried()
            item.stash[PROPERTIES].append(item.user_properties[place])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker:
            return
        from harness.report import Row

        texts = [value for name, value in report.user_properties if name == ROW]
        brought = [json.loads(each) for each in texts]
        if not brought and report.nodeid not in self.collected:
            return
        report.user_properties = [each for each in report.user_properties if each[0] != ROW]  # junit has the numbers
        self.collected.setdefault(report.nodeid, _guessed(report.nodeid))
        self._acted |= {text for each in brought for text in each["acted"]}
        if report.outcome == "rerun":  # pytest-rerunfailures makes another attempt, whose rows count
            self._attempts[report.nodeid] = self._attempts.get(report.nodeid, 0) + 1
            self.rows.pop(report.nodeid, None)
            self._standing.pop(report.nodeid, None)
            self._brought.pop(report.nodeid, None)
            self._ended_attempts.add(report.nodeid)
            return
        if report.when == "setup":
            self._ended_attempts.discard(report.nodeid)
        elif report.nodeid in self._ended_attempts:  # the teardown of an attempt that does not count
            return
        rows = self.rows.setdefault(report.nodeid, [])
        if brought:  # in any phase: a fixture may validate, and catch what its row raises
            there = self._brought.setdefault(report.nodeid, set())  # later phases, and subtests, bring the same again
            new = [each for text, each in zip(texts, brought) if text not in there]
            there.update(texts)
            rows += [self._marked(Row.from_dict(each["row"], f"the row of {report.nodeid}")) for each in new]
            self.environment = brought[-1]["environment"]
        failing = [row for row in rows if not row.status.is_fine]
        if report.failed and not failing:
            rows.append(
                self._marked(
                    self._unmeasured(report.nodeid, "error", _reason(report), **self._workers.ran(report.nodeid))
                )
            )
        if report.skipped and not rows:
            rows.append(self._marked(self._unmeasured(report.nodeid, "skipped", _reason(report))))
        if report.when == "teardown" or report.failed:
            self._write()

    def _marked(self, row):
        """The row with the mark RERUN where it is not of the test's first attempt."""
        from harness.judging.status import Mark

        return replace(row, marks=(*row.marks, Mark.RERUN)) if self._attempts.get(row.test) else row

    def _unmeasured(self, nodeid: str, kind: str, text: str, **named):
        """The row of a test that brought no numbers; `named`: its case, dtype and seed where more is known than at
        collection.
        """
        from harness.judging import verdict
        from harness.report import Row

        return Row.of(
            getattr(verdict, kind)(text), test=nodeid, **(self.collected.get(nodeid) or _guessed(nodeid)) | named
        )

    # -------- the report

    def all_rows(self) -> list:
        """A row for every accuracy test that was collected, in order; one that did not run says so."""
        return [row for nodeid in self.collected for row in self.rows.get(nodeid) or [self._not_run(nodeid)]]

    def _not_run(self, nodeid: str):
        if nodeid not in self._standing:
            self._standing[nodeid] = self._unmeasured(nodeid, "error", "not run: the session ended before it")
        return self._standing[nodeid]

    def _write(self, *, last: bool = False) -> None:
        """Write the report as it stands, so that nothing is lost when the process dies in the next test."""
        from harness import report

        self._writer = self._writer or report.Writer(self.directory, self.options.lang)
        built = report.build(self.all_rows(), performance=self.performance, **self.environment)
        try:
            self.written, self._report = self._writer.write(built, last=last), built
        except OSError as error:
            raise pytest.UsageError(f"--precision-report {self.directory}: cannot write the report ({error})") from None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        from harness.report import Row

        output = getattr(node, "workeroutput", {})
        self.performance += json.loads(output.get("precision_performance", "[]"))
        self._late += [
            Row.from_dict(row, "a late row of a worker") for row in json.loads(output.get("precision_late", "[]"))
        ]

    # -------- accepted numbers

    def _replace(self, row, after) -> None:
        """Let `after` stand in the report in place of `row`."""
        self.rows[row.test] = [after if each is row else each for each in self.rows[row.test]]

    def _groups(self) -> dict[tuple[str, str], list]:
        """The rows that brought numbers, by case and dtype."""
        groups: dict[tuple[str, str], list] = {}
        for row in self.all_rows():
            if row.rel_l2 is not None:
                groups.setdefault((row.case, row.dtype), []).append(row)
        return groups

    def _refuse_twins(self) -> None:
        """Rows of one name become errors, one would hide the other, and rows that repeat what another seed measured."""
        from harness.report.rows import without_repeats, without_twins

        for row in superfluous(self.all_rows()):
            self.rows[row.test] = [each for each in self.rows[row.test] if each is not row]
        rows = [row for row in self.all_rows() if row.test in self.rows]  # what did not run stands for itself
        twins = without_repeats(rows) | without_twins(rows)
        for row in rows:
            if id(row) in twins:
                self._replace(row, twins[id(row)])
                self.said.append((f"{row.name}: {twins[id(row)].reasons[-1]}", True))

    def _check_names(self, *, bad: bool) -> bool:
        """Say which accepted rows no case of this run has; it is `bad` where the whole was run. Whether all is well."""
        from harness.upgrade import baseline

        cases = {(row.case, row.dtype) for row in self.all_rows()}
        found = baseline.without_a_case(self.baselines, cases, baseline.key_of(**self.environment))
        self.said += [(text, bad) for text in found]
        return not (found and bad)

    def _selects_all(self) -> bool:
        """Whether this run is of all accuracy tests, so that what has no row has no case."""
        from harness.plugin.selection import selects_all

        ran = all(row.key[0] == row.case and row.test in self.rows for row in self.all_rows())
        return ran and not self._deselected and selects_all(self.config, self.baselines.parent)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._deselected = self._deselected or any(
            is_accuracy_test(item.nodeid) or uses_fixture(item) for item in items
        )

    def _check_together(self) -> bool:
        """Hold all seeds of each case against its baseline; a row that is worse with the others becomes REGRESSED.
        Whether all is well.
        """
        from harness.errors import HarnessError
        from harness.upgrade import baseline

        well = self._check_names(bad=self._selects_all())
        for (case, dtype), rows in self._groups().items():
            try:
                entry = self._entry(case, dtype, self.environment)
            except HarnessError:
                continue  # its rows are errors that say so
            settled = baseline.settled(rows, entry)
            for row, after in zip(rows, settled):
                self._replace(row, after)
                if len(after.reasons) > len(row.reasons):
                    self.said.append((after.baseline.text, True))
                    well = False
                elif after.baseline.kind in (baseline.IMPROVED, baseline.DRIFT):
                    self.said.append((f"{after.baseline.kind}: {after.baseline.text}", False))
            loose = [] if self.options.preset else baseline.loosened(entry, rows)
            if loose:
                self.said.append(
                    (
                        (
                            f"{case} {dtype} is judged more loosely than when it was accepted: {', '.join(loose)}; "
                            "put the limit back, or --precision-baseline=accept"
                        ),
                        True,
                    )
                )
                well = False
            absent = baseline.absent(entry, rows)
            if absent:
                self.said.append(
                    (f"{len(absent)} accepted rows of {case} {dtype} did not run: {', '.join(absent)}", False)
                )
        return well

    def _accept(self) -> bool:
        """Write the rows of each case as its baseline, and the report beside them under the stack's name. Whether all
        was accepted.
        """
        from harness import report
        from harness.errors import HarnessError
        from harness.judging.status import Mark, Status
        from harness.upgrade import baseline

        well, accepted, collected = True, 0, self.all_rows()
        when = time.strftime("%Y-%m-%d")
        for (case, dtype), rows in self._groups().items():
            files = {
                _file(row) for row in rows
            }  # of an error that came before its case nobody knows more than its file
            failed = [
                row
                for row in collected
                if Mark.KNOWN not in row.marks
                and (
                    (row.status in (Status.FAIL, Status.ERROR) and (row.case, row.dtype) == (case, dtype))
                    or (row.case in files and row.status is Status.ERROR)
                )
            ]
            if failed:
                self.said.append(
                    (
                        (
                            f"{case} {dtype} is not accepted: {len(failed)} of its rows did not pass; a baseline "
                            "of a failure would hide it: mend it, or enter it in the known failures"
                        ),
                        True,
                    )
                )
                well = False
                continue
            try:
                before = baseline.read(self.baselines, case, dtype)
            except HarnessError as error:
                self.said.append((f"{error}; it is written anew", False))
                before = None
            gone = baseline.absent(baseline.entry_of(before, **self.environment), rows)
            if gone:
                self.said.append(
                    (
                        (
                            f"{case} {dtype}: {len(gone)} rows that were accepted before did not run and are "
                            f"dropped: {', '.join(gone)}"
                        ),
                        True,
                    )
                )
            try:
                baseline.write(self.baselines, baseline.accepted(before, rows, when=when, **self.environment))
            except HarnessError as error:
                self.said.append((str(error), True))
                well = False
                continue
            accepted += len(rows)
        self._check_names(bad=False)
        if accepted:
            built = report.build(collected, performance=self.performance, **self.environment)
            _, markdown = report.write(
                built, self.directory / "accepted" / baseline.stack_name(**self.environment), lang=self.options.lang
            )
            self.said.append((f"accepted {accepted} rows into {self.baselines}; their report is {markdown}", False))
        return well and bool(accepted)

    def _locate_together(self) -> None:
        """Locate the rows that only all seeds together showed to be worse."""
        from harness.judging.status import Status

        for row in self.all_rows():
            case = self._cases.get((row.case, row.dtype))
            if (
                row.status is Status.REGRESSED
                and row.located is None
                and case is not None
                and self.wants_location(case, failed=True)
            ):
                self._replace(row, replace(row, located=self.locate(case, row.seed, row)))

    def _say_loose(self) -> None:
        """Say how many limits could come down, of those that a case sets itself."""
        from harness.errors import HarnessError
        from harness.upgrade.ratchet import loose

        try:
            found = loose(row for row in self.all_rows() if row.limits)
        except HarnessError:
            return  # an odd row: the command says which
        if found:
            self.said.append(
                (
                    (
                        f"{len(found)} limits could come down: python -m harness ratchet "
                        f"{self.directory / 'precision.json'}"
                    ),
                    False,
                )
            )

    def _say_stale(self) -> None:
        """Name the known failures that no row of this run is."""
        from harness.upgrade.baseline import key_of

        rows, device = self.all_rows(), key_of(**self.environment)
        stale = [
            each for each in self.known if not any(each.covers(row.case, row.dtype, row.seed, device) for row in rows)
        ]
        if stale:
            self.said.append(
                (f"{len(stale)} known failures are no rows of this run: {', '.join(map(str, stale))}", False)
            )

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
            self._say_stale()
            self._say_loose()
        well = True
        if self.rows and self.options.baseline != "off":
            well = self._accept() if self.options.baseline == "accept" else self._check_together()
            self._locate_together()
        if self.rows or (self.collected and self._device is not None and not self._refused):
            self._write(last=True)
        if session.exitstatus == pytest.ExitCode.OK and not self.config.option.collectonly:
            asked = (self.explicit and self.whole) or bool(self.collected)  # others may have tests of that name
            said = complaints(self.all_rows(), asked=asked)
            self.said += [(text, True) for text in said]
            if said or not well or self.idle_faults():
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def idle_faults(self) -> list[str]:
        """The planted faults that never acted: the run shows nothing about them."""
        return [str(each) for each in self.planted if not self.worker and self.rows and str(each) not in self._acted]

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
        if self.written is None and not self.said:
            return
        terminalreporter.section("accuracy")
        if self.written is None:
            self._print_said(terminalreporter)
            return
        from harness.report.format import counts

        stored = self._report
        if stored.backend == "emulated":
            terminalreporter.write_line("EMULATED: measured on an emulated device; it says nothing about hardware")
        for each in stored.stack.get("faults") or ():
            terminalreporter.write_line(f"FAULT PLANTED: {each}")
        for each in self.idle_faults():
            terminalreporter.write_line(
                f"{each} never acted: none of the operators that it names ran, or there was nothing to change", red=True
            )
        for row in stored.rows:
            if row.located is not None:
                self._print_located(terminalreporter, row)
        if self._unlocated:
            terminalreporter.write_line(
                f"{self._unlocated} failing rows were not located: the budget of "
                f"{self.options.locate_budget:g} s is spent; --precision-locate-budget"
            )
        self._print_said(terminalreporter)
        device = stored.stack.get("device")
        terminalreporter.write_line(f"{counts(stored.headline)} on {device} ({stored.backend})")
        terminalreporter.write_line(f"report: {self.written[1]}")

    def _print_said(self, terminal) -> None:
        for text, bad in self.said:
            terminal.write_line(text, red=bad)

    def _print_located(self, terminal, row) -> None:
        """The finding on a row: whole where it was asked for, else its sentences."""
        from harness.report.located import found_text

        name = row_name(row.case, row.dtype, row.seed)
        if self.options.locate_case is not None:
            terminal.write_line(f"{name}:")
            terminal.write_line(found_text(row.located))
        else:
            terminal.write_line(f"located {name}: {row.located.said}")


def _symptom(row):
    """What a row shows that is to be located."""
    from harness.judging.status import Mark, Status
    from harness.locate import Symptom

    if row.status is Status.ERROR:
        return Symptom(error="; ".join(row.reasons))
    fractions = [
        each for each in row.comparisons.values() if each.expected_dtype.startswith(("float", "bfloat", "complex"))
    ]
    sizes = [math.inf if each.nonfinite_differ else each.rel_l2 for each in fractions]
    away = max((each for each in sizes if each == each), default=math.nan)
    return Symptom(fails=not row.status.is_fine, away=away, scatters=Mark.NONDETERMINISTIC in row.marks)


def _interrupt(number, frame):
    raise KeyboardInterrupt("SIGTERM")


def _file(row) -> str:
    return row.test.partition("::")[0]


def _known(item: pytest.Item) -> dict:
    """Case, dtype and seed of a collected test, from its parameters."""
    from harness.case import Case

    run = run_of(item)
    if run is not None:
        return {"case": run.case_name, "dtype": run.dtype, "seed": run.seed}
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    case = next((value for value in parameters.values() if isinstance(value, Case)), None)
    if case is None:
        return _guessed(item.nodeid)
    seed = parameters.get("seed")
    return {"case": case.name, "dtype": case.dtype, "seed": seed if type(seed) is int and 0 <= seed < 2**63 else None}


def _function(item: pytest.Item) -> str:
    """The test function of a test, whatever its parameters: its id without them."""
    return item.nodeid.partition("[")[0]


def _cases_of(item: pytest.Item, known: dict) -> set[str]:
    """The names of the cases that a test may run: its own, or where it says none those that its module holds."""
    from harness.case import Case

    if known["case"] != item.nodeid.partition("::")[0]:
        return {known["case"]}
    return {value.name for value in vars(item.module).values() if isinstance(value, Case)} or {known["case"]}


def _guessed(nodeid: str) -> dict:
    """The same from the test's id, where a worker holds the parameters."""
    identity = nodeid.partition("[")[2].removesuffix("]")
    names = {short: dtype for dtype, short in SHORT_DTYPE.items()} | {"float32": "float32", "float16": "float16"}
    dtype = next((dtype for short, dtype in names.items() if short in identity), None)
    seed = re.search(r"seed(\d+)", identity)
    return {"case": nodeid.partition("::")[0], "dtype": dtype, "seed": int(seed[1]) if seed else None}


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
