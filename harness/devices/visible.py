"""The accelerator cards that this process may use, by their numbers in the variable that shows them to it."""

from __future__ import annotations

import os

from harness.devices.kinds import KINDS


def visible_cards(name: str, devices: int | None = None) -> list[str]:
    """The cards of a kind, "npu", "emulated" or "cuda", that are visible here; `devices`: how many an emulated machine
    has. Empty where it cannot be told.

    Example: with ASCEND_RT_VISIBLE_DEVICES=2,5, `visible_cards("npu")` is ["2", "5"].
    """
    kind = KINDS[name]
    there = kind.all_cards(devices)
    named = os.environ.get(kind.cards_variable or "")
    if named is None:
        return there
    cards = [part.strip() for part in named.split(",") if part.strip()]
    return [card for card in cards if card in there] if name == "emulated" else cards
