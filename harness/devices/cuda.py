"""CUDA devices."""

from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
from typing import Any

import torch

from harness.devices.kind import Kind, Switch, uuid_of
from harness.errors import DeviceError


class Cuda(Kind):
    name = torch_type = "cuda"
    hardware = True
    cards_variable = "CUDA_VISIBLE_DEVICES"
    switches = {  # noqa: RUF012
        "conv": Switch("torch.backends.cudnn", "allow_tf32"),
        "matmul": Switch("torch.backends.cuda.matmul", "allow_tf32"),
    }

    def open(self, index: int, *, soc: str | None = None, devices: int | None = None, timing: bool = False) -> str:
        return _answering(index)

    def all_cards(self, devices: int | None = None) -> list[str]:
        if shutil.which("nvidia-smi") is None:
            return []
        try:
            answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.SubprocessError):
            return []
        return [str(number) for number, line in enumerate(answer.splitlines()) if line.startswith("GPU ")]

    def answer(self, index: int) -> str:
        return _answering(index)

    def as_current(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(device)

    def synchronize(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)

    def memory(self) -> Any:
        return torch.cuda

    def generator(self, index: int) -> torch.Generator:
        return torch.cuda.default_generators[index]

    def stack(self, index: int) -> dict[str, Any]:
        return dict(
            device_count=torch.cuda.device_count(),
            card=uuid_of(torch.cuda, index),
            cuda=torch.version.cuda,
            cudnn=str(torch.backends.cudnn.version()),
            driver=_driver(),
            conv_allow_tf32=torch.backends.cudnn.allow_tf32,
            matmul_allow_tf32=torch.backends.cuda.matmul.allow_tf32,
        )


KIND = Cuda()


def _answering(index: int) -> str:
    """The name of the CUDA device of this index. Raises: DeviceError where there is none."""
    if not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else f"torch {torch.__version__} is built without CUDA"
        )
        raise DeviceError(f"cuda:{index} was asked for and no CUDA device answers; {built}")
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"cuda:{index} was asked for and there are {count} (cuda:0 to cuda:{count - 1})")
    return torch.cuda.get_device_name(torch.device("cuda", index))


@functools.cache
def _driver() -> str | None:
    """The version of NVIDIA's driver, asked once in a process."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip().splitlines()
        return lines[0] if lines else None
    return None
