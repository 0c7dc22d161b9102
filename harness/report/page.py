"""A report as one HTML page that needs nothing else: what failed on top, rows that can be filtered, pictures inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import east_asian_width

from harness.report.browser import SCRIPT, STYLE, in_html
from harness.report.cards import card_blocks
from harness.report.document import Block, Bullets, Heading, Picture, Table, Text, shortened
from harness.report.format import NO_VALUE, cosine, difference_text, number, share, times
from harness.report.history import Snapshot, history_section
from harness.report.located import found_blocks
from harness.report.pictures import histogram_picture
from harness.report.rows import Row
from harness.report.switches import switch_blocks
from harness.report.text import (
    conclusion_of,
    failed_first,
    line_of,
    measured_how,
    performance_blocks,
    result_of,
    rows_of_models,
    stack_line,
    stack_table,
    title_of,
    warnings_of,
)
from harness.report.words import LANGUAGES, told

if TYPE_CHECKING:
    from harness.report.content import Report

BLOCK = 100  # rows that are laid out together
HIGH = 28  # pixels of a line of a row, about
WIDEST, WIDEST_RESULT = 34, 17  # characters of a column; longer texts take several lines
LETTER, BOLD = 0.9, 1.15  # of a digit's width: that of other characters, and of a status's, about
SORTED = 2  # characters that the sign of the order takes
CHOICES = 500  # cases among which a reader chooses; more are found by their text
PICTURED = 40  # rows that did not pass whose pictures are in the page
LINKED = 300  # characters of a reason in the table of rows
_LARGEST = 1 << 20  # bytes of a picture's file


def page(report: Report, lang: str, folder: Path | None, history: Sequence[Snapshot] = ()) -> str:
    """The whole page; the pictures that the report names are read from `folder`. `history`: the report among those
    that its errors are charted with, the oldest first.
    """
    words = LANGUAGES[lang]
    failed = failed_first(report.rows)
    parts = [f'<p class="warning">{in_html(warning)}</p>' for warning in warnings_of(report, words)]
    parts.append(f"<h1>{in_html(title_of(report, words))}</h1>")
    if report.stack.get("device"):
        parts.append(f"<p>{in_html(stack_line(report))}</p>")
    conclusion = conclusion_of(report, words)
    parts += [f"<p>{in_html(conclusion)}</p>"] if conclusion else []
    columns = ""
    if report.rows:
        rows, columns = _rows(report, failed, words)
        parts += [_filter(report.rows, words), rows]
    parts += [history_section(history, words)] if history else []
    parts += _failures(failed, words, folder)
    parts += _blocks(card_blocks(report, words), folder)
    parts += _blocks(switch_blocks(rows_of_models(report.rows), words), folder)
    parts += _blocks(performance_blocks(report, words), folder)
    notes = measured_how(report.rows, words)
    parts += [_folded(words["how"], _blocks([Bullets(items=tuple(notes))], folder))] if notes else []
    parts.append(_folded(words["environment"], _blocks([stack_table(report, words)], folder)))
    body = "\n".join(parts)
    style = STYLE + columns
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(SCRIPT)}; img-src data:"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{in_html(title_of(report, words))}</title>'
        f"<style>{style}</style>"
    )
    script = f"<script>{SCRIPT}</script>" if report.rows else ""
    return f'<!doctype html>\n<html lang="{lang}"><head>{head}</head><body>\n{body}\n{script}</body></html>\n'


def _digest(text: str) -> str:
    """What a Content-Security-Policy allows: this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# -------- the rows


def _filter(rows: Sequence[Row], words: Mapping[str, str]) -> str:
    def choice(name: str, label: str, values: Iterable[str]) -> str:
        different = dict.fromkeys(values)
        if len(different) > CHOICES:
            return ""
        options = "".join(f"<option>{in_html(value)}</option>" for value in different)
        return f'<label>{label} <select id="{name}"><option value="">–</option>{options}</select></label>'

    statuses = choice("status", words["status"], (row.status.value for row in failed_first(rows) + list(rows)))
    cases = choice("case", words["case"], (row.case for row in rows))
    dtypes = choice("dtype", "dtype", (row.dtype or NO_VALUE for row in rows))
    text = f'<label>{words["filter"]} <input id="text" type="search"></label>'
    return f'<div class="filter">{text}{statuses}{cases}{dtypes}<output id="shown"></output></div>'


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A cell of the table of rows; `link` is where it leads, `kind` the classes that it is shown by."""

    text: str
    kind: str = ""
    link: str = ""

    def html(self, tag: str) -> str:
        kind = f' class="{self.kind}"' if self.kind else ""
        text = in_html(self.text)
        return f'<{tag}{kind}><a href="{self.link}">{text}</a></{tag}>' if self.link else f"<{tag}{kind}>{text}</{tag}>"


def _rows(report: Report, failed: Sequence[Row], words: Mapping[str, str]) -> tuple[str, str]:
    """The table of every row, those that did not pass on top and their reason below each; and its columns' style."""
    positions = {id(row): position for position, row in enumerate(failed)}
    rows = [*failed, *(row for row in report.rows if id(row) not in positions)]
    decided = any(row.decisions for row in rows)
    texts = [words["result"], words["case"], "dtype"]
    numbers = [words["seed"], "max_diff", "mean_diff", "cos_sim", words["forecast_ratio"]]
    more = [words["bits"], "rel_l2", words["to_golden"], words["cpu_to_golden"]]
    more += [words["top1"]] if decided else []
    head = [*map(_cell, texts), *map(_number, numbers + more)]
    widths = [max(map(_width, cell.text.split())) + SORTED for cell in head]
    lines = []
    for row in rows:
        cells = _cells(row, positions.get(id(row)), decided, words)
        widths = [max(width, _width(cell.text)) for width, cell in zip(widths, cells)]
        data = (
            f'data-status="{row.status}" data-case="{in_html(row.case)}" data-dtype="{in_html(row.dtype or NO_VALUE)}"'
        )
        data += ' class="with-reason"' if id(row) in positions else ""
        lines.append(f"<tr {data}>{''.join(cell.html('td') for cell in cells)}</tr>")
    shares = [BOLD, *(1 if cell.kind == "number" else LETTER for cell in head[1:])]
    most = [WIDEST_RESULT, *[WIDEST] * (len(head) - 1)]
    columns = " ".join(f"{share * min(width, limit) + 2:.1f}ch" for width, limit, share in zip(widths, most, shares))
    style = f"#rows tr {{ grid-template-columns: {columns} }}\n"
    high = HIGH * (min(BLOCK, len(rows)) + min(BLOCK, len(failed)))  # a reason takes a line
    style += f"#rows tbody {{ contain-intrinsic-block-size: {high}px }}\n"
    blocks = [lines[start : start + BLOCK] for start in range(0, len(lines), BLOCK)]
    bodies = "\n".join(f"<tbody>\n{chr(10).join(block)}\n</tbody>" for block in blocks)
    titles = "".join(cell.html("th") for cell in head)
    return f'<div class="box"><table id="rows"><thead><tr>{titles}</tr></thead>\n{bodies}</table></div>', style


def _cell(text: str) -> _Cell:
    return _Cell(text=text)


def _number(text: str) -> _Cell:
    return _Cell(text=text, kind="number")


def _width(text: str) -> int:
    """The columns of a terminal that a text takes: two for each Chinese character."""
    if text.isascii():
        return len(text)
    return len(text) + sum(east_asian_width(item) in "WF" for item in text)


def _cells(row: Row, position: int | None, decided: bool, words: Mapping[str, str]) -> list[_Cell]:
    numbers = [NO_VALUE if row.seed is None else str(row.seed)]
    numbers += [difference_text(row.max_diff), difference_text(row.mean_diff)]
    numbers += [cosine(row.cos_sim), times(row.forecast_ratio)]
    more = [number(row.effective_bits, "{:.1f}"), difference_text(row.rel_l2)]
    more += [difference_text(row.golden_rel_l2), difference_text(row.cpu_golden_rel_l2)]
    more += [share(getattr(row.decisions, "top1", None))] if decided else []
    result = result_of(row).removeprefix(f"{row.status.sign} ")  # words and a colour; not every font has the signs
    cells = [_Cell(text=result, kind=f"status {row.status}"), _cell(row.case), _cell(row.dtype or NO_VALUE)]
    cells += map(_number, numbers)
    cells += map(_number, more)
    if position is not None:  # a line of its own below the numbers
        reason = shortened(line_of(row, words).partition(": ")[2], LINKED)
        cells.append(_Cell(text=reason, kind="reason", link=f"#row{position}"))
    return cells


# -------- what failed


def _failures(failed: Sequence[Row], words: Mapping[str, str], folder: Path | None) -> list[str]:
    if not failed:
        return []
    parts = [f"<h2>{in_html(words['not_passed'])}</h2>"]
    for position, row in enumerate(failed):
        parts.append(f'<section id="row{position}"><h3 class="{row.status}">{in_html(f"{row.status} {row.name}")}</h3>')
        blocks: list[Block] = [Text(text=row.test), Bullets(items=tuple(told(reason, words) for reason in row.reasons))]
        if row.located is not None:
            blocks += found_blocks(row.located, words)
        pictured = position < PICTURED
        if row.located is not None and row.located.picture and pictured:
            blocks.append(Picture(text=words["depth"], path=row.located.picture))
        parts += _blocks(blocks, folder)
        shown = row.comparisons.get(row.output or "") if pictured else None
        drawn = "" if shown is None else histogram_picture(shown.histogram, words)
        parts += [_image(drawn.encode(), words["histogram"])] if drawn else []
        parts.append("</section>")
    return parts


# -------- blocks


def _folded(summary: str, parts: Sequence[str]) -> str:
    return f"<details><summary>{in_html(summary)}</summary>{''.join(parts)}</details>"


def _blocks(blocks: Sequence[Block], folder: Path | None) -> list[str]:
    return [_block(block, folder) for block in blocks]


def _block(block: Block, folder: Path | None) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{in_html(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        text = in_html(block.text)
        return f"<p><strong>{text}</strong></p>" if block.strong else f"<p>{text}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{in_html(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        return _picture(block, folder)
    if isinstance(block, Table):
        return _table(block)
    return _folded(block.summary, _blocks(block.blocks, folder))


def _table(table: Table) -> str:
    kinds = [' class="number"' if side == "right" else "" for side in table.alignment()]
    head = "".join(f"<th{kind}>{in_html(column)}</th>" for kind, column in zip(kinds, table.columns))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{in_html(cell)}</td>" for kind, cell in zip(kinds, row)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _picture(picture: Picture, folder: Path | None) -> str:
    """A picture inside of the page; where its file is not there, not below the report's folder or no SVG, its name."""
    path = None if folder is None else (folder / picture.path)
    if path is None or not path.is_file() or path.suffix != ".svg" or path.stat().st_size > _LARGEST:
        return f"<p>{in_html(f'{picture.text}: {picture.path}')}</p>"
    if not path.resolve().is_relative_to(Path(folder or ".").resolve()):
        return f"<p>{in_html(f'{picture.text}: {picture.path}')}</p>"
    return _image(path.read_bytes(), picture.text)


def _image(svg: bytes, text: str) -> str:
    """An SVG as an image, in which no script of it runs."""
    return f'<p><img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" alt="{in_html(text)}"></p>'
