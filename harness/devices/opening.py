"""Which device: a name is a promise, and `auto` emulates only where there is no trace of CANN or of an NPU."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

from harness.devices.device import Device
from harness.devices.kinds import KINDS
from harness.devices.names import AUTO, NUMBERED, SPECS
from harness.devices.npu import inherits_emulation, traces_of_ascend
from harness.errors import DeviceError


def open_device(
    spec: str = "auto", *, soc: str | None = None, devices: int | None = None, timing: bool = False
) -> Device:
    """Open `auto`, `npu[:n]`, `emulated`, `cuda[:n]` or `cpu`; `soc` names the chip that an emulated device plays, such
    as "Ascend310P3", and `devices` how many of them its machine has.

    Where an NPU is used for the first time in this process, torch_npu launches each operator at once
    (TASK_QUEUE_ENABLE=0, unless the variable is set), since an operator that fails in its queue takes all later work of
    the process with it. With `timing` the queue is left as the user, or torch_npu, has it.

    Raises: ValueError for another word; DeviceError when the device cannot run here, saying what was looked for and
    what to do.
    """
    name, index = parse_spec(spec)
    played = {"soc": soc, "devices": devices}
    says = {"soc": "which chip the emulated device plays", "devices": "how many cards the emulated machine has"}
    traces = traces_of_ascend() if name == AUTO else []
    if traces or (name != AUTO and not KINDS[name].plays):
        for word, value in played.items():
            if value is not None:
                raise DeviceError(
                    f"{word} {value} says {says[word]}, and {spec} is none here; leave it out, or "
                    "ask for --device=emulated"
                )
    if name != AUTO:
        reason = "the CPU was asked for" if name == "cpu" else "it was asked for"
        return _open(name, index, reason, timing=timing, **played)
    if traces:
        return _open_traced(traces, timing)
    reason = "there is no trace of CANN or of an Ascend card here"
    return _open("emulated", 0, reason, timing=timing, **played)


def parse_spec(spec: str) -> tuple[str, int]:
    """The kind and the index of a device: "npu:1" is ("npu", 1). Raises: ValueError for another word."""
    name, colon, number = spec.partition(":")
    if colon:
        fits = NUMBERED.get(name, False) and re.fullmatch("[0-9]+", number) is not None
    else:
        fits = name in NUMBERED or name == AUTO
    if not fits:
        raise ValueError(f"no device is called {spec!r}; there are {SPECS}")
    return name, int(number or 0)


def is_hardware(spec: str) -> bool:
    """Whether a device is hardware, as far as can be told without opening it: one that is named, or `auto` where there
    are traces of CANN. False for a word that is no device.
    """
    try:
        name, _ = parse_spec(spec)
    except ValueError:
        return False
    from harness import emulator

    if name in ("npu", AUTO):
        return not emulator.installed() and not inherits_emulation() and (name == "npu" or bool(traces_of_ascend()))
    return KINDS[name].hardware


def _open(name: str, index: int, reason: str, **options: Any) -> Device:
    kind = KINDS[name]
    answered = kind.open(index, **options)
    device = torch.device(kind.torch_type) if name == "cpu" else torch.device(kind.torch_type, index)
    return Device(name=answered, backend=name, torch_device=device, reason=reason)


def _open_traced(traces: list[str], timing: bool) -> Device:
    """The NPU of which something on this machine says that it is there."""
    there = ", ".join(traces)
    try:
        return _open("npu", 0, f"auto found {there}", timing=timing)
    except DeviceError as error:
        raise DeviceError(
            f"there is a trace of an NPU here ({there}) but it does not answer, so nothing is emulated in its "
            f"place: {error}; "
            f"or ask for another device by name: {SPECS}"
        ) from None


@contextlib.contextmanager
def without_broken_npu() -> Iterator[None]:
    """In the block no library imports a torch_npu that cannot be imported: one on a machine without CANN, before an
    emulated device is open.

    transformers, diffusers and others import torch_npu wherever it is installed.
    """
    hides = "torch_npu" not in sys.modules and not traces_of_ascend()
    if hides:
        sys.modules["torch_npu"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules["torch_npu"]
