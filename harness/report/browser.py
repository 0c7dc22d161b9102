"""What a page brings for the browser: its style, and a script that filters and sorts the rows. Without the script
all rows are there, in the order of the page.

The rows of a large report are laid out as they come into sight: each hundred of them is a block of its own, whose
height is estimated until then. A table's columns would be as wide as the widest of all cells, which needs all cells;
so every row is a grid of columns whose widths the page gives.
"""

from __future__ import annotations

from html import escape

from harness.report.printable import visible

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
.filter select { max-width: 24rem }
.box { overflow: auto; max-height: 75vh; border: 1px solid var(--line); margin: .5rem 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; white-space: nowrap }
td.number, th.number { text-align: right }
td:last-child:not(.number) { white-space: normal; min-width: 16rem }
#rows td:last-child { min-width: 0 }
thead th { background: var(--soft); position: sticky; top: 0 }
#rows, #rows thead, #rows tbody { display: block; width: max-content; min-width: 100% }
#rows thead { position: sticky; top: 0; z-index: 1 }
#rows tr { display: grid; align-items: stretch }
#rows td, #rows th { white-space: normal }
#rows .with-reason td:not(.reason) { border-bottom: 0; padding-bottom: 0 }
#rows td.reason { grid-column: 1 / -1; max-width: min(78rem, 96vw); padding-top: 0 }
#rows td.reason a { text-decoration: none }
#rows td.reason a:hover, #rows td.reason a:focus { text-decoration: underline }
#rows tbody { content-visibility: auto }
#rows [hidden] { display: none }
#rows th[aria-sort]:not([aria-sort=none])::after { content: " \\25B2" }
#rows th[aria-sort=descending]::after { content: " \\25BC" }
#rows th[tabindex] { cursor: pointer }
.PASS { color: var(--good) } .FAIL, .ERROR { color: var(--bad) } .REGRESSED { color: var(--worse) }
.SKIPPED { color: var(--idle) } .status { font-weight: 600 }
section { content-visibility: auto; contain-intrinsic-block-size: auto 12rem }
details { margin: .5rem 0 } summary { cursor: pointer } img { max-width: 100%; height: auto }
svg.chart, svg.axis { display: block; overflow: visible }
svg.chart polyline { fill: none; stroke: var(--link) }
svg.chart circle { fill: var(--link) } svg.chart circle.bad { fill: var(--bad) }
svg.chart line { stroke: var(--line); stroke-width: 2 }
svg.axis text { font-size: 11px; font-weight: 400; fill: var(--text) }
:target { outline: 2px solid var(--link) }
"""

SCRIPT = """
const table = document.getElementById('rows');
const wanted = ['text', 'status', 'case', 'dtype'].map(name => document.getElementById(name));
const counted = document.getElementById('shown');
const bodies = [...table.tBodies];
const size = bodies[0].rows.length;
const height = parseFloat(getComputedStyle(bodies[0]).containIntrinsicBlockSize) / size;
let rows = [...table.querySelectorAll('tbody tr')];
const written = rows;
const texts = new Map();
const textOf = row => texts.get(row) ?? texts.set(row, row.textContent.toLowerCase()).get(row);

function filter() {
  const [text, status, kind, dtype] = wanted.map(field => field?.value ?? '');
  const lower = text.toLowerCase();
  const shown = new Map(bodies.map(body => [body, 0]));
  let count = 0;
  for (const row of rows) {
    const fits = (!status || row.dataset.status === status) && (!kind || row.dataset.case === kind)
      && (!dtype || row.dataset.dtype === dtype) && (!lower || textOf(row).includes(lower));
    if (row.hidden === fits) row.hidden = !fits;
    count += fits;
    shown.set(row.parentNode, shown.get(row.parentNode) + fits);
  }
  for (const [body, there] of shown) {
    body.hidden = !there;
    body.style.containIntrinsicBlockSize = `${Math.round(there * height)}px`;
  }
  counted.textContent = count + ' / ' + rows.length;
}

function sortBy(head, place) {
  const order = { none: 'ascending', ascending: 'descending', descending: 'none' }[head.ariaSort ?? 'none'];
  for (const other of table.tHead.rows[0].cells) other.ariaSort = 'none';
  head.ariaSort = order;
  const isNumber = head.classList.contains('number');
  const keyOf = row => {
    const text = row.cells[place].textContent;
    if (!isNumber) return text;
    const number = text === 'nan' || text === 'inf' ? Infinity : parseFloat(text);
    return isNaN(number) ? null : number;
  };
  rows = [...written];
  if (order !== 'none') {
    const keys = new Map(rows.map(row => [row, keyOf(row)]));
    const sign = order === 'ascending' ? 1 : -1;
    const compared = (a, b) => (a > b) - (a < b);
    const absent = row => keys.get(row) === null;
    rows.sort((a, b) => absent(a) - absent(b) || (absent(a) ? 0 : sign * compared(keys.get(a), keys.get(b))));
  }
  bodies.forEach((body, number) => body.replaceChildren(...rows.slice(number * size, (number + 1) * size)));
  filter();
}

[...table.tHead.rows[0].cells].forEach((head, place) => {
  head.tabIndex = 0;
  head.addEventListener('click', () => sortBy(head, place));
  head.addEventListener('keydown', event => event.key === 'Enter' && sortBy(head, place));
});
wanted.forEach(field => field?.addEventListener('input', filter));
filter();
"""


def in_html(text: str) -> str:
    """Text in which nothing is markup and nothing is unseen."""
    return escape(visible(text))
