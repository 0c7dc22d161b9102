"""Two dtypes made one: the coarser of both, when a comparison asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def at_coarser(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, str | None]:
    """Both tensors in the coarser dtype of both, and in words why they cannot be compared so.

    It is the one with fewer bits; of float16 and bfloat16 it is bfloat16.

    Rounding to the coarser dtype is what the other machine did, so it is no error. A finite value that the coarser
    dtype cannot hold is one: rounded it would be an infinity that the other side may share. Integers are compared in
    the wider dtype, in which equal numbers stay equal. A floating dtype against an integer or a bool is left as it is.
    """
    import torch

    if actual.dtype == expected.dtype:
        return actual, expected, None
    kinds = [_kind(tensor.dtype) for tensor in (actual, expected)]
    if kinds[0] != kinds[1]:
        return actual, expected, None
    if kinds[0] == "integer":
        wide = torch.promote_types(actual.dtype, expected.dtype)
        return (actual.to(wide), expected.to(wide), None) if _kind(wide) == "integer" else (actual, expected, None)
    coarser = min(actual.dtype, expected.dtype, key=lambda value: (value.itemsize, -torch.finfo(value).eps))
    rounded = [tensor.to(coarser) for tensor in (actual, expected)]
    lost = sum(
        int((torch.isfinite(before) & ~torch.isfinite(after)).sum())
        for before, after in zip((actual, expected), rounded)
    )
    name = str(coarser).removeprefix("torch.")
    return *rounded, f"{lost} finite elements are too large for {name}, the coarser dtype of both" if lost else None


def _kind(dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "floating"
    return "bool" if str(dtype) == "torch.bool" else "integer"
