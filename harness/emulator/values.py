"""Device memory as torch tensors: reads what runtime.c made of the arguments of an operator."""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.emulator import layouts

_DTYPES = {  # aclDataType
    0: torch.float32, 1: torch.float16, 2: torch.int8, 3: torch.int32, 4: torch.uint8, 6: torch.int16, 7: torch.uint16,
    8: torch.uint32, 9: torch.int64, 10: torch.uint64, 11: torch.float64, 12: torch.bool, 16: torch.complex64,
    17: torch.complex128, 27: torch.bfloat16, 33: torch.complex32,
}  # fmt: skip
MAX_DIMS = 16
_TENSOR = struct.Struct(f"=7q{3 * MAX_DIMS}q")
_DESCRIPTION = struct.Struct("=3q64s")  # behind the tensor in a description of the older path
_UNDEFINED = -1  # aclDataType of an optional input that is not there
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
    storage: tuple[int, ...] = ()  # the dimensions that lie in memory
    name: str = ""  # of an input of the older path

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def blocked(self) -> bool:
        """Whether it lies in one of the NPU's own layouts."""
        return layouts.blocked(self.format)

    def view(self) -> torch.Tensor:
        """The tensor over the device's memory, or a copy of one in blocks; it must not outlive the operator."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.blocked:
            base, order = self._base()
            return layouts.unpack(self._memory(math.prod(self.storage)), self.format, self.storage, base).permute(order)
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))
        return self._memory(last + 1).as_strided(self.shape, self.strides)

    def write(self, value: torch.Tensor) -> None:
        """Put a value of this shape and dtype where the tensor lies."""
        if not self.numel:
            return
        if not self.blocked:
            self.view().copy_(value)
            return
        base, order = self._base()
        lying = value.permute([order.index(axis) for axis in range(len(order))])
        self._memory(math.prod(self.storage)).copy_(layouts.pack(lying, self.format, self.storage))

    def _memory(self, count: int) -> torch.Tensor:
        if not self.data:
            raise ValueError("a tensor with elements came without memory")
        memory = (ctypes.c_char * (count * self.dtype.itemsize)).from_address(
            self.data + self.offset * self.dtype.itemsize
        )
        return torch.frombuffer(memory, dtype=self.dtype)

    def _base(self) -> tuple[tuple[int, ...], list[int]]:
        """Of a tensor in blocks: the shape that was laid out, and how its axes make this one: a program may transpose a
        weight.
        """
        lying = sorted(
            range(len(self.shape)), key=lambda axis: -self.strides[axis]
        )  # axes from the slowest to the fastest
        base = tuple(self.shape[axis] for axis in lying)
        dense, count = True, 1
        for axis in reversed(lying):
            dense = dense and (self.shape[axis] == 1 or self.strides[axis] == count)
            count *= self.shape[axis]
        if self.offset or not dense:
            raise ValueError(f"a part of a tensor in layout {self.format}: only whole ones can be read or written")
        return base, [lying.index(axis) for axis in range(len(lying))]


def tensor(pointer: int | None) -> Spec | None:
    """The description of an aclTensor; None for a null pointer."""
    if not pointer:
        return None
    fields = _TENSOR.unpack(ctypes.string_at(pointer, _TENSOR.size))
    _, dtype, format, dims, offset, data, storage_dims = fields[:7]
    if dtype not in _DTYPES:
        raise ValueError(f"aclDataType {dtype} is not emulated")
    shape, strides, storage = (fields[7 + n * MAX_DIMS : 7 + (n + 1) * MAX_DIMS] for n in range(3))
    return Spec(_DTYPES[dtype], shape[:dims], strides[:dims], offset, data, format, pointer, storage[:storage_dims])


def description(pointer: int) -> Spec | None:
    """The tensor of an aclTensorDesc that came with a buffer; None for an optional one that is not there."""
    dtype = struct.unpack("=2q", ctypes.string_at(pointer, 16))[1]
    if dtype == _UNDEFINED:
        return None
    spec = tensor(pointer)
    _, _, room, name = _DESCRIPTION.unpack(ctypes.string_at(pointer + _TENSOR.size, _DESCRIPTION.size))
    needed = (math.prod(spec.storage) if spec.blocked else spec.numel) * spec.dtype.itemsize
    if spec.numel and needed > room:
        raise ValueError(f"a buffer of {room} bytes for a tensor of {needed}")
    return replace(spec, name=name.split(b"\0")[0].decode())


def attributes(pointer: int | None) -> dict[str, Any]:
    """An aclopAttr as keywords; names that begin with an underscore speak to the engine and are left out."""
    result: dict[str, Any] = {}
    if not pointer:
        return result
    used, _, start = struct.unpack("=3q", ctypes.string_at(pointer, 24))
    records = ctypes.string_at(start, used) if used else b""
    at = 0
    while at < used:
        kind, name_bytes, value_bytes = struct.unpack_from("=3q", records, at)
        at += 24 + name_bytes
        name = records[at - name_bytes : at].decode()
        if not name.startswith("_"):
            result[name] = _ATTRIBUTES[kind](records[at : at + value_bytes])
        at += value_bytes
    return result


def _one(code: str):
    return lambda raw: struct.unpack("=" + code, raw)[0]


def _several(code: str):
    return lambda raw: struct.unpack(f"={len(raw) // struct.calcsize('=' + code)}{code}", raw)


def _int_lists(raw: bytes) -> tuple:
    values, lists = _several("q")(raw), []
    while values:
        lists.append(values[1 : 1 + values[0]])
        values = values[1 + values[0] :]
    return tuple(lists)


_ATTRIBUTES = {  # by the kinds of runtime.c
    1: _one("?"), 2: _one("q"), 3: _one("f"), 4: bytes.decode, 5: lambda raw: _DTYPES.get(_one("q")(raw)),
    6: _several("?"), 7: _several("q"), 8: _several("f"), 9: _int_lists,
}  # fmt: skip


def scalar(pointer: int | None) -> Any:
    """The value of an aclScalar as a Python number."""
    if not pointer:
        return None
    _, dtype = struct.unpack("=2q", ctypes.string_at(pointer, 16))
    raw = ctypes.string_at(pointer + 16, 16)
    if dtype in _SCALARS:
        result = struct.unpack_from("=" + _SCALARS[dtype], raw)
        return result[0] if len(result) == 1 else complex(*result)
    return torch.frombuffer(bytearray(raw[:2]), dtype=_DTYPES[dtype]).item()


def _array(pointer: int | None, code: str) -> tuple | None:
    if not pointer:
        return None
    _, count = struct.unpack("=2q", ctypes.string_at(pointer, 16))
    return struct.unpack(f"={count}{code}", ctypes.string_at(pointer + 16, count * struct.calcsize("=" + code)))


def _list(read):
    return lambda pointer: None if not pointer else [read(item) for item in _array(pointer, "q")]


_READERS = {
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
    reader = _READERS.get(kind)
    return value if reader is None else reader(value)
