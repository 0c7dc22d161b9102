"""Whether `import torch` imports torch_npu by itself.

torch imports every installed backend through an entry point. Where torch_npu is installed and CANN is not, a bare
`import torch` therefore raises. The harness holds that back until `harness.devices` has put a CANN underneath, and
restores it afterwards, so that a user's child processes see the NPU.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "TORCH_DEVICE_BACKEND_AUTOLOAD"
# its value before `hold`, for child processes that restore it themselves; empty: it was not set
BEFORE = "HARNESS_AUTOLOAD_BEFORE"
_before: list[str | None] = []  # the variable's value before `hold`; empty where nothing is held back


def hold() -> None:
    """Keep the `import torch` of this process, and of its children, from importing torch_npu; nothing where torch is
    imported already.
    """
    if "torch" in sys.modules:
        return
    if not _before:
        inherited = (
            os.environ.get(BEFORE) if os.environ.get(VARIABLE) == "0" else None
        )  # from a process that holds it back, as xdist's
        _before.append(os.environ.get(VARIABLE) if inherited is None else inherited or None)
    os.environ |= {VARIABLE: "0", BEFORE: _before[0] or ""}


def release() -> None:
    """Restore the variable as it was before `hold`: a child process's `import torch` finds the NPU again."""
    if not _before:
        return
    value = _before.pop()
    os.environ.pop(BEFORE, None)
    if value is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = value
