"""Which tensors of a model a cast to a half dtype leaves as they are: what its makers keep in a wider one."""

from __future__ import annotations

import re

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


def kept(model: nn.Module, dtype: torch.dtype) -> frozenset[int]:
    """The ids of the parameters and buffers of `model` that keep their dtype where the model is cast to `dtype`.

    - Tensors in float64 of a model that has others too: they are so on purpose.
    - In half dtypes, what transformers' `from_pretrained(dtype=…)` keeps in float32: the parameters that a model names
      in `_keep_in_fp32_modules` (float16) and `_keep_in_fp32_modules_strict`, and buffers in float32 that are not
      saved, such as the `inv_freq` of rotary positions.
    """
    floats = [each for each in [*model.parameters(), *model.buffers()] if each.is_floating_point()]
    wide = {id(each) for each in floats if each.dtype == torch.float64}
    found = set() if len(wide) == len(floats) or dtype == torch.float64 else wide
    if dtype in HALF:
        for module in model.modules():
            if _is_pretrained(type(module)):
                found |= _kept_by_transformers(module, dtype)
    return frozenset(found)


def _is_pretrained(kind: type) -> bool:
    return any(
        each.__name__ == "PreTrainedModel" and each.__module__.startswith("transformers.") for each in kind.__mro__
    )


def _kept_by_transformers(model: nn.Module, dtype: torch.dtype) -> set[int]:
    names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    names |= set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    pattern = re.compile("|".join(rf"(?:^|\.){re.escape(each)}(?:$|\.)" for each in sorted(names))) if names else None
    found = {id(each) for name, each in model.named_parameters() if pattern is not None and pattern.search(name)}
    for module in model.modules():
        buffers = {name: each for name, each in module._buffers.items() if name in module._non_persistent_buffers_set}
        found |= {id(each) for each in buffers.values() if each is not None and each.dtype == torch.float32}
    return found
