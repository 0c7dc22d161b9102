"""Elementwise operators against the CPU."""

import math

import pytest
import torch

from harness.tests.operators.conftest import agrees, seeded

UNARY = {
    "acosh": lambda x: x.abs() + 1.5,
    "asinh": None,
    "atanh": lambda x: x.tanh() * 0.9,
    "frac": None,
    "sinc": None,
    "angle": None,
    "signbit": None,
    "exp": None,
    "log": lambda x: x.abs() + 0.5,
    "sqrt": lambda x: x.abs() + 0.5,
    "rsqrt": lambda x: x.abs() + 0.5,
    "sigmoid": None,
    "tanh": None,
    "sign": None,
    "abs": None,
    "reciprocal": lambda x: x.abs() + 0.5,
    "erf": None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", UNARY)
def test_unary(npu, name, dtype):
    smooth = name not in ("signbit", "angle", "sign")
    for shape in ((3, 4), (0, 4), ()):
        values = seeded(math.prod(shape)).reshape(shape)
        values = (UNARY[name](values) if UNARY[name] else values).to(dtype)
        agrees(npu, getattr(torch, name), values.requires_grad_(smooth), rtol=1e-5)
    agrees(
        npu,
        lambda x: getattr(torch, name)(x.T),
        (seeded(3, 4).abs() * 0.2 + (1.2 if name == "acosh" else 0.1)).to(dtype),
    )


@pytest.mark.parametrize("name", ["acosh_", "asinh_", "atanh_", "frac_", "sinc_", "nan_to_num_"])
def test_unary_in_place(npu, name):
    values = seeded(3, 4).abs() * 0.3 + (1.1 if name == "acosh_" else 0.0)
    agrees(npu, lambda x: getattr(x.clone(), name)(), values)


DTYPES = (
    torch.float32,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
ARITHMETIC = (
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.remainder,
    torch.fmod,
    torch.floor_divide,
    torch.eq,
    torch.lt,
)


@pytest.mark.parametrize("left", DTYPES, ids=str)
@pytest.mark.parametrize("right", DTYPES, ids=str)
def test_dtypes_of_a_result(npu, left, right):
    one, two = torch.tensor([7, 3, 1, 6, 0]).to(left), torch.tensor([2, 2, 5, 1, 3]).to(right)
    for function in ARITHMETIC:
        try:
            expected = function(one, two)
        except RuntimeError:  # what torch has for no device
            continue
        result = function(one.to(npu), two.to(npu))
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64, torch.int8])
@pytest.mark.parametrize("other", [3, -3, 2.5])
def test_division_and_scalars_by_their_signs(npu, dtype, other):
    values = torch.tensor([7, -7, 3, -3, 0, 1]).to(dtype)
    for function in (
        torch.remainder,
        torch.fmod,
        torch.floor_divide,
        torch.div,
        torch.add,
        torch.rsub,
        torch.mul,
        torch.lt,
        torch.ge,
    ):
        agrees(npu, lambda x, function=function: function(x, other), values)
    for mode in ("trunc", "floor"):
        agrees(npu, lambda x, mode=mode: torch.div(x, other, rounding_mode=mode), values)
    agrees(npu, lambda x: torch.remainder(other, x), values.abs() + 1)


BINARY = {
    "lerp": lambda x, y, z: torch.lerp(x, y, z),
    "lerp by a number": lambda x, y, z: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y, z: torch.addcmul(x, y, z, value=0.5),
    "addcdiv": lambda x, y, z: torch.addcdiv(x, y, z.abs() + 1, value=0.5),
    "logaddexp": lambda x, y, z: torch.logaddexp(x, y),
    "logaddexp2": lambda x, y, z: torch.logaddexp2(x, y),
    "xlogy": lambda x, y, z: torch.xlogy(x, y.abs() + 1),
    "xlogy by a number": lambda x, y, z: torch.xlogy(x, 2.0),
    "xlogy of a number": lambda x, y, z: torch.xlogy(2.0, y.abs() + 1),
    "clamp": lambda x, y, z: torch.clamp(x, -y.abs(), z.abs()),
    "clamp from below": lambda x, y, z: torch.clamp_min(x, y),
    "clamp from above": lambda x, y, z: torch.clamp_max(x, y),
    "clamp by numbers": lambda x, y, z: torch.clamp(x, -0.5, 0.5),
    "rsub": lambda x, y, z: torch.rsub(x, y, alpha=2),
    "atan2": lambda x, y, z: torch.atan2(x, y),
    "hypot of squares": lambda x, y, z: (x * x + y * y).sqrt(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", BINARY)
def test_binary(npu, name, dtype):
    for shape in ((3, 4), (0, 4), ()):
        agrees(
            npu,
            BINARY[name],
            *(seeded(math.prod(shape), seed=seed, dtype=dtype).reshape(shape).requires_grad_() for seed in range(3)),
        )
    spread = seeded(4, 3, dtype=dtype), seeded(1, 3, seed=1, dtype=dtype), seeded(3, 4, seed=2, dtype=dtype)
    agrees(npu, lambda x, y, z: BINARY[name](x.T, y.T, z), *spread)


IN_PLACE = {
    "lerp": lambda x, y: x.clone().lerp_(y, y.sigmoid()),
    "lerp by a number": lambda x, y: x.clone().lerp_(y, 0.25),
    "addcmul": lambda x, y: x.clone().addcmul_(y, y, value=2),
    "addcdiv": lambda x, y: x.clone().addcdiv_(x, y.abs() + 1),
    "xlogy": lambda x, y: x.clone().xlogy_(3.0),
    "clamp above": lambda x, y: x.clone().clamp_max_(0.1),
    "clamp above by a tensor": lambda x, y: x.clone().clamp_max_(y),
    "clamp below by a tensor": lambda x, y: x.clone().clamp_min_(y),
    "round": lambda x, y: x.clone().round_(decimals=2),
    "round out of place": lambda x, y: x.round(decimals=-1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(npu, name):
    agrees(npu, IN_PLACE[name], seeded(3, 4), seeded(3, 4, seed=1))


WHOLE = {
    "gcd": torch.gcd,
    "left shift": torch.bitwise_left_shift,
    "right shift": torch.bitwise_right_shift,
    "left shift by a number": lambda x, y: x << 2,
    "right shift by a number": lambda x, y: x >> 2,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "not": lambda x, y: torch.bitwise_not(x),
}


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(npu, name, dtype):
    agrees(npu, WHOLE[name], torch.tensor([12, -7, 30, 0, 5]).to(dtype), torch.tensor([4, 2, 0, 3, 1]).to(dtype))


def test_complex_numbers(npu):
    real, imag = seeded(3, 4), seeded(3, 4, seed=1)
    agrees(npu, torch.complex, real, imag)
    agrees(npu, torch.polar, real.abs(), imag)
    values = torch.complex(real, imag)
    for function in (
        lambda x: x + 2,
        lambda x: x * x,
        lambda x: x / (x + 3),
        torch.angle,
        torch.abs,
        torch.exp,
        torch.sqrt,
        torch.sgn,
    ):
        agrees(npu, function, values)


def test_comparisons(npu):
    values, other = seeded(3, 4), seeded(3, 4, seed=1)
    agrees(npu, lambda x, y: torch.isclose(x, y, rtol=0.5, atol=0.1), values, other)
    agrees(npu, lambda x: torch.isclose(x, x, equal_nan=True), torch.tensor([1.0, float("nan"), float("inf")]))
    agrees(npu, lambda x: torch.isin(x, 2), torch.arange(4))
    agrees(npu, lambda x: torch.isin(2, x), torch.arange(4))
    bound = torch.tensor(0.5)
    assert torch.equal(
        torch.ge(bound, torch.tensor([0.25, 0.5, 0.75], device=npu)).cpu(), torch.tensor([True, True, False])
    )
    halves = torch.tensor([0.1, 0.0999]).half()
    assert torch.equal((halves.to(npu) < 0.1).cpu(), halves < 0.1)


def test_what_a_whole_number_cannot_take(npu):
    with pytest.raises(RuntimeError, match="can't be cast to the desired output type"):
        torch.ones(3, dtype=torch.int64, device=npu).add_(torch.ones(3, device=npu))


def test_not_a_number_to_numbers(npu):
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    agrees(npu, torch.nan_to_num, values)
    agrees(npu, lambda x: torch.nan_to_num(x, 1, 2, 3), values)


def test_hardsigmoid_of_integers_is_cut_off(npu):
    x = torch.arange(-6, 7, dtype=torch.int32)
    assert torch.equal(
        torch.nn.functional.hardsigmoid(x.to(npu)).cpu(), torch.nn.functional.hardsigmoid(x.float()).int()
    )


def test_lerp_in_place_says_that_the_shapes_do_not_fit(npu):
    narrow, wide = torch.ones(2, 1), torch.ones(2, 6)
    with pytest.raises(RuntimeError, match="CheckShape failed"):
        narrow.to(npu).lerp_(wide.to(npu), 1)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
def test_quantize(npu, dtype):
    values = torch.linspace(-40, 300, 24).reshape(2, 3, 4)
    scales, zero_points = torch.tensor([0.3, 0.7, 1.0]), torch.tensor([1, 5, 0])
    agrees(npu, lambda x: torch.quantize_per_tensor(x, 0.5, 3, dtype).int_repr(), values)
    agrees(npu, lambda x: torch.quantize_per_tensor(x, 0.5, 3, dtype).int_repr(), values[:0])
    agrees(npu, lambda x: torch.quantize_per_tensor(x, 0.5, 3, dtype).int_repr(), values[0, 0, 1])
    agrees(npu, lambda x, *by: torch.quantize_per_channel(x, *by, 1, dtype).int_repr(), values, scales, zero_points)
    agrees(
        npu,
        lambda x, *by: torch.quantize_per_channel(x.transpose(1, 2), *by, 2, dtype).int_repr(),
        values,
        scales,
        zero_points,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantize_rounds_a_tie_to_even_after_the_zero_point_and_saturates(npu, dtype):
    import torch_npu

    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e4, -1e4, float("inf"), -float("inf")], dtype=dtype)
    one, zero = torch.ones(1, device=npu), torch.zeros(1, dtype=torch.int32, device=npu)
    for zero_points, expected in ((None, [0, 2, 2, 0, -2]), (zero, [0, 2, 2, 0, -2]), (zero + 1, [2, 2, 4, 0, 0])):
        result = torch_npu.npu_quantize(values.to(npu), one, zero_points, torch.qint8, 0, True)
        assert result.dtype == torch.int8 and result.tolist() == [*expected, 127, -128, 127, -128]
