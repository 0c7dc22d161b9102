"""compare(): the numbers, against numpy in float64, and what must not go unseen."""

import math

import numpy
import pytest
import torch

from harness import compare
from harness.measure.comparison import CHUNK, edge
from harness.tests.needs import compiled_and_by_torch  # noqa: F401  each test runs both ways


def seeded(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 16, 64), (1, 256, 1024), (CHUNK + 3,), (3, CHUNK // 2 + 1)])
def test_numbers_are_those_of_numpy_in_float64(shape):
    expected = seeded(*shape)
    actual = expected + 1e-3 * seeded(*shape, seed=1)
    comparison = compare(actual, expected)
    a, e = actual.double().numpy(), expected.double().numpy()
    diff = numpy.abs(a - e)
    cosine = (a * e).sum() / numpy.sqrt((a * a).sum() * (e * e).sum())
    assert comparison.max_diff == diff.max()
    assert comparison.mean_diff == pytest.approx(diff.mean(), rel=1e-12)
    assert comparison.cos_sim == pytest.approx(cosine, abs=1e-14)
    assert comparison.rel_l2 == pytest.approx(numpy.linalg.norm(a - e) / numpy.linalg.norm(e), rel=1e-12)
    assert comparison.rms == pytest.approx(math.sqrt((e * e).mean()), rel=1e-12)
    assert comparison.worst_index == tuple(int(i) for i in numpy.unravel_index(diff.argmax(), shape))
    assert comparison.unequal == int((a != e).sum())
    assert (comparison.worst_actual, comparison.worst_expected) == (
        a[comparison.worst_index],
        e[comparison.worst_index],
    )


def test_cos_sim_never_exceeds_one_where_float32_does():
    expected = seeded(1, 1024, 1024)
    expected[..., :3] *= 300  # outlier channels, as trained vision models have
    actual = expected * (1 + 1e-6 * seeded(1, 1024, 1024, seed=1))
    comparison = compare(actual, expected)
    assert comparison.cos_sim <= 1.0
    assert 0 < comparison.cos_distance < 1e-10


def test_cosine_distance_is_exact_where_one_minus_cosine_cancels():
    expected = torch.zeros(1000, dtype=torch.float64)
    expected[0] = 1.0
    actual = expected.clone()
    actual[1] = 1e-9  # 1 - cos = 5e-19, below float64's last place at 1
    assert compare(actual, expected).cos_distance == pytest.approx(5e-19, rel=1e-6)


def test_one_wrong_token_shows_where_the_whole_cosine_hides_it():
    expected = seeded(1, 256, 1024)
    expected[..., 5] = 1000.0  # one dominant channel
    actual = expected.clone()
    actual[0, 17] = seeded(1024, seed=9)
    comparison = compare(actual, expected)
    assert comparison.cos_sim > 0.99
    assert comparison.token_cos_sim < 0.5
    assert comparison.worst_token == (0, 17)


def test_nan_makes_every_number_nan_and_is_located():
    expected = seeded(4, 8)
    actual = expected.clone()
    actual[2, 3] = math.nan
    comparison = compare(actual, expected)
    assert math.isnan(comparison.max_diff) and math.isnan(comparison.mean_diff) and math.isnan(comparison.cos_sim)
    assert (comparison.nan_actual, comparison.nan_expected, comparison.nonfinite_differ) == (1, 0, 1)
    assert comparison.worst_index == (2, 3)


def test_shared_infinities_are_no_difference_and_opposite_ones_are():
    expected = seeded(4, 8)
    expected[0, 0] = math.inf
    same = compare(expected.clone(), expected)
    assert (same.max_diff, same.nonfinite_differ, same.inf_actual) == (0.0, 0, 1)
    actual = expected.clone()
    actual[0, 0] = -math.inf
    opposite = compare(actual, expected)
    assert opposite.max_diff == math.inf
    assert opposite.nonfinite_differ == 1
    assert opposite.worst_index == (0, 0)


def test_other_shapes_are_never_broadcast_nor_cut():
    comparison = compare(torch.ones(4, 8), torch.ones(2, 3))
    assert not comparison.comparable
    assert math.isnan(comparison.max_diff) and math.isnan(comparison.cos_sim)
    assert not compare(torch.ones(3, 1), torch.ones(3)).comparable


def test_zeros_point_the_same_way_as_zeros_only():
    zeros = torch.zeros(2, 4)
    assert compare(zeros, zeros).cos_sim == 1.0
    assert compare(zeros, torch.ones(2, 4)).cos_sim == 0.0
    assert compare(torch.ones(2, 4), zeros).rel_l2 == math.inf


def test_large_error_on_a_zero_reference_is_seen():
    assert compare(torch.full((3,), 1e6), torch.zeros(3)).max_diff == 1e6


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
)
def test_every_dtype_is_compared_without_overflow(dtype):
    expected = (seeded(4, 8) * 10).to(dtype)
    comparison = compare(expected, expected.clone())
    assert (comparison.max_diff, comparison.unequal) == (0.0, 0)
    assert comparison.dtype == str(dtype).removeprefix("torch.")


def test_float16_differences_do_not_overflow():
    comparison = compare(
        torch.full((2, 2), 60000.0, dtype=torch.float16), torch.full((2, 2), -60000.0, dtype=torch.float16)
    )
    assert comparison.max_diff == pytest.approx(120000, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_are_left_as_they_were(dtype):
    expected = seeded(4, 8, dtype=dtype)
    expected[1] = -1.0
    expected[0, 0] = math.inf
    actual = expected.clone()
    before = actual.clone(), expected.clone()
    compare(actual, expected)
    assert torch.equal(actual, before[0]) and torch.equal(expected, before[1])


def test_empty_and_scalar_tensors():
    assert compare(torch.empty(0, 4), torch.empty(0, 4)).max_diff == 0.0
    comparison = compare(torch.tensor(2.0), torch.tensor(1.0))
    assert (comparison.max_diff, comparison.worst_index, comparison.rel_l2) == (1.0, (), 1.0)


def test_views_are_compared_by_their_own_indices():
    expected = seeded(8, 4)
    actual = expected.clone().t()
    actual[3, 6] += 1
    assert compare(actual, expected.t()).worst_index == (3, 6)


@pytest.mark.parametrize("shape", [(3, 5), (2, 16, 64), (CHUNK + 3,), (3, CHUNK // 2 + 1)])
def test_the_other_numbers_are_those_of_numpy(shape):
    expected = seeded(*shape)
    actual = expected * 1.001 + 1e-3 * seeded(*shape, seed=1) + 1e-4
    comparison = compare(actual, expected)
    a, e = actual.double().numpy(), expected.double().numpy()
    diff, size = numpy.abs(a - e), numpy.abs(e)
    assert comparison.rmse == pytest.approx(math.sqrt((diff * diff).mean()), rel=1e-12)
    assert comparison.snr == pytest.approx(20 * math.log10(numpy.linalg.norm(e) / numpy.linalg.norm(a - e)), rel=1e-12)
    assert comparison.shift == pytest.approx((a - e).mean(), rel=1e-9)
    assert comparison.gain == pytest.approx(((a - e) * e).sum() / (e * e).sum(), rel=1e-9)
    assert comparison.balance == pytest.approx(numpy.sign(a - e).mean(), rel=1e-12)
    assert comparison.max_rel == pytest.approx((diff / (size + 1e-7)).max(), rel=1e-12)
    assert comparison.mean_rel == pytest.approx((diff / (size + 1e-7)).mean(), rel=1e-12)
    assert comparison.wape == pytest.approx(diff.mean() / size.mean(), rel=1e-12)
    places = 2.0 ** (numpy.floor(numpy.log2(size)) - 23)
    assert comparison.ulp_max == pytest.approx((diff / places).max(), rel=1e-12)
    assert comparison.ulp_mean == pytest.approx((diff / places).mean(), rel=1e-12)
    assert comparison.close_atol == pytest.approx(max((diff - 1.3e-6 * size).max(), 0), rel=1e-12)
    assert comparison.matched == pytest.approx((diff <= 1e-5 + 1.3e-6 * size).mean(), rel=1e-12)
    assert sum(count for _, count in comparison.histogram) == diff.size
    for share in (0.5, 0.99, 1.0):
        true = numpy.quantile(diff, share, method="inverted_cdf")
        assert true <= comparison.quantile(share) * (1 + 1e-6) and comparison.quantile(share) <= 1.26 * true
    if len(shape) > 1:
        rows, norms = numpy.linalg.norm(a - e, axis=-1), numpy.linalg.norm(e, axis=-1)
        assert comparison.token_rel_l2 == pytest.approx(rows.max() / math.sqrt((norms**2).mean()), rel=1e-12)
        assert comparison.worst_token_diff == tuple(int(i) for i in numpy.unravel_index(rows.argmax(), shape[:-1]))
        scaled = diff / (size + numpy.sqrt((e * e).mean(-1, keepdims=True)))
        assert comparison.max_scaled == pytest.approx(scaled.max(), rel=1e-12)


def test_a_histogram_bin_starts_where_its_edge_is():
    for number in (0, 3, 4, 500, 511):
        lower = edge(number)
        comparison = compare(
            torch.tensor([lower * 1.01 + 1e-45], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        )
        assert comparison.histogram == ((number, 1),)


def test_flips_of_the_largest_element_are_counted_and_the_widest_is_named():
    expected = seeded(6, 9)
    actual = expected.clone()
    for row in (1, 4):
        top = actual[row].topk(2)
        actual[row, top.indices] = top.values.flip(0)
    gaps = (expected.topk(2).values[:, 0] - expected.topk(2).values[:, 1])[[1, 4]]
    comparison = compare(actual, expected)
    assert (comparison.flips, comparison.first_flip) == (2, ((1,), (4,))[int(gaps.argmax())])
    assert comparison.flip_margin == pytest.approx(float(gaps.max()), rel=1e-6)
    tied = torch.tensor([[1.0, 2.0, 2.0]])
    assert compare(torch.tensor([[1.0, 2.0, 3.0]]), tied).flips == 0


def test_a_place_of_float16_and_bfloat16_is_theirs():
    for dtype, place in ((torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)):
        assert compare(torch.tensor([1 + 3 * place], dtype=dtype), torch.tensor([1.0], dtype=dtype)).ulp_max == 3.0


def test_a_row_of_zeros_that_was_met_hides_no_outlier():
    expected = torch.zeros(2, 4)
    expected[1] = 1.0
    actual = expected.clone()
    actual[1, 2] = 3.0
    assert compare(actual, expected).max_scaled == 1.0


def test_the_scale_of_a_flat_tensor_is_that_of_all_of_it():
    """And not that of the chunk in which an element happens to lie."""
    for count in (CHUNK, CHUNK + 1):
        expected = seeded(count)
        expected[-1] = 0.0
        actual = expected.clone()
        actual[-1] = 1e-9
        assert compare(actual, expected).max_scaled == pytest.approx(1e-9, rel=0.1)


@pytest.mark.parametrize("scale", [-1e-19, -1e-14, -1e-3, -1.0, -1e9])
def test_the_cosine_of_opposite_tensors_is_minus_one_whatever_their_size(scale):
    expected = seeded(16, 197) * 1e-3
    comparison = compare(expected * scale, expected)
    assert comparison.cos_sim == pytest.approx(-1, abs=1e-6) and comparison.token_cos_sim == pytest.approx(-1, abs=1e-6)


def test_numbers_whose_squares_vanish_are_not_called_equal():
    comparison = compare(seeded(64, dtype=torch.float64) * 1e-170, seeded(64, dtype=torch.float64, seed=1) * 1e-170)
    assert math.isnan(comparison.rel_l2) and math.isnan(comparison.cos_sim)


def test_a_shared_infinity_hides_no_flip():
    """As masked logits are."""
    expected = torch.tensor([[-1.0, -5.0, -math.inf, -math.inf]])
    comparison = compare(torch.tensor([[-5.0, -1.0, -math.inf, -math.inf]]), expected)
    assert (comparison.flips, comparison.flip_margin, comparison.flip_value) == (1, 4.0, -1.0)


def test_the_first_element_that_is_not_finite_on_one_side_is_named():
    actual, expected = torch.tensor([math.nan, 1.0, math.inf, 4.0]), torch.tensor([math.nan, 1.0, 2.0, 4.0])
    comparison = compare(actual, expected)
    assert (
        comparison.worst_index,
        comparison.worst_actual,
        comparison.worst_expected,
        comparison.nonfinite_differ,
    ) == (
        (2,),
        math.inf,
        2.0,
        1,
    )


def test_complex_against_real_and_sparse_tensors_are_compared():
    real = seeded(4, 5)
    comparison = compare(real.to(torch.complex64), real)
    assert (comparison.max_diff, comparison.dtype, comparison.expected_dtype) == (0.0, "complex64", "float32")
    assert compare(real.to_sparse_csr(), real).max_diff == 0.0


def test_quantiles_of_zeros_and_of_what_float32_cannot_hold():
    zeros = torch.zeros(10, dtype=torch.float64)
    assert compare(zeros, zeros).quantile(0.5) == 0.0
    assert compare(zeros + 1e300, zeros).quantile(0.5) == 1e300


# -------- fill values


def masked(fill, dtype=torch.float32):
    """Logits (8, 64), every fifth of them filled, and the same without the fill."""
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    places = (torch.arange(64) % 5 == 0).expand(8, 64)
    return logits.masked_fill(places, fill), logits.masked_fill(places, 0.0), places


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fill", [-1e4, 6e4, "least"])
def test_a_fill_value_that_both_sides_share_hides_nothing(fill, dtype):
    fill = torch.finfo(dtype).min if fill == "least" else fill
    expected, plain, places = masked(fill, dtype)
    wrong = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    comparison = compare(torch.where(places, expected, wrong), expected)
    other = compare(wrong.masked_fill(places, 0.0), plain)
    assert (
        comparison.rel_l2 == other.rel_l2 > 1
        and comparison.cos_sim == other.cos_sim
        and comparison.rms == other.rms < 2
    )
    assert comparison.inf_expected == 0 and compare(expected, expected).rel_l2 == 0


def test_a_fill_value_on_one_side_is_a_difference():
    expected, _, places = masked(-1e9)
    actual = expected.clone()
    actual[3, 5] = 0.25  # the mask was not applied here
    comparison = compare(actual, expected)
    assert comparison.max_diff > 9e8 and comparison.worst_index == (3, 5) and comparison.rel_l2 > 0.99
    actual = expected.clone()
    actual[3, 6] = -1e9  # and here it was, by mistake
    assert compare(actual, expected).worst_index == (3, 6) and compare(actual, expected).rel_l2 > 1e7


@pytest.mark.parametrize(("value", "count", "filled"), [(1000.0, 2, True), (999.9, 2, False), (1e9, 1, False)])
def test_a_fill_value_is_there_twice_and_a_thousand_times_as_large(value, count, filled):
    expected = torch.cat([torch.linspace(-1, 1, 30), torch.full((count,), -value)])
    assert (compare(expected, expected).rms < 1) is filled


def test_what_is_all_one_value_or_zero_beside_it_is_no_fill():
    assert compare(torch.full((4,), 7.0), torch.full((4,), 7.0)).rms == 7
    assert compare(torch.tensor([0.0, 9.0, 9.0]), torch.tensor([0.0, 9.0, 9.0])).rms > 5
    assert compare(torch.tensor([0, 9000, 9000, 1]), torch.tensor([0, 9000, 9000, 1])).rms > 5  # of integers none


def test_a_fill_value_is_told_across_chunks(monkeypatch):
    monkeypatch.setattr("harness.measure.comparison.CHUNK", 64)
    expected, plain, _ = masked(-1e9)
    assert compare(expected, expected).rms == pytest.approx(compare(plain, plain).rms, rel=1e-6)
