"""All accelerator cards that a process sees, as devices of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from harness.devices.device import Device, Health
from harness.devices.visible import visible_cards
from harness.errors import DeviceError


@dataclass(frozen=True, kw_only=True)
class CardDevice:
    """An accelerator card: the device by which a process uses it, and what reports call it."""

    device: Device
    name: str  # "card 3", or with its serial number "card 3 (NPU 3 chip 0, serial 1023)"


def cards_of_process(first: Device, *, devices: int | None = None) -> list[CardDevice]:
    """Every card that this process sees, the one of `first` at its place, all open. `devices`: how many cards an
    emulated machine has.

    Raises: DeviceError where there is one card alone, or one does not answer.
    """
    kind = first.kind
    count = first.stack.device_count or 0
    if count < 2:
        variable = kind.cards_variable or "an environment variable of the device"
        raise DeviceError(
            f"several cards were asked for and this process sees {count} of {first.backend}; show it more with "
            f"{variable}, or ask for an emulated machine with more: --device=emulated --devices=8"
        )
    own = first.torch_device.index or 0
    numbers = visible_cards(first.backend, devices)
    result = []
    for index in range(count):
        device = first
        if index != own:
            with kind.as_current(torch.device(first.torch_device.type, index)):
                name = kind.answer(index)
            device = replace(
                first, name=name, torch_device=torch.device(first.torch_device.type, index), health=Health()
            )
        result.append(CardDevice(device=device, name=_named(device, numbers)))
    return result


def card_name(device: Device, *, devices: int | None = None) -> str:
    """What reports call the card of a device: "card 3", with its serial number where that is known. `devices` as of
    `cards_of_process`.
    """
    return _named(device, visible_cards(device.backend, devices))


def _named(device: Device, numbers: list[str]) -> str:
    """The number that the machine gives a card, and which piece of hardware it is where that is known."""
    index = device.torch_device.index or 0
    number = f"card {numbers[index] if index < len(numbers) else index}"
    identity = device.stack.card
    return number if identity is None or device.backend == "emulated" else f"{number} ({identity})"
