"""Which of several accelerator cards that computed the same row is the odd one: by the bits of their runs, and where
healthy reruns differ, by how far they lie apart. Pure.

A device that computes rightly repeats its bits, and so does another one of its kind. So one card whose bits are not
those of most cards is wrong, however small its error is. A model whose reruns differ on one card shows that on most
cards, sooner or later: then a card is odd only where it lies further from the others than reruns lie apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, mode

FURTHER = 3.0  # times the largest spread of reruns that an odd card lies from the others, where reruns differ


@dataclass(frozen=True, kw_only=True)
class Bits:
    """The runs of one card."""

    digests: tuple[str, ...]  # of the outputs of each run
    spread: float = 0.0  # the largest rel_l2 between its first run and another one of it

    @property
    def usual(self) -> str:
        """The digest that most of its runs have."""
        return mode(self.digests)

    @property
    def repeats(self) -> bool:
        """Whether all of its runs have the same bits."""
        return len(set(self.digests)) == 1


@dataclass(frozen=True, kw_only=True)
class Odd:
    """What the runs of all cards say; numbers are places of cards in their order."""

    majority: str | None  # the digest that more than half of the cards usually have; None where there is none
    cards: tuple[int, ...] = ()  # those that are wrong
    split: bool = False  # the cards differ, and nothing says which of them is wrong
    scattered: bool = False  # reruns on one card differ as well


def odd_cards(cards: Sequence[Bits], distance: Callable[[int, int], float], *, scatters: bool = False) -> Odd:
    """The cards whose runs cannot be what a healthy card computes. `distance(i, j)`: rel_l2 between the first runs of
    two cards; asked for where there is no majority and reruns differ on several cards. `scatters`: reruns of this model
    differed on several cards before.

    >>> same, other = Bits(digests=("a", "a")), Bits(digests=("a", "b"), spread=1e-3)
    >>> odd_cards([same, other, same], lambda i, j: 0.0).cards
    (1,)
    """
    votes = [card.usual for card in cards]
    usual = mode(votes)
    majority = usual if 2 * votes.count(usual) > len(cards) else None
    moving = [place for place, card in enumerate(cards) if not card.repeats]
    away = [place for place, card in enumerate(cards) if card.usual != majority]
    if len(moving) > 1 or (moving and scatters):
        steady = tuple(place for place in away if majority is not None and cards[place].repeats)
        far = _further(cards, distance) if majority is None else ()
        split = majority is None and len(cards) == 2 and _lie_apart(cards, distance)
        return Odd(majority=majority, cards=(*steady, *far), split=split, scattered=True)
    if majority is None and not (moving and len(cards) == 2):  # of two cards one does not repeat itself
        return Odd(majority=None, split=True)
    if majority is None:
        return Odd(majority=cards[1 - moving[0]].usual, cards=tuple(moving))
    return Odd(majority=majority, cards=tuple(sorted({*away, *moving})))


def _further(cards: Sequence[Bits], distance: Callable[[int, int], float]) -> tuple[int, ...]:
    """The cards that lie further from the others than those lie from each other, and than their reruns lie apart."""
    if len(cards) < 3:
        return ()
    places = range(len(cards))
    result = []
    for place in places:
        others = [other for other in places if other != place]
        spread = max(cards[other].spread for other in others)
        apart = max(distance(one, two) for one in others for two in others if one < two)
        if median(distance(place, other) for other in others) > FURTHER * max(spread, apart):
            result.append(place)
    return tuple(result)


def _lie_apart(cards: Sequence[Bits], distance: Callable[[int, int], float]) -> bool:
    """Whether two cards lie further apart than the reruns of both."""
    return distance(0, 1) > FURTHER * max(card.spread for card in cards)
