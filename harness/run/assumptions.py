"""Whether a row that fails depends on an assumption of the forecast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from harness.errors import HarnessError
from harness.judging.criteria import FLOORED
from harness.judging.verdict import Verdict
from harness.numerics.expected_error import Rules, alternatives

HANGS = 8.0  # times a limit: what is further beyond is explained by no assumption, the furthest of which takes 3


def hangs(verdict: Verdict) -> bool:
    """Whether a row fails by so little that an assumption of the forecast may fail it, and not the device."""
    judged = [failure for failure in verdict.failures if failure.criterion in (*FLOORED, "flip_margin")]
    numbers = [item for item in judged if item.found and item.allowed]
    return len(numbers) == len(verdict.failures) > 0 and all(
        number.found <= HANGS * number.allowed for number in numbers
    )


def assumption_of(
    again: Callable[[dict[str, Tensor]], Verdict],
    forecast: Callable[[Rules], dict[str, Tensor]],
    rules: Rules,
    dtype: str,
) -> str:
    """What a card would have to do otherwise for a failing row to pass, in words; "" where none of `ASSUMPTIONS` does.

    `forecast` runs the CPU under other rules, `again` judges the row by such a forecast.
    """
    for what, other in alternatives(rules, dtype):
        try:
            result = forecast(other)
        except HarnessError:  # a forecast that cannot be made explains nothing
            continue
        if again(result).passed:
            return what
    return ""


def naming(verdict: Verdict, assumption: str) -> Verdict:
    """The verdict whose reasons name the assumption that it hangs on, if there is one."""
    if not assumption:
        return verdict
    measures = "python -m harness calibrate --output FILE measures a vector unit"
    note = f"it would pass if {assumption}, which no card has confirmed or denied yet: {measures}"
    return replace(
        verdict, failures=tuple(replace(failure, text=f"{failure.text}; {note}") for failure in verdict.failures)
    )
