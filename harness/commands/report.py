"""python -m harness report"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command
from harness.languages import LANGUAGE_NAMES


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path, nargs="?", metavar="JSON")
    parser.add_argument(
        "--schema",
        choices=("report", "baseline"),
        help="print the JSON schema of a report, or of a baseline, in place of a report",
    )
    parser.add_argument(
        "--history",
        type=Path,
        nargs="+",
        default=[],
        metavar="JSON",
        help="other reports of the same device, or their folders: the HTML shows the errors of each case over all of "
        "them as small charts",
    )
    parser.add_argument("--lang", choices=LANGUAGE_NAMES, default="en")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output; .html gives HTML")


def _run(arguments: argparse.Namespace) -> int:
    from harness.report import rerender

    if arguments.schema:
        return _print_schema(arguments.schema)
    if arguments.json is None:
        before = " before --history" if arguments.history else ""
        raise ValueError(f"name a report to render, such as reports/precision.json,{before} or give --schema")
    text = rerender(arguments.json, lang=arguments.lang, output=arguments.output, history=arguments.history)
    if text is not None:
        print(text)
    return 0


def _print_schema(name: str) -> int:
    import json

    from harness import report
    from harness.upgrade import baseline

    schema = baseline.baseline_schema() if name == "baseline" else report.json_schema()
    print(json.dumps(schema, indent=1))
    return 0


COMMAND = Command(
    name="report",
    summary="Render reports/precision.json again, as markdown or HTML, without a run.",
    example="python -m harness report reports/precision.json --lang zh --output report.md",
    add=_add,
    run=_run,
)
