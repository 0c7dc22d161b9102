"""Device memory as torch tensors: reads what runtime.c made of the arguments of an operator."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {  # aclDataType
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16, 7: torch.uint16,
    8: torch.uint32, 9: torch.int64, 10: torch.uint64, 11: torch.float64, 12: torch.bool, 16: torch.complex64,
    17: torch.complex128, 27: torch.bfloat16, 33: torch.complex32,
}  # fmt: skip
MAX_DIMS = 16
_TENSOR = struct.Struct(f"=7q{3 * MAX_DIMS}q")
_SCALARS = {0: "f", 2: "b", 3: "i", 4: "B", 6: "h", 9: "q", 11: "d", 12: "?", 16: "2f", 17: "2d"}


@dataclass(frozen=True)
class Spec:
    """A tensor argument as the call described it: where it lies and how it is strided, in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    data: int
    format: int = 2  # aclFormat of the storage: ND
    handle: int = 0  # the aclTensor

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def view(self) -> torch.Tensor:
        """The tensor over the device's memory; it must not outlive the operator."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        if not self.data:
            raise ValueError("a tensor with elements came without memory")
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        start = self.data + self.offset * self.dtype.itemsize
        memory = (ctypes.c_char * ((last + 1) * self.dtype.itemsize)).from_address(start)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.shape, self.strides)


def tensor(pointer: int | None) -> Spec | None:
    """The description of an aclTensor; None for a null pointer."""
    if not pointer:
        return None
    fields = _TENSOR.unpack(ctypes.string_at(pointer, _TENSOR.size))
    _, dtype, format, dims, offset, data, _ = fields[:7]
    if dtype not in DTYPES:
        raise ValueError(f"aclDataType {dtype} is not emulated")
    return Spec(DTYPES[dtype], fields[7 : 7 + dims], fields[7 + MAX_DIMS : 7 + MAX_DIMS + dims], offset, data, format, pointer)


def scalar(pointer: int | None) -> Any:
    """The value of an aclScalar as a Python number."""
    if not pointer:
        return None
    _, dtype = struct.unpack("=2q", ctypes.string_at(pointer, 16))
    raw = ctypes.string_at(pointer + 16, 16)
    if dtype in _SCALARS:
        found = struct.unpack_from("=" + _SCALARS[dtype], raw)
        return found[0] if len(found) == 1 else complex(*found)
    return torch.frombuffer(bytearray(raw[:2]), dtype=DTYPES[dtype]).item()


def _array(pointer: int | None, code: str) -> tuple | None:
    if not pointer:
        return None
    _, count = struct.unpack("=2q", ctypes.string_at(pointer, 16))
    return struct.unpack(f"={count}{code}", ctypes.string_at(pointer + 16, count * struct.calcsize("=" + code)))


def _list(read):
    return lambda pointer: None if not pointer else [read(each) for each in _array(pointer, "q")]


READERS = {
    "tensor": tensor,
    "scalar": scalar,
    "ints": lambda pointer: _array(pointer, "q"),
    "bools": lambda pointer: _array(pointer, "?"),
    "floats": lambda pointer: _array(pointer, "f"),
    "tensors": _list(tensor),
    "scalars": _list(scalar),
    "str": lambda text: None if text is None else text.decode(),
}


def read(kind: str, value: Any) -> Any:
    """One C argument as Python has it: a Spec, a number, a tuple, a string."""
    reader = READERS.get(kind)
    return value if reader is None else reader(value)
