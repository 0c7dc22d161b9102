"""The SoC that is played: its family says what products make of float32, and which dtypes there are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from harness.emulator import known_dtypes
from harness.numerics import FLOAT32, Family, Operands, family_of
from harness.numerics.families import A2, KEEP, USE_FLOAT16

_played: list[tuple[str, Family, Callable[[], bool]]] = [("Ascend910B4", A2, lambda: False)]


def play(name: str, saturates: Callable[[], bool]) -> None:
    """Play the SoC of this name from now on; `saturates` tells the mode of overflow that torch_npu set.

    One of which nobody says how it rounds computes as an A2 does what torch_npu asks of it.
    """
    _played[:] = [(name, family_of(name), saturates)]


def operands(cube: int, *tensors: torch.Tensor | None) -> Operands:
    """What a product makes of these tensors under a cubeMathType.

    Raises: NoFloat32 where the SoC refuses to keep float32.
    """
    if not any(tensor is not None and tensor.dtype == torch.float32 for tensor in tensors):
        return FLOAT32
    _, family, saturates = _played[-1]
    rules = family if family.known else A2
    return Operands(kind=rules.operands(cube), saturates=saturates(), half_results=bool(rules.float32))


def default_operands(*tensors: torch.Tensor | None) -> Operands:
    """What a product without a cubeMathType makes of these tensors: float32 is kept where the cube has it."""
    return operands(USE_FLOAT16 if _played[-1][1].float32 is False else KEEP, *tensors)


def without_float32() -> bool:
    """Whether the cube of the SoC has no float32."""
    return _played[-1][1].float32 is False


def soc_refusal(operator: str, dtypes: set[torch.dtype]) -> str | None:
    """Why the SoC does not take these dtypes in an operator, as CANN says it; None where it takes them, or nothing is
    known.
    """
    name, family, _ = _played[-1]
    if torch.bfloat16 in dtypes and family.bfloat16 is False:
        return (
            f"a tensor is not implemented for DT_BFLOAT16 on {name}, should be in dtype support list [DT_FLOAT, "
            "DT_FLOAT16, ...]"
        )
    newer = name.startswith("Ascend950")  # of which the table knows nothing
    return None if newer else known_dtypes.refusal(operator, dtypes)
