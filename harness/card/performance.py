"""What a card says of speed and memory: measured on hardware alone, else the reason why it is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from harness.card.facts import Stated
from harness.case import Case
from harness.devices import Device
from harness.measure.generation import greedy
from harness.reference import Models, move, run
from harness.run.cpu import inputs_of
from harness.run.timing import measure, time_case

NEW_TOKENS = 16  # that a generation makes while it is timed
_SYNTHETIC = ("emulated", "cpu")  # backends that are no hardware


def why_not(device: Device, what: str) -> str:
    """Why a device's "times" or "memory" do not belong on a card; "" for hardware."""
    if device.kind.hardware:
        return ""
    return f"{what}_{device.backend}" if device.backend in _SYNTHETIC else f"{what}_unknown"


def forwards(
    path: str | Path, device: Device, dtype: str, batches: Sequence[int], iterations: int, warmup: int, **asked: Any
) -> Stated:
    """The times of a forward by batch size, the CPU's beside the device's, and what that is in samples a second.

    Each is a row of the performance table (`harness.report.Timed`) with `throughput`.
    """
    missing = why_not(device, "times")
    if missing:
        return Stated(why=missing)
    models, rows = Models(), []
    for size in batches:
        case = Case.from_checkpoint(path, dtype=dtype, batch=size, **asked)
        timed = time_case(case, device, models, iterations=iterations, warmup=warmup)
        rows += [row | {"batch_size": size, "throughput": size * 1e3 / row["avg_ms"]} for row in timed]
    return Stated(value=rows)


def generation(case: Case, device: Device, *, iterations: int, warmup: int) -> Stated:
    """Time to the first token, time for each further one, and tokens a second of one batch, in milliseconds.

    `case`: the one that runs a forward of a language model. The first token is the forward of the whole prompt; the
    time of a further token is that of `NEW_TOKENS` tokens less that of one, over their number.
    """
    missing = why_not(device, "times")
    if missing:
        return Stated(why=missing)
    inputs = {name: value for name, value in inputs_of(case, 42).items() if name != "use_cache"}
    moved = move(inputs, device=device.torch_device)

    def once(model: Any, tokens: int) -> Callable[[], Any]:
        forward = functools.partial(greedy, steps=tokens)
        return lambda: run(model, moved, forward=forward, where=device.where)

    with device.telling(case.name), Models().untouched(**case.built, device=device.torch_device) as model:
        how: Mapping[str, Any] = dict(iterations=iterations, warmup=warmup)
        first = measure(once(model, 1), device.synchronize, **how)
        many = measure(once(model, NEW_TOKENS), device.synchronize, **how)
    each = max(many.avg_ms - first.avg_ms, 0.0) / (NEW_TOKENS - 1)
    ids = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    batch, prompt = ids.shape[0], ids.shape[1]
    return Stated(
        value=dict(
            batch_size=batch,
            prompt_tokens=prompt,
            new_tokens=NEW_TOKENS,
            ttft_ms=first.avg_ms,
            tpot_ms=each,
            tokens_per_second=batch * NEW_TOKENS * 1e3 / many.avg_ms,
            n=iterations,
        )
    )


def peak_memory(case: Case, device: Device) -> Stated:
    """Bytes that the device had allocated at most in one forward, weights included."""
    missing, memory = why_not(device, "memory"), device.kind.memory()
    if missing or memory is None:
        return Stated(why=missing or "memory_unknown")
    inputs = inputs_of(case, 42)
    with device.telling(case.name):
        memory.reset_peak_memory_stats(device.torch_device)
        with Models().untouched(**case.built, device=device.torch_device) as model:
            moved = move(inputs, device=device.torch_device)
            run(model, moved, forward=case.forward, where=device.where)
            device.synchronize()
        return Stated(value=int(memory.max_memory_allocated(device.torch_device)))
