"""`python -m harness COMMAND`: every command declares itself in a module of its own.

The modules import torch only where they work, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys

from harness.commands import (
    bench,
    bisect,
    calibrate,
    card,
    compare,
    convert,
    doctor,
    emulate,
    gate,
    infer,
    judge,
    locate,
    merge,
    ratchet,
    report,
    score,
)
from harness.commands.base import without_prefix
from harness.errors import HarnessError
from harness.typed_json import shown

COMMANDS = (
    card.COMMAND,
    infer.COMMAND,
    convert.COMMAND,
    bench.COMMAND,
    report.COMMAND,
    merge.COMMAND,
    compare.COMMAND,
    judge.COMMAND,
    gate.COMMAND,
    score.COMMAND,
    bisect.COMMAND,
    locate.COMMAND,
    ratchet.COMMAND,
    calibrate.COMMAND,
    doctor.COMMAND,
    emulate.COMMAND,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 when it did what it was asked, 1 when it failed, 2 for bad usage."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["emulate"] and argv[1:2] not in (
        ["-h"],
        ["--help"],
    ):  # what follows belongs to the program, flags and all
        arguments = argparse.Namespace(command="emulate", run=emulate.COMMAND.run, program=argv[1:])
    else:
        arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (HarnessError, ValueError, OSError) as error:
        print(f"harness {arguments.command}: {without_prefix(_one_line(error), arguments)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"harness {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()), 4000) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m harness",
        description=(
            "Accuracy validation of torch models on Ascend NPUs. The accuracy cases run by `pytest -k precision`."
        ),
        epilog=f"example:\n  {card.COMMAND.example}\n  python -m harness COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        added = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=command.usage,
        )
        command.add(added)
        added.set_defaults(run=command.run)
    return parser
