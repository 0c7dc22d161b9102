"""Localisation put to the test: faults of every kind that changes values, planted in one operator of one module, and
whether that one is named.

    python -m harness.conformance locating [--models aimv2 causal …] [--large N [--jobs N]] [--places N] [--output FILE]

A place is an operator of CANN inside a module, spread over the depth. `--large` plants each kind of fault in so many
places of the full-size AIMv2-large, `--jobs` kinds at a time.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness.case import Case
from harness.conformance.detection import FAULT_KINDS, SUBJECTS, Subject
from harness.conformance.options import parser_of
from harness.devices import Device, open_device
from harness.emulator import faults
from harness.emulator.faults import Fault
from harness.errors import HarnessError
from harness.locate import Finding, locate, named_operators
from harness.reference import Models, roundoff

_KINDS = list(dict.fromkeys(kind for kind, _ in FAULT_KINDS))
GOLDEN = (math.sqrt(5) - 1) / 2
QUIET = ("Copy", "Fill", "Arange", "Zero", "One", "Eye")  # what moves or makes numbers and computes none


@dataclass(frozen=True, kw_only=True)
class Target:
    """An operator of CANN inside a module; `depth` counts the modules before it."""

    module: str
    operator: str
    depth: int


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """A fault at a place, and what was named."""

    subject: str
    dtype: str
    target: Target
    fault: str
    kind: str
    named: str  # "" where nothing was
    cause: str
    exact: bool
    own: float  # the largest own difference of the module's operators, relative L2
    sound: float  # the same in the healthy run

    @property
    def lost(self) -> bool:
        """Whether what the fault left is, in relative L2, within one rounding of the dtype of what the healthy run
        shows.
        """
        sound = 0.0 if math.isnan(self.sound) else self.sound
        return not self.exact and self.own <= sound + roundoff(getattr(torch, self.dtype))


class _Inside(Fault):
    """Acts while one module is the innermost that runs, and remembers what it calls there; `path` is where the model
    is.
    """

    def __init__(self, pattern: str, kind: str, *, path: list[str], module: str, **settings: Any):
        super().__init__(pattern, kind, **settings)
        self.path, self.module = path, module
        self.names: list[str] = []

    def matches(self, name: str, card: int = 0) -> bool:
        if self.path[-1] != self.module:
            return False
        self.names.append(name)
        return super().matches(name, card)


class Bed:
    """A model in a dtype to plant faults in: its healthy run in lockstep, and what each of its modules called there."""

    def __init__(self, subject: Subject, dtype: str, device: Device):
        build = lambda: subject.build().eval().requires_grad_(False)  # noqa: E731
        self.case, self.device, self.models = (
            Case(name=subject.name, model=build, inputs=subject.inputs, dtype=dtype, forward=subject.forward),
            device,
            Models(),
        )
        self.model = self.models.base(**self.case.recipe)  # every copy is made of it, hooks and all
        with named_operators(self.model) as path:
            self.census = {
                name: _Inside("nothing", "stale", path=path, module=name) for name, _ in self.model.named_modules()
            }
            self.healthy = self.located(*self.census.values())

    def located(self, *planted: Fault) -> Finding:
        """The finding of a run in which these are planted."""
        for place in (torch.device("cpu"), self.device.torch_device):  # copies that were made with earlier hooks
            self.models.drop(dtype=self.case.torch_dtype, device=place)
        for item in planted:
            faults.plant(item)
        try:
            return locate(self.case, 1, self.device, models=self.models)
        finally:
            for item in planted:
                faults.remove(item)


def targets(bed: Bed, start: int = 0) -> list[Target]:
    """The places of a model, its operators in turn; however few are taken from the front, they lie spread over the
    depth. `start` shifts which come first."""
    result: dict[str, list[Target]] = {}
    for depth, (name, census) in enumerate(bed.census.items()):
        for operator in dict.fromkeys(census.names):
            if not any(word in operator for word in QUIET):
                result.setdefault(operator, []).append(Target(module=name, operator=operator, depth=depth))
    groups = [_scattered(item, start) for item in result.values()]
    shift = start % max(len(groups), 1)
    return [
        target
        for turn in itertools.zip_longest(*groups[shift:], *groups[:shift])
        for target in turn
        if target is not None
    ]


def _scattered(group: Sequence[Target], start: int) -> list[Target]:
    """In the order of the golden section: each next one lies in a gap between those before it."""
    return [group[index] for index in sorted(range(len(group)), key=lambda index: (index - start) * GOLDEN % 1)]


def trials(bed: Bed, count: int) -> Iterator[_Outcome]:
    """Faults of each kind and size at each of `count` places of a model."""
    for target in targets(bed)[:count]:
        for kind, settings in FAULT_KINDS:
            result = _tried(bed, target, kind, settings)
            if result is not None:
                yield result


def spread(bed: Bed, kind: str, count: int) -> Iterator[_Outcome]:
    """Faults of one kind, its sizes in turn, at `count` places where it acts; an operator in which it has nothing to
    change is left out from then on.
    """
    sizes = itertools.cycle([settings for item, settings in FAULT_KINDS if item == kind])
    left, deaf = count, set()
    for target in targets(bed, _KINDS.index(kind)):
        if not left:
            return
        result = None if target.operator in deaf else _tried(bed, target, kind, next(sizes))
        if result is None:
            deaf.add(target.operator)
            continue
        left -= 1
        yield result


def _tried(bed: Bed, target: Target, kind: str, settings: dict[str, Any]) -> _Outcome | None:
    """None where the fault did not act, or changed no number."""
    heads = {"heads": 4} if "heads" in kind else {}
    with named_operators(bed.model) as path:
        fault = _Inside(target.operator, kind, path=path, module=target.module, **settings, **heads)
        finding = bed.located(fault)
    if not fault.hits or _numbers(finding) == _numbers(bed.healthy):
        return None
    first = finding.first
    return _Outcome(
        subject=bed.case.name,
        dtype=bed.case.dtype,
        target=target,
        fault=str(fault),
        kind=kind,
        named="" if first is None else f"{first.module or 'the model'}: {first.operator}",
        cause="" if first is None else first.cause,
        own=_own(finding, target.module),
        sound=_own(bed.healthy, target.module),
        exact=first is not None
        and first.module == target.module
        and (finding.replay is None or target.operator in _called(finding)),
    )


def _own(finding: Finding, module: str) -> float:
    return max((step.own for step in finding.steps if step.module == module and step.own == step.own), default=math.nan)


def _numbers(finding: Finding) -> str:
    return repr([(step.own, step.inherited) for step in finding.steps])


def _called(finding: Finding) -> list[str]:
    """The operators of CANN that the named call makes."""
    census = _Inside("nothing", "stale", path=[""], module="")
    faults.plant(census)
    try:
        finding.replay.on_device()
    finally:
        faults.remove(census)
    return census.names


# -------- the report


def text(result: Sequence[_Outcome], healthy: Iterable[Finding]) -> str:
    """The counts by kind and by model, what was not found, and the healthy runs."""
    exact = sum(item.exact for item in result)
    spots = len({(item.subject, item.dtype, item.target.module, item.target.operator) for item in result})
    lost = sum(item.lost for item in result)
    lines = [
        "# Localisation", "",
        (f"{len(result)} faults in {spots} places (operator and depth): the module and the operator are named in "
            f"{exact}; {lost} more left its result within one rounding of a healthy one (relative L2)."),
        "A kind with none was not asked for, or has nothing to act on here.", "",
    ]  # fmt: skip
    lines += ["| kind | planted | named | with a cause | within one rounding |", "|---|---|---|---|---|"]
    lines += [f"| {kind} | {_counts([item for item in result if item.kind == kind])} |" for kind in _KINDS]
    lines += [
        "",
        "| model | dtype | planted | named | with a cause | within one rounding |",
        "|---|---|---|---|---|---|",
    ]
    for subject, dtype in dict.fromkeys((item.subject, item.dtype) for item in result):
        lines.append(
            f"| {subject} | {dtype} | "
            f"{_counts([item for item in result if (item.subject, item.dtype) == (subject, dtype)])} |"
        )
    lines += [
        "",
        "## Not named",
        "",
        "| model | dtype | where | fault | own difference | in the healthy run | named instead |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {item.subject} | {item.dtype} | {item.target.module} | {item.fault} | {item.own:.2e} | "
            f"{item.sound:.2e} | {item.named or 'nothing: the operator is within its floor'} |"
        for item in result if not item.exact
    ]  # fmt: skip
    lines += [
        "",
        "## Healthy runs",
        "",
        "| model | dtype | operators | named | largest own difference |",
        "|---|---|---|---|---|",
    ]
    for finding in healthy:
        largest = max((step for step in finding.steps if step.own == step.own), key=lambda value: value.own)
        lines.append(
            f"| {finding.case} | {finding.dtype} | {len(finding.steps)} | "
            f"{finding.first.name if finding.first else 'none'} | {largest.own:.2e} {largest.name} |"
        )
    return "\n".join(lines)


def _counts(group: Sequence[_Outcome]) -> str:
    named = [item for item in group if item.exact]
    return " | ".join(
        map(str, (len(group), len(named), sum(bool(item.cause) for item in named), sum(item.lost for item in group)))
    )


def _large() -> torch.nn.Module:
    from harness.models.aimv2 import build

    return build("aimv2-large-patch14-224-distilled", seed=0)


_LARGE = Subject(
    name="aimv2-large", build=_large, inputs=lambda generator: torch.randn(1, 3, 224, 224, generator=generator)
)


@functools.cache
def _bed(dtype: str) -> Bed:
    """One for all kinds that a process plants."""
    return Bed(_LARGE, dtype, open_device("emulated"))


def _planted(dtype: str, kind: str, count: int, threads: int) -> tuple[list[_Outcome], Finding]:
    """The outcomes of one kind in the full-size model, and its healthy run."""
    torch.set_num_threads(threads)
    return [_told(item) for item in spread(_bed(dtype), kind, count)], _bed(dtype).healthy


def _told(result: _Outcome) -> _Outcome:
    print(
        f"{result.subject} {result.dtype} {result.target.module} {result.fault}: "
        f"{'named' if result.exact else result.named or 'nothing named'}",
        file=sys.stderr,
        flush=True,
    )
    return result


def main(argv: list[str]) -> int:
    names = [item.name for item in SUBJECTS]
    arguments = parser_of("locating").parse_args(argv)
    models = names if arguments.models is None else arguments.models
    kinds = arguments.kinds or _KINDS
    for what, given, known in (("model", models, names), ("kind of fault", kinds, _KINDS)):
        unknown = [item for item in given if item not in known]
        if unknown:
            raise HarnessError(f"no {what} is called {', '.join(unknown)}; there are {', '.join(known)}")
    result: list[_Outcome] = []
    healthy: dict[tuple[str, str], Finding] = {}
    threads = torch.get_num_threads()
    for subject, dtype in itertools.product([item for item in SUBJECTS if item.name in models], arguments.dtypes):
        torch.set_num_threads(1)
        bed = Bed(subject, dtype, open_device("emulated"))
        healthy[subject.name, dtype] = bed.healthy
        for trial in trials(bed, arguments.places):
            result.append(_told(trial))
            _write(arguments.output, text(result, healthy.values()))
    if arguments.large:
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
            given = [
                (dtype, kind, arguments.large, max(threads // arguments.jobs, 1))
                for dtype in arguments.dtypes
                for kind in kinds
            ]
            for work in as_completed([pool.submit(_planted, *argument) for argument in given]):
                outcomes, run = work.result()
                result += outcomes
                healthy[_LARGE.name, run.dtype] = run
                _write(arguments.output, text(result, healthy.values()))
    _write(arguments.output, text(result, healthy.values()))
    if arguments.output is None:
        print(text(result, healthy.values()))
    return 0


def _write(output: Path | None, report: str) -> None:
    if output is not None:
        output.write_text(report + "\n", encoding="utf-8")
