"""python -m harness bisect"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stacks",
        type=Path,
        metavar="STACKS.toml",
        help="a [[stack]] for each, the oldest first: name, and command that writes precision.json into {report}",
    )
    parser.add_argument(
        "--case", metavar="NAME", help="a case's name, or a part of test ids: the rows that decide (default: all)"
    )
    parser.add_argument(
        "--what",
        choices=("worse", "changed"),
        default="worse",
        help="bad is what is worse than the good end, as gate says (default), or any bit changed",
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("reports/bisect"),
        metavar="DIR",
        help="where runs are kept; none is run again (default reports/bisect)",
    )
    parser.add_argument("--retry", action="store_true", help="run again what could not run before")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the markdown there too")


def _run(arguments: argparse.Namespace) -> int:
    from harness.report import write_text
    from harness.upgrade.bisect import bisect

    text, result = bisect(
        arguments.stacks, case=arguments.case, what=arguments.what, state=arguments.state, retry=arguments.retry
    )
    print(text)
    if arguments.output:
        write_text(arguments.output, text + "\n")
    return 0 if result else 1


COMMAND = Command(
    name="bisect",
    summary="Find between which two of an ordered list of stacks the numbers changed; exit status 0 only when that was "
    "found.",
    example="python -m harness bisect stacks.toml --case aimv2-digits --output bisect.md\n\nstacks.toml:\n"
    '  command = ".venv-{name}/bin/pytest -k precision --report={report}"\n  timeout = 3600\n  [[stack]]\n  '
    'name = "2.9.0"\n  [[stack]]\n  name = "2.10.0"',
    add=_add,
    run=_run,
)
