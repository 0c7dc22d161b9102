"""The machine that is played: its devices, memory, name and version, its streams and events, its processes and
threads.
"""

import pytest

from harness import emulator
from harness.emulator.program import bytes_in
from harness.errors import HarnessError
from harness.tests.execute import emulated
from harness.tests.needs import needs_torch_npu

pytestmark = needs_torch_npu


def output(body, *options, **more):
    done = emulated(body, *options, **more)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("[W")]


# -------- settings

RACK = """
import torch, torch_npu
memory = torch.npu.mem_get_info(5)[1] >> 30
print(torch.npu.device_count(), torch.npu.get_device_name(7), torch_npu.utils.get_cann_version(), memory)
x = [torch.full((4,), float(index), device=f"npu:{index}") for index in range(8)]
print([int((each * 2).sum()) for each in x], x[3].to("npu:6").device, torch.npu.memory_allocated(2) > 0)
"""


def test_a_rack_of_eight_is_played():
    first, second = output(RACK, "--devices", "8", "--memory", "64GiB", "--soc", "Ascend910B2", "--cann=8.5.0")
    assert first == "8 Ascend910B2 8.5.0 64"
    assert second == "[0, 8, 16, 24, 32, 40, 48, 56] npu:6 True"


def test_a_device_without_room_raises_what_torch_npu_raises_and_goes_on():
    body = (
        "import torch\nx = torch.ones(1 << 20, device='npu:0')\n"
        "try:\n    torch.empty(1 << 28, device='npu:0')\n"
        "except torch.OutOfMemoryError as error:\n    print('GiB total capacity' in str(error) or 'MiB total "
        "capacity' in str(error))\n"
        "print(float((x + x).sum()) == 2 << 20)"
    )
    assert output(body, "--memory", "256MiB") == ["True", "True"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--devices", "99"), "1 to 16 devices, not 99"),
        (("--memory", "much"), "'much' is no size of memory"),
        (("--memory", "5"), "at least 1 MiB"),
        (("--soc", "two words"), "a word of up to 63 letters"),
        (("--fault", "nothing"), "a fault is 'operator:kind'"),
        (("--colour", "red"), "there is no option --colour"),
    ],
)
def test_a_machine_that_there_is_not_is_one_line(options, words):
    with pytest.raises((HarnessError, ValueError, SystemExit), match=words):
        emulator.emulate([*options, "-m", "this"])


def test_sizes_are_read_with_their_units():
    assert [bytes_in(text) for text in ("4096", "64GiB", "1.5 MiB", "2GB", "1kib")] == [
        4096,
        64 << 30,
        3 << 19,
        2 * 10**9,
        1024,
    ]


# -------- processes, threads

WORKERS = """
import torch, torch_npu
import torch.multiprocessing as multiprocessing
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return torch.tensor(float(index * index))

def work(rank):
    torch.npu.set_device(rank)
    x = (torch.arange(3, device=f"npu:{rank}") * 2).tolist()
    print("child", rank, x, torch.npu.device_count(), torch.npu.get_device_name(rank), flush=True)

if __name__ == "__main__":
    print((torch.ones(2, device="npu:1") + 1).tolist())
    for method in ("fork", "spawn"):
        loader = DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context=method, pin_memory=True)
        print(method, [batch.npu().sum().item() for batch in loader])
    multiprocessing.spawn(work, nprocs=2)
"""


def test_workers_that_are_forked_or_spawned_play_the_same_machine(tmp_path):
    lines = output(WORKERS, "--devices", "2", "--soc", "Ascend910B2", path=tmp_path / "workers.py")
    assert lines[:3] == ["[2.0, 2.0]", "fork [14.0, 126.0]", "spawn [14.0, 126.0]"]
    assert sorted(lines[3:]) == ["child 0 [0, 2, 4] 2 Ascend910B2", "child 1 [0, 2, 4] 2 Ascend910B2"]


def test_a_child_of_an_emulated_process_never_takes_it_for_a_card():
    body = (
        "import subprocess, sys\n"
        "code = 'import harness\\ntry:\\n    harness.open_device(sys.argv[1])\\nexcept Exception as error:\\n  "
        "  print(error)\\nelse:\\n    print(1)'\n"
        "for spec in ('npu', 'auto'):\n"
        "    print(subprocess.run([sys.executable, '-c', 'import sys; ' + code.replace(chr(10), chr(10)), "
        "spec], capture_output=True, text=True).stdout.strip())"
    )
    first, second = output(body)
    assert "was started by one that plays an emulated CANN" in first
    assert second == "1"  # auto emulates there as well


THREADS = """
import threading, torch
results = {}
def work(number):
    x = torch.full((64, 64), float(number), device="npu:0")
    with torch.npu.stream(torch.npu.Stream()):
        for _ in range(200): x = x * 1.0 + 0.0
        results[number] = x.cpu().unique().tolist()
threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(results == {number: [float(number)] for number in range(6)})
"""


@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_threads_with_streams_of_their_own_do_not_mix(queue):
    assert output(THREADS, TASK_QUEUE_ENABLE=queue) == ["True"]


# -------- streams, memory

STREAMS = """
import torch
first, second, event = torch.npu.Stream(), torch.npu.Stream(), torch.npu.Event()
seen = []
for _ in range(5):
    x = torch.zeros(64, device="npu:0")
    torch.npu.synchronize()
    with torch.npu.stream(first):
        torch.nn.functional.silu(x)     # slow: a fault makes it so
        x.fill_(3.0)
        event.record()
    with torch.npu.stream(second):
        event.wait()
        y = x * 2
    torch.npu.synchronize()
    seen += y.cpu().unique().tolist()
print(seen)
"""


@pytest.mark.parametrize("queue", ["0", "1", "2"])
def test_a_stream_waits_for_an_event_behind_a_slow_operator_of_another(queue):
    assert output(STREAMS, "--fault", "aclnnSilu:hang:seconds=0.3", TASK_QUEUE_ENABLE=queue) == [str([6.0] * 5)]


GROWTH = """
import torch
torch.manual_seed(0)
convolution, linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8 * 36, 16)
model = torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.Flatten(), linear, torch.nn.LayerNorm(16))
model = model.to("npu:0")
x = torch.randn(4, 3, 8, 8).to("npu:0")
def forwards(count):
    with torch.no_grad():
        for _ in range(count): model(x).softmax(-1).cpu()
    torch.npu.synchronize()
    resident = int(open('/proc/self/statm').read().split()[1]) * 4
    return torch.npu.memory_allocated(), torch.npu.memory_reserved(), resident
before = forwards(2500)  # torch_npu's queue has a ring of some thousand places, which fill first
after = forwards(1000)
print(after[:2] == before[:2])
print(after[2] - before[2] < 512)  # KiB
"""


def test_memory_does_not_grow_over_a_thousand_forwards():
    assert output(GROWTH) == ["True", "True"]


def test_half_results_saturate_where_the_card_is_told_so():
    body = (
        "import torch\nx = torch.full((2,), 60000.0, dtype=torch.float16, device='npu:0')\nprint((x * 2).tolist(), "
        "(x * 2 - x * 2).tolist())"
    )
    assert output(body) == ["[inf, inf] [nan, nan]"]
    assert output(body, INF_NAN_MODE_ENABLE="0", INF_NAN_MODE_FORCE_DISABLE="1") == ["[65504.0, 65504.0] [0.0, 0.0]"]


# -------- a program as it is written for a card

TRAINING = """
import torch
import torch.nn as nn
import torch_npu
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
torch.npu.set_device(0)
device = torch.device("npu:0")
data = TensorDataset(torch.randn(256, 1, 12, 12), torch.randint(0, 4, (256,)))
loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=2, pin_memory=True)
features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
model = nn.Sequential(features, nn.Dropout(0.1), nn.Linear(800, 4)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
scaler = torch.npu.amp.GradScaler()
copies, start, end = torch.npu.Stream(), torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
start.record()
for epoch in range(8):
    for images, labels in loader:
        with torch.npu.stream(copies):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        torch.npu.current_stream().wait_stream(copies)
        with torch.autocast("npu", dtype=torch.float64):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    print(loss.item())
end.record()
torch.npu.synchronize()
print(f"{start.elapsed_time(end):.1f} ms, {torch.npu.max_memory_allocated() >> 10} KiB, {torch.npu.get_device_name(0)}")
"""


@pytest.mark.parametrize("queue", ["0", "1"])
def test_a_training_program_for_a_card_runs_unchanged(tmp_path, queue):
    *losses, memory = output(TRAINING, path=tmp_path / "train.py", TASK_QUEUE_ENABLE=queue)
    assert len(losses) == 8 and float(losses[-1]) < 0.9 * float(losses[0])
    assert (
        memory.endswith("Ascend910B4")
        and float(memory.split(" ms")[0]) > 0
        and int(memory.split(", ")[1].split()[0]) > 100
    )
