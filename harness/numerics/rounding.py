"""Rounding of single numbers: HF32, TF32, half dtypes with ties away from zero, saturation; float32 operands as a cube
takes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def round_hf32(tensor: Tensor, ties: str = "away", bits: int = 11) -> Tensor:
    """Float32 rounded to HF32: 8 exponent bits, `bits` mantissa bits, to the nearest; what is not finite passes
    through.

    Stated: HF32 rounds the operands as they enter the cube, sums and results stay float32. On Atlas A2 and A3 it keeps
    11 bits (hiascend, envref_07_0038), on Ascend 950 10 (mirror-cann/asc-devkit, Mmad, HF32.md). `ties` is "away" from
    zero, as the vendor's own goldens do it (hicann/ops-nn, conv/convolution_forward/tests/assets/golden.py), or to
    "even"; which one a convolution takes is not public.

    Raises: ValueError for other dtypes, another rule for ties or another number of bits.
    """
    if tensor.dtype != torch.float32:
        raise ValueError(f"HF32 rounds float32, not {tensor.dtype}")
    if ties not in ("away", "even"):
        raise ValueError(f"ties go 'away' or to 'even', not {ties!r}")
    if bits not in (10, 11):
        raise ValueError(f"HF32 keeps 10 or 11 mantissa bits, not {bits}")
    dropped = 23 - bits
    half, whole = 1 << (dropped - 1), _bits(tensor)
    rounded = whole + half if ties == "away" else whole + (half - 1 + ((whole >> dropped) & 1))
    return _where_finite(tensor, rounded.bitwise_and_(-(1 << dropped)).view(torch.float32))


def _bits(tensor: Tensor) -> Tensor:
    """The bits of float32. A matrix keeps its strides: weights come transposed, and copying one costs more than its
    product.
    """
    return (tensor if tensor.dim() == 2 else tensor.contiguous()).view(torch.int32)


def _where_finite(tensor: Tensor, rounded: Tensor) -> Tensor:
    if math.isfinite(float(tensor.sum())):  # the cheap answer; an overflow of the sum only takes the long way
        return rounded
    return torch.where(torch.isfinite(tensor), rounded, tensor)


def round_tf32(tensor: Tensor) -> Tensor:
    """Float32 rounded to TF32, as CUDA's tensor cores take it: 8 exponent bits, 10 mantissa bits, to the nearest, ties
    away from zero.

    Stated: cvt.rna.tf32.f32 (PTX ISA, "cvt"). What is not finite passes through. Raises: ValueError for other dtypes.
    """
    if tensor.dtype != torch.float32:
        raise ValueError(f"TF32 rounds float32, not {tensor.dtype}")
    return _where_finite(tensor, (_bits(tensor) + 0x1000).bitwise_and_(~0x1FFF).view(torch.float32))


def round_half_away(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 rounded to float16 or bfloat16, ties away from zero; to float32 it is left as it is.

    Stated: fused attention casts its probabilities and its result with CAST_ROUND (hicann/ops-transformer,
    flash_attention_score_s1_bn2gs1.h). Only exact ties differ from torch's cast: those are moved outwards by a last
    place of float32 first. For float16 below its normal range the cast is torch's.
    """
    if dtype not in HALF:
        return tensor.to(dtype)
    dropped = 13 if dtype == torch.float16 else 16  # mantissa bits that the narrow type lacks
    bits = tensor.contiguous().view(torch.int32)
    tie = (bits & ((1 << dropped) - 1)) == (1 << (dropped - 1))
    return (bits + (tie & torch.isfinite(tensor))).view(torch.float32).to(dtype)


def saturated(tensor: Tensor) -> Tensor:
    """A float16 result in saturation mode: what overflowed is cut to the largest number, NaN is 0; other dtypes are
    left as they are.

    Stated: only half saturates (torch_npu, INF_NAN_MODE_ENABLE; a 910B comes in Inf/NaN mode and refuses the other
    unless it is forced).
    """
    if tensor.dtype != torch.float16:
        return tensor
    largest = torch.finfo(torch.float16).max
    return tensor.nan_to_num(0.0, largest, -largest)


OPERANDS = (
    "float32",
    "HF32",
    "HF32 of 10 bits",
    "TF32",
    "float16",
)  # what float32 operands of a product may be rounded to


@dataclass(frozen=True, kw_only=True)
class Operands:
    """What the float32 operands of a product are rounded to as they enter the cube; half operands enter as they are.

    Raises: ValueError for a kind that is not in `OPERANDS`, or ties other than "away" and "even".
    """

    kind: str = "float32"
    ties: str = "away"  # of HF32; those of TF32 go away from zero, those of float16 to even
    saturates: bool = False  # what float16 cannot hold is cut to its largest number, NaN is 0; else it is Inf
    # A product of operands in float16 is rounded to float16 itself, as a convolution's always is.
    half_results: bool = False

    def __post_init__(self):
        if self.kind not in OPERANDS:
            raise ValueError(f"float32 operands are rounded to {', '.join(OPERANDS)}, not to {self.kind!r}")
        if self.ties not in ("away", "even"):
            raise ValueError(f"ties go 'away' or to 'even', not {self.ties!r}")

    def entering(self, tensor: Tensor) -> Tensor:
        """A float32 tensor as the cube reads it, in float32; other dtypes are left as they are."""
        if tensor.dtype != torch.float32 or self.kind == "float32":
            return tensor
        if self.kind == "float16":
            return self.in_half(tensor)
        if self.kind == "TF32":
            return round_tf32(tensor)
        return round_hf32(tensor, self.ties, 10 if self.kind.endswith("10 bits") else 11)

    def in_half(self, tensor: Tensor) -> Tensor:
        """Float32 rounded to float16 and widened again."""
        half = tensor.half()
        return (saturated(half) if self.saturates else half).float()


FLOAT32 = Operands()
