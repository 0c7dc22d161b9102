"""Rows on a Ray cluster: three nodes on this machine, one of which is killed; the report is that of one machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from harness.plugin import cluster
from harness.plugin.cluster import Cluster, need_of
from harness.plugin.row_queue import Queued, RowQueue
from harness.plugin.spread import PATIENCE, Spread
from harness.report.content import NOT_RUN
from harness.tests.environment import of_a_shell
from harness.tests.needs import needs_torch_npu, skip_without_ray
from harness.tests.test_plugin import CASE, ROOT, stored, user, write  # noqa: F401

MEASURED_ANEW = {"expected_ms", "actual_ms", "first_run_ms", "host"}
SMALLEST = dict(object_store_memory=80 << 20)  # bytes; Ray takes no less than 75 MiB
NODES = ("one", "two", "three")

ROWS = (
    CASE
    + """
import os, time

class Wrong(torch.nn.Linear):
    def forward(self, x):
        raise RuntimeError("no such operator")

CASES = [case(name, weights_seed=number) for number, name in enumerate(("a", "b", "c"))]
CASES += [case("a", weights_seed=0, dtype="float16"), case("wrong", model=lambda: Wrong(16, 4))]

@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.dtype}")
@pytest.mark.parametrize("seed", [1, 2, 3], ids=lambda seed: f"seed{seed}")
def test_precision(precision, case, seed):
    time.sleep(2 * os.path.exists("{slow}"))
    precision(case, seed)

def test_other():
    assert True
"""
)

DYING = (
    CASE
    + """
import os, signal, time

class Odd(torch.nn.Module):
    def __init__(self, act):
        super().__init__()
        self.linear, self.act = torch.nn.Linear(4, 4), act
    def forward(self, x):
        if x.max() > 1.5:
            self.act()
        return self.linear(x)

def given(generator):
    return torch.rand(2, 4, generator=generator) / 4 + generator.initial_seed()

def odd(name, act):
    return Case(name=name, model=lambda: Odd(act), inputs=given, isolated=False)

@pytest.mark.parametrize("seed", [1, 2])
def test_precision(precision, seed):
    precision(odd("killed", lambda: os.kill(os.getpid(), signal.SIGKILL)), seed)

class TestHung:
    @pytest.mark.parametrize("seed", [1, 2])
    def test_precision(self, precision, seed):
        precision(odd("hung", lambda: time.sleep(600)), seed)
"""
)


ODD_INPUTS = (
    CASE
    + """
class Odd(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.linear(torch.sin(x) if x.max() > 9 else x)

def given(generator):
    return torch.rand(2, 4, generator=generator) + 10 * (generator.initial_seed() == 1)

CASES = [case(name, model=Odd, inputs=given, weights_seed=number) for number, name in enumerate("abc")]

@pytest.mark.parametrize("seed", range(1, 10))
def test_precision(precision, seed):
    precision(CASES[seed % 3], seed)
"""
)


def environment():
    """Of a user's shell, with this checkout, and with one thread: nodes of one machine share its cores."""
    return of_a_shell("PYTEST_XDIST", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def three():
    """A cluster of three nodes with a CPU each, and its head without one."""
    skip_without_ray()
    from ray.cluster_utils import Cluster as Nodes

    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environment()):
            patch.delenv(name)
        for name, value in environment().items():
            patch.setenv(name, value)
        nodes = Nodes(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False, **SMALLEST))
        nodes.named = {name: nodes.add_node(num_cpus=1, node_name=name, **SMALLEST) for name in NODES}
        yield nodes
        nodes.shutdown()


def command(*arguments):
    return [sys.executable, "-m", "pytest", "--device=cpu", *arguments]


def pytest_run(user, *arguments, **variables):
    """A run as its user starts it; `variables` are added to its environment."""
    how = dict(cwd=user.path, env=environment() | variables, capture_output=True, text=True, timeout=300)
    return subprocess.run(command(*arguments), **how)


def unlike(row, other):
    """The names of what two rows do not share, but for what is measured anew in each run."""
    assert row.keys() == other.keys()
    return {name for name in row if name not in MEASURED_ANEW and row[name] != other[name]}


# -------- runs on a cluster


def test_the_report_is_that_of_one_machine(user, three, tmp_path):
    write(user, ROWS.replace("{slow}", str(tmp_path / "slow")))
    one = pytest_run(user, "--report=one", "--junitxml=one.xml", "--baseline=accept")
    spread = pytest_run(user, "--report=spread", "--junitxml=spread.xml", f"--ray={three.address}")
    assert (one.returncode, spread.returncode) == (1, 1), spread.stdout + spread.stderr
    assert "3 hosts, 3 workers with 1 CPU each" in spread.stdout and "tests by host: " in spread.stdout
    rows, others = stored(user, "one")["rows"], stored(user, "spread")["rows"]
    assert [row["test"] for row in rows] == [row["test"] for row in others] and len(rows) == 15
    wrong = [(row["status"], other["status"]) for row, other in zip(rows, others) if row["case"] == "wrong"]
    assert wrong == [("ERROR", "ERROR")] * 3
    differing = [unlike(row, other) - {"marks", "baseline"} for row, other in zip(rows, others)]
    assert differing == [set()] * len(rows)
    assert {mark for row in others if row["case"] != "wrong" for mark in row["marks"]} == {"IDENTICAL"}
    assert {row["host"] for row in rows} == {None} and len({row["host"] for row in others}) > 1
    assert stored(user, "one")["stack"] == stored(user, "spread")["stack"]
    tests = [re.search(r'failures="(\d+)".*tests="(\d+)"', (user.path / f"{name}.xml").read_text()).groups()
             for name in ("one", "spread")]  # fmt: skip
    assert tests[0] == tests[1]
    resumed = pytest_run(user, "--report=spread", "--resume", "--locate=off", f"--ray={three.address}")
    assert resumed.returncode == 1
    kept = [row["actual_ms"] == other["actual_ms"] for row, other in zip(others, stored(user, "spread")["rows"])]
    assert [row["status"] == "PASS" for row in others] == [same and row["actual_ms"] is not None
                                                           for row, same in zip(others, kept)]  # fmt: skip


def test_a_row_whose_worker_dies_twice_is_an_error_and_a_hung_one_is_not_tried_again(user, three):
    write(user, DYING)
    done = pytest_run(user, f"--ray={three.address}", "--row-timeout=3")
    rows = {(row["case"], row["seed"]): row for row in stored(user)["rows"]}
    assert done.returncode == 1 and len(rows) == 4, done.stdout + done.stderr
    assert {key: row["status"] for key, row in rows.items()} == {
        ("killed", 1): "PASS", ("killed", 2): "ERROR", ("hung", 1): "PASS", ("hung", 2): "ERROR"
    }  # fmt: skip
    killed, hung = rows["killed", 2], rows["hung", 2]
    assert killed["marks"] == ["CRASHED", "RERUN"] and hung["marks"] == ["HUNG"]
    places = re.fullmatch(
        r"its worker died twice, on (\w+): its process crashed by SIGKILL.* and on (\w+): its process.*",
        killed["reasons"][0],
    )
    assert places and places[1] != places[2]
    assert "it did not end within 3 s (--precision-row-timeout); thread MainThread: " in hung["reasons"][0]
    assert stored(user)["outcome"] == "infrastructure" and "1 rerun" in done.stdout


@needs_torch_npu
def test_a_closed_queue_costs_one_row_and_its_worker_gets_another_process(user, three):
    write(user, ODD_INPUTS)
    words = ("--device=emulated", "--locate=off", "--fault=aclnnSin:error", f"--ray={three.address}")
    done = pytest_run(user, *words, TASK_QUEUE_ENABLE="1")
    rows = {row["seed"]: row for row in stored(user)["rows"]}
    assert [seed for seed, row in rows.items() if row["status"] != "PASS"] == [1], done.stdout + done.stderr
    assert "aclnnSin failed in torch_npu's queue" in rows[1]["reasons"][0] and len(rows) == 9
    assert "quarantined" not in stored(user)


@needs_torch_npu
def test_lost_cards_are_quarantined_by_host_and_without_one_the_rest_is_not_run(user, three):
    write(user, ODD_INPUTS.replace("== 1", "> 0"))  # so that each worker loses its card in its first row
    words = ("--device=emulated", "--locate=off", "--fault=aclnnSin:lost", f"--ray={three.address}")
    done = pytest_run(user, *words)
    report = stored(user)
    reasons = [row["reasons"][0] for row in report["rows"]]
    unrun = [reason for reason in reasons if reason.startswith("not run: ")]
    assert len(reasons) == 9 and len(unrun) == 6, done.stdout + done.stderr
    assert {card["card"] for card in report["quarantined"]} == {f"card 0 of {name}" for name in NODES}
    assert all("asked in another process: npu:0 does not answer" in card["seen"] for card in report["quarantined"])
    assert all("the last of the cards (card 0 of " in reason for reason in unrun)
    assert report["outcome"] == "infrastructure" and done.returncode == 1


def test_a_run_that_is_ended_names_the_rows_that_ran(user, three, tmp_path):
    (tmp_path / "slow").touch()
    write(user, ROWS.replace("{slow}", str(tmp_path / "slow")).replace("sleep(2", "sleep(600"))
    journal = user.path / "reports" / "precision.journal"
    with subprocess.Popen(command(f"--ray={three.address}"), cwd=user.path, env=environment()) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (journal.exists() and '"running"' in journal.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 2
    reasons = [row["reasons"][0] for row in stored(user)["rows"]]
    assert "it was running when the session ended (KeyboardInterrupt)" in reasons and NOT_RUN in reasons


def test_a_node_that_dies_costs_its_row_which_runs_again_elsewhere(user, three, tmp_path):
    """The last of the runs: it leaves two nodes."""
    write(user, ROWS.replace("{slow}", str(tmp_path / "slow")))
    pytest_run(user, "--report=one", "--locate=off")
    (tmp_path / "slow").touch()
    words = command("-v", "--locate=off", f"--ray={three.address}")
    with subprocess.Popen(words, cwd=user.path, env=environment(), text=True, stdout=subprocess.PIPE) as process:
        journal, until = user.path / "reports" / "precision.journal", time.monotonic() + 120
        while time.monotonic() < until:
            begun = journal.read_text().count('"named"') if journal.exists() else 0
            if begun > len(NODES):  # each node runs a row
                break
            time.sleep(0.05)
        three.remove_node(three.named["two"], allow_graceful=False)
        text = process.communicate(timeout=200)[0]
    assert process.returncode == 1, text
    rows, others = stored(user, "one")["rows"], stored(user)["rows"]
    again = [row for row in others if "RERUN" in row["marks"]]
    assert len(again) == 1 and again[0]["host"] != "two", text
    assert "It ran again, since its first worker died on two: its node" in again[0]["notes"][-1]
    differing = [unlike(row, other) for row, other in zip(rows, others)]
    assert [names for row, names in zip(others, differing) if row is not again[0]] == [set()] * (len(rows) - 1)
    assert unlike(rows[others.index(again[0])], again[0]) == {"marks", "notes"}
    assert {row["host"] for row in others} <= set(NODES) and "1 rerun" in text


@needs_torch_npu
def test_a_located_row_of_an_emulated_device_brings_its_files(user, three):
    write(user, CASE + "\ndef test_precision(precision):\n    precision(case(), 1)\n")
    done = pytest_run(user, "--device=emulated", "--fault=aclnnSilu:scale:by=1.5", f"--ray={three.address}")
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = stored(user)["rows"]
    assert (row["status"], stored(user)["backend"]) == ("FAIL", "emulated") and row["host"] in NODES
    script = user.path / "reports" / "repro" / "small-float32-seed1" / "repro.py"
    assert row["located"]["repro"]["folder"] == str(script.parent) and script.is_file()


# -------- refusals


def test_a_cluster_without_cards_is_refused(user, three):
    write(user, ROWS)
    done = pytest_run(user, "--device=npu", f"--ray={three.address}")
    assert done.returncode == 4
    assert re.search(
        r"no node of the cluster at .* has NPU \(.*one.*three.*\); start a node with `ray start`", done.stderr
    )


@pytest.mark.parametrize(
    "arguments, words",
    [(("-n", "2"), "--precision-ray with -n"), (("--pdb",), "--precision-ray with --pdb")],
    ids=["workers of pytest-xdist", "a debugger"],
)
def test_other_ways_of_running_are_refused(user, arguments, words):
    write(user, ROWS)
    done = pytest_run(user, "--ray=auto", *arguments)
    assert done.returncode == 4 and words in done.stderr


def refused(monkeypatch, address, words, tmp_path, device="cpu"):
    with pytest.raises(pytest.UsageError, match=words):
        Cluster(address, device=device, root=tmp_path, report=tmp_path)


def test_without_ray_the_words_to_install_it_are_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(monkeypatch, "auto", r"ray is not installed here; pip install 'npu-accuracy-harness\[ray\]'", tmp_path)


def test_an_address_that_does_not_answer_is_refused_in_time(monkeypatch, tmp_path):
    skip_without_ray()
    monkeypatch.setattr(cluster, "ANSWER", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        refused(monkeypatch, address, "no Ray cluster answers at .* within 3 s; give auto on a machine", tmp_path)
    refused(monkeypatch, address, f"{address} does not answer", tmp_path)


def test_a_card_that_is_named_is_refused(monkeypatch, tmp_path):
    skip_without_ray()
    refused(monkeypatch, "auto", "names one card; write npu", tmp_path, device="npu:1")


# -------- which worker runs which row


def test_each_kind_of_device_takes_what_ray_calls_it():
    nodes = [{"CPU": 64.0, "NPU": 8.0, "GPU": 2.0}, {"CPU": 4.0, "NPU": 1.0}, {}]
    assert need_of("npu", nodes).workers == 9 and need_of("npu", nodes).options == {
        "num_cpus": 0,
        "resources": {"NPU": 1},
    }
    assert need_of("cuda", nodes).workers == 2 and need_of("cuda", nodes).options == {"num_cpus": 0, "num_gpus": 1}
    assert need_of("emulated", nodes).options == {"num_cpus": 4} and need_of("emulated", nodes).workers == 17
    assert need_of("cpu", [{}]).workers == 0


def queue_of(**groups):
    return RowQueue({test: Queued(group=name, dtype="float32") for name, tests in groups.items() for test in tests})


def taken(queue, worker, host="h", hosts=("h",)):
    turn = queue.take(worker, host, hosts=hosts)
    return None if turn is None else (turn.test, turn.following)


def test_a_worker_keeps_a_group_and_no_other_takes_of_it_before_its_facts_are_known():
    queue = queue_of(a=["a1", "a2", "a3", "a4"], b=["b1"])
    assert taken(queue, "w1") == ("a1", "a2") and taken(queue, "w2") == ("b1", None)
    assert taken(queue, "w2") is None
    queue.learned("a1", ["float16"])
    assert taken(queue, "w2") is None  # of another dtype
    queue.learned("a1", ["float32"])
    assert taken(queue, "w2") == ("a4", None)  # a2 was told, so half of a3 and a4
    assert [taken(queue, "w1") for _ in range(3)] == [("a2", "a3"), ("a3", None), None]


def test_what_a_lost_worker_had_left_runs_elsewhere_first_the_row_it_died_with():
    queue = queue_of(a=["a1", "a2"], b=["b1"])
    assert taken(queue, "w1", "one", ("one", "two")) == ("a1", "a2")
    queue.lost("w1", again="a1", host="one")
    assert taken(queue, "w2", "one", ("one", "two")) == ("b1", None)
    assert taken(queue, "w2", "one", ("one", "two")) is None
    assert taken(queue, "w3", "two", ("one", "two")) == ("a1", "a2")
    queue.lost("w3", again="a1", host="two")
    assert taken(queue, "w4", "two", ("two",)) == ("a1", "a2")  # there is no other host


# -------- workers that do not fit, and clusters that shrink


@pytest.mark.parametrize(
    "tests, more, words",
    [
        (["a"], {}, ""),
        (["a"], {"stack": {"torch": "2.5", "card": "other"}}, "torch 2.13 and 2.5"),
        (["a"], {"code": "other"}, "its code is another"),
        (["b"], {}, "it collected 1 tests and not the same 1"),
    ],
    ids=["alike", "another torch", "other code", "other tests"],
)
def test_a_worker_unlike_the_first_is_known_by_its_tests_its_code_and_its_stack(tests, more, words):
    first = {"backend": "npu", "stack": {"torch": "2.13", "card": "one"}, "code": "this"}
    spread = Spread.__new__(Spread)
    spread._tests, spread._environment = {"a": None}, first
    assert spread._differences(dict.fromkeys(tests), first | more) == words


def test_a_run_waits_for_a_node_and_not_for_ever(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("harness.plugin.spread.time.monotonic", lambda: clock[0])
    spread = Spread.__new__(Spread)
    spread._members, spread._left, spread._alone_since, spread._quarantined = {}, {"a"}, None, []
    spread.cluster = SimpleNamespace(has_room=lambda out: False, need=need_of("npu", [{"NPU": 1.0}]))
    spread._check_room()
    clock[0] += PATIENCE
    spread._check_room()
    clock[0] += 1.0
    with pytest.raises(pytest.UsageError, match="no node of the cluster has NPU any more, for 300 s; 1 tests did not"):
        spread._check_room()
    spread.cluster.has_room = lambda out: True
    spread._check_room()
    assert spread._alone_since is None


def test_a_node_whose_cards_are_quarantined_has_no_room():
    nodes = [{"Alive": alive, "NodeID": str(alive), "Resources": {"NPU": 2.0}} for alive in (True, False)]
    there = Cluster.__new__(Cluster)
    there._ray, there.need = SimpleNamespace(nodes=lambda: nodes), need_of("npu", [{"NPU": 2.0}])
    assert there.has_room({}) and there.has_room({"True": 1, "False": 9}) and not there.has_room({"True": 2})


def test_the_report_and_environments_are_not_sent(tmp_path):
    own = [*cluster.LEFT_OUT, "/reports/precision*", "/reports/repro"]
    assert cluster._excluded(tmp_path, tmp_path / "reports") == own
    assert cluster._excluded(tmp_path, tmp_path.parent) == [*cluster.LEFT_OUT]
