"""The accelerator card behind a device: NPU and chip number, serial number, die and firmware, as npu-smi tells them.

torch numbers the chips that a process sees: ASCEND_RT_VISIBLE_DEVICES hides and reorders them, a container numbers
its own from 0, and a card of the A3 has two dies. npu-smi asks for the number of the card (NPU ID) and of the chip on
it (Chip ID). `npu-smi info -m` holds both beside "Chip Logic ID", the number that CANN counts by.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

TIMEOUT = 5.0  # seconds that one call of npu-smi may take; after one that took longer none is made
VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"
_UNKNOWN = ("", "NA", "N/A", "-")  # what npu-smi prints where it knows nothing


@dataclass(frozen=True, kw_only=True)
class AcceleratorCard:
    """Which piece of hardware computes. `str()` says it in one line. None where npu-smi does not tell."""

    npu: int  # the card's number, "NPU ID"
    chip: int  # the chip's on it, "Chip ID"; the second die of an A3 card is 1
    serial: str | None = None  # of the card
    die: str | None = None  # "VDie ID": of the chip, the same in every machine
    firmware: str | None = None

    def __str__(self) -> str:
        named = [f"NPU {self.npu} chip {self.chip}"]
        named += [f"{name} {value}" for name, value in (("serial", self.serial), ("die", self.die)) if value]
        return ", ".join(named)


def read_card(index: int, ask: Callable[..., str | None], environment: Mapping[str, str]) -> AcceleratorCard | None:
    """The card of the torch device `npu:<index>`; None where npu-smi does not tell which it is.

    `ask(*words)` is what `npu-smi` prints for these words, None where it fails.
    """
    identifiers = _identifiers_of(index, ask("info", "-m") or "", environment)
    if identifiers is None:
        return None
    npu, chip = identifiers
    board = _fields(ask("info", "-t", "board", "-i", str(npu)))
    own = _fields(ask("info", "-t", "board", "-i", str(npu), "-c", str(chip)))
    die = own.get("VDie ID")
    return AcceleratorCard(
        npu=npu,
        chip=chip,
        serial=board.get("Serial Number") or own.get("Serial Number"),
        die="-".join(die.split()) if die else None,
        firmware=own.get("Firmware Version") or board.get("Firmware Version"),
    )


def _identifiers_of(index: int, mapping: str, environment: Mapping[str, str]) -> tuple[int, int] | None:
    """NPU ID and Chip ID of `npu:<index>`, by the text of `npu-smi info -m`; None where the text does not say it.

    A chip without a number of its own, such as the Mcu, computes nothing. A table without a column "Chip Logic ID",
    as of the 950, names the chip only where there is one.
    """
    chips = _chips(mapping)
    visible = environment.get(VISIBLE)
    if visible is not None:
        shown = [part.strip() for part in visible.split(",")]
        if index >= len(shown) or not shown[index].isdigit():
            return None
        index = int(shown[index])
    if any(logic is not None for logic, _, _ in chips):
        return next(((npu, chip) for logic, npu, chip in chips if logic == index), None)
    return chips[0][1:] if len(chips) == 1 else None


def _chips(mapping: str) -> list[tuple[int | None, int, int]]:
    """Logic ID, NPU ID and Chip ID of every chip that computes. The columns are told by the heading."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in mapping.splitlines() if line.strip()]
    heading = next((number for number, line in enumerate(lines) if line[0] == "NPU ID"), None)
    if heading is None:
        return []
    result = []
    for line in lines[heading + 1 :]:
        named = dict(zip(lines[heading], line))
        numbers = [named.get(name, "") for name in ("NPU ID", "Chip ID")]
        logic = named.get("Chip Logic ID")
        if (
            all(item.isdigit() for item in numbers)
            and named.get("Chip Name") != "Mcu"
            and (logic is None or logic.isdigit())
        ):
            result.append((None if logic is None else int(logic), *map(int, numbers)))
    return result


def _fields(text: str | None) -> dict[str, str]:
    """The lines "name : value" of npu-smi; the first of each name, without those that it does not know."""
    result: dict[str, str] = {}
    for line in (text or "").splitlines():
        name, colon, value = (part.strip() for part in line.partition(":"))
        if colon and value not in _UNKNOWN:
            result.setdefault(name, value)
    return result


@functools.cache
def card_of(index: int, visible: str | None) -> AcceleratorCard | None:
    """The card of `npu:<index>` of this machine, asked once in a process, since npu-smi takes about a second a call."""
    return read_card(index, Smi(), {} if visible is None else {VISIBLE: visible})


def this_card(index: int) -> AcceleratorCard | None:
    """The card of `npu:<index>` as this process sees it; None without npu-smi, or without the right to ask."""
    return card_of(index, os.environ.get(VISIBLE))


class Smi:
    """Asks npu-smi about all that the container holds; after one call that took too long it is not asked again."""

    def __init__(self) -> None:
        self.silent = shutil.which("npu-smi") is None

    def __call__(self, *words: str) -> str | None:
        if self.silent:
            return None
        environment = {name: value for name, value in os.environ.items() if name != VISIBLE}
        try:
            done = subprocess.run(["npu-smi", *words], capture_output=True, text=True, timeout=TIMEOUT, env=environment)
        except (OSError, subprocess.SubprocessError):
            self.silent = True
            return None
        return done.stdout if done.returncode == 0 else None
