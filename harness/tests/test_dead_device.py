"""A device that fails: the row says so, and later rows are errors, never passes. Interrupts. Compiling.

torch_npu's queue (TASK_QUEUE_ENABLE=1, a card's default) closes for the rest of a process: those tests have children.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness import Case, DeviceError, emulator, open_device, validate
from harness.commands.health import _answer_check
from harness.errors import RunError
from harness.judging.verdict import COMPILES, WORTH_SAYING
from harness.locate import locate
from harness.reference import Models
from harness.run.timing import time_case, time_pair
from harness.tests.environment import of_a_shell
from harness.tests.needs import emulated_device, needs_torch_npu

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, x):
        return torch.relu(self.b(F.silu(self.a(x))))


def draw(generator):
    return torch.randn(64, 256, generator=generator)


def case(model=Net, inputs=draw, **more):
    return Case(name="net", model=model, inputs=inputs, **more)


@pytest.fixture
def npu():
    return emulated_device()  # a new one each time: a device that stopped stays stopped


def queued(body: str) -> subprocess.Popen:
    """A child with torch_npu's queue on, in which `dev` and what is defined here are at hand."""
    code = (
        "from harness.tests.test_dead_device import *\nimport json\ntorch.set_num_threads(1)\n"
        "dev = open_device('emulated')\n" + body
    )
    prepared = of_a_shell(TASK_QUEUE_ENABLE="1")
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=prepared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def lines(child: subprocess.Popen) -> list:
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-3000:]
    return [json.loads(line) for line in out.splitlines() if line.startswith("[")]


# -------- after an error in the queue

ROWS = """
models, fixed = Models(), lambda generator: torch.randn(64, 256, generator=torch.Generator().manual_seed(5))
def row(seed, inputs):
    try:
        print(json.dumps([validate(case(inputs=inputs), seed, dev, models=models).status, ""]), flush=True)
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
row(1, fixed)
row(2, draw)
with emulator.fault("aclnnSilu", kind="error", code=507015): row(3, draw)
row(4, fixed)
row(5, fixed)
row(6, draw)
print(json.dumps(["stack", dev.stack.task_queue]))
"""
LOCATE = """
with emulator.fault("aclnnSilu", kind="error", nth=1): found = locate(case(), 1, dev, level=%r)
steps = [(each.operator, each.module, each.bad, each.note) for each in found.steps]
print(json.dumps([found.sentences(), steps, found.gone, found.unseen, found.replay is None]))
"""


@needs_torch_npu
def test_no_row_passes_on_what_memory_held_and_locate_names_the_operator_that_raised():
    """Three children at once: each is a process whose device ends."""
    children = [queued(item) for item in (ROWS, LOCATE % "operators", LOCATE % "modules")]
    *rows, stack = lines(children[0])
    assert [row[0] for row in rows] == [
        "PASS",
        "PASS",
        "RunError",
        "DeviceError",
        "DeviceError",
        "DeviceError",
    ] and stack == ["stack", 1]
    failed = rows[2][1]
    assert failed.startswith(
        "on npu:0 (Ascend910B4): RuntimeError: aclnnSilu failed in torch_npu's queue … aclnnSilu: error code 507015"
    )
    assert (
        "; AI Core exception: a kernel failed while it ran" in failed
        and "nothing more is run on the device" in failed
        and "\n" not in failed
    )
    for _, said in rows[3:]:
        assert said.startswith(
            "the device stopped computing at net float32 seed 3: on npu:0 (Ascend910B4): RuntimeError: aclnnSilu failed"
        )
        assert "run the rows that are left in another process" in said

    said, steps, gone, unseen, without_repro = lines(children[1])[0]
    assert "silu" in said and said.index("silu") < said.index(
        "is the first wrong operator: the device raised RuntimeError: aclnnSilu failed"
    )
    assert [(operator, bad) for operator, _, bad, _ in steps] == [("linear", False), ("silu", True)] and not any(
        note for *_, note in steps
    )
    assert (
        gone
        and unseen == 2
        and without_repro
        and "2 more were not looked at: the device does not compute any more" in said
    )

    said, steps, gone, *_ = lines(children[2])[0]
    assert [bad for *_, bad, _ in steps] == [False, False, True] and gone
    assert steps[2][1] == "" and "is the first wrong module: the device raised" in said  # silu is of no module in it


@needs_torch_npu
def test_a_module_that_raised_is_named_and_the_search_ends():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 256)

        def forward(self, x):
            return self.last(self.act(self.first(x)))

    device = open_device("emulated")
    with emulator.fault("aclnnSilu", kind="error"):
        location = locate(case(Inner), 1, device, level="modules")
    assert (
        location.first.module == "act"
        and "the device raised RuntimeError" in location.first.reasons[0]
        and not location.gone
    )
    with emulator.fault(
        "aclnnSilu", kind="error", code=507054
    ):  # of the card's memory: nothing that it says after that counts
        location = locate(case(Inner), 1, device)
    assert location.first.operator == "silu" and "HBM MULTI BIT ECC ERROR" in location.first.reasons[0]


def test_a_device_that_drops_work_without_a_word_makes_no_verdict(npu, monkeypatch):
    """What the check after the runs is for: the runs raised nothing."""
    answers = iter(["", "it answered [1, 2] where [3, 4] is right"])
    monkeypatch.setattr(type(npu), "_probe", lambda self: next(answers))
    with pytest.raises(
        DeviceError,
        match=r"stopped computing at net float32 seed 7: it answered \[1, 2\] where \[3, 4\] is right; run the rows",
    ):
        validate(case(), 7, npu)
    with pytest.raises(DeviceError, match="stopped computing at net float32 seed 7"):
        validate(case(), 8, npu)


def test_locate_blames_no_operator_for_a_device_that_drops_work(npu, monkeypatch):
    answers = iter([""])
    monkeypatch.setattr(type(npu), "_probe", lambda self: next(answers, "it answered [1, 2] where [3, 4] is right"))
    with emulator.fault("aclnnRelu", kind="stale"):  # the operator whose work was dropped
        location = locate(case(), 1, npu)
    assert (
        "dropped its work without a word, here or before" in location.first.reasons[0]
        and location.replay is None
        and location.gone
    )
    answers = iter([""])
    npu = open_device("emulated")
    location = locate(case(), 1, npu)  # nothing looks wrong, and the check at the end does
    assert location.first is None and location.sentences().startswith(
        "The device stopped computing while 4 operators were looked at and none of them raised"
    )


# -------- errors where they show


class Turned(Net):
    def forward(self, x):
        return super().forward(x).t()  # made contiguous on the device when it is copied back


def test_an_error_at_the_copy_back_is_a_run_error(npu):
    with emulator.fault("aclnnInplaceCopy", kind="error", code=507018) as planted, pytest.raises(RunError) as raised:
        validate(case(Turned), 1, npu)
    assert planted.hits and str(raised.value).startswith("on npu:0 (Ascend910B4): RuntimeError: ")
    assert "aclnnInplaceCopy" in str(raised.value) and "AI CPU exception: " in str(raised.value)
    assert validate(case(Turned), 1, npu).passed and not npu.stopped  # launched at once: the device goes on


def test_an_error_when_inputs_or_weights_go_to_the_device_is_a_run_error(npu, monkeypatch):
    def refuse(*_):
        raise RuntimeError("NPU out of memory. Tried to allocate 52.00 MiB (NPU 0; 60.96 GiB total capacity)")

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            RunError, match=r"on npu:0 \(Ascend910B4\): RuntimeError: NPU out of memory.*; use a smaller batch"
        ),
    ):
        patch.setattr("harness.run.device.fresh", lambda value: refuse() if "run_on_device" in _callers() else value)
        validate(case(), 1, npu)
    assert not npu.stopped and validate(case(), 1, npu).passed


def _callers() -> list[str]:
    frame, names = sys._getframe(1), []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def test_after_an_error_of_the_cards_memory_nothing_counts(npu):
    """torch_npu itself turns code 507054 into its words; the emulated device computes on, and is not trusted."""
    with (
        emulator.fault("aclnnSilu", kind="error", code=507054),
        pytest.raises(RunError, match="HBM MULTI BIT ECC ERROR: several bits .* reset this one .*npu-smi") as raised,
    ):
        validate(case(), 1, npu)
    assert "another process" not in str(raised.value)
    with pytest.raises(
        DeviceError, match="the device stopped computing at net float32 seed 1: .*reset this one"
    ) as later:
        validate(case(), 2, npu)
    assert "another process" not in str(later.value)


def test_an_operator_that_only_fails_by_itself_stops_no_device(npu):
    with emulator.fault("aclnnSilu", kind="error"), pytest.raises(RunError, match="aclnnSilu") as raised:
        validate(case(), 1, npu)
    assert "nothing more is run" not in str(raised.value) and not npu.stopped and validate(case(), 1, npu).passed


def test_timing_and_doctor_say_where_and_what(npu):
    models = (Net().eval(), Net().eval().to(npu.torch_device))
    with (
        emulator.fault("aclnnSilu", kind="error", code=507014),
        pytest.raises(RunError, match=r"on npu:0 \(Ascend910B4\): .*; timeout: "),
    ):
        time_pair("net", torch.float32, models, draw(torch.Generator()), npu, iterations=1, warmup=0, batch_size=64)
    with emulator.fault("aclnnAdd*", kind="error", code=507015):
        name, result, words = _answer_check(npu)
    assert (
        (name, result) == ("answer", "FAILED")
        and words.startswith("on npu:0 (Ascend910B4): RuntimeError")
        and "AI Core exception: " in words
    )


def test_timing_does_not_time_a_device_that_drops_its_work(npu, monkeypatch):
    answers = iter([""])
    monkeypatch.setattr(type(npu), "_probe", lambda self: next(answers, "it answered [1, 2] where [3, 4] is right"))
    with pytest.raises(DeviceError, match="stopped computing at net float32, timing"):
        time_case(case(), npu, Models(), iterations=1, warmup=0)


def test_the_performance_table_says_which_queue_was_timed(npu):
    cpu, device = time_case(case(), npu, Models(), iterations=1, warmup=0)
    assert cpu["task_queue"] is None and device["task_queue"] == npu.stack.task_queue == 0


# -------- interrupts


@pytest.mark.parametrize(
    "kind", [KeyboardInterrupt, pytest.fail.Exception, SystemExit], ids=["Ctrl-C", "a test's time limit", "exit"]
)
@pytest.mark.parametrize(
    "what", [lambda npu: validate(case(), 1, npu), lambda npu: locate(case(), 1, npu)], ids=["validate", "locate"]
)
def test_an_interrupt_while_an_operator_runs_is_one(npu, kind, what):
    def interrupt(number, frame):
        raise kind("now")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with emulator.fault("aclnnSilu", kind="hang", seconds=60), pytest.raises(kind, match="now"):
            began = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 3.0)
            what(npu)
        assert time.monotonic() - began < 50  # 60 s are one operator
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not npu.stopped and validate(case(), 1, npu).passed  # and the device has no blame


# -------- compiling


def test_a_first_run_that_compiles_is_said_and_not_timed(npu):
    models = Models()
    plain = validate(case(), 1, npu, models=models).evidence
    assert plain.slow_start == "" and plain.first_run_ms > 0
    with emulator.fault("aclnnSilu", kind="hang", seconds=3, nth=1):
        verdict = validate(case(), 1, npu, models=models)
    assert verdict.passed and verdict.evidence.first_run_ms > 3000 > verdict.evidence.actual_ms
    assert (
        verdict.evidence.slow_start.startswith("the first run took 3.")
        and verdict.evidence.slow_start.endswith("; the first is not timed")  # jit_compile is off: it compiled nothing
    )
    slow = replace(plain, actual_ms=WORTH_SAYING, first_run_ms=COMPILES * WORTH_SAYING)
    assert (
        slow.slow_start and not replace(slow, first_run_ms=COMPILES * WORTH_SAYING - 1).slow_start
    )  # three times the second
    quick = replace(plain, actual_ms=1.0, first_run_ms=1.0 + WORTH_SAYING)
    assert (
        quick.slow_start
        and not replace(quick, first_run_ms=WORTH_SAYING).slow_start
        and not replace(quick, first_run_ms=None).slow_start
    )


def test_locating_does_not_spend_its_time_on_compiling(npu):
    limit = 20.0
    models = Models()
    locate(case(), 1, npu, models=models)
    with emulator.fault("aclnnSilu", kind="hang", seconds=limit + 2, nth=1):
        location = locate(case(), 1, npu, models=models, limit=limit)
    assert location.unseen == 0 and location.first is None and len(location.steps) == 4 and location.compiling > limit
    with emulator.fault(
        "aclnnSilu", kind="hang", seconds=limit / 2 + 1
    ):  # an operator that is slow each time takes its time
        location = locate(case(), 1, npu, models=models, limit=limit)
    assert location.unseen == 2
