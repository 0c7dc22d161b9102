"""The stack: versions, switches that change numbers, threads; read where something was measured."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.devices.cards import this_card
from harness.devices.visible import VARIABLES

if TYPE_CHECKING:
    from harness.devices.cards import Card
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
    card: str | None = None  # the physical one: NPU, chip, serial number and die; of CUDA its UUID
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
        cpu_capability=_quietly(lambda: torch.backends.cpu.get_cpu_capability()),
        float32_matmul_precision=_quietly(lambda: torch.get_float32_matmul_precision()),
        packages={name: result for name in PACKAGES if (result := _imported(name)) is not None},
        threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    own: dict[str, Any] = {}
    if device.torch_device.type == "npu":
        own = _npu_stack(device)
    elif device.backend == "cuda":
        own = _cuda_stack(device.torch_device.index or 0)
    return Stack(**(common | own))


def _npu_stack(device: Device) -> dict[str, Any]:
    import torch_npu

    from harness.emulator.faults import planted

    emulated = device.backend == "emulated"
    cann = _cann_version()
    card = None if emulated else this_card(device.torch_device.index or 0)
    return dict(
        device_count=torch.npu.device_count(),
        torch_npu=torch_npu.__version__,
        torch_npu_git=_quietly(lambda: torch_npu.version.git_version),
        cann=f"{cann} (emulated)" if emulated and cann else cann or None,
        driver=None if emulated else _driver(),
        firmware=card.firmware if card is not None else None,
        card=_played(device.torch_device.index or 0) if emulated else _named(card, device.torch_device.index or 0),
        conv_allow_hf32=_quietly(lambda: bool(torch.npu.conv.allow_hf32)),
        matmul_allow_hf32=_quietly(lambda: bool(torch.npu.matmul.allow_hf32)),
        cube_math_type=_quietly(_cube_math_type),
        precision_mode=_quietly(lambda: _option("ACL_PRECISION_MODE")),
        inf_nan_mode=_quietly(lambda: bool(torch.npu.utils.is_support_inf_nan())),
        jit_compile=_quietly(lambda: not torch.npu.is_jit_compile_false()),
        compile_cache=_quietly(_compile_cache),
        deterministic_level=_quietly(lambda: int(torch_npu._C._npu_get_deterministic_level())),
        task_queue=_quietly(task_queue),
        compatible_impl=_compatible_impl(),
        allow_internal_format=_quietly(_internal_format),
        faults=tuple(item.effect for item in planted()) if emulated else (),
    )


@functools.cache
def task_queue() -> int:
    """The mode of torch_npu's queue, which it reads once in a process: 0, 1 (its default) or 2."""
    if os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        return 0
    return int(os.environ.get("TASK_QUEUE_ENABLE", "1"))


def _compatible_impl() -> bool | None:
    """Whether torch_npu follows torch's formulas, GELU's too; None where it has no such switch (before 2.9.0.post2)."""
    if not hasattr(torch.npu, "use_compatible_impl"):
        return None
    return _quietly(lambda: bool(torch.npu.are_compatible_impl_enabled()))


def _internal_format() -> bool | None:
    option = _option("ALLOW_INTERNAL_FORMAT")
    return None if option is None else option == "enable"


def _option(name: str) -> str | None:
    """One of torch_npu's options; None where it is not set or not known."""
    import torch_npu

    option = torch_npu._C._npu_getOption(name)
    return option.decode() if option else None


def _cube_math_type() -> int | None:
    option = _option("CUBE_MATH_TYPE")
    return None if option is None else int(option)


def _compile_cache() -> str | None:
    mode, folder = _option("ACL_OP_COMPILER_CACHE_MODE"), _option("ACL_OP_COMPILER_CACHE_DIR")
    return f"{mode or 'default'} in {folder or 'its default folder'}" if mode or folder else None


def _cann_version() -> str | None:
    """CANN's version. torch_npu 2.5 and 2.6 have the function in `npu.utils` alone."""
    import torch_npu

    for owner in (torch_npu.npu.utils, torch_npu.utils):
        result = _quietly(lambda owner=owner: owner.get_cann_version())
        if result:
            return result
    return None


def _played(index: int) -> str | None:
    """The number of an emulated card on its machine, where a process sees some of several; else None."""
    cards = os.environ.get(VARIABLES["emulated"], "").split(",")
    return f"emulated card {cards[index]}" if index < len(cards) and cards[index] else None


def _named(card: Card | None, index: int) -> str | None:
    """The card in words; by the UUID of its driver where npu-smi does not tell."""
    return str(card) if card is not None else _uuid(torch.npu, index)


def _uuid(owner: Any, index: int) -> str | None:
    """The UUID of a device as torch tells it; None where it has none, or one of zeros."""
    result = _quietly(lambda: str(owner.get_device_properties(index).uuid))
    return f"UUID {result}" if result and result.strip("0-") else None


def _cuda_stack(index: int) -> dict[str, Any]:
    return dict(
        device_count=torch.cuda.device_count(),
        card=_uuid(torch.cuda, index),
        cuda=torch.version.cuda,
        cudnn=str(torch.backends.cudnn.version()),
        driver=_cuda_driver(),
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
    result = re.search(r"^Version=(\S+)", path.read_text(errors="replace"), re.MULTILINE) if path.exists() else None
    return result[1] if result else None


@functools.cache
def _cuda_driver() -> str | None:
    """The version of NVIDIA's driver, asked once in a process."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        lines = subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip().splitlines()
        return lines[0] if lines else None
    return None


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
