"""An accelerator card for each worker of pytest-xdist: worker k takes the k-th of the cards that its caller sees."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from harness.plugin.options import options_of


def share_cards(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Show each worker its own card, before it imports torch: in the specification of its process, so that one that
    replaces it gets the same card.

    Raises: pytest.UsageError where there are more workers than cards, or the device names one card.
    """
    kind, index, cards = _shared(config)
    if len(specs) > 1 and options_of(config).across_cards is not None:
        raise pytest.UsageError(
            f"--precision-across-cards runs each row on all cards in one process, and -n starts {len(specs)}, each of "
            "which sees one card; leave -n out, or write -n 1"
        )
    if kind is None or not cards or len(specs) < 2:
        return
    from harness.devices.kinds import KINDS

    device = options_of(config).device
    if index is not None:
        raise pytest.UsageError(
            f"--precision-device={device} names one card and there are {len(specs)} workers; write {kind}, and each "
            f"worker takes a card of its own"
        )
    if len(specs) > len(cards):
        raise pytest.UsageError(
            f"{len(specs)} workers (-n) and {len(cards)} cards ({', '.join(cards)}); a card serves one worker: "
            f"-n {len(cards)} at most, or -n auto"
        )
    for spec, card in zip(specs, cards):
        spec.env[KINDS[kind].cards_variable] = card


def count_cards(config: pytest.Config) -> int | None:
    """As many workers as cards, for -n auto; None where the device is none of several cards. One where each row runs on
    all cards.
    """
    if options_of(config).across_cards is not None:
        return 1
    kind, _, cards = _shared(config)
    return None if kind is None or not cards else len(cards)


def _shared(config: pytest.Config) -> tuple[str | None, int | None, list[str]]:
    """As `visible_of`; nothing where each process plays an emulated machine of its own."""
    if options_of(config).devices is None:
        kind, index, cards = visible_of(config)
        return (None, None, []) if kind == "emulated" else (kind, index, cards)
    return visible_of(config)


def visible_of(config: pytest.Config) -> tuple[str | None, int | None, list[str]]:
    """The kind of a run's cards, the number that its device names, and the visible ones; None for other devices."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return None, None, []
    from harness import autoload

    autoload.hold()  # before torch is imported
    from harness.devices import parse_spec
    from harness.devices.opening import is_hardware
    from harness.devices.visible import visible_cards

    options = options_of(config)
    try:
        kind, index = parse_spec(options.device)
    except ValueError:
        return None, None, []  # which is said when the device is opened
    if kind == "auto":
        kind = "npu" if is_hardware("auto") else "emulated"
    if kind == "cpu":
        return None, None, []
    named = index if ":" in options.device else None
    return kind, named, visible_cards(kind, options.devices)


def cards_for_rows(device: Any, options: Any) -> Any:
    """The cards on which every row is to run, as `harness.run.across.Across`; None without --precision-across-cards.

    Raises: pytest.UsageError where there is one card alone, or one does not answer.
    """
    from harness.devices.several import cards_of_process
    from harness.errors import DeviceError
    from harness.run.across import Across

    if options.across_cards is None:
        return None
    try:
        cards = cards_of_process(device, devices=options.devices)
    except DeviceError as error:
        raise pytest.UsageError(f"--precision-across-cards: {error}") from None
    return Across(cards=tuple(cards), times=options.across_cards)


def check_across(options: Any) -> None:
    """Raises: pytest.UsageError where the options do not let every row run on all cards."""
    if options.across_cards is None:
        return
    if options.across_cards < 2:
        raise pytest.UsageError(
            f"--precision-across-cards={options.across_cards}: a card runs each row twice at least, so that reruns on "
            "one card can be told from other cards; write 2 or more, or no number for 10"
        )
    if ":" in options.device or options.device == "cpu":
        raise pytest.UsageError(
            f"--precision-across-cards runs each row on all visible cards, and --precision-device={options.device} "
            "names one device; write npu, cuda, or emulated with --devices=8"
        )
