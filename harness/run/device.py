"""The device's two runs of one case on one set of inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
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

    def once(moved: Any) -> tuple[dict[str, Tensor], float, Drawn, bool]:
        with copy_of(models, case, device.torch_device) as model:
            device.synchronize()
            begin = time.perf_counter()
            with (
                drawing(draws, device.generator) as drawn,
                watching(model, moved, buffers=names, inputs=names) as written,
                watching_autocast(device.torch_device.type) as autocast,
            ):
                returned = run(model, moved, forward=case.forward, where=device.where, gradients=case.gradients)
                device.synchronize()
                elapsed = (time.perf_counter() - begin) * 1e3
            outputs = written.after(tensors_of(returned, f"{case.name}: the model on the device"))
            require_fractions(case, outputs, "the model on the device")
            brought = {name: output.detach().to("cpu", copy=True) for name, output in outputs.items()}
            return brought, elapsed, drawn, autocast.on

    def watched() -> tuple[dict[str, Tensor], float, Watched]:
        with device.watch() as seen:
            torch.zeros(1).neg()  # the first operator under a mode in a process imports what takes seconds
            again, elapsed, *_ = once(move(fresh(inputs), device=device.torch_device))
        return again, elapsed, seen

    with device.telling(at):
        try:
            again, compiling, seen = watched()
        except RunError as error:
            again, compiling, seen = _unwatched(once, watched, inputs, device, error)
        moved = move(fresh(inputs), device=device.torch_device)
        outputs, warm, drawn, autocast = once(moved)  # unwatched: a composite operator takes other ways under a mode
    device.check(at)  # a device that drops its work without a word leaves in memory what an earlier run wrote
    if drawn.any and not draws.alike and not case.own_random:
        models.draws[case.subject] = True
        raise ModelDraws
    times = dict(milliseconds=min(compiling, warm), first_milliseconds=compiling)
    return DeviceRun(outputs=outputs, again=again, seen=seen, drawn=drawn, autocast=autocast, **times)


def _unwatched(
    once: Callable, watched: Callable, inputs: Any, device: Device, error: RunError
) -> tuple[dict[str, Tensor], float, Watched]:
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
        again, elapsed, *_ = once(move(fresh(inputs), device=device.torch_device))
    except RunError:
        raise error from None
    try:
        watched()
    except RunError:
        return again, elapsed, Watched(blind=error.location or str(error))
    raise error
