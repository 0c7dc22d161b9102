"""Accelerator cards that no longer answer: after the process of a row died, its card is asked before its next row.

A card that does not answer is quarantined: the process that replaces the dead one takes a free card, or gets no rows
where other workers go on, or where no card is left makes every row that remains an error at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from harness.plugin.cards import visible_of
from harness.plugin.opening import NO_DEVICE
from harness.plugin.options import options_of
from harness.plugin.workers import Ended, Workers
from harness.report.content import STOPPED, UNRUN

IDLE = "PRECISION_IDLE"  # the environment variable of a worker that gets no rows
_LONGEST = 200  # characters of what was seen
_NO_CARD = "no card was left, and the rows after it did not run"


class Quarantine:
    """In the process that started the workers: which worker has which card, and which cards answer no more."""

    def __init__(self, config: pytest.Config, workers: Workers):
        self._config, self._workers = config, workers
        self.cards: dict[str, Any] = {}  # what reports hold of those that are quarantined, by name
        self.answered: set[str] = set()  # by name: those that answered another process after one had stopped on them
        self._out: set[str] = set()  # their numbers
        self._nodes: list[Any] = []  # workers that live
        self._kind: str | None = None
        self._visible: list[str] = []
        self._variable = ""

    def begin(self) -> None:
        """Before the workers start: the cards that there are."""
        from harness.devices.kinds import KINDS

        kind, index, cards = visible_of(self._config)
        if kind is None or not cards:
            return
        self._kind, self._variable = kind, KINDS[kind].cards_variable or ""
        self._visible = cards if index is None else cards[index : index + 1]

    def started(self, node: Any) -> None:
        """A worker is about to start."""
        self._nodes.append(node)
        if self._kind is not None:
            node.workerinput["precision_has_card"] = True

    def ready(self, node: Any) -> None:
        """A worker started; one without a card ends."""
        if IDLE in node.gateway.spec.env:
            node.shutdown()

    def down(self, node: Any, error: object) -> None:
        """A worker ended, by an `error` where that is not None: ask its card, and prepare who replaces it."""
        self._nodes = [item for item in self._nodes if item is not node]
        card = self._card_of(node)
        if error is None or card is None:
            return
        ended = self._workers.ended(node)
        if options_of(self._config).across_cards is not None:
            self._leave_out(node.gateway.spec.env, ended)
            return
        if card in self._out:
            return
        problem = ended.seen if ended.unopened else self._ask(card)
        if not problem:
            self.answered.add(f"card {card}")
            return
        self._out.add(card)
        first = ended.seen.removeprefix(f"{STOPPED}{ended.row}: ")  # the row is named beside it
        seen = first if ended.unopened else _seen(first, problem)
        self._replace(node.gateway.spec.env, card, ended.row, seen)

    def _leave_out(self, environment: dict[str, str], ended: Ended) -> None:
        """In a run of every row on all cards: let the process that comes see the cards that answer."""
        from harness.report.cards import Quarantined

        problems = {card: self._ask(card) for card in self._visible if card not in self._out}
        new = {card: problem for card, problem in problems.items() if problem}
        self._out |= new.keys()
        left = [card for card in self._visible if card not in self._out]
        then = (
            "the other cards go on" if len(left) > 1 else "too few cards were left, and the rows after it did not run"
        )
        for card, problem in new.items():
            named, seen = f"card {card}", _seen(ended.seen, problem)
            self.cards[named] = Quarantined(card=named, after=ended.row, seen=seen, then=then)
        if len(left) > 1:
            environment[self._variable] = ",".join(left)
        elif new:
            environment[NO_DEVICE] = f"not run: one card is left of {len(self._visible)}, and rows run on several"

    def all_cards(self, told: Mapping[str, Any]) -> tuple[Any, ...]:
        """What reports hold of cards that answer no more, each once: as they answered another process, or as the worker
        that stopped on them `told`. A card that answered another process gets rows, and is none of them.
        """
        numbered = {name.partition(" (")[0]: card for name, card in told.items()}
        lasting = {name: card for name, card in numbered.items() if name not in self.answered}
        return tuple((lasting | self.cards).values())

    def add(self, card: str, row: str, seen: str, problem: str, *, is_last: bool) -> None:
        """A card of a cluster is quarantined: what its process saw in `row`, and what it answers to another one.

        `is_last`: no other card is left for the rows that remain.
        """
        from harness.report.cards import Quarantined

        then = _NO_CARD if is_last else "its rows went to the other cards"
        seen = _seen(seen.removeprefix(f"{STOPPED}{row}: "), problem)
        self.cards[card] = Quarantined(card=card, after=row, seen=seen, then=then)

    def unrun(self, card: str) -> str:
        """The reason of the rows that remain after the last card of a cluster."""
        after = f" after {self.cards[card].after}" if self.cards[card].after else ""
        which = f"the only card ({card})" if len(self.cards) == 1 else f"the last of the cards ({card})"
        return f"{UNRUN}{which} was quarantined{after}: {_short(self.cards[card].seen)}"

    def settle(self, node: Any) -> None:
        """The tests of a worker that ended are shared out: where those that live take no more, another one must."""
        spec = node.gateway.spec
        if IDLE in spec.env and not self._living():
            del spec.env[IDLE], spec.env[NO_DEVICE]
            told = self.cards[f"card {self._card_of(node)}"]
            self._replace(spec.env, told.card.removeprefix("card "), told.after, told.seen)

    def _living(self) -> list[Any]:
        """The workers that take more tests."""
        return [item for item in self._nodes if not item.shutting_down and IDLE not in item.gateway.spec.env]

    def _replace(self, environment: dict[str, str], card: str, row: str, seen: str) -> None:
        """Give the process that comes another card, or none."""
        from harness.report.cards import Quarantined

        named = f"card {card}"
        taken = {self._card_of(item) for item in self._living()}
        others = [item for item in self._visible if item not in self._out]
        free = [item for item in others if item not in taken]
        if taken - self._out and not free:
            then = "its rows went to the other cards"
            environment[IDLE] = environment[NO_DEVICE] = f"{named} is quarantined"
        elif free:
            then = f"its rows went to card {free[0]}"
            environment[self._variable] = free[0]
        else:
            then = _NO_CARD
            only = f"the only card ({named})" if len(self._visible) == 1 else f"the last of the cards ({named})"
            after = f" after {row}" if row else ""
            environment[NO_DEVICE] = f"not run: {only} was quarantined{after}: {_short(seen)}"
        self.cards[named] = Quarantined(card=named, after=row, seen=seen, then=then)

    def _card_of(self, node: Any) -> str | None:
        """The card of a worker; None where the device is no card."""
        if self._kind is None:
            return None
        given: Mapping[str, str] = node.gateway.spec.env
        return given.get(self._variable) or (self._visible[0] if self._visible else None)

    def _ask(self, card: str) -> str:
        """What is wrong with a card; "" where it answers."""
        from harness.devices.asking import problem_of

        options = options_of(self._config)
        assert self._kind is not None, "there is a card"
        if self._kind != "emulated":
            return problem_of(self._kind, card)
        return problem_of(self._kind, card, devices=options.devices, soc=options.soc)


def _seen(first: str, problem: str) -> str:
    """What was seen of a card: in its row, and by the process that asked it."""
    return f"{_short(first)}; asked in another process: {_short(problem)}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]} …"
