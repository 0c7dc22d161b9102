"""The environment of a user's shell, for processes that tests start: without what an emulated device leaves to its
children.
"""

import os
import subprocess
import sys

OURS = ("ASCEND", "EMULATED", "LD_LIBRARY_PATH", "TASK_QUEUE", "TORCH_DEVICE")


def of_a_shell(*without, **more):
    """This process's variables but OURS and those that begin with one of `without`; `more` are added.

    >>> of_a_shell(LANG="C")["LANG"]
    'C'
    """
    return {name: value for name, value in os.environ.items() if not name.startswith((*OURS, *without))} | more


def pytest_of_a_shell(folder, *arguments, **more):
    """A finished run of the accuracy tests in `folder` on an emulated device, as a user starts it; `more` are variables
    of its environment.
    """
    command = [sys.executable, "-m", "pytest", "-k", "precision", "--device=emulated", *arguments]
    return subprocess.run(command, cwd=folder, env=of_a_shell(**more), capture_output=True, text=True, timeout=300)
