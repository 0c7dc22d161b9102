"""The kinds of device, by the name that `--device` gives them."""

from __future__ import annotations

from harness.devices.cpu import Cpu
from harness.devices.cuda import Cuda
from harness.devices.emulated import Emulated
from harness.devices.kind import Kind
from harness.devices.npu import Npu

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Npu(), Emulated(), Cuda(), Cpu())}
TORCH_TYPES = frozenset(kind.torch_type for kind in KINDS.values())
