"""What every numeric switch costs: the expected error of a model as the switches are, with each set, and with all set.

The forecast is a CPU run under the device's rounding rules (`harness.numerics.expected_error`); each number here is its
relative L2 error to float64, of the output with the largest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from harness.case import Case
from harness.devices import Device, Stack
from harness.devices.switches import NUMERIC_SWITCHES, NumericSwitch, all_set
from harness.errors import HarnessError
from harness.judging.verdict import ALL_SWITCHES, SwitchCost
from harness.numerics.expected_error import Rules, rules_of
from harness.reference import Models, inputs_digest
from harness.run.cpu import CpuSide, golden_outputs, inputs_of
from harness.run.device import run_on_device
from harness.run.repeats import largest_error

PRICED_FROM = (
    2.0  # times the CPU's own error, from which on the device's rules cost something that a switch may win back
)


def switch_costs(
    cpu: CpuSide,
    stack: Stack,
    operators: set[str],
    forecast: Mapping[str, Tensor] | None,
    expected: Mapping[str, Tensor],
    golden: Mapping[str, Tensor] | None,
) -> tuple[SwitchCost, ...]:
    """The switches that change what a model computes, each with the expected error without and with it; the last is all
    of them together, where several change the error. Empty where the device's rules cost less than `PRICED_FROM`
    times what the CPU itself loses.

    `operators`: names of those that the model calls. Computed once for each model and dtype.
    """
    rules = rules_of(stack)
    if rules is None or forecast is None or cpu.repeated in cpu.models.priced:
        return ()
    cpu.models.priced.add(cpu.repeated)
    before, own = largest_error(dict(forecast), golden), largest_error(dict(expected), golden)
    if before is None or own is None or not before > PRICED_FROM * own:
        return ()
    switches = usable(rules, operators)
    result = [_cost(cpu, rules, golden, before, (switch,), stack) for switch in switches]
    known = [item for item in result if item is not None]
    if sum(item.felt for item in known) > 1:
        together = _cost(cpu, rules, golden, before, switches, stack)
        known += [] if together is None else [together]
    return tuple(known)


def usable(rules: Rules, operators: set[str]) -> tuple[NumericSwitch, ...]:
    """The switches that are not set yet and touch one of the operators."""
    return tuple(
        switch for switch in NUMERIC_SWITCHES if replace(rules, **switch.changes) != rules and switch.touches(operators)
    )


def _cost(
    cpu: CpuSide,
    rules: Rules,
    golden: Mapping[str, Tensor] | None,
    before: float,
    switches: tuple[NumericSwitch, ...],
    stack: Stack,
) -> SwitchCost | None:
    changes: dict[str, Any] = {}
    for switch in switches:
        changes |= switch.changes
    try:
        other = cpu.run("forecast", rules=replace(rules, **changes)).outputs
    except HarnessError:  # what cannot be computed has no price
        return None
    after = largest_error(other, golden)
    if after is None:
        return None
    name = switches[0].name if len(switches) == 1 else ALL_SWITCHES
    return SwitchCost(
        switch=name, before=before, after=after, remedy="; ".join(item.remedy(stack) for item in switches)
    )


def measured_costs(
    case: Case, seed: int | None, device: Device, costs: tuple[SwitchCost, ...], models: Models
) -> tuple[SwitchCost, ...]:
    """The same costs with what the device gives when each switch is set there, and the time of a forward in
    milliseconds before and after. A switch that the device does not take is left without a measured error.

    Raises: HarnessError where the model does not run on the device as it is.
    """
    inputs = inputs_of(case, seed)
    cpu = CpuSide(case, models, inputs, inputs_digest(inputs, case.name), device, seed or 0)
    golden, _ = golden_outputs(cpu)
    by_name = {switch.name: switch for switch in NUMERIC_SWITCHES}

    def once(switches: tuple[NumericSwitch, ...]) -> tuple[float | None, float]:
        with all_set(switches, device):
            ran = run_on_device(cpu, device, f"{case.name} {case.dtype}", frozenset())
        return largest_error(ran.outputs, golden), ran.milliseconds

    first, took = once(())
    every = tuple(by_name[cost.switch] for cost in costs if cost.switch != ALL_SWITCHES)
    result = []
    for cost in costs:
        chosen = every if cost.switch == ALL_SWITCHES else (by_name[cost.switch],)
        try:
            error, milliseconds = once(chosen)
        except (HarnessError, KeyError, ImportError):
            result.append(cost)
            continue
        times = dict(before_ms=took, after_ms=milliseconds)
        result.append(replace(cost, measured_before=first, measured_after=error, **times))
    return tuple(result)
