"""What to run, and the deep function that runs it: one case, one seed, CPU against a device."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.reference.isolated_process import CleanProcess, needs_clean
from harness.measure import RUNS, Comparison, compare, scatter_of, worst_slices
from harness.devices import Device, Stack, Watched, lacks, unknown_rounding
from harness.devices.device_errors import fault_in
from harness.errors import CaseError, HarnessError, RunError, UnstableReferenceError
from harness.numerics.expected_error import Rules, alternatives, overflow_of, rules_of
from harness.judging.checks import hangs_on_slack, hangs_on_ties, judge, near_ties
from harness.judging.criteria import FLOORED
from harness.judging.presets import UNDECIDED
from harness.judging.references import MANY, References, is_floating
from harness.judging.status import FELL_BACK, Mark, NEAR_TIE, NONDETERMINISTIC, UNFELT
from harness.judging.tolerance import Tolerance, without_forecast
from harness.judging.verdict import Decisions, Evidence, Reason, Verdict, skipped
from harness.measure.generation import first_divergence, shared_length, until
from harness.reference import (
    BUFFER,
    INPUT,
    Drawn,
    Draws,
    Models,
    Reference,
    as_golden_has,
    as_infinite,
    digest,
    drawing,
    fresh,
    move,
    moved_by_one_rounding,
    named,
    refer,
    require_float32,
    roundoff,
    run,
    seeded,
    tensors_of,
    watching,
    weights_digest,
)
from harness.reference.store import Key, code_digest, key_of

FLOOR = Tolerance(preset="floor")
TOP = 5  # largest logits whose agreement is counted beside the largest


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model in one dtype, its inputs and the limits on what the device may lose.

    `model()` builds it in float32 on the CPU; rows of one name with the same `model` object and weights share the
    build. A `model` with one parameter that must be given gets the case's dtype, and what it returns is not cast:
    `model=lambda dtype: AutoModel.from_pretrained(FOLDER, dtype=dtype)`. What it returned is never run: every side
    runs copies. One in training mode is run in evaluation mode, and the report says so, unless `training` is set.
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
    training: bool = False  # run in training mode, in which model() returns it: dropout is drawn alike on all sides
    isolated: bool | None = None  # the CPU's side in a process without torch_npu; None: where the model's code asks for an NPU
    gradients: bool = False  # autograd is on and parameters ask for gradients, which `forward` may return
    companion: bool = True  # of a case in half dtypes alone one row is run in float32 too, where errors show that half roundings hide
    own_random: bool = False  # the device draws random numbers itself: for cases about its generator, which no other gives the same

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

    @functools.cached_property
    def takes_dtype(self) -> bool:
        """Whether `model` is given the dtype that it builds in."""
        try:
            parameters = inspect.signature(self.model).parameters.values()
        except (TypeError, ValueError):
            return False
        needed = [each for each in parameters if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        return len(needed) == 1 and needed[0].kind is not needed[0].KEYWORD_ONLY

    @property
    def key(self) -> tuple:
        """What names the model that the case runs: rows with one key share the build.

        The name is a part of it: `model` may read what a test has changed since, a setting or a file, and another case
        must not get the model of the one before.
        """
        return (self.name, *self._builder)

    @property
    def _builder(self) -> tuple:
        more = (self.dtype if self.takes_dtype else "", self.training, self.gradients)
        return (self.model, self.checkpoint, self.weights_seed, *(more if any(more) else ()))

    @property
    def subject(self) -> tuple:
        """What names the model and how it is called: whether it draws, repeats and how it is conditioned is known by it."""
        return (*self._builder, self.forward)

    @property
    def recipe(self) -> dict[str, Any]:
        """How `Models` builds the model."""
        build = functools.partial(self.model, self.torch_dtype) if self.takes_dtype else self.model
        how = dict(seed=self.weights_seed, training=self.training, gradients=self.gradients)
        return dict(key=self.key, build=build, **how)

    @property
    def built(self) -> dict[str, Any]:
        """How `Models` builds and copies the model, but for its device."""
        return dict(dtype=self.torch_dtype, cast=not self.takes_dtype, **self.recipe)

    def limits(self, stack: Stack) -> Tolerance:
        """The tolerance for this dtype under these numeric switches."""
        if isinstance(self.tolerance, Tolerance):
            return self.tolerance
        return self.tolerance[self.dtype] if isinstance(self.tolerance, Mapping) else self.tolerance(self.dtype, stack)

    def weights(self) -> str:
        """sha256 of the checkpoint, or "seeded:<n>" where none was given."""
        if self.checkpoint is None:
            return f"seeded:{self.weights_seed}"
        from harness.checkpoints.conversion import checkpoint_digest

        return checkpoint_digest(self.checkpoint)


def validate(
    case: Case, seed: int | None, device: Device, *, models: Models | None = None, rerun_reference: bool = False, preset: str | None = None
) -> Verdict:
    """Run `case` with the inputs of `seed` on the CPU and on `device`, compare every output, judge.

    The device runs twice. The CPU runs in the case's dtype, in float64 on the same weights and inputs, and under the device's rounding
    rules; the first of these twice with the first inputs of a model in a dtype, and with `rerun_reference` always. Every run gets an
    untouched copy of the model, and generators that are seeded alike (`harness.reference.randomness`). `preset` judges instead of the
    case's own tolerance. Pass one `Models` to many calls and the weights are built once.

    A case in a dtype that the SoC lacks is SKIPPED, one whose reference does not repeat is an ERROR. Where it is not known how the SoC
    rounds there is no forecast, and a preset that needs one gives way to one that does not, see `without_forecast`.

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
    inputs = inputs_of(case, seed)
    how = dict(models=models, inputs=inputs, at=at, rerun_reference=rerun_reference, preset=preset)
    try:
        return _validate(case, seed, device, **how)
    except _Draws:  # it was not known that the model draws random numbers, and all sides have to draw the same
        return _validate(case, seed, device, **how)


def inputs_of(case: Case, seed: int | None) -> Any:
    """The inputs of a seed on the CPU, in the case's dtype; generators that `inputs` draws from besides its own are seeded too."""
    number = 0 if seed is None else seed
    with seeded(number):
        return move(case.inputs(torch.Generator().manual_seed(number)), device="cpu", dtype=case.torch_dtype)


class _Draws(Exception):
    """A run drew random numbers, and those before it were not made to draw the same."""


def _validate(
    case: Case, seed: int | None, device: Device, *, models: Models, inputs: Any, at: str, rerun_reference: bool, preset: str | None
) -> Verdict:
    inputs_sha256 = digest(tensors_of(inputs, f"{case.name}: inputs()"))
    cpu = _Cpu(case, models, inputs, inputs_sha256, device, 0 if seed is None else seed)
    wide, lacking = _golden(cpu)  # first: it shows whether the model draws random numbers
    golden = None if wide is None else as_infinite(wide)
    overflow = overflow_of(device.stack, case.torch_dtype)
    reference = cpu.run("cpu", rules=overflow, twice=rerun_reference or cpu.is_first)
    scatter = _scatter(reference, golden, case.torch_dtype)
    scatter = models.repeats.setdefault(cpu.repeated, scatter)
    expected = whole = _written_alike(reference.outputs, golden)
    ran = _run_device(cpu, device, at, named(expected))
    stack = device.stack  # read after the run: models change switches
    rules = rules_of(stack)
    tolerance, unknown = Tolerance(preset=preset) if preset else case.limits(stack), unknown_rounding(stack)
    tolerance = tolerance if unknown is None else without_forecast(tolerance, unknown, case.dtype)
    forecast = cpu.run("forecast", rules=rules).outputs if rules is not None else None
    other = None
    if tolerance.preset == "sharp" and rules is not None and "HF32" in rules.modes:
        other = cpu.run("forecast", rules=replace(rules, ties="even" if rules.ties == "away" else "away")).outputs
    saturates = device.name if overflow is not None and golden is not None else ""
    healthy = _Healthy(expected=expected, golden=golden, forecast=forecast, other=other, wide=wide, modes=() if rules is None else rules.modes)
    verdict, parting = _held(case, ran.outputs, healthy, tolerance, saturates)
    few = ""
    if hangs_on_slack(verdict) or hangs_on_ties(verdict):
        healthy = replace(healthy, random=(forecast or expected, *cpu.at_random(rules)))
        verdict, parting = _held(case, ran.outputs, healthy, tolerance, saturates)
        few = _few_text(verdict)
    rerun, outputs = _differences(ran.again, ran.outputs), ran.outputs
    if rerun and not verdict.failures:  # an error that comes and goes: the row is that of the worse run
        worse, worse_parting = _held(case, ran.again, healthy, tolerance, saturates)
        if worse.failures:
            said = tuple(replace(each, text=f"{each.text}; the other of the two runs passes") for each in worse.failures)
            verdict, parting, outputs = replace(worse, failures=said), worse_parting, ran.again
    if rules is not None and hangs(verdict):

        def again(forecast: dict[str, Tensor]) -> Verdict:
            return _held(case, outputs, replace(healthy, forecast=forecast), tolerance, saturates)[0]

        assumption = assumption_of(again, lambda other: cpu.run("forecast", rules=other).outputs, rules, case.dtype)
        verdict = naming(verdict, assumption)
    if verdict.failures and ran.drawn.there and not case.own_random:
        text = "the device drew random numbers itself, inside of an operator, which the CPU cannot draw: the outputs are of other numbers"
        verdict = replace(verdict, failures=(Reason(criterion="random", text=text), *verdict.failures))
    if verdict.failures and cpu.clean:
        verdict = replace(verdict, failures=(*verdict.failures, *_otherwise(cpu, expected, golden, overflow)))
    marks = (NONDETERMINISTIC,) if rerun else ()
    conditioning = _conditioning(cpu, golden)
    notes = [models.notes.get(case.key, ""), scatter, _drawn_text(cpu), _host_text(ran.seen), _blind_text(ran.seen), _pinned_text(cpu)]
    notes += [few, _ties_text(verdict), UNMOVED if conditioning == 0 else ""]
    evidence = Evidence(
        weights=_weights(models, case),
        reference=reference.words,
        inputs_sha256=inputs_sha256,
        expected_sha256=digest(whole),
        actual_sha256=digest(outputs),
        expected_ms=reference.milliseconds,
        actual_ms=ran.milliseconds,
        first_run_ms=ran.first_milliseconds,
        forecast=None if rules is None else str(rules),
        no_golden=lacking,
        conditioning=conditioning,
        rerun=rerun,
        threads=torch.get_num_threads(),
        stored=tuple(cpu.stored),
        card=stack.card,
        parted=parting,
        weights_sha256=models.content(**case.recipe),
        weights_from="" if case.checkpoint is not None else models.sources[case.key],
        notes=tuple(filter(None, notes)),
    )
    verdict = replace(verdict, marks=(*verdict.marks, *marks), evidence=evidence)
    return _with_what_was_seen(verdict, ran.seen, case.fallbacks)


def _written_alike(outputs: dict[str, Tensor], golden: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The CPU's outputs without the inputs that the float64 run did not write into as well: `x.float()` copies halves alone."""
    unlike = named(outputs, (INPUT,)) - (golden or outputs).keys()
    return {name: each for name, each in outputs.items() if name not in unlike}


def _otherwise(
    cpu: _Cpu, expected: dict[str, Tensor], golden: dict[str, Tensor] | None, overflow: Rules | None
) -> list[Reason]:
    """A reason where the model computes otherwise on the CPU of a process that sees an NPU: the device's side is such a one."""
    how = dict(rules=overflow, forward=cpu.case.forward, dtype=cpu.case.torch_dtype, gradients=cpu.case.gradients)
    try:
        here = refer(
            lambda: copy_of(cpu.models, cpu.case, "cpu"), cpu.inputs, what=cpu.case.name, draws=cpu.draws, twice=False, **how
        ).outputs
    except HarnessError:
        return []
    away = max((each.rel_l2 for name in expected if name in here and (each := compare(here[name], expected[name])).comparable), default=0.0)
    error = _largest_error(expected, golden) or 0.0
    if not away > 8 * max(error, roundoff(cpu.case.torch_dtype)):
        return []
    text = (
        f"the model computes otherwise where it sees an NPU: beside torch_npu the CPU differs by rel_l2 {away:.2e} from the CPU without "
        "it; transformers makes boolean masks of additive ones there, which attn_implementation='eager' avoids; in other code look "
        "for is_torch_npu_available() and torch.npu"
    )
    return [Reason(criterion="npu_seen", text=text)]


@dataclass(frozen=True, kw_only=True)
class _Healthy:
    """What the device's outputs are held against, by name."""

    expected: dict[str, Tensor]
    golden: dict[str, Tensor] | None
    forecast: dict[str, Tensor] | None
    other: dict[str, Tensor] | None
    wide: dict[str, Tensor] | None  # golden as it was computed: with the largest number of float64 where a mask filled it
    modes: tuple[str, ...]
    random: Sequence[dict[str, Tensor]] = ()  # of runs with random roundings, the one without them first


def _held(case: Case, outputs: dict[str, Tensor], healthy: _Healthy, tolerance: Tolerance, saturates: str) -> tuple[Verdict, str]:
    """The verdict on one run of the device, and where generations part. `saturates`: the device on which float16 does."""
    golden, given = healthy.golden, outputs
    outputs, expected, forecast = (
        each if each is None or healthy.wide is None else as_golden_has(healthy.wide, each)
        for each in (outputs, healthy.expected, healthy.forecast)
    )
    actual = outputs
    golden, cut = cut_as_float16(golden, expected, outputs, saturates) if saturates else (golden, [])
    parted, parting = None, ""
    random = healthy.random
    if case.generates is not None:
        random = ()  # of other lengths
        actual, expected, golden, forecast, parted, parting = _until_they_part(case.generates, actual, expected, golden, forecast)
    comparisons, references = measure(actual, expected, golden, forecast, healthy.modes, healthy.other, random)
    decisions = _decide(case, outputs, expected) if case.decisions is not None else None
    verdict = judge(comparisons, tolerance, decisions=decisions, references=references)
    found = [_lacking(name, "the device did not return it") for name in expected if name not in outputs]
    found += [_lacking(name, "the CPU did not return it") for name in outputs if name not in expected]
    plainer = cut + (_unseen(given, healthy.expected, golden) or _zeroed(given, healthy.expected, golden))
    if plainer:  # they say why nothing can be decided
        verdict = _without_undecided(verdict)
    found += plainer
    found += [Reason(criterion="token", text=parted.text)] if parted is not None and not parted.near_tie else []
    marks = (NEAR_TIE,) if parted is not None and parted.near_tie else ()
    marks += (UNFELT,) if any(each.unfelt for each in references.values()) else ()
    marks += (NEAR_TIE,) if _by_ties(comparisons) and NEAR_TIE not in marks else ()
    return replace(verdict, failures=(*found, *verdict.failures), marks=(*verdict.marks, *marks)), parting


HANGS = 8.0  # times a limit: what is further beyond is explained by no assumption, the furthest of which takes 3


def hangs(verdict: Verdict) -> bool:
    """Whether a row fails by so little that an assumption of the forecast may fail it, and not the device."""
    judged = [each for each in verdict.failures if each.criterion in (*FLOORED, "flip_margin")]
    numbers = [each for each in judged if each.found and each.allowed]
    return len(numbers) == len(verdict.failures) > 0 and all(each.found <= HANGS * each.allowed for each in numbers)


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
            found = forecast(other)
        except HarnessError:  # a forecast that cannot be made explains nothing
            continue
        if again(found).passed:
            return what
    return ""


def naming(verdict: Verdict, assumption: str) -> Verdict:
    """The verdict whose reasons name the assumption that it hangs on, if there is one."""
    if not assumption:
        return verdict
    measures = "python -m harness doctor --probe FILE measures a vector unit"
    said = f"it would pass if {assumption}, which no card has confirmed or denied yet: {measures}"
    return replace(verdict, failures=tuple(replace(each, text=f"{each.text}; {said}") for each in verdict.failures))


def _without_undecided(verdict: Verdict) -> Verdict:
    failures = tuple(each for each in verdict.failures if each.criterion != "undecided")
    return replace(verdict, failures=failures, marks=tuple(each for each in verdict.marks if each is not Mark.UNDECIDABLE))


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

    def __init__(self, case: Case, models: Models, inputs: Any, inputs_sha256: str, device: Device, seed: int):
        self.case, self.models, self.inputs, self.inputs_sha256, self.seed = case, models, inputs, inputs_sha256, seed
        self.stored: list[str] = []  # the roles that were read
        self.drawn = Drawn()  # what the last run drew
        self.base = models.base(**case.recipe)
        _require_dtype(case, self.base)
        wanted = case.isolated if case.isolated is not None else needs_clean(self.base)
        self.clean = wanted and device.torch_device.type == "npu"
        host = dict(separate=self.clean, emulated=device.backend == "emulated")
        self.layers = models.make_room(case.name, case.key, dtype=case.torch_dtype, **host)

    @property
    def draws(self) -> Draws:
        """How every side draws its random numbers."""
        alike = not self.case.own_random and self.models.draws.get(self.case.subject, True)  # unknown: the first run tells
        return Draws(seed=self.seed, dtype=self.case.torch_dtype, alike=alike)

    @property
    def is_first(self) -> bool:
        """Whether no reference of this model in this dtype was repeated yet."""
        return self.repeated not in self.models.repeats

    @property
    def repeated(self) -> tuple:
        """What the second run of a reference is remembered by."""
        return (*self.case.subject, self.case.dtype)

    @property
    def buffers(self) -> frozenset[str] | None:
        """The buffers that are outputs, as `watching` takes them."""
        return self.models.buffers.get(self.case.subject) if self.case.training else frozenset()

    def run(self, role: str, *, rules: Rules | None = None, stored: bool = True, twice: bool = False) -> Reference:
        """One run of the CPU's side. `role`: "cpu", "forecast", "golden", or "moved" for golden on moved inputs.

        Raises: _Draws when it drew random numbers and it was not known that the model draws.
        """
        kept = stored and self.models.store is not None and not (self.case.subject in self.models.draws and self.draws.alike)
        key = self._key(role, rules) if kept else None
        found = self.models.store.load(key) if key is not None else None
        if found is not None:
            self.stored.append(role)
            self.models.draws.setdefault(self.case.subject, False)  # what draws is not stored
            self.models.buffers.setdefault(self.case.subject, named(found, (BUFFER,)))
            return Reference(outputs=found, milliseconds=0.0, words=f"CPU {self.case.dtype}, read from the reference store", drawn=Drawn())
        ran = self._compute(role, rules, twice)
        self._note(ran)
        if key is not None and not ran.drawn.any and ran.again is None:
            self.models.store.save(key, ran.outputs)
        return ran

    def at_random(self, rules: Rules | None) -> list[dict[str, Tensor]]:
        """The outputs of `RUNS` runs under the device's rounding rules, or the CPU's own, with random roundings."""
        rules = rules if rules is not None else Rules(overflow_alone=True)
        return [self.run("random", rules=replace(rules, random=seed), stored=False).outputs for seed in range(RUNS)]

    def _note(self, ran: Reference) -> None:
        """Remember whether the model draws, from the runs that show it."""
        known = self.models.draws.get(self.case.subject)
        self.drawn = ran.drawn
        self.models.buffers.setdefault(self.case.subject, named(ran.outputs, (BUFFER,)))
        if known is None or ran.drawn.any and not known:
            self.models.draws[self.case.subject] = ran.drawn.any
        if ran.drawn.any and known is False and not self.case.own_random:
            raise _Draws

    def _compute(self, role: str, rules: Rules | None, twice: bool) -> Reference:
        case, wide = self.case, role in ("golden", "moved")
        dtype = torch.float64 if wide else case.torch_dtype
        inputs = move(self.inputs, device="cpu", dtype=dtype)
        inputs = moved_by_one_rounding(inputs, case.torch_dtype) if role == "moved" else inputs
        how = dict(what=f"{case.name}: the model", draws=self.draws, twice=twice, buffers=self.buffers)
        how |= dict(forward=case.forward, dtype=dtype, rules=rules, gradients=case.gradients)
        how |= dict(pinned=case.subject in self.models.pinned)
        if self.clean:
            self.models.clean = self.models.clean or CleanProcess()
            cast = None if case.takes_dtype else case.torch_dtype
            found = self.models.clean.forward(self.base, inputs, cast=cast, wide=wide, layers=self.layers, **how)
        else:
            found = refer(lambda: copy_of(self.models, case, "cpu", wide=wide), inputs, **how)
        _require_fractions(case, found.outputs, "the model")
        return found

    def _key(self, role: str, rules: Rules | None) -> Key:
        case, models = self.case, self.models
        of_model = ("content", *self.case.subject, case.dtype)
        if of_model not in models.digests:
            narrow = models.get(**case.built, device=torch.device("cpu"))
            models.digests[of_model] = weights_digest(narrow), code_digest(narrow, case.forward)
            if self.clean:  # the other process has a copy of its own
                models.drop(dtype=case.torch_dtype, device=torch.device("cpu"))
        weights, code = models.digests[of_model]
        more = {"rules": None if rules is None else _stated(rules), "clean": self.clean}
        more |= {"mode": [case.training, case.gradients, *(["buffers"] if case.training else [])]}
        more |= {"requests": "as they are" if case.subject in models.pinned else "wide"} if role in ("golden", "moved") else {}
        more |= {"cpu": "any", "torch": torch.__version__.partition("+")[0]}  # a store is carried from machine to machine
        return key_of(role=role, weights=weights, code=code, inputs=self.inputs_sha256, dtype=case.dtype, **more)


def _stated(rules: Rules) -> dict[str, Any]:
    """The rules as a store's key takes them: a vector unit that computes as `numerics` says is not spoken of, nor the lack of random roundings."""
    stated = asdict(rules)
    if rules.random is None:
        del stated["random"]
    if not rules.vector.operators:
        del stated["vector"]
    return stated


def without_npu(case: Case, models: Models, inputs: Any, device: Device, seed: int | None) -> dict[str, Tensor] | None:
    """What the CPU gives in a process without torch_npu, by name; None for a model that gives the same beside it. `inputs` are on the CPU, in the case's dtype."""
    cpu = _Cpu(case, models, inputs, "", device, seed or 0)
    return cpu.run("cpu", stored=False).outputs if cpu.clean else None


def _golden(cpu: _Cpu) -> tuple[dict[str, Tensor] | None, str | None]:
    """The outputs in float64, or None and why there are none: a model may hold operators that have no float64."""
    try:
        return cpu.run("golden").outputs, None
    except RunError as error:
        first = str(error)
    if cpu.case.subject not in cpu.models.pinned:  # it may want the float32 that it asks for
        cpu.models.pinned[cpu.case.subject] = first
        try:
            return cpu.run("golden").outputs, None
        except RunError:
            cpu.models.pinned.pop(cpu.case.subject)
    cpu.models.draws.setdefault(cpu.case.subject, False)
    return None, first


# Roundings by which two runs may differ where their sums were added in another order: always, and where the first run
# is off from float64 by half as much or more, since a deep model makes its roundings larger.
SUMS, DEEP_SUMS, DEEP_HALF_SUMS = 4, 64, 8


def _scatter(reference: Reference, golden: dict[str, Tensor] | None, dtype: torch.dtype) -> str:
    """What is said of two runs of a reference that differ by their roundings alone; "" where no bit differs.

    Threads that add in the order in which they end give other bits, and no more than the rounding errors of the two
    runs: twice what the first is off from float64, and at most so many roundings.

    Raises: UnstableReferenceError for two runs that differ by more, or where the first changed the model.
    """
    if reference.again is None:
        return ""
    found = _differences(reference.again, reference.outputs) or {"max_diff": math.nan, "rel_l2": math.nan, "unequal": 0}
    differ = "two runs on the CPU differ by {max_diff:.2e} at most, rel_l2 {rel_l2:.2e}, in {unequal} elements".format(**found)
    error = _largest_error(reference.outputs, golden) or 0.0
    most = DEEP_SUMS if dtype in (torch.float32, torch.float64) else DEEP_HALF_SUMS
    allowed = max(min(2 * error, most * roundoff(dtype)), SUMS * roundoff(dtype))
    if found["rel_l2"] <= allowed and not reference.changed:
        return f"{differ}: they add in an order that is not fixed, and that is within their roundings"
    what = f"the first run changed {reference.changed}" if reference.changed else UNNAMED
    raise UnstableReferenceError(f"REFERENCE UNSTABLE: {differ}; {what}; let the model return the same for the same inputs")


UNNAMED = (
    "it changed no parameter, buffer or attribute of the model, which therefore keeps something outside of itself, "
    "or draws from a generator that is not torch's, numpy's or Python's own"
)


UNMOVED = (
    "no bit of the output changes when every input moves by one rounding: see that the model uses its inputs, and that "
    "`forward` returns what this run computed"
)


def _drawn_text(cpu: _Cpu) -> str:
    if not cpu.drawn.any:
        return ""
    if cpu.case.own_random:
        return "it draws random numbers: every side drew its own"
    return "it draws random numbers: all sides got those that the CPU drew"


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
    modes: tuple[str, ...] = (), other: dict[str, Tensor] | None = None, random: Sequence[dict[str, Tensor]] = (),
) -> tuple[dict[str, Comparison], dict[str, References]]:  # fmt: skip
    """The device's outputs against the CPU's, and both against float64, by name: what `judge` takes.

    `other`: a forecast with other ties. `random`: a CPU run, and the same run with random roundings, several times.
    """
    shared = [name for name in expected if name in actual]
    comparisons = {name: compare(actual[name], expected[name]) for name in shared}
    healthy = [each for each in (golden, forecast, *random[1:]) if each is not None] if random else []
    comparisons = {name: _with_ties(each, [run[name] for run in healthy if name in run], expected[name]) for name, each in comparisons.items()}
    held = [name for name in shared if golden is not None and _fits(name, expected, golden)]
    return comparisons, {name: _hold(name, actual, expected, golden, forecast, modes, other, random) for name in held}


def _by_ties(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The outputs of whole numbers that differ in no more than near-ties."""
    return {
        name: each
        for name, each in comparisons.items()
        if not is_floating(each.expected_dtype) and 0 < each.unequal <= near_ties(each.unsettled)
    }


def _ties_text(verdict: Verdict) -> str:
    """What is said of whole numbers that differ by near-ties."""
    said = [
        f"{name}: {each.unequal} of {each.numel} whole numbers differ, in healthy runs {each.unsettled:.2g} on average"
        for name, each in _by_ties(verdict.comparisons).items()
    ]
    return f"near-ties: {'; '.join(said)}" if said else ""


def _with_ties(found: Comparison, healthy: list[Tensor], expected: Tensor) -> Comparison:
    """A comparison of whole numbers with what is known of their near-ties; any other as it is."""
    pairs = [compare(each, expected) for each in healthy if not is_floating(found.expected_dtype)]
    counts = [each.unequal for each in pairs if each.comparable]
    return replace(found, unsettled=sum(counts) / len(counts)) if counts else found


def _fits(name: str, expected: dict[str, Tensor], golden: dict[str, Tensor]) -> bool:
    return name in golden and golden[name].shape == expected[name].shape and (expected[name].is_floating_point() or expected[name].is_complex())


def _largest_error(outputs: dict[str, Tensor], golden: dict[str, Tensor] | None) -> float | None:
    """The largest relative L2 error to float64 of any output; None where no output has a float64 one."""
    known = [name for name in outputs if golden is not None and _fits(name, outputs, golden)]
    return max((compare(outputs[name], golden[name]).rel_l2 for name in known), default=None)


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
    still, *moved = (each[name] for each in random if name in each) if random else (None,)
    scatter = scatter_of(moved, still) if moved else None
    shown = scatter is not None and scatter.explains(references.cpu.rel_l2)
    return replace(references, scatter=scatter) if shown else references


def _conditioning(cpu: _Cpu, golden: dict[str, Tensor] | None) -> float | None:
    """How many times larger the relative change of the output is than that of the input, when the input moves by one rounding.

    Measured once for a model, in float64, with its first inputs and dtype; None where the inputs hold no fractions.
    """
    case, known = cpu.case, cpu.models.conditioning
    key = case.subject
    if key not in known:
        known[key] = None
        if golden is not None and moved_by_one_rounding(cpu.inputs, case.torch_dtype) is not None:
            moved = as_infinite(cpu.run("moved").outputs)
            grown = _largest_error(moved, golden)
            known[key] = None if grown is None else grown / roundoff(case.torch_dtype)
    return known[key]


def _differences(again: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, float]:
    """What two runs of the same thing differ by, the output that differs most; empty where every bit is the same."""
    found = [compare(again[name], first[name]) for name in first if name in again]
    differing = [each for each in found if not each.comparable or each.nonfinite_differ or each.unequal > each.nan_expected]
    if not differing:
        return {}
    worst = max(differing, key=lambda each: each.rel_l2 if each.rel_l2 == each.rel_l2 else math.inf)
    return {"max_diff": worst.max_diff, "rel_l2": worst.rel_l2, "unequal": worst.unequal}


def copy_of(models: Models, case: Case, device: torch.device | str, *, wide: bool = False) -> contextlib.AbstractContextManager[nn.Module]:
    """Lends a copy of a case's model in its dtype on a device, to be run; `wide` gives those weights in float64."""
    return models.untouched(**case.built, device=torch.device(device), wide=wide)


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

    outputs: dict[str, Tensor]  # of the second run, in which nothing looks on
    again: dict[str, Tensor]  # of the first, which was watched
    milliseconds: float  # of the faster run: the first may compile, and watching costs it some
    first_milliseconds: float
    seen: Watched
    drawn: Drawn


def _run_device(cpu: _Cpu, device: Device, at: str, names: frozenset[str]) -> _Ran:
    """Run two copies of the model; `names`: outputs that are buffers or inputs. Nothing runs on the device before the watch sees it, so that what a model keeps is seen too."""
    models, case, inputs, draws = cpu.models, cpu.case, cpu.inputs, cpu.draws
    device.check(at)

    def once(moved: Any) -> tuple[dict[str, Tensor], float, Drawn]:
        with copy_of(models, case, device.torch_device) as model:
            device.synchronize()
            begin = time.perf_counter()
            with drawing(draws, device.generator) as drawn, watching(model, moved, buffers=names, inputs=names) as written:
                returned = run(model, moved, forward=case.forward, where=device.where, gradients=case.gradients)
                device.synchronize()
                elapsed = (time.perf_counter() - begin) * 1e3
            outputs = written.after(tensors_of(returned, f"{case.name}: the model on the device"))
            _require_fractions(case, outputs, "the model on the device")
            return {name: each.detach().to("cpu", copy=True) for name, each in outputs.items()}, elapsed, drawn

    def watched() -> tuple[dict[str, Tensor], float, Watched]:
        with device.watch() as seen:
            torch.zeros(1).neg()  # the first operator under a mode in a process imports what takes seconds
            again, elapsed, _ = once(move(fresh(inputs), device=device.torch_device))
        return again, elapsed, seen

    with device.telling(at):
        try:
            again, compiling, seen = watched()
        except RunError as error:
            again, compiling, seen = _unwatched(once, watched, inputs, device, error)
        moved = move(fresh(inputs), device=device.torch_device)
        outputs, warm, drawn = once(moved)  # unwatched: a composite operator takes other ways under a mode
    device.check(at)  # a device that drops its work without a word leaves in memory what an earlier run wrote
    if drawn.any and not draws.alike and not case.own_random:
        models.draws[case.subject] = True
        raise _Draws
    times = dict(milliseconds=min(compiling, warm), first_milliseconds=compiling)
    return _Ran(outputs=outputs, again=again, seen=seen, drawn=drawn, **times)


def _unwatched(
    once: Callable, watched: Callable, inputs: Any, device: Device, error: RunError
) -> tuple[dict[str, Tensor], float, Watched]:
    """The first run in place of a watched one that raised `error`, where being watched is what raises.

    Some of torch's composite operators take another way while a mode looks on: `ctc_loss` with lengths on the CPU mixes
    devices there, and runs without one. An error that comes and goes is not taken for that: the watched run is repeated.

    Raises: RunError, the first one, where CANN reports a fault, where the model raises unwatched too, or not again when it is watched.
    """
    if fault_in(str(error)) is not None:
        raise error
    try:
        again, elapsed, _ = once(move(fresh(inputs), device=device.torch_device))
    except RunError:
        raise error from None
    try:
        watched()
    except RunError:
        return again, elapsed, Watched(blind=error.place or str(error))
    raise error


def _require_fractions(case: Case, found: Mapping[str, Tensor], what: str) -> None:
    """Raises: CaseError when none of the tensors that a model returned is floating point."""
    if not any(each.is_floating_point() or each.is_complex() for each in found.values()):
        dtypes = ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in found.values()}))
        raise CaseError(
            f"{case.name}: {what} returned only {dtypes}, in which no rounding error shows; "
            f"return the floating-point values that they come from, and name them in `decisions` to compare the choices"
        )


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


def _with_what_was_seen(verdict: Verdict, seen: Watched, allowed: tuple[str, ...]) -> Verdict:
    """The verdict with what the CPU computed in place of the device: an operator that fell back, the model's own code, all of it."""
    found, marks = [], []
    unknown = [each for each in seen.fell_back if each not in allowed]
    if seen.fell_back:
        marks.append(FELL_BACK)
    if unknown:
        text = f"FELL BACK: computed by the CPU in place of the device: {', '.join(unknown)}; there CPU was compared with CPU"
        found.append(Reason(criterion="fallback", text=text))
    if seen.computed == 0:
        text = "the device computed nothing: no operator but copies and views ran there; keep the model and its inputs on the device"
        found.append(Reason(criterion="fallback", text=text))
    if seen.on_host:
        marks.append(Mark.ON_HOST)
    return replace(verdict, failures=(*found, *verdict.failures), marks=(*verdict.marks, *marks))


def _few_text(verdict: Verdict) -> str:
    """What is said of a verdict on few elements that was judged by their scatter."""
    known = [each for each in verdict.references.values() if each.scatter is not None]
    if not known:
        return ""
    least = min(known, key=lambda each: each.slack)
    return (
        f"few elements: {least.scatter.runs} CPU runs with random roundings show an error made of about {least.scatter.degrees:.0f} "
        f"independent ones, so a healthy device may lose {least.slack:.2g} floors"
    )


def _pinned_text(cpu: _Cpu) -> str:
    """What is said of a model whose float64 reference is not float64 throughout."""
    why = cpu.models.pinned.get(cpu.case.subject)
    if why is None:
        return ""
    return f"the float64 reference computes in float32 where the model asks for it by name, since it raises otherwise: {why}"


def _blind_text(seen: Watched) -> str:
    """What is said of a model that raises only while its operators are watched."""
    if not seen.blind:
        return ""
    return f"not watched: fallbacks to the CPU were not looked for, since {seen.blind} raises while operators are watched, and not otherwise"


def _host_text(seen: Watched) -> str:
    """What is said of a model whose own code leaves the device."""
    if not seen.on_host:
        return ""
    return f"ON HOST: the model's own code brings values from the device to the CPU and computes there: {', '.join(seen.on_host[:6])}"


def _unseen(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], golden: Mapping[str, Tensor] | None) -> list[Reason]:
    """A reason where every output is zero, not finite, or one constant without an error: a PASS would show nothing."""
    own = [name for name in expected if name in outputs and name not in named(expected)]
    pairs = [(outputs[name], expected[name]) for name in own if expected[name].is_floating_point() and expected[name].numel()]
    if not pairs:
        return []
    said = ""
    if not any(bool(each.any()) for pair in pairs for each in pair):
        said = "zero"
    elif not any(bool(each.isfinite().any()) for pair in pairs for each in pair):
        said = "Inf or NaN"
    elif all(_is_constant(*pair) for pair in pairs) and all(
        golden is not None and name in golden and torch.equal(golden[name].double(), each.double())
        for name, each in expected.items()
        if each.is_floating_point()
    ):
        said = "the same number"
    if not said:
        return []
    text = f"every element of every output is {said} on both sides: nothing shows what computes it; give weights and inputs that do (a last layer of zeros hides all before it)"
    return [Reason(criterion="empty", text=text)]


def _zeroed(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], golden: Mapping[str, Tensor] | None) -> list[Reason]:
    """A reason for each output of which the device returned nothing but zeros where the CPU did not, whatever the limits allow.

    What the CPU has must be more than its own error to float64: a difference of equal numbers may be zero on one side alone.
    """
    found = []
    for name, each in expected.items():
        if name not in outputs or not each.is_floating_point() or not each.numel() or bool(outputs[name].any()):
            continue
        largest = float(each.abs().max())
        wide = each if golden is None else golden.get(name, each)
        if wide.shape == each.shape and not compare(each, wide).rel_l2 < UNDECIDED:
            continue
        if largest >= torch.finfo(each.dtype).tiny:  # smaller numbers a device may flush to zero
            text = f"every element that the device returned is zero, where the CPU's are up to {largest:.2e}: it computed nothing here"
            found.append(Reason(criterion="empty", text=text, output=name if len(expected) > 1 else ""))
    return found


def _require_dtype(case: Case, model: nn.Module) -> None:
    """Refuse a builder that was given a dtype and heeds it nowhere: its rows would be those of another dtype.

    Raises: CaseError.
    """
    dtypes = {each.dtype for each in [*model.parameters(), *model.buffers()] if each.is_floating_point()}
    if case.takes_dtype and dtypes and case.torch_dtype not in dtypes:
        names = ", ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
        raise CaseError(
            f"{case.name}: model(dtype) was given {case.dtype} and returned a model that is {names} throughout; hand the"
            " dtype on, as in from_pretrained(DIR, dtype=dtype), or take no argument and the harness casts"
        )


def _is_constant(actual: Tensor, expected: Tensor) -> bool:
    return expected.numel() > 1 and torch.equal(actual, expected) and bool((expected == expected.reshape(-1)[0]).all())
