"""What the harness asks of a kind of device, which is a module with `KIND`, of a subclass of `Kind`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from harness.devices.device_errors import DeviceFault
    from harness.devices.stack import Stack

T = TypeVar("T")


@dataclass(frozen=True)
class Switch:
    """A flag of torch that lets a device round the float32 operands of its products."""

    owner: str  # "torch.npu.conv"
    name: str  # "allow_hf32"


class Kind:
    """A kind of device, by the name that `--device` gives it."""

    name = ""
    torch_type = ""  # of its torch.device
    cards_variable: str | None = None  # the environment variable that shows a process some of the cards
    switches: Mapping[str, Switch] = {}
    hardware = False  # whether it is an accelerator card, and neither emulated nor the CPU
    plays = False  # whether it plays a chip, and so takes `soc` and `devices`
    script_import = ""  # the line that a script needs before it uses such a device

    def open(self, index: int, *, soc: str | None = None, devices: int | None = None, timing: bool = False) -> str:
        """The name of the device of this index, after it answered. `soc` and `devices` as in `open_device`; with
        `timing` work is queued as the user, or the library of the device, has it. Raises: DeviceError.
        """
        raise NotImplementedError(f"{type(self).__name__} does not open a device")

    def all_cards(self, devices: int | None = None) -> list[str]:
        """The numbers of all cards of this machine; `devices`: how many an emulated machine has. Empty where it cannot
        be told.
        """
        return []

    def answer(self, index: int) -> str:
        """The name of a further device of a process that has one open, after it computed something. Raises:
        DeviceError.
        """
        raise NotImplementedError(f"{type(self).__name__} is one device")

    def as_current(self, device: torch.device) -> AbstractContextManager[Any]:
        """A block in which what names no number, as in `torch.zeros(2, device="npu")`, is on this device."""
        return nullcontext()

    def synchronize(self, device: torch.device) -> None:
        """Wait until the device has done what it was given. Raises: what an operator raised meanwhile."""

    def generator(self, index: int) -> torch.Generator | None:
        """torch's own generator of random numbers on the device; None where there is none."""
        return None

    def memory(self) -> Any:
        """The module of torch that tells such a device's memory: `max_memory_allocated`, `reset_peak_memory_stats`,
        `mem_get_info`; None where nothing tells it.
        """
        return None

    def stack(self, index: int) -> dict[str, Any]:
        """What such a device adds to the fields of the stack."""
        return {}

    def fault_in(self, text: str) -> DeviceFault | None:
        """The fault of a card that the text of an error tells; None where it tells none."""
        return None

    def count_copies(self) -> Callable[[], int] | None:
        """What tells how many bytes went from the device to the host; None where nothing counts them."""
        return None

    def script_command(self, name: str, faults: Sequence[str] = ()) -> list[str]:
        """What stands between `python` and a script that uses such a device. `name`: of the device; `faults`: those
        that are planted in an emulated one.
        """
        return []

    def script_switches(self, stack: Stack) -> list[str]:
        """The lines of a script that set the switches as the stack has them."""
        return []


def quietly(read: Callable[[], T]) -> T | None:
    """What `read` gives; None where this version does not say: a version that cannot be read must not stop a run."""
    try:
        return read()
    except Exception:  # noqa: BLE001
        return None


def uuid_of(owner: Any, index: int) -> str | None:
    """The UUID of a device as a module of torch tells it; None where it has none, or one of zeros."""
    uuid = quietly(lambda: str(owner.get_device_properties(index).uuid))
    return f"UUID {uuid}" if uuid and uuid.strip("0-") else None
