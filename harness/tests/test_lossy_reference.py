"""A CPU that loses more in float32 products than float32 does is refused as a reference, before anything runs."""

import math

import pytest
import torch
from torch import nn

from harness import Case, HarnessError, open_device, validate
from harness.errors import LossyReferenceError
from harness.locate import locate
from harness.reference import float32, require_float32


@pytest.fixture(autouse=True)
def measured_anew():
    float32._losses.cache_clear()
    yield
    float32._losses.cache_clear()


def rounded(tensor, bits):
    """Float32 with so many bits of the mantissa, the leading one among them; 8 are bfloat16's."""
    if tensor.dtype != torch.float32:
        return tensor
    half, kept = 1 << (24 - bits) >> 1, ~((1 << (24 - bits)) - 1)
    return ((tensor.view(torch.int32) + half) & kept).view(torch.float32)


def plant(monkeypatch, name, bits):
    """A CPU that multiplies float32 operands of fewer bits."""
    real = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda *tensors: real(*[rounded(tensor, bits) for tensor in tensors]))


PRODUCTS = {"matmul": "matrix products", "conv2d": "convolutions"}


def test_this_cpu_is_a_reference():
    """A sum of K products in order rounds partial sums of variance 1, 2, … K by at most 2^-24 each: 2^-24 · sqrt(K / 2)
    of the result, as roundings are independent. That is 2^-20.5 for K = 256; a host that sums otherwise loses less."""
    require_float32()
    assert 0 < max(float32._losses(float32._settings()).values()) < 2.0**-20.5


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("bits", [8, 11, 17])
def test_products_below_the_limit_are_refused(monkeypatch, name, bits):
    plant(monkeypatch, name, bits)
    with pytest.raises(LossyReferenceError, match=rf"its float32 {PRODUCTS[name]} lose 2\^-\d+\.\d \(relative L2"):
        require_float32()


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("bits", [19, 24])
def test_products_above_the_limit_are_taken(monkeypatch, name, bits):
    plant(monkeypatch, name, bits)
    require_float32()


def test_the_refusal_says_what_to_look_at(monkeypatch):
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    plant(monkeypatch, "matmul", 8)
    with pytest.raises(HarnessError) as refused:
        require_float32()
    said = str(refused.value)
    assert "at most 2^-18 was expected" in said and "DNNL_DEFAULT_FPMATH_MODE is BF16" in said and "\n" not in said
    assert "float32 matmul precision is 'highest'" in said and "unset the variable" in said


def test_what_is_no_number_is_refused(monkeypatch):
    odd = {torch.float32: math.nan, torch.float64: 1}
    monkeypatch.setattr(torch, "matmul", lambda left, right: left @ right * odd[left.dtype])
    with pytest.raises(LossyReferenceError, match="lose nan"):
        require_float32()


def test_it_is_measured_once_and_again_where_a_switch_changed(monkeypatch):
    calls = []
    real = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda *tensors: calls.append(1) or real(*tensors))
    require_float32()
    require_float32()
    assert len(calls) == 2  # float32 and float64, once
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    require_float32()
    assert len(calls) == 4


@pytest.mark.parametrize("run", [validate, locate], ids=["validate", "locate"])
def test_nothing_runs_before_the_refusal(monkeypatch, run):
    def never(*_):
        raise AssertionError("it ran")

    plant(monkeypatch, "matmul", 8)
    case = Case(name="linear", model=lambda: nn.Linear(4, 4), inputs=never)
    with pytest.raises(LossyReferenceError):
        run(case, 1, open_device("cpu"))
