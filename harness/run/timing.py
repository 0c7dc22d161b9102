"""The performance table: forwards timed one by one, each ended by a synchronisation, the CPU beside the device."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from harness.devices import Device
from harness.reference import Models, move, run, run_cpu, tensors_of
from harness.run.cpu import inputs_of

P99_NEEDS = 100  # forwards: below that the 99th percentile is the slowest of them, or made up
P90_NEEDS = 10


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of n forwards after a warm-up. p90 and p99 are None where n is too small to have one, and
    `first_ms`, the first forward of the warm-up, where there was no warm-up.
    """

    n: int
    warmup: int
    avg_ms: float
    p50_ms: float
    p99_ms: float | None
    p90_ms: float | None
    min_ms: float
    max_ms: float
    first_ms: float | None


def measure(
    forward: Callable[[], Any],
    synchronize: Callable[[], None],
    *,
    iterations: int,
    warmup: int,
    clock=time.perf_counter,
) -> Timing:
    """Time `forward` with a synchronisation before the clock starts and before it stops.

    Raises: ValueError for no iterations or a negative warm-up.
    """
    if iterations < 1 or warmup < 0:
        raise ValueError(f"{iterations} iterations after {warmup} to warm up measure nothing; at least 1 and 0")

    def timed() -> float:
        synchronize()
        begin = clock()
        forward()
        synchronize()
        return (clock() - begin) * 1e3

    warm = [timed() for _ in range(warmup)]
    times = [timed() for _ in range(iterations)]
    return Timing(
        n=iterations,
        warmup=warmup,
        avg_ms=sum(times) / iterations,
        p50_ms=percentile(times, 0.50),
        p99_ms=percentile(times, 0.99) if iterations >= P99_NEEDS else None,
        p90_ms=percentile(times, 0.90) if iterations >= P90_NEEDS else None,
        min_ms=min(times),
        max_ms=max(times),
        first_ms=warm[0] if warm else None,
    )


def percentile(times: Sequence[float], share: float) -> float:
    """The smallest of `times` that at least this share of them does not exceed (nearest rank)."""
    return sorted(times)[max(math.ceil(share * len(times)) - 1, 0)]


def _row(
    case: str, dtype: str, batch_size: int, device: str, timing: Timing, task_queue: int | None = None
) -> dict[str, Any]:
    """One row of the performance table, as the report stores it. `task_queue`: torch_npu's mode, where an NPU was
    timed.
    """
    return {
        "case": case,
        "dtype": dtype,
        "batch_size": batch_size,
        "device": device,
        **asdict(timing),
        "task_queue": task_queue,
    }


def time_pair(
    name: str,
    dtype: torch.dtype,
    models: tuple[nn.Module, nn.Module],
    inputs: Any,
    device: Device,
    *,
    forward=None,
    iterations: int,
    warmup: int,
    batch_size: int,
) -> list[dict]:
    """The rows of one model on the CPU and on the device, on the same inputs.

    Raises: RunError when the model or the device raises, DeviceError when the device does not compute.
    """
    words = str(dtype).removeprefix("torch.")
    on_cpu, on_device = models
    cpu = measure(
        lambda: run_cpu(on_cpu, inputs, forward=forward, dtype=dtype),
        lambda: None,
        iterations=iterations,
        warmup=warmup,
    )
    rows = [_row(name, words, batch_size, "cpu", cpu)]
    if device.torch_device.type != "cpu":
        at = f"{name} {words}, timing"
        device.check(at)
        with device.telling(at):
            moved = move(inputs, device=device.torch_device)
            forwards = dict(iterations=iterations, warmup=warmup)
            once = functools.partial(run, on_device, moved, forward=forward, where=device.where)
            timed = measure(once, device.synchronize, **forwards)
        device.check(at)  # one that drops its work is very fast
        rows.append(_row(name, words, batch_size, device.name, timed, device.stack.task_queue))
    return rows


def time_case(case, device: Device, models: Models, *, iterations: int = 20, warmup: int = 3) -> list[dict]:
    """The rows of a case on its own inputs, for `pytest --bench`."""
    inputs = inputs_of(case, 0)
    options = dict(forward=case.forward, iterations=iterations, warmup=warmup, batch_size=_batch_size(inputs))
    with models.untouched(**case.built, device=torch.device("cpu")) as here, contextlib.ExitStack() as lent:
        with device.telling(f"{case.name} {case.dtype}, timing"):
            there = lent.enter_context(models.untouched(**case.built, device=device.torch_device))
        return time_pair(case.name, case.torch_dtype, (here, there), inputs, device, **options)


def _batch_size(inputs: Any) -> int:
    """The first size of the first tensor."""
    first = next(iter(tensors_of(inputs, "inputs()").values()))
    return first.shape[0] if first.dim() else 1
