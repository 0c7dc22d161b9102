"""One compiled pass over two tensors, comparison.c: what is given to it and what it gives back."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.measure import compiled
from harness.measure.compiled import INTEGERS, PART_SIZE, code_of, readable, share_out

if TYPE_CHECKING:
    from torch import Tensor

BINS = 1024  # of the histogram


_SOURCE = Path(__file__).with_name("comparison.c")
_TYPES: dict[str, Any] = {"double": ctypes.c_double, "int64_t": ctypes.c_int64}


def _fields_of(name: str) -> list[tuple[str, Any]]:
    """The fields of one of the structures of comparison.c, in its order."""
    source = re.sub(r"/\*.*?\*/", "", _SOURCE.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = re.search(rf"typedef struct {{([^}}]*)}} {name};", source)
    assert body is not None, f"comparison.c declares no structure {name}"
    result = []
    for declaration in body[1].split(";"):
        kind, _, names = declaration.strip().removeprefix("const ").partition(" ")
        for field in filter(None, (item.strip() for item in names.split(","))):
            pointer = field.startswith("*")
            result.append((field.lstrip("*"), ctypes.c_void_p if pointer else _TYPES[kind]))
    return result


class _Row(ctypes.Structure):
    _fields_ = _fields_of("Row")


_TYPES["Row"] = _Row


class Part(ctypes.Structure):
    """What was measured of some elements; comparison.c says what each field is."""

    _fields_ = _fields_of("Part")


class _Job(ctypes.Structure):
    _fields_ = _fields_of("Job")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How two tensors are read."""

    width: int  # elements of a row; all of them where there are no rows
    tokens: bool  # whether rows are measured by themselves
    rows: bool  # whether the largest element of each row is looked for
    step: int = PART_SIZE  # elements of a part


@dataclass(frozen=True, kw_only=True)
class CloseLimits:
    """What differences are read against; see `comparison.CLOSE` and the tables beside it."""

    close_relative: float
    close_absolute: float
    dynamo_relative: float
    mantissa: int  # 0: of integers
    smallest: float


def compared(actual: Tensor, expected: Tensor, shape: Shape, limits: CloseLimits) -> tuple[Part, list[int]] | None:
    """The numbers and the histogram of two CPU tensors of one shape that is not empty; None where torch must do it."""
    kinds = [code_of(tensor) for tensor in (actual, expected)]
    code, read = compiled.compiled_code(), readable((actual, expected))
    if code is None or read is None or len({kind >= INTEGERS for kind in kinds}) > 1:
        return None
    actual, expected = read
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
    if number == 1:
        code.harness_compare(ctypes.byref(job))
    else:
        pointer = ctypes.byref(job)
        share_out(lambda: code.harness_work(pointer), number, lambda: bool(code.harness_advance(pointer)))
    return parts[number], list(histogram)
