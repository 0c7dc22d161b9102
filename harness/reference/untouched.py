"""Copies of a model for one run each: the weights are shared, all else is the copy's own."""

from __future__ import annotations

import copy
import pickle
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import CaseError
from harness.reference.layers import is_layered

_MANY = 4  # changes that are named; of more, their number
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_OWN_COPY = ("__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__new__")


def untouched(model: nn.Module) -> nn.Module:
    """A copy of `model` to be run, which takes no memory but that of its buffers and attributes.

    Its parameters are tensors of their own on the memory of `model`'s, so that what is written into one shows in
    both (`versions`); buffers, attributes and hooks are copied.

    Raises: CaseError for a model that cannot be copied.
    """
    memo: dict[int, Any] = {
        id(parameter): _alias(parameter) for parameter in model.parameters() if type(parameter) is nn.Parameter
    }
    memo |= {id(buffer): buffer.detach().clone() for buffer in model.buffers() if type(buffer) is Tensor}
    return deep_copy(model, memo)


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy(model, memo)`, several times as fast for modules that torch copies in the usual way.

    Raises: CaseError for a model that cannot be copied.
    """
    try:
        return _copied(model, memo)
    except (TypeError, RuntimeError, NotImplementedError, AttributeError, pickle.PicklingError) as error:
        message = " ".join(str(error).split())
        text = f"the model cannot be copied: {type(error).__name__}: {message[:200]}; every side runs a copy of its own"
        raise CaseError(f"{text}: keep locks, files and streams out of its attributes") from error


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    alias.__dict__.update(parameter.__dict__)
    return alias


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in (dict, OrderedDict):
        made = memo[id(value)] = kind()
        for name, item in value.items():
            made[_copied(name, memo)] = _copied(item, memo)
        return made
    if not isinstance(value, nn.Module) or not _is_usual(kind):
        return copy.deepcopy(value, memo)
    made = memo[id(value)] = kind.__new__(kind)
    for name, item in value.__dict__.items():
        made.__dict__[name] = _copied(item, memo)
    return made


_USUAL: dict[type, bool] = {}


def _is_usual(kind: type) -> bool:
    """Whether a class of modules leaves to torch how its modules are copied."""
    if kind not in _USUAL:
        _USUAL[kind] = all(getattr(kind, name, None) == getattr(nn.Module, name, None) for name in _OWN_COPY)
        _USUAL[kind] &= not any("__slots__" in vars(item) for item in kind.__mro__[:-1])
    return _USUAL[kind]


def versions(model: nn.Module) -> dict[str, int]:
    """A number for each parameter that grows when the parameter, or a copy that shares its memory, is written into.

    None for a model that casts its weights as it uses them: all casts would be there at once.
    """
    return {} if is_layered(model) else {name: version(parameter) for name, parameter in model.named_parameters()}


def version(tensor: Tensor) -> int:
    """A number that grows when the memory of a tensor is written into; 0 for a tensor of inference mode, which has
    none.
    """
    return 0 if tensor.is_inference() else tensor._version


# -------- what a run changed


def changes(used: nn.Module, before: nn.Module) -> str:
    """What differs between a model that has run and one that has not, in words; "" where nothing does.

    Parameters, buffers and attributes are named: "attribute calls (2 where 0 was)".
    """
    result = list(_changes(used, before))
    more = [f"{len(result) - _MANY} more"] if len(result) > _MANY else []
    return ", ".join(result[:_MANY] + more)


def _changes(used: nn.Module, before: nn.Module) -> Iterator[str]:
    then = dict(before.named_modules(remove_duplicate=False))
    for path, module in used.named_modules(remove_duplicate=False):
        at = f"{path}." if path else ""
        if path not in then:
            yield f"module {path}, which was not there"
            continue
        for what, table in (("parameter", "_parameters"), ("buffer", "_buffers")):
            old = dict(getattr(then[path], table))
            for name, tensor in dict(getattr(module, table)).items():
                if not _equal(tensor, old.get(name)):
                    yield f"{what} {at}{name}"
        old = {name: item for name, item in then[path].__dict__.items() if name not in _TABLES}
        for name, value in module.__dict__.items():
            former = old.get(name, getattr(type(module), name, _ABSENT))
            if name not in _TABLES and not _equal(value, former):
                yield f"attribute {at}{name}{_change_text(value, former)}"


_TABLES = ("_parameters", "_buffers", "_modules")
_ABSENT = object()


def _change_text(value: Any, old: Any) -> str:
    if old is _ABSENT:
        return " (it was not there)"
    if type(value) in _PLAIN and type(old) in _PLAIN:
        return f" ({str(value)[:40]} where {str(old)[:40]} was)"
    return ""


def _equal(value: Any, old: Any, depth: int = 0) -> bool:
    """Whether two values hold the same, as far as can be told."""
    if value is old or depth > 8:
        return True
    if isinstance(value, Tensor) and isinstance(old, Tensor):
        same = value.shape == old.shape and value.dtype == old.dtype
        return same and torch.equal(torch.nan_to_num(value.detach().cpu()), torch.nan_to_num(old.detach().cpu()))
    if type(value) is not type(old):
        return False
    if isinstance(value, Mapping):
        return value.keys() == old.keys() and all(_equal(value[name], old[name], depth + 1) for name in value)
    if isinstance(value, (list, tuple)):
        return len(value) == len(old) and all(_equal(*item, depth + 1) for item in zip(value, old))
    if isinstance(value, torch.Generator):
        return torch.equal(value.get_state(), old.get_state())
    if isinstance(value, random.Random):
        return value.getstate() == old.getstate()
    if hasattr(value, "bit_generator"):  # numpy.random.Generator
        return str(value.bit_generator.state) == str(old.bit_generator.state)
    if isinstance(value, (*_PLAIN, set, frozenset)):
        return value == old or value != value
    if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
        return _equal(vars(value), vars(old), depth + 1)
    return True
