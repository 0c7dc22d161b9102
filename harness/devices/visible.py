"""The cards that this process may use, by their numbers in the variable that shows them to it."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess

VARIABLES = {
    "npu": "ASCEND_RT_VISIBLE_DEVICES",
    "emulated": "ASCEND_RT_VISIBLE_DEVICES",
    "cuda": "CUDA_VISIBLE_DEVICES",
}


def visible_cards(kind: str, devices: int | None = None) -> list[str]:
    """The cards of a kind, "npu", "emulated" or "cuda", that are visible here; `devices`: how many an emulated machine
    has. Empty where it cannot be told.

    Example: with ASCEND_RT_VISIBLE_DEVICES=2,5, `visible_cards("npu")` is ["2", "5"].
    """
    there = _there(kind, devices)
    named = os.environ.get(VARIABLES[kind])
    if named is None:
        return there
    cards = [part.strip() for part in named.split(",") if part.strip()]
    return [card for card in cards if card in there] if kind == "emulated" else cards


def _there(kind: str, devices: int | None) -> list[str]:
    """All cards of the machine."""
    if kind == "emulated":
        return [str(number) for number in range(devices or 1)]
    if kind == "npu":
        numbers = [re.search(r"davinci(\d+)$", path) for path in glob.glob("/dev/davinci[0-9]*")]
        return [str(number) for number in sorted(int(found[1]) for found in numbers if found)]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, line in enumerate(answer.splitlines()) if line.startswith("GPU ")]
