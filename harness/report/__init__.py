"""Rows and a Stack in, one JSON file out; markdown and HTML are rendered from that file alone.

report = build(rows, stack=..., backend=..., performance=[])
write(report, Path("reports"), lang="en")        # precision.json and precision.md, each appears whole or not at all
rerender(Path("reports/precision.json"), lang="zh", output=Path("report.html"))
"""

from harness.report.content import SCHEMA, Report, Timed, build, device_key, json_schema, stack_of_report
from harness.report.files import (
    JSON_NAME,
    MARKDOWN_NAME,
    PREVIOUS_JSON,
    Writer,
    load,
    performance_text,
    render,
    rerender,
    retire,
    safe_of,
    stem_of,
    without_collector,
    write,
    write_pairs,
    write_text,
)
from harness.report.rejudge import pairs_text, rejudged_rows, upgrade_text, verdicts_text
from harness.report.rows import Row, jsonable, row
from harness.report.text import stacks_title

__all__ = [
    "JSON_NAME",
    "MARKDOWN_NAME",
    "PREVIOUS_JSON",
    "SCHEMA",
    "Report",
    "Row",
    "Timed",
    "Writer",
    "build",
    "device_key",
    "json_schema",
    "jsonable",
    "load",
    "pairs_text",
    "performance_text",
    "rejudged_rows",
    "render",
    "rerender",
    "retire",
    "row",
    "safe_of",
    "stack_of_report",
    "stacks_title",
    "stem_of",
    "upgrade_text",
    "verdicts_text",
    "without_collector",
    "write",
    "write_pairs",
    "write_text",
]
