"""Matrix products and convolutions, forward and backward, as the cube computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.numerics.rounding import FLOAT32, HALF, Operands
from harness.numerics.vector import wide

GROUPS = 4  # partial sums that stand for the cube's accumulation; a power of two
WIDTH = 4  # products of float32 that the cube adds without a rounding between; see `matmul_by_groups`
LONG, _PART = 768, 512  # a float32 sum beyond LONG goes in parts of about _PART; see `_in_order`
_BLOCK = 1 << 21  # results that a long sum is made for at a time: 8 MiB


def matmul(
    left: Tensor,
    right: Tensor,
    *,
    bias: Tensor | None = None,
    operands: Operands = FLOAT32,
    out: torch.dtype | None = None,
    groups: int = GROUPS,
) -> Tensor:
    """left @ right (+ bias) as the cube computes it: (…, M, K) by (…, K, N), rounded once to `out`, by default left's
    dtype.

    - float16, bfloat16: exact products, float32 sums, the bias added to the sum before the only rounding. Stated: Mmad
      takes half operands into a float32 accumulator (asc-devkit, Mmad.md); the cast on the way out is
      round-to-nearest-even.
    - float64: there is none. Raises: NoFloat64.
    - float32: float32 products and sums of what `operands` makes of both; the result is float32 unless they say
      otherwise. Stated.
    - The order of the sum: fitted, see `matmul_by_groups`; here `groups` parts of K one after the other, and a long sum
      of float32 loses what its K / 4 roundings lose (`_in_order`). With one part the sum is torch's own.
    """
    dtype = out or left.dtype
    if not left.is_floating_point():
        return _exact(left, right, bias, dtype)
    halved = operands.half_results and operands.kind == "float16" and torch.float32 in (left.dtype, right.dtype)
    left, right, shape = _as_one_kind(left, right)
    alone = groups > 1 and left.dtype == right.dtype == dtype == torch.float32 and operands.kind == "float32"
    left, right = _widened(left, operands), _widened(right, operands)
    long = alone and left.shape[-1] > LONG
    total = (_in_order(left, right) if long else _grouped(left, right, groups)).view(shape)
    if bias is not None:
        total = total + bias.float()
    return (operands.in_half(total) if halved else total).to(dtype)


def _exact(left: Tensor, right: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    total = torch.matmul(left, right)
    return (total if bias is None else total + bias).to(dtype)


class NotOnCube(TypeError):
    """The cube was asked for a dtype that it does not have."""


class NoFloat64(NotOnCube):
    """The cube was asked for float64, which it does not have: stated, Mmad takes half, bfloat16, float32 and int8
    (asc-devkit, Mmad.md).
    """

    def __init__(self):
        super().__init__(
            "the cube of a 910B has no float64 (DT_DOUBLE): take float32, or compute this product on the CPU"
        )


def _widened(tensor: Tensor, operands: Operands) -> Tensor:
    if tensor.dtype == torch.float64:
        raise NoFloat64
    return tensor.float() if tensor.dtype in HALF else operands.entering(tensor)


def _as_one_kind(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The operands of `torch.matmul` as two matrices, or as two batches (B, M, K) and (B, K, N) of them, and the shape
    of their product.

    The same product is asked for in several forms: (B, T, K) by one matrix, by a vector, with a batch that is
    broadcast. A BLAS library chooses its kernel, and so the order of a sum, by the form and by the layout. Taken to one
    form first, with `left` contiguous, the same product has the same bits.
    """
    rows = left.shape[-2:-1]  # none of a vector
    columns = right.shape[-1:] if right.dim() > 1 else ()
    left = left.unsqueeze(0) if left.dim() == 1 else left
    right = right.unsqueeze(1) if right.dim() == 1 else right
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*batch, *rows, *columns)
    if len(batch) == left.dim() - 2 and _is_one_matrix(right):
        folded = left.expand(*batch, *left.shape[-2:]).reshape(math.prod(batch) * left.shape[-2], left.shape[-1])
        return folded.contiguous(), right[(0,) * (right.dim() - 2)], shape
    flat = [
        tensor.expand(*batch, *tensor.shape[-2:]).reshape(math.prod(batch), *tensor.shape[-2:])
        for tensor in (left, right)
    ]
    return flat[0].contiguous(), flat[1], shape


def _is_one_matrix(tensor: Tensor) -> bool:
    """Whether a batch of matrices is one, repeated by strides of zero."""
    leading = zip(tensor.shape[:-2], tensor.stride())
    return all(size == 1 or (stride == 0 and size > 0) for size, stride in leading)


def _grouped(left: Tensor, right: Tensor, groups: int) -> Tensor:
    inner = left.shape[-1]
    if groups == 1 or inner < 4 * groups:
        return torch.matmul(left, right)
    parts = _parts(inner, groups)
    total = torch.matmul(left[..., parts[0]], right[..., parts[0], :])
    add_product = total.addmm_ if left.dim() == 2 else total.baddbmm_
    for part in parts[1:]:
        add_product(left[..., part], right[..., part, :])
    return total


def _in_order(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with a long K, (M, K) by (K, N) or in batches, that loses as much as K / `WIDTH` roundings of the
    growing sum.

    Parts of K of about `_PART` are added one after the other. The rounding error of each addition is known, since what
    is left of the part after it can be computed; it is put back as often as it takes to stand for all the roundings
    that the cube makes along that part, whose errors are independent: the square root of their number. Partial sums
    grow along the part from those before it: with their squares as those of a random walk, (p - 1/2) / p of what they
    are at the end of part p. Where every addition is exact, nothing is lost. Beside `matmul_by_groups` it loses 1.0 to
    1.6 times as much for K of 800 to 28,672, whether terms are of either sign or all positive; a BLAS library, which
    adds blocks apart, loses a half to a seventh of it.
    """
    total = left.new_empty(*left.shape[:-1], right.shape[-1])
    rows = max(_BLOCK // max(right.shape[-1], 1), 1)
    batches = zip(left, right, total) if left.dim() == 3 else ((left, right, total),)
    for one, other, result in batches:
        for start in range(0, len(one), rows):
            _added_in_order(one[start : start + rows], other, result[start : start + rows])
    return total


def _added_in_order(left: Tensor, right: Tensor, total: Tensor) -> None:
    """left @ right, (M, K) by (K, N), into `total`."""
    parts = _parts(left.shape[1], round(left.shape[1] / _PART))
    torch.mm(left[:, parts[0]], right[parts[0]], out=total)
    term, after = torch.empty_like(total), torch.empty_like(total)
    for count, part in enumerate(parts[1:], 2):
        torch.mm(left[:, part], right[part], out=term)
        _add(total, term, part.stop - part.start, count, after)


def _parts(length: int, number: int) -> list[slice]:
    edges = [length * part // number for part in range(number + 1)]
    return [slice(*item) for item in zip(edges, edges[1:])]


def _add(total: Tensor, term: Tensor, length: float, count: int, after: Tensor) -> None:
    """total += term, part number `count` of `length` products, with the error that the cube makes along it.

    `term` and `after`, a tensor of the same shape, are overwritten.
    """
    roundings = length / WIDTH * (count - 0.5) / count
    torch.add(total, term, out=after)
    lost = term.sub_(torch.sub(after, total, out=total))
    torch.add(after, lost, alpha=1 - math.sqrt(roundings), out=total)


def matmul_by_groups(left: Tensor, right: Tensor, group: int) -> Tensor:
    """left @ right, (M, K) by (K, N) in float32, with one float32 rounding after each `group` of K, exact inside: the
    cube, literally.

    Fitted: with 4 a float32 product of K = 64 has the 23.9 effective bits that were measured on an NPU (Jittor pull
    request 18025); HF32 takes 8 k a cycle and halves 16 (asc-devkit, Cube instruction table). It costs K / group
    products, so `matmul` sums a few parts of K instead, and makes a long sum lose as much as this one.
    """
    total = torch.zeros(left.shape[0], right.shape[1])
    for start in range(0, left.shape[1], group):
        part = slice(start, start + group)
        total = (total.double() + left[:, part].double() @ right[part].double()).float()
    return total


def scaled_product(self: Tensor, product: Tensor, beta: float, alpha: float, dtype: torch.dtype) -> Tensor:
    """beta · self + alpha · product, where the product is still in the accumulator: one rounding, to `dtype`. Stated,
    as for the bias.
    """
    total = product if alpha == 1 else product * alpha
    wide = self.float() if self.dtype in HALF else self
    if beta != 0:
        total = total + (wide if beta == 1 else wide * beta)
    return total.to(dtype)


LONG_PIECE = 63


def cuts_in_pieces(x: Tensor, weight: Tensor, *, stride, padding, dilation, transposed: bool, groups: int) -> bool:
    """Whether a convolution only cuts one channel into long pieces: the vendor makes a product of it that keeps float32
    (aclnn_convolution.cpp).
    """
    alone = weight.dim() == 3 and x.shape[1] == groups == dilation[0] == 1 and not transposed
    return alone and padding[0] == 0 and stride[0] == weight.shape[2] > LONG_PIECE


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride,
    padding,
    dilation,
    transposed: bool,
    output_padding,
    groups: int,
    operands: Operands = FLOAT32,
) -> Tensor:
    """A convolution as the cube computes it: float32 operands as `operands` says, bias in the float32 accumulator, one
    rounding.

    Stated: forward convolutions take their bias as float32 (aclnnConvolution). The vendor's golden rounds it to HF32 as
    well; here it is not, an effect of at most 2^-12 of the bias. With operands in float16 the bias and the result are
    float16 too (hicann/ops-nn, aclnn_convolution.cpp, UpdateOutputDtype and UpdateInputDtype).
    """  # fmt: skip
    dtype, halved = x.dtype, operands.kind == "float16" and x.dtype == torch.float32
    wide = (_widened(x, operands), _widened(weight, operands), None if bias is None else bias.float())
    wide = (*wide[:2], operands.in_half(wide[2])) if halved and bias is not None else wide
    options = (stride, padding, dilation, transposed, output_padding, groups)
    alone = dtype == torch.float32 and operands.kind == "float32" and groups == 1
    length = _terms(weight, stride, transposed)
    result = (
        _convolved_in_order(*wide, length, options) if alone and length > LONG else torch.convolution(*wide, *options)
    )
    return (operands.in_half(result) if halved else result).to(dtype)


def _terms(weight: Tensor, stride, transposed: bool) -> int:
    """How many products one result of a convolution is the sum of, at most; of a transposed one about as many."""
    if transposed:
        return weight.shape[0] * math.prod(weight.shape[2:]) // math.prod(stride)
    return math.prod(weight.shape[1:])


def _convolved_in_order(x: Tensor, weight: Tensor, bias: Tensor | None, length: int, options: tuple) -> Tensor:
    """A convolution of one group that loses as much as `_in_order`: some channels after the others."""
    channels, transposed = x.shape[1], options[3]
    parts = _parts(channels, min(max(round(length / _PART), 1), channels))

    def of(part: slice, added: Tensor | None) -> Tensor:
        return torch.convolution(x[:, part], weight[part] if transposed else weight[:, part], added, *options)

    total = of(parts[0], bias)
    after = torch.empty_like(total)
    for count, part in enumerate(parts[1:], 2):
        _add(total, of(part, None), length * (part.stop - part.start) / channels, count, after)
    return total


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride,
    padding,
    dilation,
    transposed: bool,
    output_padding,
    groups: int,
    wanted,
    operands: Operands = FLOAT32,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of a convolution towards x, its weight and its bias, as the cube computes them; None where `wanted`
    is False.

    Those of x and of the weight are products as in the forward: operands as `operands` says, float32 sums, one
    rounding. Stated: the cube's math type of aclnnConvolutionBackward. The bias' is a float32 sum of `grad` as it came.
    Assumed: the vector unit has no HF32, and with operands in float16 the result is float32.
    """  # fmt: skip
    cubed = (_widened(grad, operands), _widened(x, operands), _widened(weight, operands))
    towards_x, towards_weight, _ = torch.ops.aten.convolution_backward(
        *cubed, None, stride, padding, dilation, transposed, output_padding, groups, (wanted[0], wanted[1], False)
    )
    axes = [axis for axis in range(grad.dim()) if axis != 1]
    return (
        towards_x.to(x.dtype) if wanted[0] else None,
        towards_weight.to(weight.dtype) if wanted[1] else None,
        wide(torch.sum, grad, dim=axes) if wanted[2] else None,
    )
