"""Whether two tensors agree once two axes are exchanged: a hint beside a failure, never a pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

READ = 256 << 20  # bytes up to which tensors of other shapes are read for this hint
SAMPLE = 4096  # elements that decide whether an exchange is worth a whole comparison
_MOST = 6  # axes: 15 exchanges


def exchanges(actual: Sequence[int], expected: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of axes, none of size 1, after whose exchange the shape `actual` is `expected`."""
    if len(actual) != len(expected) or len(actual) > _MOST or sorted(actual) != sorted(expected) or not all(actual):
        return []
    pairs = [(i, j) for i, j in itertools.combinations(range(len(actual)), 2) if actual[i] > 1 and actual[j] > 1]
    return [pair for pair in pairs if _exchanged(actual, *pair) == tuple(expected)]


def exchanged_axes(
    actual: Tensor, expected: Tensor, passes: Callable[[Tensor, Tensor], bool]
) -> tuple[int, int] | None:
    """The axes of `actual` after whose exchange it is `expected`, by `passes`; None where there are none."""
    pairs = exchanges(actual.shape, expected.shape)
    for i, j in pairs:
        turned = actual.transpose(i, j)
        if _alike(turned, expected) and passes(turned.contiguous(), expected):
            return i, j
    return None


def _exchanged(shape: Sequence[int], i: int, j: int) -> tuple[int, ...]:
    result = list(shape)
    result[i], result[j] = result[j], result[i]
    return tuple(result)


def _alike(actual: Tensor, expected: Tensor) -> bool:
    """Whether a sample of the elements agrees to 1 % of its size."""
    import torch

    count = math.prod(expected.shape)
    sample = torch.arange(0, count, max(1, count // SAMPLE | 1))[: 2 * SAMPLE]
    index = torch.unravel_index(sample, expected.shape)
    kind = torch.complex128 if expected.is_complex() or actual.is_complex() else torch.float64
    first, second = (tensor[index].to(kind) for tensor in (actual, expected))
    both = torch.isfinite(first) & torch.isfinite(second)
    first, second = first[both], second[both]
    return bool(both.any()) and bool((first - second).norm() <= 0.01 * second.norm())
