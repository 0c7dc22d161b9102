"""A float64 copy of a model that takes no memory of its own: every parameter is cast where the model reads it.

The parameters stay in their dtype, shared with the model that was copied. A module's table of parameters is replaced
by one that casts a parameter to float64 when it is read and forgets the result when the next module's parameters are
read. What the model computes with are ordinary float64 parameters, so its outputs are those of a whole float64 copy,
bit for bit. Tied weights, a parent that reads `self.emb.weight` and a model that asks for `self.weight.dtype` need
nothing special.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import ItemsView, Iterator, ValuesView
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


def has_layers(model: nn.Module) -> bool:
    """Whether the parameters of `model` can be cast one by one: not where compiled code reads them past Python."""
    return not any(isinstance(module, torch.jit.ScriptModule) or _is_compiled(module) for module in model.modules())


def is_layered(model: nn.Module) -> bool:
    """Whether `layered` made `model`."""
    return any(isinstance(module._parameters, _CastingTable) for module in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith("torch._dynamo") or getattr(module, "_compiled_call_impl", None) is not None
    )


def layered(model: nn.Module) -> nn.Module:
    """A copy of `model`, on the CPU, that computes in float64 with `model`'s own parameters, cast module by module.

    Buffers are copied to float64 at once, since a model may write into them. So are parameters that are referenced
    from elsewhere than a module's table, such as the list of weights that an LSTM keeps. A parameter that the model
    writes into is kept in float64 from then on.

    Example: `layered(nn.Linear(4, 2).half())(torch.ones(1, 4).double())` is a float64 tensor (1, 2).
    """
    buffers = {id(buffer): _widened(buffer.detach(), fresh=True) for buffer in model.buffers()}
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    memo = _CountingMemo(buffers | parameters)
    copied = copy.deepcopy(model, memo)
    slots = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    lazy = {
        number
        for number, parameter in parameters.items()
        if _is_castable(parameter) and memo.hits[number] == slots[number]
    }
    if len(lazy) < len(parameters):
        for number, parameter in parameters.items():
            if number not in lazy:
                buffers[number] = nn.Parameter(_widened(parameter.detach(), fresh=True), requires_grad=False)
        copied = copy.deepcopy(model, buffers | {number: parameters[number] for number in lazy})
    casts = _Casts({number: parameters[number] for number in lazy})
    for module in copied.modules():
        if any(id(parameter) in lazy for parameter in module._parameters.values()):
            module.__dict__["_parameters"] = _CastingTable(module._parameters, casts)
    return copied


def _is_castable(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.device.type == "cpu"


def _widened(tensor: Tensor, *, fresh: bool) -> Tensor:
    """`tensor` in float64 where it is a floating-point one, with strides as `Tensor.to` keeps them."""
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=fresh)


class _CountingMemo(dict):
    """The memo of a deepcopy that counts how often each of its first entries is met."""

    def __init__(self, entries: dict[int, Any]):
        super().__init__(entries)
        self.hits: Counter[int] = Counter()
        self._watched = frozenset(entries)

    def get(self, key: Any, default: Any = None) -> Any:
        if key in self._watched:
            self.hits[key] += 1
        return super().get(key, default)


class _Casts:
    """The float64 forms of one model's parameters: those of the module that was read last, and those still in use."""

    def __init__(self, lazy: dict[int, nn.Parameter]):
        self.lazy = lazy  # the parameters that are cast, by id: alive, so that no other object gets the id of one
        self._written: dict[int, nn.Parameter] = {}
        self._recent: dict[int, tuple[nn.Parameter, tuple]] = {}
        self._alive: WeakValueDictionary[int, nn.Parameter] = WeakValueDictionary()
        self._owner: Any = None

    def wide(self, parameter: nn.Parameter, owner: object) -> nn.Parameter:
        """`parameter` in float64; the same object as long as somebody holds it."""
        number = id(parameter)
        if number in self._written:
            return self._written[number]
        cast = self._alive.get(number)
        if owner is not self._owner:
            self._release()
            self._owner = owner
            cast = self._written.get(number, cast)
        if cast is None:
            with torch.inference_mode(False), torch.no_grad():
                cast = nn.Parameter(parameter.detach().double(), requires_grad=False)
            self._alive[number] = cast
        if number not in self._recent:
            self._recent[number] = cast, _mark(cast)
        return cast

    def _release(self) -> None:
        for number, (cast, mark) in self._recent.items():
            if _mark(cast) != mark or cast._version:
                self._written[number] = cast
        self._recent.clear()


def _mark(cast: nn.Parameter) -> tuple:
    """What changes when a tensor is written into or gets other memory."""
    return cast._version, cast.data_ptr(), cast.dtype


class _CastingTable(dict):
    """A module's parameters by name, each in float64 when it is read."""

    def __init__(self, parameters: dict[str, nn.Parameter | None], casts: _Casts):
        super().__init__(parameters)
        self._casts = casts

    def __getitem__(self, name: str) -> nn.Parameter | None:
        value = super().__getitem__(name)
        return self._casts.wide(value, self) if id(value) in self._casts.lazy else value

    def __iter__(self) -> Iterator[str]:  # one of its own, so that dict(table) and {**table} go through __getitem__
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def items(self) -> ItemsView:
        return ItemsView(self)

    def values(self) -> ValuesView:
        return ValuesView(self)

    def pop(self, name: str, *default: Any) -> Any:
        value = self.get(name)
        stored = super().pop(name, *default)
        return value if id(stored) in self._casts.lazy else stored

    def copy(self) -> dict:
        return dict(self.items())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return dict, (self.copy(),)
