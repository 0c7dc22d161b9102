"""One row on every visible card: the same bits on all, or which card is the odd one, by how much and how often.

All cards are used from one process, one after the other, so that the CPU's runs, which cost the most, are made once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from harness.devices import Device
from harness.devices.several import CardDevice
from harness.errors import DeviceError, RunError
from harness.judging.cards import Bits, odd_cards
from harness.judging.status import NONDETERMINISTIC, Mark
from harness.judging.verdict import CardRuns, Reason
from harness.measure import compare
from harness.reference import digest
from harness.run.cpu import CpuSide
from harness.run.device import DeviceRun, outputs_of_run, outputs_of_runs
from harness.run.judged import Judge
from harness.torch_private import TorchDispatchMode, in_threads, tree_leaves

CRITERION = "cards"  # of the reasons
ROUNDS = 10  # times as many runs again on every card, where one of them does not repeat its bits and the others do,
CONFIRMED = 3  # until it did not so often: by chance all three were on one of eight cards once in 64 times
CONFIRMING = 60.0  # seconds that this may take
LOOKS = 10  # runs of an odd card in which its first wrong operator is looked for, and
LOOKING = 30.0  # seconds that this may take
LOOK_AT_CARD = "rerun on the other cards, and look at the card's health (npu-smi info -t health -i CARD)"


@dataclass(frozen=True, kw_only=True)
class Across:
    """The cards on which every row is computed, the first of them the one whose numbers the row has."""

    cards: tuple[CardDevice, ...]
    times: int  # runs on each card, two at least

    @property
    def answering(self) -> tuple[CardDevice, ...]:
        """Those that compute."""
        return tuple(card for card in self.cards if not card.device.stopped)


@dataclass(frozen=True, kw_only=True)
class CardsOutcome:
    """What the cards came to on one row."""

    cards: tuple[CardRuns, ...]
    reasons: tuple[Reason, ...] = ()
    marks: tuple[Mark, ...] = ()


NO_CARDS = CardsOutcome(cards=())


@dataclass(kw_only=True)
class _OneCard:
    """What is kept of the runs of one card: digests of all, the outputs of the first, and of the first with each of
    two other digests.
    """

    card: CardDevice
    digests: list[str] = field(default_factory=list)
    outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by digest
    spread: float = 0.0
    error: str = ""

    KEPT = 3  # outputs

    def add(self, outputs: dict[str, Tensor]) -> None:
        name = digest(outputs)
        if self.digests and name not in self.outputs:
            self.spread = max(self.spread, distance(outputs, self.first))
        if len(self.outputs) < self.KEPT:
            self.outputs.setdefault(name, outputs)
        self.digests.append(name)

    @property
    def first(self) -> dict[str, Tensor]:
        return self.outputs[self.digests[0]]

    @property
    def bits(self) -> Bits:
        return Bits(digests=tuple(self.digests), spread=self.spread)

    @property
    def unlike_usual(self) -> int:
        """Its runs that have not the digest that most of them have."""
        return len(self.digests) - self.digests.count(self.bits.usual)


def compare_cards(
    cpu: CpuSide, across: Across, at: str, names: frozenset[str], judge: Judge, own: DeviceRun
) -> CardsOutcome:
    """Run a row `across.times` times on each card that answers and compare the bits; `at` and `names` as of
    `run_on_device`, `judge` judges the runs of cards that differ where nothing else says which of them is wrong, `own`
    are the two runs that the first card made already.
    """
    known, subject = cpu.models.scattered, cpu.case.subject
    ran = [_ran(cpu, card, at, names, across.times) for card in across.answering]
    runs = [item for item in ran if not item.error]
    if runs and runs[0].card is across.cards[0]:
        _add_own(cpu, runs[0], at, names, own)
    failed = tuple(
        Reason(criterion=CRITERION, text=f"{item.card.name} raised what no other did: {item.error}; {LOOK_AT_CARD}")
        for item in ran
        if item.error
    )
    broken = tuple(
        CardRuns(card=item.card.name, runs=0, differing=0, odd=True, error=item.error) for item in ran if item.error
    )
    if len(runs) < 2:
        alone = Reason(criterion=CRITERION, text=f"{_alone(runs)}: no card could be compared with another")
        return CardsOutcome(cards=broken, reasons=(*failed, alone))
    found = _odd(runs, scatters=subject in known)
    if found.cards and not found.scattered and all(not runs[place].bits.repeats for place in found.cards):
        _confirm(cpu, runs, found.cards, at, names, ROUNDS * across.times)
        found = _odd(runs, scatters=False)  # what comes and goes on the others too is no card's
    if found.scattered:
        known.add(subject)
    if found.majority is None and found.split:
        return _split(runs, judge, (*broken,), failed, scattered=found.scattered)
    usual = found.majority or runs[0].bits.usual
    right = next(item for item in runs if usual in item.outputs)
    told = [_told(item, right, usual, odd=place in found.cards) for place, item in enumerate(runs)]
    if not found.scattered:
        told = [
            replace(each, operator=first_difference(cpu, right.card.device, item.card.device)) if each.odd else each
            for each, item in zip(told, runs)
        ]
    others = [item for place, item in enumerate(runs) if place not in found.cards]
    reasons = [_reason(each, others, scattered=found.scattered) for each in told if each.odd]
    marks = (NONDETERMINISTIC,) if found.scattered else ()
    return CardsOutcome(cards=(*told, *broken), reasons=(*reasons, *failed), marks=marks)


def _odd(runs: Sequence[_OneCard], *, scatters: bool) -> Any:
    return odd_cards(
        [item.bits for item in runs], lambda one, two: distance(runs[one].first, runs[two].first), scatters=scatters
    )


def _alone(runs: Sequence[_OneCard]) -> str:
    return f"{runs[0].card.name} is the only one that answers" if runs else "no card answers"


def _ran(cpu: CpuSide, card: CardDevice, at: str, names: frozenset[str], times: int) -> _OneCard:
    """The runs of one card, or what it raised."""
    result = _OneCard(card=card)
    try:
        for outputs in outputs_of_runs(cpu, card.device, at, names, times):
            result.add(outputs)
    except (DeviceError, RunError) as error:
        result.error = " ".join(str(error).split())
    finally:
        if card.device.backend == "emulated" and card.device.torch_device.index:
            cpu.models.drop(dtype=cpu.case.torch_dtype, device=card.device.torch_device)  # its memory is the host's
    return result


def _add_own(cpu: CpuSide, item: _OneCard, at: str, names: frozenset[str], own: DeviceRun) -> None:
    """Count the two runs that a card made before. The first was watched, and has its own bits where a composite
    operator takes another way then: it counts where another watched run has the bits of all others.
    """
    item.add(own.outputs)
    if item.bits.repeats and digest(own.again) not in item.outputs:
        watched = outputs_of_run(cpu, item.card.device, at, names, item.card.device.watch)
        if digest(watched) in item.outputs:
            item.add(own.again)


def _confirm(
    cpu: CpuSide, runs: Sequence[_OneCard], suspects: Sequence[int], at: str, names: frozenset[str], rounds: int
) -> None:
    """Run every card again in turn, so many times at most, to see whether what came and went on one comes and goes on
    the others too: until it does, or until it came `CONFIRMED` times on a suspect, or `CONFIRMING` seconds are over.
    """
    until = time.monotonic() + CONFIRMING
    others = [item for place, item in enumerate(runs) if place not in suspects]
    for _ in range(rounds):
        for item in runs:
            try:
                item.add(outputs_of_run(cpu, item.card.device, at, names))
            except RunError:  # the next row says so
                return
        again = all(runs[place].unlike_usual >= CONFIRMED for place in suspects)
        if again or time.monotonic() > until or not all(item.bits.repeats for item in others):
            return


# -------- how far, and in words


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest rel_l2 of any output between two runs; infinite where it is none."""
    values = [compare(one[name], two[name]).rel_l2 for name in two if name in one]
    return max((value if math.isfinite(value) else math.inf for value in values), default=math.inf)


def _told(item: _OneCard, right: _OneCard, usual: str, *, odd: bool) -> CardRuns:
    """A card's runs beside those of the cards that agree."""
    differing = [name for name in item.digests if name != usual]
    result = CardRuns(card=item.card.name, runs=len(item.digests), differing=len(differing), odd=odd)
    shown = next((item.outputs[name] for name in differing if name in item.outputs), None)
    if shown is None:
        return result
    return replace(result, **_differences(shown, right.outputs[usual]))


def _differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Of the output that differs most: its name, in how many elements, of how many, and by how much."""
    measured = {name: compare(actual[name], expected[name]) for name in expected if name in actual}
    unlike = {name: _unlike(actual[name], expected[name]) for name in measured}
    name = max(unlike, key=lambda each: (_size(measured[each].rel_l2), unlike[each]))
    return {
        "output": name,
        "elements": unlike[name],
        "size": expected[name].numel(),
        "max_diff": measured[name].max_diff,
        "rel_l2": measured[name].rel_l2,
    }


def _size(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _unlike(actual: Tensor, expected: Tensor) -> int:
    """How many elements have other bits: -0 and 0 are unlike, two NaN of the same bits are not."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return expected.numel()
    width = actual.element_size()
    both = (tensor.contiguous().reshape(-1).view(torch.uint8).reshape(-1, width) for tensor in (actual, expected))
    one, two = both
    return int((one != two).any(-1).sum())


def _by(card: CardRuns) -> str:
    of = f"output {card.output!r}: {card.elements} of {card.size} elements"
    numbers = (
        ""
        if card.rel_l2 is None or card.max_diff is None
        else f", rel_l2 {card.rel_l2:.2e}, max_diff {card.max_diff:.2e}"
    )
    first = f"; the first operator that differs is {card.operator}" if card.operator else ""
    return f"{of}{numbers}{first}"


def _reason(card: CardRuns, others: Sequence[_OneCard], *, scattered: bool) -> Reason:
    """That a card is the odd one, in words."""
    if scattered:
        spread = max(item.spread for item in others)
        how = f"reruns on one of the {len(others)} other cards differ by rel_l2 {spread:.2e} at most, and it by more"
    elif len(others) == 1:
        how = (
            f"in {card.differing} of {card.runs} runs its bits are not those of the other card, which repeats its bits"
        )
    else:
        how = (
            f"in {card.differing} of {card.runs} runs its bits are not those of the {len(others)} other cards, which "
            "agree in every bit"
        )
    return Reason(criterion=CRITERION, text=f"{card.card} is the odd one: {how}; {_by(card)}; {LOOK_AT_CARD}")


def _split(
    runs: Sequence[_OneCard], judge: Judge, broken: tuple[CardRuns, ...], failed: tuple[Reason, ...], *, scattered: bool
) -> CardsOutcome:
    """Cards of which no more than half agree: the one that is outside of its limits, where the others are not."""
    told = [_told(item, runs[0], runs[0].bits.usual, odd=False) for item in runs]
    failing = [place for place, item in enumerate(runs) if judge(item.first)[0].failures]
    names = ", ".join(item.card.name for item in runs)
    shown = max(told, key=lambda each: _size(each.rel_l2 or 0.0))
    by = f"{shown.card} to {runs[0].card.name}: {_by(shown)}"
    if len(failing) == 1:
        odd = told[failing[0]]
        told[failing[0]] = replace(odd, odd=True)
        first = str(judge(runs[failing[0]].first)[0].failures[0])
        how = f"{names} differ, and it alone is outside of its limits ({first})"
        text = f"{odd.card} is the odd one: {how}; {by}; {LOOK_AT_CARD}"
    else:
        all_or_none = "all are" if failing else "none is"
        some = "some are" if failing and len(failing) < len(runs) else all_or_none
        text = (
            f"the cards differ and none can be singled out: {names} ({by}); no bits are those of more than half of "
            f"the cards, and {some} outside of the limits; run the row on three cards or more"
        )
    marks = (NONDETERMINISTIC,) if scattered else ()
    reason = Reason(criterion=CRITERION, text=text)
    return CardsOutcome(cards=(*told, *broken), reasons=(reason, *failed), marks=marks)


# -------- the first operator


class _Trace(TorchDispatchMode):
    """Notes each operator and the digest of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        if not getattr(func, "is_view", False):
            tensors = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.device.type != "cpu"]
            name = func.name().partition(".")[0]
            self.calls.append((name, digest({str(place): item.cpu() for place, item in enumerate(tensors)})))
        return returned


def first_difference(cpu: CpuSide, right: Device, odd: Device) -> str:
    """The first operator whose bits on the odd card are not those on the right one, and its number in the forward;
    "" where none differed in `LOOKS` runs or `LOOKING` seconds.
    """
    until = time.monotonic() + LOOKING
    try:
        good = _calls(cpu, right)
        for _ in range(LOOKS):
            for number, (one, two) in enumerate(zip_longest(good, _calls(cpu, odd)), 1):
                if one != two:
                    return f"{(one or two)[0]}, number {number} of {len(good)}"
            if time.monotonic() > until:
                break
    except (DeviceError, RunError):
        pass
    return ""


def _calls(cpu: CpuSide, device: Device) -> list[tuple[str, str]]:
    """The operators of one run, with the digests of their results."""
    trace = _Trace()
    outputs_of_run(cpu, device, "", frozenset(), lambda: in_threads(lambda: trace))
    return trace.calls
