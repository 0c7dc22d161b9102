"""Accuracy validation of torch models on Ascend NPUs: the same model on CPU and NPU, measured, judged, reported.

    from harness import Case, Tolerance, compare, open_device, validate
"""

import os

# With torch_npu installed and CANN not, a bare `import torch` raises: torch loads the backend through an entry point.
# harness.devices imports torch_npu itself, once it knows what is there.
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

from harness.measure import Comparison, compare  # noqa: E402  (torch is imported inside, when something is compared)
from harness.errors import CaseError, CheckpointError, DeviceError, HarnessError  # noqa: E402

_LAZY = {  # name: module; these import torch
    "Case": "harness.case",
    "validate": "harness.case",
    "Tolerance": "harness.gate",
    "Verdict": "harness.gate",
    "judge": "harness.gate",
    "Device": "harness.devices",
    "Stack": "harness.devices",
    "open_device": "harness.devices",
}

__all__ = ["CaseError", "CheckpointError", "Comparison", "DeviceError", "HarnessError", "compare", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
