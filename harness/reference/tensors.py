"""Trees of tensors, as models take and return them: moved, copied, named, digested."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from harness.errors import CaseError

_DEPTH = 6  # objects and containers inside of one another that are looked into


def move(value: Any, *, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """`value` with every tensor in it on `device`, and the floating-point ones in `dtype`."""
    return with_tensors_changed(
        value,
        lambda tensor: tensor.to(
            device=device, dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        ),
    )


def fresh(value: Any) -> Any:
    """A copy of what a model is given: one that writes into its inputs must not find its own writing in the next
    run.
    """
    return with_tensors_changed(value, torch.clone)


def with_tensors_changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: with_tensors_changed(item, change) for name, item in value.items()}
    if isinstance(value, PackedSequence):  # its lengths are integers that stay on the CPU
        order = (with_tensors_changed(item, change) for item in (value.sorted_indices, value.unsorted_indices))
        return PackedSequence(change(value.data), value.batch_sizes.clone(), *order)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(with_tensors_changed(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(with_tensors_changed(item, change) for item in value)
    fields = _fields_of(value)
    if fields is None:
        return value
    copied = copy.copy(value)
    for name, field in fields.items():
        object.__setattr__(copied, name, with_tensors_changed(field, change))
    return copied


def tensors_of(value: Any, what: str) -> dict[str, Tensor]:
    """The tensors in what a model returned, by name: "output" for a bare one, else keys and positions joined by dots.

    Objects are looked into: dataclasses, caches, distributions. Numbers, texts and None among tensors are passed over.

    Raises: CaseError when there is none, two have one name, or something can neither be looked into nor passed over.
    """
    pairs = list(_flatten(value, what))
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CaseError(
            f"{what} returned two tensors that are both called {twice!r}; one of them would hide the other: "
            "rename a key"
        )
    if not result:
        raise CaseError(
            f"{what} returned {tensor_kind(value)}: nothing to compare; return a tensor, or tensors in a tuple or dict"
        )
    return result


def _flatten(value: Any, what: str) -> Iterator[tuple[str, Tensor]]:
    for name, leaf in leaves(value):
        if isinstance(leaf, Tensor):
            if leaf.layout is not torch.strided:
                layout = str(leaf.layout).removeprefix("torch.")
                raise CaseError(
                    f"{what} returned a tensor of the layout {layout} as {name or 'output'!r} where a dense one was"
                    " expected; give its `.to_dense()`"
                )
            yield name or "output", leaf
        elif leaf is not None and not (name and is_plain(leaf)):
            at = f" at {name!r}" if name else ""
            raise CaseError(
                f"{what} returned {tensor_kind(leaf)}{at} where a tensor was expected; let `forward` pick the tensors"
            )


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What nested mappings, tuples, lists and objects hold, by keys, positions and attributes joined by dots; "" for a
    bare value. An array of numpy counts as a tensor.
    """
    parts: Iterable[tuple[Any, Any]]
    if is_plain(value):
        yield prefix, value
        return
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (tuple, list)):
        parts = enumerate(value)
    elif (fields := _fields_of(value)) is not None:
        parts = fields.items()
    else:
        yield prefix, as_tensor(value)
        return
    for name, part in parts:
        yield from leaves(part, f"{prefix}.{name}" if prefix else str(name))


def is_plain(value: Any) -> bool:
    """Whether a value holds no tensor and never will: a number, a text, a dtype, a size, a member of an enumeration."""
    return isinstance(value, (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.Size))


def as_tensor(value: Any) -> Any:
    """An array of numpy with numbers as the tensor of the same memory; any other value as it is."""
    if type(value).__module__ != "numpy" or not hasattr(value, "dtype"):
        return value
    try:
        return torch.as_tensor(value)
    except TypeError:  # texts and objects
        return value


def _fields_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that hold tensors, by name; None for what is no such object.

    An object is an instance of a class that Python code defined, such as a dataclass, a cache of keys and values or a
    distribution. Modules, functions, classes and tensors are none, and neither is an object without a tensor in it.
    """
    own = getattr(value, "__dict__", None)
    closed = isinstance(value, (Tensor, nn.Module, PackedSequence, type, ModuleType, Mapping, tuple, list))
    if not isinstance(own, dict) or closed or (callable(value) and not dataclasses.is_dataclass(value)):
        return None
    public = {name: item for name, item in own.items() if not name.startswith("_") and _holds_tensors(item, 0)}
    return public or None


def _holds_tensors(value: Any, depth: int) -> bool:
    """Whether there is a tensor within `_DEPTH` steps of nested values and attributes."""
    if isinstance(value, Tensor) or (type(value).__module__ == "numpy" and isinstance(as_tensor(value), Tensor)):
        return True
    if depth > _DEPTH or is_plain(value):
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensors(item, depth + 1) for item in value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_tensors(item, depth + 1) for item in value)
    own = getattr(value, "__dict__", None)
    if not isinstance(own, dict) or isinstance(value, (nn.Module, type, ModuleType)) or callable(value):
        return False
    return any(_holds_tensors(item, depth + 1) for name, item in own.items() if not name.startswith("_"))


def tensor_kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of CPU tensors."""
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        if flat.numel():
            total.update(flat.view(torch.uint8).numpy())
    return total.hexdigest()


def inputs_digest(value: Any, what: str) -> str:
    """`digest` of the tensors among a model's inputs, and of the numbers and texts beside them where there are some.

    Raises: CaseError as `tensors_of` does.
    """
    result = digest(tensors_of(value, what))
    plain = [f"{name}={leaf!r}" for name, leaf in leaves(value) if is_plain(leaf)]
    return hashlib.sha256("\n".join([result, *plain]).encode()).hexdigest() if plain else result


def weights_digest(model: nn.Module, *, strict: bool = True) -> str:
    """sha256 over the names, dtypes, shapes and bytes of parameters and buffers, tied ones under each of their names.

    sha256 because processors compute it: it runs at 1.4 GB/s a core with the SHA instructions of x86 and Armv8 (Kunpeng
    has them) where blake2b runs at 0.8; the 1.24 GB of AIMv2-large take 1.4 s on one core. Without `strict` a tensor
    whose content cannot be read counts by its dtype and shape.

    Raises: CaseError with `strict` for a tensor without readable content, such as one on the meta device.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = {id(tensor): tensor for _, tensor in named}
    with ThreadPoolExecutor() as threads:  # hashlib lets other threads run while it reads
        contents = dict(zip(tensors, threads.map(lambda value: content_digest(value, strict=strict), tensors.values())))
    total = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda value: value[0]):
        total.update(f"{name} {contents[id(tensor)]}\n".encode())
    return total.hexdigest()


def content_digest(tensor: Tensor, *, strict: bool = True) -> str:
    """sha256 of one tensor, or without `strict` its dtype and shape where it has no content that can be read. Raises:
    CaseError.
    """
    try:
        return digest({"": tensor.detach().cpu()})
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if not strict:
            return f"{tensor.dtype} {tuple(tensor.shape)}"
        raise CaseError(
            f"a {type(tensor).__name__} of {tuple(tensor.shape)} on {tensor.device} has no content that can be read "
            f"({error})"
        ) from None
