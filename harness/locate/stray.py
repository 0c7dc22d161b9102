"""Where the device's run strays from the CPU's though both make the same calls: the first that is given other values.

A write into a tensor that is used again, another tensor or number than the CPU's, a result that no other look shows.
What is given is compared with what it was when a call returned it (`trace.py`), so that roundings that grow over the
model blame nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from harness.locate.calls import Call
from harness.locate.trace import Given, Seen, Sketch, TensorOrigin, Trace, sketch_difference
from harness.reference import roundoff

ROUNDINGS, GROWN = 16, 4.0  # that are no other value; times the difference that a tensor had before, the same
_JUMP = 64  # times the differences of its arguments that a result differs by where the run itself makes it wrong


@dataclass(frozen=True, kw_only=True)
class Stray:
    """A call from which on the device's values are others."""

    call: Call
    text: str
    away: float  # relative L2 difference
    kind: str = "value"  # or "gradient"; "unseen": what it is given is wrong already, and no call returned that


def first_stray(
    here: Trace, there: Trace, pairs: Sequence[tuple[int, int]], inherited: Mapping[int, float], dtype: torch.dtype
) -> Stray | None:
    """The first call of the device (`there`) that is given other values than the CPU's (`here`), or gives others.

    `pairs` are the calls that are the same, `inherited` what each call of the CPU gave on the device beside it,
    relative L2 to the CPU. None where nothing strays.
    """
    return _Walk(here, there, pairs, inherited, roundoff(dtype)).first()


class _Walk:
    """Goes through the calls of both runs in order."""

    def __init__(self, here: Trace, there: Trace, pairs: Sequence, inherited: Mapping[int, float], unit: float):
        self.here, self.there, self.pairs, self.inherited, self.unit = here, there, pairs, inherited, unit
        self.here_of = {j: i for i, j in pairs}
        self.there_of = dict(pairs)
        self.noise = 0.0  # the largest difference of a result so far

    def first(self) -> Stray | None:
        for i, j in self.pairs:
            seen, other = self.here.seen[i], self.there.seen[j]
            outcome = self._numbers(i, j) or self._arguments(seen, other, self.there.calls[j], (i, j))
            results = [self._away(*result) for result in self._results(i, j)]
            differs = max(results, default=0.0)
            if outcome is not None and differs > self._expected(i):
                return outcome
            outcome = self._result(seen, other, i, j, differs)
            if outcome is not None:
                return outcome
            self.noise = max([self.noise, *(result for result in results if result < math.inf)])
        return self._returned()

    def _away(self, actual: Sketch | None, expected: Sketch | None) -> float:
        away = sketch_difference(actual, expected)
        return 0.0 if math.isnan(away) else away

    def _expected(self, i: int) -> float:
        """How far the result of a call may be from the CPU's and still be as it was beside the CPU."""
        inherited = self.inherited.get(i, math.nan)
        return 2 * (0.0 if math.isnan(inherited) else inherited) + ROUNDINGS * self.unit

    def _numbers(self, i: int, j: int) -> Stray | None:
        call, other = self.here.calls[i], self.there.calls[j]
        noise = self.noise if self.here.reads or self.there.reads else 0.0  # a number may be read from a tensor
        for expected, actual in zip(call.numbers, other.numbers):
            away = abs(actual - expected)
            if away > (GROWN * noise + ROUNDINGS * self.unit) * abs(expected):
                text = f"the device gives it the number {actual!r} where the CPU gives it {expected!r}"
                return Stray(call=other, text=text, away=away / abs(expected) if expected else math.inf)
        return None

    def _arguments(self, seen: Seen, other: Seen, user: Call | None, pair: tuple[int, int] | None) -> Stray | None:
        """The first argument of a call, or output of the model (`user` None), that has another value on the device."""
        if len(seen.given) != len(other.given):
            return None
        for expected, actual in zip(seen.given, other.given):
            if self._is_same(expected.origin, actual.origin):
                result = self._written(expected, actual, user)
            elif self._is_known(expected.origin, self.there_of) and self._is_known(actual.origin, self.here_of):
                result = self._other(expected, actual, user, pair)
            else:
                result = self._from_nowhere(expected, actual, user)
            if result is not None:
                return result
        return None

    def _is_same(self, expected: TensorOrigin, actual: TensorOrigin) -> bool:
        """Whether two tensors come from the same call, weight or input."""
        if actual.call is None or expected.call is None:
            return actual.call is expected.call and actual.name == expected.name != ""
        return self.there_of.get(expected.call) == actual.call and expected.number == actual.number

    def _is_known(self, origin: TensorOrigin, partner: Mapping[int, int]) -> bool:
        return origin.name != "" if origin.call is None else origin.call in partner

    def _before(self, expected: TensorOrigin, actual: TensorOrigin) -> float:
        """How far apart two tensors were when they were returned; weights and inputs are the same."""
        if expected.call is None or actual.call is None:
            return 0.0
        results = (self.there.seen[actual.call].results, self.here.seen[expected.call].results)
        numbers = (actual.number, expected.number)
        return self._away(
            *(result[number] if number < len(result) else None for result, number in zip(results, numbers))
        )

    def _written(self, expected: Given, actual: Given, user: Call | None) -> Stray | None:
        """A write into what the call is given, on one side alone."""
        there = [writer for writer in actual.writers if self.here_of.get(writer) not in expected.writers]
        here = [writer for writer in expected.writers if self.there_of.get(writer) not in actual.writers]
        trains = [*(self.there.calls[item].trains for item in there), *(self.here.calls[item].trains for item in here)]
        if (there and here) or any(trains):
            return None  # both sides write in their own way, or a norm trains on one alone: another path
        if not actual.writers and not expected.writers:
            return None
        away = self._away(self.there.content(actual), self.here.content(expected))
        before = self._before(expected.origin, actual.origin)
        if not away > GROWN * before + ROUNDINGS * self.unit:
            return None
        if not there and not here:
            return self._written_otherwise(actual, away)
        what = self._what(self.there, actual.origin)
        taken = f"which {called(user)} takes afterwards" if user is not None else "which the model returns"
        differs = f"it differs by {away:.2e} then, by {before:.2e} before"
        if there:
            call = self.there.calls[there[0]]
            text = f"it writes into {what}, {taken}: {differs}; {self._of_cpu(there[0])}"
            return Stray(call=call, text=text, away=away)
        call = self.here.calls[here[0]]
        copied = actual.origin.copied
        instead = f"the device takes a copy from before, made by {copied}" if copied else "on the device nothing does"
        text = f"on the CPU it writes into {what}, {taken}; {instead}: {differs}"
        return Stray(call=call, text=text, away=away)

    def _written_otherwise(self, actual: Given, away: float) -> Stray | None:
        """A call that writes on both sides, is given the same, returns the same and writes something else."""
        j = actual.writers[-1]
        i = self.here_of[j]
        around = [
            *self._given_away(i, j),
            *(self._away(*result) for result in self._results(i, j)),
            self.noise,
            self.unit,
        ]
        if not away > _JUMP * max(around):
            return None
        call, what = self.there.calls[j], self._what(self.there, actual.origin)
        return Stray(call=call, text=f"what it writes into {what} differs by {away:.2e}", away=away)

    def _given_away(self, i: int, j: int) -> list[float]:
        """How far the arguments of a call lie apart."""
        pairs = zip(self.there.seen[j].given, self.here.seen[i].given)
        return [self._given_one_away(actual, expected) for actual, expected in pairs]

    def _given_one_away(self, actual: Given, expected: Given) -> float:
        if actual.origin.call is None and not actual.writers and not expected.writers:
            if self._is_same(expected.origin, actual.origin):
                return 0.0  # a weight, which is the same
        return self._away(self.there.content(actual), self.here.content(expected))

    def _results(self, i: int, j: int) -> list[tuple[Sketch | None, Sketch | None]]:
        return list(zip(self.there.seen[j].results, self.here.seen[i].results))

    def _of_cpu(self, j: int) -> str:
        """What the CPU does where a call of the device writes."""
        i = self.here_of.get(j)
        given = self.here.seen[i].given if i is not None else ()
        if given and given[0].origin.copied:
            return f"on the CPU it writes into a copy of that, made by {given[0].origin.copied}"
        return "on the CPU nothing writes into it"

    def _other(self, expected: Given, actual: Given, user: Call | None, pair: tuple[int, int] | None) -> Stray | None:
        """Another tensor than the one that the CPU takes."""
        away = self._away(self.there.content(actual), self.here.content(expected))
        if not away > GROWN * self.noise + ROUNDINGS * self.unit or self._is_reordered(pair):
            return None
        what, other = self._what(self.there, actual.origin), self._what(self.here, expected.origin)
        if what == other or user is None:
            return None
        text = f"the device gives it {what} where the CPU gives it {other}: a difference of {away:.2e}"
        return Stray(call=user, text=text, away=away)

    def _is_reordered(self, pair: tuple[int, int] | None) -> bool:
        """Whether another call of the CPU that is the same takes what this one takes on the device."""
        if pair is None:
            return False
        i, j = pair
        given = [item.origin for item in self.there.seen[j].given]
        for other, call in enumerate(self.here.calls):
            if other == i or call.key != self.here.calls[i].key:
                continue
            origins = [item.origin for item in self.here.seen[other].given]
            if len(origins) == len(given) and all(map(self._is_same, origins, given)):
                return True
        return False

    def _from_nowhere(self, expected: Given, actual: Given, user: Call | None) -> Stray | None:
        """A tensor that no call of a torch function returned, on both sides, with another value."""
        unknown = [tensor.origin.call is None and not tensor.origin.name for tensor in (expected, actual)]
        away = self._away(actual.content, expected.content)
        if not all(unknown) or user is None or not away > GROWN * self.noise + _JUMP * self.unit:
            return None
        text = f"what it is given differs by {away:.2e} already, and no torch function that was seen returned it"
        return Stray(call=user, text=text, away=away, kind="unseen")

    def _result(self, seen: Seen, other: Seen, i: int, j: int, differs: float) -> Stray | None:
        """A result that is wrong in a run of the device by itself alone, from arguments that are right."""
        inherited = self.inherited.get(i, math.nan)
        if not differs > max(2 * GROWN * inherited, _JUMP * self.unit) or len(seen.given) != len(other.given):
            return None
        pairs = list(zip(other.given, seen.given))
        if not all(self._is_same(expected.origin, actual.origin) for actual, expected in pairs):
            return None
        given = self._given_away(i, j)
        if not differs > _JUMP * max([*given, self.unit]):
            return None
        text = (
            f"it differs by {differs:.2e} in a run of the device by itself, from arguments that differ by"
            f" {max([*given, 0.0]):.2e}; beside the CPU it differs by {inherited:.2e}"
        )
        return Stray(call=self.there.calls[j], text=text, away=differs)

    def _returned(self) -> Stray | None:
        """What the model returns and somebody wrote into before."""
        seen = Seen(given=self.here.outputs, results=())
        return self._arguments(seen, Seen(given=self.there.outputs, results=()), None, None)

    def _what(self, trace: Trace, origin: TensorOrigin) -> str:
        if origin.call is None:
            return origin.name or "a tensor that no call returned"
        return f"what {called(trace.calls[origin.call])} returned"


def called(call: Call) -> str:
    """A call with its module: "b: add_ (vit.py:12)"."""
    return f"{call.module or 'the model'}: {call.name}"
