"""The search: lockstep first; where that does not explain the row, a run of the device by itself, and modules side by
side.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from harness.case import Case
from harness.devices import Device
from harness.errors import HarnessError, RunError
from harness.locate.calls import Call, Parting, aligned, partings
from harness.locate.finding import RANDOM, Finding, Step, Symptom, ended
from harness.locate.gradients import first_wrong_gradient
from harness.locate.lockstep import Lockstep, named_operators, restored
from harness.locate.modules import DEEP, Modules, Sides
from harness.locate.plain import Recorder, WatchedMemory
from harness.locate.replay import relative_difference
from harness.locate.stray import Stray, called, first_stray
from harness.locate.trace import Trace
from harness.reference import Draws, Models, drawing, fresh, move, require_float32, roundoff, run, seeded, tensors_of
from harness.run.cpu import copy_of, without_npu
from harness.run.validation import inputs_of

LEVELS = ("auto", "operators", "modules")
ELSEWHERE = "same device"  # in the error of an operator that got tensors of the CPU and of the device


def locate(
    case: Case, seed: int | None, device: Device, *, models: Models | None = None, level: str = "auto",
    backward: bool = False, limit: float = math.inf, row: Symptom | None = None,
) -> Finding:  # fmt: skip
    """Run `case` with the inputs of `seed` on the CPU, each operator beside it on `device`.

    Where no operator is wrong by itself, or where those that are do not explain what the `row` shows, the model runs on
    the device by itself: an operator that writes what it must not is named, and the module in which the device takes
    another path than the CPU and goes wrong. At the level "auto" modules run side by side after that, where nothing was
    named; at the level "modules" they do at once, and of one that is wrong those that it is made of: a fast first look.

    What the device raises is a reason of the operator that raised. Where it computes no more, the search ends there.
    With `backward` each operator's gradients are held against each other too, for a seeded gradient that flows into its
    results. After `limit` seconds no further operator is looked at; what the first call of an operator takes longer
    than the next does not count, since a device may compile there.

    Raises: ValueError for another level; LossyReferenceError, CaseError, RunError and DeviceError as `validate` does.
    """
    if level not in LEVELS:
        raise ValueError(f"there is no level {level!r}; there are {', '.join(LEVELS)}")
    require_float32()
    models = models if models is not None else Models()
    at = f"{case.name} {case.dtype}" + ("" if seed is None else f" seed {seed}") + ", locating"
    device.check(at)
    search = _Search(
        case=case,
        seed=seed,
        device=device,
        models=models,
        inputs=inputs_of(case, seed),
        at=at,
        row=row,
        until=time.monotonic() + limit,
    )
    return search.modules() if level == "modules" else search.operators(level, backward)


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """A run of the model on the device by itself."""

    trace: Trace
    outputs: list[Tensor]  # on the CPU; none where it raised
    error: RunError | None
    unwatched: int


@dataclass(kw_only=True)
class _Search:
    """What all looks at one case with one seed have in common."""

    case: Case
    seed: int | None
    device: Device
    models: Models
    inputs: Any  # on the CPU, in the case's dtype
    at: str  # what runs, as messages about the device name it
    row: Symptom | None
    until: float  # a time.monotonic()
    random: bool | None = None  # whether the model draws random numbers; None: not known yet

    @property
    def draws(self) -> Draws:
        """As in the row, which runs without a mode where nothing is drawn: a composite operator takes other ways under
        one.
        """
        draws = self.models.draws.get(self.case.subject, True) if self.random is None else self.random
        return Draws(seed=self.seed or 0, dtype=self.case.torch_dtype, alike=draws and not self.case.own_random)

    @property
    def ended(self) -> bool:
        return time.monotonic() > self.until

    def run(self, model: nn.Module, inputs: Any = None) -> Any:
        """The model's output on the CPU; `inputs`: a copy of those of the search, which a model may write into."""
        inputs = fresh(self.inputs) if inputs is None else inputs
        return run(model, inputs, forward=self.case.forward, where="on the CPU", gradients=self.case.gradients)

    def finding(self, level: str, **more: Any) -> Finding:
        how = dict(case=self.case.name, dtype=self.case.dtype, seed=self.seed, row=self.row)
        more["gone"] = more.get("gone") or ended(self.device, self.at)
        return Finding(level=level, **how, **more)

    # -------- the looks

    @contextlib.contextmanager
    def sides(self) -> Iterator[Sides]:
        """Copies of the model for one forward of modules side by side."""
        with contextlib.ExitStack() as lent:
            here, healthy = (lent.enter_context(copy_of(self.models, self.case, "cpu")) for _ in range(2))
            with self.device.telling(self.at):
                there = lent.enter_context(copy_of(self.models, self.case, self.device.torch_device))
                restored(there, here)
            try:
                wide = lent.enter_context(copy_of(self.models, self.case, "cpu", wide=True))
            except HarnessError:  # there is no memory for it
                wide = None
            yield Sides(here=here, there=there, healthy=healthy, wide=wide)

    def beside(self) -> Modules:
        return Modules(self.sides, self.run, self.device, self.draws, self.until)

    def modules(self) -> Finding:
        beside = self.beside()
        steps = tuple(beside.steps())
        return self.finding("modules", steps=steps, gone=beside.gone, unseen=beside.unseen)

    def operators(self, level: str, backward: bool) -> Finding:
        """Lockstep, and where it does not explain the row, what else there is to look at."""
        case, device = self.case, self.device
        with contextlib.ExitStack() as lent:
            model = lent.enter_context(copy_of(self.models, case, "cpu"))
            with device.telling(self.at):
                there = lent.enter_context(copy_of(self.models, case, device.torch_device))
                mode_of = Lockstep(
                    device, lent.enter_context(named_operators(model)), backward, self.until, case.fallbacks
                )
                own = fresh(self.inputs)  # its copying is no call of the model
                mode_of.share(model, there, own)
                lent.callback(mode_of.trace.close)
            lent.enter_context(seeded(self.seed or 0, *filter(None, [device.generator])))
            with mode_of as mode:
                output = self.run(model, own)
            mode.trace.end(tensors_of(output, case.name).values())
            self.until = mode.until
            more: dict[str, Any] = {"steps": tuple(mode.steps), "replay": mode.replay, "unseen": mode.unseen}
            more |= {"gone": mode.gone, "compiling": mode.compiling}
            self.random = any(RANDOM in step.note for step in mode.steps)
            more["cut"] = mode.cut
            if not mode.gone and not mode.unseen and not mode.cut:
                with contextlib.suppress(RuntimeError):
                    more["followed"] = _away(mode.followed(output), list(tensors_of(output, case.name).values()))
        expected = list(tensors_of(output, case.name).values())
        finding = self.finding("operators", **more)
        if self.is_settled(finding):
            return finding
        if self.random:
            expected = self.drawn_alike()
        finding = self.with_plain_run(finding, mode, expected)
        if finding.first is None and not self.random and not self.ended and not finding.gone:
            finding = replace(finding, otherwise=self.otherwise(output))
        return self.with_modules(finding) if level == "auto" else finding

    def is_settled(self, finding: Finding) -> bool:
        """Whether nothing is left to look at, or no time or device to do it with."""
        if finding.gone or self.ended or finding.unseen:
            return True
        if self.row is not None and not self.row.fails:
            return True
        if finding.first is None:
            return False
        explained = finding.explained or bool(finding.cut)
        return self.row is None or (explained and not (self.row.error and not finding.came_back))

    def drawn_alike(self) -> list[Tensor]:
        """What the CPU returns where random numbers are drawn as in a run of the device by itself."""
        with copy_of(self.models, self.case, "cpu") as model, drawing(self.draws):
            return list(tensors_of(self.run(model), self.case.name).values())

    def otherwise(self, output: Any) -> float:
        """How far the CPU's output lies from that of a process without torch_npu; 0 within roundings, or where this
        process does not repeat itself.
        """
        try:
            alone = without_npu(self.case, self.models, self.inputs, self.device, self.seed)
            if alone is None:
                return 0.0
            with copy_of(self.models, self.case, "cpu") as model:
                here, again = (tensors_of(item, self.case.name) for item in (output, self.run(model)))
        except HarnessError:
            return 0.0
        names = [name for name in alone if name in here and name in again]
        if any(relative_difference(again[name], here[name]) for name in names):
            return 0.0
        away = max((relative_difference(here[name], alone[name]) for name in names), default=0.0)
        return away if away > DEEP * roundoff(self.case.torch_dtype) else 0.0

    # -------- the device by itself

    def plain(self) -> _Plain:
        """Run the model on the device by itself, and record what it calls and what its operators write."""
        case, device = self.case, self.device
        with contextlib.ExitStack() as lent:
            here = lent.enter_context(copy_of(self.models, case, "cpu"))
            with device.telling(self.at):
                there = lent.enter_context(copy_of(self.models, case, device.torch_device))
                restored(there, here)
                moved = move(fresh(self.inputs), device=device.torch_device)
            memory = WatchedMemory(there, self.until, device.torch_device.type)
            trace = Trace(there, moved)
            lent.callback(trace.close)
            recorder = Recorder(lent.enter_context(named_operators(there)), trace, memory)
            lent.enter_context(drawing(self.draws, device.generator))
            if self.row is not None and self.row.error:
                lent.enter_context(device.watch())  # as the first run of a row, in which the error was raised
            outputs, error = [], None
            try:
                with device.telling(self.at):
                    with recorder:
                        returned = run(there, moved, forward=case.forward, where=device.where, gradients=case.gradients)
                    device.synchronize()
                    trace.end(tensors_of(returned, case.name).values())
                    outputs = [tensor.detach().cpu() for tensor in tensors_of(returned, case.name).values()]
            except RunError as raised:
                error = raised
            if not device.stopped:
                with device.telling(self.at):
                    restored(there, here)  # the next row runs with these
        return _Plain(trace=trace, outputs=outputs, error=error, unwatched=memory.unwatched)

    def with_plain_run(self, finding: Finding, mode: Lockstep, expected: list[Tensor]) -> Finding:
        """The finding, with what the device does by itself that it does not beside the CPU."""
        try:
            plain = self.plain()
        except HarnessError:
            return finding
        steps = list(finding.steps)
        steps += [_raising(plain.error, len(steps))] if plain.error is not None and not _raises(finding) else []
        steps += _writing(self.unlike_the_cpu(plain.trace.calls), len(steps))
        away = _away(plain.outputs, expected) if plain.outputs else math.nan
        sound, shown = 0, ""
        if plain.error is None and not any(step.kind == "memory" for step in steps):
            here = mode.trace
            stray = self.stray(here, plain.trace, mode.inherited, replace(finding, plain=away).away)
            if stray is not None and stray.kind != "unseen":
                steps.append(_straying(stray, len(steps)))
            else:
                shown = f"{called(stray.call)}: {stray.text}" if stray is not None else ""
                parted = partings(here.calls, plain.trace.calls)
                wrong, sound = self.paths(here.calls, parted, finding, len(steps), away)
                steps += wrong
        gone = finding.gone or ended(self.device, self.at)
        more = dict(sound_paths=sound, shown=shown, unwatched=plain.unwatched, gone=gone)
        return replace(finding, steps=tuple(steps), plain=away, **more)

    def stray(self, here: Trace, there: Trace, inherited: dict[int, float], away: float) -> Stray | None:
        """The first call that the device gives other values or gradients; None where the CPU does too."""

        def first(trace: Trace) -> Stray | None:
            pairs, dtype = aligned(here.calls, trace.calls).pairs, self.case.torch_dtype
            result = first_stray(here, trace, pairs, inherited, dtype)
            return result or first_wrong_gradient(here, trace, pairs, dtype, away)

        result = first(there)
        if result is None or self.ended:
            return None
        return result if first(self.cpu_trace(sketching=True)) is None else None

    def unlike_the_cpu(self, calls: list[Call]) -> list[Call]:
        """Those that wrote what they must not, but for those that write it on the CPU too, as batch_norm does."""
        wrote = [call for call in calls if call.wrote]
        if not wrote:
            return []
        alike = {call.key for call in self.cpu_trace(watched=True).calls if call.wrote}
        return [item for item in wrote if item.key not in alike]

    def cpu_trace(self, *, watched: bool = False, sketching: bool = False) -> Trace:
        """The trace of another run on the CPU; `watched`: with what it writes and must not."""
        with contextlib.ExitStack() as lent:
            model = lent.enter_context(copy_of(self.models, self.case, "cpu"))
            memory = WatchedMemory(model, self.until, "cpu") if watched else None
            own = fresh(self.inputs)
            trace = Trace(model, own, sketching=sketching)
            lent.callback(trace.close)
            recorder = Recorder(lent.enter_context(named_operators(model)), trace, memory)
            with drawing(self.draws):
                with recorder:
                    output = self.run(model, own)
                trace.end(tensors_of(output, self.case.name).values())
        return trace

    def paths(
        self, calls: list[Call], parted: list[Parting], finding: Finding, number: int, away: float
    ) -> tuple[list[Step], int]:
        """A step for each module in which the device takes another path and is wrong, and how many are not wrong."""
        if not parted or self.ended:
            return [], 0
        unstable = {parting.module for parting in partings(calls, self.cpu_trace().calls)}
        parted = [item for item in parted if item.module not in unstable]
        modules = list(dict.fromkeys(item.module for item in parted))
        beside = self.beside()
        try:
            by_module = {item.module: item for item in reversed(beside.look(lambda model: modules))}
        except HarnessError:
            by_module = {}
        wrong = [module for module in modules if module in by_module and by_module[module].bad]
        if not wrong and "" in modules and not replace(finding, plain=away).explained:
            wrong = [""]  # what `forward` of the case calls outside of the model is no module's
            by_module.pop("", None)
        inner = [
            item
            for item in wrong
            if not any(other != item and (not item or other.startswith(f"{item}.")) for other in wrong)
        ]
        steps = [
            _parted(next(part for part in parted if part.module == item), by_module.get(item), number + count)
            for count, item in enumerate(inner)
        ]
        return steps, len(modules) - len(wrong)

    def with_modules(self, finding: Finding) -> Finding:
        """The finding, with the modules that are wrong where nothing else is and the operators do not explain the
        row.
        """
        if (
            finding.first is not None
            or finding.explained
            or finding.otherwise
            or not finding.came_back
            or self.ended
            or finding.gone
        ):
            return finding
        beside = self.beside()
        try:
            steps = [replace(step, number=step.number + len(finding.steps)) for step in beside.steps()]
        except HarnessError:
            return finding
        return (
            replace(finding, steps=(*finding.steps, *steps), gone=beside.gone)
            if any(step.bad for step in steps)
            else finding
        )


def _away(result: list[Tensor], expected: list[Tensor]) -> float:
    """How far outputs lie apart, relative L2, the largest; of fractions alone where there are any, as rows say it."""
    pairs = list(zip(result, expected))
    fractions = [pair for pair in pairs if pair[1].is_floating_point() or pair[1].is_complex()]
    return max((relative_difference(*fraction) for fraction in fractions or pairs), default=0.0)


def _raises(finding: Finding) -> bool:
    return any(step.bad and math.isinf(step.own) for step in finding.steps)


def _raising(error: RunError, number: int) -> Step:
    """The step of what raised in a run of the device by itself."""
    module, operator, line = _where(error.location)
    text = str(error).partition("; raised in ")[0]
    cause = (
        "nothing raises where every tensor is on the device: the model makes one on the CPU"
        if ELSEWHERE in text
        else ""
    )
    where = dict(number=number, operator=operator, module=module, place=line, dtype="", shape=())
    return Step(own=math.inf, ratio=None, inherited=math.inf, reasons=(text,), cause=cause, kind="raise", **where)


def _where(location: str) -> tuple[str, str, str]:
    """The module, operator and line of a location in words: "blocks.3: gelu (vit.py:12)"."""
    name, _, line = location.partition(" (")
    module, _, operator = name.partition(": ")
    return "" if module == "the model" else module, operator or "a call", line.removesuffix(")")


def _writing(calls: list[Call], number: int) -> list[Step]:
    """A step for each operator that wrote what it must not."""
    wrote = [call for call in calls if call.wrote]
    nothing = dict(dtype="", shape=(), own=math.nan, ratio=None, inherited=math.nan, kind="memory")
    return [
        Step(
            number=number + count,
            operator=item.operator,
            module=item.module,
            place=item.line,
            reasons=(item.wrote,),
            **nothing,
        )
        for count, item in enumerate(wrote)
    ]


def _straying(stray: Stray, number: int) -> Step:
    """The step of the first call whose values are others on the device."""
    call = stray.call
    where = dict(number=number, operator=call.operator, module=call.module, place=call.line, dtype="", shape=())
    return Step(own=math.nan, ratio=None, inherited=stray.away, reasons=(stray.text,), kind=stray.kind, **where)


def _parted(parting: Parting, alone: Step | None, number: int) -> Step:
    """The step of a module in which the device takes another path; `alone`: its step with the CPU's inputs."""
    where = dict(number=number, operator=parting.operator, module=parting.module, place=parting.line, kind="path")
    if alone is None:
        nothing = dict(own=math.nan, ratio=None, inherited=math.nan, dtype="", shape=())
        return Step(reasons=(parting.text,), **nothing, **where)
    text = (
        f"{parting.text}; with the CPU's inputs {parting.module or 'the model'} {alone.reasons[0].removeprefix('it ')}"
    )
    numbers = dict(own=alone.own, ratio=alone.ratio, inherited=alone.inherited, dtype=alone.dtype, shape=alone.shape)
    return Step(reasons=(text,), **numbers, **where)
