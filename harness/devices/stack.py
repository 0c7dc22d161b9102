"""The stack: versions, switches that change numbers, threads; read where something was measured."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from harness.devices.device import Device

ENVIRONMENT = ("TASK_QUEUE_ENABLE", "ASCEND_LAUNCH_BLOCKING", "ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where something was measured: versions, switches that change numbers, threads. None where unknown or not there."""

    device: str
    backend: str  # "npu", "emulated", "cuda" or "cpu"
    device_count: int | None = None
    torch: str = ""
    torch_npu: str | None = None
    torch_npu_git: str | None = None
    cann: str | None = None
    driver: str | None = None
    firmware: str | None = None
    cuda: str | None = None
    cudnn: str | None = None
    python: str = ""
    numpy: str | None = None
    platform: str = ""
    cpu: str = ""
    threads: int = 0  # of the CPU's side
    conv_allow_hf32: bool | None = None
    matmul_allow_hf32: bool | None = None
    conv_allow_tf32: bool | None = None
    matmul_allow_tf32: bool | None = None
    jit_compile: bool | None = None
    deterministic: bool | None = None
    compatible_impl: bool | None = None
    allow_internal_format: bool | None = None
    faults: tuple[str, ...] = ()  # what was broken on purpose on an emulated device, and how often it acted
    environment: dict[str, str] = field(default_factory=dict)  # the variables that change how a device runs, where set

    def to_dict(self) -> dict[str, Any]:
        """As the report stores it."""
        return asdict(self)


def read_stack(device: Device) -> Stack:
    common = dict(
        device=device.name,
        backend=device.backend,
        torch=str(torch.__version__),
        python=platform.python_version(),
        numpy=_version("numpy"),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    own = _npu_stack(device) if device.torch_device.type == "npu" else _cuda_stack() if device.backend == "cuda" else {}
    return Stack(**(common | own))


def _npu_stack(device: Device) -> dict[str, Any]:
    import torch_npu

    from harness.emulator.faults import planted

    emulated = device.backend == "emulated"
    cann = _quietly(lambda: torch_npu.utils.get_cann_version())
    return dict(
        device_count=torch.npu.device_count(),
        torch_npu=torch_npu.__version__,
        torch_npu_git=_quietly(lambda: torch_npu.version.git_version),
        cann=f"{cann} (emulated)" if emulated and cann else cann or None,
        driver=None if emulated else _driver(),
        firmware=None if emulated else _firmware(device.torch_device.index),
        conv_allow_hf32=_quietly(lambda: bool(torch.npu.conv.allow_hf32)),
        matmul_allow_hf32=_quietly(lambda: bool(torch.npu.matmul.allow_hf32)),
        jit_compile=_quietly(lambda: not torch.npu.is_jit_compile_false()),
        compatible_impl=_compatible_impl(),
        allow_internal_format=_quietly(_internal_format),
        faults=tuple(each.deeds for each in planted()) if emulated else (),
    )


def _compatible_impl() -> bool | None:
    """Whether torch_npu follows torch where its kernels do otherwise, such as GELU; None before torch_npu 2.13."""
    if not hasattr(torch.npu, "use_compatible_impl"):
        return None
    return _quietly(lambda: bool(torch.npu.are_compatible_impl_enabled()))


def _internal_format() -> bool | None:
    import torch_npu

    option = torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT")
    return None if option is None else option.decode() == "enable"


def _cuda_stack() -> dict[str, Any]:
    return dict(
        device_count=torch.cuda.device_count(),
        cuda=torch.version.cuda,
        cudnn=str(torch.backends.cudnn.version()),
        driver=_command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        conv_allow_tf32=torch.backends.cudnn.allow_tf32,
        matmul_allow_tf32=torch.backends.cuda.matmul.allow_tf32,
    )


def _quietly(read):
    """What `read` gives, None where this torch_npu does not say."""
    try:
        return read()
    except Exception:  # noqa: BLE001  a version that cannot be read must not stop a run
        return None


def _driver() -> str | None:
    """The NPU driver's version, as its installer left it."""
    path = Path("/usr/local/Ascend/driver/version.info")
    found = re.search(r"^Version=(\S+)", path.read_text(errors="replace"), re.MULTILINE) if path.exists() else None
    return found[1] if found else None


def _firmware(index: int) -> str | None:
    text = _command("npu-smi", "info", "-t", "board", "-i", str(index)) or ""
    found = re.search(r"Firmware Version\s*:\s*(\S+)", text)
    return found[1] if found else None


def _command(*words: str) -> str | None:
    if shutil.which(words[0]) is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        return done.stdout.strip().splitlines()[0] if words[0] == "nvidia-smi" and done.stdout.strip() else done.stdout or None
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
