"""The names of torch that no documentation promises: every use of one goes through this module, and nothing else names
them.

A torch that lacks one is met in one of three ways: a documented function does the same (`set_deterministic`), the
operator counts as one that no model can call (`operator` gives None), or importing this module fails with the name.
`NAMES` lists them all; `missing()` says which the installed torch lacks, and a test asks it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import thread as futures_thread
from contextlib import AbstractContextManager
from typing import Any

from harness.versions import require_torch

require_torch()  # before a name that an older torch lacks is an ImportError

import torch  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.nn.utils import parametrize  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402
from torch.utils.weak import WeakTensorKeyDictionary  # noqa: E402

__all__ = [
    "NAMES",
    "PRIVATE_OPERATORS",
    "StorageWeakRef",
    "Together",
    "TorchDispatchMode",
    "WeakTensorKeyDictionary",
    "added_mask",
    "adopt_parametrized",
    "aten_operator",
    "attention_by_products",
    "call_kernel",
    "custom_function",
    "has_kernel",
    "in_threads",
    "in_transform",
    "missing",
    "mkldnn_enabled",
    "registered_names",
    "returns_new",
    "set_deterministic",
    "set_mkldnn_enabled",
    "tree_leaves",
    "tree_map",
    "without_functions",
]

NAMES = {  # under torch: what it is used for
    "_C._dispatch_has_kernel_for_dispatch_key": (
        "whether an operator falls back from the device to the CPU, and which are composite"
    ),
    "_C._dispatch_get_all_op_names": "the forms of an operator that falls back",
    "ops.aten.add.Tensor._op_dk": "operators that one custom or composite operator is made of, on the device",
    "_C.DispatchKey": "the same",
    "_C.DisableTorchFunction": "the operators of the emulated CANN are no calls of the model",
    "_C._functorch.peek_interpreter_stack": "whether vmap or torch.func.grad transforms what is called",
    "_C._get_mkldnn_enabled": "the process without torch_npu computes as this one does",
    "_C._set_mkldnn_enabled": "the same",
    "_C._set_deterministic_algorithms": "the same",
    "multiprocessing.reductions.StorageWeakRef": "which memory of a model was filled with random numbers",
    "nn.utils.parametrize._inject_new_class": "modules with weight_norm in the process without torch_npu",
    "nn.utils.parametrize._inject_property": "the same",
    "utils._python_dispatch.TorchDispatchMode": "float64 references, forecasts, fallbacks",
    "utils._pytree.tree_leaves": "tensors among arguments",
    "utils._pytree.tree_map": "the same",
    "utils.weak.WeakTensorKeyDictionary": "localisation: which tensor of the device belongs to which of the CPU",
}
PRIVATE_OPERATORS = {  # of torch.ops.aten, asked for by name: the first torch that has it
    "_grouped_mm": (2, 8),
    "_log_softmax": (2, 5),
    "_scaled_dot_product_attention_math": (2, 5),
    "_scaled_dot_product_flash_attention_for_cpu": (2, 5),
    "_softmax": (2, 5),
    "_upsample_bicubic2d_aa": (2, 5),
    "_upsample_bilinear2d_aa": (2, 5),
}


def missing() -> dict[str, str]:
    """The names that the installed torch lacks, operators of its version or older among them, and what they are used
    for.
    """
    lacking = {name: what for name, what in NAMES.items() if _at(name) is None}
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    lacking |= {
        f"ops.aten.{name}": "an operator"
        for name, since in PRIVATE_OPERATORS.items()
        if version >= since and aten_operator(name) is None
    }
    return lacking


def _at(path: str) -> Any:
    """What is at a dotted path under torch; None where there is nothing."""
    return functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), torch)


@functools.cache
def returns_new(func: Any) -> bool:
    """Whether an operator returns tensors of its own, neither views nor what it was given."""
    return all(item.alias_info is None for item in func._schema.returns)


def aten_operator(name: str) -> Any | None:
    """torch.ops.aten's operator of a name, all its overloads; None in a torch that has none."""
    return getattr(torch.ops.aten, name, None)


def attention_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: Any
) -> torch.Tensor:
    """scaled_dot_product_attention by matrix products; `mask` is of bools or is added to the scores."""
    return aten_operator("_scaled_dot_product_attention_math")(
        query, key, value, added_mask(mask, query.dtype), **options
    )[0]


def added_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of bools as what is added to the scores: the operator that takes no bools would add True as 1."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), -torch.inf)


def has_kernel(name: str, key: str) -> bool:
    """Whether the dispatcher has a kernel of an operator, "aten::mul.Tensor", for a key, "PrivateUse1"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def call_kernel(func: Any, key: str, args: tuple, kwargs: dict) -> Any:
    """What an operator's kernel for a key, "CompositeExplicitAutograd", returns; modes see the operators that it
    calls.
    """
    return func._op_dk(getattr(torch._C.DispatchKey, key), *args, **kwargs)


def in_transform() -> bool:
    """Whether vmap or torch.func.grad transforms what is called here: no tensor has memory that can be read then."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def without_functions() -> AbstractContextManager:
    """A block in which no TorchFunctionMode sees what is called."""
    return torch._C.DisableTorchFunction()


def custom_function(tensor: torch.Tensor) -> str:
    """The name of the torch.autograd.Function of a model's own that returned a tensor; "" where none did."""
    made = getattr(type(tensor.grad_fn), "_forward_cls", None)
    return getattr(made, "__qualname__", "")


def registered_names() -> list[str]:
    """Every operator that is registered, with its overload: "aten::mul.Tensor"."""
    return torch._C._dispatch_get_all_op_names()


def set_deterministic(mode: bool, *, warn_only: bool) -> None:
    """torch.use_deterministic_algorithms, which also imports the compiler, for a second."""
    quick = _at("_C._set_deterministic_algorithms")
    (torch.use_deterministic_algorithms if quick is None else quick)(mode, warn_only=warn_only)


def mkldnn_enabled() -> bool:
    """Whether oneDNN is there and may compute."""
    enabled = _at("_C._get_mkldnn_enabled")
    return torch.backends.mkldnn.is_available() and (enabled is None or bool(enabled()))


def set_mkldnn_enabled(enabled: bool) -> None:
    """Let oneDNN compute or not; a torch without the switch keeps what it has."""
    switch = _at("_C._set_mkldnn_enabled")
    if switch is not None:
        switch(enabled)


class Together:
    """Several of torch's modes, entered in their order and left in the reverse one."""

    def __init__(self, modes: Sequence[AbstractContextManager]):
        self.modes = modes

    def __enter__(self) -> Together:
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*raised)


class _PassesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _PassesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _retire(mode: Any) -> None:
    """Have a mode that another thread has entered, and which only that thread could leave, do nothing any more."""
    for item in mode.modes if isinstance(mode, Together) else (mode,):
        item.__class__ = _PassesFunctions if isinstance(item, TorchFunctionMode) else _PassesOperators


@contextlib.contextmanager
def in_threads(make: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Enter the mode that `make()` gives, here and in every thread that `threading` starts while the block runs.

    `make()` gives one of torch's modes or a `Together` of some. torch keeps its modes by thread: in a thread that
    outlives the block the mode stays and does nothing. A pool of threads enters it for every piece of work that
    `submit` hands to it.
    """
    before, open_, inside = threading.getprofile(), [True], {threading.get_ident()}
    elsewhere: list[Any] = []

    def enter(frame: Any, event: str, argument: Any) -> None:
        sys.setprofile(before)
        if open_ and not _is_of_a_pool(threading.current_thread()):
            inside.add(threading.get_ident())
            elsewhere.append(make())
            elsewhere[-1].__enter__()

    def submit(pool: ThreadPoolExecutor, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        def within(*args: Any, **kwargs: Any) -> Any:
            with make() if open_ and threading.get_ident() not in inside else contextlib.nullcontext():
                return function(*args, **kwargs)

        return submitted(pool, within, *args, **kwargs)

    submitted = ThreadPoolExecutor.submit
    with make():
        threading.setprofile(enter)
        ThreadPoolExecutor.submit = submit
        try:
            yield
        finally:
            open_.clear()
            threading.setprofile(before)
            ThreadPoolExecutor.submit = submitted
            for mode in elsewhere:
                _retire(mode)


def _is_of_a_pool(thread: threading.Thread) -> bool:
    """Whether a thread waits for the work of a ThreadPoolExecutor, whose `submit` enters the mode."""
    work = getattr(futures_thread, "_worker", None)  # not documented either, and there since Python 3.2
    return work is not None and getattr(thread, "_target", None) is work


def adopt_parametrized(module: torch.nn.Module) -> None:
    """Make a module whose parametrized tensors were restored into one of the class that torch makes for them."""
    parametrize._inject_new_class(module)
    for name in module.parametrizations:
        parametrize._inject_property(module, name)
