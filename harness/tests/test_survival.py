"""A run survives what its rows do: a hang, a crash, memory that runs out, a process that is killed; and two runs do not
destroy each other's report.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from harness import last_operator
from harness.errors import HarnessError
from harness.judging.status import Mark
from harness.judging.verdict import error
from harness.plugin.watchdog import (
    COMPILING,
    FIRST,
    LEAST_SECONDS,
    STARTING,
    TIMES,
    Limits,
    Watchdog,
    stacks_of_threads,
)
from harness.report import Row, Writer, build, load
from harness.report.content import NOT_RUN
from harness.report.journal import DIED, NAME, Busy, Journal, read_journal
from harness.tests.environment import pytest_of_a_shell
from harness.tests.needs import needs_torch_npu
from harness.tests.test_plugin import CASE, run, stored, torch_npu_is_imported, user, write  # noqa: F401

ROWS = (
    CASE
    + """
import ctypes, os, signal, time

ODD = {odd}

class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        y = torch.sigmoid(self.linear(x))
        if {where}:
            exec(ODD.get(int(x.max()), ""))
        return y

def given(generator):
    return torch.rand(2, 4, generator=generator) / 4 + generator.initial_seed()

@pytest.mark.parametrize("seed", range(1, 7))
def test_precision(precision, seed):
    precision(Case(name="odd", model=Odd, inputs=given, isolated=False), seed)
"""
)
CRASH, KILL, HANG = "ctypes.string_at(0)", "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(600)"


def with_odd(odd, where="True"):
    """The six rows of which those with the seeds in `odd` do what it says."""
    return ROWS.replace("{odd}", repr(odd)).replace("{where}", where)


def pytest_run(user, *arguments, **environment):
    """A run in a process of its own, as its user starts it."""
    command = [sys.executable, "-m", "pytest", "--device", "cpu", "-k", "precision", *arguments]
    return subprocess.run(
        command, cwd=user.path, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


def rows_of(user):
    """Status, marks and seed of each row."""
    return [(row["seed"], row["status"], row["marks"]) for row in stored(user)["rows"]]


# -------- a row that ends its process, or does not end


@needs_torch_npu
@pytest.mark.parametrize(
    "kind, arguments, outcome",
    [
        ("crash", ("--isolate",), "infrastructure"),
        ("hang", ("--isolate", "--row-timeout=5"), "infrastructure"),
        ("hang", ("--row-timeout=5",), "infrastructure"),
        ("scale:by=1.5", ("--isolate",), "failures"),
    ],
    ids=["a crash", "a hang", "a hang of its own process", "a wrong number"],
)
def test_a_planted_fault_that_ends_its_process_is_counted(user, kind, arguments, outcome):
    write(user, CASE + "\ndef test_precision(precision):\n    precision(case(), 1)\n")
    words = ("--locate=off", f"--fault=aclnnSilu:{kind}", *arguments)
    done = pytest_of_a_shell(user.path, *words)
    report = stored(user)
    acted = report["stack"]["faults"]
    assert "idle_faults" not in report and report["outcome"] == outcome, done.stdout + done.stderr
    assert len(acted) == 1 and re.fullmatch(rf"aclnnSilu:{kind} \(acted on (\d) of the \1 calls.*", acted[0]), acted


def test_a_crash_a_kill_and_a_hang_cost_one_row_each(user):
    write(user, with_odd({2: CRASH, 3: KILL, 5: HANG}))
    done = pytest_run(user, "--isolate", "--row-timeout", "5")
    assert done.returncode == 1, done.stdout + done.stderr
    fine = ("PASS", ["NEW"])
    dead, hung = ("ERROR", ["CRASHED"]), ("ERROR", ["HUNG"])
    expected = [(seed, *how) for seed, how in enumerate((fine, dead, dead, fine, hung, fine), 1)]
    assert rows_of(user) == expected, done.stdout + done.stderr
    crash, kill, hang = (stored(user)["rows"][seed - 1]["reasons"][0] for seed in (2, 3, 5))
    assert re.search(r"its process crashed by SIGSEGV in string_at .* < forward \(test_model.py:\d+\)", crash), crash
    assert kill.startswith("its process crashed by SIGKILL; the system may have run out of memory")
    limit = r"it did not end within 5 s \(--precision-row-timeout\); thread MainThread: .*forward \(test_model.py:"
    assert re.search(limit, hang), hang
    assert {row["case"] for row in stored(user)["rows"]} == {"odd"}


def test_rows_of_the_test_before_the_crash_stay(user):
    write(user, with_odd({3: KILL}).replace("precision(Case", "precision(case('good'), seed); precision(Case"))
    pytest_run(user, "--isolate", "-k", "precision and 3")
    assert [(row["case"], row["status"]) for row in stored(user)["rows"]] == [("good", "PASS"), ("odd", "ERROR")]


def test_alone_a_hung_row_ends_the_run_with_a_whole_report(user):
    write(user, with_odd({3: HANG}))
    done = pytest_run(user, "--row-timeout", "4")
    assert done.returncode == 1 and "--precision-isolate goes on with the rows after it" in done.stderr
    statuses = rows_of(user)
    assert statuses[:3] == [(1, "PASS", ["NEW"]), (2, "PASS", ["NEW"]), (3, "ERROR", ["HUNG"])]
    assert {row["reasons"][0] for row in stored(user)["rows"][3:]} == {NOT_RUN}
    assert sorted(path.name for path in (user.path / "reports").iterdir()) == ["precision.json", "precision.md"]


def test_isolation_without_xdist_is_refused_in_one_line(user):
    write(user, with_odd({}))
    done = user.runpytest_inprocess("--isolate", "-p", "no:xdist")
    assert done.ret == 4 and "pip install pytest-xdist" in done.stderr.str()


# -------- the limit of a row


def test_the_limit_follows_the_rows_of_the_case():
    limits, case, other = Limits(None), ("case", "float32"), ("case", "float16")
    assert limits.of(case, compiles=False) == FIRST + STARTING
    assert limits.of(case, compiles=True) == FIRST + STARTING + COMPILING
    limits.took(case, 1.0)
    assert limits.of(other, compiles=False) == FIRST and limits.of(other, compiles=True) == FIRST + COMPILING
    assert limits.of(case, compiles=True) == LEAST_SECONDS
    limits.took(case, 100.0)
    limits.took(case, 10.0)
    assert limits.of(case, compiles=False) == TIMES * 100.0
    limits = Limits(5.0)
    assert limits.of(case, compiles=False) == 5.0 + STARTING
    limits.took(case, 1.0)
    assert limits.of(case, compiles=False) == limits.of(case, compiles=True) == 5.0
    assert limits.of(other, compiles=True) == 5.0 + COMPILING


def test_a_block_within_its_limit_is_left_alone_and_a_longer_one_is_not(tmp_path):
    ended = []
    watchdog = Watchdog(ended.append, None)
    with watchdog.limit(30):
        pass
    time.sleep(0.1)
    assert not ended
    with watchdog.limit(0.2):
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
    watchdog.close()
    assert "it did not end within 0.2 s" in ended[0] and "test_a_block_within_its_limit" in ended[0]


def test_a_thread_that_keeps_pythons_lock_is_ended_too(tmp_path):
    code = (
        "import ctypes, pathlib, sys\nfrom harness.plugin import watchdog\nwatchdog.GRACE = 0.5\n"
        "place = pathlib.Path(sys.argv[1])\nlibc = ctypes.PyDLL(None)\n"
        "with watchdog.Watchdog(print, place).limit(0.5):\n    libc.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "stacks")], timeout=50)
    assert done.returncode == 1 and "<module>" in (tmp_path / "stacks").read_text()


def test_the_stacks_are_of_the_other_threads_the_main_one_first():
    told = []
    thread = threading.Thread(target=lambda: told.append(stacks_of_threads()))
    thread.start()
    thread.join()
    assert told[0].startswith("thread MainThread: ") and "test_the_stacks_are_of_the_other_threads" in told[0]


# -------- the journal


def a_row(test, seed):
    return Row.of(error("why not"), test=test, case="case", dtype="float32", seed=seed)


def journal_of(tmp_path, *, lines=()):
    journal = Journal(tmp_path)
    journal.start()
    journal.collected({f"t{seed}": {"case": "case", "dtype": "float32", "seed": seed} for seed in range(4)})
    for name, *values in lines:
        getattr(journal, name)(*values)
    return journal


def test_a_report_is_made_of_the_journal_of_a_run_that_died(tmp_path):
    journal = journal_of(
        tmp_path, lines=[("running", "t0"), ("row", a_row("t0", 0)), ("ended", "t0"), ("running", "t1")]
    )
    journal.environment({"backend": "cpu", "stack": {"device": "some"}})
    last_operator.record_into(journal.beside("operator"))
    last_operator.note("aten::silu")
    journal.close(remove=False)
    with journal.path.open("a") as file:
        file.write('{"row": {"test": "t2", "cas')  # the line that the process was writing
    report = load(tmp_path)
    assert (report.backend, report.stack) == ("cpu", {"device": "some"})
    assert [row.reasons[0] for row in report.rows] == [
        "why not",
        f"{DIED}; the last operator that the device was given: aten::silu",
        NOT_RUN,
        NOT_RUN,
    ]
    assert [row.marks for row in report.rows] == [(), (Mark.CRASHED,), (), ()]
    assert [row.seed for row in report.rows] == [0, 1, 2, 3]
    assert load(tmp_path / "precision.json") == report


def test_a_row_counts_until_a_later_one_of_its_test_comes_and_dropped_ones_do_not(tmp_path):
    journal = journal_of(tmp_path, lines=[("running", "t0")])
    journal.row(a_row("t0", 0), final=False)
    assert [row.reasons[0] for row in read_journal(journal.path).rows][:2] == ["why not", NOT_RUN]
    journal.row(a_row("t0", 7))
    journal.ended("t0")
    assert [row.seed for row in read_journal(journal.path).rows] == [7, 1, 2, 3]
    journal.dropped("t0")
    assert [row.reasons[0] for row in read_journal(journal.path).rows] == [NOT_RUN] * 4
    journal.close(remove=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"schema": "precision-journal/9"}\n', "has schema 'precision-journal/9' where 'precision-journal/1'"),
        ('{"schema": "precision-journal/1"}\n{"row": 1}\n', "line 2"),
        ('{"schema": "precision-journal/1"}\n{"environment": {"stack": {"device": 3}}}\n', "line 2 cannot be read"),
        ('{"schema": "precision-journal/1"}\n{"collected": [1]}\n', "line 2 cannot be read"),
    ],
    ids=["schema", "row", "stack", "collected"],
)
def test_what_is_no_journal_is_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(HarnessError, match=words):
        load(tmp_path)


def test_a_killed_run_loses_no_row_and_the_next_run_keeps_its_report(user):
    write(user, with_odd({3: KILL}))
    assert pytest_run(user).returncode == -signal.SIGKILL
    report = load(user.path / "reports")
    assert [(row.seed, str(row.status)) for row in report.rows] == [
        (1, "PASS"), (2, "PASS"), (3, "ERROR"), (None, "ERROR"), (None, "ERROR"), (None, "ERROR")
    ]  # fmt: skip
    assert report.rows[2].marks == (Mark.CRASHED,) and report.rows[3].reasons[0] == NOT_RUN
    assert report.rows[2].reasons[0] == DIED
    write(user, with_odd({}))
    run(user, "-k", "precision")
    earlier = json.loads((user.path / "reports" / "precision-previous.json").read_text())
    assert [row["status"] for row in earlier["rows"]] == [str(row.status) for row in report.rows]
    assert earlier["rows"][2]["marks"] == ["CRASHED"]


def test_the_journal_stays_where_the_last_report_could_not_be_written(user, monkeypatch):
    write(user, with_odd({}))
    whole = Writer.write

    def fails_at_last(writer, report, *, last=True):
        if last:
            raise OSError(28, "No space left on device")
        return whole(writer, report, last=last)

    monkeypatch.setattr(Writer, "write", fails_at_last)
    result = run(user, "-k", "precision")
    assert result.ret == pytest.ExitCode.USAGE_ERROR and "No space left" in result.stderr.str() + result.stdout.str()
    assert [str(row.status) for row in load(user.path / "reports").rows] == ["PASS"] * 6


# -------- two runs, many rows


def test_a_second_run_into_one_folder_is_refused(tmp_path):
    first = journal_of(tmp_path)
    with pytest.raises(Busy, match=rf"another run \(process {os.getpid()} on .*, since .*\) writes its report into"):
        Journal(tmp_path)
    first.close(remove=True)
    Journal(tmp_path).close(remove=True)


def test_a_second_run_is_a_usage_error_that_names_the_first(user):
    write(user, with_odd({}))
    (user.path / "reports").mkdir()
    first = journal_of(user.path / "reports")
    done = run(user, "-k", "precision")
    assert done.ret == 4 and f"another run (process {os.getpid()} on " in done.stderr.str()
    first.close(remove=True)
    run(user, "-k", "precision").assert_outcomes(passed=6)


def test_a_long_report_is_written_a_few_times_only(tmp_path, monkeypatch):
    """The time spent on writing is a small part of the run's, whatever the number of rows."""
    clock = [0.0]
    monkeypatch.setattr("harness.report.files.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("harness.report.files.write_text", lambda path, text: clock.__setitem__(0, clock[0] + cost))
    writer, report, written, cost = Writer(tmp_path), build([], stack={}, backend=None), 0, 1.0
    for _ in range(10000):
        clock[0] += 0.1
        if writer.is_due:
            written += 1
            writer.write(report, last=False)
    assert 2 <= written <= 10000 * 0.1 / Writer.TURN + 3
    cost, before = Writer.AT_ONCE / 2, written  # a short one is written after every row
    clock[0] += 100
    for _ in range(10):
        written += writer.is_due
        writer.write(report, last=False)
    assert written - before == 10


@needs_torch_npu
def test_the_last_operator_of_the_emulated_device_is_named(user):
    write(user, with_odd({1: KILL}, where="x.device.type != 'cpu'"))
    done = pytest_run(user, "--device", "emulated", "-k", "precision and 1")
    row = load(user.path / "reports").rows[0]
    assert row.marks == (Mark.CRASHED,), done.stdout
    assert row.reasons[0].endswith("the last operator that the device was given: aten::_local_scalar_dense")
