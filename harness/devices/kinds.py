"""The kinds of device, by the name that `--device` gives them."""

from __future__ import annotations

from importlib import import_module

from harness.devices.kind import Kind
from harness.devices.names import NUMBERED

KINDS: dict[str, Kind] = {name: import_module(f"harness.devices.{name}").KIND for name in NUMBERED}
TORCH_TYPES = frozenset(kind.torch_type for kind in KINDS.values())
