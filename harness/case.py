"""What to run, and the deep function that runs it: one case, one seed, CPU against a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.clean import CleanProcess, needs_clean
from harness.measure import Comparison, compare
from harness.devices import Device, Stack, lacks, unknown_rounding
from harness.errors import CaseError, RunError
from harness.forecast import Rules, overflow_of, rules_of
from harness.gate import (
    FELL_BACK,
    NEAR_TIE,
    NONDETERMINISTIC,
    UNFELT,
    Decisions,
    Evidence,
    Reason,
    References,
    Tolerance,
    Verdict,
    is_floating,
    judge,
    skipped,
    without_forecast,
)
from harness.generation import first_divergence, shared_length, until
from harness.reference import Models, digest, fresh, move, moved_by_one_rounding, require_float32, roundoff, run, run_cpu, tensors_of
from harness.store import Key, code_digest, key_of, weights_digest

FLOOR = Tolerance(preset="floor")
TOP = 5  # largest logits whose agreement is counted beside the largest


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
    tolerance: Tolerance | Mapping[str, Tolerance] | Callable[[str, Stack], Tolerance] = FLOOR  # by dtype, or by dtype and switches
    dtype: str = "float32"
    checkpoint: Path | None = None  # where model() takes its weights from; None: seeded ones
    weights_seed: int = 0  # model() runs under torch's generator with this seed
    forward: Callable[[nn.Module, Any], Any] | None = None
    decisions: str | None = None  # name of the output with logits along its last axis; "output" for a bare tensor
    generates: tuple[str, str] | None = None  # the outputs with generated tokens (B, T) and the logits that each was taken from (B, T, V)
    labels: Tensor | None = None  # the right decisions, one for each input
    fallbacks: tuple[str, ...] = ()  # operators, "aten::std.correction", that the device may leave to the CPU: marked, and no failure

    def __post_init__(self):
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype) or not is_floating(self.dtype):
            raise ValueError(f"case {self.name}: dtype {self.dtype!r} must be a floating-point dtype, such as 'float32'")
        if self.generates is not None and len(self.generates) != 2:
            raise ValueError(f"case {self.name}: generates={self.generates!r} must name two outputs: the tokens and their logits")
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


def validate(
    case: Case, seed: int | None, device: Device, *, models: Models | None = None, rerun_reference: bool = False, preset: str | None = None
) -> Verdict:
    """Run `case` with the inputs of `seed` on the CPU and on `device`, compare every output, judge.

    The device runs twice. The CPU runs in the case's dtype, in float64 on the same weights and inputs, and under the device's rounding
    rules; with `rerun_reference` the first of these twice. `preset` judges instead of the case's own tolerance. Pass one `Models` to many
    calls and the weights are built once.

    A case in a dtype that the SoC lacks is SKIPPED. Where it is not known how the SoC rounds there is no forecast, and a preset that needs
    one gives way to one that does not, see `without_forecast`.

    Raises: LossyReferenceError when the CPU loses more in float32 than float32 does, before anything runs; CaseError when
    the case returns nothing that can be compared, RunError when the model or the device raises, DeviceError when the
    device does not compute: before the runs, or after them; MemoryLimitError when there is no room for the model's
    copies.
    """
    absent = lacks(device, case.dtype)
    if absent is not None:
        return skipped(absent)
    at = f"{case.name} {case.dtype}" + ("" if seed is None else f" seed {seed}")
    device.check(at)  # before anything else: rows after a device's end cost nothing
    require_float32()
    models = models if models is not None else Models()
    drawn = case.inputs(torch.Generator().manual_seed(0 if seed is None else seed))
    inputs = move(drawn, device="cpu", dtype=case.torch_dtype)
    inputs_sha256 = digest(tensors_of(inputs, f"{case.name}: inputs()"))

    cpu = _Cpu(case, models, inputs, inputs_sha256, device)
    overflow = overflow_of(device.stack, case.torch_dtype)
    expected, expected_ms, words = cpu.run("cpu", rules=overflow)
    whole = expected
    again = cpu.run("cpu", rules=overflow, stored=False)[0] if rerun_reference else None
    ran = _run_device(models, case, inputs, device, at)
    stack = device.stack  # read after the run: models change switches
    rules = rules_of(stack)
    tolerance, unknown = Tolerance(preset=preset) if preset else case.limits(stack), unknown_rounding(stack)
    tolerance = tolerance if unknown is None else without_forecast(tolerance, unknown, case.dtype)
    forecast = cpu.run("forecast", rules=rules)[0] if rules is not None else None
    other = None
    if tolerance.preset == "sharp" and rules is not None and "HF32" in rules.modes:
        other = cpu.run("forecast", rules=replace(rules, ties="even" if rules.ties == "away" else "away"))[0]
    golden, lacking = _golden(cpu)
    golden, cut = (golden, []) if overflow is None or golden is None else cut_as_float16(golden, expected, ran.outputs, device.name)

    actual, parted, parting = ran.outputs, None, ""
    if case.generates is not None:
        actual, expected, golden, forecast, parted, parting = _until_they_part(case.generates, actual, expected, golden, forecast)
    comparisons, references = measure(actual, expected, golden, forecast, () if rules is None else rules.modes, other)
    decisions = _decide(case, ran.outputs, expected) if case.decisions is not None else None
    verdict = judge(comparisons, tolerance, decisions=decisions, references=references)

    found = [_lacking(name, "the device did not return it") for name in expected if name not in ran.outputs]
    found += [_lacking(name, "the CPU did not return it") for name in ran.outputs if name not in expected]
    found += _unstable(expected, again) if again is not None else []
    found += cut
    found += [Reason(criterion="token", text=parted.text)] if parted is not None and not parted.near_tie else []
    rerun = _differences(ran.again, ran.outputs)
    marks = ((NEAR_TIE,) if parted is not None and parted.near_tie else ()) + ((NONDETERMINISTIC,) if rerun else ()) + ((UNFELT,) if any(each.unfelt for each in references.values()) else ())
    evidence = Evidence(
        weights=_weights(models, case),
        reference=words,
        inputs_sha256=inputs_sha256,
        expected_sha256=digest(whole),
        actual_sha256=digest(ran.outputs),
        expected_ms=expected_ms,
        actual_ms=ran.milliseconds,
        first_run_ms=ran.first_milliseconds,
        forecast=None if rules is None else str(rules),
        no_golden=lacking,
        conditioning=_conditioning(cpu, golden),
        rerun=rerun,
        threads=torch.get_num_threads(),
        stored=tuple(cpu.stored),
        card=stack.card,
        parted=parting,
    )
    verdict = replace(verdict, failures=(*found, *verdict.failures), marks=(*verdict.marks, *marks), evidence=evidence)
    return _with_fallbacks(verdict, ran.fell_back, case.fallbacks)


def _until_they_part(names: tuple[str, str], actual, expected, golden, forecast):
    """The outputs up to the first token that any run chose otherwise, the device's first, or None, and where that is in words."""
    healthy = [each for each in (golden, forecast) if each is not None]
    parted = first_divergence(actual, expected, healthy if golden is not None else [], names)
    shared = shared_length([actual, *healthy], expected, names)
    if shared is None:
        return actual, expected, golden, forecast, None, ""
    said = parted.text if parted is not None else f"healthy runs part at token {shared}: compared up to there"
    cut = [None if each is None else until(each, shared, names) for each in (actual, expected, golden, forecast)]
    return (*cut, parted, said)


class _Cpu:
    """The CPU's runs of one case on one set of inputs: read from the store where they are, in a process without torch_npu where they must."""

    def __init__(self, case: Case, models: Models, inputs: Any, inputs_sha256: str, device: Device):
        self.case, self.models, self.inputs, self.inputs_sha256 = case, models, inputs, inputs_sha256
        self.stored: list[str] = []  # the roles that were read
        self.base = models.base(_model_key(case), case.model, seed=case.weights_seed)
        self.clean = device.torch_device.type == "npu" and needs_clean(self.base)
        host = dict(separate=self.clean, emulated=device.backend == "emulated")
        self.layers = models.make_room(case.name, _model_key(case), dtype=case.torch_dtype, **host)

    def run(self, role: str, *, rules: Rules | None = None, stored: bool = True) -> tuple[dict[str, Tensor], float, str]:
        """Outputs by name, milliseconds, and what computed them. `role`: "cpu", "forecast", "golden", or "moved" for golden on moved inputs."""
        key = self._key(role, rules) if self.models.store is not None and stored else None
        found = self.models.store.load(key) if key is not None else None
        if found is not None:
            self.stored.append(role)
            return found, 0.0, f"CPU {self.case.dtype}, read from the reference store"
        outputs, milliseconds, words = self._compute(role, rules)
        if key is not None:
            self.models.store.save(key, outputs)
        return outputs, milliseconds, words

    def _compute(self, role: str, rules: Rules | None) -> tuple[dict[str, Tensor], float, str]:
        case, wide = self.case, role in ("golden", "moved")
        dtype = torch.float64 if wide else case.torch_dtype
        inputs = move(self.inputs, device="cpu", dtype=dtype)
        inputs = moved_by_one_rounding(inputs, case.torch_dtype) if role == "moved" else fresh(inputs)
        how = dict(forward=case.forward, dtype=dtype, rules=rules)
        if self.clean:
            self.models.clean = self.models.clean or CleanProcess()
            sent = dict(what=f"{case.name}: the model", cast=case.torch_dtype, wide=wide, layers=self.layers)
            outputs, milliseconds, words = self.models.clean.forward(self.base, inputs, **sent, **how)
        else:
            outputs, milliseconds, words = run_cpu(copy_of(self.models, case, "cpu", wide=wide), inputs, **how)
        return _outputs(case, outputs, "the model"), milliseconds, words

    def _key(self, role: str, rules: Rules | None) -> Key:
        case, models = self.case, self.models
        of_model = ("content", case.model, case.checkpoint, case.weights_seed, case.dtype, case.forward)
        if of_model not in models.digests:
            narrow = copy_of(models, case, "cpu")
            models.digests[of_model] = weights_digest(narrow), code_digest(narrow, case.forward)
            if self.clean:  # the other process has a copy of its own
                models.drop(dtype=case.torch_dtype, device=torch.device("cpu"))
        weights, code = models.digests[of_model]
        more = {"rules": None if rules is None else asdict(rules), "clean": self.clean}
        more |= {"cpu": "any", "torch": torch.__version__.partition("+")[0]}  # a store is carried from machine to machine
        return key_of(role=role, weights=weights, code=code, inputs=self.inputs_sha256, dtype=case.dtype, **more)


def without_npu(case: Case, models: Models, inputs: Any, device: Device) -> dict[str, Tensor] | None:
    """What the CPU gives in a process without torch_npu, by name; None for a model that gives the same beside it. `inputs` are on the CPU, in the case's dtype."""
    cpu = _Cpu(case, models, inputs, "", device)
    return cpu.run("cpu", stored=False)[0] if cpu.clean else None


def _golden(cpu: _Cpu) -> tuple[dict[str, Tensor] | None, str | None]:
    """The outputs in float64, or None and why there are none: a model may hold operators that have no float64."""
    try:
        return cpu.run("golden")[0], None
    except RunError as error:
        return None, str(error)


LARGEST = 65520.0  # from here on float16 rounds to Inf


def cut_as_float16(
    golden: dict[str, Tensor], expected: dict[str, Tensor], actual: dict[str, Tensor], name: str
) -> tuple[dict[str, Tensor], list[Reason]]:
    """The float64 outputs for a device where float16 saturates: in place of Inf and NaN what the CPU has there, cut likewise.

    Float64 says nothing of those places, so there the device's number stands where it is within a last place of the CPU's.
    And a reason for each output whose finite numbers float16 cannot hold: those are wrong on any device.
    """
    held, reasons = {}, []
    for output, wide in golden.items():
        narrow = expected.get(output)
        if narrow is None or not wide.is_floating_point() or narrow.dtype != torch.float16 or narrow.shape != wide.shape:
            held[output] = wide
            continue
        cut, there = narrow.double(), actual.get(output, narrow).double()
        if there.shape == cut.shape:
            cut = torch.where((there - cut).abs() <= cut.abs() * torch.finfo(torch.float16).eps, there, cut)
        held[output] = torch.where(wide.isfinite(), wide, cut)
        beyond = int((wide.isfinite() & (wide.abs() >= LARGEST)).sum())
        if beyond:
            text = f"{beyond} elements of the float64 result are beyond 65504, where float16 saturates on {name}: float16 cannot hold this model"
            reasons.append(Reason(criterion="finite", text=text, output=output if len(golden) > 1 else "", found=beyond, allowed=0))
    return held, reasons


def measure(
    actual: dict[str, Tensor], expected: dict[str, Tensor], golden: dict[str, Tensor] | None, forecast: dict[str, Tensor] | None,
    modes: tuple[str, ...] = (), other: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Comparison], dict[str, References]]:
    """The device's outputs against the CPU's, and both against float64, by name: what `judge` takes. `other`: a forecast with other ties."""  # fmt: skip
    shared = [name for name in expected if name in actual]
    comparisons = {name: compare(actual[name], expected[name]) for name in shared}
    held = [name for name in shared if golden is not None and _fits(name, expected, golden)]
    return comparisons, {name: _hold(name, actual, expected, golden, forecast, modes, other) for name in held}


def _fits(name: str, expected: dict[str, Tensor], golden: dict[str, Tensor]) -> bool:
    return name in golden and golden[name].shape == expected[name].shape and (expected[name].is_floating_point() or expected[name].is_complex())


def _hold(name: str, actual, expected, golden, forecast, modes: tuple[str, ...], other) -> References:
    predicted = None if forecast is None or name not in forecast else forecast[name]
    return References(
        golden=compare(actual[name], golden[name]),
        cpu=compare(expected[name], golden[name]),
        forecast=None if predicted is None else compare(predicted, golden[name]),
        unexplained=None if predicted is None else compare(actual[name], predicted).rel_l2,
        ties=None if predicted is None or other is None else compare(other[name], predicted).rel_l2,
        modes=modes,
    )


def _conditioning(cpu: _Cpu, golden: dict[str, Tensor] | None) -> float | None:
    """How many times larger the relative change of the output is than that of the input, when the input moves by one rounding.

    Measured once for a model, in float64, with its first inputs and dtype; None where the inputs hold no fractions.
    """
    case, known = cpu.case, cpu.models.conditioning
    key = (case.model, case.checkpoint, case.weights_seed, case.forward)
    if key not in known:
        known[key] = None
        if golden is not None and moved_by_one_rounding(cpu.inputs, case.torch_dtype) is not None:
            moved = cpu.run("moved")[0]
            grown = [compare(moved[name], golden[name]).rel_l2 for name in moved if _fits(name, moved, golden)]
            known[key] = max(grown) / roundoff(case.torch_dtype) if grown else None
    return known[key]


def _differences(again: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, float]:
    """What two runs of the same thing differ by, the output that differs most; empty where every bit is the same."""
    found = [compare(again[name], first[name]) for name in first if name in again]
    differing = [each for each in found if not each.comparable or each.nonfinite_differ or each.unequal > each.nan_expected]
    if not differing:
        return {}
    worst = max(differing, key=lambda each: each.rel_l2 if each.rel_l2 == each.rel_l2 else math.inf)
    return {"max_diff": worst.max_diff, "rel_l2": worst.rel_l2, "unequal": worst.unequal}


def _unstable(first: dict[str, Tensor], again: dict[str, Tensor]) -> list[Reason]:
    found = _differences(again, first)
    if not found:
        return []
    text = "REFERENCE UNSTABLE: two runs on the CPU differ by {max_diff:.2e} at most, rel_l2 {rel_l2:.2e}, in {unequal} elements; ".format(**found)
    return [Reason(criterion="reference", text=text + "seed what the model draws, or set the number of threads")]


def _model_key(case: Case) -> tuple:
    return case.model, case.checkpoint, case.weights_seed


def copy_of(models: Models, case: Case, device: torch.device | str, *, wide: bool = False) -> nn.Module:
    """The model of a case in its dtype on a device; `wide` gives those weights in float64."""
    return models.get(_model_key(case), case.model, seed=case.weights_seed, dtype=case.torch_dtype, device=torch.device(device), wide=wide)


def _weights(models: Models, case: Case) -> str:
    """`case.weights()`, read once for all the cases on one checkpoint."""
    if case.checkpoint is None:
        return case.weights()
    if case.checkpoint not in models.digests:
        models.digests[case.checkpoint] = case.weights()
    return models.digests[case.checkpoint]


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """Two runs on the device, brought to the CPU, the forwards' times, and the operators that fell back."""

    outputs: dict[str, Tensor]  # of the first run
    again: dict[str, Tensor]  # of the second, which was watched
    milliseconds: float  # of the faster run: the first may compile, and watching costs the second some
    first_milliseconds: float
    fell_back: list[str]


def _run_device(models: Models, case: Case, inputs: Any, device: Device, at: str) -> _Ran:
    device.check(at)

    def once(model: nn.Module, moved: Any) -> tuple[dict[str, Tensor], float]:
        device.synchronize()
        begin = time.perf_counter()
        returned = run(model, moved, forward=case.forward, where=device.where)
        device.synchronize()
        elapsed = (time.perf_counter() - begin) * 1e3
        return move(_outputs(case, returned, "the model on the device"), device="cpu"), elapsed

    with device.telling(at):
        model = copy_of(models, case, device.torch_device)
        first, second = (move(fresh(inputs), device=device.torch_device) for _ in range(2))
        outputs, compiling = once(model, first)  # unwatched: a composite operator takes other ways under a mode
        with device.watch() as seen:
            torch.zeros(1).neg()  # the first operator under a mode in a process imports what takes seconds
            again, warm = once(model, second)
    device.check(at)  # a device that drops its work without a word leaves in memory what an earlier run wrote
    times = dict(milliseconds=min(compiling, warm), first_milliseconds=compiling)
    return _Ran(outputs=outputs, again=again, fell_back=list(seen.fell_back), **times)


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
    overlap = _overlap(left.double(), scores)
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
        **overlap,
        correct_actual=None if labels is None else int((left == labels).sum()),
        correct_expected=None if labels is None else int((right == labels).sum()),
        first=None if first is None else (first, int(left[first]), int(right[first])),
    )


def _overlap(left: Tensor, right: Tensor) -> dict[str, Any]:
    """How much the k largest elements of each row are the same ones: 5, or half of a short row."""
    k = min(TOP, right.shape[-1] // 2) if right.dim() else 0
    if not k or not right.numel():
        return {}
    first, second = left.topk(k).indices, right.topk(k).indices
    shared = (first[..., :, None] == second[..., None, :]).any(-1)
    return {"k": k, "topk": float(shared.double().mean())}


def _with_fallbacks(verdict: Verdict, fell_back: list[str], allowed: tuple[str, ...]) -> Verdict:
    if not fell_back:
        return verdict
    verdict = replace(verdict, marks=(*verdict.marks, FELL_BACK))
    unknown = [each for each in fell_back if each not in allowed]
    if not unknown:
        return verdict
    text = f"FELL BACK: computed by the CPU in place of the device: {', '.join(unknown)}; there CPU was compared with CPU"
    return replace(verdict, failures=(Reason(criterion="fallback", text=text), *verdict.failures))
