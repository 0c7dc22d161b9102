"""The compiled pass over two tensors, comparison.c: built at first use, shared among torch's threads."""

from __future__ import annotations

import ctypes
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import compiling
from harness.errors import CompilerError

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "HARNESS_COMPARE"  # "torch" in this environment variable: nothing is compiled
STEP = 1 << 16  # elements that a thread takes at a time
BINS = 1024  # of the histogram
_SOURCE = Path(__file__).with_name("comparison.c")
_LIBRARY = "comparison.so"
_FLAGS = (
    "-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fno-strict-aliasing",
    "-w", "-shared", "-fPIC",
)  # fmt: skip
_KINDS = {  # by dtype, as comparison.c numbers them
    "float32": 0, "float64": 1, "float16": 2, "bfloat16": 3,
    "uint8": 4, "bool": 4, "int8": 5, "int16": 6, "int32": 7,
}  # fmt: skip
_INTEGERS = 4  # the first kind that is none of floating point: torch compares such a pair in float32


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


_D, _I = ctypes.c_double, ctypes.c_int64


class _Row(ctypes.Structure):
    _fields_ = [
        *_fields(_D, "diff2 actual2 expected2 dot actual_top expected_top expected_there"),
        *_fields(_I, "actual_at expected_at"),
    ]


class Part(ctypes.Structure):
    """What was measured of some elements; comparison.c says what each field is."""

    _fields_ = [
        *_fields(_D, "low high square rest"),
        *_fields(_I, "finite filled"),
        *_fields(_D, "diff2 actual2 expected2 dot gained shifted abs_diff size relative ulps"),
        *_fields(_D, "max_diff worst_actual worst_expected differ_actual differ_expected"),
        *_fields(_D, "close_excess dynamo_excess scaled_max relative_max ulps_max"),
        *_fields(_D, "token_diff2 token_distance flip_margin flip_value"),
        *_fields(_I, "worst first_differ worst_token_diff worst_token first_flip"),
        *_fields(_I, "above unequal within flips nan_actual nan_expected inf_actual inf_expected nonfinite_differ"),
        ("scale", _D),
        ("row", _Row),
    ]


COUNTED = (  # the fields of a part that `_Sums` in comparison.py has by the same name
    *"diff2 actual2 expected2 dot gained shifted abs_diff size relative ulps max_diff worst".split(),
    *"close_excess dynamo_excess scaled_max relative_max ulps_max".split(),
    *"token_diff2 token_distance worst_token_diff worst_token flips flip_margin flip_value".split(),
    *"above unequal within nan_actual nan_expected inf_actual inf_expected nonfinite_differ".split(),
)


class _Job(ctypes.Structure):
    _fields_ = [
        *_fields(ctypes.c_void_p, "actual expected parts histogram"),
        *_fields(_I, "actual_kind expected_kind count width step number"),
        *_fields(_I, "tokens rows filled places stage next"),
        *_fields(_D, "fill rms close_relative close_absolute dynamo_relative smallest"),
    ]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How two tensors are read."""

    width: int  # elements of a row; all of them where there are no rows
    tokens: bool  # whether rows are measured by themselves
    rows: bool  # whether the largest element of each row is looked for
    step: int = STEP  # elements of a part


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What differences are read against; see `comparison.CLOSE` and the tables beside it."""

    close_relative: float
    close_absolute: float
    dynamo_relative: float
    mantissa: int  # 0: of integers
    smallest: float


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is no compiler, it fails, or `VARIABLE` says torch."""
    if os.environ.get(VARIABLE) == "torch" or os.name != "posix":
        return None
    try:
        key = compiling.key(
            _SOURCE.read_bytes(),
            " ".join(_FLAGS).encode(),
            compiling.processor().encode(),
        )
        result = ctypes.CDLL(str(compiling.built(f"compare-{key}", _LIBRARY, _make) / _LIBRARY))
    except (CompilerError, OSError):
        return None
    result.harness_sizes.restype = result.harness_advance.restype = ctypes.c_int64
    result.harness_work.restype = result.harness_compare.restype = None
    if [result.harness_sizes(number) for number in range(3)] != [ctypes.sizeof(kind) for kind in (_Job, Part, _Row)]:
        return None
    return result


def _make(folder: Path) -> None:
    aside = folder / "aside.so"
    command = [*compiling.compiler(), *_FLAGS, str(_SOURCE), "-o", str(aside), "-lm"]
    try:
        compiling.run([*command, "-march=native"])
    except CompilerError:  # a compiler that does not know this processor
        compiling.run(command)
    aside.rename(folder / _LIBRARY)


def kind_of(tensor: Tensor) -> int:
    """The number of a tensor's dtype in the compiled code, -1 where it has none."""
    return _KINDS.get(str(tensor.dtype).removeprefix("torch."), -1)


def measured(actual: Tensor, expected: Tensor, shape: Shape, limits: Limits) -> tuple[Part, list[int]] | None:
    """The numbers and the histogram of two CPU tensors of one shape that is not empty; None where torch must do it."""
    kinds = [kind_of(tensor) for tensor in (actual, expected)]
    code = library()
    if code is None or -1 in kinds or len({kind >= _INTEGERS for kind in kinds}) > 1:
        return None
    actual, expected = (tensor.resolve_neg().contiguous() for tensor in (actual, expected))
    if not actual.data_ptr() or not expected.data_ptr():  # of no memory of its own
        return None
    count = actual.numel()
    step = max(shape.step // shape.width, 1) * shape.width if shape.width <= shape.step else shape.step
    number = -(-count // step) if shape.width <= shape.step else count // shape.width * -(-shape.width // step)
    parts, histogram = (Part * (number + 1))(), (ctypes.c_int64 * BINS)()
    job = _Job(
        actual=actual.data_ptr(),
        expected=expected.data_ptr(),
        parts=ctypes.addressof(parts),
        histogram=ctypes.addressof(histogram),
        actual_kind=kinds[0],
        expected_kind=kinds[1],
        count=count,
        width=shape.width,
        step=step,
        number=number,
        tokens=shape.tokens,
        rows=shape.rows,
        places=limits.mantissa > 0,
        close_relative=limits.close_relative,
        close_absolute=limits.close_absolute,
        dynamo_relative=limits.dynamo_relative,
        smallest=limits.smallest,
    )
    _run(code, job, number)
    return parts[number], list(histogram)


def _run(code: ctypes.CDLL, job: _Job, number: int) -> None:
    """Do the job in as many threads as torch has; ctypes lets the interpreter go on meanwhile."""
    import torch

    others = min(torch.get_num_threads(), number) - 1
    if others < 1:
        code.harness_compare(ctypes.byref(job))
        return
    with ThreadPoolExecutor(others) as pool:
        while True:
            waiting = [pool.submit(code.harness_work, ctypes.byref(job)) for _ in range(others)]
            code.harness_work(ctypes.byref(job))
            for item in waiting:
                item.result()
            if not code.harness_advance(ctypes.byref(job)):
                return
