"""The names of `harness.devices` under the module's former name."""

from harness.devices import SPECS, Device, Stack, Watched, open_device, parse_spec

__all__ = ["SPECS", "Device", "Stack", "Watched", "open_device", "parse_spec"]
