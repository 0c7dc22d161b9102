"""Which device: a name is a promise, and `auto` emulates only where there is no trace of CANN or of a card."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from harness import autoload
from harness.devices.device import Device, first_line
from harness.devices.device_errors import error_summary, fault_in
from harness.devices.families import FAMILIES, UNKNOWN, family_of
from harness.devices.stack import cpu_name, task_queue
from harness.errors import DeviceError

SPECS = "auto, npu[:n], emulated, cuda[:n] or cpu"
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh (from CANN 8.5: /usr/local/Ascend/cann/set_env.sh)"


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
    kind, index = parse_spec(spec)
    played = {"soc": soc, "devices": devices}
    says = {"soc": "which chip the emulated device plays", "devices": "how many cards the emulated machine has"}
    if kind not in ("auto", "emulated") or (kind == "auto" and _traces_of_ascend()):
        for name, value in played.items():
            if value is not None:
                raise DeviceError(
                    f"{name} {value} says {says[name]}, and {spec} is none here; leave it out, or "
                    "ask for --device=emulated"
                )
    if kind in ("npu", "emulated", "auto") and not timing:
        _launch_at_once()
    if kind == "cpu":
        return Device(name=cpu_name(), backend="cpu", torch_device=torch.device("cpu"), reason="the CPU was asked for")
    if kind == "cuda":
        return _open_cuda(index)
    if kind == "npu":
        return _open_npu(index, "it was asked for")
    return _open_emulated("it was asked for", **played) if kind == "emulated" else _open_auto(**played)


def _launch_at_once() -> None:
    """Switch torch_npu's queue off before it reads the variable, at the first use of a device (OptionsManager.cpp)."""
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_initialized():
        os.environ.setdefault("TASK_QUEUE_ENABLE", "0")


def parse_spec(spec: str) -> tuple[str, int]:
    """The kind and the index of a device: "npu:1" is ("npu", 1). Raises: ValueError for another word."""
    match = re.fullmatch(r"(auto|emulated|cpu)|(npu|cuda)(?::(\d+))?", spec)
    if match is None:
        raise ValueError(f"no device is called {spec!r}; there are {SPECS}")
    return match[1] or match[2], int(match[3] or 0)


def is_hardware(spec: str) -> bool:
    """Whether a device is a card, as far as can be told without opening it: one that is named, or `auto` beside traces
    of CANN. False for a word that is no device.
    """
    try:
        kind, _ = parse_spec(spec)
    except ValueError:
        return False
    from harness import emulator

    if kind in ("npu", "auto"):
        return not emulator.installed() and not _inherits_emulation() and (kind == "npu" or bool(_traces_of_ascend()))
    return kind == "cuda"


def _open_auto(soc: str | None = None, devices: int | None = None) -> Device:
    traces = _traces_of_ascend()
    if not traces:
        return _open_emulated("there is no trace of CANN or of an Ascend card here", soc, devices)
    result = ", ".join(traces)
    try:
        return _open_npu(0, f"auto found {result}")
    except DeviceError as error:
        raise DeviceError(
            f"there is a trace of an NPU here ({result}) but it does not answer, so nothing is emulated in its "
            f"place: {error}; "
            f"or ask for another device by name: {SPECS}"
        ) from None


def _traces_of_ascend() -> list[str]:
    """What on this machine says that CANN or a card is there."""
    from harness import emulator

    if emulator.installed():
        return []
    traces = []
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        home = os.environ.get(name)
        if home and not emulator.is_emulated_home(home):
            traces.append(f"{name}={home}")
    traces += sorted(glob.glob("/dev/davinci[0-9]*"))[:1]
    if not traces and not _inherits_emulation() and _loads("libascendcl.so") is None:
        traces.append("a loadable libascendcl.so")
    return traces


@contextlib.contextmanager
def without_broken_npu() -> Iterator[None]:
    """In the block no library imports a torch_npu that cannot be imported: one on a machine without CANN, before an
    emulated device is open.

    transformers, diffusers and others import torch_npu wherever it is installed.
    """
    hides = "torch_npu" not in sys.modules and not _traces_of_ascend()
    if hides:
        sys.modules["torch_npu"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hides:
            del sys.modules["torch_npu"]


def _inherits_emulation() -> bool:
    """Whether this process was started by one that plays an emulated CANN: its home is the emulated one, or the first
    CANN that the loader finds.
    """
    from harness import emulator

    folders = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    first = next((folder for folder in folders if (folder / "libascendcl.so").exists()), None)
    homes = [os.environ.get("ASCEND_HOME_PATH", ""), *([] if first is None else [first])]
    return any(emulator.is_emulated_home(home) for home in homes)


def _loads(library: str) -> str | None:
    """None where a shared library loads, else the loader's words."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def _open_npu(index: int, reason: str) -> Device:
    from harness import emulator
    from harness.emulator.build import wheel_version

    if emulator.installed():
        raise DeviceError("this process plays an emulated CANN and cannot open a card as well; start another process")
    if _inherits_emulation():
        raise DeviceError(
            "this process was started by one that plays an emulated CANN and inherits it; start it from a "
            "shell, or use --device emulated"
        )
    version = wheel_version()
    if "torch_npu" not in sys.modules:
        problem = _loads("libhccl.so")
        if problem is not None:
            raise DeviceError(
                f"torch_npu {version} is installed, but CANN cannot be loaded ({problem}); on an Ascend "
                f"machine: {SET_ENV}"
            )
    device = _answering(index, "npu", reason, f"torch_npu {version}")
    autoload.release()  # a child process of the user finds the NPU by a bare `import torch`
    return device


def _open_emulated(reason: str, soc: str | None = None, devices: int | None = None) -> Device:
    from harness import emulator

    if soc is not None and family_of(soc) is UNKNOWN:  # torch_npu refuses its name
        there = ", ".join(f"{family.name} ({family.members})" for family in FAMILIES)
        raise DeviceError(
            f"no chip is called {soc!r}; write a name such as Ascend310P3, of one of the families {there}"
        )
    settings = {name: value for name, value in (("name", soc), ("devices", devices)) if value is not None}
    try:
        emulator.install(emulator.Machine(**settings) if settings else None)
    except ValueError as error:
        raise DeviceError(str(error)) from None
    return _answering(0, "emulated", reason, "torch_npu over the emulated CANN")


def _answering(index: int, backend: str, reason: str, what: str) -> Device:
    """The NPU of this index, after it computed something."""
    try:
        import torch_npu  # noqa: F401

        count = torch.npu.device_count() if torch.npu.is_available() else 0
    except Exception as error:  # noqa: BLE001
        raise DeviceError(
            f"{what} cannot be imported ({first_line(error)}); check that torch, torch_npu and CANN fit: "
            "python -m harness doctor"
        ) from None
    if index >= count:
        there = (
            ", ".join(f"npu:{item}" for item in range(count))
            or "no card answers: is ASCEND_RT_VISIBLE_DEVICES set? see npu-smi info"
        )
        raise DeviceError(
            f"npu:{index} was asked for and {what} finds {count} NPU{'' if count == 1 else 's'} ({there})"
        )
    device = torch.device("npu", index)
    try:
        torch.npu.set_device(device)
        answer = float((torch.ones(2, device=device) + 1).sum().cpu())
    except Exception as error:  # noqa: BLE001
        fault = fault_in(str(error))
        advice = fault.sentence if fault else "see npu-smi info"
        raise DeviceError(f"npu:{index} does not answer: {error_summary(error)}; {advice}") from None
    task_queue()  # torch_npu has read it now: a change of the variable comes too late
    if answer != 4.0:
        raise DeviceError(f"npu:{index} computes wrongly: the sum of two twos is {answer}")
    return Device(name=torch.npu.get_device_name(index), backend=backend, torch_device=device, reason=reason)


def _open_cuda(index: int) -> Device:
    if not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else f"torch {torch.__version__} is built without CUDA"
        )
        raise DeviceError(f"cuda:{index} was asked for and no CUDA device answers; {built}")
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"cuda:{index} was asked for and there are {count} (cuda:0 to cuda:{count - 1})")
    device = torch.device("cuda", index)
    return Device(
        name=torch.cuda.get_device_name(device), backend="cuda", torch_device=device, reason="it was asked for"
    )
