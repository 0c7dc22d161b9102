"""The rounding rules, against float64 and against what is published about a 910B."""

import math

import pytest
import torch

from harness.numerics import (
    FLOAT32,
    NoFloat64,
    Operands,
    attention,
    attention_backward,
    convolution,
    cube,
    effective_bits,
    fused,
    gelu,
    matmul,
    matmul_by_groups,
    rms_norm,
    round_half_away,
    round_hf32,
    rsqrt,
    saturated,
    silu,
)  # fmt: skip
from harness.numerics.vector import batch_moments

HF32 = Operands(kind="HF32")


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_hf32_keeps_eleven_bits_of_the_mantissa():
    x = seeded(10000)
    rounded = round_hf32(x)
    assert torch.equal(rounded.view(torch.int32) & 0xFFF, torch.zeros(10000, dtype=torch.int32))
    relative = ((rounded - x).abs() / x.abs()).max()
    assert 2.0**-13 < relative <= 2.0**-12
    assert torch.equal(round_hf32(rounded), rounded)


def test_hf32_ties_go_the_way_they_are_told():
    tie = torch.tensor([0x3F800800, 0x3F801800], dtype=torch.int32).view(
        torch.float32
    )  # halfway above an even, above an odd
    assert [hex(number) for number in round_hf32(tie, "away").view(torch.int32).tolist()] == [
        "0x3f801000",
        "0x3f802000",
    ]
    assert [hex(number) for number in round_hf32(tie, "even").view(torch.int32).tolist()] == [
        "0x3f800000",
        "0x3f802000",
    ]
    assert torch.equal(round_hf32(-tie), -round_hf32(tie))
    with pytest.raises(ValueError, match="'away' or to 'even'"):
        round_hf32(tie, "up")


def test_hf32_passes_what_is_not_finite_and_refuses_other_dtypes():
    payload = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    odd = torch.cat([torch.tensor([math.inf, -math.inf, math.nan]), payload])
    rounded = round_hf32(odd)
    assert torch.equal(rounded.isnan(), odd.isnan())
    assert rounded[:2].tolist() == [math.inf, -math.inf]
    with pytest.raises(ValueError, match="rounds float32"):
        round_hf32(odd.half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_representable_halves_are_hf32_already(dtype):
    x = seeded(1000, dtype=dtype).float()
    assert torch.equal(round_hf32(x), x)


@pytest.mark.parametrize(("dtype", "tie"), [(torch.float16, 1 + 2.0**-11), (torch.bfloat16, 1 + 2.0**-8)])
def test_casts_of_fused_attention_round_ties_away(dtype, tie):
    x = torch.tensor([tie, -tie, 1.0, math.inf])
    assert x.to(dtype)[0] == 1.0  # to even
    result = round_half_away(x, dtype)
    assert result[0] > 1.0 and result[1] == -result[0] and result[2] == 1.0 and result[3] == math.inf
    noise = seeded(1000)
    assert torch.equal(round_half_away(noise, dtype), noise.to(dtype))  # no ties there


@pytest.mark.parametrize(
    ("dtype", "hf32", "low", "high"),
    [
        (torch.float32, False, 22.5, 24.6),
        (torch.float32, True, 12.4, 13.0),
        (torch.float16, False, 12.0, 12.5),
        (torch.bfloat16, False, 9.0, 9.5),
    ],
)
def test_products_have_the_effective_bits_of_the_hardware(dtype, hf32, low, high):
    """K = 64, normal data: HF32 12.7, float32 23 to 24, float16 12.2, bfloat16 9.2 bits, as measured on Ascend cards by
    others.
    """
    left, right = seeded(64, 64, dtype=dtype), seeded(64, 64, seed=1, dtype=dtype)
    bits = effective_bits(matmul(left, right, operands=HF32 if hf32 else FLOAT32), left.double() @ right.double())
    assert low < bits < high


def test_half_products_round_once_bias_included():
    left, right, bias = (
        seeded(8, 256, dtype=torch.bfloat16),
        seeded(256, 8, seed=1, dtype=torch.bfloat16),
        seeded(8, seed=2, dtype=torch.bfloat16),
    )
    exact = (left.double() @ right.double() + bias.double()).float()
    result = matmul(left, right, bias=bias)
    assert float((result != exact.bfloat16()).float().mean()) < 0.02  # but for sums that lie next to a tie


def test_products_of_integers_are_exact():
    left, right = torch.arange(12).view(3, 4), torch.arange(8).view(4, 2)
    assert torch.equal(matmul(left, right), left @ right)


def test_batched_products_are_those_of_torch():
    left, right = seeded(2, 3, 5, 32), seeded(2, 3, 32, 7, seed=1)
    torch.testing.assert_close(matmul(left, right), left @ right)


def test_convolution_loses_eleven_bits_only_where_hf32_is_on():
    x, weight, bias = seeded(1, 3, 28, 28), seeded(16, 3, 14, 14, seed=1), seeded(16, seed=2)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride=14)
    options = dict(stride=(14, 14), padding=(0, 0), dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1)
    bits = [
        effective_bits(convolution(x, weight, bias, operands=HF32 if hf32 else FLOAT32, **options), exact)
        for hf32 in (True, False)
    ]
    assert 12 < bits[0] < 13.5 and bits[1] > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_agrees_with_float64(dtype):
    q, k, v = (seeded(2, 4, 9, 16, seed=n, dtype=dtype) for n in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    result, top, total = attention(q, k, v, scale=16**-0.5)
    assert result.dtype == dtype and top.shape == total.shape == (2, 4, 9, 1)
    assert effective_bits(result, exact) > {torch.float32: 21, torch.float16: 10.5, torch.bfloat16: 7.5}[dtype]


def test_attention_hides_shares_heads_and_gives_zeros_where_nothing_is_seen():
    q, k, v = seeded(1, 4, 5, 8), seeded(1, 2, 6, 8, seed=1), seeded(1, 2, 6, 8, seed=2)
    hidden = torch.zeros(1, 1, 5, 6, dtype=torch.bool)
    hidden[..., 4:] = True
    hidden[..., 0, :] = True
    result, _, _ = attention(q, k, v, scale=8**-0.5, hidden=hidden)
    wide = [tensor.repeat_interleave(2, 1) for tensor in (k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=~hidden)
    torch.testing.assert_close(result[:, :, 1:], expected[:, :, 1:])
    assert result[:, :, 0].abs().max() == 0


def test_attention_in_parts_is_attention(monkeypatch):
    q, k, v = (seeded(2, 4, 9, 16, seed=n) for n in range(3))
    whole = attention(q, k, v, scale=0.25)[0]
    monkeypatch.setattr("harness.numerics.fused.SCORES", 100)
    assert torch.equal(attention(q, k, v, scale=0.25)[0], whole)


def test_what_dropout_left_is_divided_by_nothing_unless_asked():
    q, k, v = (seeded(1, 2, 3, 4, seed=n) for n in range(3))
    options = dict(scale=0.5, dropout_mask=torch.arange(18).view(1, 2, 3, 3) % 4 > 0)
    saved = attention(q, k, v, **options)
    weights = (q.double() @ k.double().mT * 0.5).softmax(-1) * options["dropout_mask"]
    torch.testing.assert_close(saved[0].double(), weights @ v.double(), rtol=1e-5, atol=1e-6)
    grad = seeded(1, 2, 3, 4, seed=5)
    towards_v = attention_backward(grad, q, k, v, *saved, **options)[2]
    torch.testing.assert_close(towards_v.double(), weights.mT @ grad.double(), rtol=1e-5, atol=1e-6)


def test_a_row_that_sees_no_key_sends_no_gradient():
    q, k, v = (seeded(1, 1, 3, 4, seed=n) for n in range(3))
    hidden = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    hidden[..., 1, :] = True
    saved = attention(q, k, v, scale=0.5, hidden=hidden)
    grads = attention_backward(seeded(1, 1, 3, 4, seed=5), q, k, v, *saved, scale=0.5, hidden=hidden)[:3]
    assert all(bool(grad.isfinite().all()) for grad in grads) and not grads[0][0, 0, 1].any()
    rows = [0, 2]
    seen = attention(q[:, :, rows], k, v, scale=0.5)
    alone = attention_backward(seeded(1, 1, 3, 4, seed=5)[:, :, rows], q[:, :, rows], k, v, *seen, scale=0.5)[:3]
    torch.testing.assert_close(grads[0][:, :, rows], alone[0])
    torch.testing.assert_close(grads[1:], alone[1:])


def test_moments_of_a_batch_from_its_sums():
    """Of (1, 2, 3) and (5, 5, 5), and of sums whose rounding would make a variance negative."""
    moments = batch_moments(torch.tensor([6.0, 15.0, 3.0]), torch.tensor([14.0, 75.0, 2.9]), 3)
    assert moments.mean.tolist() == [2.0, 5.0, 1.0]
    torch.testing.assert_close(moments.variance, torch.tensor([2 / 3, 0.0, 0.0]))
    torch.testing.assert_close(moments.unbiased, torch.tensor([1.0, 0.0, 0.0]))
    one = batch_moments(torch.tensor([2.0]), torch.tensor([4.0]), 1)
    assert (one.mean.item(), one.variance.item(), one.unbiased.item()) == (2.0, 0.0, 0.0)


def test_what_is_computed_at_a_time_takes_as_much_memory_as_it_says():
    assert (fused.SCORES * 4, cube._BLOCK * 4) == (256 * 2**20, 8 * 2**20)


def test_activations_and_norms_round_once():
    x = seeded(1000, dtype=torch.float16) * 8
    assert float((silu(x) != torch.nn.functional.silu(x.double()).half()).float().mean()) < 0.01
    assert torch.isfinite(silu(torch.tensor([-1e4, 1e4]))).all()
    tanh = torch.nn.functional.gelu(x.double(), approximate="tanh")
    assert torch.allclose(gelu(x).double(), tanh, atol=4e-3)
    weight = seeded(64, seed=3, dtype=torch.bfloat16)
    tokens = seeded(5, 64, dtype=torch.bfloat16)
    exact = torch.nn.functional.rms_norm(tokens.double(), (64,), weight.double(), 1e-5)
    y, rstd = rms_norm(tokens, weight, 1e-5)
    assert float((y != exact.bfloat16()).float().mean()) < 0.01 and rstd.shape == (5, 1) and rstd.dtype == torch.float32


def in_parts(left, right, parts):
    """left @ right with K in `parts`, each summed one product after the other: every product and every sum rounded, on
    any host alike.

    Products and sums are single elementwise operations of float32, which IEEE 754 defines to the bit; no BLAS library
    is asked.
    """
    total = None
    for columns, rows in zip(left.chunk(parts, 1), right.chunk(parts, 0)):
        part = columns[:, :1] * rows[:1]
        for k in range(1, columns.shape[1]):
            part = part + columns[:, k : k + 1] * rows[k : k + 1]
        total = part if total is None else total + part
    return total


@pytest.mark.parametrize("inner", [64, 256, 1024])
def test_four_parts_of_a_sum_lose_as_much_as_a_rounding_for_each_four(inner):
    """K / 4 roundings of the growing sum against four parts summed in order.

    With unit normal data a partial sum of k products has variance k, and a rounding loses r² of the variance that it
    rounds. One rounding for each four: r² · (4 + 8 + … + K) ≈ r² K² / 8. Four parts: 4 · r² · (1 + 2 + … + K / 4) ≈ r²
    K² / 8 as well, and besides a rounding of each product, r² K, and of the parts as they are added, r² (K / 2 + 3 K /
    4 + K). In the unit r² K the first is K / 8 + 1 / 2, the other K / 8 + 1 / 2 + 1 + 9 / 4: the bits differ by half
    the log2 of their ratio. The measured difference scatters about it: r varies with where in its binade a number lies,
    by a few percent of r², so a tenth of a bit, 15 % of a variance, is allowed on either side.
    """
    left, right = seeded(128, inner), seeded(inner, 128, seed=1)
    exact = left.double() @ right.double()
    literal, parts = (
        effective_bits(item, exact) for item in (matmul_by_groups(left, right, 4), in_parts(left, right, 4))
    )
    derived = math.log2((inner / 8 + 0.5 + 1 + 9 / 4) / (inner / 8 + 0.5)) / 2
    assert abs(literal - parts - derived) < 0.1
    if inner == 64:
        assert literal > 23.4 and effective_bits(matmul_by_groups(left, right, 1), exact) < literal - 0.7


@pytest.mark.parametrize("inner", [64, 256, 768])  # longer ones: test_long_sums
def test_a_product_loses_no_more_than_its_parts_summed_in_order(inner):
    """How the host's BLAS sums within a part is its own: with fewer roundings or more accumulators it loses less than
    one product after the other, and it cannot be nearer to the exact product than the nearest float32. 0.1 bits are for
    chance: the error of 16,384 elements is known to 1 in 128.
    """
    left, right = seeded(128, inner), seeded(inner, 128, seed=1)
    exact = left.double() @ right.double()
    bits = effective_bits(matmul(left, right), exact)
    assert effective_bits(in_parts(left, right, 4), exact) - 0.1 < bits <= effective_bits(exact.float(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_has_the_same_bits_in_every_form(dtype):
    left, right = seeded(12, 64, dtype=dtype), seeded(64, 8, seed=1, dtype=dtype)
    expected = matmul(left, right)
    batch = left.view(3, 4, 64)
    forms = {
        "a batch": matmul(batch, right),
        "a batch and one matrix for all": matmul(batch, right.expand(3, 64, 8)),
        "a batch of one": matmul(left[None], right[None]),
        "turned": matmul(left.t().contiguous().t(), right),
        "a slice": matmul(torch.cat([left[:, :5], left], 1)[:, 5:], right),
        "two axes of batches": matmul(left.view(3, 1, 4, 64), right),
    }
    assert {name: torch.equal(found.reshape(12, 8), expected) for name, found in forms.items()} == dict.fromkeys(
        forms, True
    )
    assert torch.equal(matmul(left, right[:, 0]), matmul(left, right[:, :1])[:, 0])
    assert torch.equal(matmul(batch, right[:, 0]), matmul(left, right[:, :1]).view(3, 4))
    assert torch.equal(matmul(left[0], right), matmul(left[:1], right)[0])


SHAPES = [
    ((5, 32), (32,)),
    ((32,), (32, 7)),
    ((32,), (32,)),
    ((3, 5, 32), (32,)),
    ((2, 3, 5, 32), (3, 32, 7)),
    ((5, 32), (3, 32, 7)),
    ((32,), (3, 32, 7)),
    ((3, 1, 32), (2, 1, 32, 7)),
    ((0, 5, 32), (32, 7)),
    ((0, 5, 32), (0, 32, 7)),
    ((5, 0), (0, 7)),
    ((2, 5, 0), (2, 0, 7)),
]


@pytest.mark.parametrize(("left", "right"), SHAPES, ids=str)
def test_products_have_the_shapes_of_torch(left, right):
    a, b = seeded(*left), seeded(*right, seed=1)
    torch.testing.assert_close(matmul(a, b), a @ b)


def test_operands_that_do_not_fit_are_refused():
    for right in ((31, 7), (3, 32, 7)):
        with pytest.raises(RuntimeError):
            matmul(seeded(2, 5, 32), seeded(*right))


def test_the_reciprocal_root_is_a_root_and_a_division():
    x = seeded(1000).square() + 0.1
    assert torch.equal(rsqrt(x), 1 / x.sqrt())
    assert rsqrt(torch.tensor([4])).tolist() == [0.5] and rsqrt(x.half()).dtype == torch.float16


def test_products_of_float64_are_refused():
    x = seeded(4, 4).double()
    with pytest.raises(NoFloat64, match="take float32, or compute this product on the CPU"):
        matmul(x, x)


def test_saturation_is_that_of_float16_alone():
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert saturated(odd.half()).tolist() == [65504.0, -65504.0, 0.0, 1.0]
    assert torch.equal(saturated(odd).isnan(), odd.isnan()) and saturated(odd.bfloat16())[0] == math.inf
