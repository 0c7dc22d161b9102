"""The device of a run: opened once, before tests are collected, since transformers and others import torch_npu when
they are imported.
"""

from __future__ import annotations

import os
import warnings

import pytest

DEVICE = pytest.StashKey["Opening"]()
NO_DEVICE = "PRECISION_NO_DEVICE"  # the environment variable that tells a worker why it must not open its card


def reason_not_to_open() -> str:
    """Why this process must not open a device; "" where it may."""
    return os.environ.get(NO_DEVICE, "")


class Opening:
    """The device that was asked for, or why it cannot run; opened with the first use."""

    def __init__(self, spec: str, soc: str | None = None, devices: int | None = None, *, timing: bool = False):
        self.spec, self.soc, self.devices = spec, soc, devices
        self.timing = timing  # whether forwards are timed: with torch_npu's queue as the user has it
        self._device = None
        self.error: Exception | None = None

    @property
    def is_open(self) -> bool:
        return self._device is not None

    def open(self) -> None:
        """Open the device unless that was tried. What went wrong is kept as `error`."""
        from harness import autoload
        from harness.errors import DeviceError

        if self.is_open or self.error is not None:
            return
        if reason_not_to_open():
            self.error = DeviceError(reason_not_to_open())
            return
        autoload.hold()
        _share_cores()
        try:
            with warnings.catch_warnings():  # of torch_npu's own source, which pytest does not capture this early
                warnings.simplefilter("ignore")
                from harness.devices import open_device

                self._device = open_device(self.spec, soc=self.soc, devices=self.devices, timing=self.timing)
        except (DeviceError, ValueError, ImportError) as error:
            self.error = error

    @property
    def device(self):
        """The device. Raises: DeviceError when it cannot run here."""
        from harness.errors import DeviceError

        self.open()
        if self.error is not None:
            raise DeviceError(str(self.error)) from None
        return self._device


def _share_cores() -> None:
    """Give a worker of pytest-xdist its share of the cores, so that workers do not compete for them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if os.environ.get("PYTEST_XDIST_WORKER") and workers > 1:
        import torch

        torch.set_num_threads(max(torch.get_num_threads() // workers, 1))
