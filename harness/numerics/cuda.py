"""What CUDA computes otherwise than the CPU: attention in float32, running sums and group norm of half dtypes.

Fitted to one GPU: an NVIDIA H200 with torch 2.11 (CUDA 13.0), all operator rows of the default run. Where a rule
follows torch's or CUTLASS' sources, it says so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STEP = 8  # of the inner axis: what one instruction for TF32 takes (PTX ISA, mma.m16n8k8)
_BLOCK = 1024  # numbers of a running sum that one block of threads adds at a time (torch, ScanUtils.cuh)


def split_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, (…, M, K) by (…, K, N) in float32, as tensor cores compute it in three products of TF32.

    Each operand is a large and a small TF32 number, both cut, not rounded; small by large, large by small and large by
    large are added in this order, eight terms at a time, to a float32 sum (CUTLASS, mma_tensor_op_fast_f32.h). What is
    cut off and small by small are lost, so that a product is 3.4e-7 too small on average, whatever its length: the
    H200's attention is 1.1e-7 to 4.6e-7 too small. Differentiable.

        split_product(torch.ones(1, 64), torch.ones(64, 1))  # tensor([[64.]])
    """
    return _SplitProduct.apply(left, right)


class _SplitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _split_product(left, right)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return _split_product(grad, right.transpose(-2, -1)), _split_product(left.transpose(-2, -1), grad)


def _split_product(left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros(*left.shape[:-1], right.shape[-1])
    (left_large, left_small), (right_large, right_small) = _split(left), _split(right)
    for start in range(0, left.shape[-1], STEP):
        part = slice(start, start + STEP)
        for one, other in ((left_small, right_large), (left_large, right_small), (left_large, right_large)):
            total = (total.double() + one[..., part].double() @ other[..., part, :].double()).float()
    return total


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as two of TF32, a large one and what of the rest fits, both cut towards zero."""
    large = _cut(x)
    return large, _cut(x - large)


def _cut(x: Tensor) -> Tensor:
    """The bits of TF32 of float32 numbers: the sign, the exponent and 10 of the mantissa."""
    return (x.contiguous().view(torch.int32) & -(1 << 13)).view(torch.float32)


def split_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, bias: Tensor | None = None, hidden: Tensor | None = None
) -> Tensor:
    """Attention of (B, H, N, D) in float32 with both products by `split_product`; differentiable.

    `bias` is added to the scaled scores and `hidden` is True where a key is hidden; a query that sees no key gives 0.
    The probabilities are divided by their sum after the second product, as in an online softmax (torch,
    mem_eff_attention/kernel_forward.h).
    """
    scores = split_product(query, key.transpose(-2, -1)) * scale
    scores = scores if bias is None else scores + bias
    scores = scores if hidden is None else scores.masked_fill(hidden, -math.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min).detach()
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    return split_product(weights, value) / torch.where(total > 0, total, 1)


def running_sum_in_half(x: Tensor, dim: int) -> Tensor:
    """x.cumsum(dim) of a half dtype, each addition rounded to it: a tree within `_BLOCK` numbers, the blocks one after
    the other (torch, ScanUtils.cuh: the operator adds in the tensor's dtype).

        running_sum_in_half(torch.tensor([256.0, 1.0, 1.0], dtype=torch.bfloat16), 0)  # 256, 256, 256
    """
    moved = x.movedim(dim, -1)
    blocks: list[Tensor] = []
    for block in moved.split(_BLOCK, -1):
        carried = block.clone()
        if blocks:
            carried[..., 0] += blocks[-1][..., -1]
        blocks.append(_scanned(carried))
    return torch.cat(blocks, -1).movedim(-1, dim)


def _scanned(x: Tensor) -> Tensor:
    """Running sums by Sklansky's tree: in each step the last sum of a first half is added to all of its second half."""
    length = x.shape[-1]
    padded = torch.zeros(*x.shape[:-1], 1 << (length - 1).bit_length(), dtype=x.dtype)
    padded[..., :length] = x
    step = 1
    while step < length:
        halves = padded.unflatten(-1, (-1, 2, step))
        halves[..., 1, :] += halves[..., 0, -1:]
        step *= 2
    return padded[..., :length]


def group_norm_of_half(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Group norm of (count, channels, …) in a half dtype, and the mean and 1/std of each group, which are kept in that
    dtype and used so (torch, group_norm_kernel.cu). `size` is the number of elements of a channel.
    """
    grouped = x.float().reshape(count, groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    rstd = torch.rsqrt(grouped.var(-1, keepdim=True, correction=0) + eps)
    mean, rstd = mean.to(x.dtype), rstd.to(x.dtype)
    channelwise = grouped.reshape(count, groups, channels // groups, size)
    factor = rstd.float().unsqueeze(-1) * _by_group(weight, groups, 1.0)
    offset = _by_group(bias, groups, 0.0) - mean.float().unsqueeze(-1) * factor
    result = (channelwise * factor + offset).reshape(x.shape).to(x.dtype)
    return result, mean.squeeze(-1), rstd.squeeze(-1)


def _by_group(parameter: Tensor | None, groups: int, otherwise: float) -> Tensor:
    """A parameter of each channel as (1, groups, channels of a group, 1)."""
    if parameter is None:
        return torch.full((1, groups, 1, 1), otherwise)
    return parameter.float().reshape(1, groups, -1, 1)
