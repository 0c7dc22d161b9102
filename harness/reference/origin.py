"""Where the weights of a model come from: drawn while it was built, computed, or brought from elsewhere."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy.random  # here: a model() that imports it first would look as if it had drawn
import torch
from torch import Tensor, nn

from harness.torch_private import StorageWeakRef, TorchDispatchMode, in_threads, tree_leaves


class Origin(Enum):
    """Where values come from. `value` is how a report's `weights_from` begins."""

    RANDOM = ""  # all that was not computed was drawn
    LOADED = "loaded"  # nothing was drawn: read from files, or there before
    PARTLY = "partly"  # some was drawn and some was not
    COMPUTED = "built"  # of constants alone
    NONE = "none"  # there are no weights


class Origins:
    """What `watch_origins` saw."""

    def __init__(self) -> None:
        self.storages: dict[
            StorageWeakRef, Origin
        ] = {}  # memory that an operator filled; a weak reference keeps its address from others
        self.elsewhere = False  # whether numpy or Python drew random numbers

    def of(self, model: nn.Module) -> Origin:
        """Where the floating-point parameters of `model` come from, or where it has none its buffers."""
        weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
        weights = weights or [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        result = {self.of_tensor(weight) for weight in weights}
        if not result:
            return Origin.NONE
        if Origin.RANDOM in result:
            return Origin.PARTLY if Origin.LOADED in result else Origin.RANDOM
        if self.elsewhere:  # numbers that numpy drew look like numbers that were read
            return Origin.PARTLY
        return Origin.LOADED if Origin.LOADED in result else Origin.COMPUTED

    def of_tensor(self, tensor: Tensor) -> Origin:
        """Where a tensor's values come from."""
        key = _memory(tensor)
        return Origin.LOADED if key is None else self.storages.get(key, Origin.LOADED)


@contextlib.contextmanager
def watch_origins() -> Iterator[Origins]:
    """Watch what operators write into which memory while the block runs, in every thread that it starts.

    Memory that is filled without an operator of torch, as by torch.load or safetensors, counts as loaded.

    Example: `with watch_origins() as seen: model = build()`, then `seen.of(model)`.
    """
    seen, before = Origins(), _outside()
    with in_threads(lambda: _Watch(seen)):
        yield seen
    seen.elsewhere = _outside() != before


def _memory(tensor: Tensor) -> StorageWeakRef | None:
    """What names the memory of a tensor; None for one without memory of its own, such as a sparse one."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):
        return None


def _outside() -> list:
    """The states of numpy's and Python's generators, to be compared."""
    state = numpy.random.get_state()
    return [random.getstate(), state[1].tolist(), *state[2:]]


class _Watch(TorchDispatchMode):
    def __init__(self, seen: Origins):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outcome = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(outcome) if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            origin = Origin.RANDOM
        elif func.overloadpacket is torch.ops.aten.copy_:  # a part of a tensor may be written, so what is random stays
            origin = self._origin(given[1:] if _is_whole(given[0]) else given)
        elif func.overloadpacket in (torch.ops.aten.fill_, torch.ops.aten.zero_):
            origin = Origin.COMPUTED if _is_whole(given[0]) else self._origin(given)
        else:
            origin = self._origin(given)
        for result in results:
            key = _memory(result)
            if key is not None:
                self.seen.storages[key] = origin
        return outcome

    def _origin(self, tensors: list[Tensor]) -> Origin:
        """Where what an operator makes of these comes from: drawn if one was, loaded if one was and none was drawn."""
        result = {Origin.COMPUTED, *map(self.seen.of_tensor, tensors)}
        return next(item for item in (Origin.RANDOM, Origin.LOADED, Origin.COMPUTED) if item in result)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is all of its memory, so that what is written into it leaves nothing of what was there."""
    memory = _memory(tensor)
    return memory is not None and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def source(origin: Origin, model: Any) -> str:
    """A report's `weights_from`: the origin and, where transformers or diffusers kept it, the path: "loaded:PATH"."""
    path = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return f"{origin.value}:{path}" if origin.value else ""
