"""A wrong operator as a script of its own: torch and torch_npu, its inputs, the two results and how far they are
apart.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from harness.locate.replay import FAILS, Replay, gradients, largest_difference, name_of, span_of

_NAMESPACES = {
    "torch.nn.functional": torch.nn.functional,
    "torch": torch,
    "torch.Tensor": torch.Tensor,
    "torch.special": torch.special,
    "torch.linalg": torch.linalg,
    "torch.fft": torch.fft,
    "torch._VF": torch._VF,
}
_KINDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LEAST = 1  # elements of an axis that is made shorter
MOST_TRIES = 200  # shorter calls that are tried
_SECONDS = 300.0  # that a repro may run

_SCRIPT = '''"""{title}

Run it in this folder: {command}
"""

import json
import struct
from pathlib import Path

import torch
{imports}
raw = (Path(__file__).parent / "inputs.safetensors").read_bytes()
start = 8 + struct.unpack("<Q", raw[:8])[0]
kinds = {kinds}


def load(entry):
    begin, end = entry["data_offsets"]
    shape, kind = entry["shape"], getattr(torch, kinds[entry["dtype"]])
    if end == begin:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(raw[start + begin : start + end]), dtype=kind).reshape(shape)


stored = {{name: load(entry) for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"}}


def call(device):
    tensor = {{name: value.to(device, copy=True) for name, value in stored.items()}}
{body}


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)] if isinstance(result, (tuple, list)) else []


{switches}for number, (actual, expected) in enumerate(zip(tensors(call("{device}")), tensors(call("cpu")))):
    actual, expected = actual.detach().cpu().double(), expected.detach().double()
    away = (actual - expected).abs()
    rel_l2, max_diff = float(away.norm() / expected.norm()), float(away.max())
    print(f"result {{number}} {{tuple(expected.shape)}}: rel_l2 {{rel_l2:.6e}}, max_diff {{max_diff:.6e}}")
'''


@dataclass(frozen=True, kw_only=True)
class Repro:
    """A folder with repro.py, its inputs, the stack, and what it printed in a process of its own."""

    folder: Path
    printed: str  # or how it failed
    command: str  # what runs it, in a shell
    shows: bool  # the printed difference is the one that was found, to a tenth
    elements: tuple[int, int]  # of the inputs, before and after they were made smaller


def expression_of(func: Callable) -> str | None:
    """How a script names a torch function; None where none of torch's modules holds it."""
    name = getattr(func, "__name__", "")
    return next(
        (f"{namespace}.{name}" for namespace, module in _NAMESPACES.items() if getattr(module, name, None) == func),
        None,
    )


def write_repro(
    replay: Replay,
    folder: Path,
    *,
    title: str,
    stack: Mapping[str, Any],
    faults: Sequence[str] = (),
    seconds: float = _SECONDS,
) -> Repro | None:
    """Write a repro of a call into `folder`, made smaller as far as it stays wrong, and run it in a fresh process.

    `faults` are those planted in an emulated device, which that process plants too. Half of `seconds` may go into
    making it smaller. None where no script can name the operator or its arguments, safetensors does not hold them, or
    it runs under torch.autocast.
    """
    func = replay.args[0] if replay.func is gradients else replay.func
    storable = all(
        str(tensor.dtype).removeprefix("torch.") in _KINDS.values() and tensor.layout == torch.strided
        for tensor in replay.tensors
    )
    if expression_of(func) is None or not storable or replay.autocast is not None:
        return None
    before = sum(tensor.numel() for tensor in replay.tensors)
    until = time.monotonic() + seconds
    replay = reduced(replay, until=time.monotonic() + seconds / 2)
    try:
        text, stored = _script(replay, title, shlex.join(["python", *_command(replay, faults), "repro.py"]))
    except ValueError:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "inputs.safetensors")
    (folder / "repro.py").write_text(text, encoding="utf-8")
    (folder / "stack.json").write_text(json.dumps(stack, indent=1, default=str) + "\n", encoding="utf-8")
    printed = _run(replay, folder, faults, min(max(until - time.monotonic(), 10.0), _SECONDS))
    (folder / "printed.txt").write_text(printed, encoding="utf-8")
    expected = largest_difference(replay.on_device(), replay.on_cpu())
    result = [float(item) for item in re.findall(r"rel_l2 (\S+),", printed)]
    shows = bool(result) and (
        abs(max(result) - expected) <= 0.1 * expected
        or max(result) != max(result)
        or (expected == float("inf") and max(result) > 1e30)
    )
    return Repro(
        folder=folder,
        printed=printed,
        command=shlex.join(["python", *_command(replay, faults), str(folder / "repro.py")]),
        shows=shows,
        elements=(before, sum(tensor.numel() for tensor in replay.tensors)),
    )


def _command(replay: Replay, faults: Sequence[str]) -> list[str]:
    """What stands between `python` and the script."""
    return replay.device.kind.script_command(replay.device.name, faults)


# -------- smaller


def reduced(replay: Replay, *, until: float = math.inf) -> Replay:
    """A call with shorter axes that is still wrong: every axis of one length is halved together, from either end, as
    long as it is.

    Numbers among the arguments that are such a length are halved with it, since a shape names it. Views become tensors
    of their own unless it takes one to be wrong.
    """
    left = MOST_TRIES
    if not _is_wrong(replay):
        return replay
    progress = True
    while progress and left > 0 and time.monotonic() < until:
        progress = False
        for length in sorted(
            {size for tensor in replay.tensors for size in tensor.shape if size > _LEAST}, reverse=True
        ):
            for part in (slice(0, (length + 1) // 2), slice(length // 2, length)):
                left -= 1
                smaller = _cut(replay, length, part)
                if smaller is not None and left > 0 and _is_wrong(smaller):
                    replay, progress = smaller, True
                    break
            if progress:
                break
    dense = replay.changed(
        lambda tensor: tensor.contiguous() if isinstance(tensor, Tensor) and tensor.layout == torch.strided else tensor
    )
    return dense if _is_wrong(dense) else replay


def _cut(replay: Replay, length: int, part: slice) -> Replay | None:
    size = part.stop - part.start

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            for axis, item in enumerate(value.shape):
                value = value.narrow(axis, part.start, size) if item == length else value
            return value
        return size if type(value) is int and value == length else value

    return None if size == length else replay.changed(cut)


def _is_wrong(replay: Replay) -> bool:
    try:
        results = replay.on_cpu()  # first: what the CPU refuses, an index out of range say, a device may not survive
        result = replay.on_device()
        return bool(results) and bool(replay.judged(result, results)[1])
    except FAILS:
        return False


# -------- the script


class _Writer:
    """Values as the Python text that makes them, and the tensors that this text reads, by name."""

    def __init__(self, leaves: bool):
        self.stored: dict[str, Tensor] = {}
        self._leaves = leaves  # whether tensors of fractions ask for gradients

    def text_of(self, value: Any) -> str:
        """Raises: ValueError for what no script can name."""
        if isinstance(value, Tensor):
            text = self._tensor(value)
            return f"leaf({text})" if self._leaves and value.is_floating_point() else text
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, torch.Size):
            return repr(tuple(value))
        if isinstance(value, (tuple, list)):
            inner = "".join(f"{self.text_of(item)}, " for item in value)
            return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{name!r}: {self.text_of(item)}" for name, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self.text_of(value.start)}, {self.text_of(value.stop)}, {self.text_of(value.step)})"
        return _plain(value)

    def arguments_of(self, args: tuple, kwargs: dict) -> str:
        return ", ".join([*map(self.text_of, args), *(f"{name}={self.text_of(item)}" for name, item in kwargs.items())])

    def _tensor(self, value: Tensor) -> str:
        name = str(len(self.stored))
        span = span_of(value.detach())
        self.stored[name] = (value.detach() if span is None else span).clone()
        if span is None:
            return f'tensor["{name}"]'
        return f'tensor["{name}"].as_strided({tuple(value.shape)}, {value.stride()})'


def _plain(value: Any) -> str:
    """A value without parts as Python text. Raises: ValueError."""
    if value is ...:
        return "..."
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise ValueError(f"no script can name {value!r}")


def _script(replay: Replay, title: str, command: str) -> tuple[str, dict[str, Tensor]]:
    """The text of repro.py and the tensors that it reads. Raises: ValueError for an argument that no script can
    name.
    """
    writer = _Writer(leaves=replay.func is gradients)
    lines = _body(replay, writer)
    dtypes = {str(tensor.dtype) for tensor in writer.stored.values()}
    kind = replay.device.kind
    text = _SCRIPT.format(
        title=" ".join(title.replace('"', "'").split()),
        command=command.replace("\\", "\\\\").replace('"""', '""\\"'),
        imports=f"{kind.script_import}\n" if kind.script_import else "",
        kinds={code: kind for code, kind in _KINDS.items() if f"torch.{kind}" in dtypes},
        body="\n".join(f"    {line}" if line else "" for line in lines),
        switches="".join(f"{line}\n" for line in kind.script_switches(replay.device.stack)),
        device=replay.device.torch_device,
    )
    return text, writer.stored


def _body(replay: Replay, writer: _Writer) -> list[str]:
    """The lines of the function that makes the call and returns what came of it."""
    if replay.func is gradients:
        func, args, kwargs = replay.args[:3]
        call = f"{expression_of(func)}({writer.arguments_of(args, kwargs)})"
        return [
            "leaves = []",
            "",
            "def leaf(tensor):",
            "    leaves.append(tensor.detach().requires_grad_())",
            "    return leaves[-1]",
            "",
            f"results = [result for result in tensors({call}) if result.requires_grad]",
            "generator = torch.Generator().manual_seed(0)",
            "flows = [torch.randn(item.shape, generator=generator).to(item.dtype).to(device) for item in results]",
            "grads = torch.autograd.grad(results, leaves, flows, allow_unused=True)",
            "return [grad for grad in grads if grad is not None]",
        ]
    function = expression_of(replay.func)
    if replay.writes and name_of(replay.func) == "setitem":
        target, *others = map(writer.text_of, replay.args)
        return [f"target = {target}", f"{function}(target, {', '.join(others)})", "return target"]
    return [f"return {function}({writer.arguments_of(replay.args, replay.kwargs)})"]


def _run(replay: Replay, folder: Path, faults: Sequence[str], seconds: float) -> str:
    """What the repro prints in a process of its own, over the emulated CANN where this one is, or how it failed."""
    emulated = replay.device.backend == "emulated"
    command = [sys.executable, *_command(replay, faults), "repro.py"]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (emulated and name.startswith(("ASCEND_", "EMULATED_CANN")))
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]) if emulated else "", os.environ.get("PYTHONPATH", "")])
    )
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=seconds, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it did not run: {error}\n"
    if done.returncode == 0:
        return done.stdout
    return f"it ended with exit status {done.returncode}: {' '.join(done.stderr.split()[-60:])}\n"
