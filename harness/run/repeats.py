"""Whether a reference repeats, and how far an output moves when the inputs move by one rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.errors import UnstableReferenceError
from harness.measure import compare
from harness.reference import Reference, as_infinite, moved_by_one_rounding, roundoff
from harness.run.comparisons import has_golden
from harness.run.cpu import CpuSide

# Roundings by which two runs may differ where their sums were added in another order: always, and where the first run
# is off from float64 by half as much or more, since a deep model makes its roundings larger.
SUMS, DEEP_SUMS, DEEP_HALF_SUMS = 4, 64, 8


def repeat_text(reference: Reference, golden: dict[str, Tensor] | None, dtype: torch.dtype) -> str:
    """What is said of two runs of a reference that differ by their roundings alone; "" where no bit differs.

    Threads that add in the order in which they end give other bits, and no more than the rounding errors of the two
    runs: twice what the first is off from float64, and at most so many roundings.

    Raises: UnstableReferenceError for two runs that differ by more, or where the first changed the model.
    """
    if reference.again is None:
        return ""
    result = differences(reference.again, reference.outputs) or {"max_diff": math.nan, "rel_l2": math.nan, "unequal": 0}
    differ = "two runs on the CPU differ by {max_diff:.2e} at most, rel_l2 {rel_l2:.2e}, in {unequal} elements".format(
        **result
    )
    error = largest_error(reference.outputs, golden) or 0.0
    most = DEEP_SUMS if dtype in (torch.float32, torch.float64) else DEEP_HALF_SUMS
    allowed = max(min(2 * error, most * roundoff(dtype)), SUMS * roundoff(dtype))
    if result["rel_l2"] <= allowed and not reference.changed:
        return f"{differ}: they add in an order that is not fixed, and that is within their roundings"
    what = f"the first run changed {reference.changed}" if reference.changed else UNNAMED
    raise UnstableReferenceError(
        f"REFERENCE UNSTABLE: {differ}; {what}; let the model return the same for the same inputs"
    )


UNNAMED = (
    "it changed no parameter, buffer or attribute of the model, which therefore keeps something outside of itself, "
    "or draws from a generator that is not torch's, numpy's or Python's own"
)


def largest_error(outputs: dict[str, Tensor], golden: dict[str, Tensor] | None) -> float | None:
    """The largest relative L2 error to float64 of any output; None where no output has a float64 one."""
    known = [name for name in outputs if golden is not None and has_golden(name, outputs, golden)]
    return max((compare(outputs[name], golden[name]).rel_l2 for name in known), default=None)


def conditioning_of(cpu: CpuSide, golden: dict[str, Tensor] | None) -> float | None:
    """How many times larger the relative change of the output is than that of the input, when the input moves by one
    rounding.

    Measured once for a model, in float64, with its first inputs and dtype; None where the inputs hold no fractions.
    """
    case, known = cpu.case, cpu.models.conditioning
    key = case.subject
    if key not in known:
        known[key] = None
        if golden is not None and moved_by_one_rounding(cpu.inputs, case.torch_dtype) is not None:
            moved = as_infinite(cpu.run("moved").outputs)
            grown = largest_error(moved, golden)
            known[key] = None if grown is None else grown / roundoff(case.torch_dtype)
    return known[key]


def differences(again: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, float]:
    """What two runs of the same thing differ by, the output that differs most; empty where every bit is the same."""
    pairs = [(again[name], first[name]) for name in first if name in again]
    result = [compare(*pair) for pair in pairs if not _equal(*pair)]
    differing = [
        item for item in result if not item.comparable or item.nonfinite_differ or item.unequal > item.nan_expected
    ]
    if not differing:
        return {}
    worst = max(differing, key=lambda value: value.rel_l2 if value.rel_l2 == value.rel_l2 else math.inf)
    return {"max_diff": worst.max_diff, "rel_l2": worst.rel_l2, "unequal": worst.unequal}


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal throughout; a tenth of a comparison's time, and most runs repeat."""
    return one.dtype == other.dtype and one.layout == torch.strided == other.layout and torch.equal(one, other)
