"""Operators that fall back from an NPU to the CPU while a block runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from harness.torch_private import TorchDispatchMode, has_kernel, operator_names, tree_leaves


@dataclass(kw_only=True)
class Watched:
    """What `Device.watch` saw."""

    fell_back: list[str] = field(default_factory=list)  # operators that the CPU computed in place of the device


class Watch(TorchDispatchMode):
    """Sees every operator on an NPU's tensors and asks the dispatcher whether torch_npu has a kernel for it.

    torch_npu says so itself only on standard error, and once for each operator in a process. Where it calls the CPU itself, inside a kernel, nothing
    says so; on an emulated device `to_host` counts the bytes that come back, and an operator that brings its inputs back is one.
    """

    def __init__(self, seen: Watched, to_host: Callable[[], int] | None = None):
        super().__init__()
        self.seen, self.to_host = seen, to_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if _falls_back(name):
            self._add(name)
        if self.to_host is None or name.startswith(COPIES):
            return func(*args, **(kwargs or {}))
        before, size = self.to_host(), _largest((args, kwargs))
        found = func(*args, **(kwargs or {}))
        if size and self.to_host() - before >= size:
            self._add(name)
        return found

    def _add(self, name: str) -> None:
        if name not in self.seen.fell_back:
            self.seen.fell_back.append(name)


COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")


def _largest(arguments: Any) -> int:
    """Bytes of the largest NPU tensor with several elements among the arguments of an operator."""
    tensors = [each for each in tree_leaves(arguments) if isinstance(each, torch.Tensor) and each.device.type == "npu" and each.numel() > 1]
    return max((each.numel() * each.element_size() for each in tensors), default=0)


_FALLS_BACK: dict[str, bool] = {}


def _falls_back(name: str) -> bool:
    """Whether an operator, "aten::mul.Tensor", has no kernel for NPUs of its own nor one made of others."""
    if name not in _FALLS_BACK:
        _FALLS_BACK[name] = name.startswith("aten::") and not _has_kernel(name)
    return _FALLS_BACK[name]


def _has_kernel(name: str) -> bool:
    if any(has_kernel(name, key) for key in ("PrivateUse1", "CompositeExplicitAutograd", "CompositeImplicitAutograd")):
        return True
    if not has_kernel(name, "CompositeExplicitAutogradNonFunctional"):
        return False
    # A structured operator runs its out= form, aten::i0 and aten::i0.out; one whose out= form is made of it is composite itself.
    base = name.partition(".")[0].removesuffix("_")
    forms = [each for each in operator_names() if each.startswith(base + ".") and each.endswith("out")]
    return not forms or any(has_kernel(each, key) for each in forms for key in ("PrivateUse1", "CompositeExplicitAutograd"))
