"""The real torch_npu over the emulated CANN."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from harness.devices.families import FAMILIES, UNKNOWN, family_of
from harness.devices.npu import Npu, answering, cann_version, launch_at_once, stack_of_torch_npu
from harness.errors import DeviceError


class Emulated(Npu):
    name = "emulated"
    hardware = False
    plays = True

    def open(self, index: int, *, soc: str | None = None, devices: int | None = None, timing: bool = False) -> str:
        from harness import emulator

        if not timing:
            launch_at_once()
        if soc is not None and family_of(soc) is UNKNOWN:  # torch_npu refuses its name
            there = ", ".join(f"{family.name} ({family.members})" for family in FAMILIES)
            raise DeviceError(
                f"no chip is called {soc!r}; write a name such as Ascend310P3, of one of the families {there}"
            )
        settings = {name: value for name, value in (("name", soc), ("devices", devices)) if value is not None}
        try:
            emulator.install(emulator.Machine(**settings) if settings else None)
        except ValueError as error:
            raise DeviceError(str(error)) from None
        return answering(0, "torch_npu over the emulated CANN")

    def all_cards(self, devices: int | None = None) -> list[str]:
        return [str(number) for number in range(devices or 1)]

    def count_copies(self) -> Callable[[], int]:
        from harness import emulator

        return emulator.bytes_to_host

    def script_command(self, name: str, faults: Sequence[str] = ()) -> list[str]:
        from harness import emulator

        played = [] if name == emulator.Machine().name else ["--soc", name]
        planted = [part for fault in faults for part in ("--fault", fault)]
        return ["-m", "harness", "emulate", *played, *planted]

    def stack(self, index: int) -> dict[str, Any]:
        from harness.emulator.faults import planted

        cann = cann_version()
        return stack_of_torch_npu() | dict(
            cann=f"{cann} (emulated)" if cann else None,
            card=self._played(index),
            faults=tuple(fault.effect for fault in planted()),
        )

    def _played(self, index: int) -> str | None:
        """The number of an emulated card on its machine, where a process sees some of several; else None."""
        cards = os.environ.get(self.cards_variable or "", "").split(",")
        return f"emulated card {cards[index]}" if index < len(cards) and cards[index] else None


KIND = Emulated()
