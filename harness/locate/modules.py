"""Modules side by side: each runs on the device with the CPU's inputs, and of one that is wrong those that it is made
of.

Each side gets arguments of its own, caches and other objects included, and a copy of the model that no other run has
touched; what a module draws at random is drawn alike.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.devices import Device, unknown_rounding
from harness.devices.device_errors import error_summary
from harness.locate.finding import Step, ended, kind_of, raised
from harness.locate.replay import (
    FAILS,
    autocast_now,
    autocasting,
    budget,
    copy_strided,
    judged,
    largest_difference,
    on,
    tensors_in,
)
from harness.numerics.expected_error import overflow_of, rounding, rules_of
from harness.reference import Draws, Float64Products, WideRequests, drawing, roundoff
from harness.torch_private import tree_map

_SLACK, DEEP = 3.0, 16  # times its floor that a module may lose; roundings that its depth may add to it


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Copies of one model for one forward: of the CPU, of the device, a second of the CPU that rounds as the device
    does.

    And one in float64, None where there is none.
    """

    here: nn.Module
    there: nn.Module
    healthy: nn.Module
    wide: nn.Module | None


@dataclass(frozen=True, kw_only=True)
class _Given:
    """What a module was given, copied for the sides beside the CPU, and the state of the generator."""

    there: tuple[tuple, dict]
    healthy: tuple[tuple, dict]
    wide: tuple[tuple, dict] | None
    state: Tensor


class Modules:
    """Runs modules of a model on the CPU, and each on the device with the CPU's inputs.

    `lend` gives the copies for one forward, and `forward` runs one. After `until`, a time.monotonic(), no further
    module is looked at: `unseen` counts them.
    """

    def __init__(
        self, lend: Callable[[], AbstractContextManager[Sides]], forward: Callable[[nn.Module], Any], device: Device,
        draws: Draws, until: float = math.inf,
    ):  # fmt: skip
        self.lend, self.forward, self.device, self.draws, self.until = lend, forward, device, draws, until
        stack = device.stack
        self.rules, self.known = rules_of(stack), unknown_rounding(stack) is None
        self.gone = ""  # what is said of a device that stopped computing
        self.unseen = 0

    def steps(self) -> Iterator[Step]:
        """The children of the model, then those of the first that is wrong, and so on; none after the device's end.

        Where none of its children is wrong, the model itself: what it does between them.
        """
        at, number = "", 0
        while not self.gone:
            steps = self.look(lambda model, at=at: _called(model.get_submodule(at), at), number)
            yield from steps
            number += len(steps)
            wrong = next((step.module for step in steps if step.bad), None)
            if wrong is None and not at and not self.unseen and not self.gone and number:
                yield from self.look(lambda model: [""], number)
            if wrong is None or self.unseen:
                return
            at = wrong

    def look(self, choose: Callable[[nn.Module], Iterable[str]], number: int = 0) -> list[Step]:
        """The steps of the modules whose paths `choose` gives for a copy of the model, in the order of their calls."""
        steps: list[Step] = []
        with self.lend() as sides:
            names = list(choose(sides.here))
            if not names:
                return []
            with contextlib.ExitStack() as hooks:
                for name in names:
                    module, taken = sides.here.get_submodule(name), []
                    take = functools.partial(self._take, sides, taken)
                    hold = functools.partial(self._hold, sides, taken, steps, number, name)
                    hooks.callback(module.register_forward_pre_hook(take, prepend=True, with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(hold, with_kwargs=True).remove)
                with drawing(self.draws, self.device.generator):
                    self.forward(sides.here)
        return steps

    def _take(self, sides: Sides, taken: list, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Copy what a module is given before it runs: it may write into it."""
        if self.gone or time.monotonic() > self.until:
            taken.append(None)
            return
        try:
            there = copied((args, kwargs), self.device.torch_device, _twins(sides.here, sides.there))
            healthy = copied((args, kwargs), torch.device("cpu"), _twins(sides.here, sides.healthy))
            wide = (
                None
                if sides.wide is None
                else copied((args, kwargs), torch.device("cpu"), _twins(sides.here, sides.wide), wide=True)
            )
            taken.append(_Given(there=there, healthy=healthy, wide=wide, state=torch.get_rng_state()))
        except FAILS as error:
            taken.append(error)

    def _hold(
        self, sides: Sides, taken: list, steps: list[Step], number: int, name: str, module: nn.Module, args: tuple,
        kwargs: dict, output: Any,
    ) -> None:  # fmt: skip
        """Add the step of one module that the CPU has run."""
        given, expected = taken.pop(), tensors_in(output)
        if not expected or self.gone:
            return
        if given is None:
            self.unseen += 1
            return
        where = dict(number=number + len(steps), operator=type(module).__name__, module=name, place="", kind="module")
        where |= dict(inherited=math.nan, **kind_of(expected))
        if isinstance(given, Exception):
            note = f"its arguments cannot be copied: {type(given).__name__}: {' '.join(str(given).split())[:200]}"
            steps.append(Step(own=math.nan, ratio=None, note=note, **where))
            return
        state = torch.get_rng_state()
        try:
            self._judge(sides, given, steps, name, expected, where)
        finally:
            torch.set_rng_state(state)

    def _judge(
        self, sides: Sides, given: _Given, steps: list[Step], name: str, expected: list[Tensor], where: dict
    ) -> None:
        torch.set_rng_state(given.state)
        try:
            with self.device.interruptible(), autocasting(autocast_now(), self.device.torch_device.type):
                args, kwargs = given.there
                result = [tensor.cpu() for tensor in tensors_in(sides.there.get_submodule(name)(*args, **kwargs))]
        except FAILS as error:
            if self.device.ends(f"{self.device.where}: {error_summary(error)}", error, f"{name}, locating"):
                self.gone = self.device.stopped
            steps.append(Step(own=math.inf, ratio=None, reasons=(raised(error),), **where))
            return
        healthy = self._run(sides.healthy, name, given.healthy, given.state, self.rules)
        golden = self._golden(sides, name, given, expected)
        own, ratio, reasons = self._compared(result, expected, healthy, golden)
        if reasons:
            self.gone = ended(self.device, f"{name}, locating")
        if not self.gone:  # what it answered is no evidence about this module
            steps.append(Step(own=own, ratio=ratio, reasons=reasons, **where))

    def _run(
        self, model: nn.Module, name: str, given: tuple[tuple, dict], state: Tensor, rules: Any = None
    ) -> list[Tensor]:
        """What a module of a copy on the CPU returns, from the generator's state."""
        torch.set_rng_state(state)
        args, kwargs = given
        with rounding(rules):
            return tensors_in(model.get_submodule(name)(*args, **kwargs))

    def _golden(self, sides: Sides, name: str, given: _Given, expected: list[Tensor]) -> list[Tensor] | None:
        """What a module returns in float64; None where it has none."""
        if sides.wide is None:
            return None
        result = None
        for requests in (WideRequests(), contextlib.nullcontext()):  # a module may want the float32 that it asks for
            try:
                with Float64Products(), requests:
                    result = self._run(sides.wide, name, given.wide, given.state)
                break
            except FAILS:
                continue
        if result is None:
            return None
        fits = len(result) == len(expected) and all(
            tensor.shape == other.shape for tensor, other in zip(result, expected)
        )
        if not fits:
            return None
        return [tensor.double() if tensor.is_floating_point() else tensor for tensor in result]

    def _compared(
        self, result: list[Tensor], expected: list[Tensor], healthy: list[Tensor], golden: list[Tensor] | None
    ) -> tuple[float, float | None, tuple[str, ...]]:
        """How far the device is from the CPU, relative L2, in units of the floor, and why that is no healthy
        device's.
        """
        own, sound = largest_difference(result, expected), largest_difference(healthy, expected)
        floating = [tensor.dtype for tensor in expected if tensor.is_floating_point()]
        narrow = min(floating, key=lambda value: value.itemsize, default=torch.float32)
        if golden is not None and overflow_of(self.device.stack, narrow) is None:
            sound = max(sound, largest_difference(expected, golden))
            ratio, reasons = judged(
                self.device, result, expected, golden, healthy if self.rules is not None else None, narrow
            )
            bad, floor = bool(reasons), sound
        else:
            floor = sound + (DEEP * roundoff(narrow) if floating else 0.0)
            floor = floor if self.known or not floating else max(floor, budget(narrow) / _SLACK)
            ratio, bad = own / floor if floor else None, not own <= _SLACK * floor
        text = f"it differs from the CPU by {own:.2e} where a healthy device would by {floor:.2e}"
        return own, ratio, (text,) if bad else ()


def _called(module: nn.Module, at: str) -> list[str]:
    """The paths of the modules that a module calls itself; a list or a dict of modules is never called, what it holds
    is.
    """
    result = []
    for name, child in module.named_children():
        path = f"{at}.{name}" if at else name
        if isinstance(child, torch.jit.ScriptModule):  # which takes no hooks while it runs
            continue
        result += _called(child, path) if type(child).forward is nn.Module.forward else [path]
    return result


def _twins(here: nn.Module, there: nn.Module) -> dict[int, Any]:
    """For `copied`: modules and weights of one copy of a model stand for those of the other."""
    names = dict(there.named_modules(remove_duplicate=False))
    result = {id(module): names[name] for name, module in here.named_modules(remove_duplicate=False) if name in names}
    weights = dict([*there.named_parameters(remove_duplicate=False), *there.named_buffers(remove_duplicate=False)])
    for name, item in [*here.named_parameters(remove_duplicate=False), *here.named_buffers(remove_duplicate=False)]:
        if name in weights:
            result[id(item)] = weights[name]
    return result


def copied(value: Any, device: torch.device, twins: dict[int, Any], *, wide: bool = False) -> Any:
    """Arguments with all that they hold copied to a device: tensors, and objects that keep tensors, such as caches.

    `twins`: what stands for an object, by its id. What names the CPU names the device. `wide`: fractions in float64.

    Raises: TypeError or RuntimeError for what cannot be copied.
    """
    placed = tree_map(lambda item: _placed(item, device, wide), value)
    with _CopiesTo(device, wide):
        return copy.deepcopy(placed, dict(twins))


def _placed(value: Any, device: torch.device, wide: bool) -> Any:
    """An argument that is no tensor, on a device, with `wide` in float64."""
    if wide and isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    return value if device.type == "cpu" else on(device, value)


class _CopiesTo(TorchFunctionMode):
    """Lets copy.deepcopy copy tensors to a device, with their strides."""

    def __init__(self, device: torch.device, wide: bool):
        super().__init__()
        self.device, self.wide = device, wide

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            made = copy_strided(tensor, self.device)
            memo[id(tensor)] = made.double() if self.wide and made.is_floating_point() else made
        return memo[id(tensor)]
