"""What the SoC of a device can do: the dtype that it lacks, and whether it is known how it rounds. The families are
those of `harness.numerics.families`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from harness.devices.stack import Stack
from harness.numerics.families import FAMILIES, UNKNOWN, Family, family_of

if TYPE_CHECKING:
    from harness.devices.device import Device

__all__ = ["FAMILIES", "UNKNOWN", "Family", "family_of", "lacks", "unknown_rounding"]


def lacks(device: Device, dtype: str) -> str | None:
    """Why a device cannot run a dtype, "Ascend310P3 has no bfloat16"; None where it can, or where nobody says.

    torch.npu.is_bf16_supported answers where this torch_npu has it, else the family.
    """
    if device.torch_device.type != "npu" or dtype != "bfloat16":
        return None
    return f"{device.name} has no bfloat16" if _has_bfloat16(device.name) is False else None


def _has_bfloat16(name: str) -> bool | None:
    try:
        return bool(torch.npu.is_bf16_supported())
    except (AttributeError, RuntimeError):
        return family_of(name).bfloat16


def unknown_rounding(stack: Stack) -> str | None:
    """That it is not known how the SoC of a stack rounds, in words; None for one whose rules are known, and for other
    devices than NPUs.
    """
    if stack.backend not in ("npu", "emulated") or family_of(stack.device).known:
        return None
    return f"{stack.device}: how this SoC rounds is not known, so there is no expected error"
