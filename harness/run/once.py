"""One case on one device, without a reference: what `python -m harness infer` and `bench` do with a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.case import Case
from harness.checkpoints.recognition import recognise
from harness.devices import Device, open_device
from harness.reference import Models, Reference, move, refer, run, tensors_of
from harness.reference.randomness import Draws
from harness.run.timing import time_case
from harness.run.validation import inputs_of


@dataclass(frozen=True, kw_only=True)
class Once:
    """One forward: the outputs on the CPU by name, its time, and the shapes of the inputs."""

    outputs: dict[str, Tensor]
    milliseconds: float  # of the first forward, with the model on the device already
    shapes: dict[str, tuple[int, ...]]  # of the input tensors


def run_once(case: Case, seed: int, device: Device) -> Once:
    """Run a case once on a device with the inputs of `seed`.

    Raises: HarnessError for a checkpoint that cannot be built, a model that raises, a device that does not compute.
    """
    inputs, models = inputs_of(case, seed), Models()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(inputs, f"{case.name}: inputs()").items()}
    if device.torch_device.type == "cpu":
        result = _on_cpu(case, models, inputs, device, seed)
        return Once(outputs=result.outputs, milliseconds=result.milliseconds, shapes=shapes)
    with device.telling(case.name), models.untouched(**case.built, device=device.torch_device) as model:
        moved = move(inputs, device=device.torch_device)
        device.synchronize()
        begin = time.perf_counter()
        returned = run(model, moved, forward=case.forward, where=device.where)
        device.synchronize()
        milliseconds = (time.perf_counter() - begin) * 1e3
        outputs = {name: tensor.cpu() for name, tensor in tensors_of(returned, case.name).items()}
    device.check(case.name)
    return Once(outputs=outputs, milliseconds=milliseconds, shapes=shapes)


def _on_cpu(case: Case, models: Models, inputs: Any, device: Device, seed: int) -> Reference:
    return refer(
        lambda: models.untouched(**case.built, device=device.torch_device),
        inputs,
        what=case.name,
        draws=Draws(seed=seed, dtype=case.torch_dtype, alike=False),
        twice=False,
        forward=case.forward,
        dtype=case.torch_dtype,
    )


def infer_checkpoint(
    path: str | Path, *, dtype: str, device: str, seed: int, part: str | None = None, **asked: Any
) -> tuple[str, dict[str, Tensor]]:
    """Run a checkpoint once; returns what ran and what came out in words, and the outputs by name.

    `asked`: what `Case.from_checkpoint` takes beside them. Raises: HarnessError, in one sentence.
    """
    recognise(path)  # before a device is opened
    opened = open_device(device)
    case = Case.from_checkpoint(path, dtype=dtype, part=part, **asked)
    once = run_once(case, seed, opened)
    emulated = ", EMULATED: no evidence about hardware" if opened.backend == "emulated" else ""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in once.shapes.items())
    lines = [
        f"model     {case.name} from {path}, {dtype}",
        f"device    {opened.torch_device} {opened.name}{emulated}",
        f"input     {shapes}{_source(asked, seed)}",
        *(f"          {note}" for note in case.notes),
        *(f"output    {name} {described(output)}" for name, output in once.outputs.items()),
        f"forward   {once.milliseconds:.1f} ms, the first one, model on the device already",
    ]
    return "\n".join(lines), once.outputs


def _source(asked: dict[str, Any], seed: int) -> str:
    files = [str(asked[name]) for name in ("text", "image", "audio") if asked.get(name)]
    return f", from {', '.join(files)}" if files else f", drawn with seed {seed}"


def described(tensor: Tensor) -> str:
    """A tensor in words: its shape, dtype, mean, deviation and ends; of whole numbers the first of them."""
    head = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if not tensor.is_floating_point() or not tensor.numel():
        shown = ", ".join(str(number) for number in tensor.reshape(-1)[:8].tolist())
        return f"{head}: {shown}{', …' if tensor.numel() > 8 else ''}"
    wide = tensor.double()
    broken = int((~torch.isfinite(wide)).sum())
    deviation = float(wide.std()) if wide.numel() > 1 else 0.0
    numbers = f"mean {wide.mean():.6f}, std {deviation:.6f}, least {wide.min():.4f}, largest {wide.max():.4f}"
    return f"{head}: {numbers}" + (f", {broken} NOT FINITE" if broken else "")


def bench_checkpoint(
    path: str | Path,
    *,
    dtype: str,
    device: str,
    batch_sizes: Sequence[int],
    iterations: int,
    warmup: int,
    part: str | None = None,
    **asked: Any,
) -> tuple[list[dict], Device]:
    """Time a checkpoint at several batch sizes on the CPU and on the device; returns the performance table's rows.

    Raises: HarnessError, in one sentence.
    """
    recognise(path)
    opened, models, rows = open_device(device, timing=True), Models(), []
    for size in batch_sizes:
        case = Case.from_checkpoint(path, dtype=dtype, part=part, batch=size, **asked)
        timed = time_case(case, opened, models, iterations=iterations, warmup=warmup)
        rows += [row | {"batch_size": size} for row in timed]
    return rows, opened
