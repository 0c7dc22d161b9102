"""What is not emulated says so: no name of a C function, no empty profile, no error without a text."""

import pytest

from harness.emulator import absent
from harness.tests.execute import emulated
from harness.tests.needs import needs_torch_npu

pytestmark = needs_torch_npu

ASKED = """
import os, torch, torch_npu
x = torch.ones(4, device="npu")
def graph():
    with torch.npu.graph(torch.npu.NPUGraph()): x * 2
def callables(): torch.npu.make_graphed_callables(torch.nn.Linear(4, 4).npu(), (x.detach(),))
def history():
    torch.npu.memory._record_memory_history(None)
    torch.npu.memory._record_memory_history()
def profiler():
    with torch_npu.profiler.profile(): x + 1
def cache(): torch_npu._npu_reshape_and_cache(x, x, x, x, x)
def paged(): torch_npu._npu_paged_attention(x, x, x, 1, 1, 1.0, x, x, x)
def compiled(): torch.compile(torch.nn.Linear(4, 4).npu(), backend="npu")(x)
def torchair():
    import torchair
    torchair.get_npu_backend()
def hccl():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("hccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch.distributed.all_reduce(x)
def operator(): torch_npu.npu_moe_gating_top_k_softmax(torch.ones(4, 8, device="npu").half(), k=2)
for ask in (graph, callables, history, profiler, cache, paged, compiled, torchair, hccl, operator):
    try:
        ask()
        torch.npu.synchronize()
        print(ask.__name__, "ran")
    except Exception as error:
        print(ask.__name__, " ".join(str(error).split()))
print("computes", (x + 1).tolist(), hasattr(__import__("sys").modules.get("torchair"), "anything"))
"""
SAID = {
    "graph": absent.GRAPHS,
    "callables": absent.GRAPHS,
    "history": absent.HISTORY,
    "profiler": absent.PROFILER,
    "cache": absent.ATB,
    "paged": absent.ATB,
    "compiled": absent.COMPILE,
    "torchair": absent.COMPILE,
    "hccl": absent.COLLECTIVES,
    "operator": "aclnnMoeGatingTopKSoftmax is not emulated",
}


@pytest.fixture(scope="module")
def asked():
    done = emulated(ASKED)
    lines = [line.split(" ", 1) for line in done.stdout.splitlines() if " " in line]
    return dict(lines), done.stdout + done.stderr


@pytest.mark.parametrize("name", SAID)
def test_what_is_not_emulated_says_so(asked, name):
    said, everything = asked
    assert SAID[name] in said.get(name, ""), everything
    assert "Failed to find function" not in said[name] and "[Errno" not in said[name]


def test_nothing_else_is_blamed_and_the_device_goes_on(asked):
    said, everything = asked
    assert said.get("computes") == "[2.0, 2.0, 2.0, 2.0] False", everything
    assert "driver and firmware packages do not match" not in everything and "Failed to find function" not in everything


def test_a_child_process_is_told_as_well():
    code = "import torch; x = torch.ones(2).npu(); torch.npu.NPUGraph()"
    done = emulated(
        f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {code!r}], capture_output=True, "
        "text=True).stderr)"
    )
    assert absent.GRAPHS in done.stdout, done.stdout + done.stderr
