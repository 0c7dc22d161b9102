"""What the device returned against the CPU's outputs, float64 and the forecast, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harness.judging.checks import near_ties
from harness.judging.references import MANY, References, is_floating
from harness.judging.verdict import Reason
from harness.measure import Comparison, compare, scatter_of, worst_slices

_LARGEST = 65520.0  # from here on float16 rounds to Inf


def cut_as_float16(
    golden: dict[str, Tensor], expected: dict[str, Tensor], actual: dict[str, Tensor], name: str
) -> tuple[dict[str, Tensor], list[Reason]]:
    """The float64 outputs for a device where float16 saturates: in place of Inf and NaN what the CPU has there, cut
    likewise.

    Float64 says nothing of those places, so there the device's number stands where it is within a last place of the
    CPU's. And a reason for each output whose finite numbers float16 cannot hold: those are wrong on any device.
    """
    outputs, reasons = {}, []
    for output, wide in golden.items():
        narrow = expected.get(output)
        if (
            narrow is None
            or not wide.is_floating_point()
            or narrow.dtype != torch.float16
            or narrow.shape != wide.shape
        ):
            outputs[output] = wide
            continue
        cut, there = narrow.double(), actual.get(output, narrow).double()
        if there.shape == cut.shape:
            cut = torch.where((there - cut).abs() <= cut.abs() * torch.finfo(torch.float16).eps, there, cut)
        outputs[output] = torch.where(wide.isfinite(), wide, cut)
        beyond = int((wide.isfinite() & (wide.abs() >= _LARGEST)).sum())
        if beyond:
            text = (
                f"{beyond} elements of the float64 result are beyond 65504, where float16 saturates on {name}: "
                "float16 cannot hold this model"
            )
            reasons.append(
                Reason(criterion="finite", text=text, output=output if len(golden) > 1 else "", found=beyond, allowed=0)
            )
    return outputs, reasons


def measured_outputs(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    golden: dict[str, Tensor] | None,
    forecast: dict[str, Tensor] | None,
    modes: tuple[str, ...] = (),
    other: dict[str, Tensor] | None = None,
    random: Sequence[dict[str, Tensor]] = (),
) -> tuple[dict[str, Comparison], dict[str, References]]:
    """The device's outputs against the CPU's, and both against float64, by name: what `judge` takes.

    `other`: a forecast with other ties. `random`: a CPU run, and the same run with random roundings, several times.
    """
    shared = [name for name in expected if name in actual]
    comparisons = {name: compare(actual[name], expected[name]) for name in shared}
    healthy = [item for item in (golden, forecast, *random[1:]) if item is not None] if random else []
    comparisons = {
        name: _with_ties(comparison, [run[name] for run in healthy if name in run], expected[name])
        for name, comparison in comparisons.items()
    }
    names = [name for name in shared if golden is not None and has_golden(name, expected, golden)]
    return comparisons, {name: _hold(name, actual, expected, golden, forecast, modes, other, random) for name in names}


def near_tied(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The outputs of whole numbers that differ in no more than near-ties."""
    return {
        name: comparison
        for name, comparison in comparisons.items()
        if not is_floating(comparison.expected_dtype) and 0 < comparison.unequal <= near_ties(comparison.unsettled)
    }


def _with_ties(comparison: Comparison, healthy: list[Tensor], expected: Tensor) -> Comparison:
    """A comparison of whole numbers with what is known of their near-ties; any other as it is."""
    pairs = [compare(run, expected) for run in healthy if not is_floating(comparison.expected_dtype)]
    counts = [pair.unequal for pair in pairs if pair.comparable]
    return replace(comparison, unsettled=sum(counts) / len(counts)) if counts else comparison


def has_golden(name: str, expected: dict[str, Tensor], golden: dict[str, Tensor]) -> bool:
    return (
        name in golden
        and golden[name].shape == expected[name].shape
        and (expected[name].is_floating_point() or expected[name].is_complex())
    )


def _hold(name: str, actual, expected, golden, forecast, modes: tuple[str, ...], other, random) -> References:
    predicted = None if forecast is None or name not in forecast else forecast[name]
    references = References(
        golden=compare(actual[name], golden[name]),
        cpu=compare(expected[name], golden[name]),
        forecast=None if predicted is None else compare(predicted, golden[name]),
        unexplained=None if predicted is None else compare(actual[name], predicted).rel_l2,
        ties=None if predicted is None or other is None else compare(other[name], predicted).rel_l2,
        modes=modes,
        slices=worst_slices(actual[name], golden[name], [expected[name], *([] if predicted is None else [predicted])]),
    )
    if references.golden.numel >= MANY:
        return references
    still, *moved = (item[name] for item in random if name in item) if random else (None,)
    scatter = scatter_of(moved, still) if moved else None
    shown = scatter is not None and scatter.explains(references.cpu.rel_l2)
    return replace(references, scatter=scatter) if shown else references
