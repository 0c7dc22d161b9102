"""Each worker of pytest-xdist has a card of its own."""

import pytest

from harness.devices.visible import visible_cards
from harness.plugin.cards import share_cards
from harness.tests.environment import pytest_of_a_shell
from harness.tests.needs import needs_torch_npu
from harness.tests.test_plugin import CASE, stored, torch_npu_is_imported, user, write  # noqa: F401

SIX = (
    CASE
    + """
@pytest.mark.parametrize("seed", range(1, 7))
def test_precision(precision, seed):
    import time
    time.sleep(1)  # so that one worker does not run them all
    precision(case("small"), seed)
"""
)


@pytest.mark.parametrize(
    "named, devices, cards",
    [(None, None, ["0"]), (None, 3, ["0", "1", "2"]), ("2,5", 8, ["2", "5"]), ("2,5", 4, ["2"]), ("", 4, [])],
)
def test_the_visible_cards_are_those_of_the_caller(monkeypatch, named, devices, cards):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", named)
    assert visible_cards("emulated", devices) == cards


def test_cards_of_a_real_machine_are_its_device_files(monkeypatch):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    files = ["/dev/davinci10", "/dev/davinci2", "/dev/davinci_manager"]
    monkeypatch.setattr("harness.devices.npu.glob.glob", lambda pattern: files)
    assert visible_cards("npu") == ["2", "10"]
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1, 3")
    assert visible_cards("npu") == ["1", "3"]


class Spec:
    def __init__(self):
        self.env = {}


@pytest.mark.parametrize(
    "options, workers, words",
    [
        (("--device=emulated", "--devices=2"), 3, r"3 workers \(-n\) and 2 cards \(0, 1\)"),
        (("--device=npu:1",), 2, "--precision-device=npu:1 names one card and there are 2 workers; write npu"),
    ],
    ids=["more than cards", "one card named"],
)
def test_too_many_workers_are_refused(user, monkeypatch, options, workers, words):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    config = user.parseconfig(*options)
    with pytest.raises(pytest.UsageError, match=words):
        share_cards(config, [Spec() for _ in range(workers)])


def test_each_worker_is_shown_its_card(user, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3,5,6")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    specs = [Spec(), Spec()]
    share_cards(user.parseconfig("--device=npu"), specs)
    assert [spec.env for spec in specs] == [{"ASCEND_RT_VISIBLE_DEVICES": "3"}, {"ASCEND_RT_VISIBLE_DEVICES": "5"}]
    specs = [Spec(), Spec()]
    share_cards(user.parseconfig("--device=emulated"), specs)  # each plays a machine of its own
    assert [spec.env for spec in specs] == [{}, {}]


@needs_torch_npu
def test_rows_say_on_which_card_they_ran(user):
    write(user, SIX)
    done = pytest_of_a_shell(user.path, "--devices=3", "-n", "auto", ASCEND_RT_VISIBLE_DEVICES="0,2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["card"] for row in stored(user)["rows"]} == {"emulated card 0", "emulated card 2"}


TWINS = (
    CASE
    + """
import time

@pytest.mark.parametrize("name", ["first", "second", "third", "fourth"])
def test_precision(precision, name):
    time.sleep(0 if name == "first" else 20)
    precision(case(name), 1)
"""
)


@needs_torch_npu
@pytest.mark.parametrize("workers, read", [("2", 3), ("1", 0)], ids=["shared by several", "one alone"])
def test_what_the_cpu_computed_is_read_by_the_other_workers(user, workers, read):
    """Four cases with one content: the first worker computes, and what the others read is removed with the run."""
    source = TWINS if workers == "2" else TWINS.replace("20)", "0)")
    write(user, source)
    (user.path / "temporary").mkdir()
    done = pytest_of_a_shell(user.path, "-n", workers, TMPDIR=str(user.path / "temporary"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = stored(user)["rows"]
    assert sum(bool(row["stored"]) for row in rows) == read, [row["stored"] for row in rows]
    assert not list((user.path / "temporary").glob("accuracy-workers-*"))
