"""python -m harness judge"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command, add_preset
from harness.errors import HarnessError


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("json", type=Path, metavar="JSON")
    add_preset(parser, "default: what each row was judged by")


def _run(arguments: argparse.Namespace) -> int:
    from harness.report import load, rejudged_rows, verdicts_text

    report = load(arguments.json)
    result = rejudged_rows(report, arguments.preset)
    if not result:
        raise HarnessError(f"{arguments.json} holds no rows to judge; `pytest -k precision` writes them")
    print(verdicts_text(result, title=f"{arguments.json}, {arguments.preset or 'as it was judged'}"))
    statuses = {verdict.status for _, verdict in result}
    return 0 if "PASS" in statuses and statuses <= {"PASS", "SKIPPED"} else 1


COMMAND = Command(
    name="judge",
    summary="Judge stored results again, without a run; exit status 0 only when all pass.",
    example="python -m harness judge reports/precision.json --preset cann",
    add=_add,
    run=_run,
)
