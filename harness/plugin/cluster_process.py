"""The process of pytest of a worker in a Ray cluster: it collects the tests of the run, and runs those that it is told.

    python -m harness.plugin.cluster_process FD

FD is a connection to the worker's actor: tests come in by their ids, and what happens goes out as events.
"""

from __future__ import annotations

import os
import queue
import shutil
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.plugin.cluster import PROCESS
from harness.plugin.cluster_worker import Start
from harness.plugin.collected import case_of, function_of
from harness.plugin.fixtures import SESSION
from harness.plugin.row_queue import Queued
from harness.plugin.told import Told

MODEL = "model "  # groups of tests of one model begin so; those of files and functions hold a "."
EARLIER = "precision-previous.json"


class Process:
    """The plugin of pytest in that process."""

    __name__ = PROCESS  # the name of the plugin

    def __init__(self, connection: Connection, start: Start):
        self._connection, self._start = connection, start
        self._report = Path(start.folder) / "report"
        self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._test = ""
        self._is_ready = False
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def _listen(self) -> None:
        """Take what comes; where the actor is gone, nobody waits for the row that runs and the card must be free."""
        try:
            while True:
                self._orders.put(self._connection.recv())
        except (EOFError, OSError):
            shutil.rmtree(self._start.folder, ignore_errors=True)
            os._exit(1)

    def _tell(self, *event: Any) -> None:
        self._connection.send(event)

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """The attributes by which plugins know a worker of pytest-xdist: they write no files of their own."""
        config.workerinput = dict(self._start.workerinput or {})
        config.workeroutput = {}
        _keep_reruns_here(config)
        self._config = config

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tell(
                "uncollected", self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
            )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        run = session.config.pluginmanager.get_plugin(SESSION)
        run.hears_rows(lambda named: self._tell("named", self._test, named))
        tests = {item.nodeid: run.collected.get(item.nodeid) for item in session.items}
        queued = _queued(session.items, tests)
        self._tell("ready", tests, queued, run.measured_on() if run.collected else {})
        self._is_ready = True
        items = {item.nodeid: item for item in session.items}
        while (order := self._orders.get()) is not None:
            self._test, following, facts = order
            by_name = not queued[self._test].group.startswith(MODEL)
            run.begins_with(Told(facts=facts, by_name=by_name))
            session.config.hook.pytest_runtest_protocol(item=items[self._test], nextitem=items.get(following))
            self._send_files()
            self._tell("learned", self._test, run.learned())
            if run.is_stopped:  # told before the test ends, so that no test comes after it
                self._tell("stopped", run.device.stopped)
            self._tell("ended", self._test)
            if run.is_stopped:
                break
        return True

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._tell("began", nodeid, location)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A report, with the folder of its files as it is where they go."""
        here, there = str(self._report), self._start.report
        report.user_properties = [
            (name, value.replace(here, there) if isinstance(value, str) else value)
            for name, value in report.user_properties
        ]
        self._tell("report", self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def _send_files(self) -> None:
        """The files that belong to the report, such as repro scripts."""
        for path in sorted(self._report.rglob("*")):
            if path.is_file() and path.name != EARLIER:
                self._tell("file", path.relative_to(self._report).as_posix(), path.read_bytes())
                path.unlink()

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Any:
        yield
        if self._is_ready:
            self._tell("finished", session.config.workeroutput)


def _queued(items: list[pytest.Item], tests: Mapping[str, Any]) -> dict[str, Queued]:
    """The tests as the queue knows them: those of one model together, as far as their parameters hold the case."""
    subjects: dict[Any, int] = {}
    result = {}
    for item in items:
        known, case = tests[item.nodeid], case_of(item)
        if known is None:
            group = item.nodeid.partition("::")[0]
        elif case is None:
            group = function_of(item)
        else:
            group = f"{MODEL}{subjects.setdefault(case.subject, len(subjects))}"
        result[item.nodeid] = Queued(group=group, dtype=None if known is None else known["dtype"])
    return result


def _keep_reruns_here(config: Any) -> None:
    """pytest-rerunfailures counts attempts in the process that started the workers, by a local socket: in this one."""
    plugin = sys.modules.get("pytest_rerunfailures")
    if plugin is None or not hasattr(plugin, "XDistHooks") or not config.pluginmanager.hasplugin("xdist"):
        return
    server = plugin.ServerStatusDB()
    server.sock.listen()  # its thread does so too, and may come to it after the first connection
    there = SimpleNamespace(config=SimpleNamespace(failures_db=server), workerinput=config.workerinput)
    plugin.XDistHooks().pytest_configure_node(there)


def main() -> int:
    connection = Connection(int(sys.argv[1]))
    start = connection.recv()
    report = Path(start.folder) / "report"
    report.mkdir()
    if start.earlier is not None:
        (report / EARLIER).write_text(start.earlier, encoding="utf-8")
    return int(pytest.main(list(start.arguments), plugins=[Process(connection, start)]))


if __name__ == "__main__":
    sys.exit(main())
