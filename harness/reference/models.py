"""Copies of one model: built once, copied to dtypes and devices."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.errors import CaseError
from harness.reference.layers import has_layers, is_layered, layered
from harness.reference.memory import Policy, Size
from harness.reference.tensors import kind_of

LARGE = 64 << 20  # bytes of a model from which on its memory is worth a collection, which takes 0.2 s


class Models:
    """The copies of the model at hand. Cases that share their weights share the build; the last model is kept, no more.

    A full-size model is built in seconds and a case runs it with many seeds, so what is here is most of the run's
    cost. What stays between runs is the model as it was built, its copy in the dtype of the last case, that copy on
    the device, and the float64 one: whole or layer by layer, as `policy` says (`harness.reference.memory.Policy`).
    """

    def __init__(self, store: Any = None, policy: Policy | None = None):
        keep_large_blocks()
        self.store = store  # a Store that references are read from and kept in
        self.clean: Any = None  # the CleanProcess, once a model needs one that an NPU's presence changes
        self.policy = policy  # None: that of this machine, as it is when a model is built
        self._rule = policy or Policy.here()
        self._built: dict[Any, nn.Module] = {}
        self._copies: dict[Any, nn.Module] = {}
        self._plans: dict[Any, bool] = {}
        self.digests: dict[Any, str] = {}  # of checkpoints, by path: each is read once
        self.conditioning: dict[Any, float | None] = {}  # by model

    def base(self, key: Any, build: Callable[[], nn.Module], *, seed: int) -> nn.Module:
        """The model of `key` as `build` makes it, under torch's generator seeded with `seed`.

        Raises: CaseError when `build` returns no module.
        """
        if key not in self._built:
            self._free()
            self._built[key] = self._build(build, seed)
            self._rule = self.policy or Policy.here()
        return self._built[key]

    def _free(self) -> None:
        """Give the last model's memory back before the next one is built: two full-size models may not fit."""
        large = any(size_of(model).bytes > LARGE for model in self._built.values())
        self._built, self._copies, self._plans = {}, {}, {}
        if large:
            release_memory()
            if self.clean is not None:
                self.clean.forget_gone()

    def make_room(self, name: str, key: Any, *, dtype: torch.dtype, separate: bool, emulated: bool) -> bool:
        """Whether the model of `key`, which is built, runs in float64 layer by layer.

        `separate`: in the process without torch_npu; `emulated`: beside an emulated device.

        Raises: MemoryLimitError when this machine has no room for the copies that case `name` needs.
        """
        model = self._built[key]
        if (dtype, separate) not in self._plans:
            size = size_of(model)
            layers = dtype != torch.float64 and self._rule.layers(size, dtype, separate=separate) and has_layers(model)
            self._rule.check(name, size, dtype, separate=separate, emulated=emulated, layers=layers)
            self._plans[dtype, separate] = layers
        return self._plans[dtype, separate]

    def get(
        self, key: Any, build: Callable[[], nn.Module], *, seed: int, dtype: torch.dtype, device: torch.device, wide: bool = False
    ) -> nn.Module:
        """The model of `key` in `dtype` on `device`; `wide` gives those weights in float64. `build` runs under torch's generator seeded
        with `seed`.

        Raises: CaseError when `build` returns no module; MemoryLimitError where a float64 copy has no room.
        """
        base = self.base(key, build, seed=seed)
        if device.type == "cpu" and _is_all(base, dtype) and not wide:
            return base
        place = (device, dtype, wide)
        if place not in self._copies:
            old = next((kept for each, kept in self._copies.items() if wide and each[2] and each[0] == device), None)
            self._copies = {each: kept for each, kept in self._copies.items() if each[1] == dtype}
            narrow = self.get(key, build, seed=seed, dtype=dtype, device=device) if wide else base
            if wide and self.make_room("the model", key, dtype=dtype, separate=False, emulated=False):
                self._copies[place] = layered(narrow)
            elif old is not None and not is_layered(old):
                self._copies[place] = _refilled(old, narrow)
            else:
                self._copies[place] = copy_module(narrow, dtype=torch.float64 if wide else dtype, device=device)
        return self._copies[place]

    def drop(self, *, dtype: torch.dtype, device: torch.device) -> None:
        """Free the copy in `dtype` on `device` before another dtype or model comes; the model as it was built stays."""
        self._copies.pop((device, dtype, False), None)

    @staticmethod
    def _build(build: Callable[[], nn.Module], seed: int) -> nn.Module:
        generator = torch.default_generator  # torch.manual_seed would import the compiler, which takes seconds
        before = generator.get_state()
        try:
            generator.manual_seed(seed)
            model = build()
        finally:
            generator.set_state(before)
        if not isinstance(model, nn.Module):
            raise CaseError(f"model() returned {kind_of(model)} where a torch.nn.Module was expected")
        return model.eval().requires_grad_(False)


def _is_all(model: nn.Module, dtype: torch.dtype) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return all(each.dtype == dtype and each.device.type == "cpu" for each in tensors if each.is_floating_point())


def copy_module(model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A copy of `model` on `device` with its floating-point parameters and buffers in `dtype`; tied weights stay tied.

    Each tensor is copied once, straight to where it goes.
    """
    moved: dict[int, Any] = {}
    for each in [*model.parameters(), *model.buffers()]:
        narrow = each.detach().to(dtype if each.is_floating_point() else each.dtype)  # here: on its way it would be there twice
        target = narrow.to(device, copy=narrow.data_ptr() == each.data_ptr())
        moved[id(each)] = nn.Parameter(target, requires_grad=False) if isinstance(each, nn.Parameter) else target
    return copy.deepcopy(model, memo=moved)


def size_of(model: nn.Module) -> Size:
    """The elements of floating point of a model, parameters and buffers, tied ones once, and of its largest tensor."""
    tensors = [each for each in [*model.parameters(), *model.buffers()] if each.is_floating_point()]
    counts = [each.numel() for each in tensors]
    return Size(parameters=sum(counts), largest=max(counts, default=0))


def release_memory() -> None:
    """Give the memory of models that nobody holds any more back to the system, where the C library can."""
    gc.collect()  # a module that is part of a cycle would stay beside the one that comes
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@functools.cache
def keep_large_blocks() -> None:
    """Have the C library keep blocks of up to a gigabyte for the next forward, where it is glibc.

    Those over 32 MiB, which a float64 forward of a large model asks for in every layer, else come anew from the system
    each time: 100,000 page faults a forward of AIMv2-large.
    """
    mmap_threshold, trim_threshold = -3, -1  # of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)


def _refilled(model: nn.Module, source: nn.Module) -> nn.Module:
    """`model` with the values of another copy: gigabytes of new memory cost seconds on many machines."""
    with torch.no_grad():
        for old, new in zip([*model.parameters(), *model.buffers()], [*source.parameters(), *source.buffers()]):
            old.copy_(new)
    return model
