"""Whether a model runs under torch.autocast, which computes products in half precision on one type of device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(kw_only=True)
class Autocast:
    """What a run saw of it."""

    on: bool = False


@contextlib.contextmanager
def watching_autocast(kind: str) -> Iterator[Autocast]:
    """Sees whether torch.autocast for devices of the type `kind` is on when the block begins, or is turned on in it.

    >>> with watching_autocast("cpu") as seen, torch.autocast("cpu", dtype=torch.bfloat16):
    ...     pass
    >>> seen.on
    True
    """
    seen = Autocast(on=torch.is_autocast_enabled(kind))
    enter = torch.autocast.__enter__

    def noting(self: torch.autocast) -> Any:
        entered = enter(self)
        seen.on = seen.on or torch.is_autocast_enabled(kind)
        return entered

    torch.autocast.__enter__ = noting
    try:
        yield seen
    finally:
        torch.autocast.__enter__ = enter
