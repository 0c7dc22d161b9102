"""python -m harness ratchet"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reports", type=Path, nargs="+", metavar="JSON")
    parser.add_argument(
        "--every", action="store_true", help="those of presets too, not only the limits that a case sets itself"
    )


def _run(arguments: argparse.Namespace) -> int:
    from harness.report import load
    from harness.upgrade.ratchet import loose, ratchet_text

    print(
        ratchet_text(loose([row for report in arguments.reports for row in load(report).rows], every=arguments.every))
    )
    return 0


COMMAND = Command(
    name="ratchet",
    summary="List the limits of the cases that could come down, by what stored reports found; the exit status is 0 "
    "either way.",
    example="python -m harness ratchet reports/precision.json",
    add=_add,
    run=_run,
)
