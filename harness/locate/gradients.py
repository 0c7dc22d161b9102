"""Where the gradients of the device's run go wrong though both runs make the same calls with the same values.

The gradient that comes to what each call returned is compared. Where it is wrong, and right for all that takes this
result, something between them is: a backward of the model's own, a detach or a no_grad on one side alone, an operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from harness.locate.stray import Stray, called
from harness.locate.trace import Cut, TensorKey, Trace, sketch_difference
from harness.reference import roundoff

_GROWN, _ROUNDINGS = 32, 64  # times the differences around it, or roundings, that a gradient may differ by
_SHARE = 0.1  # of the row's difference that it must differ by


def first_wrong_gradient(
    here: Trace, there: Trace, pairs: Sequence[tuple[int, int]], dtype: torch.dtype, away: float
) -> Stray | None:
    """What makes the first wrong gradient on the device (`there`), as gradients flow; None where all are as the CPU's.

    `pairs` are the calls that are the same, `away` what is to be explained, relative L2.
    """
    return _Flows(here, there, pairs, roundoff(dtype), 0.0 if math.isnan(away) else away).first()


class _Flows:
    """The gradients of both runs, by the tensor that they come to."""

    def __init__(self, here: Trace, there: Trace, pairs: Sequence[tuple[int, int]], unit: float, away: float):
        self.here, self.there, self.unit, self.away = here, there, unit, away
        self.there_of = dict(pairs)
        self.users, self.users_there = _users(here), _users(there)

    def first(self) -> Stray | None:
        keys = [item for item in {**self.here.flows, **self._flows_there()} if self.users.get(item)]
        for key in sorted(keys, key=lambda value: max(self.users[value]), reverse=True):
            users = list(dict.fromkeys(self._takers(key, set())))
            if not users or not all(user in self.there_of for user in users) or not self._is_used_alike(key):
                continue
            differs, around = self._differs(key), max(self._around(user) for user in users)
            least = max(_GROWN * around, _ROUNDINGS * self.unit, _SHARE * min(self.away, 1.0))
            if differs > least:
                return self._blamed(key, users, differs, around)
        return None

    def _is_used_alike(self, key: TensorKey) -> bool:
        """Whether the same calls take a tensor on both sides: what others do to its gradient is another path's."""
        return {self.there_of.get(user) for user in self.users[key]} == {*self.users_there.get(self._twin(key), ())}

    def _flows_there(self) -> dict[TensorKey, None]:
        """What gets a gradient on the device, by the keys of the CPU."""
        here_of = {j: i for i, j in self.there_of.items()}
        keys = (key if isinstance(key, str) else (here_of.get(key[0]), key[1]) for key in self.there.flows)
        return {key: None for key in keys if isinstance(key, str) or key[0] is not None}

    def _twin(self, key: TensorKey) -> TensorKey | None:
        """The key of the device for one of the CPU."""
        if isinstance(key, str):
            return key
        return (self.there_of[key[0]], key[1]) if key[0] in self.there_of else None

    def _differs(self, key: TensorKey) -> float:
        """How far the gradients that come to a tensor lie apart; infinite where one side alone has one."""
        expected, actual = self.here.flows.get(key), self.there.flows.get(self._twin(key))
        if expected is None and actual is None:
            return math.nan
        if expected is None or actual is None or len(expected) != len(actual):
            return math.inf
        result = [sketch_difference(*item) for item in zip(actual, expected)]
        return max((item for item in result if not math.isnan(item)), default=math.nan)

    def _results(self, call: int) -> list[TensorKey]:
        return [(call, number) for number in range(len(self.here.seen[call].results))]

    def _takers(self, key: TensorKey, known: set[int]) -> Iterator[int]:
        """The calls that take a tensor and whose results get a gradient.

        Calls within a torch.autograd.Function of the model's own get none: those after them stand for them.
        """
        for call in self.users.get(key, ()):
            if call in known:
                continue
            known.add(call)
            if not all(math.isnan(self._differs(result)) for result in self._results(call)):
                yield call
            elif call in self.there_of:
                for result in self._results(call):
                    yield from self._takers(result, known)

    def _around(self, call: int) -> float:
        """The largest difference of the gradients that come to a call, and of its arguments and results."""
        flows = [self._differs(result) for result in self._results(call)]
        twin = self.there_of[call]
        results = [
            sketch_difference(*item) for item in zip(self.there.seen[twin].results, self.here.seen[call].results)
        ]
        given = []
        for item in self.here.seen[call].given:
            origin, other = item.origin, self._twin(item.origin.key)
            if origin.call is not None and other is not None:
                sketches = (self.there.seen[other[0]].results, self.here.seen[origin.call].results)
                given += [sketch_difference(*(part[origin.number] for part in sketches))]
        return max((flow for flow in (*flows, *results, *given) if not math.isnan(flow)), default=0.0)

    def _blamed(self, key: TensorKey, users: list[int], differs: float, around: float) -> Stray:
        """Who is to be named for the gradient that comes to a tensor."""
        what = key if isinstance(key, str) else f"what {called(self.here.calls[key[0]])} returned"
        says = f"the gradient of {what} differs by {differs:.2e}, all around it by {around:.2e} at most"
        cut, on_device = self._cut(key)
        if cut is not None:
            text = f"on the {'device' if on_device else 'CPU'} alone it keeps gradients from flowing back: {says}"
            return Stray(call=cut.call, text=text, away=differs, kind="gradient")
        for user in users:
            for result in self._results(user):
                name = self.here.functions.get(result)
                if name:
                    text = f"the backward of {name} is another on the device: {says}"
                    return Stray(call=self.there.calls[self.there_of[user]], text=text, away=differs, kind="gradient")
        more = f", or one of {len(users) - 1} more that take it" if len(users) > 1 else ""
        text = f"its backward is another on the device{more}: {says}"
        return Stray(call=self.there.calls[self.there_of[users[0]]], text=text, away=differs, kind="gradient")

    def _cut(self, key: TensorKey) -> tuple[Cut | None, bool]:
        """A detach, or a call without autograd, that one side alone makes of a tensor or of what it is made of.

        And whether the device makes it.
        """
        given = [] if isinstance(key, str) else [item.origin.key for item in self.here.seen[key[0]].given]
        for item in (key, *given):
            here, there = self._cuts(self.here, item), self._cuts(self.there, self._twin(item))
            kinds = [[other.kind for other in side] for side in (here, there)]
            more = [other for other in there if kinds[1].count(other.kind) > kinds[0].count(other.kind)]
            less = [other for other in here if kinds[0].count(other.kind) > kinds[1].count(other.kind)]
            if more or less:
                return (more or less)[0], bool(more)
        return None, False

    def _cuts(self, trace: Trace, key: TensorKey | None) -> list[Cut]:
        """Where no gradient flows back to a tensor, and where the call that returned it lets none through."""
        made = [] if key is None or isinstance(key, str) else [
            cut for cuts in trace.cuts.values() for cut in cuts if cut.number == key[0]
        ]  # fmt: skip
        return [*trace.cuts.get(key, ()), *made]


def _users(trace: Trace) -> dict[TensorKey, list[int]]:
    """The calls that take each tensor."""
    result: dict[TensorKey, list[int]] = {}
    for number, seen in enumerate(trace.seen):
        for given in seen.given:
            result.setdefault(given.origin.key, []).append(number)
    return result
