"""One call of a torch function, which can be made again: on the device, on the CPU, in float64, under the device's
rounding rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.devices import Device, unknown_rounding
from harness.judging.checks import judge
from harness.judging.presets import MERE
from harness.judging.tolerance import Tolerance, without_forecast
from harness.locate.choices import settled
from harness.numerics.expected_error import Rules, overflow_of, rounding, rules_of
from harness.run.comparisons import cut_as_float16, measured_outputs
from harness.torch_private import tree_leaves, tree_map

_FLOOR, PAIR = Tolerance(preset="floor"), Tolerance(preset="pair")
FAILS = (
    RuntimeError,
    NotImplementedError,
    TypeError,
    ValueError,
    IndexError,
)  # what an operator raises that cannot be called so


def budget(dtype: torch.dtype) -> float:
    """What the preset `pair` lets a result of this dtype differ by, relative: the limit where no error can be
    expected.
    """
    return MERE["HF32"] if dtype == torch.float32 else MERE.get(str(dtype).removeprefix("torch."), MERE["float32"])


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in arguments or in what a call returned."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def span_of(tensor: Tensor) -> Tensor | None:
    """The memory that a view reaches over, flat; None for a tensor that is as its memory is."""
    if tensor.is_contiguous() or tensor.layout != torch.strided or not tensor.numel():
        return None
    return tensor.as_strided(
        (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())),), (1,)
    )


def copy_strided(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device with the strides that it has here: a view stays a view."""
    tensor = tensor.detach()
    span = span_of(tensor)
    return (
        tensor.to(device, copy=True)
        if span is None
        else span.to(device, copy=True).as_strided(tensor.shape, tensor.stride())
    )


def copies(value: Any, device: torch.device | str) -> Any:
    """Arguments with every tensor copied to a device."""
    return tree_map(lambda item: copy_strided(item, device) if isinstance(item, Tensor) else item, value)


def copies_with_layout(value: Any, device: torch.device | str) -> Any:
    """Arguments copied to a device as they lie in memory here.

    Those that share memory share it there, and each starts as far from a multiple of `BOUNDARY` bytes as it does here.
    """
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors_in(value):
        if tensor.layout == torch.strided and tensor.numel():
            groups.setdefault(_memory(tensor), []).append(tensor)
    bases = {key: _base(group, device) for key, group in groups.items()}
    made: dict[int, Tensor] = {}

    def copied(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        if id(each) not in made:
            key = _memory(each) if each.layout == torch.strided and each.numel() else None
            if key is None:
                made[id(each)] = copy_strided(each, device)
            else:
                base, start = bases[key]
                made[id(each)] = base.as_strided(each.shape, each.stride(), each.storage_offset() - start)
        return made[id(each)]

    return tree_map(copied, value)


BOUNDARY = 512  # bytes, at multiples of which the allocators of devices begin


def _memory(tensor: Tensor) -> tuple:
    return tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device


def _base(tensors: Sequence[Tensor], device: torch.device | str) -> tuple[Tensor, int]:
    """A copy of the memory that some tensors of one storage reach over, flat, and the element at which it begins."""
    begin = min(tensor.storage_offset() for tensor in tensors)
    ends = [
        tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        for tensor in tensors
    ]
    whole = max(BOUNDARY // tensors[0].element_size(), 1)
    begin = begin // whole * whole
    return tensors[0].detach().as_strided((max(ends) + 1 - begin,), (1,), begin).to(device, copy=True), begin


def memory_layout(tensors: Sequence[Tensor]) -> str:
    """How arguments lie in memory where that is not as copies of them do, in words; "" where it is."""
    strided = [tensor for tensor in tensors if tensor.layout == torch.strided and tensor.numel()]
    if len({_memory(item)[0] for item in strided}) < len(strided):
        return "two of its arguments share memory"
    offsets = [tensor.storage_offset() * tensor.element_size() for tensor in strided]
    odd = next((offset for offset in offsets if offset % BOUNDARY), 0)
    return f"an argument begins {odd} bytes into its memory" if odd else ""


def name_of(func: Callable) -> str:
    """An operator as the model wrote it: "linear", "add_", "T"."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_") if name.startswith("__") else name


def mutates(func: Callable, kwargs: dict) -> bool:
    """Whether an operator writes into what it is given: add_, x[i] = …, +=, out=, inplace=True."""
    name = getattr(func, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__set__", *IN_PLACE)
    return in_place or kwargs.get("out") is not None or kwargs.get("inplace") is True


IN_PLACE = (
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ifloordiv__",
    "__imod__",
    "__ipow__",
    "__iand__",
    "__ior__",
    "__ixor__",
)


_NORMS = {"batch_norm": "training", "instance_norm": "use_input_stats"}  # and what makes them update running statistics


def trains(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a call of a norm takes the statistics of the batch and updates the running ones, as it is asked to."""
    name = _NORMS.get(name_of(func))
    return name is not None and bool(args[5] if len(args) > 5 else kwargs.get(name, name == "use_input_stats"))


def running_statistics(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The running mean and variance that a call of a norm was given."""
    start = 3 if func is torch.batch_norm or func is torch.instance_norm else 1
    return tensors_in([args[start : start + 2], kwargs.get("running_mean"), kwargs.get("running_var")])


def statistics(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The running mean and variance after a call of a norm in training mode."""
    func(*args, **kwargs)
    return running_statistics(func, args, kwargs)


def on(device: torch.device, value: Any) -> Any:
    """An argument for a call on a device: what names the CPU names the device."""
    if (isinstance(value, torch.device) and value.type == "cpu") or (isinstance(value, str) and value == "cpu"):
        return device
    return value


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 difference; infinite where shapes or NaN and Inf differ, the share of unequal elements where they are
    no fractions.
    """
    actual, expected = (
        tensor.detach().cpu() if tensor.layout == torch.strided else tensor.detach().cpu().to_dense()
        for tensor in (actual, expected)
    )
    if actual.shape != expected.shape:
        return math.inf
    if not expected.numel() or torch.equal(actual, expected):
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((actual != expected).double().mean())
    kind = torch.promote_types(actual.dtype, expected.dtype)
    actual, expected = (tensor.to(torch.float32 if kind.itemsize < 4 else kind) for tensor in (actual, expected))
    away, size = _norm(actual - expected), _norm(expected)
    if not math.isfinite(away + size):  # somewhere an element is not, or the difference of two is none
        odd = ~(actual.isfinite() & expected.isfinite())
        if not torch.isclose(actual[odd], expected[odd], equal_nan=True).all():
            return math.inf
        wide = torch.complex128 if kind.is_complex else torch.float64
        actual, expected = (torch.where(tensor.isfinite(), tensor, 0).to(wide) for tensor in (actual, expected))
        away, size = _norm(actual - expected), _norm(expected)
    if size:
        return away / size
    return 0.0 if away == 0 else math.inf


def autocast_now() -> torch.dtype | None:
    """The dtype to which torch.autocast brings what the CPU computes at this place; None where it is off."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@contextmanager
def autocasting(dtype: torch.dtype | None, kind: str) -> Iterator[None]:
    """torch.autocast to `dtype` for devices of the type `kind`, and for no other; nothing for None."""
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast(kind, dtype=dtype):
        yield


def largest_difference(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of several results; 0 of none."""
    return max((relative_difference(actual, item) for actual, item in zip(result, expected)), default=0.0)


def _norm(tensor: Tensor) -> float:
    """The L2 norm, summed in double precision; of numbers whose squares vanish there too."""
    kind = torch.complex128 if tensor.is_complex() else torch.float64
    norm = float(torch.linalg.vector_norm(tensor, dtype=kind))
    peak = float(tensor.abs().max()) if norm == 0 else 0.0
    return norm if not peak else float(torch.linalg.vector_norm(tensor / peak, dtype=kind)) * peak


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A call with the CPU's arguments as they were before it."""

    func: Callable
    args: tuple
    kwargs: dict
    device: Device
    autocast: torch.dtype | None = None  # of the place where the model makes it

    @property
    def writes(self) -> bool:
        return mutates(self.func, self.kwargs)

    @property
    def rules(self) -> Rules | None:
        """How a sound device rounds under its switches; None for one that rounds as the CPU does, or of which nobody
        knows how.
        """
        return rules_of(self.device.stack)

    @property
    def narrow(self) -> torch.dtype:
        """The narrowest dtype of its floating-point arguments, float32 where it has none."""
        return min(
            (tensor.dtype for tensor in self.tensors if tensor.is_floating_point()),
            key=lambda value: value.itemsize,
            default=torch.float32,
        )

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return tensors_in((self.args, self.kwargs))

    def changed(self, change: Callable[[Any], Any]) -> Replay:
        """The call with every argument changed."""
        return replace(self, args=tree_map(change, self.args), kwargs=tree_map(change, self.kwargs))

    def call(self, change: Callable[[Any], Any], kind: str = "cpu") -> list[Tensor]:
        """Make the call with every argument changed, for a device of a kind, and return its results.

        They are the tensors that it returns, or what it wrote into.
        """
        other = self.changed(change)
        with autocasting(self.autocast, kind):
            return tensors_in(other.func(*other.args, **other.kwargs)) or tensors_in(other.args)[:1]

    def on_device(self, transfer: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """The results of the device, brought to the CPU; `transfer` brings a tensor there."""
        there = self.device.torch_device
        transfer = transfer or (lambda value: copy_strided(value, there))
        with self.device.interruptible():
            made = self.call(
                lambda value: transfer(value) if isinstance(value, Tensor) else on(there, value), there.type
            )
            return [tensor.cpu() for tensor in made]

    def on_device_with_layout(self) -> list[Tensor]:
        """The results of the device for arguments that lie in memory as the model's do, brought to the CPU."""
        there = self.device.torch_device
        args, kwargs = copies_with_layout((self.args, self.kwargs), there)
        return replace(self, args=args, kwargs=kwargs).on_device(lambda value: value)

    def on_cpu(self, rules: Rules | None = None) -> list[Tensor]:
        """The results of the CPU in the same dtype, under the device's rounding rules where they are given."""
        with rounding(rules):
            return self.call(lambda value: copy_strided(value, "cpu") if isinstance(value, Tensor) else value)

    def golden(self) -> list[Tensor] | None:
        """The results in float64; None where the operator has none."""

        def wide(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return torch.float64 if value.is_floating_point else value
            if isinstance(value, Tensor):
                return (
                    copy_strided(value, "cpu").to(torch.float64)
                    if value.is_floating_point()
                    else copy_strided(value, "cpu")
                )
            return value

        try:
            result = self.call(wide)
        except FAILS:
            return None
        return [tensor.double() if tensor.is_floating_point() else tensor for tensor in result]

    def judged(self, result: list[Tensor], results: list[Tensor] | None = None) -> tuple[float | None, tuple[str, ...]]:
        """The device's error to float64 over the floor, and why it is not what a healthy device would show, by the
        preset `floor`.

        Where there is no float64, or where it is not known how the SoC rounds, the preset `pair` judges, and there is
        no floor. Of indices among equal numbers any is right.
        """
        stack, golden = self.device.stack, self.golden()
        rules, overflow = rules_of(stack), overflow_of(stack, self.narrow)
        results = self.on_cpu(overflow) if results is None or overflow is not None else results
        result = settled(name_of(self.func), self.args, self.kwargs, result, results)
        forecast = None if rules is None or golden is None else self.on_cpu(rules)
        return judged(self.device, result, results, golden, forecast, self.narrow)

    def statistics(self) -> Replay | None:
        """The running statistics after the call as a call of its own; None of one that updates none."""
        if not trains(self.func, self.args, self.kwargs) or not running_statistics(self.func, self.args, self.kwargs):
            return None
        return replace(self, func=statistics, args=(self.func, self.args, self.kwargs), kwargs={})

    def backward(self) -> Replay | None:
        """The call's gradients towards its floating-point inputs as a call of its own; None where there are none.

        The gradient that flows into the results is seeded and normal: its size is not the model's.
        """
        if self.writes or not any(tensor.is_floating_point() for tensor in self.tensors):
            return None
        replay = replace(self, func=gradients, args=(self.func, self.args, self.kwargs), kwargs={})
        try:
            return replay if replay.on_cpu() else None
        except FAILS:
            return None


def judged(
    device: Device,
    result: list[Tensor],
    results: list[Tensor],
    golden: list[Tensor] | None,
    forecast: list[Tensor] | None,
    narrow: torch.dtype,
) -> tuple[float | None, tuple[str, ...]]:
    """As `Replay.judged`. `result` is the device's, `results` the CPU's, `golden` in float64, `forecast` by the rules.

    `narrow` is the narrowest dtype that is computed in.
    """
    stack = device.stack
    rules, unknown, overflow = rules_of(stack), unknown_rounding(stack), overflow_of(stack, narrow)
    actual, expected, wide, predicted = (
        None if group is None else {str(number): item for number, item in enumerate(group)}
        for group in (result, results, golden, forecast)
    )
    if overflow is not None and wide is not None:
        wide, _ = cut_as_float16(wide, expected, actual, device.name)
    comparisons, references = measured_outputs(actual, expected, wide, predicted, () if rules is None else rules.modes)
    floating = {name for name, tensor in expected.items() if tensor.is_floating_point() or tensor.is_complex()}
    tolerance = _FLOOR if floating <= references.keys() else PAIR
    if unknown is not None:
        tolerance = without_forecast(_FLOOR, unknown, str(narrow).removeprefix("torch."))
    verdict = judge(comparisons, tolerance, references=references)
    ratios = [reference.ratios()["forecast_ratio"] for reference in references.values()] if unknown is None else []
    return max(ratios, default=None), tuple(str(failure) for failure in verdict.failures)


def gradients(func: Callable, args: tuple, kwargs: dict) -> list[Tensor]:
    """The gradients of a call towards its floating-point tensors."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            leaves.append(value.detach().requires_grad_())
            return leaves[-1]
        return value

    with torch.enable_grad():
        outcome = func(*tree_map(leaf, args), **tree_map(leaf, kwargs))
        results = [tensor for tensor in tensors_in(outcome) if tensor.requires_grad]
        generator = torch.Generator().manual_seed(0)
        flows = [
            torch.randn(result.shape, generator=generator).to(result.dtype).to(result.device) for result in results
        ]
        grads = torch.autograd.grad(results, leaves, flows, allow_unused=True)
    return [grad for grad in grads if grad is not None]
