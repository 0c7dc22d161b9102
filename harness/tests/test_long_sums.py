"""Long sums, scans and variances: where the CPU's float64 inside or its blocks lose less than a card's float32 can.

A floor that is made of the CPU's error alone would call a sound card wrong there.
"""

import math
import operator

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Case, validate
from harness.emulator.table import changed
from harness.numerics import (
    Operands,
    Vector,
    batch_norm,
    convolution,
    cube,
    matmul,
    matmul_by_groups,
    running_product,
    running_sum,
    variance,
)
from harness.numerics.expected_error import Rules, rounding
from harness.tests.needs import emulated_device


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(result, exact):
    return float((result.double() - exact).norm() / exact.norm())


TERMS = {
    "of either sign": lambda x, w: (x, w),
    "squares of positive ones": lambda x, w: (x.relu() ** 2, w),
    "all positive": lambda x, w: (x.abs(), w.abs()),
}


@pytest.mark.parametrize("inner", [800, 1024, 2048, 4096, 11008])
@pytest.mark.parametrize("terms", TERMS)
def test_a_long_product_loses_as_much_as_the_cube_taken_literally(terms, inner):
    x, w = TERMS[terms](seeded(48, inner), seeded(inner, 48, seed=1))
    exact = x.double() @ w.double()
    literal = error(matmul_by_groups(x, w, cube.WIDTH), exact)
    assert 0.8 * literal < error(matmul(x, w), exact) < 1.8 * literal


def test_a_long_product_is_in_order_however_many_parts_are_asked_for_but_one(monkeypatch):
    asked, in_order = [], cube._in_order
    monkeypatch.setattr(cube, "_in_order", lambda *sides: asked.append(True) or in_order(*sides))
    x, w = seeded(48, 2048), seeded(2048, 48, seed=1)
    two, four = (matmul(x, w, groups=parts) for parts in (2, 4))
    assert torch.equal(two, four) and len(asked) == 2
    matmul(x, w, groups=1)  # torch's own sum
    assert len(asked) == 2


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8)], ids=["a matrix", "a batch"])
def test_a_long_product_is_the_same_in_batches_and_in_blocks(shape, monkeypatch):
    """Batches go one after the other; blocks of rows change nothing but what the BLAS library makes of fewer rows."""
    x, w = seeded(*shape[:-1], 2048), seeded(*shape[:-2], 2048, 8, seed=1)
    exact = x.double() @ w.double()
    whole = matmul(x, w)
    assert whole.shape == exact.shape
    if len(shape) == 3:
        assert torch.equal(whole, torch.stack([matmul(one, other) for one, other in zip(x, w)]))
    monkeypatch.setattr(cube, "_BLOCK", 24)  # three rows at a time
    assert error(matmul(x, w), exact) == pytest.approx(error(whole, exact), rel=0.5)


@pytest.mark.parametrize(("block", "columns", "rows"), [(24, 8, [3, 3, 2]), (7, 8, [1] * 8), (5, 0, [5, 3])])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["a matrix", "a batch"])
def test_a_long_product_is_made_for_so_many_results_at_a_time(monkeypatch, batch, block, columns, rows):
    sizes, added = [], cube._added_in_order
    monkeypatch.setattr(cube, "_BLOCK", block)
    monkeypatch.setattr(cube, "_added_in_order", lambda left, *rest: sizes.append(len(left)) or added(left, *rest))
    result = matmul(seeded(*batch, 8, 2048), seeded(*batch, 2048, columns, seed=1))
    assert sizes == rows * math.prod(batch) and result.shape == (*batch, 8, columns)


def test_a_long_product_whose_sums_are_exact_is_exact():
    """A lookup by a matrix of ones and zeros, and whole numbers: no addition rounds, so nothing is put back."""
    picked = F.one_hot(torch.randint(0, 2048, (16,), generator=torch.Generator().manual_seed(2)), 2048).float()
    table = seeded(2048, 8)
    assert torch.equal(matmul(picked, table), picked @ table)
    counts = torch.randint(-8, 9, (16, 2048), generator=torch.Generator().manual_seed(3)).float()
    assert torch.equal(matmul(counts, counts.t()).double(), counts.double() @ counts.double().t())


@pytest.mark.parametrize("inner", [cube.LONG, cube.LONG + 1])
def test_a_sum_is_long_beyond_its_limit_and_what_is_lost_is_put_back(inner):
    """2^24 in the first part, 1 in the last one: the addition loses the 1, which counts as often as roundings are left
    out.
    """
    left = torch.zeros(1, inner)
    left[0, 0], left[0, -1] = 2.0**24, 1.0
    result = matmul(left, torch.ones(inner, 1)).item()
    assert (cube.LONG, cube._PART, cube.WIDTH) == (768, 512, 4)
    if inner == cube.LONG:
        assert result == 2.0**24
    else:
        length = inner - inner // 2  # of the second part of two
        roundings = length / cube.WIDTH * 1.5 / 2
        assert result == float(numpy.float32(2.0**24 + (1 - math.sqrt(roundings))))


def test_what_else_is_not_a_long_float32_sum_stays_as_it_is():
    x, w = seeded(8, 4096), seeded(4096, 8, seed=1)
    assert torch.equal(matmul(x, w, groups=1), x @ w)  # one part: the sum is torch's
    for dtype in (torch.float16, torch.bfloat16):
        one, other = x.to(dtype), w.to(dtype)
        assert torch.equal(
            matmul(one, other, out=torch.float32), cube._grouped(one.float(), other.float(), cube.GROUPS)
        )
    hf32 = Operands(kind="HF32")
    assert torch.equal(matmul(x, w, operands=hf32), cube._grouped(hf32.entering(x), hf32.entering(w), cube.GROUPS))


OPTIONS = dict(stride=(1,), padding=(0,), dilation=(1,), output_padding=(0,), groups=1)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_long_convolution_loses_as_much_as_the_product_it_is(transposed):
    """A kernel of one is a product over the channels."""
    x, w = seeded(1, 2048, 40), seeded(40, 2048, seed=1)
    weight = w.t()[:, :, None] if transposed else w[:, :, None]
    exact = w.double() @ x[0].double()
    result = convolution(x, weight.contiguous(), None, transposed=transposed, **OPTIONS)[0]
    literal = error(matmul_by_groups(w, x[0], cube.WIDTH), exact)
    assert 0.8 * literal < error(result, exact) < 1.8 * literal
    bias = seeded(40, seed=2)
    with_bias = convolution(x, weight.contiguous(), bias, transposed=transposed, **OPTIONS)[0]
    assert error(with_bias, exact + bias[:, None].double()) < 2 * literal


def test_a_convolution_counts_its_whole_kernel_and_no_other_group():
    """Nine places of 86 channels are 774 terms, beyond the limit; of 85 they are 765."""
    for channels, groups, long in ((86, 1, True), (85, 1, False), (172, 2, False)):
        x, w = seeded(1, channels, 5, 5), seeded(4, channels // groups, 3, 3, seed=1)
        options = dict(
            stride=(1, 1), padding=(0, 0), dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=groups
        )
        same = torch.equal(convolution(x, w, None, **options), F.conv2d(x, w, groups=groups))
        assert same is not long


# -------- scans


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scan", "step"), [(running_sum, operator.add), (running_product, operator.mul)])
def test_a_scan_rounds_to_float32_after_each_step(scan, step, dtype):
    x = (1 + 0.1 * seeded(3, 200)).to(dtype)
    expected = torch.empty(3, 200)
    for row, numbers in enumerate(x.tolist()):
        total = numpy.float32(numbers[0])
        for place, number in enumerate(numbers):
            total = numpy.float32(step(float(total), number)) if place else total  # float64 holds one step
            expected[row, place] = float(total)
    for result in (scan(x, 1), scan(x, -1), scan(x.t(), 0).t(), scan(x.t().contiguous(), 0).t()):
        assert result.dtype == dtype and torch.equal(result, expected.to(dtype))


def test_a_scan_of_whole_numbers_float64_and_nothing_is_torchs():
    for x in (torch.arange(10), torch.rand(10, dtype=torch.float64), torch.zeros(0, 3), torch.tensor(2.0)):
        for scan, torchs in ((running_sum, torch.cumsum), (running_product, torch.cumprod)):
            assert torch.equal(scan(x, 0), torchs(x, 0)) and scan(x, 0).dtype == torchs(x, 0).dtype


def test_a_forecast_of_a_scan_has_the_dtype_that_was_asked_for():
    """Mixtures of experts count their tokens so, and the product that takes the counts wants int32."""
    counts = torch.tensor([3.0, 1.0, 2.0])
    for dtype in (torch.int32, torch.float16, torch.float64):
        with rounding(Rules()):
            result = torch.cumsum(counts, 0, dtype=dtype), torch.cumprod(counts, 0, dtype=dtype)
        assert [tensor.dtype for tensor in result] == [dtype, dtype]
        assert torch.equal(result[0], counts.cumsum(0, dtype=dtype))


def test_a_scan_of_the_cpu_hides_what_float32_loses():
    """Why the rule is there: beside the CPU alone a sound card is wrong a hundredfold."""
    x = seeded(4, 32000)
    exact = x.double().cumsum(-1)
    assert error(running_sum(x, -1), exact) > 20 * error(x.cumsum(-1), exact)


# -------- variances


@pytest.mark.parametrize("correction", [0, 1, 2.5])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axes", [(1,), (0, 2), None, ()])
def test_a_variance_is_the_mean_square_distance_from_the_mean(axes, keep, correction):
    x = seeded(4, 5, 6) + 3
    var, mean = variance(x, axes, correction, keep)
    exact = torch.var(x.double(), tuple(axes) if axes else None, correction=correction, keepdim=keep)
    assert var.dtype == torch.float32 and var.shape == exact.shape == mean.shape
    assert torch.allclose(var.double(), exact, rtol=1e-6)
    assert torch.allclose(mean.double(), x.double().mean(tuple(axes) if axes else None, keepdim=keep), rtol=1e-6)


def test_a_variance_of_halves_is_float32_and_of_one_number_is_nan():
    x = seeded(3, 64).half()
    assert torch.equal(variance(x, (1,), 1)[0], variance(x.float(), (1,), 1)[0])
    assert variance(torch.ones(3, 1), (1,), 1)[0].isnan().all()
    assert variance(torch.rand(3, 4, dtype=torch.float64), (1,), 1)[0].dtype == torch.float64


def test_batch_norm_in_training_is_made_of_sums_and_sums_of_squares():
    """A channel far from zero loses digits that two passes keep; the running statistics move as torch's do."""
    x = seeded(64, 2, 50)
    x[:, 1] += 100
    weight, bias = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    running, wanted = [torch.zeros(2), torch.ones(2)], [torch.zeros(2).double(), torch.ones(2).double()]
    y, mean, rstd = batch_norm(x, weight, bias, *running, 0.1, 1e-5)
    exact = F.batch_norm(x.double(), *wanted, weight.double(), bias.double(), True, 0.1, 1e-5)
    assert error(y[:, 0], exact[:, 0]) < 1e-6 < error(y[:, 1], exact[:, 1]) < 1e-2
    assert torch.allclose(running[0].double(), wanted[0], rtol=1e-5)
    assert torch.allclose(running[1].double(), wanted[1], rtol=1e-2)
    assert torch.allclose(mean.double(), x.double().mean((0, 2)), rtol=1e-6)
    assert torch.allclose(rstd.double(), (x.double().var((0, 2), correction=0) + 1e-5).rsqrt(), rtol=1e-2)
    plain, _, _ = batch_norm(x, None, None, None, None, 0.1, 1e-5)
    assert torch.allclose(plain * weight[:, None] + bias[:, None], y, atol=1e-5)
    half, mean, rstd = batch_norm(x[:, :1].half(), None, None, None, None, 0.1, 1e-5)
    assert half.dtype == torch.float16 and mean.dtype == rstd.dtype == torch.float32


# -------- the expected error

X = seeded(4, 1000) + 0.5
BY_RULES = {
    "cumsum": (lambda x: x.cumsum(-1), lambda x: running_sum(x, -1)),
    "cumsum_": (lambda x: x.clone().cumsum_(0), lambda x: running_sum(x, 0)),
    "cumsum, dtype": (lambda x: x.half().cumsum(1, dtype=torch.float32), lambda x: running_sum(x.half().float(), 1)),
    "cumprod": (lambda x: (1 + x / 100).cumprod(-1), lambda x: running_product(1 + x / 100, -1)),
    "var": (lambda x: x.var(), lambda x: variance(x, None, 1)[0]),
    "var, biased": (lambda x: x.var(unbiased=False), lambda x: variance(x, None, 0)[0]),
    "var, axis": (lambda x: x.var(1, False, True), lambda x: variance(x, (1,), 0, True)[0]),
    "var, correction": (lambda x: torch.var(x, (0, 1), correction=3), lambda x: variance(x, (0, 1), 3)[0]),
    "std": (lambda x: x.std(-1), lambda x: variance(x, (-1,), 1)[0].sqrt()),
    "var_mean": (lambda x: torch.var_mean(x, 1)[0], lambda x: variance(x, (1,), 1)[0]),
    "mean of it": (lambda x: torch.var_mean(x, 1)[1], lambda x: variance(x, (1,), 1)[1]),
    "std_mean": (lambda x: torch.std_mean(x, 1, correction=0)[0], lambda x: variance(x, (1,), 0)[0].sqrt()),
    "half var": (lambda x: x.half().var(1), lambda x: variance(x.half(), (1,), 1)[0].half()),
    "batch_norm": (
        lambda x: F.batch_norm(x.view(40, 10, 10), None, None, training=True),
        lambda x: batch_norm(x.view(40, 10, 10), None, None, None, None, 0.1, 1e-5)[0],
    ),
    "long product": (lambda x: x @ x.t(), lambda x: matmul(x, x.t())),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", BY_RULES)
def test_the_expected_error_goes_by_these_rules(name, mode):
    model, rule = BY_RULES[name]
    with mode(), rounding(Rules()):
        result = model(X)
    expected = rule(X)
    assert result.dtype == expected.dtype and torch.equal(result, expected)


def test_batch_norm_in_evaluation_is_the_cpus():
    x, mean, var = seeded(8, 4, 6), seeded(4, seed=1), seeded(4, seed=2).abs()
    with rounding(Rules()):
        result = F.batch_norm(x, mean, var, training=False)
    assert torch.equal(result, F.batch_norm(x, mean, var, training=False))


# -------- the verdict


class Product(nn.Module):
    def __init__(self, inner: int, positive: bool):
        super().__init__()
        self.positive, self.weight = positive, nn.Parameter(seeded(inner, 48, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return x.abs() @ self.weight.abs() if self.positive else x @ self.weight


class Scan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


class Spread(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.var(-1)


def in_groups(real):
    """The cube's products, taken literally."""
    return lambda self, other, *rest, **options: matmul_by_groups(self, other, cube.WIDTH)


def short_of_terms(real):
    """The last eight products of each sum are left out."""
    return lambda self, other, *rest, **options: matmul_by_groups(self[:, :-8], other[:-8], cube.WIDTH)


def by_doubling(real):
    """cumsum as a parallel prefix sum: float32, in log2(n) steps."""

    def compute(self, dim, dtype, out):
        total, step = self.clone(), 1
        while step < self.shape[-1]:
            total = torch.cat((total[..., :step], total[..., step:] + total[..., :-step]), -1)
            step *= 2
        return total

    return compute


def in_half_parts(real):
    """cumsum whose running value is float16 at every 1,024 numbers."""

    def compute(self, dim, dtype, out):
        total, parts = torch.zeros(len(self), 1), []
        for part in self.split(1024, -1):
            parts.append(total + running_sum(part, -1))
            total = parts[-1][:, -1:].half().float()
        return torch.cat(parts, -1)

    return compute


def lanes(real):
    """var by sums in 64 lanes."""

    def compute(self, dims, correction, keep, out):
        total = Vector(order="lanes").unit(torch.float32).total
        mean = total(self) / self.shape[-1]
        return (total((self - mean).square()) / (self.shape[-1] - correction))[..., 0]

    return compute


def without_correction(real):
    return lambda self, dims, correction, keep, out: real(self, dims, 0, keep, out)


SOUND = {
    "a product of 4,096": ("aclnnMatmul", in_groups, Product(4096, False), (64, 4096)),
    "a product of 11,008, all positive": ("aclnnMatmul", in_groups, Product(11008, True), (64, 11008)),
    "a product of 800": ("aclnnMatmul", in_groups, Product(800, True), (64, 800)),
    "a scan by doubling": ("aclnnCumsum", by_doubling, Scan(), (16, 20000)),
    "a variance in lanes": ("aclnnVarCorrection", lanes, Spread(), (64, 16384)),
}
WRONG = {
    "a product that is short of terms": ("aclnnMatmul", short_of_terms, Product(11008, False), (64, 11008)),
    "a scan kept in half": ("aclnnCumsum", in_half_parts, Scan(), (16, 20000)),
    "a variance without correction": ("aclnnVarCorrection", without_correction, Spread(), (64, 16384)),
}


def ran(name, change, model, shape):
    device = emulated_device()
    case = Case(name="long", model=lambda: model, inputs=lambda generator: torch.randn(*shape, generator=generator))
    calls = []

    def counted(real):
        compute = change(real)
        return lambda *args, **options: calls.append(name) or compute(*args, **options)

    with changed(name, counted):
        verdict = validate(case, 0, device)
    assert calls, f"the device did not call {name}"
    return verdict


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_card_that_sums_otherwise_passes(name):
    verdict = ran(*SOUND[name])
    assert verdict.passed, verdict.reasons


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_long_sum_fails(name):
    verdict = ran(*WRONG[name])
    assert verdict.status == "FAIL", verdict.reasons
