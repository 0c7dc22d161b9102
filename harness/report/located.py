"""A finding as a row of the report and as markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from harness.report.document import Block, Table, Text, to_markdown
from harness.report.format import NO_VALUE, difference_text, times
from harness.report.rows import Located, Ranked, Shown
from harness.report.words import EN, told

RANKED = 10


def located(finding: Any, repro: Any = None, picture: str | None = None) -> Located:
    """A finding as a row of the report holds it; `picture` is a file beside the report."""
    ranked = [field.name for field in fields(Ranked)]
    ranking = tuple(Ranked(**{name: getattr(item, name) for name in ranked}) for item in finding.ranking(RANKED))
    shown = None
    if repro is not None:
        names = [field.name for field in fields(Shown) if field.name not in ("folder", "elements")]
        more = {name: getattr(repro, name) for name in names}
        shown = Shown(folder=str(repro.folder), elements=tuple(repro.elements), **more)
    first = None if finding.first is None else finding.first.number
    return Located(
        said=finding.sentences(),
        first=first,
        operators=len(finding.steps),
        ranking=ranking,
        repro=shown,
        picture=picture,
    )


def unlocated(why: str) -> Located:
    """The same where there is no finding."""
    return Located(said=why)


def found_blocks(finding: Located, words: Mapping[str, str] = EN) -> list[Block]:
    """A finding as blocks: the sentences, then the operators with the largest own errors, those that are wrong
    first.
    """
    rows = []
    for item in finding.ranking:
        shape = "x".join(map(str, item.shape)) or "scalar"
        numbers = (difference_text(item.own), times(item.ratio), difference_text(item.inherited))
        why = told(item.cause or (item.reasons or [item.note or NO_VALUE])[0], words)
        rows.append((item.module or NO_VALUE, item.operator, item.place, item.dtype, shape, *numbers, why))
    columns = ("module", "operator", "line", "dtype", "shape", "own", "own_ratio", "inherited", "cause")
    named = tuple(words[f"located_{column}"] for column in columns)
    table = Table(columns=named, rows=tuple(rows), numbers_from=5, numbers_to=8)
    blocks: list[Block] = [Text(text=told(finding.said, words), strong=True), *([table] if rows else [])]
    repro = finding.repro
    if repro:
        printed = told(repro.printed.strip().replace("\n", "; "), words)
        wanted, whole = repro.elements[1], repro.elements[0]
        command = repro.command or f"{repro.folder}/repro.py"
        sentence = words["repro" if repro.shows else "repro_not_shown"]
        blocks.append(Text(text=sentence.format(command=command, few=wanted, all=whole, printed=printed)))
    return blocks


def found_text(finding: Located, words: Mapping[str, str] = EN) -> str:
    """A finding as markdown."""
    return to_markdown(found_blocks(finding, words)).rstrip("\n")
