"""Runs somebody's program over the emulated CANN: python -m harness emulate SCRIPT [ARGS…] | -m MODULE [ARGS…]."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

from harness.emulator.runtime import install
from harness.errors import HarnessError

USAGE = "python -m harness emulate SCRIPT [ARGS…], or python -m harness emulate -m MODULE [ARGS…]"


def emulate(argv: list[str]) -> int:
    """Run a script or a module as Python would, with `npu` emulated. Returns its exit status.

    Raises: HarnessError when there is nothing to run, DeviceError when nothing can be emulated here.
    """
    if argv[:1] == ["--"]:
        argv = argv[1:]
    module = argv[:1] == ["-m"]
    program, arguments = (argv[1:2], argv[2:]) if module else (argv[:1], argv[1:])
    if not program:
        raise HarnessError(f"nothing to run; {USAGE}")
    if not module and not Path(program[0]).exists():
        raise HarnessError(f"no script at {program[0]}; {USAGE}")
    install()
    sys.argv = [program[0], *arguments]
    sys.path[0] = os.getcwd() if module else str(Path(program[0]).resolve().parent)
    return _run(program[0], module)


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
    except Exception:
        traceback.print_exc()
        return 1
    return 0
