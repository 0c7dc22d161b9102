"""A run of the model on the device by itself, as the row had it: what it calls, what its operators write, what it
returns.

Lockstep makes the CPU's calls on the device, so it sees neither a path that the model takes on the device alone nor
memory that an operator changes and must not. Here the device's own calls are recorded: `partings` (calls.py) holds them
against the CPU's, and `Memory` compares what an operator may not write, before and after it.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.locate.replay import FAILS, mutates, name_of, running_statistics, tensors_in, trains
from harness.locate.trace import Trace
from harness.reference import version
from harness.torch_private import in_transform

_LARGEST = 256 << 20  # bytes of one storage up to which its content is compared
_BESIDE, _NEAREST = (
    1 << 20,
    8,
)  # bytes and tensors, the nearest, that a call is not given and that are compared all the same


class Recorder(TorchFunctionMode):
    """Records the calls of a run that give tensors in a trace. `path`: of the module that runs, innermost last."""

    def __init__(self, path: list[str], trace: Trace, memory: WatchedMemory | None = None):
        super().__init__()
        self.path, self.trace, self.memory = path, trace, memory

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        memory = None if in_transform() else self.memory
        before = memory.before(func, args, kwargs) if memory is not None else None
        traced = self.trace.before(func, tensors_in((args, kwargs)))
        returned = func(*args, **kwargs)
        results = tensors_in(returned)
        wrote = memory.after(before, results, self._name(func)) if memory is not None else ""
        self.trace.after(traced, func, args, kwargs, results, self.path[-1], wrote)
        return returned

    def _name(self, func: Callable) -> str:
        return f"{self.path[-1] or 'the model'}: {name_of(func)}"


# -------- memory


@dataclass(frozen=True, kw_only=True)
class _StoredContent:
    """The content of a storage before a call, as elements of a tensor in it."""

    like: Tensor  # any tensor in the storage
    content: Tensor  # all of it, on the CPU
    given: tuple[Tensor, ...]  # the call's tensors in it, none of memory that it is not given


class WatchedMemory:
    """Compares memory before and after each call, where the call must not write.

    That is the storages of its tensors, but for what it says that it writes, with all that lies beside them in the same
    storage, and as much as `BESIDE` of other live tensors. Storages above `_LARGEST` are not compared, and none is
    after `until`, a time.monotonic(), of tensors on devices of the type `kind`: `unwatched` counts the calls that were
    not compared whole.
    """

    def __init__(self, model: nn.Module, until: float, kind: str):
        self.until, self.unwatched, self.kind = until, 0, kind  # kind: the type of the device
        self.live: dict[int, weakref.ref] = {}  # tensors, by the address of their storage
        self.made: dict[int, tuple[str, tuple[int, ...]]] = {}  # who made it, in words, and the shape
        for name, item in [*model.named_parameters(), *model.named_buffers()]:
            self._note(item, f"the weight {name}")

    def _address(self, tensor: Tensor) -> int | None:
        """The address of a tensor's storage; None of one without memory, or with memory of another kind or device."""
        if tensor.layout != torch.strided or tensor.device.type != self.kind or not tensor.numel():
            return None
        try:
            return tensor.untyped_storage().data_ptr() or None
        except FAILS:
            return None

    def _elements(self, like: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Which elements of the storage of `like` lie in any of `tensors`."""
        result = torch.zeros(like.untyped_storage().nbytes() // like.element_size(), dtype=torch.bool)
        for tensor in tensors:
            if self._address(tensor) != self._address(like):
                continue
            if tensor.element_size() != like.element_size():  # a view of another dtype: all of it
                return torch.ones_like(result)
            result.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        return result

    def _note(self, tensor: Tensor, made: str) -> None:
        address = self._address(tensor)
        if address is None:
            return
        old = self.live.get(address)
        if old is None or old() is None:
            whole = tensor.is_contiguous() and not tensor.storage_offset()
            self.made[address] = made, tuple(tensor.shape) if whole else ()
            self.live[address] = weakref.ref(tensor)

    def before(self, func: Callable, args: tuple, kwargs: dict) -> tuple | None:
        """What is kept of a call before it is made."""
        if getattr(func, "__name__", "") == "__get__":
            return None
        given = [tensor for tensor in tensors_in((args, kwargs)) if self._address(tensor) is not None]
        if time.monotonic() > self.until:
            self.unwatched += 1
            return None
        by_address: dict[int, list[Tensor]] = {}
        for argument in given:
            by_address.setdefault(self._address(argument), []).append(argument)
        contents = []
        for tensors in by_address.values():
            if tensors[0].untyped_storage().nbytes() > _LARGEST:
                self.unwatched += 1
            else:
                contents.append(
                    _StoredContent(like=tensors[0].detach(), content=_content(tensors[0]), given=tuple(tensors))
                )
        contents += self._beside(by_address)
        written = _written(func, args, kwargs)
        return contents, written, [(argument, version(argument)) for argument in given]

    def _beside(self, addresses: dict[int, Any]) -> list[_StoredContent]:
        """Other live memory, the nearest: as much as `BESIDE` and `NEAREST`."""
        self.live = {address: ref for address, ref in self.live.items() if ref() is not None}
        others = [address for address in self.live if address not in addresses]
        others.sort(key=lambda address: min((abs(address - item) for item in addresses), default=0))
        result, left = [], _BESIDE
        for address in others[:_NEAREST] if addresses else ():
            tensor = self.live[address]()
            if tensor is None or self._address(tensor) != address or tensor.untyped_storage().nbytes() > left:
                break
            left -= tensor.untyped_storage().nbytes()
            result.append(_StoredContent(like=tensor.detach(), content=_content(tensor), given=()))
        return result

    def after(self, before: tuple | None, results: list[Tensor], name: str) -> str:
        """What a call changed and must not, in words; "" for nothing."""
        changes = []
        if before is not None:
            contents, written, versions = before
            grown = [item for item, then in versions if version(item) != then]
            allowed = written or grown
            for item in contents:
                text = self._changed(item, [*allowed, *(results if written else ())])
                changes += [text] if text else []
        for result in results:
            self._note(result, f"what {name} returned")
        return "; ".join(changes)

    def _changed(self, stored: _StoredContent, allowed: list[Tensor]) -> str:
        now = _content(stored.like)
        if now.shape != stored.content.shape or torch.equal(now, stored.content):
            return ""
        size = stored.like.element_size()
        changed = (now != stored.content).view(-1, size).any(1)
        changed &= ~self._elements(stored.like, allowed)
        if not bool(changed.any()):
            return ""
        inside = bool((changed & self._elements(stored.like, stored.given)).any())
        made, shape = self.made.get(self._address(stored.like), ("", ()))
        whole = math.prod(shape) == changed.numel() and shape
        where = [
            tuple(int(part) for part in torch.unravel_index(item, shape)) if whole else int(item)
            for item in changed.nonzero().flatten()[[0, -1]]
        ]
        what = "wrote into its input, which it must not" if inside else "wrote into memory beside its input"
        what = what if stored.given else "wrote into memory that it was not given"
        first = int(changed.nonzero()[0])
        old, new = (tensor.view(stored.like.dtype)[first].item() for tensor in (stored.content, now))
        extent = f"the first at {where[0]}" + (f", the last at {where[1]}" if where[1] != where[0] else "")
        of = f" of {made}" if made else ""
        return (
            f"it {what}: {int(changed.sum())} of {changed.numel()} elements{of}, {extent}: {_number(new)} where "
            f"{_number(old)} was"
        )


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)


def _whole(tensor: Tensor) -> Tensor:
    """All elements of a tensor's storage."""
    tensor = tensor.detach()
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _content(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's storage, on the CPU."""
    return _whole(tensor).to("cpu", copy=True).view(torch.uint8)


def _written(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that a call says it writes: by its name, out=, or its schema."""
    if trains(func, args, kwargs):
        return running_statistics(func, args, kwargs)
    if mutates(func, kwargs):
        return tensors_in(kwargs["out"]) if kwargs.get("out") is not None else tensors_in(args)[:1]
    overloads = [getattr(func, overload) for overload in func.overloads()] if hasattr(func, "overloads") else [func]
    result = []
    for schema in filter(None, (getattr(overload, "_schema", None) for overload in overloads)):
        for number, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                result += tensors_in(value)
    return result
