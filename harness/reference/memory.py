"""What a case needs of the host's memory, what the host has, and whether float64 runs layer by layer: plain numbers.

needed(Size.of(7_000_000_000), "float16", layers=True, separate=True).host / 7e9    # bytes a parameter
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import MemoryLimitError

GIB = 1 << 30
SMALL = 1 * GIB  # bytes of all copies up to which a model keeps a whole float64 copy
SHARE = 1 / 16  # and the share of a worker's memory that they may take
UNLIMITED = 1 << 60  # cgroup v1 writes a limit of nearly 2^63 where there is none
_WIDE, BUILT = 8, 4  # bytes of an element in float64, and in float32, in which a model is built
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_LARGEST = 16  # bytes an element of the largest parameter: its float64 or float32 form, and what a product makes of it
_LIBRARIES = {False: 0.8 * GIB, True: 1.4 * GIB}  # of one process, and with the process without torch_npu


@dataclass(frozen=True, kw_only=True)
class SizeInMemory:
    """Elements of floating point in a model, and in its largest parameter, which is cast as one.

    `mapped`: those that lie in mapped files, as `safetensors` loads what is not cast. `built_in`: the dtype of most.
    """

    parameters: int
    largest: int
    mapped: int = 0
    built_in: str = "float32"

    @property
    def bytes(self) -> int:
        """Of the model as it is built, without what lies in mapped files."""
        return (self.parameters - self.mapped) * BYTES.get(self.built_in, BUILT)

    def loaded_in(self, dtype: str) -> SizeInMemory:
        """Of a checkpoint of this size that is loaded in a dtype: in its own it stays in its files."""
        return replace(self, mapped=self.mapped if dtype == self.built_in else 0, built_in=dtype)

    @classmethod
    def of(cls, parameters: int) -> SizeInMemory:
        """A language model of which only the number of parameters is known.

        Its width d solves 12 d^2 (d / 128) = parameters, and its largest weight is an embedding of 128,000 words, at
        most half of all.
        """
        width = (parameters * 128 / 12) ** (1 / 3)
        return cls(parameters=parameters, largest=min(int(width * 128_000), parameters // 2))


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes: `built` of the model as it is built, `host` of it with its copies, `device` of its weights there."""

    built: int
    host: int
    device: int


def needed(size: SizeInMemory, dtype: str, *, layers: bool, separate: bool, emulated: bool = False) -> Need:
    """What one case takes at its peak, without the libraries and the activations.

    `layers`: float64 layer by layer; `separate`: the CPU's side is in the process without torch_npu; `emulated`: the
    device's memory is the host's. The model as it was built stays; a copy in the dtype stands beside it, unless it is
    the same; a whole float64 copy is there with both. Weights in mapped files take nothing, here and in the other
    process, unless they are cast.

    Raises: ValueError for a dtype that is not in BYTES.
    """
    if dtype not in BYTES:
        raise ValueError(f"memory is known for {', '.join(BYTES)}, not for {dtype!r}")
    narrow = BYTES[dtype]
    cast = size.built_in != dtype
    copied = size.parameters if cast else size.parameters - size.mapped  # a mapped file is mapped there again
    copy = copied * narrow if cast or separate else 0
    sending = copy if cast and separate else 0  # the copy that is sent stands here until it is there
    wide = 0 if layers else size.parameters * _WIDE
    host = size.bytes + copy + max(wide, sending) + size.largest * _LARGEST
    device = size.parameters * narrow
    return Need(built=size.bytes, host=host + (device if emulated else 0), device=device)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of memory in all and to be had now, and what sets them: "this machine" or "the cgroup"."""

    total: int
    available: int
    source: str = "this machine"


def read_memory(root: Path = Path("/")) -> Memory | None:
    """The memory of this machine or of this process's cgroup (v1 or v2), whichever leaves less; None where unknown.

    Pages of files that the kernel can drop count as available. Swap does not. Source:
    Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of the Linux kernel.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        entries = {
            line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line and len(line.split()) > 1
        }
        memory = Memory(total=entries["MemTotal"], available=entries["MemAvailable"])
    except (OSError, KeyError, ValueError):
        return None
    for folder, names in _cgroups(root):
        result = _limit(folder, *names)
        if result is not None and result.available < memory.available:
            memory = Memory(total=min(result.total, memory.total), available=result.available, source="the cgroup")
    return memory


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroups(root: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """The folders of the cgroups that limit this process, up to the mount's root, and the names of their files."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    result = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mounts, names = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), V2
        elif "memory" in controllers.split(","):
            mounts, names = ("sys/fs/cgroup/memory",), V1
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for mount in mounts:  # inside a container the mount's root is the group itself, whatever the path says
            result += [(root / mount / "/".join(parts[:count]), names) for count in range(len(parts), -1, -1)]
    return result


def _limit(folder: Path, limit: str, usage: str, dropped: str) -> Memory | None:
    """What one cgroup allows; None where it has no limit or does not say."""
    try:
        text = (folder / limit).read_text().strip()
        if text == "max" or int(text) >= UNLIMITED:
            return None
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return None
    files = int(stat[stat.index(dropped) + 1]) if dropped in stat else 0
    return Memory(total=int(text), available=max(int(text) - used + files, 0))


def resident(root: Path = Path("/")) -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    try:
        lines = (root / "proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


def room(memory: Memory, workers: int, own: int) -> int:
    """Bytes that one of `workers` processes may still take: what is available, and no more than its even part of all.

    `own` is what it holds already. Workers that start at once see the same memory as available; the even part keeps
    them from all taking it.
    """
    return max(min(memory.available, memory.total // workers - own), 0)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which copies of a model stay between runs, and whether a model fits, by the memory that this process may take.

    The available memory is MemAvailable or what the cgroup leaves, whichever is smaller. With xdist each worker has
    its even part. The model as it was built, its copy in the case's dtype and the device's copy stay until another
    dtype or model comes. So does a whole float64 copy while all copies together take at most SMALL (1 GiB) and SHARE
    (a sixteenth) of that memory. A larger model runs in float64 layer by layer: a parameter is cast when the model
    reads it, which gives the same bits. That adds 2 to 5 % to a row (blocks of AIMv2-large, CPU seconds, one thread),
    spares the copying, and keeps a case within 4 (float32) or 6 bytes (half) a parameter, 8 with the process without
    torch_npu, and LARGEST bytes for each element of the largest parameter. A case that needs more than there is raises
    before it takes it.
    """

    memory: Memory | None  # None: unknown, so nothing is refused
    workers: int = 1
    own: int = 0  # bytes that this process holds, the built model among them

    @classmethod
    def here(cls) -> Policy:
        """The policy for this process on this machine, now."""
        return cls(memory=read_memory(), workers=int(os.environ.get("PYTEST_XDIST_WORKER_COUNT") or 1), own=resident())

    @property
    def room(self) -> int | None:
        """Bytes that this process may still take; None where that is unknown."""
        return None if self.memory is None else room(self.memory, self.workers, self.own)

    def layers(self, size: SizeInMemory, dtype: object, *, separate: bool) -> bool:
        """Whether a model of that size runs in float64 layer by layer."""
        whole = needed(size, _name_of(dtype), layers=False, separate=separate).host
        limit = SMALL if self.room is None else min(SMALL, SHARE * self.room)
        return whole > limit

    def check(
        self, name: str, size: SizeInMemory, dtype: object, *, separate: bool, emulated: bool, layers: bool
    ) -> None:
        """Raise MemoryLimitError where the copies that case `name` needs beside the built model do not fit."""
        need = needed(size, _name_of(dtype), layers=layers, separate=separate, emulated=emulated)
        more = need.host - need.built
        if self.room is None or more <= self.room:
            return
        way = "float64 layer by layer already" if layers else "with a whole float64 copy"
        others = "" if self.workers == 1 else f", the part of one of {self.workers} workers"
        advice = ["fewer workers (-n)"] if self.workers > 1 else []
        half = needed(size, "float16", layers=layers, separate=separate, emulated=emulated)
        advice += ["a half dtype"] if BYTES[_name_of(dtype)] > 2 and half.host < need.host else []
        words = ", ".join([*advice, "a machine with more memory"])
        raise MemoryLimitError(
            f"{name}: {size.parameters:,} parameters in {_name_of(dtype)} need {more / GIB:.1f} GiB of host memory "
            f"beside the model as built ({way}), and {self.room / GIB:.1f} GiB are left on "
            f"{self.memory.source}{others}; "
            f"use {words}"
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What `workers` processes with one case each need, in bytes, and whether the host has it (None: unknown)."""

    dtype: str
    separate: bool
    mapped: bool  # the weights stay in the files of a checkpoint that stores them in this dtype
    host: int  # all processes, the libraries among it
    bytes_a_parameter: float  # of one process, without the libraries
    device: int  # weights on the device of one process
    fits: bool | None


def estimates(
    parameters: int, dtypes: tuple[str, ...], *, workers: int, memory: Memory | None, emulated: bool = False
) -> list[Estimate]:
    """What cases with a language model of that size need, by dtype: of a model that is built in float32, without and
    with the process without torch_npu, and of a checkpoint that stores its weights in that dtype.

    Raises: ValueError for a dtype that is not in BYTES, or for less than one parameter or worker.
    """
    if parameters < 1 or workers < 1:
        raise ValueError(
            f"a model has at least one parameter and a run at least one worker, not {parameters} and {workers}"
        )
    built = SizeInMemory.of(parameters)
    result = []
    for dtype in dtypes:
        stored = replace(built, mapped=parameters, built_in=dtype)
        for size, separate in ((built, False), (built, True), (stored, True)):
            how = dict(separate=separate, workers=workers, memory=memory, emulated=emulated)
            result.append(estimate(size, dtype, **how))
    return result


def estimate(
    size: SizeInMemory, dtype: str, *, separate: bool, workers: int, memory: Memory | None, emulated: bool = False
) -> Estimate:
    """What cases with a model of that size need in one dtype. Raises: ValueError for a dtype that is not in BYTES."""
    layers = Policy(memory=memory, workers=workers).layers(size, dtype, separate=separate)
    need = needed(size, dtype, layers=layers, separate=separate, emulated=emulated)
    host = int(workers * (need.host + _LIBRARIES[separate]))
    return Estimate(
        dtype=dtype,
        separate=separate,
        mapped=size.mapped > 0 and size.built_in == dtype,
        host=host,
        bytes_a_parameter=need.host / size.parameters,
        device=need.device,
        fits=None if memory is None else host <= min(memory.available, memory.total),
    )


def count_of(text: str) -> int:
    """The number of parameters that a text says: "7B", "350M", "1.1b", "124000000".

    Raises: ValueError for anything else.
    """
    units = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
    upper = text.strip().upper()
    try:
        count = float(upper[:-1]) * units[upper[-1]] if upper[-1:] in units else float(upper)
    except ValueError:
        count = 0
    if not 1 <= count < 1e15:
        raise ValueError(f"model size {text!r}: write the number of parameters, such as 7B, 350M or 124000000")
    return round(count)


def _name_of(dtype: object) -> str:
    """ "float16" of torch.float16, or of its name; what is no dtype of BYTES counts as float32."""
    name = str(dtype).removeprefix("torch.")
    return name if name in BYTES else "float32"
