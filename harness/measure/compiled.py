"""The compiled code of this package: built at first use into the user's cache, and run in as many threads as torch has.

comparison.c and slices.c do in one pass what comparison.py and slices.py do in torch, which remains the reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from harness import compiling
from harness.errors import CompilerError

if TYPE_CHECKING:
    from torch import Tensor

COMPARE_VARIABLE = "HARNESS_COMPARE"  # "torch" in this environment variable: nothing is compiled
PART_SIZE = 1 << 16  # elements that a thread takes at a time
_SOURCES = [Path(__file__).with_name(name) for name in ("comparison.c", "slices.c", "reading.h")]
_LIBRARY = "measure.so"
_FLAGS = (
    "-O3", "-std=gnu11", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
    "-fno-strict-aliasing", "-w", "-shared", "-fPIC",
)  # fmt: skip
_KINDS = {  # by dtype, as reading.h numbers them
    "float32": 0, "float64": 1, "float16": 2, "bfloat16": 3,
    "uint8": 4, "bool": 4, "int8": 5, "int16": 6, "int32": 7,
}  # fmt: skip
INTEGERS = 4  # the first kind that is none of floating point


@functools.cache
def compiled_code() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler, it fails, or `COMPARE_VARIABLE` says torch."""
    if os.environ.get(COMPARE_VARIABLE) == "torch" or os.name != "posix":
        return None
    try:
        sources = [path.read_bytes() for path in _SOURCES]
        key = compiling.key(*sources, " ".join(_FLAGS).encode(), compiling.processor().encode())
        result = ctypes.CDLL(str(compiling.built(f"measure-{key}", _LIBRARY, _make) / _LIBRARY))
    except (CompilerError, OSError):
        return None
    result.harness_advance.restype = ctypes.c_int64
    result.harness_work.restype = result.harness_compare.restype = result.harness_slices.restype = None
    return result


def _make(folder: Path) -> None:
    aside = folder / "aside.so"
    sources = [str(path) for path in _SOURCES if path.suffix == ".c"]
    command = [*compiling.compiler(), *_FLAGS, *sources, "-o", str(aside), "-lm"]
    try:
        compiling.run_compiler([*command, "-march=native"])
    except CompilerError:  # a compiler that does not know this processor
        compiling.run_compiler(command)
    aside.rename(folder / _LIBRARY)


def code_of(tensor: Tensor) -> int:
    """The number of a tensor's dtype in the compiled code, -1 where it has none."""
    return _KINDS.get(str(tensor.dtype).removeprefix("torch."), -1)


def readable(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors with their elements in order in memory; None where the compiled code cannot read one of them."""
    import torch

    result = []
    for tensor in tensors:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or code_of(tensor) < 0:
            return None
        result.append(tensor.detach().resolve_neg().contiguous())
    return result if all(tensor.data_ptr() for tensor in result) else None


def share_out(work: Callable[[], object], parts: int, again: Callable[[], bool]) -> None:
    """Call `work`, which takes up to `parts` parts, in torch's number of threads at once, until `again` returns False.

    ctypes lets the interpreter go on while the compiled code runs.
    """
    import torch

    others = min(torch.get_num_threads(), parts) - 1
    with ThreadPoolExecutor(max(others, 1)) as pool:  # it starts no thread before there is work
        while True:
            waiting = [pool.submit(work) for _ in range(others)]
            work()
            for item in waiting:
                item.result()
            if not again():
                return
