"""A report as blocks of plain text, and how they are written as markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from harness.report.printable import visible

if TYPE_CHECKING:
    from pandas import DataFrame

_LONGEST = 65_535  # characters: what a comment or a description on GitHub takes
SHORTEST = 50  # characters that a row of a table has at least
_ROWS = 60  # of a table, of which a report that is too long keeps at least so many while something else can go
LINE = 600  # characters that an item or a cell keeps of a text that is longer


@dataclass(frozen=True, kw_only=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True, kw_only=True)
class Text:
    text: str
    strong: bool = False


@dataclass(frozen=True, kw_only=True)
class Bullets:
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells are text; the columns from `numbers_from` on, up to `numbers_to`, are numbers, set to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers_from: int | None = None
    numbers_to: int | None = None  # the first column after them

    def frame(self) -> DataFrame:
        import pandas

        frame: DataFrame = pandas.DataFrame(list(self.rows), columns=list(self.columns), dtype=object)
        return frame

    def alignment(self) -> list[str]:
        first = len(self.columns) if self.numbers_from is None else self.numbers_from
        end = len(self.columns) if self.numbers_to is None else self.numbers_to
        return ["right" if first <= index < end else "left" for index in range(len(self.columns))]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in a file beside the report."""

    text: str
    path: str


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Blocks that a reader opens by a click on their summary; what is left out first of a report that is too long."""

    summary: str
    blocks: tuple[Block, ...]
    left_out_last: bool = False  # after all others of its kind


Block = Heading | Text | Bullets | Table | Picture | Folded


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub-flavoured markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_short_markdown(blocks: Sequence[Block], *, left_out: str, longest: int = _LONGEST) -> str:
    """The same in at most `longest` characters: tables and lists lose rows at their ends down to `_ROWS`, then what is
    folded is left out from the end on, then tables and lists lose more. `left_out` says so in its place; "{count}" in
    it is the number of rows or lines.

    >>> rows = tuple((str(number),) for number in range(1000))
    >>> text = to_short_markdown([Table(columns=("n",), rows=rows)], left_out="{count} more", longest=400)
    >>> len(text) <= 400, text.splitlines()[-1].endswith("more")
    (True, True)
    """
    blocks = tuple(_with_short_lines(block) for block in blocks)
    shown = list(blocks)
    rows = min(max(map(_lines_of, blocks), default=0), longest // SHORTEST)
    uncut: dict[int, str] = {}

    def render() -> list[str]:
        return [_cut(block, rows, left_out, uncut) for block in shown]

    def too_long() -> bool:
        return sum(map(len, written)) + 2 * len(written) > longest

    written = render()
    while too_long() and rows > _ROWS:
        rows = max(rows // 2, _ROWS)
        written = render()
    folded = [(index, block) for index, block in enumerate(blocks) if isinstance(block, Folded)]
    for index, block in sorted(folded, key=lambda item: (item[1].left_out_last, -item[0])):
        if too_long():
            shown[index] = Text(text=f"{block.summary}: {left_out.format(count=_lines_of(block))}")
            written[index] = _markdown(shown[index])
    while too_long() and rows:
        rows //= 2
        written = render()
    return "\n\n".join(written)[: longest - 1] + "\n"


def _lines_of(block: Block) -> int:
    """The rows of tables and the items of lists in a block."""
    if isinstance(block, Folded):
        return sum(map(_lines_of, block.blocks))
    if isinstance(block, Table):
        return len(block.rows)
    return len(block.items) if isinstance(block, Bullets) else 0


def _cut(block: Block, count: int, left_out: str, uncut: dict[int, str]) -> str:
    """A block whose tables and lists have at most `count` rows or items, as markdown, and what is left out.

    `uncut` keeps the text of what is not cut, by the identity of the block, for later calls: the blocks must outlive
    it.
    """
    if isinstance(block, Folded):
        return _folded(block.summary, [_cut(item, count, left_out, uncut) for item in block.blocks])
    more = _lines_of(block) - count
    if more <= 0:
        if id(block) not in uncut:
            uncut[id(block)] = _markdown(block)
        return uncut[id(block)]
    note = left_out.format(count=more)
    if isinstance(block, Table):
        return f"{_markdown(replace(block, rows=block.rows[:count]))}\n\n{note}"
    assert isinstance(block, Bullets)
    return "\n".join(filter(None, [_markdown(Bullets(items=block.items[:count])), f"- {note}"]))


def _with_short_lines(block: Block) -> Block:
    """A block whose lines and cells are cut where they are longer than `LINE`."""
    if isinstance(block, Folded):
        return replace(block, blocks=tuple(map(_with_short_lines, block.blocks)))
    if isinstance(block, Bullets):
        return Bullets(items=tuple(map(shortened, block.items)))
    if isinstance(block, Table):
        return replace(block, rows=tuple(tuple(map(shortened, row)) for row in block.rows))
    return replace(block, text=shortened(block.text))


def shortened(text: str, most: int = LINE) -> str:
    """A text of at most `most` characters, with "…" where it was cut."""
    return text if len(text) <= most else f"{text[: most - 2]} …"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escaped(block.text)}"
    if isinstance(block, Text):
        return f"**{escaped(block.text)}**" if block.strong else _at_the_start(escaped(block.text))
    if isinstance(block, Bullets):
        return "\n".join(f"- {_at_the_start(escaped(item))}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{escaped(block.text)}]({quote(block.path)})"
    if isinstance(block, Folded):
        return _folded(block.summary, list(map(_markdown, block.blocks)))
    frame = block.frame().map(escaped)
    frame.columns = [escaped(column) for column in block.columns]
    table: str = frame.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=block.alignment())
    return table


def _folded(summary: str, parts: Sequence[str]) -> str:
    inside = "\n\n".join(parts)
    return f"<details><summary>{escaped(summary)}</summary>\n\n{inside}\n\n</details>"


_MARKUP = re.compile(r"[\\|*`~]|\](?=[\[(:])|(?<!\w)_|_(?!\w)")
_BLOCK = re.compile(r"([#>+=-]|\d+[.)])")


def escaped(text: str) -> str:
    """Text on one line of markdown in which nothing is markup, and nothing that cannot be seen."""
    text = _MARKUP.sub(lambda found: f"\\{found[0]}", visible(text))
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _at_the_start(text: str) -> str:
    """Text at the start of a line, where a few signs would begin a heading, a quotation or a list."""
    result = _BLOCK.match(text)
    return text if result is None else f"{text[: result.end() - 1]}\\{text[result.end() - 1 :]}"
