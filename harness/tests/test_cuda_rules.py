"""The rules of CUDA, against slow restatements and against what an NVIDIA H200 gave (torch 2.11, CUDA 13.0)."""

import math

import pytest
import torch
from torch.nn import functional as F

from harness import numerics
from harness.numerics.expected_error import Rules, rounding

RULES = Rules(family="CUDA", gelu_tanh=False, fused_attention=False, split_attention=True, half_sums=True)


def drawn(*shapes, seed=42):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def off(result, exact):
    """(relative L2 error, relative gain) of a result to float64."""
    error, size = result.double() - exact, exact.norm()
    return float(error.norm() / size), float((error * exact).sum() / size**2)


@pytest.mark.parametrize("length", [8, 64, 1000])
def test_a_split_product_loses_what_is_cut_whatever_its_length(length):
    left, right = (tensor.abs() for tensor in drawn((16, length), (length, 16)))
    error, gain = off(numerics.split_product(left, right), left.double() @ right.double())
    assert 2.5e-7 < error < 5e-7 and -4.5e-7 < gain < -2.5e-7


def test_a_split_product_is_exact_where_tf32_holds_the_operands():
    left, right = torch.arange(24.0).reshape(2, 12), torch.arange(36.0).reshape(12, 3)
    assert torch.equal(numerics.split_product(left, right), left @ right)


def test_a_split_product_sends_gradients_back_by_split_products():
    left, right = drawn((5, 24), (24, 7))
    left.requires_grad_(), right.requires_grad_()
    grad = torch.ones(5, 7)
    numerics.split_product(left, right).backward(grad)
    assert torch.equal(left.grad, numerics.split_product(grad, right.detach().T))
    assert torch.equal(right.grad, numerics.split_product(left.detach().T, grad))


# relative L2 error and gain of the H200's results to float64, of the default run's probes of these names, seed 42
ATTENTION = {
    "plain": (4.596e-7, -3.511e-7, {}),
    "causal": (2.593e-7, -1.144e-7, {"is_causal": True}),
    "scale": (4.542e-7, -2.915e-7, {"scale": 0.25}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_forecast_as_large_as_a_card_measured_it(name):
    measured, gained, options = ATTENTION[name]
    heads = drawn(*[(2, 3, 37, 32)] * 3)
    exact = F.scaled_dot_product_attention(*(head.double() for head in heads), **options)
    with rounding(RULES):
        error, gain = off(F.scaled_dot_product_attention(*heads, **options), exact)
    assert measured / 2 < error < 2 * measured and 3 * gained < gain < 0
    assert off(F.scaled_dot_product_attention(*heads, **options), exact)[0] < measured


def test_attention_hides_what_is_hidden():
    heads = drawn(*[(1, 2, 9, 8)] * 3)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    mask[4] = False  # a query that sees nothing
    with rounding(RULES):
        result = F.scaled_dot_product_attention(*heads, attn_mask=mask)
        causal = F.scaled_dot_product_attention(*heads, is_causal=True)
    assert torch.equal(result[:, :, 4], torch.zeros(1, 2, 8))
    seen = [row for row in range(9) if row != 4]
    assert torch.equal(result[:, :, seen], causal[:, :, seen])


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (1, 2, 0, 8)])
def test_other_attention_is_made_of_its_products(shape):
    heads = drawn(*[shape] * 3)
    with rounding(RULES):
        result = F.scaled_dot_product_attention(*heads)
    assert torch.allclose(result, F.scaled_dot_product_attention(*heads), rtol=0, atol=1e-6)


def stepwise(x, block):
    """Running sums of a vector by blocks, each by Sklansky's tree, one number at a time."""
    numbers = x.clone()
    for start in range(0, len(x), block):
        end = min(start + block, len(x))
        if start:
            numbers[start] = numbers[start] + numbers[start - 1]
        step = 1
        while step < end - start:
            for place in range(start, end):
                if (place - start) // step % 2:
                    numbers[place] = numbers[place] + numbers[start + (place - start) // step * step - 1]
            step *= 2
    return numbers


@pytest.mark.parametrize("dtype", numerics.HALF)
@pytest.mark.parametrize("length", [1, 2, 5, 1024, 1025, 2500])
def test_a_running_sum_of_half_is_rounded_at_each_addition(dtype, length):
    x = drawn((length,))[0].to(dtype)
    assert torch.equal(numerics.running_sum_in_half(x, 0), stepwise(x, 1024))


def test_a_running_sum_of_half_goes_along_its_axis():
    x = drawn((3, 7, 2))[0].half()
    result = numerics.running_sum_in_half(x, 1)
    assert all(torch.equal(result[i, :, j], stepwise(x[i, :, j], 1024)) for i in range(3) for j in range(2))


# what the H200's results of x.cumsum(-1) are off by, x of (rows, length) drawn with seed 42
SUMS = [
    (12, 4097, torch.float16, 1.33056e-3),
    (12, 4097, torch.bfloat16, 1.18364e-2),
    (2, 32000, torch.float16, 1.27291e-3),
]


@pytest.mark.parametrize("rows, length, dtype, measured", SUMS)
def test_a_running_sum_of_half_is_off_by_what_a_card_measured(rows, length, dtype, measured):
    x = drawn((rows, length))[0].to(dtype)
    with rounding(RULES):
        error, _ = off(x.cumsum(-1), x.double().cumsum(-1))
    assert math.isclose(error, measured, rel_tol=1e-3)


@pytest.mark.parametrize("dtype", numerics.HALF)
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_of_half_uses_statistics_of_half(dtype, affine):
    x, weight, bias = (tensor.to(dtype) for tensor in drawn((2, 6, 3, 5), (6,), (6,)))
    with rounding(RULES):
        result = F.group_norm(x, 2, *((weight, bias) if affine else (None, None)))
    for sample in range(2):
        for channel in range(6):
            group = x[sample, channel // 3 * 3 : channel // 3 * 3 + 3].double()
            mean = group.mean().to(dtype).double()
            rstd = (group.var(correction=0) + 1e-5).rsqrt().to(dtype).double()
            expected = (x[sample, channel].double() - mean) * rstd
            if affine:
                expected = expected * weight[channel].double() + bias[channel].double()
            assert torch.allclose(result[sample, channel].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_group_norm_of_half_is_off_by_what_a_card_measured():
    x, weight, bias = (item.bfloat16() for item in drawn((2, 16, 9, 9), (16,), (16,)))
    exact = F.group_norm(x.double(), 4, weight.double(), bias.double())
    with rounding(RULES):
        error, gain = off(F.group_norm(x, 4, weight, bias), exact)
    assert math.isclose(error, 2.38827e-3, rel_tol=1e-2) and math.isclose(gain, 5.1546e-4, rel_tol=5e-2)


def test_float32_is_left_as_the_cpu_computes_it():
    x, weight, bias = drawn((2, 16, 9, 9), (16,), (16,))
    with rounding(RULES):
        assert torch.equal(F.group_norm(x, 4, weight, bias), F.group_norm(x, 4, weight, bias))
        assert torch.equal(x.cumsum(-1), numerics.running_sum(x, -1))
