"""Reports as files: JSON that appears whole or not at all, and markdown and HTML that are made from it alone."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.report import journal as journals
from harness.report import layout
from harness.report.content import READERS, SCHEMA, Report, build
from harness.report.document import to_short_markdown
from harness.report.history import Snapshot, by_date
from harness.report.page import page
from harness.report.rejudge import NamedVerdict
from harness.report.rows import Row, row
from harness.report.text import document
from harness.report.words import LANGUAGES
from harness.typed_json import Mismatch, named, parse_json, read_fields

PAIRS = "precision-pairs/1"
_DERIVED = ("headline", "outcome", "rows", layout.DIGEST, "cards")  # of a stored report: what its rows say
JSON_NAME = "precision.json"
MARKDOWN_NAME = "precision.md"
PREVIOUS = {name: name.replace(".", "-previous.") for name in (JSON_NAME, MARKDOWN_NAME)}  # of the run before


PREVIOUS_JSON = PREVIOUS[JSON_NAME]


def retire(directory: Path) -> Path | None:
    """Give the report in `directory` the name of an earlier run's: precision-previous.json and precision-previous.md.
    Returns the path of the markdown; None where there was no report.
    """
    there = [name for name in PREVIOUS if (directory / name).exists()]
    for name in there:
        os.replace(directory / name, directory / PREVIOUS[name])
    return directory / PREVIOUS[MARKDOWN_NAME] if there else None


def write(report: Report, directory: Path, *, lang: str = "en") -> tuple[Path, Path]:
    """Write the JSON and the markdown into `directory`, made if absent; returns their paths."""
    return Writer(directory, lang).write(report)


class Writer:
    """Writes a report that grows, again and again, each file when its turn has come.

    A run may lose what was written last: its journal (`harness.report.journal`) holds every row. The JSON of a few rows
    takes a millisecond, that of thousands a second, the markdown of hundreds a second; so the time that a run spends on
    writing stays a small part of its own, whatever the number of rows.
    """

    TURN = 100  # a file waits for this many times as long as it took,
    AT_ONCE = 0.01  # seconds; unless it took no longer than this: some hundred rows

    def __init__(self, directory: Path, lang: str = "en"):
        self.directory, self.lang = directory, lang
        self._lines: dict[int, tuple[Row, str]] = {}  # by id: the row, so that the id stays its own, and its JSON
        self._due = dict.fromkeys((JSON_NAME, MARKDOWN_NAME), -math.inf)  # when each may be written again

    @property
    def is_due(self) -> bool:
        """Whether the JSON's turn has come."""
        return time.perf_counter() >= self._due[JSON_NAME]

    def write(self, report: Report, *, last: bool = True) -> tuple[Path, Path]:
        """Write the JSON whole; the markdown too, the `last` time or where its turn has come. Returns both paths."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._timed(JSON_NAME, lambda: self._json(report))
        if last or time.perf_counter() >= self._due[MARKDOWN_NAME]:
            self._timed(MARKDOWN_NAME, lambda: render(report, lang=self.lang))
        return self.directory / JSON_NAME, self.directory / MARKDOWN_NAME

    def _timed(self, name: str, text: Callable[[], str]) -> None:
        began = time.perf_counter()
        write_text(self.directory / name, text())
        ended = time.perf_counter()
        took = ended - began
        self._due[name] = ended + (self.TURN * took if took > self.AT_ONCE else 0.0)

    def _json(self, report: Report) -> str:
        return layout.file_text(report.head(), map(self._line, report.rows))

    def _line(self, row: Row) -> str:
        if id(row) not in self._lines:
            self._lines[id(row)] = row, layout.row_text(row)
        return self._lines[id(row)][1]


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all: a neighbour is written first and takes its name."""
    partial = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex[:12]}")  # two hosts may have one process id
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


LONGEST_STEM = 150  # bytes; names of files may have 255


def stem_of(name: str) -> str:
    """A name that a file or folder may have on any system: `name` itself, or what is safe of it with a digest, so that
    no two names give one.

    >>> [stem_of(name) for name in ("a_b", "a b", "a/b")]
    ['a_b', 'a_b-c8687a08', 'a_b-c14cddc0']
    """
    safe = safe_of(name)
    if safe == name and len(name.encode()) <= LONGEST_STEM:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{safe.encode('utf-8', 'replace')[:LONGEST_STEM].decode(errors='ignore')}-{digest}"


def safe_of(name: str) -> str:
    """A name with "_" for what a file's name may not have everywhere; several names may give one."""
    return "".join(item if item.isalnum() or item in "-_." else "_" for item in name)


def write_pairs(pairs: Sequence[NamedVerdict], path: Path) -> None:
    """Write what was measured of pairs of tensors, at full precision: name, status, reasons and numbers of each."""
    rows = [
        row(test=pair.name, case=pair.name, dtype=None, seed=None, verdict=pair.verdict).to_dict() for pair in pairs
    ]
    entries = [
        {name: value for name, value in item.items() if value is not None and name not in ("test", "dtype", "seed")}
        for item in rows
    ]
    write_text(
        path, json.dumps({"schema": PAIRS, "pairs": entries}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Within it nothing looks for cyclic garbage. Reading a large report makes millions of values of which none is
    garbage, and looking through them again and again would take as long as all the rest.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def load(path: Path) -> Report:
    """Read a stored report, also one of an older version; of a folder, the report in it.

    Where the run did not end, its journal lies beside the report and holds more rows: then it is read.

    Raises: HarnessError, in one sentence, when the file is not a report of this schema, or holds a value that cannot
    be.
    """
    path = path / JSON_NAME if path.is_dir() else path
    journal = path.with_name(journals.NAME)
    try:
        with without_collector():
            if path.name == JSON_NAME and journal.is_file():
                return journals.read_journal(journal)
            return _report_of(path, path.read_bytes())
    except FileNotFoundError:
        raise HarnessError(f"no report at {path}; `pytest -k precision` writes reports/{JSON_NAME}") from None
    except OSError as error:
        raise HarnessError(
            f"{path} cannot be read ({error.strerror}); name a report that `pytest -k precision` wrote"
        ) from None
    except ValueError as error:
        raise HarnessError(
            f"{path} is not a report: it is not JSON ({error}); `pytest -k precision` writes one"
        ) from None


def _report_of(path: Path, data: bytes) -> Report:
    """The report that a file holds. Raises: ValueError where it is not JSON in UTF-8; HarnessError."""
    known = layout.unchanged(data)
    stored = parse_json(data.decode("utf-8")) if known is None else known.head | {"rows": known.rows}
    result = stored.get("schema") if isinstance(stored, dict) else None
    if result != SCHEMA:
        raise HarnessError(
            f"{path} has schema {result if result is None else named(result)} where {SCHEMA!r} was expected; "
            "write it again with this version"
        )
    missing = sorted({"created", "backend", "headline", "stack", "rows", "performance"} - stored.keys())
    if missing:
        raise HarnessError(f"{path} lacks {', '.join(missing)}; write it again with `pytest -k precision`")
    try:
        read = read_fields(stored, READERS, set())
    except Mismatch as error:
        raise HarnessError(f"{path}: {error}; write it again with `pytest -k precision`") from None
    measured = itertools.repeat(None) if known is None else (partial(layout.value_of, line) for line in known.measured)
    rows = tuple(
        Row.from_dict(item, f"{path}: row {number}", measured=later)
        for number, (item, later) in enumerate(zip(stored["rows"], measured), 1)
    )
    return Report(rows=rows, **{name: value for name, value in read.items() if name not in _DERIVED})


def render(
    report: Report,
    *,
    lang: str = "en",
    html: bool = False,
    folder: Path | None = None,
    history: Sequence[Snapshot] = (),
) -> str:
    """The report as markdown, which is never longer than a comment on GitHub may be, or as one HTML page, which then
    holds the pictures in `folder` and charts of its `history`.
    """
    if lang not in LANGUAGES:
        raise ValueError(f"no report language is called {lang!r}; there are {', '.join(LANGUAGES)}")
    if html:
        return page(report, lang, folder, history)
    return to_short_markdown(document(report, lang), left_out=LANGUAGES[lang]["left_out"])


def performance_text(rows: Sequence[Mapping[str, Any]], *, backend: str, stack: Mapping[str, Any]) -> str:
    """The performance table alone, as markdown, under the stack that it was measured on."""
    return render(build([], stack=stack, backend=backend, performance=rows)).rstrip("\n")


def rerender(path: Path, *, lang: str = "en", output: Path | None = None, history: Sequence[Path] = ()) -> str | None:
    """Render a stored report again: returns markdown, or writes `output`, as HTML where its name ends in .html.

    `history`: other reports of the device, in any order, with whose errors those of this one are charted in the HTML;
    the report itself may be among them.

    Raises: ValueError for a history without HTML; HarnessError as `load`, or where a report of the history was
    measured on another device or backend.
    """
    html = output is not None and output.suffix.lower() in (".html", ".htm")
    if history and not html:
        raise ValueError("--history draws charts, which markdown cannot hold; add --output report.html")
    with without_collector():
        report = load(path)
        older = {str(item): Snapshot.of(load(item)) for item in history if not _same_file(item, path)}
        snapshots = by_date(Snapshot.of(report), older) if history else []
        folder = path if path.is_dir() else path.parent
        text = render(report, lang=lang, html=html, folder=folder, history=snapshots)
    if output is None:
        return text.rstrip("\n")
    write_text(output, text)
    return None


def _same_file(path: Path, other: Path) -> bool:
    """Whether two paths name one report, each by its file or its folder."""
    first, second = (item / JSON_NAME if item.is_dir() else item for item in (path, other))
    return first.resolve() == second.resolve()
