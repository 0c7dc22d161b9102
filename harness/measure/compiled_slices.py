"""Sums of squares by part in one compiled pass, slices.c: what is given to it and what it gives back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.measure import compiled
from harness.measure.compiled import PART_SIZE, code_of, readable, share_out

if TYPE_CHECKING:
    from torch import Tensor

_RUNS = 16  # matrices at most
_PARTS = 16  # that the rows are divided into at most, each with sums of its own
_ROWS = 16  # of a part at least, so that its own sums are small beside what it reads
_TABLES, _RANGE = 2, 2200


class _Job(ctypes.Structure):
    _fields_ = [
        ("runs", ctypes.c_void_p * _RUNS),
        ("kinds", ctypes.c_int64 * _RUNS),
        *((name, ctypes.c_void_p) for name in ("sums", "blocks", "own")),
        *((name, ctypes.c_int64) for name in "number width all start stop columns stride parts next".split()),
    ]


class CompiledSums:
    """The sums of several matrices of one shape, golden first, some rows at a time; see `slices._TorchSums`."""

    batch = 1 << 22  # elements of the rows that are read at a time

    def __init__(self, code: ctypes.CDLL, flat: Sequence[Tensor], columns: bool, blocks: Tensor | None):
        import torch

        self._code, self._flat, self._blocks = code, flat, blocks
        rows, width = flat[0].shape
        most = min(rows, max(self.batch // width, 1))  # rows that are read at a time
        parts = max(min(_PARTS, most // _ROWS, most * width // PART_SIZE), 1)
        self._columns = len(flat) * width if columns else 0
        stride = self._columns + _TABLES * _RANGE * (len(flat) + 1)
        self._own = torch.zeros(parts, stride, dtype=torch.float64)
        self._job = _Job(
            runs=(ctypes.c_void_p * _RUNS)(*(tensor.data_ptr() for tensor in self._flat)),
            kinds=(ctypes.c_int64 * _RUNS)(*map(code_of, flat)),
            blocks=None if blocks is None else blocks.data_ptr(),
            own=self._own.data_ptr(),
            number=len(flat),
            width=width,
            all=rows,
            columns=columns,
            stride=stride,
            parts=parts,
        )

    @classmethod
    def of(cls, flat: Sequence[Tensor], columns: bool, blocks: Tensor | None) -> CompiledSums | None:
        """None where torch must do it."""
        code, read = compiled.compiled_code(), readable(flat)
        if code is None or read is None or len(flat) > _RUNS:
            return None
        return cls(code, read, columns, blocks)

    def rows(self, start: int, stop: int) -> Tensor:
        """The sums of these rows, (matrices, rows)."""
        import torch

        result = torch.empty(len(self._flat), stop - start, dtype=torch.float64)
        self._job.sums, self._job.start, self._job.stop, self._job.next = result.data_ptr(), start, stop, 0
        pointer = ctypes.byref(self._job)
        share_out(lambda: self._code.harness_slices(pointer), self._job.parts, lambda: False)
        return result

    def columns(self) -> Tensor:
        """The sums of every column of the rows that were read, (matrices, width)."""
        return self._total()[: self._columns].view(len(self._flat), -1)

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """The sums by the exponent of golden, (matrices, exponents), and the numbers of elements."""
        tables = self._total()[self._columns :].view(_TABLES, _RANGE, -1)
        table = tables[0] + tables[1]
        return table[:, :-1].t().contiguous(), table[:, -1].long()

    def _total(self) -> Tensor:
        """What the parts have together, in their order."""
        result = self._own[0].clone()
        for part in self._own[1:]:
            result += part
        return result
