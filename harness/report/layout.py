"""How a report lies in its file: the head, then each row in two lines, and a digest by which a reader sees that the
rows are as they were written.

    {
     "schema": "precision-report/1",
     …
     "rows_sha256": "5f0c…",
     "rows": [
    {"test": …, "notes": [],
     "measured": {…}},
    {"test": …, "notes": [],
     "measured": {…}}
     ]
    }

What was measured of the outputs is two thirds of a row, and few readers need it. Where the digest is that of the rows,
this program wrote them, and the second lines need not be read. Where it is not, since the file was changed, or another
program wrote it, all of it is read and checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.report.rows import Row
from harness.typed_json import parse_json

DIGEST = "rows_sha256"
_BEGIN, _END = b'\n "rows": [\n', b"\n ]\n}\n"
_MEASURED = ' "measured": '


def row_text(row: Row) -> str:
    """A row as the file holds it."""
    stored = row.to_dict()
    measured = _json(stored.pop("measured"))
    return f"{_json(stored)[:-1]},\n{_MEASURED}{measured}}}"


def file_text(head: Mapping[str, Any], lines: Iterable[str]) -> str:
    """The whole file: the report without its rows, and each row as `row_text` gives it."""
    rows = ",\n".join(lines)
    digest = hashlib.sha256(rows.encode()).hexdigest()
    begin = json.dumps({**head, DIGEST: digest}, indent=1, ensure_ascii=False, allow_nan=False)
    return f"{begin.removesuffix('}').rstrip()},{_BEGIN.decode()}{rows}{_END.decode()}"


@dataclass(frozen=True, kw_only=True)
class Unchanged:
    """A file whose rows are as they were written."""

    head: dict[str, Any]
    rows: list[Any]  # without `measured`
    measured: list[memoryview]  # the second line of each row; see `value_of`


def unchanged(data: bytes) -> Unchanged | None:
    """What a file holds, without what was measured of the outputs read; None where its rows are not those that its
    digest is of.
    """
    begin, end = data.find(_BEGIN), len(data) - len(_END)
    if begin < 0 or not data.endswith(_END):
        return None
    start, view = begin + len(_BEGIN), memoryview(data)
    try:
        head = parse_json(f"{data[:begin].decode().removesuffix(',')}\n}}")
        if not isinstance(head, dict) or head.get(DIGEST) != hashlib.sha256(view[start:end]).hexdigest():
            return None
        rows, measured = [], []
        while start < end:
            first = data.index(b",\n", start)
            last = data.index(b"\n", first + 2)
            rows.append(json.loads(f"{str(view[start:first], 'utf-8')}}}"))
            measured.append(view[first + 2 : last])
            start = last + 1
    except (ValueError, RecursionError):
        return None
    return Unchanged(head=head, rows=rows, measured=measured)


def value_of(line: memoryview) -> str:
    """The JSON text of what was measured of a row's outputs, from the row's second line."""
    return str(line, "utf-8").removesuffix(",").removesuffix("}").removeprefix(_MEASURED)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
