"""Normalizations and softmax."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from harness import numerics
from harness.emulator.operators.common import all_but_channels, upcast
from harness.emulator.table import aclop, operator


@operator("aclnnRmsNorm", "self gamma eps:double >y >rstd")
def rms_norm(self, gamma, eps, out):
    y, rstd = numerics.rms_norm(self, gamma, eps)
    return y, rstd.reshape(out[1].shape).to(out[1].dtype)


def _moved(value, spec):
    """A value as the output's specification has it: its shape when the elements are the same, its dtype; None for a
    null output.
    """
    return None if spec is None else value.reshape(spec.shape).to(spec.dtype)


def _or_zeros(value, spec):
    """The same, and zeros where the caller made room for what was not asked for."""
    return torch.zeros(spec.shape, dtype=spec.dtype) if value is None and spec is not None else _moved(value, spec)


def _talls(*tensors):
    return [upcast(tensor) for tensor in tensors]


@operator("aclnnRmsNormGrad", "grad self rstd gamma >self_grad >gamma_grad")
def rms_norm_backward(grad, self, rstd, gamma, out):
    grad, x, gamma = _talls(grad, self, gamma)
    axes = tuple(range(-gamma.dim(), 0))
    rstd = rstd.reshape(*x.shape[: x.dim() - gamma.dim()], *[1] * gamma.dim()).to(x.dtype)
    normal = x * rstd
    towards = grad * gamma
    rest = tuple(range(x.dim() - gamma.dim()))
    towards_gamma = (grad * normal).sum(rest) if rest else grad * normal
    towards_self = rstd * (towards - normal * (towards * normal).mean(axes, keepdim=True))
    return towards_self.to(out[0].dtype), _moved(towards_gamma, out[1])


def _added_rms_norm(x1, x2, gamma, eps):
    total = upcast(x1) + upcast(x2)
    return total, *numerics.rms_norm(total, upcast(gamma), eps)


@operator("aclnnAddRmsNorm", "x1 x2 gamma eps:double >y >rstd >x")
def add_rms_norm(x1, x2, gamma, eps, out):
    total, y, rstd = _added_rms_norm(x1, x2, gamma, eps)
    return [_moved(item, spec) for item, spec in zip((y, rstd, total), out)]


@operator("aclnnInplaceAddRmsNorm", "x1! x2! gamma eps:double >rstd")
def inplace_add_rms_norm(x1, x2, gamma, eps, out):
    total, y, rstd = _added_rms_norm(x1, x2, gamma, eps)
    return [_moved(item, spec) for item, spec in zip((y, total, rstd), out)]


@operator("aclnnAddRmsNormCast", "x1 x2 gamma eps:double >wide >y >rstd >x")
def add_rms_norm_cast(x1, x2, gamma, eps, out):
    total, y, rstd = _added_rms_norm(x1, x2, gamma, eps)
    return [_moved(item, spec) for item, spec in zip((y, y, rstd, total), out)]


@operator("aclnnGemmaRmsNorm", "self gamma eps:double >y >rstd")
def gemma_rms_norm(self, gamma, eps, out):
    y, rstd = numerics.rms_norm(upcast(self), upcast(gamma) + 1, eps)
    return _moved(y, out[0]), _moved(rstd, out[1])


@operator("aclnnLayerNorm aclnnFastLayerNorm", "self shape:ints weight bias eps:double >y >mean >rstd")
def layer_norm(self, shape, weight, bias, eps, out):
    weight, bias = [None if tensor is None else tensor.reshape(shape) for tensor in (weight, bias)]
    result = numerics.layer_norm(upcast(self), tuple(range(-len(shape), 0)), weight, bias, eps)
    return [_moved(item, spec) for item, spec in zip(result, out)]


@aclop("LayerNormV3")
def layer_norm_v3(x, weight, bias, out, begin_norm_axis=0, begin_params_axis=0, epsilon=1e-5):
    result = numerics.layer_norm(upcast(x), tuple(range(begin_norm_axis % x.dim(), x.dim())), weight, bias, epsilon)
    return [_moved(item, spec) for item, spec in zip(result, out)]


def _layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, wanted=(True, True, True)):
    """On tall tensors; mean and rstd hold a number for each row."""
    weight, bias = [None if tensor is None else upcast(tensor).to(x.dtype).reshape(shape) for tensor in (weight, bias)]
    rows = x.shape[: x.dim() - len(shape)] + (1,) * len(shape)
    mean, rstd = mean.to(x.dtype).reshape(rows), rstd.to(x.dtype).reshape(rows)
    return torch.ops.aten.native_layer_norm_backward(grad.to(x.dtype), x, shape, mean, rstd, weight, bias, wanted)


@operator(
    "aclnnLayerNormBackward",
    "grad self shape:ints mean rstd weight bias wanted:bools >self_grad >weight_grad >bias_grad",
)
def layer_norm_backward(grad, self, shape, mean, rstd, weight, bias, wanted, out):
    result = _layer_norm_backward(upcast(grad), upcast(self), shape, mean, rstd, weight, bias, wanted)
    return [_or_zeros(item, spec) for item, spec in zip(result, out)]


@operator("aclnnAddLayerNorm", "x1 x2 gamma beta bias eps:double with_sum:bool >y >mean >rstd >x")
def add_layer_norm(x1, x2, gamma, beta, bias, eps, with_sum, out):
    total = upcast(x1) + upcast(x2)
    total = total if bias is None else total + upcast(bias)
    result = *numerics.layer_norm(total, tuple(range(-gamma.dim(), 0)), gamma, beta, eps), total
    return [
        _moved(tensor, spec) if spec is None or tensor.numel() == spec.numel else _or_zeros(None, spec)
        for tensor, spec in zip(result, out)
    ]


@operator("aclnnAddLayerNormGrad", "grad x1 x2 rstd mean gamma sum_grad >x_grad >gamma_grad >beta_grad")
def add_layer_norm_backward(grad, x1, x2, rstd, mean, gamma, sum_grad, out):
    x = upcast(x1) + upcast(x2)
    towards, towards_gamma, towards_beta = _layer_norm_backward(
        upcast(grad), x, tuple(gamma.shape), mean, rstd, gamma, gamma
    )
    towards = towards if sum_grad is None else towards + upcast(sum_grad)
    return [_moved(item, spec) for item, spec in zip((towards, towards_gamma, towards_beta), out)]


@operator("aclnnDeepNorm", "x gx beta gamma alpha:double eps:double >mean >rstd >y")
def deep_norm(x, gx, beta, gamma, alpha, eps, out):
    y, mean, rstd = numerics.layer_norm(alpha * upcast(x) + upcast(gx), tuple(range(-gamma.dim(), 0)), gamma, beta, eps)
    return [_moved(tensor, spec) for tensor, spec in zip((mean, rstd, y), out)]


@operator("aclnnDeepNormGrad", "grad x gx gamma mean rstd alpha:double >x_grad >gx_grad >beta_grad >gamma_grad")
def deep_norm_backward(grad, x, gx, gamma, mean, rstd, alpha, out):
    towards, towards_gamma, towards_beta = _layer_norm_backward(
        upcast(grad), alpha * upcast(x) + upcast(gx), tuple(gamma.shape), mean, rstd, gamma, gamma
    )
    return [_moved(item, spec) for item, spec in zip((alpha * towards, towards, towards_beta, towards_gamma), out)]


def _columns(value, like):
    """A number for each channel, shaped to go with (N, C, …)."""
    return None if value is None else upcast(value).reshape(-1, *[1] * (like.dim() - 2))


@operator(
    "aclnnBatchNorm",
    "self weight bias running_mean! running_var! training:bool momentum:double eps:double >y >mean >invstd",
)
def batch_norm(self, weight, bias, running_mean, running_var, training, momentum, eps, out):
    x = upcast(self)
    scale, shift, average, spread = [
        None if tensor is None else upcast(tensor).to(x.dtype).clone()
        for tensor in (weight, bias, running_mean, running_var)
    ]
    if training:
        y, mean, invstd = numerics.batch_norm(x, scale, shift, average, spread, momentum, eps)
    else:
        y, _, _ = torch.native_batch_norm(x, scale, shift, average, spread, training, momentum, eps)
        mean, invstd = average, 1.0 / torch.sqrt(spread + eps)
    result = zip(
        (average, spread, y, mean, invstd), out
    )  # torch_npu 2.9 leaves no room for the last two where nothing is trained
    return [
        torch.zeros(spec.shape, dtype=spec.dtype) if spec is not None and not spec.numel else _moved(item, spec)
        for item, spec in result
    ]


@operator(
    "aclnnBatchNormBackward",
    "grad self weight running_mean running_var mean invstd training:bool eps:double wanted:bools >self_grad "
    ">weight_grad >bias_grad",
)
def batch_norm_backward(grad, self, weight, running_mean, running_var, mean, invstd, training, eps, wanted, out):
    x = upcast(self)
    per_channel = [
        None if item is None else upcast(item).to(x.dtype) for item in (weight, running_mean, running_var, mean, invstd)
    ]
    result = torch.ops.aten.native_batch_norm_backward(upcast(grad).to(x.dtype), x, *per_channel, training, eps, wanted)
    return [_or_zeros(item, spec) for item, spec in zip(result, out)]


@operator("aclnnBatchNormElemt", "self weight bias mean invstd eps:double >y")
def batch_norm_elements(self, weight, bias, mean, invstd, eps, out):
    x = upcast(self)
    scale, shift, mean, invstd = [_columns(item, x) for item in (weight, bias, mean, invstd)]
    y = (x - mean) * invstd
    y = y if scale is None else y * scale
    return (y if shift is None else y + shift).to(out.dtype)


@operator("aclnnBatchNormElemtBackward", "grad self mean invstd weight sum_dy sum_dy_xmu count >self_grad")
def batch_norm_elements_backward(grad, self, mean, invstd, weight, sum_dy, sum_dy_xmu, count, out):
    grad, x, total = upcast(grad), upcast(self), upcast(count).sum()
    mean, invstd, scale, sum_dy, sum_dy_xmu = [_columns(item, x) for item in (mean, invstd, weight, sum_dy, sum_dy_xmu)]
    towards = (grad - sum_dy / total - (x - mean) * invstd.square() * sum_dy_xmu / total) * invstd
    return (towards if scale is None else towards * scale).to(out.dtype)


@operator("aclnnBatchNormStats", "self eps:double >mean >invstd")
def batch_norm_statistics(self, eps, out):
    x = upcast(self)
    spread, mean = torch.var_mean(x, all_but_channels(x), correction=0)
    return _moved(mean, out[0]), _moved(1.0 / torch.sqrt(spread + eps), out[1])


@operator("aclnnBatchNormReduce", "self >sum >square_sum")
def batch_norm_sums(self, out):
    x = upcast(self)
    return _moved(x.sum(all_but_channels(x)), out[0]), _moved(x.square().sum(all_but_channels(x)), out[1])


@operator(
    "aclnnBatchNormReduceBackward",
    "grad self mean invstd weight for_input:bool for_weight:bool for_bias:bool >sum_dy >sum_dy_xmu "
    ">weight_grad >bias_grad",
)
def batch_norm_sums_backward(grad, self, mean, invstd, weight, for_input, for_weight, for_bias, out):
    grad, x = upcast(grad), upcast(self)
    axes = all_but_channels(x)
    sum_dy, sum_dy_xmu = grad.sum(axes), (grad * (x - _columns(mean, x))).sum(axes)
    return [_moved(item, spec) for item, spec in zip((sum_dy, sum_dy_xmu, sum_dy_xmu * upcast(invstd), sum_dy), out)]


def _gathered(mean, spread, count, running_mean, running_var, momentum, eps, out):
    """What all devices found together, and the running statistics with it: those are updated by the unbiased
    variance.
    """
    updated = [
        None if old is None else (1 - momentum) * upcast(old) + momentum * new
        for old, new in ((running_mean, mean), (running_var, spread * count / (count - 1)))
    ]
    return [_moved(item, spec) for item, spec in zip((*updated, mean, 1.0 / torch.sqrt(spread + eps)), out)]


@operator(
    "aclnnBatchNormGatherStatsWithCounts",
    "self mean invstd running_mean! running_var! momentum:double eps:double counts >mean_all >invstd_all",
)
def batch_norm_gather(self, mean, invstd, running_mean, running_var, momentum, eps, counts, out):
    mean, invstd, counts = upcast(mean), upcast(invstd), upcast(counts).reshape(-1, 1)
    total = counts.sum()
    average = (mean * counts).sum(0) / total
    spread = ((1.0 / invstd.square() - eps + (mean - average).square()) * counts).sum(0) / total
    return _gathered(average, spread, total, running_mean, running_var, momentum, eps, out)


@operator(
    "aclnnSyncBatchNormGatherStats",
    "sums square_sums counts running_mean! running_var! momentum:float eps:float >mean >invstd",
)
def batch_norm_gather_sums(sums, square_sums, counts, running_mean, running_var, momentum, eps, out):
    total = upcast(counts).sum()
    mean = upcast(sums).sum(0) / total
    spread = upcast(square_sums).sum(0) / total - mean.square()
    return _gathered(mean, spread, total, running_mean, running_var, momentum, eps, out)


def _group_norm(self, weight, bias, groups, eps):
    x = upcast(self)
    weight, bias = [None if tensor is None else upcast(tensor).to(x.dtype).contiguous() for tensor in (weight, bias)]
    size = x.shape[2:].numel()
    return torch.native_group_norm(x.contiguous(), weight, bias, x.shape[0], x.shape[1], size, groups, eps)


@operator("aclnnGroupNorm", "self weight bias batch:int channels:int size:int groups:int eps:double >y >mean >rstd")
def group_norm(self, weight, bias, batch, channels, size, groups, eps, out):
    result = _group_norm(self.reshape(batch, channels, size), weight, bias, groups, eps)
    return [_moved(item, spec) for item, spec in zip(result, out)]


@operator(
    "aclnnGroupNormBackward",
    "grad self mean rstd weight batch:int channels:int size:int groups:int wanted:bools >self_grad "
    ">weight_grad >bias_grad",
)
def group_norm_backward(grad, self, mean, rstd, weight, batch, channels, size, groups, wanted, out):
    x = upcast(self).reshape(batch, channels, size).contiguous()
    grad, mean, rstd = [upcast(item).to(x.dtype).contiguous() for item in (grad.reshape(x.shape), mean, rstd)]
    weight = None if weight is None else upcast(weight).to(x.dtype)
    result = torch.ops.aten.native_group_norm_backward(
        grad, x, mean, rstd, weight, batch, channels, size, groups, wanted
    )
    return [_or_zeros(item, spec) for item, spec in zip(result, out)]


@operator("aclnnGroupNormSilu", "self weight bias groups:int eps:double >y >mean >rstd")
def group_norm_silu(self, weight, bias, groups, eps, out):
    y, mean, rstd = _group_norm(self, weight, bias, groups, eps)
    return [_moved(item, spec) for item, spec in zip((F.silu(y), mean, rstd), out)]


@operator(
    "aclnnGroupNormSwish", "self weight bias groups:int layout:str eps:double swish:bool scale:double >y >mean >rstd"
)
def group_norm_swish(self, weight, bias, groups, layout, eps, swish, scale, out):
    y, mean, rstd = _group_norm(self, weight, bias, groups, eps)
    return [_moved(item, spec) for item, spec in zip((y * torch.sigmoid(scale * y) if swish else y, mean, rstd), out)]


@operator(
    "aclnnGroupNormSwishGrad",
    "grad mean rstd self weight bias groups:int layout:str scale:double for_weight:bool for_bias:bool "
    ">self_grad >weight_grad >bias_grad",
)
def group_norm_swish_backward(grad, mean, rstd, self, weight, bias, groups, layout, scale, for_weight, for_bias, out):
    batch, channels, size = *self.shape[:2], self.shape[2:].numel()
    x = upcast(self).reshape(batch, groups, -1)
    normal = (x - upcast(mean).reshape(batch, groups, 1)) * upcast(rstd).reshape(batch, groups, 1)
    normal = normal.reshape(batch, channels, size)
    y = normal * _columns(weight, normal) + _columns(bias, normal)
    gate = torch.sigmoid(scale * y)
    inner = upcast(grad).reshape(y.shape) * gate * (1 + scale * y * (1 - gate))
    return group_norm_backward(
        inner, self, mean, rstd, weight, batch, channels, size, groups, (True, for_weight, for_bias), out
    )


@operator("aclnnNorm", "self order:scalar dims:ints keep:bool >out")
def norm(self, order, dims, keep, out):
    return torch.linalg.vector_norm(upcast(self), order, tuple(dims) or None, keep).to(out.dtype)


@operator("aclnnRenorm", "self order:scalar dim:int limit:scalar >out")
def renorm(self, order, dim, limit, out):
    x = upcast(self)
    if order > 0:
        return torch.renorm(x, order, dim, limit).to(out.dtype)
    size = torch.linalg.vector_norm(x, order, [axis for axis in range(x.dim()) if axis != dim % x.dim()], True)
    return torch.where(size > limit, x * (limit / (size + 1e-7)), x).to(out.dtype)


@operator("aclnnInplaceRenorm", "self! order:scalar dim:int limit:scalar")
def inplace_renorm(self, order, dim, limit, out):
    return renorm(self, order, dim, limit, out)


@operator("aclnnEmbeddingRenorm", "self! indices limit:double order:double")
def embedding_renorm(self, indices, limit, order, out):
    return torch.embedding_renorm_(upcast(self).clone(), indices.long(), limit, order).to(out.dtype)


@operator("aclnnSoftmax", "self dim:int >out")
def softmax(self, dim, out):
    return F.softmax(upcast(self), dim).to(out.dtype)


@operator("aclnnLogSoftmax", "self dim:int >out")
def log_softmax(self, dim, out):
    return F.log_softmax(upcast(self), dim).to(out.dtype)
