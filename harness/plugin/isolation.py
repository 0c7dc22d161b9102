"""Rows in processes that are replaced when they die: workers of pytest-xdist, one where the command line names none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest

from harness.plugin.options import PREFIX

RESTARTS = "1000"  # processes that may die in one run


def isolate(config: pytest.Config, known: Any, args: list[str]) -> None:
    """Add pytest-xdist's options to the command line `args` where rows are to run in processes of their own.

    They are with --precision-isolate, and where the device is a card and pytest-xdist is installed, but for
    --precision-no-isolate, a debugger, and workers that the command line asks for: those are replaced then.

    Raises: pytest.UsageError where pytest-xdist is not installed and --precision-isolate asks for it.
    """
    asked = known.precision_isolate or "--isolate" in args
    refused = known.precision_no_isolate or "--no-isolate" in args
    if os.environ.get("PYTEST_XDIST_WORKER") or refused or not (asked or _is_card(_device(known, args))):
        return
    if not config.pluginmanager.hasplugin("xdist"):
        if asked:
            raise pytest.UsageError(
                "--precision-isolate runs the rows in processes of pytest-xdist's, which is not installed or switched "
                "off here; pip install pytest-xdist"
            )
        return
    if known.usepdb or known.collectonly:
        return
    if getattr(known, "maxworkerrestart", None) is None:
        args[:0] = ["--max-worker-restart", RESTARTS]
    if not getattr(known, "numprocesses", None) and not getattr(known, "tx", None):
        args[:0] = ["-n", "1"]


def _device(known: Any, args: Sequence[str]) -> str:
    """The device that the command line names, by the long or the short option."""
    named: str = known.precision_device
    for word, following in zip(args, [*args[1:], ""]):
        name, equals, value = word.partition("=")
        if name in ("--device", f"{PREFIX}device"):
            named = value if equals else following
    return named


def _is_card(spec: str) -> bool:
    """Whether a device is hardware, as far as can be told before it is open."""
    if spec in ("cpu", "emulated"):
        return False
    from harness import autoload

    autoload.hold()  # before torch is imported
    from harness.devices.opening import is_hardware

    return is_hardware(spec)
