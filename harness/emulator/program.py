"""Runs somebody's program over the emulated CANN: python -m harness emulate [OPTIONS] SCRIPT [ARGS…] | -m MODULE
[ARGS…].
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys
import traceback
from pathlib import Path

from harness.emulator import faults
from harness.emulator.runtime import Machine, install, raise_interrupt
from harness.errors import HarnessError

USAGE = "python -m harness emulate [OPTIONS] (SCRIPT | -m MODULE) [ARGS ...]"
UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}


def bytes_in(text: str) -> int:
    """ "64GiB" as a number of bytes.

    Raises: ValueError for a text that is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(
            f"{text!r} is no size of memory; write a number of bytes, or one with KiB, MiB or GiB, such as 64GiB"
        )
    return int(float(match[1]) * UNITS[match[2].upper()])


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which machine is played, and what is broken on it."""
    plain = Machine()
    parser.add_argument(
        "--devices", type=int, default=plain.devices, metavar="N", help="how many NPUs there are (default 1)"
    )
    parser.add_argument(
        "--memory",
        type=_typed(bytes_in),
        default=plain.memory,
        metavar="SIZE",
        help="of each, such as 64GiB (default 32GiB)",
    )
    parser.add_argument(
        "--soc", default=plain.name, metavar="NAME", help=f"what they are called (default {plain.name})"
    )
    parser.add_argument(
        "--cann",
        default=plain.cann,
        metavar="VERSION",
        help=f"the CANN version that is reported (default {plain.cann})",
    )
    parser.add_argument(
        "--fault",
        type=_typed(faults.parse),
        action="append",
        default=[],
        metavar="OPERATOR:KIND[:SETTINGS]",
        help="plant a fault, such as 'aclnnMatmul:hf32' or 'aclnnSilu:scale:by=1.001,nth=3'; may be given again",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, not a script")


def _typed(read):
    """`read` for argparse, which keeps the words of no ValueError."""

    def convert(text: str):
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def emulate(argv: list[str]) -> int:
    """Run a script or a module as Python would, with `npu` emulated. Returns its exit status.

    Raises: HarnessError when there is nothing to run or a planted fault never acted, DeviceError when nothing can be
    emulated here.
    """
    own, rest = _split(argv)
    parser = argparse.ArgumentParser(
        prog="python -m harness emulate", usage=USAGE, add_help=False, exit_on_error=False, allow_abbrev=False
    )
    add_machine_options(parser)
    try:
        options, unknown = parser.parse_known_args(own)
        if unknown:
            raise HarnessError(f"there is no option {unknown[0]}; {USAGE}")
        machine = Machine(devices=options.devices, memory=options.memory, name=options.soc, cann=options.cann)
    except argparse.ArgumentError as error:
        raise HarnessError(f"{error}; {USAGE}") from None
    if not rest:
        raise HarnessError(f"nothing to run; {USAGE}")
    if not options.module and not Path(rest[0]).exists():
        raise HarnessError(f"no script at {rest[0]}; {USAGE}")
    install(machine)
    for item in options.fault:
        faults.plant(item)
    sys.argv = list(rest)
    sys.path[0] = os.getcwd() if options.module else str(Path(rest[0]).resolve().parent)
    status = _run(rest[0], options.module)
    return _tell(options.fault) or status


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options before the program, and the program with what belongs to it."""
    position = 0
    while position < len(argv) and argv[position].startswith("-") and argv[position] != "--":
        position += 1
        if argv[position - 1] == "-m":
            break
        if "=" not in argv[position - 1]:
            position += 1
    own, rest = argv[:position], argv[position:]
    return own, rest[1:] if rest[:1] == ["--"] else rest


def _tell(planted: list[faults.Fault]) -> int:
    """Say how often each fault acted; one that never did is a failure, since the run then shows nothing about it."""
    for fault in planted:
        print(f"harness emulate: planted fault {fault.effect}", file=sys.stderr)
        if not fault.hits:
            print(f"harness emulate: {faults.idle_text(fault)}", file=sys.stderr)
    return int(any(not fault.hits for fault in planted))


def _run(program: str, module: bool) -> int:
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program, run_name="__main__")
    except SystemExit as exit:
        if exit.code is None or isinstance(exit.code, int):
            return exit.code or 0
        print(exit.code, file=sys.stderr)
        return 1
    except Exception:  # noqa: BLE001
        raise_interrupt()  # Ctrl-C while an operator ran came here as that operator's error
        traceback.print_exc()
        return 1
    return 0
