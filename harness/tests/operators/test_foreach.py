"""Operators on lists of tensors against the CPU."""

import pytest
import torch

from harness.tests.operators.conftest import agrees, seeded

UNARY = (
    "abs acos asin atan cos cosh erf erfc exp expm1 log log10 log1p log2 neg reciprocal sigmoid sign sin sinh "
    "sqrt tan tanh "
    "floor ceil round trunc frac"
).split()
MOST = 60  # more than torch_npu puts into one call


def lists(count=1, dtype=torch.float32, size=3):
    tensors = [(seeded(2, 3, seed=position).tanh().abs() * 0.8 + 0.1).to(dtype) for position in range(size * count)]
    return [tensors[start::count] for start in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", UNARY)
def test_unary(npu, name, dtype):
    (values,) = lists(dtype=dtype)
    agrees(npu, getattr(torch, f"_foreach_{name}"), values)

    def in_place(values):
        copies = [value.clone() for value in values]
        getattr(torch, f"_foreach_{name}_")(copies)
        return copies

    agrees(npu, in_place, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "pow", "maximum", "minimum"])
def test_binary(npu, name, dtype):
    values, others = lists(2, dtype)
    function = getattr(torch, f"_foreach_{name}")
    agrees(npu, function, values, others)
    agrees(npu, lambda x: function(x, 1.5), values)
    agrees(npu, lambda x: function(x, [0.5, 1.5, 2.0]), values)
    if name in ("add", "sub"):
        agrees(npu, lambda x, y: function(x, y, alpha=0.5), values, others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["addcmul", "addcdiv"])
def test_pointwise(npu, name, dtype):
    function = getattr(torch, f"_foreach_{name}")
    for by in (0.5, [0.5, 1.5, 2.0]):
        agrees(npu, lambda x, y, z, by=by: function(x, y, z, by), *lists(3, dtype))


OTHER = {
    "lerp by one": lambda x, y, z: torch._foreach_lerp(x, y, 0.3),
    "lerp": torch._foreach_lerp,
    "norm": lambda x, y, z: torch._foreach_norm(x),
    "norm of ones": lambda x, y, z: torch._foreach_norm(x, 1),
    "pow of a number": lambda x, y, z: torch._foreach_pow(2.0, x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", OTHER)
def test_other(npu, name, dtype):
    agrees(npu, OTHER[name], *lists(3, dtype))


def test_many_tensors_empty_ones_and_other_dtypes(npu):
    (values,) = lists(size=MOST)
    agrees(npu, lambda x: torch._foreach_mul(x, 3.0), values)
    agrees(npu, lambda x: torch._foreach_add(x, 1), [torch.zeros(0), torch.zeros(2)])
    agrees(npu, lambda x: torch._foreach_mul(x, 3), [torch.arange(4), torch.arange(3)])


def test_copy_and_zero(npu):
    def copied(values):
        room = [torch.ones_like(value) for value in values]
        torch._foreach_copy_(room, values)
        return room

    def zeroed(values):
        room = [value.clone() for value in values]
        torch._foreach_zero_(room)
        return room

    (values,) = lists()
    agrees(npu, copied, values)
    agrees(npu, zeroed, values)
