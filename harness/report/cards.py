"""The accelerator cards of a run: how each did on the rows that every card computed, and which were quarantined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.judging.verdict import CardRuns
from harness.measure import Count, Share
from harness.report.document import Block, Bullets, Heading, Table, Text
from harness.report.format import share
from harness.report.words import told

if TYPE_CHECKING:
    from harness.report.content import Report
    from harness.report.rows import Row


@dataclass(frozen=True, kw_only=True)
class CardTotals:
    """One card over all rows that it computed."""

    card: str
    rows: Count
    differing_rows: Count  # in which a run of it had other bits than most cards
    odd_rows: Count  # in which it is named as the card that is wrong
    runs: Count
    differing_runs: Count

    @property
    def share(self) -> Share:
        """Of its rows, those that differ."""
        return self.differing_rows / self.rows if self.rows else 0.0


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A card that no longer answered, and got no more rows."""

    card: str  # "card 3"
    after: str  # the row after which it did not answer; "" where it never did
    seen: str  # what was seen
    then: str  # what became of its rows

    def __str__(self) -> str:
        after = f" after {self.after}" if self.after else ""
        return f"{self.card} was quarantined{after}: {self.seen}; {self.then}"


def totals_of(rows: Iterable[Row]) -> tuple[CardTotals, ...]:
    """The cards of rows that several of them computed, in the order in which they come."""
    runs: dict[str, list[CardRuns]] = {}
    for row in rows:
        for item in row.cards or ():
            runs.setdefault(item.card, []).append(item)
    return tuple(
        CardTotals(
            card=card,
            rows=len(items),
            differing_rows=sum(item.differing > 0 for item in items),
            odd_rows=sum(item.odd for item in items),
            runs=sum(item.runs for item in items),
            differing_runs=sum(item.differing for item in items),
        )
        for card, items in runs.items()
    )


def cards_line(totals: Sequence[CardTotals], words: Mapping[str, str]) -> str:
    """The cards in one line: those that differ, or that all agree; "" where no row ran on several cards."""
    if not totals:
        return ""
    differing = [item for item in totals if item.differing_rows or item.odd_rows]
    rows, runs = max(item.rows for item in totals), sum(item.runs for item in totals)
    if not differing:
        return words["cards_agree"].format(cards=len(totals), rows=rows, runs=runs)
    named = [
        words["card_differs"].format(
            card=item.card,
            rows=item.differing_rows,
            of=item.rows,
            runs=item.differing_runs,
            of_runs=item.runs,
            odd=item.odd_rows,
        )
        for item in differing
    ]
    return words["cards_differ"].format(named=words["cards_between"].join(named), cards=len(totals))


def card_blocks(report: Report, words: Mapping[str, str]) -> list[Block]:
    """The cards under their heading; nothing where no row ran on several, and none was quarantined."""
    totals = report.cards
    blocks: list[Block] = []
    if report.quarantined:
        lines = tuple(told(str(item), words) for item in report.quarantined)
        blocks += [Heading(text=words["quarantined"]), Bullets(items=lines)]
    if not totals:
        return blocks
    columns = ("card", "rows", "rows_differ", "share", "runs", "runs_differ", "rows_odd")
    body = tuple(
        (
            item.card,
            str(item.rows),
            str(item.differing_rows),
            share(item.share),
            str(item.runs),
            str(item.differing_runs),
            str(item.odd_rows),
        )
        for item in totals
    )
    titles = tuple(words[f"cards_{name}"] for name in columns)
    intro = Text(text=words["cards_intro"])
    return [*blocks, Heading(text=words["cards"]), intro, Table(columns=titles, rows=body, numbers_from=1)]
