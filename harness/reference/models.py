"""Copies of one model: built once, copied to dtypes and devices."""

from __future__ import annotations

import copy
import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.errors import CaseError
from harness.reference.tensors import kind_of


class Models:
    """The copies of the model at hand. Cases that share their weights share the build; the last model is kept, no more.

    A full-size model is built in seconds and a case runs it with many seeds, so what is here is most of the run's cost.
    """

    def __init__(self, store: Any = None):
        _keep_large_blocks()
        self.store = store  # a Store that references are read from and kept in
        self.clean: Any = None  # the CleanProcess, once a model needs one that an NPU's presence changes
        self._built: dict[Any, nn.Module] = {}
        self._copies: dict[Any, nn.Module] = {}
        self.digests: dict[Any, str] = {}  # of checkpoints, by path: each is read once
        self.conditioning: dict[Any, float | None] = {}  # by model

    def get(
        self, key: Any, build: Callable[[], nn.Module], *, seed: int, dtype: torch.dtype, device: torch.device, wide: bool = False
    ) -> nn.Module:
        """The model of `key` in `dtype` on `device`; `wide` gives those weights in float64. `build` runs under torch's generator seeded
        with `seed`.

        Raises: CaseError when `build` returns no module.
        """
        if key not in self._built:
            self._built, self._copies = {}, {}  # free the last one first: two full-size models may not fit
            self._built[key] = self._build(build, seed)
        base = self._built[key]
        if device.type == "cpu" and _is_all(base, dtype) and not wide:
            return base
        place = (device, dtype, wide)
        if place not in self._copies:
            old = next((kept for each, kept in self._copies.items() if wide and each[2] and each[0] == device), None)
            self._copies = {each: kept for each, kept in self._copies.items() if each[1] == dtype}
            narrow = self.get(key, build, seed=seed, dtype=dtype, device=device) if wide else base
            self._copies[place] = _refilled(old, narrow) if old is not None else copy_module(narrow, dtype=torch.float64 if wide else dtype, device=device)
        return self._copies[place]

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


@functools.cache
def _keep_large_blocks() -> None:
    """Have the C library keep blocks of up to a gigabyte for the next forward, where it is glibc.

    Those over 32 MiB, which a float64 forward of a large model asks for in every layer, else come anew from the system each time: 100,000 page
    faults a forward of AIMv2-large.
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
