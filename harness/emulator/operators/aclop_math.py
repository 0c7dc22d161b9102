"""Types of CANN's older path that compute element by element, reduce and order."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.operators.common import common, ints, upcast
from harness.emulator.table import aclop

# -------- element by element


def _log(x, base=-1.0, scale=1.0, shift=0.0):
    result = torch.log(x * scale + shift) if (scale, shift) != (1.0, 0.0) else None
    if result is None:
        return {2.0: torch.log2, 10.0: torch.log10}.get(base, torch.log)(x) / (
            math.log(base) if base > 0 and base not in (2.0, 10.0) else 1
        )
    return result if base <= 0 else result / math.log(base)


def _round(x, decimals=0):
    return torch.round(x, decimals=decimals) if x.is_floating_point() else x


_UNARY = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Erfc": torch.erfc,
    "Erfinv": torch.erfinv,
    "Exp": torch.exp,
    "Expm1": torch.expm1,
    "Floor": torch.floor,
    "IsFinite": torch.isfinite,
    "Log": _log,
    "Log1p": torch.log1p,
    "LogicalNot": torch.logical_not,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Rsqrt": torch.rsqrt,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Square": torch.square,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
    "Trunc": torch.trunc,
    "Invert": torch.bitwise_not,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "HardSwish": F.hardswish,
    "LogSigmoid": F.logsigmoid,
    "Round": _round,
    "Mish": F.mish,
    "Gelu": partial(F.gelu, approximate="tanh"),
    "FastGelu": lambda x: x * torch.sigmoid(1.702 * x),
    "Swish": lambda x, scale=1.0: x * torch.sigmoid(scale * x),
    "HardSigmoid": lambda x, alpha=1 / 6, beta=0.5: (x * alpha + beta).clamp(0, 1),
    "CeluV2": lambda x, alpha=1.0: F.celu(x, alpha),
    "LeakyRelu": lambda x, negative_slope=0.0: F.leaky_relu(x, negative_slope),
    "HardShrink": lambda x, lambd=0.5: F.hardshrink(x, lambd),
    "SoftShrink": lambda x, lambd=0.5: F.softshrink(x, lambd),
    "SoftplusV2": lambda x, beta=1.0, threshold=20.0: F.softplus(x, beta, threshold),
    "ThresholdV2D": lambda x, threshold, value: torch.where(x > threshold, x, torch.full_like(x, value)),
    "Elu": lambda x, alpha=1.0, scale=1.0, input_scale=1.0: torch.ops.aten.elu(x, alpha, scale, input_scale),
    "SoftmaxV2": lambda x, axes=(-1,): F.softmax(x, axes[0]),
    "LogSoftmaxV2": lambda x, axes=(-1,): F.log_softmax(x, axes[0]),
    "GLU": lambda x, dim=-1: F.glu(x, dim),
    "NanToNum": lambda x, nan=0.0, posinf=None, neginf=None: torch.nan_to_num(x, nan, posinf, neginf),
    "Trace": torch.trace,
    "AdaptiveAvgPool2d": lambda x, output_size: F.adaptive_avg_pool2d(x, output_size),
    "UpsampleNearest3d": lambda x, output_size: F.interpolate(x, output_size, mode="nearest"),
    "MatrixInverse": lambda x, adjoint=False: torch.linalg.inv(x.mH if adjoint else x),
}


def _unary(compute, x, out, **attributes):
    return compute(upcast(x), **attributes).to(out.dtype)


for _name, _compute in _UNARY.items():
    aclop(_name)(partial(_unary, _compute))


def _log_add_exp(x, y, base=-1.0, scale=1.0, shift=0.0):
    return torch.logaddexp2(x, y) if base == 2.0 else torch.logaddexp(x, y)


_BINARY = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "RealDiv": torch.true_divide,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Pow": torch.pow,
    "FloorDiv": torch.floor_divide,
    "FloorMod": torch.remainder,
    "Mod": torch.fmod,
    "Atan2": torch.atan2,
    "Equal": torch.eq,
    "NotEqual": torch.ne,
    "Less": torch.lt,
    "LessEqual": torch.le,
    "Greater": torch.gt,
    "GreaterEqual": torch.ge,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
    "LogAddExp": _log_add_exp,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "IsClose": lambda x, y, rtol=1e-5, atol=1e-8, equal_nan=False: torch.isclose(x, y, rtol, atol, equal_nan),
    "LeftShift": torch.bitwise_left_shift,
    "RightShift": torch.bitwise_right_shift,
    "Xlogy": torch.xlogy,
    "TensorEqual": lambda x, y: torch.tensor(torch.equal(x, y)),
    "Dot": torch.dot,
    "Cross": lambda x, y, dim: torch.linalg.cross(x, y, dim=dim),
}


def _binary(compute, x, y, out, **attributes):
    return compute(*common(x, y), **attributes).to(out.dtype).reshape(out.shape)


for _name, _compute in _BINARY.items():
    aclop(_name)(partial(_binary, _compute))


_TERNARY = {
    "AxpyV2": lambda x, y, alpha: x + alpha * y,
    "Addcdiv": lambda x, a, b, value: x + value * (a / b),
    "Addcmul": lambda x, a, b, value: x + value * (a * b),
    "Lerp": torch.lerp,
    "ClipByValue": torch.clamp,
    "ClipByValueV2": torch.clamp,
}


def _ternary(compute, *inputs, out):
    return compute(*(upcast(input_) for input_ in inputs)).to(out.dtype)


for _name, _compute in _TERNARY.items():
    aclop(_name)(partial(_ternary, _compute))


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
    "ReluGrad": _threshold_grad,
    "ThresholdGradV2D": _threshold_grad,
    "SoftmaxGrad": lambda y, grad, axes=(-1,): y * (grad - (y * grad).sum(axes, keepdim=True)),
    "LogSoftmaxGrad": lambda grad, y, axis=(-1,): grad - y.exp() * grad.sum(axis, keepdim=True),
    "SigmoidGrad": lambda y, grad: grad * y * (1 - y),
    "TanhGrad": lambda y, grad: grad * (1 - y * y),
    "EluGradV2": lambda grad, x, alpha=1.0, scale=1.0, input_scale=1.0, is_result=False: torch.ops.aten.elu_backward(
        grad, alpha, scale, input_scale, is_result, x
    ),
    "HardtanhGrad": lambda x, grad, min_val=-1.0, max_val=1.0: torch.where(
        (x > min_val) & (x < max_val), grad, torch.zeros_like(grad)
    ),
    "SwishGrad": lambda grad, x, y=None, scale=1.0: _through(_UNARY["Swish"])(grad, x, scale=scale),
    "SiluGrad": _through(F.silu),
    "GeluGrad": lambda grad, x, y: _through(_UNARY["Gelu"])(grad, x),
    **{
        name: _through(_UNARY[forward])
        for name, forward in {
            "MishGrad": "Mish",
            "HardSwishGrad": "HardSwish",
            "HardSigmoidGrad": "HardSigmoid",
            "LogSigmoidGrad": "LogSigmoid",
            "GLUGrad": "GLU",
            "FastGeluGrad": "FastGelu",
            "SoftplusV2Grad": "SoftplusV2",
            "LeakyReluGrad": "LeakyRelu",
            "HardShrinkGrad": "HardShrink",
            "SoftShrinkGrad": "SoftShrink",
        }.items()
    },
}


def _gradient(compute, *inputs, out, **attributes):
    return compute(*(upcast(input_) for input_ in inputs), **attributes).to(out.dtype)


for _name, _compute in _GRADIENTS.items():
    aclop(_name)(partial(_gradient, _compute))


# -------- reductions, orders


def _reduced(compute):
    def run(x, axes, out, keep_dims=False, noop_with_empty_axes=True):
        result = upcast(x)
        for axis in sorted({axis % max(x.dim(), 1) for axis in ints(axes)}, reverse=True):
            result = compute(result, axis) if x.dim() else result
        return result.reshape(out.shape).to(out.dtype)

    return run


for _name, _compute in {
    "ReduceSum": torch.sum,
    "ReduceMean": torch.mean,
    "ReduceProd": torch.prod,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceAll": torch.all,
    "ReduceAny": torch.any,
    "ReduceLogSumExp": torch.logsumexp,
}.items():
    aclop(_name)(_reduced(_compute))


@aclop("ReduceMeanD")
def reduce_mean_d(x, out, axes, keep_dims=False):
    return upcast(x).mean(axes or None, keepdim=keep_dims).to(out.dtype)


@aclop("ReduceStdWithMean")
def reduce_std(x, mean, out, dim=(), unbiased=True, keepdim=False, invert=False, epsilon=0.001, correction=None):
    correction = int(unbiased) if correction is None else correction
    result = upcast(x).var(dim or None, correction=correction, keepdim=keepdim)
    return ((result + epsilon).rsqrt() if invert else result.sqrt()).to(out.dtype)


@aclop("ReduceStdV2Update")
def reduce_variance(x, mean, out, dim=(), if_std=False, unbiased=True, keepdim=False, correction=None):
    result = upcast(x).var(dim or None, correction=int(unbiased) if correction is None else correction, keepdim=keepdim)
    return (result.sqrt() if if_std else result).to(out.dtype)


@aclop("Renorm")
def renorm(x, out, p, dim, maxnorm):
    """The factor for each slice along an axis: what brings its norm to the largest that is allowed."""
    norms = torch.linalg.vector_norm(upcast(x), p, [axis for axis in range(x.dim()) if axis != dim], keepdim=True)
    factors = torch.where(norms > maxnorm, maxnorm / (norms + 1e-7), torch.ones(()))
    rest = math.prod(out.shape) - factors.numel()  # there may be more room than that
    return F.pad(factors.reshape(-1), (0, rest)).reshape(out.shape).to(out.dtype)


@aclop("Cumsum")
def cumsum(x, axis, exclusive=False, reverse=False):
    return numerics.running_sum(x, int(axis))


@aclop("ArgMaxV2")
def argmax(x, axis, out, keep_dims=False):
    return upcast(x).argmax(int(axis), keepdim=keep_dims).reshape(out.shape).to(out.dtype)


@aclop("ArgMin")
def argmin(x, axis, out, keep_dims=False):
    return upcast(x).argmin(int(axis), keepdim=keep_dims).reshape(out.shape).to(out.dtype)


@aclop("ArgMaxWithValue")
def argmax_with_value(x, out, dimension, keep_dims=False):
    values, indices = upcast(x).max(dimension, keepdim=keep_dims)
    return indices.to(out[0].dtype), values.to(out[1].dtype)


@aclop("ArgMinWithValue")
def argmin_with_value(x, out, dimension, keep_dims=False):
    values, indices = upcast(x).min(dimension, keepdim=keep_dims)
    return indices.to(out[0].dtype), values.to(out[1].dtype)


@aclop("Sort")
def sort(x, out, axis=-1, descending=False, stable=False):
    values, indices = x.sort(dim=axis, descending=descending, stable=True)
    return values, indices.to(out[1].dtype)


@aclop("SortV2")
def sort_values(x, axis=-1, descending=False):
    return x.sort(dim=axis, descending=descending).values


@aclop("TopKV2")
def topk(x, count, out, sorted=True, dim=-1, largest=True, indices_dtype=3):
    values, indices = x.topk(int(count), dim, largest, sorted)
    return values, indices.to(out[1].dtype)


@aclop("Cumprod")
def cumprod(x, axis, exclusive=False, reverse=False):
    return numerics.running_product(x, int(axis))


@aclop("Cummax")
def cummax(x, out, dim):
    values, indices = x.cummax(dim)
    return values, indices.to(out[1].dtype)


@aclop("Cummin")
def cummin(x, out, axis):
    values, indices = x.cummin(axis)
    return values, indices.to(out[1].dtype)
