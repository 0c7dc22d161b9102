"""The environment of a user's shell, for processes that tests start: without what an emulated device leaves to its
children.
"""

import os

OURS = ("ASCEND", "EMULATED", "LD_LIBRARY_PATH", "TASK_QUEUE", "TORCH_DEVICE")


def of_a_shell(*without, **more):
    """This process's variables but OURS and those that begin with one of `without`; `more` are added.

    >>> of_a_shell(LANG="C")["LANG"]
    'C'
    """
    return {name: value for name, value in os.environ.items() if not name.startswith((*OURS, *without))} | more
