"""Which tensors of a model a cast to a half dtype leaves as they are: what its makers keep in a wider one."""

from __future__ import annotations

import re

import torch
from torch import nn

_HALF = (torch.float16, torch.bfloat16)


def excluded_from_cast(model: nn.Module, dtype: torch.dtype) -> frozenset[int]:
    """The ids of the parameters and buffers of `model` that keep their dtype where the model is cast to `dtype`.

    - Tensors in float64 of a model that has others too: they are so on purpose.
    - In half dtypes, what transformers' `from_pretrained(dtype=…)` keeps in float32: the parameters that a model names
      in `_keep_in_fp32_modules` (float16) and `_keep_in_fp32_modules_strict`, and buffers in float32 that are not
      saved, such as the `inv_freq` of rotary positions.
    """
    floats = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    wide = {id(tensor) for tensor in floats if tensor.dtype == torch.float64}
    result = set() if len(wide) == len(floats) or dtype == torch.float64 else wide
    if dtype in _HALF:
        for module in model.modules():
            if _is_pretrained(type(module)):
                result |= _excluded_by_transformers(module, dtype)
    return frozenset(result)


def _is_pretrained(kind: type) -> bool:
    return any(
        item.__name__ == "PreTrainedModel" and item.__module__.startswith("transformers.") for item in kind.__mro__
    )


def _excluded_by_transformers(model: nn.Module, dtype: torch.dtype) -> set[int]:
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    names |= set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    pattern = re.compile("|".join(rf"(?:^|\.){re.escape(item)}(?:$|\.)" for item in sorted(names))) if names else None
    result = {
        id(parameter) for name, parameter in model.named_parameters() if pattern is not None and pattern.search(name)
    }
    for module in model.modules():
        buffers = {
            name: buffer for name, buffer in module._buffers.items() if name in module._non_persistent_buffers_set
        }
        result |= {id(buffer) for buffer in buffers.values() if buffer is not None and buffer.dtype == torch.float32}
    return result
