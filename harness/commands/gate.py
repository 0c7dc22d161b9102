"""python -m harness gate"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reports",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="two or more, the oldest first; the last two decide the exit status",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the markdown there too, for a pull request or a step summary"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every transition there")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw each case's error over the reports, as .png, .svg or .pdf; needs matplotlib",
    )
    parser.add_argument("--every", action="store_true", help="list the IDENTICAL rows too")
    parser.add_argument(
        "--subset",
        action="store_true",
        help="the newer report is of a part of the rows, a nightly run say: compare these alone",
    )


def _run(arguments: argparse.Namespace) -> int:
    from harness.report import without_collector

    with without_collector():
        return _gate(arguments)


def _gate(arguments: argparse.Namespace) -> int:
    import json

    from harness.report import jsonable, load, stacks_title, upgrade_text, write_text
    from harness.upgrade.transitions import compare_reports

    if len(arguments.reports) < 2:
        raise ValueError("one report was given where two or more are compared; give the older one first")
    stored = [load(report) for report in arguments.reports]
    result = [compare_reports(*item, subset=arguments.subset) for item in zip(stored, stored[1:])]
    titles = [stacks_title(*item) for item in zip(stored, stored[1:])]
    text = "\n\n".join(upgrade_text(item, title=title, every=arguments.every) for item, title in zip(result, titles))
    print(text)
    if arguments.output:
        write_text(arguments.output, text + "\n")
    if arguments.json:
        write_text(
            arguments.json,
            json.dumps(jsonable([item.to_dict() for item in result]), indent=1, ensure_ascii=False, allow_nan=False)
            + "\n",
        )
    if arguments.plot:
        from harness.report.plot import plot_history
        from harness.upgrade.baseline import error_of

        plot_history(stored, error_of, arguments.plot)
    return 0 if result[-1].passed else 1


COMMAND = Command(
    name="gate",
    summary="Hold a report against an older one: what broke, regressed, drifted, improved, went missing, and what "
    "changed in the stack.",
    example="python -m harness gate before/precision.json after/precision.json --output upgrade.md",
    add=_add,
    run=_run,
)
