"""The CPU itself, for a run without any device."""

from __future__ import annotations

from harness.devices.kind import Kind
from harness.devices.stack import cpu_name


class Cpu(Kind):
    name = torch_type = "cpu"

    def open(self, index: int, *, soc: str | None = None, devices: int | None = None, timing: bool = False) -> str:
        return cpu_name()


KIND = Cpu()
