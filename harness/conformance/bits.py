"""Effective bits of each family of operators on a device: -log2 of the relative L2 error against float64 of the same
inputs.

    python -m harness.conformance bits [--device emulated]

float32 gives about 23 or 24, HF32 12.7, float16 products 12.2, bfloat16 products 9.2 (K = 64, normal data): so one
product tells which arithmetic a device really used, whatever its switches say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from harness.conformance.options import parser_of
from harness.devices import open_device
from harness.numerics import effective_bits

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class _Family:
    """One operator on normal data; `cube` says that HF32 can change it, `exact` what it means where that is not
    itself.
    """

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    cube: bool = False
    exact: Callable[..., Any] | None = None


BIT_FAMILIES = (
    _Family(name="matmul", function=torch.matmul, shapes=((_SIZE, _SIZE), (_SIZE, _SIZE)), cube=True),
    _Family(name="linear", function=F.linear, shapes=((_SIZE, _SIZE), (_SIZE, _SIZE), (_SIZE,)), cube=True),
    _Family(name="bmm", function=torch.bmm, shapes=((8, _SIZE, _SIZE), (8, _SIZE, _SIZE)), cube=True),
    _Family(name="conv2d", function=F.conv2d, shapes=((4, 16, 16, 16), (16, 16, 2, 2)), cube=True),
    _Family(name="conv1d", function=F.conv1d, shapes=((4, 16, _SIZE), (16, 16, 4)), cube=True),
    _Family(name="attention", function=F.scaled_dot_product_attention, shapes=((2, 4, _SIZE, _SIZE),) * 3),
    _Family(name="softmax", function=lambda x: F.softmax(x, -1), shapes=((_SIZE, _SIZE),)),
    _Family(name="layer_norm", function=lambda x: F.layer_norm(x, (_SIZE,)), shapes=((_SIZE, _SIZE),)),
    _Family(name="gelu, none", function=F.gelu, shapes=((_SIZE, _SIZE),)),
    _Family(
        name="gelu, none, as tanh",
        function=F.gelu,
        shapes=((_SIZE, _SIZE),),
        exact=lambda x: F.gelu(x, approximate="tanh"),
    ),
    _Family(name="silu", function=F.silu, shapes=((_SIZE, _SIZE),)),
    _Family(name="add", function=torch.add, shapes=((_SIZE, _SIZE), (_SIZE, _SIZE))),
    _Family(name="exp", function=torch.exp, shapes=((_SIZE, _SIZE),)),
    _Family(name="sum", function=lambda x: x.sum(-1), shapes=((_SIZE, _SIZE),)),
)


def measure(family: _Family, dtype: torch.dtype, device: torch.device) -> float:
    """Effective bits of one operator in one dtype on a device."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in family.shapes]
    exact = (family.exact or family.function)(*[input_.double() for input_ in inputs])
    return effective_bits(family.function(*[input_.to(device) for input_ in inputs]).cpu(), exact)


def rows(device: torch.device) -> Iterator[tuple[str, dict[str, float]]]:
    """For each family its bits by dtype; on an NPU those of the cube's float32 with HF32 on as well."""
    switches = (torch.npu.conv, torch.npu.matmul) if device.type == "npu" else ()
    before = [switch.allow_hf32 for switch in switches]
    try:
        for family in BIT_FAMILIES:
            for switch in switches:
                switch.allow_hf32 = False
            result = {str(dtype).removeprefix("torch."): measure(family, dtype, device) for dtype in _DTYPES}
            if family.cube and switches:
                for switch in switches:
                    switch.allow_hf32 = True
                result["hf32"] = measure(family, torch.float32, device)
            yield family.name, result
    finally:
        for switch, value in zip(switches, before):
            switch.allow_hf32 = value


def _table(result: list[tuple[str, dict[str, float]]]) -> str:
    """Bits by family and arithmetic as markdown."""
    columns = ("float32", "hf32", "float16", "bfloat16")
    lines = [f"| operator | {' | '.join(columns)} |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {' | '.join(f'{bits[column]:.1f}' if column in bits else '' for column in columns)} |"
        for name, bits in result
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    arguments = parser_of("bits").parse_args(argv)
    device = open_device(arguments.device)
    print(f"{device.name} ({device.backend})\n")
    print(_table(list(rows(device.torch_device))))
    return 0
