"""Rows and a Stack in, one JSON file out; markdown and HTML are rendered from that file alone.

    report = build(rows, stack=..., backend=..., performance=[])
    write(report, Path("reports"), lang="en")        # precision.json and precision.md, each appears whole or not at all
    rerender(Path("reports/precision.json"), lang="zh", output=Path("report.html"))
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from harness.errors import HarnessError
from harness.gate import NEW, STATUSES
from harness.known import KNOWN
from harness.report.again import judged, pairs_text, upgrade_text, verdicts_text
from harness.report.document import to_html, to_markdown
from harness.report.rows import jsonable, row
from harness.report.text import LANGUAGES, document

SCHEMA = "precision-report/1"
PAIRS = "precision-pairs/1"
JSON_NAME = "precision.json"
MARKDOWN_NAME = "precision.md"

__all__ = [
    "SCHEMA", "Writer", "build", "jsonable", "judged", "load", "pairs_text", "performance_text", "rerender", "render", "row", "upgrade_text", "verdicts_text", "write",
    "write_pairs", "write_text",
]  # fmt: skip


def build(rows: Sequence[Mapping], *, stack: Mapping, backend: str | None, performance: Sequence[Mapping] = ()) -> dict:
    """The report as it is stored: rows as `row` makes them, the counts derived from them. Floats keep full precision."""
    headline = {status: sum(each["status"] == status for each in rows) for status in STATUSES}
    headline[NEW] = sum(NEW in each["marks"] for each in rows)
    known = sum(KNOWN in each["marks"] for each in rows)
    headline |= {KNOWN: known} if known else {}
    return jsonable(
        {
            "schema": SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "backend": backend,
            "headline": headline,
            "stack": stack,
            "performance": list(performance),
        }
    ) | {"rows": list(rows)}  # which `row` made fit for JSON


def write(report: Mapping, directory: Path, *, lang: str = "en") -> tuple[Path, Path]:
    """Write the JSON and the markdown into `directory`, made if absent; returns their paths."""
    return Writer(directory, lang).write(report)


class Writer:
    """Writes a report that grows, again and again: what was said of a row is kept, and the markdown follows when its turn has come.

    The JSON is written each time, so that a process that dies loses no row; of one row it takes microseconds, the markdown of
    hundreds takes a second.
    """

    TURN = 20  # the markdown waits for this many times as long as it took

    def __init__(self, directory: Path, lang: str = "en"):
        self.directory, self.lang = directory, lang
        self._lines: dict[int, tuple[Mapping, str]] = {}  # by id: the row, so that the id stays its own, and its JSON
        self._due = -math.inf

    def write(self, report: Mapping, *, last: bool = True) -> tuple[Path, Path]:
        """Both files, whole; before the `last` time the rows must not have changed and the markdown may be left as it is."""
        self.directory.mkdir(parents=True, exist_ok=True)
        source, rendered = self.directory / JSON_NAME, self.directory / MARKDOWN_NAME
        if last:
            self._lines = {}
        head = json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1, ensure_ascii=False, allow_nan=False)
        rows = ",\n".join(map(self._line, report["rows"]))
        write_text(source, f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n')
        began = time.perf_counter()
        if last or began >= self._due:
            write_text(rendered, to_markdown(document(report, self.lang)))
            ended = time.perf_counter()
            self._due = ended + self.TURN * (ended - began)
        return source, rendered

    def _line(self, row: Mapping) -> str:
        if id(row) not in self._lines:
            self._lines[id(row)] = row, json.dumps(row, ensure_ascii=False, allow_nan=False)
        return self._lines[id(row)][1]


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all: a neighbour is written first and takes its name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_pairs(pairs: Sequence, path: Path) -> None:
    """Write what was measured of pairs of tensors, at full precision: name, status, reasons and numbers of each."""
    rows = [row(test=each.name, case=each.name, dtype=None, seed=None, verdict=each.verdict) for each in pairs]
    kept = [{name: value for name, value in each.items() if value is not None and name not in ("test", "dtype", "seed")} for each in rows]
    write_text(path, json.dumps({"schema": PAIRS, "pairs": kept}, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load(path: Path) -> dict:
    """Read a stored report.

    Raises: HarnessError when the file is not a report of this schema.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HarnessError(f"no report at {path}; `pytest -k precision` writes reports/{JSON_NAME}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HarnessError(f"{path} is not a report: it is not JSON ({error}); `pytest -k precision` writes one") from None
    found = report.get("schema") if isinstance(report, dict) else None
    if found != SCHEMA:
        raise HarnessError(f"{path} has schema {found!r} where {SCHEMA!r} was expected; write it again with this version")
    missing = sorted({"created", "backend", "headline", "stack", "rows", "performance"} - report.keys())
    if missing:
        raise HarnessError(f"{path} lacks {', '.join(missing)}; write it again with `pytest -k precision`")
    return report


def render(report: Mapping, *, lang: str = "en", html: bool = False) -> str:
    """The report as markdown, or as one HTML page."""
    if lang not in LANGUAGES:
        raise ValueError(f"no report language is called {lang!r}; there are {', '.join(LANGUAGES)}")
    blocks = document(report, lang)
    return to_html(blocks, lang) if html else to_markdown(blocks)


def performance_text(rows: Sequence[Mapping], *, backend: str, stack: Mapping) -> str:
    """The performance table alone, as markdown, under the stack that it was measured on."""
    return render(build([], stack=stack, backend=backend, performance=rows)).rstrip("\n")


def rerender(path: Path, *, lang: str = "en", output: Path | None = None) -> str | None:
    """Render a stored report again: returns markdown, or writes `output`, as HTML where its name ends in .html."""
    html = output is not None and output.suffix.lower() in (".html", ".htm")
    text = render(load(path), lang=lang, html=html)
    if output is None:
        return text.rstrip("\n")
    write_text(output, text)
    return None
