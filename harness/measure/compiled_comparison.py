"""One compiled pass over two tensors, comparison.c: what is given to it and what it gives back."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.measure import compiled
from harness.measure.compiled import INTEGERS, PART_SIZE, code_of, readable, share_out

if TYPE_CHECKING:
    from torch import Tensor

BINS = 1024  # of the histogram


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
