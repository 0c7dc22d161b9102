"""What is installed, whether it fits together, and whether the device answers: what `python -m harness doctor`
prints.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata

from tabulate import tabulate

from harness.errors import HarnessError, TorchError
from harness.versions import require_torch

# torch_npu and the CANN it was released with: Ascend/pytorch, COMPATIBILITY.en.md and release notes. A line that stands
# for several CANN minors is written as they are; what is not here is unlisted, which is not the same as wrong.
COMPATIBLE = {
    "2.12.0": ("9.1",), "2.11.0": ("9.1",), "2.10.0.post4": ("9.1",), "2.9.0.post6": ("9.1",), "2.7.1.post8": ("9.1",),
    "2.9.0.post2": ("9.0",), "2.8.0.post4": ("9.0",), "2.7.1.post4": ("9.0",),
    "2.9.0": ("8.5",), "2.8.0.post2": ("8.5",), "2.7.1.post2": ("8.5",), "2.6.0.post5": ("8.5",),
    "2.8.0": ("8.3.RC1",), "2.7.1": ("8.3.RC1",), "2.6.0.post3": ("8.3.RC1",), "2.1.0.post17": ("8.3.RC1",),
    "2.6.0": ("8.2.RC1",), "2.5.1.post1": ("8.2.RC1",), "2.1.0.post13": ("8.2.RC1",),
    "2.5.1": ("8.1.RC1",), "2.4.0.post4": ("8.1.RC1",), "2.3.1.post6": ("8.1.RC1",), "2.1.0.post12": ("8.1.RC1",),
    "2.4.0.post2": ("8.0",), "2.3.1.post4": ("8.0",), "2.1.0.post10": ("8.0",),
}  # fmt: skip
_ACROSS = ("8.5", "9.0", "9.1")  # the releases 7.3, 26.0 and 26.1 of torch_npu are declared to run with each of these
PYTHONS = {  # the Pythons 3.x that a torch_npu has wheels for: the same document
    "2.1": (8, 11), "2.3": (8, 11), "2.4": (8, 11), "2.5": (9, 11), "2.6": (9, 11), "2.7": (9, 13), "2.8": (9, 13),
    "2.9": (10, 13), "2.10": (10, 13), "2.11": (10, 14), "2.12": (10, 14), "2.13": (10, 14),
}  # fmt: skip


def doctor(spec: str = "auto") -> tuple[str, bool]:
    """The stack, the checks and a small computation on the device, as text; False when the device cannot run.

    Raises: ValueError for a word that is no device.
    """
    try:
        require_torch()
    except TorchError as error:
        return _text({}, [_python_check(), ("torch", "FAILED", str(error))]), False
    checks = [_python_check(), _torch_check()]
    try:
        from harness.devices import open_device

        device = open_device(spec)
    except HarnessError as error:
        return _text({}, [*checks, ("device", "FAILED", str(error))]), False
    except ImportError as error:
        return _text({}, [*checks, ("device", "FAILED", f"torch cannot be imported: {error}")]), False
    stack = device.stack.to_dict()
    checks += [_cann_check(stack), _numpy_check(stack), _answer_check(device)]
    checks.append(
        ("device", "ok", f"{device.torch_device} is {device.name}, backend {device.backend}: {device.reason}")
    )
    return _text(stack, [check for check in checks if check]), all(check[1] != "FAILED" for check in checks if check)


def _text(stack: dict, checks: list[tuple[str, str, str]]) -> str:
    rows = [(name, value) for name, value in stack.items() if value not in (None, {})]
    parts = [tabulate(rows, headers=("component", "value"), tablefmt="simple", disable_numparse=True)] if rows else []
    return "\n\n".join([*parts, "\n".join(f"{name:<12} {result:<9} {words}" for name, result, words in checks)])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python_check() -> tuple[str, str, str]:
    result, version = sys.version_info[:2], _version("torch_npu")
    words = f"{result[0]}.{result[1]}"
    bounds = PYTHONS.get(".".join(version.split(".")[:2])) if version else None
    if bounds is None:
        return "python", "ok" if version is None else "unlisted", words
    fits = bounds[0] <= result[1] <= bounds[1]
    return (
        "python",
        "ok" if fits else "warning",
        f"{words}; torch_npu {version} is built for 3.{bounds[0]} to 3.{bounds[1]}",
    )


def _torch_check() -> tuple[str, str, str]:
    """Each torch_npu needs exactly its torch."""
    torch, npu = _version("torch"), _version("torch_npu")
    if npu is None:
        return "torch", "ok", f"torch {torch}, no torch_npu"
    fits = torch is not None and torch.split("+")[0].split(".")[:3] == npu.split(".")[:3]
    return (
        "torch",
        "ok" if fits else "FAILED",
        f"torch {torch} with torch_npu {npu}" + ("" if fits else f", which needs torch {'.'.join(npu.split('.')[:3])}"),
    )


def _cann_check(stack: dict) -> tuple[str, str, str] | None:
    if not stack.get("torch_npu"):
        return None
    version, cann = stack["torch_npu"].split("+")[0], stack.get("cann")
    pair = f"torch_npu {version} with CANN {cann}"
    if stack["backend"] == "emulated":
        return "cann", "emulated", f"{pair}: what a table says of it means nothing here"
    return "cann", *cann_verdict(version, cann, pair)


def cann_verdict(version: str, cann: str | None, pair: str) -> tuple[str, str]:
    """What the compatibility table says of a torch_npu and a CANN: ok, unlisted or a warning, and why."""
    if cann is None:
        return "unlisted", f"{pair}: this CANN does not say its version"
    if version not in COMPATIBLE:
        return "unlisted", f"{pair}: this torch_npu is not in the published table; check its release notes"
    wanted = COMPATIBLE[version]
    if any(cann.startswith(item) for item in wanted) or (wanted[0] in _ACROSS and cann.startswith(_ACROSS)):
        return "ok", f"{pair}, released with {wanted[0]}"
    return "warning", f"{pair}: it was released with CANN {' or '.join(wanted)}"


def _numpy_check(stack: dict) -> tuple[str, str, str] | None:
    """CANN up to 8.2 fails to set its precision mode beside numpy 2."""
    result = re.match(r"(\d+)\.(\d+)", stack.get("cann") or "")
    if (
        stack["backend"] != "npu"
        or not result
        or (int(result[1]), int(result[2])) > (8, 2)
        or (stack.get("numpy") or "1") < "2"
    ):
        return None
    return (
        "numpy",
        "warning",
        f"numpy {stack['numpy']} with CANN {stack['cann']}: SetPrecisionMode fails; pip install 'numpy<2'",
    )


def _answer_check(device) -> tuple[str, str, str]:
    """A sum and a product on the device, against the CPU's."""
    import torch

    left = torch.arange(64.0).reshape(8, 8) / 64
    try:
        device.check("doctor's check")
        with device.telling("doctor's check"):
            moved = left.to(device.torch_device)
            result = (moved @ moved + moved).cpu()
    except HarnessError as error:  # whatever the device raises is the finding
        return "answer", "FAILED", str(error)
    error = float((result.double() - (left.double() @ left.double() + left)).abs().max())
    fits = error <= 1e-2
    return (
        "answer",
        "ok" if fits else "FAILED",
        f"a product and a sum on {device.torch_device} are {error:.1e} from the CPU's (up to 1e-2 allowed)",
    )
