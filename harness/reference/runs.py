"""Runs on the CPU: in the case's dtype, in float64, and as a forecast."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from harness.errors import RunError
from harness.numerics.expected_error import Rules, modes_of
from harness.reference.autocast import watching_autocast
from harness.reference.outside import put_back
from harness.reference.raised import location_of
from harness.reference.randomness import Drawn, Draws, drawing
from harness.reference.tensors import digest, fresh, tensors_of, with_tensors_changed
from harness.reference.untouched import changes, versions
from harness.reference.wide import WideRequests
from harness.reference.written import BUFFER, named_tensors, watching
from harness.torch_private import Together, TorchDispatchMode, aten_operator, in_threads


def run(model: nn.Module, inputs: Any, *, forward: Callable | None, where: str, gradients: bool = False) -> Any:
    """`forward(model, inputs)`, or the model called with its inputs: a tensor, a tuple of arguments or a dict of
    keywords.

    Without `gradients` autograd is off. What the run leaves outside of the model is put back, see `put_back`.

    Raises: RunError, naming `where` and the module, operator and line that raised, with what they raised as its cause.
    """
    try:
        with torch.set_grad_enabled(gradients), put_back(model, forward):
            if forward is not None:
                return forward(model, inputs)
            if isinstance(inputs, Mapping):
                return model(**inputs)
            spread = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
            return model(*inputs) if spread else model(inputs)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"  # torch_npu ends with what CANN said
        if not gradients and "does not require grad" in text:
            text += "; Case(gradients=True) lets autograd run and the parameters ask for gradients"
        location = location_of(error, model)
        raised = f"; raised in {location}" if location else ""
        raise RunError(f"{where}: {type(error).__name__}: {text}{raised}", location=location) from error


def run_cpu(
    model: nn.Module,
    inputs: Any,
    *,
    forward: Callable | None,
    dtype: torch.dtype,
    rules: Rules | None = None,
    gradients: bool = False,
    pinned: bool = False,
) -> tuple[Any, float, str]:
    """One reference: the model's output on the CPU, its time in milliseconds, and what computed it, in words.

    `model` and `inputs` are in `dtype`; in float64 they are the golden reference, and what the model asks for in
    float32 by name is float64 as well, unless it is `pinned`. With `rules` the CPU rounds as they say: a forecast.
    """
    own = rules is None or rules.overflow_alone  # products are the CPU's
    emulate = dtype == torch.float16 and own and not _has_float16_products()
    begin = time.perf_counter()
    wide = dtype == torch.float64

    def modes() -> Together:
        together = modes_of(rules)
        together += [_Float16Products()] if emulate else []
        together += [Float64Products()] if wide else []
        return Together(together + ([WideRequests()] if wide and not pinned else []))

    with in_threads(modes):
        outputs = run(model, inputs, forward=forward, where="on the CPU", gradients=gradients)
    name = f"CPU {str(dtype).removeprefix('torch.')}"
    parts = [
        name,
        *(["matrix products summed in float32 and rounded once"] if emulate else []),
        *([str(rules)] if rules else []),
    ]
    words = ", ".join(parts)
    return outputs, (time.perf_counter() - begin) * 1e3, words


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One run of the CPU's side, and where it was asked for a second one after it."""

    outputs: dict[str, Tensor]
    milliseconds: float
    words: str  # what computed them
    drawn: Drawn
    autocast: bool = False  # whether it ran under torch.autocast
    again: dict[str, Tensor] | None = None  # of the second run, where a bit differs
    changed: str = ""  # what the first run changed of the model, where a bit differs


def refer(
    lend: Callable[[], AbstractContextManager[nn.Module]],
    inputs: Any,
    *,
    what: str,
    draws: Draws,
    twice: bool,
    buffers: Collection[str] | None = (),
    **how: Any,
) -> Reference:
    """Run a copy of a model that `lend` gives once, or `twice`; `how` is that of `run_cpu`.

    The second run is of the copy that ran already, on the same inputs and with the same seeds: what it does otherwise
    comes from what the first run left. Inputs that the model writes into are outputs as well, and so are `buffers`, as
    `watching` takes them; the first run then leaves none of the latter.

    Raises: RunError for what the model raises, CaseError when `what` returned something that is no tensor.
    """  # fmt: skip
    with lend() as model:
        before = versions(model)
        restore = twice and (buffers is None or bool(buffers))
        given = fresh(inputs)
        watch = watching(model, given, buffers=buffers, inputs=None, before=inputs, restore=restore)
        with drawing(draws) as drawn, watch as written, watching_autocast("cpu") as autocast:
            outputs, milliseconds, words = run_cpu(model, given, **how)
            outputs = {name: tensor.detach() for name, tensor in tensors_of(outputs, what).items()}
            outputs = fresh(outputs) if twice else outputs  # a model may return a buffer into which it writes
        outputs = written.after(outputs)
        result = dict(milliseconds=milliseconds, words=words, drawn=drawn, autocast=autocast.on)
        if not twice:
            return Reference(outputs=outputs, **result)
        for parameter in model.parameters() if how.get("gradients") else ():  # `backward()` in the model adds to them
            parameter.grad = None
        again = _second_run(model, inputs, what, draws, named_tensors(outputs, (BUFFER,)), how)
        if digest(again) == digest(outputs):
            return Reference(outputs=outputs, **result)
        rewritten = [f"parameter {name}" for name, now in versions(model).items() if before.get(name, now) != now]
        with lend() as other:
            differing = changes(model, other)
        changed_parameters = [item for item in rewritten[:4] if item not in differing.split(", ")]
        changed = ", ".join(filter(None, [*changed_parameters, differing]))
        return Reference(outputs=outputs, again=again, changed=changed, **result)


def _second_run(
    model: nn.Module, inputs: Any, what: str, draws: Draws, buffers: Collection[str], how: dict
) -> dict[str, Tensor]:
    given = fresh(inputs)
    with drawing(draws), watching(model, given, buffers=buffers, inputs=None, before=inputs) as written:
        again, _, _ = run_cpu(model, given, **how)
    return written.after({name: tensor.detach() for name, tensor in tensors_of(again, what).items()})


def roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding: half a last place; of float64, in which it is to be seen, a whole
    one.
    """
    eps = torch.finfo(dtype).eps
    return eps if dtype == torch.float64 else eps / 2


def moved_by_one_rounding(inputs: Any, dtype: torch.dtype) -> Any | None:
    """Float64 inputs, each number of them off by half a last place of `dtype`, up or down by a seeded draw; None where
    none is a fraction.
    """
    generator = torch.Generator().manual_seed(0)
    step = roundoff(dtype)
    touched = False

    def nudge(tensor: Tensor) -> Tensor:
        nonlocal touched
        if not tensor.is_floating_point():
            return tensor
        touched = True
        signs = (
            torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        ).double()  # float32 has no room for 1 + its roundoff
        return tensor * (1 + step * signs)

    nudged = with_tensors_changed(inputs, nudge)
    return nudged if touched else None


def _has_float16_products() -> bool:
    """Whether this CPU multiplies float16 matrices natively; torch's fallback is some thirty times slower than
    float32.
    """
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return probe is None or bool(probe())


class _Float16Products(TorchDispatchMode):
    """Computes products of float16 matrices in float32 and rounds the result once.

    Products of two float16 numbers are exact in float32 and the sum runs in float32, as in torch's own float16 kernel:
    the two differ by a last place in some 0.2 % of the elements.
    """

    PRODUCTS = frozenset(map(aten_operator, "mm addmm bmm baddbmm mv addmv convolution".split())) - {None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in self.PRODUCTS or not _any_half(args):
            return func(*args, **kwargs)
        return func(*[_widened(arg) for arg in args], **kwargs).half()


class Float64Products(TorchDispatchMode):
    """Computes the products of groups, with which mixtures of experts are made, in float64, which torch's kernel
    lacks.
    """

    GROUPED = aten_operator("_grouped_mm")  # None before torch 2.8, where no model calls it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is self.GROUPED and args[0].dtype == torch.float64:
            return _grouped_products(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_products(
    left: Tensor,
    right: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch._grouped_mm: `offs` (G,) says where each group ends, along left's rows, right's columns, or what is summed
    over, where a side is 2-D.
    """
    ends = [] if offs is None else offs.tolist()
    parts = [slice(*item) for item in zip([0, *ends], ends)]
    if left.dim() == 3 and right.dim() == 3:
        result = torch.bmm(left, right)
    elif left.dim() == 2 and right.dim() == 3:
        result = torch.cat([left[part] @ right[group] for group, part in enumerate(parts)])
        result = torch.cat(
            [result, result.new_zeros(left.shape[0] - result.shape[0], result.shape[1])]
        )  # rows of no group
    elif left.dim() == 3:
        result = torch.cat([left[group] @ right[:, part] for group, part in enumerate(parts)], 1)
    else:
        result = torch.stack([left[:, part] @ right[part] for part in parts])
    return result if bias is None else result + bias


def _any_half(args: tuple) -> bool:
    return any(isinstance(arg, Tensor) and arg.dtype == torch.float16 for arg in args)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value
