"""How far the parts of a tensor are off, each measured by its own size: rows, slices along an axis, blocks, magnitudes.

The error of a whole tensor says nothing of a part that is small beside the rest: the humidity of a weather model beside
its pressure, the scores of a detector beside its boxes, a quiet sample of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.measure.comparison import CHUNK, Count, Size
from harness.measure.compiled_slices import CompiledSums

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 8  # elements of a part; the error of fewer scatters too much to say anything
BLOCKS = 16  # into which the last axis is cut where each has at least `_BLOCK` elements
_BLOCK = 64
MAGNITUDE = 64  # elements of a range of magnitudes
_SHIFT, _RANGE = 1100, 2200  # exponents of float64 and where they are counted


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Of all parts of one kind the one with the largest relative error, beside the largest of any part in healthy
    runs.
    """

    error: Size  # ‖actual - golden‖ / ‖golden‖ of the part
    healthy: Size  # the largest ‖healthy - golden‖ / ‖golden‖ of any part of this kind
    count: Count  # elements of the part
    where: str  # "row (0, 3)", "index 2 of axis 1"
    magnitude: bool = False  # of the values between two powers of two, wherever they are


def worst_slices(actual: Tensor, golden: Tensor, healthy: Sequence[Tensor]) -> tuple[Slice, ...]:
    """The worst part of each kind; none where the shapes differ, and none of a kind with fewer than two parts of
    `_LEAST` elements.

    The kinds are: rows (vectors along the last axis), the slices of each axis, `BLOCKS` blocks of a long last axis, and
    the elements whose golden value lies between two powers of two. Elements that are not finite in one of the tensors
    are left out, and parts whose golden values are all zero.

    Example: the channels of a weather model, in axis 1, of which the third is off by a tenth:

    >>> import torch
    >>> sizes = torch.tensor([1e5, 10.0, 1e-2])[:, None]
    >>> golden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * sizes
    >>> actual, healthy = golden.clone(), golden * (1 + 1e-6)
    >>> actual[:, 2] *= 1.1
    >>> next(each.where for each in worst_slices(actual, golden, [healthy]) if "axis 1" in each.where)
    'index 2 of axis 1'
    """
    import torch

    shape = tuple(golden.shape)
    if (
        golden.is_complex()
        or not golden.numel()
        or not healthy
        or any(tensor.shape != shape for tensor in (actual, *healthy))
    ):
        return ()
    with torch.no_grad():
        return _of_flat(actual, golden, healthy) if len(shape) < 2 else _of_rows(actual, golden, healthy)


def _of_rows(actual: Tensor, golden: Tensor, healthy: Sequence[Tensor]) -> tuple[Slice, ...]:
    parts = _Parts(tuple(golden.shape))
    parts.read(actual, golden, healthy)
    return parts.all()


def _of_flat(actual: Tensor, golden: Tensor, healthy: Sequence[Tensor]) -> tuple[Slice, ...]:
    """Of one vector: its blocks are the rows of a matrix."""
    count = golden.numel()
    width = count // BLOCKS
    if width < _BLOCK:
        return _of_matrix(1, count, actual, golden, healthy).worst_magnitude()
    end = width * BLOCKS
    parts = _of_matrix(BLOCKS, width, actual[:end], golden[:end], [run[:end] for run in healthy])
    rows = parts.worst(parts.rows, width, lambda block: f"block {block} of {BLOCKS}")
    if end < count:
        rest = _of_matrix(1, count - end, actual[end:], golden[end:], [run[end:] for run in healthy])
        parts.magnitudes += rest.magnitudes
        parts.numbers += rest.numbers
    return (*rows, *parts.worst_magnitude())


def _of_matrix(rows: int, width: int, actual: Tensor, golden: Tensor, healthy: Sequence[Tensor]) -> _Parts:
    """The parts of a vector in rows: neither their columns nor their blocks mean anything."""
    parts = _Parts((rows, width), columns=False)
    parts.read(actual, golden, healthy)
    return parts


class _TorchSums:
    """The sums of several matrices of one shape, golden first, some rows at a time."""

    def __init__(self, flat: list[Tensor], columns: bool, blocks: Tensor | None):
        import torch

        width = flat[0].shape[1]
        self.batch = CHUNK  # elements of the rows that are read at a time
        self._flat, self._blocks = flat, blocks
        self._columns = torch.zeros(len(flat), width if columns else 0, dtype=torch.float64)
        self._magnitudes = torch.zeros(len(flat), _RANGE, dtype=torch.float64)
        self._numbers = torch.zeros(_RANGE, dtype=torch.int64)

    def rows(self, start: int, stop: int) -> Tensor:
        """The sums of these rows, (matrices, rows)."""
        import torch

        wide = [item[start:stop].double() for item in self._flat]
        squares = self._squares(wide)
        if self._blocks is not None:
            block = squares.shape[2] // BLOCKS
            cut = squares[:, :, : block * BLOCKS].reshape(len(wide), -1, BLOCKS, block)
            self._blocks[:, start:stop] = cut.sum(3)
        if self._columns.numel():
            self._columns += squares.sum(1)
        exponents = torch.frexp(wide[0]).exponent.clamp_(-_SHIFT, _SHIFT - 1).add_(_SHIFT).long().reshape(-1)
        self._magnitudes.index_add_(1, exponents, squares.view(len(wide), -1))
        self._numbers += torch.bincount(exponents, minlength=_RANGE)
        return squares.sum(2)

    @staticmethod
    def _squares(wide: list[Tensor]) -> Tensor:
        """Squares of golden and of the differences, zero where an element is not finite."""
        import torch

        squares = torch.stack([wide[0], *(item - wide[0] for item in wide[1:])])
        bad = ~torch.isfinite(squares).all(0)
        if bool(bad.any()):
            squares[:, bad] = 0.0
        return squares.square_()

    def columns(self) -> Tensor:
        """The sums of every column of the rows that were read, (matrices, width)."""
        return self._columns

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """The sums by the exponent of golden, (matrices, exponents), and the numbers of elements."""
        return self._magnitudes, self._numbers


class _Parts:
    """Sums of squares by part, of golden and of each run's difference from it, in this order along the first axis."""

    def __init__(self, shape: tuple[int, ...], columns: bool = True):
        self.shape = shape
        self.width = shape[-1]
        self.count = math.prod(shape[:-1])
        self.columns = columns and self.count >= _LEAST
        self.blocked = columns and self.width >= BLOCKS * _BLOCK and self.count > 1
        self.rows: Tensor
        self.axes: list[Tensor]
        self.blocks: Tensor
        self.magnitudes: Tensor  # sums of squares by the exponent of golden
        self.numbers: Tensor  # of elements by that exponent

    def read(self, actual: Tensor, golden: Tensor, healthy: Sequence[Tensor]) -> None:
        """Take the tensors in, a few rows at a time."""
        import torch

        kinds = 2 + len(healthy)
        keeps_rows = self.width >= _LEAST
        self.rows = torch.zeros(kinds, self.count if keeps_rows else 0, dtype=torch.float64)
        self.axes = [torch.zeros(kinds, size, dtype=torch.float64) for size in self.shape[:-1]]
        self.blocks = torch.zeros(kinds, self.count if self.blocked else 0, BLOCKS, dtype=torch.float64)
        flat = [tensor.detach().reshape(self.count, self.width) for tensor in (golden, actual, *healthy)]
        wanted = flat, self.columns, self.blocks if self.blocked else None
        sums = CompiledSums.of(*wanted) or _TorchSums(*wanted)
        step = max(sums.batch // self.width, 1)
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            rows = sums.rows(start, stop)
            if keeps_rows:
                self.rows[:, start:stop] = rows
            index = torch.arange(start, stop)
            for axis in range(len(self.shape) - 2, -1, -1):
                self.axes[axis].index_add_(1, index % self.shape[axis], rows)
                index = index // self.shape[axis]
        self.axes.append(sums.columns() if self.columns else torch.zeros(kinds, 0, dtype=torch.float64))
        self.magnitudes, self.numbers = sums.magnitudes()

    def all(self) -> tuple[Slice, ...]:
        """The worst part of each kind."""
        total = self.count * self.width
        worst = list(self.worst(self.rows, self.width, lambda row: f"row {self._unravel(row)}"))
        for axis, size in enumerate(self.shape):
            if (axis, len(self.shape)) != (0, 2):  # those are the rows
                worst += self.worst(self.axes[axis], total // size, f"index {{}} of axis {axis}".format)
        if self.blocked:
            blocks = self.blocks.flatten(1)

            def where(block: int) -> str:
                return f"block {block % BLOCKS} of {BLOCKS} of row {self._unravel(block // BLOCKS)}"

            worst += self.worst(blocks, self.width // BLOCKS, where)
        return (*worst, *self.worst_magnitude())

    def worst(self, sums: Tensor, count: int, where: Callable[[int], str]) -> tuple[Slice, ...]:
        """The worst of the parts whose sums these are, `count` elements each."""
        if count < _LEAST or sums.shape[1] < 2:
            return ()
        return self._worst(sums, lambda part: count, where)

    def worst_magnitude(self) -> tuple[Slice, ...]:
        """The worst of the ranges of magnitudes that hold enough elements."""
        enough = self.numbers >= MAGNITUDE
        sums = self.magnitudes * enough
        if int(enough.sum()) < 2:
            return ()
        where = lambda part: f"values between 2^{part - _SHIFT - 1} and 2^{part - _SHIFT}"  # noqa: E731
        result = self._worst(sums, lambda part: int(self.numbers[part]), where)
        return tuple(replace(item, magnitude=True) for item in result)

    @staticmethod
    def _worst(sums: Tensor, count: Callable[[int], int], where: Callable[[int], str]) -> tuple[Slice, ...]:
        import torch

        there = sums[0] > 0
        if int(there.sum()) < 2:
            return ()
        relative = (sums[1:] / torch.where(there, sums[0], 1.0)).sqrt_().masked_fill_(~there, 0.0)
        part = int(relative[0].argmax())
        healthy = float(relative[1:].max())
        return (Slice(error=float(relative[0, part]), healthy=healthy, count=count(part), where=where(part)),)

    def _unravel(self, row: int) -> tuple[int, ...]:
        index = []
        for size in reversed(self.shape[:-1]):
            row, position = divmod(row, size)
            index.append(position)
        return tuple(reversed(index))
