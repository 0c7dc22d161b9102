"""Accuracy validation of torch models on Ascend NPUs: the same model on CPU and NPU, measured, judged, reported.

from harness import Case, Tolerance, compare, open_device, validate
"""

import sys

from harness import autoload

__version__ = "0.1.0"

# In pytest the entry point of the plugin imports this package in every run: there nothing may change until something of
# it is used.
if "_pytest" not in sys.modules:
    autoload.hold()

_LAZY = {  # name: module; none of them is imported before it is used
    "Case": "harness.case",
    "validate": "harness.run.validation",
    "Comparison": "harness.measure",
    "compare": "harness.measure",
    "CaseError": "harness.errors",
    "CheckpointError": "harness.errors",
    "DeviceError": "harness.errors",
    "HarnessError": "harness.errors",
    "RunError": "harness.errors",
    "Tolerance": "harness.judging.tolerance",
    "Verdict": "harness.judging.verdict",
    "judge": "harness.judging.checks",
    "Device": "harness.devices",
    "Stack": "harness.devices",
    "open_device": "harness.devices",
}

_WITHOUT_TORCH = ("harness.errors", "harness.measure")  # whose names are there without one that is new enough

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    from importlib import import_module

    autoload.hold()
    if _LAZY[name] not in _WITHOUT_TORCH:
        from harness.versions import require_torch

        require_torch()
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # the next use costs nothing
    return value
