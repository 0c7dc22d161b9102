"""python -m harness emulate"""

from __future__ import annotations

import argparse

from harness.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    from harness.emulator.program import USAGE, add_machine_options

    parser.usage = USAGE
    add_machine_options(parser)
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT | -m MODULE, ARGS")


def _run(arguments: argparse.Namespace) -> int:
    from harness.emulator import emulate

    return emulate(arguments.program)


COMMAND = Command(
    name="emulate",
    summary="Run a torch_npu program over the emulated CANN.",
    example="python -m harness emulate train.py --epochs 1\n"
    "  python -m harness emulate --fault aclnnSilu:scale:by=1.001 -m package.module ARGS",
    add=_add,
    run=_run,
)
