"""--precision-ray: the rows of a run on the workers of a Ray cluster, booked here as if they had run here.

This process collects nothing and opens no device. A worker that dies costs the test that it runs, which another worker
runs once more; when that one dies too, its row is an ERROR with the mark CRASHED. A worker whose device computes no
more ends. Then, and after a death, its card is asked in another process, and one that does not answer gets no more
rows.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.judging.status import Mark
from harness.plugin.cluster import Cluster, LostWorker
from harness.plugin.cluster_worker import VISIBLE_CARDS, Start
from harness.plugin.names import row_name
from harness.plugin.row_queue import Queued, RowQueue
from harness.plugin.workers import Death

TICK = 1.0  # seconds between progress lines
PATIENCE = 300.0  # seconds that a run waits for a node where none is left that has what a worker takes
WORKERS_ENDING = 60.0  # seconds that all workers together may take for their end


@dataclass(kw_only=True, eq=False)
class Member:
    """A worker as this process knows it. Reports have it as `node`, as those of pytest-xdist's workers have theirs."""

    name: str
    actor: Any
    host: str = ""
    label: str = ""  # host and cards, for the terminal
    node: str = ""  # Ray's number of the host
    cards: str = ""  # of the host, by Ray's numbers
    is_ready: bool = False
    is_stopped: bool = False  # its device computes no more
    test: str = ""  # that runs
    named: Mapping[str, Any] = field(default_factory=dict)  # case, dtype and seed of its row
    location: tuple[str, int | None, str] | None = None
    workerinfo: Mapping[str, Any] = field(default_factory=dict)  # what pytest's terminal says of a failure's process

    @property
    def gateway(self) -> Any:
        """Where pytest's terminal looks for the name of a worker."""
        return SimpleNamespace(id=self.label)


class Spread:
    """The plugin of pytest that hands the tests of one run to a cluster; `run` is the session object of the run.

    Raises: pytest.UsageError where the options do not fit, or the cluster cannot be used.
    """

    def __init__(self, run: Any):
        self._run, self._config = run, run.config
        _refuse_others(self._config)
        root = self._config.rootpath
        self.cluster = Cluster(run.options.ray, device=run.options.device, root=root, report=run.directory)
        self._members: dict[str, Member] = {}
        self._awaited: dict[Any, Member] = {}  # the answers that are to come
        self._started = 0
        self._not_started: list[str] = []  # why workers could not start
        self._queue: RowQueue | None = None
        self._tests: dict[str, Any] = {}
        self._queued: dict[str, Queued] = {}
        self._facts: dict[str, dict[tuple[str, str], Any]] = {}  # of models, by group of tests
        self._left: set[str] = set()  # tests that have not ended
        self._deaths: dict[str, list[str]] = {}  # of the workers of a test, in words
        self._counts: Counter[str] = Counter()  # tests that ended, by host
        self._environment: dict[str, Any] | None = None
        self._quarantined: list[Member] = []  # workers that keep a card which answers no more, so that none gets it
        self._alone_since: float | None = None  # when the cluster was first seen without room

    # -------- pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool:
        """The tests that the first worker collected."""
        self._session = session
        for _ in range(self.cluster.need.workers):
            self._add()
        while self._queue is None:
            self._step()
        session.testscollected = len(self._tests)
        self._run.collected_elsewhere({test: known for test, known in self._tests.items() if known is not None})
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed and not session.config.option.continue_on_collection_errors:
            failed = f"{session.testsfailed} error{'s' * (session.testsfailed != 1)} during collection"
            raise session.Interrupted(failed)
        self._left = set(self._tests)
        self._give_to_idle()
        try:
            self._run_all(session)
        except BaseException as raised:
            for member in self._members.values():
                if member.test in self._run.collected:
                    self._run.was_running(member.test, member.named, raised)
            raise
        self._end()
        return True

    def _run_all(self, session: pytest.Session) -> None:
        """Every test. Raises: as pytest's own loop does where the run is to stop."""
        while self._left or any(member.is_stopped for member in self._members.values()):  # whose cards are asked
            self._step()
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)

    def pytest_report_teststatus(self, report: pytest.TestReport) -> Any:
        """A test whose worker died, and that runs again."""
        if report.outcome == "rerun" and report.when == "???":
            return "rerun", "R", ("RERUN", {"yellow": True})
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        for member in [*self._members.values(), *self._quarantined]:
            self.cluster.kill(member.actor, is_placed=bool(member.label))
        self._members.clear()
        self._quarantined.clear()
        self.cluster.close()

    # -------- workers

    def _add(self) -> None:
        """One more worker, which starts where its card is free."""
        self._started += 1
        name = f"ray{self._started}"
        member = Member(name=name, actor=self.cluster.start(self._start(name)))
        self._members[name] = member
        self._awaited[member.actor.where.remote()] = member

    def _start(self, name: str) -> Start:
        from harness.devices.stack import ENVIRONMENT

        config, run = self._config, self._run
        below = os.path.relpath(config.invocation_params.dir, config.rootpath)
        kind = self.cluster.kind if run.options.device == "auto" else run.options.device
        return Start(
            name=name,
            arguments=(*map(str, config.invocation_params.args), f"--precision-device={kind}"),
            root=None if self.cluster.sends else str(config.rootpath),
            local_root=str(config.rootpath),
            below=below if not below.startswith("..") else ".",
            report=str(run.directory),
            environment={
                variable: os.environ[variable]
                for variable in (*ENVIRONMENT, "MODEL_DIR")
                if variable in os.environ and variable not in VISIBLE_CARDS
            },
            earlier=_earlier(run),
            resource=self.cluster.need.resource,
            amount=self.cluster.need.amount,
            most=self.cluster.need.workers,
            devices=run.options.devices,
            soc=run.options.soc,
        )

    def _step(self) -> None:
        """Wait for an answer, and for a moment at most."""
        for reference in self.cluster.wait(list(self._awaited), TICK):
            member = self._awaited.pop(reference)
            try:
                answer = self.cluster.answer(reference)
            except LostWorker as error:
                self._lost(member, str(error), with_node=error.with_node)
                continue
            if isinstance(answer, dict):
                member.node, member.cards = answer["node"], answer["cards"]
                member.host = self.cluster.host(member.node)
                cards = f" {self.cluster.need.resource} {answer['cards']}" if answer["cards"] else ""
                member.label = f"{member.host}{cards}"
                member.workerinfo = {"id": member.label, **answer["python"]}
                answer = []
            for kind, *values in answer:
                if member.name in self._members:
                    getattr(self, f"_on_{kind}")(member, *values)
            if member.name in self._members and (member.test or not member.is_ready):
                self._awaited[member.actor.events.remote()] = member
        self._give_to_idle()
        self._check_room()
        self._say()

    def _give_to_idle(self) -> None:
        """A test for each worker that has none."""
        if self._queue is None or not self._left:
            return
        ready = [member for member in self._members.values() if member.is_ready]
        hosts = {member.host for member in self._members.values() if member.host}  # of workers that start, too
        for member in ready:
            turn = None if member.test else self._queue.take(member.name, member.host, hosts=hosts)
            if turn is not None:
                member.test, member.named, member.location = turn.test, {}, None
                task = member.actor.run.options(name=turn.test)
                facts = self._facts.get(self._queued[turn.test].group, {})
                self._awaited[task.remote(turn.test, turn.following, facts)] = member

    def _check_room(self) -> None:
        """Raises: pytest.UsageError where no node has been there for long that could run what is left."""
        out = Counter(member.node for member in self._quarantined)
        if any(member.is_ready for member in self._members.values()) or self.cluster.has_room(out):
            self._alone_since = None
            return
        self._alone_since = self._alone_since or time.monotonic()
        if time.monotonic() - self._alone_since > PATIENCE:
            raise pytest.UsageError(
                f"--precision-ray: no node of the cluster has {self.cluster.need.resource} any more, for "
                f"{PATIENCE:g} s; {len(self._left)} tests did not run"
            )

    def _end(self) -> None:
        """End all workers in order."""
        ending = {member.actor.end.remote(): member for member in self._members.values() if member.is_ready}
        until = time.monotonic() + WORKERS_ENDING
        for reference, member in ending.items():
            try:
                if not self.cluster.wait([reference], max(until - time.monotonic(), 0.0)):
                    continue
                for kind, *values in self.cluster.answer(reference):
                    if kind == "finished":
                        self._run.take_output(*values)
            except LostWorker as error:
                self._run.terminal.note(f"the worker on {member.label} died at its end: {error}")
        counts = ", ".join(f"{host} {count}" for host, count in sorted(self._counts.items()))
        self._run.terminal.note(f"tests by host: {counts}")

    # -------- what workers tell

    def _on_uncollected(self, member: Member, data: Mapping[str, Any]) -> None:
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        if self._queue is None and report.nodeid not in self._run.uncollected:  # the other workers tell the same
            self._config.hook.pytest_collectreport(report=report)

    def _on_ready(
        self, member: Member, tests: dict[str, Any], queued: dict[str, Queued], environment: dict[str, Any]
    ) -> None:
        if self._queue is None:
            self._tests, self._queued, self._environment = tests, queued, environment
            self._queue = RowQueue(queued)
        differing = self._differences(tests, environment)
        if differing:
            self._drop(member, f"it is unlike the first worker: {differing}")
            return
        member.is_ready = True

    def _differences(self, tests: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
        """What makes a worker unlike the first, in words: one report is of one stack and one code."""
        from harness.report import build
        from harness.report.merge import stack_differences

        first = self._environment or {}
        if list(tests) != list(self._tests):
            return f"it collected {len(tests)} tests and not the same {len(self._tests)}"
        if environment.get("code") != first.get("code"):
            return "its code is another"
        if not environment:
            return ""
        reports = [build([], stack=item["stack"], backend=item["backend"]) for item in (first, environment)]
        return "; ".join(stack_differences(*reports))

    def _on_learned(self, member: Member, test: str, facts: Mapping[tuple[str, str], Any]) -> None:
        """What the first rows of a model showed, for the workers that run later ones."""
        known = self._facts.setdefault(self._queued[test].group, {})
        self._facts[self._queued[test].group] = {**facts, **known}
        if self._queue is not None:
            self._queue.learned(test, [dtype for _, dtype in facts])

    def _on_named(self, member: Member, test: str, named: Mapping[str, Any]) -> None:
        member.named = named
        self._run.folder.running(test, named)

    def _on_began(self, member: Member, test: str, location: tuple[str, int | None, str]) -> None:
        member.location = location
        self._config.hook.pytest_runtest_logstart(nodeid=test, location=location)

    def _on_report(self, member: Member, data: Mapping[str, Any]) -> None:
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        report.node = member
        self._config.hook.pytest_runtest_logreport(report=report)

    def _on_file(self, member: Member, name: str, content: bytes) -> None:
        path: Path = self._run.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _on_ended(self, member: Member, test: str) -> None:
        self._config.hook.pytest_runtest_logfinish(nodeid=test, location=member.location)
        self._counts[member.host] += 1
        self._left.discard(test)
        member.test, member.location = "", None

    def _on_finished(self, member: Member, output: Mapping[str, str]) -> None:
        """A process ended although more was to run: by itself, or since its device stopped."""
        self._run.take_output(output)
        if not member.is_stopped:
            self._lost(member, "its process ended early")

    def _on_stopped(self, member: Member, how: str) -> None:
        """Its device computes no more: it gets no test after this one, and its process ends."""
        member.is_ready, member.is_stopped = False, True

    def _on_answered(self, member: Member, seen: str, problem: str) -> None:
        """What the card of a device that stopped answers to another process, "" where nothing is wrong with it."""
        del self._members[member.name]
        assert self._queue is not None, "it ran a test"
        self._queue.lost(member.name)
        if problem:
            self._put_out(member, seen, problem)
            return
        self.cluster.kill(member.actor, is_placed=True)
        self._add()

    def _on_failed(self, member: Member, text: str) -> None:
        self._drop(member, f"it did not start: {text}")

    def _on_died(self, member: Member, death: Death, problem: str) -> None:
        self._run.counts.take(death.worker, death.acts)
        self._lost(member, death.text, death, problem=problem)

    # -------- deaths

    def _drop(self, member: Member, why: str) -> None:
        """Do without a worker; another one there would do no better."""
        del self._members[member.name]
        self.cluster.kill(member.actor, is_placed=bool(member.label))
        self._not_started.append(f"{member.label or 'a node'}: {why}")
        self._run.terminal.note(f"no worker on {member.label or 'a node'}: {why}", bad=True)
        if not self._members:
            raise pytest.UsageError(f"--precision-ray: no worker is left. {self._not_started[-1]}")

    def _lost(
        self, member: Member, how: str, death: Death | None = None, *, with_node: bool = False, problem: str = ""
    ) -> None:
        """A worker is no more: another one takes its place where there is room, and its test runs once more.

        `problem`: what is wrong with its card.
        """
        if not member.is_ready and not member.is_stopped and not with_node:
            self._drop(member, f"it did not start: {how}")
            return
        del self._members[member.name]
        if not problem:
            self.cluster.kill(member.actor, is_placed=bool(member.label))
            self._add()
        self._run.terminal.note(f"the worker on {member.label or 'a node'} died: {how}")
        death = death or Death(text=how, mark=Mark.CRASHED, named=member.named, rows=[])
        began = member.location is not None
        deaths = self._deaths.setdefault(member.test, [])
        deaths += [f"on {member.label}: {how}"] if began else []
        ends = began and (len(deaths) > 1 or death.mark is not Mark.CRASHED)
        again = None if ends or not member.test else member.test
        if self._queue is not None:
            self._queue.lost(member.name, again=again, host=member.host)
        if ends:
            if len(deaths) > 1:
                death = replace(death, text=f"its worker died twice, {' and '.join(deaths)}", mark=Mark.CRASHED)
            self._report(member, "failed", death.text, death)
            self._left.discard(member.test)
        elif began:
            self._report(member, "rerun", f"It ran again, since its first worker died {deaths[0]}.")
        if problem:
            self._put_out(member, how, problem)

    def _put_out(self, member: Member, seen: str, problem: str) -> None:
        """No worker gets the card of this one any more; where none is left, the tests that remain are errors."""
        self._quarantined.append(member)
        left = any(not other.is_stopped for other in self._members.values())
        card = f"card {member.cards or '0'} of {member.host}"
        self._run.quarantine.add(card, _row_of(member), seen, problem, is_last=not left)
        if left:
            return
        text = self._run.quarantine.unrun(card)
        for test in [test for test in self._tests if test in self._left]:
            member.test, member.location = test, (test.partition("::")[0], None, test)
            for when, outcome in (("call", "failed"), ("teardown", "passed")):
                self._report(member, outcome, text if when == "call" else "", when=when)
        self._left.clear()

    def _report(
        self, member: Member, outcome: Any, text: str, death: Death | None = None, *, when: Any = "???"
    ) -> None:
        """What became of a test whose worker died, as pytest-xdist reports it; `when`: of a test that did not run."""
        how = dict(keywords={}, outcome=outcome, longrepr=text or None, when=when)
        report = pytest.TestReport(nodeid=member.test, location=member.location, **how)
        report.node, report.death = member, death
        self._config.hook.pytest_runtest_logreport(report=report)

    def _say(self) -> None:
        """The progress: how many tests ended, and what runs where."""
        ready = [member for member in self._members.values() if member.is_ready]
        if self._queue is None or not ready:
            waiting = f"waiting for {self.cluster.describe()}"
            self._run.terminal.say(waiting)
            return
        running = [f"{member.label}: {_short(member)}" for member in ready if member.test]
        done = f"{len(self._tests) - len(self._left)} of {len(self._tests)} tests"
        self._run.terminal.say("; ".join([done, *running]))


def _short(member: Member) -> str:
    """What a worker runs, as far as it is known."""
    return _row_of(member) or member.test


def _row_of(member: Member) -> str:
    """The last row of a worker; "" where it is not known."""
    named = member.named
    return row_name(named["case"], named["dtype"], named["seed"]) if named else ""


def _earlier(run: Any) -> str | None:
    """The report of the run before, where it is to be resumed."""
    from harness.report import PREVIOUS_JSON

    path: Path = run.directory / PREVIOUS_JSON
    return path.read_text(encoding="utf-8") if run.options.resume and path.is_file() else None


def _refuse_others(config: pytest.Config) -> None:
    """Raises: pytest.UsageError where the command line asks for another way of running too."""
    option = config.option
    if getattr(option, "numprocesses", None) or getattr(option, "tx", None):
        raise pytest.UsageError(
            "--precision-ray with -n: the rows run on the cluster's workers or on pytest-xdist's; leave one of them out"
        )
    if option.usepdb:
        raise pytest.UsageError("--precision-ray with --pdb: there is no terminal on the nodes; leave one of them out")
