"""The vendor's own operator tests (Ascend/op-plugin, test/test_base_ops), run unchanged over the emulated CANN.

    python -m harness emulate -m harness.conformance vendor OP_PLUGIN/test/test_base_ops [--jobs 2] [--output FILE]

Each file runs as a program in a process of its own, forked after the emulated CANN is in place. The table has a row for
each file and a line for each group of tests that did not pass. Needs what the vendor's tests need: pip install
expecttest scipy hypothesis pyyaml.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
import tempfile
import time
import traceback
import unittest
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness import emulator
from harness.conformance.options import parser_of
from harness.errors import HarnessError

PASSED, FAILED, NOT_EMULATED, NOT_APPLICABLE = "passed", "failed", "not emulated", "not applicable"
OUTCOMES = (PASSED, FAILED, NOT_EMULATED, NOT_APPLICABLE)
_LIMIT = 600  # seconds for one file
_SHARED = "torch_npu.testing"  # what nearly every file imports


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """One test: what became of it, and why where it did not pass."""

    test: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of tests."""

    name: str
    outcomes: tuple[_Outcome, ...]
    fell_back: tuple[str, ...] = field(default=())  # operators that the CPU computed, as on an NPU

    def count(self, outcome: str) -> int:
        return sum(item.outcome == outcome for item in self.outcomes)


def run_files(folder: Path, jobs: int, work: Path) -> Iterator[File]:
    """Run every test file of a folder, each in a process forked from this one, `jobs` at a time; what they print goes
    to `work`.

    Raises: HarnessError when the folder holds none, this process does not run over the emulated CANN, or the packages
    that the tests import are not installed.
    """
    one = [folder] if folder.is_file() else []
    paths = sorted(folder.glob("test_*.py")) if folder.is_dir() else one
    if not paths:
        raise HarnessError(
            f"{folder} holds no test_*.py; give the folder test/test_base_ops of a checkout of "
            "Ascend/op-plugin, or one file of it"
        )
    if not emulator.installed():
        raise HarnessError(
            "the vendor's tests need the emulated CANN underneath: python -m harness emulate -m "
            "harness.conformance vendor FOLDER"
        )
    if any(_SHARED in path.read_text(encoding="utf-8", errors="replace") for path in paths):
        _warm()
    waiting, running = list(paths), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            path = waiting.pop(0)
            running[_start(path, work)] = path, time.monotonic()
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            path, _ = running.pop(process)
            yield _read(path, work, status)
            continue
        for process, (_, began) in running.items():
            if time.monotonic() - began > _LIMIT:
                os.killpg(process, signal.SIGKILL)
        time.sleep(0.05)


def _warm() -> None:
    """Import here what nearly every file imports; nothing of it may start a thread or touch the device, since this
    process forks.

    Raises: HarnessError where something that they need is not installed.
    """
    try:
        import torch_npu.testing.testcase  # noqa: F401
    except ImportError as error:
        raise HarnessError(
            f"the vendor's tests cannot be imported: {error}; they need: pip install expecttest scipy hypothesis pyyaml"
        ) from error


def _start(path: Path, work: Path) -> int:
    """Fork a process that runs one file as a program. Returns its number."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    os.setsid()
    log = os.open(work / f"{path.stem}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 99
    try:
        os.chdir(path.parent)
        sys.path.insert(0, str(path.parent))
        sys.argv = [path.name]
        os.environ.setdefault(
            "TASK_QUEUE_ENABLE", "0"
        )  # else an operator that fails closes the queue for the tests that follow
        with open(work / f"{path.stem}.jsonl", "w", encoding="utf-8") as stored:
            unittest.TextTestRunner.resultclass = staticmethod(
                lambda *arguments, **more: _Recorder(stored, *arguments, **more)
            )
            runpy.run_path(path.name, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  a process that was forked must end here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class _Recorder(unittest.TextTestResult):
    """Writes each test's outcome down when it ends, so that a crash in the next one loses nothing."""

    def __init__(self, stored, *arguments, **more):
        super().__init__(*arguments, **more)
        self.stored = stored

    def _record(self, test, outcome: str, reason: str = "") -> None:
        self.stored.write(json.dumps({"test": test.id(), "outcome": outcome, "reason": reason}) + "\n")
        self.stored.flush()

    def addSuccess(self, test):
        super().addSuccess(test)
        self._record(test, PASSED)

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._record(test, NOT_APPLICABLE, reason.strip()[:150])

    def addFailure(self, test, problem):
        super().addFailure(test, problem)
        self._record(test, *_why(problem))

    def addError(self, test, problem):
        super().addError(test, problem)
        self._record(test, *_why(problem))

    def addSubTest(self, test, subtest, problem):
        super().addSubTest(test, subtest, problem)
        if problem is not None:
            self._record(subtest, *_why(problem))


def _why(problem) -> tuple[str, str]:
    """The outcome of a test that raised, and the reason: the operator that is missing, or the error's own words."""
    text = str(problem[1])
    missing = re.search(r"(aclop \w+|acl\w+)[^\n]* is not emulated", text)
    if missing:
        return NOT_EMULATED, missing[1]
    named = re.search(r"acl\w+: [^\n]{1,150}", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if named:
        return FAILED, named[0]
    return FAILED, f"{problem[0].__name__}: {lines[0][:150] if lines else ''}"


def _read(path: Path, work: Path, status: int) -> File:
    """What one file's process left behind. A test counts once: one that fails in several parts is one that fails."""
    log = (work / f"{path.stem}.log").read_text(errors="replace")
    fell_back = tuple(
        sorted(set(re.findall(r"operator '([\w:.]+)' is not currently supported on the NPU backend", log)))
    )
    outcomes: dict[str, _Outcome] = {}
    for line in (work / f"{path.stem}.jsonl").read_text(encoding="utf-8").splitlines():
        result = _Outcome(**json.loads(line))
        name = result.test.partition(" ")[0]
        if name not in outcomes or outcomes[name].outcome == PASSED:
            outcomes[name] = result
    signalled = os.WIFSIGNALED(status)
    if signalled or not outcomes:
        how = f"killed by signal {os.WTERMSIG(status)}" if signalled else f"exit {os.waitstatus_to_exitcode(status)}"
        last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "no output")
        outcomes[path.name] = _Outcome(
            test=path.name, outcome=FAILED, reason=f"the file's process ended ({how}; {_LIMIT} s allowed): {last[:120]}"
        )
    return File(name=path.name, outcomes=tuple(outcomes.values()), fell_back=fell_back)


def _table(files: list[File]) -> str:
    """The outcome by file, the share of those that can run on a 910B, and the reasons of what did not pass."""
    total = {outcome: sum(item.count(outcome) for item in files) for outcome in OUTCOMES}
    runnable = sum(total[outcome] for outcome in OUTCOMES[:3])
    lines = [
        (f"{total[PASSED]} of {runnable} tests that can run on a 910B pass "
            f"({total[PASSED] / max(runnable, 1):.1%}); {total[NOT_APPLICABLE]} do not apply."),
        "", f"| file | {' | '.join(OUTCOMES)} | fell back, as on an NPU |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {item.name} | {' | '.join(str(item.count(outcome)) for outcome in OUTCOMES)} | "
        f"{', '.join(item.fell_back)} |"
        for item in files
    ]
    for outcome in (FAILED, NOT_EMULATED, NOT_APPLICABLE):
        reasons = Counter(
            (item.reason, file.name) for file in files for item in file.outcomes if item.outcome == outcome
        )
        lines += ["", f"## {outcome.capitalize()}", "", "| tests | file | reason |", "|---|---|---|"]
        lines += [
            f"| {count} | {name} | {reason.replace('|', '/')} |"
            for (reason, name), count in sorted(reasons.items(), key=lambda value: value[0][::-1])
        ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    arguments = parser_of("vendor").parse_args(argv)
    files = []
    with tempfile.TemporaryDirectory() as work:
        logs = arguments.logs or Path(work)
        logs.mkdir(parents=True, exist_ok=True)
        for item in run_files(arguments.folder.resolve(), arguments.jobs, logs.resolve()):
            files.append(item)
            print(
                f"{item.name}: "
                + ", ".join(f"{item.count(outcome)} {outcome}" for outcome in OUTCOMES if item.count(outcome)),
                flush=True,
            )
    files.sort(key=lambda value: value.name)
    text = _table(files)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    print(text.splitlines()[0])
    return 0
