"""The rounding rules against slow restatements of their definitions: exact fractions, loops, numpy in float64.

The emulated device and the forecast compute by the same `harness.numerics`, so an error in it is no difference between
the two. Here each rule is written again from its definition, without a function of `numerics`
and without a BLAS library.
"""

import itertools
import math
from fractions import Fraction

import numpy
import pytest
import torch

from harness.numerics import (
    OPERANDS,
    NoFloat32,
    Operands,
    attention,
    attention_backward,
    convolution,
    convolution_backward,
    cube,
    cube_type,
    cuts_in_pieces,
    dot,
    effective_bits,
    family_of,
    fused,
    gelu,
    layer_norm,
    matmul,
    matmul_by_groups,
    rms_norm,
    round_half_away,
    round_hf32,
    round_tf32,
    rsqrt,
    saturated,
    scaled_product,
    silu,
    wide,
)
from harness.numerics.families import A2, FAMILIES

HALVES = (torch.float16, torch.bfloat16)
FORMATS = {
    torch.float16: (10, -14, 15),
    torch.bfloat16: (7, -126, 127),
    torch.float32: (23, -126, 127),
}  # bits, least and largest exponent


def short(dtype):
    return str(dtype).removeprefix("torch.")


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -------- rounding of a number


def rounded(value, bits, ties, least=-126, largest=127):
    """A number to `bits` bits behind the leading one, by the definition: the nearest multiple of the last place.

    Below 2^least the last place is that of 2^least; from 2^(largest + 1) on the result is infinite.
    """
    if math.isnan(value) or math.isinf(value) or value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, least)
    place = Fraction(2) ** (exponent - bits)
    count, rest = divmod(abs(Fraction(value)), place)
    up = rest * 2 > place or (rest * 2 == place and (ties == "away" or count % 2 == 1))
    result = (count + up) * place
    return math.copysign(math.inf if result >= Fraction(2) ** (largest + 1) else float(result), value)


def of_bits(patterns):
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def numbers():
    """Float32 numbers of every kind: subnormal to the largest, at ties and beside them, of either sign."""
    exponents = (0, 1, 2, 100, 102, 103, 112, 113, 126, 127, 128, 142, 143, 200, 253, 254)
    tails = {0, 1, 0x7FFFFF, 0x400000, 0x2AAAAA, 0x555555}
    for dropped in (12, 13, 14, 15, 16, 20):  # what a rounding to 11, 10 … bits leaves out
        half = 1 << (dropped - 1)
        tails |= {
            place + rest
            for place in (0, 2 * half, 6 * half, 0x7FFFFF & -2 * half)
            for rest in (half - 1, half, half + 1)
        }
    patterns = [
        sign << 31 | exponent << 23 | tail for sign in (0, 1) for exponent in exponents for tail in sorted(tails)
    ]
    return of_bits([pattern - (1 << 32) if pattern >> 31 else pattern for pattern in patterns])


FINITE = numbers()
ODD = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1 + 2.0**-12, -3e38])


def same(result, expected):
    """Whether two lists hold the same numbers, zeros with their signs; one NaN is as good as another."""
    result, expected = numpy.asarray(result, dtype=numpy.float64), numpy.asarray(expected, dtype=numpy.float64)
    return numpy.array_equal(result, expected, equal_nan=True) and numpy.array_equal(
        numpy.signbit(result) | numpy.isnan(result), numpy.signbit(expected) | numpy.isnan(expected)
    )


def by_definition(tensor, *rule):
    return [rounded(number, *rule) for number in tensor.tolist()]


@pytest.mark.parametrize("tensor", [FINITE, ODD, FINITE[FINITE.abs() < 1]], ids=["finite", "odd", "small"])
@pytest.mark.parametrize("bits", [10, 11])
@pytest.mark.parametrize("ties", ["away", "even"])
def test_hf32_is_the_nearest_number_of_its_bits(tensor, ties, bits):
    result = round_hf32(tensor, ties, bits)
    assert result.dtype == torch.float32 and same(result, by_definition(tensor, bits, ties))


def test_hf32_goes_away_and_keeps_eleven_bits_unless_told_otherwise():
    assert same(round_hf32(FINITE), by_definition(FINITE, 11, "away"))
    for wrong, words in (
        ((FINITE, "away", 9), "10 or 11"),
        ((FINITE, "away", 12), "10 or 11"),
        ((FINITE, "down"), "'away' or to 'even'"),
        ((FINITE.half(),), "float32"),
    ):
        with pytest.raises(ValueError, match=words):
            round_hf32(*wrong)
    with pytest.raises(ValueError, match="float32"):
        round_tf32(FINITE.double())


@pytest.mark.parametrize("tensor", [FINITE, ODD, FINITE[FINITE.abs() < 1]], ids=["finite", "odd", "small"])
def test_tf32_is_the_nearest_number_of_ten_bits_ties_away(tensor):
    assert same(round_tf32(tensor), by_definition(tensor, 10, "away"))


def test_rounding_leaves_its_input_and_the_strides_of_a_matrix():
    matrix = FINITE[:96].clone().view(8, 12).t()
    for function in (round_hf32, round_tf32):
        before = matrix.clone()
        result = function(matrix)
        assert (
            torch.equal(matrix, before)
            and result.stride() == matrix.stride()
            and same(result, function(matrix.contiguous()))
        )
    cube = FINITE[:96].clone().view(2, 4, 12).transpose(0, 2)
    assert same(round_hf32(cube).flatten(), by_definition(cube.flatten(), 11, "away"))


@pytest.mark.parametrize("dtype", HALVES, ids=short)
@pytest.mark.parametrize("tensor", [FINITE, ODD], ids=["finite", "odd"])
def test_the_casts_of_fused_attention_are_the_nearest_half_ties_away(tensor, dtype):
    """In float16 below its normal range ties go to even, as the function says."""
    bits, least, largest = FORMATS[dtype]
    expected = [
        rounded(number, bits, "even" if dtype == torch.float16 and abs(number) < 2.0**-14 else "away", least, largest)
        for number in tensor.tolist()
    ]
    result = round_half_away(tensor, dtype)
    assert result.dtype == dtype and same(result.double(), expected)


def test_the_cast_to_float32_changes_nothing():
    assert same(round_half_away(FINITE, torch.float32), FINITE)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_one_rounding_to_a_half_goes_to_even(dtype):
    """As every result of `wide` is cast: of what is computed in float32, once."""
    bits, least, largest = FORMATS[dtype]
    ones = torch.ones(1, dtype=dtype)
    result = wide(lambda one: FINITE * one, ones)
    assert result.dtype == dtype and same(result.double(), by_definition(FINITE, bits, "even", least, largest))
    place = 2.0**-bits  # the product's last bits are lost if it is rounded before the sum
    x = torch.tensor([1 + place], dtype=dtype)
    assert wide(lambda a: a * a - 1, x).double().item() == rounded((1 + place) ** 2 - 1, bits, "even")
    assert wide(torch.sum, torch.full((4096,), 1.0, dtype=dtype)).item() == 4096
    assert wide(torch.sum, torch.ones(2, 3, dtype=dtype), dim=1, dtype=torch.float32).dtype == torch.float32
    assert wide(torch.sum, torch.ones(2, 3), dim=1).tolist() == [3, 3]


def test_saturation_cuts_half_alone():
    odd = torch.tensor([math.inf, -math.inf, math.nan, 65504, -65504, 1.5, -0.0, 2.0**-24], dtype=torch.float16)
    assert same(saturated(odd), [65504, -65504, 0, 65504, -65504, 1.5, -0.0, 2.0**-24])
    for dtype in (torch.float32, torch.bfloat16):
        assert same(saturated(odd.to(dtype)).double(), odd.to(dtype).double())


def entering(value, kind, ties, saturates):
    """What the cube reads of a float32 operand, by the definition of each kind."""
    if kind == "float16":
        result = rounded(value, 10, "even", -14, 15)
        if not saturates or math.isfinite(result):
            return result
        return 0.0 if math.isnan(result) else math.copysign(65504.0, result)
    bits, ties = {"float32": (23, ties), "HF32": (11, ties), "HF32 of 10 bits": (10, ties), "TF32": (10, "away")}[kind]
    return rounded(value, bits, ties)


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("ties", ["away", "even"])
@pytest.mark.parametrize("kind", OPERANDS)
def test_operands_enter_the_cube_by_their_kind(kind, ties, saturates):
    operands = Operands(kind=kind, ties=ties, saturates=saturates)
    for tensor in (FINITE, ODD):
        result = operands.entering(tensor)
        assert result.dtype == torch.float32 and same(
            result, [entering(number, kind, ties, saturates) for number in tensor.tolist()]
        )
    for dtype in HALVES:
        assert operands.entering(FINITE.to(dtype)).dtype == dtype


def test_operands_have_defaults_and_refuse_other_words():
    assert (Operands().kind, Operands().ties, Operands().saturates, Operands().half_results) == (
        "float32",
        "away",
        False,
        False,
    )
    for wrong in (dict(kind="HF16"), dict(ties="up")):
        with pytest.raises(ValueError):
            Operands(**wrong)
    assert OPERANDS == ("float32", "HF32", "HF32 of 10 bits", "TF32", "float16")


# -------- products

BIG = 2.0**24  # a float32 beside which 1 is half a last place


@pytest.mark.parametrize(
    ("inner", "places"),
    [(16, (0, 4, 8, 12)), (16, (3, 7, 11, 15)), (18, (3, 4, 12, 13)), (18, (0, 8, 9, 17)), (64, (15, 16, 47, 48))],
)
def test_a_product_is_four_parts_of_its_sum_added_in_order(inner, places):
    """One term in each part: the parts are added first to last, and each addition rounds to float32, ties to even."""
    for terms in itertools.permutations((BIG, 1.0, 1.0, -BIG)):
        total = numpy.float32(0)
        for term in terms:
            total = numpy.float32(total + numpy.float32(term))
        left = torch.zeros(2, inner)
        left[0, list(places)] = torch.tensor(terms)
        for right in (torch.ones(inner, 3), torch.ones(2, inner, 3)):
            result = matmul(left if right.dim() == 2 else left.expand(2, 2, inner).clone(), right)
            assert (
                result.dtype == torch.float32
                and set(result[..., 0, :].flatten().tolist()) == {float(total)}
                and not result[..., 1, :].any()
            )


def test_a_product_has_as_many_parts_as_asked_and_one_where_it_is_short():
    left = torch.zeros(1, 16)
    left[0, [7, 8]] = torch.tensor([BIG, 1.0])
    assert matmul(left, torch.ones(16, 1), groups=2).item() == BIG
    left[0, 15] = 1.0  # the second part is 2, and BIG + 2 is exact
    assert matmul(left, torch.ones(16, 1), groups=2).item() in (BIG, BIG + 2), "BIG where the host adds term by term"
    for inner, groups in ((15, 4), (7, 2), (100, 1)):  # fewer than four elements a part: one product of torch's
        a, b = seeded(5, inner), seeded(inner, 6, seed=1)
        assert torch.equal(matmul(a, b, groups=groups), torch.matmul(a, b))


@pytest.mark.parametrize(
    ("inner", "groups", "sizes"),
    [(16, 4, [4] * 4), (15, 4, []), (8, 2, [4, 4]), (7, 2, []), (18, 4, [4, 5, 4, 5]), (100, 1, [])],
)
def test_a_product_has_parts_from_four_elements_each_on(monkeypatch, inner, groups, sizes):
    """The sums of a host that adds a part to the others term by term do not tell: here it is what the parts are."""
    asked, parts = [], cube._parts
    monkeypatch.setattr(cube, "_parts", lambda *given: asked.extend(parts(*given)) or parts(*given))
    matmul(torch.ones(1, inner), torch.ones(inner, 1), groups=groups)
    assert [part.stop - part.start for part in asked] == sizes


@pytest.mark.parametrize("repeated", [(2, 1), (1, 3), (1, 1), (2, 3)])
def test_a_batch_of_matrices_that_is_partly_one_repeated_is_no_single_one(repeated):
    """(2, 3, 16, 4) from matrices that are stored once for the axes of size one."""
    right = seeded(*repeated, 16, 4).expand(2, 3, 16, 4)
    for left in (seeded(2, 3, 5, 16, seed=1), seeded(5, 16, seed=1)):
        result = matmul(left, right)
        assert result.shape == (2, 3, 5, 4)
        assert torch.allclose(result.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)


def test_the_terms_of_a_convolutions_sum():
    """(out, in, kernel) of a plain one; (in, out, kernel) of a transposed one, whose strides spread them."""
    weight = torch.empty(8, 4, 5, 6)
    assert cube._terms(weight, (2, 3), False) == 4 * 5 * 6
    assert cube._terms(weight, (2, 3), True) == 8 * 5 * 6 // (2 * 3)


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize("saturates", [False, True])
def test_a_product_rounds_both_operands_and_nothing_else(kind, saturates):
    """One term: the product of what enters, exact in float32 for operands of 12 bits and fewer."""
    values = [1 + 2.0**-12, 1 + 3 * 2.0**-12, -(1 + 2.0**-11), 1 + 2.0**-13, 3e-6, 65519.0, -65520.0, 1e5]
    operands = Operands(kind=kind, saturates=saturates)
    left, right = torch.tensor([[value] for value in values]), torch.tensor([[1 + 2.0**-12, -1.0, 0.5]])
    result = matmul(left, right, operands=operands)
    enter = [
        [entering(number, kind, "away", saturates) for number in tensor.flatten().tolist()] for tensor in (left, right)
    ]
    expected = [[float(numpy.float32(a) * numpy.float32(b)) for b in enter[1]] for a in enter[0]]
    assert result.dtype == torch.float32 and same(result, expected)
    if kind == "float16":
        in_half = matmul(left, right, operands=Operands(kind=kind, saturates=saturates, half_results=True))
        halves = [[entering(item, "float16", "away", saturates) for item in row] for row in expected]
        assert in_half.dtype == torch.float32 and same(in_half, halves)
        as_it_is = matmul(left, right, operands=Operands(kind="HF32", half_results=True))
        assert same(as_it_is, matmul(left, right, operands=Operands(kind="HF32"))), (
            "half results are of operands in float16 alone"
        )
        half = left[:5].half(), right.half()
        widest = matmul(*half, operands=Operands(kind=kind, half_results=True), out=torch.float32)
        assert same(widest, half[0].double() @ half[1].double()), "half operands give float32 where that is asked for"
        mixed = matmul(left[:2], half[1], operands=Operands(kind=kind, half_results=True))
        assert same(mixed, [halves[0][:], halves[1][:]]) or kind != "float16"


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_a_half_product_is_rounded_once_after_the_bias(dtype):
    bits, least, largest = FORMATS[dtype]
    place = 2.0**-bits
    left = torch.tensor([[1 + place, 1.0, 0.0]], dtype=dtype)
    right = torch.tensor([[1 + place, 1.0], [-1.0, place], [5.0, 5.0]], dtype=dtype)
    bias = torch.tensor([-2 * place, place / 2], dtype=dtype)
    sums = [Fraction(1 + place) ** 2 - 1, Fraction(1 + place) + Fraction(place)]
    assert same(matmul(left, right).double(), [[rounded(float(item), bits, "even") for item in sums]])
    with_bias = [
        rounded(float(item + Fraction(more)), bits, "even") for item, more in zip(sums, bias.double().tolist())
    ]
    result = matmul(left, right, bias=bias)
    assert result.dtype == dtype and same(result.double(), [with_bias])
    exact = matmul(left, right, bias=bias, out=torch.float32)
    assert exact.dtype == torch.float32 and same(
        exact, [[float(item + Fraction(more)) for item, more in zip(sums, bias.double().tolist())]]
    )


def test_products_of_integers_take_a_bias_and_a_dtype():
    left, right = torch.arange(6).view(2, 3), torch.arange(12).view(3, 4)
    expected = left.numpy() @ right.numpy()
    assert matmul(left, right).tolist() == expected.tolist()
    result = matmul(left, right, bias=torch.tensor([1, 2, 3, 4]), out=torch.float32)
    assert result.dtype == torch.float32 and result.tolist() == (expected + [1, 2, 3, 4]).tolist()


@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_the_cubes_own_order_rounds_once_after_each_group(group):
    """Numbers of 12 bits: float64 holds the sum of a group exactly, so the one rounding is that of the definition."""
    left, right = (round_hf32(seeded(*shape, seed=seed)) for seed, shape in enumerate([(3, 18), (18, 2)]))
    expected = []
    for row in left.double().tolist():
        for column in right.t().double().tolist():
            total = 0.0
            for start in range(0, 18, group):
                terms = [Fraction(a) * Fraction(b) for a, b in list(zip(row, column))[start : start + group]]
                total = rounded(float(Fraction(total) + sum(terms)), 23, "even")
            expected.append(total)
    assert same(matmul_by_groups(left, right, group).flatten(), expected)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=short)
@pytest.mark.parametrize(("beta", "alpha"), [*itertools.product((0, 1, 0.5, -3), (1, 0.25, -2))])
def test_what_is_added_to_a_product_is_added_before_the_only_rounding(dtype, beta, alpha):
    bits, least, largest = FORMATS[dtype]
    itself = torch.tensor([1.0, -3.0, 1 + 2.0**-7], dtype=dtype)
    product = torch.tensor([2.0**-9, 5.0, 2.0**-12 - 1])
    exact = [
        (Fraction(beta) * Fraction(a) if beta else 0) + Fraction(alpha) * Fraction(b)
        for a, b in zip(itself.double().tolist(), product.double().tolist())
    ]
    result = scaled_product(itself, product, beta, alpha, dtype)
    assert result.dtype == dtype and same(
        result.double(), [rounded(float(item), bits, "even", least, largest) for item in exact]
    )
    unknown = torch.full((3,), math.nan, dtype=dtype)
    assert bool(scaled_product(unknown, product, 0, 1, dtype).isfinite().all())


# -------- convolutions


def convolved(x, weight, bias, stride, padding, dilation, groups):
    """The convolution of (B, C, L) by (O, C / groups, W), by its definition, in fractions."""
    batch, length = len(x), len(x[0][0])
    width, inside, outside = len(weight[0][0]), len(weight[0]), len(weight) // groups
    places = (length + 2 * padding - dilation * (width - 1) - 1) // stride + 1
    result = [
        [[Fraction(bias[o]) if bias else Fraction(0) for _ in range(places)] for o in range(len(weight))]
        for _ in range(batch)
    ]
    for b, o, place, c, w in itertools.product(
        range(batch), range(len(weight)), range(places), range(inside), range(width)
    ):
        at = place * stride - padding + w * dilation
        if 0 <= at < length:
            result[b][o][place] += Fraction(x[b][o // outside * inside + c][at]) * Fraction(weight[o][c][w])
    return result


def as_lists(tensor):
    return tensor.detach().double().tolist()


def enters(tensor, kind):
    return [[[entering(item, kind, "away", False) for item in row] for row in plane] for plane in as_lists(tensor)]


def each_of(nested, function):
    return [each_of(item, function) if isinstance(item, list) else function(item) for item in nested]


def drawn(*shape, seed):
    """Small integers, half of them with 2^-12 added, which HF32 rounds: sums of a few products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator) + torch.randint(0, 2, shape, generator=generator) * 2.0**-12


GEOMETRY = [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 1), (3, 1, 1, 2)]  # stride, padding, dilation, groups


@pytest.mark.parametrize("kind", OPERANDS)
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), GEOMETRY)
def test_a_convolution_rounds_its_operands_and_not_its_bias(kind, stride, padding, dilation, groups):
    x, weight, bias = (
        drawn(2, 4, 8, seed=0),
        torch.ones(6, 4 // groups, 3),
        torch.tensor([2.0**-12, 1.0, -2.0, 3.0, 1 + 2.0**-12, 0.5]),
    )
    weight[1::2] = -2.0
    options = dict(
        stride=(stride,), padding=(padding,), dilation=(dilation,), transposed=False, output_padding=(0,), groups=groups
    )
    for added in (None, bias):
        expected = convolved(enters(x, kind), enters(weight, kind), None, stride, padding, dilation, groups)
        terms = [0.0] * 6 if added is None else added.tolist()
        if kind == "float16":
            terms = [entering(term, kind, "away", False) for term in terms]
        expected = [
            [[float(item + Fraction(terms[o])) for item in row] for o, row in enumerate(plane)] for plane in expected
        ]
        if kind == "float16":
            expected = each_of(expected, lambda value: rounded(value, 10, "even", -14, 15))
        result = convolution(x, weight, added, operands=Operands(kind=kind), **options)
        assert result.dtype == torch.float32 and same(result, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_a_half_convolution_is_rounded_once_after_the_bias(dtype):
    bits, least, largest = FORMATS[dtype]
    x, weight = drawn(1, 2, 6, seed=1).to(dtype), drawn(3, 2, 3, seed=2).to(dtype)
    bias = torch.tensor([2.0**-9, -1.0, 0.25], dtype=dtype)
    options = dict(stride=(1,), padding=(1,), dilation=(1,), transposed=False, output_padding=(0,), groups=1)
    exact = convolved(as_lists(x), as_lists(weight), as_lists(bias), 1, 1, 1, 1)
    for operands in (Operands(), Operands(kind="float16")):
        result = convolution(x, weight, bias, operands=operands, **options)
        assert result.dtype == dtype and same(
            result.double(), each_of(exact, lambda value: rounded(float(value), bits, "even", least, largest))
        )
    plain = convolution(x, weight, None, **options)
    assert same(
        plain.double(),
        each_of(
            convolved(as_lists(x), as_lists(weight), None, 1, 1, 1, 1),
            lambda value: rounded(float(value), bits, "even", least, largest),
        ),
    )


def test_saturation_of_a_convolution_is_that_of_its_operands_bias_and_result():
    one = torch.ones(1, 1, 1)
    options = dict(stride=(1,), padding=(0,), dilation=(1,), transposed=False, output_padding=(0,), groups=1)
    for saturates, large in ((True, 65504.0), (False, math.inf)):
        operands = Operands(kind="float16", saturates=saturates)
        assert convolution(1e5 * one, one, None, operands=operands, **options).item() == large
        assert convolution(one, one, torch.tensor([1e5]), operands=operands, **options).item() == large
        assert convolution(4e4 * one, 2 * one, None, operands=operands, **options).item() == large


@pytest.mark.parametrize("kind", ["float32", "HF32", "float16"])
@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), GEOMETRY)
def test_the_gradients_of_a_convolution_round_the_operands_of_their_products(kind, stride, padding, dilation, groups):
    x, weight = drawn(2, 4, 8, seed=0), drawn(6, 4 // groups, 3, seed=1)
    places = (8 + 2 * padding - dilation * 2 - 1) // stride + 1
    grad = drawn(2, 6, places, seed=2)
    options = dict(
        stride=(stride,), padding=(padding,), dilation=(dilation,), transposed=False, output_padding=(0,), groups=groups
    )
    towards_x, towards_weight = numpy.zeros((2, 4, 8)), numpy.zeros((6, 4 // groups, 3))
    g, a, w = (numpy.array(enters(tensor, kind)) for tensor in (grad, x, weight))
    for b, o, place, c, k in itertools.product(range(2), range(6), range(places), range(4 // groups), range(3)):
        at, channel = place * stride - padding + k * dilation, o // (6 // groups) * (4 // groups) + c
        if 0 <= at < 8:
            towards_x[b, channel, at] += g[b, o, place] * w[o, c, k]
            towards_weight[o, c, k] += g[b, o, place] * a[b, channel, at]
    for wanted in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        result = convolution_backward(grad, x, weight, wanted=wanted, operands=Operands(kind=kind), **options)
        assert [item is not None for item in result] == list(wanted)
        expected = (towards_x, towards_weight, grad.double().sum((0, 2)).numpy())
        for tensor, right in zip(result, expected):
            if tensor is not None:
                numpy.testing.assert_allclose(tensor.double().numpy(), right, rtol=2.0**-22, atol=2.0**-20)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_the_gradients_of_a_half_convolution_are_rounded_once(dtype):
    bits, least, largest = FORMATS[dtype]
    x, weight = drawn(1, 1, 40, seed=0).to(dtype), torch.tensor([[[1.0, -1.0, 0.5]]], dtype=dtype)
    grad = drawn(1, 1, 38, seed=2).to(dtype)
    options = dict(stride=(1,), padding=(0,), dilation=(1,), transposed=False, output_padding=(0,), groups=1)
    result = convolution_backward(grad, x, weight, wanted=(True, True, True), **options)
    g, a, w = (tensor.double().numpy().reshape(-1) for tensor in (grad, x, weight))
    expected = (numpy.convolve(g, w), [(g * a[k : k + 38]).sum() for k in range(3)], [g.sum()])
    for tensor, right in zip(result, expected):
        assert tensor.dtype == dtype and same(
            tensor.double().flatten(), [rounded(float(value), bits, "even", least, largest) for value in right]
        )


def test_pieces_are_cut_where_one_channel_is_and_they_are_long():
    def cut(x=(2, 1, 640), weight=(4, 1, 64), stride=64, padding=0, dilation=1, transposed=False, groups=1):
        options = dict(stride=(stride,), padding=(padding,), dilation=(dilation,), transposed=transposed, groups=groups)
        return cuts_in_pieces(torch.zeros(x), torch.zeros(weight), **options)

    assert cut()
    assert not cut(weight=(4, 1, 63), stride=63) and cut(weight=(4, 1, 65), stride=65)
    assert not any(
        [
            cut(stride=63),
            cut(padding=1),
            cut(dilation=2),
            cut(transposed=True),
            cut(x=(2, 2, 640)),
            cut(x=(2, 2, 640), groups=2),
        ]
    )
    assert not cut(x=(2, 1, 640, 640), weight=(4, 1, 64, 64))


# -------- functions of the vector unit

RANGE = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 1e4, -1e4])])


def close(result, expected, rel=4e-7, least=1e-30):
    """Within some roundings of float32."""
    expected = numpy.asarray(expected, dtype=numpy.float64)
    return bool((numpy.abs(result.double().numpy() - expected) <= rel * numpy.abs(expected) + least).all())


def tanh_gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))


def test_gelu_is_its_tanh_formula_unless_asked_otherwise():
    middle = RANGE[
        RANGE.abs() < 4
    ]  # farther out 1 + tanh cancels, and what is left is of the size of a last place of 1
    for result, formula in (
        (gelu(middle), tanh_gelu),
        (gelu(middle, "tanh"), tanh_gelu),
        (gelu(middle, "none"), erf_gelu),
    ):
        assert close(result, [formula(number) for number in middle.tolist()], 1e-6, 1e-6)
    assert max(abs(tanh_gelu(number) - erf_gelu(number)) for number in middle.tolist()) > 1e-4, (
        "the two can be told apart"
    )


def test_silu_is_x_times_its_sigmoid_and_does_not_overflow():
    expected = [number / (1 + math.exp(-number)) if number > -700 else 0.0 for number in RANGE.tolist()]
    assert close(silu(RANGE), expected, 1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_half_activations_are_rounded_once(dtype):
    bits, least, largest = FORMATS[dtype]
    x = RANGE[RANGE.abs() < 4].to(dtype)
    for function, formula in ((gelu, tanh_gelu), (silu, lambda value: value / (1 + math.exp(-value)))):
        expected = numpy.array(
            [rounded(formula(number), bits, "even", least, largest) for number in x.double().tolist()]
        )
        wrong = numpy.abs(function(x).double().numpy() - expected) > 2.0**-24
        assert wrong.mean() < 0.02, "but for a value beside a tie"


def test_the_reciprocal_root_is_two_roundings():
    x = FINITE[FINITE > 0]
    result = rsqrt(x)
    assert result.dtype == torch.float32 and close(result, 1 / numpy.sqrt(x.double().numpy()), 2.0**-22), (
        "a host's root may err by a last place"
    )
    assert same(rsqrt(torch.tensor([0.0, -1.0, math.inf])), [math.inf, math.nan, 0.0])
    for dtype in HALVES:
        bits, least, largest = FORMATS[dtype]
        half = torch.tensor([0.1, 2.0, 3.0, 700.0], dtype=dtype)
        once = [
            rounded(float(numpy.float32(1) / numpy.sqrt(numpy.float32(number))), bits, "even", least, largest)
            for number in half.double().tolist()
        ]
        result = rsqrt(half)
        assert result.dtype == dtype and same(result.double(), once)
    assert rsqrt(torch.tensor([16, 4])).tolist() == [0.25, 0.5]


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_a_dot_product_of_halves_is_summed_in_float32(dtype):
    bits, _, _ = FORMATS[dtype]
    place = 2.0**-bits
    left, right = torch.tensor([1 + place, -1.0], dtype=dtype), torch.tensor([1 + place, 1.0], dtype=dtype)
    result = dot(left, right)
    assert result.dtype == dtype and result.double().item() == rounded((1 + place) ** 2 - 1, bits, "even")
    assert dot(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])).item() == -5


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", [(8,), (2, 8)])
def test_rms_norm_is_its_formula(shape, eps):
    x, weight = seeded(3, 2, 8) + 0.5, seeded(*shape, seed=1)
    axes = tuple(range(-len(shape), 0))
    wide_x = x.double().numpy()
    scale = 1 / numpy.sqrt((wide_x**2).mean(axes, keepdims=True) + eps)
    result, kept = rms_norm(x, weight, eps)
    assert (
        close(result, wide_x * scale * weight.double().numpy(), 1e-6)
        and close(kept, scale, 1e-6)
        and kept.dtype == torch.float32
    )
    for dtype in HALVES:
        half, narrow = x.to(dtype), weight.to(dtype)
        exact = half.double().numpy()
        exact = exact / numpy.sqrt((exact**2).mean(axes, keepdims=True) + eps) * narrow.double().numpy()
        once = numpy.array([rounded(number, FORMATS[dtype][0], "even") for number in exact.flatten().tolist()])
        result, kept = rms_norm(half, narrow, eps)
        assert result.dtype == dtype and kept.dtype == torch.float32
        assert (result.double().numpy().flatten() != once).mean() < 0.05, "but for a value beside a tie"


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("axes", [(-1,), (-2, -1)])
def test_layer_norm_is_its_formula(axes, eps):
    x = seeded(3, 2, 8) * 3 + 5
    shape = x.shape[len(x.shape) + axes[0] :]
    weight, bias = seeded(*shape, seed=1), seeded(*shape, seed=2)
    wide_x = x.double().numpy()
    mean = wide_x.mean(axes, keepdims=True)
    rstd = 1 / numpy.sqrt(((wide_x - mean) ** 2).mean(axes, keepdims=True) + eps)
    normal = (wide_x - mean) * rstd
    for w, b in itertools.product((None, weight), (None, bias)):
        expected = normal * (1 if w is None else w.double().numpy()) + (0 if b is None else b.double().numpy())
        y, found_mean, found_rstd = layer_norm(x, axes, w, b, eps)
        assert close(y, expected, 1e-6, 3e-6) and close(found_mean, mean, 1e-6) and close(found_rstd, rstd, 2e-6)
    half = layer_norm(x.half(), axes, weight.bfloat16(), bias.half(), eps)
    assert [tensor.dtype for tensor in half] == [torch.float32] * 3, "the caller rounds"


def test_effective_bits_are_the_log_of_the_relative_error():
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert effective_bits(exact * (1 + 2.0**-10), exact) == pytest.approx(10, abs=1e-9)
    assert effective_bits(torch.tensor([3.0, -4.0 + 5 * 2.0**-7]), exact.float()) == pytest.approx(7, abs=1e-9)
    assert effective_bits(exact, exact) == math.inf


# -------- attention


def attended(q, k, v, scale, hidden=None, bias=None, dropout_mask=None, keep=1.0, sink=None):
    """Attention of (B, H, N, D) in float64, a row at a time; the result, each row's maximum and sum."""
    (batch, heads, rows, _), group = q.shape, q.shape[1] // k.shape[1]
    result, tops, totals = (
        numpy.zeros((batch, heads, rows, v.shape[-1])),
        numpy.zeros((batch, heads, rows, 1)),
        numpy.zeros((batch, heads, rows, 1)),
    )
    for b, h, n in itertools.product(range(batch), range(heads), range(rows)):
        scores = k[b, h // group] @ q[b, h, n] * scale
        scores = scores if bias is None else scores + bias[b, h, n]
        scores = scores if hidden is None else numpy.where(hidden[b, h, n], -numpy.inf, scores)
        everything = scores if sink is None else numpy.append(scores, sink[h])
        top = everything.max()
        weights = numpy.exp(scores - top) if numpy.isfinite(top) else numpy.zeros_like(scores)
        total = numpy.exp(everything - top).sum() if numpy.isfinite(top) else 0.0
        dropped = weights
        if dropout_mask is not None:
            dropped = weights * dropout_mask[b, h, n] / keep if keep else 0 * weights
        result[b, h, n] = dropped @ v[b, h // group] / total if total else 0
        tops[b, h, n], totals[b, h, n] = top, total
    return result, tops, totals


def masks(shape, seed=7):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(shape, generator=generator) < 0.3
    hidden[..., 0] = False
    return dict(
        hidden=hidden,
        bias=torch.randn(shape, generator=generator),
        dropout_mask=torch.rand(shape, generator=generator) < 0.8,
    )


OPTIONS = [(), ("hidden",), ("bias",), ("dropout_mask",), ("sink",), ("hidden", "bias", "dropout_mask", "sink")]


def inputs(names, heads=2, dtype=torch.float32):
    q, k, v = (
        seeded(2, count, length, width, seed=seed, dtype=dtype)
        for seed, (count, length, width) in enumerate([(4, 5, 8), (heads, 6, 8), (heads, 6, 3)])
    )
    options = {name: mask for name, mask in masks((2, 4, 5, 6)).items() if name in names}
    options |= {"keep": 0.8} if "dropout_mask" in names else {}
    return (q, k, v), options | ({"sink": torch.tensor([0.5, -1.0, 2.0, 0.0])} if "sink" in names else {})


def wide_of(options):
    tensors = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    wide = {
        name: (tensor.double() if tensor.is_floating_point() else tensor).numpy() for name, tensor in tensors.items()
    }
    return options | wide


@pytest.mark.parametrize("names", OPTIONS, ids="-".join)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_is_its_definition(names, heads):
    tensors, options = inputs(names, heads)
    result = attention(*tensors, scale=0.4, **options)
    expected = attended(*[tensor.double().numpy() for tensor in tensors], 0.4, **wide_of(options))
    for tensor, right in zip(result, expected):
        assert tensor.dtype == torch.float32 and tensor.shape == right.shape
        numpy.testing.assert_allclose(tensor.double().numpy(), right, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_half_attention_is_within_its_two_casts(dtype):
    tensors, options = inputs(("hidden", "bias"), dtype=dtype)
    result, top, total = attention(*tensors, scale=0.4, **options)
    wide_q, wide_k, wide_v = (tensor.double().numpy() for tensor in tensors)
    expected = attended(wide_q, wide_k, wide_v, 0.4, **wide_of(options))
    assert result.dtype == dtype and top.dtype == total.dtype == torch.float32
    place = 2.0 ** -FORMATS[dtype][0] / 2
    numpy.testing.assert_allclose(total.double().numpy(), expected[2], rtol=3e-6)  # of the weights before their cast
    assert (numpy.abs(result.double().numpy() - expected[0]) <= 2.1 * place * numpy.abs(wide_v).max()).all()


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_the_result_of_attention_is_cast_with_ties_away(dtype):
    """Keys of zeros weigh all values alike: two of them give their mean, which is a tie."""
    place = 2.0 ** -FORMATS[dtype][0]
    zeros = torch.zeros(1, 1, 2, 4, dtype=dtype)
    v = torch.tensor([[1.0, -1.0], [1 + place, -(1 + place)]], dtype=dtype)[None, None]
    result, top, total = attention(zeros, zeros, v, scale=1.0)
    assert (
        result.double().tolist() == [[[[1 + place, -1 - place]] * 2]]
        and top.tolist() == [[[[0.0]] * 2]]
        and total.tolist() == [[[[2.0]] * 2]]
    )


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_the_probabilities_of_attention_are_cast_with_ties_away(dtype):
    """What dropout leaves is divided by `keep`, and the quotient is a tie."""
    place = 2.0 ** -FORMATS[dtype][0]
    keep = float(numpy.float32(1) / numpy.float32(1 + place / 2))
    assert (torch.ones(1) / keep).item() == 1 + place / 2
    zeros, kept = torch.zeros(1, 1, 1, 4, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    v = torch.tensor([[[[2.0, -4.0, 1.5, -1.5]]]], dtype=dtype)  # 1.5 (1 + place) is a tie again
    result = attention(zeros, zeros, v, scale=1.0, dropout_mask=kept, keep=keep)[0]
    assert result.double().tolist() == [[[[2 * (1 + place), -4 * (1 + place), 1.5 + 2 * place, -1.5 - 2 * place]]]]


@pytest.mark.parametrize(
    ("scores", "rows", "keys", "heads", "parts"),
    [
        (100, 5, 4, 12, [5, 5, 2]),
        (99, 4, 5, 12, [4, 4, 4]),
        (19, 5, 4, 3, [1, 1, 1]),  # one head at least
        (3, 1, 1, 7, [3, 3, 1]),
        (3, 0, 5, 7, [3, 3, 1]),
        (100, 5, 4, 0, [0]),
    ],
)
def test_attention_holds_as_many_scores_at_a_time_as_it_may(monkeypatch, scores, rows, keys, heads, parts):
    monkeypatch.setattr(fused, "SCORES", scores)
    sizes, attend = [], fused._attend
    monkeypatch.setattr(fused, "_attend", lambda q, *rest: sizes.append(len(q)) or attend(q, *rest))
    q, k = torch.ones(1, heads, rows, 2), torch.ones(1, heads, keys, 2)
    result, top, _ = attention(q, k, k, scale=1.0)
    assert sizes == parts and result.shape == q.shape and top.shape == (1, heads, rows, 1)


def test_fast_attention_rounds_scores_and_softmax_to_float16():
    """One key beside a sink, so that each step is one number: its score, its weight, the quotient."""
    q, k = (torch.tensor([[[[item, 1.0]]]], dtype=torch.float16) for item in (1 + 2.0**-10, 1 + 2.0**-9))
    v, sink, bias = (
        torch.ones(1, 1, 1, 1, dtype=torch.float16),
        torch.tensor([3.0]),
        torch.full((1, 1, 1, 1), 1 + 2.0**-11),
    )
    exact = (1 + 2.0**-10) * (1 + 2.0**-9) + 1

    def half(value):
        return rounded(value, 10, "even", -14, 15)

    for added in (None, bias):
        score = half(half(exact) * 0.3)
        score = score if added is None else half(score + half(1 + 2.0**-11))
        weight = half(math.exp(numpy.float32(score) - numpy.float32(3)))
        result, top, total = attention(q, k, v, scale=0.3, sink=sink, fast=True, bias=added)
        assert top.item() == 3 and total.item() == pytest.approx(weight + 1, rel=1e-7)
        assert result.item() == pytest.approx(weight / (weight + 1), rel=2.0**-11)
        slow = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=0.3, sink=sink, fast=True, bias=added)[2]
        assert torch.equal(
            slow, attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=0.3, sink=sink, bias=added)[2]
        )
    hidden = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    assert attention(q, k, v, scale=0.3, fast=True, hidden=hidden)[0].item() == 0


def test_rows_that_see_no_key_give_zeros():
    tensors, _ = inputs(())
    hidden = torch.ones(1, 1, 5, 6, dtype=torch.bool)
    hidden[..., 1:, 2] = False
    result, top, total = attention(*tensors, scale=0.4, hidden=hidden)
    assert not result[:, :, 0].any() and result[:, :, 1:].equal(
        tensors[2][:, :, 2:3].repeat_interleave(2, 1).expand(-1, -1, 4, -1)
    )
    assert (top[:, :, 0] == -math.inf).all() and not total[:, :, 0].any() and (total[:, :, 1:] == 1).all()
    dropped = attention(*tensors, scale=0.4, dropout_mask=torch.ones(1, 1, 5, 6, dtype=torch.bool), keep=0.0)[0]
    assert not dropped.any()
    nothing = attention(tensors[0], *[tensor[:, :, :0] for tensor in tensors[1:]], scale=0.4)
    assert nothing[0].shape == (2, 4, 5, 3) and not nothing[0].any() and (nothing[1] == -math.inf).all()
    assert [tuple(tensor.shape) for tensor in attention(*[tensor[:0] for tensor in tensors], scale=0.4)] == [
        (0, 4, 5, 3),
        (0, 4, 5, 1),
        (0, 4, 5, 1),
    ]


def differentiated(grad, tensors, scale, hidden=None, bias=None, dropout_mask=None, keep=1.0, sink=None):
    """The gradients of attention by torch's own differentiation, in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    q, k, v = leaves
    group = q.shape[1] // k.shape[1]
    bias, sink = (None if tensor is None else tensor.double().requires_grad_() for tensor in (bias, sink))
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale + (0 if bias is None else bias)
    scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
    beside = scores if sink is None else torch.cat([scores, sink[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = beside.softmax(-1)[..., : scores.shape[-1]]
    weights = weights if dropout_mask is None else weights * dropout_mask / keep
    (weights @ v.repeat_interleave(group, 1) * grad.double()).sum().backward()
    return [None if leaf is None else leaf.grad for leaf in (*leaves, bias, sink)]


@pytest.mark.parametrize("names", OPTIONS, ids="-".join)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_gradients_of_attention_are_those_of_its_definition(names, heads):
    tensors, options = inputs(names, heads)
    grad = seeded(2, 4, 5, 3, seed=9)
    result = attention(*tensors, scale=0.4, **options)
    gradients = attention_backward(grad, *tensors, *result, scale=0.4, **options)
    expected = differentiated(grad, tensors, 0.4, **options)
    assert [gradient is None for gradient in gradients] == [item is None for item in expected]
    for gradient, right in zip(gradients, expected):
        if gradient is not None:
            assert gradient.dtype == torch.float32 and gradient.shape == right.shape
            numpy.testing.assert_allclose(gradient.double().numpy(), right.numpy(), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_the_gradients_of_half_attention_are_products_of_rounded_probabilities(dtype):
    """Two queries whose gradients nearly cancel: what is left of the first probability shows its last place."""
    bits, least, largest = FORMATS[dtype]
    q = torch.tensor([[[[0.0], [1.0]]]], dtype=dtype)
    k, v = torch.tensor([[[[0.0], [0.0], [1.0]]]], dtype=dtype), torch.zeros(1, 1, 3, 1, dtype=dtype)
    result = attention(q, k, v, scale=1.0)
    grad = torch.tensor([[[[1.0], [-1.0]]]], dtype=dtype)
    gradients = attention_backward(grad, q, k, v, *result, scale=1.0)
    one, two = 1 / 3, 1 / (2 + math.e)
    kept = [rounded(item, bits, "away") for item in (one, two)]
    expected = rounded(kept[0] - kept[1], bits, "even", least, largest)
    assert gradients[2].dtype == dtype and gradients[2][0, 0, 0].item() == expected != rounded(
        one - two, bits, "even", least, largest
    )
    assert [gradient is None for gradient in gradients] == [False, False, False, True, True]


@pytest.mark.parametrize("dtype", HALVES, ids=short)
def test_the_gradients_of_half_scores_are_rounded_before_their_products(dtype):
    bits, least, largest = FORMATS[dtype]
    q, k = torch.zeros(1, 1, 1, 1, dtype=dtype), torch.tensor([[[[1.0], [-1.0], [0.0]]]], dtype=dtype)
    v = torch.tensor([[[[1.0], [0.9], [0.0]]]], dtype=dtype)
    result = attention(q, k, v, scale=1.0)
    gradients = attention_backward(
        torch.ones(1, 1, 1, 1, dtype=dtype), q, k, v, *result, scale=1.0, bias=torch.zeros(1, 1, 1, 3)
    )
    values, mean = v.double().flatten().tolist(), result[0].item()
    scores = [(value - mean) / 3 for value in values]
    kept = [rounded(score, bits, "away") for score in scores]
    assert (
        gradients[0].item()
        == rounded(kept[0] - kept[1], bits, "even", least, largest)
        != rounded(scores[0] - scores[1], bits, "even", least, largest)
    )
    assert gradients[3].dtype == torch.float32 and gradients[3].flatten().tolist() == pytest.approx(scores, rel=1e-6)


# -------- families

KINDS = {  # by family, what float32 operands become under cubeMathType 0 to 4; None where the cube refuses
    "A2": ("float32", "HF32", "float16", "HF32", "float32"),
    "A3": ("float32", "HF32", "float16", "HF32", "float32"),
    "950": ("float32", "HF32 of 10 bits", "float16", "HF32 of 10 bits", "float32"),
    "910A": (None, "float16", "float16", None, None),
    "310P": (None, "float16", "float16", None, None),
}


@pytest.mark.parametrize(("family", "cube"), [*itertools.product(KINDS, range(5))])
def test_what_a_cube_makes_of_float32_operands(family, cube):
    (known,) = [item for item in FAMILIES if item.name == family]
    if KINDS[family][cube] is None:
        with pytest.raises(NoFloat32, match="does not compute in float32"):
            known.operands(cube)
    else:
        assert known.operands(cube) == KINDS[family][cube]


def test_what_is_known_of_each_family():
    """Whether it is known, float32, bits of HF32, bfloat16, whether half saturates, GELU by tanh, fused attention."""
    fields = ("known", "float32", "hf32_bits", "bfloat16", "saturates", "gelu_tanh", "fused_attention")
    result = {family.name: tuple(getattr(family, name) for name in fields) for family in (*FAMILIES, family_of("?"))}
    assert result == {
        "A2": (True, True, 11, True, False, True, True),
        "A3": (True, True, 11, True, False, True, True),
        "910A": (True, False, None, False, True, True, False),
        "310P": (True, False, None, False, True, True, False),
        "310B": (False, None, None, None, True, True, True),
        "950": (True, True, 10, True, False, False, True),
        "unknown": (False, None, None, None, None, None, None),
    }


def test_which_cube_math_type_is_sent():
    sent = {
        (hf32, half): cube_type(allow_hf32=hf32, allow_float16=half) for hf32 in (False, True) for half in (False, True)
    }
    assert sent == {(False, False): 0, (True, False): 3, (False, True): 2, (True, True): 1}


def test_a_family_without_rules_says_so():
    unknown = family_of("Ascend999")
    for family in (unknown, family_of("Ascend310B1")):
        assert not family.known and family.products is family.convolutions is family.allows_float16 is None
        with pytest.raises(ValueError, match="is not known"):
            family.operands(0)
    assert (
        A2.name == "A2"
        and A2.hf32_bits == 11
        and A2.allows_float16 is False
        and family_of("Ascend310P3").allows_float16 is True
    )
