"""An emulated CANN underneath the real torch_npu: its operators computed on the CPU with the rounding of an Ascend
910B.

    from harness import emulator
    emulator.install()                      # before torch_npu is imported
    torch.ones(2).to("npu:0")               # goes through torch_npu
    with emulator.fault("aclnnSilu", kind="scale", by=1.001): ...

It computes errors of the size and the kind that a card has, not its bits, and is no evidence about hardware.
"""

from harness.emulator.build import is_emulated_home
from harness.emulator.faults import Fault, fault
from harness.emulator.program import emulate
from harness.emulator.runtime import Machine, bytes_to_host, install, installed, raise_interrupt, share_with_children

__all__ = [
    "Fault", "Machine", "bytes_to_host", "emulate", "fault", "install", "installed", "is_emulated_home",
    "raise_interrupt", "share_with_children",
]  # fmt: skip
