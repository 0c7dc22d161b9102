"""A device that answered: its stack, its synchronisation, its check, and the watch on what falls back to the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness.devices.fallback import Watch, Watched
from harness.devices.stack import Stack, read_stack
from harness.errors import DeviceError


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that answered, or the CPU."""

    name: str  # "Ascend910B4", …
    backend: str
    torch_device: torch.device
    reason: str  # why it is this one, in a sentence

    @property
    def stack(self) -> Stack:
        """The stack as it is now: switches may change between two runs."""
        return read_stack(self)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.torch_device.type == "npu":
            torch.npu.synchronize(self.torch_device)
        elif self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def check(self) -> None:
        """Compute something small. After one operator failed, torch_npu's queue may take work and never do it.

        Raises: DeviceError when the device no longer computes.
        """
        if self.torch_device.type == "cpu":
            return
        from harness.emulator import faults

        with faults.suspended():
            try:
                answer = (torch.arange(4.0).to(self.torch_device) + 1).cpu().tolist()
            except RuntimeError as error:
                answer = first_line(error)
        if answer != [1.0, 2.0, 3.0, 4.0]:
            raise DeviceError(
                f"{self.torch_device} no longer computes ({answer}): an operator failed before and its queue is closed; "
                "run this case in a process of its own"
            )

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watched]:
        """Collect the operators that fall back from an NPU to the CPU while the block runs."""
        seen = Watched()
        if self.torch_device.type != "npu":
            yield seen
            return
        from harness import emulator

        with Watch(seen, emulator.bytes_to_host if emulator.installed() else None):
            yield seen

    @contextlib.contextmanager
    def in_float32(self, what: str) -> Iterator[str]:
        """While the block runs the device's float32 convolutions ("conv") or other products ("matmul") keep their operands; gives the switch's name.

        Raises: KeyError for a device without such a switch.
        """
        path, name = SWITCHES[self.torch_device.type, what]
        owner = functools.reduce(getattr, path.split(".")[1:], torch)
        before = getattr(owner, name)
        setattr(owner, name, False)
        try:
            yield f"{path}.{name}"
        finally:
            setattr(owner, name, before)


SWITCHES = {
    ("npu", "conv"): ("torch.npu.conv", "allow_hf32"), ("npu", "matmul"): ("torch.npu.matmul", "allow_hf32"),
    ("cuda", "conv"): ("torch.backends.cudnn", "allow_tf32"), ("cuda", "matmul"): ("torch.backends.cuda.matmul", "allow_tf32"),
}  # fmt: skip  # what lets a device round the float32 operands of its products


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
