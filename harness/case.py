"""What to run, and the deep function that runs it: one case, one seed, CPU against a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.compare import compare
from harness.device import Device, Stack
from harness.errors import CaseError
from harness.gate import FELL_BACK, Decisions, Evidence, Reason, Tolerance, Verdict, is_floating, judge
from harness.reference import Models, digest, move, run, run_cpu, tensors_of


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one dtype, its inputs and the limits on what the device may lose.

    `model()` builds it in float32 on the CPU; cases with the same `model` object and weights share the build.
    `inputs(generator)` draws its inputs on the CPU: a tensor, a tuple of arguments or a dict of keywords; floating-point
    ones are cast to `dtype`. `forward(model, inputs)` calls it where `model(inputs)` does not do.

    Raises: ValueError for an unknown dtype, or for labels without the output that holds the decisions.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    tolerance: Tolerance | Mapping[str, Tolerance] | Callable[[str, Stack], Tolerance]  # by dtype, or by dtype and switches
    dtype: str = "float32"
    checkpoint: Path | None = None  # where model() takes its weights from; None: seeded ones
    weights_seed: int = 0  # model() runs under torch's generator with this seed
    forward: Callable[[nn.Module, Any], Any] | None = None
    decisions: str | None = None  # name of the output with logits along its last axis; "output" for a bare tensor
    labels: Tensor | None = None  # the right decisions, one for each input

    def __post_init__(self):
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype) or not is_floating(self.dtype):
            raise ValueError(f"case {self.name}: dtype {self.dtype!r} must be a floating-point dtype, such as 'float32'")
        if self.labels is not None and self.decisions is None:
            raise ValueError(f"case {self.name}: labels need `decisions`, the name of the output that holds the logits")
        if isinstance(self.tolerance, Mapping) and self.dtype not in self.tolerance:
            raise ValueError(f"case {self.name}: no tolerance for {self.dtype}; there are {', '.join(self.tolerance)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def limits(self, stack: Stack) -> Tolerance:
        """The tolerance for this dtype under these numeric switches."""
        if isinstance(self.tolerance, Tolerance):
            return self.tolerance
        return self.tolerance[self.dtype] if isinstance(self.tolerance, Mapping) else self.tolerance(self.dtype, stack)

    def weights(self) -> str:
        """sha256 of the checkpoint, or "seeded:<n>" where none was given."""
        if self.checkpoint is None:
            return f"seeded:{self.weights_seed}"
        from harness.convert import checkpoint_digest

        return checkpoint_digest(self.checkpoint)


def validate(case: Case, seed: int | None, device: Device, *, models: Models | None = None) -> Verdict:
    """Run `case` with the inputs of `seed` on the CPU and on `device`, compare every output, judge.

    Pass one `Models` to many calls and the weights are built once.

    Raises: CaseError when the case returns nothing that can be compared, RunError when the model raises.
    """
    models = models if models is not None else Models()
    drawn = case.inputs(torch.Generator().manual_seed(0 if seed is None else seed))
    inputs = move(drawn, device="cpu", dtype=case.torch_dtype)
    fed = tensors_of(inputs, f"{case.name}: inputs()")

    expected, expected_ms, reference = run_cpu(_copy(models, case, "cpu"), inputs, forward=case.forward, dtype=case.torch_dtype)
    expected = _outputs(case, expected, "the model")
    actual, actual_ms, fell_back = _run_device(models, case, inputs, device)

    verdict = _judge(case, actual, expected, device)
    evidence = Evidence(
        weights=_weights(models, case),
        reference=reference,
        inputs_sha256=digest(fed),
        expected_sha256=digest(expected),
        actual_sha256=digest(actual),
        expected_ms=expected_ms,
        actual_ms=actual_ms,
    )
    return _with_fallbacks(replace(verdict, evidence=evidence), fell_back)


def _copy(models: Models, case: Case, device: torch.device | str) -> nn.Module:
    key = (case.model, case.checkpoint, case.weights_seed)
    return models.get(key, case.model, seed=case.weights_seed, dtype=case.torch_dtype, device=torch.device(device))


def _weights(models: Models, case: Case) -> str:
    """`case.weights()`, read once for all the cases on one checkpoint."""
    if case.checkpoint is None:
        return case.weights()
    if case.checkpoint not in models.digests:
        models.digests[case.checkpoint] = case.weights()
    return models.digests[case.checkpoint]


def _run_device(models: Models, case: Case, inputs: Any, device: Device) -> tuple[dict[str, Tensor], float, list[str]]:
    """The device's outputs brought to the CPU, the forward's time in milliseconds, and the operators that fell back."""
    device.check()
    model = _copy(models, case, device.torch_device)
    inputs = move(inputs, device=device.torch_device)
    device.synchronize()
    begin = time.perf_counter()
    with device.watch() as seen:
        outputs = run(model, inputs, forward=case.forward, where=f"on {device.torch_device} ({device.name})")
        device.synchronize()
    elapsed = (time.perf_counter() - begin) * 1e3
    return move(_outputs(case, outputs, "the model on the device"), device="cpu"), elapsed, list(seen.fell_back)


def _outputs(case: Case, returned: Any, what: str) -> dict[str, Tensor]:
    """The named tensors that a model returned.

    Raises: CaseError when there are none, or none is floating point.
    """
    found = tensors_of(returned, f"{case.name}: {what}")
    if not any(each.is_floating_point() or each.is_complex() for each in found.values()):
        dtypes = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in found.values()}))
        raise CaseError(
            f"{case.name}: {what} returned only {dtypes}, in which no rounding error shows; "
            f"return the floating-point values that they come from, and name them in `decisions` to compare the choices"
        )
    return found


def _judge(case: Case, actual: dict[str, Tensor], expected: dict[str, Tensor], device: Device) -> Verdict:
    """The verdict on the outputs that both sides have; an output that one side lacks is a failure."""
    shared = [name for name in expected if name in actual]
    comparisons = {name: compare(actual[name], expected[name]) for name in shared}
    decisions = _decide(case, actual, expected) if case.decisions is not None else None
    verdict = judge(comparisons, case.limits(device.stack), decisions=decisions)
    lacking = [_lacking(name, "the device did not return it") for name in expected if name not in actual]
    lacking += [_lacking(name, "the CPU did not return it") for name in actual if name not in expected]
    return replace(verdict, failures=(*lacking, *verdict.failures))


def _lacking(name: str, text: str) -> Reason:
    return Reason(criterion="output", text=f"output {name!r}: {text}")


def _decide(case: Case, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> Decisions | None:
    """Top-1 decisions along the last axis of the output that the case names; None where the shapes differ.

    Where the CPU's largest values are equal, as rounded logits can be, each of them is its decision.
    """
    if case.decisions not in expected:
        raise CaseError(f"{case.name}: decisions={case.decisions!r}, but the outputs are {', '.join(expected)}")
    left, right = actual.get(case.decisions), expected[case.decisions]
    if left is None or left.shape != right.shape:
        return None  # a failure of its own
    scores = right.double()
    left, right = left.double().argmax(-1, keepdim=True), scores.argmax(-1, keepdim=True)
    same = ((left == right) | (scores.gather(-1, left) == scores.gather(-1, right))).reshape(-1)
    left, right = left.reshape(-1), right.reshape(-1)
    if case.labels is not None and case.labels.numel() != right.numel():
        raise CaseError(f"{case.name}: {case.labels.numel()} labels for {right.numel()} decisions")
    differing = (~same).nonzero().reshape(-1)
    first = int(differing[0]) if differing.numel() else None
    labels = None if case.labels is None else case.labels.reshape(-1)
    return Decisions(
        count=right.numel(),
        agree=int(same.sum()),
        correct_actual=None if labels is None else int((left == labels).sum()),
        correct_expected=None if labels is None else int((right == labels).sum()),
        first=None if first is None else (first, int(left[first]), int(right[first])),
    )


def _with_fallbacks(verdict: Verdict, fell_back: list[str]) -> Verdict:
    if not fell_back:
        return verdict
    text = f"FELL BACK: computed by the CPU in place of the device: {', '.join(fell_back)}; there CPU was compared with CPU"
    return replace(
        verdict,
        failures=(Reason(criterion="fallback", text=text), *verdict.failures),
        marks=(*verdict.marks, FELL_BACK),
    )
