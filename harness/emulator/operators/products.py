"""Matrix products and convolutions: what runs on the cube."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator import soc
from harness.emulator.operators.common import upcast
from harness.emulator.table import aclop, operator
from harness.numerics import HALF, scaled_product


@operator("aclnnMatmul aclnnMm aclnnBatchMatMul aclnnMv", "self other >out cube:int8")
def matmul(self, other, cube, out):
    return numerics.matmul(self, other, operands=soc.operands(cube, self, other), out=out.dtype)


@operator("aclnnDot", "self other >out")
def dot(self, other):
    return numerics.dot(self, other)


def wide_product(left, right, cube=None):
    """A product in float32, under a cubeMathType or, where an operator has none, with float32 kept where the cube has
    it.
    """
    operands = soc.default_operands(left, right) if cube is None else soc.operands(cube, left, right)
    return numerics.matmul(left, right, operands=operands, out=torch.float32 if left.dtype in HALF else left.dtype)


@operator("aclnnAddmm", "self mat1 mat2 beta:scalar alpha:scalar >out cube:int8")
def addmm(self, mat1, mat2, beta, alpha, cube, out):
    return scaled_product(self, wide_product(mat1, mat2, cube), beta, alpha, out.dtype)


@operator("aclnnInplaceAddmm", "self! mat1 mat2 beta:scalar alpha:scalar cube:int8")
def inplace_addmm(self, mat1, mat2, beta, alpha, cube, out):
    return scaled_product(self, wide_product(mat1, mat2, cube), beta, alpha, out.dtype)


@operator("aclnnBaddbmm", "self batch1 batch2 beta:scalar alpha:scalar >out cube:int8")
def baddbmm(self, batch1, batch2, beta, alpha, cube, out):
    return scaled_product(self, wide_product(batch1, batch2, cube), beta, alpha, out.dtype)


@operator("aclnnAddbmm", "self batch1 batch2 beta:scalar alpha:scalar >out cube:int8")
def addbmm(self, batch1, batch2, beta, alpha, cube, out):
    left, right = (
        batch1.transpose(0, 1).flatten(1),
        batch2.flatten(0, 1),
    )  # the sum over the batch is part of the product's own
    return scaled_product(self, wide_product(left, right, cube), beta, alpha, out.dtype).expand(out.shape)


@operator("aclnnAddmv", "self mat vec alpha:scalar beta:scalar >out cube:int8")
def addmv(self, mat, vec, alpha, beta, cube, out):
    return scaled_product(self, wide_product(mat, vec, cube), beta, alpha, out.dtype).expand(out.shape)


@operator("aclnnAddr", "self vec1 vec2 beta:scalar alpha:scalar >out")
def addr(self, vec1, vec2, beta, alpha, out):
    if out.dtype == torch.bool:
        return torch.addr(self, vec1, vec2, beta=beta, alpha=alpha)
    wide = [
        upcast(tensor) if tensor.is_floating_point() or tensor.is_complex() else tensor.to(out.dtype)
        for tensor in (self, vec1, vec2)
    ]
    return torch.addr(*wide, beta=beta, alpha=alpha).to(out.dtype)


@operator("aclnnInplaceAddr", "self! vec1 vec2 beta:scalar alpha:scalar")
def inplace_addr(self, vec1, vec2, beta, alpha, out):
    return addr(self, vec1, vec2, beta, alpha, out)


FUSED = {
    "": lambda product, other: product,
    "16cast32": lambda product, other: product,
    "add": lambda product, other: product + upcast(other),
    "mul": lambda product, other: product * upcast(other),
    "relu": lambda product, other: product.relu(),
    "gelu_erf": lambda product, other: F.gelu(product),
    "gelu_tanh": lambda product, other: F.gelu(product, approximate="tanh"),
}


@operator("aclnnFusedMatmul", "x1 x2 bias x3 kind:str cube:int8 >out")
def fused_matmul(x1, x2, bias, x3, kind, cube, out):
    product = wide_product(x1, x2, cube)
    product = product if bias is None else product + upcast(bias)
    return FUSED[kind](product, x3).to(out.dtype)


@operator(
    "aclnnTransposeBatchMatMul", "x1 x2 bias scale perm1:ints perm2:ints perm_out:ints cube:int8 split:int32 >out"
)
def transposed_batch_matmul(x1, x2, bias, scale, perm1, perm2, perm_out, cube, split, out):
    if scale is not None:
        raise NotImplementedError("a transposed batch product that quantizes its result")
    product = wide_product(x1.permute(perm1), x2.permute(perm2), cube)  # (B, M, N)
    product = (product if bias is None else product + upcast(bias)).permute(perm_out)
    if split > 1:  # (M, B, N) as (split, M, B / split * N)
        product = product.reshape(product.shape[0], split, -1).transpose(0, 1)
    return product.to(out.dtype)


ACTIVATIONS = {  # the numbers that grouped products give them
    0: lambda x: x,
    1: torch.relu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    3: F.gelu,
    4: lambda x: x * torch.sigmoid(1.702 * x),
    5: F.silu,
}


def _group_sizes(group_list, kind: int) -> list[int]:
    """How many rows each group has; the list holds ends (0), counts (1) or pairs of group and count (2)."""
    numbers = group_list.tolist() if isinstance(group_list, torch.Tensor) else list(group_list)
    return [end - start for start, end in zip([0, *numbers], numbers)] if kind == 0 else numbers


def _for_group(tensors, index):
    """The share of one group in a list with a tensor for each group, or with one tensor that has the groups in
    front.
    """
    if not tensors or (len(tensors) == 1 and not tensors[0].numel()):
        return None
    return tensors[index] if len(tensors) > 1 else tensors[0][index]


def _group_product(x, weight, bias, scale, offset, fine_scale, fine_offset, token_scale, activation, dtype):
    if fine_scale is not None:  # a weight of integers that is widened before the product
        weight = upcast(weight.float() if fine_offset is None else weight.float() + upcast(fine_offset)) * upcast(
            fine_scale
        )
        weight = weight.to(x.dtype)
    if x.dtype == torch.int8:
        total = torch.matmul(x.double(), weight.double())
        total = (total if bias is None else total + bias.double()).float()
    else:
        total = wide_product(x, weight)
        total = total if bias is None else total + upcast(bias)
    total = total if scale is None else total * upcast(scale)
    total = total if token_scale is None else total * token_scale.unsqueeze(-1)
    total = ACTIVATIONS[activation](total)
    return total.round().clamp(-128, 127).to(dtype) if dtype == torch.int8 else total.to(dtype)


def _share(values, index, alone):
    """What a group gets of one of the lists: nothing of an empty one, all of what is one vector for the one weight."""
    if not values:
        return None
    return values[0] if alone and values[0].dim() < 2 else _for_group(values, index)


def _grouped(
    x,
    weight,
    bias,
    scale,
    offset,
    fine_scale,
    fine_offset,
    token_scale,
    group_list,
    split,
    group_type,
    list_type,
    activation,
    outs,
):
    if list_type == 2:
        raise NotImplementedError("grouped products with a list of pairs")
    stacked = weight[0].shape[0] if weight[0].dim() == 3 else 1
    groups = len(weight) if len(weight) > 1 else stacked
    sizes = _group_sizes(group_list, list_type) if group_list is not None and len(group_list) else None
    if group_type == 2:  # groups along K: one result for each, stacked
        parts, start = [], 0
        for size in sizes:
            part = slice(start, start + size)
            parts.append(
                _group_product(
                    x[0][:, part], weight[0][part], None, None, None, None, None, None, activation, outs[0].dtype
                )
            )
            start += size
        return [torch.stack(parts)] if len(outs) == 1 else parts
    if len(x) == 1 and groups > 1:
        rows = list(torch.split(x[0], [*sizes, x[0].shape[0] - sum(sizes)]))[: len(sizes)]
        tokens = list(torch.split(token_scale[0], [*sizes, x[0].shape[0] - sum(sizes)])) if token_scale else None
    else:
        rows, tokens = list(x), token_scale or None
    alone = len(weight) == 1 and weight[0].dim() == 2
    parts = []
    for index, part in enumerate(rows):
        lists = (bias, scale, offset, fine_scale, fine_offset)
        share = [_share(item, index, alone) for item in lists]
        own = weight[0] if alone else _for_group(weight, index)
        parts.append(_group_product(part, own, *share, tokens and tokens[index], activation, outs[0].dtype))
    if len(outs) > 1 or split in (0, 1):
        return parts
    joined = torch.cat(parts)
    missing = outs[0].shape[0] - joined.shape[0]  # rows behind the last group stay zero
    return [F.pad(joined, (0, 0, 0, missing)) if missing else joined]


@operator(
    "aclnnGroupedMatmul",
    "x:tensors weight:tensors bias:tensors scale:tensors offset:tensors fine_scale:tensors fine_offset:tensors "
    "groups:ints split:int >out:tensors",
)
def grouped_matmul(x, weight, bias, scale, offset, fine_scale, fine_offset, groups, split, out):
    return _grouped(
        x, weight, bias, scale, offset, fine_scale, fine_offset, None, groups, split, 0 if groups else -1, 0, 0, out
    )


@operator(
    "aclnnGroupedMatmulV4",
    "x:tensors weight:tensors bias:tensors scale:tensors offset:tensors fine_scale:tensors fine_offset:tensors "
    "token_scale:tensors groups "
    "activation_input:tensors activation_scale:tensors activation_offset:tensors split:int group_type:int "
    "list_type:int activation:int "
    ">out:tensors >activated:tensors >dynamic_scale:tensors",
)
def grouped_matmul_v4(
    x,
    weight,
    bias,
    scale,
    offset,
    fine_scale,
    fine_offset,
    token_scale,
    groups,
    a,
    b,
    c,
    split,
    group_type,
    list_type,
    activation,
    out,
):
    outs = [item for item in out if item is not None]  # the lists that only quantization fills are null
    result = _grouped(
        x,
        weight,
        bias,
        scale,
        offset,
        fine_scale,
        fine_offset,
        token_scale,
        groups,
        split,
        group_type,
        list_type,
        activation,
        outs,
    )
    return result + [None] * (len(out) - len(outs))


@operator(
    "aclnnGroupedMatmulV5",
    "x:tensors weight:tensors bias:tensors scale:tensors offset:tensors fine_scale:tensors fine_offset:tensors "
    "token_scale:tensors groups "
    "activation_input:tensors activation_scale:tensors activation_offset:tensors split:int group_type:int "
    "list_type:int activation:int "
    "tuning:ints >out:tensors >activated:tensors >dynamic_scale:tensors",
)
def grouped_matmul_v5(
    x,
    weight,
    bias,
    scale,
    offset,
    fine_scale,
    fine_offset,
    token_scale,
    groups,
    a,
    b,
    c,
    split,
    group_type,
    list_type,
    activation,
    tuning,
    out,
):
    return grouped_matmul_v4(
        x,
        weight,
        bias,
        scale,
        offset,
        fine_scale,
        fine_offset,
        token_scale,
        groups,
        a,
        b,
        c,
        split,
        group_type,
        list_type,
        activation,
        out,
    )


@operator("aclnnGroupedMatmulAdd", "x weight groups self! transpose_x:bool transpose_weight:bool group_type:int")
def grouped_matmul_add(x, weight, groups, self, transpose_x, transpose_weight, group_type, out):
    """The gradients of grouped weights, added to those that are there: the rows of each group as a product over
    them.
    """
    parts = [
        left.t() @ right
        for left, right in zip(*[upcast(tensor).split(_group_sizes(groups, 0)) for tensor in (x, weight)])
    ]
    return (upcast(self) + torch.stack(parts).reshape(self.shape)).to(out.dtype)


@operator("aclnnTransformBiasRescaleQkv", "qkv bias heads:int >q >k >v")
def split_heads(qkv, bias, heads, out):
    whole = (upcast(qkv) + upcast(bias)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
    q, k, v = whole
    return [tensor.to(out[0].dtype) for tensor in (q / q.shape[-1] ** 0.5, k, v)]


def _even(x, padding, dims: int):
    """The tensor and a padding with one number for each axis; where both ends differ it is applied here, with zeros."""
    if (len(padding) == 2 * dims and dims > 1) or len(padding) > dims:
        pairs = [padding[2 * axis : 2 * axis + 2] for axis in range(dims)]
        if all(before == after for before, after in pairs):
            return x, [before for before, _ in pairs]
        return F.pad(x, [item for pair in reversed(pairs) for item in pair]), [0] * dims
    return x, list(padding) * (dims // len(padding))


@operator(
    "aclnnConvolution",
    "input weight bias stride:ints padding:ints dilation:ints transposed:bool output_padding:ints groups:int "
    ">out cube:int8",
)
def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups, cube, out):
    padded, padding = _even(input, padding, weight.dim() - 2)
    options = dict(stride=stride, padding=padding, dilation=dilation, transposed=transposed, groups=groups)
    operands = soc.operands(cube, input, weight)
    if "HF32" in operands.kind and numerics.cuts_in_pieces(input, weight, **options):
        operands = numerics.FLOAT32
    result = numerics.convolution(padded, weight, bias, output_padding=output_padding, operands=operands, **options)
    return result.to(out.dtype)


@operator("aclnnConvDepthwise2d", "input weight kernel:ints bias stride:ints padding:ints dilation:ints >out cube:int8")
def depthwise(input, weight, kernel, bias, stride, padding, dilation, cube, out):
    return convolution(input, weight, bias, stride, padding, dilation, False, (0, 0), input.shape[1], cube, out)


@operator("aclnnConvTbc", "input weight bias pad:int >out cube:int8")
def time_convolution(input, weight, bias, pad, cube, out):
    result = convolution(
        input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, (1,), (pad,), (1,), False, (0,), 1, cube, out
    )
    return result.permute(2, 0, 1)


@operator(
    "aclnnConvolutionBackward",
    "grad input weight bias_sizes:ints stride:ints padding:ints dilation:ints transposed:bool "
    "output_padding:ints groups:int wanted:bools "
    "cube:int8 >input_grad >weight_grad >bias_grad",
)
def convolution_backward(
    grad, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, wanted, cube, out
):
    result = numerics.convolution_backward(
        grad, input, weight, stride=stride, padding=padding, dilation=dilation, transposed=transposed,
        output_padding=output_padding, groups=groups, wanted=wanted, operands=soc.operands(cube, grad, input, weight),
    )  # fmt: skip
    return [_or_zeros(item, spec) for item, spec in zip(result, out)]


def _or_zeros(result, spec):
    """A result in the output's dtype; zeros where the caller made room for one that it did not ask for."""
    if spec is None:
        return None
    return torch.zeros(spec.shape, dtype=spec.dtype) if result is None else result.to(spec.dtype)


@operator("aclnnConvTbcBackward", "grad input weight bias pad:int cube:int8 >input_grad >weight_grad >bias_grad")
def time_convolution_backward(grad, input, weight, bias, pad, cube, out):
    towards_input, towards_weight, towards_bias = numerics.convolution_backward(
        grad.permute(1, 2, 0),
        input.permute(1, 2, 0),
        weight.permute(2, 1, 0),
        stride=(1,),
        padding=(pad,),
        dilation=(1,),
        transposed=False,
        output_padding=(0,),
        groups=1,
        wanted=(True, True, True),
        operands=soc.operands(cube, grad, input, weight),
    )
    return towards_input.permute(2, 0, 1), towards_weight.permute(2, 1, 0), towards_bias.to(out[2].dtype)


def _deformed(x, offset, kernel, stride, padding, dilation, groups: int):
    """What a deformable convolution reads of x (B, C, H, W), (B, C, H'·Kh, W'·Kw): bilinear between pixels, zero
    outside.

    `offset` (B, 3·G·Kh·Kw, H', W') has for each place of the kernel a shift to the right, one downwards and a factor.
    """
    batch, channels, height, width = x.shape
    (high, wide), (rows, columns) = kernel, offset.shape[2:]
    right, down, factor = offset.reshape(batch, -1, groups, high, wide, rows, columns)[:, :3].unbind(1)
    y = down + (
        (torch.arange(rows) * stride[0] - padding[0])[:, None] + (torch.arange(high) * dilation[0])[:, None, None, None]
    )
    x_ = right + (torch.arange(columns) * stride[1] - padding[2] + (torch.arange(wide) * dilation[1])[:, None, None])
    y, x_ = y.to(x.dtype), x_.to(x.dtype)
    pixels = x.reshape(batch, groups, channels // groups, height * width)
    result = 0
    for below, later in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = torch.floor(y) + below, torch.floor(x_) + later
        share = (1 - (y - row).abs()) * (1 - (x_ - column).abs())
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long().reshape(batch, groups, 1, -1)
        taken = pixels.gather(3, index.expand(-1, -1, channels // groups, -1)).reshape(batch, groups, -1, *y.shape[2:])
        result = result + taken * (share * inside).unsqueeze(2)
    result = (result * factor.unsqueeze(2)).flatten(1, 2)  # (B, C, Kh, Kw, H', W')
    return result.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, rows * high, columns * wide)


def _deformed_backward(grad, x, offset, *options):
    """In float64 behind the places: a shift's gradient is a small difference of sums over channels, which the kernel
    takes before it sums.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = x.clone().double().requires_grad_(), upcast(offset).clone().requires_grad_()
        return torch.autograd.grad(_deformed(*leaves, *options), leaves, grad.clone().double())


def _channels_first(x):
    return x.permute(0, 3, 1, 2)


def _channels_last(x):
    return x.permute(0, 2, 3, 1)


@aclop("DeformableOffsets")
def deformable_offsets(x, offsets, *, ksize, strides, pads, dilations, deformable_groups, data_format, modulated):
    options = ksize, strides[1:3], pads, dilations[1:3], deformable_groups
    return _channels_last(_deformed(upcast(_channels_first(x)), upcast(_channels_first(offsets)), *options)).to(x.dtype)


@aclop("DeformableOffsetsGrad")
def deformable_offsets_backward(
    grad, x, offsets, *, ksize, strides, pads, dilations, deformable_groups, data_format, modulated
):
    options = ksize, strides[1:3], pads, dilations[1:3], deformable_groups
    result = _deformed_backward(_channels_first(grad), _channels_first(x), _channels_first(offsets), *options)
    return [_channels_last(item).to(like.dtype) for item, like in zip(result, (x, offsets))]


@operator(
    "aclnnDeformableConv2d",
    "input weight offset bias kernel:ints stride:ints padding:ints dilation:ints groups:int "
    "deformable_groups:int modulated:bool >out >deformed",
)
def deformable_convolution(
    input, weight, offset, bias, kernel, stride, padding, dilation, groups, deformable_groups, modulated, out
):
    deformed = _deformed(
        upcast(input), upcast(offset), kernel, stride[2:], padding, dilation[2:], deformable_groups
    ).to(input.dtype)
    options = dict(
        padding=(0, 0),
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=groups,
        operands=soc.default_operands(input, weight),
    )
    result = numerics.convolution(deformed, weight, bias, stride=kernel, **options)
    return result.to(out[0].dtype), deformed


@operator(
    "aclnnDeformableConv2dBackward",
    "input grad deformed weight offset kernel:ints stride:ints padding:ints dilation:ints groups:int "
    "deformable_groups:int modulated:bool "
    ">input_grad >weight_grad >offset_grad >bias_grad",
)
def deformable_convolution_backward(
    input, grad, deformed, weight, offset, kernel, stride, padding, dilation, groups, deformable_groups, modulated, out
):
    options = dict(
        padding=(0, 0),
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=groups,
        operands=soc.default_operands(input, weight),
    )
    towards, towards_weight, towards_bias = numerics.convolution_backward(
        grad, deformed, weight, stride=kernel, wanted=(True, True, True), **options
    )
    towards_input, towards_offset = _deformed_backward(
        towards, input, offset, kernel, stride[2:], padding, dilation[2:], deformable_groups
    )
    return [
        tensor.to(spec.dtype)
        for tensor, spec in zip((towards_input, towards_weight, towards_offset, towards_bias), out)
    ]
