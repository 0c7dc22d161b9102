"""Rounding of single numbers: HF32, TF32, half dtypes with ties away from zero, saturation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def round_hf32(tensor: Tensor, ties: str = "away") -> Tensor:
    """Float32 rounded to HF32: 8 exponent bits, 11 mantissa bits, to the nearest; what is not finite passes through.

    Stated: HF32 on Atlas A2 rounds the operands as they enter the cube, sums and results stay float32 (hiascend,
    envref_07_0038). `ties` is "away" from zero, as the vendor's own goldens do it (hicann/ops-nn,
    conv/convolution_forward/tests/assets/golden.py), or to "even"; which one a convolution takes is not public.

    Raises: ValueError for other dtypes or another rule for ties.
    """
    if tensor.dtype != torch.float32:
        raise ValueError(f"HF32 rounds float32, not {tensor.dtype}")
    if ties not in ("away", "even"):
        raise ValueError(f"ties go 'away' or to 'even', not {ties!r}")
    bits = _bits(tensor)
    rounded = bits + 0x800 if ties == "away" else bits + (0x7FF + ((bits >> 12) & 1))
    return _where_finite(tensor, rounded.bitwise_and_(~0xFFF).view(torch.float32))


def _bits(tensor: Tensor) -> Tensor:
    """The bits of float32. A matrix keeps its strides: weights come transposed, and copying one costs more than its product."""
    return (tensor if tensor.dim() == 2 else tensor.contiguous()).view(torch.int32)


def _where_finite(tensor: Tensor, rounded: Tensor) -> Tensor:
    if math.isfinite(float(tensor.sum())):  # the cheap answer; an overflow of the sum only takes the long way
        return rounded
    return torch.where(torch.isfinite(tensor), rounded, tensor)


def round_tf32(tensor: Tensor) -> Tensor:
    """Float32 rounded to TF32, as CUDA's tensor cores take it: 8 exponent bits, 10 mantissa bits, to the nearest, ties away from zero.

    Stated: cvt.rna.tf32.f32 (PTX ISA, "cvt"). What is not finite passes through. Raises: ValueError for other dtypes.
    """
    if tensor.dtype != torch.float32:
        raise ValueError(f"TF32 rounds float32, not {tensor.dtype}")
    return _where_finite(tensor, (_bits(tensor) + 0x1000).bitwise_and_(~0x1FFF).view(torch.float32))


def round_half_away(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 rounded to float16 or bfloat16, ties away from zero; to float32 it is left as it is.

    Stated: fused attention casts its probabilities and its result with CAST_ROUND (hicann/ops-transformer,
    flash_attention_score_s1_bn2gs1.h). Only exact ties differ from torch's cast: those are moved outwards by a last place of
    float32 first. For float16 below its normal range the cast is torch's.
    """
    if dtype not in HALF:
        return tensor.to(dtype)
    dropped = 13 if dtype == torch.float16 else 16  # mantissa bits that the narrow type lacks
    bits = tensor.contiguous().view(torch.int32)
    tie = (bits & ((1 << dropped) - 1)) == (1 << (dropped - 1))
    return torch.where(tie & torch.isfinite(tensor), bits + 1, bits).view(torch.float32).to(dtype)


def saturated(tensor: Tensor) -> Tensor:
    """A float16 result in saturation mode: what overflowed is cut to the largest number, NaN is 0; other dtypes are left as they are.

    Stated: only half saturates (torch_npu, INF_NAN_MODE_ENABLE; a 910B comes in Inf/NaN mode and refuses the other unless it is forced).
    """
    if tensor.dtype != torch.float16:
        return tensor
    largest = torch.finfo(torch.float16).max
    return tensor.nan_to_num(0.0, largest, -largest)
