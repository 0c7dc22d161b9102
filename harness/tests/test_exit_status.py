"""The exit status of a run is that of its report, whatever the tests do with what the fixture raises."""

import threading
from dataclasses import replace

import pytest
import torch

from harness import Tolerance, compare, judge
from harness.judging.status import Mark
from harness.judging.verdict import error, skipped
from harness.plugin.exit_status import complaints
from harness.plugin.turns import Turns
from harness.report import Row
from harness.tests.test_plugin import CASE, run, stored, torch_npu_is_imported, user, write  # noqa: F401

LIMIT = Tolerance(max_diff=1e-3)
BAD = (
    CASE
    + """
import threading, time

class Nan(torch.nn.Module):
    def forward(self, x):
        return x * float("nan")  # nothing can be said of it: FAIL on every device

BAD, GOOD = case("bad", model=Nan), case("good")
"""
)


def statuses(user, **how):
    return [(row["case"], row["status"]) for row in stored(user, **how)["rows"]]


# -------- a failure that a test hides

HIDDEN = {
    "thread": "thread = threading.Thread(target=precision, args=(BAD, 1)); thread.start(); thread.join()",
    "thread that nobody waits for": "threading.Thread(target=precision, args=(BAD, 1)).start(); time.sleep(0.2)",
    "caught": "try: precision(BAD, 1)\n    except BaseException: pass",
    "expected": "with pytest.raises(pytest.fail.Exception): precision(BAD, 1)",
    "caught, and skipped after": "try: precision(BAD, 1)\n    except BaseException: pytest.skip('later')",
    "caught, and the session ended with 0": (
        "try: precision(BAD, 1)\n    except BaseException: pytest.exit('enough', returncode=0)"
    ),
}


def test_a_row_whose_test_clears_its_properties_is_in_the_report(user):
    write(
        user,
        BAD
        + "def test_precision(precision, request):\n    precision(GOOD, 2)\n    request.node.user_properties.clear()\n"
        "    precision(GOOD, 3)\n    request.node.user_properties = []\n",
    )
    assert run(user).ret == 0 and statuses(user) == [("good", "PASS")] * 2


def test_a_row_of_a_forked_process_fails_its_test(user):
    forked = (
        "def test_precision(precision):\n    precision(GOOD, 2)\n    child = os.fork()\n    if child == 0:\n"
        "        try: precision(BAD, 1)\n        finally: os._exit(0)\n    os.waitpid(child, 0)\n"
    )
    write(user, "import os\n" + BAD + forked + "def test_precision_after(precision): precision(GOOD, 3)\n")
    assert run(user).ret == 1 and [status for _, status in statuses(user)] == ["PASS", "ERROR", "PASS"]
    assert "in a process that the test forked" in stored(user)["rows"][1]["reasons"][0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("way", HIDDEN)
def test_a_row_that_fails_fails_the_run(user, way):
    write(user, BAD + f"def test_precision(precision):\n    {HIDDEN[way]}\n")
    assert run(user, "--locate=off").ret == 1
    assert [status for _, status in statuses(user)] in (["FAIL"], ["ERROR"])


FIXTURES = {
    "before": "@pytest.fixture\ndef checked(precision):\n    TRY\n",
    "after": "@pytest.fixture\ndef checked(precision):\n    yield\n    TRY\n",
}


@pytest.mark.parametrize("when", FIXTURES)
@pytest.mark.parametrize("then", ["pass", "pytest.skip('not right on this stack')"])
def test_a_row_that_a_fixture_hides_fails_the_run(user, when, then):
    fixture = FIXTURES[when].replace("TRY", f"try: precision(BAD, 1)\n    except BaseException: {then}")
    write(
        user,
        BAD + fixture + "def test_precision(checked): pass\ndef test_precision_good(precision): precision(GOOD, 2)\n",
    )
    assert run(user, "--locate=off").ret == 1
    hidden = ("bad", "FAIL" if when == "before" else "ERROR")  # a test has ended before its fixtures do
    assert hidden in statuses(user) and ("good", "PASS") in statuses(user)


@pytest.mark.parametrize("seed", ["True", "1.0", "'42'", "-1", "2**63", "2**64 + 1"])
def test_a_seed_that_is_no_whole_number_is_an_error_row_and_ends_nothing(user, seed):
    source = (
        f"@pytest.mark.parametrize('seed', [{seed}], ids=['odd'])\ndef test_precision(precision, seed): "
        "precision(GOOD, seed)\n"
    )
    write(user, BAD + source + "def test_precision_good(precision): precision(GOOD, 2)\n")
    assert run(user).ret == 1
    odd, good = stored(user)["rows"]
    assert (odd["status"], good["status"]) == ("ERROR", "PASS")
    assert "where a whole number from 0 to 2^63 - 1 was expected" in odd["reasons"][0]


def test_a_seed_of_numpy_is_a_seed(user):
    write(
        user,
        BAD + "import numpy\n@pytest.mark.parametrize('seed', numpy.arange(2))\ndef test_precision(precision, seed): "
        "precision(GOOD, seed)\n",
    )
    assert run(user).ret == 0
    assert [row["seed"] for row in stored(user)["rows"]] == [0, 1]


def test_an_expected_failure_of_pytest_excuses_nothing(user):
    write(user, BAD + "@pytest.mark.xfail(reason='later')\ndef test_precision(precision): precision(BAD, 1)\n")
    result = run(user)
    assert result.ret == 1 and statuses(user) == [("bad", "FAIL")]
    result.stdout.fnmatch_lines(
        ["1 row did not pass, and pytest counts no failure: FAIL bad float32 seed 1; *known_failures.toml*"]
    )


def test_a_thread_that_comes_after_its_test_is_an_error_row(user):
    body = (
        "def later():\n    time.sleep(1.0); precision(GOOD, "
        "1)\nthreading.Thread(target=later).start()\nprecision(GOOD, 2)"
    )
    source = "".join(f"    {line}\n" for line in body.splitlines())
    write(user, BAD + f"def test_precision(precision):\n{source}\ndef test_wait(): time.sleep(2.0)\n")
    result = run(user)
    assert result.ret == 1 and statuses(user) == [("good", "PASS"), ("good", "ERROR")]
    assert "its test had ended" in stored(user)["rows"][1]["reasons"][0]


def test_rows_of_several_threads_that_pass_pass(user):
    body = (
        "threads = [threading.Thread(target=precision, args=(GOOD, seed)) for seed in range(4)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]"
    )
    source = "".join(f"    {line}\n" for line in body.splitlines())
    write(user, BAD + f"def test_precision(precision):\n{source}")
    assert run(user).ret == 0 and statuses(user) == [("good", "PASS")] * 4


def test_turns_wait_for_what_has_begun():
    turns, order, begun = Turns(), [], threading.Event()
    turns.begin("a")

    def row():
        with turns.turn("a") as in_time:
            begun.set()
            order.append(("row", in_time))

    with turns.turn("a"):
        thread = threading.Thread(target=row)
        thread.start()
        assert not begun.wait(0.1), "two rows at a time"
    turns.end("a")
    order.append("end")
    thread.join()
    with turns.turn("a") as in_time:
        assert not in_time
    assert order == [("row", True), "end"]
    turns.begin("a")
    with turns.turn("a") as in_time:
        assert in_time


def test_a_subtest_that_fails_fails_and_its_row_is_there_once(user):
    pytest.importorskip("_pytest.subtests")
    body = "with subtests.test('bad'): precision(BAD, 1)\n    with subtests.test('good'): precision(GOOD, 2)"
    write(user, BAD + f"def test_precision(precision, subtests):\n    {body}\n")
    assert run(user, "--locate=off").ret == 1 and statuses(user) == [("bad", "FAIL"), ("good", "PASS")]


# -------- nothing was measured

NOTHING = {
    "every row skipped": (
        "@pytest.mark.skip(reason='no weights')\ndef test_precision(precision): precision(GOOD, 1)\n",
        "1 row skipped",
    ),
    "skipped in the case": (
        (
            "NONE = case('none', model=lambda: pytest.skip('no weights'))\ndef test_precision(precision): "
            "precision(NONE, 1)\n"
        ),
        "1 row skipped",
    ),
    "a test without the fixture": ("def test_precision_mine(): pass\n", "no test handed a case"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_run_that_measured_nothing_fails(user, name):
    source, said = NOTHING[name]
    write(user, BAD + source)
    result = run(user, "-k", "precision")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"nothing was measured*{said}*"])


def test_a_run_of_other_tests_that_gives_an_option_measured_nothing(user):
    write(user, "def test_other(): pass\n")
    assert run(user).ret == 1
    assert user.runpytest_inprocess().ret == 0  # no option


def test_one_row_that_was_measured_is_enough(user):
    write(
        user,
        BAD + "def test_precision(precision): precision(GOOD, 1)\n@pytest.mark.skip\ndef "
        "test_precision_too(precision): pass\n",
    )
    assert run(user, "-k", "precision").ret == 0
    assert [status for _, status in statuses(user)] == ["PASS", "SKIPPED"]


def test_collecting_alone_is_no_run(user):
    write(user, BAD + "def test_precision(precision): precision(GOOD, 1)\n")
    assert run(user, "--collect-only").ret == 0


def test_complaints_of_rows():
    def row(verdict, seed=1, **more):
        return replace(Row.of(verdict, test="t", case="a", dtype="float32", seed=seed), **more)

    passed, failed, gone = judge(compare(torch.ones(2), torch.ones(2)), LIMIT), error("no"), skipped("no weights")
    assert complaints([row(passed)], asked=True) == [] == complaints([], asked=False)
    assert len(complaints([], asked=True)) == 1 == len(complaints([row(gone)], asked=True))
    assert complaints([row(gone)], asked=False) == [] == complaints([row(gone), row(passed)], asked=True)
    assert complaints([row(failed, marks=(Mark.KNOWN,))], asked=True) == []
    (said,) = complaints([row(failed, seed=seed) for seed in range(7)], asked=True)
    assert said.startswith("7 rows did not pass") and said.count("ERROR a float32") == 5 and " …;" in said


# -------- every row is there


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "worker"])
def test_any_test_that_uses_the_fixture_gives_a_row(user, workers):
    if workers:
        pytest.importorskip("xdist")
    source = (
        "@pytest.fixture\ndef check(precision): return precision\n"
        "def test_mine(precision): precision(GOOD, 1)\ndef test_through(check): check(GOOD, 2)\n"
        "def test_asked(request): request.getfixturevalue('precision')(GOOD, 3)\ndef test_idle(precision): pass\n"
    )
    write(user, BAD + source)
    result = user.runpytest_subprocess("--device", "cpu", *workers) if workers else run(user)
    assert result.ret == 1  # the last compared nothing
    rows = {row["test"].partition("::")[2]: (row["status"], row["seed"]) for row in stored(user)["rows"]}
    assert rows == {
        "test_mine": ("PASS", 1),
        "test_through": ("PASS", 2),
        "test_asked": ("PASS", 3),
        "test_idle": ("ERROR", None),
    }


RAISES = {
    "in the model": "Case(name='named', model=lambda: 1 / 0, inputs=tokens)",
    "in the inputs": "Case(name='named', model=Nan, inputs=lambda g: [][1])",
    "pytest.fail": "Case(name='named', model=lambda: pytest.fail('no'), inputs=tokens)",
    "no module": "Case(name='named', model=lambda: 3, inputs=tokens)",
}


@pytest.mark.parametrize("where", RAISES)
def test_a_row_keeps_the_name_of_its_case_through_any_exception(user, where):
    write(user, BAD + f"def test_precision(precision): precision({RAISES[where]}, 3)\n")
    assert run(user).ret == 1
    (row,) = stored(user)["rows"]
    assert (row["case"], row["dtype"], row["seed"], row["status"]) == ("named", "float32", 3, "ERROR")


def test_a_row_keeps_its_name_through_an_interrupt_and_a_crash_of_a_worker(user):
    stops = (
        "class Stops(torch.nn.Module):\n    def forward(self, x): {}\n"
        "def test_precision(precision): precision(case('named', model=Stops), 3)\n"
    )
    write(user, BAD + stops.format("raise KeyboardInterrupt"))
    assert user.runpytest_subprocess("--device", "cpu").ret == 2
    (row,) = stored(user)["rows"]
    assert (row["case"], row["seed"], row["status"]) == ("named", 3, "ERROR") and "was running" in row["reasons"][0]
    pytest.importorskip("xdist")
    write(user, BAD + stops.format("import os; os.kill(os.getpid(), 9)"))
    assert user.runpytest_subprocess("--device", "cpu", "-n", "1").ret == 1
    (row,) = stored(user)["rows"]
    assert (row["case"], row["seed"], row["status"]) == ("named", 3, "ERROR") and "crashed" in row["reasons"][0]


# -------- a report belongs to its run


@pytest.mark.parametrize("options", [(), ("-k", "precision"), ("--device", "cpu")], ids=["plain", "word", "option"])
def test_a_run_that_ends_in_collection_does_not_leave_the_report_of_another(user, options):
    write(user, BAD + "def test_precision(precision): precision(GOOD, 1)\n")
    assert run(user).ret == 0
    write(user, "import no_such_module\n" + BAD + "def test_precision(precision): precision(GOOD, 1)\n")
    assert user.runpytest_inprocess(*options, "--device=cpu").ret == 2
    (row,) = stored(user)["rows"]
    assert row["status"] == "ERROR" and "no_such_module" in row["reasons"][0]
    assert (user.path / "reports" / "precision-previous.json").exists()


def test_a_run_that_stops_at_its_options_leaves_no_report_of_another(user):
    write(user, BAD + "def test_precision(precision): precision(GOOD, 1)\n")
    assert run(user).ret == 0
    assert run(user, "--preset", "flor").ret == 4
    assert not (user.path / "reports" / "precision.json").exists()


def test_a_run_without_accuracy_tests_leaves_the_report_alone(user):
    write(user, BAD + "def test_precision(precision): precision(GOOD, 1)\n")
    assert run(user).ret == 0
    user.makepyfile(test_broken="import no_such_module\n")
    assert user.runpytest_inprocess("test_broken.py").ret == 2
    assert [status for _, status in statuses(user)] == ["PASS"]


# -------- attempts

FLAKY = """
CALLS = []
def test_precision(precision):
    CALLS.append(1)
    precision(BAD if len(CALLS) < {passes} else GOOD, len(CALLS))
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "worker"])
@pytest.mark.parametrize(("passes", "status"), [(2, "PASS"), (9, "FAIL")])
def test_of_several_attempts_the_last_is_the_row(user, passes, status, workers):
    pytest.importorskip("pytest_rerunfailures")
    write(user, BAD + FLAKY.format(passes=passes))
    result = user.runpytest_subprocess(
        "--device", "cpu", "--locate=off", "--reruns", "2", "--junitxml", "junit.xml", *workers
    )
    assert result.ret == (0 if status == "PASS" else 1)
    (row,) = stored(user)["rows"]
    assert row["status"] == status and "RERUN" in row["marks"] and row["seed"] == (2 if status == "PASS" else 3)
    attempts = (user.path / "junit.xml").read_text().split("</testcase>")[:-1]  # the plugin writes one for each
    assert attempts and all(attempt.count('name="rel_l2"') == 1 for attempt in attempts)


def test_a_first_attempt_that_passes_is_not_marked(user):
    pytest.importorskip("pytest_rerunfailures")
    write(user, BAD + FLAKY.format(passes=1))
    assert user.runpytest_subprocess("--device", "cpu", "--locate=off", "--reruns", "2").ret == 0
    (row,) = stored(user)["rows"]
    assert row["status"] == "PASS" and "RERUN" not in row["marks"]


# -------- rows without accepted numbers


def test_a_row_without_accepted_numbers_fails_where_they_are_required(user):
    good = "@pytest.mark.parametrize('seed', [1, 2])\ndef test_precision(precision, seed): precision(GOOD, seed)\n"
    write(user, BAD + good)
    assert run(user, "--baseline=require").ret == 1
    rows = stored(user)["rows"]
    assert [(row["status"], row["marks"]) for row in rows] == [("FAIL", ["NEW"])] * 2
    (reason,) = rows[0]["reasons"]
    assert reason.startswith("no accepted numbers, which --precision-baseline=require asks for: no baseline for good")
    assert reason.endswith(" float32 seed 1; accept this run with --precision-baseline=accept")
    assert [row["located"] for row in rows] == [None] * 2  # no error is there to be located
    assert run(user, "--baseline=accept").ret == 0
    assert run(user, "--baseline=require").ret == 0
    assert [row["marks"] for row in stored(user)["rows"]] == [["IDENTICAL"]] * 2
    (user.path / "cases" / "baselines" / "good-float32.json").unlink()
    assert run(user).ret == 0  # NEW, and that is allowed
    assert (
        run(user, "--baseline=require", "--resume", "--locate=off").ret == 1
    )  # also where a run that passed is resumed
    assert [row["status"] for row in stored(user)["rows"]] == ["FAIL"] * 2


def test_a_run_that_no_accuracy_test_matches_fails_and_names_the_report_of_the_run_before(user):
    write(user, BAD + "def test_precision_good(precision): precision(GOOD, 2)\ndef test_other(): pass\n")
    assert run(user).ret == 0
    result = run(user, "-k", "precision and digit7")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "no accuracy test matches; nothing was measured",
            "this run wrote no report; that of the run before is *precision-previous.md",
        ]
    )
    folder = user.path / "reports"
    assert not (folder / "precision.json").exists() and (folder / "precision-previous.json").exists()
    assert user.runpytest_inprocess("-k", "digit7").ret == pytest.ExitCode.NO_TESTS_COLLECTED  # which asks for none


# -------- the terminal in Chinese


def test_the_terminal_speaks_the_reports_language(user):
    write(user, BAD + "def test_precision(precision): precision(BAD, 1)\n")
    said = run(user, "--lang=zh", "--locate=off").stdout.str()
    assert "最多允许" in said and " allowed)" not in said
    assert "outcome: failures" in said and "report: " in said  # which programs read
    assert " allowed)" in run(user, "--locate=off").stdout.str()
