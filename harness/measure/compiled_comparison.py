"""One compiled pass over two tensors, comparison.c: what is given to it and what it gives back."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
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


TOGETHER = 8  # pairs at most that are read in one pass


class _Work(ctypes.Structure):
    _fields_ = [
        ("jobs", ctypes.c_void_p * TOGETHER),
        *((name, ctypes.c_int64) for name in "count number stage next".split()),
    ]


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


class Prepared:
    """A pair of CPU tensors of one shape that is not empty, ready for the compiled pass.

    `brief`: the sums of squares and the largest difference alone.
    """

    def __init__(self, tensors: list[Tensor], shape: Shape, limits: CloseLimits, brief: bool):
        self._tensors = actual, expected = tensors  # alive while they are read
        count = actual.numel()
        whole = shape.width <= shape.step  # rows in a part; otherwise a part is a piece of a row
        step = max(shape.step // shape.width, 1) * shape.width if whole else shape.step
        self.number = -(-count // step) if whole else count // shape.width * -(-shape.width // step)
        self._parts, self._histogram = (Part * (self.number + 1))(), (ctypes.c_int64 * BINS)()
        self.job = _Job(
            actual=actual.data_ptr(),
            expected=expected.data_ptr(),
            parts=ctypes.addressof(self._parts),
            histogram=ctypes.addressof(self._histogram),
            actual_kind=code_of(actual),
            expected_kind=code_of(expected),
            count=count,
            width=shape.width,
            step=step,
            number=self.number,
            tokens=shape.tokens and not brief,
            rows=shape.rows and not brief,
            places=limits.mantissa > 0,
            brief=brief,
            same=-1,
            close_relative=limits.close_relative,
            close_absolute=limits.close_absolute,
            dynamo_relative=limits.dynamo_relative,
            smallest=limits.smallest,
        )

    @classmethod
    def of(
        cls, actual: Tensor, expected: Tensor, shape: Shape, limits: CloseLimits, brief: bool = False
    ) -> Prepared | None:
        """None where torch must do it."""
        kinds = [code_of(tensor) for tensor in (actual, expected)]
        read = readable((actual, expected))
        if compiled.compiled_code() is None or read is None or len({kind >= INTEGERS for kind in kinds}) > 1:
            return None
        return cls(read, shape, limits, brief)

    @property
    def cut(self) -> tuple[int, int, int]:
        """What pairs that are read together have alike: elements of all, of a row and of a part."""
        return self.job.count, self.job.width, self.job.step

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensors."""
        return tuple(self._tensors[0].shape)

    @property
    def total(self) -> Part:
        """What was measured, once it was read."""
        part: Part = self._parts[self.number]
        return part

    @property
    def histogram(self) -> list[int]:
        """Elements by bin of their difference, once it was read."""
        return list(self._histogram)


def read_together(pairs: Sequence[Prepared]) -> None:
    """Read up to `TOGETHER` pairs that are cut alike in one pass: each tensor comes from memory once."""
    code = compiled.compiled_code()
    assert code is not None, "pairs are prepared for compiled code alone"
    jobs = [pair.job for pair in pairs]
    surveyed: dict[tuple[int, int], int] = {}
    for index, job in enumerate(jobs):
        first = surveyed.setdefault((job.expected, job.expected_kind), index)
        job.same = first if first < index else -1
    pointers = (ctypes.c_void_p * TOGETHER)(*(ctypes.addressof(job) for job in jobs))
    work = _Work(jobs=pointers, count=len(jobs), number=jobs[0].number)
    pointer = ctypes.byref(work)
    if work.number == 1:
        code.harness_compare(pointer)
    else:
        share_out(lambda: code.harness_work(pointer), work.number, lambda: bool(code.harness_advance(pointer)))
