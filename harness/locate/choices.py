"""Indices among equal numbers: torch leaves open which of them `topk`, an unstable `sort` and others return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.numerics import open_dimension


def settled(
    name: str, args: tuple, kwargs: dict[str, Any], result: list[Tensor], results: list[Tensor]
) -> list[Tensor]:
    """`result`, in which indices of equal numbers are those of `results`: what else differs is an error.

    `name` and the arguments are those of the call, `result` the device's and `results` the CPU's. A row of indices that
    names an element twice, or one that there is not, stays as it is.
    """
    dim = open_dimension(name, args, kwargs)
    if dim is None:
        return result
    pairs = zip(result, results)
    return [_settled(args[0], dim, here, there) if here.dtype == torch.int64 else here for here, there in pairs]


def _settled(numbers: Tensor, dim: int, actual: Tensor, expected: Tensor) -> Tensor:
    if actual.shape != expected.shape or torch.equal(actual, expected):
        return actual
    numbers = numbers.detach().cpu()
    reduced = expected.dim() == numbers.dim() - 1
    here, there = (item.unsqueeze(dim) if reduced else item for item in (actual, expected))
    if here.dim() != numbers.dim() or bool(((here < 0) | (here >= numbers.shape[dim])).any()):
        return actual
    same = numbers.gather(dim, here) == numbers.gather(dim, there)
    ordered = here.sort(dim).values
    twice = (ordered.diff(dim=dim) == 0).any(dim, keepdim=True)
    return torch.where(same & ~twice, there, here).reshape(actual.shape)
