"""Elementwise functions, reductions and norms as the vector unit computes them; how exact a result is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.numerics.rounding import HALF


def wide(function, *tensors: Tensor, dtype: torch.dtype | None = None, **options) -> Tensor:
    """An elementwise function or a reduction: half dtypes are computed in float32 and rounded once. Stated: vector unit goldens."""
    dtype = dtype or tensors[0].dtype
    return function(*[each.float() if each.dtype in HALF else each for each in tensors], **options).to(dtype)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x). Stated: the vendor's golden takes a form that cannot overflow; in float32, one rounding."""
    return wide(lambda x: x * torch.sigmoid(x), x)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """GELU; torch_npu's kernel takes the tanh formula whatever `approximate` says, unless compatible_impl is on. Stated."""
    return wide(F.gelu, x, approximate=approximate)


def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x), as Sqrt and Div; torch's own rsqrt is an approximation that differs by host. Stated for norms (hicann/ops-nn)."""
    scale = 1.0 / torch.sqrt(x.float() if x.dtype in HALF else x)
    return scale.to(x.dtype) if x.is_floating_point() else scale  # of integers a fraction


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum of left · right, both (K,); float32 products and sums, one rounding. Assumed: the vector unit's products and sums."""
    return wide(lambda left, right: (left * right).sum(), left, right)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps) · weight over weight's axes, and 1/sqrt(…) in float32. Stated: float32 inside, Sqrt and Div."""
    axes = tuple(range(-weight.dim(), 0))
    tall = x.float() if x.dtype in HALF else x
    scale = 1.0 / torch.sqrt(tall.square().mean(axes, keepdim=True) + eps)
    return (tall * scale * weight.to(tall.dtype)).to(x.dtype), scale


def layer_norm(x: Tensor, axes: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last `axes`; mean and 1/sqrt(…) with those axes of one. All in float32.

    The caller rounds. Stated: float32 inside, Sqrt and Div (hicann/ops-nn, layer_norm_v4).
    """
    x, weight, bias = [each.float() if each is not None and each.dtype in HALF else each for each in (x, weight, bias)]
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    rstd = 1.0 / torch.sqrt(centred.square().mean(axes, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, rstd


def effective_bits(found: Tensor, exact: Tensor) -> float:
    """-log2 of the relative L2 error against a float64 result: tells float32 (≈ 23), HF32 (≈ 12.7), float16 and bfloat16 apart."""
    exact = exact.double()
    error = float((found.double() - exact).norm() / exact.norm())
    return math.inf if error == 0 else -math.log2(error)
