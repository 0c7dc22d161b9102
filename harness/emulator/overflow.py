"""The float status of a device in the saturating mode: whether an operator overflowed since it was cleared.

In that mode (`INF_NAN_MODE_ENABLE=0`) a result that overflows is cut to the largest number, so a program such as
torch_npu's GradScaler asks the status instead of looking for Inf. Here an operator sets the status when it gives Inf or
NaN from finite numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

_flagged = [False]


def flagged() -> bool:
    """Whether an operator overflowed since the last `clear`."""
    return _flagged[0]


def clear() -> None:
    """Forget what overflowed."""
    _flagged[0] = False


def watch(inputs: list[Any], results: list[Any]) -> None:
    """Flag a floating result that is not finite where all inputs are: tensors, numbers and lists of them."""
    if not _finite(results) and _finite(inputs):
        _flagged[0] = True


def _finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_finite(item) for item in value)
    if isinstance(value, torch.Tensor):
        floating = value.is_floating_point() or value.is_complex()
        return not floating or bool(torch.isfinite(value).all())
    return not isinstance(value, float) or math.isfinite(value)
