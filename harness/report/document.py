"""A report as blocks of plain text, and the two ways to write them: markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


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
    """Cells are text; the columns from `numbers_from` on are numbers, set to the right."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers_from: int | None = None

    def frame(self) -> DataFrame:
        import pandas

        frame: DataFrame = pandas.DataFrame(list(self.rows), columns=list(self.columns), dtype=str)
        return frame

    def alignment(self) -> list[str]:
        first = len(self.columns) if self.numbers_from is None else self.numbers_from
        return ["left" if index < first else "right" for index in range(len(self.columns))]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in a file beside the report."""

    text: str
    path: str


Block = Heading | Text | Bullets | Table | Picture


def to_markdown(blocks: Sequence[Block]) -> str:
    """GitHub-flavoured markdown."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_escaped(block.text)}"
    if isinstance(block, Text):
        return f"**{_escaped(block.text)}**" if block.strong else _escaped(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {_escaped(item)}" for item in block.items)
    if isinstance(block, Picture):
        return f"![{_escaped(block.text)}]({block.path})"
    frame = block.frame().map(_escaped)
    table: str = frame.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=block.alignment())
    return table


def _escaped(text: str) -> str:
    """Text on one line in which nothing is markup."""
    text = " ".join(text.split())
    for mark, replacement in (("\\", "\\\\"), ("|", "\\|"), ("*", "\\*"), ("`", "\\`"), ("<", "&lt;")):
        text = text.replace(mark, replacement)
    return text


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums }
th, td { border: 1px solid #d0d7de; padding: .25rem .7rem; text-align: left; white-space: nowrap }
th { background: #f6f8fa }
"""


def to_html(blocks: Sequence[Block], lang: str) -> str:
    """One page that needs nothing else."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="{lang}"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        text = html.escape(block.text)
        return f"<p><strong>{text}</strong></p>" if block.strong else f"<p>{text}</p>"
    if isinstance(block, Picture):
        return f'<p><img src="{html.escape(block.path)}" alt="{html.escape(block.text)}"></p>'
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block.items) + "</ul>"
    import pandas

    with pandas.option_context("display.max_colwidth", None):  # else long cells are cut
        table: str = block.frame().to_html(index=False, border=0, escape=True)
    return table
