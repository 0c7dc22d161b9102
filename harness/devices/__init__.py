"""Which device, and where a run happens: every word about torch_npu, CANN and CUDA.

A device that is asked for by name is a promise: absent or broken it is a DeviceError, never another device. `auto`
takes a real NPU, and the emulated one only on a machine without any trace of CANN or of an NPU. The names are imported
when they are used: torch takes seconds, and `names`, which `--help` reads, needs none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.devices.device import Device
    from harness.devices.fallback import Watched
    from harness.devices.families import Family, family_of, lacks, unknown_rounding
    from harness.devices.names import SPECS
    from harness.devices.opening import open_device, parse_spec, without_broken_npu
    from harness.devices.stack import Stack

_MODULES = {
    "SPECS": "names",
    "Device": "device",
    "Family": "families",
    "Stack": "stack",
    "Watched": "fallback",
    "family_of": "families",
    "lacks": "families",
    "open_device": "opening",
    "parse_spec": "opening",
    "unknown_rounding": "families",
    "without_broken_npu": "opening",
}

__all__ = [
    "SPECS",
    "Device",
    "Family",
    "Stack",
    "Watched",
    "family_of",
    "lacks",
    "open_device",
    "parse_spec",
    "unknown_rounding",
    "without_broken_npu",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next use costs nothing
    return value
