"""The calls of a run, one after the other, and where those of two runs of one model part."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.devices.kinds import TORCH_TYPES
from harness.locate.replay import mutates, name_of, tensors_in, trains
from harness.reference import is_of_a_model, run
from harness.torch_private import tree_leaves

# Calls that keep the numbers that they are given: a path with more or fewer of them is the same path.
_KEEP = (
    "contiguous",
    "clone",
    "detach",
    "to",
    "type_as",
    "float",
    "half",
    "bfloat16",
    *TORCH_TYPES,
    "requires_grad_",
    "alias",
    "lift_fresh.default",
)
ENOUGH = 6  # calls of one side that a sentence names


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a torch function, as a model made it."""

    operator: str
    module: str
    line: str
    given: tuple  # dtypes and shapes of its tensors, and its other arguments, in words
    wrote: str = ""  # what it changed and must not, in words
    trains: bool = False  # it takes the statistics of the batch, and updates the running ones
    numbers: tuple[float, ...] = ()  # the fractions among its arguments, of which `given` holds five digits

    @property
    def key(self) -> tuple:
        """What two runs of one model have in common."""
        return (self.operator, self.module, self.given)

    @property
    def name(self) -> str:
        return f"{self.operator} ({self.line})" if self.line else self.operator


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Where the calls of the device and of the CPU part, up to where they meet again."""

    here: tuple[Call, ...]  # the CPU's
    there: tuple[Call, ...]

    @property
    def module(self) -> str:
        """The innermost module that makes them all."""
        paths = [item.module.split(".") if item.module else [] for item in (*self.here, *self.there)]
        shared = []
        for parts in zip(*paths):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        return ".".join(shared)

    @property
    def operator(self) -> str:
        """The operator that one side alone calls."""
        return self._own.operator

    @property
    def line(self) -> str:
        """Its line."""
        return self._own.line

    @property
    def _own(self) -> Call:
        """The first call of torch_npu's own on the device, else the device's first, else the CPU's."""
        own = [item for item in self.there if item.operator.startswith("npu_")]
        return (own or self.there or self.here)[0]

    @property
    def text(self) -> str:
        """What either side runs."""
        if len(self.here) == len(self.there) == 1 and self.here[0].operator == self.there[0].operator:
            if self.here[0].trains != self.there[0].trains:
                return _statistics(*self.here, *self.there)
            here, there = (
                ", ".join(_only(*pair)) for pair in ((self.here[0], self.there[0]), (self.there[0], self.here[0]))
            )
            where = f" ({self.there[0].line})" if self.there[0].line else ""
            return f"the device runs {self.there[0].operator}{where} with {there} where the CPU runs it with {here}"
        return f"the device runs {_listed(self.there)} where the CPU runs {_listed(self.here)}"


def _statistics(here: Call, there: Call) -> str:
    """What a norm computes with on either side, where one of them trains."""
    batch, running = "with the statistics of the batch, and updates the running ones", "with the running statistics"
    own, other = (batch, running) if there.trains else (running, batch)
    mode = "training" if there.trains else "evaluation"
    return f"the device runs {there.name} in {mode} mode, {own}, where the CPU runs it {other}"


def _only(one: Call, other: Call) -> list[str]:
    """The arguments of a call that another has not."""
    left = list(other.given)
    result = []
    for item in one.given:
        if item in left:
            left.remove(item)
        else:
            result.append(item)
    return result or ["fewer arguments"]


def _listed(calls: Sequence[Call]) -> str:
    """Calls in words, the lines of the model once each."""
    if not calls:
        return "nothing"
    names = []
    for number, call in enumerate(calls):
        again = number > 0 and call.line == calls[number - 1].line
        names.append(call.operator if again else call.name)
    if len(names) <= ENOUGH:
        return ", ".join(names)
    return f"{', '.join(names[: ENOUGH // 2])}, {len(names) - ENOUGH} more, {', '.join(names[-(ENOUGH // 2) :])}"


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Which calls of two runs are the same, and where the runs part."""

    pairs: tuple[tuple[int, int], ...]  # of the CPU and of the device, in order
    partings: tuple[Parting, ...]  # in order


def aligned(here: Sequence[Call], there: Sequence[Call]) -> Alignment:
    """The calls of the CPU (`here`) and of the device (`there`) beside each other."""
    matcher = difflib.SequenceMatcher(None, [item.key for item in here], [item.key for item in there], autojunk=False)
    pairs: list[tuple[int, int]] = []
    parted = []
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            pairs += zip(range(a, b), range(c, d))
        else:
            parted.append(Parting(here=tuple(here[a:b]), there=tuple(there[c:d])))
    return Alignment(pairs=tuple(pairs), partings=tuple(parted))


def partings(here: Sequence[Call], there: Sequence[Call]) -> list[Parting]:
    """Where the calls of the device (`there`) and of the CPU (`here`) part, in order; empty where they are the same."""
    return list(aligned(here, there).partings)


def call_of(
    func: Callable, args: tuple, kwargs: dict, results: list[Tensor], module: str, wrote: str = "",
    weights: Mapping[Tensor, str] | None = None,
) -> Call | None:  # fmt: skip
    """A call as it is recorded; None of one that gives no new numbers and writes none.

    `weights`: the names of the model's.
    """
    if not results and not mutates(func, kwargs) and not wrote:
        return None
    if name_of(func) in _KEEP and not wrote:
        given = [tensor.dtype for tensor in tensors_in((args, kwargs))[:1]]
        if given == [result.dtype for result in results]:
            return None
    leaves = [("", leaf) for leaf in tree_leaves(args)]
    leaves += [(f"{name}=", leaf) for name, value in kwargs.items() for leaf in tree_leaves(value)]
    given = [_described(leaf, name + _weight(leaf, weights)) for name, leaf in leaves]
    return Call(
        operator=name_of(func), module=module, line=calling_line(), given=tuple(sorted(filter(None, given))),
        wrote=wrote, trains=trains(func, args, kwargs),
        numbers=tuple(leaf for _, leaf in leaves if isinstance(leaf, float)),
    )  # fmt: skip


def _weight(value: Any, weights: Mapping[Tensor, str] | None) -> str:
    """The name of a weight of the model and a space; "" of any other argument."""
    return f"{weights[value]} " if weights and isinstance(value, Tensor) and value in weights else ""


def _described(value: Any, name: str) -> str:
    """An argument in words: a tensor by its dtype and shape, a fraction to five digits, since the last may hang on
    roundings.
    """
    if value is None or isinstance(value, (torch.device, torch.memory_format, torch.layout)):
        return ""
    if isinstance(value, Tensor):
        return f"{name}{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, float):
        return f"{name}{value:.5g}"
    if isinstance(value, str):
        return "" if value.partition(":")[0] in TORCH_TYPES else f"{name}{value}"
    if isinstance(value, (bool, int, complex, slice, torch.dtype)) or value is ...:
        return f"{name}{value}"
    return f"{name}{type(value).__name__}"


def calling_line() -> str:
    """The line of the model that called the operator; "" where torch's own modules did and nothing of the model stands
    between.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not run.__code__:
        file = frame.f_code.co_filename
        if is_of_a_model(file):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
