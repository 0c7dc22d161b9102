"""What a run tells on the terminal: its header, its progress, and at its end what it came to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from harness.report.printable import visible

LOG_EVERY = 10.0  # seconds between progress lines where output is not a terminal


class Terminal:
    """The terminal of one run; `quiet` in a worker of pytest-xdist, which has none."""

    def __init__(self, config: pytest.Config, *, lang: str, quiet: bool):
        self._config, self._lang, self._quiet = config, lang, quiet
        self.notes: list[tuple[str, bool]] = []  # for the end of the run: a line, and whether it is bad
        self._began = time.perf_counter()
        self._last_progress = -math.inf  # when the last progress line was written

    @property
    def _reporter(self) -> Any:
        return self._config.pluginmanager.get_plugin("terminalreporter")

    def note(self, text: str, *, bad: bool = False) -> None:
        """A line for the end of the run; in red where it is `bad`."""
        self.notes.append((text, bad))

    def say(self, text: str) -> None:
        """A progress line: on a terminal overwritten by the next, in a log at most one every `LOG_EVERY` seconds."""
        reporter = self._reporter
        now = time.perf_counter() - self._began
        if reporter is None or self._quiet or self._config.option.verbose < 0:
            return
        if not reporter.isatty and now - self._last_progress < LOG_EVERY:
            return
        self._last_progress = now
        line = f"[{now:5.1f} s] {self.in_language(text)}"
        with self.uncaptured():
            if reporter.isatty:
                reporter.rewrite(line[: reporter._tw.fullwidth - 1], erase=True)
            else:
                reporter.ensure_newline()
                reporter.write_line(line)

    @contextmanager
    def uncaptured(self) -> Iterator[None]:
        """A block whose output pytest does not capture."""
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        if capture is None:
            yield
            return
        with capture.global_and_fixture_disabled():
            yield

    def in_language(self, text: str) -> str:
        """A line in the language of the report."""
        from harness.report.words import LANGUAGES, told

        return visible(told(text, LANGUAGES[self._lang]))

    def tell(self, text: str, *, bad: bool = False) -> None:
        """A line of the summary, now."""
        self._reporter.write_line(self.in_language(text), red=bad)

    def tell_notes(self, before: Sequence[str] = ()) -> None:
        """The lines that were noted, after those of `before`."""
        for text in before:
            self.tell(text)
        for text, bad in self.notes:
            self.tell(text, bad=bad)


def header(opening: Any, wanted: str) -> list[str]:
    """The device, why it is this one, and its switches, for pytest's header; nothing before it is open."""
    if opening.error is not None:
        return [f"accuracy: no device ({wanted}): {opening.error}"]
    if not opening.is_open:
        return []
    device = opening.device
    stack = device.stack.to_dict()
    card = f", card {stack['card']}" if stack.get("card") else ""
    switches = [f"{name} {'on' if value else 'off'}" for name, value in stack.items() if isinstance(value, bool)]
    switches += [f"{name}={value}" for name, value in stack["environment"].items()]
    switches.append(f"{stack['threads']} threads")
    return [
        f"accuracy: {device.torch_device} is {device.name}{card}, {device.backend}: {device.reason}",
        f"accuracy: {', '.join(switches)}",
    ]


def terminal_summary(run: Any, reporter: Any) -> None:
    """What a run came to: its warnings, where failing rows come from, its notes, its counts, its report."""
    terminal = run.terminal
    if run.written is None and not terminal.notes:
        return
    reporter.section("accuracy")
    if run.written is None:
        terminal.tell_notes(run.folder.notes)
        if run.folder.earlier is not None:
            terminal.tell(f"this run wrote no report; that of the run before is {run.folder.earlier}")
        return
    from harness.report.format import tally
    from harness.report.words import LANGUAGES

    if run.resumed_rows:
        terminal.tell(f"{run.resumed_rows} rows are of the run before, which this one resumes")
    report = run.report
    if report.backend == "emulated":
        terminal.tell("EMULATED: measured on an emulated device; it says nothing about hardware")
    for item in report.stack.get("faults") or ():
        terminal.tell(f"FAULT PLANTED: {item}")
    for text in report.idle_faults:
        terminal.tell(text, bad=True)
    for row in report.rows:
        if row.located is not None:
            run.locating.print(reporter, row)
    if run.locating.unlocated:
        terminal.tell(
            f"{run.locating.unlocated} failing rows were not located: the budget of "
            f"{run.options.locate_budget:g} s is spent; --precision-locate-budget"
        )
    terminal.tell_notes(run.folder.notes)
    from harness.report.cards import cards_line

    for card in report.quarantined:
        terminal.tell(f"QUARANTINED: {card}", bad=True)
    cards = cards_line(report.cards, LANGUAGES[run.options.lang])
    if cards:
        bad = any(item.odd_rows for item in report.cards)
        reporter.write_line(cards, red=bad)
    where = dict(device=report.stack.get("device"), backend=report.backend)
    counted = LANGUAGES[run.options.lang]["counted"] if where["device"] else "{counts}"  # none was opened here
    reporter.write_line(counted.format(counts=tally(report.rows), **where))
    reporter.write_line(f"report: {run.written[1]}")
    reporter.write_line(f"outcome: {report.outcome}")
