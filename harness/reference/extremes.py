"""The largest finite number of a dtype as what models mean by it: infinite.

Masks fill with `torch.finfo(x.dtype).min`, which is another number in each dtype: -1.8e308 in float64, -65504 in
float16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def as_infinite(golden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float64 outputs with Inf, of the same sign, in place of float64's largest finite number and its negative.

    >>> as_infinite({"x": torch.tensor([1.0, torch.finfo(torch.float64).min], dtype=torch.float64)})["x"].tolist()
    [1.0, -inf]
    """
    return {name: _filled(item, _is_extreme(item)) for name, item in golden.items()}


def as_golden_has(golden: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs with Inf in place of their dtype's largest finite number where `golden` has float64's, of that sign.

    Only there: elsewhere that number is one that the model computed, or where float16 was cut to it.

    >>> least = torch.finfo(torch.float64).min
    >>> outputs = {"x": torch.tensor([-65504.0, -65504.0, 65504.0], dtype=torch.float16)}
    >>> as_golden_has({"x": torch.tensor([least, -torch.inf, least], dtype=torch.float64)}, outputs)["x"].tolist()
    [-inf, -65504.0, 65504.0]
    """
    result = dict(outputs)
    for name, wide in golden.items():
        each = outputs.get(name)
        if each is None or each.shape != wide.shape or not each.is_floating_point():
            continue
        filled = _is_extreme(wide)
        if bool(filled.any()):
            result[name] = _filled(each, filled & _is_extreme(each) & (wide.sign() == each.sign()))
    return result


def _is_extreme(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, dtype=torch.bool)
    return tensor.abs() == torch.finfo(tensor.dtype).max


def _filled(tensor: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, tensor.sign() * torch.inf, tensor) if bool(where.any()) else tensor
