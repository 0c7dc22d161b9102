"""Elementwise functions, reductions and norms as the vector unit computes them; how exact a result is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.numerics.rounding import HALF


def wide(function, *tensors: Tensor, dtype: torch.dtype | None = None, **options) -> Tensor:
    """An elementwise function or a reduction: half dtypes are computed in float32 and rounded once. Stated: vector unit
    goldens.
    """
    dtype = dtype or tensors[0].dtype
    return function(*[tensor.float() if tensor.dtype in HALF else tensor for tensor in tensors], **options).to(dtype)


def silu(x: Tensor) -> Tensor:
    """x · sigmoid(x). Stated: the vendor's golden takes a form that cannot overflow; in float32, one rounding."""
    return wide(lambda x: x * torch.sigmoid(x), x)


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """GELU; torch_npu's kernel takes the tanh formula whatever `approximate` says, unless compatible_impl is on.
    Stated.
    """
    return wide(F.gelu, x, approximate=approximate)


def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x), as Sqrt and Div; torch's own rsqrt is an approximation that differs by host. Stated for norms
    (hicann/ops-nn).
    """
    scale = 1.0 / torch.sqrt(x.float() if x.dtype in HALF else x)
    return scale.to(x.dtype) if x.is_floating_point() else scale  # of integers a fraction


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum of left · right, both (K,); float32 products and sums, one rounding. Assumed: the vector unit's products
    and sums.
    """
    return wide(lambda left, right: (left * right).sum(), left, right)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x²) + eps) · weight over weight's axes, and 1/sqrt(…) in float32. Stated: float32 inside, Sqrt and
    Div.
    """
    axes = tuple(range(-weight.dim(), 0))
    upcast = x.float() if x.dtype in HALF else x
    scale = 1.0 / torch.sqrt(upcast.square().mean(axes, keepdim=True) + eps)
    return (upcast * scale * weight.to(upcast.dtype)).to(x.dtype), scale


def layer_norm(
    x: Tensor, axes: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last `axes`; mean and 1/sqrt(…) with those axes of one. All
    in float32.

    The caller rounds. Stated: float32 inside, Sqrt and Div (hicann/ops-nn, layer_norm_v4).
    """
    x, weight, bias = [
        tensor.float() if tensor is not None and tensor.dtype in HALF else tensor for tensor in (x, weight, bias)
    ]
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    rstd = 1.0 / torch.sqrt(centred.square().mean(axes, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, rstd


def running_sum(x: Tensor, dim: int) -> Tensor:
    """x.cumsum(dim), one float32 rounding after each step, in order; half dtypes are rounded to x's dtype at the end.

    Assumed: Ascend's vector unit has no float64, so the running value is float32 (ops-math says no order for it).
    torch's own keeps float64 on the CPU: at 32,000 numbers its error is 2.5e-8 where float32 steps lose 5e-6.

        running_sum(torch.tensor([16777216.0, 1.0, 1.0]), 0)  # tensor([16777216., 16777216., 16777216.])
    """
    return _running(numpy.add, torch.cumsum, x, dim)


def running_product(x: Tensor, dim: int) -> Tensor:
    """x.cumprod(dim), one float32 rounding after each step, as `running_sum`. Assumed."""
    return _running(numpy.multiply, torch.cumprod, x, dim)


def _running(step: numpy.ufunc, otherwise: Callable, x: Tensor, dim: int) -> Tensor:
    if x.dtype not in (torch.float32, *HALF) or x.dim() == 0 or x.numel() == 0:
        return otherwise(x, dim)
    steps = step.accumulate(x.detach().float().numpy(), axis=dim)
    return torch.from_numpy(steps).to(x.dtype)


def variance(x: Tensor, axes: Sequence[int] | None, correction: float, keep: bool = False) -> tuple[Tensor, Tensor]:
    """The variance and the mean of x over `axes`, all of them for None, in float32 (float64 of float64).

    The sum of (x - mean)² over the count less `correction`. Assumed: two passes of float32 sums; torch's own sums in
    float64 on the CPU.
    """
    x = x.float() if x.dtype in HALF else x
    axes = tuple(range(x.dim())) if axes is None or len(axes) == 0 else tuple(axes)
    count = math.prod(x.shape[axis] for axis in axes)
    mean = x.mean(axes, keepdim=True)
    total = (x - mean).square().sum(axes, keepdim=keep)
    mean = mean if keep else mean.squeeze(axes)
    return total / max(count - correction, 0), mean


class BatchMoments(NamedTuple):
    """The mean and the variance of a batch, (C,), the latter over the count and over the count less one."""

    mean: Tensor
    variance: Tensor
    unbiased: Tensor


def batch_moments(total: Tensor, squares: Tensor, count: int) -> BatchMoments:
    """The moments of `count` numbers in each channel from their sums and their sums of squares, both (C,)."""
    mean = total / count
    variance = (squares / count - mean.square()).clamp_(min=0)
    return BatchMoments(mean, variance, variance * (count / max(count - 1, 1)))


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training on (N, C, …): y as x, and the batch's mean and 1 / sqrt(var + eps), (C,) in float32.

    `running_mean` and `running_var` are moved in place. The variance is the mean square less the square of the mean, in
    float32, so it loses digits where a channel's mean is far from zero. Stated: aclnnBatchNorm goes through
    BNTrainingReduce, which returns the sum and the sum of squares (hicann/ops-nn, aclnn_batch_norm.cpp). The order of
    both sums is assumed.
    """  # fmt: skip
    upcast = x.float() if x.dtype in HALF else x
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = math.prod(x.shape[axis] for axis in axes)
    mean, spread, unbiased = batch_moments(upcast.sum(axes), upcast.square().sum(axes), count)
    rstd = 1.0 / torch.sqrt(spread + eps)
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.mul_(1 - momentum).add_(batch.to(running.dtype), alpha=momentum)
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (upcast - mean.view(shape)) * rstd.view(shape)
    y = y if weight is None else y * weight.to(y.dtype).view(shape)
    y = y if bias is None else y + bias.to(y.dtype).view(shape)
    return y.to(x.dtype), mean, rstd


def effective_bits(result: Tensor, exact: Tensor) -> float:
    """-log2 of the relative L2 error against a float64 result: tells float32 (≈ 23), HF32 (≈ 12.7), float16 and
    bfloat16 apart.
    """
    exact = exact.double()
    error = float((result.double() - exact).norm() / exact.norm())
    return math.inf if error == 0 else -math.log2(error)
