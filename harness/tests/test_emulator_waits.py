"""No thread waits for torch_npu's queue with the GIL, which the operators of the emulated CANN need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.tests.execute import emulated
from harness.tests.needs import needs_torch_npu

pytestmark = needs_torch_npu

ROOT = Path(__file__).parents[2]
LIMIT = 200  # seconds: a process that hangs is ended, and the test fails

NUMBERS = """
import torch
a, x = torch.randn(400, 400, device="npu"), torch.ones(6, device="npu").view(2, 3)
torch.npu.synchronize()
n = lambda: ((a @ a) @ a).isfinite().all().long() + 1  # 2, and still in the queue
calls = {
    "repeat": lambda: torch.ones(3, device="npu").repeat(n(), 1),
    "arange": lambda: torch.arange(n()), "zeros": lambda: torch.zeros(n()), "full": lambda: torch.full((2,), n()),
    "view": lambda: x.view(n(), -1), "expand": lambda: torch.ones(3, device="npu").expand(n(), 3),
    "narrow": lambda: x.narrow(0, 0, n()), "alpha": lambda: torch.add(x, x, alpha=n()), "topk": lambda: x.topk(n())[0],
}
for name, call in calls.items():
    print(name, tuple(call().shape), flush=True)
print("sum", torch.add(x, x, alpha=n()).sum().item())
"""
ANSWERS = [
    "repeat (2, 3)",
    "arange (2,)",
    "zeros (2,)",
    "full (2,)",
    "view (2, 3)",
    "expand (2, 3)",
    "narrow (2, 3)",
    "alpha (2, 3)",
    "topk (2, 2)",
    "sum 18.0",
]


def installed(body, **environment):
    """Run Python code after `emulator.install()` in a fresh process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ASCEND", "LD_LIBRARY_PATH", "EMULATED"))
    }
    code = f"import harness.emulator as e; e.install()\n{body}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=LIMIT
    )


@pytest.mark.parametrize("queue", ["0", "1", "2"])
@pytest.mark.parametrize("run", [emulated, installed], ids=["emulate", "install"])
def test_a_tensor_in_place_of_a_number_is_read(run, queue):
    done = run(NUMBERS, TASK_QUEUE_ENABLE=queue)
    assert done.stdout.splitlines() == ANSWERS, done.stdout + done.stderr


OTHERS = """
import threading, torch
from torch.utils.data import DataLoader, TensorDataset
a = torch.randn(200, 200, device="npu")
n = lambda: ((a @ a) @ a).isfinite().all().long() + 1

def several(work):  # threads that wait for one queue, some with the GIL and some without
    threads = [threading.Thread(target=work) for _ in range(3)]
    [each.start() for each in threads]
    [each.join() for each in threads]

several(lambda: [torch.ones(3, device="npu").repeat(n(), 1) for _ in range(5)])
print("threads", flush=True)

other, x = torch.npu.Stream(), torch.ones(4, device="npu")
def fill():  # more launches than the queue holds (4096), with events and frees between them
    for turn in range(2000):
        y = x + 1
        y.record_stream(other)
        pinned = torch.empty(4, pin_memory=True).copy_(y, non_blocking=True)
        del y, pinned
        if turn % 500 == 0:
            torch.npu.empty_cache()
several(fill)
print("full", torch.zeros(n()).shape[0], flush=True)

w = torch.randn(100, 100, device="npu", requires_grad=True)
y = w @ w
# In the engine's thread, with the GIL.
y.register_hook(lambda gradient: gradient * torch.ones(3, device="npu").repeat(n(), 1).sum())
w.register_post_accumulate_grad_hook(lambda parameter: print("hook", torch.arange(n()).tolist(), flush=True))
(y * 1).sum().backward()

# A thread pins memory meanwhile.
for batch, in DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4, pin_memory=True):
    print("batch", torch.zeros(batch.npu(non_blocking=True).sum().long()).shape[0], flush=True)
for _ in range(20):
    a = a @ a  # left in the queue: the process ends with it
print("end", flush=True)
"""


@pytest.mark.parametrize("queue", ["1", "2"])
def test_threads_a_full_queue_hooks_and_pinned_memory_go_on(queue):
    done = emulated(OTHERS, TASK_QUEUE_ENABLE=queue)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["threads", "full 2", "hook [0, 1]", "batch 16", "batch 16", "end"], done.stderr


FAILING = """
import torch
a, broken = torch.randn(200, 200, device="npu"), torch.ones(2, device="npu")
torch.npu.synchronize()
try:
    torch.sinc(broken)  # the planted error comes while the queue holds more
    for _ in range(500):
        a = a @ a
    torch.zeros(((a @ a).isfinite().all().long() + 1))
    torch.npu.synchronize()
except RuntimeError as error:
    print("raised", "planted" in str(error) or "507011" in str(error) or "Inner error" in str(error))
"""


@pytest.mark.parametrize("queue", ["1", "2"])
def test_an_error_in_the_queue_reaches_the_thread_that_waits_with_the_gil(queue):
    done = emulated(FAILING, "--fault", "aclnnSinc:error", TASK_QUEUE_ENABLE=queue)
    assert done.stdout.splitlines() == ["raised True"], done.stderr


DEAD = """
import ctypes, os, sys, threading, time
from harness.emulator import build
core = ctypes.CDLL(str(build.build(build.wheel_version()) / "libascendcl.so"))
libc = ctypes.CDLL(None, use_errno=True)

def fail(name, ends):
    libc.prctl(15, name)  # PR_SET_NAME
    core.emulator_set_error(b"an operator failed")
    ends.wait()

def wait(name, ended, written):  # the answer to a wait of up to 4 s while a thread of this name has failed
    descriptor, value, ends = os.eventfd(0), ctypes.c_uint64(), threading.Event()
    thread = threading.Thread(target=fail, args=(name, ends))
    thread.start()
    if ended:
        ends.set()
        thread.join()
    if written:
        threading.Timer(3, os.eventfd_write, (descriptor, 7)).start()
    begun = time.monotonic()
    status = core.emulator_read_eventfd(descriptor, ctypes.byref(value))
    print(status, value.value, time.monotonic() - begun > 2.5, flush=True)
    ends.set()

wait(b"python", True, True)       # some thread failed and ended: the queue's answer is waited for
wait(b"acl_thread", False, True)  # the queue's thread failed and goes on: so is it
core.emulator_begin_operator()
threading.Timer(3, core.emulator_end_operator, (0,)).start()
wait(b"acl_thread", True, False)  # it ended: no answer can come, which is said when no other operator is computed
wait(b"acl_thread", True, False)
"""


def test_a_wait_for_a_queue_whose_thread_has_ended_ends():
    done = subprocess.run([sys.executable, "-c", DEAD], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout.splitlines() == ["0 7 True", "0 7 True", "-1 0 True", "-1 0 False"], done.stderr
