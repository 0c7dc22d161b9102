"""compare() and worst_slices() against slow restatements in Python, and at the edges of tables, chunks and places."""

import itertools
import math
from fractions import Fraction

import numpy
import pytest
import torch

from harness import compare
from harness.measure import comparison, slices
from harness.measure.comparison import CLOSE, DYNAMO, METRICS_AT_LEAST, WORST, Cosine, Count, Share, Size, edge
from harness.measure.slices import Slice, worst_slices
from harness.tests.needs import compiled_and_by_torch  # noqa: F401  each test runs both ways

DTYPES = {  # mantissa bits, smallest normal exponent, the tolerances of torch.testing and of the compiler's benchmarks
    "float16": (10, -14, (1e-3, 1e-5), 1e-2),
    "bfloat16": (7, -126, (1.6e-2, 1e-5), 1e-2),
    "float32": (23, -126, (1.3e-6, 1e-5), 1e-3),
    "float64": (52, -1022, (1e-7, 1e-7), 1e-3),
    "complex64": (23, -126, (1.3e-6, 1e-5), 0.0),
    "complex128": (52, -1022, (1e-7, 1e-7), 0.0),
}


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -------- tables


@pytest.mark.parametrize("name", DTYPES)
def test_the_last_place_and_the_tolerances_of_each_dtype(name):
    """A difference of two places; the place of a subnormal number is that of the smallest normal one."""
    mantissa, smallest, (relative, absolute), compiler = DTYPES[name]
    dtype = getattr(torch, name)
    for size in (1.0, 4.0, 2.0**smallest, 2.0 ** (smallest - 1), 2.0 ** (smallest - 2)):
        place = 2.0 ** (max(math.log2(size), smallest) - mantissa)
        result = compare(torch.tensor([size + 2 * place], dtype=dtype), torch.tensor([size], dtype=dtype))
        mean = 1.0 if name.startswith("complex") else 2.0  # of the imaginary part too, which is equal
        assert (result.ulp_max, result.ulp_mean) == (2.0, mean)
    result = compare(torch.tensor([3.0], dtype=dtype), torch.tensor([2.0], dtype=dtype))
    assert result.close_atol == 1 - relative * 2 and result.dynamo_atol == 1 - compiler * 2
    assert (CLOSE[name], DYNAMO.get(name, 0.0)) == ((relative, absolute), compiler)
    assert set(CLOSE) == set(DTYPES) and list(DYNAMO) == ["float32", "float64", "float16", "bfloat16"]
    plain = torch.tensor([2.0], dtype=dtype)
    with pytest.raises(AssertionError) as refused:  # torch's own words name both of its tolerances
        torch.testing.assert_close(plain + 1, plain)
    assert f"up to {absolute} allowed" in str(refused.value) and f"up to {relative} allowed" in str(refused.value)


def test_a_place_of_integers_is_one_and_they_have_no_tolerance():
    result = compare(torch.tensor([9, 2**40]), torch.tensor([2, 2**40]))
    assert (result.ulp_max, result.ulp_mean, result.close_atol, result.dynamo_atol, result.matched) == (
        7.0,
        3.5,
        7.0,
        7.0,
        0.5,
    )


def test_bounds_of_what_a_file_may_hold():
    bounds = {kind: kind.__metadata__[0] for kind in (Count, Size, Share, Cosine)}
    held = {
        name: (bounds[kind].least, bounds[kind].most)
        for name, kind in (("count", Count), ("size", Size), ("share", Share), ("cosine", Cosine))
    }
    assert held == {"count": (0, math.inf), "size": (0, math.inf), "share": (0, 1), "cosine": (-1 - 1e-9, 1 + 1e-9)}


def test_the_defaults_are_unknown_numbers_and_no_elements():
    result = compare(torch.ones(2), torch.ones(3))
    unknown = (
        "max_diff mean_diff cos_sim cos_distance rel_l2 rms worst_actual worst_expected token_cos_sim rmse shift gain "
        "balance max_rel mean_rel wape max_scaled"
    )
    assert all(
        math.isnan(getattr(result, item))
        for item in (*unknown.split(), "token_rel_l2", "ulp_max", "ulp_mean", "close_atol", "matched", "dynamo_atol")
    )
    none = (
        "nan_actual",
        "nan_expected",
        "inf_actual",
        "inf_expected",
        "nonfinite_differ",
        "unequal",
        "flips",
        "flip_margin",
        "flip_value",
    )
    assert [getattr(result, item) for item in none] == [0] * len(none)
    assert (
        result.worst_index is result.worst_token is result.worst_token_diff is result.first_flip is None
        and result.histogram == ()
    )
    assert (result.shape, result.expected_shape, result.numel, result.comparable) == ((2,), (3,), 2, False)
    empty = compare(torch.ones(0, 3), torch.ones(0, 3))
    numbers = (
        "max_diff mean_diff cos_distance rel_l2 rms rmse worst_actual worst_expected shift gain balance max_rel "
        "mean_rel wape max_scaled ulp_max ulp_mean close_atol dynamo_atol"
    )
    assert {getattr(empty, part) for part in numbers.split()} == {0.0} and (
        empty.cos_sim,
        empty.matched,
        empty.numel,
    ) == (1.0, 1.0, 0)


def test_what_a_limit_must_know_of_each_metric():
    assert METRICS_AT_LEAST == ("cos_sim", "token_cos_sim", "matched")
    assert WORST == {
        "max_diff": ("worst_index", ""),
        "token_cos_sim": ("worst_token", "token"),
        "token_rel_l2": ("worst_token_diff", "token"),
        "flip_margin": ("first_flip", "row"),
    }


def test_a_torch_that_is_too_old_is_refused(monkeypatch):
    def refuse():
        raise RuntimeError("too old")

    monkeypatch.setattr(comparison, "require_torch", refuse)
    with pytest.raises(RuntimeError, match="too old"):
        compare(torch.ones(1), torch.ones(1))


# -------- numbers by their definition


def measured(actual, expected, relative, absolute, compiler):
    """The numbers of two matrices, in exact fractions but for roots; every one by its definition."""
    a, e = ([[Fraction(x) for x in row] for row in tensor] for tensor in (actual, expected))
    flat = [(x, y) for rows in zip(a, e) for x, y in zip(*rows)]
    diffs, count = [x - y for x, y in flat], len(flat)
    square = [sum((x - y) ** 2 for x, y in zip(*rows)) for rows in zip(a, e)]
    norms = [sum(y * y for y in row) for row in e]
    whole = sum(norms)
    rms = math.sqrt(whole / count)
    scaled = [
        abs(x - y) / (abs(y) + max(math.sqrt(norm / len(row)), rms / 10))
        for row, other, norm in zip(e, a, norms)
        for x, y in zip(other, row)
    ]
    cosines = [
        sum(x * y for x, y in zip(*rows))
        / (math.sqrt(sum(x * x for x in rows[0])) * math.sqrt(sum(y * y for y in rows[1])))
        for rows in zip(a, e)
    ]
    gaps = [
        float(row[max(range(len(row)), key=lambda i: row[i])] - row[max(range(len(row)), key=lambda i: other[i])])
        for row, other in zip(e, a)
    ]
    return dict(
        max_diff=max(map(abs, diffs)),
        mean_diff=sum(map(abs, diffs)) / count,
        rel_l2=math.sqrt(sum(square) / whole),
        rms=rms,
        rmse=math.sqrt(sum(square) / count),
        shift=sum(diffs) / count,
        gain=sum((x - y) * y for x, y in flat) / whole,
        balance=Fraction(sum((d > 0) - (d < 0) for d in diffs), count),
        max_rel=max(float(abs(x - y)) / (abs(float(y)) + 1e-7) for x, y in flat),
        mean_rel=sum(float(abs(x - y)) / (abs(float(y)) + 1e-7) for x, y in flat) / count,
        wape=sum(map(abs, diffs)) / sum(abs(y) for _, y in flat),
        max_scaled=max(map(float, scaled)),
        token_rel_l2=math.sqrt(max(square) / (whole / len(e))),
        token_cos_sim=min(cosines),
        cos_sim=sum(x * y for x, y in flat) / (math.sqrt(sum(x * x for x, _ in flat)) * math.sqrt(whole)),
        close_atol=max(0.0, *(float(abs(x - y)) - relative * abs(float(y)) for x, y in flat)),
        unequal=sum(d != 0 for d in diffs),
        dynamo_atol=max(0.0, *(float(abs(x - y)) - compiler * abs(float(y)) for x, y in flat)),
        matched=sum(abs(x - y) <= absolute + relative * abs(float(y)) for x, y in flat) / count,
        flips=sum(gap > 0 for gap in gaps),
        flip_margin=max(0.0, *gaps),
    ), dict(
        worst_token=cosines.index(min(cosines)),
        worst_token_diff=square.index(max(square)),
        first_flip=gaps.index(max(gaps)) if max(gaps) > 0 else None,
    )


@pytest.mark.parametrize("chunk", [1, 5, 12, 1 << 18])
@pytest.mark.parametrize("noise", [1e-7, 1e-3, 1.0])
def test_each_number_of_a_matrix_is_its_definition_in_any_chunks(monkeypatch, chunk, noise):
    monkeypatch.setattr(comparison, "CHUNK", chunk)
    expected = seeded(7, 5)
    expected[3] *= 1e-3
    actual = expected + noise * seeded(7, 5, seed=1)
    actual[5, 2] = expected[5, 2]
    result = compare(actual, expected)
    numbers, places = measured(actual.tolist(), expected.tolist(), 1e-7, 1e-7, 1e-3)
    for name, value in numbers.items():
        assert getattr(result, name) == pytest.approx(float(value), rel=1e-9, abs=1e-15), name
    assert {name: getattr(result, name) for name in places} == {
        name: None if at is None else (at,) for name, at in places.items()
    }
    assert result.cos_distance == pytest.approx(1 - float(numbers["cos_sim"]), rel=1e-6, abs=1e-15)
    if result.first_flip is not None:
        assert result.flip_value == expected[result.first_flip[0]].max()
    flat = (actual - expected).abs().argmax().item()
    assert result.worst_index == (flat // 5, flat % 5) and (result.worst_actual, result.worst_expected) == (
        actual.flatten()[flat],
        expected.flatten()[flat],
    )


@pytest.mark.parametrize("chunk", [1, 4, 1 << 18])
def test_places_count_through_all_axes_and_chunks(monkeypatch, chunk):
    monkeypatch.setattr(comparison, "CHUNK", chunk)
    shape = (2, 3, 4, 5)
    for place in ((0, 0, 0, 0), (1, 0, 3, 1), (1, 2, 3, 4), (0, 2, 1, 3)):
        expected = seeded(*shape)
        expected[place[:-1]] += torch.eye(5, dtype=torch.float64)[0] * 5
        actual = expected.clone()
        actual[place] += 20
        result = compare(actual, expected)
        assert result.worst_index == place and result.worst_token == result.worst_token_diff == place[:-1]
        assert (result.flips, result.first_flip) == ((1, place[:-1]) if place[-1] else (0, None))
        actual[place] = math.nan
        result = compare(actual, expected)
        assert (
            result.worst_index == place
            and (result.nan_actual, result.nonfinite_differ) == (1, 1)
            and math.isnan(result.worst_actual)
        )
    first = compare(
        torch.tensor([[1.0, 5.0], [1.0, 5.0], [1.0, 9.0]]), torch.tensor([[5.0, 1.0], [5.0, 1.0], [5.0, 1.0]])
    )
    assert (first.worst_index, first.worst_token, first.worst_token_diff, first.first_flip) == (
        (2, 1),
        (2,),
        (2,),
        (0,),
    ), "the first of equals"
    rows = torch.tensor([[3.0, 1.0, 0.0], [9.0, 4.0, 2.0], [9.0, 4.0, 2.0], [3.0, 1.0, 0.0], [9.0, 4.0, 2.0]])
    equals = compare(rows.flip(1).contiguous(), rows)
    assert (equals.worst_index, equals.worst_token, equals.worst_token_diff, equals.first_flip) == (
        (1, 0),
        (0,),  # which is turned furthest: the cosine is 1/10, that of the others 52/101
        (1,),
        (1,),
    ), "the first of equals in any chunks"


def test_rows_of_one_element_are_no_tokens():
    for shape in ((4, 1), (4,), (), (2, 2, 1)):
        result = compare(torch.ones(shape) * 2, torch.ones(shape))
        assert (
            result.worst_token is result.worst_token_diff is None
            and math.isnan(result.token_cos_sim)
            and math.isnan(result.token_rel_l2)
        )
    assert compare(torch.ones(1, 2) * 2, torch.ones(1, 2)).worst_token == (0,)


def test_flips_of_a_flat_tensor_are_of_all_of_it(monkeypatch):
    expected, actual = torch.tensor([1.0, 4.0, 2.0]), torch.tensor([1.0, 4.0, 9.0])
    result = compare(actual, expected)
    assert (result.flips, result.flip_margin, result.flip_value, result.first_flip) == (1, 2.0, 4.0, ())
    assert compare(torch.tensor([2.0]), torch.tensor([1.0])).flips == 0
    monkeypatch.setattr(comparison, "CHUNK", 2)
    assert compare(actual, expected).flips == 0, "a flat tensor of several chunks is no row"
    assert compare(torch.tensor([[True, False]]), torch.tensor([[False, True]])).flips == 1


# -------- what is not finite

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("actual", "expected", "counts", "differ", "first"),
    [
        ([INF, 1.0], [INF, 1.0], (0, 0, 1, 1), 0, None),
        ([INF, 1.0], [-INF, 1.0], (0, 0, 1, 1), 1, 0),
        ([NAN, 1.0], [NAN, 1.0], (1, 1, 0, 0), 0, None),
        ([1.0, NAN], [1.0, 1.0], (1, 0, 0, 0), 1, 1),
        ([1.0, 1.0], [1.0, NAN], (0, 1, 0, 0), 1, 1),
        ([1.0, INF], [1.0, NAN], (0, 1, 1, 0), 1, 1),
        ([1.0, 2.0], [-INF, INF], (0, 0, 0, 2), 2, 0),
        ([INF, -INF, NAN], [INF, 3.0, 4.0], (1, 0, 2, 1), 2, 1),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_what_is_not_finite_is_counted_and_the_first_that_differs_is_named(
    monkeypatch, chunk, actual, expected, counts, differ, first
):
    monkeypatch.setattr(comparison, "CHUNK", chunk)
    result = compare(torch.tensor(actual), torch.tensor(expected))
    assert (
        result.nan_actual,
        result.nan_expected,
        result.inf_actual,
        result.inf_expected,
    ) == counts and result.nonfinite_differ == differ
    if first is not None:
        same = numpy.array_equal(
            [result.worst_actual, result.worst_expected], [actual[first], expected[first]], equal_nan=True
        )
        assert result.worst_index == (first,) and same
    if differ == 0 and not any(map(math.isnan, actual)):
        assert (result.max_diff, result.rel_l2, result.cos_sim, result.unequal) == (0.0, 0.0, 1.0, 0)


def test_a_shared_infinity_is_left_out_of_every_number():
    finite = compare(torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[4.0, 2.0, 0.0]]))
    shared = compare(torch.tensor([[3.0, 2.0, -INF]]), torch.tensor([[4.0, 2.0, -INF]]))
    for name in (
        "max_diff",
        "mean_diff",
        "rel_l2",
        "rms",
        "rmse",
        "shift",
        "gain",
        "cos_sim",
        "token_rel_l2",
        "max_scaled",
        "max_rel",
    ):
        assert getattr(shared, name) == getattr(finite, name), name


def test_the_largest_difference_stays_unknown_once_it_is(monkeypatch):
    monkeypatch.setattr(comparison, "CHUNK", 1)
    result = compare(torch.tensor([[1.0, NAN], [9.0, 9.0], [NAN, 0.0]]), torch.ones(3, 2))
    assert (
        math.isnan(result.max_diff)
        and result.worst_index == (0, 1)
        and result.worst_token == result.worst_token_diff == (0,)
    )
    assert (
        math.isnan(result.token_cos_sim)
        and math.isnan(result.token_rel_l2)
        and math.isnan(result.max_rel)
        and math.isnan(result.close_atol)
    )


# -------- cosine, ratio, scales


@pytest.mark.parametrize("angle", [1e-9, 1e-5, 0.1, 0.141, 0.142, 0.2, 1.0, math.pi / 2, 2.0, 3.0, math.pi])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_the_cosine_of_two_vectors_at_an_angle(angle, length):
    expected = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    actual = length * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    result = compare(actual, expected)
    exact = 2 * math.sin(angle / 2) ** 2
    assert result.cos_distance == pytest.approx(exact, rel=1e-6, abs=1e-15) or (
        length != 1 and result.cos_distance == pytest.approx(exact, abs=1e-9)
    )
    assert result.cos_sim == pytest.approx(math.cos(angle), abs=1e-9) == pytest.approx(result.token_cos_sim, abs=1e-9)


def test_vectors_of_nothing():
    zeros, ones = torch.zeros(2, 2), torch.ones(2, 2)
    both = compare(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert (both.token_cos_sim, both.cos_sim, both.rel_l2, both.gain, both.max_scaled) == (1.0, 1.0, 0.0, 0.0, 0.0)
    one = compare(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    assert one.token_cos_sim == 0.0 and one.worst_token == (0,)
    result = compare(ones, zeros)
    assert (result.cos_sim, result.rel_l2, result.token_rel_l2, result.gain, result.rms, result.max_scaled) == (
        0.0,
        INF,
        INF,
        0.0,
        0.0,
        INF,
    )
    assert (
        compare(zeros, ones).token_cos_sim == compare(ones, zeros).token_cos_sim == 0.0
        and compare(zeros, zeros).token_cos_sim == 1.0
    )
    assert (
        compare(zeros, zeros).max_scaled == 0.0
        and compare(zeros, ones).gain == -1.0
        and compare(3 * ones, ones).gain == 2.0
    )
    assert compare(zeros, ones).snr == 0.0 and compare(ones, ones).snr == INF and compare(ones, zeros).snr == -INF
    assert (
        compare(ones * 1.25, ones).snr == pytest.approx(20 * math.log10(4))
        and compare(ones * 3, ones).max_diff_rms == 2.0
    )


def test_the_scale_of_an_element_is_its_size_and_its_rows_and_at_least_a_tenth_of_all():
    expected = torch.zeros(2, 100)
    expected[0] = 10.0
    rms = 10 / math.sqrt(2)
    actual = expected.clone()
    actual[1, 3] = 1.0
    assert compare(actual, expected).max_scaled == pytest.approx(1 / (rms / 10))
    actual = expected.clone()
    actual[0, 3] = 12.0
    assert compare(actual, expected).max_scaled == pytest.approx(2 / (10 + 10))
    assert compare(torch.tensor([3.0, 6.0]), torch.tensor([3.0, 4.0])).max_scaled == pytest.approx(
        2 / (4 + math.sqrt(12.5))
    )
    infinite = torch.tensor([[INF, 1.0], [1.0, 1.0]])  # the scale is that of what is finite
    changed = torch.tensor([[INF, 1.0], [1.0, 3.0]])
    assert compare(changed, infinite).max_scaled == pytest.approx(2 / (1 + 1))


# -------- histogram, layouts


def test_edges_of_bins_are_quarters_of_an_octave():
    assert [edge(item) for item in (0, 1, 2, 3)] == [0.0, 2.0**-128, 2.0**-127, 3 * 2.0**-128]
    assert [edge(item) for item in (4, 5, 508, 509, 510, 511, 512, 1018)] == [
        2.0**-126,
        1.25 * 2.0**-126,
        1.0,
        1.25,
        1.5,
        1.75,
        2.0,
        1.5 * 2.0**127,
    ]


def test_quantiles_are_upper_edges_of_bins_that_hold_the_share():
    diffs = [0.0] * 4 + [1.1] * 4 + [1.6] + [100.0]
    result = compare(torch.tensor(diffs, dtype=torch.float64), torch.zeros(10, dtype=torch.float64))
    assert result.histogram == ((0, 4), (508, 4), (510, 1), (534, 1))
    wanted = {0.0: 0.0, 0.4: 0.0, 0.41: 1.25, 0.8: 1.25, 0.81: 1.75, 0.9: 1.75, 0.91: 100.0, 1.0: 100.0}
    assert {share: result.quantile(share) for share in wanted} == wanted and math.isnan(
        compare(torch.ones(1), torch.ones(2)).quantile(0.5)
    )
    large = compare(torch.tensor([3.3e38], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    assert large.quantile(1.0) == 3.3e38 == large.max_diff
    three = compare(torch.tensor([2.6e38, 3.39e38, 3.39e38], dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert (
        three.histogram == ((1018, 1), (1019, 2))
        and three.quantile(0.3) == edge(1019)
        and three.quantile(0.5) == three.max_diff
    )
    beyond = compare(torch.tensor([3.39e38, 1e300], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert beyond.histogram == ((1019, 1), (1020, 1)), "no float32 number is as large as the second"
    assert beyond.quantile(0.5) == 2.0**128 and beyond.quantile(0.51) == 1e300


def test_layouts_and_kinds_of_tensors_are_read_as_what_they_hold():
    real = seeded(4, 5, dtype=torch.float32)
    for other in (real.to_sparse(), real.to_sparse_csr(), real.clone().requires_grad_(), real.t().contiguous().t()):
        assert compare(other, real).max_diff == 0.0 and compare(other, real + 1).max_diff == pytest.approx(1.0)
    quantized = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 0, torch.qint8)
    result = compare(quantized, torch.tensor([1.0, 2.5]))
    assert (result.max_diff, result.dtype, result.expected_dtype) == (0.5, "qint8", "float32")
    turned = torch.complex(real, real + 1).conj()
    result = compare(turned, torch.complex(real, -(real + 1)))
    assert (result.max_diff, result.dtype, result.shape) == (0.0, "complex64", (4, 5)) and result.worst_index == (
        0,
        0,
        0,
    )
    mixed = compare(real, torch.complex(real, real))
    assert (mixed.dtype, mixed.expected_dtype) == ("float32", "complex64") and mixed.max_diff == real.abs().max()


# -------- slices


def expected_slices(actual, golden, healthy):
    """The worst part of each kind by its definition: (error, healthy, count, where, magnitude)."""
    shape = tuple(golden.shape)
    width, result = shape[-1], []

    def of(parts, magnitude=False):
        parts = [(where, index) for where, index in parts if float((golden[index] ** 2).sum()) > 0]
        if len(parts) < 2:
            return

        def error(run, index):
            return float(((run[index] - golden[index]) ** 2).sum() / (golden[index] ** 2).sum()) ** 0.5

        where, index = max(parts, key=lambda value: error(actual, value[1]))
        most = max(error(run, part) for run in healthy for _, part in parts)
        result.append((error(actual, index), most, golden[index].numel(), where, magnitude))

    rows = list(itertools.product(*map(range, shape[:-1])))
    if width >= 8 and len(rows) > 1:
        of([(f"row {row}", row) for row in rows])
    for axis, size in enumerate(shape):
        if (axis, len(shape)) != (0, 2) and golden.numel() // size >= 8 and size > 1:
            of([(f"index {place} of axis {axis}", (slice(None),) * axis + (place,)) for place in range(size)])
    if width >= 16 * 64 and len(rows) > 1:
        block = width // 16
        of(
            [
                (f"block {place} of 16 of row {row}", (*row, slice(place * block, (place + 1) * block)))
                for row in rows
                for place in range(16)
            ]
        )
    exponents = torch.frexp(golden).exponent
    known = [number for number in exponents.unique().tolist() if int((exponents == number).sum()) >= 64]
    if len(known) >= 2:
        of([(f"values between 2^{item - 1} and 2^{item}", exponents == item) for item in known], True)
    return result


@pytest.mark.parametrize(
    "shape",
    [
        (3, 8),
        (3, 7),
        (2, 4, 8),
        (9, 2, 3),
        (4, 1, 16),
        (1, 40),
        (2, 1024),
        (2, 1023),
        (2, 2, 1030),
        (16, 40),
        (5, 3, 2, 11),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 18])
def test_the_worst_parts_are_those_of_the_definition(monkeypatch, shape, chunk):
    monkeypatch.setattr(slices, "CHUNK", chunk)
    golden = seeded(*shape)
    healthy = [golden + 1e-6 * seeded(*shape, seed=seed) for seed in (1, 2)]
    actual = golden + 1e-3 * seeded(*shape, seed=3)
    for runs in (healthy, healthy[:1]):
        result = worst_slices(actual, golden, runs)
        expected = expected_slices(actual, golden, runs)
        assert [(item.where, item.count, item.magnitude) for item in result] == [
            item[3:4] + item[2:3] + item[4:] for item in expected
        ]
        for item, right in zip(result, expected):
            assert (item.error, item.healthy) == (pytest.approx(right[0], rel=1e-9), pytest.approx(right[1], rel=1e-9))


@pytest.mark.parametrize(
    ("shape", "columns", "blocked"), [((8, 1024), True, True), ((7, 1023), False, False), ((1, 1024), False, False)]
)
def test_columns_and_blocks_are_summed_where_they_may_be_parts(shape, columns, blocked):
    parts = slices._Parts(shape)
    assert (parts.columns, parts.blocked) == (columns, blocked)
    vector = slices._Parts(shape, columns=False)  # a vector in rows, of which neither means anything
    assert not vector.columns and not vector.blocked
    numbers = seeded(16 * 64)
    assert not slices._of_matrix(16, 64, numbers, numbers, [numbers]).columns


def test_a_flat_tensor_has_sixteen_blocks_of_sixty_four_or_more():
    for count, width in ((1023, None), (1024, 64), (1039, 64), (1040, 65)):
        golden = seeded(count)
        actual = golden.clone()
        actual[5 * (width or 1) + 1] += 1.0
        result = [
            worst_slice_ for worst_slice_ in worst_slices(actual, golden, [golden + 1e-9]) if not worst_slice_.magnitude
        ]
        assert [(item.where, item.count) for item in result] == ([] if width is None else [("block 5 of 16", width)])
        if width:
            part = slice(5 * width, 6 * width)
            assert result[0].error == pytest.approx(float(1.0 / golden[part].norm())) and result[0].healthy > 0


def test_ranges_of_magnitude_need_sixty_four_elements_and_another_range():
    def ranges(small, large):
        golden = torch.cat([torch.full((small,), 0.75), torch.full((large,), 3.0)]).double()
        actual = golden.clone()
        actual[0] *= 1.5
        return [
            (worst_slice_.where, worst_slice_.count)
            for worst_slice_ in worst_slices(actual, golden, [golden * (1 + 1e-9)])
            if worst_slice_.magnitude
        ]

    assert (
        ranges(64, 64) == [("values between 2^-1 and 2^0", 64)]
        and ranges(63, 64) == ranges(64, 63) == []
        and ranges(100, 64) == [("values between 2^-1 and 2^0", 100)]
    )


def test_parts_need_two_of_their_kind_that_are_not_zero():
    golden = torch.zeros(9, 8, dtype=torch.float64)  # of eight elements and more is a row, and is a column
    golden[1] = 1.0
    assert [worst_slice_.where for worst_slice_ in worst_slices(golden + 1, golden, [golden])] == ["index 0 of axis 1"]
    golden[2] = 1.0
    assert [worst_slice_.where for worst_slice_ in worst_slices(golden + 1, golden, [golden])] == [
        "row (1,)",
        "index 0 of axis 1",
    ]
    assert (
        worst_slices(golden, golden, [])
        == ()
        == worst_slices(golden[:2], golden, [golden])
        == worst_slices(golden, golden, [golden[:2]])
    )
    assert (
        worst_slices(golden.to(torch.complex64), golden.to(torch.complex64), [golden.to(torch.complex64)])
        == ()
        == worst_slices(golden[:0], golden[:0], [golden[:0]])
    )
    assert Slice(error=1.0, healthy=1.0, count=1, where="").magnitude is False


def test_elements_that_are_not_finite_count_for_nothing():
    golden = seeded(4, 16)
    actual, healthy = golden + 1e-3 * seeded(4, 16, seed=1), golden + 1e-6 * seeded(4, 16, seed=2)
    for tensor, value in ((actual, math.nan), (actual, math.inf), (healthy, -math.inf), (golden, math.nan)):
        spoiled = [item.clone() for item in (actual, golden, healthy)]
        spoiled[[actual is tensor, golden is tensor, healthy is tensor].index(True)][2, 5] = value
        zeroed = [item.clone() for item in (actual, golden, healthy)]
        for item in zeroed:
            item[2, 5] = 0.0
        result, expected = (worst_slices(a, g, [h]) for a, g, h in (spoiled, zeroed))
        assert [(item.where, item.error, item.healthy) for item in result] == [
            (item.where, pytest.approx(item.error), pytest.approx(item.healthy)) for item in expected
        ]
