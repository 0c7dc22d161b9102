"""Operators of CANN's older path: a type, inputs in order, attributes by name."""

from __future__ import annotations

import ctypes
import math
from functools import partial

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.operators import products
from harness.emulator.operators.common import common, tall
from harness.emulator.table import older, operator


def allowed_hf32() -> tuple[bool, bool]:
    """Whether convolutions and products may take HF32: a compile option of the older path, one digit for each."""
    text = ctypes.create_string_buffer(128)
    ctypes.CDLL(None).aclGetCompileopt(14, text, ctypes.c_size_t(128))
    digits = text.value.decode() or "10"
    return digits[0] == "1", digits[1:2] == "1"


def ints(values) -> list[int]:
    """A tensor of sizes or axes as a list."""
    return [int(each) for each in values.reshape(-1).tolist()]


# ------------------------------------------------------------------------------------------- layouts, copies, slices


@older("Identity TransData")
def identity(x, src_format="", dst_format="", groups=1):
    return x  # the layouts are changed where it is read and where it is written


@operator("aclnnNpuFormatCast", "source >out")
def format_cast(source):
    return source


operator("aclnnMatmulWeightNz aclnnBatchMatMulWeightNz", "self other >out cube:int8")(products.matmul)
operator("aclnnAddmmWeightNz", "self mat1 mat2 beta:scalar alpha:scalar >out cube:int8")(products.addmm)


@older("TensorMove ViewCopy")
def move(x):
    return x


@older("Cast")
def cast(x, out, dst_type=None):
    return x.to(out.dtype)


@older("Fill")
def fill(dims, value, out):
    return value.reshape(()).to(out.dtype).expand(out.shape)


@older("OnesLike")
def ones_like(x):
    return torch.ones_like(x)


@older("ZerosLike")
def zeros_like(x):
    return torch.zeros_like(x)


@older("Eye")
def eye(out, num_rows, num_columns=0, batch_shape=(), dtype=None):
    return torch.eye(num_rows, num_columns or num_rows, dtype=out.dtype)


@older("Range")
def arange(start, end, step, out):
    return (start.double() + step.double() * torch.arange(out.shape[0])).to(out.dtype)


@older("LinSpace")
def linspace(start, end, count, out):
    return torch.linspace(start.item(), end.item(), ints(count)[0]).to(out.dtype)


@older("Slice")
def slice_(x, offsets, sizes):
    for axis, (offset, size) in enumerate(zip(ints(offsets), ints(sizes))):
        x = x.narrow(axis, offset, x.shape[axis] - offset if size < 0 else size)
    return x


@older("StridedSlice")
def strided_slice(x, begin, end, strides=None, begin_mask=0, end_mask=0, ellipsis_mask=0, new_axis_mask=0, shrink_axis_mask=0):
    begin, end = ints(begin), ints(end)
    strides = ints(strides) if strides is not None else [1] * len(begin)

    def marked(mask, position):
        return bool(mask >> position & 1)

    index = []
    for position in range(len(begin)):
        if marked(ellipsis_mask, position):
            index.append(Ellipsis)
        elif marked(new_axis_mask, position):
            index.append(None)
        elif marked(shrink_axis_mask, position):
            index.append(begin[position])
        else:
            first = None if marked(begin_mask, position) else begin[position]
            last = None if marked(end_mask, position) else end[position]
            index.append(slice(first, last, strides[position]))
    return torch.from_numpy(x.view(_BITS.get(x.dtype, x.dtype)).numpy()[tuple(index)].copy()).view(x.dtype)  # numpy steps backwards too


_BITS = {torch.bfloat16: torch.int16}  # a dtype that numpy lacks, as one of its width


@older("Transpose")
def transpose(x, perm):
    return x.permute(ints(perm))


@older("ConfusionTransposeD")
def confusion_transpose(x, perm, shape, transpose_first):
    return x.permute(perm).reshape(shape) if transpose_first else x.reshape(shape).permute(perm)


@older("BroadcastTo")
def broadcast_to(x, shape):
    return x.expand(ints(shape))


@older("Tile")
def tile(x, repeats):
    return x.repeat(ints(repeats))


@older("ReverseV2")
def reverse(x, axes):
    return x.flip(ints(axes))


@older("Roll")
def roll(x, shifts, dims=()):
    return x.roll(shifts, dims or None)


@older("ConcatD")
def concat(*tensors, concat_dim, N=None):
    return torch.cat(tensors, concat_dim)


@older("Pack")
def stack(*tensors, axis=0, N=None):
    return torch.stack(tensors, axis)


@older("Pad")
def pad(x, paddings):
    return _padded(x, ints(paddings), "constant", 0)


@older("PadV3")
def pad_v3(x, paddings, value=None, mode="constant", paddings_contiguous=True):
    return _padded(x, ints(paddings), {"edge": "replicate"}.get(mode, mode), 0 if value is None else value.item())


@older("MirrorPad")
def mirror_pad(x, paddings, mode="REFLECT"):
    return _padded(x, ints(paddings), mode.lower(), 0)


def _padded(x, paddings, mode, value):
    """Paddings are (before, after) from the first axis; torch counts from the last."""
    pairs = [(paddings[at], paddings[at + 1]) for at in range(0, len(paddings), 2)]
    while mode != "constant" and len(pairs) > 1 and pairs[0] == (0, 0) and len(pairs) > x.dim() - 2:
        pairs = pairs[1:]
    return F.pad(x, [size for pair in reversed(pairs) for size in pair], mode, *((value,) if mode == "constant" else ()))


@older("AsStrided")
def as_strided(x, shape, strides, offset):
    return x.contiguous().as_strided(ints(shape), ints(strides), int(offset))


@older("GatherV2")
def gather_v2(x, index, axis, batch_dims=0):
    return x.index_select(int(axis), index.reshape(-1).long()).reshape([*x.shape[: int(axis)], *index.shape, *x.shape[int(axis) + 1 :]])


@older("GatherV2D")
def gather_v2d(x, index, axis=0):
    return gather_v2(x, index, axis)


@older("GatherElements")
def gather_elements(x, index, dim=0):
    return x.gather(dim, index.long())


@older("ScatterElements")
def scatter_elements(x, index, source, axis=0, reduction="none"):
    if reduction == "add":
        return tall(x).scatter_add(axis, index.long(), tall(source)).to(x.dtype)
    return x.scatter(axis, index.long(), source)


@older("ScatterUpdate")
def scatter_update(x, index, source, use_locking=False):
    return x.index_copy(0, index.reshape(-1).long(), source.reshape(-1, *x.shape[1:]))


@older("Gather")
def take(x, index, validate_indices=True, batch_dims=0):
    return x.reshape(-1)[index.long()] if x.dim() <= 1 else x[index.long()]


@older("InplaceIndexAdd")
def index_add(x, index, source, alpha=None, axis=0):
    return tall(x).index_add(axis, index.long(), tall(source), alpha=1 if alpha is None else alpha.item()).to(x.dtype)


@older("OneHot")
def one_hot(x, depth, on, off, axis=-1):
    return _one_hot(x, int(depth), on, off, axis)


@older("OneHotD")
def one_hot_d(x, on, off, depth, axis=-1):
    return _one_hot(x, depth, on, off, axis)


def _one_hot(x, depth, on, off, axis):
    axis = axis if axis >= 0 else x.dim()
    shape = [1] * (x.dim() + 1)
    shape[axis] = depth
    return torch.where(x.long().unsqueeze(axis) == torch.arange(depth).view(shape), on.reshape(()), off.reshape(()))


@older("MaskedFill")
def masked_fill(x, mask, value):
    return torch.where(mask.bool(), value.reshape(()).to(x.dtype), x)


@older("MaskedSelect", free=(0,))
def masked_select(x, mask):
    return x.masked_select(mask.bool())


@older("NonZero", free=(0,))
def nonzero(x, out, transpose=False):
    found = x.nonzero().to(out.dtype)
    return found.t() if transpose else found


@older("Select SelectV2")
def select(condition, x, y):
    return torch.where(condition.bool(), x, y)


@older("MaskedFillRange")
def masked_fill_range(x, start, end, value, axis=-1):
    """Fills x[j, …, start[i, j]:end[i, j]] along an axis with value[i], or the whole range where the axis is the first."""
    changed, axis = x.clone(), axis % x.dim()
    for i in range(start.shape[0]):
        for j in range(start.shape[1]):
            first, last = int(start[i, j]), int(end[i, j])
            rows = changed if axis == 0 or start.shape[1] == 1 and x.shape[0] != 1 else changed[j]
            rows.narrow(axis - (rows.dim() < x.dim()), first, last - first).fill_(value[i])
    return changed


@older("Tril")
def tril(x, diagonal=0):
    return x.tril(diagonal)


@older("Triu")
def triu(x, diagonal=0):
    return x.triu(diagonal)


@older("FillDiagonal")
def fill_diagonal(x, fill_value, wrap=False):
    return x.clone().fill_diagonal_(fill_value, wrap)


# ------------------------------------------------------------------------------------------------ element by element


def _log(x, base=-1.0, scale=1.0, shift=0.0):
    found = torch.log(x * scale + shift) if (scale, shift) != (1.0, 0.0) else None
    if found is None:
        return {2.0: torch.log2, 10.0: torch.log10}.get(base, torch.log)(x) / (math.log(base) if base > 0 and base not in (2.0, 10.0) else 1)
    return found if base <= 0 else found / math.log(base)


def _round(x, decimals=0):
    return torch.round(x, decimals=decimals) if x.is_floating_point() else x


_UNARY = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh,
    "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Erfc": torch.erfc, "Erfinv": torch.erfinv, "Exp": torch.exp,
    "Expm1": torch.expm1, "Floor": torch.floor, "IsFinite": torch.isfinite, "Log": _log, "Log1p": torch.log1p, "LogicalNot": torch.logical_not,
    "Neg": torch.neg, "Reciprocal": torch.reciprocal, "Rsqrt": torch.rsqrt, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh,
    "Sqrt": torch.sqrt, "Square": torch.square, "Tan": torch.tan, "Tanh": torch.tanh, "Trunc": torch.trunc, "Invert": torch.bitwise_not,
    "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Selu": F.selu, "HardSwish": F.hardswish, "LogSigmoid": F.logsigmoid, "Round": _round,
    "Mish": F.mish, "Gelu": partial(F.gelu, approximate="tanh"), "FastGelu": lambda x: x * torch.sigmoid(1.702 * x),
    "Swish": lambda x, scale=1.0: x * torch.sigmoid(scale * x), "HardSigmoid": lambda x, alpha=1 / 6, beta=0.5: (x * alpha + beta).clamp(0, 1),
    "CeluV2": lambda x, alpha=1.0: F.celu(x, alpha), "LeakyRelu": lambda x, negative_slope=0.0: F.leaky_relu(x, negative_slope),
    "HardShrink": lambda x, lambd=0.5: F.hardshrink(x, lambd), "SoftShrink": lambda x, lambd=0.5: F.softshrink(x, lambd),
    "SoftplusV2": lambda x, beta=1.0, threshold=20.0: F.softplus(x, beta, threshold),
    "ThresholdV2D": lambda x, threshold, value: torch.where(x > threshold, x, torch.full_like(x, value)),
    "Elu": lambda x, alpha=1.0, scale=1.0, input_scale=1.0: torch.ops.aten.elu(x, alpha, scale, input_scale),
    "SoftmaxV2": lambda x, axes=(-1,): F.softmax(x, axes[0]), "LogSoftmaxV2": lambda x, axes=(-1,): F.log_softmax(x, axes[0]),
    "GLU": lambda x, dim=-1: F.glu(x, dim), "NanToNum": lambda x, nan=0.0, posinf=None, neginf=None: torch.nan_to_num(x, nan, posinf, neginf),
    "Renorm": lambda x, p, dim, maxnorm: torch.renorm(x, p, dim, maxnorm), "Trace": torch.trace,
    "AdaptiveAvgPool2d": lambda x, output_size: F.adaptive_avg_pool2d(x, output_size),
    "UpsampleNearest3d": lambda x, output_size: F.interpolate(x, output_size, mode="nearest"),
    "MatrixInverse": lambda x, adjoint=False: torch.linalg.inv(x.mH if adjoint else x),
}  # fmt: skip


def _unary(compute, x, out, **attributes):
    return compute(tall(x), **attributes).to(out.dtype)


for _name, _compute in _UNARY.items():
    older(_name)(partial(_unary, _compute))


def _log_add_exp(x, y, base=-1.0, scale=1.0, shift=0.0):
    return torch.logaddexp2(x, y) if base == 2.0 else torch.logaddexp(x, y)


_BINARY = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "RealDiv": torch.true_divide, "Maximum": torch.maximum, "Minimum": torch.minimum,
    "Pow": torch.pow, "FloorDiv": torch.floor_divide, "FloorMod": torch.remainder, "Mod": torch.fmod, "Atan2": torch.atan2,
    "Equal": torch.eq, "NotEqual": torch.ne, "Less": torch.lt, "LessEqual": torch.le, "Greater": torch.gt, "GreaterEqual": torch.ge,
    "LogicalAnd": torch.logical_and, "LogicalOr": torch.logical_or, "LogAddExp": _log_add_exp,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "IsClose": lambda x, y, rtol=1e-5, atol=1e-8, equal_nan=False: torch.isclose(x, y, rtol, atol, equal_nan),
    "TensorEqual": lambda x, y: torch.tensor(torch.equal(x, y)), "Dot": torch.dot,
    "Cross": lambda x, y, dim: torch.linalg.cross(x, y, dim=dim),
}  # fmt: skip


def _binary(compute, x, y, out, **attributes):
    return compute(*common(x, y), **attributes).to(out.dtype).reshape(out.shape)


for _name, _compute in _BINARY.items():
    older(_name)(partial(_binary, _compute))


_TERNARY = {
    "AxpyV2": lambda x, y, alpha: x + alpha * y, "Addcdiv": lambda x, a, b, value: x + value * (a / b), "Addcmul": lambda x, a, b, value: x + value * (a * b),
    "Lerp": torch.lerp, "ClipByValue": lambda x, low, high: torch.clamp(x, low, high), "ClipByValueV2": lambda x, low, high: torch.clamp(x, low, high),
}  # fmt: skip


def _ternary(compute, *inputs, out):
    return compute(*(tall(each) for each in inputs)).to(out.dtype)


for _name, _compute in _TERNARY.items():
    older(_name)(partial(_ternary, _compute))


def _threshold_grad(grad, x, threshold=0.0):
    return torch.where(x > threshold, grad, torch.zeros_like(grad))


def _through(compute):
    """The gradient of an operator of one input: grad and x to what goes back."""

    def backward(grad, x, **attributes):
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(compute(x, **attributes), x, grad.clone())[0]

    return backward


_GRADIENTS = {  # of grad and x, in this order
    "ReluGrad": _threshold_grad, "ThresholdGradV2D": _threshold_grad, "SoftmaxGrad": lambda y, grad, axes=(-1,): y * (grad - (y * grad).sum(axes, keepdim=True)),
    "LogSoftmaxGrad": lambda grad, y, axis=(-1,): grad - y.exp() * grad.sum(axis, keepdim=True),
    "SigmoidGrad": lambda y, grad: grad * y * (1 - y), "TanhGrad": lambda y, grad: grad * (1 - y * y),
    "EluGradV2": lambda grad, x, alpha=1.0, scale=1.0, input_scale=1.0, is_result=False: torch.ops.aten.elu_backward(
        grad, alpha, scale, input_scale, is_result, x
    ),
    "HardtanhGrad": lambda x, grad, min_val=-1.0, max_val=1.0: torch.where((x > min_val) & (x < max_val), grad, torch.zeros_like(grad)),
    "SeluGrad": lambda grad, y: torch.ops.aten.elu_backward(grad, 1.6732632423543772, 1.0507009873554805, 1.0, True, y),
    "SwishGrad": lambda grad, x, y=None, scale=1.0: _through(_UNARY["Swish"])(grad, x, scale=scale), "SiluGrad": _through(F.silu),
    **{
        name: _through(_UNARY[forward])
        for name, forward in {
            "MishGrad": "Mish", "HardSwishGrad": "HardSwish", "HardSigmoidGrad": "HardSigmoid", "LogSigmoidGrad": "LogSigmoid", "GLUGrad": "GLU",
            "FastGeluGrad": "FastGelu", "LeakyReluGrad": "LeakyRelu", "HardShrinkGrad": "HardShrink", "SoftShrinkGrad": "SoftShrink",
        }.items()
    },
}  # fmt: skip


def _gradient(compute, *inputs, out, **attributes):
    return compute(*(tall(each) for each in inputs), **attributes).to(out.dtype)


for _name, _compute in _GRADIENTS.items():
    older(_name)(partial(_gradient, _compute))


# ------------------------------------------------------------------------------------------------ reductions, orders


def _reduced(compute):
    def run(x, axes, out, keep_dims=False, noop_with_empty_axes=True):
        found = tall(x)
        for axis in sorted({axis % max(x.dim(), 1) for axis in ints(axes)}, reverse=True):
            found = compute(found, axis) if x.dim() else found
        return found.reshape(out.shape).to(out.dtype)

    return run


for _name, _compute in {
    "ReduceSum": torch.sum, "ReduceMean": torch.mean, "ReduceProd": torch.prod, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
    "ReduceAll": torch.all, "ReduceAny": torch.any, "ReduceLogSumExp": torch.logsumexp,
}.items():  # fmt: skip
    older(_name)(_reduced(_compute))


@older("ReduceMeanD")
def reduce_mean_d(x, out, axes, keep_dims=False):
    return tall(x).mean(axes or None, keepdim=keep_dims).to(out.dtype)


@older("ReduceStdWithMean")
def reduce_std(x, mean, out, dim=(), unbiased=True, keepdim=False, invert=False, epsilon=0.001, correction=None):
    correction = int(unbiased) if correction is None else correction
    found = tall(x).var(dim or None, correction=correction, keepdim=keepdim)
    return ((found + epsilon).rsqrt() if invert else found.sqrt()).to(out.dtype)


@older("ArgMaxV2")
def argmax(x, axis, out, keep_dims=False):
    return tall(x).argmax(int(axis), keepdim=keep_dims).reshape(out.shape).to(out.dtype)


@older("ArgMin")
def argmin(x, axis, out, keep_dims=False):
    return tall(x).argmin(int(axis), keepdim=keep_dims).reshape(out.shape).to(out.dtype)


@older("ArgMaxWithValue")
def argmax_with_value(x, out, dimension, keep_dims=False):
    values, indices = tall(x).max(dimension, keepdim=keep_dims)
    return indices.to(out[0].dtype), values.to(out[1].dtype)


@older("ArgMinWithValue")
def argmin_with_value(x, out, dimension, keep_dims=False):
    values, indices = tall(x).min(dimension, keepdim=keep_dims)
    return indices.to(out[0].dtype), values.to(out[1].dtype)


@older("Sort")
def sort(x, out, axis=-1, descending=False, stable=False):
    values, indices = x.sort(dim=axis, descending=descending, stable=True)
    return values, indices.to(out[1].dtype)


@older("SortV2")
def sort_values(x, axis=-1, descending=False):
    return x.sort(dim=axis, descending=descending).values


@older("TopKV2")
def topk(x, count, out, sorted=True, dim=-1, largest=True, indices_dtype=3):
    values, indices = x.topk(int(count), dim, largest, sorted)
    return values, indices.to(out[1].dtype)


@older("Cumprod")
def cumprod(x, axis, exclusive=False, reverse=False):
    return tall(x).cumprod(int(axis)).to(x.dtype)


@older("Cummax")
def cummax(x, out, dim):
    values, indices = x.cummax(dim)
    return values, indices.to(out[1].dtype)


@older("Cummin")
def cummin(x, out, axis):
    values, indices = x.cummin(axis)
    return values, indices.to(out[1].dtype)


# --------------------------------------------------------------------------------------------- products, convolutions


@older("MatMul MatMulV2")
def matmul(x, y, bias=None, offset=None, *, out, transpose_x1=False, transpose_x2=False, offset_x=0):
    left, right = (each.t() if turned else each for each, turned in ((x, transpose_x1), (y, transpose_x2)))
    return numerics.matmul(left, right, bias=bias, hf32=allowed_hf32()[1], out=out.dtype).reshape(out.shape)


@older("BatchMatMul BatchMatMulV2")
def batch_matmul(x, y, third=None, *, out, adj_x1=False, adj_x2=False, bias=0):
    left, right = (each.mT if turned else each for each, turned in ((x, adj_x1), (y, adj_x2)))
    return numerics.matmul(left, right, bias=third, hf32=allowed_hf32()[1], out=out.dtype)


def _spatial(values, data_format):
    """Strides or dilations of the spatial axes, out of one number for each axis."""
    return list(values[1:-1] if data_format.endswith("C") else values[2:])


def _padding(x, pads):
    """An input and the symmetric padding that is left to do: pads are (before, after) for each spatial axis."""
    pairs = [(pads[at], pads[at + 1]) for at in range(0, len(pads), 2)]
    if all(before == after for before, after in pairs):
        return x, [before for before, _ in pairs]
    return F.pad(x, [size for pair in reversed(pairs) for size in pair]), [0] * len(pairs)


@older("Conv2D Conv3D")
def convolution(x, filter, bias=None, offset=None, *, strides, pads, dilations, groups=1, data_format="NCHW", offset_x=0):
    x, padding = _padding(x, pads)
    return numerics.convolution(
        x, filter, bias, stride=_spatial(strides, data_format), padding=padding, dilation=_spatial(dilations, data_format), transposed=False,
        output_padding=[0] * len(padding), groups=groups, hf32=allowed_hf32()[0],
    )  # fmt: skip


@older("Conv2DTranspose Conv3DTranspose")
def convolution_transpose(size, x, filter, bias=None, offset=None, *, out, strides, pads, dilations, groups=1, data_format="NCHW", output_padding=(), offset_x=0):
    stride, dilation, padding = _spatial(strides, data_format), _spatial(dilations, data_format), [pads[at] for at in range(0, len(pads), 2)]
    lacking = [
        wanted - ((size - 1) * step - 2 * pad + spread * (kernel - 1) + 1)
        for wanted, size, step, pad, spread, kernel in zip(out.shape[2:], x.shape[2:], stride, padding, dilation, filter.shape[2:])
    ]
    return numerics.convolution(
        x, filter, bias, stride=stride, padding=padding, dilation=dilation, transposed=True, output_padding=lacking, groups=groups,
        hf32=allowed_hf32()[0],
    )  # fmt: skip


def _backward(grad, x, filter, wanted, strides, pads, dilations, groups, data_format):
    padding = [pads[at] for at in range(0, len(pads), 2)]
    return numerics.convolution_backward(
        grad, x, filter, stride=_spatial(strides, data_format), padding=padding, dilation=_spatial(dilations, data_format), transposed=False,
        output_padding=[0] * len(padding), groups=groups, wanted=wanted, hf32=allowed_hf32()[0],
    )  # fmt: skip


@older("Conv2DBackpropInput Conv3DBackpropInput")
def convolution_input(size, filter, grad, out, *, strides, pads, dilations, groups=1, data_format="NCHW"):
    x = torch.zeros(out.shape, dtype=grad.dtype)
    return _backward(grad, x, filter, (True, False, False), strides, pads, dilations, groups, data_format)[0].to(out.dtype)


@older("Conv2DBackpropFilter Conv3DBackpropFilter")
def convolution_filter(x, size, grad, out, *, strides, pads, dilations, groups=1, data_format="NCHW"):
    filter = torch.zeros(out.shape, dtype=torch.float32)
    return _backward(grad, x, filter, (False, True, False), strides, pads, dilations, groups, data_format)[1].to(out.dtype)


@older("BiasAddGrad")
def bias_add_grad(grad, out, data_format="NCHW"):
    return tall(grad).sum([axis for axis in range(grad.dim()) if axis != 1]).to(out.dtype)


# ---------------------------------------------------------------------------------------------------- norms, losses


def _channels(value, x):
    """One number for each channel against x of (N, C, …)."""
    return value.float().reshape(1, -1, *(1,) * (x.dim() - 2))


def _all_but_channels(x):
    return [axis for axis in range(x.dim()) if axis != 1]


@older("BNTrainingReduce BN3DTrainingReduce")
def batch_norm_sums(x, out, epsilon=1e-4):
    wide = x.float()
    return [found.reshape(spec.shape) for found, spec in zip((wide.sum(_all_but_channels(x)), (wide * wide).sum(_all_but_channels(x))), out)]


@older("BNTrainingUpdate BN3DTrainingUpdate")
def batch_norm_update(x, total, squares, scale, offset, mean, variance, out, factor, epsilon, isRef=True):
    count = x.numel() // x.shape[1]
    batch_mean = total / count
    batch_variance = (squares / count - batch_mean**2).clamp(min=0)
    unbiased = batch_variance * (count / max(count - 1, 1))
    normal = (x.float() - _channels(batch_mean, x)) * (_channels(batch_variance, x) + epsilon).rsqrt()
    y = normal * _channels(scale, x) + _channels(offset, x)
    results = (y, mean * (1 - factor) + batch_mean * factor, variance * (1 - factor) + unbiased * factor, batch_mean, batch_variance)
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip(results, out)]


@older("BNInfer")
def batch_norm_infer(x, scale, offset, mean, variance, out, epsilon=1e-4):
    normal = (x.float() - _channels(mean, x)) * (_channels(variance, x) + epsilon).rsqrt()
    return (normal * _channels(scale, x) + _channels(offset, x)).to(out.dtype)


@older("BNTrainingUpdateGrad BN3DTrainingUpdateGrad")
def batch_norm_update_grad(grad, x, mean, variance, out, epsilon=1e-4):
    normal = (x.float() - _channels(mean, x)) * (_channels(variance, x) + epsilon).rsqrt()
    results = ((grad.float() * normal).sum(_all_but_channels(x)), grad.float().sum(_all_but_channels(x)))
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip(results, out)]


@older("BNTrainingReduceGrad BN3DTrainingReduceGrad")
def batch_norm_reduce_grad(grad, x, diff_scale, diff_offset, scale, mean, variance, out, epsilon=1e-4):
    count, inverse = x.numel() // x.shape[1], (_channels(variance, x) + epsilon).rsqrt()
    normal = (x.float() - _channels(mean, x)) * inverse
    centred = grad.float() - (_channels(diff_offset, x) + normal * _channels(diff_scale, x)) / count
    return (_channels(scale, x) * inverse * centred).to(out.dtype)


@older("BNInferGrad")
def batch_norm_infer_grad(grad, scale, variance, out, epsilon=1e-4):
    return (grad.float() * _channels(scale, grad) * (_channels(variance, grad) + epsilon).rsqrt()).to(out.dtype)


@older("LayerNorm")
def layer_norm(x, weight, bias, out, begin_norm_axis=0, begin_params_axis=0, epsilon=1e-5):
    axes, wide = list(range(begin_norm_axis, x.dim())), tall(x)
    mean, variance = wide.mean(axes, keepdim=True), wide.var(axes, correction=0, keepdim=True)
    y = (wide - mean) * (variance + epsilon).rsqrt() * tall(weight) + tall(bias)
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip((y, mean, variance), out)]


@older("RmsNorm")
def rms_norm(x, gamma, out, epsilon=1e-6):
    axes = list(range(x.dim() - gamma.dim(), x.dim()))
    scale = (x.float().square().mean(axes, keepdim=True) + epsilon).rsqrt()
    return (x.float() * scale * gamma.float()).to(out[0].dtype), scale.reshape(out[1].shape)


def _loss(compute):
    def run(x, target, *weights, out, reduction="mean", **attributes):
        found = compute(tall(x), tall(target), *(tall(each) for each in weights), reduction=reduction, **attributes)
        return found.to(out.dtype).reshape(out.shape)

    return run


def _smooth_l1(x, target, reduction, sigma=1.0):
    return F.l1_loss(x, target, reduction=reduction) if sigma == 0 else F.smooth_l1_loss(x, target, reduction=reduction, beta=sigma)


for _name, _compute in {
    "MseLoss": F.mse_loss, "SmoothL1LossV2": _smooth_l1, "SoftMarginLoss": F.soft_margin_loss,
    "LpLoss": lambda x, target, reduction, p=1: F.l1_loss(x, target, reduction=reduction),
    "BinaryCrossEntropy": lambda x, target, weight=None, reduction="mean": F.binary_cross_entropy(x, target, weight, reduction=reduction),
    "SigmoidCrossEntropyWithLogitsV2": lambda x, target, weight=None, positive=None, reduction="mean": F.binary_cross_entropy_with_logits(
        x, target, weight, reduction=reduction, pos_weight=positive
    ),
}.items():  # fmt: skip
    older(_name)(_loss(_compute))


@older("SoftmaxCrossEntropyWithLogits")
def softmax_cross_entropy(x, labels, out):
    wide = tall(x)
    loss = -(tall(labels) * F.log_softmax(wide, -1)).sum(-1)
    return [found.reshape(spec.shape).to(spec.dtype) for found, spec in zip((loss, F.softmax(wide, -1) - tall(labels)), out)]


@older("NLLLoss")
def nll_loss(x, target, weight, out, reduction="mean", ignore_index=-100):
    found, total = torch.ops.aten.nll_loss_forward(tall(x), target.long(), tall(weight), _REDUCTIONS[reduction], ignore_index)
    return found.reshape(out[0].shape).to(out[0].dtype), total.reshape(out[1].shape).to(out[1].dtype)


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


# ----------------------------------------------------------------------------------------------------- optimizers


def _scalars(*values):
    return [value.reshape(()).float() for value in values]


@older("ApplyAdamD")
def adam(variable, m, v, beta1_power, beta2_power, rate, beta1, beta2, epsilon, grad, use_locking=False, use_nesterov=False):
    beta1_power, beta2_power, rate, beta1, beta2, epsilon = _scalars(beta1_power, beta2_power, rate, beta1, beta2, epsilon)
    g = grad.float()
    m_new, v_new = beta1 * m.float() + (1 - beta1) * g, beta2 * v.float() + (1 - beta2) * g * g
    step = rate * (1 - beta2_power).sqrt() / (1 - beta1_power)
    towards = beta1 * m_new + (1 - beta1) * g if use_nesterov else m_new
    return (variable.float() - step * towards / (v_new.sqrt() + epsilon)).to(variable.dtype), m_new.to(m.dtype), v_new.to(v.dtype)


@older("ApplyAdamW")
def adam_w(variable, m, v, beta1_power, beta2_power, rate, decay, beta1, beta2, epsilon, grad, most=None, amsgrad=False, maximize=False):
    beta1_power, beta2_power, rate, decay, beta1, beta2, epsilon = _scalars(beta1_power, beta2_power, rate, decay, beta1, beta2, epsilon)
    g = -grad.float() if maximize else grad.float()
    m_new, v_new = m.float() * beta1 + (1 - beta1) * g, v.float() * beta2 + (1 - beta2) * g * g
    spread = torch.maximum(most.float(), v_new) if amsgrad and most is not None else v_new
    below = (spread / (1 - beta2_power * beta2)).sqrt() + epsilon
    found = variable.float() * (1 - rate * decay) - rate * m_new / (1 - beta1_power * beta1) / below
    return found.to(variable.dtype), m_new.to(m.dtype), v_new.to(v.dtype)


@older("ApplyAdamV2")
def bert_adam(variable, m, v, rate, beta1, beta2, epsilon, grad, max_norm, norm, decay, step_size=None, adam_mode="adam"):
    rate, beta1, beta2, epsilon, max_norm, norm, decay = _scalars(rate, beta1, beta2, epsilon, max_norm, norm, decay)
    g = grad.float()
    if max_norm > 0 and norm > max_norm:
        g = g / (norm / max_norm)
    m_new, v_new = m.float() * beta1 + (1 - beta1) * g, v.float() * beta2 + (1 - beta2) * g * g
    step = m_new / (v_new.sqrt() + epsilon) + decay * variable.float()
    found = variable.float() - (rate if adam_mode == "adam" or step_size is None else step_size.reshape(()).float()) * step
    return found.to(variable.dtype), m_new.to(m.dtype), v_new.to(v.dtype)


# ------------------------------------------------------------------------------------------------ chance, bits, status


@older("DropOutGenMaskV3")
def dropout_byte_mask(shape, probability, out, seed=0, seed2=0):
    """One byte for each element, 1 where it is kept; `probability` is that of keeping."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + seed2) & (2**63 - 1)) if seed or seed2 else None
    drawn = torch.rand(math.prod(out.shape), generator=generator)
    return (drawn < probability.reshape(()).float()).to(out.dtype).reshape(out.shape)


@older("DropOutDoMaskV3")
def dropout_with_byte_mask(x, mask, probability):
    kept = mask.reshape(-1)[: x.numel()].reshape(x.shape).bool()
    return torch.where(kept, tall(x) / probability.reshape(()).float(), torch.zeros(())).to(x.dtype)


@older("AxpyWithSoftmaxAndDropOutDoMask")
def softmax_with_dropout(x, y, mask, out, alpha, input_keep_prob, axis=(-1,)):
    soft = F.softmax(tall(x) + tall(y) * alpha, axis[0])
    kept = mask.reshape(-1)[: x.numel()].reshape(x.shape).bool()
    return soft.to(out[0].dtype), torch.where(kept, soft / input_keep_prob, torch.zeros(())).to(out[1].dtype)


@older("DropoutWithMulsAndSoftmaxGrad")
def softmax_with_dropout_grad(grad, mask, soft, alpha, input_keep_prob, axes=(-1,)):
    kept = mask.reshape(-1)[: grad.numel()].reshape(grad.shape).bool()
    through = torch.where(kept, tall(grad) / input_keep_prob, torch.zeros(()))
    wide = tall(soft)
    return ((through - (through * wide).sum(axes, keepdim=True)) * wide * alpha).to(grad.dtype)


@older("RandomChoiceWithMask")
def random_choice(x, out, count, seed=0, seed2=0):
    """Up to `count` places of True, in a random order where there are more, and which of the rows hold one."""
    places = x.nonzero()
    if len(places) > count:
        places = places[torch.randperm(len(places))[:count]]
    rows = torch.zeros(count, x.dim(), dtype=out[0].dtype)
    rows[: len(places)] = places.to(rows.dtype)
    return rows, torch.arange(count) < len(places)


_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)  # of the bits of a byte, the first element in the lowest


@older("SignBitsPack")
def sign_bits_pack(x, size):
    """Eight elements a byte, the first in the lowest bit: 1 where not negative, 0 behind the end."""
    bits = F.pad((tall(x) >= 0).int(), (0, -x.numel() % 8))
    return (bits.view(-1, 8) * torch.tensor(_WEIGHTS)).sum(-1).to(torch.uint8).reshape(size, -1)


@older("SignBitsUnpack")
def sign_bits_unpack(x, out, size, dtype=0):
    bits = (x.int().unsqueeze(-1) & torch.tensor(_WEIGHTS)) != 0
    return torch.where(bits, 1.0, -1.0).reshape(size, -1).to(out.dtype)


@older("StrideAdd")
def stride_add(x, y, out, x1_c1_offset, x2_c1_offset, c1_len):
    """Blocks of 16 channels of x and y from an offset in each, added; channels that a tensor lacks count as 0."""

    def blocks(tensor, first):
        wanted = F.pad(tall(tensor), (0, 0) * (tensor.dim() - 2) + (0, (first + c1_len) * 16 - tensor.shape[1]))
        return wanted[:, first * 16 : (first + c1_len) * 16]

    return (blocks(x, x1_c1_offset) + blocks(y, x2_c1_offset)).reshape(out.shape).to(out.dtype)


@older("NPUAllocFloatStatus NPUGetFloatStatusV2 NPUGetFloatDebugStatus")
def float_status(out):
    return torch.zeros(out.shape, dtype=out.dtype)  # nothing overflows into a flag here


@older("NPUGetFloatStatus NPUClearFloatStatus")
def float_status_of(status, out):
    return torch.zeros(out.shape, dtype=out.dtype)


@older("NPUClearFloatStatusV2 NPUClearFloatDebugStatus")
def clear_float_status():
    return []
