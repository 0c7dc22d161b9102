"""Programs over the emulated CANN in a process of their own; python -m harness.tests.execute CODE runs its argument."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 600  # seconds that a program may take, many times what the longest needs


def emulated(body, *options, path=None, **environment):
    """Run Python code under `python -m harness emulate OPTIONS`, from a file where `path` is given. Returns the ended
    process.

    A test is skipped where there is no torch_npu, and fails with what the program printed where it does not end.
    """
    from harness.tests.needs import skip_without_torch_npu  # which imports pytest, that the programs need not

    skip_without_torch_npu()
    prepared = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ASCEND", "LD_LIBRARY_PATH", "EMULATED"))
    } | environment
    program = ["-m", "harness.tests.execute", body]
    if path is not None:
        path.write_text(body)
        program = [str(path)]
    command = [sys.executable, "-m", "harness", "emulate", *options, *program]
    try:
        return subprocess.run(command, cwd=ROOT, env=prepared, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        said = "\n".join((part or b"").decode(errors="replace") for part in (error.stdout, error.stderr))
        raise AssertionError(f"the program did not end within {LIMIT} s; it printed:\n{said}") from None


if __name__ == "__main__":
    exec(compile(sys.argv[1], "<argument>", "exec"), {"__name__": "__main__"})
