"""What the device is held against: the same weights and inputs on the CPU in the same dtype, in float64, and as a forecast.

Weights are built once and copied; the CPU's runs are repeatable for a given number of threads.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import CaseError, RunError
from harness.forecast import Rules, rounding

# ---------------------------------------------------------------------------------------------- copies of one model


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
            raise CaseError(f"model() returned {_kind(model)} where a torch.nn.Module was expected")
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


# ------------------------------------------------------------------------------------------------------------- runs


def run(model: nn.Module, inputs: Any, *, forward: Callable | None, where: str) -> Any:
    """`forward(model, inputs)`, or the model called with its inputs: a tensor, a tuple of arguments or a dict of keywords.

    Raises: RunError, naming `where`, with what the model raised as its cause.
    """
    try:
        with torch.no_grad():
            if forward is not None:
                return forward(model, inputs)
            if isinstance(inputs, Mapping):
                return model(**inputs)
            return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"  # torch_npu ends with what CANN said
        raise RunError(f"{where}: {type(error).__name__}: {text}") from error


def run_cpu(
    model: nn.Module, inputs: Any, *, forward: Callable | None, dtype: torch.dtype, rules: Rules | None = None
) -> tuple[Any, float, str]:
    """One reference: the model's output on the CPU, its time in milliseconds, and what computed it, in words.

    `model` and `inputs` are in `dtype`; in float64 they are the golden reference. With `rules` the CPU rounds as they say: a forecast.
    """
    emulate = dtype == torch.float16 and rules is None and not _has_float16_products()
    begin = time.perf_counter()
    wide = dtype == torch.float64
    with rounding(rules) if rules is not None else _Float16Products() if emulate else _Float64Products() if wide else nullcontext():
        outputs = run(model, inputs, forward=forward, where="on the CPU")
    name = f"CPU {str(dtype).removeprefix('torch.')}"
    words = f"{name}, matrix products summed in float32 and rounded once" if emulate else f"{name}, {rules}" if rules else name
    return outputs, (time.perf_counter() - begin) * 1e3, words


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding: half a last place; of float64, in which it is to be seen, a whole one."""
    eps = torch.finfo(dtype).eps
    return eps if dtype == torch.float64 else eps / 2


def moved_by_one_rounding(inputs: Any, dtype: torch.dtype) -> Any | None:
    """Float64 inputs, each number of them off by half a last place of `dtype`, up or down by a seeded draw; None where none is a fraction."""
    generator = torch.Generator().manual_seed(0)
    step = roundoff(dtype)
    touched = False

    def nudge(tensor: Tensor) -> Tensor:
        nonlocal touched
        if not tensor.is_floating_point():
            return tensor
        touched = True
        signs = (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1).double()  # float32 has no room for 1 + its roundoff
        return tensor * (1 + step * signs)

    nudged = _each(inputs, nudge)
    return nudged if touched else None


def _has_float16_products() -> bool:
    """Whether this CPU multiplies float16 matrices natively; torch's fallback is some thirty times slower than float32."""
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return probe is None or bool(probe())


class _Float16Products(TorchDispatchMode):
    """Computes products of float16 matrices in float32 and rounds the result once.

    Products of two float16 numbers are exact in float32 and the sum runs in float32, as in torch's own float16 kernel:
    the two differ by a last place in some 0.2 % of the elements.
    """

    PRODUCTS = frozenset(getattr(torch.ops.aten, name) for name in "mm addmm bmm baddbmm mv addmv convolution".split())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in self.PRODUCTS or not _any_half(args):
            return func(*args, **kwargs)
        return func(*[_widened(each) for each in args], **kwargs).half()


class _Float64Products(TorchDispatchMode):
    """Computes the products of groups, with which mixtures of experts are made, in float64, which torch's kernel lacks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype == torch.float64:
            return _grouped_products(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_products(left: Tensor, right: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """torch._grouped_mm: `offs` (G,) says where each group ends, along left's rows, right's columns, or what is summed over, where a side is 2-D."""
    ends = [] if offs is None else offs.tolist()
    parts = [slice(*each) for each in zip([0, *ends], ends)]
    if left.dim() == 3 and right.dim() == 3:
        found = torch.bmm(left, right)
    elif left.dim() == 2 and right.dim() == 3:
        found = torch.cat([left[part] @ right[group] for group, part in enumerate(parts)])
        found = torch.cat([found, found.new_zeros(left.shape[0] - found.shape[0], found.shape[1])])  # rows of no group
    elif left.dim() == 3:
        found = torch.cat([left[group] @ right[:, part] for group, part in enumerate(parts)], 1)
    else:
        found = torch.stack([left[:, part] @ right[part] for part in parts])
    return found if bias is None else found + bias


def _any_half(args: tuple) -> bool:
    return any(isinstance(each, Tensor) and each.dtype == torch.float16 for each in args)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


# --------------------------------------------------------------------------------------- what went in and came out


def move(value: Any, *, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """`value` with every tensor in it on `device`, and the floating-point ones in `dtype`."""
    return _each(value, lambda tensor: tensor.to(device=device, dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype))


def fresh(value: Any) -> Any:
    """A copy of what a model is given: one that writes into its inputs must not find its own writing in the next run."""
    return _each(value, torch.clone)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to every tensor in it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _each(each, change) for name, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_each(each, change) for each in value)
    return value


def tensors_of(value: Any, what: str) -> dict[str, Tensor]:
    """The tensors in what a model returned, by name: "output" for a bare one, else keys and positions joined by dots.

    Raises: CaseError when there is none, or something is neither a tensor nor None.
    """
    found = dict(_flatten(value, "", what))
    if not found:
        raise CaseError(f"{what} returned {_kind(value)}: nothing to compare; return a tensor, or tensors in a tuple or dict")
    return found


def _flatten(value: Any, prefix: str, what: str):
    if isinstance(value, Tensor):
        yield prefix or "output", value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _flatten(each, f"{prefix}.{name}" if prefix else str(name), what)
    elif isinstance(value, (tuple, list)):
        for index, each in enumerate(value):
            yield from _flatten(each, f"{prefix}.{index}" if prefix else str(index), what)
    elif value is not None:
        at = f" at {prefix!r}" if prefix else ""
        raise CaseError(f"{what} returned {_kind(value)}{at} where a tensor was expected; let `forward` pick the tensors")


def _kind(value: Any) -> str:
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
