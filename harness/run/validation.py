"""One case with one seed, on the CPU and on a device: run, measured and judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.case import Case
from harness.devices import Device, Stack, Watched, lacks, unknown_rounding
from harness.errors import HarnessError
from harness.judging.checks import hangs_on_choice, hangs_on_slack, hangs_on_ties
from harness.judging.preset_names import NEED_OTHER_TIES
from harness.judging.status import FELL_BACK, NONDETERMINISTIC, Mark
from harness.judging.tolerance import Tolerance, without_forecast
from harness.judging.verdict import Evidence, Reason, Verdict, skipped
from harness.measure import compare
from harness.numerics.expected_error import Rules, overflow_of, rules_of
from harness.reference import (
    INPUT,
    Models,
    Reference,
    as_infinite,
    digest,
    inputs_digest,
    named_tensors,
    refer,
    require_float32,
    roundoff,
)
from harness.run.across import NO_CARDS, Across, compare_cards
from harness.run.assumptions import assumption_of, hangs, naming
from harness.run.cpu import CpuSide, ModelDraws, copy_of, golden_outputs, inputs_of
from harness.run.device import DeviceRun, run_on_device
from harness.run.judged import Healthy, Judge, next_tokens
from harness.run.notes import UNMOVED, alone_text, blind_text, drawn_text, few_text, host_text, pinned_text, ties_text
from harness.run.repeats import conditioning_of, differences, largest_error, repeat_text
from harness.run.switches import switch_costs


def validate(
    case: Case,
    seed: int | None,
    device: Device,
    *,
    models: Models | None = None,
    rerun_reference: bool = False,
    preset: str | None = None,
    across: Across | None = None,
) -> Verdict:
    """Run `case` with the inputs of `seed` on the CPU and on `device`, compare every output, judge.

    The device runs twice. The CPU runs in the case's dtype, in float64 on the same weights and inputs, and under the
    device's rounding rules; the first of these twice with the first inputs of a model in a dtype, and with
    `rerun_reference` always. Every run gets an untouched copy of the model, and generators that are seeded alike
    (`harness.reference.randomness`). `preset` judges instead of the case's own tolerance. Pass one `Models` to many
    calls and the weights are built once. With `across` the row is run on all of its cards as well, and fails where one
    of them has other bits than most.

    A case in a dtype that the SoC lacks is SKIPPED, one whose reference does not repeat is an ERROR. Where it is not
    known how the SoC rounds there is no forecast, and a preset that needs one gives way to one that does not, see
    `without_forecast`.

    Raises: LossyReferenceError when the CPU loses more in float32 than float32 does, before anything runs; CaseError
    when the case returns nothing that can be compared, RunError when the model or the device raises, DeviceError when
    the device does not compute: before the runs, or after them; MemoryLimitError when there is no room for the model's
    copies.
    """
    absent = lacks(device, case.dtype)
    if absent is not None:
        return skipped(absent)
    at = f"{case.name} {case.dtype}" + ("" if seed is None else f" seed {seed}")
    device.require_running()  # before anything else: rows after a device's end cost nothing
    require_float32()
    models = models if models is not None else Models()
    inputs = inputs_of(case, seed)
    how = dict(models=models, inputs=inputs, at=at, rerun_reference=rerun_reference, preset=preset)
    how |= dict(across=across)
    try:
        return _validate(case, seed, device, **how)
    except ModelDraws:  # it was not known that the model draws random numbers, and all sides have to draw the same
        return _validate(case, seed, device, **how)


def _validate(
    case: Case,
    seed: int | None,
    device: Device,
    *,
    models: Models,
    inputs: Any,
    at: str,
    rerun_reference: bool,
    preset: str | None,
    across: Across | None,
) -> Verdict:
    inputs_sha256 = inputs_digest(inputs, f"{case.name}: inputs()")
    cpu = CpuSide(case, models, inputs, inputs_sha256, device, 0 if seed is None else seed)
    refs = _references(cpu, device, rerun_reference)
    named = named_tensors(refs.expected)
    ran = run_on_device(cpu, device, at, named)
    stack = device.stack  # read after the run: models change switches
    tolerance = _tolerance(case, stack, preset)
    rules = rules_of(stack)
    judge = Judge(
        case=case,
        healthy=_healthy(cpu, refs, rules, tolerance),
        tolerance=tolerance,
        saturates=device.name if refs.overflow is not None and refs.golden is not None else "",
        targets=next_tokens(case, inputs),
    )
    outcome = _judged(judge, cpu, rules, ran)
    cards = NO_CARDS if across is None else compare_cards(cpu, across, at, named, judge, ran)
    verdict = outcome.verdict
    if verdict.failures and ran.drawn.there and not case.own_random:
        verdict = replace(verdict, failures=(Reason(criterion="random", text=DRAWN_THERE), *verdict.failures))
    verdict = replace(verdict, failures=(*_autocast_apart(case, refs, ran, verdict), *verdict.failures))
    if verdict.failures and cpu.clean:
        verdict = replace(verdict, failures=(*verdict.failures, *_otherwise(cpu, refs)))
    conditioning = conditioning_of(cpu, refs.golden)
    notes = [
        *case.notes,
        models.notes.get(case.key, ""),
        refs.scatter,
        alone_text(case, outcome.outputs, refs.expected),
        drawn_text(cpu),
        host_text(ran.seen),
        blind_text(ran.seen),
    ]
    notes += [pinned_text(cpu), outcome.few, ties_text(verdict), UNMOVED if conditioning == 0 else ""]
    marks = (NONDETERMINISTIC,) if outcome.rerun else cards.marks
    forecast = judge.healthy.forecast
    evidence = replace(
        _evidence(cpu, refs, ran, outcome),
        switches=switch_costs(cpu, stack, ran.seen.operators, forecast, refs.expected, refs.golden),
        forecast=None if rules is None else str(rules),
        conditioning=conditioning,
        card=stack.card,
        cards=cards.cards,
        notes=tuple(filter(None, notes)),
    )
    failures = (*verdict.failures, *cards.reasons)
    verdict = replace(verdict, failures=failures, marks=(*verdict.marks, *marks), evidence=evidence)
    return _with_what_was_seen(verdict, ran.seen, case.fallbacks)


def _evidence(cpu: CpuSide, refs: _References, ran: DeviceRun, outcome: _Outcome) -> Evidence:
    """What the two sides' runs leave: digests, times, where weights and numbers come from."""
    case, models = cpu.case, cpu.models
    return Evidence(
        weights=_weights(models, case),
        reference=refs.reference.words,
        inputs_sha256=cpu.inputs_sha256,
        expected_sha256=digest(refs.expected),
        actual_sha256=digest(outcome.outputs),
        expected_ms=refs.reference.milliseconds,
        actual_ms=ran.milliseconds,
        first_run_ms=ran.first_milliseconds,
        no_golden=refs.lacking,
        rerun=outcome.rerun,
        threads=torch.get_num_threads(),
        stored=tuple(cpu.stored),
        parted=outcome.parting,
        weights_sha256=models.content(**case.recipe),
        weights_from="" if case.checkpoint is not None else models.sources[case.key],
    )


def _autocast_apart(case: Case, refs: _References, ran: DeviceRun, verdict: Verdict) -> list[Reason]:
    """A reason where torch.autocast was on for one side alone: always where the reference is then the coarser one, and
    for a row that fails where the device is.
    """
    coarse_reference = refs.reference.autocast and not ran.autocast and case.torch_dtype.itemsize > 2
    coarse_device = ran.autocast and not refs.reference.autocast and bool(verdict.failures)
    if not coarse_reference and not coarse_device:
        return []
    side = "the CPU's" if coarse_reference else "the device's"
    text = (
        f"torch.autocast was on for {side} side alone, which computed in half precision; "
        "write torch.autocast(x.device.type), so that it is on for both or for none"
    )
    return [Reason(criterion="autocast", text=text)]


DRAWN_THERE = (
    "the device drew random numbers itself, inside of an operator, which the CPU cannot draw: the outputs are of "
    "other numbers"
)


@dataclass(frozen=True, kw_only=True)
class _References:
    """The CPU's runs that a row needs whatever the device does."""

    reference: Reference  # in the case's dtype
    expected: dict[str, Tensor]  # its outputs
    golden: dict[str, Tensor] | None  # in float64; None where it cannot be computed
    wide: dict[str, Tensor] | None  # golden as it was computed, see `Healthy`
    lacking: str | None  # why there is no golden
    overflow: Rules | None  # how the reference overflows, where that is as the device does
    scatter: str  # what is said of its second run


def _references(cpu: CpuSide, device: Device, rerun_reference: bool) -> _References:
    wide, lacking = golden_outputs(cpu)  # first: it shows whether the model draws random numbers
    golden = None if wide is None else as_infinite(wide)
    overflow = overflow_of(device.stack, cpu.case.torch_dtype)
    reference = cpu.run("cpu", rules=overflow, twice=rerun_reference or cpu.is_first)
    scatter = cpu.models.repeats.setdefault(cpu.repeated, repeat_text(reference, golden, cpu.case.torch_dtype))
    return _References(
        reference=reference,
        expected=_written_alike(reference.outputs, golden),
        golden=golden,
        wide=wide,
        lacking=lacking,
        overflow=overflow,
        scatter=scatter,
    )


def _tolerance(case: Case, stack: Stack, preset: str | None) -> Tolerance:
    """What judges: a preset, else the case's tolerance, without limits that need a forecast where there is none."""
    tolerance = Tolerance(preset=preset) if preset else case.limits(stack)
    unknown = unknown_rounding(stack)
    return tolerance if unknown is None else without_forecast(tolerance, unknown, case.dtype)


def _healthy(cpu: CpuSide, refs: _References, rules: Rules | None, tolerance: Tolerance) -> Healthy:
    """What the device's outputs are compared with; a forecast with other ties for the preset that needs it."""
    forecast = cpu.run("forecast", rules=rules).outputs if rules is not None else None
    modes = () if rules is None else rules.modes
    other = None
    if tolerance.preset in NEED_OTHER_TIES and "HF32" in modes:
        ties = "even" if rules.ties == "away" else "away"
        other = cpu.run("forecast", rules=replace(rules, ties=ties)).outputs
    return Healthy(
        expected=refs.expected, golden=refs.golden, forecast=forecast, other=other, wide=refs.wide, modes=modes
    )


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """The verdict on the worse of the device's two runs."""

    verdict: Verdict
    parting: str  # where generations part
    outputs: dict[str, Tensor]  # of the run that it is about
    rerun: dict[str, float]  # what the two runs differ by
    few: str  # what is said of few elements


def _judged(judge: Judge, cpu: CpuSide, rules: Rules | None, ran: DeviceRun) -> _Outcome:
    outputs = ran.outputs
    verdict, parting = judge(outputs)
    few = ""
    if hangs_on_slack(verdict) or hangs_on_ties(verdict) or hangs_on_choice(verdict):
        still = judge.healthy.forecast or judge.healthy.expected
        judge = judge.with_healthy(random=(still, *cpu.at_random(rules)))
        verdict, parting = judge(outputs)
        few = few_text(verdict)
    rerun = differences(ran.again, outputs)
    if rerun and not verdict.failures:  # an error that comes and goes: the row is that of the worse run
        worse, worse_parting = judge(ran.again)
        if worse.failures:
            failures = tuple(
                replace(failure, text=f"{failure.text}; the other of the two runs passes") for failure in worse.failures
            )
            verdict, parting, outputs = replace(worse, failures=failures), worse_parting, ran.again
    if rules is not None and hangs(verdict):

        def again(forecast: dict[str, Tensor]) -> Verdict:
            return judge.with_healthy(forecast=forecast)(outputs)[0]

        assumption = assumption_of(again, lambda other: cpu.run("forecast", rules=other).outputs, rules, cpu.case.dtype)
        verdict = naming(verdict, assumption)
    return _Outcome(verdict=verdict, parting=parting, outputs=outputs, rerun=rerun, few=few)


def _written_alike(outputs: dict[str, Tensor], golden: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The CPU's outputs without the inputs that the float64 run did not write into as well: `x.float()` copies halves
    alone.
    """
    unlike = named_tensors(outputs, (INPUT,)) - (golden or outputs).keys()
    return {name: output for name, output in outputs.items() if name not in unlike}


def _otherwise(cpu: CpuSide, refs: _References) -> list[Reason]:
    """A reason where the model computes otherwise on the CPU of a process that sees an NPU: the device's side is such a
    one.
    """
    how = dict(rules=refs.overflow, forward=cpu.case.forward, dtype=cpu.case.torch_dtype, gradients=cpu.case.gradients)
    try:
        here = refer(
            lambda: copy_of(cpu.models, cpu.case, "cpu"),
            cpu.inputs,
            what=cpu.case.name,
            draws=cpu.draws,
            twice=False,
            **how,
        ).outputs
    except HarnessError:
        return []
    away = max(
        (
            each.rel_l2
            for name in refs.expected
            if name in here and (each := compare(here[name], refs.expected[name])).comparable
        ),
        default=0.0,
    )
    error = largest_error(refs.expected, refs.golden) or 0.0
    if not away > 8 * max(error, roundoff(cpu.case.torch_dtype)):
        return []
    text = (
        "the model computes otherwise where it sees an NPU: beside torch_npu the CPU differs by rel_l2 "
        f"{away:.2e} from the CPU without "
        "it; transformers makes boolean masks of additive ones there, which attn_implementation='eager' "
        "avoids; in other code look "
        "for is_torch_npu_available() and torch.npu"
    )
    return [Reason(criterion="npu_seen", text=text)]


def _weights(models: Models, case: Case) -> str:
    """`case.weights()`, read once for all the cases on one checkpoint."""
    if case.checkpoint is None:
        return case.weights()
    if case.checkpoint not in models.digests:
        models.digests[case.checkpoint] = case.weights()
    return models.digests[case.checkpoint]


def _with_what_was_seen(verdict: Verdict, seen: Watched, allowed: tuple[str, ...]) -> Verdict:
    """The verdict with what the CPU computed in place of the device: an operator that fell back, the model's own code,
    all of it.
    """
    result, marks = [], []
    unknown = [item for item in seen.fell_back if item not in allowed]
    if seen.fell_back:
        marks.append(FELL_BACK)
    if unknown:
        text = (
            f"FELL BACK: computed by the CPU in place of the device: {', '.join(unknown)}; there CPU was compared "
            "with CPU"
        )
        result.append(Reason(criterion="fallback", text=text))
    if seen.computed == 0:
        text = (
            "the device computed nothing: no operator but copies and views ran there; keep the model and its "
            "inputs on the device"
        )
        result.append(Reason(criterion="fallback", text=text))
    if seen.on_host:
        marks.append(Mark.ON_HOST)
    return replace(verdict, failures=(*result, *verdict.failures), marks=(*verdict.marks, *marks))
