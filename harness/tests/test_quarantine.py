"""A card that no longer answers gets no more rows: those that remain go to other cards, or are errors at once."""

import os
import sys
import time

import pytest

from harness.devices.asking import problem_of
from harness.plugin.quarantine import Quarantine
from harness.report import Row, build, load
from harness.report.cards import Quarantined
from harness.report.content import NOT_RUN, UNRUN
from harness.tests.environment import pytest_of_a_shell
from harness.tests.needs import needs_torch_npu
from harness.tests.test_plugin import CASE, run, stored, torch_npu_is_imported, user, write  # noqa: F401

ROWS = (
    CASE
    + """
import time

@pytest.mark.parametrize("seed", range(1, 9))
def test_precision(precision, seed):
    time.sleep(0.5)  # so that one worker does not run them all
    precision(case("small"), seed)
"""
)
LOST = "aclnnSilu:lost:card=0,nth=3"  # two calls a row


def run_of(user, *arguments, **environment):
    """A run on emulated cards in a process of its own."""
    done = pytest_of_a_shell(user.path, *arguments, **environment)
    return done.returncode, done.stdout + done.stderr


def statuses(user):
    return [row["status"] for row in sorted(stored(user)["rows"], key=lambda row: row["seed"])]


@needs_torch_npu
def test_rows_of_a_lost_card_go_to_the_other_cards(user):
    write(user, ROWS)
    code, text = run_of(user, "--devices=2", "-n", "2", "--fault", "aclnnSilu:lost:card=0,nth=1")
    report = stored(user)
    assert code == 1 and sorted(statuses(user)) == ["ERROR", *["PASS"] * 7], text
    failed = next(row for row in report["rows"] if row["status"] == "ERROR")
    assert "the device is lost" in failed["reasons"][0]
    (card,) = report["quarantined"]
    assert (card["card"], card["then"]) == ("card 0", "its rows went to the other cards")
    assert card["after"] == f"small float32 seed {failed['seed']}"
    assert "asked in another process: npu:0 does not answer" in card["seen"]
    assert report["outcome"] == "infrastructure"
    assert f"QUARANTINED: card 0 was quarantined after small float32 seed {failed['seed']}: " in text
    assert "## Quarantined cards" in (user.path / "reports" / "precision.md").read_text()


@needs_torch_npu
def test_a_card_that_is_lost_when_the_other_workers_end_leaves_no_row_behind(user):
    """What it gives back comes too late for a worker that was told to end: a new one takes that card."""
    write(user, ROWS)
    _, text = run_of(user, "--devices=2", "-n", "2", "--fault", "aclnnSilu:lost:card=0,nth=5")
    assert sorted(statuses(user)) == ["ERROR", *["PASS"] * 7], text


@needs_torch_npu
def test_with_one_card_the_rest_is_not_run_and_says_so_at_once(user):
    write(user, ROWS.replace("time.sleep(0.5)", "pass"))
    began = time.monotonic()
    code, text = run_of(user, "--isolate", "--fault", LOST, "--row-timeout=100")
    assert code == 1 and statuses(user) == ["PASS", *["ERROR"] * 7], text
    assert time.monotonic() - began < 100
    rows = sorted(stored(user)["rows"], key=lambda row: row["seed"])
    for row in rows[2:]:
        assert "not run: the only card (card 0) was quarantined after small float32 seed 2: " in row["reasons"][0]
    assert stored(user)["outcome"] == "infrastructure" and stored(user)["backend"] == "emulated"
    assert stored(user)["quarantined"][0]["then"] == "no card was left, and the rows after it did not run"


@needs_torch_npu
def test_a_card_that_no_worker_uses_takes_the_place_of_a_lost_one(user):
    write(user, ROWS.replace("time.sleep(0.5)", "pass"))
    code, text = run_of(user, "--devices=2", "-n", "1", "--fault", LOST)
    assert statuses(user) == ["PASS", "ERROR", *["PASS"] * 6], text
    assert stored(user)["quarantined"][0]["then"] == "its rows went to card 1"
    assert {row["card"] for row in stored(user)["rows"] if row["seed"] > 2} == {"emulated card 1"}


@needs_torch_npu
def test_a_closed_queue_costs_one_row_and_no_card(user):
    write(user, ROWS.replace("time.sleep(0.5)", "pass"))
    fault = "aclnnSilu:error:code=507015,nth=5"
    code, text = run_of(user, "--isolate", "--fault", fault, "--row-timeout=100", TASK_QUEUE_ENABLE="1")
    # the process that comes next counts the calls of the fault from the start
    assert code == 1 and statuses(user).count("ERROR") == 2 and statuses(user).count("PASS") == 6, text
    assert "quarantined" not in stored(user)


@needs_torch_npu
def test_rows_on_all_cards_go_on_without_a_lost_one(user):
    write(user, ROWS.replace("time.sleep(0.5)", "pass"))
    words = ("--devices=4", "-n", "1", "--across-cards=2")
    _, text = run_of(user, *words, "--fault", "aclnnSilu:lost:card=0,nth=3", "--fault", "aclnnSilu:lost:card=2,nth=3")
    assert statuses(user).count("PASS") >= 6, text
    assert {card["card"] for card in stored(user)["quarantined"]} == {"card 0", "card 2"}
    last = max(stored(user)["rows"], key=lambda row: row["seed"])
    assert [card["card"] for card in last["cards"]] == ["card 1", "card 3"]


@needs_torch_npu
def test_in_one_process_a_lost_card_is_named_too(user):
    write(user, ROWS.replace("time.sleep(0.5)", "pass"))
    _, text = run_of(user, "--fault", LOST)
    assert statuses(user) == ["PASS", *["ERROR"] * 7], text
    report = load(user.path / "reports")
    assert [(item.card, item.after) for item in report.quarantined] == [("card 0", "small float32 seed 2")]
    assert str(report.outcome) == "infrastructure"


# -------- asking


def asking(code, limit=60.0):
    began = time.monotonic()
    problem = problem_of("emulated", "0", limit=limit, command=(sys.executable, "-c", code))
    return problem, time.monotonic() - began


def test_a_card_that_hangs_is_not_waited_for():
    problem, seconds = asking("import time; time.sleep(100)", limit=1.0)
    assert problem == "it did not open and compute within 1 s" and seconds < 30


@pytest.mark.parametrize(
    "code, problem",
    [
        ("", ""),
        ("import os; os.abort()", "the process that asked it died by SIGABRT"),
        ("print('harness.devices.asking: it is gone'); raise SystemExit(1)", "it is gone"),
        ("raise SystemExit(3)", "the process that asked it ended with 3"),
    ],
)
def test_what_a_card_answers_is_said(code, problem):
    assert asking(code)[0] == problem


@needs_torch_npu
def test_an_emulated_card_answers(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("ASCEND", "LD_LIBRARY_PATH", "EMULATED"))]:
        monkeypatch.delenv(name)
    assert problem_of("emulated", "1", devices=2) == ""


# -------- the report


def test_rows_that_were_lost_with_a_card_are_no_failures():
    from harness.judging.verdict import error

    def outcome(*texts, quarantined=()):
        rows = [Row.of(error(text), test=text, case="c", dtype="float32", seed=n) for n, text in enumerate(texts)]
        return str(build(rows, stack={}, backend="emulated", quarantined=quarantined).outcome)

    card = Quarantined(card="card 3", after="c float32 seed 0", seen="it is lost", then="its rows went to card 1")
    assert outcome("RunError: odd") == "failures"
    assert outcome("RunError: odd", quarantined=[card]) == "infrastructure"
    assert outcome("RunError: odd", "RunError: odd", quarantined=[card]) == "failures"
    assert outcome(f"DeviceError: {UNRUN}the only card is gone", NOT_RUN) == "infrastructure"
    assert str(card) == "card 3 was quarantined after c float32 seed 0: it is lost; its rows went to card 1"


def test_a_card_that_answered_another_process_is_not_reported_as_quarantined():
    """Its worker saw a lost device, and told so before the card was asked."""

    def told(card):
        return Quarantined(card=card, after="small float32 seed 1", seen="lost", then="it got no more rows")

    known = Quarantine(config=None, workers=None)
    workers = {"card 0 (serial 7)": told("card 0 (serial 7)"), "card 1": told("card 1"), "card 2": told("card 2")}
    assert known.all_cards(workers) == tuple(workers.values())
    known.answered |= {"card 0", "card 1"}
    known.cards["card 1"] = told("card 1 later")  # it answered once, and not the next time
    assert [card.card for card in known.all_cards(workers)] == ["card 2", "card 1 later"]
