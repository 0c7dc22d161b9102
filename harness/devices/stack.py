"""The stack: versions, switches that change numbers, threads; read where something was measured."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.devices.kind import quietly

if TYPE_CHECKING:
    from harness.devices.device import Device

# Variables that change how a device or the CPU computes. CUBE_MATH_TYPE and ACL_PRECISION_MODE are none of them:
# torch_npu reads them as options alone (npu/npu_config.py), and fields of the stack hold them.
ENVIRONMENT = (
    # torch_npu's manual of variables
    "TASK_QUEUE_ENABLE", "PER_STREAM_QUEUE", "ASCEND_LAUNCH_BLOCKING",
    "INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE", "TORCH_NPU_USE_COMPATIBLE_IMPL", "TORCH_NPU_LEGACY_IMPL_LIST",
    "ACL_OP_COMPILER_CACHE_MODE", "ACL_OP_COMPILER_CACHE_DIR",
    # CANN's manual, and those of its libraries for communication (HCCL, LCCL) and for transformers (ATB)
    "ASCEND_RT_VISIBLE_DEVICES", "ASCEND_CACHE_PATH", "ASCEND_WORK_PATH", "HCCL_DETERMINISTIC", "LCCL_DETERMINISTIC",
    "CLOSE_MATMUL_K_SHIFT", "ATB_MATMUL_SHUFFLE_K_ENABLE", "ATB_LLM_LCOC_ENABLE",
    # the CPU's side: oneDNN may multiply float32 in bfloat16; the others choose instructions, thus the order of sums
    "DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
    # CUDA's
    "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
)  # fmt: skip
# Model code whose version changes numbers.
PACKAGES = ("transformers", "timm", "diffusers", "sentence_transformers")


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Where something was measured: versions, switches that change numbers, threads. None where it is unknown."""

    device: str
    backend: str  # "npu", "emulated", "cuda" or "cpu"
    device_count: int | None = None
    card: str | None = None  # the accelerator card: NPU, chip, serial number and die; of CUDA its UUID
    harness: str | None = None
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
    cpu_capability: str | None = None  # the instructions that torch's own kernels take: "AVX2", "AVX512", "DEFAULT", …
    threads: int = 0  # of the CPU's side
    conv_allow_hf32: bool | None = None
    matmul_allow_hf32: bool | None = None
    conv_allow_tf32: bool | None = None
    matmul_allow_tf32: bool | None = None
    # Of products where set, over matmul_allow_hf32: 0 keep, 1 lower, 2 float16, 3 HF32, 4 group sums.
    cube_math_type: int | None = None
    # ACL_PRECISION_MODE where set: "allow_fp32_to_fp16" or "must_keep_origin_dtype"; else the SoC's default holds.
    precision_mode: str | None = None
    inf_nan_mode: bool | None = None  # whether half overflows to Inf; otherwise it saturates
    float32_matmul_precision: str | None = None  # torch's own: "highest", "high" or "medium"
    jit_compile: bool | None = None
    compile_cache: str | None = None  # ACL_OP_COMPILER_CACHE_MODE and _DIR where set by option
    # torch_npu's queue in force: 0 launches each operator at once, 1 and 2 from another thread.
    task_queue: int | None = None
    deterministic: bool | None = None
    # torch_npu's: 0 off, 1 the same from run to run, 3 (of CANN) also in every batch.
    deterministic_level: int | None = None
    compatible_impl: bool | None = None
    allow_internal_format: bool | None = None
    faults: tuple[str, ...] = ()  # what was broken on purpose on an emulated device, and how often it acted
    packages: dict[str, str] = field(default_factory=dict)  # versions of the model code that this process imported
    environment: dict[str, str] = field(default_factory=dict)  # the variables that change how a device runs, where set

    def to_dict(self) -> dict[str, Any]:
        """As the report stores it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Stack:
        """The stack that a report holds: what an older report lacks is unknown, what a newer one adds is left out.

        Example: `Stack.from_dict(json.loads(text)["stack"]).torch_npu`.
        """
        known = {item.name: stored[item.name] for item in fields(cls) if item.name in stored}
        known |= {name: stored.get(name) or "" for name in ("device", "backend")}
        return cls(**(known | {"faults": tuple(known.get("faults") or ())}))


def read_stack(device: Device) -> Stack:
    common = dict(
        device=device.name,
        backend=device.backend,
        torch=str(torch.__version__),
        python=platform.python_version(),
        numpy=_version("numpy"),
        platform=f"{platform.system()} {platform.machine()}",
        harness=harness_version(),
        cpu=cpu_name(),
        cpu_capability=quietly(lambda: torch.backends.cpu.get_cpu_capability()),
        float32_matmul_precision=quietly(lambda: torch.get_float32_matmul_precision()),
        packages={name: result for name in PACKAGES if (result := _imported(name)) is not None},
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    return Stack(**(common | device.kind.stack(device.torch_device.index or 0)))


def harness_version() -> str | None:
    """The version of this package: its `__version__`, else that of the installed distribution."""
    return getattr(sys.modules.get("harness"), "__version__", None) or _version("npu-accuracy-harness")


def _imported(package: str) -> str | None:
    """The version of a package that this process imported; None where it did not."""
    module = sys.modules.get(package)
    return None if module is None else getattr(module, "__version__", None) or _version(package.replace("_", "-"))


@functools.cache  # no package changes under a process that runs, and a stack is read with every row
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Arm processors have numbers of maker and part in /proc/cpuinfo, no name: Linux, arch/arm64/include/asm/cputype.h
ARM = {
    ("0x48", "0xd01"): "Kunpeng 920", ("0x48", "0xd02"): "HiSilicon HIP09",
    ("0x41", "0xd08"): "Cortex-A72", ("0x41", "0xd0c"): "Neoverse N1", ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2", ("0x41", "0xd4f"): "Neoverse V2",
}  # fmt: skip


@functools.cache
def cpu_name() -> str:
    """The CPU's name, by its numbers where it is an Arm one: "Kunpeng 920 (implementer 0x48, part 0xd01)"."""
    with contextlib.suppress(OSError):
        return name_of_cpu(Path("/proc/cpuinfo").read_text())
    return platform.processor() or platform.machine()


def name_of_cpu(cpuinfo: str) -> str:
    """The CPU's name by the text of /proc/cpuinfo."""
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if named:
        return named[1].strip()
    maker, part = (re.search(rf"^CPU {name}\s*:\s*(\S+)$", cpuinfo, re.MULTILINE) for name in ("implementer", "part"))
    if not maker or not part:
        return platform.processor() or platform.machine()
    return f"{ARM.get((maker[1], part[1]), 'aarch64')} (implementer {maker[1]}, part {part[1]})"
