"""Reductions, scans, searches and distances against the CPU."""

import pytest
import torch

from harness.tests.operators.conftest import agrees, seeded

SPREAD = {
    "std": lambda x: torch.std(x, 1),
    "var": lambda x: torch.var(x, (0, 1)),
    "var of all": torch.var,
    "biased": lambda x: torch.var(x, 0, correction=0, keepdim=True),
    "std and mean": lambda x: torch.std_mean(x, 1, correction=1),
    "var and mean": lambda x: torch.var_mean(x, 1),
    "prod": torch.prod,
    "prod of an axis": lambda x: torch.prod(x, 1, keepdim=True),
    "logsumexp": lambda x: torch.logsumexp(x, (0, 1)),
    "cumprod": lambda x: torch.cumprod(x, 1),
    "cumsum": lambda x: torch.cumsum(x, 0),
    "cummax": lambda x: torch.cummax(x, 1),
    "cummin": lambda x: torch.cummin(x, 0),
    "median": torch.median,
    "nanmedian": torch.nanmedian,
    "median of an axis": lambda x: torch.median(x, 1),
    "nanmedian of an axis": lambda x: torch.nanmedian(x, 0, keepdim=True),
    "kthvalue": lambda x: torch.kthvalue(x, 2, 1),
    "trace": torch.trace,
    "mean": torch.mean,
    "sum": lambda x: x.sum(1),
    "amax": lambda x: x.amax(1),
    "max": lambda x: x.max(1),
    "norm": torch.linalg.vector_norm,
    "nansum": torch.nansum,
    "nanmean": torch.nanmean,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SPREAD)
def test_reductions(npu, name, dtype):
    values = seeded(5, 7, dtype=dtype)
    agrees(npu, SPREAD[name], values.clone().requires_grad_(dtype == torch.float32))
    agrees(npu, lambda x: SPREAD[name](x.T), values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.float64])
def test_dtypes_of_a_result(npu, dtype):
    values = torch.tensor([[3, 1, 0, 2], [1, 1, 4, 2]]).to(dtype)
    for function in (
        torch.sum,
        torch.prod,
        lambda x: x.cumsum(1),
        lambda x: x.sum(1, dtype=torch.float32),
        lambda x: x.cumprod(1),
    ):
        agrees(npu, function, values)
    agrees(npu, torch.sum, torch.zeros(0, 3).to(dtype))


def test_least_and_largest(npu):
    values = seeded(4, 6)
    agrees(npu, torch.aminmax, values)
    agrees(npu, lambda x: torch.aminmax(x, dim=1, keepdim=True), values)
    agrees(npu, lambda x: torch._aminmax(x), values)
    agrees(npu, lambda x: torch._aminmax(x, 0), values)
    missing = torch.where(values > 1, torch.tensor(float("nan")), values)
    for function in (torch.nansum, torch.nanmedian, torch.median):
        agrees(npu, function, missing)


def test_counts(npu):
    agrees(npu, lambda x: torch.histc(x, 10, -2, 2), seeded(100))
    agrees(npu, lambda x: torch.histc(x, 5), seeded(100))
    numbers = torch.tensor([1, 4, 4, 0, 2])
    agrees(npu, torch.bincount, numbers)
    agrees(npu, lambda x, w: torch.bincount(x, w, minlength=9), numbers, seeded(5))


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_searches(npu, right, narrow):
    edges, values = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([[0.5, 2.0], [5.0, 9.0]])
    agrees(npu, lambda e, v: torch.searchsorted(e, v, right=right, out_int32=narrow), edges, values)
    agrees(npu, lambda e: torch.searchsorted(e, 2.0, right=right, out_int32=narrow), edges)
    agrees(npu, lambda e, v: torch.bucketize(v, e, right=right, out_int32=narrow), edges, values)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_distances(npu, p):
    agrees(npu, lambda x, y: torch.cdist(x, y, p), seeded(2, 3, 4), seeded(2, 5, 4, seed=1), atol=1e-4)
    agrees(npu, lambda x: torch.pdist(x, p), seeded(5, 4), atol=1e-4)
