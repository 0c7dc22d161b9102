"""Programs over the emulated CANN in a process of their own; python -m harness.tests.execute CODE runs its argument."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def emulated(body, *options, path=None, **environment):
    """Run Python code under `python -m harness emulate OPTIONS`, from a file where `path` is given. Returns the ended process.

    A test is skipped where there is no torch_npu.
    """
    from harness.tests.needs import skip_without_torch_npu  # which imports pytest, that the programs need not

    skip_without_torch_npu()
    prepared = {name: value for name, value in os.environ.items() if not name.startswith(("ASCEND", "LD_LIBRARY_PATH", "EMULATED"))} | environment
    program = ["-m", "harness.tests.execute", body]
    if path is not None:
        path.write_text(body)
        program = [str(path)]
    command = [sys.executable, "-m", "harness", "emulate", *options, *program]
    return subprocess.run(command, cwd=ROOT, env=prepared, capture_output=True, text=True, timeout=600)


if __name__ == "__main__":
    exec(compile(sys.argv[1], "<argument>", "exec"), {"__name__": "__main__"})
