"""How far two tensors are apart: one pass over chunks, in float64, in bounded memory.

This module measures and never judges. `actual` is what the device under test gave, `expected` what it is held against.
torch is imported inside, so that importing the package costs nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 18  # elements compared at a time: 2 MiB a float64 temporary, so that they stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was measured between one pair of tensors: numbers only.

    Differences are in output units. Where the shapes differ nothing could be measured and the numbers are NaN;
    a NaN on either side makes them NaN, and an infinity that the other side lacks makes max_diff infinite.
    """

    shape: tuple[int, ...]  # of actual
    expected_shape: tuple[int, ...]
    dtype: str  # of actual: "float32", …
    expected_dtype: str
    max_diff: float = math.nan  # largest |actual - expected|
    mean_diff: float = math.nan  # mean |actual - expected|
    cos_sim: float = math.nan  # cosine of the two flattened tensors, at most 1
    cos_distance: float = math.nan  # 1 - cosine, without the cancellation of that subtraction
    rel_l2: float = math.nan  # ‖actual - expected‖ / ‖expected‖
    rms: float = math.nan  # root mean square of expected: the scale that differences are read against
    worst_index: tuple[int, ...] | None = None  # of max_diff, or of the first element that is not finite on one side only
    worst_actual: float = math.nan  # the two values there
    worst_expected: float = math.nan
    token_cos_sim: float = math.nan  # least cosine of a token, a vector along the last axis; NaN below two axes
    worst_token: tuple[int, ...] | None = None
    nan_actual: int = 0  # elements that are NaN
    nan_expected: int = 0
    inf_actual: int = 0  # elements that are +inf or -inf
    inf_expected: int = 0
    nonfinite_differ: int = 0  # positions where one side is NaN or infinite and the other is not the same, sign included
    unequal: int = 0  # elements that are not equal

    @property
    def comparable(self) -> bool:
        """Whether the shapes agree, so that there was something to measure."""
        return self.shape == self.expected_shape

    @property
    def numel(self) -> int:
        """Number of elements of actual."""
        return math.prod(self.shape)

    @property
    def max_diff_rms(self) -> float:
        """Largest difference in units of the root mean square of expected."""
        return _ratio(self.max_diff, self.rms)


def compare(actual: Tensor, expected: Tensor) -> Comparison:
    """Measure how far `actual` is from `expected`, both of any dtype and on any device.

    Both are brought to the CPU and read once, in float64, `CHUNK` elements at a time. Complex numbers are compared as
    pairs (a last axis of 2 is added), bools as 0 and 1. An infinity that both sides share counts as no difference.
    The cosine distance is (‖a-e‖² - (‖a‖-‖e‖)²) / (2 ‖a‖ ‖e‖), equal to 1 - cos in exact arithmetic.
    """
    import torch

    header = dict(
        shape=tuple(actual.shape),
        expected_shape=tuple(expected.shape),
        dtype=_name(actual.dtype),
        expected_dtype=_name(expected.dtype),
    )
    if actual.shape != expected.shape:
        return Comparison(**header)
    with torch.no_grad():
        return Comparison(**header, **_measure(_on_cpu(actual), _on_cpu(expected)))


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _on_cpu(tensor: Tensor) -> Tensor:
    import torch

    tensor = tensor.detach().cpu()
    tensor = tensor.dequantize() if tensor.is_quantized else tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _measure(actual: Tensor, expected: Tensor) -> dict:
    """The numbers of a Comparison for two CPU tensors of one shape."""
    shape = actual.shape
    if not actual.numel():
        return dict(
            max_diff=0.0, mean_diff=0.0, cos_sim=1.0, cos_distance=0.0, rel_l2=0.0, rms=0.0, worst_actual=0.0, worst_expected=0.0
        )  # fmt: skip
    tokens = len(shape) > 1 and shape[-1] > 1
    width = shape[-1] if tokens else min(actual.numel(), CHUNK)
    sums = _Sums(tokens=tokens)
    for start, left, right in _chunks(actual, expected, width):
        sums.add(start, left, right)
    return sums.numbers(shape)


def _chunks(actual: Tensor, expected: Tensor, width: int):
    """Yield (index of the first element, rows of actual, rows of expected), rows of `width` elements."""
    left, right = actual.reshape(-1), expected.reshape(-1)
    step = max(CHUNK // width, 1) * width
    for start in range(0, left.numel(), step):
        a, e = left[start : start + step], right[start : start + step]
        rows = (-1, width) if a.numel() % width == 0 else (1, -1)  # the last chunk of a flat tensor may be shorter
        yield start, a.view(rows), e.view(rows)


class _Sums:
    """What is carried from chunk to chunk."""

    def __init__(self, tokens: bool):
        self.tokens = tokens
        self.count = self.width = 0
        self.abs_diff = self.diff2 = self.actual2 = self.expected2 = self.dot = 0.0
        self.max_diff, self.worst = -1.0, 0
        self.worst_values = (math.nan, math.nan)
        self.token_distance, self.worst_token = -1.0, 0
        self.nan_actual = self.nan_expected = self.inf_actual = self.inf_expected = 0
        self.nonfinite_differ = self.unequal = 0

    def add(self, start: int, actual: Tensor, expected: Tensor) -> None:
        """Take in one chunk, (rows, width) each; `start` is the flat index of its first element."""
        import torch

        a, e = actual.double(), expected.double()
        diff = a - e
        self.count, self.width = self.count + a.numel(), a.shape[1]
        self.unequal += int(torch.count_nonzero(actual != expected))
        diff2 = torch.linalg.vecdot(diff, diff)
        if not bool(torch.isfinite(diff2).all()):  # rare: only then is every element looked at
            diff = self._nonfinite(a, e, diff)
            diff2 = torch.linalg.vecdot(diff, diff)
        actual2, expected2 = torch.linalg.vecdot(a, a), torch.linalg.vecdot(e, e)
        magnitude = diff.abs_()
        self.abs_diff += float(magnitude.sum())
        self._find_worst(start, a, e, magnitude)
        for name, rows in (("diff2", diff2), ("actual2", actual2), ("expected2", expected2)):
            setattr(self, name, getattr(self, name) + float(rows.sum()))
        if self.tokens:
            self._find_worst_token(start, diff2, actual2, expected2)

    def _nonfinite(self, a: Tensor, e: Tensor, diff: Tensor) -> Tensor:
        """Count what is not finite and make shared infinities no difference. Zeroes them in `a` and `e`, in place."""
        import torch

        nan_a, nan_e, inf_a, inf_e = a.isnan(), e.isnan(), a.isinf(), e.isinf()
        for name, mask in (("nan_actual", nan_a), ("nan_expected", nan_e), ("inf_actual", inf_a), ("inf_expected", inf_e)):
            setattr(self, name, getattr(self, name) + int(torch.count_nonzero(mask)))
        shared = inf_a & (a == e)
        either = nan_a | nan_e | inf_a | inf_e
        self.nonfinite_differ += int(torch.count_nonzero(either & ~shared & ~(nan_a & nan_e)))
        for tensor in (a, e, diff):
            tensor.masked_fill_(shared, 0.0)
        return diff

    def _find_worst(self, start: int, a: Tensor, e: Tensor, magnitude: Tensor) -> None:
        flat = int(magnitude.argmax())  # a NaN counts as the largest
        found = float(magnitude.view(-1)[flat])
        if math.isnan(self.max_diff) or not (found > self.max_diff or math.isnan(found)):
            return
        self.max_diff, self.worst = found, start + flat
        self.worst_values = (float(a.view(-1)[flat]), float(e.view(-1)[flat]))

    def _find_worst_token(self, start: int, diff2: Tensor, actual2: Tensor, expected2: Tensor) -> None:
        distance = _cos_distance_rows(diff2, actual2, expected2)
        row = int(distance.argmax())
        found = float(distance[row])
        if math.isnan(self.token_distance) or not (found > self.token_distance or math.isnan(found)):
            return
        self.token_distance, self.worst_token = found, start // self.width + row

    def numbers(self, shape: tuple[int, ...]) -> dict:
        """The fields of a Comparison."""
        distance = _cos_distance(self.diff2, self.actual2, self.expected2)
        found = dict(
            max_diff=self.max_diff,
            mean_diff=self.abs_diff / self.count,
            cos_sim=1.0 - distance,
            cos_distance=distance,
            rel_l2=_ratio(_root(self.diff2), _root(self.expected2)),
            rms=_root(self.expected2 / self.count),
            worst_index=_unravel(self.worst, shape),
            worst_actual=self.worst_values[0],
            worst_expected=self.worst_values[1],
            nan_actual=self.nan_actual,
            nan_expected=self.nan_expected,
            inf_actual=self.inf_actual,
            inf_expected=self.inf_expected,
            nonfinite_differ=self.nonfinite_differ,
            unequal=self.unequal,
        )
        if self.tokens:
            found |= dict(token_cos_sim=1.0 - self.token_distance, worst_token=_unravel(self.worst_token, shape[:-1]))
        return found


def _cos_distance(diff2: float, actual2: float, expected2: float) -> float:
    """1 - cosine, from squared norms; two zero vectors point the same way, a zero and another do not."""
    if actual2 == 0 or expected2 == 0:
        return 0.0 if actual2 == expected2 else 1.0
    gap = _root(actual2) - _root(expected2)
    distance = (diff2 - gap * gap) / (2 * _root(actual2) * _root(expected2))
    return 0.0 if distance < 0 else distance  # below zero only by rounding; NaN stays


def _cos_distance_rows(diff2: Tensor, actual2: Tensor, expected2: Tensor) -> Tensor:
    """`_cos_distance` of every row."""
    import torch

    left, right = actual2.sqrt(), expected2.sqrt()
    distance = ((diff2 - (left - right).square_()) / (2 * left * right)).clamp_(min=0.0)
    zero = (actual2 == 0) | (expected2 == 0)
    return torch.where(zero, (actual2 != expected2).double(), distance) if bool(zero.any()) else distance


def _root(square: float) -> float:
    return math.sqrt(square) if square >= 0 else math.nan


def _ratio(part: float, whole: float) -> float:
    """part / whole, where nothing of nothing is 0 and something of nothing is infinite."""
    if whole == 0:
        return 0.0 if part == 0 else math.inf if part > 0 else math.nan
    return part / whole


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return tuple(reversed(index))
