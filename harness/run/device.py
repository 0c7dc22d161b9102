"""The device's two runs of one case on one set of inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.devices import Device, Watched
from harness.devices.device_errors import fault_in
from harness.errors import RunError
from harness.reference import Drawn, drawing, fresh, move, run, tensors_of, watching, watching_autocast
from harness.run.cpu import CpuSide, ModelDraws, copy_of, require_fractions


@dataclass(frozen=True, kw_only=True)
class DeviceRun:
    """Two runs on the device, brought to the CPU, the forwards' times, and the operators that fell back."""

    outputs: dict[str, Tensor]  # of the second run, in which nothing looks on
    again: dict[str, Tensor]  # of the first, which was watched
    milliseconds: float  # of the faster run: the first may compile, and watching costs it some
    first_milliseconds: float
    seen: Watched
    drawn: Drawn
    autocast: bool  # whether it ran under torch.autocast


def run_on_device(cpu: CpuSide, device: Device, at: str, names: frozenset[str]) -> DeviceRun:
    """Run two copies of the model; `names`: outputs that are buffers or inputs. Nothing runs on the device before the
    watch sees it, so that what a model keeps is seen too.
    """
    models, case, inputs, draws = cpu.models, cpu.case, cpu.inputs, cpu.draws
    device.check(at)

    def once(moved: Any) -> _Once:
        return _run_once(cpu, device, names, moved)

    def watched() -> tuple[_Once, Watched]:
        with device.watch() as seen:
            torch.zeros(1).neg()  # the first operator under a mode in a process imports what takes seconds
            return once(move(fresh(inputs), device=device.torch_device)), seen

    with device.telling(at):
        try:
            first, seen = watched()
        except RunError as error:
            first, seen = _unwatched(once, watched, inputs, device, error)
        moved = move(fresh(inputs), device=device.torch_device)
        second = once(moved)  # unwatched: a composite operator takes other ways under a mode
    device.check(at)  # a device that drops its work without a word leaves in memory what an earlier run wrote
    if second.drawn.any and not draws.alike and not case.own_random:
        models.draws[case.subject] = True
        raise ModelDraws
    return DeviceRun(
        outputs=second.outputs,
        again=first.outputs,
        seen=seen,
        drawn=second.drawn,
        autocast=second.autocast,
        milliseconds=min(first.milliseconds, second.milliseconds),
        first_milliseconds=first.milliseconds,
    )


def outputs_of_runs(
    cpu: CpuSide, device: Device, at: str, names: frozenset[str], times: int
) -> Iterator[dict[str, Tensor]]:
    """The outputs of so many runs on a device, on the CPU, one after the other; nothing looks on. `at` and `names` as
    of `run_on_device`.

    Raises: RunError; DeviceError where the device does not compute, before the runs or after them.
    """
    device.check(at)
    for _ in range(times):
        yield outputs_of_run(cpu, device, at, names)
    device.check(at)


def outputs_of_run(
    cpu: CpuSide,
    device: Device,
    at: str,
    names: frozenset[str],
    looking: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Tensor]:
    """The outputs of one run on a device, on the CPU. `at` and `names` as of `run_on_device`; the model runs in the
    block `looking()`. Raises: RunError.
    """
    with device.telling(at), device.kind.as_current(device.torch_device):
        moved = move(fresh(cpu.inputs), device=device.torch_device)
        return _run_once(cpu, device, names, moved, looking).outputs


@dataclass(frozen=True, kw_only=True)
class _Once:
    """One run on the device."""

    outputs: dict[str, Tensor]  # on the CPU
    milliseconds: float
    drawn: Drawn
    autocast: bool


def _run_once(
    cpu: CpuSide,
    device: Device,
    names: frozenset[str],
    moved: Any,
    looking: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> _Once:
    """Run a copy of the model on inputs that lie on the device, in the block `looking()`."""
    case = cpu.case
    with copy_of(cpu.models, case, device.torch_device) as model:
        device.synchronize()
        begin = time.perf_counter()
        with (
            drawing(cpu.draws, device.generator) as drawn,
            watching(model, moved, buffers=names, inputs=names) as written,
            watching_autocast(device.torch_device.type) as autocast,
            looking(),
        ):
            returned = run(model, moved, forward=case.forward, where=device.where, gradients=case.gradients)
            device.synchronize()
            elapsed = (time.perf_counter() - begin) * 1e3
        outputs = written.after(tensors_of(returned, f"{case.name}: the model on the device"))
        require_fractions(case, outputs, "the model on the device")
        brought = {name: output.detach().to("cpu", copy=True) for name, output in outputs.items()}
        return _Once(outputs=brought, milliseconds=elapsed, drawn=drawn, autocast=autocast.on)


def _unwatched(
    once: Callable[[Any], _Once], watched: Callable[[], Any], inputs: Any, device: Device, error: RunError
) -> tuple[_Once, Watched]:
    """The first run in place of a watched one that raised `error`, where being watched is what raises.

    Some of torch's composite operators take another way while a mode looks on: `ctc_loss` with lengths on the CPU mixes
    devices there, and runs without one. An error that comes and goes is not taken for that: the watched run is
    repeated.

    Raises: RunError, the first one, where CANN reports a fault, where the model raises unwatched too, or not again when
    it is watched.
    """
    if fault_in(str(error)) is not None:
        raise error
    try:
        first = once(move(fresh(inputs), device=device.torch_device))
    except RunError:
        raise error from error.__cause__
    try:
        watched()
    except RunError:
        return first, Watched(blind=error.location or str(error))
    raise error
