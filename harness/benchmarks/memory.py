"""Host memory of a case, in bytes a parameter: at most 14, for a Llama of transformers and a plain model, 300 million.

Counted is the peak of this process and the one without torch_npu together, in a fresh interpreter for every row,
sampled while `validate` builds the model and runs it with two seeds. Not counted are the libraries (what both hold
after a tiny case) and the memory of the emulated device. Other sizes and dtypes: `python -m harness.benchmarks.memory
llama-1.1B float16`; a checkpoint, with 16 tokens: `python -m harness.benchmarks.memory DIR bfloat16`, where pages of
mapped files count as resident and not as `own`.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness.benchmarks import Figure

PROMISE = 14  # bytes a parameter
_DTYPES = ("float32", "float16", "bfloat16")
SUBJECT = """
import json, sys, time
import torch
from pathlib import Path
from torch import nn
from harness import Case, open_device, validate
from harness.checkpoints.weights import size_of_weights
from harness.reference import Models
from harness.run.cpu import CpuSide
import harness.run.validation as validation

NAMES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SIZES = {
    "tiny": dict(zip(NAMES, (64, 128, 1, 2, 2, 2048))),
    "300M": dict(zip(NAMES, (1024, 4096, 18, 16, 16, 2048))),
    "1.1B": dict(zip(NAMES, (2048, 5632, 22, 32, 4, 32000))),
}

def llama(size):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(**SIZES[size])).eval()

class Plain(nn.Module):
    def __init__(self, size):
        super().__init__()
        wide, deep = SIZES[size]["hidden_size"], 2 * SIZES[size]["num_hidden_layers"]
        self.emb = nn.Embedding(2048, wide)
        parts = lambda: (nn.LayerNorm(wide), nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, wide))
        self.blocks = nn.ModuleList([nn.Sequential(*parts()) for _ in range(deep)])

    def forward(self, ids):
        x = self.emb(ids)
        for each in self.blocks:
            x = x + each(x)
        return x

class Built:
    def __init__(self, kind, size):
        self.kind, self.size = kind, size

    def __call__(self):
        model = (llama if self.kind == "llama" else Plain)(self.size)
        counted["parameters"] = sum(each.numel() for each in model.parameters())
        return model

def logits(model, ids):
    returned = model(ids)
    return returned if isinstance(returned, torch.Tensor) else returned.logits

def ids(generator):
    return torch.randint(0, 2048, (1, 16), generator=generator)

def checkpoint(path):
    counted["parameters"] = size_of_weights(Path(path)).parameters
    return Case.from_checkpoint(path, dtype=dtype, batch=1, length=16)

def timed(owner, name, label):
    function = getattr(owner, name)
    def wrapped(*args, **kwargs):
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            part = label(args)
            parts[part] = parts.get(part, 0.0) + time.perf_counter() - begin
    setattr(owner, name, wrapped)

counted, parts = {}, {}
if __name__ == "__main__":
    kind, size, dtype = sys.argv[1:]
    device, models = open_device("emulated"), Models()
    built = "llama" if kind == "checkpoint" else kind
    case = lambda size: Case(name=size, model=Built(built, size), inputs=ids, dtype=dtype, forward=logits)
    validate(case("tiny"), 0, device, models=models)
    torch.npu.reset_peak_memory_stats()
    print("ready", flush=True)
    sys.stdin.readline()
    timed(CpuSide, "run", lambda args: args[1])
    timed(validation, "run_on_device", lambda args: "device")
    timed(Models, "base", lambda args: "build")
    timed(Models, "content", lambda args: "digest")
    began, large = time.perf_counter(), checkpoint(size) if kind == "checkpoint" else case(size)
    seeds = (0,) if kind == "checkpoint" else (0, 1)
    verdicts = [validate(large, seed, device, models=models) for seed in seeds]
    seconds = time.perf_counter() - began
    said = dict(counted, device=torch.npu.max_memory_allocated(), seconds=seconds)
    said["status"] = [each.status for each in verdicts]
    said["expected"] = [each.evidence.expected_sha256[:12] for each in verdicts]
    said["golden"] = [next(iter(each.references.values())).cpu.rel_l2 for each in verdicts]
    said["seconds_of"] = {part: round(taken, 1) for part, taken in parts.items()}
    print(json.dumps(said), flush=True)
"""


def measure() -> list[Figure]:
    rows = [("llama", "300M", dtype) for dtype in _DTYPES] + [("plain", "300M", dtype) for dtype in _DTYPES[:2]]
    return [_figure(*row) for row in rows]


def _figure(kind: str, size: str, dtype: str) -> Figure:
    return Figure(
        name=f"host memory, {kind}-{size} {dtype}",
        value=peak(kind, size, dtype)["bytes_a_parameter"],
        promise=PROMISE,
        unit="bytes a parameter",
    )


def peak(kind: str, size: str, dtype: str) -> dict:
    """What a fresh interpreter and its child processes hold at most for one case, `bytes_a_parameter` among it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory_subject.py"  # a class of __main__ is found by its file
        file.write_text(SUBJECT)
        process = subprocess.Popen(
            [sys.executable, str(file), kind, size, dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the tiny {kind} case in {dtype} did not run")
        before, own_before = _memory_of(process.pid), sum(_memory_of(process.pid, "RssAnon"))
        process.stdin.write("go\n")
        process.stdin.flush()
        most, own = before, own_before
        while process.poll() is None:
            most = max(most, _memory_of(process.pid), key=sum)
            own = max(own, sum(_memory_of(process.pid, "RssAnon")))
            time.sleep(0.02)
        result = json.loads(process.stdout.read().strip().splitlines()[-1])
    count = result["parameters"]
    parts = {
        "own_process": (most[0] - before[0] - result["device"]) / count,
        "other_processes": (most[1] - before[1]) / count,
    }
    total = (sum(most) - sum(before) - result["device"]) / count
    sizes = {"libraries": sum(before), "resident": sum(most), "own": own}
    return {"bytes_a_parameter": total, **parts, **result, **sizes}


def _memory_of(pid: int, field: str = "VmRSS") -> tuple[int, int]:
    """Bytes that a process holds, and those of all its children together; `field`: of /proc/PID/status."""
    children = [int(part) for path in Path(f"/proc/{pid}/task").glob("*/children") for part in _text(path).split()]
    return _bytes(pid, field), sum(_bytes(child, field) for child in children)


def _bytes(pid: int, field: str) -> int:
    lines = _text(Path(f"/proc/{pid}/status")).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


def _asked(subject: str) -> tuple[str, str]:
    """The kind and the size that a command line names."""
    if Path(subject).is_dir():
        return "checkpoint", str(Path(subject).resolve())
    kind, _, size = subject.partition("-")
    return kind, size


if __name__ == "__main__":
    print(json.dumps(peak(*_asked(sys.argv[1]), sys.argv[2])))
