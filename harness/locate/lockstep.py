"""Lockstep: each call of a torch function runs on the CPU and then on the device, with the CPU's inputs and with the
device's own.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from harness.devices import Device
from harness.devices.device_errors import error_summary
from harness.locate.calls import calling_line
from harness.locate.diagnose import cause_of, rule_of
from harness.locate.finding import FALLS_BACK, GRADIENT, RANDOM, TRANSFORMED, Step, ended, kind_of, raised
from harness.locate.replay import (
    FAILS,
    Replay,
    autocast_now,
    autocasting,
    copies_with_layout,
    copy_strided,
    largest_difference,
    memory_layout,
    mutates,
    name_of,
    on,
    relative_difference,
    tensors_in,
    trains,
)  # fmt: skip
from harness.locate.trace import Trace
from harness.reference import roundoff, version
from harness.torch_private import WeakTensorKeyDictionary, in_transform, tree_map

# The unit of what a difference to the CPU may be, relative, before more is measured: a rounding of half, two of
# float32; in float32 products sixteen, for the order of their sums. Half of it may lie in the norm, all of it in a row,
# a thirty-second in what all elements share, `_ALONE` of it in one element. That is what the limits of the preset
# `floor` leave room for beside the CPU's own error (`References.ratios`); in one row or element of an operator that the
# CPU computes exactly, up to twice that.
SCATTER = {torch.float32: 2 * 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PRODUCT, _ALONE, ALONE_IN_PRODUCTS = 16 * 2.0**-24, 2, 6
_PRODUCTS = (
    "linear",
    "bilinear",
    "matmul",
    "rmatmul",
    "mm",
    "bmm",
    "addmm",
    "addbmm",
    "baddbmm",
    "einsum",
    "tensordot",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
)
UNFILLED = ("empty_like", "new_empty", "new_empty_strided")  # what they hold is nobody's answer
_JUMP = 64  # times its own difference that a result inherits before its arguments are tried as they lie in memory
CAUSES = 3  # wrong operators whose cause is looked for
GRADIENTS = ("grad", "backward")


@contextlib.contextmanager
def named_operators(model: nn.Module) -> Iterator[list[str]]:
    """The path of the module that runs, innermost last, kept by hooks while the block runs."""
    path: list[str] = [""]
    hooks = []

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        path.pop()

    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # which takes none while it runs
            continue
        hooks.append(module.register_forward_pre_hook(lambda module, inputs, name=name: path.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield path
    finally:
        for hook in hooks:
            hook.remove()


class Lockstep(TorchFunctionMode):
    """Runs each call of a torch function on the CPU, then on the device."""

    def __init__(self, device: Device, path: list[str], backward: bool, until: float, allowed: tuple[str, ...] = ()):
        super().__init__()
        self.allowed = allowed  # operators that may fall back to the CPU
        self.fell_back: dict[tuple, list[str]] = {}  # those that do, by function and dtypes
        self.device, self.path, self.backward, self.until = device, path, backward, until
        self.unseen = 0
        self.gone = ""  # what is said of a device that stopped computing
        self.cut = ""  # the first call that gave the device the CPU's numbers for its own
        self.warm: set[tuple] = set()  # the operators that ran with these dtypes and shapes
        self.compiling = 0.0  # seconds that first calls took longer than the next
        self.shadows = WeakTensorKeyDictionary()  # of what the CPU computed: what the device made of its own values
        self.constants = WeakTensorKeyDictionary()  # weights and inputs: the same on both sides
        self.steps: list[Step] = []
        self.trace: Trace | None = None  # of the CPU's calls, views among them
        self.inherited: dict[int, float] = {}  # of the steps, by the number of the call
        self.replay: Replay | None = None  # of the first step that is wrong

    def share(self, model: nn.Module, there: nn.Module, inputs: Any) -> None:
        """Take the weights of the model's copy on the device for those of the model, and trace what is given to it."""
        self.trace = Trace(model, inputs)
        restored(there, model)
        known = dict([*there.named_parameters(), *there.named_buffers()])
        for name, item in [*model.named_parameters(), *model.named_buffers()]:
            self.constants[item] = known[name].detach()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.gone or time.monotonic() > self.until:
            self.trace.sketching = False
            returned = func(*args, **kwargs)
            self.unseen += bool(tensors_in(returned))
            self._record(func, args, kwargs, tensors_in(returned), [])
            return returned
        if in_transform():
            return self._transformed(func, args, kwargs)
        given = tensors_in((args, kwargs))
        writes = mutates(func, kwargs)
        needs_copies = writes or trains(func, args, kwargs)
        before = copies_with_layout((args, kwargs), "cpu") if needs_copies else (args, kwargs)
        failed = self._keep(given) if writes else None
        state, versions = torch.get_rng_state(), [version(argument) for argument in given]
        traced = self.trace.before(func, given)
        returned = func(*args, **kwargs)
        self._record(func, args, kwargs, tensors_in(returned), traced)
        results = tensors_in(returned) or (given[:1] if writes else [])
        drawn, wrote = (
            not torch.equal(state, torch.get_rng_state()),
            versions != [version(argument) for argument in given],
        )
        if failed is None:
            try:
                with saved_tensors_hooks(_as_it_is, _as_it_is):  # torch.utils.checkpoint counts what the model saves
                    self._beside(func, args, kwargs, before, given, results, wrote=wrote and not writes, drawn=drawn)
            except FAILS as error:  # of a copy to the device; operators are looked after where they run
                failed = error
        if failed is not None:
            self._failed(func, results or given, failed)
        return returned

    def _transformed(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A call inside of vmap or torch.func.grad: what leaves the transform is the CPU's on both sides."""
        returned = func(*args, **kwargs)
        results = tensors_in(returned)
        self._record(func, args, kwargs, results, [])
        if results and getattr(func, "__name__", "") != "__get__":
            self.cut = self.cut or self._name(func)
            self._add(func, results, note=TRANSFORMED)
        return returned

    def _record(self, func: Callable, args: tuple, kwargs: dict, results: list[Tensor], traced: list) -> None:
        self.trace.after(traced, func, args, kwargs, results, self.path[-1])

    def followed(self, output: Any) -> list[Tensor]:
        """What the device has made of the tensors that the model returned, from its own values, on the CPU."""
        return [self.shadows[tensor].cpu() if tensor in self.shadows else tensor for tensor in tensors_in(output)]

    def _keep(self, given: list[Tensor]) -> Exception | None:
        """Give the device what an operator writes into, as it was before the write; returns what the device raised, if
        it did.
        """
        try:
            for argument in given:
                if argument not in self.shadows:
                    self.shadows[argument] = copy_strided(argument, self.device.torch_device)
        except FAILS as error:
            return error
        return None

    def _beside(
        self, func: Callable, args: tuple, kwargs: dict, before: tuple, given: list[Tensor], results: list[Tensor], *,
        wrote: bool, drawn: bool,
    ) -> None:  # fmt: skip
        """Do on the device what the CPU has done. `wrote`: into inputs, unasked; `drawn`: random numbers."""
        writes = mutates(func, kwargs)
        if wrote:
            self.cut = self.cut or self._name(func)
            self._take(
                func,
                [*results, *given],
                "it wrote into its input and its name does not say so: the device goes on with the CPU's numbers",
            )
        elif drawn:
            fallen = self._fallen(func, given, self._replay(func, before).on_device)
            self.cut = self.cut or (self._name(func) if given else "")
            self._take(func, results, "; ".join(filter(None, (fallen, RANDOM))))
        elif name_of(func) in GRADIENTS:
            self.cut = self.cut or self._name(func)
            self._take(func, results, GRADIENT)
        elif (not given and results) or name_of(func) in UNFILLED:
            self._take(func, results)
        elif results and (writes or not all(any(result is other for other in given) for result in results)):
            self._step(func, args, kwargs, before, given, results, writes)

    def _failed(self, func: Callable, results: list[Tensor], error: Exception) -> None:
        """Add the step of an operator at which the device raised, and go on with the CPU's numbers.

        The search ends where the device computes no more.
        """
        at = self._at(func)
        if self.device.ends(f"{self.device.where}: {error_summary(error)}", error, at):
            self.gone = self.device.stopped
        try:
            if not self.gone:
                self._take(func, results)
        except FAILS as again:
            self.gone = f"at {at} it takes no tensors any more: {error_summary(again)}"
        if results:
            self._add(func, results, reasons=(raised(error),), own=math.inf, inherited=math.inf)

    def _at(self, func: Callable) -> str:
        """An operator as messages about the device name it."""
        return f"{self._name(func)}, locating"

    def _name(self, func: Callable) -> str:
        return f"{self.path[-1] or 'the model'}: {name_of(func)}"

    def _take(self, func: Callable, results: list[Tensor], note: str = "") -> None:
        """Let the device go on with the CPU's numbers."""
        for result in results:
            self.shadows[result] = copy_strided(result, self.device.torch_device)
        if note and results:
            self._add(func, results, note=note)

    def _step(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        before: tuple,
        given: list[Tensor],
        results: list[Tensor],
        writes: bool,
    ) -> None:
        replay = self._replay(func, before)
        made, began = None, time.monotonic()
        try:
            made = self._follow(func, args, kwargs, results)
            self.device.synchronize()  # what fails in torch_npu's queue raises here, not at the next operator
            followed = time.monotonic()
            if not writes and all(_is_view(result, given) for result in results):
                return None  # a view computes nothing
            outcome = replay.on_device(None if writes else self._exact)
        except FAILS as error:
            if made is not None and not _can_be_made_again(replay):
                self._add(func, results, note=_not_again(error))
            else:
                self._failed(func, results, error)
            return None
        self._count(func, given, followed - began, time.monotonic() - followed)
        if replay.autocast is not None:
            outcome, note = _as_the_cpu_casts(outcome, results)
            if note:
                return self._add(
                    func,
                    results,
                    own=largest_difference(outcome, results),
                    inherited=largest_difference(made, results),
                    note=note,
                )
        try:
            self._hold(replay, results, largest_difference(made, results), outcome)
        except FAILS as error:
            self._add(func, results, note=_not_again(error))

    def _replay(self, func: Callable, before: tuple) -> Replay:
        return Replay(func=func, args=before[0], kwargs=before[1], device=self.device, autocast=autocast_now())

    def _count(self, func: Callable, given: list[Tensor], first: float, second: float) -> None:
        """Add to the limit what the first call of an operator with these dtypes and shapes took longer than the second.

        Both are in seconds.
        """
        key = (func, *((argument.dtype, argument.shape) for argument in given))
        if key not in self.warm:
            self.warm.add(key)
            self.compiling += max(first - second, 0.0)
            self.until += max(first - second, 0.0)

    def _follow(self, func: Callable, args: tuple, kwargs: dict, results: list[Tensor]) -> list[Tensor]:
        """Run the operator on what the device has computed so far, and return its results."""
        args, kwargs = tree_map(self._shadow, args), tree_map(self._shadow, kwargs)
        with self.device.interruptible(), autocasting(autocast_now(), self.device.torch_device.type):
            made = tensors_in(func(*args, **kwargs)) or tensors_in(args)[:1]
        for here, there in zip(results, made, strict=True):
            self.shadows[here] = there.to(self.device.torch_device)
        return made

    def _shadow(self, value: Any) -> Any:
        """An argument on the device with the device's own value."""
        if not isinstance(value, Tensor):
            return on(self.device.torch_device, value)
        return self.shadows[value] if value in self.shadows else self._constant(value)

    def _constant(self, value: Tensor) -> Tensor:
        if value not in self.constants:
            self.constants[value] = copy_strided(value, self.device.torch_device)
        return self.constants[value]

    def _exact(self, value: Tensor) -> Tensor:
        """A tensor on the device with the CPU's value."""
        return (
            self._constant(value)
            if value in self.constants and value not in self.shadows
            else copy_strided(value, self.device.torch_device)
        )

    def _hold(self, replay: Replay, results: list[Tensor], inherited: float, result: list[Tensor]) -> None:
        """Judge what the device made of the operator with the CPU's inputs: `result`."""
        func, first = replay.func, not any(step.bad for step in self.steps)
        own = largest_difference(result, results)
        ratio, reasons = (None, ()) if is_explained(result, results, name_of(func)) else replay.judged(result, results)
        if reasons and self._overwritten(replay):
            result = replay.on_device()
            own = largest_difference(result, results)
            ratio, reasons = (
                (None, ()) if is_explained(result, results, name_of(func)) else replay.judged(result, results)
            )
        for what, more in self._besides(replay) if not reasons else ():
            try:
                there, here = more.on_device(), more.on_cpu()
            except FAILS as error:
                return self._failed(func, results, error)
            if not is_explained(there, here, name_of(func)):
                reasons = tuple(f"{what}: {item}" for item in more.judged(there, here)[1])
            if reasons:
                replay, result, results = more, there, here
                break
        cause, lies = "", "" if reasons else self._lies(replay, results, own, inherited)
        if lies:
            result = replay.on_device_with_layout()
            own, (ratio, reasons) = largest_difference(result, results), replay.judged(result, results)
            cause = f"with copies of its arguments it passes: {lies}" if reasons else ""
        elif reasons and sum(step.bad for step in self.steps) < CAUSES:
            cause = cause_of(replay, result, results)
        elif ratio is not None and not reasons:
            with contextlib.suppress(*FAILS):
                cause = rule_of(replay, result, results)
        note = self._fallen(replay.func, replay.tensors, replay.on_device)
        cause = "; ".join(filter(None, (cause, note))) if reasons else cause
        if reasons:
            self.gone = ended(self.device, self._at(func))
            if self.gone:  # what it answered is no evidence about this operator
                reasons, cause = (f"the device dropped its work without a word, here or before: {self.gone}",), ""
        if reasons and first and not self.gone and not lies:
            self.replay = replay
        self._add(func, results, own=own, ratio=ratio, reasons=reasons, cause=cause, inherited=inherited, note=note)
        return None

    def _besides(self, replay: Replay) -> Iterator[tuple[str, Replay]]:
        """What a call does beside its results, as calls of their own: running statistics, and gradients on request."""
        pairs = (
            ("running statistics", replay.statistics()),
            ("backward", replay.backward() if self.backward else None),
        )
        yield from ((what, pair) for what, pair in pairs if pair is not None)

    def _lies(self, replay: Replay, results: list[Tensor], own: float, inherited: float) -> str:
        """How the arguments lie in memory, in words, where the device is wrong with them so and right with copies."""
        lies = memory_layout(replay.tensors)
        if not lies or not inherited > _JUMP * max(own, roundoff(replay.narrow)):
            return ""
        if is_explained(replay.on_device_with_layout(), results, name_of(replay.func)):
            return ""
        again = replay.on_device()  # a fault that comes and goes hangs on no place
        return (
            lies if is_explained(again, results, name_of(replay.func)) or not replay.judged(again, results)[1] else ""
        )

    def _overwritten(self, replay: Replay) -> bool:
        """Whether an earlier operator changed a weight or an input of this one on the device, which is put right."""
        known = [(self.constants[tensor], tensor) for tensor in replay.tensors if tensor in self.constants]
        return bool([there for there, here in known if put_right(there, here)])

    def _fallen(self, func: Callable, given: list[Tensor], call: Callable[[], Any]) -> str:
        """What of a call the CPU computes in place of the device, as a note. It is watched in a run of its own, which
        watching changes; once for each operator and dtypes.
        """
        key = (func, *(argument.dtype for argument in given))
        if key not in self.fell_back:
            with self.device.watch() as seen, contextlib.suppress(*FAILS):
                call()
            self.fell_back[key] = [item for item in seen.fell_back if item not in self.allowed]
        return f"{FALLS_BACK}: {', '.join(self.fell_back[key])}" if self.fell_back[key] else ""

    def _add(self, func: Callable, results: list[Tensor], **more: Any) -> None:
        given = dict(own=math.nan, ratio=None, inherited=math.nan) | more
        self.inherited[len(self.trace.calls) - 1] = given["inherited"]
        where = dict(operator=name_of(func), module=self.path[-1], place=calling_line())
        self.steps.append(Step(number=len(self.steps), **kind_of(results), **where, **given))


def restored(there: nn.Module, here: nn.Module) -> list[str]:
    """Give a copy of a model on a device the weights of `here` where a run overwrote them; the names of those."""
    known = dict([*here.named_parameters(), *here.named_buffers()])
    copies = [*there.named_parameters(), *there.named_buffers()]
    return [name for name, copy in copies if name in known and put_right(copy, known[name])]


def put_right(there: Tensor, here: Tensor) -> bool:
    """Whether a tensor on a device has other bits than that of the CPU that it is a copy of; then it is copied
    again.
    """
    there, here = there.detach(), here.detach()
    if there.layout != torch.strided or there.dtype != here.dtype or there.shape != here.shape:
        return False
    if torch.equal(_bits(there.cpu()), _bits(here)):
        return False
    with torch.no_grad():
        there.copy_(here)
    return True


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0)


def _can_be_made_again(replay: Replay) -> bool:
    """Whether the CPU can make the call a second time: an iterator among the arguments may be used up."""
    try:
        replay.on_cpu()
    except FAILS:
        return False
    return True


def _not_again(error: Exception) -> str:
    return f"it could not be made again: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _as_the_cpu_casts(result: list[Tensor], results: list[Tensor]) -> tuple[list[Tensor], str]:
    """Results of the device under torch.autocast, whose lists of operators differ by device, in the CPU's dtypes.

    And a note where the device's dtype is the narrower one: its roundings are not the operator's.
    """
    cast = []
    for tensor, other in zip(result, results):
        fractions = tensor.is_floating_point() and other.is_floating_point() and tensor.dtype != other.dtype
        if fractions and tensor.dtype.itemsize < other.dtype.itemsize:
            narrow, wide = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, other.dtype))
            return result, f"torch.autocast computes it in {narrow} on the device, in {wide} on the CPU: not judged"
        cast.append(tensor.to(other.dtype) if fractions else tensor)
    return cast, ""


def _is_view(result: Tensor, given: list[Tensor]) -> bool:
    return result.layout == torch.strided and any(
        argument.layout == torch.strided
        and argument.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
        for argument in given
    )


def is_explained(result: list[Tensor], results: list[Tensor], operator: str) -> bool:
    """Whether what the device returned is the CPU's but for scattered roundings; what is no fraction must be equal."""
    for tensor, other in zip(result, results):
        away = relative_difference(tensor, other)
        if tensor.dtype != other.dtype or (away and not _is_scattered(tensor.detach(), other.detach(), away, operator)):
            return False
    return True


def _is_scattered(actual: Tensor, expected: Tensor, own: float, operator: str) -> bool:
    """Whether two results, `own` apart, differ as roundings do: no element, no row (along the last axis) and no factor
    or summand of all holds more of it than they leave.
    """
    product = operator in _PRODUCTS and expected.dtype == torch.float32
    unit = PRODUCT if product else SCATTER.get(expected.dtype, 0.0)
    if not own <= unit / 2 or expected.layout != torch.strided:
        return False
    peak = float(expected.abs().max())
    if not 0 < peak < math.inf:
        return False
    expected = expected.float() / peak  # whose squares neither overflow nor vanish
    away, size = actual.float() / peak - expected, float(torch.linalg.vector_norm(expected))
    scale = size / math.sqrt(expected.numel())
    if expected.dim() > 1 and expected.shape[-1] > 1:
        rows = torch.linalg.vector_norm(expected, dim=-1)
        if bool((torch.linalg.vector_norm(away, dim=-1) > unit * rows).any()):
            return False
        scale = (rows / math.sqrt(expected.shape[-1])).clamp(min=scale / 10)[..., None]
    if bool((away.abs() > (ALONE_IN_PRODUCTS if product else _ALONE) * unit * (expected.abs() + scale)).any()):
        return False
    shift, gain = (
        float(away.mean()) * math.sqrt(expected.numel()) / size,
        float(away.flatten() @ expected.flatten()) / size**2,
    )
    return max(abs(shift), abs(gain)) <= unit / 32
