"""Where it diverged: the model runs once on the CPU, and beside it every operator on the device, twice.

With the CPU's exact inputs an operator shows its *own* error; with what the device itself computed upstream, what it *inherited* as well. So the
first operator whose own error is above its floor is the one that is wrong, however far the damage has spread. Nothing is dumped: what is kept is what the
model itself keeps alive, once more on the device.

An operator is a call of a torch function as the model makes it, `linear`, `softmax`, `add_`: each side computes it in its own way.
"""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

from torch import nn

from harness.case import Case, copy_of, inputs_of, without_npu
from harness.devices import Device
from harness.errors import HarnessError
from harness.locate.finding import RANDOM, Finding, Step, ended
from harness.locate.lockstep import Lockstep, is_explained, named
from harness.locate.modules import DEEP, Modules
from harness.reference import Models, fresh, require_float32, roundoff, run, seeded, tensors_of
from harness.trial import difference

__all__ = ["Finding", "Step", "is_explained", "locate", "named"]

LEVELS = ("operators", "modules")


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
        beside = Modules(model, there, device)
        steps = beside.steps(lambda: run(model, fresh(inputs), forward=case.forward, where="on the CPU", gradients=case.gradients))
        more = {"steps": tuple(steps), "gone": beside.gone}
    else:
        with named(model) as path:
            until, own = time.monotonic() + limit, fresh(inputs)
            mode = Lockstep(device, path, backward, until, case.fallbacks)
            mode.share(model, there)
            with mode:
                output = run(model, own, forward=case.forward, where="on the CPU", gradients=case.gradients)
        more = {"steps": tuple(mode.steps), "trial": mode.trial, "unseen": mode.unseen}
        more |= {"gone": mode.gone, "compiling": mode.compiling}
        undecided = any(each.bad or RANDOM in each.note for each in mode.steps)
        if not mode.unseen and not mode.gone and time.monotonic() < mode.until and not undecided:
            more["otherwise"] = _otherwise(case, seed, models, model, inputs, device, output)
    more["gone"] = more["gone"] or ended(device, at)
    return Finding(case=case.name, dtype=case.dtype, seed=seed, level=level, **more)


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
