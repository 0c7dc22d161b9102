"""Which torch the harness needs, and whether the installed one is: asked without importing torch, which takes a
second.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib import metadata, util

from harness.errors import TorchError

OLDEST = (2, 5)  # the oldest torch that the harness is tested with is 2.5.1


@functools.cache
def require_torch() -> None:
    """Return where the installed torch is new enough.

    Raises: TorchError where it is older than `OLDEST`, or not installed.
    """
    needed = f"{OLDEST[0]}.{OLDEST[1]}"
    result = torch_version()
    if result is None:
        raise TorchError(
            f"torch is not installed and the harness needs {needed} or later: pip install torch; "
            "on an Ascend machine the one that its torch_npu needs"
        )
    numbers = re.match(r"(\d+)\.(\d+)", result)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        raise TorchError(
            f"torch {result} is installed and the harness needs {needed} or later: install a newer one; on an "
            "Ascend machine "
            "together with its torch_npu (pip install torch==2.5.1 torch_npu==2.5.1 is the oldest pair) and a "
            "CANN that fits both"
        )


def torch_version() -> str | None:
    """The installed torch's version, "2.13.0+cpu"; None where there is none."""
    if "torch" in sys.modules:
        return str(getattr(sys.modules["torch"], "__version__", "")) or None
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return _imported_version() if util.find_spec("torch") is not None else None


def _imported_version() -> str | None:
    """The version of a torch that no package manager knows of, built in place."""
    import torch

    return str(torch.__version__)
