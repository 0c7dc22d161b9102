"""What several operators need: half dtypes taken wide, two operands in one dtype, axes by their default."""

from __future__ import annotations

import functools

import torch

from harness.numerics import HALF


def upcast(value):
    """Half tensors as float32, anything else as it is."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


def common(self, other):
    """Both in the dtype that torch promotes them to, half ones as float32."""
    dtype = torch.result_type(self, other)
    dtype = torch.float32 if dtype in HALF else dtype
    return tuple(value.to(dtype) if isinstance(value, torch.Tensor) else value for value in (self, other))


def all_but_channels(x):
    """The axes of x, (N, C, …), but for that of its channels."""
    return [axis for axis in range(x.dim()) if axis != 1]


def axes(dims, self):
    return tuple(dims) if dims else tuple(range(self.dim()))


def alike(*values):
    """The tensors among the values in the one dtype that they promote to, half ones as float32; anything else as it
    is.
    """
    dtypes = [
        torch.float32 if value.dtype in HALF else value.dtype for value in values if isinstance(value, torch.Tensor)
    ]
    dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else None
    return tuple(value.to(dtype) if isinstance(value, torch.Tensor) else value for value in values)


def ints(values) -> list[int]:
    """A tensor of sizes or axes as a list."""
    return [int(number) for number in values.reshape(-1).tolist()]
