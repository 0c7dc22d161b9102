"""Where it diverged: the model runs once on the CPU, and beside it every operator on the device, twice.

With the CPU's exact inputs an operator shows its *own* error; with what the device itself computed upstream, what it *inherited* as well. So the
first operator whose own error is above its floor is the one that is wrong, however far the damage has spread. Nothing is dumped: what is kept is what the
model itself keeps alive, once more on the device.

An operator is a call of a torch function as the model makes it, `linear`, `softmax`, `add_`: each side computes it in its own way.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.case import Case, copy_of, inputs_of, without_npu
from harness.devices import Device, unknown_rounding
from harness.devices.device_errors import fault_in, summary
from harness.errors import DeviceError, HarnessError
from harness.evidence import cause_of, rule_of
from harness.forecast import rounding, rules_of
from harness.reference import Models, fresh, require_float32, roundoff, run, seeded, tensors_of
from harness.torch_private import WeakTensorKeyDictionary, tree_map
from harness.trial import FAILS, Trial, apart, budget, copies, copy_strided, difference, mutates, name_of, on, tensors_in

# The unit of what a difference to the CPU may be, relative, before more is measured: a rounding of half, two of float32; in float32 products sixteen, for the order of
# their sums. Half of it may lie in the norm, all of it in a row, a thirty-second in what all elements share, `ALONE` of it in one element. That is what the limits of the
# preset `floor` leave room for beside the CPU's own error (`References.ratios`); in one row or element of an operator that the CPU computes exactly, up to twice that.
SCATTER = {torch.float32: 2 * 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
PRODUCT, ALONE, ALONE_IN_PRODUCTS = 16 * 2.0**-24, 2, 6
PRODUCTS = (
    "linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "einsum", "tensordot", "scaled_dot_product_attention", "multi_head_attention_forward",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru", "rnn_tanh", "rnn_relu",
)  # fmt: skip
LEVELS = ("operators", "modules")
SLACK, DEEP = 3.0, 16  # times its floor that a module may lose; roundings that its depth may add to it
FALLS_BACK = "the CPU computes it in place of the device"
RANDOM = "random: the device goes on with the CPU's numbers"
GRADIENTS, GRADIENT = ("grad", "backward"), "a gradient: looked at with backward"
UNFILLED = ("empty_like", "new_empty", "new_empty_strided")  # what they hold is nobody's answer
CAUSES = 3  # wrong operators whose cause is looked for
TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator, as the model called it."""

    number: int
    operator: str
    module: str  # the path of the module that called it, "" for the model itself
    place: str  # the line, "aimv2.py:212"
    dtype: str
    shape: tuple[int, ...]
    own: float  # relative L2 difference to the CPU with the CPU's inputs
    ratio: float | None  # own error to float64 over the floor; None where it is below what is measured
    inherited: float  # relative L2 difference to the CPU with the device's own inputs
    reasons: tuple[str, ...] = ()  # why it is not as a healthy device computes it
    cause: str = ""  # what the evidence names
    note: str = ""  # "random", "on the CPU alone", …

    @property
    def bad(self) -> bool:
        return bool(self.reasons)

    @property
    def name(self) -> str:
        """Where it is: "trunk.blocks.3.mlp.fc2: linear (aimv2.py:212)"."""
        return f"{self.module or 'the model'}: {self.operator}" + (f" ({self.place})" if self.place else "")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Every operator of a forward, and the first that is wrong."""

    case: str
    dtype: str
    seed: int | None
    steps: tuple[Step, ...]
    level: str = "operators"
    unseen: int = 0  # operators that were not looked at, because the time was over
    gone: str = ""  # where the device stopped computing while it was looked at, and what it said; "" where it did not
    compiling: float = 0.0  # seconds that first calls of operators took longer than the next, which no limit counts
    otherwise: float = 0.0  # relative L2 difference of the CPU's output in this process to that in one without torch_npu
    trial: Any = field(default=None, repr=False)  # of the first, to make a repro of

    @property
    def first(self) -> Step | None:
        """The first operator whose own error is above its floor; of modules the innermost."""
        bad = [each for each in self.steps if each.bad]
        if not bad or self.level == "operators":
            return bad[0] if bad else None
        return next((each for each in bad if f"{each.module}.".startswith(f"{bad[0].module}.") and not any(other.module.startswith(each.module + ".") for other in bad)), bad[0])

    @property
    def has_gradients(self) -> bool:
        """Whether the model takes gradients itself, which only `backward` looks into."""
        return any(each.note == GRADIENT for each in self.steps)

    @property
    def fallen(self) -> list[Step]:
        """The operators that the CPU computes in place of the device."""
        return [each for each in self.steps if each.note.startswith(FALLS_BACK)]

    def ranking(self, count: int = 10) -> list[Step]:
        """The operators with the largest own errors; those that are wrong first, in their order, then those that fall back to the CPU."""
        marked = [each for each in self.steps if each.bad] + [each for each in self.fallen if not each.bad]
        return (marked + sorted((each for each in self.steps if each not in marked and each.own == each.own), key=lambda each: -each.own))[:count]

    def sentences(self) -> str:
        """The finding in three sentences at most."""
        arithmetic = [each for each in self.steps if each.own == each.own]
        what = self.level.removesuffix("s")
        why = "the device does not compute any more" if self.gone else "the time was over"
        over = f" {self.unseen} more were not looked at: {why}." if self.unseen else ""
        if self.gone and self.first is None:
            looked = f"while {len(self.steps)} {self.level} were looked at and none of them raised, so none is named"
            return f"The device stopped computing {looked}: {self.gone}."
        if not self.steps:
            return f"Nothing was looked at.{over}" if self.unseen else f"Nothing was looked at: the model calls no {what} of its own."
        if self.first is None:
            largest = max(arithmetic, key=lambda each: each.own, default=None)
            said = f"No {what} is wrong: each of {len(self.steps)} is within its floor with the CPU's inputs.{over}"
            if self.otherwise:
                return (
                    f"{said} But the model is another where torch_npu is: what it gives on the CPU of this process is {self.otherwise:.2e} away from what it gives in one without, "
                    "which the row is held against (transformers turns masks that are not boolean around)."
                )
            if self.fallen:
                said += f" {len(self.fallen)} fell back to the CPU, the first is {self.fallen[0].name} ({self.fallen[0].note.removeprefix(FALLS_BACK + ': ')})."
            if largest is None or not largest.own:
                return said
            return f"{said} The largest own difference is {largest.own:.2e}, {largest.name}{f': {largest.cause}' if largest.cause else ''}."
        others = sum(each.bad for each in self.steps) - 1 if self.level == "operators" else 0
        said = f"{self.first.name} is the first wrong {what}: {self.first.reasons[0]}."
        said += f" {self.first.cause[0].upper()}{self.first.cause[1:]}." if self.first.cause else ""
        if self.level == "modules":
            return said + over
        if self.gone:
            return said + over
        return said + (f" {others} more are wrong by themselves." if others else " No other operator is wrong by itself: what comes after inherits.") + over


def locate(
    case: Case, seed: int | None, device: Device, *, models: Models | None = None, level: str = "operators", backward: bool = False, limit: float = math.inf
) -> Finding:
    """Run `case` with the inputs of `seed` on the CPU, each operator beside it on `device`.

    At the level "modules" whole modules run beside it instead, and of one that is wrong those that it is made of: a fast first look.
    What the device raises is a reason of the operator that raised. Where it computes no more, the search ends there.
    With `backward` each operator's gradients are held against each other too, for a seeded gradient that flows into its results.
    After `limit` seconds no further operator is looked at; what the first call of an operator takes longer than the
    next does not count, since a card may compile there.

    Raises: ValueError for another level; LossyReferenceError, CaseError, RunError and DeviceError as `validate` does.
    """
    if level not in LEVELS:
        raise ValueError(f"there is no level {level!r}; there are {', '.join(LEVELS)}")
    require_float32()
    models = models if models is not None else Models()
    inputs = inputs_of(case, seed)
    at = f"{case.name} {case.dtype}" + ("" if seed is None else f" seed {seed}") + ", locating"
    device.check(at)
    with contextlib.ExitStack() as lent:
        model = lent.enter_context(copy_of(models, case, "cpu"))
        with device.telling(at):
            there = lent.enter_context(copy_of(models, case, device.torch_device))
        lent.enter_context(seeded(seed or 0, *filter(None, [device.generator])))
        how = dict(level=level, backward=backward, limit=limit, at=at)
        return _located(case, seed, device, models, model, there, inputs, **how)


def _located(
    case: Case, seed: int | None, device: Device, models: Models, model: nn.Module, there: nn.Module, inputs: Any, *,
    level: str, backward: bool, limit: float, at: str,
) -> Finding:  # fmt: skip
    """`locate` on two copies of the model that may run."""
    more: dict[str, Any] = {}
    if level == "modules":
        beside = _Modules(model, there, device)
        steps = beside.steps(lambda: run(model, fresh(inputs), forward=case.forward, where="on the CPU", gradients=case.gradients))
        more = {"steps": tuple(steps), "gone": beside.gone}
    else:
        with named(model) as path:
            until, own = time.monotonic() + limit, fresh(inputs)
            mode = _Lockstep(device, path, backward, until, case.fallbacks)
            mode.share(model, there)
            with mode:
                output = run(model, own, forward=case.forward, where="on the CPU", gradients=case.gradients)
        more = {"steps": tuple(mode.steps), "trial": mode.trial, "unseen": mode.unseen}
        more |= {"gone": mode.gone, "compiling": mode.compiling}
        undecided = any(each.bad or RANDOM in each.note for each in mode.steps)
        if not mode.unseen and not mode.gone and time.monotonic() < mode.until and not undecided:
            more["otherwise"] = _otherwise(case, seed, models, model, inputs, device, output)
    more["gone"] = more["gone"] or _ended(device, at)
    return Finding(case=case.name, dtype=case.dtype, seed=seed, level=level, **more)


def _ended(device: Device, at: str) -> str:
    """What `device.check` says of a device that computes no more; "" of one that does."""
    try:
        device.check(at)
    except DeviceError as error:
        return str(error)
    return ""


def _raised(error: Exception) -> str:
    """What the device raised, as a reason of the operator that ran."""
    fault = fault_in(str(error))
    return f"the device raised {summary(error)}" + (f" ({fault.sentence})" if fault else "")


def _otherwise(case: Case, seed: int | None, models: Models, model: nn.Module, inputs: Any, device: Device, output: Any) -> float:
    """How far the CPU's output lies from that of a process without torch_npu; 0 within roundings, or where this process does not repeat itself."""
    try:
        alone = without_npu(case, models, inputs, device, seed)
        if alone is None:
            return 0.0
        here, again = (tensors_of(each, case.name) for each in (output, run(model, fresh(inputs), forward=case.forward, where="on the CPU", gradients=case.gradients)))
    except HarnessError:
        return 0.0
    names = [name for name in alone if name in here and name in again]
    if any(difference(again[name], here[name]) for name in names):
        return 0.0
    away = max((difference(here[name], alone[name]) for name in names), default=0.0)
    return away if away > DEEP * roundoff(case.torch_dtype) else 0.0


class _Modules:
    """Runs modules of a model on the CPU, and each on the device with the CPU's inputs."""

    def __init__(self, model: nn.Module, there: nn.Module, device: Device):
        self.model, self.there, self.device = model, there, device
        stack = device.stack
        self.rules, self.known = rules_of(stack), unknown_rounding(stack) is None
        self.gone = ""  # what is said of a device that stopped computing

    def steps(self, forward: Callable[[], Any]) -> Iterator[Step]:
        """The children of the model, then those of the first that is wrong, and so on; none after the device's end."""
        at, number = "", 0
        while not self.gone:
            children = _called(self.model.get_submodule(at), at)
            steps: list[Step] = []
            with contextlib.ExitStack() as hooks:
                for name in children:
                    look = functools.partial(self._look, steps, number, name)
                    hooks.callback(self.model.get_submodule(name).register_forward_hook(look, with_kwargs=True).remove)
                forward()
            yield from steps
            number += len(steps)
            wrong = next((each.module for each in steps if each.bad), "")
            if not wrong or not _called(self.model.get_submodule(wrong), wrong):
                return
            at = wrong

    def _look(
        self, steps: list[Step], number: int, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any
    ) -> None:
        """Add the step of one module that the CPU has run."""
        expected = tensors_in(output)
        if not expected or self.gone:
            return
        where = dict(number=number + len(steps), operator=type(module).__name__, module=name, place="")
        where |= dict(inherited=math.nan, **_kind(expected))
        try:
            found = Trial(func=self.there.get_submodule(name), args=args, kwargs=kwargs, device=self.device).on_device()
        except FAILS as error:
            if self.device.ends(f"{self.device.where}: {summary(error)}", error, f"{name}, locating"):
                self.gone = self.device.stopped
            steps.append(Step(own=math.inf, ratio=None, reasons=(_raised(error),), **where))
            return
        with rounding(self.rules):
            healthy = tensors_in(type(module).forward(module, *args, **kwargs))
        own = apart(found, expected)
        floating = [each.dtype for each in expected if each.is_floating_point()]
        floor = apart(healthy, expected) + (DEEP * roundoff(floating[0]) if floating else 0.0)
        floor = floor if self.known or not floating else max(floor, budget(floating[0]) / SLACK)
        differs = f"it differs from the CPU by {own:.2e} where a healthy device would by {floor:.2e}"
        text = () if own <= SLACK * floor else (differs,)
        if text:
            self.gone = _ended(self.device, f"{name}, locating")
        if not self.gone:  # what it answered is no evidence about this module
            steps.append(Step(own=own, ratio=own / floor if floor else None, reasons=text, **where))


def _called(module: nn.Module, at: str) -> list[str]:
    """The paths of the modules that a module calls itself; a list or a dict of modules is never called, what it holds is."""
    found = []
    for name, child in module.named_children():
        path = f"{at}.{name}" if at else name
        found += _called(child, path) if type(child).forward is nn.Module.forward else [path]
    return found


@contextlib.contextmanager
def named(model: nn.Module) -> Iterator[list[str]]:
    """The path of the module that runs, innermost last, kept by hooks while the block runs."""
    path: list[str] = [""]
    hooks = []

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        path.pop()

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda module, inputs, name=name: path.append(name)))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield path
    finally:
        for each in hooks:
            each.remove()


class _Lockstep(TorchFunctionMode):
    """Runs each call of a torch function on the CPU, then on the device."""

    def __init__(self, device: Device, path: list[str], backward: bool, until: float, allowed: tuple[str, ...] = ()):
        super().__init__()
        self.allowed = allowed  # operators that may fall back to the CPU
        self.fell_back: dict[tuple, list[str]] = {}  # those that do, by function and dtypes
        self.device, self.path, self.backward, self.until = device, path, backward, until
        self.unseen = 0
        self.gone = ""  # what is said of a device that stopped computing
        self.warm: set[tuple] = set()  # the operators that ran with these dtypes and shapes
        self.compiling = 0.0  # seconds that first calls took longer than the next
        self.shadows = WeakTensorKeyDictionary()  # of what the CPU computed: what the device made of its own values
        self.constants = WeakTensorKeyDictionary()  # weights and inputs: the same on both sides
        self.steps: list[Step] = []
        self.trial: Trial | None = None  # of the first step that is wrong

    def share(self, model: nn.Module, there: nn.Module) -> None:
        """Take the weights of the model's copy on the device for those of the model."""
        known = dict([*there.named_parameters(), *there.named_buffers()])
        for name, each in [*model.named_parameters(), *model.named_buffers()]:
            self.constants[each] = known[name].detach()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.gone or time.monotonic() > self.until:
            returned = func(*args, **kwargs)
            self.unseen += bool(tensors_in(returned))
            return returned
        writes = mutates(func, kwargs)
        given = tensors_in((args, kwargs))
        before = copies((args, kwargs), "cpu") if writes else (args, kwargs)
        failed = self._keep(given) if writes else None
        state, versions = torch.get_rng_state(), [_version(each) for each in given]
        returned = func(*args, **kwargs)
        results = tensors_in(returned) or (given[:1] if writes else [])
        drawn, wrote = not torch.equal(state, torch.get_rng_state()), versions != [_version(each) for each in given]
        if failed is None:
            try:
                self._beside(func, args, kwargs, before, given, results, wrote=wrote and not writes, drawn=drawn)
            except FAILS as error:  # of a copy to the device; operators are looked after where they run
                failed = error
        if failed is not None:
            self._failed(func, results or given, failed)
        return returned

    def _keep(self, given: list[Tensor]) -> Exception | None:
        """Give the device what an operator writes into, as it was before the write; returns what the device raised, if it did."""
        try:
            for each in given:
                if each not in self.shadows:
                    self.shadows[each] = copy_strided(each, self.device.torch_device)
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
            self._take(func, [*results, *given], "it wrote into its input and its name does not say so: the device goes on with the CPU's numbers")
        elif drawn:
            fallen = self._fallen(func, given, lambda: Trial(func=func, args=before[0], kwargs=before[1], device=self.device).on_device())
            self._take(func, results, "; ".join(filter(None, (fallen, RANDOM))))
        elif name_of(func) in GRADIENTS:
            self._take(func, results, GRADIENT)
        elif not given and results or name_of(func) in UNFILLED:
            self._take(func, results)
        elif results and (writes or not all(any(each is other for other in given) for each in results)):
            self._step(func, args, kwargs, before, given, results, writes)

    def _failed(self, func: Callable, results: list[Tensor], error: Exception) -> None:
        """Add the step of an operator at which the device raised, and go on with the CPU's numbers.

        The search ends where the device computes no more.
        """
        at = self._at(func)
        if self.device.ends(f"{self.device.where}: {summary(error)}", error, at):
            self.gone = self.device.stopped
        try:
            if not self.gone:
                self._take(func, results)
        except FAILS as again:
            self.gone = f"at {at} it takes no tensors any more: {summary(again)}"
        if results:
            self._add(func, results, reasons=(_raised(error),), own=math.inf, inherited=math.inf)

    def _at(self, func: Callable) -> str:
        """An operator as messages about the device name it."""
        return f"{self.path[-1] or 'the model'}: {name_of(func)}, locating"

    def _take(self, func: Callable, results: list[Tensor], note: str = "") -> None:
        """Let the device go on with the CPU's numbers."""
        for each in results:
            self.shadows[each] = copy_strided(each, self.device.torch_device)
        if note and results:
            self._add(func, results, note=note)

    def _step(self, func: Callable, args: tuple, kwargs: dict, before: tuple, given: list[Tensor], results: list[Tensor], writes: bool) -> None:
        trial = Trial(func=func, args=before[0], kwargs=before[1], device=self.device)
        made, began = None, time.monotonic()
        try:
            made = self._follow(func, args, kwargs, results)
            self.device.synchronize()  # what fails in torch_npu's queue raises here, not at the next operator
            followed = time.monotonic()
            if not writes and all(_is_view(each, given) for each in results):
                return  # a view computes nothing
            found = trial.on_device(None if writes else self._exact)
        except FAILS as error:
            if made is not None and not _can_be_made_again(trial):
                self._add(func, results, note=_not_again(error))
            else:
                self._failed(func, results, error)
            return
        self._count(func, given, followed - began, time.monotonic() - followed)
        try:
            self._hold(trial, results, apart(made, results), found)
        except FAILS as error:
            self._add(func, results, note=_not_again(error))

    def _count(self, func: Callable, given: list[Tensor], first: float, second: float) -> None:
        """Add to the limit what the first call of an operator with these dtypes and shapes took longer than the second.

        Both are in seconds.
        """
        key = (func, *((each.dtype, each.shape) for each in given))
        if key not in self.warm:
            self.warm.add(key)
            self.compiling += max(first - second, 0.0)
            self.until += max(first - second, 0.0)

    def _follow(self, func: Callable, args: tuple, kwargs: dict, results: list[Tensor]) -> list[Tensor]:
        """Run the operator on what the device has computed so far, and return its results."""
        args, kwargs = tree_map(self._shadow, args), tree_map(self._shadow, kwargs)
        with self.device.interruptible():
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
        return self._constant(value) if value in self.constants and value not in self.shadows else copy_strided(value, self.device.torch_device)

    def _hold(self, trial: Trial, results: list[Tensor], inherited: float, found: list[Tensor]) -> None:
        """Judge what the device made of the operator with the CPU's inputs: `found`."""
        func, first = trial.func, not any(each.bad for each in self.steps)
        own = apart(found, results)
        ratio, reasons = (None, ()) if _is_explained(found, results, name_of(func)) else trial.judged(found, results)
        back = trial.backward() if self.backward and not reasons else None
        if back is not None:
            try:
                there, here = back.on_device(), back.on_cpu()
            except FAILS as error:
                return self._failed(func, results, error)
            reasons = () if _is_explained(there, here, name_of(func)) else tuple(f"backward: {each}" for each in back.judged(there, here)[1])
            trial, found, results = (back, there, here) if reasons else (trial, found, results)
        cause = ""
        if reasons and sum(each.bad for each in self.steps) < CAUSES:
            cause = cause_of(trial, found, results)
        elif ratio is not None and not reasons:
            with contextlib.suppress(*FAILS):
                cause = rule_of(trial, found, results)
        note = self._fallen(trial.func, trial.tensors, trial.on_device)
        cause = "; ".join(filter(None, (cause, note))) if reasons else cause
        if reasons:
            self.gone = _ended(self.device, self._at(func))
            if self.gone:  # what it answered is no evidence about this operator
                reasons, cause = (f"the device dropped its work without a word, here or before: {self.gone}",), ""
        if reasons and first and not self.gone:
            self.trial = trial
        self._add(func, results, own=own, ratio=ratio, reasons=reasons, cause=cause, inherited=inherited, note=note)

    def _fallen(self, func: Callable, given: list[Tensor], call: Callable[[], Any]) -> str:
        """What of a call the CPU computes in place of the device, as a note. It is watched in a run of its own, which watching changes; once for each operator and dtypes."""
        key = (func, *(each.dtype for each in given))
        if key not in self.fell_back:
            with self.device.watch() as seen, contextlib.suppress(*FAILS):
                call()
            self.fell_back[key] = [each for each in seen.fell_back if each not in self.allowed]
        return f"{FALLS_BACK}: {', '.join(self.fell_back[key])}" if self.fell_back[key] else ""

    def _add(self, func: Callable, results: list[Tensor], **more: Any) -> None:
        given = dict(own=math.nan, ratio=None, inherited=math.nan) | more
        where = dict(operator=name_of(func), module=self.path[-1], place=_place())
        self.steps.append(Step(number=len(self.steps), **_kind(results), **where, **given))


def _kind(results: list[Tensor]) -> dict[str, Any]:
    """The dtype and the shape of the largest result, as a step says them."""
    largest = max(results, key=lambda each: each.numel())
    return {"dtype": str(largest.dtype).removeprefix("torch."), "shape": tuple(largest.shape)}


def _can_be_made_again(trial: Trial) -> bool:
    """Whether the CPU can make the call a second time: an iterator among the arguments may be used up."""
    try:
        trial.on_cpu()
    except FAILS:
        return False
    return True


def _not_again(error: Exception) -> str:
    return f"it could not be made again: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_view(result: Tensor, given: list[Tensor]) -> bool:
    return result.layout == torch.strided and any(each.layout == torch.strided and each.untyped_storage().data_ptr() == result.untyped_storage().data_ptr() for each in given)


def _is_explained(found: list[Tensor], results: list[Tensor], operator: str) -> bool:
    """Whether what the device returned is the CPU's but for scattered roundings; what is no fraction must be equal."""
    for each, other in zip(found, results):
        away = difference(each, other)
        if each.dtype != other.dtype or away and not _is_scattered(each.detach(), other.detach(), away, operator):
            return False
    return True


def _is_scattered(actual: Tensor, expected: Tensor, own: float, operator: str) -> bool:
    """Whether two results, `own` apart, differ as roundings do: no element, no row (along the last axis) and no factor or summand of all holds more of it than they leave."""
    product = operator in PRODUCTS and expected.dtype == torch.float32
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
    if bool((away.abs() > (ALONE_IN_PRODUCTS if product else ALONE) * unit * (expected.abs() + scale)).any()):
        return False
    shift, gain = float(away.mean()) * math.sqrt(expected.numel()) / size, float(away.flatten() @ expected.flatten()) / size**2
    return max(abs(shift), abs(gain)) <= unit / 32


def _place() -> str:
    """The line of the model that called the operator; "" where torch's own modules did and nothing of the model stands between."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not run.__code__:
        file = frame.f_code.co_filename
        if not file.startswith(TORCH) and file != __file__ and not file.startswith("<"):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
