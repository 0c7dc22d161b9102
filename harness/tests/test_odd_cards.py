"""Every row on every card: one card of eight that is wrong is named, and healthy or nondeterministic ones are not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.judging.cards import FURTHER, Bits, odd_cards
from harness.report.cards import totals_of
from harness.report.rows import Row
from harness.tests.environment import of_a_shell, pytest_of_a_shell
from harness.tests.needs import needs_torch_npu
from harness.tests.test_plugin import CASE, run, stored, torch_npu_is_imported, user, write  # noqa: F401

ROOT = Path(__file__).parents[2]

# -------- the rule


def bits(text, spread=0.0):
    """A card's runs by the letters of their digests."""
    return Bits(digests=tuple(text), spread=spread)


def odd(*cards, distance=lambda one, two: 0.0, **more):
    return odd_cards([bits(card) if isinstance(card, str) else card for card in cards], distance, **more)


def test_cards_that_agree_are_not_accused():
    found = odd("aaa", "aaa", "aaa")
    assert (found.majority, found.cards, found.split, found.scattered) == ("a", (), False, False)


@pytest.mark.parametrize(
    "cards, named",
    [
        (("aaa", "aaa", "bbb"), (2,)),
        (("bbb", "aaa", "aaa"), (0,)),
        (("aaa", "aba", "aaa"), (1,)),
        (("aaa", "bcd", "aaa"), (1,)),
        (("aaa", "aaa", "aaa", "bbb", "ccc"), (3, 4)),
        (("aaa", "aab"), (1,)),
        (("aaa", "bcd"), (1,)),
    ],
    ids=["always", "the first", "once", "never the same", "two of five", "of two, once", "of two, never the same"],
)
def test_the_card_that_is_unlike_the_others_is_named(cards, named):
    found = odd(*cards)
    assert found.cards == named and not found.split and not found.scattered


@pytest.mark.parametrize("cards", [("aaa", "bbb"), ("aa", "aa", "bb", "bb"), ("aa", "bb", "cc")])
def test_without_a_majority_none_is_named(cards):
    found = odd(*cards)
    assert found.split and not found.cards and found.majority is None


def test_reruns_that_differ_on_several_cards_accuse_none():
    found = odd("aab", "aca", "aaa", "aaa")
    assert found.scattered and not found.cards
    assert not odd("aab", "aaa", "aaa", scatters=True).cards  # known of the model from an earlier row
    assert not odd("abc", "def", "ggg", "hhh").cards  # without a majority, one that repeats itself is not odd for it
    assert odd("aab", "aca", "ddd", "aaa", "aaa").cards == (2,)  # it repeats itself, with other bits


@pytest.mark.parametrize("times, named", [(FURTHER - 0.01, ()), (FURTHER + 0.01, (2,))], ids=["as reruns", "further"])
def test_a_card_further_off_than_reruns_lie_apart_is_named(times, named):
    cards = [bits(text, spread=1e-6) for text in ("abc", "def", "ghi", "jkl")]

    def distance(one, two):
        assert one != two, "a card is compared with others alone"
        return times * 1e-6 if 2 in (one, two) else 1e-6

    found = odd(*cards, distance=distance)
    assert found.scattered and found.cards == named
    assert FURTHER == 3.0


@pytest.mark.parametrize("times, split", [(FURTHER - 0.01, False), (FURTHER + 0.01, True)])
def test_two_cards_with_reruns_that_differ_cannot_be_told_apart(times, split):
    cards = [bits(text, spread=1e-6) for text in ("abc", "def")]
    found = odd(*cards, distance=lambda one, two: times * 1e-6)
    assert not found.cards and found.split is split


# -------- on eight emulated cards

SETTING = """
from harness import Case, open_device, validate
import json, torch
from torch import nn
from harness.devices.several import cards_of_process
from harness.emulator import faults
from harness.reference import Models
from harness.run.across import Across
torch.set_num_threads(1)
device = open_device("emulated", devices=8)
cards = tuple(cards_of_process(device, devices=8))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)
    def forward(self, x):
        return torch.softmax(self.b(nn.functional.silu(self.norm(self.a(x)))), -1)

case = Case(name="net", model=Net, inputs=lambda generator: torch.randn(8, 32, generator=generator), isolated=False)
models = Models()
def row(seed, *texts, count=8, times=5):
    models.scattered.clear()
    planted = [faults.parse(item) for item in texts]
    for item in planted:
        faults.plant(item)
    verdict = validate(case, seed, device, models=models, across=Across(cards=cards[:count], times=times))
    for item in planted:
        faults.remove(item)
    told = [[item.card, item.runs, item.differing, item.odd, item.operator] for item in verdict.evidence.cards]
    reasons = [str(reason) for reason in verdict.reasons if reason.criterion == "cards"]
    print(json.dumps([verdict.status, list(verdict.marks), reasons, told]), flush=True)
"""


def rows_of_child(calls):
    """What `row(…)` gives for each of `calls`, in one process that plays a machine of eight cards."""
    code = SETTING + calls
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=of_a_shell(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@needs_torch_npu
def test_a_card_that_is_wrong_always_or_once_is_named_with_its_operator():
    healthy, always, once, first = rows_of_child(
        "row(1)\n"
        "row(2, 'aclnnSilu:scale:by=1.0001,card=3')\n"
        "row(3, 'aclnnLayerNorm:offset:by=1e-6,card=6,nth=4')\n"
        "row(4, 'aclnnSilu:noise:by=1e-5,card=0')\n"
    )
    assert (
        healthy[0] == "PASS"
        and not healthy[2]
        and [item[1:4] for item in healthy[3]] == [[6, 0, False], *[[5, 0, False]] * 7]
    )
    status, _, (reason,), told = always
    assert status == "FAIL" and [item[0] for item in told if item[3]] == ["card 3"]
    assert "card 3 is the odd one: in 5 of 5 runs its bits are not those of the 7 other cards" in reason
    assert "the first operator that differs is aten::silu" in reason and "rel_l2" in reason and "max_diff" in reason
    status, _, (reason,), told = once
    assert status == "FAIL" and "card 6 is the odd one: in 1 of 55 runs" in reason
    assert [item[1] for item in told] == [56, *[55] * 7]  # all ran again and agree; the first has a run of its own
    assert first[0] == "FAIL" and [item[0] for item in first[3] if item[3]] == ["card 0"]


@needs_torch_npu
def test_a_nondeterministic_model_accuses_no_card_but_one_that_is_further_off():
    same, rare, further = rows_of_child(
        "row(1, 'aclnnSilu:noise:by=1e-7')\n"
        "row(2, 'aclnnSilu:noise:by=1e-7,probability=0.2,seed=3')\n"
        "row(3, 'aclnnSilu:noise:by=1e-7', 'aclnnSilu:scale:by=1.01,card=5')\n"
    )
    for status, marks, reasons, told in (same, rare):
        assert (status, reasons) == ("PASS", []) and "NONDETERMINISTIC" in marks and not any(item[3] for item in told)
    status, _, (reason,), told = further
    assert status == "FAIL" and [item[0] for item in told if item[3]] == ["card 5"]
    assert "reruns on one of the 7 other cards differ by rel_l2" in reason


@needs_torch_npu
def test_of_two_cards_the_one_outside_of_its_limits_is_named_and_else_none():
    neither, outside = rows_of_child(
        "row(1, 'aclnnSilu:scale:by=1.0000001,card=1', count=2)\nrow(1, 'aclnnSilu:scale:by=1.01,card=1', count=2)\n"
    )
    assert neither[0] == "FAIL" and "the cards differ and none can be singled out: card 0, card 1" in neither[2][0]
    assert not any(item[3] for item in neither[3])
    assert "card 1 is the odd one: card 0, card 1 differ, and it alone is outside of its limits" in outside[2][0]


@needs_torch_npu
def test_a_card_that_raises_is_named_and_one_that_is_lost_is_left_out_of_later_rows():
    raises, lost, after = rows_of_child(
        "row(1, 'aclnnSilu:error:card=2,nth=2')\nrow(2, 'aclnnSilu:lost:card=4')\nrow(3)\n"
    )
    assert raises[0] == "FAIL" and raises[2][0].startswith("card 2 raised what no other did: on npu:2")
    assert "card 4 raised what no other did" in lost[2][0] and "the device is lost" in lost[2][0]
    assert after[0] == "PASS" and [item[0] for item in after[3]] == [f"card {n}" for n in (0, 1, 2, 3, 5, 6, 7)]


# -------- by the option

ROWS = (
    CASE
    + """
@pytest.mark.parametrize("seed", range(1, 6))
def test_precision(precision, seed):
    precision(case("small"), seed)
"""
)


def child_run(user, *arguments):
    return pytest_of_a_shell(user.path, "--devices=8", *arguments)


@needs_torch_npu
def test_one_wrong_call_in_fifty_is_found_and_the_report_has_a_table_of_cards(user):
    write(user, ROWS)
    fault = "aclnnSilu:scale:by=1.0001,card=3,every=50"
    done = child_run(user, "--across-cards", "--fault", fault, "--lang=zh")
    text = done.stdout + done.stderr
    assert done.returncode == 1 and "8 张卡中：card 3 在 5 行中有 1 行不一致" in text, text
    report = stored(user)
    failing = [row for row in report["rows"] if row["status"] == "FAIL"]
    assert [row["seed"] for row in failing] == [5] and failing[0]["criteria"] == ["cards"]
    assert failing[0]["located"] is None  # the card whose rows are located is a healthy one
    assert [item["card"] for item in report["cards"]] == [f"card {number}" for number in range(8)]
    third = report["cards"][3]
    assert (third["rows"], third["differing_rows"], third["odd_rows"], third["runs"]) == (5, 1, 1, 50 + 100)
    markdown = (user.path / "reports" / "precision.md").read_text()
    assert third["differing_runs"] == 3  # and twice in the runs that confirm it
    assert "## 每一行在每张卡上" in markdown and "| card 3 |" in markdown and "是异常卡" in markdown
    from harness.report import load, rerender

    assert [item.odd_rows for item in load(user.path / "reports").cards] == [0, 0, 0, 1, 0, 0, 0, 0]
    rerender(user.path / "reports", output=user.path / "page.html")
    assert "Every row on every card" in (user.path / "page.html").read_text()


@needs_torch_npu
def test_healthy_cards_are_not_accused(user):
    write(user, ROWS)
    done = child_run(user, "--across-cards=4")
    assert done.returncode == 0 and "8 cards agree in every bit of 5 rows (165 runs)" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "options, words",
    [
        (("--across-cards=1",), "a card runs each row twice at least"),
        (("--across-cards", "--device=cpu"), "--precision-device=cpu names one device; write npu"),
        (("--across-cards", "--device=emulated", "--devices=4", "-n", "2"), "leave -n out, or write -n 1"),
    ],
    ids=["one run", "cpu", "workers"],
)
def test_what_cannot_run_on_all_cards_is_refused(user, options, words):
    write(user, ROWS)
    done = user.runpytest_subprocess("-k", "precision", *options)
    assert done.ret == 4 and words in done.stderr.str() + done.stdout.str()


def test_the_totals_are_those_of_the_rows():
    from harness.judging.verdict import CardRuns, error

    row = Row.of(error("x"), test="t", case="c", dtype="float32", seed=1)
    cards = (CardRuns(card="card 0", runs=5, differing=0), CardRuns(card="card 1", runs=5, differing=2, odd=True))
    totals = totals_of([replace(row, cards=cards), replace(row, cards=cards[:1]), row])
    assert [(item.card, item.rows, item.differing_rows, item.share, item.runs) for item in totals] == [
        ("card 0", 2, 0, 0.0, 10),
        ("card 1", 1, 1, 1.0, 5),
    ]
