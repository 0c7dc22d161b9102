"""A report as one HTML page that needs nothing else: what failed on top, rows that can be filtered, pictures inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from harness.printable import visible
from harness.report.cards import card_blocks
from harness.report.document import Block, Bullets, Heading, Picture, Table, Text, shortened
from harness.report.format import MISSING, cosine, difference_text, number, share, times
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

PICTURED = 40  # rows that did not pass whose pictures are in the page
LINKED = 160  # characters of a reason in the table of rows
_LARGEST = 1 << 20  # bytes of a picture's file

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --back: #fff; --line: #d0d7de; --soft: #f6f8fa; --link: #0550ae;
  --good: #1a7f37; --bad: #b42318; --worse: #9a6700; --idle: #57606a }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --back: #0d1117; --line: #30363d; --soft: #161b22;
  --link: #79c0ff; --good: #3fb950; --bad: #ff7b72; --worse: #d29922; --idle: #9198a1 } }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; max-width: 90rem; margin: 1rem auto; padding: 0 1rem;
  color: var(--text); background: var(--back); overflow-wrap: anywhere }
a { color: var(--link) }
h1 { font-size: 1.5rem; margin: .5rem 0 }
.warning { border-left: .3rem solid var(--worse); padding: .3rem .8rem; background: var(--soft); font-weight: 600 }
.filter { display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: .8rem 0 }
.filter input, .filter select { font: inherit; padding: .2rem .4rem; color: inherit; background: var(--back);
  border: 1px solid var(--line); border-radius: .3rem }
.box { overflow: auto; max-height: 75vh; border: 1px solid var(--line); margin: .5rem 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; white-space: nowrap }
td.text { white-space: normal; min-width: 22rem }
td.number, th.number { text-align: right }
thead th { background: var(--soft); position: sticky; top: 0 }
.PASS { color: var(--good) } .FAIL, .ERROR { color: var(--bad) } .REGRESSED { color: var(--worse) }
.SKIPPED { color: var(--idle) } .status { font-weight: 600 }
details { margin: .5rem 0 } summary { cursor: pointer } img { max-width: 100%; height: auto }
:target { outline: 2px solid var(--link) }
"""

_SCRIPT = """
const chosen = ['text', 'status', 'case', 'dtype'].map(name => document.getElementById(name));
const rows = [...document.querySelectorAll('#rows tbody tr')];
const shown = document.getElementById('shown');
function filter() {
  const [text, status, kind, dtype] = chosen.map(each => each.value);
  const wanted = text.toLowerCase();
  let count = 0;
  for (const row of rows) {
    const fits = (!status || row.dataset.status === status) && (!kind || row.dataset.case === kind)
      && (!dtype || row.dataset.dtype === dtype) && (!wanted || row.textContent.toLowerCase().includes(wanted));
    row.hidden = !fits;
    count += fits;
  }
  shown.textContent = count + ' / ' + rows.length;
}
chosen.forEach(each => each.addEventListener('input', filter));
filter();
"""


def page(report: Report, lang: str, folder: Path | None) -> str:
    """The whole page; the pictures that the report names are read from `folder`."""
    words = LANGUAGES[lang]
    failed = failed_first(report.rows)
    parts = [f'<p class="warning">{_text(warning)}</p>' for warning in warnings_of(report, words)]
    parts.append(f"<h1>{_text(title_of(report, words))}</h1>")
    if report.stack.get("device"):
        parts.append(f"<p>{_text(stack_line(report))}</p>")
    conclusion = conclusion_of(report, words)
    parts += [f"<p>{_text(conclusion)}</p>"] if conclusion else []
    if report.rows:
        parts += [_filter(report.rows, words), _rows(report, failed, words)]
    parts += _failures(failed, words, folder)
    parts += _blocks(card_blocks(report, words), folder)
    parts += _blocks(switch_blocks(rows_of_models(report.rows), words), folder)
    parts += _blocks(performance_blocks(report, words), folder)
    notes = measured_how(report.rows, words)
    parts += [_folded(words["how"], _blocks([Bullets(items=tuple(notes))], folder))] if notes else []
    parts.append(_folded(words["environment"], _blocks([stack_table(report, words)], folder)))
    body = "\n".join(parts)
    policy = f"default-src 'none'; style-src {_digest(STYLE)}; script-src {_digest(_SCRIPT)}; img-src data:"
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{_text(title_of(report, words))}</title>'
        f"<style>{STYLE}</style>"
    )
    script = f"<script>{_SCRIPT}</script>" if report.rows else ""
    return f'<!doctype html>\n<html lang="{lang}"><head>{head}</head><body>\n{body}\n{script}</body></html>\n'


def _digest(text: str) -> str:
    """What a Content-Security-Policy allows: this very text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    return escape(visible(text))


# -------- the rows


def _filter(rows: Sequence[Row], words: Mapping[str, str]) -> str:
    def choice(name: str, label: str, values: Iterable[str]) -> str:
        options = "".join(f"<option>{_text(fromkey)}</option>" for fromkey in dict.fromkeys(values))
        return f'<label>{label} <select id="{name}"><option value="">–</option>{options}</select></label>'

    statuses = choice("status", words["status"], (row.status.value for row in failed_first(rows) + list(rows)))
    cases = choice("case", words["case"], (row.case for row in rows))
    dtypes = choice("dtype", "dtype", (row.dtype or MISSING for row in rows))
    text = f'<label>{words["filter"]} <input id="text" type="search"></label>'
    return f'<div class="filter">{text}{statuses}{cases}{dtypes}<output id="shown"></output></div>'


def _rows(report: Report, failed: Sequence[Row], words: Mapping[str, str]) -> str:
    """Every row, those that did not pass on top with a link to their reasons."""
    positions = {id(row): position for position, row in enumerate(failed)}
    rows = [*failed, *(row for row in report.rows if id(row) not in positions)]
    decided = any(row.decisions for row in rows)
    texts = [words["result"], words["case"], "dtype"]
    numbers = [words["seed"], "max_diff", "mean_diff", "cos_sim", words["forecast_ratio"]]
    more = [words["bits"], "rel_l2", words["to_golden"], words["cpu_to_golden"]]
    more += [words["top1"]] if decided else []
    head = "".join(f"<th>{_text(text)}</th>" for text in texts) + _cells("th", numbers)
    head += (f"<th>{words['reason']}</th>" if failed else "") + _cells("th", more)
    body = "\n".join(_row(row, positions.get(id(row)), decided, bool(failed), words) for row in rows)
    return f'<div class="box"><table id="rows"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _cells(tag: str, numbers: Iterable[str]) -> str:
    return "".join(f'<{tag} class="number">{_text(item)}</{tag}>' for item in numbers)


def _row(row: Row, position: int | None, decided: bool, reasons: bool, words: Mapping[str, str]) -> str:
    dtype = row.dtype or MISSING
    numbers = [
        MISSING if row.seed is None else str(row.seed),
        difference_text(row.max_diff),
        difference_text(row.mean_diff),
    ]
    numbers += [cosine(row.cos_sim), times(row.forecast_ratio)]
    more = [number(row.effective_bits, "{:.1f}"), difference_text(row.rel_l2)]
    more += [difference_text(row.golden_rel_l2), difference_text(row.cpu_golden_rel_l2)]
    more += [share(getattr(row.decisions, "top1", None))] if decided else []
    result = result_of(row).removeprefix(f"{row.status.sign} ")  # words and a colour; not every font has the signs
    cells = f'<td class="status {row.status}">{_text(result)}</td><td>{_text(row.case)}</td><td>{_text(dtype)}</td>'
    cells += _cells("td", numbers)
    why = (
        ""
        if position is None
        else f'<a href="#row{position}">{_text(shortened(line_of(row, words).partition(": ")[2], LINKED))}</a>'
    )
    cells += (f'<td class="text">{why}</td>' if reasons else "") + _cells("td", more)
    data = f'data-status="{row.status}" data-case="{_text(row.case)}" data-dtype="{_text(dtype)}"'
    return f"<tr {data}>{cells}</tr>"


# -------- what failed


def _failures(failed: Sequence[Row], words: Mapping[str, str], folder: Path | None) -> list[str]:
    if not failed:
        return []
    parts = [f"<h2>{_text(words['not_passed'])}</h2>"]
    for position, row in enumerate(failed):
        parts.append(f'<section id="row{position}"><h3 class="{row.status}">{_text(f"{row.status} {row.name}")}</h3>')
        blocks: list[Block] = [Text(text=row.test), Bullets(items=tuple(told(reason, words) for reason in row.reasons))]
        if row.located is not None:
            blocks += found_blocks(row.located, words)
        pictured = position < PICTURED
        if row.located is not None and row.located.picture and pictured:
            blocks.append(Picture(text=words["depth"], path=row.located.picture))
        parts += _blocks(blocks, folder)
        shown = row.comparisons.get(row.output or "")
        drawn = histogram_picture(shown.histogram) if shown is not None and pictured else ""
        parts += [_image(drawn.encode(), words["histogram"])] if drawn else []
        parts.append("</section>")
    return parts


# -------- blocks


def _folded(summary: str, parts: Sequence[str]) -> str:
    return f"<details><summary>{_text(summary)}</summary>{''.join(parts)}</details>"


def _blocks(blocks: Sequence[Block], folder: Path | None) -> list[str]:
    return [_block(block, folder) for block in blocks]


def _block(block: Block, folder: Path | None) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_text(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        text = _text(block.text)
        return f"<p><strong>{text}</strong></p>" if block.strong else f"<p>{text}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Picture):
        return _picture(block, folder)
    if isinstance(block, Table):
        return _table(block)
    return _folded(block.summary, _blocks(block.blocks, folder))


def _table(table: Table) -> str:
    kinds = [' class="number"' if side == "right" else "" for side in table.alignment()]
    head = "".join(f"<th{kind}>{_text(column)}</th>" for kind, column in zip(kinds, table.columns))
    rows = "".join(
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _picture(picture: Picture, folder: Path | None) -> str:
    """A picture inside of the page; where its file is not there, not below the report's folder or no SVG, its name."""
    path = None if folder is None else (folder / picture.path)
    if path is None or not path.is_file() or path.suffix != ".svg" or path.stat().st_size > _LARGEST:
        return f"<p>{_text(f'{picture.text}: {picture.path}')}</p>"
    if not path.resolve().is_relative_to(Path(folder or ".").resolve()):
        return f"<p>{_text(f'{picture.text}: {picture.path}')}</p>"
    return _image(path.read_bytes(), picture.text)


def _image(svg: bytes, text: str) -> str:
    """An SVG as an image, in which no script of it runs."""
    return f'<p><img src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" alt="{_text(text)}"></p>'
