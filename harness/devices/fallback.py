"""What the CPU computes while a model runs on an NPU: operators that fall back, and what the model brings there
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from harness import last_operator
from harness.torch_private import (
    TorchDispatchMode,
    WeakTensorKeyDictionary,
    call_kernel,
    has_kernel,
    registered_names,
    tree_leaves,
)


@dataclass(kw_only=True)
class Watched:
    """What `Device.watch` saw."""

    fell_back: list[str] = field(default_factory=list)  # operators that the CPU computed in place of the device
    on_host: list[str] = field(
        default_factory=list
    )  # operators that the model's own code ran on the CPU, on values from the device
    operators: set[str] = field(default_factory=set)  # names of the operators on the device's tensors
    computed: int | None = None  # operators that ran on the device, but for copies and views; None where nobody counts
    blind: str = ""  # where the model raises only while it is watched; nothing was seen then
    # Tensors on the CPU whose values come from the device.
    brought: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary, repr=False)
    exported: bool = False  # whether such values were handed to what is not torch's


class Watch(TorchDispatchMode):
    """Sees every operator on a device's tensors and asks the dispatcher whether an NPU has a kernel for it.

    torch_npu says so itself only on standard error, and once for each operator in a process. Where it calls the CPU
    itself, inside a kernel, nothing says so; on an emulated device `to_host` counts the bytes that come back, and an
    operator that brings its inputs back is one. An operator that is made of others, a custom one or any in inference
    mode, is taken apart, so that those are seen.
    """

    def __init__(self, seen: Watched, to_host: Callable[[], int] | None = None, kind: str = "npu"):
        super().__init__()
        self.seen, self.to_host, self.kind = seen, to_host, kind
        self.inside: list[str] = []  # the custom operators that run
        self.sizes: set[int] = set()  # elements of the tensors that were brought to the CPU
        self.made = WeakTensorKeyDictionary()  # tensors on the CPU that torch made of nothing, such as ranges

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        last_operator.note(name)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if tensor.device.type == self.kind]
        made = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == self.kind
        if not there and not made:
            return self._on_host(func, name, tensors, args, kwargs)
        self.seen.operators.add(name)
        key = _apart(name) if there else None
        if key is not None:
            return self._taken_apart(func, name, key, args, kwargs)
        if self.kind == "npu" and _falls_back(name):
            self._add(name)
        if name.startswith(_COPIES):
            result = func(*args, **kwargs)
            self._copied(result, args, tensors)
            return result
        if self.to_host is None:
            result = func(*args, **kwargs)
        else:
            before, size = self.to_host(), _largest(there)
            result = func(*args, **kwargs)
            if size and self.to_host() - before >= size:
                self._add(name)
        self._count(func, name, result, tensors)
        return result

    def _taken_apart(self, func: Any, name: str, key: str, args: tuple, kwargs: dict) -> Any:
        self.inside.append(name)
        try:
            with self:
                return call_kernel(func, key, args, kwargs)
        finally:
            self.inside.pop()

    def _count(self, func: Any, name: str, outcome: Any, tensors: list[Tensor]) -> None:
        """Count an operator that gave new values on the device, and no view, no empty memory and no copy."""
        if name.startswith(_MEMORY):
            return
        memory = set() if func._schema.is_mutable else {_memory(tensor) for tensor in tensors}
        results = [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor) and leaf.device.type == self.kind]
        if any(_memory(result) not in memory for result in results):
            self.seen.computed = (self.seen.computed or 0) + 1

    def _copied(self, result: Any, args: tuple, tensors: list[Tensor]) -> None:
        """Note a tensor of fractions that came to the CPU, and one that goes back without having been seen on its
        way.
        """
        if not isinstance(result, Tensor) or result.numel() < 2 or not result.is_floating_point():
            return
        sources = [tensor for tensor in tensors if tensor is not result]
        if result.device.type == "cpu":
            if any(source.device.type == self.kind for source in sources):
                self.seen.brought[result] = True
                self.sizes.add(result.numel())
        elif sources and all(source.device.type == "cpu" and source not in self.seen.brought for source in sources):
            foreign = self.seen.exported and any(source not in self.made for source in sources)
            if foreign or result.numel() in self.sizes:
                self._add_host("what is not torch's, such as numpy")

    def _on_host(self, func: Any, name: str, tensors: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """An operator on the CPU's tensors: noted where it computes with values that came from the device."""
        result = func(*args, **kwargs)
        if not any(tensor in self.seen.brought for tensor in tensors):
            if all(tensor in self.made for tensor in tensors):
                self.made.update({leaf: True for leaf in tree_leaves(result) if isinstance(leaf, Tensor)})
            return result
        memory = {_memory(tensor) for tensor in tensors}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self.seen.brought[leaf] = True
                new = _memory(leaf) not in memory or func._schema.is_mutable
                if new and not name.startswith((*_COPIES, *_MEMORY)):
                    self._add_host(name)
        return result

    def _add_host(self, name: str) -> None:
        if self.inside:  # a custom operator is to compute on the device
            self._add(self.inside[0])
        elif name not in self.seen.on_host:
            self.seen.on_host.append(name)

    def _add(self, name: str) -> None:
        if name not in self.seen.fell_back:
            self.seen.fell_back.append(name)


class AsUnwatched(TorchFunctionMode):
    """Lets torch take the way that it takes where no mode looks on, and sees what leaves torch, as for numpy.

    `ctc_loss` with lengths in tensors makes whole numbers of them and calls an operator that NPUs have; while a mode is
    active it calls one that takes tensors, which NPUs lack (aten/src/ATen/native/LossCTC.cpp,
    `areAnyTensorSubclassLike`). torch.nn's encoder layers and attention ask whether a mode like this one is active, and
    call one fused operator where none is, which NPUs lack as well: they are told of subclasses of Tensor alone.
    """

    EXPORTS = (Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.tolist)

    def __init__(self, seen: Watched):
        super().__init__()
        self.seen = seen
        self._asked: list[Any] = []  # torch's own `has_torch_function`, once for each time that this mode was entered

    def __enter__(self) -> AsUnwatched:
        self._asked.append(torch.overrides.has_torch_function)
        torch.overrides.has_torch_function = _has_subclass
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.overrides.has_torch_function = self._asked.pop()
        super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.EXPORTS and args[0].is_floating_point() and args[0].numel() > 1:
            self.seen.exported |= args[0].device.type != "cpu" or args[0] in self.seen.brought
        if func in (F.ctc_loss, torch.ctc_loss):
            args = (*args[:2], *map(_whole_numbers, args[2:4]), *args[4:])
            kwargs = {name: _whole_numbers(item) if name in _LENGTHS else item for name, item in kwargs.items()}
        return func(*args, **kwargs)


def _has_subclass(relevant_args: Iterable[Any]) -> bool:
    """As `torch.overrides.has_torch_function` where no mode is active."""
    plain = (Tensor, torch.nn.Parameter)
    return any(type(item) not in plain and hasattr(type(item), "__torch_function__") for item in relevant_args)


_LENGTHS = ("input_lengths", "target_lengths")


def _whole_numbers(value: Any) -> Any:
    return value.flatten().tolist() if isinstance(value, Tensor) else value


_COPIES = (
    "aten::copy_",
    "aten::_to_copy",
    "aten::to.",
    "aten::type_as",
    "aten::_copy_from",
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
)
_MEMORY = (
    "aten::empty",
    "aten::new_empty",
    "aten::detach",
    "aten::clone",
    "aten::contiguous",
    "aten::alias",
    "aten::lift_fresh",
)


def _memory(tensor: Tensor) -> tuple:
    """What tells the memory of one tensor from that of another."""
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a tensor without memory of its own
        return tensor.device, id(tensor)


def _largest(there: list[Tensor]) -> int:
    """Bytes of the largest tensor with several elements."""
    return max((tensor.numel() * tensor.element_size() for tensor in there if tensor.numel() > 1), default=0)


_APART: dict[str, str | None] = {}


def _apart(name: str) -> str | None:
    """The kernel by which an operator is taken apart into others: of a custom one, and in inference mode of a composite
    one.
    """
    if name not in _APART:
        known = name.startswith(("aten::", "npu::", "prim::", "prims::", "profiler::", "c10d::"))
        keys = (
            ("CompositeImplicitAutograd",)
            if known
            else ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "PrivateUse1")
        )
        own = known and (name.startswith(_COPIES) or has_kernel(name, "PrivateUse1"))
        _APART[name] = None if own else next((key for key in keys if has_kernel(name, key)), None)
    return _APART[name]


_FALLS_BACK: dict[str, bool] = {}


def _falls_back(name: str) -> bool:
    """Whether an operator, "aten::mul.Tensor", has no kernel for NPUs of its own nor one made of others."""
    if name not in _FALLS_BACK:
        _FALLS_BACK[name] = not _has_kernel(name)
    return _FALLS_BACK[name]


def _has_kernel(name: str) -> bool:
    if any(has_kernel(name, key) for key in ("PrivateUse1", "CompositeExplicitAutograd", "CompositeImplicitAutograd")):
        return True
    if not has_kernel(name, "CompositeExplicitAutogradNonFunctional"):
        return False
    # A structured operator runs its out= form, aten::i0 and aten::i0.out; one whose out= form is made of it is
    # composite itself.
    base = name.partition(".")[0].removesuffix("_")
    forms = [
        operator_name
        for operator_name in registered_names()
        if operator_name.startswith(base + ".") and operator_name.endswith("out")
    ]
    return not forms or any(
        has_kernel(form, key) for form in forms for key in ("PrivateUse1", "CompositeExplicitAutograd")
    )
