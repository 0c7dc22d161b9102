"""Copies of one model: built once and never run, copied to dtypes and devices, and for each run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import CaseError
from harness.reference.dtypes import excluded_from_cast
from harness.reference.layers import has_layers, is_layered, layered
from harness.reference.mapped import mapped_elements
from harness.reference.memory import BUILT, Policy, SizeInMemory, read_memory, resident
from harness.reference.origin import source, watch_origins
from harness.reference.randomness import seeded
from harness.reference.tensors import tensor_kind, weights_digest
from harness.reference.untouched import deep_copy, untouched, versions

LARGE = 64 << 20  # bytes of a model from which on its memory is worth a collection, which takes 0.2 s


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What is measured of a model in a dtype once, with the first inputs that it gets."""

    conditioning: float | None
    repeats: str  # what is to be said of the reference's second run


class Models:
    """The copies of the model at hand. Rows that share a key share the build; the last model is kept, no more.

    A full-size model is built in seconds and a case runs it with many seeds, so what is here is most of the run's
    cost. What stays between runs is the model as it was built, its copy in the dtype of the last case, that copy on
    the device, and the float64 one: whole or layer by layer, as `policy` says (`harness.reference.memory.Policy`).

    None of these is ever run: `untouched` lends a copy for a run, which shares their weights and nothing else, so that
    no run finds what another one left.
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
        self._writing: set[Any] = set()  # the models that write into their parameters while they run
        self.digests: dict[Any, Any] = {}  # of checkpoints, by path, and of what was built: each is read once
        self.conditioning: dict[Any, float | None] = {}  # by model
        self.draws: dict[Any, bool] = {}  # by model: whether it draws random numbers
        self.buffers: dict[Any, frozenset[str]] = {}  # by model in training mode: the buffers that it writes
        self.repeats: dict[Any, str] = {}  # by model and dtype: what is to be said of the reference's second run
        self.priced: set[Any] = set()  # models and dtypes whose switches have been looked at (`harness.run.switches`)
        self.contents: dict[Any, str] = {}  # digests of what was built, by model
        # Where weights come from that have no checkpoint= of their own: `harness.reference.origin.source`.
        self.sources: dict[Any, str] = {}
        self.pinned: dict[Any, str] = {}  # by model: why its float64 runs leave float32 where it asks for it by name
        self.scattered: set[Any] = set()  # models whose reruns on one card differed, seen on several cards
        self.notes: dict[Any, str] = {}  # by model: what was changed of it as it was handed over, in words

    def learned(self, subject: tuple, dtype: str) -> Learned | None:
        """What was measured of a model in a dtype; None before that. `subject`: `Case.subject`."""
        if (*subject, dtype) not in self.repeats:
            return None
        return Learned(conditioning=self.conditioning.get(subject), repeats=self.repeats[(*subject, dtype)])

    def learn(self, subject: tuple, dtype: str, learned: Learned) -> None:
        """Take over what another process measured of a model in a dtype; what is known here stays."""
        self.conditioning.setdefault(subject, learned.conditioning)
        self.repeats.setdefault((*subject, dtype), learned.repeats)
        self.priced.add((*subject, dtype))

    def base(
        self, key: Any, build: Callable[[], nn.Module], *, seed: int, training: bool = False, gradients: bool = False
    ) -> nn.Module:
        """The model of `key` as `build` makes it, under generators seeded with `seed`; it is not to be run.

        With `training` it stays in training mode; with `gradients` its parameters ask for gradients as they do.

        Raises: CaseError when `build` returns no module, or with `training` one in evaluation mode.
        """
        if key not in self._built:
            self._free()
            model, self.notes[key], self.sources[key] = _build(build, seed, training)
            for parameter in () if gradients else model.parameters():  # TorchScript has no `model.requires_grad_`
                parameter.requires_grad_(False)
            self._built[key] = model
            self._rule = self.policy or Policy.here()
        return self._built[key]

    def content(self, key: Any, build: Callable[[], nn.Module], *, seed: int, **how: bool) -> str:
        """sha256 over the names, dtypes, shapes and bytes of the weights of `key` as they were built, read once."""
        if key not in self.contents:
            model = self.base(key, build, seed=seed, **how)
            self.contents[key] = weights_digest(model, strict=False)
        return self.contents[key]

    def _free(self) -> None:
        """Give the last model's memory back before the next one is built: two full-size models may not fit."""
        large = any(size_of(model).parameters * BUILT > LARGE for model in self._built.values())
        devices = {device.type for device, _, _ in self._copies}
        self._built, self._copies, self._plans = {}, {}, {}
        if large:
            release_memory(devices)
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
            layers = layers and not any(parameter.requires_grad for parameter in model.parameters())
            self._rule.check(name, size, dtype, separate=separate, emulated=emulated, layers=layers)
            self._plans[dtype, separate] = layers
        return self._plans[dtype, separate]

    def get(
        self,
        key: Any,
        build: Callable[[], nn.Module],
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        wide: bool = False,
        cast: bool = True,
        **how: bool,
    ) -> nn.Module:
        """The model of `key` in `dtype` on `device`, not to be run; `wide` gives those weights in float64.

        Without `cast` it is in `dtype` as it was built. `build` and `how` are those of `base`.

        Raises: CaseError when `build` returns no module; MemoryLimitError where a float64 copy has no room.
        """  # fmt: skip
        base = self.base(key, build, seed=seed, **how)
        here = all(
            tensor.device.type == "cpu"
            for tensor in [*base.parameters(), *base.buffers()]
            if tensor.is_floating_point()
        )
        if device.type == "cpu" and not wide and (not cast or (here and is_in(base, dtype))):
            return base
        key_of_copy = (device, dtype, wide)
        if key_of_copy not in self._copies:
            old = next(
                (copied for name, copied in self._copies.items() if wide and name[2] and name[0] == device), None
            )
            self._copies = {name: copied for name, copied in self._copies.items() if name[1] == dtype}
            narrow = base
            if wide:
                narrow = self.get(key, build, seed=seed, dtype=dtype, device=device, cast=cast, **how)
            if wide and self.make_room("the model", key, dtype=dtype, separate=False, emulated=False):
                self._copies[key_of_copy] = layered(narrow)
            elif old is not None and not is_layered(old):
                self._copies[key_of_copy] = _refilled(old, narrow)
            else:
                own = dtype if cast else None
                self._copies[key_of_copy] = copy_module(narrow, dtype=torch.float64 if wide else own, device=device)
        return self._copies[key_of_copy]

    @contextlib.contextmanager
    def untouched(
        self,
        key: Any,
        build: Callable[[], nn.Module],
        *,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        wide: bool = False,
        cast: bool = True,
        **how: bool,
    ) -> Iterator[nn.Module]:
        """A copy of what `get` gives, to be run: with its weights, and with buffers and attributes of its own.

        Where a run writes into the weights themselves, the model is built anew afterwards, and from then on each copy
        has weights of its own.

        Raises: as `get`; CaseError for a model that cannot be copied.
        """  # fmt: skip
        like = dict(seed=seed, dtype=dtype, device=device, cast=cast, **how)
        self.base(key, build, seed=seed, **how)
        if wide and self.make_room("the model", key, dtype=dtype, separate=False, emulated=False):
            yield layered(self.get(key, build, **like))
            return
        whole = self.get(key, build, wide=wide, **like)
        if key in self._writing:
            yield copy_module(whole, dtype=None, device=device)
            return
        before = versions(whole)
        yield untouched(whole)
        if versions(whole) != before:
            self._writing.add(key)
            del whole
            self._free()

    def drop(self, *, dtype: torch.dtype, device: torch.device) -> None:
        """Free the copy in `dtype` on `device` before another dtype or model comes; the model as it was built stays."""
        self._copies.pop((device, dtype, False), None)


def _build(build: Callable[[], nn.Module], seed: int, training: bool) -> tuple[nn.Module, str, str]:
    """A new model, what was changed of it, in words, and where its weights come from: see `Models.sources`."""
    with seeded(seed), watch_origins() as origins:
        model = build()
    if not isinstance(model, nn.Module):
        raise CaseError(f"model() returned {tensor_kind(model)} where a torch.nn.Module was expected")
    lazy = [name for name, parameter in model.named_parameters() if nn.parameter.is_lazy(parameter)]
    if lazy:
        raise CaseError(
            f"model() returned a model without values for {lazy[0]} and maybe others; let it run once in "
            "model(), so that they are made"
        )
    for module in model.modules():  # torch copies no result of autograd, such as the weight that weight_norm computes
        result = {
            name: variable
            for name, variable in vars(module).items()
            if isinstance(variable, Tensor) and not variable.is_leaf
        }
        vars(module).update({name: tensor.detach() for name, tensor in result.items()})
    if not hasattr(model, "training"):
        raise CaseError(
            "model() returned what torch.jit.freeze made, whose weights are constants on the CPU; return the "
            "module that"
            " was frozen"
        )
    if training and not model.training:
        raise CaseError("training=True, and model() returned a model in evaluation mode; let it return model.train()")
    came = source(origins.of(model), model)
    if training or not model.training:  # in evaluation mode a part may be in training mode on purpose
        return model, "", came
    heeds = any("training" in _names(module) for module in model.modules())
    text = (
        "model() returned it in training mode and it was run in evaluation mode; Case(training=True) runs it as it is"
    )
    with contextlib.suppress(NotImplementedError):  # torch.export's programs have one mode
        model.eval()
    return model, text if heeds else "", came


def _names(module: nn.Module) -> tuple[str, ...]:
    """The names that the code of a module's forward uses; none where it is no Python code, as of TorchScript."""
    forward = inspect.getattr_static(type(module), "forward", None)  # getattr fails for a traced module's class
    return getattr(getattr(forward, "__code__", None), "co_names", ())


def is_in(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all that a cast to `dtype` would change is in it already."""
    stays = excluded_from_cast(model, dtype)
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    return all(tensor.dtype == dtype or id(tensor) in stays for tensor in tensors)


def copy_module(model: nn.Module, *, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    """A copy of `model` on `device` with its floating-point parameters and buffers in `dtype`; tied weights stay tied.

    What `excluded_from_cast` names keeps its dtype, and with None everything does. Each tensor is copied once, straight
    to where it goes. A part in TorchScript is copied whole before it is moved and cast, excluded or not: it hands out
    no tensor to replace.
    """
    moved: dict[int, Any] = {}
    stays = frozenset() if dtype is None else excluded_from_cast(model, dtype)
    for tensor in [*model.parameters(), *model.buffers()]:
        changes = dtype is not None and tensor.is_floating_point() and id(tensor) not in stays
        narrow = tensor.detach().to(dtype if changes else tensor.dtype)  # here: on its way it would be there twice
        target = narrow.to(device, copy=narrow.data_ptr() == tensor.data_ptr())
        asks = tensor.requires_grad and tensor.is_floating_point()
        moved[id(tensor)] = nn.Parameter(target, requires_grad=asks) if isinstance(tensor, nn.Parameter) else target
    copied = deep_copy(model, moved)
    for part in scripted(copied):
        part.to(device=device, dtype=dtype)
    return copied


def scripted(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that run as TorchScript, without those inside of another."""
    if isinstance(model, torch.jit.ScriptModule):
        return [model]
    return [part for child in model.children() for part in scripted(child)]


def size_of(model: nn.Module) -> SizeInMemory:
    """The elements of floating point of a model, parameters and buffers, tied ones once, and of its largest tensor."""
    tensors = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()]
    elements: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        elements[tensor.dtype] += tensor.numel()
    is_large = sum(tensor.nbytes for tensor in tensors) > LARGE
    return SizeInMemory(
        parameters=elements.total(),
        largest=max((tensor.numel() for tensor in tensors), default=0),
        mapped=mapped_elements(tensors) if is_large else 0,
        built_in=str(max(elements, key=elements.get, default=torch.float32)).removeprefix("torch."),
    )


def release_memory(devices: Iterable[str] = ()) -> None:
    """Give the memory of models that nobody holds any more back to the system, where the C library can.

    `devices`: the types of those on which they were ("npu"): torch keeps freed memory there for the next tensors, and
    that of the emulated device is the host's.
    """
    gc.collect()  # a module that is part of a cycle would stay beside the one that comes
    for device in devices:
        empty_cache = getattr(getattr(torch, device, None), "empty_cache", None)
        if empty_cache is not None:
            empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def release_where_tight() -> bool:
    """`release_memory`, where less memory is left than this process holds: `keep_large_blocks` may hold gigabytes of
    freed blocks. Whether it was so.
    """
    memory = read_memory()
    is_tight = memory is not None and memory.available < resident()
    if is_tight:
        release_memory()
    return is_tight


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
