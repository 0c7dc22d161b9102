"""Which device, and where a run happens: every word about torch_npu, CANN and CUDA.

A device that is asked for by name is a promise: absent or broken it is a DeviceError, never another device. `auto` takes a real
NPU, and the emulated one only on a machine without any trace of CANN or of a card.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.errors import DeviceError

SPECS = "auto, npu[:n], emulated, cuda[:n] or cpu"
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh (from CANN 8.5: /usr/local/Ascend/cann/set_env.sh)"
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


@dataclass(kw_only=True)
class Watched:
    """What `Device.watch` saw."""

    fell_back: list[str] = field(default_factory=list)  # operators that the CPU computed in place of the device


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that answered, or the CPU."""

    name: str  # "Ascend910B4", …
    backend: str
    torch_device: torch.device
    reason: str  # why it is this one, in a sentence

    @property
    def stack(self) -> Stack:
        """The stack as it is now: switches may change between two runs."""
        return _read_stack(self)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.torch_device.type == "npu":
            torch.npu.synchronize(self.torch_device)
        elif self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def check(self) -> None:
        """Compute something small. After one operator failed, torch_npu's queue may take work and never do it.

        Raises: DeviceError when the device no longer computes.
        """
        if self.torch_device.type == "cpu":
            return
        from harness.emulator import faults

        with faults.suspended():
            try:
                answer = (torch.arange(4.0).to(self.torch_device) + 1).cpu().tolist()
            except RuntimeError as error:
                answer = _first_line(error)
        if answer != [1.0, 2.0, 3.0, 4.0]:
            raise DeviceError(
                f"{self.torch_device} no longer computes ({answer}): an operator failed before and its queue is closed; "
                "run this case in a process of its own"
            )

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watched]:
        """Collect the operators that fall back from an NPU to the CPU while the block runs."""
        seen = Watched()
        if self.torch_device.type != "npu":
            yield seen
            return
        from harness import emulator

        with _Watch(seen, emulator.bytes_to_host if emulator.installed() else None):
            yield seen

    @contextlib.contextmanager
    def in_float32(self, what: str) -> Iterator[str]:
        """While the block runs the device's float32 convolutions ("conv") or other products ("matmul") keep their operands; gives the switch's name.

        Raises: KeyError for a device without such a switch.
        """
        path, name = SWITCHES[self.torch_device.type, what]
        owner = functools.reduce(getattr, path.split(".")[1:], torch)
        before = getattr(owner, name)
        setattr(owner, name, False)
        try:
            yield f"{path}.{name}"
        finally:
            setattr(owner, name, before)


SWITCHES = {
    ("npu", "conv"): ("torch.npu.conv", "allow_hf32"), ("npu", "matmul"): ("torch.npu.matmul", "allow_hf32"),
    ("cuda", "conv"): ("torch.backends.cudnn", "allow_tf32"), ("cuda", "matmul"): ("torch.backends.cuda.matmul", "allow_tf32"),
}  # fmt: skip  # what lets a device round the float32 operands of its products


# ------------------------------------------------------------------------------------------------------------- opening


def open_device(spec: str = "auto") -> Device:
    """Open `auto`, `npu[:n]`, `emulated`, `cuda[:n]` or `cpu`.

    Raises: ValueError for another word; DeviceError when the device cannot run here, saying what was looked for and what to do.
    """
    kind, index = parse_spec(spec)
    if kind == "cpu":
        return Device(name=_cpu_name(), backend="cpu", torch_device=torch.device("cpu"), reason="the CPU was asked for")
    if kind == "cuda":
        return _open_cuda(index)
    if kind == "npu":
        return _open_npu(index, "it was asked for")
    return _open_emulated("it was asked for") if kind == "emulated" else _open_auto()


def parse_spec(spec: str) -> tuple[str, int]:
    """The kind and the index of a device: "npu:1" is ("npu", 1). Raises: ValueError for another word."""
    match = re.fullmatch(r"(auto|emulated|cpu)|(npu|cuda)(?::(\d+))?", spec)
    if match is None:
        raise ValueError(f"no device is called {spec!r}; there are {SPECS}")
    return match[1] or match[2], int(match[3] or 0)


def _open_auto() -> Device:
    traces = _traces_of_ascend()
    if not traces:
        return _open_emulated("there is no trace of CANN or of an Ascend card here")
    found = ", ".join(traces)
    try:
        return _open_npu(0, f"auto found {found}")
    except DeviceError as error:
        raise DeviceError(
            f"there is a trace of an NPU here ({found}) but it does not answer, so nothing is emulated in its place: {error}; "
            f"or ask for another device by name: {SPECS}"
        ) from None


def _traces_of_ascend() -> list[str]:
    """What on this machine says that CANN or a card is there."""
    from harness import emulator

    if emulator.installed():
        return []
    traces = []
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        home = os.environ.get(name)
        if home and not emulator.is_emulated_home(home):
            traces.append(f"{name}={home}")
    traces += sorted(glob.glob("/dev/davinci[0-9]*"))[:1]
    if not traces and not _inherits_emulation() and _loads("libascendcl.so") is None:
        traces.append("a loadable libascendcl.so")
    return traces


def _inherits_emulation() -> bool:
    """Whether this process was started by one that plays an emulated CANN."""
    from harness import emulator

    return emulator.is_emulated_home(os.environ.get("ASCEND_HOME_PATH", ""))


def _loads(library: str) -> str | None:
    """None where a shared library loads, else the loader's words."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return None


def _open_npu(index: int, reason: str) -> Device:
    from harness import emulator
    from harness.emulator.build import wheel_version

    if emulator.installed():
        raise DeviceError("this process plays an emulated CANN and cannot open a card as well; start another process")
    if _inherits_emulation():
        raise DeviceError("this process was started by one that plays an emulated CANN and inherits it; start it from a shell, or use --device emulated")
    version = wheel_version()
    if "torch_npu" not in sys.modules:
        problem = _loads("libhccl.so")
        if problem is not None:
            raise DeviceError(f"torch_npu {version} is installed, but CANN cannot be loaded ({problem}); on an Ascend machine: {SET_ENV}")
    return _answering(index, "npu", reason, f"torch_npu {version}")


def _open_emulated(reason: str) -> Device:
    from harness import emulator

    # With torch_npu's queue an operator that fails closes the queue for the rest of the process.
    os.environ.setdefault("TASK_QUEUE_ENABLE", "0")
    emulator.install()
    return _answering(0, "emulated", reason, "torch_npu over the emulated CANN")


def _answering(index: int, backend: str, reason: str, what: str) -> Device:
    """The NPU of this index, after it computed something."""
    try:
        import torch_npu  # noqa: F401

        count = torch.npu.device_count() if torch.npu.is_available() else 0
    except Exception as error:
        raise DeviceError(f"{what} cannot be imported ({_first_line(error)}); check that torch, torch_npu and CANN fit: python -m harness doctor") from None
    if index >= count:
        there = ", ".join(f"npu:{each}" for each in range(count)) or "no card answers: is ASCEND_RT_VISIBLE_DEVICES set? see npu-smi info"
        raise DeviceError(f"npu:{index} was asked for and {what} finds {count} NPU{'' if count == 1 else 's'} ({there})")
    device = torch.device("npu", index)
    try:
        torch.npu.set_device(device)
        answer = float((torch.ones(2, device=device) + 1).sum().cpu())
    except Exception as error:
        raise DeviceError(f"npu:{index} does not answer: {_first_line(error)}; see npu-smi info") from None
    if answer != 4.0:
        raise DeviceError(f"npu:{index} computes wrongly: the sum of two twos is {answer}")
    return Device(name=torch.npu.get_device_name(index), backend=backend, torch_device=device, reason=reason)


def _open_cuda(index: int) -> Device:
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        raise DeviceError(f"cuda:{index} was asked for and no CUDA device answers; {built}")
    count = torch.cuda.device_count()
    if index >= count:
        raise DeviceError(f"cuda:{index} was asked for and there are {count} (cuda:0 to cuda:{count - 1})")
    device = torch.device("cuda", index)
    return Device(name=torch.cuda.get_device_name(device), backend="cuda", torch_device=device, reason="it was asked for")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------------------------------------------------- falling back


class _Watch(TorchDispatchMode):
    """Sees every operator on an NPU's tensors and asks the dispatcher whether torch_npu has a kernel for it.

    torch_npu says so itself only on standard error, and once for each operator in a process. Where it calls the CPU itself, inside a kernel, nothing
    says so; on an emulated device `to_host` counts the bytes that come back, and an operator that brings its inputs back is one.
    """

    def __init__(self, seen: Watched, to_host: Callable[[], int] | None = None):
        super().__init__()
        self.seen, self.to_host = seen, to_host

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if _falls_back(name):
            self._add(name)
        if self.to_host is None or name.startswith(COPIES):
            return func(*args, **(kwargs or {}))
        before, size = self.to_host(), _largest((args, kwargs))
        found = func(*args, **(kwargs or {}))
        if size and self.to_host() - before >= size:
            self._add(name)
        return found

    def _add(self, name: str) -> None:
        if name not in self.seen.fell_back:
            self.seen.fell_back.append(name)


COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")


def _largest(arguments: Any) -> int:
    """Bytes of the largest NPU tensor with several elements among the arguments of an operator."""
    tensors = [each for each in tree_leaves(arguments) if isinstance(each, torch.Tensor) and each.device.type == "npu" and each.numel() > 1]
    return max((each.numel() * each.element_size() for each in tensors), default=0)


_FALLS_BACK: dict[str, bool] = {}


def _falls_back(name: str) -> bool:
    """Whether an operator, "aten::mul.Tensor", has no kernel for NPUs of its own nor one made of others."""
    if name not in _FALLS_BACK:
        _FALLS_BACK[name] = name.startswith("aten::") and not _has_kernel(name)
    return _FALLS_BACK[name]


def _has_kernel(name: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if any(has(name, key) for key in ("PrivateUse1", "CompositeExplicitAutograd", "CompositeImplicitAutograd")):
        return True
    if not has(name, "CompositeExplicitAutogradNonFunctional"):
        return False
    # A structured operator runs its out= form, aten::i0 and aten::i0.out; one whose out= form is made of it is composite itself.
    base = name.partition(".")[0].removesuffix("_")
    forms = [each for each in torch._C._dispatch_get_all_op_names() if each.startswith(base + ".") and each.endswith("out")]
    return not forms or any(has(each, key) for each in forms for key in ("PrivateUse1", "CompositeExplicitAutograd"))


# ----------------------------------------------------------------------------------------------------------- the stack


def _read_stack(device: Device) -> Stack:
    common = dict(
        device=device.name,
        backend=device.backend,
        torch=str(torch.__version__),
        python=platform.python_version(),
        numpy=_version("numpy"),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu_name(),
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


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
