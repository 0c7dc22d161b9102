"""python -m harness merge"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command
from harness.languages import LANGUAGE_NAMES


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports", type=Path, nargs="+", metavar="JSON", help="the parts, or the folders that hold them"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="where the one report goes")
    parser.add_argument("--lang", choices=LANGUAGE_NAMES, default="en")
    parser.add_argument(
        "--different-stacks", action="store_true", help="merge reports of different stacks too, under the first one's"
    )


def _run(arguments: argparse.Namespace) -> int:
    from harness.report import load, write
    from harness.report.format import tally
    from harness.report.merge import merge

    reports = {path: load(path) for path in arguments.reports}
    if len(reports) < 2:
        raise ValueError("one report was given where two or more are merged; name each part")
    merged = merge(reports, different_stacks=arguments.different_stacks)
    _, markdown = write(merged, arguments.output, lang=arguments.lang)
    print(f"{tally(merged.rows)} of {len(reports)} reports: {markdown}")
    return 0


COMMAND = Command(
    name="merge",
    summary="Make one report of the parts that several machines ran (--precision-shard).",
    example="python -m harness merge part1/precision.json part2/precision.json --output reports/whole",
    add=_add,
    run=_run,
)
