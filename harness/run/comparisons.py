"""What the device returned against the CPU's outputs, float64 and the forecast, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.judging.checks import near_ties
from harness.judging.references import MANY, References, is_floating
from harness.judging.verdict import Reason
from harness.measure import Comparison, compare, compare_all, scatter_of, worst_slices

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
    runs = _Runs(actual=actual, expected=expected, golden=golden, forecast=forecast, other=other, random=random)
    comparisons, references = {}, {}
    for name in expected:
        if name not in actual:
            continue
        comparisons[name], reference = runs.measured(name, modes)
        if reference is not None:
            references[name] = reference
    return comparisons, references


def near_tied(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The outputs of whole numbers that differ in no more than near-ties."""
    return {
        name: comparison
        for name, comparison in comparisons.items()
        if not is_floating(comparison.expected_dtype) and 0 < comparison.unequal <= near_ties(comparison.unsettled)
    }


def has_golden(name: str, expected: dict[str, Tensor], golden: dict[str, Tensor]) -> bool:
    return (
        name in golden
        and golden[name].shape == expected[name].shape
        and (expected[name].is_floating_point() or expected[name].is_complex())
    )


@dataclass(frozen=True, kw_only=True)
class _Runs:
    """The outputs of all runs by name; see `measured_outputs`."""

    actual: dict[str, Tensor]
    expected: dict[str, Tensor]
    golden: dict[str, Tensor] | None
    forecast: dict[str, Tensor] | None
    other: dict[str, Tensor] | None
    random: Sequence[dict[str, Tensor]]

    def measured(self, name: str, modes: tuple[str, ...]) -> tuple[Comparison, References | None]:
        """One output of the device against the CPU's, and both against float64 where there is one, in one pass."""
        actual, expected = self.actual[name], self.expected[name]
        if self.golden is None or not has_golden(name, self.expected, self.golden):
            return self._with_ties(compare(actual, expected), name), None
        golden = self.golden[name]
        predicted = None if self.forecast is None else self.forecast.get(name)
        pairs, errors = [(actual, expected), (actual, golden), (expected, golden)], []
        if predicted is not None:
            pairs.append((predicted, golden))
            errors.append((actual, predicted))
            if self.other is not None:
                errors.append((self.other[name], predicted))
        comparisons, sizes = compare_all(pairs, errors)
        healthy = [expected, *([] if predicted is None else [predicted])]
        references = References(
            golden=comparisons[1],
            cpu=comparisons[2],
            forecast=None if predicted is None else comparisons[3],
            unexplained=None if predicted is None else sizes[0],
            ties=sizes[1] if len(sizes) > 1 else None,
            modes=modes,
            slices=worst_slices(actual, golden, healthy),
        )
        return self._with_ties(comparisons[0], name), self._with_scatter(references, name)

    def _with_ties(self, comparison: Comparison, name: str) -> Comparison:
        """A comparison of whole numbers with what is known of their near-ties; any other as it is."""
        if not self.random or is_floating(comparison.expected_dtype):
            return comparison
        plain = self._unequal(name, [run for run in (self.golden, self.forecast) if run is not None])
        random = self._unequal(name, self.random[1:])
        means = [sum(counts) / len(counts) for counts in (plain + random, random) if counts]
        return replace(comparison, unsettled=max(means)) if means else comparison

    def _unequal(self, name: str, runs: Sequence[dict[str, Tensor]]) -> list[int]:
        """In how many whole numbers runs differ from the CPU's; with random roundings they also choose among equals."""
        pairs = [compare(run[name], self.expected[name]) for run in runs if name in run]
        return [pair.unequal for pair in pairs if pair.comparable]

    def _with_scatter(self, references: References, name: str) -> References:
        """What is measured of few elements with how far healthy runs scatter, where that explains the CPU's error."""
        if references.golden.numel >= MANY:
            return references
        still, *moved = (run[name] for run in self.random if name in run) if self.random else (None,)
        scatter = scatter_of(moved, still) if moved else None
        shown = scatter is not None and scatter.explains(references.cpu.rel_l2)
        return replace(references, scatter=scatter) if shown else references
