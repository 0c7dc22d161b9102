"""The emulated machine as a program meets it: devices, hidden devices, child processes, the status of an overflow."""

import pytest

from harness.tests.execute import emulated
from harness.tests.needs import needs_torch_npu

pytestmark = needs_torch_npu

COUNT = """
import os, torch
for value in [None, "1", "0,2", "0,1,2,3", "", ",", "0,", "1,0", "0,0", "0,7,1", "7", "npu0", "0, 1", " 0"]:
    os.environ.pop("ASCEND_RT_VISIBLE_DEVICES", None)
    if value is not None:
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = value
    print(torch.npu.device_count(), end=" ")
os.environ["ASCEND_RT_VISIBLE_DEVICES"] = "1,3"
torch.ones(2, device="npu:1")
try:
    torch.ones(2, device="npu:2")
except RuntimeError as error:
    print("refused")
"""


def test_a_variable_hides_devices_as_torch_npu_reads_it():
    done = emulated(COUNT, "--devices", "4")
    assert done.stdout.split() == [*"4 1 2 4 0 0 1 0 0 1 0 0 1 0".split(), "refused"], done.stderr


BACKWARD = """
import torch
torch.npu.set_device(0)
torch.npu.use_compatible_impl(True)
x = torch.ones(3, device="npu", requires_grad=True)
(x * 2).sum().backward()
y = torch.ones(3, device="npu:1", requires_grad=True)
((y * 3).sum().to("npu:0") + (x * 2).sum()).backward()
print(x.grad.tolist(), y.grad.tolist())
"""


def test_backward_with_several_devices_and_the_compatible_implementations():
    done = emulated(BACKWARD, "--devices", "2")
    assert done.stdout.strip() == "[4.0, 4.0, 4.0] [3.0, 3.0, 3.0]", done.stderr


CHILD = """
import os, subprocess, sys
own = "import torch; print(torch.ones(2).npu().sum().item())"
def ask(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
print(ask(own), ask("import torch_npu, " + own[7:]), os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD"))
"""


@pytest.mark.parametrize(
    "first", ["", "import harness\n", "import harness.emulator as e; e.install()\n"], ids=["plain", "import", "install"]
)
def test_a_child_process_finds_the_device(first):
    done = emulated(first + CHILD)
    assert done.stdout.split()[:2] == ["2.0", "2.0"] and done.stdout.split()[2] in ("None", "1"), (
        done.stdout + done.stderr
    )


SCALER = """
import torch, torch_npu
model = torch.nn.Linear(8, 8).npu()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = model.weight.detach().clone()
def step(scale):
    scaler = torch.npu.amp.GradScaler(init_scale=scale)
    optimizer.zero_grad()
    with torch.autocast("npu", dtype=torch.float16):
        loss = model(torch.ones(4, 8, device="npu")).float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(model.weight, before), scaler.get_scale() / scale
print(*step(2.0**40), *step(16.0))
status = torch_npu.npu_alloc_float_status(torch.zeros(8, device="npu"))
def flagged(work):
    torch_npu.npu_clear_float_status(status)
    work()
    return bool(torch_npu.npu_get_float_status(status).cpu()[0])
half = torch.tensor([40000.0, 1.0], dtype=torch.float16, device="npu")
print(flagged(lambda: half + half), flagged(lambda: half * 1.5),
      flagged(lambda: torch.full((2,), -float("inf"), device="npu")),
      flagged(lambda: half.masked_fill(half > 2, -float("inf"))), (half + half).tolist())
"""


def test_the_saturating_mode_flags_an_overflow():
    done = emulated(SCALER, INF_NAN_MODE_FORCE_DISABLE="1", INF_NAN_MODE_ENABLE="0")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("True", "False"))]
    assert lines == ["True 0.5 False 1.0", "True False False False [65504.0, 2.0]"], done.stdout + done.stderr
    default = emulated(SCALER)
    assert (
        next(line for line in default.stdout.splitlines() if line.startswith(("True", "False"))) == "True 0.5 False 1.0"
    ), default.stderr
