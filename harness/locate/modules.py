"""Modules side by side: each runs on the device with the CPU's inputs, and of one that is wrong those that it is made of."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from harness.devices import Device, unknown_rounding
from harness.devices.device_errors import summary
from harness.forecast import rounding, rules_of
from harness.locate.finding import Step, ended, kind_of, raised
from harness.reference import roundoff
from harness.trial import FAILS, Trial, apart, budget, tensors_in

SLACK, DEEP = 3.0, 16  # times its floor that a module may lose; roundings that its depth may add to it


class Modules:
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
        where |= dict(inherited=math.nan, **kind_of(expected))
        try:
            found = Trial(func=self.there.get_submodule(name), args=args, kwargs=kwargs, device=self.device).on_device()
        except FAILS as error:
            if self.device.ends(f"{self.device.where}: {summary(error)}", error, f"{name}, locating"):
                self.gone = self.device.stopped
            steps.append(Step(own=math.inf, ratio=None, reasons=(raised(error),), **where))
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
            self.gone = ended(self.device, f"{name}, locating")
        if not self.gone:  # what it answered is no evidence about this module
            steps.append(Step(own=own, ratio=own / floor if floor else None, reasons=text, **where))


def _called(module: nn.Module, at: str) -> list[str]:
    """The paths of the modules that a module calls itself; a list or a dict of modules is never called, what it holds is."""
    found = []
    for name, child in module.named_children():
        path = f"{at}.{name}" if at else name
        found += _called(child, path) if type(child).forward is nn.Module.forward else [path]
    return found
