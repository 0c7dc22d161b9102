"""How an Ascend 910B rounds: the rules that the emulator computes by, and that an error forecast can be made from.

Pure torch, on CPU tensors. Each rule names its source and how far it can be trusted: *stated* by the vendor's documents or
sources, *fitted* to published measurements, or *assumed*. The order of a card's sums is not public, so these functions give errors
of the right size, not a card's bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)
SCORES = 1 << 26  # attention scores held at a time: 256 MiB


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


GROUPS = 4  # partial sums that stand for the cube's accumulation; a power of two


def matmul(
    left: Tensor, right: Tensor, *, bias: Tensor | None = None, hf32: bool = False, out: torch.dtype | None = None, groups: int = GROUPS
) -> Tensor:
    """left @ right (+ bias) as the cube computes it: (…, M, K) by (…, K, N), rounded once to `out`, by default left's dtype.

    - float16, bfloat16: exact products, float32 sums, the bias added to the sum before the only rounding. Stated: Mmad takes
      half operands into a float32 accumulator (asc-devkit, Mmad.md); the cast on the way out is round-to-nearest-even.
    - float64: there is none. Raises: NoFloat64.
    - float32: float32 products and sums; with `hf32` both operands are rounded to HF32 first. Stated.
    - The order of the sum: fitted, see `matmul_by_groups`; here `groups` parts of K one after the other.
    """
    dtype = out or left.dtype
    if not left.is_floating_point():
        return _exact(left, right, bias, dtype)
    left, right = _widened(left, hf32), _widened(right, hf32)
    total = _grouped(left, right, groups)
    if bias is not None:
        total = total + bias.float()
    return total.to(dtype)


def _exact(left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    total = torch.matmul(left, right)
    return (total if bias is None else total + bias).to(dtype)


class NoFloat64(TypeError):
    """The cube was asked for float64, which it does not have: stated, Mmad takes half, bfloat16, float32 and int8 (asc-devkit, Mmad.md)."""

    def __init__(self):
        super().__init__("the cube of a 910B has no float64 (DT_DOUBLE): take float32, or compute this product on the CPU")


def _widened(tensor: Tensor, hf32: bool) -> Tensor:
    if tensor.dtype == torch.float64:
        raise NoFloat64
    if tensor.dtype in HALF:
        return tensor.float()
    return round_hf32(tensor) if hf32 and tensor.dtype == torch.float32 else tensor


def _grouped(left: Tensor, right: Tensor, groups: int) -> Tensor:
    inner = left.shape[-1]
    if groups == 1 or inner < 4 * groups or right.dim() < 2:
        return torch.matmul(left, right)
    edges = [inner * part // groups for part in range(groups + 1)]
    parts = [slice(*each) for each in zip(edges, edges[1:])]
    total = torch.matmul(left[..., parts[0]], right[..., parts[0], :])
    for part in parts[1:]:
        if left.dim() == right.dim() == 2:
            total.addmm_(left[:, part], right[part])
        else:
            total.add_(torch.matmul(left[..., part], right[..., part, :]))
    return total


def matmul_by_groups(left: Tensor, right: Tensor, group: int) -> Tensor:
    """left @ right, (M, K) by (K, N) in float32, with one float32 rounding after each `group` of K, exact inside: the cube, literally.

    Fitted: with 4 a float32 product of K = 64 has the 23.9 effective bits that were measured on a card (Jittor pull request 18025); HF32
    takes 8 k a cycle and halves 16 (asc-devkit, Cube instruction table). It costs K / group products, so `matmul` sums four parts of K
    instead: K / 4 roundings of partial sums a quarter as long lose as much as K / 4 roundings of the growing sum.
    """
    total = torch.zeros(left.shape[0], right.shape[1])
    for start in range(0, left.shape[1], group):
        part = slice(start, start + group)
        total = (total.double() + left[:, part].double() @ right[part].double()).float()
    return total


def scaled_product(self: Tensor, product: Tensor, beta: float, alpha: float, dtype: torch.dtype) -> Tensor:
    """beta · self + alpha · product, where the product is still in the accumulator: one rounding, to `dtype`. Stated, as for the bias."""
    total = product if alpha == 1 else product * alpha
    wide = self.float() if self.dtype in HALF else self
    return (total if beta == 0 else total + (wide if beta == 1 else wide * beta)).to(dtype)


LONG_PIECE = 63


def cuts_in_pieces(x: Tensor, weight: Tensor, *, stride, padding, dilation, transposed: bool, groups: int) -> bool:
    """Whether a convolution only cuts one channel into long pieces: the vendor makes a product of it that keeps float32 (aclnn_convolution.cpp)."""
    alone = weight.dim() == 3 and x.shape[1] == groups == dilation[0] == 1 and not transposed
    return alone and padding[0] == 0 and stride[0] == weight.shape[2] > LONG_PIECE


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride, padding, dilation, transposed: bool, output_padding, groups: int, hf32: bool
) -> Tensor:
    """A convolution as the cube computes it: HF32 operands where `hf32`, bias in the float32 accumulator, one rounding.

    Stated: forward convolutions take their bias as float32 (aclnnConvolution). The vendor's golden rounds it to HF32 as well;
    here it is not, an effect of at most 2^-12 of the bias.
    """
    dtype = x.dtype
    wide = (_widened(x, hf32), _widened(weight, hf32), None if bias is None else bias.float())
    found = torch.convolution(*wide, stride, padding, dilation, transposed, output_padding, groups)
    return found.to(dtype)


def convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, *, stride, padding, dilation, transposed: bool, output_padding, groups: int, wanted, hf32: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution towards x, its weight and its bias, as the cube computes them; None where `wanted` is False.

    Those of x and of the weight are products as in the forward: both operands in HF32 where `hf32`, float32 sums, one rounding. Stated:
    the cube's math type of aclnnConvolutionBackward. The bias' is a float32 sum of `grad` as it came. Assumed: the vector unit has no HF32.
    """
    cubed = (_widened(grad, hf32), _widened(x, hf32), _widened(weight, hf32))
    towards_x, towards_weight, _ = torch.ops.aten.convolution_backward(
        *cubed, None, stride, padding, dilation, transposed, output_padding, groups, (wanted[0], wanted[1], False)
    )
    axes = [axis for axis in range(grad.dim()) if axis != 1]
    return (
        towards_x.to(x.dtype) if wanted[0] else None,
        towards_weight.to(weight.dtype) if wanted[1] else None,
        wide(torch.sum, grad, dim=axes) if wanted[2] else None,
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, hidden: Tensor | None = None, bias: Tensor | None = None,
    kept: Tensor | None = None, keep: float = 1.0, sink: Tensor | None = None, fast: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused attention on (B, H, N, D): the result, and each row's maximum and sum, both (B, H, N, 1) in float32.

    `hidden` is True where a key is hidden, broadcast to (B, H, N, S); `bias` is added to the scaled scores; `kept` is True where dropout
    left a probability, which is then divided by `keep`; `sink` (H,) is one more score for each row, without a value. Heads of k and v may
    be fewer, shared by groups of q's. Scores, softmax and sums are float32; probabilities and the result are cast to q's dtype, ties
    away from zero. Stated, but for the tiles of the online softmax: hicann/ops-transformer, flash_attention_score. With `fast`, the high
    performance of prompts, scores and softmax of float16 are float16. Stated: prompt_flash_attention_base.h; after which steps they are
    rounded is assumed.
    """  # fmt: skip
    k, v = _shared(k, q), _shared(v, q)
    parts = []
    flat = [each.flatten(0, 1) for each in (q, k, v)]
    masks = [_spread(each, q, k) for each in (hidden, bias, kept)]
    sink = None if sink is None else sink.float().repeat(q.shape[0])
    fast = fast and q.dtype == torch.float16
    for part in _parts(q, k):
        parts.append(_attend(*[each[part] for each in flat], scale, *[None if each is None else each[part] for each in (*masks, sink)], keep, fast))
    return tuple(torch.cat(each).unflatten(0, q.shape[:2]) for each in zip(*parts))


def _shared(heads: Tensor, q: Tensor) -> Tensor:
    group = q.shape[1] // max(heads.shape[1], 1)
    return heads.repeat_interleave(group, 1) if group > 1 else heads


def _spread(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2]).flatten(0, 1)


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    step = max(SCORES // max(q.shape[2] * k.shape[2], 1), 1)
    return [slice(start, start + step) for start in range(0, q.shape[0] * q.shape[1], step)] or [slice(0, 0)]


def _scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(1, 2)).mul_(scale)
    if bias is not None:
        scores += bias.float()
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    return scores


def _half_scores(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None) -> Tensor:
    scores = torch.matmul(q.float(), k.float().transpose(1, 2)).half() * scale
    scores = (scores if bias is None else scores + bias.half()).float()
    return scores if hidden is None else scores.masked_fill_(hidden, -math.inf)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden, bias, kept, sink, keep: float, fast: bool):
    scores = _scores(q, k, scale, hidden, bias) if not fast else _half_scores(q, k, scale, hidden, bias)
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -math.inf)
    top = top if sink is None else torch.maximum(top, sink[:, None, None])
    finite = torch.where(torch.isfinite(top), top, 0.0)
    weights = scores.sub_(finite).exp_()
    weights = weights.half().float() if fast else weights
    total = weights.sum(-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink[:, None, None] - finite)
    if kept is not None:
        weights = weights.mul_(kept) / keep if keep else weights.zero_()
    weights = round_half_away(weights, q.dtype).float() if q.dtype in HALF else weights
    found = torch.matmul(weights, v.float()) / torch.where(total == 0, 1.0, total)  # a row that sees no key gives zeros
    return round_half_away(found, q.dtype), top, total


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Tensor, top: Tensor, total: Tensor, *, scale: float, hidden: Tensor | None = None,
    bias: Tensor | None = None, kept: Tensor | None = None, keep: float = 1.0, sink: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of `attention` towards q, k, v, bias (B, H, N, S) and sink (H,); the last two in float32, None without the input.

    Probabilities are made again from the saved maximum and sum, in float32. They and the gradient of the scores enter the products that
    follow in q's dtype, ties away from zero, and the row sums of grad · found replace those over the keys. Stated:
    hicann/ops-transformer, flash_attention_score_grad; that the results are cast once, after the sum over all tiles, as well.
    """  # fmt: skip
    wide_k, wide_v = _shared(k, q), _shared(v, q)
    flat = [each.flatten(0, 1) for each in (grad, q, wide_k, wide_v, found, top, total)]
    masks = [_spread(each, q, k) for each in (hidden, bias, kept)]
    parts = []
    for part in _parts(q, k):
        parts.append(_attend_backward(*[each[part] for each in flat], scale, *[None if each is None else each[part] for each in masks], keep))
    joined = [None if each[0] is None else torch.cat(each).unflatten(0, q.shape[:2]) for each in zip(*parts)]
    towards_q, towards_k, towards_v, towards_bias, rows = joined
    group = q.shape[1] // max(k.shape[1], 1)
    if group > 1:
        towards_k, towards_v = [each.unflatten(1, (-1, group)).sum(2) for each in (towards_k, towards_v)]
    towards_sink = None
    if sink is not None:
        share = torch.exp(sink.float()[None, :, None, None] - top) / total
        towards_sink = -(share * rows).sum((0, 2, 3))
    return towards_q.to(q.dtype), towards_k.to(k.dtype), towards_v.to(v.dtype), towards_bias, towards_sink


def _attend_backward(grad, q, k, v, found, top, total, scale: float, hidden, bias, kept, keep: float):
    finite = torch.where(torch.isfinite(top), top, 0.0)
    weights = _scores(q, k, scale, hidden, bias).sub_(finite).exp_() / torch.where(total == 0, 1.0, total)
    grad = grad.float()
    towards_weights = torch.matmul(grad, v.float().transpose(1, 2))
    dropped = weights
    if kept is not None:
        factor = kept.float() / keep if keep else torch.zeros_like(weights)
        dropped, towards_weights = weights * factor, towards_weights * factor
    rows = (grad * found.float()).sum(-1, keepdim=True)
    towards_scores = weights * (towards_weights - rows)
    narrow = [round_half_away(each, q.dtype).float() if q.dtype in HALF else each for each in (dropped, towards_scores)]
    return (
        torch.matmul(narrow[1], k.float()) * scale,
        torch.matmul(narrow[1].transpose(1, 2), q.float()) * scale,
        torch.matmul(narrow[0].transpose(1, 2), grad),
        None if bias is None else towards_scores,
        rows,
    )


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
