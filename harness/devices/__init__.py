"""Which device, and where a run happens: every word about torch_npu, CANN and CUDA.

A device that is asked for by name is a promise: absent or broken it is a DeviceError, never another device. `auto`
takes a real NPU, and the emulated one only on a machine without any trace of CANN or of a card.
"""

from harness.devices.device import Device
from harness.devices.fallback import Watched
from harness.devices.families import Family, family_of, lacks, unknown_rounding
from harness.devices.opening import SPECS, open_device, parse_spec, without_broken_npu
from harness.devices.stack import Stack

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
