"""Ascend NPUs: every word about torch_npu and CANN on an NPU."""

from __future__ import annotations

import ctypes
import functools
import glob
import os
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness import autoload
from harness.devices.cards import AcceleratorCard, this_card
from harness.devices.device_errors import DeviceFault, error_summary, fault_in
from harness.devices.kind import Kind, Switch, quietly, uuid_of
from harness.errors import DeviceError

if TYPE_CHECKING:
    from harness.devices.stack import Stack

SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh (from CANN 8.5: /usr/local/Ascend/cann/set_env.sh)"


class Npu(Kind):
    name = torch_type = "npu"
    hardware = True
    cards_variable = "ASCEND_RT_VISIBLE_DEVICES"
    switches = {  # noqa: RUF012
        "conv": Switch("torch.npu.conv", "allow_hf32"),
        "matmul": Switch("torch.npu.matmul", "allow_hf32"),
    }
    script_import = "import torch_npu  # noqa: F401"

    def open(self, index: int, *, soc: str | None = None, devices: int | None = None, timing: bool = False) -> str:
        if not timing:
            launch_at_once()
        return open_card(index)

    def all_cards(self, devices: int | None = None) -> list[str]:
        numbers = [re.search(r"davinci(\d+)$", path) for path in glob.glob("/dev/davinci[0-9]*")]
        return [str(number) for number in sorted(int(match[1]) for match in numbers if match)]

    def answer(self, index: int) -> str:
        return answering(index, "torch_npu")

    def as_current(self, device: torch.device) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.npu.device(device)
        return context

    def synchronize(self, device: torch.device) -> None:
        torch.npu.synchronize(device)

    def memory(self) -> Any:
        return torch.npu

    def generator(self, index: int) -> torch.Generator:
        return torch.npu.default_generators[index]

    def fault_in(self, text: str) -> DeviceFault | None:
        return fault_in(text)

    def stack(self, index: int) -> dict[str, Any]:
        card = this_card(index)
        return stack_of_torch_npu() | dict(
            cann=cann_version(),
            driver=_driver(),
            firmware=None if card is None else card.firmware,
            card=_named(card, index),
        )

    def script_switches(self, stack: Stack) -> list[str]:
        allowed = (("conv", stack.conv_allow_hf32), ("matmul", stack.matmul_allow_hf32))
        return [f"torch.npu.{name}.allow_hf32 = {value}" for name, value in allowed if value is not None]


KIND = Npu()


# -------- opening


def launch_at_once() -> None:
    """Switch torch_npu's queue off before it reads the variable, at the first use of a device (OptionsManager.cpp)."""
    npu = getattr(torch, "npu", None)
    if npu is None or not npu.is_initialized():
        os.environ.setdefault("TASK_QUEUE_ENABLE", "0")


def traces_of_ascend() -> list[str]:
    """What on this machine says that CANN or an NPU is there."""
    from harness import emulator

    if emulator.installed():
        return []
    traces = []
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        home = os.environ.get(name)
        if home and not emulator.is_emulated_home(home):
            traces.append(f"{name}={home}")
    traces += sorted(glob.glob("/dev/davinci[0-9]*"))[:1]
    if not traces and not inherits_emulation() and loads("libascendcl.so") is None:
        traces.append("a loadable libascendcl.so")
    return traces


def inherits_emulation() -> bool:
    """Whether this process was started by one that plays an emulated CANN: its home is the emulated one, or the first
    CANN that the loader finds.
    """
    from harness import emulator

    folders = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    first = next((folder for folder in folders if (folder / "libascendcl.so").exists()), None)
    homes = [os.environ.get("ASCEND_HOME_PATH", ""), *([] if first is None else [first])]
    return any(emulator.is_emulated_home(home) for home in homes)


def loads(library: str) -> str | None:
    """None where a shared library loads, else the loader's words."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def open_card(index: int) -> str:
    """The name of a real NPU, after it computed something. Raises: DeviceError."""
    from harness import emulator
    from harness.emulator.build import wheel_version

    if emulator.installed():
        raise DeviceError("this process plays an emulated CANN and cannot open a card as well; start another process")
    if inherits_emulation():
        raise DeviceError(
            "this process was started by one that plays an emulated CANN and inherits it; start it from a "
            "shell, or use --device emulated"
        )
    version = wheel_version()
    if "torch_npu" not in sys.modules:
        problem = loads("libhccl.so")
        if problem is not None:
            raise DeviceError(
                f"torch_npu {version} is installed, but CANN cannot be loaded ({problem}); on an Ascend "
                f"machine: {SET_ENV}"
            )
    name = answering(index, f"torch_npu {version}")
    autoload.release()  # a child process of the user finds the NPU by a bare `import torch`
    return name


def answering(index: int, what: str) -> str:
    """The name of the NPU of this index, after it computed something; `what` finds the NPUs. Raises: DeviceError."""
    try:
        import torch_npu  # noqa: F401

        count = torch.npu.device_count() if torch.npu.is_available() else 0
    except Exception as error:  # noqa: BLE001
        raise DeviceError(
            f"{what} cannot be imported ({_first_line(error)}); check that torch, torch_npu and CANN fit: "
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
    return torch.npu.get_device_name(index)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# -------- the stack


def stack_of_torch_npu() -> dict[str, Any]:
    """What torch_npu tells of itself and of its switches, on an NPU or over the emulated CANN."""
    import torch_npu

    return dict(
        device_count=torch.npu.device_count(),
        torch_npu=torch_npu.__version__,
        torch_npu_git=quietly(lambda: torch_npu.version.git_version),
        conv_allow_hf32=quietly(lambda: bool(torch.npu.conv.allow_hf32)),
        matmul_allow_hf32=quietly(lambda: bool(torch.npu.matmul.allow_hf32)),
        cube_math_type=quietly(_cube_math_type),
        precision_mode=quietly(lambda: _option("ACL_PRECISION_MODE")),
        inf_nan_mode=quietly(lambda: bool(torch.npu.utils.is_support_inf_nan())),
        jit_compile=quietly(lambda: not torch.npu.is_jit_compile_false()),
        compile_cache=quietly(_compile_cache),
        deterministic_level=quietly(lambda: int(torch_npu._C._npu_get_deterministic_level())),
        task_queue=quietly(task_queue),
        compatible_impl=_compatible_impl(),
        allow_internal_format=quietly(_internal_format),
    )


@functools.cache
def task_queue() -> int:
    """The mode of torch_npu's queue, which it reads once in a process: 0, 1 (its default) or 2."""
    if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        return 0
    return int(os.environ.get("TASK_QUEUE_ENABLE", "1"))


def _compatible_impl() -> bool | None:
    """Whether torch_npu follows torch's formulas, GELU's too; None where it has no such switch (before 2.9.0.post2)."""
    if not hasattr(torch.npu, "use_compatible_impl"):
        return None
    return quietly(lambda: bool(torch.npu.are_compatible_impl_enabled()))


def _internal_format() -> bool | None:
    option = _option("ALLOW_INTERNAL_FORMAT")
    return None if option is None else option == "enable"


def _option(name: str) -> str | None:
    """One of torch_npu's options; None where it is not set or not known."""
    import torch_npu

    option = torch_npu._C._npu_getOption(name)
    return option.decode() if option else None


def _cube_math_type() -> int | None:
    option = _option("CUBE_MATH_TYPE")
    return None if option is None else int(option)


def _compile_cache() -> str | None:
    mode, folder = _option("ACL_OP_COMPILER_CACHE_MODE"), _option("ACL_OP_COMPILER_CACHE_DIR")
    return f"{mode or 'default'} in {folder or 'its default folder'}" if mode or folder else None


def cann_version() -> str | None:
    """CANN's version. torch_npu 2.5 and 2.6 have the function in `npu.utils` alone."""
    import torch_npu

    for owner in (torch_npu.npu.utils, torch_npu.utils):
        result = quietly(lambda owner=owner: owner.get_cann_version())
        if result:
            return result
    return None


def _named(card: AcceleratorCard | None, index: int) -> str | None:
    """The accelerator card in words; by the UUID of its driver where npu-smi does not tell."""
    return str(card) if card is not None else uuid_of(torch.npu, index)


def _driver() -> str | None:
    """The NPU driver's version, as its installer left it."""
    path = Path("/usr/local/Ascend/driver/version.info")
    result = re.search(r"^Version=(\S+)", path.read_text(errors="replace"), re.MULTILINE) if path.exists() else None
    return result[1] if result else None
